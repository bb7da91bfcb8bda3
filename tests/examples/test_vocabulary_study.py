"""The study of how words enter a tokenizer: its arms on a small corpus."""

from __future__ import annotations

import importlib
from pathlib import Path

import pytest
from conftest import CORPUS, bpe_tokenizer

EXAMPLES = Path(__file__).parents[2] / "examples"


@pytest.fixture
def study(monkeypatch):
    monkeypatch.syspath_prepend(EXAMPLES)
    return importlib.import_module("vocabulary_study")


def test_merges_lengthen_no_word_and_more_rows_shorten_more(study):
    texts = [f"{line} Part {number} of spaces, names and prasedymium." for number in range(40) for line in CORPUS[:4]]
    found = study.study(bpe_tokenizer()._tokenizer, texts, [5, 20])
    assert set(found) == set(study.ARMS)
    for arm in study.ARMS[1:]:
        (few, longer), (many, longer_many) = found[arm]
        assert many <= few < 1 and longer == longer_many == 0
    assert "| chosen |" in study.markdown({"small": {"made up": found}})


def test_plot_leaves_out_what_was_not_recounted(study, tmp_path):
    pytest.importorskip("matplotlib")
    figures = {arm: [(0.9, 0), None if arm == "recounted" else (0.8, 0)] for arm in study.ARMS}
    study.plot({"small": {"made up": figures}}, [5, 20], tmp_path / "plot.png")
    assert (tmp_path / "plot.png").stat().st_size > 1000
    assert "| recounted | .9000 (0) |" in study.markdown({"small": {"made up": figures}})


def test_german_messages_are_read_from_po_files(study, tmp_path):
    (tmp_path / "de").mkdir()
    (tmp_path / "de" / "some.po").write_text(
        'msgid ""\nmsgstr ""\n"Language: de\\n"\n\nmsgid "Yes"\nmsgstr "Ja, \\"gern\\""\n\nmsgid "No"\nmsgstr ""\n'
        '"Nein "\n"danke\\n"\n', "utf-8",
    )  # fmt: skip
    assert study.german_messages([tmp_path]) == ['Ja, "gern"', "Nein danke\n"]
