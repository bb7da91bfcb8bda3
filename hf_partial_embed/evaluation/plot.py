"""Pictures: what token rows have learned (loss, norms, neighbours), and an evaluation. They need the extra `plot`."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from typing import Any

from ..attachment.partial import PartialEmbedding
from ..errors import PartialEmbeddingError
from ..optional import need
from .neighbours import name_tokens, nearest_rows
from .report import EvaluationReport, TokenResult

__all__ = ["plot_report", "plot_rows"]

_MOST_TOKENS = 24
_CURVES = {"loss": ("training loss", "tab:blue"), "eval_loss": ("held-out loss", "tab:orange")}
_LEAKS = {"rows/leak": ("leak (right)", ":"), "rows/leak_elsewhere": ("leak, texts elsewhere (right)", "-.")}


def plot_rows(
    partial: PartialEmbedding,
    log_history: Sequence[Mapping[str, Any]] = (),
    *,
    path: str | os.PathLike[str] | None = None,
    num_neighbours: int = 3,
) -> Any:
    """Draw loss and leak over the steps, the new rows' norms among the old ones', and nearest old tokens.

    Args:
        partial (`PartialEmbedding`): the rows, on their model.
        log_history: `trainer.state.log_history`; without it there is no curve.
        path: where to save the picture, in the format that its suffix names; not saved if not given.
        num_neighbours (`int`): how many old tokens to name for each new one.

    Returns:
        `matplotlib.figure.Figure`. No window is opened.

    Raises:
        `PartialEmbeddingError`: matplotlib is not installed.
    """
    figures = need("matplotlib.figure", "plot", "plot_rows")
    tables = partial.trained_tables()
    if "input_rows" not in tables:
        raise PartialEmbeddingError("These rows have no input embeddings, whose norms and neighbours could be drawn.")
    table = tables["input_rows"]
    rows = partial.token_rows().input_rows.float()
    shown = min(len(rows), _MOST_TOKENS)
    figure = figures.Figure(figsize=(13, max(4.2, 1.4 + 0.24 * shown)), layout="constrained")
    curve, histogram, neighbours = figure.subplots(1, 3, width_ratios=[1, 1, 1.3])
    _draw_curves(curve, log_history)
    new = set(partial.token_ids)
    step = max(1, table.size // 50_000)
    old_ids = [token_id for token_id in range(0, table.size, step) if token_id not in new]
    old_norms = table.rows(old_ids).float().norm(dim=1)
    _draw_norms(histogram, old_norms[old_norms > 0].tolist(), rows.norm(dim=1).tolist())

    whole = table.values()
    spare = set(range(len(whole))) - set(partial.tokenizer.get_vocab().values()) if partial.tokenizer else set()
    cosines, ids = nearest_rows(rows[:shown], whole, num_neighbours, exclude=sorted(new | spare))
    names = partial.tokens or [f"id {token_id}" for token_id in partial.token_ids]
    lines = [
        [
            (name_tokens(partial.tokenizer, [near])[0] if partial.tokenizer else f"id {near}", cosine)
            for near, cosine in zip(nears, values, strict=True)
        ]
        for nears, values in zip(ids.tolist(), cosines.tolist(), strict=True)
    ]
    _draw_neighbours(neighbours, names[:shown], lines, len(names) - shown)
    if path is not None:
        figure.savefig(path, dpi=120)
    return figure


def _draw_curves(axes: Any, log_history: Sequence[Mapping[str, Any]]) -> None:
    axes.set_title("Training")
    axes.set_xlabel("step")
    drawn = []
    for key, (label, color) in _CURVES.items():
        points = [(entry["step"], float(entry[key])) for entry in log_history if key in entry]
        if points:
            drawn += axes.plot(
                *zip(*points, strict=True), label=label, color=color, marker="." if len(points) < 30 else ""
            )
    if not drawn:
        axes.text(0.5, 0.5, "no log given", ha="center", va="center", transform=axes.transAxes, color="gray")
        axes.set_axis_off()
        return
    axes.set_ylabel("loss")
    leaks = {key: [(entry["step"], float(entry[key])) for entry in log_history if key in entry] for key in _LEAKS}
    if any(leaks.values()):
        right = axes.twinx()
        for key, points in leaks.items():
            if points:
                label, style = _LEAKS[key]
                drawn += right.plot(*zip(*points, strict=True), label=label, color="tab:red", linestyle=style)
        right.set_ylabel("probability on new tokens where none belongs", fontsize=8)
        right.set_ylim(bottom=0)
    axes.legend(drawn, [line.get_label() for line in drawn], loc="upper right")


def _draw_norms(axes: Any, old: list[float], new: list[float]) -> None:
    axes.set_title("Norms of the input rows")
    low, high = min(old + new), max(old + new)
    axes.hist(old, bins=60, range=(low, high), color="lightgray", label=f"{len(old):,} old rows")
    top = axes.get_ylim()[1]
    axes.vlines(new, 0, 0.12 * top, color="tab:blue", linewidth=1.2, label=f"{len(new):,} new rows")
    axes.set_xlabel("L2 norm")
    axes.set_ylabel("number of old rows")
    axes.legend(loc="upper right")


def _draw_neighbours(axes: Any, names: list[str], lines: list[list[tuple[str, float]]], more: int) -> None:
    axes.set_title("Nearest old tokens, by cosine")
    axes.set_axis_off()
    axes.set_ylim(len(names) + (1 if more > 0 else 0), -0.5)
    axes.set_xlim(0, 1)
    for row, (name, line) in enumerate(zip(names, lines, strict=True)):
        axes.text(
            0.0, row, _drawable(name), va="center", fontsize=9, fontweight="bold", parse_math=False, clip_on=True
        )
        text = "   ".join(f"{_drawable(near)} {cosine:.2f}" for near, cosine in line)
        axes.text(0.3, row, text, va="center", fontsize=9, parse_math=False)
    if more > 0:
        axes.text(0.0, len(names), f"and {more} more", va="center", fontsize=9, color="gray")


def _drawable(text: str, limit: int = 18) -> str:
    """Text as the picture has it: spaces visible, what its font lacks escaped, and not too long."""
    shown = "".join(
        "·"
        if char == " "
        else char
        if char.isprintable() and ord(char) < 0x250
        else char.encode("unicode_escape").decode()
        for char in text
    )
    return shown if len(shown) <= limit else shown[: limit - 1] + "…"


_PARTS = (
    ("whole text", "bits_per_byte"),
    ("new tokens", "bits_per_byte_new"),
    ("what follows", "bits_per_byte_following"),
)
_BEFORE, _AFTER = "#8a8f98", "tab:blue"


def plot_report(report: EvaluationReport, *, path: str | os.PathLike[str] | None = None) -> Any:
    """Draw an evaluation: bits per byte before and after, the measures beside them, and each token's change.

    Args:
        report: what `evaluate` returned.
        path: where to save the picture, in the format that its suffix names; not saved if not given.

    Returns:
        `matplotlib.figure.Figure`. No window is opened.

    Raises:
        `PartialEmbeddingError`: matplotlib is not installed.
    """
    figures = need("matplotlib.figure", "plot", "plot_report")
    tokens = [result for result in report.per_token if result.change is not None]
    shown = min(len(tokens), _MOST_TOKENS)
    figure = figures.Figure(figsize=(13, max(4.2, 1.6 + 0.24 * shown)), layout="constrained")
    bars, measures, changes = figure.subplots(1, 3, width_ratios=[1.1, 0.9, 1.2])
    _draw_bits(bars, report)
    _draw_measures(measures, report)
    _draw_changes(changes, tokens)
    if path is not None:
        figure.savefig(path, dpi=120)
    return figure


def _draw_bits(axes: Any, report: EvaluationReport) -> None:
    axes.set_title("Bits per byte")
    parts = [(name, value) for name, key in _PARTS if (value := getattr(report, key)).after is not None]
    if not parts:
        _say(axes, "not measured")
        return
    for shift, side, color in ((-0.2, "before", _BEFORE), (0.2, "after", _AFTER)):
        heights = [getattr(value, side) or 0.0 for _, value in parts]
        label = "original tokenisation" if side == "before" else "with the new tokens"
        places = [number + shift for number in range(len(parts))]
        drawn = axes.bar(places, heights, 0.38, color=color, label=label)
        axes.bar_label(drawn, fmt="%.3f", fontsize=8, padding=2)
    axes.set_xticks(range(len(parts)), [name for name, _ in parts])
    axes.set_ylim(0, 1.25 * max(max(value.before or 0.0, value.after or 0.0) for _, value in parts))
    axes.legend(loc="upper right", fontsize=8)


def _draw_measures(axes: Any, report: EvaluationReport) -> None:
    axes.set_title("Before, after, change")
    axes.set_axis_off()
    lines = [line for line in report.lines() if any(cell not in ("", "-") for cell in line[1:])]
    axes.set_xlim(0, 1)
    axes.set_ylim(len(lines), -0.8)
    for row, (name, before, after, change) in enumerate(lines):
        axes.text(0.0, row, name, va="center", fontsize=8.5)
        for place, cell in ((0.66, before), (0.84, after), (1.03, change)):
            axes.text(place, row, cell, va="center", ha="right", fontsize=8.5)


def _draw_changes(axes: Any, tokens: Sequence[TokenResult]) -> None:
    axes.set_title("Cost of an occurrence, in nats")
    if not tokens:
        _say(axes, "no new token occurs in the texts")
        return
    shown = tokens[:_MOST_TOKENS]
    values = [result.change or 0.0 for result in shown]
    axes.barh(range(len(shown)), values, color=["tab:red" if value > 0 else _AFTER for value in values])
    axes.axvline(0, color="black", linewidth=0.8)
    axes.set_yticks(range(len(shown)))
    labels = axes.set_yticklabels([f"{_drawable(result.token)} ×{result.count}" for result in shown], fontsize=8.5)
    for label in labels:
        label.set_parse_math(False)
    axes.set_ylim(len(shown) - 0.4, -0.6)
    axes.set_xlabel("surprise after - before, up to the next new token")
    if len(tokens) > len(shown):
        axes.text(1, 0, f"and {len(tokens) - len(shown)} more", ha="right", va="bottom", transform=axes.transAxes)


def _say(axes: Any, text: str) -> None:
    axes.text(0.5, 0.5, text, ha="center", va="center", transform=axes.transAxes, color="gray")
    axes.set_axis_off()
