"""The benchmark of `evaluate`: what it takes for the forwards that are needed."""

from __future__ import annotations

import importlib
from pathlib import Path

import pytest
import torch
from conftest import bpe_tokenizer, build_model, snapshot

from hf_partial_embed import add_tokens


@pytest.fixture
def section(monkeypatch):
    monkeypatch.syspath_prepend(Path(__file__).parents[2] / "examples" / "benchmark")
    return importlib.import_module("evaluating")


def test_the_bare_forwards_are_those_of_evaluate(section):
    tokenizer = bpe_tokenizer()
    model = build_model("llama", len(tokenizer))
    before = snapshot(model)
    rows = section.evaluating(model, tokenizer, torch.device("cpu"), 1, tokens=5, texts=2)
    texts = section.paragraphs()
    words = section.words_of(texts, tokenizer, 5)
    assert len(words) == 5 and all(len(tokenizer.tokenize(word)) > 1 for word in words)
    assert [row["texts"] for row in rows] == ["2 with new tokens", "the same and 2 without"]
    for row in rows:
        assert 0 < row["positions, head"] <= row["positions, body"]
        assert row["evaluate"] > 0 and row["evaluate, to those inside"] > 1 and row["of it reading"] > 0
        assert row["evaluate, peak MB"] > 0 and row["body and head, peak MB"] > 0
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    # A text without a new token goes through the head once, though there are two readings.
    new = set(add_tokens(model, tokenizer, words).token_ids)
    plain = [ids for ids in tokenizer(texts, add_special_tokens=False)["input_ids"] if new.isdisjoint(ids)]
    assert rows[1]["positions, head"] - rows[0]["positions, head"] == sum(map(len, plain[:2]))
