"""One of two processes: trains rows under an engine, and compares with one process on the same batches.

    RANK=0 WORLD_SIZE=2 ... python tests/distributed_cases.py fsdp2 FOLDER

What became of each case is written to `FOLDER/RANK.json`.
"""

from __future__ import annotations

import json
import os
import sys
import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path

import torch
import torch.distributed as dist
from accelerate import DistributedType, PartialState
from conftest import bpe_tokenizer, build_model
from torch import nn
from transformers.integrations.deepspeed import unset_hf_deepspeed_config
from transformers import AutoModelForCausalLM, DistributedConfig, Trainer, TrainingArguments

from hf_partial_embed import PartialEmbeddingCallback, PartialEmbeddingError, TokenRows, add_tokens, train_tokens

RANK = int(os.environ["RANK"])
WORLD = int(os.environ["WORLD_SIZE"])
TOKENS = ["<think>", "</think>", "<tool>"]
STEPS, LR = 3, 0.01
ENGINES: dict[str, Callable] = {}
CASES: dict[str, Callable] = {}


def case(function: Callable) -> Callable:
    CASES[function.__name__] = function
    return function


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
        partial = add_tokens(
            base_model(setting), bpe_tokenizer(), TOKENS, strategy=setting.strategy, dtype=dtype
        )
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
        if tolerance:
            torch.testing.assert_close(
                rows[name], expected[name], rtol=0, atol=tolerance, msg=lambda m: f"{name}: {m}"
            )
        else:
            assert torch.equal(rows[name], expected[name]), f"{name}: {(rows[name] - expected[name]).abs().max():.3g}"
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
    from torch.distributed.fsdp import fully_shard

    model, tokenizer = base_model(setting), bpe_tokenizer()
    partial = add_tokens(model, tokenizer, TOKENS)
    for layer in model.model.layers:
        fully_shard(layer)
    fully_shard(model)
    trainable = [parameter for parameter in model.parameters() if parameter.requires_grad]
    optimizer = torch.optim.AdamW(partial.parameters(), lr=LR, weight_decay=0.1)
    assert {id(p) for group in optimizer.param_groups for p in group["params"]} <= {id(p) for p in trainable}
    train(setting, model, optimizer, partial.token_ids)
    assert hasattr(next(partial.parameters()), "placements")
    state = {name: value.full_tensor() for name, value in model.state_dict().items()}
    check_result(setting, partial, folder, tolerance=1e-6, save=saving(model, state))


def fsdp1(setting: Setting, folder: Path) -> None:
    from torch.distributed.fsdp import FullStateDictConfig, FullyShardedDataParallel, StateDictType

    model, tokenizer = base_model(setting), bpe_tokenizer()
    partial = add_tokens(model, tokenizer, TOKENS, dtype=setting.dtype)
    wrapped = FullyShardedDataParallel(model, use_orig_params=True, device_id=torch.device("cpu"))
    optimizer = torch.optim.AdamW(partial.parameters(), lr=LR, weight_decay=0.1)
    train(setting, wrapped, optimizer, partial.token_ids)
    with FullyShardedDataParallel.state_dict_type(wrapped, StateDictType.FULL_STATE_DICT, FullStateDictConfig()):
        state = wrapped.state_dict()
    # Gradients are reduced in the parameters' dtype.
    tolerance = 1e-6 if setting.dtype == torch.float32 else 1e-3
    alone = train_alone(setting, dtype=setting.dtype)
    check_result(setting, partial, folder, tolerance=tolerance, alone=alone, save=saving(model, state))


def zero(stage: int) -> Callable:
    def run(setting: Setting, folder: Path) -> None:
        import deepspeed

        model, tokenizer = base_model(setting), bpe_tokenizer()
        partial = add_tokens(model, tokenizer, TOKENS)
        config = {
            "train_micro_batch_size_per_gpu": 2,
            "gradient_accumulation_steps": setting.accumulate,
            "zero_optimization": {"stage": stage, "stage3_param_persistence_threshold": 0},
            "zero_allow_untested_optimizer": True,
            "gradient_clipping": 0.0,
        }
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
    check_result(setting, partial, folder / "saved", tolerance=1e-6, alone=alone, save=trainer.save_model)
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


ENGINES = {"zero1-trainer": by_trainer("DeepSpeedEngine", **zero_config(1)),
    "zero2-trainer": by_trainer("DeepSpeedEngine", **zero_config(2)),
    "zero3-trainer": by_trainer("DeepSpeedEngine", **zero_config(3)),
    "fsdp2-transformers": fsdp2_transformers,
    "ddp-trainer": by_trainer("DistributedDataParallel"), "ddp": ddp, "fsdp2": fsdp2, "fsdp1": fsdp1, "zero1": zero(1), "zero2": zero(2), "zero3": zero(3),
    "fsdp2-trainer": by_trainer(
        "FSDP", fsdp=True, fsdp_config={"version": 2, "transformer_layer_cls_to_wrap": ["LlamaDecoderLayer"]}
    ),
}  # fmt: skip


def cases_of(engine: str) -> dict[str, Callable]:
    made = {}
    for setting in SETTINGS:
        made[setting.name] = lambda folder, setting=setting: ENGINES[engine](setting, folder)
    return made


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
