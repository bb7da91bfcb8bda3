"""`SplitLinear`, a head in which some output rows train, and the functions that compute its logits and gradients."""

from __future__ import annotations

from collections.abc import Iterable
from itertools import pairwise
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..errors import PartialEmbeddingError
from .embedding import SplitEmbedding
from .rows import PartialModule, RowSource, TableProperty, apply
from .splitting import (
    check_base_size,
    check_ids,
    check_module,
    fast_class,
    present_rows,
    share_state,
    split_class,
    split_module,
)

__all__ = ["HeadOperands", "SplitLinear", "head_gradient", "head_logits", "row_columns"]


class HeadOperands(NamedTuple):
    """The operands of the logits of a head with trainable rows, all in one dtype.

    Attributes:
        weight (`torch.Tensor` of shape `(V, dim)`): the table, detached.
        bias (`torch.Tensor` of shape `(V,)`, *optional*): detached.
        rows (`torch.Tensor` of shape `(K, dim)`): the rows that train.
        bias_rows (`torch.Tensor` of shape `(K,)`, *optional*): their entries of the bias.
        base_size: number of rows that the table had before it grew.
        start: where the rows are, if `ids` is `None`: from this id on, which is at least `base_size`.
        ids (`torch.Tensor` of shape `(K,)`, *optional*): their ids, if they are anywhere else.
    """

    weight: Tensor
    bias: Tensor | None
    rows: Tensor
    bias_rows: Tensor | None
    base_size: int
    start: int
    ids: Tensor | None


def head_logits(x: Tensor, head: HeadOperands, out: Tensor | None = None) -> Tensor:
    """Logits from a frozen weight and trainable rows; each column is written once, to its place in the output.

    Args:
        x (`torch.Tensor` of shape `(N, dim)`): hidden states.
        head: the head.
        out (`torch.Tensor` of shape `(N, V)`, *optional*): where to write the logits.

    Returns:
        `torch.Tensor` of shape `(N, V)`, in the operands' dtype.
    """
    weight, bias, rows, bias_rows, base_size, row_start, ids = head
    # The old columns come from a matmul of the size that it had before the table grew: one of another size may be
    # split among kernels and threads differently, which changes the last bits.
    cuts = [0, base_size, weight.shape[0]]
    if ids is None:
        cuts = [0, base_size, row_start, row_start + rows.shape[0], weight.shape[0]]
    pieces = []
    for start, stop in pairwise(cuts):
        if ids is None and start == row_start < stop:
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


def head_gradient(grad: Tensor, grad_new: Tensor, head: HeadOperands) -> Tensor:
    """The gradient of the hidden states, `(N, dim)`.

    Args:
        grad (`torch.Tensor` of shape `(N, V)`): the gradient of the logits.
        grad_new (`torch.Tensor` of shape `(N, K)`): its `row_columns`.
        head: the head.
    """
    weight, rows = head.weight, head.rows
    if head.ids is not None:
        # grad @ weight uses the table's own values at the trainable ids: add the difference to the rows.
        difference = weight.index_select(0, head.ids).neg_().add_(rows)
        return torch.addmm(grad @ weight, grad_new, difference)
    grad_x = grad_new @ rows
    for start, stop in ((0, head.start), (head.start + rows.shape[0], weight.shape[0])):
        if stop > start:
            grad_x = grad_x.addmm(grad[:, start:stop], weight[start:stop])
    return grad_x


def row_columns(grad: Tensor, head: HeadOperands) -> Tensor:
    """The columns of the trainable rows, `(N, K)`, of a gradient of the logits."""
    if head.ids is None:
        return grad[:, head.start : head.start + head.rows.shape[0]]
    return grad.index_select(1, head.ids)


class _LinearPieces(torch.autograd.Function):
    """`head_logits`, with a gradient for the hidden states and the trainable rows.

    `torch.cat` would write the logits twice, and a matmul with the whole table would need a `[V, dim]`
    gradient. The frozen columns come from a matmul of their own, so they are bit-identical to those of a
    head without new rows.
    """

    @staticmethod
    def forward(
        x: Tensor, weight: Tensor, bias: Tensor | None, rows: Tensor, bias_rows: Tensor | None,
        base_size: int, start: int, ids: Tensor | None,
    ) -> Tensor:  # fmt: skip
        head = HeadOperands(weight, bias, rows, bias_rows, base_size, start, ids)
        flat, shape = x.reshape(-1, x.shape[-1]), (*x.shape[:-1], weight.shape[0])
        if torch.compiler.is_compiling():
            return head_logits(flat, head).view(shape)
        out = x.new_empty(shape)  # not a view of a flat tensor: FSDP2 and others warn of in-place changes to views
        head_logits(flat, head, out=out.view(-1, shape[-1]))
        return out

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
        x, weight, _, rows, bias_rows, base_size, start, ids = inputs
        ctx.save_for_backward(x, weight, rows, ids)
        ctx.base_size, ctx.start = base_size, start
        ctx.has_bias_rows = bias_rows is not None

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        x, weight, rows, ids = ctx.saved_tensors
        head = HeadOperands(weight, None, rows, None, ctx.base_size, ctx.start, ids)
        grad, flat = grad.reshape(-1, grad.shape[-1]), x.reshape(-1, x.shape[-1])
        grad_new = row_columns(grad, head)
        grad_x = None
        if ctx.needs_input_grad[0]:
            grad_x = head_gradient(grad, grad_new, head).view(x.shape)
        grad_rows = grad_new.t() @ flat if ctx.needs_input_grad[3] else None
        grad_bias = grad_new.sum(0) if ctx.has_bias_rows and ctx.needs_input_grad[4] else None
        return grad_x, None, None, grad_rows, grad_bias, None, None, None


