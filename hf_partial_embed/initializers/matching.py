"""Rows of a few tokens, fitted so that the early hidden states are those of the original tokenisation."""

from __future__ import annotations

import logging
import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor, nn

from .running import LARGEST_ERROR, Before, Runner
from .snippets import Snippet

__all__ = ["Lesson", "can_reuse", "fit", "trimmed"]

logger = logging.getLogger(__name__)

# Lengths of what comes before a token, apart from the longest: those that are equally long run in one batch.
_LENGTHS = (1, 2, 3, 4, 6, 8, 12, 16, 24, 32, 48, 64)
_EVERY = 4  # of the positions before a token one is an example of where it does not come
_BETAS = (0.9, 0.99)


def trimmed(snippet: Snippet, following: int) -> Snippet:
    """A snippet with at most so many ids behind the token, and before it as many as some other snippets have."""
    keep = max((length for length in _LENGTHS if length <= snippet.start), default=snippet.start)
    drop = snippet.start - keep
    cut = max(0, snippet.following - following)
    return replace(
        snippet,
        original=snippet.original[drop : len(snippet.original) - cut],
        shortened=snippet.shortened[drop : len(snippet.shortened) - cut],
        start=keep,
        end=snippet.end - drop,
        following=snippet.following - cut,
    )


@dataclass(frozen=True)
class _Part:
    """Snippets of different tokens, with what does not change while their rows are fitted.

    Attributes:
        snippets: one of each token.
        rows: the index of each snippet's token in the group.
        cache: keys and values of what comes before the tokens; `None` where it is run each time.
        targets (`torch.Tensor` of shape `(B, P, d)`): states of the original tokenisation, from the token's last
            piece on, padded with zeros.
        weights (`torch.Tensor` of shape `(B, P)`): of each position in the loss, 0 for padding.
    """

    snippets: Sequence[Snippet]
    rows: Sequence[int]
    cache: Before | None
    targets: Tensor
    weights: Tensor

    def loss(self, runner: Runner, layer: nn.Module, rows: Tensor) -> Tensor:
        """Sum over the snippets of the squared distance, in units of the mean square of their targets."""
        # Without a cache all begin with equally many ids.
        first = self.snippets[0].start if self.cache is None else 0
        skipped = [snippet.start - first for snippet in self.snippets]
        ids = [snippet.shortened[skip:] for snippet, skip in zip(self.snippets, skipped, strict=True)]
        places = [(first, row) for row in self.rows]
        states = runner.until(layer, ids, rows, places, self.cache and self.cache.branch())
        distances = (states[:, first:].float() - self.targets).square().sum(-1)
        weighted: Tensor = (self.weights * distances).sum()
        return weighted


class Lesson:
    """The original tokenisation of the snippets of some tokens, run once.

    Every turn has one snippet of each token: of a token with fewer snippets than others they come again. What comes
    before the tokens is run to the end of the model, for the head's input there, and its keys and values are kept;
    the tokens and what follows them are run to the layer.

    Args:
        runner: of the model.
        layer: whose output is to be matched.
        depth: how many layers of the model come up to it.
        snippets: of each token of the group, at least one.
        batch_size: snippets that are run at once.
        reuse: whether keys and values are kept, and used.
        together: whether snippets are run together that begin with different numbers of ids.
        head: whether the head's input is wanted.

    Attributes:
        turns: in each of them every token has one snippet.
        states (`torch.Tensor` of shape `(N, d)`): the head's input at the positions that a token follows, and at some
            before them.
        sums (`torch.Tensor` of shape `(N,)`): log-sum-exp of the old logits there.
        labels (`torch.Tensor` of shape `(N,)`): the index of the following token in the group, -1 where none follows.
    """

    @torch.no_grad()
    def __init__(
        self,
        runner: Runner,
        layer: nn.Module,
        depth: int,
        snippets: Sequence[Sequence[Snippet]],
        batch_size: int,
        reuse: bool,
        together: bool,
        head: bool,
    ) -> None:
        self.turns: list[list[_Part]] = []
        states, sums, labels = [], [], []
        for turn in range(max(map(len, snippets))):
            parts = []
            for batch, rows in _batches([own[turn % len(own)] for own in snippets], batch_size, together):
                ahead = [snippet.original[: snippet.start] for snippet in batch]
                cache = runner.new_cache() if reuse else None
                if head:
                    # Near the token others come, too, where it would be proposed most easily.
                    positions = [[-1, *range(-2, -1 - len(ids), -_EVERY)] for ids in ahead]
                    hidden, _, logits = runner.head(ahead, positions, cache)
                    states.append(hidden)
                    sums.append(logits.float().logsumexp(-1))
                    for row, own in zip(rows, positions, strict=True):
                        labels += [row, *[-1] * (len(own) - 1)]
                elif reuse:
                    runner.until(layer, ahead, cache=cache)
                parts.append(_part(runner, layer, batch, rows, cache and cache.branch(depth)))
            self.turns.append(parts)
        if head:
            self.states, self.sums = torch.cat(states), torch.cat(sums)
            self.labels = torch.tensor(labels, device=self.states.device)


