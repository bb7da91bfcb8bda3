"""A set of token rows: attached to a model (`PartialEmbedding`), and as values of its own (`TokenRows`).

One file, since each class makes the other: `partial.token_rows()` and `rows.attach(model)`.
"""

from __future__ import annotations

import logging
import os
import tempfile
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from tokenizers import AddedToken
from torch import Tensor, nn

from ..errors import PartialEmbeddingError, count, shorten
from ..files.hub import locate_rows, merged_card, rows_card, upload, write_card
from ..files.rows_file import ROWS_FILE, read_rows, write_rows
from ..layout.tables import Table, VocabularyLayout, find_layout, model_name, row_keys
from ..lazy import lazy_function
from ..modules.merged_view import MergedView
from ..modules.splitting import check_ids
from ..tokens.added import normalize_tokens, token_to_dict, without_tokens_from
from ..tokens.pieces import Piece
from ..tokens.stored import entry_of
from ..tokens.vocabulary import display_names, plain_tokenizer
from .additions import change_without_additions
from .arriving import arriving_tokens
from .attachment import Attachment, ids_in_use
from .fitting import fit_rows
from .growth import warn_of_mean_rows
from .options import ROW_DTYPES, check_options

__all__ = ["PartialEmbedding", "TokenRows", "attach_rows"]

logger = logging.getLogger(__name__)

_evaluate = lazy_function("evaluation.evaluate", "evaluate")  # a wing above this one


