"""One text in two tokenisations: which places they share, and sums by characters of what is measured by tokens."""

from __future__ import annotations

from bisect import bisect_left, bisect_right
from collections.abc import Mapping, Sequence
from functools import cached_property
from itertools import accumulate, pairwise, takewhile

from ..tokens.reading import Reading

__all__ = ["AlignedText", "Window", "windows_of"]


class AlignedText:
    """A text before and after, with what has been measured on it.

    A *place* is a character at which a token starts in both tokenisations: what comes next is predicted there from
    the same text.

    Args:
        number: of the text, for messages.
        text: the text.
        before, after: its two readings.
        pieces: by the id of each new token, what its text alone was read as before.

    Attributes:
        new: indices of the new tokens in `after`.
        same: whether both readings have the same ids, none of them new.
        shared: how many tokens at the beginning are predicted from the same ids in both readings.
        partners: for each token of `after` that is at a place behind the first new token, the token of `before`
            that is there.
        firsts: for each new token's index, the id of the first of its old pieces, `None` where there are none.
        rests: the indices of the others in `before`; empty where the original reading has no border at both ends
            of the token.
        nats: for each side what each token's surprise is, in nats; 0 where it is not scored.
        leak: at each token of `after` the probability of the new tokens, that of the token itself aside.
        kl: for each token of `after` in `partners`, the divergence there.
        first_nats, ranks: for each new token's index, the surprise of `firsts` and the token's own rank.
        scored_from: for each side the first token that is scored.
    """

    def __init__(
        self, number: int, text: str, before: Reading, after: Reading, pieces: Mapping[int, Sequence[int]]
    ) -> None:
        self.number, self.text = number, text
        self.readings = {"before": before, "after": after}
        self.new = [index for index, token_id in enumerate(after.ids) if token_id in pieces]
        self.same = not self.new and before.ids == after.ids
        at = _first_at(before)
        self.partners: dict[int, int] = {}
        if self.new:
            behind = after.ends[self.new[0]]
            self.partners = {
                index: at[start]
                for start, index in _first_at(after).items()
                if start >= behind and start in at and index > self.new[0]
            }
        self.shared = _shared(before.ids, after.ids, self.partners)
        self.firsts: dict[int, int | None] = {}
        self.rests: dict[int, range] = {}
        borders = {*at, len(text)}
        for index in self.new:
            start, end = after.starts[index], after.ends[index]
            own = pieces[after.ids[index]]
            if start in borders and end in borders and start < end:
                stop = bisect_right(before.ends, end)
                self.firsts[index], self.rests[index] = before.ids[at[start]], range(at[start] + 1, stop)
            else:
                self.firsts[index], self.rests[index] = (own[0] if own else None), range(0)
        self.nats = {side: [0.0] * len(reading.ids) for side, reading in self.readings.items()}
        self.leak = [0.0] * len(after.ids)
        self.kl: dict[int, float] = {}
        self.first_nats: dict[int, float] = {}
        self.ranks: dict[int, int] = {}
        self.scored_from = {"before": 0, "after": 0}
        self.windows_left = 0

    @cached_property
    def partners_before(self) -> dict[int, int]:
        """`partners`, the other way."""
        return {old: index for index, old in self.partners.items()}

    @cached_property
    def _bytes(self) -> list[int]:
        return list(accumulate((len(char.encode("utf-8", "replace")) for char in self.text), initial=0))

    @cached_property
    def _sums(self) -> dict[str, list[float]]:
        return {side: list(accumulate(nats, initial=0.0)) for side, nats in self.nats.items()}

    def bytes_between(self, side: str, start: int, end: int) -> int:
        """UTF-8 bytes of the characters `start` to `end`, those of a token that is not scored aside."""
        first, reading = self.scored_from[side], self.readings[side]
        scored = reading.ends[first - 1] if first else 0
        start = max(start, scored)
        return max(0, self._bytes[max(start, end)] - self._bytes[start])

    def nats_between(self, side: str, start: int, end: int) -> float:
        """Surprise of the characters `start` to `end`; a token across a border is split as its bytes are."""
        return self._nats_until(side, end) - self._nats_until(side, start)

    def _nats_until(self, side: str, char: int) -> float:
        reading, sums = self.readings[side], self._sums[side]
        done = bisect_right(reading.ends, char)  # tokens that end at the character, or before it
        if done == len(reading.ends) or char <= reading.starts[done]:
            return sums[done] if char else 0.0
        start, end = self._bytes[reading.starts[done]], self._bytes[reading.ends[done]]
        return sums[done] + (sums[done + 1] - sums[done]) * (self._bytes[char] - start) / (end - start)

    def regions(self) -> list[tuple[str, int, int]]:
        """The text in parts, `("lead" | "new" | "following", start, end)`."""
        after, parts, reached = self.readings["after"], [], 0
        for index in self.new:
            parts.append(("following" if index != self.new[0] else "lead", reached, after.starts[index]))
            reached = after.ends[index]
            parts.append(("new", after.starts[index], reached))
        parts.append(("following" if self.new else "lead", reached, len(self.text)))
        return parts

    def influence(self) -> list[tuple[int, int, list[int]]]:
        """For each new token where its influence ends: index, the character, and its places up to there.

        That is where the next new token starts (a place of this one still), or the end of the text.
        """
        after = self.readings["after"]
        places = sorted(self.partners)
        found = []
        for index, following in pairwise([*self.new, len(after.ids)]):
            end = after.starts[following] if following < len(after.ids) else len(self.text)
            own = places[bisect_right(places, index) : bisect_right(places, following)]
            found.append((index, end, own))
        return found

    def cuts_word(self, index: int) -> bool:
        """Whether a new token ends or begins inside of a word, at a place where there was no border before."""
        after, before = self.readings["after"], self.readings["before"]
        for char in (after.starts[index], after.ends[index]):
            inside = 0 < char < len(self.text) and self.text[char - 1].isalnum() and self.text[char].isalnum()
            where = bisect_left(before.starts, char)
            if inside and (where == len(before.starts) or before.starts[where] != char):
                return True
        return False


