"""One of two processes: trains rows under an engine, and compares with one process on the same batches.

    RANK=0 WORLD_SIZE=2 ... python tests/distributed_cases.py fsdp2 FOLDER

What became of each case is written to `FOLDER/RANK.json`.
"""

from __future__ import annotations

import copy
import json
import os
import sys
import traceback
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import timedelta
from functools import partial as bound
from pathlib import Path

import torch
import torch.distributed as dist
from accelerate import DistributedType, PartialState
from conftest import bpe_tokenizer, build_model
from torch import nn
from torch.distributed.algorithms.ddp_comm_hooks import default_hooks
from torch.distributed.fsdp import FullStateDictConfig, FullyShardedDataParallel, StateDictType, fully_shard
from torch.distributed.tensor import Shard, distribute_tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from transformers import AutoModelForCausalLM, DistributedConfig, Trainer, TrainingArguments
from transformers.integrations.deepspeed import unset_hf_deepspeed_config

from hf_partial_embed import (
    FrozenRowsChangedError,
    PartialEmbeddingCallback,
    PartialEmbeddingError,
    TokenRows,
    add_tokens,
    train_tokens,
)
from hf_partial_embed.modules.splitting import split_module
from hf_partial_embed.training.diagnostics import RowDiagnostics
from hf_partial_embed.training.optimizers import auto_learning_rate

RANK = int(os.environ.get("RANK", "0"))
WORLD = int(os.environ.get("WORLD_SIZE", "2"))
TOKENS = ["<think>", "</think>", "<tool>"]
STEPS, LR = 3, 0.01


@dataclass
class Setting:
    """How a model is trained."""

    tied: bool = True
    dtype: torch.dtype = torch.float32
    accumulate: int = 1
    checkpointing: bool = False
    strategy: str = "split"

    @property
    def name(self) -> str:
        parts = ["tied" if self.tied else "untied", str(self.dtype).removeprefix("torch.")]
        parts += ["accumulated"] if self.accumulate > 1 else []
        parts += ["checkpointed"] if self.checkpointing else []
        return "-".join(parts)


def base_model(setting: Setting):
    torch.manual_seed(0)
    model = build_model("llama", len(bpe_tokenizer()), tied=setting.tied, dtype=setting.dtype).train()
    if setting.dtype != torch.float32:
        model.requires_grad_(False)  # FSDP trains parameters of one dtype in a group
    if setting.checkpointing:
        model.gradient_checkpointing_enable({"use_reentrant": False})
    return model


def batches(setting: Setting, vocabulary: int, new: list[int]) -> list[list[list[torch.Tensor]]]:
    """Ids by step, process and part of the step. At the second step one process has no new token."""
    generator = torch.Generator().manual_seed(1)
    steps = []
    for step in range(STEPS):
        ranks = []
        for rank in range(WORLD):
            parts = []
            for _ in range(setting.accumulate):
                ids = torch.randint(4, vocabulary, (2, 8), generator=generator)
                if not (step == 1 and rank == 1):
                    ids[:, 2:5] = torch.tensor(new)
                parts.append(ids)
            ranks.append(parts)
        steps.append(ranks)
    return steps


def loss_of(model: nn.Module, ids: torch.Tensor) -> torch.Tensor:
    logits = model(input_ids=ids).logits.float()
    return nn.functional.cross_entropy(logits[:, :-1].flatten(0, 1), ids[:, 1:].flatten())


def train_alone(
    setting: Setting, *, partial=None, dtype: torch.dtype | None = None, decay: float = 0.1, clip: float = 0.0
):
    """The rows that one process arrives at with all processes' batches."""
    if partial is None:
        partial = add_tokens(base_model(setting), bpe_tokenizer(), TOKENS, strategy=setting.strategy, dtype=dtype)
    model, tokenizer = partial.model, partial.tokenizer
    optimizer = torch.optim.AdamW(partial.parameters(), lr=LR, weight_decay=decay)
    partial.protect(optimizer)
    for ranks in batches(setting, len(tokenizer), partial.token_ids):
        for parts in ranks:
            for ids in parts:
                (loss_of(model, ids) / (WORLD * setting.accumulate)).backward()
        if clip:
            nn.utils.clip_grad_norm_(partial.parameters(), clip)
        optimizer.step()
        optimizer.zero_grad()
    return partial


def train(setting: Setting, model: nn.Module, optimizer, new: list[int], *, step=None, backward=None) -> None:
    """Train on this process's share of the batches."""
    for ranks in batches(setting, len(bpe_tokenizer()) + len(new), new):
        for number, ids in enumerate(ranks[RANK]):
            if hasattr(model, "require_backward_grad_sync"):  # DDP
                model.require_backward_grad_sync = number == setting.accumulate - 1
            loss = loss_of(model, ids) / setting.accumulate
            if backward is not None:
                backward(loss)
            else:
                loss.backward()
        if step is not None:
            step()
        else:
            optimizer.step()
            optimizer.zero_grad()


