"""The three functions that attach token rows to a model."""

from __future__ import annotations

import os
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from typing import Any

import torch
from tokenizers import AddedToken
from torch import Tensor

from .attachment.options import check_options
from .attachment.partial import PartialEmbedding, TokenRows, attach_rows
from .attachment.traps import warn_of_traps
from .errors import PartialEmbeddingError, shorten
from .evaluation.reuse import plan_reuse
from .initializers.initial_values import initial_values, new_rows
from .initializers.registry import Initializer
from .layout.tables import VocabularyLayout, find_layout
from .modules.splitting import check_ids
from .tokens.added import (
    KnownTokensError,
    check_new,
    existing_tokens,
    normalize_tokens,
    tokens_as_known,
    without_tokens_from,
)
from .tokens.cutting import warn_of_cuts, warn_of_missing_spaces
from .tokens.entering import plan_tokens
from .tokens.reserved import pieces_without, tokenizer_without
from .tokens.vocabulary import find_ids, known_ids, plain_tokenizer

__all__ = ["add_tokens", "load_tokens", "train_tokens"]

Tokens = Sequence["str | AddedToken"] | Mapping[Any, "str | Tensor"]


def add_tokens(
    model: Any,
    tokenizer: Any,
    tokens: Tokens,
    *,
    init: str | Initializer = "subtoken_mean",
    strategy: str = "split",
    output: str | bool = "auto",
    special: bool = False,
    entry: str = "auto",
    reuse: str | Sequence[str] | None = None,
    force: bool = False,
    dtype: torch.dtype | None = None,
    seed: int = 0,
) -> PartialEmbedding:
    """Add tokens to a tokenizer and a model, and make their rows the only ones that train.

    All other rows of the input embeddings and of the output head are frozen. Everything else in the
    model keeps the `requires_grad` that it has. Right afterwards the logits over the old vocabulary are
    what they were before.

    Args:
        model: a `transformers` model, on any device, in any floating-point dtype.
        tokenizer: its tokenizer (or a processor that has one). A token that it has already, but for which the model's
            table has no row (the tokenizer was extended first), gets a new row, too.
        tokens: a list of `str` or `AddedToken`; or a dict from token to what its row starts from: a
            string is a description, whose pieces are averaged, a tensor `[d]` is the input row itself.
        init: name of an initialiser (`"subtoken_mean"`, `"mean"`, `"multivariate_normal"`, `"positional"`,
            `"description"`, `"copy"`, `"distill"`, `"cached_head"`), one with parameters of its own
            (`Distill(texts=...)`, `Vectors(...)`, `Donor(...)`; see `hf_partial_embed.initializers`), or any
            function from an `InitRequest` to rows.
        strategy: `"split"`: the rows are a parameter of their own, `[K, d]`, beside a frozen table.
            `"mask"`: the model's modules stay as they are and the gradient of frozen rows is zeroed;
            then the optimizer needs `partial.protect(optimizer)`, which the callback does in a Trainer.
        output: `"auto"` trains the head's new rows too where there is a head over the vocabulary;
            `False` leaves them at their initial values.
        special: whether the tokens are special ones, which `decode(skip_special_tokens=True)` drops.
        entry: how they enter the tokenizer. `"added"`: as added tokens, which are split off before the
            pre-tokenizer; right for markers. `"vocabulary"`: as pieces of the vocabulary, with merges after all old
            ones, so that no text becomes longer and a text without new tokens is read as before; parts that a
            token needs become tokens with rows, too. `"auto"`: special tokens, `AddedToken` objects and texts that
            the pre-tokenizer would split are added; other strings enter the vocabulary where its kind allows it.
        reuse: names of reserved or unused tokens, whose ids and rows the tokens take over, in this order. The old
            name is replaced wherever it is (vocabulary, special tokens, post-processor, what is saved), and is
            ordinary text until `detach()`. The tokenizer and the tables keep their length, so it works on a model
            that is sharded already. `"auto"` takes tokens with a reserved name and an untrained row
            (`audit_tokens`), then spare rows of the tables, then lets the tables grow, and logs which.
        force: whether `reuse` may name tokens that are trained, or that the chat template, the end of a text or the
            like use; these then use the new token.
        dtype: of the trainable rows; `None` is float32 under `"split"` and the model's under `"mask"`.
        seed: of initialisers that draw random numbers.

    Returns:
        The `PartialEmbedding` that is now on the model.

    Raises:
        `PartialEmbeddingError`: tokens that are known, repeated or empty, or that the tokenizer would never produce;
            tokens that cannot enter the vocabulary, if that was asked for; a model whose vocabulary cannot grow;
            arguments that do not fit. Model and tokenizer are unchanged.
    """
    from .initializers.by_name import resolve

    tokenizer = plain_tokenizer(tokenizer, needed=True)
    starts: Mapping[Any, Any] = tokens if isinstance(tokens, Mapping) else {}
    listed = list(tokens) if isinstance(tokens, Iterable) and not isinstance(tokens, str) else tokens
    asked = normalize_tokens(listed, special)
    resolve(init)
    if reuse is not None and entry == "vocabulary":
        raise PartialEmbeddingError(
            "A token that takes over another one's id is cut out of the text as that one was: reuse and "
            "entry='vocabulary' cannot be had together. Leave one of them out."
        )
    # A token that the tokenizer has but the table lacks (it was extended first) stays in the tokenizer as it is.
    there = _are_there(tokenizer, [token.content for token in asked])
    plain = [isinstance(token, str) and not known for token, known in zip(listed, there, strict=True)]
    try:
        entering = plan_tokens(tokenizer, asked, plain, entry if reuse is None else "added")
    except KnownTokensError as error:
        _check_rows(find_layout(model), tokenizer, error.ids)
        raise
    reused: dict[str, str] = {}
    taken: list[int] = []
    layout: VocabularyLayout | None = None
    read: dict[str, list[int]] | None = None
    if reuse is not None:
        read = check_new(tokenizer, asked)
        layout = find_layout(model)
        reused = plan_reuse(model, tokenizer, layout, list(read), reuse, force)
        taken = find_ids(tokenizer, list(reused.values()))
    growing = len(entering.tokens) - len(reused) - sum(there)
    if layout is None or growing:
        layout = find_layout(model, len(tokenizer) + growing if growing or any(there) else None)
    before = without_tokens_from(tokenizer, _table_size(layout))
    added = [token for token, piece in zip(asked, entering.pieces, strict=False) if piece is None]
    if read is None or before is not tokenizer:
        read = check_new(before, added) if added else {}
    entering = replace(entering, tokens=tokens_as_known(tokenizer, entering.tokens))
    check_options(layout, strategy, output, dtype)
    pieces = entering.read_as(read)
    rows = new_rows(model, before, layout, entering, pieces, list(starts.values()) or None, init, seed, ids=taken)
    partial = attach_rows(
        model, tokenizer, layout, tokens=entering.tokens, entries=entering.pieces, rows=rows, strategy=strategy,
        output=output, dtype=dtype, pieces=pieces, reuse=reused, planned=True,
    )  # fmt: skip
    warn_of_cuts(tokenizer, added)
    warn_of_missing_spaces(tokenizer, entering.pieces)
    warn_of_traps(partial)
    return partial


