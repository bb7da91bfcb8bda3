"""The sums of an evaluation: what is found on each text, added up to the report."""

from __future__ import annotations

import math
from collections.abc import Mapping
from statistics import fmean, median

from .alignment import AlignedText
from .report import BeforeAfter, EvaluationReport, TokenResult

__all__ = ["Tally"]

_SIDES = ("before", "after")


class Tally:
    """Adds texts up.

    Args:
        names: the new tokens' texts by their ids, in the order in which the report has them if they do not occur.
        swapped: ids of tokens whose rows are swapped, by the ids of the others.
    """

    def __init__(self, names: Mapping[int, str], swapped: Mapping[int, int]) -> None:
        self.names, self.swapped = dict(names), dict(swapped)
        self.report = EvaluationReport(tokens=BeforeAfter(0, 0))
        self._nats = {(side, part): 0.0 for side in _SIDES for part in ("lead", "new", "following")}
        self._bytes = {(side, part): 0 for side in _SIDES for part in ("lead", "new", "following")}
        self._kl = _Mean()
        self._leak = {"elsewhere": _Mean(), "within": _Mean()}
        self._change = {"elsewhere": _Mean(), "lead": _Mean()}
        self._found: dict[int, dict[str, list[float]]] = {}
        self._cuts: dict[int, int] = {}

    def count(self, text: AlignedText) -> None:
        """Count tokens only."""
        report = self.report
        report.texts += 1
        report.texts_with_new += bool(text.new)
        report.bytes += len(text.text.encode("utf-8", "replace"))
        report.occurrences += len(text.new)
        tokens = report.tokens
        tokens.before = (tokens.before or 0) + len(text.readings["before"].ids)
        tokens.after = (tokens.after or 0) + len(text.readings["after"].ids)
        for index in text.new:
            token_id = text.readings["after"].ids[index]
            self._found.setdefault(token_id, {}).setdefault("count", []).append(1.0)
            self._cuts[token_id] = self._cuts.get(token_id, 0) + text.cuts_word(index)

    def add(self, text: AlignedText) -> None:
        """Add a text that has been scored in both readings."""
        self.count(text)
        for part, start, end in text.regions():
            for side in _SIDES:
                self._nats[side, part] += text.nats_between(side, start, end)
                self._bytes[side, part] += text.bytes_between(side, start, end)
        self._kl.add(*text.kl.values())
        new = set(text.new)
        first = text.scored_from["after"]
        leak = [value for index, value in enumerate(text.leak) if index >= first and index not in new]
        self._leak["within" if new else "elsewhere"].add(*leak)
        end = text.readings["after"].starts[text.new[0]] if new else len(text.text)
        tokens = (text.new[0] if new else len(text.leak)) - first
        if tokens > 0:
            change = text.nats_between("after", 0, end) - text.nats_between("before", 0, end)
            self._change["lead" if new else "elsewhere"].add_sum(change, tokens)
        self._add_occurrences(text)

    def _add_occurrences(self, text: AlignedText) -> None:
        after = text.readings["after"]
        for index, end, places in text.influence():
            if index < text.scored_from["after"]:
                continue
            found = self._found[after.ids[index]]
            start, stop = after.starts[index], after.ends[index]
            loss = text.nats["after"][index]
            change = text.nats_between("after", start, end) - text.nats_between("before", start, end)
            values = {
                "loss": [loss],
                "loss_before": [text.nats_between("before", start, stop)],
                "change": [change],
                "rank": [float(text.ranks[index])],
                "greedy": [float(text.ranks[index] == 1)],
                "kl": [text.kl[place] for place in places if place in text.kl],
            }
            if index in text.first_nats:
                pieces = text.first_nats[index] + sum(text.nats["before"][piece] for piece in text.rests[index])
                values["adoption"] = [1 / (1 + math.exp(min(700.0, loss - pieces)))]
            for name, some in values.items():
                found.setdefault(name, []).extend(some)

    def finish(self, *, scored: bool) -> EvaluationReport:
        """The report; without `scored` it has the counts only."""
        report = self.report
        before, after = report.tokens.before or 0, report.tokens.after or 0
        report.saving = 1 - after / before if before else None
        report.per_token = sorted(
            (self._result(token_id) for token_id in self.names),
            key=lambda result: (
                not result.count,
                result.swapped_with is None,
                -(result.change or 0.0),
                -result.count,
            ),
        )
        report.unseen = [result.token for result in report.per_token if not result.count]
        if not scored:
            return report
        everything = ("lead", "new", "following")
        report.bits_per_byte = self._bits(*everything)
        report.bits_per_byte_new = self._bits("new")
        report.bits_per_byte_following = self._bits("following")
        report.kl = self._kl.value
        report.leak_within = self._leak["within"].value
        elsewhere = self._leak["elsewhere"].value
        report.leak = report.leak_within if elsewhere is None else elsewhere
        change = self._change["elsewhere"].value
        change = self._change["lead"].value if change is None else change
        report.perplexity_change = None if change is None else math.expm1(change)
        report.adoption, report.greedy = self._over_all("adoption"), self._over_all("greedy")
        return report

    def _bits(self, *parts: str) -> BeforeAfter:
        values = []
        for side in _SIDES:
            size = sum(self._bytes[side, part] for part in parts)
            nats = sum(self._nats[side, part] for part in parts)
            values.append(nats / math.log(2) / size if size else None)
        return BeforeAfter(*values)

    def _result(self, token_id: int) -> TokenResult:
        found = self._found.get(token_id, {})
        means = {
            name: (median if name == "rank" else fmean)(values)
            for name, values in found.items()
            if values and name != "count"
        }
        other = self.swapped.get(token_id)
        return TokenResult(
            self.names[token_id],
            token_id,
            count=len(found.get("count", ())),
            cuts=self._cuts.get(token_id, 0),
            swapped_with=None if other is None else self.names[other],
            **means,
        )

    def _over_all(self, name: str) -> float | None:
        values = [value for found in self._found.values() for value in found.get(name, ())]
        return fmean(values) if values else None


class _Mean:
    def __init__(self) -> None:
        self.total, self.count = 0.0, 0

    def add(self, *values: float) -> None:
        self.add_sum(math.fsum(values), len(values))

    def add_sum(self, total: float, count: int) -> None:
        self.total += total
        self.count += count

    @property
    def value(self) -> float | None:
        return self.total / self.count if self.count else None
