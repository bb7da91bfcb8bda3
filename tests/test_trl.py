"""TRL's `SFTTrainer`, whose default loss reads the head's weight itself."""

from __future__ import annotations

import pytest
import torch
from conftest import PEFT_WARNING, bpe_tokenizer, build_model
from datasets import Dataset

from hf_partial_embed import PartialEmbeddingCallback, add_tokens

pytestmark = [pytest.mark.filterwarnings("ignore::FutureWarning"), pytest.mark.filterwarnings(PEFT_WARNING)]


def train(tmp_path, loss_type: str, *, tied: bool, lora: bool):
    from peft import LoraConfig
    from trl import SFTConfig, SFTTrainer

    tokenizer = bpe_tokenizer()
    model = build_model("llama", len(tokenizer), tied=tied).requires_grad_(False)
    partial = add_tokens(model, tokenizer, ["<think>", "</think>"], special=True)
    data = Dataset.from_dict({"input_ids": [[5, 300, 7, 301, 9, 10], [6, 300, 8, 301, 9, 4]] * 4})
    args = SFTConfig(
        output_dir=str(tmp_path), max_steps=2, per_device_train_batch_size=4, report_to=[], use_cpu=True, bf16=False,
        learning_rate=1e-2, loss_type=loss_type, save_strategy="no", disable_tqdm=True, dataloader_pin_memory=False,
        activation_checkpointing=False, seed=0,
    )  # fmt: skip
    config = LoraConfig(target_modules=["q_proj"], r=2, modules_to_save=["new_rows"]) if lora else None
    SFTTrainer(
        model=model, args=args, train_dataset=data, processing_class=tokenizer, peft_config=config,
        callbacks=[PartialEmbeddingCallback(partial, learning_rate=1e-2)],
    ).train()  # fmt: skip
    return [rows.detach().clone() for rows in partial.parameters()]


@pytest.mark.parametrize("lora", [False, True], ids=["rows", "rows-and-lora"])
def test_chunked_loss_trains_the_rows_as_the_plain_loss_does(tmp_path, tied, lora):
    chunked = train(tmp_path, "chunked_nll", tied=tied, lora=lora)
    plain = train(tmp_path, "nll", tied=tied, lora=lora)
    assert len(plain) == (1 if tied else 2)
    for rows, expected in zip(chunked, plain, strict=True):
        torch.testing.assert_close(rows, expected, atol=1e-5, rtol=1e-4)