def _are_there(tokenizer: Any, texts: Sequence[str]) -> list[bool]:
    """Whether a tokenizer has tokens of these names.

    What a byte-level model calls a piece ("ü") may be another text's name for a byte, and "ü" no token: that is seen
    where tokens are planned, by how the model spells them.
    """
    found = [token_id is not None for token_id in known_ids(tokenizer, texts)]
    if not any(found) or not getattr(tokenizer, "is_fast", False):
        return found
    added = tokenizer.get_added_vocab()
    return [
        known and (text in added or not text or not all("\u00a1" <= letter <= "\u0143" for letter in text))
        for text, known in zip(texts, found, strict=True)
    ]


def train_tokens(
    model: Any,
    tokenizer: Any,
    tokens: Sequence[str | AddedToken] | Sequence[int],
    *,
    init: str | Initializer | None = None,
    strategy: str = "split",
    output: str | bool = "auto",
    dtype: torch.dtype | None = None,
    seed: int = 0,
) -> PartialEmbedding:
    """Make rows that exist the only ones that train; otherwise like `add_tokens`.

    Args:
        model: a `transformers` model.
        tokenizer: its tokenizer; may be `None` where `tokens` are ids and there is no `init`.
        tokens: tokens of the vocabulary, or ids, in any order.
        init: `None` keeps the rows as they are. An initialiser makes them start anew, as rows of new tokens do, from
            the ids that their texts have in a tokenizer without these tokens: for an added token, what the rest of the
            tokenizer reads; for a piece of the vocabulary, the pieces that it is merged from. The old rows are not
            used. With `output=False` the head's rows stay as they are. `detach()` restores the old rows.
        strategy, output, dtype: as in `add_tokens`.
        seed: of initialisers that draw random numbers.

    Returns:
        The `PartialEmbedding` that is now on the model.

    Raises:
        `PartialEmbeddingError`: tokens that are not in the vocabulary, ids outside of the table, either
            given twice; rows that are to start anew, but have no token; arguments that do not fit. Nothing has
            changed.
    """
    if init is not None:
        from .initializers.by_name import resolve

        resolve(init)
    values: Any = tokens.tolist() if isinstance(tokens, Tensor) else tokens
    if isinstance(values, (str, AddedToken)) or not isinstance(values, Iterable):
        raise PartialEmbeddingError(f"tokens must be a list of tokens or of ids, but got {values!r}.")
    values = list(values)
    layout = find_layout(model)
    check_options(layout, strategy, output, dtype)
    by_text = bool(values) and all(isinstance(token, (str, AddedToken)) for token in values)
    tokenizer = plain_tokenizer(tokenizer, needed=by_text)
    texts: list[AddedToken] = []
    if by_text:
        ids = find_ids(tokenizer, [str(token) for token in values])
        _check_rows(layout, tokenizer, dict(zip(map(str, values), ids, strict=True)))
        texts = existing_tokens(tokenizer, ids)
    else:
        if any(isinstance(token, (str, AddedToken)) for token in values):
            raise PartialEmbeddingError(f"Give tokens or ids, not both: {shorten(values)}.")
        remedy = (
            "For tokens that the model has no rows for yet, use add_tokens, which grows the table; where they are "
            "pieces of the tokenizer's vocabulary, call model.resize_token_embeddings(len(tokenizer)) first."
        )
        ids = check_ids(values, _table_size(layout), remedy)
        if tokenizer is not None:
            texts = existing_tokens(tokenizer, ids)
    rows = {table.name: table.rows(ids) for table in layout.tables if table.has_rows}
    if init is not None:
        rows.update(_rows_anew(model, tokenizer, layout, texts, ids, init, output, seed))
    return attach_rows(
        model, tokenizer, layout, tokens=texts, ids=ids, rows=rows, strategy=strategy, output=output, dtype=dtype
    )


