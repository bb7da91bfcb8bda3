"""Sharded parameters: FSDP2's, FSDP1's and those of DeepSpeed ZeRO-3.

Under each of these engines a process holds one stretch of the flattened parameter outside of forwards; they differ
only in which one. Values are gathered by an all-reduce with MAX over their bytes (zeros where a process holds
nothing). That keeps every bit of any dtype, also where several processes hold the same stretch.
"""

from __future__ import annotations

import importlib
import math
from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor, nn

from ..errors import PartialEmbeddingError
from .digest import row_digests

__all__ = [
    "Part",
    "from_any_process",
    "gradient_norm",
    "is_dtensor",
    "is_sharded",
    "part_of",
    "set_whole",
    "shard_with",
    "sharded_row_digests",
    "sharding_of",
    "trained_rows",
    "whole",
    "whole_rows",
    "write_rows",
]

_PIECE = 1 << 22  # elements at a time


class Part(NamedTuple):
    """The stretch of a parameter that this process holds.

    Attributes:
        values (`torch.Tensor` of shape `(n,)`): the elements themselves; writing to it changes the parameter.
        start: position of the first one in the flattened parameter.
        shape: the parameter's unsharded shape.
        group: the process group that it is sharded over; `None` for the default group.
    """

    values: Tensor
    start: int
    shape: tuple[int, ...]
    group: Any

    @property
    def width(self) -> int:
        """How many elements a row has."""
        return math.prod(self.shape[1:])


def is_sharded(parameter: Tensor, shape: Sequence[int]) -> bool:
    """Whether this process holds only a part of a parameter, or nothing of it, at the moment.

    Args:
        parameter: as its module has it now.
        shape: its unsharded shape.
    """
    if parameter.is_meta:
        return False
    # FSDP1 frees the storage of a gathered parameter and keeps the tensor.
    freed = bool(parameter.numel()) and not is_dtensor(parameter) and not parameter.untyped_storage().size()
    return freed or is_dtensor(parameter) or tuple(parameter.shape) != tuple(shape)


def part_of(parameter: Tensor, shape: Sequence[int]) -> Part:
    """The part of a sharded parameter that this process holds. Under FSDP1 every process has to call it.

    Raises:
        `PartialEmbeddingError`: it is sharded otherwise than by rows, or by an engine that is not known.
    """
    shape = tuple(shape)
    if is_dtensor(parameter):
        return _dtensor_part(parameter, shape)
    piece: Any = getattr(parameter, "ds_tensor", None)
    if piece is not None:  # DeepSpeed pads the last one
        group: Any = parameter.ds_process_group  # type: ignore[attr-defined]
        start = dist.get_rank(group) * piece.ds_numel
        size = max(0, min(piece.ds_numel, math.prod(shape) - start))
        return Part(piece.data[:size], start, shape, group)
    if not dist.is_initialized() or parameter.dim() != 1:
        raise PartialEmbeddingError(
            f"A parameter of shape {shape} has the shape {tuple(parameter.shape)} here: it is sharded in a way that "
            "is not known. Known are FSDP2, FSDP1 with use_orig_params=True, and DeepSpeed ZeRO-3."
        )
    sizes = [torch.zeros(1, dtype=torch.int64, device=parameter.device) for _ in range(dist.get_world_size())]
    dist.all_gather(sizes, sizes[0].new_tensor([parameter.numel()]))
    start = sum(int(size) for size in sizes[: dist.get_rank()])
    return Part(parameter.detach(), start, shape, None)


def is_dtensor(tensor: Tensor) -> bool:
    """Whether it is a DTensor: sharded by FSDP2 or by tensor parallelism."""
    return hasattr(tensor, "full_tensor")


def _dtensor_part(parameter: Any, shape: tuple[int, ...]) -> Part:
    placements, mesh = parameter.placements, parameter.device_mesh
    start, size = 0, shape[0]
    for dim, placement in enumerate(placements):
        if placement.is_replicate():
            continue
        if type(placement).__name__ != "Shard" or placement.dim != 0:
            raise PartialEmbeddingError(
                f"A parameter of shape {shape} is sharded as {placements}: rows can only train where tables are "
                "sharded by rows, as FSDP does it. Tensor parallelism is not supported."
            )
        size, offset = placement.local_shard_size_and_offset(size, mesh.size(dim), mesh.get_local_rank(dim))
        start += offset if size else 0
    local = parameter.detach().to_local()
    width = math.prod(shape[1:])
    return Part(local.view(-1), start * width, shape, mesh.get_group() if mesh.ndim == 1 else None)


