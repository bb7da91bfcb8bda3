"""Per-row digests of a table: eight bytes a row that tell whether any of its bits has changed."""

from __future__ import annotations

import torch
from torch import Tensor

__all__ = ["row_digests"]

_CHUNK_BYTES = 1 << 24


@torch.no_grad()
def row_digests(table: Tensor, dim: int = 0) -> Tensor:
    """A 64-bit digest of the bits of each row.

    The row is read as 64-bit words, and their products with fixed pseudo-random odd numbers are added
    modulo 2**64 (multilinear hashing, as in Carter and Wegman, 1979). A change of a single word always
    changes the digest, since an odd factor can be inverted. It guards against accidents, not forgery.

    Args:
        table (`torch.Tensor`): of any dtype, with the rows along `dim`.
        dim (`int`): the dimension of the rows.

    Returns:
        `torch.Tensor` of shape `(rows,)`, int64, on the CPU.
    """
    table = table.detach().movedim(dim, 0).contiguous()
    rows = table.shape[0]
    raw = table.reshape(rows, -1).view(torch.uint8)
    width = raw.shape[1]
    words = next(
        dtype
        for dtype in (torch.int64, torch.int32, torch.int16, torch.uint8)
        if width % dtype.itemsize == 0 and raw.storage_offset() % dtype.itemsize == 0
    )
    bits = raw.view(words)
    generator = torch.Generator().manual_seed(0x9E3779B9)
    factors = torch.randint(-(2**62), 2**62, (bits.shape[1],), generator=generator) | 1
    factors = factors.to(table.device)
    if bits.dtype == torch.int64 and table.device.type == "cpu":
        return torch.mv(bits, factors)  # the same sums in one pass, five times as fast; only CPUs have it
    digests = torch.empty(rows, dtype=torch.int64, device=table.device)
    step = max(1, _CHUNK_BYTES // max(1, 8 * bits.shape[1]))
    for start in range(0, rows, step):
        torch.sum(bits[start : start + step] * factors, 1, out=digests[start : start + step])
    return digests.cpu()
