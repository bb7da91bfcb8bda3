"""Loading a saved base model from a folder or the Hub: the model, its skeleton, its tokenizer, or one table.

No code of a repository is run and nothing is unpickled. Only the files that are needed are read.
"""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import torch
import transformers
from safetensors import safe_open
from torch import Tensor
from transformers import AutoConfig, AutoProcessor, AutoTokenizer

from ..errors import PartialEmbeddingError, shorten
from .checkpoints import checkpoint_files, checkpoint_folder, reading_errors
from .hub import hub_errors

__all__ = ["has_tokenizer", "input_table", "load_model", "load_tokenizer", "model_skeleton"]

_PROCESSOR_FILES = ("processor_config.json", "preprocessor_config.json")


def _model_class(source: str | os.PathLike[str]) -> tuple[Any, Any]:
    """The class that a checkpoint names, and its config."""
    with hub_errors(f"Cannot read the model {str(source)!r}"):
        config = AutoConfig.from_pretrained(source, trust_remote_code=False)
    names = list(config.architectures or [])
    found = next((cls for name in names if (cls := getattr(transformers, name, None)) is not None), None)
    if found is None:
        raise PartialEmbeddingError(
            f"The config of {str(source)!r} names the architectures {names}, none of which transformers "
            f"{transformers.__version__} has. Code of a repository is not run from here: load the model in Python and "
            "use the functions of the package."
        )
    return found, config


def load_model(source: str | os.PathLike[str]) -> Any:
    """A model in the class that its config names, in the dtype in which it was saved, on the CPU.

    Raises:
        `PartialEmbeddingError`: it cannot be read; its weights are a pickle; its class is not one of
            `transformers`.
    """
    cls, _ = _model_class(source)
    with hub_errors(f"Cannot load the model {str(source)!r}"):
        return cls.from_pretrained(source, dtype="auto", use_safetensors=True).eval()


def model_skeleton(source: str | os.PathLike[str]) -> Any:
    """The model on the meta device; only its config is read."""
    cls, config = _model_class(source)
    with torch.device("meta"):
        return cls(config)


def has_tokenizer(folder: str | os.PathLike[str]) -> bool:
    """Whether a folder holds a tokenizer."""
    return any((Path(folder) / name).is_file() for name in ("tokenizer.json", "tokenizer_config.json"))


def load_tokenizer(source: str | os.PathLike[str]) -> Any:
    """A tokenizer, or the processor that has it."""
    has_processor = any((Path(source) / name).is_file() for name in _PROCESSOR_FILES)
    with hub_errors(f"Cannot load the tokenizer of {str(source)!r}"):
        auto = AutoProcessor if has_processor else AutoTokenizer
        return auto.from_pretrained(source, trust_remote_code=False)


def input_table(source: str | os.PathLike[str]) -> Tensor:
    """The input embeddings of a saved model, `[V, d]`; no other tensor of its checkpoint is read.

    Raises:
        `PartialEmbeddingError`: the checkpoint has no tensor of that shape under a name that the model's class gives
            to its input embeddings.
    """
    model = model_skeleton(source)
    weight = model.get_input_embeddings().weight
    names = [name for name, value in model.named_parameters(remove_duplicate=False) if value is weight]
    # A checkpoint of the base model lacks the prefix that its parameters have in a model with a head, and vice versa.
    prefix = f"{model.base_model_prefix}."
    wanted = {*names, *(name.removeprefix(prefix) for name in names), *(prefix + name for name in names)}
    folder = checkpoint_folder(source)
    with reading_errors(source):
        for file in checkpoint_files(folder):
            with safe_open(folder / file, framework="pt") as opened:
                for key in opened.keys():  # noqa: SIM118
                    if key in wanted and tuple(opened.get_slice(key).get_shape()) == tuple(weight.shape):
                        table: Tensor = opened.get_tensor(key)
                        return table
    raise PartialEmbeddingError(
        f"The checkpoint {str(source)!r} has no tensor {shorten(sorted(wanted))} of shape {tuple(weight.shape)}, "
        f"which {type(model).__name__} has its input embeddings in."
    )
