"""Names of a package that are imported when they are first asked for."""

from __future__ import annotations

import importlib
from collections.abc import Callable
from typing import Any

__all__ = ["lazy_names"]


def lazy_names(package: str, modules: dict[str, str]) -> tuple[Callable[[str], Any], Callable[[], list[str]]]:
    """`__getattr__` and `__dir__` for a package whose `__init__` imports nothing.

    Args:
        package: its `__name__`.
        modules: for each public name the module below the package that has it.
    """
    loaded = importlib.import_module(package).__dict__

    def getattribute(name: str) -> Any:
        if name not in modules:
            raise AttributeError(f"module {package!r} has no attribute {name!r}")
        value = getattr(importlib.import_module(f".{modules[name]}", package), name)
        loaded[name] = value
        return value

    def names() -> list[str]:
        return sorted({*loaded, *modules})

    return getattribute, names
