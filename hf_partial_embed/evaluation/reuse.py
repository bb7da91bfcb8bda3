"""Which tokens of a tokenizer new ones may take over: reserved by their names, and untrained by their rows."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from typing import Any

from ..attachment.attachment import attachments_of
from ..errors import PartialEmbeddingError, count, shorten
from ..layout.tables import VocabularyLayout
from ..tokens.reserved import is_reserved_name, roles_of
from ..tokens.vocabulary import check_unicode, known_id
from .audit import judge_rows

__all__ = ["plan_reuse"]

logger = logging.getLogger(__name__)


def plan_reuse(
    model: Any,
    tokenizer: Any,
    layout: VocabularyLayout,
    tokens: Sequence[str],
    reuse: str | Sequence[str],
    force: bool,
) -> dict[str, str]:
    """For each token that takes over another one the text of that.

    Raises:
        `PartialEmbeddingError`: names that are no tokens, not reserved, in use, or too few. Nothing has changed.
    """
    if isinstance(reuse, str):
        if reuse != "auto":
            raise PartialEmbeddingError(f"reuse={reuse!r} is unknown. Pass 'auto', or a list of names: [{reuse!r}].")
        return _choose(model, tokenizer, layout, tokens)
    names = list(reuse)
    if not all(isinstance(name, str) for name in names):
        raise PartialEmbeddingError(f"reuse must be a list of tokens, but has {shorten(names)}.")
    if len(names) < len(tokens):
        raise PartialEmbeddingError(
            f"{count(tokens, 'token')} cannot take over {count(names, 'name')}: {shorten(tokens[len(names) :])} would "
            "be left. Name more, or pass reuse='auto', which adds what is left."
        )
    _check_names(model, tokenizer, layout, names, force)
    planned = dict(zip(tokens, names, strict=False))
    for token, name in planned.items():
        logger.info("%r takes over %r (id %s).", token, name, known_id(tokenizer, name))
    return planned


def _check_names(model: Any, tokenizer: Any, layout: VocabularyLayout, names: list[str], force: bool) -> None:
    for name in names:
        check_unicode(name)
    twice = sorted({name for name in names if names.count(name) > 1})
    if twice:
        raise PartialEmbeddingError(f"{shorten(twice)} would be taken over twice. Give each name once.")
    ids = {name: known_id(tokenizer, name) for name in names}
    missing = [name for name, token_id in ids.items() if token_id is None]
    if missing:
        raise PartialEmbeddingError(
            f"{shorten(missing)} cannot be taken over: {type(tokenizer).__name__} has no such token. Pass names that "
            "it has, or reuse='auto'."
        )
    if force:
        return
    used = {name: roles for name in names if (roles := roles_of(tokenizer, name))}
    if used:
        raise PartialEmbeddingError(
            "Tokens in use would be taken over: "
            + "; ".join(f"{name!r} ({', '.join(roles)})" for name, roles in used.items())
            + ". Pass others, or force=True, which gives the new name to all that uses the old one."
        )
    unclear = {name: token_id for name, token_id in ids.items() if not is_reserved_name(name)}
    judged = (
        judge_rows(model, tokenizer, [i for i in unclear.values() if i is not None], layout=layout) if unclear else {}
    )
    trained = [name for name, token_id in unclear.items() if token_id not in judged]
    if trained:
        raise PartialEmbeddingError(
            f"{shorten(trained)} would be taken over, but by name they are not reserved, and by their rows they look "
            "trained: the model would lose them. Pass others, or force=True."
        )


def _choose(model: Any, tokenizer: Any, layout: VocabularyLayout, tokens: Sequence[str]) -> dict[str, str]:
    reach = min(table.size for table in layout.tables if table.has_rows)
    attached = {token_id for attachment in attachments_of(model) for token_id in attachment.ids}
    renamable = tokenizer.get_vocab() if tokenizer.is_fast else tokenizer.get_added_vocab()
    candidates = {
        token_id: text
        for text, token_id in sorted(renamable.items(), key=lambda item: item[1])
        if token_id < reach and token_id not in attached and is_reserved_name(text) and text not in tokens
    }
    judged = judge_rows(model, tokenizer, candidates, layout=layout) if candidates else {}
    planned: dict[str, str] = {}
    for token_id, text in candidates.items():
        if len(planned) == len(tokens):
            break
        if token_id in judged and not roles_of(tokenizer, text):
            token = tokens[len(planned)]
            planned[token] = text
            kinds = ", ".join(f"{table} {finding.kind}" for table, finding in judged[token_id].items())
            logger.info("%r takes over %r (id %d, untrained: %s).", token, text, token_id, kinds)
    left = list(tokens[len(planned) :])
    spare = max(reach - len(tokenizer), 0)
    if left[:spare]:
        logger.info("%s get spare rows of the tables.", shorten(left[:spare]))
    if left[spare:]:
        logger.warning(
            "%s get new rows, and the tables grow: of %d reserved tokens, %d have untrained rows.",
            shorten(left[spare:]),
            len(candidates),
            len(judged),
        )
    return planned
