"""The token rows of a checkpoint: which tokens they belong to, and their exact values.

The tables and the optimizer's state of a checkpoint have rows by position. The texts of their tokens are noted in the
`TrainerState`, which every engine saves with each checkpoint and loads on every process before the first step,
wherever the checkpoint has been moved to.
"""

from __future__ import annotations

import json
import logging
import os
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from tokenizers import Tokenizer
from torch import nn
from transformers import TrainerState, TrainingArguments

from ..attachment.attachment import attachments_of
from ..attachment.partial import PartialEmbedding, TokenRows
from ..errors import PartialEmbeddingError, shorten
from ..files.rows_file import ROWS_FILE, read_rows

__all__ = ["check_tokens", "checkpoint_folder", "note_tokens", "restore_from_files", "rounded_rows", "rows_file"]

logger = logging.getLogger(__name__)

_KEY = "hf_partial_embed"  # beside the states of callbacks
_STATE_FILE = "trainer_state.json"


class RowSet(NamedTuple):
    """Tokens of a set of rows, in the order of the rows; no texts where they were chosen by id."""

    tokens: list[str]
    ids: list[int]

    @property
    def names(self) -> list[str | int]:
        return [*self.tokens] or [*self.ids]


def note_tokens(state: TrainerState, partials: Sequence[PartialEmbedding]) -> None:
    """Note in the Trainer's state, which each checkpoint has, which tokens the rows belong to."""
    noted: Any = state.stateful_callbacks
    noted[_KEY] = {"row_sets": [{"tokens": rows.tokens, "token_ids": rows.ids} for rows in _present(partials)]}


def check_tokens(args: TrainingArguments, state: TrainerState, partials: Sequence[PartialEmbedding]) -> None:
    """Check, before the first step of a resumed run, that the checkpoint's rows are those of this model's tokens.

    Raises:
        `PartialEmbeddingError`: they are of other tokens, or of the same ones in another order; the same for the best
            checkpoint, where that is to be loaded when training ends.
    """
    ordered = partials[0].strategy == "split"
    here = _present(partials)
    own = [_row_set(partial) for partial in partials]  # what the row files have
    noted: Any = state.stateful_callbacks
    saved = _noted(noted)
    if saved is not None:
        _compare(f"checkpoint at step {state.global_step}", saved, here, ordered)
    else:
        _compare_with_files(args, state, partials, own, ordered)
    best = state.best_model_checkpoint if args.load_best_model_at_end else None
    if best:
        saved = _noted(_state_in(Path(best)).get("stateful_callbacks"))
        if saved is not None:
            _compare(best, saved, here, ordered)
        elif (files := _row_sets_in(Path(best), len(own))) is not None:
            _compare(best, files, own, ordered)
        else:
            _warn_of_unknown(f"best checkpoint, {best},", own)


def _compare_with_files(
    args: TrainingArguments,
    state: TrainerState,
    partials: Sequence[PartialEmbedding],
    own: list[RowSet],
    ordered: bool,
) -> None:
    """`check_tokens` for a checkpoint without such a note: by its row files or, if it has none, its tokenizer."""
    for folder in _folders(args, state):
        found = _state_in(folder)
        if not found or found.get("log_history") != state.log_history:
            continue  # not the one that was loaded: the Trainer does not tell callbacks which one that was
        saved = _row_sets_in(folder, len(own))
        if saved is not None:
            _compare(str(folder), saved, own, ordered)
            return
        vocabulary = _vocabulary_in(folder)
        if vocabulary is not None and all(rows.tokens for rows in own):
            texts = {token_id: text for text, token_id in vocabulary.items()}
            read = [RowSet([texts.get(i, f"id {i}") for i in rows.ids], rows.ids) for rows in own]
            _compare(f"tokenizer of {folder}", read, own, ordered)
            return
    _warn_of_unknown(f"checkpoint at step {state.global_step}", own)


def _warn_of_unknown(where: str, own: list[RowSet]) -> None:
    logger.warning(
        "The %s does not say which tokens its rows belong to: it was written without this callback, and no row file "
        "or tokenizer was found beside it. Its rows are taken by their position, as those of %s.",
        where,
        shorten([name for rows in own for name in rows.names]),
    )


def _compare(where: str, saved: list[RowSet], here: list[RowSet], ordered: bool) -> None:
    """Refuse rows that would be taken for those of other tokens.

    Args:
        where: what `saved` was read from.
        saved, here: row sets in the order in which they were attached.
        ordered: whether the order of the rows counts, too (`"split"`: it is that of their parameter); else ids do.
    """
    if len(saved) == len(here) and all(_same(*pair) for pair in zip(saved, here, strict=True)):
        return
    there_names, here_names = ([name for rows in sets for name in rows.names] for sets in (saved, here))
    there_ids, here_ids = ([token_id for rows in sets for token_id in rows.ids] for sets in (saved, here))
    there_rows = list(zip(there_names, there_ids, strict=True))
    here_rows = list(zip(here_names, here_ids, strict=True))
    if not ordered and set(there_rows) == set(here_rows):
        return
    same = set(there_names) == set(here_names)
    if there_rows == here_rows:
        what = "are the same tokens in other row sets"
        shown: tuple[Any, Any] = ([rows.names for rows in saved], [rows.names for rows in here])
    elif there_names == here_names:
        what = "have other ids"
        shown = there_rows, here_rows
    else:
        what = "are the same tokens in another order" if same else "are other tokens"
        shown = there_names, here_names
    remedy = (
        "Give them in the order of the checkpoint (a list or a sorted one; the order of a set changes from run to run)"
        if same
        else "Give the tokens of the checkpoint"
    )
    first, there, now = _from_difference(*shown)
    raise PartialEmbeddingError(
        f"Cannot resume: rows are taken from a checkpoint by position, and those of the {where} {what}"
        f"{f', from place {first} on' if first else ''}. There: {shorten(there)}. Here: {shorten(now)}. Training has "
        f"not begun. {remedy}, or train without resume_from_checkpoint: load_tokens takes rows from the checkpoint's "
        f"{ROWS_FILE} by their text."
    )