def check_result(setting: Setting, partial, folder: Path, *, tolerance: float, alone=None, save=None) -> None:
    """What holds after a training, under any engine."""
    rows, expected = partial.token_rows().tensors(), (alone or train_alone(setting)).token_rows().tensors()
    assert rows.keys() == expected.keys()
    for name in rows:
        difference = (rows[name] - expected[name]).abs().max().item()
        assert rows[name].dtype == expected[name].dtype and difference <= tolerance, f"{name}: {difference:.3g}"
        everywhere = [torch.empty_like(rows[name]) for _ in range(WORLD)]
        dist.all_gather(everywhere, rows[name].contiguous())
        assert all(torch.equal(rows[name], other) for other in everywhere), f"{name} differs between processes"
    partial.verify()
    before = base_model(setting).state_dict()
    if save is None:
        partial.model.save_pretrained(folder, is_main_process=RANK == 0)
    else:
        save(folder)
    partial.tokenizer.save_pretrained(folder / f"tokenizer-{RANK}")
    dist.barrier()
    if "deepspeed" in sys.modules:
        unset_hf_deepspeed_config()  # it would shard at loading
    loaded, info = AutoModelForCausalLM.from_pretrained(folder, dtype=setting.dtype, output_loading_info=True)
    assert not info["missing_keys"] and not info["unexpected_keys"], info
    assert loaded.config.vocab_size == len(partial.tokenizer)
    size = len(bpe_tokenizer())
    for name, value in loaded.state_dict().items():
        old = value[:size] if value.shape != before[name].shape else value
        assert torch.equal(old, before[name]), f"{name} has changed"
    ids = partial.token_ids
    written = {"input_rows": loaded.get_input_embeddings().weight, "output_rows": loaded.lm_head.weight}
    for name in rows:
        assert torch.equal(written[name].detach()[ids], rows[name].to(setting.dtype)), f"{name} in the checkpoint"
    assert (loaded.lm_head.weight is loaded.get_input_embeddings().weight) == setting.tied
    partial.save_pretrained(folder / f"rows-{RANK}")


def saving(model, state: dict[str, torch.Tensor]) -> Callable[[Path], None]:
    """Saves what an engine has gathered, as the engines' own examples do it."""
    return lambda folder: model.save_pretrained(folder, state_dict=state, is_main_process=RANK == 0)


SETTINGS = [
    Setting(tied, dtype, accumulate, checkpointing)
    for tied in (True, False)
    for dtype, accumulate, checkpointing in (
        (torch.float32, 1, False),
        (torch.bfloat16, 1, False),
        (torch.float32, 2, False),
        (torch.float32, 1, True),
    )
]


def ddp(setting: Setting, folder: Path) -> None:
    model, tokenizer = base_model(setting), bpe_tokenizer()
    partial = add_tokens(model, tokenizer, TOKENS, strategy=setting.strategy)
    wrapped = nn.parallel.DistributedDataParallel(model)
    optimizer = torch.optim.AdamW(partial.parameters(), lr=LR, weight_decay=0.1)
    partial.protect(optimizer)
    train(setting, wrapped, optimizer, partial.token_ids)
    check_result(setting, partial, folder, tolerance=1e-6)


def fsdp2(setting: Setting, folder: Path) -> None:
    model, tokenizer = base_model(setting), bpe_tokenizer()
    partial = add_tokens(model, tokenizer, TOKENS)
    sharded_by_fsdp2(model)
    trainable = [parameter for parameter in model.parameters() if parameter.requires_grad]
    optimizer = torch.optim.AdamW(partial.parameters(), lr=LR, weight_decay=0.1)
    assert {id(p) for group in optimizer.param_groups for p in group["params"]} <= {id(p) for p in trainable}
    train(setting, model, optimizer, partial.token_ids)
    assert hasattr(next(partial.parameters()), "placements")
    state = {name: value.full_tensor() for name, value in model.state_dict().items()}
    check_result(setting, partial, folder, tolerance=1e-6, save=saving(model, state))


def fsdp1(setting: Setting, folder: Path) -> None:
    model, tokenizer = base_model(setting), bpe_tokenizer()
    partial = add_tokens(model, tokenizer, TOKENS, dtype=setting.dtype)
    wrapped = sharded_by_fsdp1(model)
    optimizer = torch.optim.AdamW(partial.parameters(), lr=LR, weight_decay=0.1)
    train(setting, wrapped, optimizer, partial.token_ids)
    with FullyShardedDataParallel.state_dict_type(wrapped, StateDictType.FULL_STATE_DICT, FullStateDictConfig()):
        state = wrapped.state_dict()
    # Gradients are reduced in the parameters' dtype.
    tolerance = 1e-6 if setting.dtype == torch.float32 else 1e-3
    alone = train_alone(setting, dtype=setting.dtype)
    check_result(setting, partial, folder, tolerance=tolerance, alone=alone, save=saving(model, state))


