"""The cross-entropy of a head whose table is frozen, without keeping its logits, in plain PyTorch.

The logits of `N` positions over `V` ids are the largest thing in the training of a small model, and their
gradient and log-probabilities are as large again. Here they exist for one chunk of positions at a time. In the
forward pass the logits of a chunk are computed, turned into their gradient in place and multiplied into the
gradients of hidden states and trainable rows; the backward pass only scales these. That is the scheme of
Liger Kernel's fused linear cross-entropy (Hsu et al., 2024, arXiv:2410.10989). Since the table is frozen here,
no gradient of its size exists either.

In a compiled function all of this is one operator of the graph, `hf_partial_embed::chunked_cross_entropy`, which runs
the same code: the compiler cannot unroll a loop whose length depends on the batch.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from ..errors import PartialEmbeddingError
from .linear import HeadOperands, SplitLinear, head_gradient, head_logits, row_columns
from .rows import apply
from .steps import Steps, Transform

__all__ = [
    "CHUNK_BYTES", "CHUNK_POSITIONS", "ChunkedCrossEntropy", "Chunks", "head_operands", "linear_cross_entropy",
    "linear_log_probs",
]  # fmt: skip

# A chunk has as many positions as fit 64 MiB of float32 logits, but at least 128. Measured on a CPU, at
# vocabularies of 49 and 152 thousand: with half as many positions the matmuls become slower (1.06 to 1.26 times
# the plain loss's time), and twice as many gain little.
CHUNK_BYTES = 1 << 26
CHUNK_POSITIONS = 128

# Where the head's dtype is lower, a CPU's thread casts and computes the softmax and its gradient in float32 blocks of
# this size, which stay in its cache. A float32 head's are computed in place; blocks gain nothing there.
BLOCK_BYTES = 1 << 22


def chunk_positions(position_bytes: int) -> int:
    """How many positions a chunk has, if one takes so many bytes."""
    return max(CHUNK_POSITIONS, CHUNK_BYTES // position_bytes)


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

    The largest tensors are the logits of a chunk of positions (`CHUNK_BYTES`), which turn into their gradient in
    place, and the gradient of `input`. Ignored positions are left out of all matmuls. Dtypes are those of the plain
    loss: logits in the head's dtype (autocast's, if it is on), their softmax in float32 or better.

    Args:
        input (`torch.Tensor` of shape `(N, dim)`): hidden states.
        head (`SplitLinear`, or an `nn.Linear` that is frozen): the head.
        target (`torch.Tensor` of shape `(N,)`, int64): ids, or `ignore_index`.
        reduction: `"mean"` (over the positions that are not ignored) or `"sum"`.
        ignore_index, label_smoothing: as in `F.cross_entropy`.
        z_loss: weight of the mean (or sum) of `logsumexp(logits)²`, which keeps the partition function near 1
            (Chowdhery et al., 2022, arXiv:2204.02311); 0 is none.
        transform: applied to the logits before the loss (scaling, soft-capping); each position for itself. In a
            compiled function anything but `Steps` runs outside of the graph.

    Returns:
        a scalar `torch.Tensor`, in float32 or better. Its backward can run once, and cannot itself be
        differentiated.

    Raises:
        `PartialEmbeddingError`: the head's whole table trains, or it has a forward of its own; another `reduction`.
        `IndexError`: a target outside of the vocabulary.
    """
    if reduction not in ("mean", "sum"):
        raise PartialEmbeddingError(f"reduction={reduction!r} has no chunked form. Use 'mean' or 'sum'.")
    operands = head_operands(head, input)
    x = input.to(operands.weight.dtype) if torch.is_autocast_enabled(input.device.type) else input
    with torch.autocast(input.device.type, enabled=False):
        options = (reduction, ignore_index, label_smoothing, z_loss, transform)
        return apply(ChunkedCrossEntropy, x, *operands, target, *options)


def linear_log_probs(
    input: Tensor, head: nn.Linear, target: Tensor, *, transform: Transform | None = None
) -> tuple[Tensor, Tensor]:
    """The entry at `target` and the sum over the vocabulary of `log_softmax(transform(head(input)))`.

    For losses that weight positions themselves, such as the label smoother of `transformers`. The weight of a
    position is known only in the backward pass, so the logits of each chunk are computed again there: one more
    matmul than `linear_cross_entropy` needs, in the same memory.

    Args:
        input (`torch.Tensor` of shape `(N, dim)`): hidden states.
        head, transform: as in `linear_cross_entropy`.
        target (`torch.Tensor` of shape `(N,)`, int64): ids, all of them inside of the vocabulary.

    Returns:
        two `torch.Tensor` of shape `(N,)`, in float32 or better.

    Raises:
        `PartialEmbeddingError`: the head's whole table trains, or it has a forward of its own.
    """
    operands = head_operands(head, input)
    x = input.to(operands.weight.dtype) if torch.is_autocast_enabled(input.device.type) else input
    with torch.autocast(input.device.type, enabled=False):
        picked, total = _ChunkedLogProbs.apply(x, *operands, target, transform)  # type: ignore[no-untyped-call]
    return picked, total


