"""What it costs to bring chosen tokens into a vocabulary, against added tokens, and to load the tokenizer then.

    python examples/benchmark/vocabulary_cost.py TOKENIZER_FOLDER_OR_JSON TEXTS...

The tokens are those that `choose_tokens` takes from the texts, so each needs one row. Times are seconds of processor
time; the ratio of loading is the median over turns in which the tokenizers are loaded one after the other.
"""

from __future__ import annotations

import argparse
import copy
import logging
import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
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


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("tokenizer", type=Path, help="folder of a tokenizer, or a tokenizer.json")
    parser.add_argument("texts", type=Path, nargs="+", help="text files")
    parser.add_argument("--counts", type=int, nargs="+", default=[2500, 5000, 10000])
    parser.add_argument("--loads", type=int, default=5)
    args = parser.parse_args()
    torch.set_num_threads(1)
    logging.getLogger("hf_partial_embed").setLevel(logging.ERROR)  # words that added tokens cut: measured elsewhere
    base: Any = (
        AutoTokenizer.from_pretrained(args.tokenizer)
        if args.tokenizer.is_dir()
        else PreTrainedTokenizerFast(tokenizer_file=str(args.tokenizer))
    )
    lines = [line for path in args.texts for line in path.read_text("utf-8").splitlines(keepends=True)]
    spent, chosen = seconds(lambda: choose_tokens(base, lines, max(args.counts)))
    print(f"{len(chosen):,} tokens chosen from {sum(map(len, lines)):,} characters in {spent:.1f} s\n", flush=True)
    print("| tokens | vocabulary, s | added, s | difference, s | load vocabulary / base | load added / base |")
    print("| ---: | ---: | ---: | ---: | ---: | ---: |")
    with tempfile.TemporaryDirectory() as folder:
        base.save_pretrained(f"{folder}/base")
        for count in args.counts:
            times = {}
            for entry in ("added", "vocabulary"):
                tokenizer, model = copy.deepcopy(base), tiny_model(len(base))
                tokens = list(chosen[:count])
                times[entry], _ = seconds(lambda: add_tokens(model, tokenizer, tokens, entry=entry))  # noqa: B023
                tokenizer.save_pretrained(f"{folder}/{entry}")
            loads: dict[str, list[float]] = {"base": [], "vocabulary": [], "added": []}
            for _ in range(args.loads):
                for name, found in loads.items():
                    found.append(seconds(lambda: AutoTokenizer.from_pretrained(f"{folder}/{name}"))[0])  # noqa: B023
            ratios = [
                statistics.median(a / b for a, b in zip(loads[name], loads["base"], strict=True))
                for name in ("vocabulary", "added")
            ]
            print(
                f"| {count:,} | {times['vocabulary']:.2f} | {times['added']:.2f} | "
                f"{times['vocabulary'] - times['added']:+.2f} | {ratios[0]:.2f} | {ratios[1]:.2f} |",
                flush=True,
            )


if __name__ == "__main__":
    main()
