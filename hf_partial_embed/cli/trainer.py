"""The Trainer that `train` runs."""

from __future__ import annotations

import argparse
import functools
import logging
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..errors import PartialEmbeddingError

if TYPE_CHECKING:
    from ..attachment.partial import PartialEmbedding

__all__ = ["blocks", "collate", "precision", "run_trainer"]

logger = logging.getLogger(__name__)

# Of the rate that rows at the mean of their pieces train at: distilled ones have less way to go, and forget the texts
# less that were not trained on. SmolLM2-135M, element names: 0.001 for 0.0095.
_AFTER_DISTILLATION = 0.1


def precision(options: argparse.Namespace) -> dict[str, Any]:
    """Arguments of the Trainer, which takes bfloat16 on a CPU only where it is told to use that."""
    import torch

    return {"bf16": options.bf16, "use_cpu": not torch.accelerator.is_available()}


def run_trainer(
    model: Any, partial: PartialEmbedding, texts: list[str], elsewhere: list[str], rendered: bool,
    checkpoint: str | None, distilled: bool, work: Path, options: argparse.Namespace,
) -> list[dict[str, Any]]:  # fmt: skip
    """Train; gives what was logged."""
    if options.steps == 0:
        return []
    import torch
    from transformers import Trainer, TrainingArguments, set_seed
    from transformers.trainer_callback import PrinterCallback, ProgressCallback

    from ..training.optimizers import auto_learning_rate

    set_seed(options.seed)
    tokenizer = partial.tokenizer
    rate = options.learning_rate
    if rate == "auto":
        rate = auto_learning_rate(partial) * (_AFTER_DISTILLATION if distilled else 1.0)
    body_rate = options.body_learning_rate or {"frozen": rate, "lora": 2e-4, "full": 2e-5}[options.body]
    arguments = TrainingArguments(
        output_dir=str(work),
        max_steps=options.steps or -1,
        num_train_epochs=options.epochs,
        learning_rate=body_rate,
        lr_scheduler_type="cosine",
        warmup_steps=0.1,
        per_device_train_batch_size=options.batch_size,
        train_sampling_strategy="group_by_length",
        save_strategy="steps",
        save_steps=options.save_steps,
        save_total_limit=1,
        logging_steps=10,
        **precision(options),
        seed=options.seed,
        report_to=[],
        disable_tqdm=options.quiet,
        dataloader_pin_memory=torch.cuda.is_available(),  # it warns where there is nothing to pin for
    )
    callback, texts = _callback(partial, rate, texts, elsewhere, work, options)
    trainer = Trainer(
        model=model,
        args=arguments,
        train_dataset=blocks(tokenizer, texts, options.max_length, special=not rendered),
        data_collator=functools.partial(collate, pad=tokenizer.pad_token_id or 0),
        callbacks=[callback],
    )
    for printing in (PrinterCallback, ProgressCallback):  # they print on standard output, which is the command's
        trainer.remove_callback(printing)
    if not options.quiet:
        trainer.add_callback(_progress_bar(ProgressCallback))
    trainer.train(resume_from_checkpoint=checkpoint)
    return list(trainer.state.log_history)


def _callback(
    partial: PartialEmbedding,
    rate: float,
    texts: list[str],
    elsewhere: list[str],
    work: Path,
    options: argparse.Namespace,
) -> tuple[Any, list[str]]:
    """The callback, and the texts to train on.

    With a frozen body the rows learn nothing of texts without new tokens but where these do not belong, so such texts
    are not trained on, but run once.
    """
    from ..training.callback import PartialEmbeddingCallback
    from ..training.prefix_cache import PrefixCache

    cache = PrefixCache(max(1, int(options.prefix_cache * 1e9)), work) if options.prefix_cache else None
    made = functools.partial(
        PartialEmbeddingCallback, partial, learning_rate=rate, chunked_loss=options.chunked_loss,
        frozen_prefix=options.frozen_prefix if cache is None else cache,
    )  # fmt: skip
    if options.body != "frozen":
        return made(), texts
    new = set(partial.token_ids)
    read = partial.tokenizer(texts, add_special_tokens=False)["input_ids"]
    without = [text for text, ids in zip(texts, read, strict=True) if new.isdisjoint(ids)]
    if not elsewhere and not without:
        logger.warning(
            "Each text of DATA has a new token, so nothing shows where they do not belong. --elsewhere FILE with some "
            "dozens of other texts would."
        )
        return made(), texts
    try:
        callback = made(elsewhere=elsewhere or without)
    except PartialEmbeddingError as error:
        if elsewhere:
            raise
        logger.warning("The texts of DATA without new tokens are trained on like the others: %s", error)
        return made(), texts
    left_out = set(without)
    return callback, [text for text in texts if text not in left_out] or texts


def _progress_bar(kind: Any) -> Any:
    """The Trainer's bar on standard error, without the log that it writes to standard output."""

    class Bar(kind):  # type: ignore[misc]
        def on_log(self, args: Any, state: Any, control: Any, logs: Any = None, **kwargs: Any) -> None:
            if state.is_world_process_zero and self.training_bar is not None and logs and "loss" in logs:
                self.training_bar.set_postfix(loss=logs["loss"])

    return Bar()


def blocks(tokenizer: Any, texts: list[str], length: int, *, special: bool) -> list[dict[str, list[int]]]:
    """The texts as ids, long ones in parts; those of one id have nothing to predict."""
    read = tokenizer(texts, add_special_tokens=special)["input_ids"]
    parts = [ids[first : first + length] for ids in read for first in range(0, len(ids), length)]
    return [{"input_ids": ids} for ids in parts if len(ids) > 1]


def collate(items: list[dict[str, list[int]]], pad: int) -> dict[str, Any]:
    """Texts as a batch, in which each of their ids is a label.

    The language modelling collator of `transformers` takes every padding token out of the labels: where the token
    that ends a turn is the padding, too, no model would learn to end one.
    """
    import torch
    from torch.nn.utils.rnn import pad_sequence

    ids = [torch.tensor(item["input_ids"]) for item in items]

    def padded(values: list[torch.Tensor], value: int) -> torch.Tensor:
        return pad_sequence(values, batch_first=True, padding_value=value)

    return {
        "input_ids": padded(ids, pad),
        "attention_mask": padded([torch.ones_like(one) for one in ids], 0),
        "labels": padded(ids, -100),
    }
