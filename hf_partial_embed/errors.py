"""The package's exceptions. Every message says what is wrong, the values seen and the remedy."""

from __future__ import annotations

from collections.abc import Sequence


class PartialEmbeddingError(ValueError):
    """Base of every error that this package raises on purpose.

    When it is raised, model, tokenizer and files are as they were before the call.
    """


class FrozenRowsChangedError(PartialEmbeddingError):
    """Rows that are frozen have changed.

    Args:
        changed: see below.
        remark: a further sentence for the message.

    Attributes:
        changed (`dict[str, list[int]]`): ids of the changed rows by the name of their table.
    """

    def __init__(self, changed: dict[str, list[int]], remark: str | None = None) -> None:
        self.changed = changed
        parts = [f"{name}: {count(ids, 'row')} ({shorten(ids)})" for name, ids in changed.items()]
        super().__init__(
            "Frozen rows have changed since the tokens were attached: "
            + "; ".join(parts)
            + ". Something wrote to them in place. Under strategy='mask' an optimizer does that unless "
            "partial.protect(optimizer) is called before the first step; strategy='split' needs no call."
            + (f" {remark}" if remark else "")
        )


def count(items: Sequence[object], noun: str) -> str:
    """`3 rows`, `1 row`."""
    return f"{len(items)} {noun}{'' if len(items) == 1 else 's'}"


def visible(text: str, keep: str = "") -> str:
    """Text from an untrusted file, made safe to print: control and other invisible characters are escaped.

    Args:
        text: the text.
        keep: characters that stay as they are.
    """
    return "".join(
        char if char.isprintable() or char in keep else char.encode("unicode_escape", "surrogatepass").decode()
        for char in text
    )


def _cut(text: str, length: int = 150) -> str:
    return text if len(text) <= length else f"{text[:length]}... ({len(text)} characters)"


def shorten(items: Sequence[object], limit: int = 8) -> str:
    """The first few items of a long list, as they stand in a message; long ones are cut."""
    shown = ", ".join(_cut(repr(item)) for item in items[:limit])
    return shown if len(items) <= limit else f"{shown}, ... {len(items) - limit} more"