def zero_options(stage: int, accumulate: int = 1) -> dict:
    return {
        "train_micro_batch_size_per_gpu": 2,
        "gradient_accumulation_steps": accumulate,
        "zero_optimization": {"stage": stage, "stage3_param_persistence_threshold": 0},
        "zero_allow_untested_optimizer": True,
        "gradient_clipping": 0.0,
    }


def zero(stage: int) -> Callable:
    def run(setting: Setting, folder: Path) -> None:
        import deepspeed

        model, tokenizer = base_model(setting), bpe_tokenizer()
        partial = add_tokens(model, tokenizer, TOKENS)
        config = zero_options(stage, accumulate=setting.accumulate)
        if setting.dtype == torch.bfloat16:
            config["bf16"] = {"enabled": True}
        optimizer = torch.optim.AdamW(partial.parameters(), lr=LR, weight_decay=0.1)
        engine, optimizer, _, _ = deepspeed.initialize(model=model, optimizer=optimizer, config=config)
        for ranks in batches(setting, len(tokenizer), partial.token_ids):
            for ids in ranks[RANK]:
                engine.backward(loss_of(engine, ids))
                engine.step()
        state = engine._zero3_consolidated_16bit_state_dict() if stage == 3 else engine.module.state_dict()
        # With bf16 enabled DeepSpeed computes and reduces gradients in bfloat16, whatever the rows' dtype.
        tolerance = 1e-6 if setting.dtype == torch.float32 else 1e-3
        check_result(setting, partial, folder, tolerance=tolerance, save=saving(model, state))

    return run


def frozen_model(setting: Setting):
    return base_model(setting).requires_grad_(False)


def data_of(setting: Setting, vocabulary: int, new: list[int]) -> list[dict[str, torch.Tensor]]:
    """The same batches as examples, in the order in which the Trainer gives batches to processes."""
    examples = []
    for ranks in batches(setting, vocabulary, new):
        for part in range(setting.accumulate):
            for parts in ranks:
                examples += [{"input_ids": ids, "labels": ids} for ids in parts[part]]
    return examples


def trainer_of(setting: Setting, folder: Path, model, partial, options: dict):
    os.environ["ACCELERATE_USE_CPU"] = "true"
    args = TrainingArguments(
        output_dir=str(folder / "run"), max_steps=STEPS, per_device_train_batch_size=2, learning_rate=LR,
        lr_scheduler_type="constant", max_grad_norm=0.1, weight_decay=0.1, train_sampling_strategy="sequential",
        save_steps=2, logging_steps=1, report_to=[], gradient_accumulation_steps=setting.accumulate,
        gradient_checkpointing=setting.checkpointing, disable_tqdm=True, **options,
    )  # fmt: skip
    if args.fsdp or args.deepspeed:
        claim_gpus(args)
    data = data_of(setting, len(partial.tokenizer), partial.token_ids)
    return Trainer(
        model=model, args=args, train_dataset=data, processing_class=partial.tokenizer,
        callbacks=[PartialEmbeddingCallback(partial)],
    )  # fmt: skip


def by_trainer(wrapped_type: str, *, tolerance: float = 1e-6, resumes: bool = True, **options) -> Callable:
    """Training by `Trainer`, and the same again with an interruption after two steps."""

    def run(setting: Setting, folder: Path) -> None:
        model, tokenizer = frozen_model(setting), bpe_tokenizer()
        partial = add_tokens(model, tokenizer, TOKENS)
        trainer = trainer_of(setting, folder, model, partial, options)
        trainer.train()
        assert wrapped_type in type(trainer.model_wrapped).__name__, type(trainer.model_wrapped).__name__
        assert any("rows/norm" in entry for entry in trainer.state.log_history)
        alone = train_alone(setting, decay=0.0, clip=0.1)
        check_result(setting, partial, folder / "saved", tolerance=tolerance, alone=alone, save=trainer.save_model)
        rows = partial.token_rows().tensors()
        checkpoint = folder / "run" / "checkpoint-2"
        saved = TokenRows.from_pretrained(checkpoint)
        assert saved.tokens == TOKENS
        AutoModelForCausalLM.from_pretrained(checkpoint)
        if not resumes:
            return
        model, tokenizer = frozen_model(setting), bpe_tokenizer()
        again = add_tokens(model, tokenizer, TOKENS, init="mean")
        trainer_of(setting, folder, model, again, options).train(resume_from_checkpoint=str(checkpoint))
        for name, values in again.token_rows().tensors().items():
            assert torch.equal(values, rows[name]), f"{name} after a resume: {(values - rows[name]).abs().max():.3g}"
        again.verify()

    return run


def refuses_another_order(**options) -> Callable:
    """Every process refuses, before the first step, a checkpoint whose rows are those of other tokens' positions."""

    def run(folder: Path) -> None:
        setting = Setting(dtype=torch.bfloat16)
        model, tokenizer = frozen_model(setting), bpe_tokenizer()
        partial = add_tokens(model, tokenizer, TOKENS)
        trainer_of(setting, folder, model, partial, options).train()
        for tokens in (TOKENS[::-1], [*TOKENS[:2], "<other>"]):
            model, tokenizer = frozen_model(setting), bpe_tokenizer()
            again = add_tokens(model, tokenizer, tokens)
            trainer = trainer_of(setting, folder, model, again, options)
            with raises("are taken from a checkpoint by position"):
                trainer.train(resume_from_checkpoint=str(folder / "run" / "checkpoint-2"))
            assert trainer.state.global_step == 2

    return run