def head_operands(head: nn.Module, input: Tensor) -> HeadOperands:
    """The operands of a head's logits, where its table is frozen.

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
        size = weight.shape[0]  # no row trains: an empty index after the last row
        none, no_bias = weight[size:], None if bias is None else bias[size:]
        operands = HeadOperands(weight, bias, none, no_bias, size, size, None)
    if operands is None:
        raise PartialEmbeddingError(
            f"The chunked loss needs a head whose table is frozen apart from its trainable rows, but got "
            f"{type(head).__name__}, which trains as a whole or computes its logits in a way of its own. Use the "
            "plain loss for it."
        )
    return operands


class ChunkedCrossEntropy(torch.autograd.Function):
    """Loss and, where they are needed, gradients, in one pass over the chunks."""

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, weight: Tensor, bias: Tensor | None, rows: Tensor, bias_rows: Tensor | None,
        base_size: int, start: int, ids: Tensor | None, target: Tensor,
        reduction: str, ignore_index: int, label_smoothing: float, z_loss: float, transform: Transform | None,
    ) -> Tensor:  # fmt: skip
        head = HeadOperands(weight, bias, rows, bias_rows, base_size, start, ids)
        needs = [ctx.needs_input_grad[number] for number in (0, 3, 4)]
        options = (reduction, ignore_index, label_smoothing, z_loss)
        if torch.compiler.is_compiling() and (transform is None or isinstance(transform, Steps)):
            steps = Steps() if transform is None else transform
            results = torch.ops.hf_partial_embed.chunked_cross_entropy(
                x, *head, target, *needs, *options, steps.names, steps.numbers
            )
        else:
            results = _loss_and_gradients(x, head, target, needs, *options, transform)
        loss: Tensor
        loss, scale, *gradients = results
        ctx.save_for_backward(scale, *(grad if need else None for grad, need in zip(gradients, needs, strict=True)))
        ctx.dtype = x.dtype
        return loss

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        scale, *gradients = ctx.saved_tensors
        scale = grad * scale
        grad_x, grad_rows, grad_bias = (
            None if saved is None else (saved * scale).to(ctx.dtype) for saved in gradients
        )
        return grad_x, None, None, grad_rows, grad_bias, *[None] * 9


def _loss_and_gradients(
    x: Tensor, head: HeadOperands, target: Tensor, needs: Sequence[bool],
    reduction: str, ignore_index: int, label_smoothing: float, z_loss: float, transform: Transform | None,
) -> tuple[Tensor, Tensor, Tensor | None, Tensor | None, Tensor | None]:  # fmt: skip
    """The loss; what its gradients are yet to be multiplied with; and those of hidden states, rows and bias.

    Args:
        needs: which of the three gradients are needed; the others are `None`.
    """
    rows, size = head.rows, head.weight.shape[0]
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
    # Accumulated over many chunks, so in float32 whatever the head's dtype.
    grad_x = (torch.empty_like(x) if everything else torch.zeros_like(x)) if needs[0] else None
    grad_rows = rows.new_zeros(rows.shape, dtype=exact) if needs[1] else None
    grad_bias = rows.new_zeros(len(rows), dtype=exact) if needs[2] else None

    chunks = Chunks(head, x, transform, len(target))
    for span in chunks.spans:
        labels = target[span].unsqueeze(1)
        positions = span if everything else kept[span]
        part = x[positions]
        # Summed over the chunk, so that the loss does not depend on how many positions a block has.
        picked, normalizers = loss.new_empty(2, len(part), 1)
        total = loss.new_zeros(())
        for block in chunks.blocks(part):
            logits = chunks.logits(block)
            own = logits.gather(1, labels[block]) if z_loss else None  # before they may be overwritten
            grad = chunks.log_softmax(logits)
            picked[block] = grad.gather(1, labels[block])
            if label_smoothing:
                total += grad.sum()
            if own is not None:
                normalizers[block] = own.to(exact) - picked[block]
            if not any(needs):
                continue
            grad.exp_()
            if z_loss:
                grad.mul_(1 + 2 * z_loss * normalizers[block])
            if label_smoothing:
                grad.sub_(label_smoothing / size)
            grad.scatter_add_(1, labels[block], grad.new_full((1, 1), label_smoothing - 1).expand_as(labels[block]))
            chunks.set_gradient(block, grad)
        loss -= picked.sum() * (1 - label_smoothing)
        if label_smoothing:
            loss -= total * (label_smoothing / size)
        if z_loss:
            loss += normalizers.square().sum() * z_loss
        if not any(needs):
            continue
        grad_new = row_columns(chunks.raw, head)
        if grad_x is not None:
            grad_x[positions] = head_gradient(chunks.raw, grad_new, head)
        _add_row_gradients(grad_new, part, grad_rows, grad_bias)
    # Without any position the mean is NaN, as in F.cross_entropy.
    scale = 1.0 if reduction == "sum" else (1 / len(target) if len(target) else float("nan"))
    return loss * scale, loss.new_tensor(scale if len(target) else 0.0), grad_x, grad_rows, grad_bias


torch.library.define(
    "hf_partial_embed::chunked_cross_entropy",
    "(Tensor x, Tensor weight, Tensor? bias, Tensor rows, Tensor? bias_rows, SymInt base_size, SymInt start, "
    "Tensor? ids, Tensor target, bool needs_x, bool needs_rows, bool needs_bias, str reduction, SymInt ignore_index, "
    "float label_smoothing, float z_loss, str[] names, float[] numbers) -> (Tensor, Tensor, Tensor, Tensor, Tensor)",
    tags=(torch.Tag.pt2_compliant_tag,),
)


@torch.library.impl("hf_partial_embed::chunked_cross_entropy", "CompositeExplicitAutograd")
def _(*args: Any) -> tuple[Tensor, ...]:
    x, head, target, needs, options, steps = _arguments(args)
    results = _loss_and_gradients(x, head, target, needs, *options, steps if steps.names else None)
    return tuple(x.new_empty(0) if value is None else value for value in results)


# Not `register_fake`, which looks for its caller in all modules that are loaded: 60 ms of an import.
@torch.library.impl("hf_partial_embed::chunked_cross_entropy", "Meta")
def _(*args: Any) -> tuple[Tensor, ...]:
    x, head, _, needs, _, _ = _arguments(args)
    exact = torch.promote_types(torch.float32, x.dtype)
    rows = head.rows
    return (
        x.new_empty((), dtype=exact),
        x.new_empty((), dtype=exact),
        torch.empty_like(x) if needs[0] else x.new_empty(0),
        rows.new_empty(rows.shape, dtype=exact) if needs[1] else x.new_empty(0),
        rows.new_empty(rows.shape[0], dtype=exact) if needs[2] else x.new_empty(0),
    )


def _arguments(
    args: Any,
) -> tuple[Tensor, HeadOperands, Tensor, list[bool], tuple[str, int, float, float], Steps]:
    """What the operator was called with, in the order of its schema."""
    return args[0], HeadOperands(*args[1:8]), args[8], list(args[9:12]), args[12:16], Steps(*args[16:])


class _ChunkedLogProbs(torch.autograd.Function):
    """Forward and backward of `linear_log_probs`; the backward computes the logits again."""

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, weight: Tensor, bias: Tensor | None, rows: Tensor, bias_rows: Tensor | None,
        base_size: int, start: int, ids: Tensor | None, target: Tensor, transform: Transform | None,
    ) -> tuple[Tensor, Tensor]:  # fmt: skip
        head = HeadOperands(weight, bias, rows, bias_rows, base_size, start, ids)
        chunks = Chunks(head, x, transform, len(x))
        picked, total = x.new_empty(len(x), dtype=chunks.exact), x.new_empty(len(x), dtype=chunks.exact)
        for span in chunks.spans:
            for block in chunks.blocks(x[span]):
                log_probs = chunks.log_softmax(chunks.logits(block))
                picked[span][block] = log_probs.gather(1, target[span][block].unsqueeze(1)).squeeze(1)
                total[span][block] = log_probs.sum(1)
        ctx.save_for_backward(x, weight, bias, rows, bias_rows, ids, target)
        ctx.base_size, ctx.start, ctx.transform = base_size, start, transform
        return picked, total

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, grad_picked: Tensor, grad_total: Tensor) -> tuple[Tensor | None, ...]:
        x, weight, bias, rows, bias_rows, ids, target = ctx.saved_tensors
        head = HeadOperands(weight, bias, rows, bias_rows, ctx.base_size, ctx.start, ids)
        chunks = Chunks(head, x, ctx.transform, len(x))
        grad_x = torch.empty_like(x) if ctx.needs_input_grad[0] else None
        grad_rows = rows.new_zeros(rows.shape, dtype=chunks.exact) if ctx.needs_input_grad[3] else None
        grad_bias = rows.new_zeros(len(rows), dtype=chunks.exact) if ctx.needs_input_grad[4] else None
        for span in chunks.spans:
            for block in chunks.blocks(x[span]):
                one, every = grad_picked[span][block].unsqueeze(1), grad_total[span][block].unsqueeze(1)
                grad = chunks.log_softmax(chunks.logits(block)).exp_()
                grad.mul_(-one - every * weight.shape[0]).add_(every)
                grad.scatter_add_(1, target[span][block].unsqueeze(1), one)
                chunks.set_gradient(block, grad)
            grad_new = row_columns(chunks.raw, head)
            if grad_x is not None:
                grad_x[span] = head_gradient(chunks.raw, grad_new, head)
            _add_row_gradients(grad_new, x[span], grad_rows, grad_bias)
        grad_rows, grad_bias = (None if sums is None else sums.to(x.dtype) for sums in (grad_rows, grad_bias))
        return grad_x, None, None, grad_rows, grad_bias, *[None] * 5


class Chunks:
    """Log-probabilities of one block of positions at a time, in buffers that all chunks and blocks share.

    The matmuls take a whole chunk. What comes between them, transform and softmax, takes a block of it at a time.

    Attributes:
        spans: the slice of positions of each chunk.
        raw: the head's logits of the present chunk, `(n, V)`, which turn into their gradient block by block.
    """

    def __init__(self, head: HeadOperands, x: Tensor, transform: Transform | None, count: int) -> None:
        self.head, self.transform = head, transform
        self.exact = torch.promote_types(torch.float32, x.dtype)
        size = head.weight.shape[0]
        position_bytes = size * self.exact.itemsize
        step = self._block = min(chunk_positions(position_bytes), max(1, count))
        if x.dtype != self.exact and x.device.type == "cpu":
            self._block = min(step, max(1, BLOCK_BYTES // position_bytes) * torch.get_num_threads())
        self.spans = [slice(start, min(start + step, count)) for start in range(0, count, step)]
        self._logits = x.new_empty(step, size)
        in_place = transform is None and x.dtype == self.exact  # the backward of a transform may need its logits
        self._log_probs = self._logits if in_place else x.new_empty(self._block, size, dtype=self.exact)

    def blocks(self, part: Tensor) -> Iterator[slice]:
        """Computes the logits of a chunk, and gives the slice of each block of it."""
        self.raw = head_logits(part, self.head, out=self._logits[: len(part)])
        for start in range(0, len(part), self._block):
            yield slice(start, min(start + self._block, len(part)))

    def logits(self, block: slice) -> Tensor:
        """The logits of a block after `transform`."""
        self._leaf = self.raw[block]
        self._out = self._leaf
        if isinstance(self.transform, Steps):
            self._out, self._kept = self.transform.forward(self._leaf)
        elif self.transform is not None:
            self._leaf = self._leaf.detach().requires_grad_(True)
            with torch.enable_grad():
                self._out = self.transform(self._leaf)
        return self._out.detach()

    def log_softmax(self, logits: Tensor) -> Tensor:
        """The log-probabilities of a block's logits, which may be overwritten with them."""
        out = self._log_probs[: len(logits)]
        if logits.dtype != self.exact:  # a cast by log_softmax would make another tensor
            logits = out.copy_(logits)
        return torch.log_softmax(logits, 1, out=out)

    def set_gradient(self, block: slice, grad: Tensor) -> None:
        """Turns a block of `raw` into its gradient.

        Args:
            block: the one that `logits` was called with last.
            grad: the gradient of what it returned.
        """
        if isinstance(self.transform, Steps):
            grad = self.transform.backward(grad.to(self._out.dtype), self._kept)
        elif self.transform is not None:
            (grad,) = torch.autograd.grad(self._out, self._leaf, grad.to(self._out.dtype))
        if len(grad) == len(self.raw) and grad.dtype == self.raw.dtype:
            self.raw = grad
        else:
            self.raw[block] = grad


def _add_row_gradients(grad_new: Tensor, part: Tensor, grad_rows: Tensor | None, grad_bias: Tensor | None) -> None:
    if grad_rows is not None:
        grad_rows += grad_new.t() @ part
    if grad_bias is not None:
        grad_bias += grad_new.sum(0)
