"""Reading a model: its tensors, the integers that its modules and configurations keep, its embeddings."""

from __future__ import annotations

import logging
import threading
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor, nn

from .storage import logical_shape

__all__ = [
    "Path",
    "Resizing",
    "Shapes",
    "config_ints",
    "grown_dims",
    "input_weight",
    "members_of",
    "named_counts",
    "named_tensors",
    "output_weight",
    "quiet",
    "shapes_of",
    "try_call",
]

Shapes = dict[str, tuple[int, ...]]
Path = tuple[str, ...]


@dataclass
class Resizing:
    """What changes in a model when its vocabulary grows.

    Attributes:
        tensors: for each parameter and buffer over the vocabulary, by name: the vocabulary's dimension, the size
            in it now, and the size that was asked for.
        tails: for those that have rows after the vocabulary's, by name: how many. These rows belong to ids that
            the model computes from the vocabulary's size (prompts, an initial token).
        counts: integers of modules and configurations that change with it, by their name in `named_counts`: the
            value now and the value then.
    """

    tensors: dict[str, tuple[int, int, int]]
    counts: dict[str, tuple[int, int]]
    tails: dict[str, int] = field(default_factory=dict)


def try_call(model: nn.Module, name: str) -> Any:
    """The result of a method without arguments; `None` where the model does not have or implement it."""
    try:
        return getattr(model, name)()
    except (AttributeError, NotImplementedError, TypeError):
        return None


def input_weight(model: nn.Module) -> Any:
    """The table of the input embeddings; `None` where the model does not say which it is."""
    weight = getattr(try_call(model, "get_input_embeddings"), "weight", None)
    return weight if isinstance(weight, Tensor) and weight.dim() == 2 else None


def output_weight(model: nn.Module) -> Any:
    """The weight of the head; `None` where the model does not say which it is."""
    return getattr(try_call(model, "get_output_embeddings"), "weight", None)


def named_tensors(model: nn.Module) -> Iterator[tuple[str, tuple[nn.Module, str]]]:
    """The module and the attribute of each parameter and buffer, by every name that it has.

    A module that a PEFT layer wraps also has the name that it had before it was wrapped.
    """
    for prefix, module in model.named_modules(remove_duplicate=False):
        for _, attribute in members_of(module):
            name = f"{prefix}.{attribute}" if prefix else attribute
            yield name, (module, attribute)
            if ".base_layer." in name:
                yield name.replace(".base_layer.", "."), (module, attribute)


def named_counts(model: nn.Module) -> Iterator[tuple[str, tuple[Any, str, int]]]:
    """Every integer attribute of the modules and of the configurations that they carry, by a stable name."""
    seen: set[int] = set()
    for prefix, module in model.named_modules():
        for attribute, value in module.__dict__.items():
            if type(value) is int:
                yield f"{prefix}:{attribute}", (module, attribute, value)
            elif _is_config(value):
                for path, owner, name, number in _walk_config(value, (attribute,), seen):
                    yield f"{prefix}:{'.'.join((*path, name))}", (owner, name, number)


def _walk_config(config: Any, path: Path, seen: set[int]) -> Iterator[tuple[Path, Any, str, int]]:
    if id(config) in seen:
        return
    seen.add(id(config))
    for attribute, value in vars(config).items():
        if type(value) is int:
            yield path, config, attribute, value
        elif _is_config(value):
            yield from _walk_config(value, (*path, attribute), seen)


def _is_config(value: Any) -> bool:
    return hasattr(value, "to_diff_dict")


def members_of(module: nn.Module) -> list[tuple[nn.Module, str]]:
    """Parameters and buffers of a module itself, each as the module and the attribute."""
    members = (module._parameters, module._buffers)
    return [(module, name) for group in members for name, tensor in group.items() if tensor is not None]


def shapes_of(model: nn.Module) -> Shapes:
    """Shapes of all parameters and buffers, by every name that they have."""
    return {name: logical_shape(*holder) for name, holder in named_tensors(model)}


def grown_dims(before: Shapes, after: Shapes) -> dict[str, int]:
    """Names of the tensors that have become larger in one dimension, with that dimension."""
    grown = {}
    for name, shape in after.items():
        old = before.get(name, ())
        if len(old) == len(shape):
            differ = [dim for dim, (a, b) in enumerate(zip(old, shape, strict=True)) if a != b]
            if len(differ) == 1:
                grown[name] = differ[0]
    return grown


def config_ints(config: Any) -> Iterator[tuple[Path, int]]:
    """Every integer of a configuration and of its sub-configurations, by its path."""
    for path, owner, attribute, value in _walk_config(config, (), set()):
        del owner
        yield (*path, attribute), value


_ALONE = threading.RLock()


@contextmanager
def quiet() -> Iterator[None]:
    """Silence logging and warnings while a model is built for its shapes only.

    One thread at a time, since logging and warnings are switched for the whole process.
    """
    with _ALONE:
        before = logging.root.manager.disable
        logging.disable(logging.CRITICAL)
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")
                yield
        finally:
            logging.disable(before)
