"""The promises over every architecture of `transformers` that has text embeddings.

A few different ones run with the other tests, all of them with `pytest -m sweep tests/layout/test_architectures.py`.
As a command this prints a table of what holds for which class, and totals:

    python tests/layout/test_architectures.py --jobs 2 [--strategy split|mask] [--ties default|flipped] [--only NAME]
"""

from __future__ import annotations

import argparse
import copy
import json
import os
import signal
import tempfile
import time
import traceback
import warnings
from collections import Counter
from collections.abc import Sequence
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context
from pathlib import Path
from typing import Any

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")

import pytest
import torch
import transformers
import zoo
from tqdm import tqdm
from zoo import NotInZoo

from hf_partial_embed import add_tokens, load_tokens

TOKENS = ["<new0>", "<new1>", "<new2>"]
SECONDS = 90  # for one class

# The kinds of layout that there are, each with a class that has it; with "flip" where its tie is the other one.
KINDS = {
    "a causal model": "LlamaForCausalLM",
    "a tied causal model": "GPT2LMHeadModel",
    "a causal model untied that is tied by default": "GPT2LMHeadModel flip",
    "a state space model": "Mamba2ForCausalLM",
    "a mixture of experts": "MixtralForCausalLM",
    "a hash table that routes tokens to experts": "DeepseekV4ForCausalLM",
    "a head with a bias": "PhiForCausalLM",
    "a head with a bias in an old class": "GPTJForCausalLM",
    "a tied head with a bias": "CTRLLMHeadModel",
    "a head bias that is a parameter of the model": "BertForMaskedLM",
    "a head bias that the model has twice": "RobertaForMaskedLM",
    "an untied head with a bias that the model has twice": "RobertaForMaskedLM flip",
    "a head bias apart from a tied decoder": "ModernBertForMaskedLM",
    "a head bias that is a buffer": "BartForConditionalGeneration",
    "a head bias in a permuting model": "XLNetLMHeadModel",
    "several pretraining heads": "BertForPreTraining",
    "factorised embeddings": "AlbertForMaskedLM",
    "factorised embeddings and a generator": "ElectraForMaskedLM",
    "a second output table": "MobileBertForMaskedLM",
    "scaled embeddings": "Gemma3ForCausalLM",
    "per-layer embeddings": "Gemma3nForCausalLM",
    "per-layer embeddings of a composite": "Gemma4ForConditionalGeneration",
    "normed embeddings": "Inkling2ForCausalLM",
    "a table shared by encoder, decoder and head": "T5ForConditionalGeneration",
    "an untied encoder-decoder with a table that nobody reads": "BartForConditionalGeneration flip",
    "an untied encoder-decoder whose shared table is read": "Florence2ForConditionalGeneration flip",
    "an encoder-decoder with separate positions": "MarianMTModel",
    "an untied encoder-decoder": "SeamlessM4Tv2ForTextToText flip",
    "an embedding wrapped twice": "ProphetNetForConditionalGeneration",
    "two vocabularies of one size": "FSMTForConditionalGeneration",
    "sizes that have to agree": "T5Gemma2ForConditionalGeneration",
    "a size under a name of its own": "XLMWithLMHeadModel",
    "a protein model": "EsmForMaskedLM",
    "a quantisation-aware embedding": "IBertForMaskedLM",
    "an encoder-decoder wrapper": "EncoderDecoderModel",
    "a wrapper with a vision encoder": "VisionEncoderDecoderModel",
    "a speech-to-text decoder": "WhisperForConditionalGeneration",
    "an image-text-to-text model": "LlavaForConditionalGeneration",
    "a head in a nested language model": "Blip2ForConditionalGeneration",
    "a nested head beside another vocabulary": "InstructBlipForConditionalGeneration",
    "a caption model with a head bias": "GitForCausalLM",
    "an input table with more rows than the head": "MllamaForConditionalGeneration",
    "rows behind the vocabulary that the model computes ids for": "CpmAntForCausalLM",
    "a text encoder": "CLIPTextModel",
    "two towers that do not name their embeddings": "CLIPModel",
    "a classification head over a language model": "LlamaForSequenceClassification",
    "a classification head over an encoder-decoder": "BartForSequenceClassification",
    "a classification head over a T5": "T5ForSequenceClassification",
    "an encoder": "BertModel",
    "a head that is the transposed table": "PerceiverForMaskedLM",
    "a text that begins as tokens drawn from the vocabulary": "DiffusionGemmaForBlockDiffusion",
}

