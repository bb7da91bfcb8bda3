"""What a model does to its logits before the loss, as data: an operator of a graph cannot be given a function."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

__all__ = ["Steps", "Transform"]

Transform = Callable[[Tensor], Tensor]


class Steps:
    """A `transform` of casts, `tanh`, products and quotients, as data.

    Args:
        names: `"tanh"`, `"mul"`, `"div"`, or the name of the dtype of a cast, in their order.
        numbers: the factor or divisor of each step; 0 where it has none.
    """

    def __init__(self, names: Sequence[str] = (), numbers: Sequence[float | Tensor] = ()) -> None:
        self.names, self.numbers = tuple(names), tuple(numbers)

    def then(self, name: str, number: float | Tensor = 0.0) -> Steps:
        """These steps and one more."""
        return Steps((*self.names, name), (*self.numbers, number))

    def __call__(self, logits: Tensor) -> Tensor:
        return self.forward(logits)[0]

    def forward(self, logits: Tensor) -> tuple[Tensor, list[Any]]:
        """The logits after all steps, and what `backward` needs of each."""
        kept: list[Any] = []
        for name, number in zip(self.names, self.numbers, strict=True):
            kept.append(logits.dtype)
            if name == "mul":
                logits = logits * number
            elif name == "div":
                logits = logits / number
            elif name == "tanh":
                logits = kept[-1] = logits.tanh()
            else:
                logits = logits.to(getattr(torch, name))
        return logits, kept

    def backward(self, grad: Tensor, kept: list[Any]) -> Tensor:
        """The gradient of the logits before all steps. By hand: autograd is switched off inside of an operator."""
        for name, number, value in zip(self.names[::-1], self.numbers[::-1], kept[::-1], strict=True):
            if name == "mul":
                grad = grad * number
            elif name == "div":
                grad = grad / number
            else:
                grad = torch.ops.aten.tanh_backward(grad, value) if name == "tanh" else grad.to(value)
        return grad
