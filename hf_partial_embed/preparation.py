"""What a set of rows needs before it is attached: options that fit the model, and initial values."""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from tokenizers import AddedToken
from torch import Tensor

from .errors import PartialEmbeddingError, shorten
from .initializers import Initializer, InitRequest, initial_rows
from .layout import Table, VocabularyLayout
from .vocabulary import encode_all, token_from_dict, token_to_dict

__all__ = [
    "ROW_DTYPES",
    "check_options",
    "display_names",
    "existing_tokens",
    "initial_values",
    "model_name",
    "plain_tokenizer",
    "row_keys",
]

ROW_DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)


def check_options(layout: VocabularyLayout, strategy: str, output: str | bool, dtype: torch.dtype | None) -> None:
    if strategy not in ("split", "mask"):
        raise PartialEmbeddingError(f"strategy={strategy!r} is unknown. Choose 'split' or 'mask'.")
    if output != "auto" and output is not False:
        raise PartialEmbeddingError(f"output={output!r} is unknown. Choose 'auto' or False.")
    if output is False and layout.tied:
        raise PartialEmbeddingError(
            "output=False cannot be had on a model whose head is tied to its input embeddings: there is one row "
            "for both. Use output='auto', or untie the head first."
        )
    if dtype not in (None, *ROW_DTYPES):
        allowed = ", ".join(str(dtype) for dtype in ROW_DTYPES)
        raise PartialEmbeddingError(f"dtype={dtype} cannot be trained. Choose one of {allowed}.")
    if strategy == "mask" and dtype not in (None, layout.tables[0].tensor.dtype):
        raise PartialEmbeddingError(
            f"strategy='mask' trains the model's own tables, which are {layout.tables[0].tensor.dtype}; dtype={dtype} "
            "cannot be had. Use strategy='split', or convert the model."
        )


def initial_values(
    model: Any,
    tokenizer: Any,
    layout: VocabularyLayout,
    tokens: list[AddedToken],
    starts: list[str | Tensor] | None,
    init: str | Initializer,
    seed: int,
) -> dict[str, Tensor]:
    """Rows of each table of a model for tokens that are not added yet."""
    texts = [token.content for token in tokens]
    given: list[Any] = starts or [None] * len(texts)
    for text, start in zip(texts, given, strict=True):
        if start is not None and not isinstance(start, (str, Tensor)):
            raise PartialEmbeddingError(
                f"Token {text!r} starts from {start!r}: give a description (str) or its row (a tensor)."
            )
    sources = [start if isinstance(start, str) else text for text, start in zip(texts, given, strict=True)]
    all_pieces = encode_all(tokenizer, sources)
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


def plain_tokenizer(tokenizer: Any, *, needed: bool) -> Any:
    """The tokenizer itself where a processor was given."""
    is_processor = not hasattr(tokenizer, "convert_tokens_to_ids")
    inner = getattr(tokenizer, "tokenizer", tokenizer) if is_processor else tokenizer
    if needed and not hasattr(inner, "convert_tokens_to_ids"):
        raise PartialEmbeddingError(
            f"A tokenizer is needed, but got {type(tokenizer).__name__}. Pass the model's tokenizer, e.g. "
            "AutoTokenizer.from_pretrained(...)."
        )
    return inner


def existing_tokens(tokenizer: Any, ids: Sequence[int]) -> list[AddedToken]:
    """The tokens that have the ids; none, if there is an id without one (a spare row)."""
    added = tokenizer.added_tokens_decoder
    by_id = {token_id: text for text, token_id in tokenizer.get_vocab().items()}
    texts = [by_id.get(token_id) for token_id in ids]
    if None in texts:
        return []
    return [
        token_from_dict(token_to_dict(added[i])) if i in added else AddedToken(text)
        for i, text in zip(ids, texts, strict=True)
    ]


def display_names(tokens: Sequence[str], ids: Sequence[int]) -> list[str]:
    """What a person calls the rows: the tokens' texts, or their ids where there are none."""
    return list(tokens) or [f"id {token_id}" for token_id in ids]


def model_name(model: Any) -> str | None:
    """The base model's name on the Hub, or of its folder: a path of this machine says nothing elsewhere."""
    name = getattr(getattr(model, "config", None), "_name_or_path", None)
    if name and (os.path.isabs(name) or Path(name).exists()):
        return Path(name).name or None
    return name or None


def row_keys(layout: VocabularyLayout) -> dict[str, Table]:
    """Under which name a row file has the rows of each table."""
    names = {"input": "input_rows", "output": "output_rows", "bias": "output_bias"}
    keys: dict[str, Table] = {}
    for table in layout.tables:
        if table.has_rows:
            key = names.get(table.role)
            keys[f"extra.{table.name}" if key is None or key in keys else key] = table
    return keys