# Run with the slow tests: they take longest, and what decides in them decides in a faster one, too.
SLOW_KINDS = {
    "an untied encoder-decoder whose shared table is read",
    "sizes that have to agree",
    "an encoder-decoder wrapper",
    "an untied encoder-decoder",
    "per-layer embeddings of a composite",
    "an image-text-to-text model",
    "a nested head beside another vocabulary",
    "a speech-to-text decoder",
    "a classification head over an encoder-decoder",
    "a classification head over a T5",
    "several pretraining heads",
    "a wrapper with a vision encoder",
    "a caption model with a head bias",
}

# What does not hold, and why: transformers' own limit, or ours. By class and check.
_TDT = "its head's last outputs, for durations, come behind the tokens', so they move when there are more tokens"
EXPLAINED: dict[tuple[str, str], str] = {
    ("ParakeetForTDT", check): _TDT for check in ("old_logits_float32", "old_logits_bfloat16", "train", "two_sets")
}

# Tables of the vocabulary that get no gradient in these models, and why.
NO_GRADIENT = {
    # Finds where patches end, and runs without gradients.
    "BltForCausalLM": "model.patcher.",
    "BltModel": "patcher.",
    # Heads that run only with labels for masked texts and images, which are not given here.
    "FlavaForPreTraining": "m",
}

# Not ours to mend, and not among the checks, which give the canvas: DiffusionGemma called without `decoder_input_ids`
# draws them by `torch.randint(high=config.text_config.vocab_size)`. With more tokens one seed draws other ids, so the
# outputs for the same prompt differ, as they do after `resize_token_embeddings`. See
# `test_a_canvas_drawn_from_the_vocabulary_is_all_that_differs`.


class Skip(Exception):
    """A check that has no meaning for a class, and why."""


def same_bits(a: torch.Tensor, b: torch.Tensor) -> bool:
    return a.shape == b.shape and bool(((a == b) | ((a != a) & (b != b))).all())


def assert_close(a: torch.Tensor, b: torch.Tensor) -> None:
    """Equal up to rounding, on the scale of the values: tiny models have tiny logits."""
    assert a.shape == b.shape, f"shapes {tuple(a.shape)} and {tuple(b.shape)}"
    a, b = a.float().nan_to_num(), b.float().nan_to_num()
    finite = b[b.abs() < 1e30]
    scale = float(finite.abs().max()) if finite.numel() else 1.0
    difference = float((a - b).abs().max())
    assert difference <= 1e-4 * scale, f"differ by {difference:.2e} on a scale of {scale:.2e}"


def output(model: Any, ids: torch.Tensor) -> torch.Tensor:
    with torch.no_grad():
        return zoo.run(model, ids)[1].detach()


def ties(model: Any) -> list[list[str]]:
    groups: dict[int, list[str]] = {}
    for name, parameter in model.named_parameters(remove_duplicate=False):
        if "new_rows" not in name:
            groups.setdefault(id(parameter), []).append(name)
    return sorted(sorted(names) for names in groups.values() if len(names) > 1)


def is_plain(value: Any) -> bool:
    """Whether a value can be compared with `==`."""
    if isinstance(value, (tuple, list)):
        return all(is_plain(item) for item in value)
    return isinstance(value, (int, str, bool, float, type(None)))


def state_of(model: Any, tokenizer: Any) -> dict[str, Any]:
    """Everything that must come back after `detach`."""
    return {
        "flags": {name: p.requires_grad for name, p in model.named_parameters(remove_duplicate=False)},
        "identities": {name: id(p) for name, p in model.named_parameters(remove_duplicate=False)},
        "types": {name: type(module) for name, module in model.named_modules(remove_duplicate=False)},
        "attributes": {
            name: {key: copy.deepcopy(value) for key, value in vars(module).items() if is_plain(value)}
            for name, module in model.named_modules()
        },
        "keys": {name: sorted(vars(module)) for name, module in model.named_modules()},
        "hooks": {name: (len(m._forward_hooks), len(m._forward_pre_hooks)) for name, m in model.named_modules()},
        "config": json.dumps(model.config.to_dict(), default=str, sort_keys=True),
        "tokenizer": tokenizer._tokenizer.to_str(),
        "length": len(tokenizer),
    }