def claim_gpus(args: TrainingArguments) -> None:
    """Without GPUs accelerate makes DDP of FSDP and of ZeRO, and does not say so."""
    assert args.device.type == "cpu"
    if args.deepspeed:
        os.environ["ACCELERATE_USE_CPU"] = "false"
        PartialState._shared_state["distributed_type"] = DistributedType.DEEPSPEED
        return
    PartialState._shared_state["distributed_type"] = DistributedType.MULTI_GPU


def fsdp2_transformers(setting: Setting, folder: Path) -> None:
    """Sharded by `from_pretrained`: the model is loaded with its tokens, whose rows are then trained."""
    whole, tokenizer = frozen_model(setting), bpe_tokenizer()
    add_tokens(whole, tokenizer, TOKENS).merge()
    base = folder / "base"
    whole.save_pretrained(base, is_main_process=RANK == 0)
    dist.barrier()
    config = DistributedConfig(fsdp_size=WORLD)
    model = AutoModelForCausalLM.from_pretrained(base, distributed_config=config, dtype=setting.dtype)
    model.train().requires_grad_(False)
    with raises("is sharded already, and has 303 rows, where 304 are needed"):
        add_tokens(model, tokenizer, ["<new>"])
    with raises("strategy='split'"):
        train_tokens(model, tokenizer, TOKENS, strategy="mask")
    partial = train_tokens(model, tokenizer, TOKENS)
    trainer = trainer_of(setting, folder, model, partial, {"save_only_model": True})
    trainer.train()
    whole = AutoModelForCausalLM.from_pretrained(base, dtype=setting.dtype).train().requires_grad_(False)
    alone = train_alone(setting, partial=train_tokens(whole, tokenizer, TOKENS), decay=0.0, clip=0.1)
    # Rows inside of the table: the head's gradient takes the table's own out again, in the table's dtype.
    tolerance = 1e-6 if setting.dtype == torch.float32 else 1e-3
    check_result(setting, partial, folder / "saved", tolerance=tolerance, alone=alone, save=trainer.save_model)
    with raises("Cannot merge: the model is sharded"):
        partial.merge()
    with raises("Cannot detach: the model is sharded"):
        partial.detach()


@contextmanager
def raises(text: str) -> Iterator[None]:
    try:
        yield
    except PartialEmbeddingError as error:
        assert text in str(error), error
    else:
        raise AssertionError(f"not refused: {text}")


def zero_config(stage: int) -> dict:
    return {
        "deepspeed": {
            "train_micro_batch_size_per_gpu": "auto", "gradient_accumulation_steps": "auto",
            "gradient_clipping": "auto", "zero_allow_untested_optimizer": True,
            "zero_optimization": {
                "stage": stage, "stage3_param_persistence_threshold": 0,
                "stage3_gather_16bit_weights_on_model_save": True,
            },
        }
    }  # fmt: skip


def mask_is_right(folder: Path) -> None:
    for tied in (True, False):
        ddp(Setting(tied, strategy="mask"), folder / str(tied))


def mask_is_right_in_trainer(folder: Path) -> None:
    setting = Setting(strategy="mask")
    model, tokenizer = frozen_model(setting), bpe_tokenizer()
    partial = add_tokens(model, tokenizer, TOKENS, strategy="mask")
    trainer = trainer_of(setting, folder, model, partial, {})
    trainer.train()
    alone = train_alone(setting, decay=0.0, clip=0.1)
    check_result(setting, partial, folder / "saved", tolerance=1e-6, alone=alone, save=trainer.save_model)


def refuses_mask(wrap: Callable[[nn.Module], nn.Module]) -> Callable:
    """A model that is sharded after `add_tokens(strategy="mask")` does not train as if nothing were."""

    def run(folder: Path) -> None:
        setting = Setting()
        model, tokenizer = base_model(setting), bpe_tokenizer()
        add_tokens(model, tokenizer, TOKENS, strategy="mask")
        ids = torch.arange(8).unsqueeze(0)
        with raises("strategy='split'"):
            loss_of(wrap(model), ids).backward()

    return run


def sharded_by_fsdp2(model: nn.Module) -> nn.Module:
    for layer in model.model.layers:
        fully_shard(layer)
    return fully_shard(model)


def sharded_by_fsdp1(model: nn.Module) -> nn.Module:
    return FullyShardedDataParallel(model, use_orig_params=True, device_id=torch.device("cpu"))


def sharded_by_zero3(model: nn.Module) -> nn.Module:
    import deepspeed

    trainable = [parameter for parameter in model.parameters() if parameter.requires_grad]
    optimizer = torch.optim.AdamW(trainable, lr=LR)
    return deepspeed.initialize(model=model, optimizer=optimizer, config=zero_options(3))[0]


