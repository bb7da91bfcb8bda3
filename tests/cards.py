"""Reading the list of tokens of a model card."""

from __future__ import annotations

import html
import re


def listed(card: str) -> list[str]:
    """What a reader of a card sees as tokens."""
    items = re.findall(r"^- <code>(.*)</code>$", card, re.MULTILINE)
    assert all(re.fullmatch(r"(\w| |[^\x00-\x7f]|&#?\w+;)*", item) for item in items), "Markdown or HTML"
    return [html.unescape(item).replace("\xa0", " ") for item in items]


def as_text(token: str) -> str:
    return "".join(char if char.isprintable() else f"\\u{{{ord(char):x}}}" for char in token)
