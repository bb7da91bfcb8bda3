"""Embeddings and heads of which some rows train and all others stay frozen, in plain PyTorch.

The forward reads the trainable rows from the parameter `new_rows.weight`, `[K, dim]`, and all others from
the frozen table. Nothing of the table's size is allocated, and the optimizer, gradient clipping and
gradient norms see `K` rows only.
"""

from __future__ import annotations

import operator
from collections.abc import Iterable, Sequence
from itertools import pairwise
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .errors import PartialEmbeddingError, shorten
from .rows import ForwardScope, NewRows, PartialModule, RowIndex, RowSource, TableProperty, apply

__all__ = [
    "HeadOperands",
    "SplitEmbedding",
    "SplitLinear",
    "check_ids",
    "head_gradient",
    "head_logits",
    "next_row_name",
    "row_columns",
    "split_class",
    "split_module",
    "unsplit_module",
]


class SplitEmbedding(PartialModule, nn.Embedding):
    """An `nn.Embedding` of which the rows `trainable_ids` train and all others are frozen.

    Args:
        embedding (`nn.Embedding`): the module to take over. Its weight is shared, not copied, and is
            frozen (`requires_grad=False`). A subclass keeps its own forward.
        trainable_ids (ids, in any order): the rows that train. They start at their present values.
        dtype (`torch.dtype`, *optional*): dtype of the trainable rows; the table's if not given.
        base_size (`int`, *optional*): number of rows that the table had before it grew, for a head that
            is tied to it; all of them if not given.

    Raises:
        `PartialEmbeddingError`: ids out of range or repeated; `max_norm`, `sparse` or
            `scale_grad_by_freq` is set (the first rewrites frozen rows at every lookup, the other two
            serve gradients of whole tables, which there are none of here).

    Example:
    ```python
    embedding = SplitEmbedding(nn.Embedding(1000, 64), trainable_ids=[3, 17, 999])
    embedding.new_rows.weight.shape  # torch.Size([3, 64]), the only trainable parameter
    ```
    """

    weight: Any = TableProperty("weight")
    _table_names = frozenset({"weight"})
    _unsplit_class = nn.Embedding

    def __new__(cls, embedding: nn.Embedding | None = None, *args: Any, **kwargs: Any) -> SplitEmbedding:
        made: SplitEmbedding = super().__new__(
            split_class(type(embedding), {"weight"}) if isinstance(embedding, nn.Embedding) else cls
        )
        return made

    def __init__(
        self,
        embedding: nn.Embedding,
        *,
        trainable_ids: Iterable[int],
        dtype: torch.dtype | None = None,
        base_size: int | None = None,
    ) -> None:
        ids = check_ids(trainable_ids, embedding.num_embeddings)
        _share_state(embedding, self)
        rows = {"weight": _present_rows(embedding.weight, ids, dtype)}
        split_module(self, rows, ids, base_size=base_size)

    @classmethod
    def from_pretrained(  # type: ignore[override]
        cls,
        vectors: Tensor,
        num_new: int,
        *,
        padding_idx: int | None = None,
        dtype: torch.dtype | None = None,
        seed: int = 0,
    ) -> SplitEmbedding:
        """Pretrained vectors that stay frozen, followed by `num_new` rows that train.

        Stands where `nn.Embedding.from_pretrained(vectors)` would: ids below `len(vectors)` read the
        frozen rows, ids from there on the trainable ones. New rows are drawn from a normal distribution
        with the mean and the standard deviation that the vectors have in each dimension.

        Args:
            vectors (`torch.Tensor` of shape `(V, dim)`): the pretrained vectors; copied once.
            num_new (`int`): number of trainable rows, at least 1.
            padding_idx (`int`, *optional*): as in `nn.Embedding`, in `[-(V + num_new), V + num_new)`.
            dtype (`torch.dtype`, *optional*): dtype of the trainable rows; the vectors' if not given.
            seed (`int`): seed of the new rows' values.

        Raises:
            `PartialEmbeddingError`: `vectors` is not a floating-point matrix, or `num_new` is below 1.
        """
        if vectors.dim() != 2 or not vectors.is_floating_point():
            raise PartialEmbeddingError(
                f"SplitEmbedding.from_pretrained needs a floating-point matrix of shape (V, dim), but got "
                f"shape {tuple(vectors.shape)} of {vectors.dtype}."
            )
        if isinstance(num_new, bool) or not isinstance(num_new, int) or num_new < 1:
            raise PartialEmbeddingError(
                f"num_new={num_new!r} is not a number of rows that can train. Pass an int of at least 1, "
                "or use nn.Embedding.from_pretrained where nothing is to be learned."
            )
        size, width = vectors.shape
        table = vectors.new_empty(size + num_new, width, requires_grad=False)
        table[:size] = vectors.detach()
        generator = torch.Generator().manual_seed(seed)
        noise = torch.randn(num_new, width, generator=generator, dtype=torch.float32).to(table.device)
        spread = vectors.detach().float().std(0, correction=0) if size else torch.ones(width)
        mean = vectors.detach().float().mean(0) if size else torch.zeros(width)
        table[size:] = (mean + spread * noise).to(table.dtype)
        if padding_idx is not None and padding_idx % (size + num_new) >= size:
            table[padding_idx] = 0
        embedding = nn.Embedding(size + num_new, width, padding_idx=padding_idx, _weight=table, _freeze=True)
        return cls(embedding, trainable_ids=range(size, size + num_new), dtype=dtype, base_size=size)

    def forward(self, input: Tensor) -> Tensor:
        """Look up frozen and trainable rows.

        Args:
            input (`torch.Tensor` of any shape, int32 or int64): ids; never changed in place.

        Returns:
            `torch.Tensor` of shape `(*input.shape, dim)`, in the table's dtype.

        Raises:
            `IndexError`: an id outside of the table, as `nn.Embedding` raises it.
        """
        source = self._row_sources["weight"]
        table: Tensor = self.raw_table("weight")
        # Detached, so that the rows stay still also after somebody has called model.requires_grad_(True).
        old = F.embedding(input, table.detach())
        is_new, row = source.lookup(input)
        # As in nn.Embedding, the row at padding_idx gets no gradient.
        padding_row = None if self.padding_idx is None else source.index.row_of.get(self.padding_idx)
        new = F.embedding(row, source.rows(), padding_row)
        return torch.where(is_new.unsqueeze(-1), new.to(old.dtype), old)


