"""Imports at first use: of a package's public names, and of a function behind a method."""

from __future__ import annotations

import importlib
from collections.abc import Callable
from typing import Any

__all__ = ["lazy_function", "lazy_names"]


def lazy_function(module: str, name: str) -> Callable[..., Any]:
    """A function of a module of this package that is imported when it is called.

    For a method that a wing above its class implements, from which the class must not import.

    Args:
        module: the module below this package, such as `evaluation.evaluate`.
        name: the function's.
    """

    def call(*args: Any, **kwargs: Any) -> Any:
        return getattr(importlib.import_module(f".{module}", __package__), name)(*args, **kwargs)

    return call


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
