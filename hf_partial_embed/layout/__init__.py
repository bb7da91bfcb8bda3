"""Where a `transformers` model has its vocabulary, and how that grows."""

from __future__ import annotations