class HeadOperands(NamedTuple):
    """What the logits of a head with trainable rows are computed from, all in one dtype.

    Attributes:
        weight (`torch.Tensor` of shape `(V, dim)`): the table, detached.
        bias (`torch.Tensor` of shape `(V,)`, *optional*): detached.
        rows (`torch.Tensor` of shape `(K, dim)`): the rows that train.
        bias_rows (`torch.Tensor` of shape `(K,)`, *optional*): their entries of the bias.
        row_index: which ids they have.
        ids (`torch.Tensor` of shape `(K,)`, *optional*): the same as a tensor; `None` where appended.
    """

    weight: Tensor
    bias: Tensor | None
    rows: Tensor
    bias_rows: Tensor | None
    row_index: RowIndex
    ids: Tensor | None


def head_logits(x: Tensor, head: HeadOperands, out: Tensor | None = None) -> Tensor:
    """Logits from a frozen weight and trainable rows, each written once, to its place in the output.

    Args:
        x (`torch.Tensor` of shape `(N, dim)`): hidden states.
        head: the head.
        out (`torch.Tensor` of shape `(N, V)`, *optional*): where to write them.
    """
    weight, bias, rows, bias_rows, index, ids = head
    # The old columns come from a product of the size that it had before the table grew: another size
    # may be split among kernels and threads in another way, with other last bits.
    cuts = [0, index.base_size, weight.shape[0]]
    if index.appended:
        cuts = [0, index.base_size, index.start, index.stop, weight.shape[0]]
    pieces = []
    for start, stop in pairwise(cuts):
        if index.appended and start == index.start < stop:
            pieces.append((start, stop, rows, bias_rows))
        elif start < stop:
            pieces.append((start, stop, weight[start:stop], None if bias is None else bias[start:stop]))
    if torch.compiler.is_compiling():  # the compiler takes no strided `out`, and fuses the copy
        out = torch.cat([_affine(x, part, bias_part) for _, _, part, bias_part in pieces], 1)
    else:
        out = x.new_empty(x.shape[0], weight.shape[0]) if out is None else out
        for start, stop, part, bias_part in pieces:
            _affine(x, part, bias_part, out=out[:, start:stop])
    return out if ids is None else out.index_copy_(1, ids, _affine(x, rows, bias_rows))


