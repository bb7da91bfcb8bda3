"""What the callback does to the optimizer: a parameter group for the rows, and their exact values in its state."""

from __future__ import annotations

import inspect
from collections.abc import Sequence
from typing import Any

import torch
from torch import nn

from ..attachment.partial import PartialEmbedding
from ..errors import PartialEmbeddingError
from ..evaluation.old_rows import old_input_rows
from ..initializers.table_statistics import root_mean_square
from ..modules.sharding import from_any_process, is_dtensor

__all__ = [
    "ExactRows",
    "OwnGroup",
    "SharedStep",
    "auto_learning_rate",
    "check_in_optimizer",
    "check_steps",
    "flattened_groups",
    "take_from_optimizer",
]

_EXACT_ROWS = "hf_partial_embed_rows"


def flattened_groups(optimizer: Any) -> list[list[nn.Parameter]] | None:
    """The model's parameters in each group of DeepSpeed's ZeRO optimizer, which steps on one flat tensor per group.

    `None` for any other optimizer.
    """
    while optimizer is not None:
        for name in ("bit16_groups", "fp16_groups", "bf16_groups"):
            parts = getattr(optimizer, name, None)
            if isinstance(parts, list):
                # ZeRO-3 steps on parts of groups.
                group_of = getattr(optimizer, "sub_group_to_group_id", None) or {i: i for i in range(len(parts))}
                groups: list[list[nn.Parameter]] = [[] for _ in range(1 + max(group_of.values(), default=-1))]
                for number, part in enumerate(parts):
                    groups[group_of[number]] += part
                return groups
        optimizer = getattr(optimizer, "optimizer", None)
    return None


_OTHER = (
    "Choose another one, e.g. TrainingArguments(optim='adamw_torch'): where the rows are all that trains, its state "
    "is small."
)


def check_steps(optimizer: torch.optim.Optimizer) -> None:
    """Check that an optimizer calls its step hooks, by which the rows get their own learning rate.

    Raises:
        `PartialEmbeddingError`: it has no `step` of its own, since it updates parameters in the backward (LOMO), or
            one that PyTorch has not wrapped for hooks.
    """
    step = type(optimizer).step
    if inspect.unwrap(step) is inspect.unwrap(torch.optim.Optimizer.step) or not getattr(step, "hooked", False):
        raise _no_steps(optimizer)


def _no_steps(optimizer: Any) -> PartialEmbeddingError:
    return PartialEmbeddingError(
        f"{type(optimizer).__name__} does not update parameters in a step() of its own with PyTorch's step hooks "
        "(some optimizers do it in the backward), so the rows would not have the learning rate and the weight decay "
        f"of PartialEmbeddingCallback, and frozen rows under strategy='mask' no protection. {_OTHER}"
    )


def check_in_optimizer(partial: PartialEmbedding, optimizer: Any, flattened: list[list[nn.Parameter]] | None) -> None:
    """Check that an optimizer has all rows that require grad.

    Args:
        partial: the rows.
        optimizer: the optimizer, unwrapped.
        flattened: what `flattened_groups` returns.

    Raises:
        `PartialEmbeddingError`: some are not in it.
    """
    groups = [group["params"] for group in optimizer.param_groups] if flattened is None else flattened
    held = {id(parameter) for group in groups for parameter in group}
    for parameter in partial.parameters():
        if parameter.requires_grad and id(parameter) not in held and parameter._post_accumulate_grad_hooks:
            raise PartialEmbeddingError(
                f"Rows of shape {tuple(parameter.shape)} are not in the {type(optimizer).__name__}; something updates "
                "them by a hook in the backward instead, as layer-wise optimizers do, without the learning rate and "
                f"the weight decay of PartialEmbeddingCallback. {_OTHER}"
            )
        if parameter.requires_grad and id(parameter) not in held:
            raise PartialEmbeddingError(
                f"Rows of shape {tuple(parameter.shape)} are not in the {type(optimizer).__name__}, so they would "
                "not train. Make the Trainer after add_tokens, with the same model, and call "
                "partial.requires_grad_(True) if something has frozen the model since."
            )


