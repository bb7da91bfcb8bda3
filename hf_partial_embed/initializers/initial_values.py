"""Initial rows of every table of a model, for tokens that are not there yet, or are and start anew."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from tokenizers import AddedToken
from torch import Tensor

from ..errors import PartialEmbeddingError, shorten
from ..layout.tables import VocabularyLayout
from ..tokens.vocabulary import encode_all
from .registry import Initializer, InitRequest, initial_rows

__all__ = ["initial_values"]


def initial_values(
    model: Any,
    tokenizer: Any,
    layout: VocabularyLayout,
    tokens: list[AddedToken],
    starts: list[str | Tensor] | None,
    init: str | Initializer,
    seed: int,
    *,
    ids: Sequence[int] = (),
    known_pieces: Sequence[Sequence[int]] | None = None,
) -> dict[str, Tensor]:
    """Rows of each table of a model for tokens that are not added yet, or as if they were not there.

    Args:
        model, tokenizer, layout, tokens, starts, init, seed: as `add_tokens` has them.
        ids: rows that the tokens will take, where these exist: what stands there is no trained row.
        known_pieces: what the tokens' texts are read as, where the tokenizer is not to be asked.
    """
    texts = [token.content for token in tokens]
    given: list[Any] = starts or [None] * len(texts)
    for text, start in zip(texts, given, strict=True):
        if start is not None and not isinstance(start, (str, Tensor)):
            raise PartialEmbeddingError(
                f"Token {text!r} starts from {start!r}: give a description (str) or its row (a tensor)."
            )
    sources = [start if isinstance(start, str) else text for text, start in zip(texts, given, strict=True)]
    all_pieces = encode_all(tokenizer, sources) if known_pieces is None else known_pieces
    rows = {}
    memo: dict[str, Any] = {}
    for table in layout.tables:
        old = table.values().movedim(table.dim, 0)
        if table.role == "lookup":  # integers have no mean: the first piece's are the token's
            rows[table.name] = old[[next((p for p in ids if p < len(old)), 0) for ids in all_pieces]]
        if not table.has_rows:
            continue
        padding = getattr(table.holders[0][0], "padding_idx", None)
        padding = tokenizer.pad_token_id if padding is None else padding
        pieces = [[piece for piece in ids if piece < len(old) and piece != padding] for ids in all_pieces]
        empty = [
            text for text, start, ids in zip(texts, given, pieces, strict=True) if isinstance(start, str) and not ids
        ]
        if empty:
            raise PartialEmbeddingError(
                f"The descriptions of {shorten(empty)} have no tokens. Describe them in words."
            )
        request = InitRequest(
            table=old,
            role=table.role,
            tokens=texts,
            pieces=pieces,
            padding=padding,
            model=model,
            tokenizer=tokenizer,
            generator=torch.Generator().manual_seed(seed),
            memo=memo,
            untrained=ids,
        )
        values = initial_rows(init, request)
        described = [row for row, start in enumerate(given) if isinstance(start, str)]
        if described and isinstance(init, str):  # whatever the other tokens start from
            values[described] = initial_rows("subtoken_mean", request)[described]
        if table.role == "input":
            for row, text, start in zip(values, texts, given, strict=True):
                if isinstance(start, Tensor):
                    row.copy_(_check_row(start, text, row))
        rows[table.name] = values
    return rows


def _check_row(start: Tensor, text: str, row: Tensor) -> Tensor:
    if start.shape != row.shape or not start.is_floating_point() or not torch.isfinite(start).all():
        raise PartialEmbeddingError(
            f"The row given for {text!r} has shape {tuple(start.shape)} and dtype {start.dtype}; finite "
            f"floating-point numbers of shape {tuple(row.shape)} are needed."
        )
    return start.detach()
