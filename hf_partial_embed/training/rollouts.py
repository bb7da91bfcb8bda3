"""Weights for an engine that generates while a trainer trains (TRL's GRPO, RLOO, ... with vLLM).

TRL walks `model.named_parameters()` and hands every tensor to the engine by its name. With rows attached, that
would be a name that the engine does not know, and a table whose copy of the rows is an old one.
"""

from __future__ import annotations

import functools
import sys
from collections.abc import Callable
from typing import Any

from torch import nn

from ..attachment.additions import Addition
from ..attachment.attachment import attachments_of
from ..errors import PartialEmbeddingError
from ..modules.merged_view import MergedView

__all__ = ["RolloutWeights"]

_MODULE = "trl.generation.vllm_generation"


class RolloutWeights(Addition):
    """Lets TRL hand its vLLM engine the weights of the merged model, while it is installed.

    A trainer does not tell its callbacks of its engine, so what is changed is the `sync_weights` of TRL's class.
    Models without rows are handed on as always. Where TRL's vLLM part is not loaded, there is nothing to do.
    """

    def _put_on(self) -> None:
        generation = _generation_class()
        if generation is None:
            return
        if not isinstance(generation.sync_weights, _Synced):
            generation.sync_weights = _Synced(generation.sync_weights)
        generation.sync_weights.users.append(self)

    def _take_off(self) -> None:
        generation = _generation_class()
        synced = getattr(generation, "sync_weights", None)
        if isinstance(synced, _Synced) and self in synced.users:
            synced.users.remove(self)
            if not synced.users:
                generation.sync_weights = synced.original


class _Synced:
    """`VLLMGeneration.sync_weights`, over the merged model's weights."""

    def __init__(self, original: Callable[..., Any]) -> None:
        self.original = original
        self.users: list[RolloutWeights] = []
        functools.update_wrapper(self, original)

    def __get__(self, generation: Any, owner: type | None = None) -> Any:
        return self if generation is None else functools.partial(self, generation)

    def __call__(self, generation: Any, *args: Any, **kwargs: Any) -> Any:
        model = generation.model
        if not attachments_of(model):
            return self.original(generation, *args, **kwargs)
        if not getattr(generation, "_partial_embedding_checked", False):
            _check_size(generation, model)
            generation._partial_embedding_checked = True
        with MergedView(model):
            return self.original(generation, *args, **kwargs)


def _generation_class() -> Any:
    return getattr(sys.modules.get(_MODULE), "VLLMGeneration", None)


def _check_size(generation: Any, model: nn.Module) -> None:
    """Find an engine of fewer rows now: vLLM would end in an assertion without a word, or in a dead worker."""
    config: Any = model.config
    own = config.get_text_config().vocab_size  # where vLLM, too, looks
    llm, client = getattr(generation, "llm", None), getattr(generation, "vllm_client", None)
    if llm is not None:
        engine = int(llm.llm_engine.model_config.get_vocab_size())
        if engine != own:
            raise PartialEmbeddingError(_message(f"{engine} rows", model, own))
    elif client is not None:  # on the main process
        # A server does not say how many rows it has, but refuses ids that it has no row for.
        try:
            client.generate(prompts=[[own - 1]], n=1, max_tokens=1)
        except Exception as error:
            if "vocabulary" not in str(error):
                raise
            raise PartialEmbeddingError(_message(f"no row for id {own - 1} ({error})", model, own)) from error


def _message(holds: str, model: nn.Module, own: int) -> str:
    return (
        f"The generation engine holds {holds}, and {type(model).__name__} has {own} rows: the engine was started from "
        "another checkpoint than the one with the new tokens. Save the model with its tokens (model.save_pretrained, "
        "tokenizer.save_pretrained), start the engine from that folder, and the trainer from it with train_tokens."
    )
