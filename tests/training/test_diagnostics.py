"""What the callback says of the rows while they train."""

from __future__ import annotations

import copy
import logging
import pickle

import pytest
import torch
from added import add_tokens
from conftest import bpe_tokenizer, build_model
from transformers import Trainer, TrainerCallback, TrainingArguments

from hf_partial_embed import PartialEmbeddingCallback, PartialEmbeddingError, train_tokens
from hf_partial_embed.training.diagnostics import RowDiagnostics, split_elsewhere

TOKENS = ["<think>", "</think>", "praseodymium", "neodymium"]
SEEN = [[5, 300, 7, 301, 9, 10], [6, 300, 8, 303, 9, 4]]


def prepared(kind="llama", tied=True, tokens=TOKENS, **options):
    tokenizer = bpe_tokenizer()
    model = build_model(kind, len(tokenizer), tied=tied).requires_grad_(False)
    return model, tokenizer, add_tokens(model, tokenizer, tokens, **options)


def trainer_of(tmp_path, model, callbacks, sequences=SEEN, labels=None, **options):
    data = [{"input_ids": ids, "labels": other} for ids, other in zip(sequences, labels or sequences, strict=True)]
    settings = {
        "num_train_epochs": 2, "per_device_train_batch_size": 4, "use_cpu": True, "report_to": [], "logging_steps": 1,
        "save_strategy": "no", "disable_tqdm": True, "learning_rate": 1e-2, "seed": 0, "dataloader_pin_memory": False,
        "max_grad_norm": 1e9,
    }  # fmt: skip
    return Trainer(
        model=model,
        args=TrainingArguments(str(tmp_path), **{**settings, **options}),
        train_dataset=data,
        callbacks=callbacks,
    )


def logged(trainer):
    return [entry for entry in trainer.state.log_history if "loss" in entry]


def test_log_has_norms_counts_and_leak(tmp_path, tied, strategy):
    model, _, partial = prepared(tied=tied, strategy=strategy)
    callback = PartialEmbeddingCallback(partial)
    trainer = trainer_of(tmp_path, model, [callback])
    trainer.train()
    first, last = logged(trainer)
    assert last["rows/norm"] == pytest.approx(partial.token_rows().input_rows.norm(dim=1).mean().item())
    assert ("rows/output_norm" in last) == (not tied)
    assert 0 <= last["rows/norm_percentile"] <= 100 and 0 < last["rows/leak"] < 1
    assert first["rows/grad_norm"] == pytest.approx(first["grad_norm"], rel=1e-3)  # nothing but the rows trains
    assert (last["rows/unseen_inputs"], last["rows/unseen_labels"], last["rows/least_seen"]) == (1, 1, 0)
    assert callback.diagnostics[0].counts() == {
        "<think>": (4, 4), "</think>": (2, 2), "praseodymium": (0, 0), "neodymium": (2, 2),
    }  # fmt: skip
    assert not model._forward_pre_hooks or partial._attachment.attached
    assert not any(isinstance(hook, RowDiagnostics) for hook in model._forward_hooks.values())


def test_leak_is_the_probability_where_no_new_token_is_the_label(tmp_path):
    model, _, partial = prepared()
    ids = torch.tensor(SEEN)
    with torch.no_grad():
        probabilities = model(input_ids=ids).logits[:, :-1].softmax(-1)[..., partial.token_ids].sum(-1)
    elsewhere = ids[:, 1:] < 300
    expected = probabilities[elsewhere].mean().item()
    trainer = trainer_of(tmp_path, model, [PartialEmbeddingCallback(partial)], num_train_epochs=1)
    trainer.train()
    assert logged(trainer)[0]["rows/leak"] == pytest.approx(expected, rel=1e-4)


def test_percentile_says_how_unlike_the_old_rows_they_are():
    model, _, partial = prepared()
    with torch.no_grad():
        (rows,) = partial.parameters()
        rows[:2] *= 1e-3
        rows[2:] *= 1e3
    diagnostics = RowDiagnostics(partial)
    diagnostics.start()
    assert diagnostics.values()["norm_percentile"] == pytest.approx(50)
    diagnostics.stop()
    assert len(model._forward_hooks) == 1  # the scope of the rows, which was there before


def test_tokens_that_the_data_lacks_are_named_once_after_the_first_epoch(tmp_path, caplog):
    model, _, partial = prepared()
    labels = [[-100, -100, 7, 301, 9, 10], [6, -100, 8, 303, 9, 4]]
    with caplog.at_level(logging.WARNING, logger="hf_partial_embed"):
        trainer_of(tmp_path, model, [PartialEmbeddingCallback(partial)], labels=labels).train()
    messages = [record.message for record in caplog.records]
    assert sum("1 of 4 tokens" in message and "'praseodymium'" in message for message in messages) == 1
    assert sum("as labels" in message and "'<think>'" in message and "301" not in message for message in messages) == 1


