"""What a frozen prefix tells the chunked loss: which of the head's positions no step changes, and their normalizers.

They are recognised by the values of their hidden states, whatever the model does between its layers and its head.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from ..modules.frozen_loss import frozen_normalizers, linear_cross_entropy_given
from ..modules.rows import PartialModule
from ..modules.steps import Steps
from .prefix_cache import PrefixCache

__all__ = ["FrozenPositions"]


class FrozenPositions:
    """The first positions of a batch, whose hidden states come without a graph.

    Args:
        hidden (`torch.Tensor` of shape `(batch, positions, dim)`): their hidden states.
        keys: of each text's entry in `cache`; `None` where it has none.
        cache: keeps normalizers for the next steps.
    """

    def __init__(self, hidden: Tensor, keys: Sequence[bytes | None], cache: PrefixCache | None) -> None:
        self.hidden, self.keys, self.cache = hidden, keys, cache

    def numbers_in(self, input: Tensor) -> Tensor | None:
        """The number of each position of the head's input among these, `(batch, sequence, 1)`; -1 for all others.

        `None` where the input does not begin with these hidden states.
        """
        batch, length, _ = self.hidden.shape
        alike = input.dim() == 3 and (input.dtype, input.device) == (self.hidden.dtype, self.hidden.device)
        if not alike or not torch.equal(input[:, :length], self.hidden):
            return None
        numbers = torch.full((*input.shape[:2], 1), -1, device=input.device)
        numbers[:, :length, 0] = torch.arange(batch * length, device=input.device).view(batch, length)
        return numbers

    def cross_entropy(
        self,
        input: Tensor,
        head: nn.Linear,
        target: Tensor,
        numbers: Tensor,
        *,
        reduction: str,
        ignore_index: int,
        transform: Steps | None,
    ) -> Tensor:
        """`linear_cross_entropy` of the hidden states `(N, dim)` of positions with these numbers, `(N,)`."""
        wanted = torch.zeros(self.hidden.shape[:2].numel(), dtype=torch.bool, device=input.device)
        wanted[numbers[(numbers >= 0) & (target != ignore_index)]] = True
        known = self._normalizers(head, transform, wanted.view(self.hidden.shape[:2])).flatten()
        normalizers = torch.where(numbers < 0, torch.nan, known[numbers.clamp(min=0)])
        options: dict[str, Any] = {"reduction": reduction, "ignore_index": ignore_index, "transform": transform}
        return linear_cross_entropy_given(input, head, target, normalizers, **options)

    @torch.no_grad()
    def _normalizers(self, head: nn.Linear, transform: Steps | None, wanted: Tensor) -> Tensor:
        """Of all positions, `(batch, positions)`; those that are wanted are computed where the cache has none."""
        length = self.hidden.shape[1]
        exact = torch.promote_types(torch.float32, self.hidden.dtype)
        found = self.hidden.new_full(self.hidden.shape[:2], torch.nan, dtype=exact)
        kept = [] if self.cache is None else self.cache.normalizers_of(_state(head, transform), self.keys)
        for row, values in enumerate(kept):
            if values is not None:
                found[row] = values[:length]
        missing = found.isnan() & wanted
        if missing.any():
            found[missing] = frozen_normalizers(self.hidden[missing], head, transform=transform)
            for row, values in enumerate(kept):
                if values is not None:
                    values[:length] = found[row]
        return found


def _state(head: nn.Linear, transform: Steps | None) -> Any:
    """What normalizers depend on beside the hidden states; it differs after any change in place of the old rows."""
    tables = {name: table for name, table in head._parameters.items() if table is not None}
    versions = [(name, table.data_ptr(), table._version, table.shape) for name, table in tables.items()]
    source = head._row_sources.get("weight") if isinstance(head, PartialModule) else None
    steps = None if transform is None else (transform.names, [float(number) for number in transform.numbers])
    device = tables["weight"].device.type
    autocast = torch.is_autocast_enabled(device) and torch.get_autocast_dtype(device)
    return versions, source and source.index.ids, steps, autocast
