"""The row file: one safetensors file with the rows and all that is needed to attach them elsewhere.

`examples/guides/file_format.md` documents the format. Reading checks the whole file before a value is used,
and unpickles nothing; writing is atomic and durable.
"""

from __future__ import annotations

import json
import math
import os
import secrets
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from ..errors import PartialEmbeddingError, shorten, visible
from ..tokens.added import TOKEN_FLAGS
from ..tokens.backend import collector_paused
from ..tokens.vocabulary import is_unicode

__all__ = ["FORMAT_VERSION", "ROWS_FILE", "is_rows_file", "read_rows", "write_atomically", "write_rows"]

ROWS_FILE = "token_rows.safetensors"
FORMAT_VERSION = 2
_KEY = "hf_partial_embed"
_MAX_HEADER = 64 << 20
_DTYPES = {"F16", "BF16", "F32", "F64"}


def write_rows(path: str | os.PathLike[str], tensors: dict[str, Tensor], metadata: dict[str, Any]) -> None:
    """Write a row file atomically: at any moment `path` is the whole old file or the whole new one.

    Args:
        path: of the file.
        tensors: by name; `input_rows` among them.
        metadata: anything that JSON can hold.

    Raises:
        `PartialEmbeddingError`: writing the data failed, for instance on a full disk.
        `OSError`: the folder cannot be made, or written to.
    """
    # Version 2 says how tokens came into a vocabulary; files without such tokens are as they always were.
    version = 2 if any("vocabulary" in token for token in metadata.get("tokens", ())) else 1
    header = {_KEY: json.dumps({"format_version": version, **metadata}, sort_keys=True)}
    # Copies, since safetensors refuses tensors that share memory, as those of a tied pair may.
    copies = {name: tensor.detach().clone(memory_format=torch.contiguous_format) for name, tensor in tensors.items()}
    try:
        write_atomically(Path(path), lambda temporary: save_file(copies, temporary, metadata=header))
    except SafetensorError as error:
        raise PartialEmbeddingError(f"Cannot write {path}: {error}. What was there before is still there.") from error


def write_atomically(path: Path, write: Callable[[Path], object]) -> None:
    """Let `write` write a temporary file beside `path`, sync it to the disk, and rename it to `path`."""
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.{secrets.token_hex(8)}")
    try:
        temporary.touch(exist_ok=False)
        mode = temporary.stat().st_mode
        write(temporary)  # safetensors makes a file that only its owner can read
        temporary.chmod(mode)
        _sync(temporary)
        os.replace(temporary, path)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise
    if os.name == "posix":
        _sync(path.parent)


def _sync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


@collector_paused()
def read_rows(path: str | os.PathLike[str]) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """Read a row file.

    Returns:
        The tensors by name, on the CPU, and the metadata.

    Raises:
        `PartialEmbeddingError`: the file is missing, damaged, of another kind or of a newer format
            version, or its tensors do not fit its tokens.
    """
    path = Path(path)
    try:
        with path.open("rb") as file:
            length = int.from_bytes(file.read(8), "little")
        if length > min(_MAX_HEADER, path.stat().st_size):
            raise PartialEmbeddingError(
                f"{path} is no row file, or a damaged one: it announces a header of {length} bytes."
            )
        with safe_open(path, framework="pt") as file:
            metadata = _check_metadata(path, file.metadata())
            _check_shapes(path, file, metadata)
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    except (SafetensorError, OSError, ValueError, OverflowError, RecursionError) as error:
        if isinstance(error, PartialEmbeddingError):
            raise
        # `from None`, since the cause's text may quote the file, for instance a terminal's control sequences.
        reason = visible(str(error))[:500]
        raise PartialEmbeddingError(f"Cannot read {path}: {type(error).__name__}: {reason}") from None
    for name, tensor in tensors.items():
        if not torch.isfinite(tensor).all():
            raise PartialEmbeddingError(
                f"{path} holds infinite or NaN values in {shorten([name])}. Nothing was loaded."
            )
    return tensors, metadata


def is_rows_file(path: str | os.PathLike[str]) -> bool:
    """Whether a file's header is that of a row file; the rest of it is not checked."""
    try:
        with safe_open(path, framework="pt") as file:
            return _KEY in (file.metadata() or {})
    except (SafetensorError, OSError, ValueError):
        return False


