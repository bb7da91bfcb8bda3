"""Rows of a table that were never trained, told by the statistics of the table itself.

After Land and Bartolo, "Fishing for Magikarp: Automatically Detecting Under-trained Tokens in Large Language Models",
EMNLP 2024: such rows are where training has left them, near each other and near those of tokens that no text has,
and what says so are the rows alone. They rank tokens and look at the first few; what is here has to answer for each
row, so each way in which a row can be untrained has a test of its own, whose bounds are the trained rows' own spread.
"""

from __future__ import annotations

import math
import re
from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

__all__ = ["KINDS", "Finding", "untrained_rows"]

# From what is certain to what is likely.
KINDS = ("broken", "zero", "equal", "unused", "mean", "random", "short", "long")

_EQUAL = 0.02  # distance over norm; trained rows have no other within 0.1, and bfloat16 rounds to 0.004
_CERTAIN = math.log(1000)  # of a likelihood ratio
_SAMPLE = 16384  # rows from which the second moment is taken
_BLOCK = 1 << 24  # entries of a block of cosines
_SMALL = 8192  # rows of a table that are all asked for their neighbours
_RELATED = 0.3  # least cosine, less the mean, of rows of words that differ in case or space


@dataclass(frozen=True)
class Finding:
    """Why a row counts as untrained.

    Attributes:
        kind: one of `KINDS`.
        detail: the same for a reader, with the figures.
        others: ids of the rows that it equals.
    """

    kind: str
    detail: str
    others: tuple[int, ...] = ()


@torch.no_grad()
def untrained_rows(
    table: Tensor,
    ids: Sequence[int],
    belongs: Tensor,
    unused: Sequence[int] = (),
    texts: Mapping[int, str] | None = None,
) -> dict[int, Finding]:
    """Which of some rows were never trained.

    The tests, in this order; the first that holds is told.
    - broken: not finite. zero: without length.
    - equal: another row is within 2% of its length. Of two equal rows one may be trained, and the other its copy: that
      is the one whose words in other spellings have rows like it.
    - unused: as near to the mean of the rows of unused tokens as these are themselves, by the cosine that is left
      without the table's first principal component, which all rows share (Land and Bartolo's measure for heads).
      Only where unused tokens' rows are alike and trained ones are not like them.
    - mean: at the mean of all rows, as means to start from are. short, long: of a length far outside of the others'.
    - random: its parts along the table's principal axes are as independent draws from one normal distribution are,
      and no other row points its way. The axes of trained rows have very different shares.

    Cost: a product of these rows with the table, as a head has it over as many positions; one of `d²` for each of
    16,384 rows at most; a `d × d` eigendecomposition.

    Args:
        table (`torch.Tensor` of shape `(V, d)`): all rows.
        ids: of the rows to be judged.
        belongs (`torch.Tensor` of shape `(V,)`, bool): rows that belong to a token.
        unused: ids that no text has, known from elsewhere.
        texts: of the tokens, by id.
    """
    table = table.detach()
    size, width = table.shape
    norms = torch.cat([part.float().norm(dim=1) for part in torch.split(table, 8192)])
    sound = torch.isfinite(norms) & belongs.to(norms.device)
    if not sound.any():
        return {i: Finding("broken", "the table has no finite row") for i in ids}
    sound &= norms > 1e-3 * norms[sound].median()
    median = float(norms[sound].median())
    found: dict[int, Finding] = {}
    left = []
    for token_id in ids:
        norm = float(norms[token_id])
        if not math.isfinite(norm):
            found[token_id] = Finding("broken", "it has infinite or NaN values")
        elif norm <= 1e-3 * median:
            found[token_id] = Finding("zero", f"its length is {norm:.2g}, the median is {median:.3g}")
        else:
            left.append(token_id)
    # In a small table a few random rows would be axes of their own: what points its own way does not count.
    asked = sorted({*left, *sound.nonzero().flatten().tolist()}) if size <= _SMALL else left
    groups, nearest = _neighbours(table, norms, asked)
    alone = 1.25 * math.sqrt(2 * math.log(max(size, 2)) / width)  # of V independent directions, and some more
    apart = [token_id for token_id in asked if nearest[token_id] < alone]
    if len(apart) < 0.25 * len(asked):
        sound[apart] = False
    tests = _Tests(table, norms, sound)
    for token_id in left:
        others = groups.get(token_id)
        if others and tests.owner({token_id, *others}, texts or {}) != token_id:
            named = ", ".join(repr((texts or {}).get(i, f"id {i}")) for i in others[:3])
            more = f" and {len(others) - 3} more" if len(others) > 3 else ""
            found[token_id] = Finding("equal", f"it equals the row of {named}{more}", tuple(others))
    for test in (
        lambda rows: tests.unused(rows, unused),
        lambda rows: tests.random(rows, nearest, alone),
        tests.length,
    ):
        rest = [token_id for token_id in left if token_id not in found and token_id not in groups]
        found.update(test(rest) if rest else {})
    return found


