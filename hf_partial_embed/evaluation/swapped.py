"""Rows that stand under each other's ids: a fault that texts show late, and the rows themselves at once."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

import torch
import torch.nn.functional as F

__all__ = ["swapped_rows"]

_MARGIN = 0.1
_DEVIATIONS = 4
_SAMPLE = 4096
_ROWS_AT_ONCE = 1024


@torch.no_grad()
def swapped_rows(model: Any, pieces: Mapping[int, Sequence[int]]) -> dict[int, int]:
    """Pairs of new tokens each of whose input rows is more like the other's pieces than like its own.

    A row that started at the mean of its pieces, or was distilled from them, stays nearer to this mean than to that
    of other tokens. Compared are cosines, after the mean of the old rows is taken off; both rows of a pair must be
    nearest to the other's pieces of all, by 0.1 and more, and nearer than chance: in `d` dimensions the cosine of
    random directions has a standard deviation of 1 / √d, of which it must be four. So rows that never had to do
    with their pieces (a donor's, a description's) give no alarm, nor does any row of a toy model.

    Args:
        model: the model with the rows.
        pieces: by the id of each new token, what its text was read as before.

    Returns:
        The id of the other token for each of a pair.
    """
    embed = model.get_input_embeddings()
    ids = [token_id for token_id, own in pieces.items() if own]
    if len(ids) < 2:
        return {}
    device = next(embed.parameters()).device

    def rows(wanted: Sequence[int]) -> torch.Tensor:
        found: torch.Tensor = embed(torch.tensor([list(wanted)], device=device))[0].float()
        return found

    table = getattr(embed, "num_embeddings", max(ids) + 1)
    new = set(pieces)
    old = [token_id for token_id in range(0, table, max(1, table // _SAMPLE)) if token_id not in new]
    center = rows(old or ids).mean(0)
    means = F.normalize(torch.stack([rows(pieces[token_id]).mean(0) for token_id in ids]) - center, dim=1)
    own_rows = F.normalize(rows(ids) - center, dim=1)
    own = (own_rows * means).sum(1)
    best = [(own_rows[i : i + _ROWS_AT_ONCE] @ means.T).max(1) for i in range(0, len(ids), _ROWS_AT_ONCE)]
    nearest = torch.cat([found.indices for found in best]).tolist()
    values = torch.cat([found.values for found in best])
    further = (values > own + _MARGIN) & (values > _DEVIATIONS / math.sqrt(means.shape[1]))
    return {
        ids[one]: ids[other]
        for one, other in enumerate(nearest)
        if other != one and nearest[other] == one and further[one] and further[other]
    }
