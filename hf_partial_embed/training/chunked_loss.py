"""Use the chunked loss inside a model's own forward, whatever the model.

A model computes `logits = head(hidden)`, perhaps scales or soft-caps them, and passes them to `F.cross_entropy`,
in its loss function or in its forward. While the chunked loss is installed and the forward is given labels, the
head returns deferred logits: an object with the shape of the logits but not their values, which records the
operations on it and turns into the loss when `F.cross_entropy` is called with it. Any other function raises an
error that names it, so that a loss of another kind is never taken for this one. Deferred logits do not leave the
forward: its output has `logits=None`, as with other fused losses.

Where a `FrozenPrefix` is installed, too, its positions' logits of old tokens are computed without a graph, and with a
cache only once.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from transformers.utils.generic import ModelOutput

from ..attachment.additions import Addition
from ..errors import PartialEmbeddingError
from ..modules.loss import head_operands
from ..modules.steps import Steps
from .deferred_logits import Deferred, DeferredLogits
from .frozen_prefix import FrozenPrefix

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
        self.prefix: FrozenPrefix | None = None  # of this forward
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
        logits = DeferredLogits(
            input, self.head, autocast or input.dtype, Steps(), autocast, type(self.model).__name__
        )
        if self.prefix is not None and self.prefix.positions is not None:
            logits.frozen, logits.numbers = self.prefix.positions, self.prefix.positions.numbers_in(input)
        return logits


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
        owner.active, owner.prefix = True, None
        if not torch.compiler.is_compiling() and (found := owner.others(FrozenPrefix)):
            owner.prefix = found[0]
            owner.prefix.noted = True
        try:
            output = self.forward(*args, **kwargs)
        finally:
            owner.active = False
            if owner.prefix is not None:
                owner.prefix.noted, owner.prefix.positions, owner.prefix = False, None, None
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
            if isinstance(value, Deferred):
                output[key] = None
        return output
    if isinstance(output, dict):
        return {key: None if isinstance(value, Deferred) else value for key, value in output.items()}
    if isinstance(output, tuple):  # return_dict=False: such a tuple leaves out what is None
        return tuple(value for value in output if not isinstance(value, Deferred))
    return output
