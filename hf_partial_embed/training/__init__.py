"""Rows in a training step: the Trainer's callback, the optimizer, cheaper losses, what to look at meanwhile."""

from __future__ import annotations
