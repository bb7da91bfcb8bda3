"""Tokens as a row file has them: how each entered the tokenizer, and what it is made of."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from tokenizers import AddedToken

from ..errors import PartialEmbeddingError, count, shorten
from .added import token_to_dict
from .entering import piece_id
from .pieces import Piece
from .planners import planner_of
from .spelling import Spelling
from .vocabulary import find_ids

__all__ = [
    "check_no_spellings",
    "check_same_base",
    "described_tokens",
    "entry_of",
    "stored_ids",
    "stored_pieces",
]


def described_tokens(tokens: Sequence[AddedToken], pieces: Sequence[Piece | None], kind: str) -> list[dict[str, Any]]:
    """Tokens as they are stored in a row file: text, flags and, for pieces of a vocabulary, what they are made of."""
    return [
        token_to_dict(token)
        if piece is None
        else {
            **token_to_dict(token),
            "vocabulary": {
                "model": kind,
                "piece": piece.spelling,
                "parts": list(piece.parts),
                "merged": piece.merged,
                "asked": piece.asked,
                "rank": piece.rank,
            },
        }
        for token, piece in zip(tokens, pieces, strict=True)
    ]


def stored_pieces(tokens: Sequence[dict[str, Any]]) -> list[Piece | None]:
    """The inverse, as far as a file can know: which ids a piece was made of depends on the tokenizer."""
    return [
        Piece(
            token["content"], own["piece"], own["asked"], tuple(own["parts"]), merged=own["merged"], rank=own["rank"]
        )
        if (own := token.get("vocabulary"))
        else None
        for token in tokens
    ]


def entry_of(token: dict[str, Any]) -> str:
    """How a token of a row file entered: `"added"`, `"vocabulary"`, or `"part"` of one that did."""
    own = token.get("vocabulary")
    return "added" if own is None else "vocabulary" if own["asked"] else "part"


def stored_ids(tokenizer: Any, tokens: Sequence[dict[str, Any]]) -> list[int]:
    """The ids of a row file's tokens, which the tokenizer has.

    Raises:
        `PartialEmbeddingError`: it lacks some.
    """
    pieces = stored_pieces(tokens)
    texts = [token["content"] for token, piece in zip(tokens, pieces, strict=True) if piece is None]
    by_text = dict(zip(texts, find_ids(tokenizer, texts), strict=True))
    ids = [
        by_text[token["content"]] if piece is None else piece_id(tokenizer, piece)
        for token, piece in zip(tokens, pieces, strict=True)
    ]
    found = [token_id for token_id in ids if token_id is not None]
    if len(found) != len(ids):
        missing = [token["content"] for token, token_id in zip(tokens, ids, strict=True) if token_id is None]
        raise PartialEmbeddingError(
            f"{count(missing, 'token')} not in the vocabulary: {shorten(missing)}. Use the tokenizer that the rows "
            "are on, or load them with load_tokens."
        )
    return found


def check_no_spellings(tokenizer: Any, tokens: Sequence[AddedToken]) -> None:
    """Check that no new token is what a model calls a piece of its vocabulary, as PEFT's adapters have them.

    Raises:
        `PartialEmbeddingError`: names those that are. As added tokens they would never be found.
    """
    if not getattr(tokenizer, "is_fast", False):
        return
    spelling = Spelling(tokenizer._tokenizer)
    mark = "\u0120" if spelling.byte_level else "\u2581" if spelling.marks_spaces else ""
    spelled = [token.content for token in tokens if mark and token.content.startswith(mark)]
    if spelled:
        raise PartialEmbeddingError(
            f"{shorten(spelled)} are not in the vocabulary, and written as its pieces are, with {mark!r} for a space: "
            "the rows do not say how these tokens entered it. Load rows that partial.save_pretrained has written, or "
            "use the tokenizer that was saved with them."
        )


def check_same_base(tokenizer: Any, tokens: Sequence[dict[str, Any]]) -> None:
    """Check that pieces of a row file fit a tokenizer's vocabulary.

    Raises:
        `PartialEmbeddingError`: its model is of another kind, or spells texts in another way.
    """
    stored = [token["vocabulary"] for token in tokens if "vocabulary" in token]
    if not stored:
        return
    name = type(tokenizer).__name__
    kind = planner_of(tokenizer).kind
    other = next((own["model"] for own in stored if own["model"] != kind), None)
    if other is not None:
        raise PartialEmbeddingError(
            f"These tokens are pieces of a {other} vocabulary, and the model of this {name} is {kind}, which has "
            "other pieces. Load the tokenizer that belongs to the rows' base model."
        )
    spelling = Spelling(tokenizer._tokenizer)
    strange = [
        token["content"]
        for token in tokens
        if (own := token.get("vocabulary")) and (spelling.text_of(own["piece"]) or own["piece"]) != token["content"]
    ]
    if strange:
        raise PartialEmbeddingError(
            f"These tokens are pieces of a vocabulary that is spelled in another way than this {name}'s, which would "
            f"not find {shorten(strange)} under the spelling that they have. Load the tokenizer that belongs to the "
            "rows' base model."
        )
