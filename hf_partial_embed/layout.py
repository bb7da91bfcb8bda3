"""Where a model has its vocabulary: which parameters have a row for each token, and how they grow.

Nothing here knows a model by its name. `transformers` knows how the vocabulary of each architecture
grows, so its own `resize_token_embeddings` is run on a skeleton of the model (a copy without storage,
milliseconds at any size), and what has grown there is what the vocabulary is made of. Only that answer
is used: the tables of the live model grow in place, so ties, hooks and modules stay what they are, and
a head that a checkpoint brought untied stays untied whatever the config says.
"""

from __future__ import annotations

import copy
import inspect
import logging
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves

from .errors import PartialEmbeddingError

__all__ = ["REGISTRY", "Growth", "Table", "VocabularyLayout", "find_layout"]


# The attribute of a model under which its row sets are kept; a skeleton goes without them.
REGISTRY = "_partial_embeddings"


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
            `"inert"` (grows, but has nothing to train: a buffer, or a parameter that no forward reads).
        size: number of rows at present.
        grown_size: number of rows in the vocabulary that was asked for.
    """

    name: str
    holders: list[tuple[nn.Module, str]]
    dim: int
    role: str
    size: int
    grown_size: int

    @property
    def tensor(self) -> Any:
        """The parameter or buffer itself."""
        module, attribute = self.holders[0]
        return {**module._buffers, **module._parameters}[attribute]

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
    embeddings = _call(model, "get_input_embeddings")
    weight = getattr(embeddings, "weight", None)
    if not isinstance(weight, Tensor) or weight.dim() != 2:
        raise PartialEmbeddingError(
            f"{type(model).__name__} has no input embeddings to add rows to: get_input_embeddings() gave "
            f"{type(embeddings).__name__}. Pass the model, or the part of it, that has a table of token "
            "embeddings."
        )
    present = weight.shape[0]
    asked = max(size or 0, present + 1)
    try:
        skeleton = _skeleton(model)
        before = _shapes(skeleton)
        counts_before = dict(_counts(skeleton))
        _resize_skeleton(skeleton, asked)
    except Exception as error:
        raise PartialEmbeddingError(
            f"{type(model).__name__} cannot grow its vocabulary from {present} to {asked} rows: its "
            f"resize_token_embeddings says {type(error).__name__}: {error}"
        ) from error
    after = _shapes(skeleton)

    heads = _call(model, "get_output_embeddings")
    head_weight = getattr(heads, "_parameters", {}).get("weight")
    live = dict(_named_tensors(model))
    tables: dict[int, Table] = {}
    for name, shape in after.items():
        old = before.get(name)
        if name not in live or old is None or old == shape or len(old) != len(shape):
            continue
        module, attribute = live[name]
        is_buffer = attribute not in module._parameters
        tensor = module._buffers[attribute] if is_buffer else module._parameters[attribute]
        assert tensor is not None
        if id(tensor) in tables:
            continue
        dim = next(dim for dim, (a, b) in enumerate(zip(old, shape, strict=True)) if a != b)
        if is_buffer or _is_unread_bias(module, attribute, heads):
            role = "inert"
        elif tensor is getattr(embeddings, "_parameters", {}).get("weight"):
            role = "input"
        elif tensor.dim() == 1:
            role = "bias"
        elif tensor is head_weight:
            role = "output"
        else:
            role = "extra"
        holders = [holder for holder in _holders(model) if holder[2] is tensor]
        tables[id(tensor)] = Table(
            name=name,
            holders=[(module, attribute) for module, attribute, _ in holders],
            dim=dim,
            role=role,
            size=old[dim],
            grown_size=shape[dim] if asked == size else old[dim],
        )
    found = sorted(tables.values(), key=lambda table: _ROLES.index(table.role))
    if not found or found[0].role != "input":
        raise PartialEmbeddingError(
            f"{type(model).__name__}: its {type(embeddings).__name__} of {present} rows did not grow with the "
            f"vocabulary; what grew was {[table.name for table in found]}."
        )
    for table in found:
        _check_storage(model, table)
        if table.role != "inert" and table.grown_size < (size or 0):
            raise PartialEmbeddingError(
                f"{type(model).__name__} cannot take ids up to {(size or 0) - 1}: its {table.name} has {table.size} "
                f"rows and its input embeddings {present}, and its resize_token_embeddings does not grow one without "
                "the other."
            )
    live_counts = dict(_counts(model))
    counts = []
    for key, (_, attribute, value) in _counts(skeleton):
        if key in counts_before and key in live_counts and counts_before[key][2] != value:
            counts.append((live_counts[key][0], attribute, value))
    for table in found:  # modules that share a weight, of which transformers resizes one
        for module, _ in table.holders:
            for attribute in ("num_embeddings", "out_features"):
                if getattr(module, attribute, None) == table.size and table.dim == 0:
                    counts.append((module, attribute, table.grown_size))
    return VocabularyLayout(
        tables=found,
        counts=counts,
        tied=head_weight is found[0].tensor,
        has_head=any(head_weight is table.tensor for table in found),
        reach=min(table.grown_size for table in found),
    )


_ROLES = ["input", "output", "extra", "bias", "inert"]


def _is_unread_bias(module: nn.Module, attribute: str, head: Any) -> bool:
    """Whether a parameter of a module around the head is a second bias, which the head has of its own.

    BERT and its family keep the bias twice, tied. With an untied head the outer one is read by nobody: as
    a trainable parameter without a gradient it would stop distributed training.
    """
    own = getattr(head, "_parameters", {}).get("bias")
    tensor = module._parameters[attribute]
    inside = head is not module and any(child is head for child in module.modules())
    return inside and own is not None and tensor is not own and tensor is not None and tensor.shape == own.shape


class Growth:
    """Tables that were grown in place, and how to take it back.

    A parameter stays the same object, so whatever is tied to it grows with it, and an old row keeps
    every bit. New rows are zero. Each table is copied once.
    """

    def __init__(self, layout: VocabularyLayout) -> None:
        self._tables: list[tuple[Table, Tensor | None]] = []
        self._counts: list[tuple[Any, str, int]] = []
        growing = [table for table in layout.tables if table.grown_size > table.size]
        try:
            for table in growing:
                self._tables.append((table, table.tensor.grad))
                self._resize(table)
            for owner, attribute, value in layout.counts if growing else []:
                self._counts.append((owner, attribute, getattr(owner, attribute)))
                setattr(owner, attribute, value)
        except BaseException:
            self.undo()
            raise

    @staticmethod
    def _resize(table: Table) -> None:
        tensor, dim, old, new = table.tensor, table.dim, table.size, table.grown_size
        shape = list(tensor.shape)
        shape[dim] = new
        grown = torch.empty(shape, dtype=tensor.dtype, device=tensor.device)
        grown.narrow(dim, 0, old).copy_(tensor.detach())
        grown.narrow(dim, old, new - old).zero_()
        tensor.grad = None
        tensor.data = grown

    def undo(self) -> None:
        """Give the tables their old size and bits, and the counts their old values."""
        for owner, attribute, value in reversed(self._counts):
            setattr(owner, attribute, value)
        for table, gradient in reversed(self._tables):
            tensor = table.tensor
            if tensor.shape[table.dim] != table.size:
                tensor.grad = None
                tensor.data = tensor.detach().narrow(table.dim, 0, table.size).clone()
            tensor.grad = gradient
        self._counts, self._tables = [], []


def _call(model: nn.Module, name: str) -> Any:
    try:
        return getattr(model, name)()
    except (AttributeError, NotImplementedError, TypeError):
        return None


def _skeleton(model: nn.Module) -> Any:
    """A copy of the model without storage: ties, configs and classes as they are, all on `meta`."""
    memo: dict[int, Any] = {}
    for _, _, tensor in _holders(model):
        empty = torch.empty(tensor.shape, dtype=tensor.dtype, device="meta")
        is_parameter = isinstance(tensor, nn.Parameter)
        memo[id(tensor)] = nn.Parameter(empty, requires_grad=tensor.requires_grad) if is_parameter else empty
    for module in model.modules():
        for value in module.__dict__.values():  # states that a module has kept from its last forward
            for leaf in tree_leaves(value) if isinstance(value, (Tensor, list, tuple, dict)) else ():
                if isinstance(leaf, Tensor) and id(leaf) not in memo:
                    memo[id(leaf)] = torch.empty(leaf.shape, dtype=leaf.dtype, device="meta")
        for attachment in module.__dict__.get(REGISTRY, ()):
            memo[id(attachment)] = None
    skeleton = copy.deepcopy(model, memo)
    for module in skeleton.modules():
        module.__dict__.pop("resize_token_embeddings", None)
    return skeleton


def _resize_skeleton(skeleton: Any, size: int) -> None:
    """Let `transformers` resize the skeleton; no values are computed, and nothing is said of any."""
    for module in skeleton.modules():
        for name in dir(type(module)):
            if name.startswith("_init_added_") or name == "_init_weights":
                module.__dict__[name] = _compute_nothing
    known = inspect.signature(skeleton.resize_token_embeddings).parameters
    options = {"mean_resizing": False} if "mean_resizing" in known else {}
    speaker = logging.getLogger("transformers.modeling_utils")
    disabled, speaker.disabled = speaker.disabled, True
    try:
        skeleton.resize_token_embeddings(size, **options)
    finally:
        speaker.disabled = disabled


def _compute_nothing(*args: object, **kwargs: object) -> None:
    """Stands for the initialisation of a skeleton's new rows, which have no values."""


