"""What an evaluation found: as a table, a dict, or JSON."""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

from ..errors import count

__all__ = ["BeforeAfter", "EvaluationReport", "TokenResult"]

_SHOWN = 12


@dataclass
class BeforeAfter:
    """One measure in the original tokenisation, and with the new tokens; `None` where it could not be taken."""

    before: float | None = None
    after: float | None = None


@dataclass
class TokenResult:
    """One new token on the texts.

    Attributes:
        token: its text.
        id: its id.
        count: how often it occurs.
        loss: its mean surprise where it stands, in nats.
        loss_before: that of the same characters in the original tokenisation.
        change: mean of what one occurrence costs, in nats: surprise after less before, of its own text and what
            follows up to the next new token. By this the tokens are sorted, the worst first; those that are
            `swapped_with` another come before.
        rank: median rank among all outputs where it stands; 1 is the most likely.
        kl: mean divergence at the places behind it, up to the next new token.
        adoption: mean of `p(token) / (p(token) + p(its old pieces))`; see `evaluate`.
        greedy: share of the occurrences at which it is the most likely output.
        swapped_with: the new token whose pieces its row is like, and that in turn has a row like this one's pieces.
        cuts: occurrences that begin or end inside of a word where the original tokenisation has no border.
    """

    token: str
    id: int
    count: int = 0
    loss: float | None = None
    loss_before: float | None = None
    change: float | None = None
    rank: float | None = None
    kl: float | None = None
    adoption: float | None = None
    greedy: float | None = None
    swapped_with: str | None = None
    cuts: int = 0


@dataclass
class EvaluationReport:
    """What `evaluate` returns. `print(report)` is a table; `to_dict()` and `to_json()` have all of it.

    Attributes:
        texts, texts_with_new, bytes: number of texts that are not empty, of those in which a new token is found,
            and of their UTF-8 bytes.
        tokens: number of tokens of all texts, special tokens around them aside.
        saving: share of the tokens that the new ones save.
        bits_per_byte: of the whole texts. A rolling log-likelihood, in nats / ln 2 / UTF-8 bytes.
        bits_per_byte_new: of the new tokens' own text.
        bits_per_byte_following: of what comes after the first new token of a text, the new tokens' own text aside.
        kl: mean of `KL(before || after)` of the next-token distribution over the old vocabulary, in nats, at the
            places behind the first new token of a text: the characters at which both tokenisations have a border.
        adoption: over all occurrences of new tokens; see `TokenResult`.
        greedy: share of the occurrences at which the new token is the most likely output.
        leak: mean probability of all new tokens at the places of texts without them; where there is no such text,
            at the places of the others where no new token follows.
        leak_within: that of texts with new tokens, where no new token follows.
        perplexity_change: per token of texts without new tokens, after / before - 1; where there is no such text,
            of what comes before the first new token. 0.001 is a tenth of a percent.
        occurrences: of new tokens.
        per_token: what is known of each token that occurs, the worst first, then those that do not occur.
        unseen: texts of the tokens that do not occur.
        seconds_per_text: time to generate as many tokens as a text has, if it was asked for.
        max_length, stride: of the windows.
        forwards: windows that were run through a model.
        notes: what could not be measured, and what a reader has to know.
    """

    texts: int = 0
    texts_with_new: int = 0
    bytes: int = 0
    tokens: BeforeAfter = field(default_factory=BeforeAfter)
    saving: float | None = None
    bits_per_byte: BeforeAfter = field(default_factory=BeforeAfter)
    bits_per_byte_new: BeforeAfter = field(default_factory=BeforeAfter)
    bits_per_byte_following: BeforeAfter = field(default_factory=BeforeAfter)
    kl: float | None = None
    adoption: float | None = None
    greedy: float | None = None
    leak: float | None = None
    leak_within: float | None = None
    perplexity_change: float | None = None
    occurrences: int = 0
    per_token: list[TokenResult] = field(default_factory=list)
    unseen: list[str] = field(default_factory=list)
    seconds_per_text: BeforeAfter = field(default_factory=BeforeAfter)
    max_length: int | None = None
    stride: int | None = None
    forwards: int = 0
    notes: list[str] = field(default_factory=list)

    @property
    def tokens_per_text(self) -> BeforeAfter:
        return _over(self.tokens, self.texts)

    @property
    def tokens_per_byte(self) -> BeforeAfter:
        return _over(self.tokens, self.bytes)

    def to_dict(self) -> dict[str, Any]:
        """Plain numbers, strings, lists and dicts; what was not measured is `None`."""
        values = asdict(self)
        values["tokens_per_text"] = asdict(self.tokens_per_text)
        values["tokens_per_byte"] = asdict(self.tokens_per_byte)
        return values

    def to_json(self, indent: int | None = 2) -> str:
        """`to_dict()` as JSON."""
        return json.dumps(self.to_dict(), indent=indent)

    def lines(self) -> list[tuple[str, str, str, str]]:
        """The table's lines: measure, before, after, change."""
        return [
            _line("tokens", self.tokens, "{:,.0f}"),
            _line("tokens per text", self.tokens_per_text, "{:.2f}"),
            _line("tokens per byte", self.tokens_per_byte, "{:.4f}"),
            _line("bits per byte", self.bits_per_byte, "{:.4f}"),
            _line("  of the new tokens", self.bits_per_byte_new, "{:.4f}"),
            _line("  of what follows them", self.bits_per_byte_following, "{:.4f}"),
            ("KL to the original", "", _number(self.kl, "{:.4f}"), ""),
            ("adoption", "", _number(self.adoption, "{:.1%}"), ""),
            ("  taken by greedy decoding", "", _number(self.greedy, "{:.1%}"), ""),
            ("leak", "", _number(self.leak, "{:.3%}"), ""),
            ("perplexity elsewhere", "", "", _number(self.perplexity_change, "{:+.3%}")),
            *(
                [_line("seconds per text", self.seconds_per_text, "{:.3f}")]
                if self.seconds_per_text.after is not None
                else []
            ),
        ]

    def __str__(self) -> str:
        seen = [result for result in self.per_token if result.count]
        known, in_texts = count(self.per_token, "new token"), count(range(self.texts_with_new), "text")
        head = (
            f"{count(range(self.texts), 'text')}, {self.bytes:,} bytes; "
            f"{count(range(self.occurrences), 'occurrence')} of {len(seen)} of {known}, in {in_texts}"
        )
        parts = [head, "", *_columns([("", "before", "after", "change"), *self.lines()], left=1)]
        if seen:
            parts += ["", *_columns(_token_lines(seen[:_SHOWN]), left=1)]
            if len(seen) > _SHOWN:
                parts.append(f"... {len(seen) - _SHOWN} more in to_dict()")
            if self.bits_per_byte.after is not None:
                parts.append("loss and before: nats of an occurrence; change: of it and what follows, to the next one")
        if self.unseen:
            more = f", ... {len(self.unseen) - 8} more" if len(self.unseen) > 8 else ""
            parts += ["", f"never seen: {', '.join(map(repr, self.unseen[:8]))}{more}"]
        return "\n".join([*parts, *(["", *(f"note: {note}" for note in self.notes)] if self.notes else [])])


