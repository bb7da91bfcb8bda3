"""The rows that a set of new ones is compared with."""

from __future__ import annotations

import torch
from torch import Tensor

from ..attachment.partial import PartialEmbedding
from ..initializers.table_statistics import trained_mask

__all__ = ["old_input_rows"]


@torch.no_grad()
def old_input_rows(partial: PartialEmbedding) -> tuple[Tensor, Tensor] | None:
    """The table of the input embeddings, and a bool mask `[V]` of its old rows that belong to tokens.

    Spare rows and padding are not in the mask, nor the rows that train. On a sharded table every process
    takes part. `None` where this process does not hold the table.
    """
    input_table = next(iter(partial.trained_tables().values()))
    table = input_table.values().movedim(input_table.dim, 0)
    ids = partial.token_ids
    if len(table) <= max(ids):
        return None
    if partial.tokenizer is None:
        mask = torch.ones(len(table), dtype=torch.bool)
    else:
        mask = trained_mask(len(table), partial.tokenizer, partial.tokenizer.pad_token_id)
    mask[ids] = False
    return table, mask
