"""Where a model has its vocabulary: which parameters have a row for each token, and what each is for.

What belongs to the vocabulary is found on copies without storage (`skeleton`). Only that answer is used:
the tables of the live model grow in place (`growth`), so ties, hooks and modules stay what they are, and
a head that a checkpoint brought untied stays untied whatever the config says.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from .errors import PartialEmbeddingError
from .skeleton import input_weight, named_counts, named_tensors, plan_growth, try_call

__all__ = ["Table", "VocabularyLayout", "find_layout"]


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
            but nothing of it is trained: a buffer, or a parameter that no forward reads).
        size: number of rows at present.
        grown_size: number of rows in the vocabulary that was asked for.
        tail: how many of its rows are behind the vocabulary; they keep their distance from its end.
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
        module, attribute = self.holders[0]
        return {**module._buffers, **module._parameters}[attribute]

    @property
    def has_rows(self) -> bool:
        """Whether it has rows to train."""
        return self.role not in ("lookup", "inert")

    @property
    def is_parameter(self) -> bool:
        """Whether it is a parameter; else it is a buffer."""
        module, attribute = self.holders[0]
        return attribute in module._parameters

    def rows(self, ids: list[int]) -> Tensor:
        """Copies of rows, `[K, ...]`."""
        index = torch.tensor(ids, device=self.tensor.device, dtype=torch.int64)
        rows: Tensor = self.tensor.detach().index_select(self.dim, index).movedim(self.dim, 0)
        return rows


@dataclass(eq=False)
class VocabularyLayout:
    """All that has to do with the size of a model's vocabulary.

    Attributes:
        tables: the parameters and buffers, the input embeddings' first.
        counts: integers that follow the size: `(object, attribute, value at the size asked for)`, of
            modules (`num_embeddings`, `out_features`) and configs (`vocab_size`).
        tied: whether the head has the input embeddings' weight.
        has_head: whether the model has a head over the vocabulary.
        reach: ids below this have a row, once the tables are grown.
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

    Raises:
        `PartialEmbeddingError`: the model has no input embeddings, or none that can be found; it is
            sharded or on the meta device. Nothing has changed.
    """
    resizing = plan_growth(model, size or 0)
    live = dict(named_tensors(model))
    tables: dict[int, Table] = {}
    for name, (dim, old, new) in resizing.tensors.items():
        if name not in live:
            continue
        module, attribute = live[name]
        tensor = {**module._buffers, **module._parameters}[attribute]
        if id(tensor) not in tables:
            holders = [(m, a) for m, a in _distinct(live.values()) if {**m._buffers, **m._parameters}[a] is tensor]
            tail = resizing.tails.get(name, 0)
            tables[id(tensor)] = Table(name, holders, dim, role="", size=old, grown_size=new, tail=tail)
    found = list(tables.values())
    head = _give_roles(model, found)
    found.sort(key=lambda table: _ROLES.index(table.role))
    if not found or found[0].role != "input":
        raise PartialEmbeddingError(
            f"{type(model).__name__}: what grows with its vocabulary is {[table.name for table in found]}, and none "
            "of it is a table of token embeddings. Pass the part of the model that has one."
        )
    for table in found:
        _check_storage(model, table)
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
        tables=found,
        counts=counts,
        tied=head is not None and head is found[0].tensor,
        has_head=any(head is table.tensor for table in found),
        reach=min(rows),
    )


_ROLES = ["input", "output", "extra", "bias", "lookup", "inert"]


def _give_roles(model: Any, tables: list[Table]) -> Any:
    """Say of each table what it is for; returns the weight of the head over the vocabulary, if there is one."""
    head = try_call(model, "get_output_embeddings")
    weight = getattr(head, "_parameters", {}).get("weight")
    embeddings = input_weight(model)
    unread = _unread_tables(model, tables)
    vectors = [table for table in tables if table.is_parameter and table.tensor.dim() > 1 and table not in unread]
    if any(table.tensor is embeddings for table in unread):
        embeddings = input_weight(model.get_encoder())
    elif not any(table.tensor is embeddings for table in vectors):
        embeddings = next((table.tensor for table in vectors if not _is_linear(table)), None)
    if not any(table.tensor is weight for table in vectors):
        weight = next((table.tensor for table in vectors if _is_linear(table)), None)
    for table in tables:
        module, attribute = table.holders[0]
        if not table.is_parameter:
            table.role = "inert" if table.tensor.is_floating_point() or table.tensor.dim() < 2 else "lookup"
        elif table.tensor is embeddings:
            table.role = "input"
        elif _is_unread_bias(module, attribute, head) or table in unread:
            table.role = "inert"
        elif table.tensor.dim() == 1:
            table.role = "bias"
        else:
            table.role = "output" if table.tensor is weight else "extra"
    return weight


def _is_linear(table: Table) -> bool:
    return all(isinstance(module, nn.Linear) for module, _ in table.holders)


def _unread_tables(model: nn.Module, tables: list[Table]) -> list[Table]:
    """The table that the parts of a tied encoder-decoder share, in an untied one, whose parts have their own.

    As a trainable parameter without a gradient it would stop distributed training.
    """
    encoder = try_call(model, "get_encoder")
    if not isinstance(encoder, nn.Module) or encoder is model:
        return []
    embeddings = [table for table in tables if all(isinstance(module, nn.Embedding) for module, _ in table.holders)]
    own = next((table for table in embeddings if table.tensor is input_weight(encoder)), None)
    if own is None:
        return []
    return [
        table
        for table in embeddings
        if table is not own and table.tensor.shape == own.tensor.shape and _shares(model, table, encoder)
    ]


def _shares(model: nn.Module, table: Table, encoder: nn.Module) -> bool:
    """Whether a table stands beside an encoder, where one that it shares would stand."""
    parents = [module for module in model.modules() if any(child is encoder for child in module.children())]
    return any(module is child for module, _ in table.holders for parent in parents for child in parent.children())


def _distinct(holders: Any) -> list[tuple[nn.Module, str]]:
    return list({(id(module), attribute): (module, attribute) for module, attribute in holders}.values())


def _is_unread_bias(module: nn.Module, attribute: str, head: Any) -> bool:
    """Whether a parameter of a module around the head is a second bias, which the head has of its own.

    BERT and its family keep the bias twice, tied. With an untied head the outer one is read by nobody: as
    a trainable parameter without a gradient it would stop distributed training.
    """
    own = getattr(head, "_parameters", {}).get("bias")
    tensor = module._parameters[attribute]
    inside = head is not module and any(child is head for child in module.modules())
    return inside and own is not None and tensor is not own and tensor is not None and tensor.shape == own.shape


def _check_storage(model: nn.Module, table: Table) -> None:
    tensor = table.tensor
    where = f"{type(model).__name__}'s {table.name}"
    if tensor.is_meta:
        raise PartialEmbeddingError(
            f"{where} has no values here: it is on the meta device (offloaded, or not loaded yet). Add the "
            "tokens before the model is offloaded."
        )
    if type(tensor) is not (nn.Parameter if table.is_parameter else Tensor):
        raise PartialEmbeddingError(
            f"{where} is a {type(tensor).__name__}, sharded or quantised: rows cannot be added to it. Add the "
            "tokens before the model is sharded, and leave embeddings and head out of the quantisation."
        )
    if tensor.numel() == 0:
        raise PartialEmbeddingError(
            f"{where} has no values here: another engine (DeepSpeed ZeRO-3) holds them. Add the tokens before "
            "the model is sharded."
        )
