"""What is stored and published: row files, checkpoints, the Hub."""

from __future__ import annotations