def _affine(x: Tensor, weight: Tensor, bias: Tensor | None, out: Tensor | None = None) -> Tensor:
    return torch.mm(x, weight.t(), out=out) if bias is None else torch.addmm(bias, x, weight.t(), out=out)


def _after_lookup(source: RowSource) -> Tensor:
    """The trainable rows; where a tied embedding has looked some up, by way of that, so that their gradients meet."""
    rows = source.rows()
    if not source.tied or torch.compiler.is_compiling():
        return rows
    looked_up, source.looked_up = source.looked_up, None
    if looked_up is None or not torch.is_grad_enabled():
        return rows
    # Not those of a lookup before the rows were cast, moved or gathered anew.
    same = looked_up.data_ptr() == rows.data_ptr() and looked_up.dtype == rows.dtype
    return looked_up if same and rows.requires_grad else rows


@fast_class(nn.Linear)
class SplitLinear(PartialModule, nn.Linear):
    """An `nn.Linear` in which the output rows `trainable_ids` train and all others are frozen.

    Args:
        linear (`nn.Linear`): the module to take over, for instance a language model's head. Its weight
            and bias are shared, not copied, and are frozen.
        trainable_ids (ids, in any order): the outputs whose rows (and biases) train. They start at
            their present values. Not given together with `tied_to`.
        tied_to (`SplitEmbedding`, *optional*): an embedding with the same weight, whose trainable rows
            are used here, too.
        dtype (`torch.dtype`, *optional*): dtype of the trainable rows; the table's if not given.
        base_size (`int`, *optional*): number of rows that the table had before it grew, whose outputs stay
            bit-identical to what they were then; all rows if not given.

    Raises:
        `PartialEmbeddingError`: `linear` is not an `nn.Linear`, or is quantised; ids are out of range or repeated;
            not exactly one of `trainable_ids` and `tied_to` is given; `tied_to` is not split or has another weight.
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
        check_module(linear, nn.Linear, "SplitLinear")
        if (trainable_ids is None) == (tied_to is None):
            raise PartialEmbeddingError("SplitLinear needs exactly one of trainable_ids and tied_to.")
        if tied_to is not None and not isinstance(tied_to, SplitEmbedding):
            raise PartialEmbeddingError(
                f"SplitLinear(tied_to=...) needs a SplitEmbedding, but got {type(tied_to).__name__}. Split the "
                "embedding first: SplitEmbedding(embedding, trainable_ids=...)."
            )
        if tied_to is not None and linear.weight is not tied_to._parameters["weight"]:
            raise PartialEmbeddingError(
                "SplitLinear(tied_to=...) needs a head that shares its weight with the embedding: set "
                "`linear.weight = embedding.weight` before the embedding is split."
            )
        shared = None if tied_to is None else tied_to._row_sources["weight"]
        if not shared:
            assert trainable_ids is not None
            ids = check_ids(trainable_ids, linear.out_features)
        else:
            ids = list(shared.index.ids)
        check_base_size(base_size, linear.out_features)
        names = ["bias"] if shared else ["weight", "bias"]
        tables = {name: table for name in names if (table := linear._parameters[name]) is not None}
        rows = {name: present_rows(table, ids, dtype) for name, table in tables.items()}
        share_state(linear, self)
        split_module(
            self,
            rows,
            ids,
            shared={"weight": shared} if shared else {},
            base_size=base_size,
        )

    def forward(self, input: Tensor) -> Tensor:
        """Apply frozen and trainable output rows.

        Args:
            input (`torch.Tensor` of shape `(..., in_features)`): for instance hidden states.

        Returns:
            `torch.Tensor` of shape `(..., out_features)`, in the weight's dtype (autocast's, if it is on). The
            outputs of frozen rows are bit-identical to those of the module without trainable rows.
        """
        head = self.operands(input)
        if head is None:
            return F.linear(input, self.raw_table("weight"), self.bias)
        x = input.to(head.weight.dtype) if torch.is_autocast_enabled(input.device.type) else input
        return apply(_LinearPieces, x, *head)

    def operands(self, input: Tensor) -> HeadOperands | None:
        """The operands of the logits of `input`, in autocast's dtype if it is on.

        `None` where only the bias has trainable rows.
        """
        source = self._row_sources.get("weight")
        weight: Tensor = self.raw_table("weight")
        bias: Tensor | None = self.raw_table("bias")
        if source is None:
            return None
        rows = _after_lookup(source)
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
            source.index.base_size,
            source.index.start,
            None if source.index.appended else source.ids(table.device),
        )
