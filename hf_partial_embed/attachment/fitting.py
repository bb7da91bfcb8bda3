"""Fitting saved rows to the tables of a model."""

from __future__ import annotations

import logging
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ..errors import PartialEmbeddingError
from ..initializers.initial_values import initial_values
from ..layout.tables import Table, VocabularyLayout, model_name, row_keys
from .arriving import Arriving

__all__ = ["fit_rows"]

logger = logging.getLogger(__name__)

_TABLE_NAMES = {
    "input": "input embeddings", "output": "output embeddings", "bias": "biases", "extra": "further tables"
}  # fmt: skip


def fit_rows(
    values: Mapping[str, Tensor],
    model: Any,
    tokenizer: Any,
    layout: VocabularyLayout,
    arriving: Arriving,
    *,
    base_model: str | None,
    tied: bool,
) -> dict[str, Tensor]:
    """Saved rows for each table of a model. Rows that the file does not have start at the mean of their pieces.

    Args:
        values: the rows, `[K, ...]`, by their name in a row file.
        model, tokenizer, layout: what they are to be attached to.
        arriving: their tokens as this tokenizer is to have them; none where rows were chosen by id.
        base_model, tied: what the row file says of the model that they were trained on.

    Returns:
        Rows by the name of their table, one for each of `arriving.tokens`.

    Raises:
        `PartialEmbeddingError`: rows of another width; rows for a head where the model's is tied.
    """
    here, there = type(model).__name__, base_model or "another model"
    name = model_name(model)
    if base_model and name and Path(name).name != Path(base_model).name:
        logger.warning(
            "These rows were trained on %r and are attached to %r: they may mean nothing there.",
            base_model,
            name,
        )
    if layout.tied and "output_rows" in values:
        raise PartialEmbeddingError(
            f"Cannot attach rows with an output row of their own to {here}: its head is tied to the input "
            f"embeddings. The rows were trained on {there!r}; load that base model."
        )
    rows: dict[str, Tensor] = {}
    missing: list[Table] = []
    for key, table in row_keys(layout).items():
        given = values.get(key)
        if given is None and table.role == "output" and tied:
            given = values["input_rows"]  # they were the head's rows as well
        if given is None:
            missing.append(table)
            continue
        width = table.row_shape
        if tuple(given.shape[1:]) != width:
            raise PartialEmbeddingError(
                f"Cannot attach {len(given)} rows of width {'×'.join(map(str, given.shape[1:]))} to {here}: its "
                f"{_TABLE_NAMES[table.role]} are {'×'.join(map(str, width))} wide. The rows were trained on "
                f"{there!r}; load that base model."
            )
        if len(arriving.tokens) > len(arriving.kept):
            parts = slice(len(arriving.kept), None)
            fresh = initial_values(
                model, tokenizer, VocabularyLayout([table]), arriving.tokens[parts], None, "subtoken_mean", 0,
                pieces=arriving.pieces[parts],
            )  # fmt: skip
            given = torch.cat([given, fresh[table.name].to(given)])
        rows[table.name] = given
    unused = sorted(values.keys() - row_keys(layout).keys())
    if unused:
        logger.warning("%s has no tables for these rows, which are left out: %s.", here, unused)
    lookups = [table for table in layout.tables if table.role == "lookup"]
    if missing and arriving.tokens:
        logger.warning(
            "The rows have no values for %s of %s; they start at the mean of their pieces.",
            [table.name for table in missing],
            here,
        )
    if (missing or lookups) and arriving.tokens:
        some = VocabularyLayout([*missing, *lookups])
        rows.update(
            initial_values(model, tokenizer, some, arriving.tokens, None, "subtoken_mean", 0, pieces=arriving.pieces)
        )
    return rows
