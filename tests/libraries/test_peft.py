"""LoRA and token rows together: what merging the adapter leaves."""

from __future__ import annotations

import pytest
import torch
from added import add_tokens
from conftest import PEFT_WARNING, bpe_tokenizer, build_model, logits_of
from peft import LoraConfig, PeftModel, get_peft_model
from transformers import AutoModelForCausalLM

from hf_partial_embed import load_tokens

pytestmark = [pytest.mark.filterwarnings(PEFT_WARNING), pytest.mark.filterwarnings("ignore::FutureWarning")]

TOKENS = ["<think>", "</think>", "praseodymium"]


def trained(order, tied, modules_to_save):
    """A LoRA model with token rows, both after some steps."""
    tokenizer, model = bpe_tokenizer(), build_model("llama", 300, tied=tied)
    more = {"modules_to_save": ["new_rows"]} if modules_to_save else {}
    config = LoraConfig(target_modules=["q_proj", "v_proj"], r=2, **more)
    if order == "before":
        model = get_peft_model(model, config)
        partial = add_tokens(model, tokenizer, TOKENS)
    else:
        partial = add_tokens(model, tokenizer, TOKENS)
        model = get_peft_model(model, config)
        partial.requires_grad_(True)
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=0.1)
    ids = torch.tensor([[5, *partial.token_ids, 9, *partial.token_ids]])
    for _ in range(3):
        model(input_ids=ids, labels=ids).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    partial.verify()
    return model.eval(), tokenizer, partial, ids


@pytest.mark.parametrize(
    ("order", "modules_to_save", "rows_first"),
    [
        ("before", False, True), ("before", False, False), ("after", False, True), ("after", False, False),
        ("after", True, False),  # the adapter holds the rows: it is merged first
    ],
    ids=["lora-on-rows-off-first", "lora-on-lora-off-first", "rows-on-rows-off-first", "rows-on-lora-off-first",
         "rows-in-the-adapter"],
)  # fmt: skip
def test_merge_and_unload_keeps_lora_and_rows(tmp_path, tied, order, modules_to_save, rows_first):
    model, _, partial, ids = trained(order, tied, modules_to_save)
    untrained = logits_of(build_model("llama", 300, tied=tied), ids.clamp(max=299))
    expected = logits_of(model, ids)
    if rows_first:
        partial.merge()
        merged = model.merge_and_unload()
    else:
        merged = model.merge_and_unload()
        if not modules_to_save:
            partial.merge()
    merged.save_pretrained(tmp_path)
    plain = AutoModelForCausalLM.from_pretrained(tmp_path)
    torch.testing.assert_close(logits_of(plain, ids), expected, atol=1e-5, rtol=1e-5)
    assert not torch.isclose(expected[..., :300], untrained, atol=1e-2).all()  # LoRA has its part in it
    assert (plain.lm_head.weight is plain.model.embed_tokens.weight) == tied


def test_adapter_and_row_file_come_back_together(tmp_path, tied):
    model, _, partial, ids = trained("after", tied, False)
    expected = logits_of(model, ids)
    partial.save_pretrained(tmp_path / "rows")
    model.save_pretrained(tmp_path / "adapter", save_embedding_layers=False)
    again = PeftModel.from_pretrained(build_model("llama", 300, tied=tied), tmp_path / "adapter").eval()
    load_tokens(again, bpe_tokenizer(), tmp_path / "rows")
    torch.testing.assert_close(logits_of(again, ids), expected)
    merged = again.merge_and_unload()
    torch.testing.assert_close(logits_of(merged, ids), expected, atol=1e-5, rtol=1e-5)
