"""Nearest old tokens of new rows: what a row has come to mean."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from ..errors import PartialEmbeddingError, count

__all__ = ["name_tokens", "nearest_rows"]

_ROWS_AT_ONCE = 16384


@torch.no_grad()
def nearest_rows(rows: Tensor, table: Tensor, num: int, *, exclude: Sequence[int] = ()) -> tuple[Tensor, Tensor]:
    """The rows of a table with the largest cosine to each of some other rows.

    Args:
        rows (`torch.Tensor` of shape `(K, d)`): the rows.
        table (`torch.Tensor` of shape `(V, d)`): the table; read in parts, never copied whole.
        num (`int`): how many neighbours, at least 1.
        exclude: ids that are no neighbours, such as those of the rows themselves.

    Returns:
        Cosines, float32 `(K, num)`, the largest first, and ids, int64 `(K, num)`. Rows of zeros in the
        table have cosine 0.

    Raises:
        `PartialEmbeddingError`: rows of another width, or fewer neighbours than were asked for.
    """
    if rows.shape[1] != table.shape[1]:
        raise PartialEmbeddingError(
            f"The rows are {rows.shape[1]} wide and the table {table.shape[1]}: they are of different models. Give "
            "the base model that the rows were trained on."
        )
    excluded = set(exclude)
    there = len(table) - sum(0 <= token_id < len(table) for token_id in excluded)
    if not 1 <= num <= there:
        raise PartialEmbeddingError(f"{num} neighbours were asked for; there are {count(range(there), 'row')}.")
    directions = F.normalize(rows.detach().float(), dim=1).to(table.device)
    cosines = torch.empty(len(rows), 0, device=table.device)
    ids = torch.empty(len(rows), 0, dtype=torch.int64, device=table.device)
    for start in range(0, len(table), _ROWS_AT_ONCE):
        part = table[start : start + _ROWS_AT_ONCE].detach().float()
        values = directions @ F.normalize(part, dim=1).T
        inside = [token_id - start for token_id in excluded if start <= token_id < start + len(part)]
        values[:, inside] = -torch.inf
        best = values.topk(min(num, len(part)), dim=1)
        cosines = torch.cat([cosines, best.values], 1)
        ids = torch.cat([ids, best.indices + start], 1)
        kept = cosines.topk(min(num, cosines.shape[1]), dim=1)
        cosines, ids = kept.values, ids.gather(1, kept.indices)
    return cosines.cpu(), ids.cpu()


def name_tokens(tokenizer: Any, ids: Sequence[int]) -> list[str]:
    """What a person reads where each id stands: its decoded text, or its spelling where that is empty."""
    return [
        tokenizer.decode([token_id]) or str(tokenizer.convert_ids_to_tokens(token_id) or f"id {token_id}")
        for token_id in ids
    ]