def tensors_of(model: Any) -> dict[str, torch.Tensor]:
    buffers = {name: buffer.detach().clone() for name, buffer in model.named_buffers(remove_duplicate=False)}
    return buffers | {name: p.detach().clone() for name, p in model.named_parameters(remove_duplicate=False)}


def assert_same_state(now: dict[str, Any], before: dict[str, Any]) -> None:
    for key, value in before.items():
        if now[key] == value:
            continue
        if isinstance(value, dict):
            wrong = [k for k in {**value, **now[key]} if value.get(k) != now[key].get(k)]
            detail = f"{wrong[:3]}: {str(value.get(wrong[0]))[:150]} became {str(now[key].get(wrong[0]))[:150]}"
        else:
            at = next((i for i, (a, b) in enumerate(zip(str(value), str(now[key]), strict=False)) if a != b), 0)
            detail = f"{str(value)[max(0, at - 30) : at + 60]} became {str(now[key])[max(0, at - 30) : at + 60]}"
        raise AssertionError(f"{key} did not come back: {detail}")


def assert_same_tensors(now: dict[str, torch.Tensor], before: dict[str, torch.Tensor]) -> None:
    assert now.keys() == before.keys(), f"tensors differ: {sorted(now.keys() ^ before.keys())[:4]}"
    wrong = [name for name, tensor in before.items() if not same_bits(now[name], tensor)]
    assert not wrong, f"bits differ in {wrong[:4]}"


