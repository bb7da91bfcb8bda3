"""A tokenizer's side of new tokens; knows no model."""

from __future__ import annotations

from typing import TYPE_CHECKING

from ..lazy import lazy_names

if TYPE_CHECKING:
    from .choosing import ChosenTokens, choose_tokens
    from .concepts import concepts_of, expand_placeholders, vector_tokens

__all__ = ["ChosenTokens", "choose_tokens", "concepts_of", "expand_placeholders", "vector_tokens"]

__getattr__, __dir__ = lazy_names(
    __name__,
    {
        "ChosenTokens": "choosing",
        "choose_tokens": "choosing",
        "concepts_of": "concepts",
        "expand_placeholders": "concepts",
        "vector_tokens": "concepts",
    },
)
