"""Which parameters of a model have a row for each token of its vocabulary, and what each is for.

No architecture is known by name. A checkpoint is loaded into what the configuration builds, so the tensors of the
vocabulary are found by building the model with a larger one, on the meta device (`rebuilding`). Where that fails
(the model was changed by hand, or its constructor computes with values), its own `resize_token_embeddings` is run
on a copy on the meta device (`resizing`). Either way only names and sizes are taken from it: the tables of the live
model grow in place (`growth`), so ties, hooks and modules stay what they are, and a head that a checkpoint brought
untied stays untied whatever the config says.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from ..errors import PartialEmbeddingError
from ..modules.digest import digests_through
from ..modules.rows import PartialModule
from ..modules.sharding import is_dtensor, is_sharded, part_of, sharded_row_digests, whole, whole_rows, write_rows
from .rebuilding import DifferentVocabularies, resizing_by_building, unread_tables
from .resizing import resizing_by_itself
from .storage import is_quantized, logical_shape, offloaded_value, plain_value, tensor_of
from .structure import Resizing, input_weight, named_counts, named_tensors, try_call

__all__ = ["Table", "VocabularyLayout", "find_layout", "model_name", "row_keys"]


@dataclass(eq=False)
class Table:
    """A tensor of a model with one row for each token of its vocabulary.

    Attributes:
        name: the first name under which the model has it.
        holders: every module that has it as a parameter or buffer, with the attribute's name; more
            than one where it is tied.
        dim: the dimension of the vocabulary.
        role: `"input"` (what `get_input_embeddings()` holds), `"output"` (the head's weight, where it is
            not the input's), `"bias"` (a vector over the vocabulary), `"extra"` (any further parameter),
            `"lookup"` (integers that are looked up by token and have nothing to train), `"inert"` (grows,
            but is not trained: a buffer, or a parameter that no forward reads).
        size: number of rows at present.
        grown_size: number of rows for the vocabulary that was asked for.
        tail: how many of its rows come after those of the vocabulary; they stay the last ones when it grows.
    """

    name: str
    holders: list[tuple[nn.Module, str]]
    dim: int
    role: str
    size: int
    grown_size: int
    tail: int = 0

    @property
    def tensor(self) -> Any:
        """The parameter or buffer itself."""
        return tensor_of(*self.holders[0])

    def holds(self, tensor: Any) -> bool:
        """Whether `tensor` is this table, the same object."""
        return any(tensor is tensor_of(*holder) for holder in self.holders)

    @property
    def has_rows(self) -> bool:
        """Whether it has rows to train."""
        return self.role not in ("lookup", "inert")

    @property
    def is_parameter(self) -> bool:
        """Whether it is a parameter; else it is a buffer."""
        module, attribute = self.holders[0]
        return attribute in module._parameters

    @property
    def shape(self) -> tuple[int, ...]:
        """Its unsharded shape at present."""
        module, attribute = self.holders[0]
        source = module._row_sources.get(attribute) if isinstance(module, PartialModule) else None
        return tuple(self.tensor.shape) if source is None else source.shape

    @property
    def row_shape(self) -> tuple[int, ...]:
        """The shape of one row, dequantised where the table is quantised."""
        shape = self.shape if self.sharded else logical_shape(*self.holders[0])
        return shape[: self.dim] + shape[self.dim + 1 :]

    @property
    def sharded(self) -> bool:
        """Whether this process holds only a part of it now; then every process has to call `values`, `rows`, ..."""
        return is_sharded(self.tensor, self.shape)

    def values(self) -> Tensor:
        """The table as an ordinary tensor, not to be changed; a copy where it is quantised, offloaded or sharded."""
        return whole(self.tensor, self.shape) if self.sharded else plain_value(*self.holders[0])

    def rows(self, ids: list[int]) -> Tensor:
        """Copies of rows, `[K, ...]`."""
        if self.sharded:
            return whole_rows(self.tensor, self.shape, ids, self.dim)
        values = self.values()
        return whole_rows(values, values.shape, ids, self.dim)

    def write(self, ids: list[int], rows: Tensor) -> None:
        """Write rows, `[K, ...]`, into it."""
        write_rows(self.tensor, self.shape, ids, rows, self.dim)

    def digests(self, through: Sequence[torch.dtype] = ()) -> Tensor:
        """`row_digests` of the whole table."""
        return self.digests_through([through])[0]

    def digests_through(self, ways: Sequence[Sequence[torch.dtype]]) -> list[Tensor]:
        """`row_digests` of the whole table for several `through`, in one pass over it."""
        if self.sharded and self.dim == 0:
            return [sharded_row_digests(self.tensor, self.shape, way) for way in ways]
        return digests_through(self.values(), ways, self.dim)

    @property
    def dtype(self) -> torch.dtype:
        """The dtype of its values, dequantised where it is quantised."""
        dtype: torch.dtype = self.tensor.dtype
        return dtype if dtype.is_floating_point else self.values().dtype


@dataclass(eq=False)
class VocabularyLayout:
    """All tensors and integers of a model that depend on the size of its vocabulary.

    Attributes:
        tables: the parameters and buffers, the input embeddings first.
        counts: the integers, of modules (`num_embeddings`, `out_features`) and configs (`vocab_size`):
            `(object, attribute, value at the size asked for)`.
        tied: whether the head has the input embeddings' weight.
        has_head: whether the model has a head over the vocabulary.
        reach: ids below it have a row once the tables are grown.
    """

    tables: list[Table]
    counts: list[tuple[Any, str, int]] = field(default_factory=list)
    tied: bool = False
    has_head: bool = False
    reach: int = 0

    def table(self, role: str) -> Table | None:
        """The first table of a role."""
        return next((table for table in self.tables if table.role == role), None)


def find_layout(model: nn.Module, size: int | None = None) -> VocabularyLayout:
    """Find the tables over a model's vocabulary.

    Args:
        model: a `transformers` model, or a wrapper that passes its attributes through.
        size: the size that the vocabulary is to have, if that is more than it has.

    Returns:
        `VocabularyLayout`: what is there, and the sizes to grow to. The model has not changed.

    Raises:
        `PartialEmbeddingError`: the model has no input embeddings, or none that can be found; its vocabulary cannot
            grow; it is on the meta device, tensor parallel, held by ZeRO-3, or sharded and would have to grow.
    """
    _check_parallel(model)
    resizing = _plan_growth(model, size or 0)
    live = dict(named_tensors(model))
    keys = _keys(model, live)
    names: dict[int, list[str]] = {}
    for name in live:
        names.setdefault(keys[name], []).append(name)
    tables: dict[int, Table] = {}
    for name, (dim, old, new) in resizing.tensors.items():
        if name in live and keys[name] not in tables:
            holders = {(id(live[other][0]), live[other][1]): live[other] for other in names[keys[name]]}
            tables[keys[name]] = Table(
                name,
                list(holders.values()),
                dim,
                role="",
                size=old,
                grown_size=new,
                tail=resizing.tails.get(name, 0),
            )
    found = list(tables.values())
    head = _give_roles(model, {table: names[keys[table.name]] for table in found})
    found.sort(key=lambda table: _ROLES.index(table.role))
    if not found or found[0].role != "input":
        raise PartialEmbeddingError(
            f"{type(model).__name__}: what grows with its vocabulary is {[table.name for table in found]}, and none "
            "of it is a table of token embeddings. Pass the part of the model that has one."
        )
    for table in found:
        _check_storage(model, table)
    _check_softmax(model, found)
    live_counts = dict(named_counts(model))
    counts = [
        (live_counts[name][0], live_counts[name][1], new)
        for name, (old, new) in resizing.counts.items()
        if name in live_counts and live_counts[name][2] == old
    ]
    for table in found:  # modules that share a weight, of which transformers resizes one
        for module, _ in table.holders:
            for attribute in ("num_embeddings", "out_features"):
                if getattr(module, attribute, None) == table.size and table.dim == 0:
                    counts.append((module, attribute, table.grown_size))
    rows = [table.grown_size - table.tail for table in found if table.role in ("input", "output")]
    return VocabularyLayout(
        tables=found, counts=counts, tied=head is found[0], has_head=head is not None, reach=min(rows)
    )


def _plan_growth(model: Any, size: int) -> Resizing:
    """Find out what has to change in a model for its vocabulary to have `size` rows.

    Args:
        model: a `transformers` model, or a wrapper that passes its attributes through.
        size: ids below it are to have a row, in the input embeddings and in the head. Where they have one already,
            what belongs to the vocabulary is found all the same.

    Raises:
        `PartialEmbeddingError`: both ways fail; the message has the error of each.
    """
    if not hasattr(model, "config") and try_call(model, "get_input_embeddings") is None:
        raise PartialEmbeddingError(
            f"{type(model).__name__} has no input embeddings to add rows to: it has no configuration, and no "
            "get_input_embeddings(). Pass a transformers model; for a network of your own there is SplitEmbedding."
        )
    reasons = []
    for plan in (resizing_by_building, resizing_by_itself):
        try:
            return plan(model, size)
        except DifferentVocabularies:
            raise
        except Exception as error:  # noqa: BLE001  # a third-party constructor may raise anything
            kind = "" if isinstance(error, PartialEmbeddingError) else f"{type(error).__name__}: "
            reasons.append(f"{kind}{error}".rstrip("."))
    raise PartialEmbeddingError(
        f"{type(model).__name__} cannot grow its vocabulary to {size} rows. Built from its configuration: "
        f"{reasons[0]}. By its own resize_token_embeddings: {reasons[1]}. Pass the part of the model that has the "
        "token embeddings, if there is one."
    )


def _keys(model: Any, live: dict[str, tuple[nn.Module, str]]) -> dict[str, int]:
    """A key for each parameter and buffer, by name, which is equal for two names of one tensor.

    The key is the tensor's identity. Where accelerate has offloaded the values, each module has a meta tensor of
    its own, and `all_tied_weights_keys` says which are tied.
    """
    tensors = {name: tensor_of(*holder) for name, holder in live.items()}
    keys = {name: id(tensor) for name, tensor in tensors.items()}
    for target, source in (getattr(model, "all_tied_weights_keys", None) or {}).items():
        if target in tensors and source in tensors and all(tensors[name].is_meta for name in (target, source)):
            keys[target] = keys[source]
    return keys


_ROLES = ["input", "output", "extra", "bias", "lookup", "inert"]


def _give_roles(model: Any, tables: dict[Table, list[str]]) -> Table | None:
    """Set the role of each table, given with all of its names; returns the head's table, if there is one."""
    vectors = [table for table in tables if table.is_parameter and table.tensor.dim() > 1]
    embeddings = [table for table in vectors if not _is_linear(table)]
    unread: set[str] = set()
    if len(embeddings) > 1:
        # An untied encoder-decoder may have, beside the tables of its two parts, a shared one that only a tied model
        # reads.
        unread = unread_tables(model, [name for table in embeddings for name in tables[table]])
        embeddings = [table for table in embeddings if not unread.issuperset(tables[table])]
    inputs = [input_weight(part) for part in (model, try_call(model, "get_encoder")) if part is not None]
    named = [table for weight in inputs for table in embeddings if table.holds(weight)]
    input_table = next(iter([*named, *embeddings]), None)
    head = try_call(model, "get_output_embeddings")
    weight = getattr(head, "_parameters", {}).get("weight")
    head_table = next((table for table in vectors if table.holds(weight)), None)
    if head_table is None:  # a model that does not say which its head is
        head_table = next((table for table in vectors if _is_linear(table)), None)
    for table in tables:
        module, attribute = table.holders[0]
        if not table.is_parameter:
            table.role = "inert" if table.tensor.is_floating_point() or table.tensor.dim() < 2 else "lookup"
        elif table is input_table:
            table.role = "input"
        elif _is_unread_bias(module, attribute, head) or unread.issuperset(tables[table]):
            table.role = "inert"
        elif table.tensor.dim() == 1:
            table.role = "bias"
        else:
            table.role = "output" if table is head_table else "extra"
    return head_table


def _is_linear(table: Table) -> bool:
    return all(isinstance(module, nn.Linear) for module, _ in table.holders)


def _is_unread_bias(module: nn.Module, attribute: str, head: Any) -> bool:
    """Whether a parameter of a module around the head duplicates the head's own bias.

    BERT and its family register the bias twice, tied. With an untied head nothing reads the outer one; if it
    trained, it would have no gradient, for which DDP raises an error.
    """
    own = getattr(head, "_parameters", {}).get("bias")
    tensor = module._parameters[attribute]
    inside = head is not module and any(child is head for child in module.modules())
    return inside and own is not None and tensor is not own and tensor is not None and tensor.shape == own.shape


def _check_softmax(model: nn.Module, tables: list[Table]) -> None:
    holders = {id(module) for table in tables for module, _ in table.holders}
    for name, module in model.named_modules():
        if isinstance(module, nn.AdaptiveLogSoftmaxWithLoss) and any(id(part) in holders for part in module.modules()):
            raise PartialEmbeddingError(
                f"{type(model).__name__}'s {name} is an adaptive softmax: it sorts tokens into clusters by their "
                "frequency, which new tokens have none of, and gives probabilities, which would all change. Load the "
                "model with an ordinary head."
            )


def _check_parallel(model: Any) -> None:
    """Refuse tensor parallelism, where a shard of a layer does not see all rows, and models loaded under ZeRO-3."""
    size = getattr(model, "_tp_size", None)
    if isinstance(size, int) and size > 1:
        raise PartialEmbeddingError(
            f"{type(model).__name__} is split over {size} devices by tensor parallelism (tp_plan), under which rows "
            "cannot train. Load it without tp_plan, and shard it with FSDP (DistributedConfig(fsdp_size=...))."
        )
    if any(hasattr(parameter, "ds_id") for parameter in model.parameters()):
        raise PartialEmbeddingError(
            f"{type(model).__name__} is held by DeepSpeed ZeRO-3, which has sharded it: rows cannot be added now. "
            "Load the model and add the tokens before TrainingArguments(deepspeed=...) or HfDeepSpeedConfig is made."
        )


def _check_storage(model: nn.Module, table: Table) -> None:
    tensor = table.tensor
    module, attribute = table.holders[0]
    where = f"{type(model).__name__}'s {table.name}"
    if tensor.is_meta and offloaded_value(module, attribute) is None:
        raise PartialEmbeddingError(
            f"{where} has no values here: it is on the meta device, and accelerate has none of it either. Load the "
            "model's weights before tokens are added."
        )
    if is_dtensor(tensor):
        part_of(tensor, table.shape)  # refuses what is not sharded by rows
        if table.grown_size > table.size or table.dim:
            raise PartialEmbeddingError(
                f"{where} is sharded already, and has {table.size} rows, where {table.grown_size} are needed: a "
                "sharded table cannot grow. Add the tokens before the model is sharded. Where it is sharded at "
                "loading (DistributedConfig), load it whole once, add_tokens, save model and tokenizer, load that "
                "sharded, and call train_tokens with the same tokens."
            )
        return
    if type(tensor) is not (nn.Parameter if table.is_parameter else Tensor) and not is_quantized(tensor):
        raise PartialEmbeddingError(
            f"{where} is a {type(tensor).__name__}, a class that is not known here: rows cannot be added to it."
        )


def row_keys(layout: VocabularyLayout) -> dict[str, Table]:
    """The tables that have rows, by the name under which a row file has these."""
    names = {"input": "input_rows", "output": "output_rows", "bias": "output_bias"}
    keys: dict[str, Table] = {}
    for table in layout.tables:
        if table.has_rows:
            key = names.get(table.role)
            keys[f"extra.{table.name}" if key is None or key in keys else key] = table
    return keys


def model_name(model: Any) -> str | None:
    """The base model's name on the Hub, or that of its folder: a full path means nothing on another machine."""
    name = getattr(getattr(model, "config", None), "_name_or_path", None)
    if name and (os.path.isabs(name) or Path(name).exists()):
        return Path(name).name or None
    return name or None