class Case:
    """One model class, and the checks on it. Each check builds what it needs, so that none disturbs another."""

    def __init__(self, name: str, strategy: str = "split", *, flip: bool = False) -> None:
        self.name, self.strategy = name, strategy
        self.tied: bool | None = None
        model = zoo.build_runnable(name)
        if flip:
            before = zoo.head_is_tied(model)
            if before is None:
                raise NotInZoo("no head whose tie could be flipped")
            self.tied = not before
            model = zoo.build_runnable(name, self.tied)
            if zoo.head_is_tied(model) is not self.tied:
                raise NotInZoo(f"its head stays {'tied' if before else 'untied'} whatever the config says")
        self.is_tied = zoo.head_is_tied(model)
        self.size = zoo.rows_of(model)
        self.model = model
        generator = torch.Generator().manual_seed(3)
        self.old_ids = torch.randint(zoo.FIRST_TEXT_ID, min(self.size, zoo.VOCAB) - 6, (2, 8), generator=generator)
        a, b = output(model, self.old_ids), output(model, self.old_ids)
        self.deterministic = same_bits(a, b)
        self.plain: tuple[Any, dict[str, Any]] | None = None
        self._trained: tuple[Any, Any, Any] | None = None

    def build(self, dtype: torch.dtype = torch.float32) -> Any:
        """A fresh model, the same every time."""
        try:
            return copy.deepcopy(self.model).to(dtype)
        except Exception:  # noqa: BLE001  # a forward of some leaves tensors behind that cannot be copied
            return zoo.build(self.name, self.tied, dtype)

    def tail(self) -> int:
        """Number of rows behind the vocabulary."""
        configs = {id(config): config for m in self.model.modules() if (config := getattr(m, "config", None))}
        sizes = [v for config in configs.values() for k, v in vars(config).items() if k.endswith("vocab_size")]
        return self.size - max((v for v in sizes if type(v) is int and v <= self.size), default=self.size)

    def ids(self, partial: Any) -> torch.Tensor:
        new = torch.tensor(partial.token_ids)
        ids = self.old_ids.clone()
        ids[0, 1 : 1 + len(new)] = new
        ids[1, 4 : 4 + len(new)] = new
        return ids

    def add(self, model: Any, tokenizer: Any, tokens: list[str] | None = None, **options: Any) -> Any:
        return add_tokens(model, tokenizer, tokens or TOKENS, strategy=self.strategy, **options)

    def step(self, model: Any, partial: Any, steps: int = 3) -> None:
        trainable = [p for p in model.parameters() if p.requires_grad]
        optimizer = torch.optim.AdamW(trainable, lr=1e-2, weight_decay=0.1)
        partial.protect(optimizer)
        for _ in range(steps):
            loss, _ = zoo.run(model, self.ids(partial))
            loss.backward()
            without = self.without_gradient(model, partial)
            assert not without, f"no gradient for {without}"
            optimizer.step()
            optimizer.zero_grad()

    def without_gradient(self, model: Any, partial: Any) -> list[str]:
        """Names of what should train and got no gradient."""
        ids = {id(p) for p in partial.parameters() if p.grad is None or not p.grad.any()}
        excused = NO_GRADIENT.get(self.name, "-")
        return [name for name, p in model.named_parameters() if id(p) in ids and not name.startswith(excused)]

    def trained(self) -> tuple[Any, Any, Any]:
        if self._trained is None:
            tokenizer = zoo.tokenizer_of(self.size)
            model = self.build().requires_grad_(False)
            partial = self.add(model, tokenizer)
            self.step(model, partial)
            self._trained = model, tokenizer, partial
        return self._trained

    def reload(self, model: Any, folder: str) -> tuple[Any, dict[str, Any]]:
        model.save_pretrained(folder)
        loaded, info = type(self.model).from_pretrained(folder, output_loading_info=True)
        return loaded.eval(), {key: sorted(map(str, info[key])) for key in info if info[key] and key != "error_msgs"}

    def plain_reload(self) -> tuple[Any, dict[str, Any]]:
        """What comes back of the model that has nothing added: the measure for the one that has."""
        if self.plain is None:
            with tempfile.TemporaryDirectory() as folder:
                self.plain = self.reload(copy.deepcopy(self.model), folder)
        return self.plain

    # --- checks -------------------------------------------------------------------------------------

    def check_transformers(self) -> None:
        """Not ours: whether transformers itself can grow the vocabulary and load what it saved."""
        model = self.build()
        before = output(model, self.old_ids)
        model.resize_token_embeddings(self.size + 3)
        ids = self.old_ids.clone()
        ids[0, 2] = self.size + 1
        logits = output(model, ids)
        zoo.run(model, ids)
        assert_close(output(model, self.old_ids)[..., : before.shape[-1]], before)
        with tempfile.TemporaryDirectory() as folder:
            loaded, info = self.reload(model, folder)
        plain = self.plain_reload()[1]
        assert info == plain, f"loading: {info}"
        assert_close(output(loaded, ids), logits)

    def check_plain_reload(self) -> None:
        """Not ours: whether the untouched model can be saved and loaded."""
        loaded, info = self.plain_reload()
        assert not info, f"loading: {info}"
        assert_close(output(loaded, self.old_ids), output(self.model, self.old_ids))
        assert ties(loaded) == ties(self.model), f"ties {ties(self.model)} became {ties(loaded)}"

    def _old_logits(self, dtype: torch.dtype) -> None:
        model = self.build(dtype)
        try:
            before = output(model, self.old_ids)
        except Exception as error:
            raise Skip(f"the plain model does not run in {dtype}: {zoo._reason(error)}") from error
        if not same_bits(before, output(model, self.old_ids)):
            raise Skip("the plain model is not deterministic")
        partial = self.add(model, zoo.tokenizer_of(self.size))
        after = output(model, self.old_ids)
        assert after.dtype == before.dtype, f"{before.dtype} became {after.dtype}"
        after = after[..., : before.shape[-1]]
        if self.strategy == "split":
            largest = float((after.float() - before.float()).abs().nan_to_num().max())
            assert same_bits(after, before), f"old logits differ by up to {largest:.2e}"
        else:
            torch.testing.assert_close(after, before, equal_nan=True)
        output(model, self.ids(partial))

    def check_old_logits_float32(self) -> None:
        self._old_logits(torch.float32)

    def check_old_logits_bfloat16(self) -> None:
        self._old_logits(torch.bfloat16)

    def check_train(self) -> None:
        """Exactly the rows are trainable, they move, and nothing else moves by one bit."""
        tokenizer = zoo.tokenizer_of(self.size)
        model = self.build().requires_grad_(False)
        before = tensors_of(model)
        partial = self.add(model, tokenizer)
        trainable = [p for p in model.parameters() if p.requires_grad]
        assert trainable
        assert {id(p) for p in trainable} == {id(p) for p in partial.parameters()}
        if self.strategy == "split":
            shapes = [tuple(p.shape) for p in trainable]
            assert all(shape[0] == len(TOKENS) for shape in shapes), f"trainable shapes {shapes}"
        start = partial.token_rows().tensors()
        self.step(model, partial)
        partial.verify()
        after = {**tensors_of(model)}
        wrong = []
        for name, tensor in before.items():
            now = after[name]
            for dim, size in enumerate(tensor.shape):
                now = now.narrow(dim, 0, size)
            if not same_bits(now, tensor):
                wrong.append(name)
        assert not wrong, f"moved: {wrong}"
        for name, rows in partial.token_rows().tensors().items():
            if self.name in NO_GRADIENT and name != "input_rows":
                continue
            still = [i for i, (a, b) in enumerate(zip(rows, start[name], strict=True)) if torch.equal(a, b)]
            assert not still, f"rows {still} of {name} did not move"

    def check_save_reload(self) -> None:
        model, _, partial = self.trained()
        ids = self.ids(partial)
        logits = output(model, ids)
        with tempfile.TemporaryDirectory() as folder:
            loaded, info = self.reload(model, folder)
            saved = json.loads((Path(folder) / "config.json").read_text())
        plain, plain_info = self.plain_reload()
        assert info == plain_info, f"loading: {info}"
        assert_close(output(loaded, ids), logits)
        expected = ties(self.model)
        if ties(plain) == expected:  # else transformers itself loses the tie
            assert ties(loaded) == expected, f"ties {expected} became {ties(loaded)}"
        rows = zoo.rows_of(loaded)
        text = self.model.config.get_text_config()
        assert rows == self.size + len(TOKENS) + self.tail(), f"{rows} rows"
        if getattr(text, "vocab_size", None) == self.size:
            now = loaded.config.get_text_config().vocab_size
            assert now == rows, f"config.vocab_size is {now} for {rows} rows"
            assert str(rows) in json.dumps(saved), "config.json"

    def check_rows(self) -> None:
        """Rows saved, and loaded by text into a fresh model."""
        model, _, partial = self.trained()
        tokenizer = zoo.tokenizer_of(self.size)
        with tempfile.TemporaryDirectory() as folder:
            partial.save_pretrained(folder)
            fresh = self.build()
            loaded = load_tokens(fresh, tokenizer, folder)
        assert loaded.token_ids == partial.token_ids
        ids = self.ids(partial)
        assert_close(output(fresh, ids), output(model, ids))

    def check_merge(self) -> None:
        model, _, partial = self.trained()
        self._trained = None
        ids = self.ids(partial)
        logits = output(model, ids)
        assert partial.merge() is model
        now = {name: type(module) for name, module in model.named_modules(remove_duplicate=False)}
        before = {name: type(module) for name, module in self.model.named_modules(remove_duplicate=False)}
        assert now == before, f"types differ: {[n for n in {**now, **before} if now.get(n) != before.get(n)][:4]}"
        assert ties(model) == ties(self.model)
        assert_close(output(model, ids), logits)

    def check_detach(self) -> None:
        tokenizer = zoo.tokenizer_of(self.size)
        model = self.build()
        output(model, self.old_ids)  # a forward of some leaves attributes behind
        state, tensors = state_of(model, tokenizer), tensors_of(model)
        partial = self.add(model, tokenizer)
        model.requires_grad_(False)
        partial.requires_grad_(True)
        self.step(model, partial, 1)
        for name, parameter in model.named_parameters(remove_duplicate=False):
            if state["flags"].get(name):
                parameter.requires_grad_(True)
        partial.detach()
        assert_same_state(state_of(model, tokenizer), state)
        assert_same_tensors(tensors_of(model), tensors)

    def check_two_sets(self) -> None:
        for order in ([0, 1], [1, 0]):
            tokenizer = zoo.tokenizer_of(self.size)
            model = self.build().requires_grad_(False)
            logits = output(model, self.old_ids)
            state, tensors = state_of(model, tokenizer), tensors_of(model)
            sets = [self.add(model, tokenizer, ["<newA>"]), self.add(model, tokenizer, ["<newB>", "<newC>"])]
            after = output(model, self.old_ids)[..., : logits.shape[-1]]
            assert_close(after, logits)
            for partial in sets:
                loss, _ = zoo.run(model, self.ids(partial))
                loss.backward()
                assert not self.without_gradient(model, partial), "a set has no gradient"
                model.zero_grad()
            ids = self.ids(sets[order[1]])
            expected = output(model, ids)
            sets[order[0]].detach()
            left = sets[order[1]]
            if left.token_ids == ids[0, 1 : 1 + len(left.token_ids)].tolist():
                now = output(model, self.ids(left))
                if now.shape[-1] < expected.shape[-1]:
                    expected = expected[..., : now.shape[-1]]
                assert_close(now, expected)
            left.detach()
            assert_same_state(state_of(model, tokenizer), state)
            assert_same_tensors(tensors_of(model), tensors)

    def check_spare_rows(self) -> None:
        """The model's table is longer than the tokenizer: nothing grows."""
        size = self.size - 5
        tokenizer = zoo.tokenizer_of(size)
        model = self.build().requires_grad_(False)
        if self.tail():
            raise Skip("its last rows are behind the vocabulary, which grows before them")
        before = tensors_of(model)
        partial = self.add(model, tokenizer)
        assert partial.token_ids == list(range(size, size + len(TOKENS)))
        assert zoo.rows_of(model) == self.size
        self.step(model, partial, 2)
        partial.verify()
        after = tensors_of(model)
        trained = {id(table) for _, table in partial.rows_and_tables()}
        tables = {n for n, p in model.named_parameters(remove_duplicate=False) if id(p) in trained}
        wrong = [n for n, tensor in before.items() if n not in tables and not same_bits(after[n], tensor)]
        assert not wrong, f"moved: {wrong}"
        ids = self.ids(partial)
        logits = output(model, ids)
        with tempfile.TemporaryDirectory() as folder:
            loaded, info = self.reload(model, folder)
        assert info == self.plain_reload()[1], f"loading: {info}"
        assert_close(output(loaded, ids), logits)

    def check_checkpointing(self) -> None:
        if not getattr(self.model, "supports_gradient_checkpointing", False):
            raise Skip("not supported")
        options = {"gradient_checkpointing_kwargs": {"use_reentrant": False}}
        try:
            plain = self.build()
            plain.gradient_checkpointing_enable(**options)
            zoo.run(plain.train(), self.old_ids)[0].backward()
            assert zoo.text_table(plain).grad.any()
        except Exception as error:
            raise Skip(f"not by the plain model: {zoo._reason(error)}") from error
        model = self.build().requires_grad_(False)
        partial = self.add(model, zoo.tokenizer_of(self.size))
        model.gradient_checkpointing_enable(**options)
        self.step(model.train(), partial, 1)

    def check_generate(self) -> None:
        if not hasattr(self.model, "generate") or not self.model.can_generate():
            raise Skip("does not generate")
        recipe = dict(zoo._recipe(self.model))
        recipe["ids"] = [name for name in recipe["ids"] if name != "labels"]

        def generate(model: Any, ids: torch.Tensor) -> torch.Tensor:
            arguments = zoo._arguments(model, ids, recipe)
            with torch.random.fork_rng():
                torch.manual_seed(5)
                return model.generate(**arguments, max_new_tokens=3, do_sample=False, pad_token_id=1)

        try:
            expected = generate(self.build(), self.old_ids)
            if not isinstance(expected, torch.Tensor):
                raise TypeError(f"generate gave {type(expected).__name__}")
        except Exception as error:
            raise Skip(f"not by the plain model: {zoo._reason(error)}") from error
        model = self.build().requires_grad_(False)
        partial = self.add(model, zoo.tokenizer_of(self.size))
        ids = self.ids(partial)
        attached = generate(model, ids)
        partial.merge()
        merged = generate(model, ids)
        assert attached.shape == merged.shape and bool((attached == merged).all()), "merged generates otherwise"

    def check_compile(self) -> None:
        def compiled(model: Any, ids: torch.Tensor) -> torch.Tensor:
            torch._dynamo.reset()
            run = torch.compile(model, backend="aot_eager", fullgraph=True)
            return zoo._main(run(**zoo._arguments(model, ids, zoo._recipe(model))))

        try:
            plain = self.build().requires_grad_(False)  # some compile only where all of them trains
            zoo.text_table(plain).requires_grad_(True)
            compiled(plain, self.old_ids).sum().backward()
        except Exception as error:
            raise Skip(f"not the plain model: {zoo._reason(error)}") from error
        model = self.build().requires_grad_(False)
        partial = self.add(model, zoo.tokenizer_of(self.size))
        ids = self.ids(partial)
        out = compiled(model, ids)
        assert_close(out.detach(), output(model, ids))
        out.float().sum().backward()
        excused = NO_GRADIENT.get(self.name, "-")
        trains = {name: p for name, p in model.named_parameters() if p.requires_grad and not name.startswith(excused)}
        assert trains and all(p.grad is not None for p in trains.values()), "no gradient"


