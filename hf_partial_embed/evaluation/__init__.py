"""How good rows are: neighbours, leak, pictures."""

from __future__ import annotations

from typing import TYPE_CHECKING

from ..lazy import lazy_names

if TYPE_CHECKING:
    from .neighbours import nearest_rows
    from .plot import plot_rows

__all__ = ["nearest_rows", "plot_rows"]

__getattr__, __dir__ = lazy_names(__name__, {"nearest_rows": "neighbours", "plot_rows": "plot"})