def _check_metadata(path: Path, header: dict[str, str] | None) -> dict[str, Any]:
    if not header or _KEY not in header:
        raise PartialEmbeddingError(
            f"{path} is a safetensors file, but no row file: its header has no {_KEY!r} entry. A whole model "
            "is loaded with from_pretrained of its class."
        )
    metadata = json.loads(header[_KEY])
    if not isinstance(metadata, dict):
        raise PartialEmbeddingError(f"{path} has damaged metadata: a JSON object is needed.")
    metadata = {"base_model": None, **metadata}
    version = metadata.get("format_version")
    if type(version) is not int or version < 1:
        raise PartialEmbeddingError(f"{path} has no valid format version: {shorten([version])}.")
    if version > FORMAT_VERSION:
        raise PartialEmbeddingError(
            f"{path} has format version {version}; this release reads versions up to {FORMAT_VERSION}. "
            "Upgrade hf_partial_embed."
        )
    tokens, ids = metadata.get("tokens"), metadata.get("token_ids")
    valid = (
        isinstance(tokens, list)
        and all(map(_is_token, tokens))
        and {type(token.get(flag)) for token in tokens for flag in TOKEN_FLAGS} <= {bool}
        and is_unicode("".join(text for token in tokens for text in _texts_of(token)))
        and len({token["content"] for token in tokens}) == len(tokens)
        and isinstance(ids, list)
        and all(type(token_id) is int and token_id >= 0 for token_id in ids)
        and len(set(ids)) == len(ids) > 0
        and len(tokens) in (0, len(ids))
        and (metadata["base_model"] is None or _is_text(metadata["base_model"]))
        and isinstance(metadata.get("tied"), bool)
    )
    if not valid:
        raise PartialEmbeddingError(f"{path} has damaged metadata: tokens, ids or flags are not what they must be.")
    return metadata


def _is_token(token: Any) -> bool:
    return (
        isinstance(token, dict)
        and _is_name(token.get("content"))
        and ("vocabulary" not in token or _is_piece(token["vocabulary"]))
    )


def _is_piece(piece: Any) -> bool:
    """What version 2 says of a token that is a piece of a vocabulary."""
    return (
        isinstance(piece, dict)
        and _is_name(piece.get("model"))
        and _is_name(piece.get("piece"))
        and isinstance(piece.get("parts"), list)
        and all(map(_is_name, piece["parts"]))
        and type(piece.get("merged")) is type(piece.get("asked")) is bool
        and type(piece.get("rank")) is int
        and piece["rank"] >= 0
    )


def _is_name(value: Any) -> bool:
    return isinstance(value, str) and bool(value)


def _texts_of(token: dict[str, Any]) -> tuple[str, ...]:
    """All texts of a token, which are looked at together: see `_is_text`."""
    piece = token.get("vocabulary")
    if piece is None:
        return (token["content"],)
    return token["content"], piece["model"], piece["piece"], *piece["parts"]


def _is_text(value: Any) -> bool:
    """Whether it is a str without lone surrogates, which JSON can contain and no tokenizer accepts."""
    return isinstance(value, str) and is_unicode(value)


def _check_shapes(path: Path, file: Any, metadata: dict[str, Any]) -> None:
    count = len(metadata["token_ids"])
    names = set(file.keys())
    if "input_rows" not in names:
        raise PartialEmbeddingError(f"{path} has no input_rows; it holds {shorten(sorted(names))}.")
    unknown = {
        name for name in names if name not in ("input_rows", "output_rows", "output_bias") and name[:6] != "extra."
    }
    if unknown:
        raise PartialEmbeddingError(f"{path} holds tensors that no row file has: {shorten(sorted(unknown))}.")
    for name in sorted(names):
        part = file.get_slice(name)
        shape, dtype = part.get_shape(), part.get_dtype()
        dims = {"input_rows": 2, "output_rows": 2, "output_bias": 1}.get(name, len(shape))
        if dtype not in _DTYPES or len(shape) != dims or not shape or shape[0] != count or not math.prod(shape):
            raise PartialEmbeddingError(
                f"{path}: {shorten([name])} has shape {tuple(shape)} and dtype {dtype}, which does not fit "
                f"{count} tokens: {dims} dimensions of floating-point numbers, the first {count}, are needed."
            )
