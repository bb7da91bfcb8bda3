"""A learning rate for new rows that goes with the size of the old ones."""

from __future__ import annotations

import torch

from .partial import PartialEmbedding
from .table_statistics import root_mean_square, trained_mask

__all__ = ["auto_learning_rate"]

# Of the old rows' root mean square, for one step of an Adam-like optimizer at the top of the schedule.
_SHARE = 0.07


def auto_learning_rate(partial: PartialEmbedding) -> float:
    """A learning rate for Adam and its like: 0.07 times the root mean square of the old input rows.

    Such an optimizer moves every number by about its learning rate in a step, so the rate has the unit of
    the rows, and what is right for a table of one size is not for another. Rows that do not belong to a
    token (spare ones, padding) do not count, nor do the trained ones.
    """
    table = next(table for _, table in partial.rows_and_tables()).detach()
    if partial.tokenizer is None:
        mask = torch.ones(len(table), dtype=torch.bool)
    else:
        mask = trained_mask(len(table), partial.tokenizer, partial.tokenizer.pad_token_id)
    mask[partial.token_ids] = False
    return _SHARE * root_mean_square(table, mask)
