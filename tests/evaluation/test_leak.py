"""Leak, the automatic learning rate, and the callback's warnings."""

from __future__ import annotations

import logging

import pytest
import torch
from added import add_tokens
from conftest import bpe_tokenizer, build_model, table_of
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import Trainer, TrainingArguments

from hf_partial_embed import PartialEmbeddingCallback, PartialEmbeddingError, train_tokens
from hf_partial_embed.evaluation.leak import leak
from hf_partial_embed.training.optimizers import auto_learning_rate

TOKENS = ["<think>", "</think>", "praseodymium"]


def setup(*, strategy="split", tied=True, vocab=300):
    tokenizer = bpe_tokenizer()
    model = build_model("llama", vocab, tied=tied)
    model.requires_grad_(False)
    return model, add_tokens(model, tokenizer, TOKENS, special=True, strategy=strategy)


def train(model, partial, folder, callback, *, steps=4, new=True):
    ids = torch.randint(4, 250, (16, 10), generator=torch.Generator().manual_seed(7))
    if new:
        ids[:, ::3] = partial.token_ids[0]
    data = [{"input_ids": row, "labels": row} for row in ids]
    arguments = TrainingArguments(
        output_dir=str(folder), per_device_train_batch_size=4, max_steps=steps, learning_rate=1e-4, report_to=[],
        use_cpu=True, logging_steps=2, save_strategy="no", disable_tqdm=True, dataloader_pin_memory=False,
        lr_scheduler_type="constant",
    )  # fmt: skip
    Trainer(model=model, args=arguments, train_dataset=data, callbacks=[callback]).train()


class TestLeak:
    @settings(max_examples=40, deadline=None)
    @given(st.integers(0, 2**31), st.sets(st.integers(0, 11), min_size=1, max_size=4))
    def test_is_the_mean_probability_of_new_tokens_that_are_not_the_label(self, seed, new):
        generator = torch.Generator().manual_seed(seed)
        logits = 3 * torch.randn(2, 5, 12, generator=generator)
        labels = torch.randint(0, 12, (2, 5), generator=generator)
        labels[0, :2] = -100
        expected = [
            sum(logits[i, j].softmax(-1)[k].item() for k in new if k != labels[i, j])
            for i in range(2) for j in range(5) if labels[i, j] != -100
        ]  # fmt: skip
        assert leak(logits, labels, sorted(new)) == pytest.approx(sum(expected) / len(expected), abs=1e-6)

    def test_nothing_counted(self):
        assert leak(torch.zeros(1, 3, 5), torch.full((1, 3), -100), [4]) == 0.0


class TestAutoLearningRate:
    @pytest.mark.parametrize("strategy", ["split", "mask"])
    def test_goes_with_the_trained_old_rows(self, strategy):
        model = build_model("llama", 320)
        with torch.no_grad():
            table_of(model)[1] = 1e6  # padding
            table_of(model)[303:] = 1e6  # spare rows
            table_of(model)[:1], table_of(model)[2:303] = 0.5, -0.5
        partial = add_tokens(model, bpe_tokenizer(), TOKENS, strategy=strategy)
        assert auto_learning_rate(partial) == pytest.approx(0.07 * 0.5, rel=1e-6)

    def test_rows_chosen_by_id(self):
        model = build_model()
        with torch.no_grad():
            table_of(model).fill_(0.25)
            table_of(model)[7] = 1e6  # the one that trains
        assert auto_learning_rate(train_tokens(model, None, [7])) == pytest.approx(0.07 * 0.25, rel=1e-6)

    def test_zero_rows_are_refused(self):
        model = build_model()
        with torch.no_grad():
            table_of(model).zero_()
        with pytest.raises(PartialEmbeddingError, match="Give a number"):
            auto_learning_rate(train_tokens(model, None, [7]))

    def test_rows_train_at_it(self, tmp_path):
        model, partial = setup()
        rate = auto_learning_rate(partial)
        before = partial.token_rows().input_rows
        train(model, partial, tmp_path, PartialEmbeddingCallback(partial, learning_rate="auto"), steps=1)
        change = (partial.token_rows().input_rows[0] - before[0]).abs()
        assert change.median().item() == pytest.approx(rate, rel=0.05)  # a first step of AdamW

    @pytest.mark.parametrize("value", ["fast", -1.0])
    def test_other_values_are_refused(self, value):
        _, partial = setup()
        with pytest.raises(PartialEmbeddingError, match="learning_rate="):
            PartialEmbeddingCallback(partial, learning_rate=value)
        with pytest.raises(PartialEmbeddingError, match="weight_decay='auto'"):
            PartialEmbeddingCallback(partial, weight_decay="auto")


class TestWarnings:
    def test_leak_is_warned_of_once(self, tmp_path, caplog):
        model, partial = setup()
        with caplog.at_level(logging.WARNING):  # uniform predictions: 3 of 303 are 0.99%, so shout
            with torch.no_grad():
                next(partial.parameters()).mul_(60)
            train(model, partial, tmp_path, PartialEmbeddingCallback(partial), new=False)
        messages = [record.getMessage() for record in caplog.records if "do not belong" in record.getMessage()]
        assert len(messages) == 1
        assert "New tokens take" in messages[0] and "elsewhere=..." in messages[0]

    def test_norm_that_leaves_the_old_rows_range_is_warned_of_once(self, tmp_path, caplog):
        model, partial = setup(tied=False)
        with torch.no_grad():
            next(partial.parameters())[1].mul_(1e3)  # outside from the start, and it does not train
        with caplog.at_level(logging.WARNING):
            train(model, partial, tmp_path, PartialEmbeddingCallback(partial, learning_rate=0.1))
        messages = [record.getMessage() for record in caplog.records if "norms outside" in record.getMessage()]
        assert len(messages) == 1
        assert messages[0].startswith("The rows of '<think>' have norms outside of the old rows' range")

    @pytest.mark.parametrize("strategy", ["split", "mask"])
    def test_quiet_where_all_is_well(self, tmp_path, caplog, strategy):
        model, partial = setup(strategy=strategy, vocab=1500, tied=False)
        hooks = len(model._forward_hooks)
        with caplog.at_level(logging.WARNING):
            train(model, partial, tmp_path, PartialEmbeddingCallback(partial))
        assert not [record for record in caplog.records if record.name == "hf_partial_embed.training.watch"]
        assert len(model._forward_hooks) == hooks
