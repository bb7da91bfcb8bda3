"""The example that extends a model for a domain, with a small model in place of SmolLM2."""

from __future__ import annotations

import importlib
from pathlib import Path

from conftest import CORPUS, bpe_tokenizer, build_model
from transformers import AutoModelForCausalLM, AutoTokenizer

from hf_partial_embed import TokenRows

EXAMPLES = Path(__file__).parents[2] / "examples"


def test_domain_example_runs_from_choosing_to_a_checkpoint(monkeypatch, tmp_path, capsys):
    monkeypatch.syspath_prepend(EXAMPLES)
    module = importlib.import_module("domain_tokens")
    base, out, texts = tmp_path / "base", tmp_path / "out", tmp_path / "texts.txt"
    tokenizer = bpe_tokenizer()
    tokenizer.save_pretrained(base)
    build_model("llama", len(tokenizer)).save_pretrained(base)
    texts.write_text(
        "".join(f"{line} Case {n} of the terbium lanthanides.\n" for n in range(60) for line in CORPUS[:4])
    )
    reports = module.main([
        "--cache", str(base), "--texts", str(texts), "--out", str(out), "--count", "6", "--steps", "4",
        "--batch-size", "2", "--held-out", "4",
    ])  # fmt: skip
    tokens = reports["trained"].tokens
    assert tokens.after < tokens.before
    assert reports["trained"].bits_per_byte.before == reports["distilled"].bits_per_byte.before
    assert reports["trained"].bits_per_byte.after != reports["distilled"].bits_per_byte.after
    rows = TokenRows.from_pretrained(out / "rows")
    merged = AutoModelForCausalLM.from_pretrained(out / "merged")
    assert len(rows) == 6 and merged.get_input_embeddings().weight.shape[0] == len(tokenizer) + 6
    grown = AutoTokenizer.from_pretrained(out / "merged")
    assert tokenizer.get_vocab().items() <= grown.get_vocab().items()
    assert f"vllm serve {out / 'merged'}" in capsys.readouterr().out