def _batches(snippets: Sequence[Snippet], size: int, together: bool) -> Iterator[tuple[list[Snippet], list[int]]]:
    """Batches of snippets, and where their tokens are in the list; those that begin with equally many ids are apart
    from others unless they may come together.
    """
    by_start: dict[int, list[int]] = {}
    for row in sorted(range(len(snippets)), key=lambda row: (snippets[row].start, len(snippets[row].original))):
        by_start.setdefault(0 if together else snippets[row].start, []).append(row)
    for rows in by_start.values():
        for first in range(0, len(rows), size):
            batch = rows[first : first + size]
            yield [snippets[row] for row in batch], batch


def _part(runner: Runner, layer: nn.Module, batch: list[Snippet], rows: list[int], cache: Before | None) -> _Part:
    skipped = [0 if cache is None else snippet.start for snippet in batch]
    ids = [snippet.original[skip:] for snippet, skip in zip(batch, skipped, strict=True)]
    states = runner.until(layer, ids, cache=cache and cache.branch())
    longest = 1 + max(snippet.following for snippet in batch)
    targets = states.new_zeros(len(batch), longest, states.shape[-1], dtype=torch.float32)
    weights = targets.new_zeros(len(batch), longest)
    for number, snippet in enumerate(batch):
        count, last = 1 + snippet.following, snippet.end - skipped[number]
        targets[number, :count] = states[number, last : last + count]
        weights[number, :count] = 1 / targets[number, :count].square().sum().clamp(min=1e-30)
    return _Part(batch, rows, cache, targets, weights)


@torch.no_grad()
def can_reuse(runner: Runner, layer: nn.Module, snippets: Sequence[Snippet]) -> bool:
    """Whether texts in two parts, the second on the first one's keys and values, have the states that each has whole
    and alone; some may begin with more ids than others.
    """
    wholes = [runner.until(layer, [snippet.original])[0, snippet.start :].float() for snippet in snippets]
    try:
        cache = runner.new_cache()
        runner.until(layer, [snippet.original[: snippet.start] for snippet in snippets], cache=cache)
        parted = runner.until(layer, [snippet.original[snippet.start :] for snippet in snippets], cache=cache).float()
        error = max(
            float((made[: len(whole)] - whole).norm() / whole.norm())
            for made, whole in zip(parted, wholes, strict=True)
        )
        reason = f"the states differ by {error:.1g}"
        fits = error <= LARGEST_ERROR.get(next(layer.parameters()).dtype, 5e-2)
    except Exception as found:  # noqa: BLE001 whatever goes wrong, running all of it is there
        fits, reason = False, f"{type(found).__name__}: {found}"
    if not fits:
        starts = sorted({snippet.start for snippet in snippets})
        logger.info("Keys and values of what comes before new tokens, %s ids, cannot be kept: %s.", starts, reason)
    return fits


def fit(
    loss: Callable[[Tensor, int], Iterator[Tensor]],
    start: Tensor,
    turns: Sequence[int],
    rate: float,
) -> Tensor:
    """Rows after one step of Adam in each turn, on a cosine schedule.

    Args:
        loss: for rows and the number of a turn, the terms of the loss one after another, so that only one graph is
            there at a time. Each row has terms of its own.
        start (`torch.Tensor` of shape `(G, d)`): where the rows begin.
        turns: which turn each step takes.
        rate: learning rate of the first step.
    """
    rows = start.clone().requires_grad_(True)
    optimizer = torch.optim.Adam([rows], lr=rate, betas=_BETAS)
    for step, turn in enumerate(turns):
        optimizer.param_groups[0]["lr"] = rate * (1 + math.cos(math.pi * step / len(turns))) / 2
        rows.grad = torch.zeros_like(rows)
        with torch.enable_grad():
            for term in loss(rows, turn):
                rows.grad += torch.autograd.grad(term, [rows])[0]
        optimizer.step()
    return rows.detach()
