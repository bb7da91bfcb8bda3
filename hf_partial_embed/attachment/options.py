"""Checks of the options with which rows are attached."""

from __future__ import annotations

import torch

from ..errors import PartialEmbeddingError
from ..layout.tables import VocabularyLayout

__all__ = ["ROW_DTYPES", "check_options"]

ROW_DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)


def check_options(layout: VocabularyLayout, strategy: str, output: str | bool, dtype: torch.dtype | None) -> None:
    """Check the options of `add_tokens` and its like against a model.

    Raises:
        `PartialEmbeddingError`: a value that is unknown, or does not fit the model.
    """
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
