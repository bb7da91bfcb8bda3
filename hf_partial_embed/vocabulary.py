"""Tokens of a tokenizer: which are new, what they were made of before, adding them and taking them back."""

from __future__ import annotations

import json
import unicodedata
from collections.abc import Iterable, Sequence
from itertools import groupby
from typing import Any

from tokenizers import AddedToken, Tokenizer

from .errors import PartialEmbeddingError, count, shorten

__all__ = [
    "add_to_tokenizer",
    "check_new",
    "encode_all",
    "find_ids",
    "known_id",
    "normalize_tokens",
    "remove_from_tokenizer",
    "token_from_dict",
    "token_to_dict",
]

_FLAGS = ("special", "lstrip", "rstrip", "single_word", "normalized")


def normalize_tokens(tokens: Iterable[str | AddedToken], special: bool) -> list[AddedToken]:
    """Tokens as `AddedToken`s of our own (the tokenizers change the ones that they are given).

    Raises:
        `PartialEmbeddingError`: no tokens, tokens of another type, empty ones, or ones given twice (also
            where only their Unicode normal form differs).
    """
    if isinstance(tokens, (str, AddedToken)):
        raise PartialEmbeddingError(f"tokens must be a list, but got the single token {str(tokens)!r}.")
    made = []
    for token in tokens:
        if isinstance(token, str):
            made.append(AddedToken(token, special=special, normalized=not special))
        elif isinstance(token, AddedToken):
            copy = token_from_dict(token_to_dict(token))
            made.append(token_from_dict({**token_to_dict(token), "special": True}) if special else copy)
        else:
            raise PartialEmbeddingError(
                f"A token must be a str or an AddedToken, but got {token!r} ({type(token).__name__})."
            )
    if not made:
        raise PartialEmbeddingError("No tokens were given: name at least one.")
    if any(not token.content for token in made):
        raise PartialEmbeddingError("A token is the empty string, which no text contains. Leave it out.")
    seen: dict[str, str] = {}
    for token in made:
        form = unicodedata.normalize("NFC", token.content)
        if form in seen:
            same = "twice" if seen[form] == token.content else f"and {seen[form]!r}, the same text in Unicode"
            raise PartialEmbeddingError(f"Token {token.content!r} is given {same}. Give each token once.")
        seen[form] = token.content
    return made


def token_to_dict(token: AddedToken) -> dict[str, Any]:
    """The text and the flags of a token, as they are stored in a row file."""
    return {"content": token.content, **{flag: getattr(token, flag) for flag in _FLAGS}}


def token_from_dict(values: dict[str, Any]) -> AddedToken:
    """The inverse of `token_to_dict`."""
    return AddedToken(values["content"], **{flag: bool(values[flag]) for flag in _FLAGS})


def encode_all(tokenizer: Any, texts: Sequence[str]) -> list[list[int]]:
    """Ids of each text alone: no special tokens around it, no truncation, no unknown-token ids."""
    batch = tokenizer(list(texts), add_special_tokens=False, truncation=False, padding=False, verbose=False)[
        "input_ids"
    ]
    return [[token_id for token_id in ids if token_id != tokenizer.unk_token_id] for ids in batch]


def encode(tokenizer: Any, text: str) -> list[int]:
    """`encode_all` of one text."""
    return encode_all(tokenizer, [text])[0]


def known_id(tokenizer: Any, text: str) -> int | None:
    """The id of a token by its exact text, `None` where the tokenizer has no such token."""
    token_id = tokenizer.convert_tokens_to_ids(text)
    if not isinstance(token_id, int) or (token_id == tokenizer.unk_token_id and text != tokenizer.unk_token):
        return None
    return token_id


def find_ids(tokenizer: Any, tokens: Sequence[str]) -> list[int]:
    """Ids of tokens that exist: by their exact text, else as the single piece that their text encodes to.

    Raises:
        `PartialEmbeddingError`: tokens that are not in the vocabulary; two that are the same one.
    """
    ids: list[int] = []
    missing = []
    for token in tokens:
        token_id = known_id(tokenizer, token)
        if token_id is None:
            pieces = encode(tokenizer, token)
            token_id = pieces[0] if len(pieces) == 1 else None
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


