"""Putting trainable rows on a model and its tokenizer, and taking them off again.

An `Attachment` changes things in small steps, each of which knows how to take itself back; whatever
goes wrong on the way, the steps taken so far are undone in reverse. Steps hold data, no closures, so
that an attachment can be deep-copied together with its model.

One file, since putting on and taking off are two directions of one way, and share its state.
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
from ..tokens.entering import piece_id, plan_again
from ..tokens.pieces import Piece
from ..tokens.stored import described_tokens
from ..tokens.vocabulary import known_id
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
        self.pieces = None if pieces is None else [list(ids) for ids in pieces]
        self.entries = list(entries or [None] * len(self.tokens))
        self.reuse = dict(reuse or {})
        self.trainable = trainable
        self.rows: dict[str, Any] = dict(rows)
        self.ids: list[int] = []
        self.trained: list[Table] = []
        self.layout: VocabularyLayout | None = None
        self.masks: list[MaskHandle] = []
        self._row_names: dict[str, str] = {}
        self._flags: dict[str, bool] = {}  # requires_grad of what trains, when it was taken off
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
        for table in self.trained:
            own, *narrower = casts_of(table.dtype)
            self._digests[table.name] = {own: table.digests(), **{cast: table.digests([cast]) for cast in narrower}}
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
        # Ids without a token, between the old rows and the new ones.
        between = sorted({*range(table.size, table.grown_size - table.tail)} - set(self.ids))
        if between and table.has_rows:
            self._do(WriteRows(table, between, mean_rows(table, len(between))))

    def _give_ids(self) -> list[int]:
        if self.fixed_ids is not None:
            return self.fixed_ids
        if self.reuse:
            taken = {self.reuse[token.content]: token for token in self.tokens if token.content in self.reuse}
            self._do(RenameTokens(self.tokenizer, taken))
        ids = {
            token.content: known_id(self.tokenizer, token.content)
            if piece is None
            else piece_id(self.tokenizer, piece)
            for token, piece in zip(self.tokens, self.entries, strict=True)
        }
        new = [token for token in self.tokens if ids[token.content] is None]
        kept = dict[str, int]()
        if any(piece is not None and ids[piece.text] is None for piece in self.entries):
            entered = self._enter_pieces({token.content for token in new})
            ids.update({piece.text: entered.ids[piece.spelling] for piece in entered.pieces})
            kept = entered.pins
        texts = [token.content for token in self.tokens]
        new = [token for token in new if ids[token.content] is None]
        if new:
            step = AddTokens(self.tokenizer, new, kept)
            self._do(step)
            ids.update(zip((token.content for token in new), step.ids, strict=True))
        return [token_id for text in texts if (token_id := ids[text]) is not None]

    def _enter_pieces(self, new: set[str]) -> EnterPieces:
        """Plan those pieces that are new over what is in the vocabulary now, and put them in.

        Where another set has gone whose pieces were parts of these, they need parts of their own, which get rows.
        """
        missing = [piece for piece in self.entries if piece is not None and piece.text in new]
        planned = {piece.text: piece for piece in plan_again(self.tokenizer, missing)}
        texts = {token.content for token in self.tokens}
        parts = [piece for piece in planned.values() if piece.text not in texts]
        self.entries = [piece and planned.get(piece.text, piece) for piece in self.entries]
        if self.pieces is not None:
            self.pieces = [
                list(planned[token.content].made_of) if token.content in planned else ids
                for token, ids in zip(self.tokens, self.pieces, strict=True)
            ]
        if parts:
            self._take_in(parts)
        came = [
            (token, piece)
            for token, piece in zip(self.tokens, self.entries, strict=True)
            if token.content in new or token.content in planned
        ]
        step = EnterPieces(self.tokenizer, [token for token, _ in came], [piece for _, piece in came])
        self._do(step)
        return step

    def _take_in(self, parts: list[Piece]) -> None:
        """Give further parts rows, which start from what they are made of."""
        tokens = [AddedToken(part.text, normalized=True) for part in parts]
        made_of = [list(part.made_of) for part in parts]
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

        A table that was cast as a whole since then is compared with what the cast makes of its old values.

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
        """Which tokens and rows it has, which planning it anew can change; and its digests."""
        pieces = None if self.pieces is None else list(self.pieces)
        state: dict[str, Any] = {
            "tokens": list(self.tokens),
            "entries": list(self.entries),
            "pieces": pieces,
            "rows": dict(self.rows),
        }
        return state, self._digests

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