def _combine(values: Tensor, group: Any) -> Tensor:
    """The values of all processes put together; each has zeros for what another one holds."""
    values = values.contiguous()
    device = values.device
    if device.type == "cpu" and dist.get_backend(group) == "nccl":  # offloaded
        values = values.to(torch.accelerator.current_accelerator() or device)
    dist.all_reduce(values.view(torch.uint8), op=dist.ReduceOp.MAX, group=group)
    return values.to(device)


def _index(ids: Sequence[int] | Tensor, device: torch.device) -> Tensor:
    return ids.to(device) if isinstance(ids, Tensor) else torch.tensor(list(ids), device=device, dtype=torch.int64)


def _places(part: Part, ids: Tensor) -> Iterator[tuple[slice, Tensor, Tensor]]:
    """Which elements of rows this process holds, a chunk of rows at a time.

    Yields:
        the rows, as a slice of `ids`; positions in the flattened rows; positions in `part.values`.
    """
    width = part.width
    step = max(1, _PIECE // max(1, width))
    columns = torch.arange(width, device=ids.device)
    for first in range(0, len(ids), step):
        rows = slice(first, min(first + step, len(ids)))
        place = (ids[rows].unsqueeze(1) * width + columns).view(-1) - part.start
        inside = ((place >= 0) & (place < part.values.numel())).nonzero().view(-1)
        yield rows, inside, place[inside]


@torch.no_grad()
def whole(parameter: Tensor, shape: Sequence[int]) -> Tensor:
    """A parameter, gathered and detached, on every process; not a copy where it is not sharded.

    Args:
        parameter: as its module has it now.
        shape: its unsharded shape.
    """
    if not is_sharded(parameter, shape):
        return parameter.detach()
    part = part_of(parameter, shape)
    return _gathered(part, torch.arange(part.shape[0], device=part.values.device))


def _gathered(part: Part, ids: Tensor) -> Tensor:
    rows = part.values.new_zeros((len(ids), part.width))
    for some, inside, here in _places(part, ids):
        rows[some].view(-1)[inside] = part.values[here]
        rows[some] = _combine(rows[some], part.group)
    return rows.view(len(ids), *part.shape[1:])


@torch.no_grad()
def whole_rows(parameter: Tensor, shape: Sequence[int], ids: Sequence[int] | Tensor, dim: int = 0) -> Tensor:
    """Copies of rows of a parameter, sharded or not, on every process.

    Of a sharded parameter only the rows are communicated; the whole of it where `dim` is not 0.

    Args:
        parameter: as its module has it now.
        shape: its unsharded shape.
        ids: which rows.
        dim: the dimension of the rows.

    Returns:
        `torch.Tensor` of shape `(K, ...)`, detached.
    """
    if dim == 0 and is_sharded(parameter, shape):
        part = part_of(parameter, shape)
        return _gathered(part, _index(ids, part.values.device))
    values = whole(parameter, shape)
    return values.index_select(dim, _index(ids, values.device)).movedim(dim, 0)


@torch.no_grad()
def write_rows(
    parameter: Tensor, shape: Sequence[int], ids: Sequence[int] | Tensor, rows: Tensor, dim: int = 0
) -> None:
    """Write rows into a parameter, or into the part of it that this process holds, past its version counter.

    Nothing is communicated, except for a sharded parameter where `dim` is not 0.

    Args:
        parameter, shape, ids, dim: as for `whole_rows`.
        rows (`torch.Tensor` of shape `(K, ...)`): the values, the same on every process.
    """
    rows = rows.to(device=parameter.device, dtype=parameter.dtype)
    index = _index(ids, rows.device)
    if not is_sharded(parameter, shape):
        parameter.data.index_copy_(dim, index, rows.movedim(0, dim))
        return
    part = part_of(parameter, shape)
    if dim:
        changed = whole(parameter, shape).index_copy_(dim, index, rows.movedim(0, dim)).view(-1)
        part.values.copy_(changed[part.start : part.start + part.values.numel()])
        return
    flat = rows.reshape(len(index), -1)
    for some, inside, here in _places(part, index):
        part.values[here] = flat[some].reshape(-1)[inside]


@torch.no_grad()
def set_whole(parameter: Tensor, shape: Sequence[int], values: Tensor) -> None:
    """Set a parameter, or the part of it that this process holds, from its unsharded values; no communication."""
    if is_sharded(parameter, shape):
        write_rows(parameter, shape, range(shape[0]), values)
    else:
        parameter.copy_(values)


@torch.no_grad()
def trained_rows(parameter: Tensor, shape: Sequence[int]) -> Tensor:
    """The values of a parameter that the optimizer trains, gathered and detached, on every process.

    Where DeepSpeed trains a float32 copy of a 16-bit parameter, that copy.
    """
    if hasattr(parameter, "_hp_mapping") or hasattr(parameter, "ds_id"):
        deepspeed: Any = importlib.import_module("deepspeed.utils")
        optimized = hasattr(parameter, "_hp_mapping") or hasattr(parameter, "_z3_optimizer")
        if optimized and (master := deepspeed.safe_get_full_fp32_param(parameter)) is not None:
            values: Tensor = master.detach().view(tuple(shape))
            return values
    return whole(parameter, shape)


@torch.no_grad()
def gradient_norm(
    parameter: Tensor, shape: Sequence[int], dim: int = 0, ids: Sequence[int] | None = None
) -> float | None:
    """The L2 norm of a parameter's present gradient, over all shards; `None` where it has no gradient.

    Where it is sharded by FSDP every process has to call it, and gets the same value.

    Args:
        parameter: as its module has it now.
        shape: its unsharded shape.
        dim: the dimension of its rows.
        ids: the rows that count, if not all; only for a parameter that is not sharded.
    """
    gradient: Any = parameter.grad
    if is_dtensor(parameter):
        return None if gradient is None else float(gradient.full_tensor().float().norm())
    if hasattr(parameter, "ds_id") or not is_sharded(parameter, shape):  # DeepSpeed keeps gradients elsewhere
        if gradient is None:
            return None
        return float(
            (gradient if ids is None else gradient.index_select(dim, _index(ids, gradient.device))).float().norm()
        )
    # FSDP1: the sum of squares, whether there is a gradient, and the number of elements, in which replicated parts
    # (HYBRID_SHARD) are counted more than once.
    square = 0.0 if gradient is None else float(gradient.float().square().sum())
    sums = torch.tensor([square, gradient is not None, parameter.numel()], dtype=torch.float64)
    if dist.get_backend() == "nccl":
        sums = sums.to(parameter.device)
    dist.all_reduce(sums)
    square, count, size = sums.tolist()
    return (square * math.prod(shape) / size) ** 0.5 if count else None


@torch.no_grad()
def from_any_process(values: Tensor | None, parameter: Any) -> Tensor | None:
    """Give every process a tensor that some of them have; `None` if none has it.

    Args:
        values: the tensor, or `None` on a process without it.
        parameter: an FSDP2 parameter of this unsharded shape.
    """
    part = part_of(parameter, parameter.shape)
    device = part.values.device
    had = _combine(torch.tensor([values is not None], dtype=torch.uint8, device=device), part.group)
    if not had.item():
        return None
    whole = part.values.new_zeros(part.shape) if values is None else values.to(part.values)
    return _combine(whole, part.group)


@torch.no_grad()
def sharded_row_digests(parameter: Tensor, shape: Sequence[int], through: Sequence[torch.dtype] = ()) -> Tensor:
    """`row_digests` of a sharded table, on every process.

    Only digests are communicated, and those rows that are split between processes.
    """
    part = part_of(parameter, shape)
    size, width = part.shape[0], max(1, part.width)
    first = -(-part.start // width)
    last = (part.start + part.values.numel()) // width
    digests = torch.zeros(size, dtype=torch.int64)
    if last > first:
        offset = first * width - part.start
        whole = part.values[offset : offset + (last - first) * width]
        digests[first:last] = row_digests(whole.view(last - first, *part.shape[1:]), through=through)
    digests = _combine(digests.to(part.values.device), part.group).cpu()
    here = torch.zeros(size, dtype=torch.uint8)
    here[first:last] = 1
    split = (_combine(here.to(part.values.device), part.group) == 0).nonzero().view(-1).tolist()
    if split:
        digests[split] = row_digests(whole_rows(parameter, shape, split), through=through)
    return digests


def shard_with(module: nn.Module, table: Any) -> None:
    """Shard a module by FSDP2, over the device mesh of a table.

    Raises:
        `PartialEmbeddingError`: the module is sharded already.
    """
    fsdp: Any = importlib.import_module("torch.distributed.fsdp")
    if isinstance(module, fsdp.FSDPModule):
        raise PartialEmbeddingError(
            "The model is sharded already and has a row set: a second one cannot be added to it. Add both before the "
            "model is sharded, or train all tokens in one set."
        )
    fsdp.fully_shard(module, mesh=table.device_mesh, reshard_after_forward=False)


def sharding_of(module: nn.Module, parameter: Tensor) -> str | None:
    """The engine that shards a module's parameter, gathered at the moment or not; `None` if none does."""
    if hasattr(parameter, "ds_id"):
        return "DeepSpeed ZeRO-3"
    if is_dtensor(parameter) or getattr(module, "_is_fsdp_managed_module", False):
        return "FSDP"
    return None
