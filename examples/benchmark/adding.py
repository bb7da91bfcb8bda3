"""What adding tokens costs: few of them to a large table, and many of them to a small model."""

from __future__ import annotations

import copy
import gc
import itertools
import logging
import random
import tempfile
import time
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from methods import Shape, build, new_tokens
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from hf_partial_embed import add_tokens, load_tokens
from hf_partial_embed.modules.digest import row_digests

Rows = list[dict[str, Any]]


def few(shape: Shape, device: torch.device, repetitions: int) -> Rows:
    """Adding tokens to a large table, against a copy of it and `resize_token_embeddings`."""
    clock = time.perf_counter if device.type == "cuda" else time.process_time
    names = (
        "copy of the table",
        "add_tokens",
        "resize_token_embeddings",
        "without mean_resizing",
        "digest of each row",
    )
    seconds: dict[str, list[float]] = {name: [] for name in names}
    for _ in range(repetitions):
        for name, times in seconds.items():
            model, tokenizer = build(shape, device)
            start = clock()
            if name == "add_tokens":
                add_tokens(model, tokenizer, new_tokens(shape))
            elif name == "copy of the table":
                model.get_input_embeddings().weight.clone()
            elif name == "digest of each row":
                row_digests(model.get_input_embeddings().weight)
            else:
                tokenizer.add_tokens(list(new_tokens(shape)))
                model.resize_token_embeddings(len(tokenizer), mean_resizing=name == "resize_token_embeddings")
            if device.type == "cuda":
                torch.cuda.synchronize(device)
            times.append(clock() - start)
            del model, tokenizer
            gc.collect()
    base = seconds["copy of the table"]
    return [
        {
            "way": name,
            "seconds": _median(times),
            "ratio to the copy": _median([a / b for a, b in zip(times, base, strict=True)]),
        }
        for name, times in seconds.items()
    ]


def many(shape: Shape, device: torch.device, repetitions: int) -> Rows:
    """Adding many tokens to a small model, and loading them, against the same by hand.

    By hand: one batched call of the tokenizer's backend, `tokenizer.add_tokens`,
    `resize_token_embeddings(mean_resizing=False)`, and one `embedding_bag` for the means of the pieces' rows. That is
    less than `add_tokens` does: nothing is checked, frozen, trained or undone.
    """
    logging.getLogger("hf_partial_embed").setLevel(logging.ERROR)  # words that added tokens cut: measured elsewhere
    base = _word_tokenizer(shape.vocabulary)
    words = list(itertools.islice(_words(seed=1), shape.tokens))
    kinds: dict[str, tuple[list[str], dict[str, Any]]] = {
        "special": ([f"<|{word}|>" for word in words], {"special": True}),
        "added": ([f" {word}" for word in words], {"entry": "added"}),
        "vocabulary": ([f" {word}" for word in words], {"entry": "vocabulary"}),
    }
    rows: Rows = []
    for kind, (tokens, options) in kinds.items():
        special = kind == "special"
        with tempfile.TemporaryDirectory() as folder:
            model, tokenizer = _small_model(shape, len(base), device), copy.deepcopy(base)
            add_tokens(model, tokenizer, tokens, **options).save_pretrained(folder)
            ways: dict[str, Callable[[Any, Any], object]] = {
                "by hand": lambda model, tokenizer: _by_hand(model, tokenizer, tokens, special),  # noqa: B023
                "add_tokens": lambda model, tokenizer: add_tokens(model, tokenizer, tokens, **options),  # noqa: B023
                "load_tokens": lambda model, tokenizer: load_tokens(model, tokenizer, folder),
            }
            seconds: dict[str, list[float]] = {way: [] for way in ways}
            for _ in range(repetitions):
                for way, function in ways.items():
                    model, tokenizer = _small_model(shape, len(base), device), copy.deepcopy(base)
                    gc.collect()
                    start = time.process_time()
                    function(model, tokenizer)
                    seconds[way].append(time.process_time() - start)
        row: dict[str, Any] = {"kind": kind, "tokens": len(tokens), "by hand, s": _median(seconds["by hand"])}
        for way in ("add_tokens", "load_tokens"):
            pairs = zip(seconds[way], seconds["by hand"], strict=True)
            row |= {f"{way}, s": _median(seconds[way]), f"{way}, ratio": _median([a / b for a, b in pairs])}
        rows.append(row)
    return rows


def _median(values: list[float]) -> float:
    return sorted(values)[len(values) // 2]


@torch.no_grad()
def _by_hand(model: Any, tokenizer: Any, tokens: list[str], special: bool) -> None:
    pieces = [read.ids for read in tokenizer._tokenizer.encode_batch_fast(tokens, add_special_tokens=False)]
    tokenizer.add_tokens(tokens, special_tokens=special)
    model.resize_token_embeddings(len(tokenizer), mean_resizing=False)
    table = model.get_input_embeddings().weight
    flat = torch.tensor(list(itertools.chain.from_iterable(pieces)), device=table.device)
    starts = torch.tensor([0, *itertools.accumulate(map(len, pieces[:-1]))], device=table.device)
    table[-len(tokens) :] = F.embedding_bag(flat, table, starts, mode="mean")


def _small_model(shape: Shape, vocabulary: int, device: torch.device) -> LlamaForCausalLM:
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=vocabulary, hidden_size=shape.width, intermediate_size=2 * shape.width,
        num_hidden_layers=shape.layers, num_attention_heads=4, tie_word_embeddings=shape.tied,
    )  # fmt: skip
    with device:
        return LlamaForCausalLM(config).to(getattr(torch, shape.dtype)).requires_grad_(False)


def _words(seed: int) -> Any:
    """Words of three to five random syllables, without end, each once."""
    syllables = [a + b for a in "bdfgklmnprstvz" for b in ("a", "e", "i", "o", "u", "an", "er", "is")]
    made, numbers = set[str](), random.Random(seed)
    while True:
        word = "".join(numbers.choices(syllables, k=numbers.randint(3, 5)))
        if word not in made:
            made.add(word)
            yield word


def _word_tokenizer(size: int) -> PreTrainedTokenizerFast:
    """A byte-level BPE, trained on words of the same syllables."""
    backend = Tokenizer(models.BPE())
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=size, special_tokens=["<unk>"], initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )  # fmt: skip
    words = list(itertools.islice(_words(seed=0), 4 * size))
    backend.train_from_iterator([f"{a} {b}" for a, b in itertools.pairwise(words)], trainer)
    return PreTrainedTokenizerFast(tokenizer_object=backend, unk_token="<unk>")
