"""The picture of the rows, and what an optional package's absence says."""

from __future__ import annotations

import sys

import pytest
import torch
from conftest import bpe_tokenizer, build_model

from hf_partial_embed import PartialEmbeddingError, add_tokens
from hf_partial_embed.evaluation import nearest_rows, plot_rows
from hf_partial_embed.optional import need

LOG = [
    *({"step": n, "loss": 5.0 - n / 10, "rows/leak": 0.01 * n, "rows/leak_elsewhere": 1e-3} for n in range(1, 9)),
    {"step": 8, "eval_loss": 4.0},
]


@pytest.fixture
def partial():
    tokenizer = bpe_tokenizer()
    model = build_model("llama", len(tokenizer))
    return add_tokens(model, tokenizer, ["<think>", "$x_1$ ☃\n", *(f"name{n}" for n in range(30))])


def texts(axes):
    return [text.get_text() for text in axes.texts]


def test_picture_has_curves_norms_and_neighbours(partial, tmp_path):
    pytest.importorskip("matplotlib")
    with torch.no_grad():
        next(partial.parameters())[0] = 2 * partial.model.get_input_embeddings().weight[40]
    figure = plot_rows(partial, LOG, path=tmp_path / "rows.png", num_neighbours=2)
    curve, histogram, neighbours, _ = figure.axes
    assert curve.lines[0].get_ydata().tolist() == [entry["loss"] for entry in LOG if "loss" in entry]
    assert {text.get_text() for text in curve.get_legend().get_texts()} == {
        "training loss", "held-out loss", "leak (right)", "leak, texts elsewhere (right)",
    }  # fmt: skip
    assert [text.get_text() for text in histogram.get_legend().get_texts()] == [
        "299 old rows",
        "32 new rows",
    ]  # one is the padding
    shown = texts(neighbours)
    assert shown[0] == "<think>" and shown[1].startswith(partial.tokenizer.decode([40])) and " 1.00" in shown[1]
    assert "$x_1$·\\u2603\\n" in shown and "and 8 more" in shown
    assert (tmp_path / "rows.png").stat().st_size > 10_000


def test_picture_without_a_log_says_so(partial):
    pytest.importorskip("matplotlib")
    assert "no log given" in texts(plot_rows(partial).axes[0])


def test_missing_package_is_an_error_that_names_the_extra(partial, monkeypatch):
    for name in [name for name in sys.modules if name.partition(".")[0] == "matplotlib"]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    with pytest.raises(
        PartialEmbeddingError, match=r'plot_rows needs matplotlib.*pip install "hf_partial_embed\[plot\]"'
    ):
        plot_rows(partial)


def test_a_package_that_lacks_something_of_its_own_says_that(monkeypatch, tmp_path):
    (tmp_path / "half_there.py").write_text("import not_there_at_all")
    monkeypatch.syspath_prepend(tmp_path)
    with pytest.raises(ModuleNotFoundError, match="not_there_at_all"):
        need("half_there", "plot", "a picture")


def test_nearest_rows_are_those_of_the_whole_product(monkeypatch):
    monkeypatch.setattr("hf_partial_embed.evaluation.neighbours._ROWS_AT_ONCE", 7)
    torch.manual_seed(0)
    rows, table = torch.randn(3, 8), torch.randn(40, 8)
    cosines, ids = nearest_rows(rows, table, 5, exclude=[2, 39])
    expected = torch.nn.functional.cosine_similarity(rows[:, None], table[None], dim=-1)
    expected[:, [2, 39]] = -1
    values, indices = expected.topk(5)
    torch.testing.assert_close(cosines, values)
    assert torch.equal(ids, indices)
    with pytest.raises(PartialEmbeddingError, match="8 wide and the table 4"):
        nearest_rows(rows, table[:, :4], 2)
    with pytest.raises(PartialEmbeddingError, match="39 neighbours were asked for; there are 38 rows"):
        nearest_rows(rows, table, 39, exclude=[2, 39])
