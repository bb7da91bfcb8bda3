"""The benchmark of distilling many tokens: which words and texts it takes."""

from __future__ import annotations

import importlib
from pathlib import Path

import pytest
from conftest import bpe_tokenizer


@pytest.fixture
def script(monkeypatch):
    monkeypatch.syspath_prepend(Path(__file__).parents[2] / "examples" / "benchmark")
    return importlib.import_module("distilling")


def test_texts_that_are_held_back_are_not_distilled_from(script):
    words = ("dysprosium", "praseodymium", "palladium")
    texts = [f"the {word} of {n} is it" for word in words for n in range(4 + len(word))]
    pool = script.words_of([*texts, "a rare lutetium is it", "only holmium"], bpe_tokenizer())
    assert sorted(pool) == sorted(f" {word}" for word in words)
    chosen, train, held_out = script.drawn(pool, 2)
    assert script.drawn(pool, 2) == (chosen, train, held_out)
    assert len(held_out) == 2 and not set(held_out) & set(train)
    assert all(sum(word in text for text in train) == script.TEXTS for word in chosen)
    with pytest.raises(SystemExit, match="have 3 words"):
        script.drawn(pool, 4)