def head_gradient(
    grad: Tensor, grad_new: Tensor, weight: Tensor, rows: Tensor, index: RowIndex, ids: Tensor | None
) -> Tensor:
    """The gradient of the hidden states, `(N, dim)`, from that of the logits, `(N, V)`, and its `row_columns`."""
    if ids is not None:
        # The product with the whole table counts the table's own values at the trainable ids.
        difference = weight.index_select(0, ids).neg_().add_(rows)
        return torch.addmm(grad @ weight, grad_new, difference)
    grad_x = grad_new @ rows
    for start, stop in ((0, index.start), (index.stop, weight.shape[0])):
        if stop > start:
            grad_x = grad_x.addmm(grad[:, start:stop], weight[start:stop])
    return grad_x


def row_columns(grad: Tensor, index: RowIndex, ids: Tensor | None) -> Tensor:
    """The columns of the trainable rows, `(N, K)`."""
    return grad[:, index.start : index.stop] if ids is None else grad.index_select(1, ids)


class _LinearPieces(torch.autograd.Function):
    """`head_logits`, with a gradient for the hidden states and the trainable rows.

    `cat` would write the logits twice, and a product with the whole table would need a `[V, dim]`
    gradient. The frozen columns come from a product of their own, which keeps them equal to the bit to
    those of a head without new rows.
    """

    @staticmethod
    def forward(
        x: Tensor, weight: Tensor, bias: Tensor | None, rows: Tensor, bias_rows: Tensor | None,
        index: RowIndex, ids: Tensor | None,
    ) -> Tensor:  # fmt: skip
        head = HeadOperands(weight, bias, rows, bias_rows, index, ids)
        flat, shape = x.reshape(-1, x.shape[-1]), (*x.shape[:-1], weight.shape[0])
        if torch.compiler.is_compiling():
            return head_logits(flat, head).view(shape)
        out = x.new_empty(shape)  # not a view of a flat one, on which FSDP2 and others warn of changes in place
        head_logits(flat, head, out=out.view(-1, shape[-1]))
        return out

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
        x, weight, _, rows, bias_rows, index, ids = inputs
        ctx.save_for_backward(x, weight, rows, ids)
        ctx.index = index
        ctx.has_bias_rows = bias_rows is not None

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        x, weight, rows, ids = ctx.saved_tensors
        grad, flat = grad.reshape(-1, grad.shape[-1]), x.reshape(-1, x.shape[-1])
        grad_new = row_columns(grad, ctx.index, ids)
        grad_x = None
        if ctx.needs_input_grad[0]:
            grad_x = head_gradient(grad, grad_new, weight, rows, ctx.index, ids).view(x.shape)
        grad_rows = grad_new.t() @ flat if ctx.needs_input_grad[3] else None
        grad_bias = grad_new.sum(0) if ctx.has_bias_rows and ctx.needs_input_grad[4] else None
        return grad_x, None, None, grad_rows, grad_bias, None, None


def _affine(x: Tensor, weight: Tensor, bias: Tensor | None, out: Tensor | None = None) -> Tensor:
    return torch.mm(x, weight.t(), out=out) if bias is None else torch.addmm(bias, x, weight.t(), out=out)


