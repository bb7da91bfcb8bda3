"""`PartialEmbeddingCallback` in a real `transformers.Trainer`."""

from __future__ import annotations

import copy
import logging
from pathlib import Path

import pytest
import torch
from conftest import bpe_tokenizer, build_model, logits_of, snapshot, table_of
from quick import quick
from trainings import TOKENS, Texts, arguments, frozen_part, rows_of, setup, train
from transformers import AutoModelForCausalLM, Trainer, TrainerCallback

from hf_partial_embed import (
    FrozenRowsChangedError,
    PartialEmbeddingCallback,
    PartialEmbeddingError,
    TokenRows,
    add_tokens,
)


# Under mask somebody has to call protect, which the callback does.
@pytest.mark.parametrize(("strategy", "with_callback"), [("split", True), ("split", False), ("mask", True)], ids=str)
def test_old_rows_bit_identical_after_trainer_with_decay(tmp_path, tied, strategy, with_callback):
    tokenizer = bpe_tokenizer()
    base = build_model("llama", len(tokenizer), tied=tied)
    base.requires_grad_(False)
    before = snapshot(base)
    partial = add_tokens(base, tokenizer, TOKENS, strategy=strategy)
    start = partial.token_rows().input_rows
    callbacks = [PartialEmbeddingCallback(partial, learning_rate=2e-2)] if with_callback else []
    train(base, tokenizer, partial, tmp_path, callbacks=callbacks, max_grad_norm=0.5)
    frozen_part(before, base, len(before))
    partial.verify()
    assert not torch.isclose(partial.token_rows().input_rows, start).all(1).any()


RUNS = [
    {},
    {"gradient_accumulation_steps": 2},
    {"bf16": True},
    {"activation_checkpointing": True},
    {"eval_strategy": "steps", "eval_steps": 2, "load_best_model_at_end": True, "save_steps": 2},
    {"optim": "sgd"},
    {"optim": "adafactor"},
    {"lr_scheduler_type": "cosine", "max_grad_norm": 0.1},
    {"save_total_limit": 1},
]
KINDS = [("split", torch.float32), ("split", torch.bfloat16), ("mask", torch.float32)]


# Each kind without options, and each option with one of the kinds in turn.
@pytest.mark.parametrize(
    ("strategy", "dtype", "options"),
    quick(
        [(*kind, options) for kind in KINDS for options in RUNS],
        lambda strategy, dtype, options: (
            not options or RUNS.index(options) % len(KINDS) == KINDS.index((strategy, dtype))
        ),
    ),
    ids=str,
)
def test_resumed_run_continues_bit_for_bit(tmp_path, strategy, dtype, options):
    # Loading rounds Adafactor's own float32 statistics of a bfloat16 body, with or without us.
    setting = {"strategy": strategy, "dtype": dtype, "freeze_body": options.get("optim") == "adafactor"}
    whole_model, tokenizer, whole = setup(**setting)
    callback = PartialEmbeddingCallback(whole, learning_rate=3e-2)
    step = 4 if options.get("save_steps") == 2 else 3
    keep = _KeepCheckpoint(tmp_path / "kept", step)
    train(whole_model, tokenizer, whole, tmp_path / "whole", callbacks=[callback, keep], **options)

    model, tokenizer, partial = setup(**setting)
    callback = PartialEmbeddingCallback(partial, learning_rate=3e-2)
    train(
        model, tokenizer, partial, tmp_path / "resumed", callbacks=[callback],
        resume=str(tmp_path / "kept" / f"checkpoint-{step}"), **options,
    )  # fmt: skip
    for resumed, expected in zip(rows_of(partial), rows_of(whole), strict=True):
        assert torch.equal(resumed, expected)
    for name, tensor in whole_model.state_dict().items():
        assert torch.equal(model.state_dict()[name], tensor), name


class _KeepCheckpoint(TrainerCallback):
    """Copies a checkpoint away, as somebody would who moves it to another machine."""

    def __init__(self, folder: Path, step: int) -> None:
        self.folder, self.step = folder, step

    def on_save(self, args, state, control, **kwargs):
        import shutil

        if state.global_step == self.step:
            name = f"checkpoint-{self.step}"
            shutil.copytree(Path(args.output_dir) / name, self.folder / name)


def test_resume_without_the_callback_is_exact_too(tmp_path):
    model, tokenizer, partial = setup()
    train(model, tokenizer, partial, tmp_path / "a")
    other, tokenizer, again = setup()
    train(other, tokenizer, again, tmp_path / "a", resume=str(tmp_path / "a" / "checkpoint-3"))
    assert torch.equal(rows_of(partial)[0], rows_of(again)[0])


