"""Use the chunked loss inside a model's own forward, whatever the model.

A model computes `logits = head(hidden)`, perhaps scales or soft-caps them, and passes them to `F.cross_entropy`,
in its loss function or in its forward. While the chunked loss is installed and the forward is given labels, the
head returns deferred logits: an object with the shape of the logits but not their values, which records the
operations on it and turns into the loss when `F.cross_entropy` is called with it. Any other function raises an
error that names it, so that a loss of another kind is never taken for this one. Deferred logits do not leave the
forward: its output has `logits=None`, as with other fused losses.

They are no tensor subclass, so that `torch.compile` can trace them: it knows no attributes of such tensors.
"""

from __future__ import annotations

import builtins
import inspect
import math
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers.utils.generic import ModelOutput

from ..attachment.additions import Addition
from ..errors import PartialEmbeddingError
from ..modules.loss import head_operands, linear_cross_entropy, linear_log_probs
from ..modules.steps import Steps

__all__ = ["ChunkedLoss"]


class ChunkedLoss(Addition):
    """Computes the loss of a model that has trainable rows in chunks, while it is installed.

    Only forwards that are given `labels` and build a graph are changed, compiled ones too. Generation and evaluation
    compute their logits as always. Also a context manager:

    ```python
    with ChunkedLoss(model):
        model(input_ids=ids, labels=ids).loss.backward()
    ```

    Args:
        model: a model with a head over its vocabulary whose table is frozen, as `add_tokens` leaves it.
        keep_logits: leave deferred logits in the output, and defer them in a forward without labels, too: for a
            label smoother, which computes the loss from them afterwards.

    Raises:
        `PartialEmbeddingError`: the model has no head; its whole table trains, or is sharded, offloaded or
            quantised; in a forward, a loss that is not a cross-entropy over all logits.
    """

    def __init__(self, model: nn.Module, *, keep_logits: bool = False) -> None:
        super().__init__(model)
        self.keep_logits = keep_logits
        self.head = _find_head(model)
        self.active = False  # whether the model's forward is running, and defers its logits
        self._replaced: Any = None

    def _put_on(self) -> None:
        self._replaced = self.model.__dict__.get("forward")
        self.model.__dict__["forward"] = _Forward(self, self.model.forward)
        self.head.__dict__["forward"] = self._head_forward

    def _take_off(self) -> None:
        forward = self.model.__dict__.get("forward")
        if isinstance(forward, _Forward) and forward.owner is self:
            del self.model.__dict__["forward"]
            if self._replaced is not None:
                self.model.__dict__["forward"] = self._replaced
        if self.head.__dict__.get("forward") == self._head_forward:
            del self.head.__dict__["forward"]
        self.active = False

    def wanted(self, labels: object) -> bool:
        """Whether a forward that is given these labels is to defer its logits."""
        if not torch.is_grad_enabled():
            return False
        return labels is not None or (self.keep_logits and self.model.training)

    def _head_forward(self, input: Tensor) -> Any:
        if not self.active or not torch.is_grad_enabled():
            return type(self.head).forward(self.head, input)
        device = input.device.type
        autocast = torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else None
        owner = type(self.model).__name__
        return _DeferredLogits(input, self.head, autocast or input.dtype, Steps(), autocast, owner)


class _Forward:
    """A model's forward that defers logits. It is no hook: a compiler runs those of the model outside of its graph.

    It has the signature of the forward in whose place it is, which `generate` asks for.
    """

    def __init__(self, owner: ChunkedLoss, forward: Callable[..., Any]) -> None:
        self.owner, self.forward = owner, forward

    @property
    def __signature__(self) -> inspect.Signature:
        return inspect.signature(self.forward)

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        owner = self.owner
        if not owner.wanted(kwargs.get("labels")):
            return self.forward(*args, **kwargs)
        owner.active = True
        try:
            output = self.forward(*args, **kwargs)
        finally:
            owner.active = False
        return output if owner.keep_logits else _without_deferred(output)


def _find_head(model: nn.Module) -> nn.Linear:
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


class _Deferred:
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
        if method is None or not isinstance(deferred, _Deferred):
            deferred = next(arg for arg in (*args, *(kwargs or {}).values()) if isinstance(arg, _Deferred))
            raise deferred.refuse(getattr(func, "__name__", str(func)))
        return method(*args, **(kwargs or {}))


class _Refusal:
    """A method without a chunked form: only its call is an error, so that `hasattr` is none."""

    def __init__(self, deferred: _Deferred, name: str) -> None:
        self.deferred, self.name = deferred, name

    def __call__(self, *args: object, **kwargs: object) -> Any:
        raise self.deferred.refuse(self.name)


def _refused_operator(name: str) -> Callable[..., Any]:
    def operator(self: _Deferred, *args: object) -> Any:
        raise self.refuse(name.strip("_"))

    return operator


