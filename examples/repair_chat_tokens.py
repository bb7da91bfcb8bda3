"""Chat tokens that were never trained, found and repaired: the rows alone, beside LoRA on the broken rows.

    python examples/repair_chat_tokens.py --cache smollm2 --steps 100

SmolLM2-135M-Instruct with the rows of `<|im_start|>` and `<|im_end|>` overwritten by one common vector, which is the
state that base models come in. The audit finds them; `train_tokens(init=...)` gives them a start, and 100 steps on
short chats train the two rows, with the body frozen. What counts is how many replies to held-out questions stop by
themselves. Beside it: LoRA with the same steps, which leaves the broken rows as they are.

Measured, one seed, of 100 held-out questions: untouched 69 (it explains at length), broken 0, rows 100 (1,152 numbers
train), LoRA 0 (2,442,240 train).
"""

from __future__ import annotations

import argparse
import random
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from _assets import load_smollm2, read_elements, require
from torch import Tensor

from hf_partial_embed import audit_tokens, train_tokens

CHAT_TOKENS = ["<|im_start|>", "<|im_end|>"]
REPLY_LIMIT = 16


def chats() -> list[tuple[str, str]]:
    """Questions with short answers about the chemical elements, in a fixed order that mixes them."""
    names = [element.name for element in read_elements()]
    pairs = []
    for number, name in enumerate(names, 1):
        pairs.append((f"Which element has the atomic number {number}?", f"{name.capitalize()}."))
        pairs.append((f"What is the atomic number of {name}?", f"{number}."))
        pairs.append((f"What is the first letter of {name}?", f"{name[0].upper()}."))
    random.Random(0).shuffle(pairs)
    return pairs


def render(tokenizer: Any, question: str, answer: str | None) -> str:
    messages = [{"role": "system", "content": "Be brief."}, {"role": "user", "content": question}]
    if answer is not None:
        messages.append({"role": "assistant", "content": answer})
    return str(tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=answer is None))


def break_rows(model: Any, tokenizer: Any) -> None:
    """Overwrite the chat tokens' rows by one vector, of the length that rows have."""
    table = model.get_input_embeddings().weight
    with torch.no_grad():
        common = torch.randn(table.shape[1], generator=torch.Generator().manual_seed(0))
        rows = table[tokenizer.convert_tokens_to_ids(CHAT_TOKENS)]
        rows.copy_(common * table.norm(dim=1).median() / common.norm())
        table[tokenizer.convert_tokens_to_ids(CHAT_TOKENS)] = rows


def batch_of(tokenizer: Any, pairs: list[tuple[str, str]]) -> dict[str, Tensor]:
    """Ids, mask, and labels of what the assistant says, its end included."""
    prompts = [tokenizer(render(tokenizer, question, None))["input_ids"] for question, _ in pairs]
    whole = [tokenizer(render(tokenizer, *pair).rstrip("\n"))["input_ids"] for pair in pairs]
    longest = max(map(len, whole))
    ids = torch.zeros(len(pairs), longest, dtype=torch.long)
    labels, mask = torch.full_like(ids, -100), torch.zeros_like(ids)
    for row, (prompt, text) in enumerate(zip(prompts, whole, strict=True)):
        ids[row, : len(text)] = torch.tensor(text)
        labels[row, len(prompt) : len(text)] = torch.tensor(text[len(prompt) :])
        mask[row, : len(text)] = 1
    return {"input_ids": ids, "attention_mask": mask, "labels": labels}


def train(model: Any, tokenizer: Any, parameters: Any, pairs: list[tuple[str, str]], steps: int, lr: float) -> None:
    optimizer = torch.optim.AdamW(parameters, lr=lr, weight_decay=0.0)
    schedule = torch.optim.lr_scheduler.LinearLR(optimizer, 1.0, 0.1, total_iters=steps)
    for step in range(steps):
        at = step * 4 % (len(pairs) - 3)
        loss = model(**batch_of(tokenizer, pairs[at : at + 4])).loss
        loss.backward()
        optimizer.step()
        schedule.step()
        optimizer.zero_grad()
        if step % 10 == 0:
            print(f"  step {step}: loss {loss.item():.3f}", flush=True)


@torch.no_grad()
def share_that_stops(model: Any, tokenizer: Any, questions: list[str]) -> tuple[int, list[str]]:
    """How many replies end by themselves within the limit, and the first few of them."""
    end = tokenizer.convert_tokens_to_ids("<|im_end|>")
    stopped, shown = 0, []
    for start in range(0, len(questions), 25):
        texts = [render(tokenizer, question, None) for question in questions[start : start + 25]]
        tokenizer.padding_side = "left"
        batch = tokenizer(texts, return_tensors="pt", padding=True)
        out = model.generate(
            **batch, max_new_tokens=REPLY_LIMIT, do_sample=False, eos_token_id=end, pad_token_id=end
        )[:, batch["input_ids"].shape[1] :]  # fmt: skip
        stopped += int((out == end).any(1).sum())
        shown += tokenizer.batch_decode(out[:2])
    return stopped, shown[:3]


def main(argv: Sequence[str] | None = None) -> dict[str, tuple[int, int]]:
    """Run the comparison; returns by arm how many numbers train, and how many replies stop by themselves."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--cache", type=Path, default=Path("smollm2"), help="folder of the converted model")
    parser.add_argument("--steps", type=int, default=100)
    parser.add_argument("--held-out", type=int, default=100, help="questions that are asked")
    parser.add_argument("--arms", nargs="+", default=["untouched", "broken", "rows", "lora"])
    options = parser.parse_args(argv)
    require(["peft"] if "lora" in options.arms else [])
    pairs = chats()
    questions, trained_on = [question for question, _ in pairs[: options.held_out]], pairs[options.held_out :]
    results = {}
    for arm in options.arms:
        torch.manual_seed(0)
        model, tokenizer = load_smollm2(options.cache)
        model.requires_grad_(False)
        if arm != "untouched":
            break_rows(model, tokenizer)
        trainable = 0
        if arm == "rows":
            report = audit_tokens(model, tokenizer)
            print(report)
            partial = train_tokens(model, tokenizer, report.untrained, init="subtoken_mean")
            trainable = sum(parameter.numel() for parameter in partial.parameters())
            train(model, tokenizer, partial.parameters(), trained_on, options.steps, lr=0.02)
            partial.verify()
        if arm == "lora":
            from peft import LoraConfig, get_peft_model

            model = get_peft_model(model, LoraConfig(r=8, lora_alpha=16, target_modules="all-linear"))
            parameters = [parameter for parameter in model.parameters() if parameter.requires_grad]
            trainable = sum(parameter.numel() for parameter in parameters)
            train(model, tokenizer, parameters, trained_on, options.steps, lr=5e-4)
        stopped, shown = share_that_stops(model, tokenizer, questions)
        results[arm] = (trainable, stopped)
        print(arm, f"{stopped}/{len(questions)} replies stop by themselves;", shown, flush=True)
    print(f"\n{'arm':12}{'trainable':>12}{'stop by themselves':>22}")
    for arm, (trainable, stopped) in results.items():
        print(f"{arm:12}{trainable:12,}{stopped:15} of {len(questions)}")
    return results


if __name__ == "__main__":
    main()
