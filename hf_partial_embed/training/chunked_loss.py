"""Use the chunked loss inside a model's own forward, whatever the model.

A model computes `logits = head(hidden)`, perhaps scales or soft-caps them, and passes them to `F.cross_entropy`,
in its loss function or in its forward. While the chunked loss is installed and the forward is given labels, the
head returns deferred logits: a tensor subclass with the shape of the logits but not their values, which records
the operations on it and turns into the loss when `F.cross_entropy` is called with it. Any other function raises an
error that names it, so that a loss of another kind is never taken for this one. Deferred logits do not leave the
forward: its output has `logits=None`, as with other fused losses.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers.utils.generic import ModelOutput

from ..attachment.additions import Addition
from ..errors import PartialEmbeddingError
from ..modules.loss import head_operands, linear_cross_entropy, linear_log_probs

__all__ = ["ChunkedLoss"]

Steps = tuple[Callable[[Tensor], Tensor], ...]


class ChunkedLoss(Addition):
    """Computes the loss of a model that has trainable rows in chunks, while it is installed.

    Only forwards that are given `labels` and build a graph are changed. Generation, evaluation and compiled models
    compute their logits as always. Also a context manager:

    ```python
    with ChunkedLoss(model):
        model(input_ids=ids, labels=ids).loss.backward()
    ```

    Args:
        model: a model with a head over its vocabulary whose table is frozen, as `add_tokens` leaves it.
        outer: modules that are called instead of the model (a PEFT model).
        keep_logits: leave deferred logits in the output, and defer them in a forward without labels, too: for a
            label smoother, which computes the loss from them afterwards.

    Raises:
        `PartialEmbeddingError`: the model has no head; its whole table trains, or is sharded, offloaded or
            quantised; in a forward, a loss that is not a cross-entropy over all logits.
    """

    def __init__(self, model: nn.Module, *, outer: Sequence[nn.Module] = (), keep_logits: bool = False) -> None:
        super().__init__(model)
        self.keep_logits = keep_logits
        self.head = _find_head(model)
        self.entries = [model, *(module for module in outer if module is not model)]
        self.depth = 0
        self._handles: list[Any] = []

    def _put_on(self) -> None:
        for module in self.entries:
            self._handles.append(module.register_forward_pre_hook(self._enter, with_kwargs=True))
            self._handles.append(module.register_forward_hook(self._leave, always_call=True))
        self.head.__dict__["forward"] = self._head_forward

    def _take_off(self) -> None:
        for handle in self._handles:
            handle.remove()
        if self.head.__dict__.get("forward") == self._head_forward:
            del self.head.__dict__["forward"]
        self._handles = []
        self.depth = 0

    def _enter(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        if torch.compiler.is_compiling() or not torch.is_grad_enabled():
            return
        if kwargs.get("labels") is not None or (self.keep_logits and self.model.training) or self.depth:
            self.depth += 1

    def _leave(self, module: nn.Module, args: object, output: Any) -> Any:
        if not self.depth:
            return None
        self.depth -= 1
        return None if self.depth or self.keep_logits else _without_deferred(output)

    def _head_forward(self, input: Tensor) -> Tensor:
        if self.depth and torch.is_grad_enabled() and not torch.compiler.is_compiling():
            device = input.device.type
            autocast = torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else None
            deferred: Tensor = _DeferredLogits.make(
                autocast or input.dtype,
                hidden=input,
                head=self.head,
                steps=(),
                autocast=autocast,
                owner=type(self.model).__name__,
            )
            return deferred
        logits: Tensor = type(self.head).forward(self.head, input)
        return logits


def _find_head(model: nn.Module) -> nn.Module:
    get = getattr(model, "get_output_embeddings", lambda: None)
    head = get()
    name = type(model).__name__
    if not isinstance(head, nn.Linear):
        raise PartialEmbeddingError(
            f"chunked_loss needs a head over the vocabulary, but get_output_embeddings() of {name} gave "
            f"{type(head).__name__}. Leave chunked_loss out for this model."
        )
    weight = head._parameters.get("weight")
    if "_hf_hook" in head.__dict__ or type(weight) is not nn.Parameter or weight.is_meta or not weight.numel():
        raise PartialEmbeddingError(
            f"chunked_loss reads the head of {name} outside of its forward, but it is offloaded, sharded or quantised "
            f"({type(weight).__name__}). Leave chunked_loss out here."
        )
    if "forward" in head.__dict__:
        raise PartialEmbeddingError(
            f"The head of {name} has had its forward replaced already (by another chunked or fused loss?). Take that "
            "off first, or leave chunked_loss out."
        )
    with torch.no_grad():
        head_operands(head, weight[:1])  # raises for any other head that cannot be used
    return head


def _without_deferred(output: Any) -> Any:
    """The output with `None` for deferred logits."""
    if isinstance(output, ModelOutput):
        for key, value in list(output.items()):
            if isinstance(value, _Deferred):
                output[key] = None
        return output
    if isinstance(output, dict):
        return {key: None if isinstance(value, _Deferred) else value for key, value in output.items()}
    if isinstance(output, tuple):  # return_dict=False: such a tuple leaves out what is None
        return tuple(value for value in output if not isinstance(value, _Deferred))
    return output


class _Deferred(torch.Tensor):
    """A tensor over positions and vocabulary that is not computed: a scalar, expanded to its shape.

    Attributes:
        hidden (`torch.Tensor` of shape `(..., dim)`): the hidden states at its positions.
        head: the head.
        steps: the operations on the head's logits so far, to be applied before the softmax.
        autocast: autocast's dtype when the head was called; `None` if it was off.
        owner: the model's class name, for messages.
    """

    hidden: Tensor
    head: nn.Linear
    steps: Steps
    autocast: torch.dtype | None
    owner: str

    @classmethod
    def make(cls, dtype: torch.dtype, hidden: Tensor, head: Any, steps: Steps, **state: Any) -> Any:
        with torch._C.DisableTorchFunctionSubclass():
            number = hidden.new_empty((), dtype=dtype)
            made = number.expand(*hidden.shape[:-1], head.out_features).as_subclass(cls)
        made.__dict__.update(hidden=hidden, head=head, steps=steps, **state)
        return made

    def but(self, cls: type[_Deferred] | None = None, dtype: torch.dtype | None = None, **changes: Any) -> Any:
        """A copy with some of its attributes changed."""
        return (cls or type(self)).make(dtype or self.dtype, **{**self.__dict__, **changes})

    def in_rows(self) -> tuple[Tensor, nn.Linear, Callable[[Tensor], Tensor] | None]:
        """Hidden states `(N, dim)`, head, and the function of the logits to apply, if it is more than `float()`."""
        transform = None if all(step is _in_float32 for step in self.steps) else _Chain(self.steps)
        return self.hidden.reshape(-1, self.hidden.shape[-1]), self.head, transform

    def autocasting(self) -> torch.autocast:
        """Autocast as it was when the head was called."""
        return torch.autocast(self.device.type, dtype=self.autocast, enabled=self.autocast is not None)

    @classmethod
    def __torch_function__(cls, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        deferred = next(arg for arg in (*args, *kwargs.values()) if isinstance(arg, _Deferred))
        with torch._C.DisableTorchFunctionSubclass():
            if func in _READS:
                return func(*args, **kwargs)
            handler = _HANDLERS[type(deferred)].get(func)
            answer = NotImplemented if handler is None else handler(*args, **kwargs)
        if answer is NotImplemented:
            raise PartialEmbeddingError(
                f"chunked_loss cannot be used with {deferred.owner}: before or beside the cross-entropy its logits go "
                f"through {getattr(func, '__name__', func)}, for which there is no chunked form. Leave "
                "chunked_loss out for this model."
            )
        return answer


class _DeferredLogits(_Deferred):
    """Logits that are not computed."""


class _DeferredLogProbs(_Deferred):
    """`factor * log_softmax(logits)`, for a label smoother: `gather`, and then `sum` over the vocabulary, work."""

    factor: int
    total: Tensor | None


class _Chain:
    """The steps between head and softmax, for one chunk of logits."""

    def __init__(self, steps: Steps) -> None:
        self.steps = steps

    def __call__(self, logits: Tensor) -> Tensor:
        for step in self.steps:
            logits = step(logits)
        return logits


def _in_float32(values: Tensor) -> Tensor:
    return values.float()


# Functions that need no values.
_READS = {
    torch.Tensor.size, torch.Tensor.dim, torch.Tensor.numel, torch.Tensor.is_floating_point, torch.is_floating_point,
    torch.Tensor.get_device, torch.Tensor.__len__,
    *(
        getattr(torch.Tensor, name).__get__
        for name in ("shape", "ndim", "dtype", "device", "layout", "is_cuda", "is_meta", "requires_grad")
    ),
}  # fmt: skip


def _reshape(logits: _Deferred, *shape: Any) -> Any:
    sizes = list(shape[0] if len(shape) == 1 and isinstance(shape[0], (tuple, list)) else shape)
    if not sizes or not all(isinstance(size, int) for size in sizes):
        return NotImplemented
    if sizes[-1] == -1:
        sizes[-1] = logits.numel() // max(1, torch.Size(sizes[:-1]).numel())
    if sizes[-1] != logits.shape[-1]:
        return NotImplemented
    return logits.but(hidden=logits.hidden.reshape(*sizes[:-1], logits.hidden.shape[-1]))


def _flatten(logits: _Deferred, start_dim: int = 0, end_dim: int = -1) -> Any:
    if end_dim % logits.dim() == logits.dim() - 1:
        return NotImplemented
    return logits.but(hidden=logits.hidden.flatten(start_dim, end_dim))


def _index(logits: _Deferred, key: Any) -> Any:
    """Slices of positions, such as `logits[..., :-1, :]`, by which older losses shift."""
    parts = key if isinstance(key, tuple) else (key,)
    if not all(part is Ellipsis or isinstance(part, slice) for part in parts):
        return NotImplemented
    reaches_ids = len(parts) == logits.dim() or (Ellipsis in parts and parts[-1] is not Ellipsis)
    if len(parts) > logits.dim() or (reaches_ids and parts[-1] != slice(None)):
        return NotImplemented
    return logits.but(hidden=logits.hidden[key])


def _float(logits: _Deferred) -> Any:
    return logits.but(dtype=torch.float32, steps=(*logits.steps, _in_float32))


def _to(logits: _Deferred, *args: Any, **kwargs: Any) -> Any:
    """`to` with a dtype, a device, or both; only the device on which they are."""
    sample = torch.empty(0, dtype=logits.dtype, device=logits.device).to(*args, **kwargs)
    if sample.device != logits.device:
        return NotImplemented
    return logits.but(dtype=sample.dtype, steps=(*logits.steps, _Step(torch.Tensor.to, (sample.dtype,))))


class _Step:
    """`function(values, *args)`."""

    def __init__(self, function: Callable[..., Tensor], args: tuple[Any, ...]) -> None:
        self.function, self.args = function, args

    def __call__(self, values: Tensor) -> Tensor:
        return self.function(values, *self.args)


class _ByNumber:
    """An elementwise operation on logits, with a number or without."""

    def __init__(self, function: Callable[..., Tensor]) -> None:
        self.function = function

    def __call__(self, logits: Any, *args: Any) -> Any:
        numbers = all(isinstance(arg, (int, float)) or (type(arg) is Tensor and not arg.dim()) for arg in args)
        if not numbers or not isinstance(logits, _Deferred):
            return NotImplemented
        step = _Step(self.function, args)
        dtype = step(torch.empty(1, dtype=logits.dtype, device=logits.device)).dtype
        return logits.but(dtype=dtype, steps=(*logits.steps, step))


def _cross_entropy(
    input: Any,
    target: Tensor,
    weight: Tensor | None = None,
    size_average: None = None,
    ignore_index: int = -100,
    reduce: None = None,
    reduction: str = "mean",
    label_smoothing: float = 0.0,
) -> Any:
    usual = size_average is None and reduce is None and weight is None and reduction in ("mean", "sum")
    if not isinstance(input, _Deferred) or not usual or target.is_floating_point() or input.dim() != 2:
        return NotImplemented
    hidden, head, transform = input.in_rows()
    options: dict[str, Any] = {"ignore_index": ignore_index, "label_smoothing": label_smoothing}
    with input.autocasting():
        loss = linear_cross_entropy(hidden, head, target, reduction=reduction, transform=transform, **options)
    # Under autocast F.cross_entropy returns float32.
    return loss if torch.is_autocast_enabled(loss.device.type) else loss.to(input.dtype)


def _log_softmax(logits: _Deferred, dim: int | None = None, _stacklevel: int = 3, dtype: Any = None) -> Any:
    if dim not in (-1, logits.dim() - 1) or dtype is not None:
        return NotImplemented
    return logits.but(_DeferredLogProbs, factor=1, total=None)


def _negative(log_probs: _DeferredLogProbs) -> Any:
    return log_probs.but(factor=-log_probs.factor)


def _gather(log_probs: _DeferredLogProbs, dim: int, index: Tensor) -> Any:
    if dim not in (-1, log_probs.dim() - 1) or index.shape != (*log_probs.shape[:-1], 1):
        return NotImplemented
    hidden, head, transform = log_probs.in_rows()
    with log_probs.autocasting():
        picked, total = linear_log_probs(hidden, head, index.flatten(), transform=transform)
    log_probs.total = total.view(index.shape) * log_probs.factor
    return (picked.view(index.shape) * log_probs.factor).to(log_probs.dtype)


def _sum(log_probs: _DeferredLogProbs, dim: int, keepdim: bool = False, dtype: torch.dtype | None = None) -> Any:
    if dim not in (-1, log_probs.dim() - 1) or log_probs.total is None:
        return NotImplemented
    total = log_probs.total if keepdim else log_probs.total.squeeze(-1)
    return total.to(dtype or log_probs.dtype)


_HANDLERS: dict[type[_Deferred], dict[Any, Callable[..., Any]]] = {
    _DeferredLogits: {
        torch.Tensor.view: _reshape,
        torch.Tensor.reshape: _reshape,
        torch.Tensor.flatten: _flatten,
        torch.Tensor.__getitem__: _index,
        torch.Tensor.contiguous: lambda logits: logits,
        torch.Tensor.float: _float,
        torch.Tensor.to: _to,
        torch.tanh: _ByNumber(torch.tanh),
        torch.Tensor.tanh: _ByNumber(torch.tanh),
        torch.Tensor.mul: _ByNumber(torch.mul),
        torch.Tensor.__mul__: _ByNumber(torch.mul),
        torch.Tensor.__rmul__: _ByNumber(torch.mul),
        torch.Tensor.div: _ByNumber(torch.div),
        torch.Tensor.__truediv__: _ByNumber(torch.div),
        F.cross_entropy: _cross_entropy,
        F.log_softmax: _log_softmax,
    },
    _DeferredLogProbs: {
        torch.Tensor.neg: _negative,
        torch.Tensor.__neg__: _negative,
        torch.Tensor.gather: _gather,
        torch.Tensor.sum: _sum,
    },
}
