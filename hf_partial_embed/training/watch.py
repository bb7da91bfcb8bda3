"""Warnings about rows that diverge in training."""

from __future__ import annotations

import logging
from collections.abc import Iterable

from ..attachment.partial import PartialEmbedding
from ..errors import shorten
from ..evaluation.old_rows import old_input_rows
from ..initializers.table_statistics import norm_range

__all__ = ["RowWatch"]

logger = logging.getLogger(__name__)

_MOST_LEAK = 0.01


class RowWatch:
    """Warns once when new tokens get more than 1% of the probability where they are not the label, and once when
    the norm of a row leaves the range of the old rows' norms.

    A row that starts outside of the range (a mean of many pieces has a small norm) is warned of only if it grows
    beyond both the range and its start.

    Args:
        partials: the rows to watch, all on one model.
    """

    def __init__(self, partials: Iterable[PartialEmbedding]) -> None:
        self.partials = list(partials)
        self._warned: set[str] = set()
        olds = [old_input_rows(partial) for partial in self.partials]
        self._ranges = [(0.0, float("inf")) if old is None else norm_range(*old) for old in olds]
        self._starts = [_norms(partial) for partial in self.partials]

    def check_norms(self) -> None:
        """Compare the norms of the input rows with those of the old rows; call it on every process."""
        for partial, (least, most), starts in zip(self.partials, self._ranges, self._starts, strict=True):
            norms = _norms(partial)
            names = partial.tokens or partial.token_ids
            outside = [
                name
                for name, norm, start in zip(names, norms, starts, strict=True)
                if norm > max(most, start) or norm < least <= start
            ]
            if outside:
                self._warn(
                    "norm",
                    f"The rows of {shorten(outside)} have norms outside of the old rows' range, {least:.3g} to "
                    f"{most:.3g} (theirs are {min(norms):.3g} to {max(norms):.3g}). Lower the rows' learning rate "
                    "(learning_rate='auto' goes with the old rows' size), or train fewer steps.",
                )

    def check_leak(self, share: float) -> None:
        """Warn if the share of the probability that `leak` has measured is too large."""
        if share > _MOST_LEAK:
            self._warn(
                "leak",
                f"New tokens take {share:.1%} of the probability where they do not belong. In the first steps that is "
                "about their share of the labels, and it passes as they learn where they belong. If it stays, train "
                "more steps, or give PartialEmbeddingCallback(elsewhere=...) some dozens of texts without them.",
            )

    def _warn(self, kind: str, message: str) -> None:
        if kind not in self._warned:
            self._warned.add(kind)
            logger.warning("%s", message)


def _norms(partial: PartialEmbedding) -> list[float]:
    """Norms of the input rows; on a sharded table every process takes part."""
    norms: list[float] = partial.token_rows().input_rows.float().norm(dim=1).tolist()
    return norms
