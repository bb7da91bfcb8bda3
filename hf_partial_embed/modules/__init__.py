"""Plain PyTorch modules of which some rows train; does not import `transformers`."""

from __future__ import annotations

# They announce themselves to `splitting`, which is to know them whoever imports it.
from . import embedding, linear

__all__ = ["embedding", "linear"]
