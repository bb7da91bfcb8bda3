"""How good rows are: before and after on texts, neighbours, leak, pictures."""

from __future__ import annotations

from typing import TYPE_CHECKING

from ..lazy import lazy_names

if TYPE_CHECKING:
    from .neighbours import nearest_rows
    from .plot import plot_report, plot_rows
    from .report import EvaluationReport

__all__ = ["EvaluationReport", "nearest_rows", "plot_report", "plot_rows"]

__getattr__, __dir__ = lazy_names(
    __name__,
    {"EvaluationReport": "report", "nearest_rows": "neighbours", "plot_report": "plot", "plot_rows": "plot"},
)
