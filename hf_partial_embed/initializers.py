"""Where new rows start.

An initialiser is a function from an `InitRequest` to the rows of one table, `[K, ...]`. It is called
once for each table over the vocabulary (input embeddings, an untied head, a head's bias, ...), so that
input rows come from input rows and head rows from head rows. Register one under a name with
`@register("name")`, or pass the function itself as `add_tokens(..., init=function)`.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch
from torch import Tensor

from .errors import PartialEmbeddingError, count, shorten

__all__ = ["INITIALIZERS", "InitRequest", "Initializer", "initial_rows", "register"]


@dataclass(frozen=True)
class InitRequest:
    """What an initialiser is given.

    Attributes:
        table: the old rows of the table, `[V, ...]`, in the model's dtype; not to be changed.
        role: `"input"`, `"output"`, `"bias"` or `"extra"`.
        tokens: the new tokens' texts, `K` of them.
        pieces: for each token the ids of what its text, or its description, consisted of before it was
            added; ids of padding and of unknown tokens are left out.
        padding: id of the padding, whose row is not trained; `None` where there is none.
        model, tokenizer: as they were passed to `add_tokens`, before anything was added.
        generator: source of random numbers, seeded with `add_tokens(..., seed=)`.
    """

    table: Tensor
    role: str
    tokens: Sequence[str]
    pieces: Sequence[Sequence[int]]
    padding: int | None
    model: Any
    tokenizer: Any
    generator: torch.Generator

    @cached_property
    def trained_rows(self) -> Tensor:
        """Bool `[V]`: rows that belong to a token. Spare rows, rows in gaps between ids and the row of
        the padding are not trained, and should enter no mean.
        """
        size = len(self.table)
        trained = torch.zeros(size, dtype=torch.bool)
        ids = [token_id for token_id in self.tokenizer.get_vocab().values() if token_id < size]
        trained[ids] = True
        if self.padding is not None and 0 <= self.padding < size:
            trained[self.padding] = False
        return trained


Initializer = Callable[[InitRequest], Tensor]

INITIALIZERS: dict[str, Initializer] = {}


def register(name: str) -> Callable[[Initializer], Initializer]:
    """Make an initialiser known under a name."""

    def add(initializer: Initializer) -> Initializer:
        INITIALIZERS[name] = initializer
        return initializer

    return add


@register("mean")
def mean(request: InitRequest) -> Tensor:
    """The mean of all trained rows, the same for every token. One pass over the table.

    Source: Hewitt, "Initializing new word embeddings for pretrained language models", 2021, without its
    noise.
    """
    table, trained = request.table, request.trained_rows.to(request.table.device)
    total = torch.zeros(table.shape[1:], dtype=torch.float64, device=table.device)
    for start in range(0, len(table), 8192):  # in parts, so that no float64 copy of the table exists
        part = slice(start, start + 8192)
        total += table[part][trained[part]].double().sum(0)
    average = total / trained.sum().clamp(min=1)
    return average.float().expand(len(request.tokens), *table.shape[1:]).clone()


@register("subtoken_mean")
def subtoken_mean(request: InitRequest) -> Tensor:
    """For each token the mean of the rows of its pieces. Reads only those rows.

    A token without pieces (its text was unknown to the tokenizer) starts at the mean of all rows.
    Source: Gee et al., "Fast Vocabulary Transfer for Language Model Compression", EMNLP 2022.
    """
    table = request.table
    rows = torch.empty(len(request.tokens), *table.shape[1:], dtype=torch.float32, device=table.device)
    fallback: Tensor | None = None
    for row, pieces in zip(rows, request.pieces, strict=True):
        if pieces:
            row.copy_(table[torch.tensor(list(pieces), device=table.device)].double().mean(0))
        else:
            fallback = mean(request)[0] if fallback is None else fallback
            row.copy_(fallback)
    return rows


def initial_rows(init: str | Initializer, request: InitRequest) -> Tensor:
    """Call an initialiser and check what it gives.

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