CHECKS = [name.removeprefix("check_") for name in vars(Case) if name.startswith("check_")]
NOT_OURS = ("transformers", "plain_reload")
USUAL_CHECKS = [check for check in CHECKS if check != "compile"]  # which takes longer than all others


class _TooLong(BaseException):
    """The clock for one class ran out."""


def _alarm(*_: object) -> None:
    raise _TooLong


def examine(
    name: str, strategy: str = "split", *, flip: bool = False, checks: Sequence[str] = (), seconds: int = 0
) -> dict[str, Any]:
    """All checks on one class: `"ok"`, `"skip: ..."` or `"FAIL: ..."` each; or why there are none."""
    torch.set_num_threads(1)  # tiny tensors: more threads only wait for each other
    started = time.time()
    result: dict[str, Any] = {"class": name, "checks": {}, "left_out": None}
    if seconds:  # not under pytest, which has a clock of its own on the same signal
        signal.signal(signal.SIGALRM, _alarm)
        signal.alarm(seconds)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            try:
                case = Case(name, strategy, flip=flip)
            except NotInZoo as reason:
                result["left_out"] = str(reason)
                return result
            except Exception as error:  # noqa: BLE001
                result["left_out"] = zoo._reason(error)
                return result
            result["tied"] = case.is_tied
            for check in CHECKS:
                if check not in (checks or USUAL_CHECKS):
                    continue
                try:
                    getattr(case, f"check_{check}")()
                    outcome = "ok"
                except Skip as reason:
                    outcome = f"skip: {reason}"
                except Exception as error:  # noqa: BLE001
                    frames = traceback.extract_tb(error.__traceback__)
                    at = frames[-1]
                    ours = [f for f in frames if "hf_partial_embed" in f.filename]
                    where = f"{Path(at.filename).name}:{at.lineno}"
                    if ours:
                        where += f", from {Path(ours[-1].filename).name}:{ours[-1].lineno}"
                    outcome = f"FAIL: {zoo._reason(error)} [{where}]"
                result["checks"][check] = outcome
    except _TooLong:
        result["checks"]["time"] = f"FAIL: more than {seconds} s"
    finally:
        if seconds:
            signal.alarm(0)
        result["seconds"] = round(time.time() - started, 2)
    return result


