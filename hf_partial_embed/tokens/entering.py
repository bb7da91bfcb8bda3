"""How new tokens enter a tokenizer: as pieces of its vocabulary, or as added tokens; and the way back."""

from __future__ import annotations

import logging
import unicodedata
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from tokenizers import AddedToken

from ..errors import PartialEmbeddingError, shorten
from .added import check_new
from .backend import change_state, changed_copy, collector_paused
from .pieces import Piece, Planner
from .planners import KINDS, planner_of
from .spelling import CONTEXTS
from .vocabulary import encode_all, known_ids

__all__ = [
    "ENTRIES",
    "Entering",
    "Preview",
    "enter_pieces",
    "ids_of",
    "piece_id",
    "pins_of",
    "places",
    "plan_again",
    "plan_tokens",
    "take_back",
]

logger = logging.getLogger(__name__)

ENTRIES = ("auto", "added", "vocabulary")


@dataclass(frozen=True)
class Entering:
    """New tokens as they are going to enter.

    Attributes:
        tokens: the asked ones in their order, then parts.
        pieces: for each of them the piece of the vocabulary that it is; `None` for an added token.
    """

    tokens: list[AddedToken]
    pieces: list[Piece | None]

    def read_as(self, added: Mapping[str, Sequence[int]]) -> list[Sequence[int]]:
        """For each token the ids of what its text is read as now; `added` says it of the added ones."""
        return [
            added[token.content] if piece is None else piece.made_of
            for token, piece in zip(self.tokens, self.pieces, strict=True)
        ]

    @property
    def num_parts(self) -> int:
        return sum(piece is not None and not piece.asked for piece in self.pieces)


@collector_paused()
def plan_tokens(tokenizer: Any, tokens: Sequence[AddedToken], plain: Sequence[bool], entry: str) -> Entering:
    """Decide how each new token enters, and which parts come along. The tokenizer is only read.

    Args:
        tokenizer: a tokenizer.
        tokens: new ones.
        plain: for each whether it was given as a `str`.
        entry: `"auto"`, `"added"` or `"vocabulary"`.

    Raises:
        `PartialEmbeddingError`: no such entry; tokens that exist; with `"vocabulary"`, tokens that cannot be pieces
            of this vocabulary.
    """
    if entry not in ENTRIES:
        raise PartialEmbeddingError(f"entry={entry!r} is none of {', '.join(map(repr, ENTRIES))}.")
    if entry == "added":
        return Entering(list(tokens), [None] * len(tokens))
    candidates = [
        token
        for token, is_plain in zip(tokens, plain, strict=True)
        if entry == "vocabulary" or _is_word(token, is_plain)
    ]
    refused: dict[str, PartialEmbeddingError] = {}
    planned: list[Piece] = []
    if candidates:
        try:
            planner = planner_of(tokenizer)
            _check_places(tokenizer, planner)
            planned, refused = _plan(tokenizer, planner, candidates)
        except _KnownTokens as error:
            check_new(tokenizer, tokens, known=error.known)
        except PartialEmbeddingError as error:
            refused = {token.content: error for token in candidates}
    if refused and entry == "vocabulary":
        first = next(iter(refused.values()))
        more = f" The same holds for, or hinders, {len(refused) - 1} more of the tokens." if len(refused) > 1 else ""
        raise PartialEmbeddingError(f"{first}{more}") from first
    if not planned:
        return Entering(list(tokens), [None] * len(tokens))
    asked = {piece.text: piece for piece in planned if piece.asked}
    parts = [piece for piece in planned if not piece.asked]
    both = sorted({token.content for token in tokens} & {part.text for part in parts})
    if both:
        raise PartialEmbeddingError(
            f"{shorten(both)} would come into the vocabulary as parts of other tokens, and cannot be added tokens at "
            "the same time. Leave them out."
        )
    return Entering(
        [*tokens, *(AddedToken(part.text, normalized=True) for part in parts)],
        [*(asked.get(token.content) for token in tokens), *parts],
    )


def _is_word(token: AddedToken, is_plain: bool) -> bool:
    return is_plain and not token.special and "\ufffd" not in token.content


