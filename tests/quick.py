"""Which cases of a test the default run takes; the others run with the slow tests."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

import pytest

__all__ = ["quick"]


def quick(cases: Iterable[Any], keep: Callable[..., bool]) -> list[Any]:
    """Cases for `pytest.mark.parametrize`, of which those that `keep` says no to are slow.

    Args:
        cases: a value each, or a tuple of them.
        keep: is given the values of a case.
    """
    listed = [case if isinstance(case, tuple) else (case,) for case in cases]
    return [pytest.param(*case, marks=[] if keep(*case) else pytest.mark.slow) for case in listed]