class OwnGroup:
    """Gives the rows a parameter group of their own during each step.

    Between steps the groups are those that the Trainer made: schedulers and saved optimizer states go by group,
    and a run can be resumed with or without the callback.
    """

    def __init__(
        self,
        optimizer: Any,
        parameters: list[nn.Parameter],
        learning_rate: float | None,
        weight_decay: float,
        flattened: list[list[nn.Parameter]] | None,
    ) -> None:
        self.rows = {id(parameter) for parameter in parameters}
        self.flattened = None if flattened is None else [self._are_rows(group) for group in flattened]
        for group, members in zip(optimizer.param_groups, flattened or (), strict=False):
            some = any(id(parameter) in self.rows for parameter in members)
            if some and not self._are_rows(members) and (learning_rate is not None or group["weight_decay"]):
                raise PartialEmbeddingError(
                    f"DeepSpeed has flattened the rows into one parameter group with {len(members)} parameters, so "
                    "they cannot have a learning rate and a weight decay of their own. Give the Trainer an optimizer "
                    "with a group for them: optimizers=(AdamW([*partial.param_groups(lr), others]), None)."
                )
        self.learning_rate = learning_rate
        self.weight_decay = weight_decay
        self.top_rates = [group.get("initial_lr", group["lr"]) for group in optimizer.param_groups]
        rows_in = [any(self._is_own(n, p) for p in group["params"]) for n, group in enumerate(optimizer.param_groups)]
        # The rows' rate at the top of the schedule.
        self.top_rate = (
            self.top_rates[rows_in.index(True)] if learning_rate is None and any(rows_in) else learning_rate
        )
        self.saved: list[dict[str, Any]] | None = None
        self.optimizer = optimizer
        self.taken = 0

    def check_taken(self) -> None:
        """Check, after a step, that this optimizer's step hooks have run.

        Raises:
            `PartialEmbeddingError`: they have not.
        """
        if not self.taken:
            raise _no_steps(self.optimizer)

    def _are_rows(self, parameters: list[nn.Parameter]) -> bool:
        return bool(parameters) and all(id(parameter) in self.rows for parameter in parameters)

    def _is_own(self, number: int, parameter: nn.Parameter) -> bool:
        return id(parameter) in self.rows if self.flattened is None else self.flattened[number]

    def before(self, optimizer: Any, *_: object) -> None:
        self.after(optimizer)  # if the last step raised
        self.taken += 1
        self.saved = optimizer.param_groups
        self.origins: list[dict[str, Any]] = []
        optimizer.param_groups = []
        for number, (group, top_rate) in enumerate(zip(self.saved, self.top_rates, strict=True)):
            own = [parameter for parameter in group["params"] if self._is_own(number, parameter)]
            others = [parameter for parameter in group["params"] if not self._is_own(number, parameter)]
            if others or not own:
                optimizer.param_groups.append({**group, "params": others})
                self.origins.append(group)
            if own:
                rate = group["lr"]
                if self.learning_rate is not None:
                    rate = self.learning_rate * (rate / top_rate if top_rate else 1.0)
                changed = {"lr": rate, "weight_decay": self.weight_decay}
                optimizer.param_groups.append({**group, **changed, "params": own})
                self.origins.append(group)

    def after(self, optimizer: Any, *_: object) -> None:
        if self.saved is None:
            return
        for group, origin in zip(optimizer.param_groups, self.origins, strict=True):
            # Some optimizers keep state in the group, such as a count of steps.
            origin.update({k: v for k, v in group.items() if k not in ("params", "lr", "weight_decay")})
        optimizer.param_groups, self.saved = self.saved, None


class ExactRows:
    """Puts the rows, in their own dtype, into the state dict of the optimizer.

    A standard checkpoint holds them in the table's dtype, and that of an adapter not at all. A resume takes them
    from the optimizer's state, wherever the checkpoint has been moved to.
    """

    def __init__(self, parameters: list[nn.Parameter]) -> None:
        self.parameters = parameters

    def store(self, optimizer: Any, state_dict: dict[str, Any]) -> dict[str, Any]:
        held = [id(parameter) for group in optimizer.param_groups for parameter in group["params"]]
        entries = state_dict["state"]
        stateless = not entries
        for parameter in self.parameters:
            number = held.index(id(parameter))
            # A new entry would look, to an optimizer that keeps state, like that of a parameter that has had a step.
            if number in entries or stateless:
                entries[number] = {**entries.get(number, {}), _EXACT_ROWS: parameter.detach().clone()}
        return state_dict


