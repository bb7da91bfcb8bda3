"""Statistics of the rows of a table that belong to tokens; spare rows and padding are left out."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

__all__ = ["mean_and_covariance", "norm_range", "root_mean_square", "trained_mask"]

_PART = 8192  # rows at a time, so that the table is not copied whole in float64


def trained_mask(size: int, tokenizer: Any, padding: int | None) -> Tensor:
    """Bool `[V]`: rows that belong to a token. Spare rows, rows in gaps between ids and the padding row are not
    among them.
    """
    trained = torch.zeros(size, dtype=torch.bool)
    trained[[token_id for token_id in tokenizer.get_vocab().values() if token_id < size]] = True
    if padding is not None and 0 <= padding < size:
        trained[padding] = False
    return trained


def _parts(table: Tensor, mask: Tensor) -> Iterator[Tensor]:
    mask = mask.to(table.device)
    for start in range(0, len(table), _PART):
        part = slice(start, start + _PART)
        rows = table[part][mask[part]]
        if len(rows):
            yield rows.double()


def mean_and_covariance(table: Tensor, mask: Tensor, *, covariance: bool = True) -> tuple[Tensor, Tensor | None]:
    """Mean `[...]` and, if asked for, covariance `[d, d]` of the rows in the mask, in float64."""
    count = max(int(mask.sum()), 1)
    mean = torch.zeros(table.shape[1:], dtype=torch.float64, device=table.device)
    for rows in _parts(table, mask):
        mean += rows.sum(0)
    mean /= count
    if not covariance:
        return mean, None
    width = mean.numel()
    total = torch.zeros(width, width, dtype=torch.float64, device=table.device)
    for rows in _parts(table, mask):
        centred = (rows - mean).reshape(len(rows), width)
        total += centred.T @ centred
    return mean, total / max(count - 1, 1)


def root_mean_square(table: Tensor, mask: Tensor) -> float:
    """Root of the mean square of all numbers in the rows of the mask; 0 where it is empty."""
    total = sum(float(rows.square().sum()) for rows in _parts(table, mask))
    numbers = int(mask.sum()) * max(table[:1].numel(), 1)
    return float((total / max(numbers, 1)) ** 0.5)


def norm_range(table: Tensor, mask: Tensor) -> tuple[float, float]:
    """The smallest and the largest norm of the rows in the mask; `(0, inf)` where it is empty."""
    norms = [rows.reshape(len(rows), -1).norm(dim=1) for rows in _parts(table, mask)]
    if not norms:
        return 0.0, float("inf")
    every = torch.cat(norms)
    return every.min().item(), every.max().item()
