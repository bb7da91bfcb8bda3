"""What the formats share: finding, reading and writing safetensors and JSON files; pickles are refused."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import torch
from huggingface_hub import hf_hub_download
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from ..errors import PartialEmbeddingError
from ..files.hub import hub_errors
from ..files.rows_file import write_atomically

__all__ = ["PICKLES", "fetch", "load_tensors", "refuse_pickle", "write_json", "write_tensors"]

PICKLES = (".bin", ".pt", ".pth", ".ckpt", ".pkl")


def refuse_pickle(path: str | os.PathLike[str]) -> None:
    """Refuse a file that can only be read by unpickling, which can run code that the file contains."""
    if Path(path).suffix.lower() in PICKLES:
        raise PartialEmbeddingError(
            f"{path} is a pickle, which can run code when it is read; nothing here unpickles. Ask for a .safetensors "
            "file, or convert it where you trust it: safetensors.torch.save_file(torch.load(path, "
            "weights_only=True), 'file.safetensors')."
        )


def fetch(source: str | os.PathLike[str], name: str, *, revision: str | None = None) -> Path:
    """The path of a file in a folder, or downloaded from a Hub repository.

    Raises:
        `PartialEmbeddingError`: there is no such file.
    """
    folder = Path(source)
    if folder.is_dir():
        if not (folder / name).is_file():
            there = sorted(entry.name for entry in folder.iterdir())
            raise PartialEmbeddingError(f"The folder {folder} has no {name}; it holds {there[:10]}.")
        return folder / name
    with hub_errors(f"Cannot read {name} from {str(source)!r}", revision):
        return Path(hf_hub_download(str(source), name, revision=revision))


def load_tensors(path: Path) -> dict[str, Tensor]:
    """All tensors of a safetensors file, on the CPU; infinite and NaN values are refused."""
    refuse_pickle(path)
    try:
        tensors: dict[str, Tensor] = load_file(path)
    except (SafetensorError, OSError, ValueError) as error:
        raise PartialEmbeddingError(f"Cannot read {path}: {type(error).__name__}: {error}") from error
    for name, tensor in tensors.items():
        if tensor.is_floating_point() and not torch.isfinite(tensor).all():
            raise PartialEmbeddingError(f"{path} holds infinite or NaN values in {name!r}. Nothing was loaded.")
    return tensors


def write_tensors(path: Path, tensors: dict[str, Tensor]) -> None:
    """Write a safetensors file atomically: see `write_atomically`."""
    copies = {name: tensor.detach().clone(memory_format=torch.contiguous_format) for name, tensor in tensors.items()}
    write_atomically(path, lambda temporary: save_file(copies, temporary, metadata={"format": "pt"}))


def write_json(path: Path, value: dict[str, Any]) -> None:
    text = json.dumps(value, indent=2, sort_keys=True, ensure_ascii=False) + "\n"
    write_atomically(path, lambda temporary: temporary.write_text(text, "utf-8"))