def _holders(model: nn.Module) -> Iterator[tuple[nn.Module, str, Tensor]]:
    for module in model.modules():
        for members in (module._parameters, module._buffers):
            for attribute, tensor in members.items():
                if tensor is not None:
                    yield module, attribute, tensor


def _named_tensors(model: nn.Module) -> Iterator[tuple[str, tuple[nn.Module, str]]]:
    for prefix, module in model.named_modules(remove_duplicate=False):
        for attribute in (*module._parameters, *module._buffers):
            yield f"{prefix}.{attribute}" if prefix else attribute, (module, attribute)


def _shapes(model: nn.Module) -> dict[str, tuple[int, ...]]:
    shapes = {}
    for name, (module, attribute) in _named_tensors(model):
        tensor = {**module._parameters, **module._buffers}[attribute]
        if tensor is not None:
            shapes[name] = tuple(tensor.shape)
    return shapes


def _counts(model: nn.Module) -> Iterator[tuple[str, tuple[Any, str, int]]]:
    """Every integer attribute of the modules and of the configs that they carry, by a stable name."""
    seen: set[int] = set()
    for prefix, module in model.named_modules():
        for attribute, value in module.__dict__.items():
            if type(value) is int:
                yield f"{prefix}:{attribute}", (module, attribute, value)
            elif hasattr(value, "to_diff_dict"):
                yield from _config_counts(value, f"{prefix}:{attribute}", seen)


def _config_counts(config: Any, path: str, seen: set[int]) -> Iterator[tuple[str, tuple[Any, str, int]]]:
    if id(config) in seen:
        return
    seen.add(id(config))
    for attribute, value in vars(config).items():
        if type(value) is int:
            yield f"{path}.{attribute}", (config, attribute, value)
        elif hasattr(value, "to_diff_dict"):
            yield from _config_counts(value, f"{path}.{attribute}", seen)


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