def test_run_with_callback_can_be_resumed_without_and_the_other_way_round(tmp_path):
    model, tokenizer, partial = setup(dtype=torch.bfloat16)
    train(model, tokenizer, partial, tmp_path / "a", callbacks=[PartialEmbeddingCallback(partial)])
    other, tokenizer, again = setup(dtype=torch.bfloat16)
    train(other, tokenizer, again, tmp_path / "b", resume=str(tmp_path / "a" / "checkpoint-3"))
    third, tokenizer, once = setup(dtype=torch.bfloat16)
    train(
        third, tokenizer, once, tmp_path / "c", resume=str(tmp_path / "b" / "checkpoint-6"), max_steps=8,
        callbacks=[PartialEmbeddingCallback(once, learning_rate=1e-3)],
    )  # fmt: skip


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_best_model_is_loaded_with_the_rows_in_their_own_dtype(tmp_path, dtype):
    model, tokenizer, partial = setup(dtype=dtype)
    callback = PartialEmbeddingCallback(partial, learning_rate=0.1)
    seen = _RowsAtSteps(partial)
    trainer = train(
        model, tokenizer, partial, tmp_path, callbacks=[seen, callback], eval_strategy="steps", eval_steps=2,
        save_steps=2, load_best_model_at_end=True, metric_for_best_model="eval_loss",
        greater_is_better=True,  # an early checkpoint is the one to come back
    )  # fmt: skip
    assert trainer.state.best_model_checkpoint is not None
    step = int(trainer.state.best_model_checkpoint.rsplit("-", 1)[1])
    assert step < 6
    assert torch.equal(rows_of(partial)[0], seen.rows[step])


def test_resume_from_a_checkpoint_of_another_base_is_refused_at_once(tmp_path):
    model, tokenizer, partial = setup()
    train(model, tokenizer, partial, tmp_path)
    other, tokenizer, again = setup(seed=1)
    steps = _RowsAtSteps(again)
    with pytest.raises(FrozenRowsChangedError):
        train(
            other, tokenizer, again, tmp_path, resume=str(tmp_path / "checkpoint-3"),
            callbacks=[PartialEmbeddingCallback(again), steps],
        )  # fmt: skip
    assert not steps.rows


class _RowsAtSteps(TrainerCallback):
    def __init__(self, partial) -> None:
        self.partial, self.rows = partial, {}

    def on_step_end(self, args, state, control, **kwargs):
        self.rows[state.global_step] = rows_of(self.partial)[0]


def test_each_checkpoint_is_a_standard_one_with_the_row_file_beside_it(tmp_path, tied, strategy):
    model, tokenizer, partial = setup(tied=tied, strategy=strategy)
    train(model, tokenizer, partial, tmp_path, callbacks=[PartialEmbeddingCallback(partial)], save_total_limit=1)
    assert [path.name for path in tmp_path.glob("checkpoint-*")] == ["checkpoint-6"]
    loaded, info = AutoModelForCausalLM.from_pretrained(tmp_path / "checkpoint-6", output_loading_info=True)
    assert not any(info[key] for key in ("missing_keys", "unexpected_keys", "mismatched_keys"))
    ids = torch.tensor([[5, *partial.token_ids, 9]])
    torch.testing.assert_close(logits_of(loaded, ids), logits_of(model.eval(), ids))
    assert (loaded.lm_head.weight is loaded.get_input_embeddings().weight) == tied
    rows = TokenRows.from_pretrained(tmp_path / "checkpoint-6")
    assert rows.tokens == TOKENS
    assert torch.equal(rows.input_rows, partial.token_rows().input_rows)


class _Recorder(TrainerCallback):
    """Groups as they are in a step, and between steps."""

    def __init__(self) -> None:
        self.between, self.inside = [], []

    def on_train_begin(self, args, state, control, optimizer=None, **kwargs):
        inner = getattr(optimizer, "optimizer", optimizer)
        inner.register_step_pre_hook(lambda opt, *_: self.inside.append([dict(g) for g in opt.param_groups]))

    def on_step_end(self, args, state, control, optimizer=None, lr_scheduler=None, **kwargs):
        self.between.append([(len(g["params"]), g["lr"]) for g in optimizer.param_groups])


def test_rows_have_their_own_rate_and_no_decay_and_the_others_keep_theirs(tmp_path):
    model, tokenizer, partial = setup(freeze_body=False)
    recorder = _Recorder()
    callback = PartialEmbeddingCallback(partial, learning_rate=5e-2)
    train(model, tokenizer, partial, tmp_path, callbacks=[callback, recorder], lr_scheduler_type="linear")
    row = next(iter(partial.parameters()))
    assert all(len(groups) == 2 for groups in recorder.between)
    assert len(recorder.inside) == 6
    for groups in recorder.inside:
        own = [group for group in groups if any(p is row for p in group["params"])]
        others = [group for group in groups if not any(p is row for p in group["params"])]
        assert len(own) == 1
        assert own[0]["weight_decay"] == 0.0
        assert own[0]["lr"] == pytest.approx(5 * others[0]["lr"])
        assert {group["weight_decay"] for group in others} == {0.1, 0.0}


def test_clip_norm_counts_new_rows_only(tmp_path, strategy):
    model, tokenizer, partial = setup(strategy=strategy)
    norms = {}

    class Norms(TrainerCallback):
        def on_pre_optimizer_step(self, args, state, control, **kwargs):
            grads = [p.grad for p in partial.parameters()]
            if strategy == "mask":
                grads = [grad[partial.token_ids] for grad in grads]
            norms[state.global_step + 1] = torch.cat([grad.flatten() for grad in grads]).norm().item()

    trainer = train(model, tokenizer, partial, tmp_path, callbacks=[Norms()], max_grad_norm=1e9)
    logged = {entry["step"]: entry["grad_norm"] for entry in trainer.state.log_history if "grad_norm" in entry}
    assert logged.keys() == norms.keys()
    for step, norm in norms.items():
        assert logged[step] == pytest.approx(norm, rel=1e-5)


