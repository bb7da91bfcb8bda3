"""Add tokens to a Hugging Face model and train only their embedding rows."""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from .api import add_tokens, load_tokens, train_tokens
    from .checkpoints import verify_checkpoint
    from .chunked_loss import ChunkedLoss
    from .errors import FrozenRowsChangedError, PartialEmbeddingError
    from .loss import linear_cross_entropy
    from .mask import mask_gradients
    from .partial import PartialEmbedding, TokenRows
    from .prefix import FrozenPrefix
    from .split import SplitEmbedding, SplitLinear
    from .trainer import PartialEmbeddingCallback

__version__ = "0.1.0"

# By module, and imported on first use: the modules for plain PyTorch must not import transformers.
_NAMES = {
    "add_tokens": "api",
    "load_tokens": "api",
    "train_tokens": "api",
    "PartialEmbedding": "partial",
    "TokenRows": "partial",
    "PartialEmbeddingCallback": "trainer",
    "ChunkedLoss": "chunked_loss",
    "FrozenPrefix": "prefix",
    "linear_cross_entropy": "loss",
    "verify_checkpoint": "checkpoints",
    "mask_gradients": "mask",
    "SplitEmbedding": "split",
    "SplitLinear": "split",
    "PartialEmbeddingError": "errors",
    "FrozenRowsChangedError": "errors",
}

__all__ = [
    "ChunkedLoss",
    "FrozenPrefix",
    "FrozenRowsChangedError",
    "PartialEmbedding",
    "PartialEmbeddingCallback",
    "PartialEmbeddingError",
    "SplitEmbedding",
    "SplitLinear",
    "TokenRows",
    "add_tokens",
    "linear_cross_entropy",
    "load_tokens",
    "mask_gradients",
    "train_tokens",
    "verify_checkpoint",
]


def __getattr__(name: str) -> Any:
    if name not in _NAMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    value = getattr(importlib.import_module(f".{_NAMES[name]}", __name__), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
