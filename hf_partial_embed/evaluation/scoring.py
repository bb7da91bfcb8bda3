"""Log-probabilities of texts under a model before and after, and how far its predictions have moved."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ..errors import PartialEmbeddingError
from .alignment import AlignedText, Window
from .states import HeadStates

__all__ = ["Columns", "Scorer", "Side", "batches"]

# A batch holds at most so many ids for each window that it may have, padding counted; one long window may be more.
_IDS_PER_WINDOW = 512
_SORTED_BATCHES = 8
# Of what is made of logits at a time, for each thread.
_BLOCK_BYTES = 1 << 19


class Columns:
    """Some outputs of a head.

    Args:
        ids: their ids, in any order.
    """

    def __init__(self, ids: Iterable[int]) -> None:
        kept = sorted(ids)
        self.count = len(kept)
        first = kept[0] if kept else 0
        self._slice = slice(first, first + len(kept)) if kept == list(range(first, first + len(kept))) else None
        self.ids = torch.tensor(kept, dtype=torch.int64)

    def of(self, logits: Tensor) -> Tensor:
        """`(n, count)`; not to be changed."""
        if self._slice is not None:
            return logits[:, self._slice]
        self.ids = self.ids.to(logits.device)
        return logits.index_select(1, self.ids)


@dataclass
class Side:
    """One of the two models that are compared.

    Attributes:
        model: its halves.
        more: its outputs beside those that both have.
        prefix: the id that a context begins with.
    """

    model: HeadStates
    more: Columns
    prefix: int | None


class _Place(NamedTuple):
    """Where one token of a text is predicted, or one of each reading, with the state or the two states there."""

    text: AlignedText
    before: int | None
    after: int | None
    states: tuple[Tensor, ...]


class Scorer:
    """Measures windows, and writes what it finds to their texts.

    Each state goes through the head once. Where one model is both, the two readings share the states up to the first
    token that differs. Behind a new token, states of one place in both readings wait for each other, for the
    divergence between them; since a text's windows come in the order of its characters, few of them wait.

    Args:
        before, after: the sides; `before.model is after.model` where one model is both.
        old: the outputs that both have.
        new_ids: ids of the new tokens.
    """

    def __init__(self, before: Side, after: Side, old: Columns, new_ids: Iterable[int]) -> None:
        self.before, self.after, self.old = before, after, old
        self.new = Columns(new_ids)
        self._one = before.model is after.model
        self._waiting: dict[tuple[int, int], Tensor] = {}
        self._ready: list[_Place] = []

    @property
    def is_full(self) -> bool:
        """Whether there are as many states as go through the head at once."""
        return sum(len(place.states) for place in self._ready) >= self._at_once

    @property
    def _at_once(self) -> int:
        return min(self.before.model.positions_at_once, self.after.model.positions_at_once)

    @torch.no_grad()
    def run(self, windows: Sequence[Window]) -> None:
        """Run the models over windows, up to their heads."""
        if self._one:
            groups = [(self.after, list(windows))]
        else:
            groups = [
                (self.before, [window for window in windows if window.side == "before"]),
                (self.after, [window for window in windows if window.side != "before"]),
            ]
        for side, own in groups:
            if own:
                states = side.model.states([window.ids for window in own])
                for window, hidden in zip(own, states, strict=True):
                    self._sort(window, hidden)

    def _sort(self, window: Window, hidden: Tensor) -> None:
        """Note the states of a window: those that are all that there is at their place, and halves of pairs."""
        text, is_after = window.aligned, window.side == "after"
        partners = text.partners if is_after else text.partners_before
        shared = text.shared if self._one else 0
        for token in window.tokens:
            state = hidden[token - window.shift]
            if token < shared:
                if not is_after:
                    self._ready.append(_Place(text, token, token, (state,)))
                continue
            partner = partners.get(token)
            before, after = (partner, token) if is_after else (token, partner)
            if partner is None:
                self._ready.append(_Place(text, before, after, (state,)))
                continue
            key = (text.number, token if is_after else partner)
            other = self._waiting.pop(key, None)
            if other is None:
                self._waiting[key] = state
            else:
                self._ready.append(_Place(text, before, after, (other, state) if is_after else (state, other)))

    @torch.no_grad()
    def score(self) -> None:
        """Put all states through the head that do not wait for their other half."""
        for part in _parts(self._ready, self._at_once):
            self._score(part)
        self._ready.clear()

    def _score(self, part: Sequence[_Place]) -> None:
        """Score places whose logits fit into memory."""
        pairs = [place for place in part if len(place.states) == 2]
        both = [place for place in part if len(place.states) == 1 and None not in (place.before, place.after)]
        befores = [*(place for place in part if place.after is None), *pairs, *both]
        afters = [*both, *pairs, *(place for place in part if place.before is None)]
        first = [place.states[0] for place in befores]
        second = [place.states[-1] for place in afters[len(both) :]]
        apart = len(befores) - len(both)
        if self._one:  # what both have is in the middle: the last rows of before are the first ones of after
            logits = self.after.model.logits(torch.stack([*first, *second]))
            totals = self._totals(logits)
            before, after = (logits[: len(befores)], totals[: len(befores)]), (logits[apart:], totals[apart:])
        else:
            before, after = self._logits(self.before, first), self._logits(self.after, second)
        self._write_before(*before, [(place.text, place.before) for place in befores if place.before is not None])
        self._write_after(*after, [(place.text, place.after) for place in afters if place.after is not None])
        if pairs:
            ours, theirs = slice(apart - len(pairs), apart), slice(len(both), len(both) + len(pairs))
            values = [value[rows] for rows, side in ((ours, before), (theirs, after)) for value in side]
            for place, value in zip(pairs, self._divergences(*values), strict=True):
                assert place.after is not None
                place.text.kl[place.after] = max(value, 0.0)

    def _logits(self, side: Side, states: Sequence[Tensor]) -> tuple[Tensor, Tensor]:
        if not states:
            return torch.empty(0, self.old.count), torch.empty(0)
        logits = side.model.logits(torch.stack(list(states)))
        return logits, self._totals(logits)

    def _totals(self, logits: Tensor) -> Tensor:
        """`logsumexp` over the outputs that both have, `(n,)`."""
        return _in_blocks(lambda block: _logsumexp(self.old.of(block)), logits)

    def _divergences(self, before: Tensor, total: Tensor, after: Tensor, total_after: Tensor) -> list[float]:
        def divergence(before: Tensor, total: Tensor, after: Tensor, total_after: Tensor) -> Tensor:
            return _divergence(self.old.of(before), total, self.old.of(after), total_after)

        device = before.device
        found: list[float] = _in_blocks(divergence, before, total, after.to(device), total_after.to(device)).tolist()
        return found

    def _write_before(self, logits: Tensor, totals: Tensor, places: Sequence[tuple[AlignedText, int]]) -> None:
        """Write the surprise."""
        if not places:
            return
        ids = _targets(logits, places, "before")
        every = _with_more(self.before, logits, totals)
        _write_nats(every - logits.gather(1, ids[:, None])[:, 0], places, "before")

    def _write_after(self, logits: Tensor, totals: Tensor, places: Sequence[tuple[AlignedText, int]]) -> None:
        if not places:
            return
        ids = _targets(logits, places, "after")
        every = _with_more(self.after, logits, totals)
        own = logits.gather(1, ids[:, None])
        _write_nats(every - own[:, 0], places, "after")
        if not self.new.count:
            return

        def leak(logits: Tensor, every: Tensor, ids: Tensor) -> Tensor:
            mine = (self.new.of(logits) - every[:, None]).exp_()
            return mine.masked_fill_(ids[:, None] == self.new.ids.to(ids.device), 0.0).sum(1)

        for (text, token), value in zip(places, _in_blocks(leak, logits, every, ids).tolist(), strict=True):
            text.leak[token] = value
        rows = [row for row, (text, token) in enumerate(places) if token in text.firsts]
        if rows:
            picked = logits[rows]
            better = [(columns.of(picked) > own[rows]).sum(1) for columns in (self.old, self.after.more)]
            ranks = 1 + better[0] + better[1]
            firsts = [places[row][0].firsts[places[row][1]] for row in rows]
            first = torch.tensor([token_id or 0 for token_id in firsts], device=logits.device)
            nats = every[rows] - picked.gather(1, first[:, None])[:, 0]
            for row, rank, value, known in zip(rows, ranks.tolist(), nats.tolist(), firsts, strict=True):
                text, token = places[row]
                text.ranks[token] = rank
                if known is not None:
                    text.first_nats[token] = value


def _in_blocks(function: Callable[..., Tensor], logits: Tensor, *more: Tensor) -> Tensor:
    """`function` of all rows, so many at a time that what it makes of them stays in the cache of a CPU.

    No block has one row only, whose sum threads would share, with other last bits than those of rows among others.
    """
    count = 1
    if logits.device.type == "cpu":
        at_once = max(3, torch.get_num_threads() * _BLOCK_BYTES // (4 * logits.shape[1]))
        count = -(-len(logits) // at_once)
    blocks = [tensor.tensor_split(count) for tensor in (logits, *more)]
    return torch.cat([function(*block) for block in zip(*blocks, strict=True)])


def _logsumexp(logits: Tensor) -> Tensor:
    """`logits.logsumexp(1)`, bit for bit; the one of PyTorch takes a copy of a slice first."""
    top = logits.amax(1, keepdim=True)
    return (logits - top).exp_().sum(1).log_().add_(top[:, 0])


def _with_more(side: Side, logits: Tensor, totals: Tensor) -> Tensor:
    """The logarithms of the softmax's denominators, `(n,)`: `totals` has those of the outputs that both have."""
    if not side.more.count:
        return totals
    return totals.logaddexp(_in_blocks(lambda block: side.more.of(block).logsumexp(1), logits))