class PartialEmbedding:
    """Token rows on a model: what `add_tokens`, `train_tokens` and `load_tokens` return.

    Attributes:
        model: what the rows are attached to.
        tokenizer: its tokenizer, `None` where rows were chosen by id.
    """

    def __init__(self, attachment: Attachment) -> None:
        self._attachment = attachment

    @property
    def model(self) -> Any:
        return self._attachment.model

    @property
    def tokenizer(self) -> Any:
        return self._attachment.tokenizer

    @property
    def tokens(self) -> list[str]:
        """Texts of the tokens; empty where rows were chosen by id without a tokenizer."""
        return [token.content for token in self._attachment.tokens]

    @property
    def token_ids(self) -> list[int]:
        """Ids, in the order of `tokens`."""
        return list(self._attachment.ids)

    @property
    def entries(self) -> list[str]:
        """How each token entered the tokenizer: `"added"`, `"vocabulary"`, or as `"part"` of one that did."""
        return [entry_of(token) for token in self._attachment.described_tokens()]

    def expand(self, ids: Sequence[int]) -> list[int]:
        """Replace each new id by the ids that its text was read as before the token was added.

        Args:
            ids: ids of a text, with or without new tokens.

        Returns:
            `list[int]`: ids that the base model knows. Tokens that existed before (`train_tokens`) keep their id.
        """
        made_of = self._attachment.made_of
        return [piece for token_id in ids for piece in made_of.get(token_id, (token_id,))]

    def vocabulary_pieces(self) -> list[tuple[int, ...]]:
        """For each token the ids that it is made of as a piece of the vocabulary; empty for an added token."""
        return [() if piece is None else piece.made_of for piece in self._attachment.entries]

    def evaluate(
        self,
        texts: Iterable[str],
        *,
        batch_size: int = 8,
        max_length: int | None = None,
        stride: int | None = None,
        timed_texts: int = 0,
        progress: bool = True,
    ) -> Any:
        """Compare the model, on texts, with what it was before: `hf_partial_embed.evaluate(None, self, texts)`.

        Args, result and errors are those of `hf_partial_embed.evaluate`, which says how texts are scored. Give texts
        with new tokens and without, none of which were trained on. Model and tokenizer are unchanged.
        """
        options = {"max_length": max_length, "stride": stride, "timed_texts": timed_texts, "progress": progress}
        return _evaluate(None, self, texts, batch_size=batch_size, **options)

    @property
    def strategy(self) -> str:
        return self._attachment.strategy

    def parameters(self) -> Iterator[nn.Parameter]:
        """The parameters that train: the rows of each table, `[K, ...]`; under `"mask"` the whole tables."""
        self._require_attached("parameters")
        for table in self._attachment.trained:
            yield self._attachment.parameter(table)

    def param_groups(self, lr: float, weight_decay: float = 0.0) -> list[dict[str, Any]]:
        """Parameter groups for an optimizer. Weight decay would pull new rows towards zero, so its default is 0."""
        return [{"params": list(self.parameters()), "lr": lr, "weight_decay": weight_decay}]

    def requires_grad_(self, requires_grad: bool = True) -> PartialEmbedding:
        """Set whether the rows train; needed after something else has frozen the whole model, as PEFT does."""
        for parameter in self.parameters():
            parameter.requires_grad_(requires_grad)
        return self

    def protect(self, optimizer: Any) -> None:
        """Keep frozen rows unchanged under `"mask"` in your own training loop; see `MaskHandle.protect`.

        Call it once, before the first step. Under `"split"` it does nothing, since nothing is needed.

        Raises:
            `PartialEmbeddingError`: the optimizer does not hold the masked tables.
        """
        self._require_attached("protect")
        self._attachment.protect(optimizer)

    def verify(self) -> None:
        """Check that no frozen row has changed by one bit since the rows were attached.

        A cast of the whole model or table is no change. A table that was cast to a wider dtype is compared with the
        old bits; a float32 table that was cast to bfloat16 or float16 is compared with its old values, rounded, and a
        warning says so.

        In a sharded run every process calls it, with the same result; digests of the rows are communicated.

        Raises:
            `FrozenRowsChangedError`: names the ids of the rows that have changed.
        """
        self._require_attached("verify")
        self._attachment.verify()

    def rows_and_tables(self) -> Iterator[tuple[nn.Parameter, Tensor]]:
        """Each parameter that trains, with the whole table that it belongs to."""
        self._require_attached("rows_and_tables")
        for table in self._attachment.trained:
            yield self._attachment.parameter(table), table.tensor

    def trained_tables(self) -> dict[str, Table]:
        """The tables in which rows train, by the name that their rows have in a row file."""
        self._require_attached("trained_tables")
        layout = self._attachment.layout
        keys = row_keys(layout) if layout else {}
        return {key: table for key, table in keys.items() if table in self._attachment.trained}

    def parameter_of(self, table: Table) -> nn.Parameter:
        """The parameter that trains for one of `trained_tables`: its rows; under `"mask"` the whole table."""
        return self._attachment.parameter(table)

    def set_rows(self, table: Table, values: Tensor) -> None:
        """Set the trainable rows of one of `trained_tables`, `[K, ...]`; on every process of a sharded run."""
        self._require_attached("set_rows")
        self._attachment.set_rows(table, values)

    def token_rows(self) -> TokenRows:
        """The rows as they are now: detached copies on the CPU, gathered where they are sharded.

        In a sharded run every process calls it.
        """
        attachment = self._attachment
        if attachment.attached:
            self._require_attached("read the rows")
        assert attachment.layout is not None
        keys = row_keys(attachment.layout)
        return TokenRows.from_tensors(
            {key: attachment.current_rows(table) for key, table in keys.items()},
            added_tokens=attachment.described_tokens(),
            token_ids=self.token_ids,
            base_model=model_name(self.model),
            tied=attachment.layout.tied,
        )

    @torch.no_grad()
    def adopt(self, rows: TokenRows, *, if_equal_rounded: bool = False) -> bool:
        """Set the rows to saved values of the same tokens, where they fit.

        Args:
            rows: the values.
            if_equal_rounded: set them only if they are equal to the present ones in the table's dtype.

        Returns:
            `bool`: whether the values were set.
        """
        attachment = self._attachment
        self._require_attached("adopt")
        assert attachment.layout is not None
        values = rows.tensors()
        pairs = []
        for key, table in row_keys(attachment.layout).items():
            if table in attachment.trained:
                if key not in values or rows.tokens != self.tokens:
                    return False
                pairs.append((table, values[key], attachment.current_rows(table)))
        if self.strategy == "mask":
            return False
        for table, value, now in pairs:
            dtype = table.tensor.dtype
            if value.shape != now.shape or (if_equal_rounded and not torch.equal(value.to(dtype), now.to(dtype))):
                return False
        for table, value, _ in pairs:
            attachment.set_rows(table, value)
        return True

    def save_pretrained(self, path: str | os.PathLike[str]) -> None:
        """Save the rows: see `TokenRows.save_pretrained`.

        In a sharded run every process calls it. Each writes the same whole file, so they may all give one path.
        """
        self.token_rows().save_pretrained(path)

    def push_to_hub(
        self,
        repo_id: str,
        *,
        merged: bool = False,
        private: bool | None = None,
        token: str | bool | None = None,
        revision: str | None = None,
        commit_message: str | None = None,
        create_pr: bool = False,
    ) -> str:
        """Publish the rows, or with `merged=True` the whole model and tokenizer, with a model card.

        Args:
            repo_id: repository on the Hub, made where it does not exist.
            merged: whether to publish an ordinary checkpoint instead of the rows.
            private, token, revision, commit_message, create_pr: as `huggingface_hub` has them.

        Returns:
            `str`: the URL of the commit or the pull request.
        """
        options: dict[str, Any] = {
            "private": private, "token": token, "revision": revision, "create_pr": create_pr
        }  # fmt: skip
        if not merged:
            return self.token_rows().push_to_hub(repo_id, commit_message=commit_message, **options)
        with tempfile.TemporaryDirectory() as name:
            folder = Path(name)
            self.model.save_pretrained(folder)
            if self.tokenizer is not None:
                self.tokenizer.save_pretrained(folder)
            card = merged_card(
                display_names(self.tokens, self.token_ids),
                base_model=model_name(self.model),
                repo_id=repo_id,
                entries=self.entries,
                model_class=(self.model.config.architectures or [type(self.model).__name__])[0],
            )
            write_card(folder, card)
            message = commit_message or f"Upload model with {count(self.token_ids, 'trained token row')}"
            return upload(folder, repo_id, commit_message=message, **options)

    def as_merged(self) -> MergedView:
        """A context manager in which the model's weights are those of the merged model, for whoever walks them.

        ```python
        with partial.as_merged() as model:
            engine.load_weights(model.named_parameters())  # or model.state_dict()
        ```

        No `new_rows` keys, the current rows written into the tables; nothing is copied, and training goes on
        afterwards. Outside of it `state_dict()` has the rows in the tables as well, and `new_rows` keys beside.
        In a sharded run (FSDP2) every process opens it.

        Raises:
            `PartialEmbeddingError`: the tables are partitioned by ZeRO-3 or FSDP1, or offloaded.
        """
        self._require_attached("hand on the merged weights")
        return MergedView(self.model)

    def merge(self) -> Any:
        """Leave the rows in the tables of an ordinary model, with the modules that it had before.

        Returns:
            The model. The tokenizer keeps the tokens.

        Raises:
            `PartialEmbeddingError`: the rows are not attached, or are offloaded or sharded.
        """
        self._require_attached("merge")
        self._require_whole("merge")
        change_without_additions(self.model, self._attachment.merge)
        return self.model

    def detach(self) -> TokenRows:
        """Remove the rows: model and tokenizer are as they were before, bit for bit.

        Row sets that were attached later stay attached; their ids may change.

        Returns:
            The rows.

        Raises:
            `PartialEmbeddingError`: the rows are not attached, or are offloaded or sharded.
        """
        self._require_attached("detach")
        self._require_whole("detach")
        rows = self.token_rows()
        change_without_additions(self.model, self._attachment.detach)
        return rows

    def _require_attached(self, action: str) -> None:
        if not self._attachment.attached:
            raise PartialEmbeddingError(
                f"Cannot {action}: these rows are not on a model any more (merged or detached). Attach them again "
                "with TokenRows.attach."
            )
        if self._attachment.offloaded:
            raise PartialEmbeddingError(
                f"Cannot {action}: accelerate has offloaded the rows, which are on the meta device until they are "
                "used. An offloaded model can only be run. Train, save and merge rows before cpu_offload, "
                "disk_offload or dispatch_model."
            )

    def _require_whole(self, action: str) -> None:
        if self._attachment.sharded:
            raise PartialEmbeddingError(
                f"Cannot {action}: the model is sharded, and each process holds a part of the rows. What "
                "model.save_pretrained writes is the merged checkpoint already: load that, or take the rows with "
                "token_rows()."
            )

    def __repr__(self) -> str:
        state = "" if self._attachment.attached else ", not attached"
        names = self.tokens or self.token_ids
        return (
            f"PartialEmbedding({count(names, 'token')}: {shorten(names, 4)}; {self.strategy}, "
            f"{type(self.model).__name__}{state})"
        )


