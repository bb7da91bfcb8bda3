"""Pieces of a BPE vocabulary, each made by one merge behind all merges that are there.

A new merge joins two pieces that the old merges leave side by side, and what it makes is neither an old piece nor made
by another merge. So no old merge finds anything that it did not find before, and taking a text's new pieces apart
again gives the ids that it had. With `ignore_merges` a whole pre-token of the vocabulary needs no merge.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from itertools import pairwise
from typing import Any, NamedTuple

from ..errors import PartialEmbeddingError
from .pieces import Piece, Planner
from .spelling import Spelling

__all__ = ["BytePairs"]

_Symbol = tuple[str, tuple[int, ...]]  # a piece's spelling, and what it was read as before


class _Made(NamedTuple):
    """What a piece of the plan is made of, as `Piece` has it."""

    parts: tuple[str, ...]
    made_of: tuple[int, ...]
    merged: bool


class BytePairs(Planner):
    """BPE: byte-level, with byte fallback, and with `ignore_merges`."""

    kind = "BPE"

    def __init__(self, backend: Any, spelling: Spelling) -> None:
        super().__init__(backend, spelling)
        self.whole_first = bool(self.model.ignore_merges)
        self._made: dict[str, _Made] = {}
        self._ranks: dict[tuple[str, str], int] = {}
        self._wanted: set[str] = set()
        self._journal: list[tuple[str, _Made | None]] = []
        self._next = 0
        if self.model.dropout:
            raise PartialEmbeddingError(
                f"The tokenizer leaves out merges at random (dropout={self.model.dropout}), so no piece of its "
                "vocabulary has a text of its own. Add the tokens with entry='added'."
            )
        mark = self.model.continuing_subword_prefix or self.model.end_of_word_suffix
        if mark:
            raise PartialEmbeddingError(
                f"The tokenizer's BPE marks the inside or the end of words with {mark!r}, for which merges are not "
                "planned here. Add the tokens with entry='added'."
            )

    def base(self, spelling: str) -> list[tuple[str, int]]:
        if not self.whole_first:
            return self._read(spelling)
        # What merges make of it, also where it would be looked up as a whole.
        self.model.ignore_merges = False
        try:
            return self._read(spelling)
        finally:
            self.model.ignore_merges = True

    def _read(self, spelling: str) -> list[tuple[str, int]]:
        tokens = self._tokenized(spelling)
        if "".join([value for value, _ in tokens]) != spelling:
            raise PartialEmbeddingError(
                f"{self.spelling.text_of(spelling) or spelling!r} has characters that the tokenizer's BPE does not "
                f"know: it reads {[value for value, _ in tokens]}. Add it with entry='added'."
            )
        return tokens

    def plan(self, wanted: Iterable[Piece]) -> tuple[list[Piece], dict[str, PartialEmbeddingError]]:
        listed = list(wanted)
        self._made, self._ranks = {}, {}
        self._wanted = {piece.spelling for piece in listed}
        refused = {}
        for piece in listed:
            self._journal = []
            try:
                self._plan_one(piece)
            except PartialEmbeddingError as error:
                self._take_back()  # the parts that it would have needed
                refused[piece.spelling] = error
        named = {piece.spelling: (piece.text, piece.asked) for piece in listed if piece.spelling not in refused}
        pieces = []
        for rank, (spelling, made) in enumerate(self._made.items()):
            text, asked = named.get(spelling) or (self.spelling.text_of(spelling) or spelling, False)
            pieces.append(Piece(text, spelling, asked, *made, rank))
        return pieces, refused

    def reads(self, text: str) -> bool:
        return text in self.spelling.pre_tokens(text) and (self.whole_first or len(text) == 1)

    def _plan_one(self, piece: Piece) -> None:
        if piece.spelling in self._made:
            return
        symbols = self._merged(self._symbols(piece.spelling))
        if self.whole_first and len(symbols) > 2 and self.spelling.is_whole(piece.text, piece.spelling):
            self._put(piece.spelling, symbols, merged=False)
            return
        while len(symbols) > 1:
            at = self._choose(symbols, piece)
            pair = symbols[at : at + 2]
            symbols = _join(symbols, (pair[0][0], pair[1][0]), self._put(pair[0][0] + pair[1][0], pair, merged=True))

    def _choose(self, symbols: list[_Symbol], piece: Piece) -> int:
        """Where two neighbours are to be merged: what they make must have no other way to come about."""
        best: tuple[tuple[bool, bool, int], int] | None = None
        for at, ((left, _), (right, _)) in enumerate(pairwise(symbols)):
            join = left + right
            made = self._made.get(join)
            if (made is None and self._taken(join)) or (made is not None and (made.merged or not self.whole_first)):
                continue
            # Rather something that is wanted anyway, and no half characters.
            key = (join not in self._wanted, self.spelling.text_of(join) is None, at)
            if best is None or key < best[0]:
                best = key, at
            if not key[0] and not key[1]:
                break
        if best is None:
            raise PartialEmbeddingError(
                f"{piece.text!r} is read as {[part for part, _ in symbols]}, and what two neighbours of these make "
                "is a token already, by other merges: one more merge would change how other texts are read. Add it "
                "with entry='added'."
            )
        return best[1]

    def _take_back(self) -> None:
        for spelling, before in reversed(self._journal):
            made = self._made.pop(spelling)
            if made.merged:
                del self._ranks[made.parts[0], made.parts[1]]
            if before is not None:
                self._made[spelling] = before

    def _put(self, spelling: str, symbols: Sequence[_Symbol], *, merged: bool) -> _Symbol:
        # A whole pre-token that gets a merge later comes in with that.
        self._journal.append((spelling, self._made.pop(spelling, None)))
        parts, ids = zip(*symbols, strict=True)
        self._made[spelling] = _Made(parts, sum(ids, ()), merged)
        if merged:
            self._ranks[parts] = self._next = self._next + 1
        return spelling, self._made[spelling].made_of

    def _symbols(self, spelling: str) -> list[_Symbol]:
        """What the old merges leave; a character that there are bytes for only comes in as a symbol by itself."""
        if not self.model.byte_fallback:
            return [(part, (token_id,)) for part, token_id in self.base(spelling)]
        symbols: list[_Symbol] = []
        start = 0
        for end, letter in enumerate([*spelling, ""]):
            if letter and self.model.token_to_id(letter) is not None:
                continue
            if spelling[start:end]:
                symbols += [(part, (token_id,)) for part, token_id in self.base(spelling[start:end])]
            if letter:
                symbols.append(self._character(letter))
            start = end + 1
        return symbols

    def _character(self, letter: str) -> _Symbol:
        if letter not in self._made:
            tokens = self._tokenized(letter)
            if self._taken(letter) or not all(value.startswith("<0x") for value, _ in tokens):
                raise PartialEmbeddingError(
                    f"The tokenizer's BPE knows neither {letter!r} nor bytes for it. Add the token with entry='added'."
                )
            self._put(letter, [(value, (token_id,)) for value, token_id in tokens], merged=False)
        return letter, self._made[letter].made_of

    def _merged(self, symbols: list[_Symbol]) -> list[_Symbol]:
        """What the new merges, which come behind all old ones, make of symbols."""
        while True:
            names = [name for name, _ in symbols]
            known = [pair for pair in pairwise(names) if pair in self._ranks]
            if not known:
                return symbols
            pair = min(known, key=self._ranks.__getitem__)
            symbols = _join(symbols, pair, (pair[0] + pair[1], self._made[pair[0] + pair[1]].made_of))

    @staticmethod
    def enter(model: dict[str, Any], pieces: Sequence[Piece], ids: dict[str, int], pins: dict[str, int]) -> None:
        model["vocab"].update(pins)
        model["vocab"].update(ids)
        model["merges"].extend(list(piece.parts) for piece in pieces if piece.merged)

    @staticmethod
    def leave(model: dict[str, Any], pieces: Sequence[Piece], pins: Iterable[str]) -> None:
        for spelling in [*(piece.spelling for piece in pieces), *pins]:
            model["vocab"].pop(spelling, None)
        gone = {piece.parts for piece in pieces if piece.merged}
        model["merges"] = [pair for pair in model["merges"] if tuple(pair) not in gone]


def _join(symbols: list[_Symbol], pair: tuple[str, str], joined: _Symbol) -> list[_Symbol]:
    """Put one symbol in the place of each pair, from the left."""
    out: list[_Symbol] = []
    for symbol in symbols:
        if out and (out[-1][0], symbol[0]) == pair:
            out[-1] = joined
        else:
            out.append(symbol)
    return out