def _divergence(before: Tensor, total: Tensor, after: Tensor, total_after: Tensor) -> Tensor:
    """`KL(softmax(before) || softmax(after))`, `(n,)`; `total` is `before.logsumexp(1)`, `total_after` likewise."""
    probability = (before - total[:, None]).exp_()
    value = (before - after).mul_(probability).sum(1)
    if not value.isfinite().all():  # an output that cannot be (its logit is -inf) adds nothing
        value = (before - after).masked_fill_(probability == 0, 0.0).mul_(probability).sum(1)
    return value - (total - total_after)


def _targets(logits: Tensor, places: Sequence[tuple[AlignedText, int]], side: str) -> Tensor:
    ids = [text.readings[side].ids[token] for text, token in places]
    if max(ids) >= logits.shape[1]:
        raise PartialEmbeddingError(
            f"A text has the id {max(ids)}, for which the model has no output (it has {logits.shape[1]}): model and "
            "tokenizer do not belong together."
        )
    return torch.tensor(ids, device=logits.device)


def _write_nats(nats: Tensor, places: Sequence[tuple[AlignedText, int]], side: str) -> None:
    for (text, token), value in zip(places, nats.tolist(), strict=True):
        if not math.isfinite(value):
            where = text.readings[side].starts[token]
            raise PartialEmbeddingError(
                f"The model's log-probabilities are not finite: {-value} in text {text.number} at character {where}, "
                f"{'in the original tokenisation' if side == 'before' else 'with the new tokens'}. Look for NaN or "
                "infinite values in the rows (partial.token_rows()) and in the weights, or load the model in float32."
            )
        text.nats[side][token] = value


