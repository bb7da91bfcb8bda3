"""A learning rate for new rows that goes with the size of the old ones."""

from __future__ import annotations

from .errors import PartialEmbeddingError
from .old_rows import old_input_rows
from .partial import PartialEmbedding
from .table_statistics import root_mean_square

__all__ = ["auto_learning_rate"]

# Of the old rows' root mean square, for one step of an Adam-like optimizer at the top of the schedule.
_SHARE = 0.07


def auto_learning_rate(partial: PartialEmbedding) -> float:
    """A learning rate for Adam and its like: 0.07 times the root mean square of the old input rows.

    Such an optimizer moves every number by about its learning rate in a step, so the rate has the unit of
    the rows, and what is right for a table of one size is not for another. Rows that do not belong to a
    token (spare ones, padding) do not count, nor do the trained ones.

    Raises:
        `PartialEmbeddingError`: the old rows are not here, or all zero.
    """
    old = old_input_rows(partial)
    rate = 0.0 if old is None else _SHARE * root_mean_square(*old)
    if not rate > 0:
        raise PartialEmbeddingError(
            f"learning_rate='auto' goes with the size of the old rows, and {type(partial.model).__name__} has none "
            "here (other processes hold them, or they are zero). Give a number."
        )
    return rate
