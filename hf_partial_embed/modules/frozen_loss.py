"""The loss of positions whose hidden states no step changes: only their logits of trainable rows are computed.

All other logits of such a position are the same in every step. They enter its loss by their log-sum-exp, the
position's normalizer, and by that of the label; their gradient goes nowhere. So once the normalizer is known, a
position takes `K × dim` multiplications for its logits and as many for the rows' gradient, in the place of `V × dim`
twice.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .linear import HeadOperands
from .loss import ChunkedCrossEntropy, Chunks, chunk_positions, head_operands
from .rows import apply
from .steps import Transform

__all__ = ["frozen_normalizers", "linear_cross_entropy_given"]


@torch.no_grad()
def frozen_normalizers(input: Tensor, head: nn.Linear, *, transform: Transform | None = None) -> Tensor:
    """The log-sum-exp of all logits but those of trainable rows, chunk by chunk.

    Args:
        input (`torch.Tensor` of shape `(N, dim)`): hidden states.
        head, transform: as in `linear_cross_entropy`.

    Returns:
        `torch.Tensor` of shape `(N,)`, in float32 or better.
    """
    operands, x = _operands(head, input)
    ids = _trainable_ids(operands)
    with torch.autocast(input.device.type, enabled=False):
        chunks = Chunks(operands, x, transform, len(x))
        found = x.new_empty(len(x), dtype=chunks.exact)
        for span in chunks.spans:
            for block in chunks.blocks(x[span]):
                logits = chunks.logits(block).to(chunks.exact).index_fill_(1, ids, -torch.inf)
                largest = logits.amax(1, keepdim=True)
                found[span][block] = logits.sub_(largest).exp_().sum(1).log_().add_(largest.squeeze(1))
    return found


def linear_cross_entropy_given(
    input: Tensor,
    head: nn.Linear,
    target: Tensor,
    normalizers: Tensor,
    *,
    reduction: str = "mean",
    ignore_index: int = -100,
    transform: Transform | None = None,
) -> Tensor:
    """`linear_cross_entropy`, where the hidden states of some positions need no gradient.

    Args:
        input, head, target, reduction, ignore_index: as in `linear_cross_entropy`.
        normalizers (`torch.Tensor` of shape `(N,)`): of these positions; NaN at all others.
        transform: as in `linear_cross_entropy`; each logit for itself.

    Returns:
        a scalar `torch.Tensor`, in float32 or better.
    """
    operands, x = _operands(head, input)
    known = ~normalizers.isnan() & (target != ignore_index)
    with torch.autocast(input.device.type, enabled=False):
        others = target.masked_fill(known, ignore_index)
        value = apply(ChunkedCrossEntropy, x, *operands, others, "sum", ignore_index, 0.0, 0.0, transform)
        given = (x.detach()[known], operands, target[known], normalizers[known], transform)
        value = value + apply(_GivenNormalizers, operands.rows, operands.bias_rows, *given)
    return value if reduction == "sum" else value / (target != ignore_index).sum()


class _GivenNormalizers(torch.autograd.Function):
    """The sum of losses and, where they are needed, the gradients of the rows, in one pass over the chunks."""

    @staticmethod
    def forward(
        ctx: Any, rows: Tensor, bias_rows: Tensor | None,
        x: Tensor, head: HeadOperands, target: Tensor, normalizers: Tensor, transform: Transform | None,
    ) -> Tensor:  # fmt: skip
        head = head._replace(rows=rows.detach().requires_grad_(True))
        if bias_rows is not None:
            head = head._replace(bias_rows=bias_rows.detach().requires_grad_(True))
        needs = ctx.needs_input_grad[:2]
        needed = [
            leaf for leaf, need in zip((head.rows, head.bias_rows), needs, strict=True) if need and leaf is not None
        ]
        sums = [torch.zeros_like(leaf, dtype=normalizers.dtype) for leaf in needed]
        value = normalizers.new_zeros(())
        step = chunk_positions(normalizers.itemsize * (len(rows) + x.shape[1]))
        for part, labels, given in zip(
            *(torch.split(values, step) for values in (x, target, normalizers)), strict=True
        ):
            with torch.enable_grad():
                here = _losses(part, head, labels, given, transform).sum()
            value += here.detach()
            for total, grad in zip(sums, torch.autograd.grad(here, needed) if needed else (), strict=True):
                total += grad
        found = iter(sums)
        ctx.save_for_backward(*(next(found) if need else None for need in needs))
        ctx.dtype = rows.dtype
        return value

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        return (*(None if saved is None else (saved * grad).to(ctx.dtype) for saved in ctx.saved_tensors), *[None] * 5)


def _losses(x: Tensor, head: HeadOperands, labels: Tensor, given: Tensor, transform: Transform | None) -> Tensor:
    """The loss of each position, `(n,)`, differentiable in the rows."""
    new = F.linear(x, head.rows, head.bias_rows)
    old = torch.bmm(x.unsqueeze(1), head.weight.index_select(0, labels).unsqueeze(2)).squeeze(2)
    if head.bias is not None:
        old = old + head.bias.index_select(0, labels).unsqueeze(1)
    if transform is not None:
        new, old = transform(new), transform(old)
    new, old = new.to(given.dtype), old.to(given.dtype).squeeze(1)
    is_label = labels.unsqueeze(1) == _trainable_ids(head)
    own = torch.where(is_label.any(1), (new * is_label).sum(1), old)
    return torch.logaddexp(given, new.logsumexp(1)) - own


def _operands(head: nn.Linear, input: Tensor) -> tuple[HeadOperands, Tensor]:
    operands = head_operands(head, input)
    return operands, input.to(operands.weight.dtype) if torch.is_autocast_enabled(input.device.type) else input


def _trainable_ids(head: HeadOperands) -> Tensor:
    if head.ids is not None:
        return head.ids
    return torch.arange(head.start, head.start + len(head.rows), device=head.weight.device)
