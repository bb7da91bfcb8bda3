"""A resume takes rows by their tokens' text: what a checkpoint has at another position is not taken."""

from __future__ import annotations

import itertools
import json
import logging
import shutil

import pytest
import torch
from conftest import bpe_tokenizer, build_model
from quick import quick
from trainings import Texts, arguments, rows_of
from transformers import Trainer, TrainerCallback

from hf_partial_embed import (
    FrozenRowsChangedError,
    PartialEmbeddingCallback,
    PartialEmbeddingError,
    TokenRows,
    add_tokens,
    train_tokens,
)

A, B, C = "<a>", "<b>", "<c>"
VARIANTS = [(strategy, dtype) for strategy in ("split", "mask") for dtype in (torch.float32, torch.bfloat16)]
QUICK = VARIANTS[0], VARIANTS[3]
each_variant = pytest.mark.parametrize(
    ("strategy", "dtype"), quick(VARIANTS, lambda *variant: variant in QUICK), ids=str
)


class Steps(TrainerCallback):
    """Whether any step was made."""

    begun = False

    def on_step_begin(self, args, state, control, **kwargs):
        self.begun = True


class Run:
    """A user's script: a model with some row sets, and a Trainer."""

    def __init__(self, folder, *sets, strategy="split", dtype=torch.float32, seed=0, attach=add_tokens):
        self.tokenizer = bpe_tokenizer()
        self.model = build_model("llama", len(self.tokenizer), dtype=dtype, seed=seed).requires_grad_(False)
        self.partials = [attach(self.model, self.tokenizer, tokens, strategy=strategy) for tokens in sets]
        self.folder = folder
        self.steps = Steps()

    def train(self, resume=None, callback=True, save_rows=True, verify=True, tokenizer=True, **options):
        data = Texts(sorted(token_id for partial in self.partials for token_id in partial.token_ids))
        own = PartialEmbeddingCallback(self.partials, save_rows=save_rows, verify=verify, learning_rate=3e-2)
        trainer = Trainer(
            model=self.model, args=arguments(self.folder, **options), train_dataset=data, eval_dataset=data,
            processing_class=self.tokenizer if tokenizer else None,
            callbacks=[*([own] if callback else []), self.steps],
        )  # fmt: skip
        trainer.train(resume_from_checkpoint=resume)
        return trainer

    def refused(self, **options) -> str:
        with pytest.raises(PartialEmbeddingError) as caught:
            self.train(**options)
        assert not self.steps.begun
        return str(caught.value)


@each_variant
def test_the_same_tokens_in_another_order_are_refused_with_both_orders(tmp_path, strategy, dtype):
    Run(tmp_path, [A, B], strategy=strategy, dtype=dtype).train()
    message = Run(tmp_path, [B, A], strategy=strategy, dtype=dtype).refused(resume=True)
    assert "the same tokens in another order" in message
    assert "There: '<a>', '<b>'. Here: '<b>', '<a>'." in message


@each_variant
def test_other_tokens_are_refused(tmp_path, strategy, dtype):
    Run(tmp_path, [A, B], strategy=strategy, dtype=dtype).train()
    message = Run(tmp_path, [A, C], strategy=strategy, dtype=dtype).refused(resume=True)
    assert "are other tokens. There: '<a>', '<b>'. Here: '<a>', '<c>'." in message


@each_variant
def test_a_checkpoint_of_another_base_is_refused(tmp_path, strategy, dtype):
    Run(tmp_path, [A, B], strategy=strategy, dtype=dtype).train()
    other = Run(tmp_path, [A, B], strategy=strategy, dtype=dtype, seed=1)
    with pytest.raises(FrozenRowsChangedError, match=r"one of another base model\. Training has not begun"):
        other.train(resume=True)
    assert not other.steps.begun
    message = Run(tmp_path, [B, A], strategy=strategy, dtype=dtype, seed=1).refused(resume=True, verify=False)
    assert "another order" in message


def test_it_is_found_wherever_the_checkpoint_is_and_whatever_lies_beside_it(tmp_path):
    Run(tmp_path / "a", [A, B]).train(save_rows=False, tokenizer=False)
    shutil.move(tmp_path / "a" / "checkpoint-3", tmp_path / "moved")
    assert "another order" in Run(tmp_path / "b", [B, A]).refused(resume=str(tmp_path / "moved"))
    # A checkpoint of the same step, of another run with other tokens, lies where the Trainer would look by itself.
    Run(tmp_path / "c", [C, A]).train()
    Run(tmp_path / "c", [A, B]).train(resume=str(tmp_path / "moved"))


def without_note(checkpoint) -> None:
    path = checkpoint / "trainer_state.json"
    state = json.loads(path.read_text())
    del state["stateful_callbacks"]["hf_partial_embed"]
    path.write_text(json.dumps(state))


# The two choices do not know of each other: each is made both ways in the default run.
@pytest.mark.parametrize(
    ("tokens", "beside", "strategy"),
    quick(
        itertools.product(([B, A], [A, C]), ("row file", "tokenizer"), ("split", "mask")),
        lambda tokens, beside, strategy: (beside == "row file") == (tokens == [B, A]) == (strategy == "split"),
    ),
    ids=str,
)
def test_a_checkpoint_without_a_note_is_known_by_its_files(tmp_path, tokens, beside, strategy):
    Run(tmp_path, [A, B], strategy=strategy).train(save_rows=beside == "row file")
    without_note(tmp_path / "checkpoint-6")
    message = Run(tmp_path, tokens, strategy=strategy).refused(resume=True, max_steps=8)
    assert "There: '<a>', '<b>'" in message
    Run(tmp_path, [A, B], strategy=strategy).train(resume=True, max_steps=8)


