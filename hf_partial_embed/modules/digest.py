"""Per-row digests of a table: eight bytes per row, by which a changed bit of the row is found."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence

import torch
from torch import Tensor

__all__ = ["casts_of", "changed_rows", "row_digests"]

_CHUNK_BYTES = 1 << 24


@torch.no_grad()
def row_digests(table: Tensor, dim: int = 0, through: Sequence[torch.dtype] = ()) -> Tensor:
    """A 64-bit digest of the bits of each row.

    The row is read as a sequence of words of up to 64 bits. Each word is multiplied by a fixed pseudo-random odd
    number, and the products are summed modulo 2**64 (multilinear hashing, as in Carter and Wegman, 1979). A change
    of a single word always changes the digest, since multiplication by an odd number is invertible. It guards
    against accidents, not forgery.

    Args:
        table (`torch.Tensor`): of any dtype, with the rows along `dim`.
        dim (`int`): the dimension of the rows.
        through: dtypes to cast the values to first, in this order; done for a chunk of rows at a time.

    Returns:
        `torch.Tensor` of shape `(rows,)`, int64, on the CPU.
    """
    table = table.detach().movedim(dim, 0).contiguous()
    rows = table.shape[0]
    if through:
        step = max(1, _CHUNK_BYTES // max(1, 8 * table[:1].numel()))
        parts = [row_digests(_cast(part, through)) for part in torch.split(table, step)] if rows else []
        return torch.cat([torch.empty(0, dtype=torch.int64), *parts])
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
        return torch.mv(bits, factors)  # the same sums in one pass, five times as fast; on CPUs only
    digests = torch.empty(rows, dtype=torch.int64, device=table.device)
    step = max(1, _CHUNK_BYTES // max(1, 8 * bits.shape[1]))
    for start in range(0, rows, step):
        torch.sum(bits[start : start + step] * factors, 1, out=digests[start : start + step])
    return digests.cpu()


def _cast(values: Tensor, through: Sequence[torch.dtype]) -> Tensor:
    for dtype in through:
        values = values.to(dtype)
    return values


def casts_of(dtype: torch.dtype) -> list[torch.dtype]:
    """The dtypes for which digests of a table are kept: its own, and those that it is likely to be cast down to.

    A wider dtype represents every old value exactly, so it needs no digests of its own. Casts between bfloat16 and
    float16 are left out: they are rare, and each would cost every `add_tokens` one more pass over the table.
    """
    return [dtype, torch.bfloat16, torch.float16] if dtype in (torch.float32, torch.float64) else [dtype]


def changed_rows(
    before: Mapping[torch.dtype, Tensor],
    now: torch.dtype,
    read: Callable[[Sequence[torch.dtype]], Tensor],
    trained: Sequence[int],
) -> tuple[list[int], torch.dtype | None]:
    """Find the rows of a table that have changed otherwise than by a cast of the whole table.

    Args:
        before: `row_digests` of the old table for each dtype that `casts_of` gives, its own first.
        now: the table's dtype now.
        read: computes `row_digests` of the table as it is now, for a given `through`.
        trained: ids of rows that are allowed to change.

    Returns:
        Ids of the rows that have changed, and the dtype whose digests the table was compared with; `None` if the
        table now has a dtype that none of them can be compared with.
    """
    best: tuple[list[int], torch.dtype | None] | None = None
    present = read(())
    for dtype, digests in before.items():
        if torch.promote_types(dtype, now) != now:
            continue
        size = len(digests)
        if dtype == now:
            differs = present[:size] != digests
        else:  # widened: cast down, it has the old digests, and casting it back loses nothing
            differs = (read((dtype,))[:size] != digests) | (read((dtype, now))[:size] != present[:size])
        differs[[row for row in trained if row < size]] = False
        found = differs.nonzero().flatten().tolist()
        if best is None or len(found) < len(best[0]):
            best = found, dtype
        if not found:
            break
    return best or ([], None)