class SplitLinear(PartialModule, nn.Linear):
    """An `nn.Linear` of which the output rows `trainable_ids` train and all others are frozen.

    Args:
        linear (`nn.Linear`): the module to take over, for instance a language model's head. Its weight
            and bias are shared, not copied, and are frozen.
        trainable_ids (ids, in any order): the outputs whose rows (and biases) train. They start at
            their present values. Not given together with `tied_to`.
        tied_to (`SplitEmbedding`, *optional*): an embedding with the same weight, whose trainable rows
            are to serve here too.
        dtype (`torch.dtype`, *optional*): dtype of the trainable rows; the table's if not given.
        base_size (`int`, *optional*): number of rows that the table had before it grew, whose outputs are
            to be equal to the bit to those of then; all of them if not given.

    Raises:
        `PartialEmbeddingError`: ids out of range or repeated; not exactly one of `trainable_ids` and
            `tied_to`; `tied_to` has another weight.
    """

    weight: Any = TableProperty("weight")
    bias: Any = TableProperty("bias")
    _table_names = frozenset({"weight", "bias"})
    _unsplit_class = nn.Linear

    def __new__(cls, linear: nn.Linear | None = None, *args: Any, **kwargs: Any) -> SplitLinear:
        made: SplitLinear = super().__new__(
            split_class(type(linear), {"weight", "bias"}) if isinstance(linear, nn.Linear) else cls
        )
        return made

    def __init__(
        self,
        linear: nn.Linear,
        *,
        trainable_ids: Iterable[int] | None = None,
        tied_to: SplitEmbedding | None = None,
        dtype: torch.dtype | None = None,
        base_size: int | None = None,
    ) -> None:
        if (trainable_ids is None) == (tied_to is None):
            raise PartialEmbeddingError("SplitLinear needs exactly one of trainable_ids and tied_to.")
        if tied_to is not None and linear.weight is not tied_to._parameters["weight"]:
            raise PartialEmbeddingError(
                "SplitLinear(tied_to=...) needs a head that shares its weight with the embedding: set "
                "`linear.weight = embedding.weight` before the embedding is split."
            )
        shared = None if tied_to is None else tied_to._row_sources["weight"]
        ids = list(shared.index.ids) if shared else check_ids(trainable_ids or (), linear.out_features)
        _share_state(linear, self)
        names = ["bias"] if shared else ["weight", "bias"]
        tables = {name: table for name in names if (table := linear._parameters[name]) is not None}
        split_module(
            self,
            {name: _present_rows(table, ids, dtype) for name, table in tables.items()},
            ids,
            shared={"weight": shared} if shared else {},
            base_size=base_size,
        )

    def forward(self, input: Tensor) -> Tensor:
        """Apply frozen and trainable output rows.

        Args:
            input (`torch.Tensor` of shape `(..., in_features)`): for instance hidden states.

        Returns:
            `torch.Tensor` of shape `(..., out_features)`: the outputs of the frozen rows are equal to
            the bit to those of the module without trainable rows.
        """
        head = self.operands(input)
        if head is None:
            return F.linear(input, self.raw_table("weight"), self.bias)
        x = input.to(head.weight.dtype) if torch.is_autocast_enabled(input.device.type) else input
        return apply(_LinearPieces, x, *head)

    def operands(self, input: Tensor) -> HeadOperands | None:
        """What the logits of `input` are computed from, in the dtype that autocast asks for, if it is on.

        `None` where only the bias has trainable rows.
        """
        source = self._row_sources.get("weight")
        weight: Tensor = self.raw_table("weight")
        bias: Tensor | None = self.raw_table("bias")
        if source is None:
            return None
        rows: Tensor = source.rows()
        bias_rows: Tensor | None = None
        if bias is not None:
            bias_source = self._row_sources.get("bias")
            ids = source.ids(bias.device)
            bias_rows = bias.index_select(0, ids) if bias_source is None else bias_source.rows()
        table = weight.detach()
        if torch.is_autocast_enabled(input.device.type):
            dtype = torch.get_autocast_dtype(input.device.type)
            table, bias = table.to(dtype), None if bias is None else bias.to(dtype)
        return HeadOperands(
            table,
            None if bias is None else bias.detach(),
            rows.to(table.dtype),
            None if bias_rows is None else bias_rows.to(table.dtype),
            source.index,
            None if source.index.appended else source.ids(table.device),
        )


