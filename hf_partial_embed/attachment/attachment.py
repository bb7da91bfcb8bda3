"""Attach trainable rows to a model and its tokenizer, and detach them.

An `Attachment` is a sequence of small steps, each of which can undo itself. If anything raises on the way, the steps
done so far are undone in reverse order. Steps hold data, no closures, so that an attachment can be deep-copied
together with its model.

One file, since attaching and detaching run the same steps in opposite directions, and share their state.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from tokenizers import AddedToken
from torch import Tensor, nn

from ..errors import FrozenRowsChangedError, PartialEmbeddingError, shorten
from ..initializers.initial_values import initial_values
from ..layout.resizing import REGISTRY
from ..layout.storage import PlainTables
from ..layout.tables import Table, VocabularyLayout, find_layout
from ..modules.digest import casts_of, changed_rows
from ..modules.mask import MaskHandle
from ..modules.rows import ForwardScope, PartialModule
from ..modules.sharding import is_sharded, set_whole, trained_rows
from ..tokens.backend import collector_paused
from ..tokens.entering import ids_of, plan_again
from ..tokens.pieces import Piece
from ..tokens.stored import described_tokens
from .growth import Growth, mean_rows
from .steps import (
    SCOPE,
    AddTokens,
    EnterPieces,
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

__all__ = ["Attachment", "attachments_of", "ids_in_use"]

logger = logging.getLogger(__name__)


def attachments_of(model: nn.Module) -> list[Attachment]:
    """The row sets that are attached to a model, the oldest first."""
    found: list[Attachment] = getattr(model, REGISTRY, None) or []
    return found


def ids_in_use(model: nn.Module) -> set[int]:
    """Ids of the rows that are in a set on a model."""
    return {token_id for attachment in attachments_of(model) for token_id in attachment.ids}


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
        entries: for each token the piece of the vocabulary that it is; `None` for an added token.
        reuse: for each token that takes over another one, by its text: the text of that other one.
        trainable: whether the rows require grad at first.
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
        entries: Sequence[Piece | None] | None = None,
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
        self.pieces = None if pieces is None else list(pieces)
        self.entries = list(entries or [None] * len(self.tokens))
        self.reuse = dict(reuse or {})
        self.trainable = trainable
        self.rows: dict[str, Any] = dict(rows)
        self.ids: list[int] = []
        self.made_of: dict[int, Sequence[int]] = {}  # what each id was read as before
        self.trained: list[Table] = []
        self.layout: VocabularyLayout | None = None
        self.masks: list[MaskHandle] = []
        self._row_names: dict[str, str] = {}
        self._flags: dict[str, bool] = {}  # requires_grad of what trains, when it was detached last
        self._digests: dict[str, dict[torch.dtype, Tensor]] = {}  # of each table, as each dtype
        self._protected: list[Any] = []
        self._steps: list[Step] = []

    @property
    def attached(self) -> bool:
        """Whether the rows are on the model now."""
        return self in attachments_of(self.model)

    def described_tokens(self) -> list[dict[str, Any]]:
        """Its tokens as a row file has them."""
        kind = type(self.tokenizer._tokenizer.model).__name__ if any(self.entries) else ""
        return described_tokens(self.tokens, self.entries, kind)

    @property
    def offloaded(self) -> bool:
        """Whether tables or rows are on the meta device, since accelerate holds their values."""
        return any(table.tensor.is_meta or self.parameter(table).is_meta for table in self.trained)

    @property
    def sharded(self) -> bool:
        """Whether this process holds only a part of the tables or rows."""
        return any(table.sharded or self._rows_sharded(table) for table in self.trained)

    def apply(self, layout: VocabularyLayout | None = None, *, planned: bool = False) -> None:
        """Attach the rows. If anything raises, everything is as it was before.

        Args:
            layout: the model's layout, if the caller has found it already.
            planned: whether the entries were planned over the tokenizer's vocabulary as it is now.

        Raises:
            `PartialEmbeddingError`: rows that are in another set, or that have another strategy than the model's
                other sets; whatever a step raises.
        """
        try:
            self._apply(layout, planned)
        except BaseException:
            self._undo()
            raise

    def _apply(self, layout: VocabularyLayout | None, planned: bool) -> None:
        self.ids = self._give_ids(planned)
        self.made_of = {} if self.pieces is None else dict(zip(self.ids, self.pieces, strict=True))
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
        for table in self.trained:
            own, *narrower = casts_of(table.dtype)
            digests = table.digests_through([[], *([cast] for cast in narrower)])
            self._digests[table.name] = dict(zip([own, *narrower], digests, strict=True))
        for table in self.trained:
            rows = table.tensor if self.strategy == "mask" else self.rows[table.name]
            rows.requires_grad_(self._flags.get(table.name, self.trainable))
        self._do(SetAttribute(self.model, REGISTRY, [*attachments_of(self.model), self]))

    def _write_rows(self, table: Table) -> None:
        """Write the rows into a table that has been grown for them."""
        rows = self.rows.get(table.name)
        if table.role == "lookup" and rows is not None:  # existing rows are the model's, with or without a token
            new = [row for row, token_id in enumerate(self.ids) if token_id >= table.size]
            if new:
                self._do(WriteRows(table, [self.ids[row] for row in new], rows[new]))
        elif rows is not None:
            self._do(WriteRows(table, self.ids, rows))
        # Ids without a token, between the old rows and the new ones.
        between = sorted({*range(table.size, table.grown_size - table.tail)} - set(self.ids))
        if between and table.has_rows:
            self._do(WriteRows(table, between, mean_rows(table, len(between))))

    @collector_paused()
    def _give_ids(self, planned: bool) -> list[int]:
        if self.fixed_ids is not None:
            return self.fixed_ids
        if self.reuse:
            taken = {self.reuse[token.content]: token for token in self.tokens if token.content in self.reuse}
            self._do(RenameTokens(self.tokenizer, taken))
        found = ids_of(self.tokenizer, self.tokens, self.entries)
        texts = [token.content for token in self.tokens]
        ids = dict(zip(texts, found, strict=True))
        kept = dict[str, int]()
        if any(piece is not None and ids[piece.text] is None for piece in self.entries):
            entered = self._enter_pieces({text for text in texts if ids[text] is None}, planned)
            ids.update({piece.text: entered.ids[piece.spelling] for piece in entered.pieces})
            kept = entered.pins
            texts = [token.content for token in self.tokens]  # parts may have come
        new = {text: token for text, token in zip(texts, self.tokens, strict=True) if ids[text] is None}
        if new:
            step = AddTokens(self.tokenizer, list(new.values()), kept)
            self._do(step)
            ids.update(zip(new, step.ids, strict=True))
        return [token_id for text in texts if (token_id := ids[text]) is not None]

    def _enter_pieces(self, new: set[str], are_planned: bool) -> EnterPieces:
        """Enter the pieces that are new, planned against the present vocabulary now if they are not."""
        if not are_planned:
            new = new | self._plan_pieces(new)
        came = [(token, piece) for token, piece in zip(self.tokens, self.entries, strict=True) if token.content in new]
        step = EnterPieces(self.tokenizer, [token for token, _ in came], [piece for _, piece in came])
        self._do(step)
        return step

    def _plan_pieces(self, new: set[str]) -> set[str]:
        """Plan the pieces that are new against the present vocabulary; returns the texts of what is to come.

        Where another set was detached whose pieces were parts of these, they need parts of their own, which get rows.
        """
        missing = [piece for piece in self.entries if piece is not None and piece.text in new]
        planned = {piece.text: piece for piece in plan_again(self.tokenizer, missing)}
        texts = {token.content for token in self.tokens}
        parts = [piece for piece in planned.values() if piece.text not in texts]
        self.entries = [piece and planned.get(piece.text, piece) for piece in self.entries]
        if self.pieces is not None:
            self.pieces = [
                planned[token.content].made_of if token.content in planned else ids
                for token, ids in zip(self.tokens, self.pieces, strict=True)
            ]
        if parts:
            self._take_in(parts)
        return set(planned)

    def _take_in(self, parts: list[Piece]) -> None:
        """Take further parts into the set, with rows that start at the mean of what they are made of."""
        tokens = [AddedToken(part.text, normalized=True) for part in parts]
        made_of = [part.made_of for part in parts]
        layout = find_layout(self.model)
        values = initial_values(self.model, self.tokenizer, layout, tokens, None, "subtoken_mean", 0, pieces=made_of)
        for name, rows in self.rows.items():
            if name in values:
                added = values[name].to(device=rows.device, dtype=rows.dtype)
                longer = torch.cat([rows.detach(), added])
                self.rows[name] = nn.Parameter(longer) if isinstance(rows, nn.Parameter) else longer
        self.tokens += tokens
        self.entries += parts
        if self.pieces is not None:
            self.pieces += made_of

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
        """The values of a table's rows, `[K, ...]`: a detached copy on the CPU."""
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
        """Compare the bits of all frozen rows with those that they had when the rows were attached.

        A table that was cast as a whole since then is compared with its old values, cast in the same way.

        Raises:
            `FrozenRowsChangedError`: names the ids of those that differ.
        """
        changed = {}
        trained = [token_id for attachment in attachments_of(self.model) for token_id in attachment.ids]
        for table in self.trained:
            before, now = self._digests[table.name], table.dtype
            own = next(iter(before))
            rows, known_as = changed_rows(before, now, table.digests, trained)
            if rows:
                changed[table.name] = rows
            elif known_as is None:
                logger.warning(
                    "%s was cast from %s to %s since the tokens were attached. Its frozen rows cannot be compared "
                    "with what they were: no bits of them are known in that dtype.", table.name, own, now,
                )  # fmt: skip
            elif known_as != own:
                logger.warning(
                    "%s was cast from %s to %s since the tokens were attached: its frozen rows are the old ones, "
                    "rounded to that dtype.", table.name, own, known_as,
                )  # fmt: skip
        if changed:
            raise FrozenRowsChangedError(changed)

    def detach(self) -> None:
        """Undo all steps: model and tokenizer are as if the rows had never been attached."""
        self._change_under_others(self._undo)

    def merge(self) -> None:
        """Write the rows into the tables, and undo all steps but those that last."""
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
        """Call `change`, which removes this row set, while the sets that were attached after it are detached.

        Those are attached again afterwards. If anything raises, all of them are, this one too, as they were.
        """
        # Not a context manager: it would miss an interrupt between its generator and the body of `with`.
        attached = attachments_of(self.model)
        sets = attached[attached.index(self) :]
        for attachment in sets:
            attachment._keep_rows()
        gradients = {id(p): (p, p.grad) for other in sets for p in map(other.parameter, other.trained)}
        before = [attachment._own_state() for attachment in sets]
        try:
            for other in reversed(sets[1:]):
                other._undo()
            change()
            for other in sets[1:]:
                other.apply()
        except BaseException:
            for attachment in reversed(sets):
                attachment._undo()
            for attachment, (state, digests) in zip(sets, before, strict=True):
                attachment.__dict__.update(state)
                attachment.apply()
                attachment._digests = digests
            for parameter, gradient in gradients.values():
                parameter.grad = gradient
            raise

    def _own_state(self) -> tuple[dict[str, Any], dict[str, dict[torch.dtype, Tensor]]]:
        """What attaching it again can change: its tokens, entries, pieces and rows; and its digests."""
        pieces = None if self.pieces is None else list(self.pieces)
        state: dict[str, Any] = {
            "tokens": list(self.tokens),
            "entries": list(self.entries),
            "pieces": pieces,
            "rows": dict(self.rows),
        }
        return state, self._digests

    def _keep_rows(self) -> None:
        """Keep the rows' present values (under `"split"` the parameters themselves), to attach them again."""
        self._flags = {table.name: self.parameter(table).requires_grad for table in self.trained}
        for table in self.layout.tables if self.layout else []:
            if table.name in self.rows:
                split = self.strategy == "split" and table in self.trained
                self.rows[table.name] = self.parameter(table) if split else table.rows(self.ids)

    def _undo(self) -> None:
        """Undo all steps. A step whose undoing is interrupted is undone again before the interrupt is raised."""
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
