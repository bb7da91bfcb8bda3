"""Rows of groups of tokens that are finished, on disk, for a run that goes on where another was interrupted."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

from ..errors import PartialEmbeddingError
from ..files.rows_file import write_atomically
from ..modules.digest import row_digests

__all__ = ["FinishedRows", "digest_of"]

_NUMBERS = 1024  # of each parameter go into the digest


class FinishedRows:
    """Files with the rows of one group each, `group-00000.safetensors` and so on.

    Args:
        folder: made if it is not there.
        key: of all that the rows depend on.

    Raises:
        `PartialEmbeddingError`: a file that is damaged, or of another run.
    """

    def __init__(self, folder: str | os.PathLike[str], key: str) -> None:
        self.folder, self.key = Path(folder), key
        for path in sorted(self.folder.glob("group-*.safetensors")):
            self._read(path)

    def _path(self, number: int) -> Path:
        return self.folder / f"group-{number:05}.safetensors"

    def get(self, number: int) -> Tensor | None:
        """The rows of a group, `[G, d]`; `None` where they are not finished."""
        path = self._path(number)
        return self._read(path) if path.exists() else None

    def put(self, number: int, rows: Tensor) -> None:
        self.folder.mkdir(parents=True, exist_ok=True)
        held = {"rows": rows.detach().cpu().contiguous()}
        # The digest of the numbers, since safetensors does not notice one that has changed.
        header = {"distilled": json.dumps({"key": self.key, "digest": digest_of([held["rows"]])})}
        write_atomically(self._path(number), lambda temporary: save_file(held, temporary, metadata=header))

    def _read(self, path: Path) -> Tensor:
        remedy = "Give another folder, or delete this one to begin anew."
        try:
            with safe_open(path, framework="pt") as file:
                header = json.loads((file.metadata() or {})["distilled"])
                rows: Tensor = file.get_tensor("rows")
            key, digest = header["key"], header["digest"]
        except (SafetensorError, OSError, ValueError, KeyError, TypeError) as error:
            raise PartialEmbeddingError(
                f"{path} does not hold distilled rows, or is damaged: {type(error).__name__}. {remedy}"
            ) from None
        if key != self.key:
            raise PartialEmbeddingError(
                f"{path} holds rows that were distilled from another model or for other tokens, texts, settings or "
                f"another seed. {remedy}"
            )
        if digest != digest_of([rows]):
            raise PartialEmbeddingError(f"{path} is damaged: its numbers are not those that were written. {remedy}")
        return rows


def digest_of(parts: Iterable[Any]) -> str:
    """SHA-256 of tensors' numbers, of the first numbers of modules' parameters, and of other values' text."""
    digest = hashlib.sha256()
    for part in parts:
        if isinstance(part, nn.Module):
            for name, parameter in part.named_parameters():
                digest.update(f"{name} {tuple(parameter.shape)} {parameter.dtype}".encode())
                if not parameter.is_meta:
                    digest.update(_bytes(parameter.detach().reshape(-1)[:_NUMBERS]))
        elif isinstance(part, Tensor):
            digest.update(f"{tuple(part.shape)} {part.dtype}".encode())
            digest.update(_bytes(row_digests(part)) if part.dim() > 1 else _bytes(part))
        else:
            digest.update(repr(part).encode())
    return digest.hexdigest()


def _bytes(values: Tensor) -> bytes:
    return values.detach().cpu().contiguous().view(torch.uint8).numpy().tobytes()
