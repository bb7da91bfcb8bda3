"""Pieces of the vocabulary in a Trainer: the tokenizer lies in every checkpoint, and a resume goes on bit for bit."""

from __future__ import annotations

import pytest
import torch
from conftest import bpe_tokenizer, build_model
from trainings import Texts, arguments, rows_of
from transformers import AutoTokenizer, Trainer

from hf_partial_embed import PartialEmbeddingCallback, add_tokens

TOKENS = [" lanthanum", "<x>", "praseodymic"]


def run(folder, strategy, resume=None):
    tokenizer = bpe_tokenizer()
    model = build_model("llama", len(tokenizer)).requires_grad_(False)
    partial = add_tokens(model, tokenizer, TOKENS, strategy=strategy)
    data = Texts(partial.token_ids)
    trainer = Trainer(
        model=model, args=arguments(folder), train_dataset=data, processing_class=tokenizer,
        callbacks=[PartialEmbeddingCallback(partial, learning_rate=3e-2)],
    )  # fmt: skip
    trainer.train(resume_from_checkpoint=resume)
    return partial


@pytest.mark.parametrize("strategy", ["split", "mask"])
def test_tokenizer_is_in_each_checkpoint_and_a_resume_goes_on_bit_for_bit(tmp_path, strategy):
    whole = run(tmp_path / "whole", strategy)
    assert set(whole.entries) == {"vocabulary", "added", "part"}
    text = ["a lanthanum<x> of praseodymic\npraseodymic"]
    for step in (3, 6):
        saved = AutoTokenizer.from_pretrained(tmp_path / "whole" / f"checkpoint-{step}")
        assert saved(text)["input_ids"] == whole.tokenizer(text)["input_ids"]
        assert saved.get_vocab() == whole.tokenizer.get_vocab()
    rest = run(tmp_path / "rest", strategy, resume=str(tmp_path / "whole" / "checkpoint-3"))
    assert all(torch.equal(a, b) for a, b in zip(rows_of(whole), rows_of(rest), strict=True))
    whole.verify()
    rest.verify()