def refuses_mask_in_trainer(folder: Path) -> None:
    """ZeRO-1 leaves the tables whole, but steps on a flat copy of them."""
    setting = Setting()
    model, tokenizer = frozen_model(setting), bpe_tokenizer()
    partial = add_tokens(model, tokenizer, TOKENS, strategy="mask")
    with raises("strategy='split'"):
        trainer_of(setting, folder, model, partial, zero_config(1)).train()


def refuses_a_shared_group(folder: Path) -> None:
    """ZeRO flattens a parameter group: rows in it cannot have a rate of their own."""
    setting = Setting()
    model, tokenizer = base_model(setting), bpe_tokenizer()
    partial = add_tokens(model, tokenizer, TOKENS)
    with raises("flattened the rows into one parameter group"):
        trainer_of(setting, folder, model, partial, zero_config(1)).train()


def refuses_tokens_after_sharding(folder: Path) -> None:
    model, tokenizer = base_model(Setting()), bpe_tokenizer()
    before = tokenizer.get_vocab()
    sharded_by_fsdp2(model)
    with raises("Add the tokens before the model is sharded"):
        add_tokens(model, tokenizer, TOKENS)
    assert tokenizer.get_vocab() == before


def refuses_tokens_after_loading_by_zero3(folder: Path) -> None:
    import deepspeed

    model, tokenizer = base_model(Setting()), bpe_tokenizer()
    deepspeed.zero.Init(module=model)
    with raises("is held by DeepSpeed ZeRO-3"):
        add_tokens(model, tokenizer, TOKENS)


def rows_inside_a_sharded_table_train(folder: Path) -> None:
    setting = Setting()
    ids = [5, 9, 200]
    model, tokenizer = base_model(setting), bpe_tokenizer()
    alone, used = train_tokens(base_model(setting), None, ids), train_tokens(model, None, ids)
    used.detach()
    sharded_by_fsdp2(model)
    partial = train_tokens(model, tokenizer, ids)
    assert partial.token_rows().input_rows.shape == (3, 16)
    for rows, trained in ((alone, alone.model), (partial, model)):
        optimizer = torch.optim.AdamW(rows.parameters(), lr=LR, weight_decay=0.1)
        for ranks in batches(setting, len(tokenizer), ids):
            for rank, (batch,) in enumerate(ranks):
                if trained is model and rank == RANK:
                    loss_of(model, batch).backward()
                elif trained is not model:
                    (loss_of(trained, batch) / WORLD).backward()
            optimizer.step()
            optimizer.zero_grad()
    expected = alone.token_rows().input_rows
    torch.testing.assert_close(partial.token_rows().input_rows, expected, rtol=0, atol=1e-6)
    partial.verify()
    with raises("a second one cannot be added"):
        train_tokens(model, tokenizer, [7])


def reserved_tokens_are_taken_over_after_sharding(folder: Path) -> None:
    """No table changes its shape, so new tokens come to a model that is sharded already, or was loaded so."""
    setting = Setting()
    reserved = [f"<|reserved_{number}|>" for number in range(3)]

    def start():
        tokenizer = bpe_tokenizer()
        size = len(tokenizer)
        tokenizer.add_tokens(reserved)
        model = build_model("llama", len(tokenizer), tied=setting.tied).train()
        with torch.no_grad():
            model.get_input_embeddings().weight[size:] = 0
        return model, tokenizer

    expected = add_tokens(*start(), TOKENS, reuse="auto").token_rows()
    model, tokenizer = start()
    model.save_pretrained(folder / "base") if RANK == 0 else None
    dist.barrier()
    config = DistributedConfig(fsdp_size=WORLD)
    loaded = AutoModelForCausalLM.from_pretrained(folder / "base", distributed_config=config)
    for sharded in (sharded_by_fsdp2(model), loaded):
        words = copy.deepcopy(tokenizer)
        partial = add_tokens(sharded, words, TOKENS, reuse="auto")
        assert partial.token_ids == expected.token_ids == [300, 301, 302]
        assert len(words) == len(tokenizer)
        assert torch.equal(partial.token_rows().input_rows, expected.input_rows)
        optimizer = torch.optim.AdamW(partial.parameters(), lr=LR, weight_decay=0.1)
        for (ids,), _ in batches(setting, 300, partial.token_ids):
            loss_of(sharded, ids).backward()
            optimizer.step()
            optimizer.zero_grad()
        partial.verify()
        assert (partial.token_rows().input_rows != expected.input_rows).any(1).all()
    with raises("Add the tokens before the model is sharded"):
        add_tokens(sharded_by_fsdp2(start()[0]), bpe_tokenizer(), ["<a>", "<b>", "<c>", "<d>"], reuse="auto")


