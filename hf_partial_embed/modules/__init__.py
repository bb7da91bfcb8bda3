"""Plain PyTorch modules in which only some rows train; does not import `transformers`."""

from __future__ import annotations

# Imported so that they have registered with `splitting` whoever imports that.
from . import embedding, linear

__all__ = ["embedding", "linear"]
