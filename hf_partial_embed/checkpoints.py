"""Comparing saved checkpoints bit for bit, without loading a model."""

from __future__ import annotations

import json
import os
from collections.abc import Iterator
from contextlib import ExitStack
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from huggingface_hub import snapshot_download
from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalEntryNotFoundError
from safetensors import SafetensorError, safe_open
from torch import Tensor

from .errors import PartialEmbeddingError, count, shorten

__all__ = ["CheckpointReport", "TableReport", "verify_checkpoint"]

_CHUNK_BYTES = 1 << 24
_INDEX = "model.safetensors.index.json"
_SINGLE = "model.safetensors"


@dataclass
class TableReport:
    """What differs in a tensor that has a row for each token.

    Attributes:
        base_rows, adapted_rows: number of rows in each checkpoint.
        changed_ids: rows of the base that differ in any bit.
    """

    base_rows: int
    adapted_rows: int
    changed_ids: list[int]

    @property
    def added_ids(self) -> list[int]:
        """Rows that only the adapted checkpoint has."""
        return list(range(self.base_rows, self.adapted_rows))


@dataclass
class CheckpointReport:
    """What `verify_checkpoint` found.

    Attributes:
        tables: each tensor over the vocabulary, by name.
        changed: names of other tensors that differ in any bit, in shape or in dtype.
        missing, unexpected: names of tensors that only the base, or only the adapted checkpoint has.
        compared: number of tensors compared.
    """

    tables: dict[str, TableReport] = field(default_factory=dict)
    changed: list[str] = field(default_factory=list)
    missing: list[str] = field(default_factory=list)
    unexpected: list[str] = field(default_factory=list)
    compared: int = 0

    @property
    def changed_ids(self) -> list[int]:
        """Rows of the base that differ in any table."""
        return sorted({row for table in self.tables.values() for row in table.changed_ids})

    @property
    def only_added_rows(self) -> bool:
        """Whether the adapted checkpoint is the base, bit for bit, but for rows that the base has not."""
        return not (self.changed or self.missing or self.unexpected or self.changed_ids)

    def __str__(self) -> str:
        lines = [f"{self.compared} tensors compared"]
        for name, table in self.tables.items():
            changed = f"{count(table.changed_ids, 'row')} changed"
            changed += f" ({shorten(table.changed_ids)})" if table.changed_ids else ""
            lines.append(f"{name}: {table.base_rows} rows, {changed}, {count(table.added_ids, 'row')} added")
        for label, names in (("changed", self.changed), ("missing", self.missing), ("unexpected", self.unexpected)):
            if names:
                lines.append(f"{label}: {shorten(names)}")
        return "\n".join(lines)


def verify_checkpoint(base: str | os.PathLike[str], adapted: str | os.PathLike[str]) -> CheckpointReport:
    """Compare two saved checkpoints: which embedding rows and which other tensors differ, bit for bit.

    No model is loaded, and memory does not grow with its size.

    Args:
        base: folder or Hub id of the checkpoint before.
        adapted: folder or Hub id of the one after.

    Returns:
        `CheckpointReport`.

    Raises:
        `PartialEmbeddingError`: one of them has no safetensors files, or damaged ones.
    """
    with ExitStack() as stack:
        old, new = (_Checkpoint(source, stack) for source in (base, adapted))
        report = CheckpointReport(missing=sorted(old.names - new.names), unexpected=sorted(new.names - old.names))
        for name in sorted(old.names & new.names):
            _compare(name, old, new, report)
        return report


def _compare(name: str, old: _Checkpoint, new: _Checkpoint, report: CheckpointReport) -> None:
    report.compared += 1
    (shape, dtype), (new_shape, new_dtype) = old.describe(name), new.describe(name)
    is_table = bool(shape) and shape[0] in old.sizes and bool(new_shape) and new_shape[0] in new.sizes
    comparable = dtype == new_dtype and shape[1:] == new_shape[1:] and len(shape) == len(new_shape)
    if not comparable or (shape != new_shape and not (is_table and new_shape[0] > shape[0])):
        report.changed.append(name)
        return
    changed = [row for rows in _changed_rows(name, old, new, shape) for row in rows]
    if is_table:
        report.tables[name] = TableReport(shape[0], new_shape[0], changed)
    elif changed:
        report.changed.append(name)


