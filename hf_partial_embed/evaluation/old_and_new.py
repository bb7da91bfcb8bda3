"""Which tokens two vocabularies share, and which are new in the second."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from ..attachment.attachment import attachments_of
from ..attachment.partial import PartialEmbedding
from ..errors import PartialEmbeddingError, count, shorten

__all__ = ["Vocabularies", "live_vocabularies", "saved_vocabularies"]


@dataclass
class Vocabularies:
    """The outputs of two models, and the new tokens.

    Attributes:
        new: texts of the new tokens by their ids.
        size_before, size_after: number of outputs.
        without: outputs that the model before does not have, of those below `size_before`.
        notes: for the report.
    """

    new: dict[int, str]
    size_before: int
    size_after: int
    without: list[int] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)


def live_vocabularies(partial: PartialEmbedding) -> Vocabularies:
    """Those of a model with rows on it, where the outputs of tokens that it did not have are left out before.

    Raises:
        `PartialEmbeddingError`: no row belongs to a token that was added.
    """
    attachment = partial._attachment
    layout = attachment.layout
    assert layout is not None
    table = layout.table("output") or layout.tables[0]
    pieces = attachment.pieces or [[token_id] for token_id in attachment.ids]
    names = dict(zip(partial.token_ids, partial.tokens, strict=True)) if partial.tokens else {}
    new = {
        token_id: names[token_id]
        for token_id, own in zip(attachment.ids, pieces, strict=True)
        if own != [token_id] and token_id in names
    }
    if not new:
        raise PartialEmbeddingError(
            f"The rows {shorten(partial.tokens or partial.token_ids, 4)} belong to tokens that were there before, "
            "whose old values are not on this model. Compare with the model that they were trained on: "
            "evaluate((base_model, base_tokenizer), partial, texts)."
        )
    size = table.shape[table.dim]
    others = {token_id for other in attachments_of(partial.model) for token_id in other.ids} - set(attachment.ids)
    between = set(range(table.size, table.grown_size - table.tail)) - others
    without = sorted(between | set(new))
    notes = []
    kept = len(attachment.ids) - len(new)
    if kept:
        notes.append(
            f"{kept} of the rows belong to tokens that were there before; they are the same before and after."
        )
    spare = [token_id for token_id in new if token_id < table.size]
    if spare:
        notes.append(
            f"{count(spare, 'new token')} took spare rows of the table, whose outputs are left out before, too: the "
            "base model by itself gives them some probability."
        )
    return Vocabularies(new, size, size, without, notes)


def saved_vocabularies(before_model: Any, before: Any, after_model: Any, after: Any) -> Vocabularies:
    """Those of two models, each with its tokenizer.

    A token of the first must have the same id in the second, or be a reserved one that another has taken over.

    Raises:
        `PartialEmbeddingError`: the second vocabulary is not the first one with tokens added.
    """
    old, now = before.get_vocab(), after.get_vocab()
    texts = {token_id: text for text, token_id in now.items()}
    moved = [text for text, token_id in old.items() if text in now and now[text] != token_id]
    lost = {token_id: text for text, token_id in old.items() if text not in now}
    reserved = set(before.added_tokens_decoder) & set(after.added_tokens_decoder)
    gone = [
        text for token_id, text in lost.items() if token_id not in texts or not _is_reserved(token_id, text, reserved)
    ]
    if moved or gone:
        wrong = [f"{len(moved)} have another id ({shorten(moved, 3)})"] if moved else []
        wrong += [f"{len(gone)} are not there ({shorten(gone, 3)})"] if gone else []
        raise PartialEmbeddingError(
            f"base and adapted do not belong together: of the {len(old)} tokens of base's tokenizer "
            f"{' and '.join(wrong)} in adapted's. Pass the model that the tokens were added to."
        )
    sizes = [_outputs(model) for model in (before_model, after_model)]
    highest = max(old.values())
    if highest >= sizes[0]:
        raise PartialEmbeddingError(
            f"base's tokenizer has ids up to {highest}, but its model has {sizes[0]} outputs: they do not belong "
            "together."
        )
    known = set(old.values())
    ids = sorted(token_id for token_id in texts if token_id not in known or token_id in lost)
    added = after.added_tokens_decoder
    # A piece's spelling is not its text (a byte-level tokenizer writes a space as another character).
    new = {i: texts[i] if i in added else after.decode([i], clean_up_tokenization_spaces=False) for i in ids}
    notes = [] if new else ["adapted has no token that base does not have."]
    return Vocabularies(new, sizes[0], sizes[1], [], notes)


def _is_reserved(token_id: int, text: str, added: set[int]) -> bool:
    return token_id in added or (text.startswith("[unused") and text.endswith("]"))


def _outputs(model: Any) -> int:
    head = model.get_output_embeddings() if hasattr(model, "get_output_embeddings") else None
    size = getattr(head, "out_features", None)
    return int(size if size is not None else model.config.get_text_config().vocab_size)