def split_class(base: type[nn.Module], names: Iterable[str]) -> type[Any]:
    """The class that a module of class `base` gets when rows of its parameters `names` train.

    `SplitEmbedding` and `SplitLinear` stand *between* a subclass and its `nn` base, so that a subclass
    which scales or otherwise dresses the lookup of its base class goes on doing so.
    """
    if issubclass(base, PartialModule):
        names = frozenset(names) | base._table_names
        base = base._unsplit_class
    names = frozenset(names)
    fast: type[Any] = PartialModule
    if issubclass(base, nn.Embedding):
        fast = SplitEmbedding
    elif issubclass(base, nn.Linear):
        fast = SplitLinear
    extra = names - fast._table_names
    if base in (nn.Embedding, nn.Linear) and not extra:
        return fast
    key = (base, frozenset(extra))
    if key not in _CLASSES:
        bases = (base, fast) if fast is not PartialModule else (PartialModule, base)
        members: dict[str, Any] = {name: TableProperty(name) for name in extra}
        members.update(
            _make_class=staticmethod(split_class),
            _unsplit_class=base,
            _table_names=extra | fast._table_names,
            __module__=base.__module__,
            __qualname__=f"Split{base.__qualname__}",
            __doc__=base.__doc__,
        )
        if fast is not PartialModule:
            members["__init__"] = fast.__init__
        _CLASSES[key] = type(f"Split{base.__name__}", bases, members)
    return _CLASSES[key]


SplitEmbedding._make_class = staticmethod(split_class)
SplitLinear._make_class = staticmethod(split_class)
_CLASSES: dict[tuple[type[nn.Module], frozenset[str]], type[Any]] = {}


def split_module(
    module: nn.Module,
    rows: dict[str, nn.Parameter],
    ids: Sequence[int],
    *,
    shared: dict[str, RowSource] | None = None,
    dims: dict[str, int] | None = None,
    scope: ForwardScope | None = None,
    base_size: int | None = None,
) -> dict[str, str]:
    """Let rows of a module's tables train, in place.

    The module's class becomes that of `split_class`; its parameters keep their names and identity.

    Args:
        module: any module; what is said of `SplitEmbedding` holds for embeddings.
        rows: the trainable rows by the name of their table, `[K, ...]` each.
        ids: the ids of the rows in the tables, in the order of the rows.
        shared: tables whose rows live in another split module (a tied head), with their source there.
        dims: dimension of the vocabulary, for tables where it is not the first.
        scope: counts the forwards in which `module.<table>` is differentiable; always, if not given.
        base_size: number of rows that the tables had before they grew; what they have, if not given.

    Returns:
        For each table in `rows` the name that its parameter has in `module.new_rows`.
    """
    shared = shared or {}
    if isinstance(module, nn.Embedding) and "weight" in (rows | shared):
        _check_embedding_options(module)
    cls = split_class(type(module), {*rows, *shared})
    module.__dict__.setdefault("_row_sources", {})
    module.__class__ = cls
    assert isinstance(module, PartialModule)
    module.__dict__["_forward_scope"] = scope
    if rows and "new_rows" not in module._modules:
        module.add_module("new_rows", NewRows())
    names = {}
    for name, parameter in rows.items():
        names[name] = module.new_rows.add_set(name, parameter)
        before = module._row_sources[name].index.ids if name in module._row_sources else ()
        index_rows(module, name, (*before, *ids), (dims or {}).get(name, 0), base_size)
    for name, source in shared.items():
        module._row_sources[name] = source
    for name in (*rows, *shared):
        table = module._parameters[name]
        assert table is not None
        table.requires_grad_(False)
    return names


def index_rows(
    module: PartialModule, name: str, ids: Sequence[int], dim: int = 0, base_size: int | None = None
) -> None:
    """Set which ids the rows of a table have; keeps the `RowSource` that tied modules share."""
    table = module._parameters[name]
    assert table is not None
    if name in module._row_sources:
        index = RowIndex(ids, module._row_sources[name].index.base_size)
        module._row_sources[name].index = index
    else:
        index = RowIndex(ids, table.shape[dim] if base_size is None else base_size)
        module._row_sources[name] = RowSource(module, name, index, table.shape, dim)
    _drop_index_buffers(module, name)
    if not index.contiguous:
        for buffer, values in zip(
            PartialModule.index_buffers(name), torch.tensor(index.ids, device=table.device).sort(), strict=True
        ):
            module.register_buffer(buffer, values, persistent=False)


def _drop_index_buffers(module: nn.Module, name: str) -> None:
    for buffer in PartialModule.index_buffers(name):
        module._buffers.pop(buffer, None)
        module._non_persistent_buffers_set.discard(buffer)