def _changed_rows(name: str, old: _Checkpoint, new: _Checkpoint, shape: list[int]) -> Iterator[list[int]]:
    if not shape:
        yield [] if _same_bits(old.tensor(name), new.tensor(name)).all() else [0]
        return
    width = max(1, 8 * int(torch.Size(shape[1:]).numel()))
    step = max(1, _CHUNK_BYTES // width)
    for start in range(0, shape[0], step):
        stop = min(start + step, shape[0])
        same = _same_bits(old.rows(name, start, stop), new.rows(name, start, stop))
        yield (~same).nonzero().flatten().add(start).tolist()


def _same_bits(a: Tensor, b: Tensor) -> Tensor:
    """For each row whether all of its bits are the same."""
    raw_a, raw_b = (t.contiguous().reshape(len(t) if t.dim() else 1, -1).view(torch.uint8) for t in (a, b))
    return (raw_a == raw_b).all(1)


class _Checkpoint:
    """The tensors of a saved checkpoint, read piece by piece."""

    def __init__(self, source: str | os.PathLike[str], stack: ExitStack) -> None:
        self.folder = _folder(source)
        try:
            files = _files(self.folder)
            self._handles: dict[str, Any] = {
                file: stack.enter_context(safe_open(self.folder / file, framework="pt")) for file in files
            }
        except (SafetensorError, OSError, ValueError) as error:
            if isinstance(error, PartialEmbeddingError):
                raise
            raise PartialEmbeddingError(f"Cannot read the checkpoint {self.folder}: {error}") from error
        self._where = {name: handle for handle in self._handles.values() for name in handle.keys()}  # noqa: SIM118
        self.names = set(self._where)
        self.sizes = set(_vocabulary_sizes(self.folder))

    def describe(self, name: str) -> tuple[list[int], str]:
        """Shape and dtype."""
        part = self._where[name].get_slice(name)
        return list(part.get_shape()), str(part.get_dtype())

    def tensor(self, name: str) -> Tensor:
        tensor: Tensor = self._where[name].get_tensor(name)
        return tensor

    def rows(self, name: str, start: int, stop: int) -> Tensor:
        rows: Tensor = self._where[name].get_slice(name)[start:stop]
        return rows


def _folder(source: str | os.PathLike[str]) -> Path:
    path = Path(source)
    if path.is_dir():
        return path
    patterns = ["*.safetensors", _INDEX, "config.json"]
    try:
        return Path(snapshot_download(str(source), allow_patterns=patterns))
    except (HFValidationError, HfHubHTTPError, LocalEntryNotFoundError) as error:
        raise PartialEmbeddingError(
            f"{str(source)!r} is no folder here, and no repository on the Hub that can be read: {error}"
        ) from error


def _files(folder: Path) -> list[str]:
    if (folder / _INDEX).is_file():
        index = json.loads((folder / _INDEX).read_text("utf-8"))
        return sorted(set(index["weight_map"].values()))
    if (folder / _SINGLE).is_file():
        return [_SINGLE]
    there = sorted(entry.name for entry in folder.iterdir())
    raise PartialEmbeddingError(f"{folder} has no {_SINGLE} and no {_INDEX}; it holds {there[:10]}.")


def _vocabulary_sizes(folder: Path) -> Iterator[int]:
    """Every `vocab_size` of the config, those of its sub-configs included."""
    path = folder / "config.json"
    pending: list[Any] = [json.loads(path.read_text("utf-8"))] if path.is_file() else []
    while pending:
        config = pending.pop()
        for key, value in config.items():
            if isinstance(value, dict):
                pending.append(value)
            elif "vocab_size" in key and type(value) is int:
                yield value