def rows_of_another_dtype_have_a_group(folder: Path) -> None:
    """Beside a bfloat16 model that trains too, float32 rows are sharded by themselves."""
    setting = Setting(dtype=torch.bfloat16)
    model, tokenizer = base_model(setting).requires_grad_(True), bpe_tokenizer()
    partial = add_tokens(model, tokenizer, TOKENS)
    fully_shard(model.get_input_embeddings().new_rows, reshard_after_forward=False)
    sharded_by_fsdp2(model)
    optimizer = torch.optim.AdamW(partial.parameters(), lr=LR, weight_decay=0.1)
    train(setting, model, optimizer, partial.token_ids)
    expected = train_alone(setting).token_rows().input_rows
    torch.testing.assert_close(partial.token_rows().input_rows, expected, rtol=0, atol=1e-6)
    assert next(partial.parameters()).dtype == torch.float32


def a_changed_row_is_found_on_every_process(folder: Path) -> None:
    model, tokenizer = base_model(Setting()), bpe_tokenizer()
    partial = add_tokens(model, tokenizer, TOKENS)
    sharded_by_fsdp2(model)
    partial.verify()
    if RANK == 1:
        part = model.get_input_embeddings()._parameters["weight"].to_local()
        part.detach()[3, 0] += 1  # the second half of 303 rows begins at 152
    try:
        partial.verify()
    except FrozenRowsChangedError as error:
        assert "155" in str(error), error
    else:
        raise AssertionError("not found")


def rate_of_old_rows_and_no_chunked_loss(folder: Path) -> None:
    model, tokenizer = frozen_model(Setting()), bpe_tokenizer()
    partial = add_tokens(model, tokenizer, TOKENS)
    expected = auto_learning_rate(partial)
    sharded_by_fsdp2(model)
    assert auto_learning_rate(partial) == expected
    with raises("chunked_loss reads the head"):
        PartialEmbeddingCallback(partial, chunked_loss=True)


def ddp_sends_rows_only(folder: Path) -> None:
    sent = []

    def count(state, bucket):
        sent.append(bucket.buffer().numel())
        return default_hooks.allreduce_hook(dist.group.WORLD, bucket)

    setting = Setting(tied=False)
    model, tokenizer = frozen_model(setting), bpe_tokenizer()
    partial = add_tokens(model, tokenizer, TOKENS)
    wrapped = nn.parallel.DistributedDataParallel(model)
    wrapped.register_comm_hook(None, count)
    train(setting, wrapped, torch.optim.AdamW(partial.parameters(), lr=LR), partial.token_ids)
    rows = 2 * len(TOKENS) * 16  # of the input embeddings and of the head
    assert sum(sent) == STEPS * rows, sent


class _Sent(TorchDispatchMode):
    """Counts the bytes of the largest tensor that each collective is given, by the kind of collective."""

    def __init__(self) -> None:
        super().__init__()
        self.bytes: Counter = Counter()

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        namespace, _, name = str(function).partition(".")
        if namespace == "c10d":
            kind = name.lstrip("_").partition("_base")[0].partition(".")[0].rstrip("_")
            self.bytes[kind] += max(t.nbytes for t in tree_leaves((args, kwargs)) if isinstance(t, torch.Tensor))
        return function(*args, **(kwargs or {}))


def fsdp2_reduces_rows_only(folder: Path) -> None:
    """What is sent for gradients are the rows; tables are gathered as those of any frozen model are."""

    def bytes_of(rows_train: bool) -> Counter:
        setting = Setting(tied=False)
        model, tokenizer = frozen_model(setting), bpe_tokenizer()
        partial = add_tokens(model, tokenizer, TOKENS)
        if not rows_train:  # the same tables, all frozen
            model = partial.merge().requires_grad_(False)
            model.model.layers[0].input_layernorm.weight.requires_grad_(True)  # as far back as the rows
        sharded_by_fsdp2(model)
        optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=LR)
        with _Sent() as counted:
            train(setting, model, optimizer, partial.token_ids)
        return counted.bytes

    ours, frozen = bytes_of(True), bytes_of(False)
    padded = 2 * (2 * WORLD) * 16 * 4  # two tables; parts have as many rows on each process, in float32
    assert ours["reduce_scatter"] == STEPS * padded, ours
    gathered = ours["allgather"] - frozen["allgather"]
    assert 0 < gathered <= STEPS * padded, (ours, frozen)
    assert not ours["allreduce"]


def no_table_is_gathered_to_look_at_rows(folder: Path) -> None:
    """Reading, verifying and writing the rows into the sharded tables sends the rows, and a digest of each row."""
    model, tokenizer = frozen_model(Setting(tied=False)), bpe_tokenizer()
    partial = add_tokens(model, tokenizer, TOKENS)
    sharded_by_fsdp2(model)
    rows, size = 2 * len(TOKENS) * 16 * 4, len(tokenizer)
    with _Sent() as reading:
        partial.token_rows()
    with _Sent() as writing:
        model.state_dict()
    with _Sent() as verifying:
        partial.verify()
    assert reading.bytes == writing.bytes == Counter(allreduce=rows), (reading.bytes, writing.bytes)
    assert verifying.bytes == Counter(allreduce=2 * size * (8 + 1)), verifying.bytes