def next_row_name(module: nn.Module, table_name: str) -> str:
    """The name that `split_module` will give to the next rows of a table."""
    holder = getattr(module, "new_rows", None)
    return table_name if holder is None else str(holder.next_name(table_name))


def unsplit_module(module: nn.Module, names: dict[str, str], shared: Iterable[str], ids: Sequence[int]) -> None:
    """Take off a row set that `split_module` has put on, be it in part, writing nothing.

    When it is cut short it can be called again.

    Args:
        module: the split module.
        names: what `split_module` returned.
        shared: names of the tables whose rows live elsewhere.
        ids: ids of the set.
    """
    sources: dict[str, RowSource] = module.__dict__.get("_row_sources", {})
    own = set(ids)
    for name, parameter_name in names.items():
        holder: Any = module._modules.get("new_rows")
        if holder is not None:
            holder._parameters.pop(parameter_name, None)
            holder.shapes.pop(parameter_name, None)
        if name not in sources:
            continue
        left = [token_id for token_id in sources[name].index.ids if token_id not in own]
        if left:
            assert isinstance(module, PartialModule)
            index_rows(module, name, left)
        else:
            _drop_index_buffers(module, name)
            del sources[name]
    for name in shared:
        source = sources.get(name)
        if source is not None and source.table_name not in source.owner.__dict__.get("_row_sources", {}):
            del sources[name]
    if not sources:
        module._modules.pop("new_rows", None)
        for name in (*names, *shared):
            _drop_index_buffers(module, name)
        if isinstance(module, PartialModule):
            base: Any = module._unsplit_class
            module.__class__ = base
        module.__dict__.pop("_row_sources", None)
        module.__dict__.pop("_forward_scope", None)


def check_ids(ids: Iterable[int], size: int) -> list[int]:
    """The ids as a list of ints.

    Raises:
        `PartialEmbeddingError`: none, repeated, not whole numbers, or outside of `[0, size)`.
    """
    values = ids.flatten().tolist() if isinstance(ids, Tensor) else list(ids)
    try:
        checked = [operator.index(value) for value in values if not isinstance(value, bool)]
    except TypeError:
        checked = []
    if len(checked) != len(values):
        raise PartialEmbeddingError(f"Row ids must be whole numbers, but got {shorten(values)}.")
    if not checked:
        raise PartialEmbeddingError("No row ids were given: name at least one row.")
    outside = [value for value in checked if not 0 <= value < size]
    if outside:
        raise PartialEmbeddingError(
            f"Row ids {shorten(outside)} are outside of a table of {size} rows: valid ids are 0 to {size - 1}."
        )
    if len(set(checked)) != len(checked):
        repeated = sorted({value for value in checked if checked.count(value) > 1})
        raise PartialEmbeddingError(f"Row ids are given more than once: {shorten(repeated)}.")
    return checked


def _check_embedding_options(embedding: nn.Embedding) -> None:
    reasons = {
        "max_norm": "it rewrites rows in place at every lookup, frozen ones too",
        "sparse": "the trainable rows have a small dense gradient of their own",
        "scale_grad_by_freq": "it counts ids over the whole table",
    }
    for option, reason in reasons.items():
        if getattr(embedding, option, None):
            raise PartialEmbeddingError(
                f"Cannot split an embedding with {option}={getattr(embedding, option)!r}: {reason}. "
                f"Build it without {option}."
            )


def _present_rows(table: Tensor, ids: Sequence[int], dtype: torch.dtype | None) -> nn.Parameter:
    index = torch.tensor(list(ids), device=table.device)
    return nn.Parameter(table.detach().index_select(0, index).to(dtype or table.dtype).clone())


def _share_state(source: nn.Module, target: nn.Module) -> None:
    """Give `target` the parameters, buffers, hooks and attributes of `source`, without copying any."""
    if isinstance(source, PartialModule):
        raise PartialEmbeddingError(
            f"This {type(source).__name__} is split already. Wrap the module that it was made from."
        )
    for name, value in source.__dict__.items():
        target.__dict__[name] = value.copy() if isinstance(value, (dict, set)) else value
