"""Logits that are not computed, and what a model may do with them on the way to its loss.

They are no tensor subclass, so that `torch.compile` can trace them: it knows no attributes of such tensors.
"""

from __future__ import annotations

import builtins
import math
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..errors import PartialEmbeddingError
from ..modules.loss import linear_cross_entropy, linear_log_probs
from ..modules.steps import Steps
from .frozen_positions import FrozenPositions

__all__ = ["Deferred", "DeferredLogits"]


class Deferred:
    """Values over positions and vocabulary that are not computed; to a model they look like a tensor.

    Functions of torch and methods that have a chunked form are methods of the subclasses. All others raise.

    Args:
        hidden (`torch.Tensor` of shape `(..., dim)`): the hidden states at its positions.
        head: the head.
        dtype: that of the values.
        steps: the operations on the head's logits so far, to be applied before the softmax.
        autocast: autocast's dtype when the head was called; `None` if it was off.
        owner: the model's class name, for messages.
    """

    def __init__(
        self,
        hidden: Tensor,
        head: nn.Linear,
        dtype: torch.dtype,
        steps: Steps,
        autocast: torch.dtype | None,
        owner: str,
    ) -> None:
        self.hidden, self.head, self.dtype = hidden, head, dtype
        self.steps, self.autocast, self.owner = steps, autocast, owner

    @property
    def shape(self) -> torch.Size:
        return torch.Size((*self.hidden.shape[:-1], self.head.out_features))

    def size(self, dim: int | None = None) -> Any:
        return self.shape if dim is None else self.shape[dim]

    def numel(self) -> int:
        return self.shape.numel()

    def __len__(self) -> int:
        return self.shape[0]

    def in_rows(self) -> tuple[Tensor, nn.Linear, Steps | None]:
        """Hidden states `(N, dim)`, head, and the function of the logits to apply, if it is more than `float()`."""
        transform = None if all(name == "float32" for name in self.steps.names) else self.steps
        return self.hidden.reshape(-1, self.hidden.shape[-1]), self.head, transform

    def autocasting(self) -> torch.autocast:
        """Autocast as it was when the head was called."""
        return torch.autocast(self.hidden.device.type, dtype=self.autocast, enabled=self.autocast is not None)

    def refuse(self, name: str) -> PartialEmbeddingError:
        """The error for an operation that has no chunked form."""
        return PartialEmbeddingError(
            f"chunked_loss cannot be used with {self.owner}: before or beside the cross-entropy its logits go "
            f"through {name}, for which there is no chunked form. Leave chunked_loss out for this model."
        )

    def __getattr__(self, name: str) -> Any:
        if name in _AS_HIDDEN:
            return getattr(self.hidden, name)
        if not name.startswith("_") and callable(getattr(torch.Tensor, name, None)):
            return _Refusal(self, name)
        raise AttributeError(f"{type(self).__name__!r} object has no attribute {name!r}")

    @classmethod
    def __torch_function__(cls, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None) -> Any:
        deferred = args[0] if args else None
        method = getattr(type(deferred), _METHODS.get(func, ""), None)
        if method is None or not isinstance(deferred, Deferred):
            deferred = next(arg for arg in (*args, *(kwargs or {}).values()) if isinstance(arg, Deferred))
            raise deferred.refuse(getattr(func, "__name__", str(func)))
        return method(*args, **(kwargs or {}))


class _Refusal:
    """A method without a chunked form: only its call is an error, so that `hasattr` is none."""

    def __init__(self, deferred: Deferred, name: str) -> None:
        self.deferred, self.name = deferred, name

    def __call__(self, *args: object, **kwargs: object) -> Any:
        raise self.deferred.refuse(self.name)


def _refused_operator(name: str) -> Callable[..., Any]:
    def operator(self: Deferred, *args: object) -> Any:
        raise self.refuse(name.strip("_"))

    return operator


# Python looks for operators in the class only. In place they would not change what other names stand for.
_OPERATORS = (
    "add sub matmul pow mod truediv radd rsub rmatmul rpow rtruediv iadd isub imul itruediv neg lt le gt ge setitem"
)
for _name in _OPERATORS.split():
    setattr(Deferred, f"__{_name}__", _refused_operator(_name))

# What logits have in common with the hidden states.
_AS_HIDDEN = frozenset(
    ("device", "dim", "get_device", "is_cuda", "is_floating_point", "is_meta", "layout", "ndim", "requires_grad")
)