def test_a_checkpoint_of_which_nothing_is_known_is_told(tmp_path, caplog):
    Run(tmp_path, [A, B]).train(callback=False, tokenizer=False)
    with caplog.at_level(logging.WARNING, logger="hf_partial_embed"):
        Run(tmp_path, [A, B]).train(resume=True, max_steps=8)
    assert "does not say which tokens its rows belong to" in caplog.text


def test_row_sets_in_another_order_are_refused(tmp_path, strategy):
    Run(tmp_path, [A, B], [C], strategy=strategy).train()
    assert "There: '<a>', '<b>', '<c>'. Here: '<c>', '<a>', '<b>'" in Run(
        tmp_path, [C], [A, B], strategy=strategy
    ).refused(resume=True)
    if strategy == "split":
        message = Run(tmp_path, [A], [B, C]).refused(resume=str(tmp_path / "checkpoint-3"))
        assert "There: ['<a>', '<b>'], ['<c>']. Here: ['<a>'], ['<b>', '<c>']" in message
    again = Run(tmp_path, [A, B], [C], strategy=strategy)
    again.train(resume=True, max_steps=8)


def test_a_long_list_is_shown_from_where_it_differs(tmp_path):
    tokens = [f"<{number}>" for number in range(20)]
    Run(tmp_path, tokens).train()
    swapped = [*tokens[:15], tokens[16], tokens[15], *tokens[17:]]
    message = Run(tmp_path, swapped).refused(resume=True)
    assert "from place 15 on. There: '<15>', '<16>', '<17>'" in message
    assert "Here: '<16>', '<15>', '<17>'" in message


def test_rows_inside_of_the_table_have_no_order_under_mask(tmp_path):
    ids = [[12, 9], [9, 12]]
    whole, again = (Run(tmp_path, rows, strategy="mask", attach=train_tokens) for rows in ids)
    whole.train()
    again.train(resume=str(tmp_path / "checkpoint-3"))
    assert torch.equal(rows_of(again.partials[0])[0], rows_of(whole.partials[0])[0])
    Run(tmp_path, ids[0], attach=train_tokens).train()
    message = Run(tmp_path, ids[1], attach=train_tokens).refused(resume=True)
    assert "There: " in message


BEST = {
    "eval_strategy": "steps", "eval_steps": 2, "save_steps": 2, "load_best_model_at_end": True,
    "metric_for_best_model": "eval_loss", "greater_is_better": True,
}  # fmt: skip


@each_variant
@pytest.mark.parametrize("noted", [True, pytest.param(False, marks=pytest.mark.slow)])
def test_the_best_checkpoint_is_compared_before_the_first_step(tmp_path, strategy, dtype, noted):
    Run(tmp_path, [A, B], strategy=strategy, dtype=dtype).train(**BEST)
    best = json.loads((tmp_path / "checkpoint-6" / "trainer_state.json").read_text())["best_model_checkpoint"]
    assert best.endswith("checkpoint-2")
    shutil.rmtree(best)
    Run(tmp_path / "other", [B, A], strategy=strategy, dtype=dtype).train(save_steps=2)
    shutil.copytree(tmp_path / "other" / "checkpoint-2", best)
    if not noted:
        without_note(tmp_path / "checkpoint-2")
    run = Run(tmp_path, [A, B], strategy=strategy, dtype=dtype)
    message = run.refused(resume=str(tmp_path / "checkpoint-4"), **BEST)
    assert "checkpoint-2" in message
    assert "There: '<b>', '<a>'. Here: '<a>', '<b>'" in message


def test_a_best_checkpoint_of_which_nothing_is_known_is_told(tmp_path, caplog):
    Run(tmp_path, [A, B]).train(save_rows=False, **BEST)
    without_note(tmp_path / "checkpoint-2")
    with caplog.at_level(logging.WARNING, logger="hf_partial_embed"):
        Run(tmp_path, [A, B]).train(resume=str(tmp_path / "checkpoint-4"), save_rows=False, **BEST)
    assert "The best checkpoint" in caplog.text and "does not say which tokens" in caplog.text


class Vandal(TrainerCallback):
    def __init__(self, model) -> None:
        self.model = model

    def on_step_end(self, args, state, control, **kwargs):
        with torch.no_grad():
            self.model.get_input_embeddings()._parameters["weight"][17, 3] += 1e-3


def test_a_failed_verification_at_the_end_saves_the_trained_rows_first(tmp_path, strategy):
    run = Run(tmp_path, [A, B], [C], strategy=strategy)
    run.steps = Vandal(run.model)
    with pytest.raises(FrozenRowsChangedError, match=r"1 row \(17\)") as caught:
        run.train(save_strategy="no", save_rows=False)
    assert f"The trained rows were saved to {tmp_path / 'token_rows.safetensors'} before this." in str(caught.value)
    for partial, folder in zip(run.partials, (tmp_path, tmp_path / "token_rows_2"), strict=True):
        saved = TokenRows.from_pretrained(folder)
        assert saved.tokens == partial.tokens
        assert torch.equal(saved.input_rows, partial.token_rows().input_rows)
    again = Run(tmp_path, [A, B], [C], strategy=strategy)
    again.steps = Vandal(again.model)
    with pytest.raises(FrozenRowsChangedError, match="unverified-6"):  # files that are there stay
        again.train(save_strategy="no")
    assert torch.equal(TokenRows.from_pretrained(tmp_path / "unverified-6").input_rows, rows_now(again))


def rows_now(run) -> torch.Tensor:
    return run.partials[0].token_rows().input_rows


def test_a_cast_before_the_training_does_not_end_it(tmp_path, strategy):
    run = Run(tmp_path, [A, B], strategy=strategy, dtype=torch.bfloat16)
    run.model.float()
    run.train()
