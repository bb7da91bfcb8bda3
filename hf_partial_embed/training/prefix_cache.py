"""What a frozen prefix leaves behind for the next epochs: keys, values and hidden states, text by text.

A batch is composed anew in every epoch, so what is kept belongs to a text, not to a batch: the positions before its
own first new token. Each tensor of an entry has the positions first, so that the first `n` of them, which is what a
batch asks for, are one piece of memory or of the file.
"""

from __future__ import annotations

import logging
import os
import tempfile
import weakref
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any

import torch
from torch import Tensor

from ..errors import PartialEmbeddingError, count

__all__ = ["PrefixCache"]

logger = logging.getLogger(__name__)


@dataclass
class _Entry:
    """What is kept of one text.

    Attributes:
        inputs: what it was computed from, position by position.
        normalizers: of the head's logits, position by position; NaN where they are not known yet.
        tensors: in memory; if they are in the file, tensors of no positions.
        devices: of the tensors that were given.
        offsets: in the file.
        size: in bytes.
    """

    inputs: Tensor
    normalizers: Tensor
    tensors: list[Tensor]
    devices: list[torch.device]
    offsets: list[int] | None
    size: int


class PrefixCache:
    """Where a `FrozenPrefix` keeps keys, values and hidden states from one epoch to the next.

    Texts are taken as they come until the next one would go beyond the bound; those without an entry are computed
    in every epoch, as without a cache, and one warning says how many have one. Nothing is replaced: all texts come
    equally often, so an entry in another's place would gain nothing.

    It is empty when a training begins, and again when it ends. Entries in a folder are in one file without a name,
    which the operating system takes back when the process ends, however it ends.

    Args:
        max_bytes (`int`): the most that all entries may take. A position takes `layers × 2 × key-value heads ×
            head size + hidden size` numbers, and 28 bytes: 48 kB in float32 for SmolLM2-135M, 139 kB in bfloat16 for
            Llama 3 8B.
        folder (`str` or `os.PathLike`, *optional*): an existing folder on a disk with room for the entries; in
            memory if not given.

    Raises:
        `PartialEmbeddingError`: a bound below 1, or a folder that is none.
    """

    def __init__(self, max_bytes: int = 4 << 30, folder: str | os.PathLike[str] | None = None) -> None:
        if isinstance(max_bytes, bool) or not isinstance(max_bytes, int) or max_bytes < 1:
            raise PartialEmbeddingError(f"max_bytes={max_bytes!r} must be a whole number of bytes, at least 1.")
        if folder is not None and not Path(folder).is_dir():
            raise PartialEmbeddingError(f"There is no folder {os.fspath(folder)!r} for a prefix cache. Make it.")
        self.max_bytes = max_bytes
        self.folder = folder
        self.clear()

    def __reduce__(self) -> Any:  # a copy begins empty: entries may be gigabytes, and belong to one training
        return PrefixCache, (self.max_bytes, self.folder)

    def __len__(self) -> int:
        return len(self._entries)

    def clear(self) -> None:
        """Forget all entries and give back their memory, or their file."""
        self.bytes = 0  # that the entries take
        self.position_bytes = 0.0  # of the latest entry
        self._entries: dict[bytes, _Entry] = {}
        self._head: Any = None  # the state of the head that normalizers are of
        self.closed: str | None = None  # why it takes no more
        self.silent = False
        file: IO[bytes] | None = getattr(self, "_file", None)
        self._file: IO[bytes] | None = None
        if file is not None:
            file.close()

    def close(self, reason: str) -> None:
        """Take no more entries, and say why."""
        self.closed = reason
        if not self.silent:
            self.silent = True  # once is enough
            logger.warning(
                "The prefixes of %s are kept for the next epochs; others are computed each time: %s.",
                count(list(self._entries), "text"),
                reason,
            )

    def has_room(self, positions: int) -> bool:
        """Whether an entry of so many positions is likely to be taken."""
        return not self.closed and self.bytes + positions * self.position_bytes <= self.max_bytes

    def covers(self, key: bytes, inputs: Tensor) -> bool:
        """Whether there is an entry of a text that begins with these inputs."""
        entry = self._entries.get(key)
        return entry is not None and torch.equal(entry.inputs[: len(inputs)], inputs)

    def keep(self, key: bytes, inputs: Tensor, tensors: list[Tensor]) -> None:
        """Keep copies of tensors of shape `(positions, ...)`, if there is room for them.

        Args:
            key: of the text.
            inputs: what the tensors were computed from, `(positions, inputs)`.
            tensors: the positions first.
        """
        old = self._entries.get(key)
        if self.closed or (old is not None and len(old.inputs) >= len(inputs)):
            return
        normalizers = torch.full((len(inputs),), torch.nan, dtype=torch.promote_types(torch.float32, tensors[0].dtype))
        if old is not None:
            normalizers[: len(old.normalizers)] = old.normalizers
        size = inputs.nbytes + normalizers.nbytes + sum(tensor.nbytes for tensor in tensors)
        self.position_bytes = size / max(1, len(inputs))
        if self.bytes + size > self.max_bytes:
            what = f"{_size(self.bytes)} of the {_size(self.max_bytes)} that it may take are in use"
            self.close(f"{what}, and the next text needs {_size(size)}")
            return
        kept, offsets = [torch.empty(tensor.shape, dtype=tensor.dtype).copy_(tensor) for tensor in tensors], None
        if self.folder is None:
            self.bytes -= old.size if old is not None else 0  # of the file there is no part to give back
        else:
            try:
                offsets = self._write(kept)
            except OSError as error:
                self.close(f"the file in {os.fspath(self.folder)!r} cannot be written: {error}")
                return
            kept = [tensor[:0].clone() for tensor in kept]
        self.bytes += size
        devices = [tensor.device for tensor in tensors]
        self._entries[key] = _Entry(inputs.clone(), normalizers, kept, devices, offsets, size)

    def read_into(self, key: bytes, targets: list[Tensor]) -> None:
        """Copy the first positions of an entry into tensors `(positions, ...)`, on any device."""
        entry = self._entries[key]
        for number, target in enumerate(targets):
            tensor = entry.tensors[number]
            if entry.offsets is None:
                target.copy_(tensor[: len(target)])
            else:
                target.copy_(self._read(entry.offsets[number], torch.empty(target.shape, dtype=tensor.dtype)))

    def normalizers_of(self, head: Any, keys: Sequence[bytes | None]) -> list[Tensor | None]:
        """Normalizers of entries, `(positions,)` each, to be read and to be filled in.

        Args:
            head: the state of the head. Normalizers of another state are forgotten.
            keys: of the entries; a tensor is `None` where its key is.
        """
        if head != self._head:
            self._head = head
            for entry in self._entries.values():
                entry.normalizers.fill_(torch.nan)
        return [None if key is None else self._entries[key].normalizers for key in keys]

    def like(self, key: bytes, *shape: int) -> list[Tensor]:
        """New tensors of shape `(*shape, *the shape of a position)`, of dtype and device of an entry's tensors."""
        entry = self._entries[key]
        return [
            torch.empty(*shape, *tensor.shape[1:], dtype=tensor.dtype, device=device)
            for tensor, device in zip(entry.tensors, entry.devices, strict=True)
        ]

    def _write(self, tensors: list[Tensor]) -> list[int]:
        """Write tensors to the end of the file, or leave it as it was; gives where they begin."""
        if self._file is None:
            self._file = tempfile.TemporaryFile(dir=self.folder, buffering=0)  # noqa: SIM115 lives with the entries
            weakref.finalize(self, self._file.close)
        begin, offsets = self._file.seek(0, os.SEEK_END), []
        try:
            for tensor in tensors:
                offsets.append(self._file.tell())
                rest = _bytes_of(tensor)
                while rest:
                    rest = rest[self._file.write(rest) :]
        except OSError:
            self._file.truncate(begin)
            raise
        return offsets

    def _read(self, offset: int, tensor: Tensor) -> Tensor:
        file, rest = self._file, _bytes_of(tensor)
        assert file is not None
        file.seek(offset)
        while rest:
            read = file.readinto(rest)  # type: ignore[attr-defined]
            if not read:
                raise OSError(f"The prefix cache's file in {self.folder!r} has lost its end.")
            rest = rest[read:]
        return tensor


def _bytes_of(tensor: Tensor) -> memoryview:
    """The memory of a contiguous tensor on the CPU."""
    numbers: Any = tensor.detach().flatten().view(torch.uint8).numpy()
    return memoryview(numbers)


def _size(number: float) -> str:
    for unit in ("bytes", "kB", "MB"):
        if number < 1000:
            return f"{number:.1f} {unit}"
        number /= 1000
    return f"{number:,.1f} GB"