# Python looks for operators in the class only. In place they would not change what other names stand for.
_OPERATORS = (
    "add sub matmul pow mod truediv radd rsub rmatmul rpow rtruediv iadd isub imul itruediv neg lt le gt ge setitem"
)
for _name in _OPERATORS.split():
    setattr(_Deferred, f"__{_name}__", _refused_operator(_name))

# What logits have in common with the hidden states.
_AS_HIDDEN = frozenset(
    ("device", "dim", "get_device", "is_cuda", "is_floating_point", "is_meta", "layout", "ndim", "requires_grad")
)


class _DeferredLogits(_Deferred):
    """Logits that are not computed."""

    def at(self, hidden: Tensor) -> _DeferredLogits:
        """The logits of other hidden states."""
        return _DeferredLogits(hidden, self.head, self.dtype, self.steps, self.autocast, self.owner)

    def then(self, dtype: torch.dtype, name: str, number: Any = 0.0) -> _DeferredLogits:
        """These logits after one more step."""
        steps = self.steps.then(name, number)
        return _DeferredLogits(self.hidden, self.head, dtype, steps, self.autocast, self.owner)

    def contiguous(self) -> _DeferredLogits:
        return self

    def reshape(self, *shape: Any) -> _DeferredLogits:
        sizes = list(shape[0] if len(shape) == 1 and isinstance(shape[0], (tuple, list)) else shape)
        vocabulary = self.head.out_features
        if not sizes or isinstance(sizes[-1], torch.dtype) or sizes[-1] not in (-1, vocabulary):
            raise self.refuse("reshape")
        if sizes[-1] == -1 and self.numel() != math.prod(sizes[:-1]) * vocabulary:
            raise self.refuse("reshape")
        return self.at(self.hidden.reshape(*sizes[:-1], self.hidden.shape[-1]))

    view = reshape

    def flatten(self, start_dim: int = 0, end_dim: int = -1) -> _DeferredLogits:
        if end_dim % self.ndim == self.ndim - 1:
            raise self.refuse("flatten")
        return self.at(self.hidden.flatten(start_dim, end_dim))

    def __getitem__(self, key: Any) -> _DeferredLogits:
        """Slices of positions, such as `logits[..., :-1, :]`, by which older losses shift."""
        parts = key if isinstance(key, tuple) else (key,)
        slices = all(part is Ellipsis or isinstance(part, slice) for part in parts)
        reaches_ids = len(parts) == self.ndim or (Ellipsis in parts and parts[-1] is not Ellipsis)
        if not slices or len(parts) > self.ndim or (reaches_ids and parts[-1] != slice(None)):
            raise self.refuse("__getitem__")
        return self.at(self.hidden[key])

    def float(self) -> _DeferredLogits:
        return self.then(torch.float32, "float32")

    def to(self, *args: Any, **kwargs: Any) -> _DeferredLogits:
        """With a dtype, a device, or both; only the device on which they are."""
        sample = torch.empty(0, dtype=self.dtype, device=self.device).to(*args, **kwargs)
        if sample.device != self.device:
            raise self.refuse("to")
        return self.then(sample.dtype, str(sample.dtype).removeprefix("torch."))

    def tanh(self) -> _DeferredLogits:
        return self.then(self.dtype, "tanh")

    def mul(self, number: Any) -> _DeferredLogits:
        return self._by_number("mul", number)

    def div(self, number: Any) -> _DeferredLogits:
        return self._by_number("div", number)

    __mul__ = __rmul__ = mul
    __truediv__ = div

    def _by_number(self, name: str, number: Any) -> _DeferredLogits:
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
        options: dict[str, Any] = {"ignore_index": ignore_index, "label_smoothing": label_smoothing}
        with self.autocasting():
            loss = linear_cross_entropy(hidden, head, target, reduction=reduction, transform=transform, **options)
        # Under autocast F.cross_entropy returns float32.
        return loss if torch.is_autocast_enabled(loss.device.type) else loss.to(self.dtype)

    def log_softmax(self, dim: int | None = None, _stacklevel: int = 3, dtype: Any = None) -> _DeferredLogProbs:
        if dim not in (-1, self.ndim - 1) or dtype is not None:
            raise self.refuse("log_softmax")
        return _DeferredLogProbs(self.hidden, self.head, self.dtype, self.steps, self.autocast, self.owner)


class _DeferredLogProbs(_Deferred):
    """`factor * log_softmax(logits)`, for a label smoother: `gather`, and then `sum` over the vocabulary, work."""

    factor = 1
    total: Tensor | None = None

    def neg(self) -> _DeferredLogProbs:
        negative = _DeferredLogProbs(self.hidden, self.head, self.dtype, self.steps, self.autocast, self.owner)
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