@dataclass
class TokenRows:
    """The values of token rows, on the CPU: what is saved, published, and attached to other models.

    Attributes:
        tokens: texts of the `K` tokens; empty where rows were chosen by id without a tokenizer.
        input_rows (`torch.Tensor` of shape `(K, d)`): rows of the input embeddings.
        output_rows (`torch.Tensor` of shape `(K, d)`, *optional*): rows of the head; `None` where it is
            tied to the input embeddings, or where there is none.
        output_bias (`torch.Tensor` of shape `(K,)`, *optional*): entries of the head's bias.
        extra_rows: rows of further tables over the vocabulary, by parameter name.
        token_ids: ids that the rows had; used only where there are no tokens.
        added_tokens: text and flags of each token.
        base_model: name of the model that the rows were trained on.
        tied: whether that model's head was tied.

    Raises:
        `PartialEmbeddingError`: another number of rows than of tokens, repeated ids, or rows that are not of a
            floating-point dtype.
    """

    tokens: list[str]
    input_rows: Tensor
    output_rows: Tensor | None = None
    output_bias: Tensor | None = None
    extra_rows: dict[str, Tensor] = field(default_factory=dict)
    token_ids: list[int] = field(default_factory=list)
    added_tokens: list[dict[str, Any]] = field(default_factory=list)
    base_model: str | None = None
    tied: bool = False

    def __post_init__(self) -> None:
        if self.tokens and not self.added_tokens:
            self.added_tokens = [token_to_dict(token) for token in normalize_tokens(self.tokens, special=False)]
        if not self.token_ids:
            self.token_ids = list(range(len(self.input_rows)))
        self._check()

    def _check(self) -> None:
        size = len(self.token_ids)
        if self.tokens and len(self.tokens) != size:
            raise PartialEmbeddingError(f"There are {len(self.tokens)} tokens, but {count(self.token_ids, 'id')}.")
        if len(set(self.token_ids)) != size:
            raise PartialEmbeddingError(f"Ids are given more than once: {shorten(self.token_ids)}.")
        for name, rows in self.tensors().items():
            if rows.dtype not in ROW_DTYPES:
                allowed = ", ".join(str(dtype) for dtype in ROW_DTYPES)
                raise PartialEmbeddingError(f"{name} is {rows.dtype}; rows are one of {allowed}.")
            if len(rows) != size:
                raise PartialEmbeddingError(
                    f"{name} has {len(rows)} rows, but there are {count(self.token_ids, 'token')}: "
                    f"{shorten(self.tokens or self.token_ids)}."
                )

    @classmethod
    def from_tensors(
        cls, tensors: Mapping[str, Tensor], *, added_tokens: list[dict[str, Any]], **metadata: Any
    ) -> TokenRows:
        """The inverse of `tensors`, with the metadata of a row file."""
        known = ("input_rows", "output_rows", "output_bias")
        return cls(
            tokens=[token["content"] for token in added_tokens],
            extra_rows={name.removeprefix("extra."): rows for name, rows in tensors.items() if name not in known},
            added_tokens=added_tokens,
            **{name: tensors[name] for name in known if name in tensors},  # type: ignore[arg-type]
            **metadata,
        )

    def tensors(self) -> dict[str, Tensor]:
        """All rows, by the name that they have in a row file."""
        tensors = {"input_rows": self.input_rows}
        if self.output_rows is not None:
            tensors["output_rows"] = self.output_rows
        if self.output_bias is not None:
            tensors["output_bias"] = self.output_bias
        return {**tensors, **{f"extra.{name}": rows for name, rows in self.extra_rows.items()}}

    @property
    def entries(self) -> list[str]:
        """How each token entered the tokenizer: `"added"`, `"vocabulary"`, or as `"part"` of one that did."""
        return [entry_of(token) for token in self.added_tokens]

    def __len__(self) -> int:
        return len(self.token_ids)

    def save_pretrained(self, path: str | os.PathLike[str]) -> None:
        """Save the rows as one safetensors file, and a model card, in the folder `path`.

        The file is written under another name, synced to the disk and renamed, so that whatever happens on the way
        either the old file or the new one is there, whole. A `README.md` that was not written here is left alone.

        Raises:
            `PartialEmbeddingError`: infinite or NaN values, or `path` is a file. Nothing is written.
        """
        self._save(Path(path), repo_id=str(path))

    def save_file(self, path: str | os.PathLike[str]) -> None:
        """Save the rows as the file `path`, without a model card.

        Raises:
            `PartialEmbeddingError`: infinite or NaN values. Nothing is written.
        """
        for name, rows in self.tensors().items():
            finite = torch.isfinite(rows).reshape(len(self), -1).all(1)
            if not finite.all():
                bad = [(self.tokens or self.token_ids)[row] for row in (~finite).nonzero().flatten().tolist()]
                raise PartialEmbeddingError(
                    f"{name} has infinite or NaN values for {shorten(bad)}: the training has diverged, or the values "
                    "do not fit the dtype. Lower the learning rate."
                )
        metadata = {
            "tokens": self.added_tokens,
            "token_ids": self.token_ids,
            "base_model": self.base_model,
            "tied": self.tied,
        }
        write_rows(path, self.tensors(), metadata)

    def _save(self, folder: Path, repo_id: str) -> None:
        if folder.is_file():
            raise PartialEmbeddingError(f"Cannot save to {folder}: it is a file. Give the path of a folder.")
        self.save_file(folder / ROWS_FILE)
        card = rows_card(
            display_names(self.tokens, self.token_ids),
            {name: tuple(rows.shape) for name, rows in self.tensors().items()},
            base_model=self.base_model,
            repo_id=repo_id,
            file_bytes=(folder / ROWS_FILE).stat().st_size,
            entries=self.entries,
        )
        write_card(folder, card)

    @classmethod
    def from_pretrained(
        cls,
        source: str | os.PathLike[str],
        *,
        revision: str | None = None,
        token: str | bool | None = None,
    ) -> TokenRows:
        """Load rows from a row file, a folder that has one, or a Hub repository.

        Nothing is unpickled and no code is run.

        Raises:
            `PartialEmbeddingError`: there is no row file, or it is damaged or of a newer version.
        """
        tensors, metadata = read_rows(locate_rows(source, revision=revision, token=token))
        return cls.from_tensors(
            tensors,
            added_tokens=metadata["tokens"],
            token_ids=metadata["token_ids"],
            base_model=metadata["base_model"],
            tied=metadata["tied"],
        )

    def push_to_hub(
        self,
        repo_id: str,
        *,
        private: bool | None = None,
        token: str | bool | None = None,
        revision: str | None = None,
        commit_message: str | None = None,
        create_pr: bool = False,
    ) -> str:
        """Publish the row file and a model card; returns the URL of the commit or pull request."""
        with tempfile.TemporaryDirectory() as name:
            self._save(Path(name), repo_id)
            return upload(
                Path(name),
                repo_id,
                private=private,
                token=token,
                revision=revision,
                commit_message=commit_message or f"Upload {count(self.token_ids, 'token row')}",
                create_pr=create_pr,
            )

    def attach(
        self,
        model: Any,
        tokenizer: Any,
        *,
        strategy: str = "split",
        output: str | bool = "auto",
        dtype: torch.dtype | None = None,
        trainable: bool = True,
    ) -> PartialEmbedding:
        """Attach the rows to a model.

        Tokens are matched by their text: those that the tokenizer has get these rows, the others are added to it.
        Rows without texts are matched by id.

        Args:
            model, tokenizer, strategy, output, dtype: as in `add_tokens`.
            trainable: whether the rows train.

        Returns:
            The `PartialEmbedding` that is now on the model.

        Raises:
            `PartialEmbeddingError`: the model's embeddings have another width, its head is tied and the rows have
                output rows of their own, or tokens cannot enter the tokenizer. Nothing has changed.
        """
        tokenizer = plain_tokenizer(tokenizer, needed=bool(self.tokens))
        arriving = arriving_tokens(tokenizer, self.added_tokens, ids_in_use(model))
        layout = find_layout(model, arriving.reach or None)
        check_options(layout, strategy, output, dtype)
        # Tokens that the tokenizer has but the table lacks are new: plan them over the tokenizer without these.
        before = without_tokens_from(tokenizer, min(table.size for table in layout.tables)) if self.tokens else None
        if before is not tokenizer and before is not None:
            arriving = arriving_tokens(before, self.added_tokens, ids_in_use(model))
        values = (
            {name: rows[arriving.kept] for name, rows in self.tensors().items()} if self.tokens else self.tensors()
        )
        rows = fit_rows(
            values, model, before or tokenizer, layout, arriving, base_model=self.base_model, tied=self.tied
        )
        ids = None if self.tokens else check_ids(self.token_ids, min(table.size for table in layout.tables))
        return attach_rows(
            model, tokenizer, layout, tokens=arriving.tokens, entries=arriving.entries, ids=ids, rows=rows,
            strategy=strategy, output=output, dtype=dtype, pieces=arriving.pieces if self.tokens else None,
            trainable=trainable, planned=before is tokenizer,
        )  # fmt: skip


def attach_rows(
    model: Any,
    tokenizer: Any,
    layout: VocabularyLayout,
    *,
    tokens: Sequence[AddedToken],
    rows: dict[str, Tensor],
    strategy: str,
    output: str | bool,
    dtype: torch.dtype | None,
    ids: Sequence[int] | None = None,
    pieces: Sequence[Sequence[int]] | None = None,
    entries: Sequence[Piece | None] | None = None,
    reuse: Mapping[str, str] | None = None,
    trainable: bool = True,
    planned: bool = False,
) -> PartialEmbedding:
    """Attach a set of rows to a model; the arguments are those of `Attachment` and of its `apply`."""
    attachment = Attachment(
        model, tokenizer, tokens=tokens, ids=ids, rows=rows, strategy=strategy, output=output, dtype=dtype,
        pieces=pieces, entries=entries, reuse=reuse, trainable=trainable,
    )  # fmt: skip
    partial = PartialEmbedding(attachment)
    attachment.apply(layout, planned=planned)
    if tokenizer is not None and attachment.layout is not None:
        warn_of_mean_rows(attachment.layout, tokenizer, attachment.ids)
    return partial
