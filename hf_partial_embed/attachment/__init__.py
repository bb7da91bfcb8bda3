"""Rows on a live model, and off again."""

from __future__ import annotations