def check_new(tokenizer: Any, tokens: Sequence[AddedToken]) -> None:
    """Check that no token is in the vocabulary, under its text or what the tokenizer makes of it.

    Raises:
        `PartialEmbeddingError`: names those that are.
    """
    known = []
    all_pieces = encode_all(tokenizer, [token.content for token in tokens])
    for token, pieces in zip(tokens, all_pieces, strict=True):
        token_id = known_id(tokenizer, token.content)
        if token_id is None and len(pieces) == 1 and _is_one_piece(tokenizer, token.content):
            token_id = pieces[0]
        if token_id is not None:
            spelled = tokenizer.convert_ids_to_tokens(token_id)
            known.append(f"{token.content!r} (id {token_id}{'' if spelled == token.content else f', {spelled!r}'})")
    if known:
        verb = "is a token" if len(known) == 1 else "are tokens"
        raise PartialEmbeddingError(
            f"{', '.join(known[:8])}{' and more' if len(known) > 8 else ''} {verb} of this tokenizer already. "
            "Nothing was added. To train rows that exist, use train_tokens."
        )


def _is_one_piece(tokenizer: Any, text: str) -> bool:
    """Whether a text is a single piece, counting unknown ones."""
    return len(tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"]) == 1


def add_to_tokenizer(tokenizer: Any, tokens: Sequence[AddedToken]) -> list[int]:
    """Add tokens that are not known yet; returns their ids.

    Raises:
        `PartialEmbeddingError`: the tokenizer does not find a token in its own text, or finds another
            one there (two that are the same after its normaliser). The tokenizer is as it was.
    """
    if not tokens:
        return []
    texts = [token.content for token in tokens]
    try:
        # In runs of one kind, which keeps the order where special and other tokens are mixed.
        for special, run in groupby(tokens, key=lambda token: bool(token.special)):
            copies = [token_from_dict(token_to_dict(token)) for token in run]
            tokenizer.add_tokens(copies, special_tokens=special)
        ids = []
        for text in texts:
            token_id = known_id(tokenizer, text)
            if token_id is None:
                raise PartialEmbeddingError(
                    f"{type(tokenizer).__name__} did not take {text!r} as a token of its own. Give it another text."
                )
            ids.append(token_id)
        new = dict(zip(ids, texts, strict=True))
        for (token_id, text), found in zip(new.items(), encode_all(tokenizer, texts), strict=True):
            if token_id not in found:
                other = [new[piece] for piece in found if piece in new]
                reason = f"reads it as {other[0]!r}" if other else "does not find it in its own text"
                raise PartialEmbeddingError(
                    f"Token {text!r} would never be used: this {type(tokenizer).__name__} {reason} after its "
                    "normaliser. Give it another text, or pass AddedToken(..., normalized=False)."
                )
    except BaseException:
        remove_from_tokenizer(tokenizer, texts)
        raise
    return ids


def remove_from_tokenizer(tokenizer: Any, texts: Sequence[str]) -> None:
    """Take back tokens that `add_to_tokenizer` added; the tokenizer is as it was before, bit for bit."""
    gone = set(texts)
    if getattr(tokenizer, "is_fast", False):
        backend = json.loads(tokenizer._tokenizer.to_str())
        kept = [token for token in backend["added_tokens"] if token["content"] not in gone]
        if len(kept) != len(backend["added_tokens"]):
            backend["added_tokens"] = kept
            tokenizer._tokenizer = Tokenizer.from_str(json.dumps(backend, ensure_ascii=False))
        return
    for text in gone & set(tokenizer._added_tokens_encoder):
        del tokenizer._added_tokens_decoder[tokenizer._added_tokens_encoder.pop(text)]
    tokenizer._extra_special_tokens = [token for token in tokenizer._extra_special_tokens if str(token) not in gone]
    tokenizer.tokens_trie = type(tokenizer.tokens_trie)()
    tokenizer._update_trie()
    tokenizer._update_total_vocab_size()
