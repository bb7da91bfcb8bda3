"""The Rust object inside of a fast tokenizer: its settings, and loading it anew in place."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

__all__ = ["change_state", "remove_added_tokens", "settings_kept"]


@contextmanager
def settings_kept(tokenizer: Any) -> Iterator[None]:
    """Put back what a call sets on the backend for good: truncation, padding, splitting of special tokens."""
    backend = tokenizer._tokenizer if getattr(tokenizer, "is_fast", False) else None
    if backend is None:
        yield
        return
    truncation, padding, split = backend.truncation, backend.padding, backend.encode_special_tokens
    try:
        yield
    finally:
        backend.encode_special_tokens = split
        if truncation is not None:
            backend.enable_truncation(**truncation)
        if padding is not None:
            backend.enable_padding(**padding)


def remove_added_tokens(backend: Any, gone: set[str]) -> None:
    """Load the backend anew without some tokens, in place, since others may hold it."""

    def change(state: dict[str, Any]) -> None:
        state["added_tokens"] = [token for token in state["added_tokens"] if token["content"] not in gone]

    change_state(backend, change)


def change_state(backend: Any, change: Callable[[dict[str, Any]], None]) -> None:
    """Load the backend anew from what it is saved as, changed, in place, since others may hold it.

    Args:
        backend: its truncation, its padding and how it splits special tokens stay as they are.
        change: changes the state, a JSON object as `tokenizer.json` has it.
    """
    split, parts = backend.encode_special_tokens, {}
    try:
        text = backend.to_str()
    except Exception:  # noqa: BLE001  # these two may be written in Python, and then cannot be serialised
        parts = {"pre_tokenizer": backend.pre_tokenizer, "decoder": backend.decoder}
        try:
            backend.pre_tokenizer = backend.decoder = None
            text = backend.to_str()
        finally:
            _set_parts(backend, parts)
    state = json.loads(text)
    change(state)
    try:
        backend.__setstate__(json.dumps(state, ensure_ascii=False).encode())
    finally:
        _set_parts(backend, parts)
        backend.encode_special_tokens = split


def _set_parts(backend: Any, parts: dict[str, Any]) -> None:
    for name, part in parts.items():
        setattr(backend, name, part)
