"""Which planner a tokenizer's model has: the place to make another kind of model known."""

from __future__ import annotations

from typing import Any

from ..errors import PartialEmbeddingError
from .merges import BytePairs
from .pieces import Planner, ScoredPieces, WholeWords
from .spelling import Spelling

__all__ = ["KINDS", "planner_of"]

KINDS: dict[str, type[Planner]] = {planner.kind: planner for planner in (BytePairs, ScoredPieces, WholeWords)}


def planner_of(tokenizer: Any) -> Planner:
    """The planner for a tokenizer's model.

    Raises:
        `PartialEmbeddingError`: no fast tokenizer, or one whose model takes no pieces.
    """
    if not getattr(tokenizer, "is_fast", False):
        raise PartialEmbeddingError(
            f"{type(tokenizer).__name__} is written in Python and takes no pieces into its vocabulary. Load it with "
            "AutoTokenizer where it has a tokenizer.json (tiktoken and SentencePiece files are converted to one), or "
            "add the tokens with entry='added'."
        )
    backend = tokenizer._tokenizer
    kind = type(backend.model).__name__
    if kind not in KINDS:
        raise PartialEmbeddingError(
            f"The tokenizer's model is {kind}, which takes no pieces into its vocabulary; {', '.join(KINDS)} do. Add "
            "the tokens with entry='added'."
        )
    return KINDS[kind](backend, Spelling(backend))
