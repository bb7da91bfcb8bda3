"""How much probability new tokens take where they do not belong."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

__all__ = ["leak"]


@torch.no_grad()
def leak(logits: Tensor, labels: Tensor, new_ids: Sequence[int], *, ignore_index: int = -100) -> float:
    """Mean probability on new tokens at the positions where another token follows.

    A position whose label is a new token counts with the probability of the others of them.

    Args:
        logits (`torch.Tensor` of shape `(..., V)`): predictions, each of the label at the same place.
        labels (`torch.LongTensor` of shape `(...)`): what follows; shift them before, as a causal model's loss
            does.
        new_ids: ids of the new tokens.
        ignore_index: label of positions that do not count.

    Returns:
        `float`: between 0 and 1; 0 where no position counts.
    """
    counted = labels != ignore_index
    logits, labels = logits[counted].float(), labels[counted]
    if not len(labels):
        return 0.0
    ids = torch.tensor(list(new_ids), device=logits.device)
    new = (logits[:, ids] - logits.logsumexp(-1, keepdim=True)).exp()
    return new.masked_fill(labels[:, None] == ids, 0.0).sum(-1).mean().item()
