"""Comparing saved checkpoints bit for bit, without loading a model."""

from __future__ import annotations

import json
import os
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, BinaryIO

from huggingface_hub import snapshot_download
from safetensors import SafetensorError, safe_open
from tqdm.auto import tqdm  # type: ignore[import-untyped]

from ..errors import PartialEmbeddingError, count, shorten
from .hub import hub_errors

__all__ = [
    "CheckpointReport",
    "TableReport",
    "checkpoint_files",
    "checkpoint_folder",
    "reading_errors",
    "verify_checkpoint",
]

_PIECE_BYTES = 1 << 22
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
        """Whether the adapted checkpoint equals the base bit for bit, apart from the rows that were added to it."""
        return not (self.changed or self.missing or self.unexpected or self.changed_ids)

    def __str__(self) -> str:
        lines = [f"{count(range(self.compared), 'tensor')} compared"]
        for name, table in self.tables.items():
            changed = f"{count(table.changed_ids, 'row')} changed"
            changed += f" ({shorten(table.changed_ids)})" if table.changed_ids else ""
            lines.append(f"{name}: {table.base_rows} rows, {changed}, {count(table.added_ids, 'row')} added")
        for label, names in (("changed", self.changed), ("missing", self.missing), ("unexpected", self.unexpected)):
            if names:
                lines.append(f"{label}: {shorten(names)}")
        return "\n".join(lines)


def verify_checkpoint(
    base: str | os.PathLike[str], adapted: str | os.PathLike[str], *, progress: bool = False
) -> CheckpointReport:
    """Compare two saved checkpoints: which embedding rows and which other tensors differ, bit for bit.

    No model is loaded, and memory does not grow with its size.

    Args:
        base: folder or Hub id of the checkpoint before.
        adapted: folder or Hub id of the one after.
        progress: whether to show a bar on stderr.

    Returns:
        `CheckpointReport`.

    Raises:
        `PartialEmbeddingError`: one of them has no safetensors files, or damaged ones.
    """
    with ExitStack() as stack:
        old, new = (_Checkpoint(source, stack) for source in (base, adapted))
        report = CheckpointReport(
            missing=sorted(old.tensors.keys() - new.tensors.keys()),
            unexpected=sorted(new.tensors.keys() - old.tensors.keys()),
        )
        both = sorted(old.tensors.keys() & new.tensors.keys())
        for name in tqdm(both, desc="comparing", unit=" tensors", disable=not progress):
            _compare(name, old, new, report)
        return report


def _compare(name: str, old: _Checkpoint, new: _Checkpoint, report: CheckpointReport) -> None:
    report.compared += 1
    before, after = old.tensors[name], new.tensors[name]
    shape, new_shape = before.shape, after.shape
    is_table = bool(shape) and shape[0] in old.sizes and bool(new_shape) and new_shape[0] in new.sizes
    comparable = before.dtype == after.dtype and shape[1:] == new_shape[1:] and len(shape) == len(new_shape)
    if not comparable or (shape != new_shape and not (is_table and new_shape[0] > shape[0])):
        report.changed.append(name)
    elif is_table:
        report.tables[name] = TableReport(shape[0], new_shape[0], list(_changed_rows(before, after, shape[0])))
    elif next(_changed_rows(before, after, 1), None) is not None:
        report.changed.append(name)


@dataclass(frozen=True)
class _StoredTensor:
    """Where a safetensors file has the bytes of a tensor.

    The file is read, not memory-mapped: mapped pages would count as memory of the process.
    """

    file: BinaryIO
    start: int
    size: int
    shape: list[int]
    dtype: str

    def read(self, offset: int, size: int) -> bytes:
        self.file.seek(self.start + offset)
        return self.file.read(size)


