"""Initial rows of every table of a model, for tokens that have not been added yet, or start anew."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from itertools import chain
from typing import Any

import torch
from tokenizers import AddedToken
from torch import Tensor

from ..errors import PartialEmbeddingError, shorten
from ..layout.tables import VocabularyLayout
from ..tokens.entering import Entering, Preview
from ..tokens.vocabulary import encode_all
from .registry import Initializer, InitRequest

__all__ = ["initial_values", "new_rows"]


def new_rows(
    model: Any,
    tokenizer: Any,
    layout: VocabularyLayout,
    entering: Entering,
    pieces: Sequence[Sequence[int]],
    starts: list[str | Tensor] | None,
    init: str | Initializer,
    seed: int,
    ids: Sequence[int] = (),
) -> dict[str, Tensor]:
    """Rows for tokens as they are going to enter: parts, which nobody has described, start at their pieces' mean."""
    size = len(entering.tokens) - entering.num_parts
    preview = None
    if any(piece is not None for piece in entering.pieces):
        preview = partial(Preview, tokenizer, entering.tokens, entering.pieces)
    asked = initial_values(
        model, tokenizer, layout, entering.tokens[:size], starts, init, seed, pieces=pieces[:size], preview=preview,
        ids=ids,
    )  # fmt: skip
    if size == len(entering.tokens):
        return asked
    parts = initial_values(
        model, tokenizer, layout, entering.tokens[size:], None, "subtoken_mean", seed, pieces=pieces[size:]
    )
    return {name: torch.cat([rows, parts[name]]) for name, rows in asked.items()}


def initial_values(
    model: Any,
    tokenizer: Any,
    layout: VocabularyLayout,
    tokens: list[AddedToken],
    starts: list[str | Tensor] | None,
    init: str | Initializer,
    seed: int,
    *,
    pieces: Sequence[Sequence[int]] | None = None,
    preview: Callable[[], Preview] | None = None,
    ids: Sequence[int] = (),
) -> dict[str, Tensor]:
    """Initial rows, `[K, ...]`, of each table by its name; model and tokenizer are not changed.

    Args:
        model, tokenizer, layout: where the tokens are to be.
        tokens: theirs.
        starts: what `add_tokens` was given for each of them.
        init, seed: as in `add_tokens`.
        pieces: for each token the ids of what its text is read as now, where they are known; else it is read.
        preview: the tokenizer as it is going to be, where tokens become pieces of its vocabulary.
        ids: rows that the tokens will take, where these exist: what stands there is no trained row.
    """
    from .by_name import initial_rows  # all initialisers, which a program that only loads rows does not need

    texts = [token.content for token in tokens]
    given: list[Any] = starts or [None] * len(texts)
    for text, start in zip(texts, given, strict=True):
        if start is not None and not isinstance(start, (str, Tensor)):
            raise PartialEmbeddingError(
                f"Token {text!r} starts from {start!r}: give a description (str) or its row (a tensor)."
            )
    sources = [start if isinstance(start, str) else text for text, start in zip(texts, given, strict=True)]
    if pieces is None:
        all_pieces: list[Sequence[int]] = [*encode_all(tokenizer, sources)]
    else:
        all_pieces = _without(pieces, tokenizer.unk_token_id)
        described = [row for row, start in enumerate(given) if isinstance(start, str)]
        read = encode_all(tokenizer, [given[row] for row in described])
        for row, ids_read in zip(described, read, strict=True):
            all_pieces[row] = ids_read
    rows = {}
    memo: dict[str, Any] = {}
    for table in layout.tables:
        old = table.values().movedim(table.dim, 0)
        if table.role == "lookup":  # integers cannot be averaged: take those of the first piece
            rows[table.name] = old[[next((p for p in ids if p < len(old)), 0) for ids in all_pieces]]
        if not table.has_rows:
            continue
        padding = getattr(table.holders[0][0], "padding_idx", None)
        padding = tokenizer.pad_token_id if padding is None else padding
        size = len(old)
        own = _without(all_pieces, padding, size)
        empty = [
            text for text, start, ids in zip(texts, given, own, strict=True) if isinstance(start, str) and not ids
        ]
        if empty:
            raise PartialEmbeddingError(
                f"The descriptions of {shorten(empty)} have no tokens. Describe them in words."
            )
        request = InitRequest(
            table=old,
            role=table.role,
            tokens=texts,
            pieces=own,
            described=[isinstance(start, str) for start in given],
            preview=preview,
            padding=padding,
            model=model,
            tokenizer=tokenizer,
            generator=torch.Generator().manual_seed(seed),
            memo=memo,
            untrained=ids,
        )
        values = initial_rows(init, request)
        described = [row for row, start in enumerate(given) if isinstance(start, str)]
        if described and isinstance(init, str):  # a description takes precedence over a named initialiser
            values[described] = initial_rows("subtoken_mean", request)[described]
        if table.role == "input":
            for row, start in enumerate(starts or ()):
                if isinstance(start, Tensor):
                    values[row].copy_(_check_row(start, texts[row], values[row]))
        rows[table.name] = values
    return rows


def _without(sequences: Sequence[Sequence[int]], token_id: int | None, size: int | None = None) -> list[Sequence[int]]:
    """Sequences of ids without one of the ids, and without those from `size` on."""
    present = set(chain.from_iterable(sequences))
    gone = {piece for piece in present if piece == token_id or (size is not None and piece >= size)}
    if not gone:
        return list(sequences)
    return [ids if gone.isdisjoint(ids) else [piece for piece in ids if piece not in gone] for ids in sequences]


def _check_row(start: Tensor, text: str, row: Tensor) -> Tensor:
    if start.shape != row.shape or not start.is_floating_point() or not torch.isfinite(start).all():
        raise PartialEmbeddingError(
            f"The row given for {text!r} has shape {tuple(start.shape)} and dtype {start.dtype}; finite "
            f"floating-point numbers of shape {tuple(row.shape)} are needed."
        )
    return start.detach()
