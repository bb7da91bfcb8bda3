"""Initialisers by name, and calling one.

Importing this imports those of the package, which register themselves; it is done when tokens are first added.
"""

from __future__ import annotations

import torch
from torch import Tensor

from ..errors import PartialEmbeddingError, count, shorten
from . import distill, head, pieces, table  # noqa: F401  # they register themselves
from .registry import INITIALIZERS, Initializer, InitRequest, register

__all__ = ["INITIALIZERS", "initial_rows", "register", "resolve"]


def initial_rows(init: str | Initializer, request: InitRequest) -> Tensor:
    """Call an initialiser and check the rows that it returns.

    Args:
        init: a name in `INITIALIZERS`, or a function.
        request: for one table.

    Returns:
        `torch.Tensor` of shape `(K, *table.shape[1:])`, float32.

    Raises:
        `PartialEmbeddingError`: the rows are of another shape, or not finite.
    """
    name = init if isinstance(init, str) else getattr(init, "__name__", type(init).__name__)
    rows = resolve(init)(request)
    expected = (len(request.tokens), *request.table.shape[1:])
    if not isinstance(rows, Tensor) or tuple(rows.shape) != expected:
        got = f"a tensor of shape {tuple(rows.shape)}" if isinstance(rows, Tensor) else type(rows).__name__
        raise PartialEmbeddingError(
            f"The initialiser {name!r} gave {got} for the {request.role} rows of {count(request.tokens, 'token')}; a "
            f"tensor of shape {expected} is needed."
        )
    if not torch.isfinite(rows).all():
        bad = [token for token, row in zip(request.tokens, rows, strict=True) if not torch.isfinite(row).all()]
        raise PartialEmbeddingError(
            f"The initialiser {name!r} gave infinite or NaN values for {shorten(bad)}, in the {request.role} rows; "
            "finite ones are needed."
        )
    return rows.detach().float()


def resolve(init: str | Initializer) -> Initializer:
    """The function behind a name.

    Raises:
        `PartialEmbeddingError`: no initialiser has the name.
    """
    if callable(init):
        return init
    if not isinstance(init, str) or init not in INITIALIZERS:
        raise PartialEmbeddingError(
            f"init={init!r} is no initialiser. Choose one of {sorted(INITIALIZERS)}, or pass a function."
        )
    return INITIALIZERS[init]