def _shared(before: Sequence[int], after: Sequence[int], partners: Mapping[int, int]) -> int:
    same = takewhile(lambda pair: pair[0] == pair[1], zip(before, after, strict=False))
    least = min(len(before), len(after), sum(1 for _ in same) + 1)
    return min(least, *partners, *partners.values()) if partners else least


def _first_at(reading: Reading) -> dict[int, int]:
    """The token that starts at each character, the first one where several do."""
    first: dict[int, int] = {}
    for index, (start, clean) in enumerate(zip(reading.starts, reading.clean, strict=True)):
        if clean:
            first.setdefault(start, index)
    return first


class Window:
    """A part of one reading of a text that the model is run over.

    Attributes:
        aligned: the text.
        side: `"before"`, `"after"`, or `"both"` where one forward serves both.
        ids: what the model is given.
        tokens: indices in the reading of the tokens that are scored here, a range.
        shift: the state that predicts token `t` is at position `t - shift`.
    """

    def __init__(self, aligned: AlignedText, side: str, ids: list[int], tokens: range, shift: int) -> None:
        self.aligned, self.side, self.ids, self.tokens, self.shift = aligned, side, ids, tokens, shift

    @property
    def reading(self) -> Reading:
        return self.aligned.readings["after" if self.side == "both" else self.side]


def windows_of(
    aligned: AlignedText, side: str, prefix: int | None, length: int, stride: int, shared: int = 0
) -> list[Window]:
    """The windows of one reading: every token is scored once, after the prefix if there is one.

    Each window but the first begins `stride` tokens before the first token that it scores.

    Args:
        aligned, side: the text and its reading.
        prefix: id that the context begins with; without one the first token is not scored.
        length: the most ids in a window.
        stride: from 1 to `length - 1`.
        shared: tokens at the beginning that are scored in the other reading's windows, which are the same up to
            there; windows that have no others are left out.
    """
    ids = aligned.readings["after" if side == "both" else side].ids
    before = [] if prefix is None else [prefix]
    sequence = [*before, *ids]
    for name in ("before", "after") if side == "both" else (side,):
        aligned.scored_from[name] = 1 - len(before)
    found, start, first = [], 0, 1
    while first < len(sequence):
        stop = min(start + length, len(sequence))
        tokens = range(first - len(before), stop - len(before))
        if tokens.stop > shared:
            found.append(Window(aligned, side, sequence[start:stop], tokens, start + 1 - len(before)))
        start, first = stop - stride, stop
    aligned.windows_left += len(found)
    return found
