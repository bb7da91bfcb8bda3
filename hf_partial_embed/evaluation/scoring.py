"""Log-probabilities of texts under a model before and after, and how far its predictions have moved."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from ..errors import PartialEmbeddingError
from .alignment import AlignedText, Window
from .states import HeadStates

__all__ = ["Columns", "Scorer", "Side", "batches"]

# A batch holds at most so many ids for each window that it may have, padding counted; one long window may be more.
_IDS_PER_WINDOW = 512
_SORTED_BATCHES = 8


class Columns:
    """Some outputs of a head.

    Args:
        size: number of all outputs.
        without: ids that are left out.
    """

    def __init__(self, size: int, without: Sequence[int] = ()) -> None:
        kept = sorted(set(range(size)) - set(without))
        self.count = len(kept)
        self.ids = None if kept == list(range(len(kept))) else torch.tensor(kept)

    def of(self, logits: Tensor) -> Tensor:
        """`(n, count)`; a copy, so that sums over it are those over a head that has only these, bit for bit."""
        if self.ids is None:
            return logits if self.count == logits.shape[1] else logits[:, : self.count].contiguous()
        self.ids = self.ids.to(logits.device)
        return logits.index_select(1, self.ids)


@dataclass
class Side:
    """One of the two models that are compared: its halves, its outputs, the id that a context begins with."""

    model: HeadStates
    outputs: Columns
    prefix: int | None


class Scorer:
    """Measures windows, and writes what it finds to their texts.

    Each state goes through the head once. States of one place in both readings wait for each other, for the
    divergence between them; since a text's windows come in the order of its characters, few of them wait.

    Args:
        before, after: the sides; `before.model is after.model` where one model is both.
        old: the outputs that both have.
        new_ids: ids of the new tokens.
    """

    def __init__(self, before: Side, after: Side, old: Columns, new_ids: Sequence[int]) -> None:
        self.before, self.after, self.old = before, after, old
        self.new = torch.tensor(sorted(new_ids), dtype=torch.int64)
        self._waiting: dict[tuple[int, int], Tensor] = {}
        self._single: dict[str, list[tuple[AlignedText, int, Tensor]]] = {"before": [], "after": [], "both": []}
        self._pairs: list[tuple[AlignedText, int, int, Tensor, Tensor]] = []

    @property
    def is_full(self) -> bool:
        """Whether there are as many states as go through the head at once."""
        ready = 2 * len(self._pairs) + sum(map(len, self._single.values()))
        return ready >= min(self.before.model.positions_at_once, self.after.model.positions_at_once)

    @torch.no_grad()
    def run(self, windows: Sequence[Window]) -> None:
        """Run the models over windows, up to their heads."""
        if self.before.model is self.after.model:
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
        """Note the states of a window as single ones or as halves of pairs."""
        text, side = window.aligned, window.side
        partners = text.partners if side == "after" else text.partners_before if side == "before" else {}
        for token in window.tokens:
            state = hidden[token - window.shift]
            partner = partners.get(token)
            if partner is None:
                self._single[side].append((text, token, state))
                continue
            key = (text.number, token if side == "after" else partner)
            other = self._waiting.pop(key, None)
            if other is None:
                self._waiting[key] = state
            elif side == "after":
                self._pairs.append((text, partner, token, other, state))
            else:
                self._pairs.append((text, token, partner, state, other))

    @torch.no_grad()
    def score(self) -> None:
        """Put all states through the head that do not wait for their other half."""
        for name, items in self._single.items():
            self._score_single(name, items)
            items.clear()
        self._score_pairs(self._pairs)
        self._pairs.clear()

    def _score_single(self, name: str, items: Sequence[tuple[AlignedText, int, Tensor]]) -> None:
        model = self.before.model if name == "before" else self.after.model
        for part in _chunks(items, model.positions_at_once):
            logits = model.logits(torch.stack([state for _, _, state in part]))
            places = [(text, token) for text, token, _ in part]
            if name != "after":
                self._write_before(logits, places)
            if name != "before":
                self._write_after(logits, places)

    def _score_pairs(self, pairs: Sequence[tuple[AlignedText, int, int, Tensor, Tensor]]) -> None:
        one = self.before.model is self.after.model
        at_once = max(1, self.after.model.positions_at_once // 2)
        for part in _chunks(pairs, at_once):
            befores, afters = torch.stack([pair[3] for pair in part]), torch.stack([pair[4] for pair in part])
            if one:
                logits_before, logits_after = self.after.model.logits(torch.cat([befores, afters])).chunk(2)
            else:
                logits_before, logits_after = self.before.model.logits(befores), self.after.model.logits(afters)
            total = self._write_before(logits_before, [(text, token) for text, token, _, _, _ in part])
            self._write_after(logits_after, [(text, token) for text, _, token, _, _ in part])
            old = self.old.of(logits_before)
            if self.old.count != self.before.outputs.count:  # the base model has outputs that are new tokens' now
                total = old.logsumexp(1)
            divergences = _divergence(old, total, self.old.of(logits_after).to(old.device))
            for (text, _, token, _, _), value in zip(part, divergences.tolist(), strict=True):
                text.kl[token] = max(value, 0.0)

    def _write_before(self, logits: Tensor, places: Sequence[tuple[AlignedText, int]]) -> Tensor:
        """Write the surprise; returns the logarithms of the softmax's denominators."""
        ids = _targets(logits, places, "before")
        total = self.before.outputs.of(logits).logsumexp(1)
        _write_nats(total - logits.gather(1, ids[:, None])[:, 0], places, "before")
        return total

    def _write_after(self, logits: Tensor, places: Sequence[tuple[AlignedText, int]]) -> None:
        ids = _targets(logits, places, "after")
        every = self.after.outputs.of(logits).logsumexp(1)
        own = logits.gather(1, ids[:, None])
        _write_nats(every - own[:, 0], places, "after")
        if not len(self.new):
            return
        self.new = self.new.to(logits.device)
        mine = logits.index_select(1, self.new)
        leak = (mine - every[:, None]).exp_().masked_fill_(ids[:, None] == self.new, 0.0).sum(1)
        for (text, token), value in zip(places, leak.tolist(), strict=True):
            text.leak[token] = value
        rows = [row for row, (text, token) in enumerate(places) if token in text.firsts]
        if rows:
            picked = logits[rows]
            ranks = (self.after.outputs.of(picked) > own[rows]).sum(1) + 1
            firsts = [places[row][0].firsts[places[row][1]] for row in rows]
            first = torch.tensor([token_id or 0 for token_id in firsts], device=logits.device)
            nats = every[rows] - picked.gather(1, first[:, None])[:, 0]
            for row, rank, value, known in zip(rows, ranks.tolist(), nats.tolist(), firsts, strict=True):
                text, token = places[row]
                text.ranks[token] = rank
                if known is not None:
                    text.first_nats[token] = value


def _divergence(before: Tensor, total: Tensor, after: Tensor) -> Tensor:
    """`KL(softmax(before) || softmax(after))`, `(n,)`, with `total = before.logsumexp(1)`."""
    shift = total - after.logsumexp(1)
    probability = (before - total[:, None]).exp_()
    # An output that cannot be (its logit is -inf) adds nothing.
    difference = (before - after).masked_fill_(probability == 0, 0.0)
    return (probability * difference).sum(1) - shift


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
