"""What keeps new rows among the old ones."""

from __future__ import annotations

import torch
from torch import Tensor

from ..table_statistics import norm_range
from .registry import InitRequest

__all__ = ["keep_norms"]


def keep_norms(rows: Tensor, request: InitRequest) -> Tensor:
    """Shorten rows of a tied table that are longer than its longest trained row.

    A row of a tied table is an output row, too: its norm is how loudly the token is proposed everywhere,
    and one that is louder than any old token's takes probability where the token does not belong.
    """
    if not request.shared:
        return rows
    _, longest = norm_range(request.table, request.trained_rows)
    norms = rows.norm(dim=1, keepdim=True).clamp(min=torch.finfo(rows.dtype).tiny)
    shorter: Tensor = rows * (longest / norms).clamp(max=1)
    return shorter
