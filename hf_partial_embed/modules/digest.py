"""Per-row digests of a table: eight bytes a row that tell whether any of its bits has changed."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence

import torch
from torch import Tensor

__all__ = ["casts_of", "changed_rows", "row_digests"]

_CHUNK_BYTES = 1 << 24


@torch.no_grad()
def row_digests(table: Tensor, dim: int = 0, through: Sequence[torch.dtype] = ()) -> Tensor:
    """A 64-bit digest of the bits of each row.

    The row is read as 64-bit words, and their products with fixed pseudo-random odd numbers are added
    modulo 2**64 (multilinear hashing, as in Carter and Wegman, 1979). A change of a single word always
    changes the digest, since an odd factor can be inverted. It guards against accidents, not forgery.

    Args:
        table (`torch.Tensor`): of any dtype, with the rows along `dim`.
        dim (`int`): the dimension of the rows.
        through: dtypes that the values are cast to first, one after the other, some rows at a time.

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
        return torch.mv(bits, factors)  # the same sums in one pass, five times as fast; only CPUs have it
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
    """The dtypes as which a table is to be known again: its own, and those that it is likely to be rounded to.

    A wider dtype needs no digests of its own, since it holds every old value. The 16-bit dtypes are not rounded to
    each other in practice, and a pass over a large table for each would be paid in every `add_tokens`.
    """
    return [dtype, torch.bfloat16, torch.float16] if dtype in (torch.float32, torch.float64) else [dtype]


def changed_rows(
    before: Mapping[torch.dtype, Tensor],
    now: torch.dtype,
    read: Callable[[Sequence[torch.dtype]], Tensor],
    trained: Sequence[int],
) -> tuple[list[int], torch.dtype | None]:
    """Rows of a table that are not what they were, a cast of the whole table aside.

    Args:
        before: `row_digests` of the old table, cast to each of `casts_of` its dtype, its own first.
        now: the dtype that the table has.
        read: gives `row_digests` of the table with this `through`.
        trained: rows that may have changed.

    Returns:
        Ids of the rows that have changed, and the dtype as which the table was known again; `None` if it has one
        with which nothing can be compared.
    """
    best: tuple[list[int], torch.dtype | None] | None = None
    present = read(())
    for dtype, digests in before.items():
        if torch.promote_types(dtype, now) != now:
            continue
        size = len(digests)
        if dtype == now:
            differs = present[:size] != digests
        else:  # the wider table holds the old values and nothing that the narrower dtype could not
            differs = (read((dtype,))[:size] != digests) | (read((dtype, now))[:size] != present[:size])
        differs[[row for row in trained if row < size]] = False
        found = differs.nonzero().flatten().tolist()
        if best is None or len(found) < len(best[0]):
            best = found, dtype
        if not found:
            break
    return best or ([], None)
