"""What can be put on a model that has trainable rows, for a time: the base of chunked loss and frozen prefix."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch import nn

__all__ = ["Addition", "change_without_additions"]

_REGISTRY = "_partial_embedding_additions"


class Addition:
    """A change of how a model runs that can be taken off again; also a context manager.

    The model knows what is on it, so that `merge()` and `detach()` take it off too.
    """

    def __init__(self, model: nn.Module) -> None:
        self.model = model

    @property
    def installed(self) -> bool:
        """Whether it is on the model now."""
        return self in self.model.__dict__.get(_REGISTRY, ())

    def install(self) -> Any:
        """Put it on; harmless if it is on already."""
        if not self.installed:
            self._put_on()
            self.model.__dict__.setdefault(_REGISTRY, []).append(self)
        return self

    def remove(self) -> None:
        """Take it off; harmless if it is off."""
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
    """Take off all that is on a model, the last first, and change it; if that fails, they are put on again."""
    additions: list[Addition] = list(model.__dict__.get(_REGISTRY, ()))
    try:
        for addition in reversed(additions):
            addition.remove()
        change()
    except BaseException:
        for addition in additions:
            addition.install()
        raise
