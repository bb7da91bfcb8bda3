"""What it costs to bring chosen tokens into a vocabulary, against added tokens, and to load the tokenizer then.

    python examples/benchmark/vocabulary_cost.py TOKENIZER_FOLDER_OR_JSON TEXTS... --loads 15

The tokens are those that `choose_tokens` takes from the texts, so each needs one row. All times are of processor time.
A tokenizer with more tokens has more to load, so loading is given as a whole and for each token, against the base's:
the least of many turns in which the tokenizers are loaded one after the other, since what else runs on the machine can
only add to it. `backend` is the part of it that is
`tokenizers`' own, `Tokenizer.from_file` of the same file; `transformers` does the rest.
"""

from __future__ import annotations

import argparse
import copy
import gc
import logging
import os
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from tokenizers import Tokenizer
from transformers import AutoTokenizer, LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from hf_partial_embed import add_tokens, choose_tokens


def tiny_model(vocab_size: int) -> LlamaForCausalLM:
    config = LlamaConfig(
        vocab_size=vocab_size, hidden_size=16, intermediate_size=16, num_hidden_layers=1, num_attention_heads=2,
        tie_word_embeddings=True,
    )  # fmt: skip
    return LlamaForCausalLM(config)


def seconds(work: Callable[[], Any]) -> tuple[float, Any]:
    begun = time.process_time()
    result = work()
    return time.process_time() - begun, result


def take_turns(works: dict[str, Callable[[], Any]], turns: int) -> dict[str, list[float]]:
    """Seconds of each work in each turn. The garbage of one does not fall into the time of the next."""
    for work in works.values():
        work()
    found: dict[str, list[float]] = {name: [] for name in works}
    gc.disable()
    try:
        for turn in range(turns):
            # From another one in each turn: what comes behind a large one may find less in the caches.
            names = list(works)[turn % len(works) :] + list(works)[: turn % len(works)]
            for name in names:
                gc.collect()
                found[name].append(seconds(works[name])[0])
    finally:
        gc.enable()
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("tokenizer", type=Path, help="folder of a tokenizer, or a tokenizer.json")
    parser.add_argument("texts", type=Path, nargs="+", help="text files")
    parser.add_argument("--counts", type=int, nargs="+", default=[2500, 5000, 10000])
    parser.add_argument("--loads", type=int, default=15, help="turns in which each tokenizer is loaded once")
    args = parser.parse_args()
    torch.set_num_threads(1)
    logging.getLogger("hf_partial_embed").setLevel(logging.ERROR)  # words that added tokens cut: measured elsewhere
    base: Any = (
        AutoTokenizer.from_pretrained(args.tokenizer)
        if args.tokenizer.is_dir()
        else PreTrainedTokenizerFast(tokenizer_file=str(args.tokenizer))
    )
    lines = [line for path in args.texts for line in path.read_text("utf-8", "replace").splitlines(keepends=True)]
    spent, chosen = seconds(lambda: choose_tokens(base, lines, max(args.counts)))
    print(f"{len(chosen):,} tokens chosen from {sum(map(len, lines)):,} characters in {spent:.1f} s\n", flush=True)
    entering = ["| tokens | as vocabulary, s | as added tokens, s | difference, s |", "| ---: | ---: | ---: | ---: |"]
    loading = [
        "| tokens | entry | file / base | load / base | for each token of the vocabulary | backend / base |",
        "| ---: | --- | ---: | ---: | ---: | ---: |",
    ]
    with tempfile.TemporaryDirectory() as folder:
        base.save_pretrained(f"{folder}/base")
        for count in args.counts:
            times, sizes = {}, {"base": len(base)}
            for entry in ("added", "vocabulary"):
                tokenizer, model = copy.deepcopy(base), tiny_model(len(base))
                tokens = list(chosen[:count])
                times[entry], _ = seconds(lambda: add_tokens(model, tokenizer, tokens, entry=entry))  # noqa: B023
                tokenizer.save_pretrained(f"{folder}/{entry}")
                sizes[entry] = len(tokenizer)
            entering.append(
                f"| {count:,} | {times['vocabulary']:.2f} | {times['added']:.2f} | "
                f"{times['vocabulary'] - times['added']:+.2f} |"
            )
            names = ("base", "vocabulary", "added")
            works: dict[str, Callable[[], Any]] = {}
            for name in names:
                works[name] = lambda name=name: AutoTokenizer.from_pretrained(f"{folder}/{name}")
                works[f"{name} backend"] = lambda name=name: Tokenizer.from_file(f"{folder}/{name}/tokenizer.json")
            found = take_turns(works, args.loads)
            bytes_of = {name: os.path.getsize(f"{folder}/{name}/tokenizer.json") for name in names}
            for name in names[1:]:
                whole, backend = (min(found[name + part]) / min(found["base" + part]) for part in ("", " backend"))
                loading.append(
                    f"| {count:,} | {name} | {bytes_of[name] / bytes_of['base']:.2f} | {whole:.2f} | "
                    f"{whole * sizes['base'] / sizes[name]:.2f} | {backend:.2f} |"
                )
            print(f"{count:,}: the base is loaded in {1000 * min(found['base']):.0f} ms", flush=True)
    print("\n".join(["", *entering, "", *loading]))


if __name__ == "__main__":
    main()
