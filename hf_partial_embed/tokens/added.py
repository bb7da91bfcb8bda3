"""Added tokens, which a tokenizer cuts out of the text before its model runs: checking, adding, taking back."""

from __future__ import annotations

import logging
import unicodedata
from collections.abc import Collection, Iterable, Mapping, Sequence
from copy import copy, deepcopy
from itertools import groupby
from typing import Any, NoReturn

from tokenizers import AddedToken

from ..errors import PartialEmbeddingError, shorten
from .backend import collector_paused, remove_added_tokens
from .vocabulary import check_all_unicode, encode_all, known_ids, read_all

__all__ = [
    "TOKEN_FLAGS",
    "KnownTokensError",
    "add_to_tokenizer",
    "check_found",
    "check_new",
    "check_texts",
    "existing_tokens",
    "normalize_tokens",
    "remove_from_tokenizer",
    "token_from_dict",
    "token_to_dict",
    "tokens_as_known",
    "without_tokens_from",
]

logger = logging.getLogger(__name__)

_PART = 1024  # texts to be read at a time

TOKEN_FLAGS = ("special", "lstrip", "rstrip", "single_word", "normalized")


class KnownTokensError(PartialEmbeddingError):
    """Tokens that were to be new are in the vocabulary already; `ids` has the id of each."""

    def __init__(self, message: str, ids: dict[str, int]) -> None:
        super().__init__(message)
        self.ids = ids


def normalize_tokens(tokens: Iterable[str | AddedToken], special: bool) -> list[AddedToken]:
    """Tokens as `AddedToken`s of our own (the tokenizers change the ones that they are given).

    Raises:
        `PartialEmbeddingError`: no tokens, tokens of another type, empty ones, ones that are no valid
            Unicode, or ones given twice (also where only their Unicode normal form differs).
    """
    if isinstance(tokens, (str, AddedToken)):
        raise PartialEmbeddingError(
            f"tokens must be a list, but got the single token {str(tokens)!r}. Pass [{str(tokens)!r}]."
        )
    if not isinstance(tokens, Iterable):
        raise PartialEmbeddingError(f"tokens must be a list of str or AddedToken, but got {tokens!r}.")
    listed = list(tokens)
    for token in listed:
        if not isinstance(token, (str, AddedToken)):
            raise PartialEmbeddingError(
                f"A token must be a str or an AddedToken, but got {token!r} ({type(token).__name__})."
            )
    if not listed:
        raise PartialEmbeddingError("No tokens were given: name at least one.")
    check_texts([token if isinstance(token, str) else token.content for token in listed])
    return [
        AddedToken(token, special=special, normalized=not special)
        if isinstance(token, str)
        else _copied(token, special)
        for token in listed
    ]


def check_texts(texts: Sequence[str]) -> None:
    """Refuse empty tokens, ones that are no valid Unicode, and ones given twice, be it in two Unicode forms."""
    check_all_unicode(texts)
    if not all(texts):
        raise PartialEmbeddingError("A token is the empty string, which no text contains. Leave it out.")
    seen: dict[str, str] = {}
    for text in texts:
        form = unicodedata.normalize("NFC", text)
        if form in seen:
            if seen[form] == text:
                raise PartialEmbeddingError(f"Token {text!r} is given twice. Give each token once.")
            raise PartialEmbeddingError(
                f"Tokens {seen[form]!a} and {text!a} are the same text, {form!r}, in two Unicode forms. Give "
                "one of them."
            )
        seen[form] = text


def token_to_dict(token: AddedToken) -> dict[str, Any]:
    """The text and the flags of a token, as they are stored in a row file."""
    return {"content": token.content, **{flag: getattr(token, flag) for flag in TOKEN_FLAGS}}


def token_from_dict(values: dict[str, Any]) -> AddedToken:
    """The inverse of `token_to_dict`, of a text that `check_texts` accepts."""
    return AddedToken(values["content"], **{flag: bool(values[flag]) for flag in TOKEN_FLAGS})


def _copied(token: AddedToken, special: bool = False) -> AddedToken:
    return AddedToken(
        token.content, special=special or token.special, lstrip=token.lstrip, rstrip=token.rstrip,
        single_word=token.single_word, normalized=token.normalized,
    )  # fmt: skip


def existing_tokens(tokenizer: Any, ids: Sequence[int]) -> list[AddedToken]:
    """The tokens that have the ids; none, if there is an id without one (a spare row)."""
    added = tokenizer.added_tokens_decoder
    by_id = {token_id: text for text, token_id in tokenizer.get_vocab().items()}
    texts = [by_id.get(token_id) for token_id in ids]
    if None in texts:
        return []
    return [
        token_from_dict(token_to_dict(added[i])) if i in added else AddedToken(text)
        for i, text in zip(ids, texts, strict=True)
    ]


