"""The tokens of a row file beside a tokenizer: which it has, which are new, and which parts the new ones need."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from tokenizers import AddedToken

from ..tokens.added import check_new, check_texts, token_from_dict
from ..tokens.backend import collector_paused
from ..tokens.entering import ids_of, plan_again
from ..tokens.pieces import Piece
from ..tokens.stored import check_no_spellings, check_same_base, stored_pieces

__all__ = ["Arriving", "arriving_tokens"]


@dataclass(frozen=True)
class Arriving:
    """Saved tokens as a tokenizer is to have them.

    Attributes:
        tokens: the tokens of the file, followed by parts that they need in this tokenizer and did not need in the
            one that they were trained with.
        entries: for each of `tokens` the piece of the vocabulary that it is; `None` for an added token.
        pieces: for each of `tokens` the ids that its text is read as now; its own id where the tokenizer has it.
        kept: which of the file's tokens, by position, are among `tokens`.
        num_new: how many of `tokens` the tokenizer does not have.
        reach: ids below this need a row; 0 where there are no tokens.
    """

    tokens: list[AddedToken]
    entries: list[Piece | None]
    pieces: list[list[int]]
    kept: list[int]
    num_new: int
    reach: int


@collector_paused()
def arriving_tokens(tokenizer: Any, stored: Sequence[dict[str, Any]], in_use: set[int]) -> Arriving:
    """Find which of a row file's tokens a tokenizer has, and plan the entry of the others.

    Args:
        tokenizer: only read.
        stored: the tokens of a row file; none where its rows are matched by id.
        in_use: ids that belong to another row set; a part with such an id is left to that set.

    Raises:
        `PartialEmbeddingError`: tokens that cannot enter this tokenizer.
    """
    if not stored:
        return Arriving([], [], [], [], 0, 0)
    check_same_base(tokenizer, stored)
    texts = [token["content"] for token in stored]
    check_texts(texts)
    tokens = [token_from_dict(token) for token in stored]
    entries = stored_pieces(stored)
    ids = ids_of(tokenizer, tokens, entries)
    kept = [
        row for row, (piece, token_id) in enumerate(zip(entries, ids, strict=True))
        if piece is None or piece.asked or token_id not in in_use
    ]  # fmt: skip
    new = [tokens[row] for row in kept if ids[row] is None and entries[row] is None]
    read: dict[str, list[int]] = {}
    if new:
        check_no_spellings(tokenizer, new)
        read = check_new(tokenizer, new)
    missing = [piece for row in kept if ids[row] is None and (piece := entries[row]) is not None]
    planned = {piece.text: piece for piece in (plan_again(tokenizer, missing) if missing else [])}
    kept_entries, pieces = [], []
    for row in kept:
        piece, own = planned.get(texts[row], entries[row]), ids[row]
        kept_entries.append(piece)
        if own is not None:
            pieces.append([own])
        else:
            pieces.append(read[texts[row]] if piece is None else list(piece.made_of))
    there = {texts[row] for row in kept}
    parts = [piece for text, piece in planned.items() if text not in there]
    num_new = len(new) + len(planned)
    owned = [own for row in kept if (own := ids[row]) is not None]
    return Arriving(
        tokens=[*(tokens[row] for row in kept), *(AddedToken(part.text, normalized=True) for part in parts)],
        entries=[*kept_entries, *parts],
        pieces=[*pieces, *(list(part.made_of) for part in parts)],
        kept=kept,
        num_new=num_new,
        reach=max([len(tokenizer) + num_new if num_new else 0, *(own + 1 for own in owned)]),
    )
