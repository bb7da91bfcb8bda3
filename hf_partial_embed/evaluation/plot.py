"""One picture of what token rows have learned: loss, norms and neighbours. Needs the extra `plot`."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from typing import Any

from ..attachment.partial import PartialEmbedding
from ..errors import PartialEmbeddingError
from ..optional import need
from .neighbours import name_tokens, nearest_rows

__all__ = ["plot_rows"]

_MOST_TOKENS = 24
_CURVES = {"loss": ("training loss", "tab:blue"), "eval_loss": ("held-out loss", "tab:orange")}


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
    leak = [(entry["step"], float(entry["rows/leak"])) for entry in log_history if "rows/leak" in entry]
    if leak:
        right = axes.twinx()
        drawn += right.plot(*zip(*leak, strict=True), label="leak (right)", color="tab:red", linestyle=":")
        right.set_ylabel("probability on new tokens elsewhere", fontsize=8)
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