def test_changed_frozen_row_is_found_when_training_ends(tmp_path):
    model, tokenizer, partial = setup()

    class Vandal(TrainerCallback):
        def on_step_end(self, args, state, control, **kwargs):
            with torch.no_grad():
                table_of(model)[17, 3] += 1e-3

    callbacks = [PartialEmbeddingCallback(partial), Vandal()]
    with pytest.raises(FrozenRowsChangedError, match=r"model\.embed_tokens\.weight: 1 row \(17\)"):
        train(model, tokenizer, partial, tmp_path, callbacks=callbacks, save_strategy="no")
    train(
        model, tokenizer, partial, tmp_path, save_strategy="no",
        callbacks=[PartialEmbeddingCallback(partial, verify=False)],
    )  # fmt: skip


def test_rows_that_are_not_in_the_optimizer_are_an_error(tmp_path):
    model, _, partial = setup(freeze_body=False)
    data = Texts(partial.token_ids)
    optimizer = torch.optim.SGD([p for n, p in model.named_parameters() if "norm" in n], lr=0.1)
    trainer = Trainer(
        model=model, args=arguments(tmp_path), train_dataset=data, optimizers=(optimizer, None),
        callbacks=[PartialEmbeddingCallback(partial)],
    )  # fmt: skip
    with pytest.raises(PartialEmbeddingError, match="not in the SGD"):
        trainer.train()


@pytest.mark.parametrize("options", [{"learning_rate": -1.0}, {"weight_decay": float("nan")}], ids=str)
def test_callback_refuses_bad_numbers(options):
    _, _, partial = setup()
    with pytest.raises(PartialEmbeddingError, match=next(iter(options))):
        PartialEmbeddingCallback(partial, **options)


def test_two_row_sets_train_beside_each_other(tmp_path):
    model, tokenizer, first = setup()
    second = add_tokens(model, tokenizer, ["<tool>", "</tool>"])
    start = second.token_rows().input_rows
    data = Texts([*first.token_ids, *second.token_ids])
    callback = PartialEmbeddingCallback([first, second], learning_rate=1e-2)
    Trainer(model=model, args=arguments(tmp_path), train_dataset=data, callbacks=[callback]).train()
    assert not torch.isclose(second.token_rows().input_rows, start).all(1).any()
    checkpoint = tmp_path / "checkpoint-6"
    assert TokenRows.from_pretrained(checkpoint).tokens == TOKENS
    assert TokenRows.from_pretrained(checkpoint / "token_rows_2").tokens == ["<tool>", "</tool>"]


def test_trained_head_of_an_untied_model_moves_and_output_false_leaves_it(tmp_path):
    moved = {}
    for output in ("auto", False):
        tokenizer = bpe_tokenizer()
        model = build_model("llama", len(tokenizer), tied=False)
        model.requires_grad_(False)
        partial = add_tokens(model, tokenizer, TOKENS, output=output)
        start = partial.token_rows()
        callback = PartialEmbeddingCallback(partial)
        train(model, tokenizer, partial, tmp_path / str(output), callbacks=[callback])
        rows = partial.token_rows()
        moved[output] = not torch.equal(rows.output_rows, start.output_rows)
        assert not torch.equal(rows.input_rows, start.input_rows)
    assert moved == {"auto": True, False: False}


def test_users_trainable_parameters_train_and_frozen_ones_do_not(tmp_path, strategy):
    tokenizer = bpe_tokenizer()
    model = build_model("llama", len(tokenizer))
    model.requires_grad_(False)
    model.model.layers[1].requires_grad_(True)
    before = copy.deepcopy(dict(model.named_parameters()))
    partial = add_tokens(model, tokenizer, TOKENS, strategy=strategy)
    train(model, tokenizer, partial, tmp_path, callbacks=[PartialEmbeddingCallback(partial)])
    for name, parameter in model.named_parameters():
        if "layers.1." in name:
            assert not torch.equal(parameter, before[name]), name
        elif name in before and "embed" not in name:
            assert torch.equal(parameter, before[name]), name


def test_says_so_when_exact_rows_cannot_be_restored(tmp_path, caplog):
    model, tokenizer, partial = setup(dtype=torch.bfloat16)
    train(model, tokenizer, partial, tmp_path / "a")  # no callback: nobody has stored the exact rows
    other, tokenizer, again = setup(dtype=torch.bfloat16)
    with caplog.at_level(logging.WARNING, logger="hf_partial_embed.training.callback"):
        train(
            other, tokenizer, again, tmp_path / "b", resume=str(tmp_path / "a" / "checkpoint-3"),
            callbacks=[PartialEmbeddingCallback(again)],
        )  # fmt: skip
    assert "rounded to the table's dtype" in caplog.text
