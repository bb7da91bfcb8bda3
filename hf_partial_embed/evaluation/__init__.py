"""How good rows are: before and after on texts, neighbours, leak, pictures, and which were never trained."""

from __future__ import annotations

from typing import TYPE_CHECKING

from ..lazy import lazy_names

if TYPE_CHECKING:
    from .audit import AuditReport, audit_tokens
    from .neighbours import nearest_rows
    from .plot import plot_report, plot_rows
    from .report import EvaluationReport

__all__ = ["AuditReport", "EvaluationReport", "audit_tokens", "nearest_rows", "plot_report", "plot_rows"]

__getattr__, __dir__ = lazy_names(
    __name__,
    {
        "AuditReport": "audit",
        "audit_tokens": "audit",
        "EvaluationReport": "report",
        "nearest_rows": "neighbours",
        "plot_report": "plot",
        "plot_rows": "plot",
    },
)
