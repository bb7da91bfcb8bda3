"""Temporary changes of how a model with trainable rows runs: the base of chunked loss and frozen prefix."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, TypeVar

from torch import nn

__all__ = ["Addition", "change_without_additions"]

_REGISTRY = "_partial_embedding_additions"
Kind = TypeVar("Kind", bound="Addition")


class Addition:
    """A change of how a model runs that can be removed again; also a context manager.

    The model keeps a list of what is installed, so that `merge()` and `detach()` remove it, too.
    """

    def __init__(self, model: nn.Module) -> None:
        self.model = model

    @property
    def installed(self) -> bool:
        """Whether it is installed now."""
        return self in self.model.__dict__.get(_REGISTRY, ())

    def others(self, kind: type[Kind]) -> list[Kind]:
        """What else of a kind is installed on the model."""
        return [other for other in self.model.__dict__.get(_REGISTRY, ()) if isinstance(other, kind)]

    def install(self) -> Any:
        """Install it; does nothing if it is installed."""
        if not self.installed:
            self._put_on()
            self.model.__dict__.setdefault(_REGISTRY, []).append(self)
        return self

    def remove(self) -> None:
        """Remove it; does nothing if it is not installed."""
        if self.installed:
            self._take_off()
            self.model.__dict__[_REGISTRY].remove(self)

    def __enter__(self) -> Any:
        return self.install()

    def __exit__(self, *_: object) -> None:
        self.remove()

    def _put_on(self) -> None:
        raise NotImplementedError

    def _take_off(self) -> None:
        raise NotImplementedError


def change_without_additions(model: nn.Module, change: Callable[[], None]) -> None:
    """Remove all additions of a model, the last first, and call `change`; if that fails, install them again."""
    additions: list[Addition] = list(model.__dict__.get(_REGISTRY, ()))
    try:
        for addition in reversed(additions):
            addition.remove()
        change()
    except BaseException:
        for addition in additions:
            addition.install()
        raise
