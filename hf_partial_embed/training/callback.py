"""The callback for `transformers.Trainer`: own learning rate, protection, verification, row files, resume."""

from __future__ import annotations

import importlib.util
import logging
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any, Literal

from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments
from transformers.trainer_utils import IntervalStrategy

from ..attachment.additions import Addition
from ..attachment.partial import PartialEmbedding
from ..errors import FrozenRowsChangedError, PartialEmbeddingError
from ..modules.mask import unwrap_optimizer
from .chunked_loss import ChunkedLoss
from .diagnostics import RowDiagnostics
from .frozen_prefix import FrozenPrefix
from .optimizers import (
    ExactRows,
    OwnGroup,
    SharedStep,
    auto_learning_rate,
    check_in_optimizer,
    check_steps,
    flattened_groups,
    take_from_optimizer,
)
from .prefix_cache import PrefixCache
from .resume import check_tokens, checkpoint_folder, note_tokens, restore_from_files, rounded_rows, rows_file
from .rollouts import RolloutWeights
from .watch import RowWatch

__all__ = ["PartialEmbeddingCallback"]

logger = logging.getLogger(__name__)


class PartialEmbeddingCallback(TrainerCallback):
    """Takes care of token rows while a `Trainer` runs.

    It gives the rows their own learning rate without weight decay, keeps frozen rows unchanged under
    `strategy="mask"`, writes the row file into each checkpoint, continues with the rows' exact values
    after a resume or when the best model is loaded, and verifies the frozen rows at the end. TRL's trainers that
    generate with vLLM hand it the merged model's weights meanwhile; an engine with another number of rows than the
    model is an error before the first step.

    Args:
        partial (`PartialEmbedding`): the rows, or a list of several.
        learning_rate (`float` or `"auto"`, *optional*): of the rows, at the top of the Trainer's schedule;
            the Trainer's own if not given. `"auto"` is 0.07 times the root mean square of the old input
            rows, for AdamW and its like. The schedule is scaled as a whole: an absolute minimum in it
            (`lr_scheduler_kwargs={"min_lr": ...}`) is to the rows' rate what it is to the Trainer's.
        weight_decay (`float`): of the rows. Decay pulls new rows towards zero, so the default is none.
        verify (`bool`): whether to compare all frozen rows with their digests when training ends. If some have
            changed, the trained rows are saved to `output_dir` before the error is raised.
        save_rows (`bool`): whether to write the row file beside each checkpoint.
        diagnostics (`bool`): whether to add norms, counts and leak of the rows to what the Trainer logs,
            under `rows/...`, and to warn after the first epoch of tokens that the data lacks; see
            `RowDiagnostics`. For a reporter such as TensorBoard call `log_first(trainer)`, too.
        chunked_loss (`bool`): whether to compute the loss of training steps in chunks of positions, so that
            neither all logits nor a gradient of the table's size exist; see `ChunkedLoss`. The same gradients, in
            less memory. Evaluation has its logits as always.
        frozen_prefix (`bool`, `"cache"` or `PrefixCache`): whether to build no graph for what comes before the first
            new token of a batch, where all but the rows is frozen; see `FrozenPrefix`. The same gradients, in less
            time and memory. With `"cache"`, a `PrefixCache()`, it is not even computed from the second epoch on.
        elsewhere (`Sequence[str]`, *optional*): texts in which the new tokens do not belong, a few dozen; they are run
            once. What the tokens cost there is held down, see `Elsewhere`, and the rows then learn more of what their
            own texts have in common, by a step that all of them take together, see `SharedStep`. For a causal model
            of which nothing but the rows trains.

    Raises:
        `PartialEmbeddingError`: a negative rate or decay; a model that cannot have a chunked loss, that has no
            split input embeddings for a frozen prefix, or that cannot use texts `elsewhere`, or none of these without
            a new token; when training begins, something else that trains beside `elsewhere`, rows that are not in the
            optimizer, an optimizer that updates parameters elsewhere than in its `step`, or a checkpoint to resume
            from whose rows are those of other tokens, or of the same ones in another order.
    """

    def __init__(
        self,
        partial: PartialEmbedding | Iterable[PartialEmbedding],
        *,
        learning_rate: float | Literal["auto"] | None = None,
        weight_decay: float = 0.0,
        verify: bool = True,
        save_rows: bool = True,
        diagnostics: bool = True,
        chunked_loss: bool = False,
        frozen_prefix: bool | Literal["cache"] | PrefixCache = False,
        elsewhere: Sequence[str] | None = None,
    ) -> None:
        self.partials = [partial] if isinstance(partial, PartialEmbedding) else list(partial)
        for name, value in (("learning_rate", learning_rate), ("weight_decay", weight_decay)):
            automatic = name == "learning_rate" and value == "auto"
            if not (value is None or automatic) and (isinstance(value, str) or not value >= 0):
                raise PartialEmbeddingError(f"{name}={value!r} must be a number of at least 0.")
        self.learning_rate = learning_rate
        self.weight_decay = weight_decay
        self.verify = verify
        self.save_rows = save_rows
        self.diagnostics = [RowDiagnostics(partial) for partial in self.partials] if diagnostics else []
        self.chunked_loss = chunked_loss
        if not isinstance(frozen_prefix, (bool, PrefixCache)) and frozen_prefix != "cache":
            raise PartialEmbeddingError(f"frozen_prefix={frozen_prefix!r} must be a bool, 'cache' or a PrefixCache.")
        self.frozen_prefix = PrefixCache() if frozen_prefix == "cache" else frozen_prefix
        self._elsewhere = None
        if elsewhere is not None:
            from .elsewhere import Elsewhere

            self._elsewhere = Elsewhere(self.partials, elsewhere)
        self._additions = self._make_additions()
        self._watch: RowWatch | None = None
        self._steps: OwnGroup | None = None
        self._hooks: list[Any] = []

    def log_first(self, trainer: Any) -> None:
        """Move this callback before the Trainer's reporters, so that they see its values, too.

        The Trainer calls reporters (TensorBoard, W&B, ...) before the callbacks that it was given. Its own
        `log_history` and what it prints have the values in any case.
        """
        callbacks = trainer.callback_handler.callbacks
        callbacks.sort(key=lambda callback: callback is not self)

    def on_init_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        if args.use_liger_kernel and importlib.util.find_spec("triton") is None:
            raise PartialEmbeddingError(
                "use_liger_kernel=True needs Triton, which is not installed here (it runs on GPUs): Liger's fused "
                "loss cannot be used. Switch it off: TrainingArguments(use_liger_kernel=False)."
            )

    def _make_additions(self, smoothing: bool = False) -> list[Addition]:
        """The additions to install while the model trains; raises where the model cannot have one."""
        additions: list[Addition] = [RolloutWeights(self.partials[0].model)]
        if self.chunked_loss:
            additions.append(ChunkedLoss(self.partials[0].model, keep_logits=smoothing))
        if self.frozen_prefix is not False:
            cache = self.frozen_prefix if isinstance(self.frozen_prefix, PrefixCache) else None
            additions.append(FrozenPrefix(self.partials[0].model, cache))
        return additions

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        optimizer = unwrap_optimizer(kwargs["optimizer"])
        flattened = flattened_groups(kwargs["optimizer"])
        check_steps(optimizer)
        if state.global_step:
            check_tokens(args, state, self.partials)
        note_tokens(state, self.partials)
        for number, partial in enumerate(self.partials):
            check_in_optimizer(partial, optimizer, flattened)
            partial.protect(optimizer)
            stored = take_from_optimizer(partial, optimizer)
            if state.global_step and self.verify:
                _verify_loaded(partial, state)
            if state.global_step and not stored and flattened is None:  # DeepSpeed brings back what it trains
                folders = [args.resume_from_checkpoint, checkpoint_folder(args, state)]
                restore_from_files(partial, folders, number, in_checkpoint=not _is_adapter(kwargs["model"]))
        parameters = [parameter for partial in self.partials for parameter in partial.parameters()]
        exact = [
            parameter
            for partial in (self.partials if flattened is None else ())
            for parameter in (partial.parameters() if _is_adapter(kwargs["model"]) else rounded_rows(partial))
        ]
        self._remove_hooks()
        rate = self.learning_rate
        if rate == "auto":
            rate = auto_learning_rate(self.partials[0])  # all of them are on one table
            logger.info("Learning rate of the token rows: %.3g.", rate)
        self._watch = RowWatch(self.partials)
        steps = self._steps = OwnGroup(optimizer, parameters, rate, self.weight_decay, flattened)
        held_down = []
        if self._elsewhere is not None:
            if flattened is not None:
                raise PartialEmbeddingError("elsewhere=... needs whole rows, but DeepSpeed has flattened them.")
            self._elsewhere.start()
            shared = SharedStep(optimizer, self.partials, steps.top_rate)
            held_down = [
                optimizer.register_step_pre_hook(self._elsewhere.before_step),
                optimizer.register_step_post_hook(shared),  # while the rows have their own learning rate
            ]
        self._hooks = [
            *held_down,
            optimizer.register_step_pre_hook(steps.before),
            optimizer.register_step_post_hook(steps.after),
            optimizer.register_state_dict_post_hook(ExactRows(exact).store),
        ]
        self._additions = self._make_additions(smoothing=args.label_smoothing_factor > 0)
        for addition in self._additions:
            addition.install()
        for diagnostics in self.diagnostics:  # last, so that they see what the others leave of an output
            diagnostics.stop()
            diagnostics.start()

    def on_step_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        for diagnostics in self.diagnostics:
            diagnostics.sampling = _will_log(args, state)

    def on_pre_optimizer_step(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        for diagnostics in self.diagnostics:
            diagnostics.look_at_gradients()

    def on_optimizer_step(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        # check_steps cannot see every optimizer without hooks. A step may also be skipped, for an overflow.
        if self._steps is not None and not getattr(kwargs["optimizer"], "step_was_skipped", False):
            self._steps.check_taken()

    def on_log(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        logs: dict[str, float] | None = None,
        **kwargs: Any,
    ) -> None:
        if logs is None or "loss" not in logs:
            return
        if self._watch is not None:
            self._watch.check_norms()
        for number, diagnostics in enumerate(self.diagnostics):
            prefix = "rows" if number == 0 else f"rows_{number + 1}"
            found = diagnostics.values()
            values = {f"{prefix}/{name}": value for name, value in found.items()}
            if number == 0 and self._elsewhere is not None:
                values["rows/leak_elsewhere"] = self._elsewhere.leak()
            if self._watch is not None and "leak" in found:
                self._watch.check_leak(found["leak"])
            logs.update(values)
            state.log_history[-1].update(values)  # a copy, made before the callbacks are asked

    def on_epoch_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        for diagnostics in self.diagnostics:
            diagnostics.end_of_epoch()

    def on_save(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        if self.save_rows and (error := self._write_rows(checkpoint_folder(args, state), state)):
            # Not a reason to end a run that may be saved otherwise.
            logger.warning("No row file was written beside this checkpoint: %s", error)

    def _write_rows(self, folder: Path, state: TrainerState) -> Exception | None:
        """Write the row files into a folder; returns the error of one that could not be written."""
        failed: Exception | None = None
        for number, partial in enumerate(self.partials):
            rows = partial.token_rows()  # on every rank: a sharded run gathers here
            if state.is_world_process_zero:
                try:
                    rows.save_file(rows_file(folder, number))
                except PartialEmbeddingError as error:
                    failed = error
        return failed

    def on_train_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        self._remove_hooks()
        if self._elsewhere is not None:
            self._elsewhere.stop()
        for diagnostics in self.diagnostics:
            diagnostics.stop()
        if self._watch is not None:
            self._watch.check_norms()
            self._watch = None
        if args.load_best_model_at_end and state.best_model_checkpoint:
            in_checkpoint = not _is_adapter(kwargs["model"])
            for number, partial in enumerate(self.partials):
                restore_from_files(partial, [state.best_model_checkpoint], number, in_checkpoint=in_checkpoint)
        if self.verify:
            self._verify_at_end(args, state)

    def _verify_at_end(self, args: TrainingArguments, state: TrainerState) -> None:
        """Verify all row sets; if that fails the script may end here, so the trained rows are saved first."""
        try:
            for partial in self.partials:
                partial.verify()
                logger.info("The frozen embedding rows have not changed by one bit.")
        except FrozenRowsChangedError as error:
            folder = Path(str(args.output_dir))
            if rows_file(folder, 0).exists():  # those of another run, perhaps
                folder = folder / f"unverified-{state.global_step}"
            try:
                failed = self._write_rows(folder, state)
            except OSError as cause:
                failed = cause
            saved = f"could not be saved: {failed}" if failed else f"were saved to {rows_file(folder, 0)} before this"
            raise FrozenRowsChangedError(error.changed, f"The trained rows {saved}.") from error

    def _remove_hooks(self) -> None:
        for hook in self._hooks:
            hook.remove()
        self._hooks, self._steps = [], None
        for addition in self._additions:
            addition.remove()


def _will_log(args: TrainingArguments, state: TrainerState) -> bool:
    """Whether the values of the step that begins will be logged."""
    step = state.global_step + 1
    if args.logging_strategy != IntervalStrategy.STEPS:
        return step % 50 == 0
    return step % max(1, state.logging_steps) == 0 or (step == 1 and args.logging_first_step)


def _verify_loaded(partial: PartialEmbedding, state: TrainerState) -> None:
    """Verify after a resume, so that a checkpoint of another base model is found before the training."""
    try:
        partial.verify()
    except FrozenRowsChangedError as error:
        remark = (
            f"The checkpoint at step {state.global_step}, which was loaded just now, has other old rows than the "
            "model that the tokens were attached to: it is one of another base model. Training has not begun."
        )
        raise FrozenRowsChangedError(error.changed, remark) from error


def _is_adapter(model: Any) -> bool:
    """Whether the Trainer's checkpoints hold a PEFT adapter instead of the model."""
    return hasattr(model, "peft_config")
