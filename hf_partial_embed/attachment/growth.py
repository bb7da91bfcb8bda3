"""Grow the tables of a model in place, and undo it."""

from __future__ import annotations

import ctypes
import sys
from typing import Any

import torch
from torch import Tensor

from ..errors import PartialEmbeddingError
from ..layout.tables import Table, VocabularyLayout, find_layout
from ..modules.rows import note_size

__all__ = ["Growth", "add_spare_rows", "mean_rows"]


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
        _wish_huge_pages(grown)
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


def _wish_huge_pages(tensor: Tensor) -> None:
    """Ask Linux to map a new tensor's memory in huge pages.

    Mapping it in pages of 4 KiB takes longer than copying a table into it. It is a wish: where it is not granted, the
    memory is mapped as always.
    """
    if sys.platform != "linux" or tensor.device.type != "cpu":
        return
    first = -(-tensor.data_ptr() // _HUGE_PAGE) * _HUGE_PAGE
    size = (tensor.data_ptr() + tensor.nbytes - first) // _HUGE_PAGE * _HUGE_PAGE
    madvise = getattr(ctypes.CDLL(None), "madvise", None)
    if size > 0 and madvise is not None:
        madvise(ctypes.c_void_p(first), ctypes.c_size_t(size), _MADV_HUGEPAGE)


_HUGE_PAGE = 1 << 21
_MADV_HUGEPAGE = 14


def mean_rows(table: Table, count: int) -> Tensor:
    """Values for rows that no token has yet, `[count, ...]`: the mean of the old rows.

    Zeros would give logits of zero, which are high where logits are mostly negative.
    """
    old = table.tensor.detach().narrow(table.dim, 0, table.size)
    mean: Tensor = old.mean(table.dim, dtype=torch.promote_types(old.dtype, torch.float32))
    return mean.expand(count, *mean.shape)


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