def rows_along_another_dimension_are_written(folder: Path) -> None:
    """A table with a column for each token, `[d, V]`, which FSDP2 shards by its other dimension."""
    torch.manual_seed(0)
    module = nn.Module()
    module.weight = nn.Parameter(torch.randn(5, 11))
    before, rows = module.weight.detach().clone(), torch.randn(3, 5)
    split_module(module, {"weight": nn.Parameter(rows.clone())}, [2, 7, 4], dims={"weight": 1})
    fully_shard(module)
    written = module.state_dict()["weight"].full_tensor()
    expected = before.index_copy(1, torch.tensor([2, 7, 4]), rows.T)
    assert torch.equal(written, expected), (written - expected).abs().max(0)
    module.load_state_dict({"weight": distribute_tensor(before, module._parameters["weight"].device_mesh, [Shard(0)])})
    assert torch.equal(module._row_sources["weight"].whole_rows(), before[:, [2, 7, 4]].T)


def refuses_tensor_parallelism(folder: Path) -> None:
    whole, tokenizer = base_model(Setting(tied=False)), bpe_tokenizer()
    whole.save_pretrained(folder / "base", is_main_process=RANK == 0)
    dist.barrier()
    config = DistributedConfig(tp_size=WORLD)
    model = AutoModelForCausalLM.from_pretrained(folder / "base", distributed_config=config)
    size = len(tokenizer)
    with raises("by tensor parallelism"):
        add_tokens(model, tokenizer, TOKENS)
    with raises("by tensor parallelism"):
        train_tokens(model, tokenizer, [5])
    assert len(tokenizer) == size


def fsdp_options(**more) -> dict:
    config = {"version": 2, "transformer_layer_cls_to_wrap": ["LlamaDecoderLayer"], **more}
    return {"fsdp": True, "fsdp_config": config}


def loaded_on_one_process(folder: Path) -> None:
    """accelerate sends the values from the first process to parameters on the meta device; ties last."""
    by_trainer("FSDP", **fsdp_options(cpu_ram_efficient_loading=True))(Setting(dtype=torch.bfloat16), folder)


class _FusedLoss:
    """Takes the logits out of the output, as a fused loss leaves it."""

    def __init__(self, model: nn.Module) -> None:
        self.logits = []
        model.register_forward_hook(self._drop)

    def _drop(self, module, args, output):
        self.logits.append(output.logits.detach())
        return type(output)(loss=output.loss)


def leak_is_measured_where_one_process_has_no_position(folder: Path) -> None:
    """The head is a group of its own, which both processes have to gather; only one has old tokens as labels."""
    for root, own in ((False, True), (False, False), (True, False)):
        setting = Setting(tied=False)
        model, tokenizer = frozen_model(setting), bpe_tokenizer()
        partial = add_tokens(model, tokenizer, TOKENS)
        if own:
            fully_shard(model.lm_head)
        for layer in model.model.layers:
            fully_shard(layer)
        fully_shard(model, reshard_after_forward=root)
        fused, diagnostics = _FusedLoss(model), RowDiagnostics(partial)
        diagnostics.start()
        diagnostics.sampling = True
        old = torch.arange(10, 18).repeat(2, 1)
        nothing = torch.full_like(old, -100)
        # The process without a position at the first forward has one at the second.
        for labels in (old, nothing) if RANK == 0 else (nothing, old):
            model(input_ids=old, labels=labels)
        found = diagnostics.values().get("leak")
        diagnostics.stop()
        if root and not own:  # not here any more after the forward, and no module to bring it back
            assert found is None, found
        elif RANK == 0:
            probabilities = fused.logits[0][:, :-1].softmax(-1)[..., partial.token_ids].sum(-1)
            assert abs(found - probabilities.mean().item()) < 1e-6, (found, probabilities.mean())
        else:
            assert found is None, found
        dist.barrier()


def gradient_norm_is_that_of_all_processes(shard: Callable[[nn.Module], nn.Module]) -> Callable:
    def run(folder: Path) -> None:
        norms = []
        for sharded in (False, True):
            setting = Setting(tied=False)
            model, tokenizer = base_model(setting), bpe_tokenizer()
            partial = add_tokens(model, tokenizer, TOKENS)
            wrapped = shard(model) if sharded else model
            ids = torch.arange(8).repeat(2, 1)
            ids[:, 2:5] = torch.tensor(partial.token_ids)
            loss_of(wrapped, ids).backward()  # the same on both, so that the mean over processes is what one has
            diagnostics = RowDiagnostics(partial)
            diagnostics.start()
            diagnostics.sampling = True
            diagnostics.look_at_gradients()
            norms.append(diagnostics.values()["grad_norm"])
        assert abs(norms[0] - norms[1]) <= 1e-5 * norms[0], norms

    return run


