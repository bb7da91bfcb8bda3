"""Counting what operators allocate."""

from __future__ import annotations

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
