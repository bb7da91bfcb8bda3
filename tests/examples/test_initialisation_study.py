"""The study of initialisers: its pure parts, and (slow) its smallest setting on the real model."""

from __future__ import annotations

import copy
import importlib
import json
import math
from pathlib import Path

import pytest
import torch
from added import add_tokens
from conftest import bpe_tokenizer, build_model

EXAMPLES = Path(__file__).parents[2] / "examples"


@pytest.fixture
def study(monkeypatch):
    monkeypatch.syspath_prepend(EXAMPLES)
    return importlib.import_module("initialisation_study")


def test_perplexity_of_unrelated_text_is_that_of_the_grown_model(study):
    model, tokenizer = build_model("llama", 300, tied=False), bpe_tokenizer()
    with torch.no_grad():
        model.lm_head.weight.mul_(30)
    text = "A model reads tokens, and a token is a piece of a word."
    ids = torch.tensor([tokenizer(text)["input_ids"]])
    unrelated = study.Unrelated(model, tokenizer, text)

    def loss():
        with torch.no_grad():
            return model(input_ids=ids, labels=ids).loss.item()

    before = loss()
    partial = add_tokens(model, tokenizer, ["<x>", "<y>"])
    expected = 100 * math.expm1(loss() - before)
    assert unrelated.increase(partial.token_rows().output_rows) == pytest.approx(expected, abs=1e-3)


def test_rows_that_say_what_the_pieces_say_score_like_them(study):
    """A token whose row is that of its single piece, on a model that sees one token only: no KL at all."""
    model, tokenizer = build_model("llama", 300, tied=False), bpe_tokenizer()
    with torch.no_grad():
        for layer in model.model.layers:  # the residual stream passes by
            layer.self_attn.o_proj.weight.zero_()
            layer.mlp.down_proj.weight.zero_()
    place = study.Occurrence("The", " dysprosium", " is hard to get.")
    held_out = study.HeldOut(model, tokenizer, [place])
    last = tokenizer(place.word)["input_ids"][-1]
    row = model.get_input_embeddings().weight[last].clone()
    other = copy.deepcopy(model), bpe_tokenizer()
    partial = add_tokens(model, tokenizer, {place.word: row})
    scores = held_out.score(model, dict(zip(partial.tokens, partial.token_ids, strict=True)))
    assert scores["kl"] == pytest.approx(0, abs=1e-6)
    assert scores["leak"] == pytest.approx(1 / 301, rel=0.2)
    assert scores["nll"] == pytest.approx(math.log(301), rel=0.05)
    partial = add_tokens(*other, {place.word: torch.randn(16)})
    worse = held_out.score(other[0], dict(zip(partial.tokens, partial.token_ids, strict=True)))
    assert worse["kl"] > 1e-4


def test_table_has_mean_and_standard_deviation(study):
    ((method, cells),) = study.table([{"mean": {"kl": value}} for value in (1.0, 2.0, 3.0)])
    assert method == "mean" and cells["kl"] == (2.0, 1.0)


@pytest.mark.slow
def test_smallest_setting_on_the_real_model(study, tmp_path):
    arguments = ["--seeds", "5", "--words", "2", "--steps", "4", "--output", str(tmp_path)]
    (scores,) = study.main([*arguments, "--cache", str(tmp_path / "model")])
    assert scores["distill"]["kl"] < 0.8 * scores["subtoken_mean"]["kl"]
    assert scores["subtoken_mean"]["kl"] < scores["mean"]["kl"]
    assert scores["untied: distill + cached_head"]["nll"] < scores["untied: subtoken_mean"]["nll"]
    assert all(values["ppl"] < 0.5 for values in scores.values())
    assert json.loads((tmp_path / "results.json").read_text()) == [scores]
    assert (tmp_path / "initialisation_study.png").is_file()
