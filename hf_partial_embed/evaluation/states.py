"""A causal model in two halves: up to its head once for each window, its head on as many states as memory allows."""

from __future__ import annotations

import inspect
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor

from ..errors import PartialEmbeddingError
from ..modules.loss import CHUNK_BYTES, CHUNK_POSITIONS

__all__ = ["HeadStates"]

# Ids of the trial: all weights are read for it, and few ids take little more than one.
_TRIED = 3


class HeadStates:
    """States that a model's head is given, and the model's logits of any such states.

    The logits are made by the model's own forward, in which its base model gives back what it gave once before and
    the head is handed the states asked for. So what the model does to its logits behind the head (scaling,
    soft-capping) is done. Whether that is what the whole forward gives is tried on the first window; where it is
    not (no base model of its own, a head that is called elsewhere), the states are the logits themselves, and
    `in_chunks` is false.

    Args:
        model: a causal model, in eval mode.
    """

    def __init__(self, model: Any) -> None:
        self.model = model
        self.in_chunks = False
        self.forwards = 0
        self._head: Any = model.get_output_embeddings()
        self._body: Any = getattr(model, "base_model", None)
        self._device = next(model.get_input_embeddings().parameters()).device
        parameters = inspect.signature(model.forward).parameters
        open_ended = any(parameter.kind is parameter.VAR_KEYWORD for parameter in parameters.values())
        self._options = {"use_cache": False} if open_ended or "use_cache" in parameters else {}
        self._takes_mask = open_ended or "attention_mask" in parameters
        self._probe: Tensor | None = None
        self._least = 0  # positions that a head has to be given, whose whole table is read for the first one
        self._body_output: Any = None

    def states(self, windows: Sequence[Sequence[int]]) -> list[Tensor]:
        """Run the model over windows of ids, padded on the right, where a causal model does not look.

        Returns:
            For each window `(length, d)`: at each position the state of which the next token is predicted.
        """
        if self._probe is None:
            self._try(windows[0][:_TRIED])
        self.forwards += len(windows)
        longest = max(map(len, windows))
        ids = torch.tensor([[*ids, *[ids[-1]] * (longest - len(ids))] for ids in windows], device=self._device)
        mask = torch.tensor([[1] * len(ids) + [0] * (longest - len(ids)) for ids in windows], device=self._device)
        states = self._head_input(ids, mask) if self.in_chunks else self._run(ids, mask)
        return [states[row, : len(ids)] for row, ids in enumerate(windows)]

    def logits(self, states: Tensor) -> Tensor:
        """The model's logits, float32 `(n, V)`, of `n` states of `states`."""
        if not self.in_chunks:
            return states.float()
        assert self._probe is not None
        with self._replaced_body(), _head_given(self._head, states[None]):
            logits: Tensor = self._run(self._probe, None)
        return logits[0].float()

    @property
    def positions_at_once(self) -> int:
        """How many positions' logits fit into a chunk; at least 128, as in the chunked loss."""
        size = getattr(self._head, "out_features", None) or self.model.config.get_text_config().vocab_size
        return max(CHUNK_POSITIONS, CHUNK_BYTES // (4 * int(size)))

    def _run(self, ids: Tensor, mask: Tensor | None) -> Tensor:
        more = {} if mask is None or not self._takes_mask else {"attention_mask": mask}
        logits: Tensor = self.model(input_ids=ids, **more, **self._options).logits
        return logits

    def _head_input(self, ids: Tensor, mask: Tensor | None) -> Tensor:
        with _head_given(self._head, None, self._least) as seen:
            self._run(ids, mask)
        if len(seen) != 1:
            raise PartialEmbeddingError(f"{type(self.model).__name__} calls its head {len(seen)} times in a forward.")
        return seen[0]

    def _try(self, ids: Sequence[int]) -> None:
        """Find out whether the two halves make the whole."""
        self._probe = probe = torch.tensor([list(ids)], device=self._device)
        if self._head is None or self._body is None or self._body is self.model:
            return
        outputs: list[Any] = []
        handle = self._body.register_forward_hook(lambda _, args, output: outputs.append(output))
        try:
            expected = self._run(probe, None)
        finally:
            handle.remove()
        if len(outputs) != 1:
            return
        self._body_output = outputs[0]
        for self._least in (0, 1):
            try:
                self.in_chunks = True
                with self._replaced_body():
                    states = self._head_input(probe, None)
                found = self.logits(states[0])
                break
            except (ValueError, RuntimeError, TypeError, IndexError, AttributeError, AssertionError):
                self.in_chunks = False  # a forward of another shape, which is run whole
        else:
            return
        same = found.shape == expected[0].shape
        self.in_chunks = same and torch.allclose(found, expected[0].float(), rtol=1e-4, atol=1e-4, equal_nan=True)

    @contextmanager
    def _replaced_body(self) -> Iterator[None]:
        attributes = self._body.__dict__
        before = attributes.get("forward")  # accelerate's hooks stand there
        attributes["forward"] = lambda *args, **kwargs: self._body_output
        try:
            yield
        finally:
            if before is None:
                del attributes["forward"]
            else:
                attributes["forward"] = before


@contextmanager
def _head_given(head: Any, states: Tensor | None, least: int = 0) -> Iterator[list[Tensor]]:
    """Hand the head other states; or, without any, as few as it takes, and note what it would have been given."""
    seen: list[Tensor] = []

    def give(module: Any, args: tuple[Any, ...]) -> tuple[Any, ...]:
        seen.append(args[0])
        return (args[0][:, :least] if states is None else states, *args[1:])

    handle = head.register_forward_pre_hook(give)
    try:
        yield seen
    finally:
        handle.remove()
