"""Numbers on the command line, refused with their limits where they are out of them."""

from __future__ import annotations

import argparse
import math
from typing import Any

__all__ = ["learning_rate", "natural", "positive", "share", "whole_number"]


def _number(kind: type, least: float, *, included: bool, below: float | None = None) -> Any:
    def read(text: str) -> Any:
        try:
            value = kind(text)
        except ValueError as error:
            raise argparse.ArgumentTypeError(f"{text!r} is no number") from error
        if not (value > least or (included and value == least)) or (below is not None and not value < below):
            limit = "" if below is None else f" and below {below:g}"
            raise argparse.ArgumentTypeError(f"{text} must be {'at least' if included else 'above'} {least:g}{limit}")
        if math.isinf(value):
            raise argparse.ArgumentTypeError(f"{text} must be finite")
        return value

    return read


whole_number = _number(int, 1, included=True)
natural = _number(int, 0, included=True)
positive = _number(float, 0, included=False)
share = _number(float, 0, included=True, below=1)


def learning_rate(text: str) -> Any:
    return text if text == "auto" else positive(text)
