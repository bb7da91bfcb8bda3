"""Where new rows start.

An initialiser is a function from an `InitRequest` to the rows of one table, `[K, ...]`. It is called
once for each table over the vocabulary (input embeddings, an untied head, a head's bias, ...), so that
input rows are made of input rows and head rows of head rows. Register one under a name with
`@register("name")`, or pass the function itself as `add_tokens(..., init=function)`.
"""

from __future__ import annotations

from .distill import Distill
from .donor import Donor
from .head import CachedHead
from .pieces import Copy, Description, Positional, subtoken_mean
from .registry import INITIALIZERS, Initializer, InitRequest, initial_rows, register, resolve
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
