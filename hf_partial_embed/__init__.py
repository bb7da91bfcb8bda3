"""Add tokens to a Hugging Face model and train only their embedding rows."""

from __future__ import annotations

from typing import TYPE_CHECKING

from .lazy import lazy_names

if TYPE_CHECKING:
    from .api import add_tokens, load_tokens, train_tokens
    from .attachment.partial import PartialEmbedding, TokenRows
    from .errors import FrozenRowsChangedError, PartialEmbeddingError
    from .evaluation.audit import audit_tokens
    from .evaluation.evaluate import evaluate
    from .files.checkpoints import verify_checkpoint
    from .modules.embedding import SplitEmbedding
    from .modules.linear import SplitLinear
    from .modules.loss import linear_cross_entropy
    from .modules.mask import mask_gradients
    from .tokens.choosing import choose_tokens
    from .tokens.spelling import word_forms
    from .training.callback import PartialEmbeddingCallback
    from .training.chunked_loss import ChunkedLoss
    from .training.frozen_prefix import FrozenPrefix
    from .training.prefix_cache import PrefixCache

__version__ = "0.1.0"

__all__ = [
    "ChunkedLoss",
    "FrozenPrefix",
    "FrozenRowsChangedError",
    "PartialEmbedding",
    "PartialEmbeddingCallback",
    "PartialEmbeddingError",
    "PrefixCache",
    "SplitEmbedding",
    "SplitLinear",
    "TokenRows",
    "add_tokens",
    "audit_tokens",
    "choose_tokens",
    "evaluate",
    "linear_cross_entropy",
    "load_tokens",
    "mask_gradients",
    "train_tokens",
    "verify_checkpoint",
    "word_forms",
]

# The modules for plain PyTorch must not import transformers, nor a plain import anything of torch.
__getattr__, __dir__ = lazy_names(
    __name__,
    {
        "add_tokens": "api",
        "load_tokens": "api",
        "train_tokens": "api",
        "choose_tokens": "tokens.choosing",
        "evaluate": "evaluation.evaluate",
        "audit_tokens": "evaluation.audit",
        "PartialEmbedding": "attachment.partial",
        "TokenRows": "attachment.partial",
        "PartialEmbeddingCallback": "training.callback",
        "ChunkedLoss": "training.chunked_loss",
        "FrozenPrefix": "training.frozen_prefix",
        "PrefixCache": "training.prefix_cache",
        "linear_cross_entropy": "modules.loss",
        "verify_checkpoint": "files.checkpoints",
        "word_forms": "tokens.spelling",
        "mask_gradients": "modules.mask",
        "SplitEmbedding": "modules.embedding",
        "SplitLinear": "modules.linear",
        "PartialEmbeddingError": "errors",
        "FrozenRowsChangedError": "errors",
    },
)