def test_tokens_that_the_data_has_as_other_ids_are_named(tmp_path, caplog):
    before = bpe_tokenizer()
    texts = ["Praseodymium and neodymium are twins", "a name <think> of neodymium", "iron neodymium"]
    sequences = [before(text)["input_ids"] for text in texts]
    length = max(map(len, sequences))
    model, tokenizer, partial = prepared()
    assert split_elsewhere(tokenizer, TOKENS, partial.token_ids, sequences) == {"<think>": 1, "neodymium": 3}
    again = [tokenizer(text)["input_ids"] for text in texts]
    assert split_elsewhere(tokenizer, TOKENS, partial.token_ids, again) == {}
    with caplog.at_level(logging.WARNING, logger="hf_partial_embed"):
        callback = PartialEmbeddingCallback(partial)
        trainer_of(
            tmp_path, model, [callback], sequences=[[1] * (length - len(ids)) + ids for ids in sequences]
        ).train()
    assert any(
        "tokenised before they were added" in r.message and "neodymium (3 times)" in r.message for r in caplog.records
    )


def test_reporters_see_the_values_after_log_first(tmp_path):
    class Reporter(TrainerCallback):
        def __init__(self):
            self.seen = []

        def on_log(self, args, state, control, logs=None, **kwargs):
            self.seen.append(dict(logs))

    for first in (True, False):
        model, _, partial = prepared()
        reporter, callback = Reporter(), PartialEmbeddingCallback(partial)
        trainer = trainer_of(tmp_path, model, [reporter, callback])
        if first:
            callback.log_first(trainer)
        trainer.train()
        assert any("rows/norm" in logs for logs in reporter.seen) == first
        assert all("rows/norm" in entry for entry in logged(trainer))


def test_two_row_sets_have_names_of_their_own_and_none_are_logged_if_not_wanted(tmp_path):
    model, tokenizer, partial = prepared()
    other = train_tokens(model, tokenizer, ["</s>"])
    trainer = trainer_of(tmp_path, model, [PartialEmbeddingCallback([partial, other])])
    trainer.train()
    assert {"rows/norm", "rows_2/norm"} <= set(logged(trainer)[0])
    trainer = trainer_of(tmp_path, model, [PartialEmbeddingCallback(partial, diagnostics=False)])
    trainer.train()
    assert not any(key.startswith("rows") for entry in logged(trainer) for key in entry)


def test_copy_of_a_model_in_training_is_not_watched(tmp_path):
    copies = []

    class Copy(TrainerCallback):
        def on_step_end(self, args, state, control, model=None, **kwargs):
            copies.extend([copy.deepcopy(model), pickle.loads(pickle.dumps(model))])

    model, _, partial = prepared()
    callback = PartialEmbeddingCallback(partial)
    trainer_of(tmp_path, model, [callback, Copy()], num_train_epochs=1).train()
    before = callback.diagnostics[0].counts()
    for copied in copies:
        copied.train()(input_ids=torch.tensor(SEEN), labels=torch.tensor(SEEN)).loss.backward()
    assert callback.diagnostics[0].counts() == before
    assert all(
        hook.__self__.__dict__.keys() <= {"_hooks"}
        for hook in copies[1]._forward_pre_hooks.values()
        if isinstance(getattr(hook, "__self__", None), RowDiagnostics)
    )


def test_nothing_is_computed_at_steps_that_are_not_logged(tmp_path, monkeypatch):
    model, _, partial = prepared()
    asked = []
    monkeypatch.setattr(RowDiagnostics, "_gradient_norm", lambda self, table: asked.append(table) or None)
    options = {"logging_steps": 3, "num_train_epochs": 7, "per_device_train_batch_size": 2}
    trainer_of(tmp_path, model, [PartialEmbeddingCallback(partial)], **options).train()
    assert len(asked) == 2


def test_masked_language_model_is_watched_without_a_shift(tmp_path):
    model, _, partial = prepared("bert")
    trainer = trainer_of(tmp_path, model, [PartialEmbeddingCallback(partial)])
    trainer.train()
    assert 0 < logged(trainer)[0]["rows/leak"] < 1


@pytest.mark.filterwarnings("ignore::FutureWarning")
def test_leak_is_known_with_trls_fused_loss_that_has_no_logits(tmp_path):
    from datasets import Dataset
    from trl import SFTConfig, SFTTrainer

    model, tokenizer, partial = prepared()
    args = SFTConfig(
        output_dir=str(tmp_path), max_steps=1, per_device_train_batch_size=2, report_to=[], use_cpu=True, bf16=False,
        save_strategy="no", disable_tqdm=True, dataloader_pin_memory=False, logging_steps=1,
        activation_checkpointing=False,
    )  # fmt: skip
    with torch.no_grad():
        ids = torch.tensor(SEEN)
        probabilities = model(input_ids=ids).logits[:, :-1].softmax(-1)[..., partial.token_ids].sum(-1)
    trainer = SFTTrainer(
        model=model, args=args, train_dataset=Dataset.from_dict({"input_ids": SEEN}), processing_class=tokenizer,
        callbacks=[PartialEmbeddingCallback(partial)],
    )  # fmt: skip
    trainer.train()
    assert logged(trainer)[0]["rows/leak"] == pytest.approx(probabilities[ids[:, 1:] < 300].mean().item(), rel=1e-3)


def test_liger_without_triton_is_refused_when_the_trainer_is_made(tmp_path, monkeypatch):
    _, _, partial = prepared()
    monkeypatch.setattr("importlib.util.find_spec", lambda name, *_: None)
    callback = PartialEmbeddingCallback(partial)
    args = TrainingArguments(str(tmp_path), use_cpu=True, report_to=[])
    args.use_liger_kernel = True
    with pytest.raises(PartialEmbeddingError, match=r"Switch it off: TrainingArguments\(use_liger_kernel=False\)"):
        callback.on_init_end(args, None, None)