def failures(result: dict[str, Any]) -> dict[str, str]:
    """The checks of ours that failed and are not explained."""
    return {
        check: outcome
        for check, outcome in result["checks"].items()
        if outcome.startswith("FAIL") and check not in NOT_OURS and (result["class"], check) not in EXPLAINED
    }


def _test(name: str, strategy: str, *, flip: bool = False) -> None:
    result = examine(name, strategy, flip=flip)
    if result["left_out"]:
        pytest.skip(result["left_out"])
    failed = failures(result)
    assert not failed, "\n".join(f"{check}: {outcome}" for check, outcome in failed.items())


@pytest.mark.parametrize(
    "kind", [pytest.param(kind, marks=pytest.mark.slow) if kind in SLOW_KINDS else kind for kind in KINDS]
)
def test_kind(kind):
    name, _, flip = KINDS[kind].partition(" ")
    _test(name, "split", flip=bool(flip))


def test_a_canvas_drawn_from_the_vocabulary_is_all_that_differs():
    name = "DiffusionGemmaForBlockDiffusion"
    model = zoo.build(name)
    size, length = zoo.rows_of(model), model.config.canvas_length
    prompt = torch.randint(zoo.FIRST_TEXT_ID, size, (2, 8), generator=torch.Generator().manual_seed(3))

    def drawn(high: int) -> torch.Tensor:
        torch.manual_seed(7)
        return torch.randint(0, high, (2, length))

    def logits(canvas: torch.Tensor | None = None) -> torch.Tensor:
        torch.manual_seed(7)
        with torch.no_grad():
            return model(input_ids=prompt, decoder_input_ids=canvas).logits

    before = logits()
    assert same_bits(before, logits(drawn(size)))
    partial = add_tokens(model, zoo.tokenizer_of(size), TOKENS)
    grown = size + len(partial.tokens)
    assert not torch.equal(drawn(grown), drawn(size))
    assert same_bits(logits(), logits(drawn(grown)))
    assert same_bits(logits(drawn(size))[..., :size], before)