def _same(saved: RowSet, here: RowSet) -> bool:
    return saved.ids == here.ids and (saved.tokens == here.tokens or not saved.tokens or not here.tokens)


def _from_difference(there: list[Any], here: list[Any]) -> tuple[int, list[Any], list[Any]]:
    """Long lists are cut to begin where they differ; returns that position and both lists."""
    first = next((i for i, (a, b) in enumerate(zip(there, here, strict=False)) if a != b), min(len(there), len(here)))
    first = first if max(len(there), len(here)) > 8 else 0
    return first, there[first:], here[first:]


def _present(partials: Sequence[PartialEmbedding]) -> list[RowSet]:
    """All row sets of the model, also those that the callback was not given: they are in the checkpoint, too."""
    return [
        RowSet([token.content for token in attachment.tokens], list(attachment.ids))
        for attachment in attachments_of(partials[0].model)
    ]


def _row_set(partial: PartialEmbedding) -> RowSet:
    return RowSet(partial.tokens, partial.token_ids)


def _noted(states: Any) -> list[RowSet] | None:
    """What `note_tokens` has noted; `None` without a note."""
    found = states.get(_KEY) if isinstance(states, dict) else None
    return None if found is None else [RowSet(rows["tokens"], rows["token_ids"]) for rows in found["row_sets"]]


def _state_in(folder: Path) -> dict[str, Any]:
    try:
        found = json.loads((folder / _STATE_FILE).read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    return found if isinstance(found, dict) else {}


def _row_sets_in(folder: Path, number: int) -> list[RowSet] | None:
    """Tokens of the row files of a checkpoint; `None` if it does not have them all."""
    paths = [rows_file(folder, index) for index in range(number)]
    if not all(path.is_file() for path in paths):
        return None
    found = [read_rows(path)[1] for path in paths]
    return [RowSet([token["content"] for token in rows["tokens"]], rows["token_ids"]) for rows in found]


def _vocabulary_in(folder: Path) -> dict[str, int] | None:
    """Ids by text of the tokenizer that a Trainer has saved with a checkpoint; `None` if there is none."""
    path = folder / "tokenizer.json"
    if not path.is_file():
        return None
    vocabulary: dict[str, int] = Tokenizer.from_file(str(path)).get_vocab(with_added_tokens=True)
    return vocabulary


def _folders(args: TrainingArguments, state: TrainerState) -> Iterator[Path]:
    if args.resume_from_checkpoint is not None:
        yield Path(args.resume_from_checkpoint)
    yield checkpoint_folder(args, state)


def restore_from_files(
    partial: PartialEmbedding,
    checkpoints: Iterable[str | os.PathLike[str] | None],
    number: int,
    *,
    in_checkpoint: bool,
) -> None:
    """Take the exact rows from the row file of the checkpoint that was loaded, if that has them rounded or not at all.

    Args:
        partial: the rows to set.
        checkpoints: folders where the file may be.
        number: the row set's number in the callback.
        in_checkpoint: whether the checkpoint itself has the rows, in the table's dtype; then only a file that is
            equal to them in that dtype is taken.
    """
    if in_checkpoint and not rounded_rows(partial):
        return
    for checkpoint in checkpoints:
        path = None if checkpoint is None else rows_file(checkpoint, number)
        if path is not None and path.is_file():
            saved = TokenRows.from_pretrained(path)
            if partial.adopt(saved, if_equal_rounded=in_checkpoint):
                return
    logger.warning(
        "Training goes on from the token rows that the model holds now: no row file of the checkpoint that was "
        "loaded was found, so they are rounded to the table's dtype (or, with an adapter, not restored). Give "
        "TrainingArguments(resume_from_checkpoint=...) the checkpoint's folder."
    )


def rounded_rows(partial: PartialEmbedding) -> list[nn.Parameter]:
    """The rows that a standard checkpoint holds in another dtype than their own."""
    return [rows for rows, table in partial.rows_and_tables() if rows.dtype != table.dtype]


def checkpoint_folder(args: TrainingArguments, state: TrainerState) -> Path:
    return Path(str(args.output_dir)) / f"checkpoint-{state.global_step}"


def rows_file(checkpoint: str | os.PathLike[str], number: int) -> Path:
    return Path(checkpoint) / ROWS_FILE if number == 0 else Path(checkpoint) / f"token_rows_{number + 1}" / ROWS_FILE
