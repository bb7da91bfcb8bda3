"""BPE training that goes on where a tokenizer's own training ended, and what its new tokens leave of a text.

The training is that of Sennrich et al. (2016, arXiv:1508.07909) over the base's own pieces of each pre-token, with
the counts kept up to date by an inverted index. A new merge never makes a text that is a token already: its ids would
then mean another segmentation than before.
"""

from __future__ import annotations

import heapq
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from itertools import pairwise

from .corpus import Reader

__all__ = ["Learned", "Learner", "merged", "pairs_of"]

Pair = tuple[int, int]


@dataclass(frozen=True)
class Learned:
    """A new token.

    Attributes:
        piece: its text as the vocabulary writes it.
        parts: the pieces that its merge joins; `None` for one that only a whole pre-token is read as.
        saved: by how many tokens it shortened the corpus, behind the tokens before it.
    """

    piece: str
    parts: tuple[str, str] | None
    saved: int


def pairs_of(ids: Sequence[int]) -> Iterator[Pair]:
    """Neighbouring pairs; of a run of one piece only those that can be merged beside each other."""
    overlaps = False
    for place in range(len(ids) - 1):
        left, right = ids[place], ids[place + 1]
        overlaps = not overlaps and place > 0 and ids[place - 1] == left == right
        if not overlaps:
            yield left, right


def merged(ids: Sequence[int], pair: Pair, new: int) -> list[int]:
    """The pieces with every pair joined, from the left."""
    left, right = pair
    out: list[int] = []
    place, last = 0, len(ids) - 1
    while place <= last:
        if place < last and ids[place] == left and ids[place + 1] == right:
            out.append(new)
            place += 2
        else:
            out.append(ids[place])
            place += 1
    return out