def without_tokens_from(tokenizer: Any, size: int) -> Any:
    """What a tokenizer was before it was extended by added tokens for which a table of `size` rows has none.

    Returns:
        The tokenizer itself if there are none, else a copy.
    """
    added = tokenizer.get_added_vocab() if hasattr(tokenizer, "get_added_vocab") else {}
    beyond = {text for text, token_id in added.items() if token_id >= size}
    if not beyond:
        return tokenizer
    before = deepcopy(tokenizer)
    remove_from_tokenizer(before, beyond)
    return before


def tokens_as_known(tokenizer: Any, tokens: Sequence[AddedToken]) -> list[AddedToken]:
    """The tokens with the flags that the tokenizer has for them, where it has them."""
    known = {token.content: token for token in tokenizer.added_tokens_decoder.values()}
    found = [token if (own := known.get(token.content)) is None else _copied(own) for token in tokens]
    differ = [token.content for token, given in zip(found, tokens, strict=True) if given.special and not token.special]
    if differ:
        logger.warning(
            "Tokens %s are in the tokenizer already, as ordinary ones: they stay that, whatever special=True says. "
            "Add them as special ones: tokenizer.add_tokens(..., special_tokens=True).",
            shorten(differ),
        )
    return found


@collector_paused()
def check_new(
    tokenizer: Any, tokens: Sequence[AddedToken], *, known: Mapping[str, int] | None = None
) -> dict[str, list[int]]:
    """Check that no token is in the vocabulary, under its text or what the tokenizer makes of it.

    Args:
        tokenizer: any.
        tokens: new ones.
        known: ids of those of which it is known already that they are there.

    Returns:
        What each token's text is read as now.

    Raises:
        `KnownTokensError`: names those that are.
        `PartialEmbeddingError`: the tokenizer makes the same of two; it takes no tokens.
    """
    _check_growable(tokenizer)
    found = dict[str, int]()
    shown = []
    made_of: dict[tuple[int | str, ...], str] = {}
    added = {unicodedata.normalize("NFC", text): token_id for text, token_id in tokenizer.get_added_vocab().items()}
    texts = [token.content for token in tokens]
    unk_id = tokenizer.unk_token_id
    read = read_all(tokenizer, texts, unknown=True)
    for token, text, own_id in zip(tokens, texts, known_ids(tokenizer, texts), strict=True):
        pieces = read[text]
        is_read = unk_id not in pieces
        token_id = known.get(text, own_id) if known else own_id
        if token_id is None and added:
            token_id = added.get(unicodedata.normalize("NFC", text))
        if token_id is None and is_read and len(pieces) == 1:
            token_id = pieces[0]
        if token_id is not None:
            spelled = tokenizer.convert_ids_to_tokens(token_id)
            found[text] = token_id
            shown.append(f"{text!r} (id {token_id}{'' if spelled == text else f', {spelled!r}'})")
        elif pieces:
            # Unknown pieces do not tell what was read, and a token that is not normalised is found in the raw
            # text: such ones are the same only where nothing but spaces differs.
            key: tuple[int | str, ...] = (*pieces,) if is_read and token.normalized else (text.strip(), *pieces)
            if made_of.setdefault(key, text) != text:
                raise PartialEmbeddingError(
                    f"{type(tokenizer).__name__} reads {made_of[key]!r} and {text!r} as the same text, "
                    f"{tokenizer.convert_ids_to_tokens(pieces)}: they would be two rows for one thing. Give one of "
                    "them."
                )
    if found:
        named = ", ".join(shown[:8]) + (f" and {len(shown) - 8} more" if len(shown) > 8 else "")
        verb = "is a token" if len(found) == 1 else "are tokens"
        raise KnownTokensError(
            f"{named} {verb} of this tokenizer already. Nothing was added. To train rows that exist, use "
            "train_tokens.",
            found,
        )
    return read


def add_to_tokenizer(
    tokenizer: Any, tokens: Sequence[AddedToken], places: Mapping[str, int] | None = None
) -> list[int]:
    """Add tokens that are not known yet; returns their ids.

    Args:
        tokenizer: any.
        tokens: new ones.
        places: ids that the vocabulary keeps free for some of them.

    Raises:
        `PartialEmbeddingError`: the tokenizer takes no tokens, gives a token another one's id, does not
            find it in its own text (or finds another one there, the same after its normaliser), or would
            not find an earlier one any more. The tokenizer is as it was.
    """
    if not tokens:
        return []
    _check_growable(tokenizer)
    earlier = dict(tokenizer.get_added_vocab())
    # A table of the whole vocabulary takes longer than all the rest; a backend can be asked for single ids.
    taken = set(earlier.values()) if tokenizer.is_fast else set(tokenizer.get_vocab().values())
    read = read_all(tokenizer, earlier)
    found = {text: token_id for text, token_id in earlier.items() if token_id in read[text]}
    state = {} if tokenizer.is_fast else {key: copy(getattr(tokenizer, key)) for key in _SLOW_STATE}
    try:
        # In runs of one kind, which keeps the order where special and other tokens are mixed.
        for special, run in groupby(tokens, key=lambda token: bool(token.special)):
            given = list(run)  # a fast one keeps copies of them, others the objects
            tokenizer.add_tokens(given if tokenizer.is_fast else list(map(_copied, given)), special_tokens=special)
        ids = _new_ids(tokenizer, [token.content for token in tokens], taken, places or {})
        check_found(tokenizer, {**found, **ids}, tokens)
    except BaseException:
        came = set(tokenizer.get_added_vocab()) - set(earlier)
        tokenizer.__dict__.update(state)
        remove_from_tokenizer(tokenizer, came)
        raise
    return list(ids.values())


