"""Per-row digests of a table: eight bytes per row, by which a changed bit of the row is found."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence

import torch
from torch import Tensor

__all__ = ["casts_of", "changed_rows", "digests_through", "row_digests"]

_CHUNK_BYTES = 1 << 24
_CACHE_BYTES = 1 << 19  # what a processor's core keeps while it computes several digests of it


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
    return digests_through(table, [through], dim)[0]


@torch.no_grad()
def digests_through(table: Tensor, ways: Sequence[Sequence[torch.dtype]], dim: int = 0) -> list[Tensor]:
    """`row_digests` of one table for several `through`, in one pass over the table.

    Args:
        table: as in `row_digests`.
        ways: a `through` for each of the digests.
        dim: as in `row_digests`.

    Returns:
        For each of `ways` a `torch.Tensor` of shape `(rows,)`, int64, on the CPU.
    """
    table = table.detach().movedim(dim, 0).contiguous()
    size, numbers = table.shape[0], max(1, table[:1].numel())
    # On a CPU a part stays in the cache for all ways; elsewhere a part is what may be allocated.
    is_cached = table.device.type == "cpu" and len(ways) > 1
    step = max(1, _CACHE_BYTES // (numbers * table.itemsize) if is_cached else _CHUNK_BYTES // (8 * numbers))
    passes = []
    for way in ways:
        # New memory for the casts of every part would take longer than the digests.
        casts, dtype = list[Tensor](), table.dtype
        for dtype_then in way:
            if dtype_then != dtype:
                dtype = dtype_then
                casts.append(table.new_empty((min(step, size), *table.shape[1:]), dtype=dtype))
        words = _words(casts[-1] if casts else table)
        passes.append((casts, words, _factors(words), torch.empty(size, dtype=torch.int64, device=table.device)))
    for start in range(0, size, step):
        stop = min(start + step, size)
        part = table[start:stop]
        for casts, words, factors, found in passes:
            value = part
            for cast in casts:
                value = cast[: stop - start].copy_(value)
            _sum(words[: stop - start] if casts else words[start:stop], factors, found[start:stop])
    return [found.cpu() for *_, found in passes]


def _words(values: Tensor) -> Tensor:
    """The bits of each row as integers, `[rows, words]`: the widest of which a row is a whole number."""
    raw = values.reshape(len(values), -1).view(torch.uint8)
    words = next(
        dtype
        for dtype in (torch.int64, torch.int32, torch.int16, torch.uint8)
        if raw.shape[1] % dtype.itemsize == 0 and raw.storage_offset() % dtype.itemsize == 0
    )
    return raw.view(words)


def _factors(words: Tensor) -> Tensor:
    generator = torch.Generator().manual_seed(0x9E3779B9)
    return (torch.randint(-(2**62), 2**62, (words.shape[1],), generator=generator) | 1).to(words.device)


def _sum(words: Tensor, factors: Tensor, out: Tensor) -> None:
    """Write the sum of the products of each row."""
    if words.dtype == torch.int64 and words.device.type == "cpu":
        torch.mv(words, factors, out=out)  # the same sums in one pass, five times as fast; on CPUs only
    else:
        torch.sum(words * factors, 1, out=out)


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
