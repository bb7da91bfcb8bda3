"""Putting trainable rows on a model and its tokenizer, and taking them off again.

An `Attachment` changes things in small steps, each of which knows how to take itself back; whatever
goes wrong on the way, the steps taken so far are undone in reverse. Steps hold data, no closures, so
that an attachment can be deep-copied together with its model.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from tokenizers import AddedToken
from torch import Tensor, nn

from ..errors import FrozenRowsChangedError, PartialEmbeddingError, shorten
from ..layout.resizing import REGISTRY
from ..layout.storage import PlainTables
from ..layout.tables import Table, VocabularyLayout, find_layout
from ..modules.mask import MaskHandle
from ..modules.rows import ForwardScope, PartialModule
from ..modules.sharding import is_sharded, set_whole, trained_rows
from ..tokens.vocabulary import known_id
from .growth import Growth
from .steps import (
    SCOPE,
    AddTokens,
    Freeze,
    HideRows,
    Mask,
    OpenScope,
    RenameTokens,
    SetAttribute,
    Split,
    Step,
    WriteRows,
)

__all__ = ["Attachment", "attachments_of"]


def attachments_of(model: nn.Module) -> list[Attachment]:
    """The row sets that are attached to a model, the oldest first."""
    found: list[Attachment] = getattr(model, REGISTRY, None) or []
    return found


class Attachment:
    """One set of rows on a model.

    Args:
        model: the model.
        tokenizer: its tokenizer, or `None` where `ids` are given.
        tokens: the tokens; those that the tokenizer does not know are added to it.
        ids: ids of the rows, where there are no tokens.
        rows: the rows' values for each table by its name, `[K, ...]`.
        strategy: `"split"` or `"mask"`.
        output: whether the rows of an untied head, and of biases, train.
        dtype: dtype of the trainable rows under `"split"`.
        pieces: for each token the ids of what its text was read as before it was added; `None` where the tokens
            were there already.
        reuse: for each token that takes over another one the text of that, by its own.
        trainable: whether they train at first.
    """

    def __init__(
        self,
        model: Any,
        tokenizer: Any,
        *,
        tokens: Sequence[AddedToken],
        ids: Sequence[int] | None,
        rows: dict[str, Tensor],
        strategy: str,
        output: str | bool,
        dtype: torch.dtype | None,
        pieces: Sequence[Sequence[int]] | None = None,
        reuse: Mapping[str, str] | None = None,
        trainable: bool = True,
    ) -> None:
        self.model = model
        self.tokenizer = tokenizer
        self.tokens = list(tokens)
        self.fixed_ids = None if ids is None else list(ids)
        self.strategy = strategy
        self.output = output
        self.dtype = dtype
        self.pieces = None if pieces is None else [list(ids) for ids in pieces]
        self.reuse = dict(reuse or {})
        self.trainable = trainable
        self.rows: dict[str, Any] = dict(rows)
        self.ids: list[int] = []
        self.trained: list[Table] = []
        self.layout: VocabularyLayout | None = None
        self.masks: list[MaskHandle] = []
        self._row_names: dict[str, str] = {}
        self._flags: dict[str, bool] = {}  # requires_grad of what trains, when it was taken off
        self._digests: dict[str, Tensor] = {}
        self._protected: list[Any] = []
        self._steps: list[Step] = []

    @property
    def attached(self) -> bool:
        """Whether the rows are on the model now."""
        return self in attachments_of(self.model)

    @property
    def offloaded(self) -> bool:
        """Whether something (accelerate) holds the values of the tables or rows, which are on the meta device."""
        return any(table.tensor.is_meta or self.parameter(table).is_meta for table in self.trained)

    @property
    def sharded(self) -> bool:
        """Whether each process holds a part of the tables or rows only."""
        return any(table.sharded or self._rows_sharded(table) for table in self.trained)

    def apply(self, layout: VocabularyLayout | None = None) -> None:
        """Put the rows on. On any error everything is as it was before.

        Args:
            layout: the model's layout, if the caller has just looked for it.
        """
        try:
            self._apply(layout)
        except BaseException:
            self._undo()
            raise

    def _apply(self, layout: VocabularyLayout | None) -> None:
        self.ids = self._give_ids()
        size = max(self.ids) + 1
        if layout is None or size > layout.reach:
            layout = find_layout(self.model, size)
        self.layout = layout
        self.trained = [table for table in layout.tables if self._trains(table)]
        self._check_free()
        self._do(PlainTables(self.model, [table.holders for table in layout.tables]))
        self._do(Growth(layout))
        for table in layout.tables:
            self._write_rows(table)
        for table in layout.tables:
            if table.is_parameter:
                for module, attribute in table.holders:
                    self._do(Freeze(module, attribute))
        if self.strategy == "split":
            self._split()
        else:
            self._mask()
        for module in self.model.modules():
            if hasattr(type(module), "resize_token_embeddings"):
                self._do(SetAttribute(module, "resize_token_embeddings", _refuse_resize))
        self._digests = {table.name: table.digests() for table in self.trained}
        for table in self.trained:
            rows = table.tensor if self.strategy == "mask" else self.rows[table.name]
            rows.requires_grad_(self._flags.get(table.name, self.trainable))
        self._do(SetAttribute(self.model, REGISTRY, [*attachments_of(self.model), self]))

    def _write_rows(self, table: Table) -> None:
        """Write the rows into a table that has been grown for them."""
        rows = self.rows.get(table.name)
        if table.role == "lookup" and rows is not None:  # what stands there is the model's, token or not
            new = [row for row, token_id in enumerate(self.ids) if token_id >= table.size]
            if new:
                self._do(WriteRows(table, [self.ids[row] for row in new], rows[new]))
        elif rows is not None:
            self._do(WriteRows(table, self.ids, rows))
        # Ids without a token, between the old rows and the new ones: zeros would be large logits in a model
        # whose logits are mostly negative.
        between = sorted({*range(table.size, table.grown_size - table.tail)} - set(self.ids))
        if between and table.has_rows:
            old = table.tensor.detach().narrow(table.dim, 0, table.size)
            mean = old.mean(table.dim, dtype=torch.promote_types(old.dtype, torch.float32))
            self._do(WriteRows(table, between, mean.expand(len(between), *mean.shape)))

    def _give_ids(self) -> list[int]:
        if self.fixed_ids is not None:
            return self.fixed_ids
        if self.reuse:
            taken = {self.reuse[token.content]: token for token in self.tokens if token.content in self.reuse}
            self._do(RenameTokens(self.tokenizer, taken))
        texts = [token.content for token in self.tokens]
        ids = {text: known_id(self.tokenizer, text) for text in texts}
        new = [token for token in self.tokens if ids[token.content] is None]
        if new:
            step = AddTokens(self.tokenizer, new)
            self._do(step)
            ids.update(zip((token.content for token in new), step.ids, strict=True))
        return [token_id for text in texts if (token_id := ids[text]) is not None]

    def _trains(self, table: Table) -> bool:
        return table.has_rows and (self.output is not False or table.role in ("input", "extra"))

    def _check_free(self) -> None:
        for other in attachments_of(self.model):
            shared = sorted(set(self.ids) & set(other.ids))
            if shared:
                raise PartialEmbeddingError(
                    f"Rows {shorten(shared)} are trainable already, in another row set of this model. Train them "
                    "there, or detach() that one first."
                )
            if other.strategy != self.strategy:
                raise PartialEmbeddingError(
                    f"This model has rows attached with strategy={other.strategy!r}; rows with "
                    f"strategy={self.strategy!r} cannot be attached beside them. Use one strategy for both."
                )

    def _do(self, step: Step) -> None:
        self._steps.append(step)
        step.do()

    def _split(self) -> None:
        self._do(OpenScope(self.model))
        scope: ForwardScope = getattr(self.model, SCOPE)
        for table in self.trained:
            rows = self.rows[table.name]
            if not isinstance(rows, nn.Parameter):
                tensor = table.tensor
                dtype = self.dtype or torch.promote_types(torch.float32, tensor.dtype)
                rows = nn.Parameter(rows.to(device=tensor.device, dtype=dtype, copy=True))
                self.rows[table.name] = rows
            step = Split(table, rows, self.ids, scope)
            self._do(step)
            self._row_names[table.name] = step.row_name
        self._do(HideRows(self.model))

    def _mask(self) -> None:
        for table in self.trained:
            table.tensor.requires_grad_(True)
            others = [
                handle
                for other in attachments_of(self.model)
                for other_table, handle in zip(other.trained, other.masks, strict=True)
                if other_table.tensor is table.tensor
            ]
            step = Mask(table, self.ids, others)
            self._do(step)
            assert step.handle is not None
            self.masks.append(step.handle)
            for optimizer in self._protected:
                step.handle.protect(optimizer)

    def parameter(self, table: Table) -> nn.Parameter:
        """What trains for a table: its rows, or under `"mask"` the whole of it."""
        module, _ = table.holders[0]
        if self.strategy == "mask" or not self.attached:
            parameter: nn.Parameter = table.tensor if self.attached else self.rows[table.name]
            return parameter
        assert isinstance(module, PartialModule)
        # By attribute, since a wrapper (PEFT's modules_to_save) may have put a copy in its place.
        rows: nn.Parameter = getattr(module.new_rows, self._row_names[table.name])
        return rows

    def current_rows(self, table: Table) -> Tensor:
        """Values of the rows of a table, `[K, ...]`, detached copies on the CPU."""
        if self.attached and (self.strategy == "mask" or table not in self.trained):
            rows = table.rows(self.ids)
        else:
            rows = trained_rows(self.parameter(table), self._rows_shape(table))
        return rows.detach().to("cpu", copy=True)

    def set_rows(self, table: Table, values: Tensor) -> None:
        """Set the trainable rows of a table, under `"split"`."""
        set_whole(self.parameter(table), self._rows_shape(table), values)

    def _rows_shape(self, table: Table) -> tuple[int, ...]:
        return (len(self.ids), *table.shape[: table.dim], *table.shape[table.dim + 1 :])

    def _rows_sharded(self, table: Table) -> bool:
        return self.strategy == "split" and is_sharded(self.parameter(table), self._rows_shape(table))

    def protect(self, optimizer: Any) -> None:
        """`MaskHandle.protect` for every table; under `"split"` there is nothing to do."""
        for handle in self.masks:
            handle.protect(optimizer)
        self._protected.append(optimizer)

    def verify(self) -> None:
        """Compare the bits of all frozen rows with those at the time of attachment.

        Raises:
            `FrozenRowsChangedError`: names the ids of those that differ.
        """
        changed = {}
        for table in self.trained:
            now, before = table.digests(), self._digests[table.name]
            differs = now[: len(before)] != before
            for attachment in attachments_of(self.model):
                differs[[token_id for token_id in attachment.ids if token_id < len(before)]] = False
            if differs.any():
                changed[table.name] = differs.nonzero().flatten().tolist()
        if changed:
            raise FrozenRowsChangedError(changed)

    def detach(self) -> None:
        """Take the rows off: model and tokenizer are as if they had never been there."""
        self._change_under_others(self._undo)

    def merge(self) -> None:
        """Leave the rows in the tables, and take off everything else."""
        self._change_under_others(self._leave_rows)
        self._steps = []

    def _leave_rows(self) -> None:
        for table in self.trained:
            module, attribute = table.holders[0]
            if isinstance(module, PartialModule):
                module.write_rows([attribute])
        for step in reversed(self._steps):
            if not step.lasts:
                step.undo()

    def _change_under_others(self, change: Callable[[], None]) -> None:
        """Take off this row set by `change`, while those that were put on after it are off.

        On any error all of them are put on again, this one too, as they were.
        """
        # No context manager: an interrupt on the way from its generator to the body of `with` goes past it.
        attached = attachments_of(self.model)
        sets = attached[attached.index(self) :]
        for attachment in sets:
            attachment._keep_rows()
        gradients = {id(p): (p, p.grad) for other in sets for p in map(other.parameter, other.trained)}
        digests = [attachment._digests for attachment in sets]
        try:
            for other in reversed(sets[1:]):
                other._undo()
            change()
            for other in sets[1:]:
                other.apply()
        except BaseException:
            for attachment in reversed(sets):
                attachment._undo()
            for attachment, before in zip(sets, digests, strict=True):
                attachment.apply()
                attachment._digests = before
            for parameter, gradient in gradients.values():
                parameter.grad = gradient
            raise

    def _keep_rows(self) -> None:
        """Hold the rows' present values (and, under `"split"`, the parameters themselves)."""
        self._flags = {table.name: self.parameter(table).requires_grad for table in self.trained}
        for table in self.layout.tables if self.layout else []:
            if table.name in self.rows:
                split = self.strategy == "split" and table in self.trained
                self.rows[table.name] = self.parameter(table) if split else table.rows(self.ids)

    def _undo(self) -> None:
        """Take back what was done. A step that is interrupted while it is taken back begins again."""
        try:
            self._undo_steps()
        except BaseException:
            self._undo_steps()
            raise

    def _undo_steps(self) -> None:
        while self._steps:
            self._steps[-1].undo()
            self._steps.pop()
        self.masks, self._row_names, self._digests = [], {}, {}


def _refuse_resize(*args: object, **kwargs: object) -> None:
    raise PartialEmbeddingError(
        "resize_token_embeddings would tear the tables away from the rows that are attached to them. Add "
        "tokens with add_tokens, or call partial.merge() or partial.detach() first."
    )