@torch.no_grad()
def take_from_optimizer(partial: PartialEmbedding, optimizer: Any) -> bool:
    """Move the exact rows out of a loaded optimizer state into the parameters; returns whether there were any."""
    found = False
    for table in partial.trained_tables().values():
        parameter = partial.parameter_of(table)
        rows = optimizer.state[parameter].pop(_EXACT_ROWS, None) if parameter in optimizer.state else None
        if is_dtensor(parameter) and not (rows is not None and is_dtensor(rows)):
            rows = from_any_process(rows, parameter)  # FSDP2 loads an entry that it does not know on one process
            if rows is not None:
                partial.set_rows(table, rows)
        elif rows is not None:
            parameter.copy_(rows)
        found = found or rows is not None
    return found


_SHARED = "hf_partial_embed_shared"
_FIRST, _SECOND, _TINY = 0.9, 0.999, 1e-8
# Times the rows' own rate, and at most so many times `auto_learning_rate`.
_MOST_SHARED = 24.0
_FASTEST_SHARED = 2.5


class SharedStep:
    """Moves all rows of a table together, beside the step that each takes by itself.

    As if each row were its own part plus one part that all of them share, `w_k + u`: the gradient of `u` is the sum
    of the rows' gradients, and `u` takes Adam's step with it, at 24 times the rows' own rate, but at most at 2.5 times
    `auto_learning_rate`. A row alone sees the few texts that have its token, and learns what these happen to say; what
    all of the texts have in common is in the sum, where the rest averages out. The rows stay one parameter, and
    nothing else of the model changes.

    Its moments are kept in the optimizer's state, so that checkpoints have them.

    Args:
        optimizer: the one that steps on them.
        partials: the rows, not sharded, as for `Elsewhere`.
        top_rate: the rows' own rate at the top of their schedule; at 0 nothing moves.

    Raises:
        `PartialEmbeddingError`: the old rows are all zero.
    """

    def __init__(self, optimizer: Any, partials: Sequence[PartialEmbedding], top_rate: float | None) -> None:
        self.optimizer = optimizer
        fastest = _FASTEST_SHARED * auto_learning_rate(partials[0])
        self.factor = min(_MOST_SHARED, fastest / top_rate) if top_rate else 0.0
        self.tables: list[tuple[nn.Parameter, int, list[int] | None]] = []
        for partial in partials:
            for table in partial.trained_tables().values():
                parameter = partial.parameter_of(table)
                masked = partial.strategy == "mask"
                if parameter.dim() > 1:
                    self.tables.append((parameter, table.dim if masked else 0, partial.token_ids if masked else None))

    @torch.no_grad()
    def __call__(self, optimizer: Any, *_: object) -> None:
        rates = {id(parameter): group["lr"] for group in optimizer.param_groups for parameter in group["params"]}
        for parameter, dim, ids in self.tables:
            if parameter.grad is None or not parameter.requires_grad:
                continue
            gradients = parameter.grad.movedim(dim, 0)
            gradient = (gradients if ids is None else gradients[ids]).float().sum(0)
            # The moments of a constant one beside those of the gradient are what divides their bias out.
            extended = torch.cat([gradient.flatten(), gradient.new_ones(1)])
            held = self.optimizer.state[parameter].setdefault(_SHARED, parameter.new_zeros(2, len(extended)))
            for moment, value, decay in ((held[0], extended, _FIRST), (held[1], extended.square(), _SECOND)):
                moment.copy_(moment.float().lerp(value, 1 - decay))
            first, second = (moment[:-1].float() / moment[-1].float() for moment in held)
            step = self.factor * rates[id(parameter)] * first / (second.sqrt() + _TINY)
            step = step.view_as(gradient).to(parameter.dtype)
            rows = parameter.movedim(dim, 0)
            if ids is None:
                rows.sub_(step)
            else:
                rows[ids] = rows[ids] - step


# The learning rate, as a share of the old rows' root mean square, at the top of the schedule.
_SHARE = 0.07


def auto_learning_rate(partial: PartialEmbedding) -> float:
    """A learning rate for Adam and its like: 0.07 times the root mean square of the old input rows.

    Such an optimizer moves every element by about its learning rate in a step, so the right rate is proportional
    to the size of the table's values. Rows without a token (spare ones, padding) and trained rows do not count.

    Raises:
        `PartialEmbeddingError`: the old rows are not in this process, or all zero.
    """
    old = old_input_rows(partial)
    rate = 0.0 if old is None else _SHARE * root_mean_square(*old)
    if not rate > 0:
        raise PartialEmbeddingError(
            f"learning_rate='auto' goes with the size of the old rows, and {type(partial.model).__name__} has none "
            "here (other processes hold them, or they are zero). Give a number."
        )
    return rate