@pytest.mark.sweep
@pytest.mark.parametrize("name", zoo.names())
@pytest.mark.parametrize("strategy", ["split", "mask"])
@pytest.mark.parametrize("flip", [False, True], ids=["", "flipped"])
def test_every_architecture(name, strategy, flip):
    _test(name, strategy, flip=flip)


def _start_worker() -> None:
    torch.set_num_threads(1)
    transformers.logging.set_verbosity(transformers.logging.CRITICAL)
    transformers.logging.disable_progress_bar()


def _examine(task: tuple[str, str, bool, list[str]]) -> dict[str, Any]:
    name, strategy, flip, checks = task
    return examine(name, strategy, flip=flip, checks=checks, seconds=SECONDS)


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--strategy", choices=["split", "mask"], help="only this one (default: both)")
    parser.add_argument("--ties", choices=["default", "flipped"], help="only these (default: both)")
    parser.add_argument("--check", action="append", choices=CHECKS, help="only this; default: all but compile")
    parser.add_argument("--only", action="append", help="a class; may be repeated")
    parser.add_argument("--jobs", type=int, default=1, help="processes")
    parser.add_argument("--json", help="write all outcomes to this file")
    options = parser.parse_args(arguments)
    names, everything = options.only or zoo.names(), []
    for strategy in [options.strategy] if options.strategy else ["split", "mask"]:
        for ties in [options.ties] if options.ties else ["default", "flipped"]:
            print(f"\n=== {strategy}, {ties} ties\n", flush=True)
            tasks = [(name, strategy, ties == "flipped", options.check or []) for name in names]
            results = []
            with ProcessPoolExecutor(options.jobs, get_context("spawn"), _start_worker) as pool:
                for result in tqdm(pool.map(_examine, tasks), total=len(tasks), desc=f"{strategy}, {ties} ties"):
                    results.append(result)
                    _print_result(result, named=bool(options.only))
            _print_totals([result for result in results if not result["left_out"]], len(results))
            everything += [{"strategy": strategy, "ties": ties, **result} for result in results]
            if options.json:
                Path(options.json).write_text(json.dumps(everything, indent=1, default=str))