def _plan(
    tokenizer: Any, planner: Planner, tokens: Sequence[AddedToken]
) -> tuple[list[Piece], dict[str, PartialEmbeddingError]]:
    """Pieces for tokens, with their parts; and by text the reasons for those that cannot be pieces."""
    refused: dict[str, PartialEmbeddingError] = {}
    wanted: list[Piece] = []
    known: dict[str, int] = {}
    added = {unicodedata.normalize("NFC", text): token_id for text, token_id in tokenizer.get_added_vocab().items()}
    for token in tokens:
        text = token.content
        try:
            _check_plain(token)
            spelling = planner.spelling.spell(text)
        except PartialEmbeddingError as error:
            refused[text] = error
            continue
        token_id = added.get(unicodedata.normalize("NFC", text), tokenizer._tokenizer.token_to_id(spelling))
        if token_id is None:
            wanted.append(Piece(text, spelling))
        else:
            known[text] = token_id
    if known:
        raise _KnownTokens(known)
    texts = {piece.spelling: piece.text for piece in wanted}
    pieces, reasons = planner.plan(wanted)
    never = _never_read(tokenizer, [piece for piece in pieces if piece.asked])
    if never:  # without them, and without the parts that only they need
        reasons.update(never)
        pieces, more = planner.plan([piece for piece in wanted if piece.spelling not in reasons])
        reasons.update(more)
    refused.update({texts[spelling]: error for spelling, error in reasons.items()})
    return pieces, refused


class _KnownTokens(Exception):
    """Tokens are in the vocabulary already."""

    def __init__(self, known: dict[str, int]) -> None:
        self.known = known


def _check_plain(token: AddedToken) -> None:
    if token.special or token.lstrip or token.rstrip or token.single_word:
        raise PartialEmbeddingError(
            f"Token {token.content!r} is special or has flags (lstrip, rstrip, single_word), which only added tokens "
            "have. Add it with entry='added'."
        )
    if "\ufffd" in token.content:
        raise PartialEmbeddingError(
            f"Token {token.content!r} has U+FFFD in it, which decoders write for half a character. Give whole "
            "characters."
        )


def _check_places(tokenizer: Any, planner: Planner) -> None:
    """Check that there are ids for new pieces, behind those of all tokens that are there."""
    ids = set(tokenizer.get_vocab().values())
    if ids and max(ids) + 1 != len(ids):
        raise PartialEmbeddingError(
            f"{type(tokenizer).__name__} has {len(ids)} tokens with ids up to {max(ids)}, so there are gaps, and new "
            "pieces of the vocabulary would collide with old ones. Give the tokenizer a token for each id first."
        )
    pins, decoder = pins_of(tokenizer), tokenizer.added_tokens_decoder
    read = [text for text, token_id in pins.items() if _would_be_read(planner, decoder[token_id])]
    if read:
        raise PartialEmbeddingError(
            f"The added tokens {shorten(read)} would be found where they are not now, if they had a place in the "
            f"vocabulary of {type(tokenizer).__name__}, as pieces behind them need. Add the tokens with entry='added'."
        )


def _never_read(tokenizer: Any, pieces: Sequence[Piece]) -> dict[str, PartialEmbeddingError]:
    """Pieces whose parts the tokenizer does not read side by side, wherever their text stands."""
    left = list(pieces)
    for context in CONTEXTS:
        read = encode_all(tokenizer, [context + piece.text for piece in left], unknown=True)
        left = [
            piece for piece, ids in zip(left, read, strict=True) if tuple(ids[-len(piece.made_of) :]) != piece.made_of
        ]
    alone = encode_all(tokenizer, [piece.text for piece in left], unknown=True)
    return {
        piece.spelling: PartialEmbeddingError(
            f"{piece.text!r} never comes to the tokenizer's vocabulary as a whole: its text is read as "
            f"{tokenizer.convert_ids_to_tokens(ids)}, where a piece of the vocabulary would be made of "
            f"{tokenizer.convert_ids_to_tokens(list(piece.made_of))}. Add it with entry='added'."
        )
        for piece, ids in zip(left, alone, strict=True)
    }


def plan_again(tokenizer: Any, pieces: Sequence[Piece]) -> list[Piece]:
    """Plan pieces over what is in the vocabulary now, and the parts that they need now.

    Args:
        tokenizer: where they are to come in; they are not there.
        pieces: planned before, there or on another copy of the base.

    Raises:
        `PartialEmbeddingError`: one of them cannot come in.
    """
    planner = planner_of(tokenizer)
    _check_places(tokenizer, planner)
    planned, refused = planner.plan(sorted(pieces, key=lambda piece: piece.rank))
    for spelling, error in refused.items():
        raise PartialEmbeddingError(f"{spelling!r} cannot come into the vocabulary as it is now. {error}") from error
    return planned


def ids_of(tokenizer: Any, tokens: Sequence[AddedToken], pieces: Sequence[Piece | None]) -> list[int | None]:
    """The ids of tokens, `None` where the tokenizer does not have them: by their text, those of pieces by these."""
    texts = [token.content for token, piece in zip(tokens, pieces, strict=True) if piece is None]
    by_text = iter(known_ids(tokenizer, texts))
    return [next(by_text) if piece is None else piece_id(tokenizer, piece) for piece in pieces]


def piece_id(tokenizer: Any, piece: Piece) -> int | None:
    """The id of a piece, `None` where the vocabulary does not have it."""
    backend = tokenizer._tokenizer if getattr(tokenizer, "is_fast", False) else None
    found: int | None = None if backend is None else backend.token_to_id(piece.spelling)
    return found


