"""How a tokenizer's model spells a text: what its normaliser and pre-tokenizer make of it.

A piece of the vocabulary stands for a text in the middle of running text. `" word"` is `Ġword` in a byte-level
tokenizer and `▁word` in one of SentencePiece; `"word"` is `word` in both, also where the tokenizer puts a space in
front of every text.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from ..errors import PartialEmbeddingError, shorten
from .vocabulary import plain_tokenizer

__all__ = ["CONTEXTS", "Spelling", "word_forms"]

# What comes in front of a text, to see how it is spelled behind something.
_ANCHOR = "a"
_SPACE = "▁"

# A token may begin inside of a word, behind a bracket or in a new line.
CONTEXTS = ("", "\n", "(", "1", _ANCHOR)


def _byte_alphabet() -> dict[str, int]:
    """The byte that each character of a byte-level vocabulary stands for (GPT-2's `bytes_to_unicode`, inverted).

    Printable bytes stand for themselves, the others for characters from 256 on.
    """
    printable = [*range(33, 127), *range(161, 173), *range(174, 256)]
    others = [byte for byte in range(256) if byte not in printable]
    return {**{chr(byte): byte for byte in printable}, **{chr(256 + n): byte for n, byte in enumerate(others)}}


class Spelling:
    """The spelling of a fast tokenizer.

    Attributes:
        byte_level: whether the model sees bytes, each as a letter of its own.
        marks_spaces: whether a word's leading space is part of its first piece.
    """

    def __init__(self, backend: Any) -> None:
        self._normalizer, self._pre_tokenizer = backend.normalizer, backend.pre_tokenizer
        self._anchor = "".join(self.pre_tokens(_ANCHOR))
        self.byte_level = "".join(self.pre_tokens("中")).endswith("\u00e4\u00b8\u0143")
        self._bytes = _byte_alphabet() if self.byte_level else {}
        with_space = self._behind_anchor(self.pre_tokens(_ANCHOR + " x"))
        self.marks_spaces = with_space is not None and with_space != "x"

    def pre_tokens(self, text: str) -> list[str]:
        """The parts of a text that the model sees, each by itself."""
        if self._normalizer is not None:
            text = self._normalizer.normalize_str(text)
        if self._pre_tokenizer is None:
            return [text]
        return [part for part, _ in self._pre_tokenizer.pre_tokenize_str(text)]

    def spell(self, text: str) -> str:
        """How a text is spelled in the middle of running text.

        Raises:
            `PartialEmbeddingError`: the normaliser changes the text, or a pre-tokenizer cuts it.
        """
        anchored = self.pre_tokens(_ANCHOR + text)
        spelled = self._behind_anchor(anchored)
        read = None if spelled is None else self.text_of(spelled)
        if spelled is None or read != text:
            raise PartialEmbeddingError(
                f"The tokenizer's normaliser changes {text!r}"
                f"{'' if read is None else f' to {read!r}'}, so no piece of its vocabulary stands for it. Give the "
                "text as the tokenizer reads it, or add it with entry='added'."
            )
        # Behind the anchor, which has been looked at, nearly every text ends in a pre-token of its own.
        if not anchored[-1].endswith(spelled) and not any(
            (parts := self.pre_tokens(context + text)) and parts[-1].endswith(spelled) for context in CONTEXTS
        ):
            raise PartialEmbeddingError(
                f"The pre-tokenizer cuts {text!r} into {self.pre_tokens(text)} before the vocabulary is looked at, so "
                "as a piece of the vocabulary it would never be used. Give the parts, or add it with entry='added'."
            )
        return spelled

    def is_whole(self, text: str, spelled: str) -> bool:
        """Whether the model sees the text, alone, as one pre-token."""
        return self.pre_tokens(text) == [spelled]

    def text_of(self, spelled: str) -> str | None:
        """The text of a piece; `None` where it is no whole characters."""
        if not self.byte_level:
            return spelled.replace(_SPACE, " ") if self.marks_spaces else spelled
        word = spelled.removeprefix("\u0120")
        if word.isascii() and word.isalnum():  # nearly all, and several times as fast
            return spelled if word == spelled else f" {word}"
        try:
            return bytes(map(self._bytes.__getitem__, spelled)).decode()
        except (KeyError, UnicodeDecodeError):
            return None

    def _behind_anchor(self, pre_tokens: list[str]) -> str | None:
        spelled = "".join(pre_tokens)
        return spelled.removeprefix(self._anchor) if spelled.startswith(self._anchor) else None


def word_forms(tokenizer: Any, words: Iterable[str]) -> list[str]:
    """The forms in which words occur in running text, for `add_tokens` as pieces of the vocabulary.

    Where the tokenizer keeps a word's leading space in its first piece, these are `" word"`, inside of a sentence,
    and `"word"`, at the beginning of a line or behind a bracket. A tokenizer that drops spaces (BERT's) has one.

    Args:
        tokenizer: a fast tokenizer, or a processor that has one.
        words: words, with or without a leading space.

    Returns:
        `list[str]`: the forms, those of a word beside each other, each once.
    """
    tokenizer = plain_tokenizer(tokenizer, needed=True)
    if isinstance(words, str):
        raise PartialEmbeddingError(f"words must be a list, but got the single word {words!r}. Pass [{words!r}].")
    spaced = bool(getattr(tokenizer, "is_fast", False)) and Spelling(tokenizer._tokenizer).marks_spaces
    bare = [word.removeprefix(" ") for word in words]
    if not all(bare):
        raise PartialEmbeddingError(f"There is an empty word among {shorten(bare)}. Leave it out.")
    return list(dict.fromkeys(form for word in bare for form in ([f" {word}", word] if spaced else [word])))
