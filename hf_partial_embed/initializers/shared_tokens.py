"""Tokens that two vocabularies have in common, by their text."""

from __future__ import annotations

from typing import Any

__all__ = ["texts_by_id"]

_SPACES = ("Ġ", "▁")  # how byte-level BPE and SentencePiece write the space before a word


def texts_by_id(tokenizer: Any, size: int) -> dict[int, str]:
    """The text of each token below an id, a leading space written as one whatever the tokenizer's family."""
    texts = {}
    for text, token_id in tokenizer.get_vocab().items():
        if token_id < size:
            texts[token_id] = " " + text[1:] if text.startswith(_SPACES) else text
    return texts
