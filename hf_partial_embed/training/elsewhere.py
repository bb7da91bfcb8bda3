"""Texts in which new tokens do not belong: what they cost there is part of what trains the rows."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from ..attachment.partial import PartialEmbedding
from ..errors import PartialEmbeddingError
from ..evaluation.states import HeadStates
from ..initializers.head import logit_shape
from ..initializers.running import undisturbed
from ..layout.tables import Table
from ..modules.sharding import is_dtensor
from ..tokens.backend import settings_kept

__all__ = ["WEIGHT", "Elsewhere"]

# Of the loss, beside the mean loss of a batch. With a third of it, and rows that step together a quarter faster, the
# tokens leaked nearly three times as much, and texts that have them were predicted no better behind them.
WEIGHT = 15.0

# Positions that are kept, about, and ids of a text that are read.
_POSITIONS = 4096
_LONGEST = 256


class Elsewhere:
    """Keeps new tokens from being predicted in texts that have none of them.

    To the gradient of the head's new rows it adds, before each step, that of

    `weight · mean_p -log(1 - leak_p)`

    where `leak_p` is the probability of all new tokens at position `p` of the texts: the loss that they add to a text
    without them. Such a text has the same hidden states whatever the rows are, as long as nothing else trains. So the
    model runs over the texts once, and a step costs a product of some 4,096 states with the new rows.

    Args:
        partials: the rows, all on one model.
        texts: any texts; those with a new token are left out, and of many texts only some are taken, evenly.
        weight: of the loss.

    Raises:
        `PartialEmbeddingError`: no text without a new token; a model that is not causal, or not a body and a head
            whose logits are at most scaled or capped; head rows that do not train; rows without a tokenizer.
    """

    def __init__(self, partials: Sequence[PartialEmbedding], texts: Sequence[str], weight: float = WEIGHT) -> None:
        self.partials, self.weight = list(partials), weight
        self.model = model = partials[0].model
        if model.config.is_encoder_decoder or not getattr(model, "can_generate", lambda: False)():
            raise PartialEmbeddingError(
                f"elsewhere=... needs a causal model, and {type(model).__name__} is none. Leave it out."
            )
        self._tables: list[tuple[PartialEmbedding, Table]] = []
        for partial in self.partials:
            of_weight = _head_table(partial, "weight")
            if of_weight is None:
                raise PartialEmbeddingError(
                    f"elsewhere=... needs head rows that train, and those of {type(model).__name__} do not. Leave it "
                    "out."
                )
            tables = [of_weight, _head_table(partial, "bias")]
            self._tables += [(partial, table) for table in tables if table is not None]
        tokenizer = partials[0].tokenizer
        if tokenizer is None:
            raise PartialEmbeddingError("elsewhere=... needs a tokenizer, and these rows were made without one.")
        self._new = sorted({token_id for partial in partials for token_id in partial.token_ids})
        new = set(self._new)
        with settings_kept(tokenizer):
            read = tokenizer(list(texts), truncation=False, padding=False, verbose=False)["input_ids"] if texts else []
        free = [ids[:_LONGEST] for ids in read if ids and new.isdisjoint(ids)]
        self.windows = sorted(free[:: max(1, -(-sum(map(len, free)) // _POSITIONS))], key=len)
        if not self.windows:
            raise PartialEmbeddingError(
                f"elsewhere=... is for texts without the new tokens, and none of the {len(texts)} given is one."
            )
        self._states = self._sums = torch.empty(0)
        self._shape = self._find_shape()

    @torch.no_grad()
    def _find_shape(self) -> Callable[[Tensor], Tensor]:
        """What the model makes of its head's output, tried on a few ids."""
        with undisturbed(self.model):
            runner = HeadStates(self.model)
            (states,) = runner.states([self.windows[-1][:8]])
            if not runner.in_chunks:
                raise PartialEmbeddingError(
                    f"elsewhere=... needs a model of a body and a head that is called once, which "
                    f"{type(self.model).__name__} is not. Leave it out."
                )
            return logit_shape(self.model, self.model.get_output_embeddings()(states), runner.logits(states))

    @torch.no_grad()
    def start(self) -> None:
        """Run the model over the texts.

        Raises:
            `PartialEmbeddingError`: something else than the rows trains, or the rows are sharded.
        """
        own = {id(parameter) for partial in self.partials for parameter in partial.parameters()}
        others = [name for name, p in self.model.named_parameters() if p.requires_grad and id(p) not in own]
        if others:
            raise PartialEmbeddingError(
                f"elsewhere=... runs its texts once, so nothing but the rows may train, but {others[0]} and "
                f"{len(others) - 1} more parameters do. Freeze them, or leave elsewhere out."
            )
        if any(is_dtensor(parameter) for partial in self.partials for parameter in partial.parameters()):
            raise PartialEmbeddingError("elsewhere=... needs whole rows, but they are sharded. Leave it out here.")
        states, sums = [], []
        with undisturbed(self.model):
            runner = HeadStates(self.model)
            for first in range(0, len(self.windows), 8):
                found = torch.cat(runner.states(self.windows[first : first + 8]))
                for part in torch.split(found, runner.positions_at_once):
                    logits = runner.logits(part)
                    logits[:, self._new] = -torch.inf
                    states.append(part.float())
                    sums.append(logits.logsumexp(-1))
        self._states, self._sums = torch.cat(states), torch.cat(sums)

    def stop(self) -> None:
        """Let go of the states."""
        self._states = self._sums = torch.empty(0)

    def loss(self, rows: Sequence[Tensor] | None = None) -> Tensor:
        """What the new tokens cost at each kept position, in nats, `[N]`; with other rows than the present ones."""
        present = iter([_rows_of(partial, table) for partial, table in self._tables] if rows is None else rows)
        logits = []
        for partial in self.partials:
            raw = self._states @ next(present).T
            logits.append(raw if _head_table(partial, "bias") is None else raw + next(present))
        return F.softplus(self._shape(torch.cat(logits, 1)).logsumexp(1) - self._sums)

    @torch.no_grad()
    def leak(self) -> float:
        """The mean probability of the new tokens there, with the present rows."""
        return float(-torch.expm1(-self.loss()).mean())

    @torch.no_grad()
    def before_step(self, *_: object) -> None:
        """Add the gradient; a hook before the optimizer's step, where gradients are clipped and unscaled already."""
        rows = [_rows_of(partial, table).requires_grad_(True) for partial, table in self._tables]
        with torch.enable_grad():
            gradients = torch.autograd.grad(self.weight * self.loss(rows).mean(), rows)
        for (partial, table), gradient in zip(self._tables, gradients, strict=True):
            parameter = partial.parameter_of(table)
            if parameter.grad is None:
                parameter.grad = torch.zeros_like(parameter)
            gradient = gradient.to(parameter.dtype)
            if partial.strategy == "mask":
                ids = torch.tensor(partial.token_ids, device=parameter.device)
                parameter.grad.movedim(table.dim, 0).index_add_(0, ids, gradient)
            else:
                parameter.grad += gradient


def _head_table(partial: PartialEmbedding, attribute: str) -> Table | None:
    """The table that the head has under a name and whose rows train."""
    head = partial.model.get_output_embeddings()
    tables = partial.trained_tables().values()
    return next((table for table in tables if (head, attribute) in table.holders), None)


def _rows_of(partial: PartialEmbedding, table: Table) -> Tensor:
    """A detached float32 copy of the rows that train, `[K, ...]`."""
    values = partial.parameter_of(table).detach()
    if partial.strategy == "mask":
        values = values.movedim(table.dim, 0)[partial.token_ids]
    return values.float().clone()