class DeferredLogits(Deferred):
    """Logits that are not computed.

    Attributes:
        frozen: positions of a frozen prefix.
        numbers (`torch.Tensor` of shape `(..., 1)`): which of them each position is; `None` if it is none.
    """

    frozen: FrozenPositions | None = None
    numbers: Tensor | None = None

    def at(self, places: Callable[[Tensor], Tensor]) -> DeferredLogits:
        """The logits of other positions, or in another shape, which `places` gives of anything at these."""
        return self._like(places(self.hidden), None if self.numbers is None else places(self.numbers))

    def then(self, dtype: torch.dtype, name: str, number: Any = 0.0) -> DeferredLogits:
        """These logits after one more step."""
        changed = self._like(self.hidden, self.numbers)
        changed.dtype, changed.steps = dtype, self.steps.then(name, number)
        return changed

    def _like(self, hidden: Tensor, numbers: Tensor | None) -> DeferredLogits:
        made = DeferredLogits(hidden, self.head, self.dtype, self.steps, self.autocast, self.owner)
        made.frozen, made.numbers = self.frozen, numbers
        return made

    def contiguous(self) -> DeferredLogits:
        return self

    def reshape(self, *shape: Any) -> DeferredLogits:
        sizes = list(shape[0] if len(shape) == 1 and isinstance(shape[0], (tuple, list)) else shape)
        vocabulary = self.head.out_features
        if not sizes or isinstance(sizes[-1], torch.dtype) or sizes[-1] not in (-1, vocabulary):
            raise self.refuse("reshape")
        if sizes[-1] == -1 and self.numel() != math.prod(sizes[:-1]) * vocabulary:
            raise self.refuse("reshape")
        return self.at(lambda values: values.reshape(*sizes[:-1], values.shape[-1]))

    view = reshape

    def flatten(self, start_dim: int = 0, end_dim: int = -1) -> DeferredLogits:
        if end_dim % self.ndim == self.ndim - 1:
            raise self.refuse("flatten")
        return self.at(lambda values: values.flatten(start_dim, end_dim))

    def __getitem__(self, key: Any) -> DeferredLogits:
        """Slices of positions, such as `logits[..., :-1, :]`, by which older losses shift."""
        parts = key if isinstance(key, tuple) else (key,)
        slices = all(part is Ellipsis or isinstance(part, slice) for part in parts)
        reaches_ids = len(parts) == self.ndim or (Ellipsis in parts and parts[-1] is not Ellipsis)
        if not slices or len(parts) > self.ndim or (reaches_ids and parts[-1] != slice(None)):
            raise self.refuse("__getitem__")
        return self.at(lambda values: values[key])

    def float(self) -> DeferredLogits:
        return self.then(torch.float32, "float32")

    def to(self, *args: Any, **kwargs: Any) -> DeferredLogits:
        """With a dtype, a device, or both; only the device on which they are."""
        sample = torch.empty(0, dtype=self.dtype, device=self.device).to(*args, **kwargs)
        if sample.device != self.device:
            raise self.refuse("to")
        return self.then(sample.dtype, str(sample.dtype).removeprefix("torch."))

    def tanh(self) -> DeferredLogits:
        return self.then(self.dtype, "tanh")

    def mul(self, number: Any) -> DeferredLogits:
        return self._by_number("mul", number)

    def div(self, number: Any) -> DeferredLogits:
        return self._by_number("div", number)

    __mul__ = __rmul__ = mul
    __truediv__ = div

    def _by_number(self, name: str, number: Any) -> DeferredLogits:
        if not (isinstance(number, (int, builtins.float)) or (type(number) is Tensor and not number.dim())):
            raise self.refuse(name)
        # A number of no dimension changes no dtype of a tensor of positions; logits are of floating point.
        return self.then(self.dtype, name, number)

    def cross_entropy(
        self,
        target: Tensor,
        weight: Tensor | None = None,
        size_average: None = None,
        ignore_index: int = -100,
        reduce: None = None,
        reduction: str = "mean",
        label_smoothing: builtins.float = 0.0,
    ) -> Tensor:
        usual = size_average is None and reduce is None and weight is None and reduction in ("mean", "sum")
        if not usual or target.is_floating_point() or self.ndim != 2:
            raise self.refuse("cross_entropy")
        hidden, head, transform = self.in_rows()
        options: dict[str, Any] = {"reduction": reduction, "ignore_index": ignore_index, "transform": transform}
        with self.autocasting():
            if self.frozen is not None and self.numbers is not None and not label_smoothing:
                loss = self.frozen.cross_entropy(hidden, head, target, self.numbers.flatten(), **options)
            else:
                loss = linear_cross_entropy(hidden, head, target, label_smoothing=label_smoothing, **options)
        # Under autocast F.cross_entropy returns float32.
        return loss if torch.is_autocast_enabled(loss.device.type) else loss.to(self.dtype)

    def log_softmax(self, dim: int | None = None, _stacklevel: int = 3, dtype: Any = None) -> DeferredLogProbs:
        if dim not in (-1, self.ndim - 1) or dtype is not None:
            raise self.refuse("log_softmax")
        return DeferredLogProbs(self.hidden, self.head, self.dtype, self.steps, self.autocast, self.owner)


class DeferredLogProbs(Deferred):
    """`factor * log_softmax(logits)`, for a label smoother: `gather`, and then `sum` over the vocabulary, work."""

    factor = 1
    total: Tensor | None = None

    def neg(self) -> DeferredLogProbs:
        negative = DeferredLogProbs(self.hidden, self.head, self.dtype, self.steps, self.autocast, self.owner)
        negative.factor = -self.factor
        return negative

    __neg__ = neg

    def gather(self, dim: int, index: Tensor) -> Tensor:
        if dim not in (-1, self.ndim - 1) or index.shape != (*self.shape[:-1], 1):
            raise self.refuse("gather")
        hidden, head, transform = self.in_rows()
        with self.autocasting():
            picked, total = linear_log_probs(hidden, head, index.flatten(), transform=transform)
        self.total = total.view(index.shape) * self.factor
        return (picked.view(index.shape) * self.factor).to(self.dtype)

    def sum(self, dim: int, keepdim: bool = False, dtype: torch.dtype | None = None) -> Tensor:
        if dim not in (-1, self.ndim - 1) or self.total is None:
            raise self.refuse("sum")
        total = self.total if keepdim else self.total.squeeze(-1)
        return total.to(dtype or self.dtype)


# The method for a function of torch; the compiler asks for operators by the methods of `torch.Tensor`, too.
_METHODS: dict[Any, str] = {
    F.cross_entropy: "cross_entropy",
    F.log_softmax: "log_softmax",
    torch.tanh: "tanh",
    torch.mul: "mul",
    torch.Tensor.mul: "mul",
    torch.Tensor.__rmul__: "mul",
    torch.div: "div",
    torch.Tensor.div: "div",
    torch.Tensor.neg: "neg",
    torch.Tensor.__getitem__: "__getitem__",
}