def _table_size(layout: VocabularyLayout) -> int:
    return min(table.size for table in layout.tables)


def _check_rows(layout: VocabularyLayout, tokenizer: Any, ids: Mapping[str, int]) -> None:
    """Check that the model has rows for tokens of a tokenizer, by their texts.

    Raises:
        `PartialEmbeddingError`: the tokenizer was extended, and the model was not.
    """
    size = _table_size(layout)
    beyond = [text for text, token_id in ids.items() if token_id >= size]
    if not beyond:
        return
    added = set(tokenizer.added_tokens_decoder)
    if all(ids[text] in added for text in beyond):
        remedy = "Use add_tokens with these tokens, which grows the table."
    else:
        remedy = (
            "They are pieces of its vocabulary, so let the table grow first: "
            "model.resize_token_embeddings(len(tokenizer)); then "
            'train_tokens(model, tokenizer, tokens, init="subtoken_mean") gives them rows that start anew.'
        )
    raise PartialEmbeddingError(
        f"The tokenizer has the tokens {shorten(beyond)}, but the model's table of {size} rows has none for them: "
        f"the tokenizer was extended, and the model was not. {remedy}"
    )


def _rows_anew(
    model: Any,
    tokenizer: Any,
    layout: VocabularyLayout,
    tokens: list[AddedToken],
    ids: list[int],
    init: str | Initializer,
    output: str | bool,
    seed: int,
) -> dict[str, Tensor]:
    """Initial rows for tokens that exist, computed as for new ones."""
    if not tokens:
        reason = "there is no tokenizer" if tokenizer is None else "not all of them have a token"
        raise PartialEmbeddingError(
            f"Rows {shorten(ids)} have no text to start anew from with init={init!r}: {reason}. Pass the tokenizer "
            "and ids that have a token, or leave init out, which keeps the rows as they are."
        )
    roles = ("input", "extra") if output is False else ("input", "extra", "output", "bias")
    trained = VocabularyLayout([table for table in layout.tables if table.role in roles])
    without = tokenizer_without(tokenizer, ids)
    pieces = pieces_without(tokenizer, without, ids)
    return initial_values(model, without, trained, tokens, None, init, seed, ids=ids, pieces=pieces)


def load_tokens(
    model: Any,
    tokenizer: Any,
    source: str | os.PathLike[str],
    *,
    revision: str | None = None,
    token: str | bool | None = None,
    trainable: bool = True,
) -> PartialEmbedding:
    """Attach saved rows to a model: `TokenRows.from_pretrained(source).attach(model, tokenizer)`.

    Args:
        model: a model with embeddings of the width that the rows have.
        tokenizer: its tokenizer; tokens that it does not know are added, with ids of its own.
        source: a row file, a folder that has one, or a Hub repository id.
        revision: of the repository.
        token: to read a private repository.
        trainable: whether the rows train.

    Returns:
        The `PartialEmbedding` that is now on the model.

    Raises:
        `PartialEmbeddingError`: as `TokenRows.from_pretrained` and `TokenRows.attach` raise it. Nothing has changed.
    """
    rows = TokenRows.from_pretrained(source, revision=revision, token=token)
    return rows.attach(model, tokenizer, trainable=trainable)
