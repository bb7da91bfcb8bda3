"""A tiny model with new tokens in a real `transformers.Trainer`."""

from __future__ import annotations

import torch
from added import add_tokens
from conftest import bpe_tokenizer, build_model
from transformers import Trainer, TrainingArguments

TOKENS = ["<think>", "</think>", "praseodymium"]


class Texts(torch.utils.data.Dataset):
    """Sentences in which every third token is a new one."""

    def __init__(self, new_ids: list[int], size: int = 24, length: int = 10) -> None:
        generator = torch.Generator().manual_seed(7)
        self.ids = torch.randint(4, 250, (size, length), generator=generator)
        self.ids[:, ::3] = torch.tensor(new_ids).repeat(size * length)[: self.ids[:, ::3].numel()].view(size, -1)

    def __len__(self) -> int:
        return len(self.ids)

    def __getitem__(self, index: int):
        return {"input_ids": self.ids[index], "labels": self.ids[index]}


def setup(*, tied=True, strategy="split", dtype=torch.float32, freeze_body=True, seed=0):
    tokenizer = bpe_tokenizer()
    model = build_model("llama", len(tokenizer), tied=tied, dtype=dtype, seed=seed)
    if freeze_body:
        model.requires_grad_(False)
    partial = add_tokens(model, tokenizer, TOKENS, special=True, strategy=strategy)
    return model, tokenizer, partial


def arguments(folder, **options) -> TrainingArguments:
    defaults = {
        "output_dir": str(folder), "per_device_train_batch_size": 4, "max_steps": 6, "learning_rate": 1e-2,
        "weight_decay": 0.1, "report_to": [], "use_cpu": True, "seed": 3, "logging_steps": 1, "save_steps": 3,
        "disable_tqdm": True, "dataloader_pin_memory": False, "warmup_steps": 1, "dataloader_num_workers": 0,
    }  # fmt: skip
    return TrainingArguments(**{**defaults, **options})


def train(model, tokenizer, partial, folder, *, callbacks=None, resume=None, **options):
    data = Texts(partial.token_ids)
    trainer = Trainer(
        model=model, args=arguments(folder, **options), train_dataset=data, eval_dataset=data, callbacks=callbacks
    )
    trainer.train(resume_from_checkpoint=resume)
    return trainer


def rows_of(partial) -> list[torch.Tensor]:
    return [parameter.detach().clone() for parameter in partial.parameters()]


def frozen_part(before: dict, model, size: int) -> None:
    for name, tensor in model.state_dict().items():
        if name in before:
            old = before[name]
            assert torch.equal(tensor[: len(old)] if old.dim() else tensor, old), name
