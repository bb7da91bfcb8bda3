"""What a person should know of how new tokens are written: added ones that cut other words, words without a space."""

from __future__ import annotations

import logging
from collections import Counter
from collections.abc import Sequence
from typing import Any

from tokenizers import AddedToken

from ..errors import count, shorten
from .backend import collector_paused
from .pieces import Piece
from .spelling import Spelling
from .vocabulary import texts_by_id

__all__ = ["cut_tokens", "warn_of_cuts", "warn_of_missing_spaces"]

logger = logging.getLogger(__name__)


@collector_paused()
def cut_tokens(tokenizer: Any, tokens: Sequence[AddedToken]) -> dict[str, int]:
    """Added tokens that occur inside of the vocabulary's tokens, and in how many of them.

    Where such a token stands in a text, an added token is cut out of it, and what is left of the word is read in more
    and rarer pieces. Only texts with a letter or a digit at an end are looked at: no word goes on behind a bracket.
    """
    contents = {
        text
        for token in tokens
        if ((text := token.content)[:1].isalnum() or text[-1:].isalnum()) and not token.single_word
    }
    if not contents:
        return {}
    shortest, first = min(map(len, contents)), {content[0] for content in contents}
    lengths: dict[str, tuple[int, ...]] = {}  # of the tokens by how they begin
    for begin, length in {(content[:shortest], len(content)) for content in contents}:
        lengths[begin] = (*lengths.get(begin, ()), length)
    backend = tokenizer._tokenizer if getattr(tokenizer, "is_fast", False) else None
    spelling = None if backend is None else Spelling(backend)
    inside: set[tuple[int, str]] = set()
    for token_id, text in texts_by_id(tokenizer, 1 << 60).items():
        is_bytes = spelling is not None and spelling.byte_level and not text.isascii()  # ASCII stands for itself
        whole = (spelling.text_of(text) if spelling and is_bytes else None) or text
        for start in range(len(whole) - shortest + 1):
            if whole[start] not in first:  # inside of most texts, where the tokens begin with a space
                continue
            for length in lengths.get(whole[start : start + shortest], ()):
                part = whole[start : start + length]
                # A word with and without its leading space is the same word.
                if length < len(whole) and part in contents and whole.strip() != part.strip():
                    inside.add((token_id, part))
    found = Counter(part for _, part in inside)
    return {token.content: found[token.content] for token in tokens if found[token.content]}


def warn_of_cuts(tokenizer: Any, tokens: Sequence[AddedToken]) -> None:
    """Tell which added tokens will cut other words."""
    cut = cut_tokens(tokenizer, tokens)
    if cut:
        logger.warning(
            "%s will be cut out of other words, since added tokens are taken out of a text before the tokenizer's "
            "model reads it: %s. Such words become longer. Let words enter with entry='vocabulary', give them with "
            "their leading space, or pass AddedToken(..., single_word=True).",
            count(list(cut), "added token"),
            shorten([f"{token} (inside of {number} tokens of the vocabulary)" for token, number in cut.items()]),
        )


def warn_of_missing_spaces(tokenizer: Any, pieces: Sequence[Piece | None]) -> None:
    """Tell of words without their leading space, where no token has one: they are not found inside of a sentence."""
    asked = [piece.text for piece in pieces if piece is not None and piece.asked]
    words = [text for text in asked if text[:1].isalpha()]
    if not words or any(text.startswith(" ") for text in asked) or not Spelling(tokenizer._tokenizer).marks_spaces:
        return
    logger.warning(
        "%s came into the vocabulary without a leading space: %s. This tokenizer's words have one, so inside of a "
        "sentence %r is not found, only at the beginning of a line or behind a bracket. Give %r, or both forms: "
        "word_forms(tokenizer, words).",
        count(words, "word"), shorten(words), words[0], " " + words[0],
    )  # fmt: skip
