"""Warnings of what `transformers` and `tokenizers` silently do wrong with new ids.

Each case is detected by what the tokenizer or the model does, not by their names, and logged once for all tokens.
"""

from __future__ import annotations

import inspect
import logging
import re
from typing import Any

from torch import nn

from ..errors import shorten
from ..tokens.vocabulary import decode_each
from .partial import PartialEmbedding

__all__ = ["warn_of_traps"]

logger = logging.getLogger(__name__)

# Code that takes the position of a text's largest id for its end: in CLIP's vocabulary that is the end token.
_LARGEST_ID = re.compile(r"input_ids(\.to\([^()]*\))?\.argmax\(")
_LEGACY_EOS = 2  # with it CLIP and its like still look for the largest id (huggingface/transformers#24773)


def warn_of_traps(partial: PartialEmbedding) -> None:
    """Log a warning for each known trap that new tokens run into.

    Args:
        partial: the rows, on their model, with ids of their own.
    """
    for message in (
        _other_decoding(partial),
        _pooling_at_largest_id(partial),
        _taken_for_timestamps(partial),
    ):
        if message:
            logger.warning("%s", message)


def _other_decoding(partial: PartialEmbedding) -> str | None:
    """Byte-level decoders read the letters from U+00A1 to U+0143 of an added token as bytes."""
    tokenizer = partial.tokenizer
    pieces = partial.vocabulary_pieces()
    ids = {a: i for a, i, piece in zip(partial.tokens, partial.token_ids, pieces, strict=True) if not piece}
    try:
        decoded = decode_each(tokenizer, list(ids.values()))
    except Exception as error:  # noqa: BLE001  # a third-party tokenizer; the rows are right all the same
        return f"{type(tokenizer).__name__} does not decode the new tokens: {type(error).__name__}: {error}."
    # Spaces at an edge are the decoder's business, for old tokens, too.
    others = [(a, b) for a, b in zip(ids, decoded, strict=True) if a != b and "".join(a.split()) != "".join(b.split())]
    added = tokenizer.added_tokens_decoder if others else {}
    changed = [f"{a!r} as {b!r}" for a, b in others if ids[a] in added]
    if not changed:
        return None
    return (
        f"{type(tokenizer).__name__} decodes {'; '.join(changed[:8])}{' and others' if len(changed) > 8 else ''}: its "
        "decoder takes the characters of an added token for bytes. Encoding and training are right, decoded text is "
        "not. Give words as plain strings with entry='vocabulary', and markers a text of ASCII characters; flags such "
        "as special and normalized change nothing here."
    )


def _pooling_at_largest_id(partial: PartialEmbedding) -> str | None:
    """CLIP with its old configuration, OWL-ViT and others look for the end of a text by its largest id."""
    eos = partial.tokenizer.eos_token_id
    if eos is not None and max(partial.token_ids) < eos:
        return None
    found = [module for module in partial.model.modules() if _pools_at_largest_id(module)]
    if not found:
        return None
    names = ", ".join(sorted({type(module).__name__ for module in found}))
    if any(hasattr(module, "eos_token_id") for module in found) and eos is not None:
        remedy = (
            f"Set it before the model is loaded (config.eos_token_id = {eos}, in text_config where there is one), or "
            f"now: module.eos_token_id = {eos} for each module of model.modules() that has {_LEGACY_EOS} there."
        )
    else:
        remedy = "Use the states of all positions, or take the one of the end token yourself."
    return (
        f"{names} takes the state at the largest id of a text for that of its end. The new tokens' ids "
        f"({shorten(partial.token_ids)}) are larger than that of the end token ({eos}), so a text that has one is "
        f"pooled there. {remedy}"
    )


def _pools_at_largest_id(module: nn.Module) -> bool:
    if getattr(module, "eos_token_id", _LEGACY_EOS) != _LEGACY_EOS:
        return False
    forward: Any = inspect.unwrap(type(module).forward)
    code = getattr(forward, "__code__", None)
    if code is None or "argmax" not in code.co_names:
        return False
    try:
        return _LARGEST_ID.search(inspect.getsource(forward)) is not None
    except OSError:  # no source here
        return False


def _taken_for_timestamps(partial: PartialEmbedding) -> str | None:
    """Whisper takes every id behind `<|notimestamps|>` for a time."""
    last = getattr(getattr(partial.model, "generation_config", None), "no_timestamps_token_id", None)
    if not isinstance(last, int):
        return None
    tokens = [text for text, i in zip(partial.tokens, partial.token_ids, strict=True) if i > last]
    if not tokens:
        return None
    return (
        f"The ids of {shorten(tokens)} are behind those of the timestamps, and this model takes every id above {last} "
        "for a time: generate(return_timestamps=True) does, and decode(decode_with_timestamps=True) writes a time in "
        "the token's place. Use these tokens without timestamps, or train a token that exists and has a smaller id "
        "(train_tokens)."
    )
