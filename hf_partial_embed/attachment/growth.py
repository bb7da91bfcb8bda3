"""Grow the tables of a model in place, and undo it."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from ..errors import PartialEmbeddingError, count, shorten
from ..layout.tables import Table, VocabularyLayout, find_layout
from ..modules.rows import note_size
from ..tokens.vocabulary import texts_by_id

__all__ = ["Growth", "add_spare_rows", "mean_rows", "warn_of_mean_rows"]

logger = logging.getLogger(__name__)


class Growth:
    """Grow tables in place. A step of an attachment, see `steps`.

    A parameter stays the same object, so whatever is tied to it grows with it. Old rows keep every bit, new rows are
    zero, and a tail (`Table.tail`) is at the end again. Each table is copied once.

    Args:
        layout: which tables grow, and to what size.
    """

    lasts = True

    def __init__(self, layout: VocabularyLayout) -> None:
        self._layout = layout
        self._tables: list[tuple[Table, Tensor | None, Tensor]] = []
        self._counts: list[tuple[Any, str, int]] = []

    def do(self) -> None:
        """Grow the tables of the layout, and set the integers that count their rows."""
        growing = [table for table in self._layout.tables if table.grown_size > table.size]
        for table in growing:
            tail = table.tensor.detach().narrow(table.dim, table.size - table.tail, table.tail).clone()
            self._tables.append((table, table.tensor.grad, tail))
            self._resize(table, tail)
        for owner, attribute, value in self._layout.counts if growing else []:
            self._counts.append((owner, attribute, getattr(owner, attribute)))
            setattr(owner, attribute, value)

    @staticmethod
    def _resize(table: Table, tail: Tensor) -> None:
        tensor, dim, old, new = table.tensor, table.dim, table.size, table.grown_size
        shape = list(tensor.shape)
        shape[dim] = new
        grown = torch.empty(shape, dtype=tensor.dtype, device=tensor.device)
        grown.narrow(dim, 0, old).copy_(tensor.detach())
        grown.narrow(dim, old, new - old).zero_()
        # The tail also stays in its old place: some of its rows may belong to tokens, which keep their ids.
        grown.narrow(dim, new - table.tail, table.tail).copy_(tail)
        tensor.grad = None
        tensor.data = grown
        for module, attribute in table.holders:
            note_size(module, attribute)

    def undo(self) -> None:
        """Restore the size and bits of the tables, and the counts, as far as `do` came."""
        for owner, attribute, value in reversed(self._counts):
            setattr(owner, attribute, value)
        for table, gradient, tail in reversed(self._tables):
            tensor, dim = table.tensor, table.dim
            if tensor.shape[dim] != table.size:
                old = tensor.detach().narrow(dim, 0, table.size).clone()
                old.narrow(dim, table.size - table.tail, table.tail).copy_(tail)
                tensor.grad = None
                tensor.data = old
            for module, attribute in table.holders:
                note_size(module, attribute)
            tensor.grad = gradient
        self._counts, self._tables = [], []


def mean_rows(table: Table, count: int) -> Tensor:
    """Values for rows that no token has yet, `[count, ...]`: the mean of the old rows.

    Zeros would give logits of zero, which are high where logits are mostly negative.
    """
    old = table.tensor.detach().narrow(table.dim, 0, table.size)
    mean: Tensor = old.mean(table.dim, dtype=torch.promote_types(old.dtype, torch.float32))
    return mean.expand(count, *mean.shape)


def warn_of_mean_rows(layout: VocabularyLayout, tokenizer: Any, ids: Sequence[int]) -> None:
    """Tell of tokens that had no row, since the tokenizer was extended first, and are not in the set that has come.

    Args:
        layout: as it was before the tables grew.
        tokenizer: with all of its tokens.
        ids: those of the set.
    """
    table = layout.tables[0]
    between = set(range(table.size, table.grown_size - table.tail)).difference(ids)
    texts = texts_by_id(tokenizer, table.grown_size) if between else {}
    left = [texts[token_id] for token_id in sorted(between.intersection(texts))]
    if left:
        logger.warning(
            "The tokenizer has %s for which the model's table of %d rows had none, and which are not among those that "
            "were asked for: %s. Their rows start at the mean of all rows and do not train. "
            'train_tokens(model, tokenizer, tokens, init="subtoken_mean") with these tokens lets them start at the '
            "mean of their pieces, and train.",
            count(left, "token"), table.size, shorten(left),
        )  # fmt: skip


def add_spare_rows(model: Any, size: int) -> int:
    """Grow a model's vocabulary by rows that no token has yet, each the mean of the old rows.

    Tokens that are added later take these rows, and no shape changes any more. The old rows keep every bit.

    Args:
        model: a `transformers` model without rows attached.
        size: rows that its tables are to have.

    Returns:
        `int`: how many rows were added.

    Raises:
        `PartialEmbeddingError`: the tables have as many rows already; the model cannot grow. Nothing has changed.
    """
    layout = find_layout(model, size)
    new = [table for table in layout.tables if table.grown_size > table.size]
    if not new:
        raise PartialEmbeddingError(
            f"The tables of {type(model).__name__} have {layout.tables[0].size} rows already, so a size of {size} "
            "adds none. Ask for more."
        )
    step = Growth(layout)
    try:
        step.do()
        for table in new:
            if table.has_rows:
                ids = list(range(table.size, table.grown_size - table.tail))
                table.write(ids, mean_rows(table, len(ids)))
    except BaseException:
        step.undo()
        raise
    return new[0].grown_size - new[0].size