def _new_ids(
    tokenizer: Any, texts: Sequence[str], taken: Collection[int], places: Mapping[str, int]
) -> dict[str, int]:
    """The ids of tokens that have just been added, none of the ids that were there before."""
    name = type(tokenizer).__name__
    model = tokenizer._tokenizer.model if tokenizer.is_fast else None
    ids: dict[str, int] = {}
    id_to_token = (lambda _: None) if model is None else model.id_to_token
    for text, token_id in zip(texts, known_ids(tokenizer, texts), strict=True):
        if token_id is None:
            raise PartialEmbeddingError(
                f"{name} did not take {text!r} as a token of its own. Give it another text, or pass "
                f"AddedToken({text!r}, normalized=False)."
            )
        if token_id in taken or (id_to_token(token_id) is not None and places.get(text) != token_id):
            present = set(tokenizer.get_vocab().values())
            raise PartialEmbeddingError(
                f"{name} would give the new token {text!r} the id {token_id}, which another token has: its "
                f"{len(present)} ids go up to {max(present)}, with gaps. Give the tokenizer a token for each id first."
            )
        ids[text] = token_id
    return ids


def check_found(tokenizer: Any, ids: dict[str, int], new: Sequence[AddedToken]) -> None:
    """Check that the tokenizer finds each token in the token's own text."""
    texts = list(ids)
    for start in range(0, len(texts), _PART):
        part = texts[start : start + _PART]
        for text, found in zip(part, encode_all(tokenizer, part), strict=True):
            if ids[text] not in found:
                _raise_not_found(tokenizer, text, found, ids, new)


def _raise_not_found(
    tokenizer: Any, text: str, found: Sequence[int], ids: dict[str, int], new: Sequence[AddedToken]
) -> NoReturn:
    texts = {token_id: text for text, token_id in ids.items()}
    normalized = {token.content: token.normalized for token in new}
    pieces = [texts.get(piece) or tokenizer.convert_ids_to_tokens(piece) for piece in found]
    reads = f"{type(tokenizer).__name__} would read its text as {pieces or 'nothing'}"
    if text not in normalized:
        raise PartialEmbeddingError(f"Token {text!r} would be lost: {reads}. Give the new one another text.")
    remedy = ", or pass AddedToken(..., normalized=False)" if normalized[text] else ""
    raise PartialEmbeddingError(f"Token {text!r} would never be used: {reads}. Give it another text{remedy}.")


# What a tokenizer written in Python knows of added tokens, beside its trie and its size.
_SLOW_STATE = ("_added_tokens_decoder", "_added_tokens_encoder", "_extra_special_tokens")


def _check_growable(tokenizer: Any) -> None:
    if not getattr(tokenizer, "is_fast", False) and not all(hasattr(tokenizer, key) for key in _SLOW_STATE):
        raise PartialEmbeddingError(
            f"{type(tokenizer).__name__} takes no new tokens. Load the tokenizer with AutoTokenizer in another "
            "backend, or train rows that exist with train_tokens."
        )


def remove_from_tokenizer(tokenizer: Any, texts: Iterable[str]) -> None:
    """Take back tokens that `add_to_tokenizer` added; the tokenizer is as it was before, bit for bit."""
    gone = set(texts)
    if tokenizer.is_fast:
        remove_added_tokens(tokenizer._tokenizer, gone)
        return
    for text in gone & set(tokenizer._added_tokens_encoder):
        del tokenizer._added_tokens_decoder[tokenizer._added_tokens_encoder.pop(text)]
    tokenizer._extra_special_tokens = [token for token in tokenizer._extra_special_tokens if str(token) not in gone]
    # Some classes split at more than the added tokens, so the trie keeps whatever else it has.
    trie = tokenizer.tokens_trie
    tokenizer.tokens_trie = type(trie)(sorted(trie._tokens - gone))
    tokenizer._update_total_vocab_size()