class Learner:
    """The segmentation of a corpus, and the next token that shortens it most.

    Args:
        reader: the tokenizer.
        pre_tokens: the distinct ones with their counts.
        min_count: how often a token must occur when it is chosen.
        accept: whether a piece may become a token.
    """

    def __init__(
        self, reader: Reader, pre_tokens: dict[str, int], min_count: int, accept: Callable[[str], bool]
    ) -> None:
        self._reader, self.min_count, self._accept = reader, min_count, accept
        self.names = list(pre_tokens)
        self.counts = list(pre_tokens.values())
        self.words = reader.segment(self.names)
        self.tokens = self.before = sum(count * len(ids) for count, ids in zip(self.counts, self.words, strict=True))
        # Where merges are ignored, a pre-token that has become a token is read as one, however its pieces lie.
        self._whole = {name: word for word, name in enumerate(self.names)} if reader.ignore_merges else {}
        self.learned: list[Learned] = []
        self.ids: dict[str, int] = {}  # of the new tokens, below zero
        self._texts: dict[int, str] = {}
        self._may_enter: dict[str, bool] = {}
        self._pair_counts: dict[Pair, int] = {}
        self._where: dict[Pair, set[int]] = {}
        for word, ids in enumerate(self.words):
            for pair in pairs_of(ids):
                self._pair_counts[pair] = self._pair_counts.get(pair, 0) + self.counts[word]
                self._where.setdefault(pair, set()).add(word)
        # Ties go by the texts, so that neither the order of the corpus nor that of a hash decides.
        self._heap: list[tuple[int, str, str, Pair]] = []
        self._push(self._pair_counts)

    def _push(self, pairs: Iterable[Pair]) -> None:
        for pair in pairs:
            count = self._pair_counts[pair]
            if count >= self.min_count:
                entry = (-count, self.text(pair[0]) + self.text(pair[1]), self.text(pair[0]), pair)
                heapq.heappush(self._heap, entry)

    def text(self, token_id: int) -> str:
        """The text of a piece, old or new, as the vocabulary writes it."""
        text = self._texts.get(token_id)
        if text is None:
            text = self._texts[token_id] = self._reader.piece(token_id)
        return text

    def join(self, left: str, right: str) -> str | None:
        """What a merge of two pieces would make, `None` where that cannot become a token."""
        piece = left + right
        if piece in self.ids or not (self._reader.is_text(left) and self._reader.is_text(right)):
            return None
        return piece if self.may_enter(piece) else None

    def may_enter(self, piece: str) -> bool:
        """Whether a piece is none yet, and may become one."""
        known = self._may_enter.get(piece)
        if known is None:
            known = self._may_enter[piece] = not self._reader.is_known(piece) and self._accept(piece)
        return known

    def best_pair(self) -> tuple[int, Pair] | None:
        """The pair that occurs most and may be merged, with its count; it stays where it is."""
        while self._heap:
            entry = self._heap[0]
            pair = entry[3]
            count = self._pair_counts.get(pair, 0)
            if count < self.min_count or self.join(self.text(pair[0]), self.text(pair[1])) is None:
                heapq.heappop(self._heap)
            elif count != -entry[0]:  # counts only fall after a pair has come up
                heapq.heapreplace(self._heap, (-count, *entry[1:]))
            else:
                return count, pair
        return None

    def merge(self, pair: Pair) -> None:
        """Make the pair a token, and join it in every pre-token."""
        parts = self.text(pair[0]), self.text(pair[1])
        new = self._new_id("".join(parts))
        saved, fresh = 0, set[Pair]()
        for word in sorted(self._where.get(pair, ())):
            ids = self.words[word]
            joined = merged(ids, pair, new)
            if len(joined) < len(ids):
                saved += (len(ids) - len(joined)) * self.counts[word]
                fresh |= self._replace(word, joined)
        self._where.pop(pair, None)
        self._push(fresh)
        whole = self._whole.get(self.text(new))
        if whole is not None and len(self.words[whole]) > 1:
            saved += (len(self.words[whole]) - 1) * self.counts[whole]
            self._replace(whole, [new])
        self._note(Learned("".join(parts), parts, saved))

    def take_whole(self, word: int) -> None:
        """Make a whole pre-token a token, which needs no merge where the tokenizer ignores them."""
        piece = self.names[word]
        saved = (len(self.words[word]) - 1) * self.counts[word]
        self._replace(word, [self._new_id(piece)])
        self._note(Learned(piece, None, saved))

    def _new_id(self, piece: str) -> int:
        new = -1 - len(self.ids)
        self.ids[piece] = new
        self._texts[new] = piece
        return new

    def _note(self, learned: Learned) -> None:
        self.tokens -= learned.saved
        self.learned.append(learned)

    def _replace(self, word: int, ids: list[int]) -> set[Pair]:
        """Put other pieces in the place of a word's; returns the pairs that have come up."""
        count, counts, fresh = self.counts[word], self._pair_counts, set[Pair]()
        for pair in pairs_of(self.words[word]):
            counts[pair] -= count
        self.words[word] = ids
        for pair in pairs_of(ids):
            counts[pair] = counts.get(pair, 0) + count
            where = self._where.get(pair)
            if where is None:
                self._where[pair] = {word}
                fresh.add(pair)
            else:
                where.add(word)
        return fresh

    def chain(self, word: int) -> list[Pair] | None:
        """Merges that make a pre-token one piece, frequent pairs first; `None` where there are none.

        The pairs hold ids that the tokens before them in the list will have.
        """
        ids, chain = list(self.words[word]), list[Pair]()
        made: dict[int, str] = {}
        while len(ids) > 1:
            texts = [made.get(token_id) or self.text(token_id) for token_id in ids]
            options = [
                (-self._pair_counts.get(pair, 0), place, pair, piece)
                for place, pair in enumerate(pairwise(ids))
                if (piece := self.join(texts[place], texts[place + 1])) and piece not in made.values()
            ]
            if not options:
                return None
            _, _, pair, piece = min(options)
            new = -1 - len(self.ids) - len(made)
            made[new] = piece
            ids = merged(ids, pair, new)
            chain.append(pair)
        return chain
