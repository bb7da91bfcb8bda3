"""What a tokenizer knows: ids of tokens by their text, texts by their ids, and what a text is read as."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

from ..errors import PartialEmbeddingError, count, shorten
from .backend import settings_kept

__all__ = [
    "check_unicode",
    "display_names",
    "encode_all",
    "find_ids",
    "known_id",
    "plain_tokenizer",
    "read_all",
    "texts_by_id",
]


def plain_tokenizer(tokenizer: Any, *, needed: bool) -> Any:
    """The tokenizer itself where a processor was given."""
    is_processor = not hasattr(tokenizer, "convert_tokens_to_ids")
    inner = getattr(tokenizer, "tokenizer", tokenizer) if is_processor else tokenizer
    if needed and not hasattr(inner, "convert_tokens_to_ids"):
        raise PartialEmbeddingError(
            f"A tokenizer is needed, but got {type(tokenizer).__name__}. Pass the model's tokenizer, e.g. "
            "AutoTokenizer.from_pretrained(...)."
        )
    return inner


def encode_all(tokenizer: Any, texts: Sequence[str], *, unknown: bool = False) -> list[list[int]]:
    """Ids of each text alone: no special tokens around it, no truncation.

    Args:
        tokenizer: any tokenizer, which is as it was afterwards.
        texts: any number of them.
        unknown: whether unknown-token ids stay among the others.
    """
    if not texts:
        return []
    with settings_kept(tokenizer):
        batch = tokenizer(
            list(texts),
            add_special_tokens=False,
            truncation=False,
            padding=False,
            split_special_tokens=False,
            verbose=False,
        )["input_ids"]
    unk_id = tokenizer.unk_token_id
    return [[token_id for token_id in ids if unknown or token_id != unk_id] for ids in batch]


def read_all(tokenizer: Any, texts: Iterable[str]) -> dict[str, list[int]]:
    """What the tokenizer makes of each text."""
    listed = list(texts)
    return dict(zip(listed, encode_all(tokenizer, listed), strict=True))


def known_id(tokenizer: Any, text: str) -> int | None:
    """The id of a token by its exact text, `None` where the tokenizer has no such token."""
    token_id = tokenizer.convert_tokens_to_ids(text)
    if not isinstance(token_id, int) or (token_id == tokenizer.unk_token_id and text != tokenizer.unk_token):
        return None
    # Byte tokenizers written in Python make an id of any single character.
    made_up = not tokenizer.is_fast and token_id >= len(tokenizer) and text not in tokenizer.get_vocab()
    return None if made_up else token_id


def find_ids(tokenizer: Any, tokens: Sequence[str]) -> list[int]:
    """Ids of tokens that exist: by their exact text, else as the single piece that their text encodes to.

    Raises:
        `PartialEmbeddingError`: tokens that are not in the vocabulary; two that are the same one.
    """
    ids: list[int] = []
    missing = []
    for token in tokens:
        check_unicode(token)
        token_id = known_id(tokenizer, token)
        if token_id is None:
            (pieces,) = encode_all(tokenizer, [token], unknown=True)
            token_id = pieces[0] if len(pieces) == 1 and pieces[0] != tokenizer.unk_token_id else None
        if token_id is None:
            missing.append(token)
        else:
            ids.append(token_id)
    if missing:
        raise PartialEmbeddingError(
            f"{count(missing, 'token')} not in the vocabulary: {shorten(missing)}. Use add_tokens for new ones."
        )
    if len(set(ids)) != len(ids):
        same = [token for token, token_id in zip(tokens, ids, strict=True) if ids.count(token_id) > 1]
        raise PartialEmbeddingError(f"Tokens {shorten(same)} share one row. Give each token once.")
    return ids


def check_unicode(text: str) -> None:
    if any("\ud800" <= character <= "\udfff" for character in text):
        raise PartialEmbeddingError(
            f"Token {text!r} is no valid Unicode: it has a lone surrogate, which no tokenizer reads. Decode the bytes "
            "that it came from with errors='replace', or leave it out."
        )


def display_names(tokens: Sequence[str], ids: Sequence[int]) -> list[str]:
    """What a person calls the rows: the tokens' texts, or their ids where there are none."""
    return list(tokens) or [f"id {token_id}" for token_id in ids]


_SPACES = ("Ġ", "▁")  # how byte-level BPE and SentencePiece write the space before a word


def texts_by_id(tokenizer: Any, size: int) -> dict[int, str]:
    """The text of each token below an id, a leading space written as one whatever the tokenizer's family."""
    texts = {}
    for text, token_id in tokenizer.get_vocab().items():
        if token_id < size:
            texts[token_id] = " " + text[1:] if text.startswith(_SPACES) else text
    return texts
