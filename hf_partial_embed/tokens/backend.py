"""The Rust object inside of a fast tokenizer: its settings, loading it anew in place, and renaming in its state."""

from __future__ import annotations

import gc
import json
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

__all__ = [
    "change_state",
    "changed_copy",
    "collector_paused",
    "cut_merges",
    "read_by_backend",
    "remove_added_tokens",
    "rename_vocabulary",
    "settings_kept",
]


_PART = 1024  # texts at a time


@contextmanager
def collector_paused() -> Iterator[None]:
    """Keep Python's cyclic garbage collector from running meanwhile; also a decorator.

    Whenever objects have become a quarter more it looks at each one of the process, which takes a quarter of a second
    with torch and transformers there. What is made here for many tokens is freed without it.
    """
    running = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if running:
            gc.enable()


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


def read_by_backend(backend: Any, texts: Sequence[str]) -> list[list[int]]:
    """Ids of each text alone: no special tokens around it, none of them split, no truncation, no padding.

    Call it within `settings_kept`.
    """
    if backend.truncation is not None:
        backend.no_truncation()
    if backend.padding is not None:
        backend.no_padding()
    if backend.encode_special_tokens:
        backend.encode_special_tokens = False
    # In parts: what the backend makes of a text is an object with offsets and more, of which only the ids are kept.
    return [
        read.ids
        for start in range(0, len(texts), _PART)
        for read in backend.encode_batch_fast(list(texts[start : start + _PART]), add_special_tokens=False)
    ]


def change_state(backend: Any, change: Callable[[dict[str, Any]], None]) -> None:
    """Load the backend anew from a changed state, in place, since others may hold it. Nothing or all changes."""
    split = backend.encode_special_tokens
    text, parts = _changed_state(backend, change)
    try:
        backend.__setstate__(text.encode())
    finally:
        _set_parts(backend, parts)
        backend.encode_special_tokens = split


def changed_copy(backend: Any, change: Callable[[dict[str, Any]], None]) -> Any:
    """Another backend, from a changed state of this one."""
    text, parts = _changed_state(backend, change)
    made = type(backend).from_str(text)
    _set_parts(made, parts)
    return made


def remove_added_tokens(backend: Any, gone: set[str]) -> None:
    """Load the backend anew without some added tokens."""

    def change(state: dict[str, Any]) -> None:
        state["added_tokens"] = [token for token in state["added_tokens"] if token["content"] not in gone]

    change_state(backend, change)


@collector_paused()
def _changed_state(backend: Any, change: Callable[[dict[str, Any]], None]) -> tuple[str, dict[str, Any]]:
    """The changed state as it is serialised, and what cannot be: these two may be written in Python."""
    parts: dict[str, Any] = {}
    try:
        text = backend.to_str()
    except Exception:  # noqa: BLE001  # the bindings raise nothing more exact
        parts = {"pre_tokenizer": backend.pre_tokenizer, "decoder": backend.decoder}
        try:
            backend.pre_tokenizer = backend.decoder = None
            text = backend.to_str()
        finally:
            _set_parts(backend, parts)
    state = json.loads(text)
    change(state)
    return json.dumps(state, ensure_ascii=False), parts


def _set_parts(backend: Any, parts: dict[str, Any]) -> None:
    for name, part in parts.items():
        setattr(backend, name, part)


def cut_merges(model: dict[str, Any], gone: Collection[str]) -> list[tuple[int, Any]]:
    """Take the merges that make or use one of some tokens out of a serialised model, which lacks these tokens then.

    Returns:
        The merges with their old places, first ones first.
    """
    # A right part inside of a word begins with the prefix, which what the two make has only at its beginning.
    prefix = model.get("continuing_subword_prefix") or ""
    cut = []
    for index, merge in enumerate(model.get("merges") or ()):
        left, right = merge.split(" ") if isinstance(merge, str) else merge
        if left in gone or right in gone or left + right.removeprefix(prefix) in gone:
            cut.append((index, merge))
    places = {index for index, _ in cut}
    if cut:
        model["merges"] = [merge for index, merge in enumerate(model["merges"]) if index not in places]
    return cut


def rename_vocabulary(model: dict[str, Any], names: Mapping[str, str]) -> None:
    """Give tokens of a serialised model's vocabulary other texts, and the same ids."""
    vocabulary = model.get("vocab")
    if isinstance(vocabulary, dict):
        for old, new in names.items():
            if old in vocabulary:
                vocabulary[new] = vocabulary.pop(old)
    elif vocabulary:  # Unigram: pairs of a text and its score
        for pair in vocabulary:
            pair[0] = names.get(pair[0], pair[0])
    if model.get("unk_token") in names:
        model["unk_token"] = names[model["unk_token"]]