def engines_are_handed_merged_weights(folder: Path) -> None:
    """What a generation engine is sent under FSDP2: whole tables by the names of the merged model."""
    setting = Setting(tied=False)
    model, tokenizer = base_model(setting), bpe_tokenizer()
    partial = add_tokens(model, tokenizer, TOKENS)
    sharded_by_fsdp2(model)
    optimizer = torch.optim.AdamW(partial.parameters(), lr=LR, weight_decay=0.1)
    train(setting, model, optimizer, partial.token_ids)
    rows = partial.token_rows()
    with partial.as_merged():
        sent = {name: tensor.full_tensor() for name, tensor in model.named_parameters()}
    assert any("new_rows" in name for name, _ in model.named_parameters())
    plain = base_model(setting)
    add_tokens(plain, bpe_tokenizer(), TOKENS).merge()
    assert {n: t.shape for n, t in sent.items()} == {n: t.shape for n, t in plain.named_parameters()}
    assert torch.equal(sent["model.embed_tokens.weight"][partial.token_ids], rows.input_rows)
    assert torch.equal(sent["lm_head.weight"][partial.token_ids], rows.output_rows)


def refuses_to_hand_on_parts(shard: Callable[[nn.Module], nn.Module]) -> Callable:
    def run(folder: Path) -> None:
        model, tokenizer = base_model(Setting()).requires_grad_(False), bpe_tokenizer()
        partial = add_tokens(model, tokenizer, TOKENS)
        shard(model)
        with raises("Hand on what model.save_pretrained writes"), partial.as_merged():
            pass

    return run


TRAININGS = {
    "ddp": ddp,
    "ddp-trainer": by_trainer("DistributedDataParallel"),
    "fsdp1": fsdp1,
    "fsdp2": fsdp2,
    "fsdp2-trainer": by_trainer("FSDP", **fsdp_options()),
    "fsdp2-transformers": fsdp2_transformers,
    **{f"zero{stage}": zero(stage) for stage in (1, 2, 3)},
    **{f"zero{stage}-trainer": by_trainer("DeepSpeedEngine", **zero_config(stage)) for stage in (1, 2, 3)},
}
OTHERS = {
    "ddp": {"mask": mask_is_right, "bytes": ddp_sends_rows_only},
    "ddp-trainer": {"mask": mask_is_right_in_trainer, "another-order": refuses_another_order()},
    "fsdp1": {
        "mask": refuses_mask(sharded_by_fsdp1),
        "gradient-norm": gradient_norm_is_that_of_all_processes(sharded_by_fsdp1),
        "as-merged": refuses_to_hand_on_parts(sharded_by_fsdp1),
    },
    "fsdp2": {
        "mask": refuses_mask(sharded_by_fsdp2),
        "bytes": fsdp2_reduces_rows_only,
        "transposed": rows_along_another_dimension_are_written,
        "bytes-of-saving": no_table_is_gathered_to_look_at_rows,
        "tokens-after-sharding": refuses_tokens_after_sharding,
        "rows-inside": rows_inside_a_sharded_table_train,
        "reserved": reserved_tokens_are_taken_over_after_sharding,
        "dtypes": rows_of_another_dtype_have_a_group,
        "verify": a_changed_row_is_found_on_every_process,
        "rate": rate_of_old_rows_and_no_chunked_loss,
        "tensor-parallelism": refuses_tensor_parallelism,
        "gradient-norm": gradient_norm_is_that_of_all_processes(sharded_by_fsdp2),
        "leak": leak_is_measured_where_one_process_has_no_position,
        "as-merged": engines_are_handed_merged_weights,
    },
    "fsdp2-trainer": {
        "loaded-on-one-process": loaded_on_one_process,
        "another-order": refuses_another_order(**fsdp_options()),
    },
    "zero1-trainer": {
        "mask": refuses_mask_in_trainer,
        "shared-group": refuses_a_shared_group,
        "another-order": refuses_another_order(**zero_config(1)),
    },
    **{f"zero{stage}-trainer": {"another-order": refuses_another_order(**zero_config(stage))} for stage in (2, 3)},
    "zero3": {
        "mask": refuses_mask(sharded_by_zero3),
        "tokens-after-loading": refuses_tokens_after_loading_by_zero3,
        "as-merged": refuses_to_hand_on_parts(sharded_by_zero3),
    },
}


def cases_of(engine: str) -> dict[str, Callable]:
    """The cases of an engine by name; each is given a folder of its own."""
    trained = {setting.name: bound(TRAININGS[engine], setting) for setting in SETTINGS}
    return {**trained, **OTHERS.get(engine, {})}


def main() -> None:
    engine, folder = sys.argv[1], Path(sys.argv[2])
    torch.set_num_threads(1)
    dist.init_process_group("gloo", timeout=timedelta(seconds=60))
    results = {}
    for name, run in cases_of(engine).items():
        if len(sys.argv) > 3 and name != sys.argv[3]:
            continue
        try:
            run(folder / name)
            results[name] = ""
        except Exception:
            results[name] = traceback.format_exc()
            if len(sys.argv) > 3:
                raise
        (folder / f"{RANK}.json").write_text(json.dumps(results))
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
