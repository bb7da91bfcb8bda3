"""What a tokenizer knows: ids of tokens by their text, texts by their ids, and what a text is read as."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Sequence
from typing import Any

from ..errors import PartialEmbeddingError, count, shorten
from .backend import collector_paused, read_by_backend, settings_kept

__all__ = [
    "check_all_unicode",
    "check_unicode",
    "decode_each",
    "display_names",
    "encode_all",
    "find_ids",
    "is_unicode",
    "known_id",
    "known_ids",
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
        if _is_its_backend(tokenizer, "__call__", "_encode_plus", "_convert_encoding"):
            batch = read_by_backend(tokenizer._tokenizer, texts)
        else:
            batch = tokenizer(
                list(texts),
                add_special_tokens=False,
                truncation=False,
                padding=False,
                split_special_tokens=False,
                verbose=False,
            )["input_ids"]
    if unknown:
        return batch
    unk_id = tokenizer.unk_token_id
    return [[token_id for token_id in ids if token_id != unk_id] if unk_id in ids else ids for ids in batch]


@collector_paused()
def decode_each(tokenizer: Any, ids: Sequence[int]) -> list[str]:
    """The text of each id alone; spaces are as the tokenizer's backend leaves them."""
    if _is_its_backend(tokenizer, "batch_decode", "decode", "_decode"):
        texts: list[str] = tokenizer._tokenizer.decode_batch([[token] for token in ids], skip_special_tokens=False)
    else:
        texts = tokenizer.batch_decode([[token_id] for token_id in ids])
    return texts


def _is_its_backend(tokenizer: Any, *methods: str) -> bool:
    """Whether a tokenizer's methods do no more than its backend: they are those of all fast tokenizers.

    They take several times as long as the backend, since they handle each text by itself. Some classes (CodeLlama's,
    LayoutLM's) have methods of their own.
    """
    if not getattr(tokenizer, "is_fast", False):
        return False
    from transformers import PreTrainedTokenizerFast

    return all(
        getattr(getattr(tokenizer, name, None), "__func__", None) is getattr(PreTrainedTokenizerFast, name)
        for name in methods
    )


def read_all(tokenizer: Any, texts: Iterable[str], *, unknown: bool = False) -> dict[str, list[int]]:
    """What the tokenizer makes of each text: see `encode_all`."""
    listed = list(texts)
    return dict(zip(listed, encode_all(tokenizer, listed, unknown=unknown), strict=True))


def known_id(tokenizer: Any, text: str) -> int | None:
    """The id of a token by its exact text, `None` where the tokenizer has no such token."""
    return known_ids(tokenizer, [text])[0]


def known_ids(tokenizer: Any, texts: Sequence[str]) -> list[int | None]:
    """`known_id` of many texts."""
    unk_id = tokenizer.unk_token_id
    unk = None if unk_id is None else tokenizer.unk_token
    if _is_its_backend(tokenizer, "convert_tokens_to_ids", "_convert_token_to_id_with_added_voc"):
        found = [tokenizer._tokenizer.token_to_id(text) for text in texts]
    else:
        found = [_id_by_method(tokenizer, text) for text in texts]
    return [
        None if token_id is not None and token_id == unk_id and text != unk else token_id
        for text, token_id in zip(texts, found, strict=True)
    ]


def _id_by_method(tokenizer: Any, text: str) -> int | None:
    token_id = tokenizer.convert_tokens_to_ids(text)
    if not isinstance(token_id, int):
        return None
    # Byte tokenizers written in Python make an id of any single character.
    made_up = not tokenizer.is_fast and token_id >= len(tokenizer) and text not in tokenizer.get_vocab()
    return None if made_up else token_id


def find_ids(tokenizer: Any, tokens: Sequence[str]) -> list[int]:
    """Ids of tokens that exist: by their exact text, else as the single piece that their text encodes to.

    Raises:
        `PartialEmbeddingError`: tokens that are not in the vocabulary; two that are the same one.
    """
    check_all_unicode(tokens)
    found = known_ids(tokenizer, tokens)
    others = [token for token, token_id in zip(tokens, found, strict=True) if token_id is None]
    unk_id = tokenizer.unk_token_id if others else None
    single = {
        token: pieces[0]
        for token, pieces in zip(others, encode_all(tokenizer, others, unknown=True), strict=True)
        if len(pieces) == 1 and pieces[0] != unk_id
    }
    named = [
        single.get(token) if token_id is None else token_id for token, token_id in zip(tokens, found, strict=True)
    ]
    missing = [token for token, token_id in zip(tokens, named, strict=True) if token_id is None]
    ids = [token_id for token_id in named if token_id is not None]
    if missing:
        raise PartialEmbeddingError(
            f"{count(missing, 'token')} not in the vocabulary: {shorten(missing)}. Use add_tokens for new ones."
        )
    if len(set(ids)) != len(ids):
        times = Counter(ids)
        same = [token for token, token_id in zip(tokens, ids, strict=True) if times[token_id] > 1]
        raise PartialEmbeddingError(f"Tokens {shorten(same)} share one row. Give each token once.")
    return ids


def is_unicode(text: str) -> bool:
    """Whether a text has no lone surrogates."""
    try:
        text.encode()
    except UnicodeEncodeError:
        return False
    return True


def check_all_unicode(texts: Iterable[str]) -> None:
    """`check_unicode` of many texts."""
    listed = list(texts)
    if not is_unicode("".join(listed)):
        for text in listed:
            check_unicode(text)


def check_unicode(text: str) -> None:
    """Check that a text has no lone surrogates.

    Raises:
        `PartialEmbeddingError`: it has some.
    """
    if not is_unicode(text):
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