def _rows(table: Tensor, ids: Sequence[int]) -> Tensor:
    rows: Tensor = table[torch.tensor(list(ids), dtype=torch.long, device=table.device)].double()
    return rows


def _neighbours(table: Tensor, norms: Tensor, ids: Sequence[int]) -> tuple[dict[int, list[int]], dict[int, float]]:
    """For each id those of equal rows, if there are any, and the largest cosine to another row."""
    equal: dict[int, list[int]] = {}
    nearest: dict[int, float] = {}
    lengths = norms.clamp(min=torch.finfo(torch.float32).tiny)
    directions = (table.float() / lengths[:, None]).nan_to_num(0.0, 0.0, 0.0)
    block = max(1, _BLOCK // len(table))
    for start in range(0, len(ids), block):
        part = torch.tensor(ids[start : start + block], device=table.device)
        cosines = directions[part] @ directions.T
        cosines[torch.arange(len(part)), part] = -1.0
        nearest.update(zip(part.tolist(), cosines.amax(1).tolist(), strict=True))
        ratio = norms[None] / norms[part][:, None]
        near = (1 + ratio.square() - 2 * ratio * cosines) < (2 * _EQUAL) ** 2  # rounding: asked again in float64
        close: dict[int, list[int]] = defaultdict(list)
        for row, other in near.nonzero().tolist():
            close[int(part[row])].append(other)
        for token_id, others in close.items():
            own = _rows(table, [token_id])
            distances = (_rows(table, others) - own).norm(dim=1) / own.norm()
            same = [i for i, distance in zip(others, distances.tolist(), strict=True) if distance < _EQUAL]
            if same:
                equal[token_id] = same
    return equal, nearest


class _Tests:
    """The tests that ask for the statistics of the trained rows."""

    def __init__(self, table: Tensor, norms: Tensor, sound: Tensor) -> None:
        self.table, self.norms = table, norms
        self.size, self.width = table.shape
        chosen = sound.nonzero().flatten()
        sample = table[chosen[:: -(-len(chosen) // _SAMPLE)]].double()
        self.mean = sample.mean(0)
        values, self.axes = torch.linalg.eigh(sample.T @ sample / len(sample))
        # The smallest ones are the sample's noise, where it is not many times as large as the rows are wide.
        self.shares = values.clamp(min=float(values.mean()) * 1e-2)
        self.median = float(norms[sound].median())
        self.bounds = _bounds(norms[sound].double())
        self.centred_bounds = _bounds((sample - self.mean).norm(dim=1))
        self.sample = sample
        self.told, _ = self._likelihood(sample[:2048])

        half = min(len(sample) // 2, 2048)
        pairs = torch.cosine_similarity(sample[:half] - self.mean, sample[half : 2 * half] - self.mean)
        self.related = max(_RELATED, float(pairs.quantile(0.999))) if half else _RELATED

    def rows(self, ids: Sequence[int]) -> Tensor:
        return _rows(self.table, ids)

    def owner(self, group: set[int], texts: Mapping[int, str]) -> int | None:
        """Which token of equal rows these belong to, if its relatives say so: words that differ in case or marks."""
        if not hasattr(self, "_relatives"):
            self._relatives: dict[str, list[int]] = defaultdict(list)
            for token_id, text in sorted(texts.items()):  # a tokenizer lists them in no order of its own
                if token_id < self.size and (word := _word(text)):
                    self._relatives[word].append(token_id)
        like = []
        for token_id in group if len(group) <= 8 else ():
            others = [i for i in self._relatives.get(_word(texts.get(token_id, "")), ()) if i not in group]
            if others:
                own, rows = self.rows([token_id]) - self.mean, self.rows(others[:16]) - self.mean
                if torch.cosine_similarity(own, rows).amax() > self.related:
                    like.append(token_id)
        return like[0] if len(like) == 1 else None

    def unused(self, ids: Sequence[int], unused: Sequence[int]) -> dict[int, Finding]:
        known = [i for i in unused if i < self.size and math.isfinite(float(self.norms[i])) and self.norms[i] > 0]
        if len(known) < 4:
            return {}
        first = self.axes[:, -1]

        def without_first(rows: Tensor) -> Tensor:
            return torch.addr(rows, rows @ first, first, alpha=-1)

        reference = without_first(self.rows(known))
        total = reference.sum(0)
        own = torch.cosine_similarity(reference, total - reference)  # each to the mean of the others
        trained = torch.cosine_similarity(without_first(self.sample), total[None])
        bound = max(float(own.quantile(0.1)), 0.95)
        if own.median() < 0.95 or trained.quantile(0.99) > bound:
            return {}
        cosines = torch.cosine_similarity(without_first(self.rows(ids)), total[None]).tolist()
        return {
            i: Finding("unused", f"its cosine to the mean of {len(known)} unused tokens' rows is {cosine:.3f}")
            for i, cosine in zip(ids, cosines, strict=True)
            if cosine >= bound
        }

    def length(self, ids: Sequence[int]) -> dict[int, Finding]:
        rows = self.rows(ids)
        found = {}
        for token_id, norm, centred in zip(
            ids, rows.norm(dim=1).tolist(), (rows - self.mean).norm(dim=1).tolist(), strict=True
        ):
            if centred < self.centred_bounds[0]:
                usual = self.centred_bounds[2]
                detail = f"it is {centred:.3g} from the mean of all rows, where trained rows are {usual:.3g}"
                found[token_id] = Finding("mean", detail)
            elif not self.bounds[0] <= norm <= self.bounds[1]:
                kind = "short" if norm < self.bounds[0] else "long"
                found[token_id] = Finding(kind, f"its length is {norm:.3g}, the median is {self.median:.3g}")
        return found

    def random(self, ids: Sequence[int], nearest: Mapping[int, float], alone: float) -> dict[int, Finding]:
        if float(self.told.median()) < 0.2:  # the rows have no axes that tell: of a model that is all random, too
            return {}
        likelihoods, deviations = self._likelihood(self.rows(ids))
        freedom = self._parts() - 1
        bound = freedom + 10 * math.sqrt(2 * freedom)
        return {
            i: Finding(
                "random",
                f"its parts along the table's axes are like draws of one normal distribution (log-likelihood ratio "
                f"{-value * self.width / 2:.0f}), and its nearest row has the cosine {nearest[i]:.2f}",
            )
            for i, value, deviation in zip(ids, likelihoods.tolist(), deviations.tolist(), strict=True)
            if value * self.width / 2 < -_CERTAIN and deviation < bound and nearest[i] < alone
        }

    def _parts(self) -> int:
        return max(2, min(16, self.width // 4))

    def _likelihood(self, rows: Tensor) -> tuple[Tensor, Tensor]:
        """How much better the trained rows' axes explain a row than equal axes do, at the best scale for each,
        `2/d` of the log-likelihood ratio; and how far the axes' shares, in parts, are from equal ones, as a chi².
        """
        squares = (rows @ self.axes).square()
        ratio = squares.mean(1).log() - (squares / self.shares).mean(1).log() - self.shares.log().mean()
        portions = squares / squares.sum(1, keepdim=True)
        deviation = torch.zeros_like(ratio)
        for part in portions.chunk(self._parts(), 1):
            expected = part.shape[1] / self.width
            deviation += (part.sum(1) - expected).square() / (2 * expected / self.width)
        return ratio, deviation


def _bounds(norms: Tensor) -> tuple[float, float, float]:
    """Lengths below and above which a row is not one of these, and their median: 6 and 10 times the spread away, in
    logarithms, each side's own, of which 10% of the rows are further than 1.28.
    """
    if len(norms) > 1 << 20:
        norms = norms[:: len(norms) >> 20]
    low, median, high = norms.clamp(min=1e-30).log().quantile(norms.new_tensor([0.1, 0.5, 0.9])).tolist()
    below, above = max(median - low, 0.05) / 1.28, max(high - median, 0.05) / 1.28
    return math.exp(median - 6 * below), math.exp(min(median + 10 * above, 700.0)), math.exp(median)


def _word(text: str) -> str:
    """The word that a token spells, without case and marks; a name in brackets spells none (`</s>` is no `s`)."""
    if re.fullmatch(r"<.*>|\[.*\]", text, re.DOTALL):
        return ""
    return re.sub(r"[\W_]+|^Ġ|^##", "", text).casefold()
