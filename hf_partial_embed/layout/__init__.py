"""Which tensors of a `transformers` model belong to its vocabulary, and how they grow."""

from __future__ import annotations
