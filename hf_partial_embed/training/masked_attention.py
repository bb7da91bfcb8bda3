"""Attention with a mask, as it is after a prefix, at less than the cost of all pairs of positions."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.overrides import TorchFunctionMode

__all__ = ["MaskedAttention"]

# Queries that share a range of keys. With 128 a CPU takes longer, although fewer products are left.
_BLOCK = 256


class _Block(NamedTuple):
    """Queries, the keys that any of them sees, and the mask of these."""

    queries: slice
    keys: slice
    mask: Tensor


class MaskedAttention(TorchFunctionMode):
    """While it is entered, `scaled_dot_product_attention` under a boolean mask leaves out what no query sees.

    After a prefix attention needs an explicit mask, and with one it computes all pairs, those of a query and the keys
    after it, too. Here the queries come in blocks, each with the keys from the first to the last that one of its
    queries sees, whatever the mask's form. And a boolean mask is converted to a float one once for all layers, instead
    of in every layer, each of which would keep its own for the backward: for 1024 positions after 1024, 8 MiB.
    """

    def __init__(self) -> None:
        super().__init__()
        self._blocks: dict[tuple[Any, ...], tuple[Tensor, list[_Block]]] = {}

    def __torch_function__(self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        mask = kwargs.get("attn_mask") if func is F.scaled_dot_product_attention else None
        if mask is None or mask.dtype is not torch.bool or len(args) != 3:
            return func(*args, **kwargs)
        query, key, value = args
        found = (mask.data_ptr(), mask.shape, mask.stride(), query.dtype)
        if found not in self._blocks:
            # The mask is kept, too, so that no other one gets its address in the meantime.
            self._blocks[found] = mask, _blocks(mask, query.dtype)
        blocks = self._blocks[found][1]
        outputs = [
            func(query[..., block.queries, :], key[..., block.keys, :], value[..., block.keys, :],
                 **{**kwargs, "attn_mask": block.mask})
            for block in blocks
        ]  # fmt: skip
        return outputs[0] if len(outputs) == 1 else torch.cat(outputs, -2)


def _blocks(mask: Tensor, dtype: torch.dtype) -> list[_Block]:
    numeric = torch.zeros(mask.shape, dtype=dtype, device=mask.device).masked_fill_(~mask, -torch.inf)
    blocks = []
    for start in range(0, mask.shape[-2], _BLOCK):
        queries = slice(start, min(start + _BLOCK, mask.shape[-2]))
        seen = mask[..., queries, :].flatten(0, -2).any(0).nonzero()
        # From an even place, for kernels that read several numbers at once.
        keys = slice(int(seen[0]) // 16 * 16, int(seen[-1]) + 1) if len(seen) else slice(0, mask.shape[-1])
        blocks.append(_Block(queries, keys, numeric[..., queries, keys]))
    return blocks