def enter_pieces(tokenizer: Any, pieces: Sequence[Piece], ids: Mapping[str, int], pins: Mapping[str, int]) -> None:
    """Put planned pieces into the vocabulary, in place.

    Args:
        tokenizer: whose truncation, padding and splitting of special tokens stay as they are.
        pieces: planned over what is there now.
        ids, pins: what `places` says.
    """
    backend = tokenizer._tokenizer
    planner = KINDS[type(backend.model).__name__]
    ranked = sorted(pieces, key=lambda piece: piece.rank)
    change_state(backend, lambda state: planner.enter(state["model"], ranked, dict(ids), dict(pins)))


def places(
    tokenizer: Any, tokens: Sequence[AddedToken], pieces: Sequence[Piece | None]
) -> tuple[dict[str, int], dict[str, int]]:
    """The ids of new tokens, in their order, behind all that are there.

    Returns:
        The ids of pieces by their spelling; and those of added tokens that need a place in the vocabulary, since
        pieces come behind them: a backend that is loaded would give them others. Added tokens that the model would
        find there come behind all pieces instead.
    """
    planner = planner_of(tokenizer)
    ids, pins = {}, pins_of(tokenizer)
    last = max((at for at, piece in enumerate(pieces) if piece is not None), default=-1)
    next_id = len(tokenizer)
    for at, (token, piece) in enumerate(zip(tokens, pieces, strict=True)):
        if piece is not None:
            ids[piece.spelling] = next_id
        elif at < last and not _would_be_read(planner, token):
            pins[token.content] = next_id
        else:
            continue
        next_id += 1
    return ids, pins


def _would_be_read(planner: Planner, token: AddedToken) -> bool:
    """Whether an added token's text comes to the model without being cut out, which then finds it."""
    comes = token.special or token.single_word or (not token.normalized and planner.backend.normalizer is not None)
    return comes and planner.reads(token.content)


def take_back(tokenizer: Any, pieces: Sequence[Piece], pins: Mapping[str, int]) -> None:
    """The inverse of `enter_pieces`; harmless where they are not in.

    Raises:
        `PartialEmbeddingError`: other tokens have come behind them, which would get other ids.
    """
    backend = tokenizer._tokenizer
    own = [token_id for piece in pieces if (token_id := backend.model.token_to_id(piece.spelling)) is not None]
    if not own:
        return
    behind = [text for text, token_id in tokenizer.get_vocab().items() if token_id > max(own)]
    if behind:
        raise PartialEmbeddingError(
            f"The pieces {shorten([piece.text for piece in pieces])} cannot be taken out of the vocabulary: "
            f"{shorten(behind)} came behind them and would get other ids. Take those off first."
        )
    planner = KINDS[type(backend.model).__name__]
    change_state(backend, lambda state: planner.leave(state["model"], pieces, pins))


def pins_of(tokenizer: Any) -> dict[str, int]:
    """Added tokens, with their ids, that the vocabulary has no place for yet."""
    model = tokenizer._tokenizer.model
    return {
        token.content: token_id
        for token_id, token in sorted(tokenizer.added_tokens_decoder.items())
        if model.token_to_id(token.content) is None
    }


class Preview:
    """A tokenizer as it is going to be, with new pieces in its vocabulary.

    Args:
        tokenizer: as it is; it is only read.
        tokens: the new ones.
        pieces: for each the piece of the vocabulary that it is; `None` for an added token, which is not found here.

    Attributes:
        ids: for each token its id here, `None` for an added one.
    """

    def __init__(self, tokenizer: Any, tokens: Sequence[AddedToken], pieces: Sequence[Piece | None]) -> None:
        there = [piece for piece in pieces if piece is not None]
        given, pins = places(tokenizer, tokens, pieces)
        self.ids = [None if piece is None else given[piece.spelling] for piece in pieces]
        self._made_of = {given[piece.spelling]: piece.made_of for piece in there}
        ranked = sorted(there, key=lambda piece: piece.rank)
        planner = KINDS[type(tokenizer._tokenizer.model).__name__]
        self._backend = changed_copy(
            tokenizer._tokenizer, lambda state: planner.enter(state["model"], ranked, given, pins)
        )
        self._backend.no_truncation()
        self._backend.no_padding()

    def read(self, texts: Sequence[str]) -> list[list[int]]:
        """Ids of each text alone."""
        encodings = self._backend.encode_batch(list(texts), add_special_tokens=False)
        return [encoding.ids for encoding in encodings]

    def expand(self, ids: Sequence[int]) -> list[int]:
        """Each new id as the ids that it was read as before."""
        return [part for token_id in ids for part in self._made_of.get(token_id, (token_id,))]