def _parts(places: Sequence[_Place], size: int) -> Iterator[list[_Place]]:
    """Parts with at most so many states, about the same number in each, and a place at least."""
    total = sum(len(place.states) for place in places)
    most = min(size, 1 + -(-total // max(1, -(-total // size))))
    part: list[_Place] = []
    count = 0
    for place in places:
        if part and count + len(place.states) > most:
            yield part
            part, count = [], 0
        part.append(place)
        count += len(place.states)
    if part:
        yield part


def _chunks(items: Sequence[Any], size: int) -> Iterator[Sequence[Any]]:
    for start in range(0, len(items), size):
        yield items[start : start + size]


def batches(windows: Sequence[Window], size: int) -> Iterator[list[Window]]:
    """Windows of a length, at most `size` at a time and not too many ids.

    The two readings of a text differ in length, so that neighbours would have much padding. They are sorted some
    batches at a time: of a text's two halves of a pair, one does not wait long for the other.
    """
    for part in _chunks(windows, _SORTED_BATCHES * size):
        yield from _in_order(sorted(part, key=lambda window: len(window.ids)), size)


def _in_order(windows: Sequence[Window], size: int) -> Iterator[list[Window]]:
    batch: list[Window] = []
    longest = 0
    for window in windows:
        longest = max(longest, len(window.ids))
        if batch and (len(batch) == size or longest * (len(batch) + 1) > size * _IDS_PER_WINDOW):
            yield batch
            batch, longest = [], len(window.ids)
        batch.append(window)
    if batch:
        yield batch
