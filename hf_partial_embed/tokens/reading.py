"""Texts as a tokenizer reads them, or read them before it knew some tokens: ids, and the characters of each."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from typing import Any, NamedTuple

from tokenizers import AddedToken, Tokenizer

from ..errors import PartialEmbeddingError
from .backend import changed_copy, cut_merges, rename_vocabulary

__all__ = ["Reading", "TextReader"]


class Reading(NamedTuple):
    """The `n` tokens of a text; together their spans are the whole of it.

    Attributes:
        ids: ids.
        starts, ends: first character, and the one behind the last. Each token starts where the one before it ends:
            what a normaliser drops belongs to the token behind it, and of several tokens that make one character
            the first has it, the others are empty.
        clean: whether the token begins with a character, and not in the middle of one.
    """

    ids: list[int]
    starts: list[int]
    ends: list[int]
    clean: list[bool]


class TextReader:
    """Reads texts by a copy of a tokenizer's backend: without special tokens around them, truncation and padding.

    The tokenizer itself is not touched. With `hidden` ids the copy reads as a tokenizer that has no such tokens,
    in whatever way they entered it: as added tokens, or as pieces with merges.

    Args:
        tokenizer: a fast tokenizer.
        hidden: ids of the tokens that are not to be found in a text.

    Raises:
        `PartialEmbeddingError`: the tokenizer has no fast backend, or one that cannot be copied.
    """

    def __init__(self, tokenizer: Any, hidden: Collection[int] = ()) -> None:
        if not getattr(tokenizer, "is_fast", False):
            raise PartialEmbeddingError(
                f"{type(tokenizer).__name__} has no fast backend, which says what characters a token stands for. Load "
                "the tokenizer with AutoTokenizer.from_pretrained(..., use_fast=True)."
            )
        self._backend = _copy(tokenizer._tokenizer, set(hidden), type(tokenizer).__name__)

    def ids(self, text: str) -> list[int]:
        """Ids of a text."""
        return list(self._backend.encode(text, add_special_tokens=False).ids)

    def read(self, texts: Sequence[str]) -> list[Reading]:
        """Ids and spans of each text."""
        encodings = self._backend.encode_batch(list(texts), add_special_tokens=False)
        return [
            _reading(encoding.ids, encoding.offsets, len(text))
            for encoding, text in zip(encodings, texts, strict=True)
        ]


def _reading(ids: list[int], offsets: list[tuple[int, int]], length: int) -> Reading:
    starts, ends, clean, reached = [], [], [], 0
    for start, end in offsets:
        starts.append(reached)
        clean.append(start >= reached)
        reached = max(reached, end)
        ends.append(reached)
    if ends:
        ends[-1] = length
    return Reading(list(ids), starts, ends, clean)


def _copy(backend: Any, hidden: set[int], name: str) -> Tokenizer:
    """A backend of one's own, in which hidden tokens have names that no text contains.

    They are renamed, not left out: tokens after a gap would be given other ids when it is loaded.
    """
    then = {i: token.content for i, token in backend.get_added_tokens_decoder().items() if i not in hidden}
    # Loading a state takes seconds for a large vocabulary, and is needed only to change the vocabulary.
    makers = [_anew] if any(backend.model.id_to_token(i) is not None for i in hidden) else [_beside, _anew]
    for make in makers:
        copy = make(backend, hidden)
        now = {i: token.content for i, token in copy.get_added_tokens_decoder().items() if i not in hidden}
        if now == then:
            return copy
    raise PartialEmbeddingError(
        f"A copy of {name}'s backend gives its added tokens other ids, so texts cannot be read as before. Save "
        "the tokenizer, load it again, and attach the tokens to that one."
    )


def _beside(backend: Any, hidden: set[int]) -> Tokenizer:
    """A backend with the same model, and added tokens of its own."""
    made = Tokenizer(backend.model)
    for part in ("normalizer", "pre_tokenizer"):
        if getattr(backend, part) is not None:
            setattr(made, part, getattr(backend, part))
    for token_id, token in sorted(backend.get_added_tokens_decoder().items()):
        if token_id in hidden:
            made.add_special_tokens([AddedToken(f"\uffff{token_id}\uffff", normalized=False)])
        elif token.special:
            made.add_special_tokens([token])
        else:
            made.add_tokens([token])
    made.encode_special_tokens = backend.encode_special_tokens
    return made


def _anew(backend: Any, hidden: set[int]) -> Tokenizer:
    """A backend loaded from a changed state."""

    def hide(state: dict[str, Any]) -> None:
        state.update(truncation=None, padding=None, post_processor=None)  # the last would trim spaces off the spans
        names = {text: f"\uffff{i}\uffff" for i in hidden if (text := backend.model.id_to_token(i)) is not None}
        cut_merges(state["model"], names)
        rename_vocabulary(state["model"], names)
        for token in state["added_tokens"]:
            if token["id"] in hidden:
                token.update(
                    content=f"\uffff{token['id']}\uffff", special=True, normalized=False, lstrip=False, rstrip=False,
                    single_word=False,
                )  # fmt: skip

    copy: Tokenizer = changed_copy(backend, hide)
    copy.encode_special_tokens = backend.encode_special_tokens
    return copy