def _token_lines(results: Sequence[TokenResult]) -> list[tuple[str, ...]]:
    header = ("worst tokens", "count", "change", "loss", "before", "rank", "KL", "adoption", "cuts")
    forms = ("{:+.2f}", "{:.2f}", "{:.2f}", "{:,.0f}", "{:.3f}", "{:.0%}")
    lines: list[tuple[str, ...]] = [header]
    for result in results:
        values = (result.change, result.loss, result.loss_before, result.rank, result.kl, result.adoption)
        numbers = (_number(value, form) for value, form in zip(values, forms, strict=True))
        lines.append((repr(result.token), str(result.count), *numbers, str(result.cuts or "")))
    return lines


def _line(name: str, value: BeforeAfter, form: str) -> tuple[str, str, str, str]:
    change = ""
    if value.before and value.after is not None:
        change = f"{value.after / value.before - 1:+.1%}"
    return name, _number(value.before, form), _number(value.after, form), change


def _number(value: float | None, form: str) -> str:
    return "-" if value is None or not math.isfinite(value) else form.format(value)


def _over(value: BeforeAfter, size: int) -> BeforeAfter:
    return BeforeAfter(*(None if x is None or not size else x / size for x in (value.before, value.after)))


def _columns(rows: Sequence[Sequence[str]], left: int) -> list[str]:
    widths = [max(len(row[column]) for row in rows) for column in range(len(rows[0]))]
    return [
        "  ".join(
            cell.ljust(width) if column < left else cell.rjust(width)
            for column, (cell, width) in enumerate(zip(row, widths, strict=True))
        ).rstrip()
        for row in rows
    ]