def _print_result(result: dict[str, Any], *, named: bool) -> None:
    """One line of the table: class, tie, how many checks hold, and why others do not."""
    if result["left_out"]:
        if named:
            print(f"{result['class']:48} left out: {result['left_out']}", flush=True)
        return
    marks = Counter(outcome.partition(":")[0] for outcome in result["checks"].values())
    tied = {True: "tied", False: "untied", None: "no head"}[result["tied"]]
    failed = {check: outcome for check, outcome in result["checks"].items() if outcome.startswith("FAIL")}
    reasons = [
        f"{check}{' (not ours)' * (check in NOT_OURS)}: {EXPLAINED.get((result['class'], check), outcome[6:])}"
        for check, outcome in failed.items()
    ]
    print(
        f"{result['class']:48} {tied:8} ok {marks['ok']:2} skip {marks['skip']:2} FAIL {marks['FAIL']:2}  "
        f"{'; '.join(reasons)}",
        flush=True,
    )


def _print_totals(ran: list[dict[str, Any]], asked: int) -> None:
    passed = [result for result in ran if not failures(result)]
    excused = sum(any((r["class"], check) in EXPLAINED for check in r["checks"]) for r in passed)
    print(
        f"\n{asked} classes, {asked - len(ran)} left out; of {len(ran)}, {len(passed)} pass every check of ours "
        f"({excused} of them but for what is explained)."
    )
    for check in CHECKS:
        outcomes = Counter(r["checks"][check].partition(":")[0] for r in ran if check in r["checks"])
        if not outcomes:
            continue
        note = " (transformers itself)" if check in NOT_OURS else ""
        print(f"  {check + note:40} ok {outcomes['ok']:4}  skip {outcomes['skip']:4}  FAIL {outcomes['FAIL']:4}")
    grown = [result for result in ran if result["checks"].get("transformers") == "ok"]
    good = sum(not failures(result) for result in grown)
    print(f"Of the {len(grown)} that transformers itself can grow and reload, {good} pass; of the others, "
          f"{len(passed) - good} of {len(ran) - len(grown)}.")  # fmt: skip


if __name__ == "__main__":
    main()
