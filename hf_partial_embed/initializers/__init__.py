"""Where new rows start.

An initialiser is a function from an `InitRequest` to the rows of one table, `[K, ...]`. It is called
once for each table over the vocabulary (input embeddings, an untied head, a head's bias, ...), so that
input rows are made of input rows and head rows of head rows. Register one under a name with
`@register("name")`, or pass the function itself as `add_tokens(..., init=function)`.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from ..lazy import lazy_names

if TYPE_CHECKING:
    from .by_name import INITIALIZERS, initial_rows, register, resolve
    from .distill import Distill
    from .donor import Donor
    from .head import CachedHead
    from .pieces import Copy, Description, Positional, subtoken_mean
    from .registry import Initializer, InitRequest
    from .table import MultivariateNormal, mean
    from .vectors import Vectors, entmax15, sparsemax

__all__ = [
    "INITIALIZERS",
    "CachedHead",
    "Copy",
    "Description",
    "Distill",
    "Donor",
    "InitRequest",
    "Initializer",
    "MultivariateNormal",
    "Positional",
    "Vectors",
    "entmax15",
    "initial_rows",
    "mean",
    "register",
    "resolve",
    "sparsemax",
    "subtoken_mean",
]

__getattr__, __dir__ = lazy_names(
    __name__,
    {
        **dict.fromkeys(("INITIALIZERS", "initial_rows", "register", "resolve"), "by_name"),
        **dict.fromkeys(("InitRequest", "Initializer"), "registry"),
        **dict.fromkeys(("Copy", "Description", "Positional", "subtoken_mean"), "pieces"),
        **dict.fromkeys(("MultivariateNormal", "mean"), "table"),
        **dict.fromkeys(("Vectors", "entmax15", "sparsemax"), "vectors"),
        "CachedHead": "head",
        "Distill": "distill",
        "Donor": "donor",
    },
)
