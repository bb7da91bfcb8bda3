"""The cross-entropy of a head whose table is frozen, without its logits, in plain PyTorch.

The logits of `N` positions over `V` ids are the largest thing in the training of a small model, and their
gradient and log-probabilities are as large again. Here they exist for a few positions at a time: those of
a chunk are computed, turned into their own gradient in place and multiplied into the gradients of hidden
states and trainable rows, all in the forward pass; the backward pass scales these. That is the scheme of
Liger Kernel's fused linear cross-entropy (Hsu et al., 2024, arXiv:2410.10989), but the table is frozen, so
that no gradient of its size exists either.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from .errors import PartialEmbeddingError
from .rows import RowIndex, apply
from .split import HeadOperands, SplitLinear, head_gradient, head_logits, row_columns

__all__ = ["CHUNK_BYTES", "CHUNK_POSITIONS", "head_operands", "linear_cross_entropy"]

# A chunk has as many positions as have 64 MiB of float32 logits, but at least 128. Measured on a CPU, at
# vocabularies of 49 and 152 thousand: with half as many the products become slower (1.06 to 1.26 of the
# plain loss), with twice as many little is won.
CHUNK_BYTES = 1 << 26
CHUNK_POSITIONS = 128

Transform = Callable[[Tensor], Tensor]


def linear_cross_entropy(
    input: Tensor,
    head: nn.Linear,
    target: Tensor,
    *,
    reduction: str = "mean",
    ignore_index: int = -100,
    label_smoothing: float = 0.0,
    z_loss: float = 0.0,
    transform: Transform | None = None,
) -> Tensor:
    """`F.cross_entropy(transform(head(input)), target)`, in memory that grows neither with `N × V` nor with `V × dim`.

    The largest tensors are the logits of a chunk of positions (`CHUNK_BYTES`), their log-probabilities, and the
    gradient of `input`. Ignored positions are left out of all products. Numbers are computed as the plain
    loss computes them: logits in the head's dtype (autocast's, if it is on), their softmax in float32 or better.

    Args:
        input (`torch.Tensor` of shape `(N, dim)`): hidden states.
        head (`SplitLinear`, or an `nn.Linear` that is frozen): the head.
        target (`torch.Tensor` of shape `(N,)`, int64): ids, or `ignore_index`.
        reduction: `"mean"` (over the positions that are not ignored) or `"sum"`.
        ignore_index, label_smoothing: as in `F.cross_entropy`.
        z_loss: weight of the mean (or sum) of `logsumexp(logits)²`, which keeps the partition function near 1
            (Chowdhery et al., 2022, arXiv:2204.02311); 0 is none.
        transform: what is done to logits before the loss, position by position (scaling, soft-capping).

    Returns:
        `torch.Tensor` without dimensions, in float32 or better. Its backward can run once, and cannot itself be
        differentiated.

    Raises:
        `PartialEmbeddingError`: a head whose whole table trains, or another `reduction`.
        `IndexError`: a target outside of the vocabulary.
    """
    if reduction not in ("mean", "sum"):
        raise PartialEmbeddingError(f"reduction={reduction!r} has no chunked form. Use 'mean' or 'sum'.")
    operands = head_operands(head, input)
    x = input.to(operands.weight.dtype) if torch.is_autocast_enabled(input.device.type) else input
    with torch.autocast(input.device.type, enabled=False):
        options = (reduction, ignore_index, label_smoothing, z_loss, transform)
        return apply(_ChunkedLoss, x, *operands, target, *options)


def head_operands(head: nn.Module, input: Tensor) -> HeadOperands:
    """What the logits of a head are computed from, where its table is frozen.

    Raises:
        `PartialEmbeddingError`: the head has a forward of its own, or its whole table trains.
    """
    operands = None
    if isinstance(head, SplitLinear) and head._unsplit_class is nn.Linear:
        operands = head.operands(input)
    elif type(head) is nn.Linear and not any(parameter.requires_grad for parameter in head.parameters()):
        weight, bias = head.weight.detach(), None if head.bias is None else head.bias.detach()
        if torch.is_autocast_enabled(input.device.type):
            dtype = torch.get_autocast_dtype(input.device.type)
            weight, bias = weight.to(dtype), None if bias is None else bias.to(dtype)
        size = weight.shape[0]  # no row trains: an index of none, behind the last
        none, no_bias = weight[size:], None if bias is None else bias[size:]
        operands = HeadOperands(weight, bias, none, no_bias, RowIndex((), size), None)
    if operands is None:
        raise PartialEmbeddingError(
            f"The chunked loss needs a head whose table is frozen apart from its trainable rows, but got "
            f"{type(head).__name__}, which trains as a whole or computes its logits in a way of its own. Use the "
            "plain loss for it."
        )
    return operands


class _ChunkedLoss(torch.autograd.Function):
    """Loss and, where they are needed, gradients, in one pass over the chunks."""

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, weight: Tensor, bias: Tensor | None, rows: Tensor, bias_rows: Tensor | None,
        index: RowIndex, ids: Tensor | None, target: Tensor,
        reduction: str, ignore_index: int, label_smoothing: float, z_loss: float, transform: Transform | None,
    ) -> Tensor:  # fmt: skip
        needs_x, needs_rows, needs_bias = (ctx.needs_input_grad[number] for number in (0, 3, 4))
        head = HeadOperands(weight, bias, rows, bias_rows, index, ids)
        size = weight.shape[0]
        exact = torch.promote_types(torch.float32, x.dtype)
        kept = (target != ignore_index).nonzero().flatten()
        everything = len(kept) == len(target)
        target = target if everything else target[kept]
        if len(target) and not 0 <= int(target.min()) <= int(target.max()) < size:
            raise IndexError(
                f"Target {int(target.min() if target.min() < 0 else target.max())} is out of bounds: the head has "
                f"{size} outputs, and ignore_index={ignore_index}."
            )
        loss = x.new_zeros((), dtype=exact)
        # Sums over many chunks: kept in float32, whatever the head's dtype.
        grad_x = (torch.empty_like(x) if everything else torch.zeros_like(x)) if needs_x else None
        grad_rows = rows.new_zeros(rows.shape, dtype=exact) if needs_rows else None
        grad_bias = rows.new_zeros(len(rows), dtype=exact) if needs_bias and bias_rows is not None else None

        step = min(max(CHUNK_POSITIONS, CHUNK_BYTES // (size * exact.itemsize)), max(1, len(target)))
        logits_buffer = x.new_empty(step, size)
        buffer = x.new_empty(step, size, dtype=exact)
        for start in range(0, len(target), step):
            labels = target[start : start + step].unsqueeze(1)
            stop = start + len(labels)
            positions = slice(start, stop) if everything else kept[start:stop]
            part = x[positions]
            raw = head_logits(part, head, out=logits_buffer[: len(labels)])
            logits, back = (raw, None) if transform is None else _transformed(raw, transform)
            grad = torch.log_softmax(logits, 1, dtype=exact, out=buffer[: len(labels)])
            picked = grad.gather(1, labels)
            loss -= picked.sum() * (1 - label_smoothing)
            if label_smoothing:
                loss -= grad.sum() * (label_smoothing / size)
            if z_loss:
                normalizer = logits.gather(1, labels).to(exact) - picked
                loss += normalizer.square().sum() * z_loss
            if not (needs_x or grad_rows is not None or grad_bias is not None):
                continue
            grad.exp_()
            if z_loss:
                grad.mul_(1 + 2 * z_loss * normalizer)
            if label_smoothing:
                grad.sub_(label_smoothing / size)
            grad.scatter_add_(1, labels, grad.new_full((1, 1), label_smoothing - 1).expand_as(labels))
            if back is not None:
                grad = back(grad)
            # The logits are not needed any more: their buffer takes the gradient in the head's dtype.
            grad = grad if grad.dtype == x.dtype else raw.copy_(grad)
            if grad_x is not None:
                grad_x[positions] = head_gradient(grad, weight, rows, index, ids)
            if grad_rows is not None or grad_bias is not None:
                grad_new = row_columns(grad, index, ids)
                if grad_rows is not None:
                    grad_rows += grad_new.t() @ part
                if grad_bias is not None:
                    grad_bias += grad_new.sum(0)
        # No position at all: NaN, as 0 / 0 is in F.cross_entropy.
        scale = 1.0 if reduction == "sum" else (1 / len(target) if len(target) else float("nan"))
        ctx.save_for_backward(grad_x, grad_rows, grad_bias)
        ctx.scale, ctx.dtype = scale if len(target) else 0.0, x.dtype
        return loss * scale

    @staticmethod
    @torch.autograd.function.once_differentiable  # type: ignore[untyped-decorator]
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        scale = grad * ctx.scale
        grad_x, grad_rows, grad_bias = (
            None if saved is None else (saved * scale).to(ctx.dtype) for saved in ctx.saved_tensors
        )
        return grad_x, None, None, grad_rows, grad_bias, *[None] * 8


def _transformed(raw: Tensor, transform: Transform) -> tuple[Tensor, Transform]:
    """Logits as `transform` makes them, and what takes their gradient back to the raw ones."""
    leaf = raw.detach().requires_grad_(True)
    with torch.enable_grad():
        out = transform(leaf)

    def back(grad: Tensor) -> Tensor:
        (result,) = torch.autograd.grad(out, leaf, grad.to(out.dtype))
        return result

    return out.detach(), back