def _changed_rows(old: _StoredTensor, new: _StoredTensor, rows: int) -> Iterator[int]:
    """Numbers of the rows whose bytes differ; `old` is read as `rows` rows of equal width."""
    width = old.size // max(1, rows)
    step = max(1, _PIECE_BYTES // max(1, width))
    for first in range(0, rows, step):
        size = min(step, rows - first) * width
        for offset in range(first * width, first * width + size, _PIECE_BYTES):
            length = min(_PIECE_BYTES, first * width + size - offset)
            a, b = old.read(offset, length), new.read(offset, length)
            if a != b and width > _PIECE_BYTES:
                yield first
                break
            if a != b:
                starts = range(0, length, width)
                yield from (first + row for row, at in enumerate(starts) if a[at : at + width] != b[at : at + width])


@contextmanager
def reading_errors(source: str | os.PathLike[str]) -> Iterator[None]:
    """Turn any error of reading a damaged checkpoint into a `PartialEmbeddingError` that names the checkpoint."""
    try:
        yield
    except (SafetensorError, OSError, ValueError, LookupError, TypeError, AttributeError) as error:
        if isinstance(error, PartialEmbeddingError):
            raise
        raise PartialEmbeddingError(
            f"Cannot read the checkpoint {str(source)!r}: {type(error).__name__}: {error}"
        ) from error


class _Checkpoint:
    """Where the files of a saved checkpoint have its tensors, and the sizes of its vocabularies."""

    def __init__(self, source: str | os.PathLike[str], stack: ExitStack) -> None:
        folder = checkpoint_folder(source)
        with reading_errors(source):
            self.tensors = {
                name: tensor
                for file in checkpoint_files(folder)
                for name, tensor in _stored_tensors(folder / file, stack)
            }
            self.sizes = set(_vocabulary_sizes(folder))


def _stored_tensors(path: Path, stack: ExitStack) -> Iterator[tuple[str, _StoredTensor]]:
    with safe_open(path, framework="pt"):  # validates the header
        file = stack.enter_context(path.open("rb"))
    length = int.from_bytes(file.read(8), "little")
    for name, entry in json.loads(file.read(length)).items():
        if name != "__metadata__":
            start, stop = entry["data_offsets"]
            yield name, _StoredTensor(file, 8 + length + start, stop - start, entry["shape"], entry["dtype"])


def checkpoint_folder(source: str | os.PathLike[str]) -> Path:
    """The folder of a checkpoint, downloaded where it is a Hub id."""
    path = Path(source)
    if os.path.isdir(path):
        return path
    with hub_errors(f"Cannot read the checkpoint {str(source)!r}"):
        return Path(snapshot_download(str(source), allow_patterns=["*.safetensors", _INDEX, "config.json"]))


def checkpoint_files(folder: Path) -> list[str]:
    """Names of the safetensors files of a checkpoint; names that lead out of its folder are refused."""
    if (folder / _INDEX).is_file():
        index = json.loads((folder / _INDEX).read_text("utf-8"))
        files = sorted(set(index["weight_map"].values()))
        if any(Path(file).name != file for file in files):
            raise ValueError(f"its {_INDEX} names files outside of the folder: {shorten(files)}")
        return files
    if (folder / _SINGLE).is_file():
        return [_SINGLE]
    there = sorted(entry.name for entry in folder.iterdir()) if folder.is_dir() else []
    raise PartialEmbeddingError(
        f"{folder} has no {_SINGLE} and no {_INDEX}; it holds {there[:10]}. Save the model with save_pretrained."
    )


def _vocabulary_sizes(folder: Path) -> Iterator[int]:
    """Every `vocab_size` of the config and of its sub-configs."""
    path = folder / "config.json"
    pending: list[Any] = [json.loads(path.read_text("utf-8"))] if path.is_file() else []
    while pending:
        config = pending.pop()
        for key, value in config.items():
            if isinstance(value, dict):
                pending.append(value)
            elif "vocab_size" in key and key != "type_vocab_size" and type(value) is int:  # counts segments
                yield value
