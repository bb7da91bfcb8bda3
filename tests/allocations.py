"""Counting what operators allocate."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves


class Allocations(TorchDispatchMode):
    """Sizes in bytes of all storages that operators make."""

    def __init__(self) -> None:
        super().__init__()
        self.sizes: list[int] = []
        self.names: list[str] = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        known = {
            leaf.untyped_storage().data_ptr()
            for leaf in tree_leaves((args, kwargs or {}))
            if isinstance(leaf, torch.Tensor)
        }
        out = func(*args, **(kwargs or {}))
        for leaf in tree_leaves(out):
            if not isinstance(leaf, torch.Tensor) or leaf.is_meta:  # a tensor on meta has no bytes
                continue
            if leaf.untyped_storage().data_ptr() not in known:
                self.sizes.append(leaf.untyped_storage().nbytes())
                self.names.append(str(func))
        return out

    def largest(self) -> tuple[int, str]:
        return max(zip(self.sizes, self.names, strict=True))


def memory_changes(function: Callable[[], object]) -> list[int]:
    """What the allocator hands out (and takes back, negative) during a call, in bytes, in order.

    It sees what `Allocations` does not: inside of an operator, under a compiler, and sums that autograd does in place
    while no dispatch mode is on.
    """
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True) as profile:
        function()
    events = [event for event in profile.profiler.kineto_results.events() if event.name() == "[memory]"]
    return [event.nbytes() for event in sorted(events, key=lambda event: event.start_ns())]


def peak_bytes(function: Callable[[], object]) -> int:
    """The most memory that a call has in use beyond what was in use before it."""
    in_use = peak = 0
    for change in memory_changes(function):
        in_use += change
        peak = max(peak, in_use)
    return peak
