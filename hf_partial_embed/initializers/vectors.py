"""Rows from static word vectors (GloVe, fastText), mapped into the model's space."""

from __future__ import annotations

import logging
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from ..errors import PartialEmbeddingError, count, shorten
from ..tokens.vocabulary import texts_by_id
from .pieces import subtoken_mean
from .registry import InitRequest

__all__ = ["Vectors", "entmax15", "sparsemax"]

logger = logging.getLogger(__name__)

_RIDGES = tuple(10.0**exponent for exponent in range(-6, 4))


def sparsemax(scores: Tensor) -> Tensor:
    """The point of the probability simplex that is nearest to the scores, over the last dimension.

    `p_i = max(0, z_i - τ)` with `τ` such that they sum to one: with `z` sorted downwards and `k` the
    largest number for which `1 + k z_k > Σ_{j≤k} z_j`, `τ = (Σ_{j≤k} z_j - 1) / k`.
    Source: Martins and Astudillo, "From Softmax to Sparsemax", ICML 2016, algorithm 1.
    """
    ordered = scores.sort(dim=-1, descending=True).values
    sums = ordered.cumsum(-1) - 1
    ranks = torch.arange(1, scores.shape[-1] + 1, dtype=scores.dtype, device=scores.device)
    size = (ranks * ordered > sums).sum(-1, keepdim=True)
    return (scores - sums.gather(-1, size - 1) / size).clamp(min=0)


def entmax15(scores: Tensor) -> Tensor:
    """Between softmax and sparsemax: `p_i = max(0, z_i / 2 - τ)²`, over the last dimension.

    With `x = z / 2` sorted downwards, `M_k` the mean of its first `k` and `S_k` the sum of their squared
    distances from it, `τ_k = M_k - √((1 - S_k) / k)`; the right `k` is the largest with `τ_k ≤ x_k`.
    Source: Peters, Niculae and Martins, "Sparse Sequence-to-Sequence Models", ACL 2019, algorithm 2.
    """
    halves = (scores - scores.amax(-1, keepdim=True)) / 2
    ordered = halves.sort(dim=-1, descending=True).values
    ranks = torch.arange(1, scores.shape[-1] + 1, dtype=scores.dtype, device=scores.device)
    means = ordered.cumsum(-1) / ranks
    spread = ordered.square().cumsum(-1) - ranks * means.square()
    thresholds = means - ((1 - spread) / ranks).clamp(min=0).sqrt()
    size = (thresholds <= ordered).sum(-1, keepdim=True)
    return (halves - thresholds.gather(-1, size - 1)).clamp(min=0).square()


@dataclass(frozen=True)
class Vectors:
    """Static word vectors, mapped into the table's space over the words that both have.

    With `X [n, p]` and `Y [n, d]` the vectors and rows of the `n` shared words, `x̄`, `ȳ` their means, and
    `x` the new word's vector:

    - `"ridge"`: `ȳ + (x - x̄) W`, `W = (XᵀX + λI)⁻¹ XᵀY` of the centred `X` and `Y`, `λ` by generalised
      cross-validation (Golub, Heath and Wahba, 1979). Cost `n·p·(p + d)`.
    - `"procrustes"`: `ȳ + s (x - x̄) R`, `R` the matrix with orthonormal rows (or columns) and `s` the
      scale that bring the centred `X` nearest to `Y` (Schönemann, 1966). Cost as above.
    - `"neighbours"`: `Σ w_i y_i` with `w` the sparsemax (or entmax) of the cosines between `x` and the
      shared words' vectors, divided by `temperature`; as FOCUS does (Dobler and de Melo, EMNLP 2023).
      Cost `n·p` for each token.

    A token is looked up without the spaces around it, and in lower case if that is not found. A token without a
    vector starts at the mean of its pieces; a warning names it.

    Args:
        vectors: vectors by word, all of one length.
        method: `"ridge"`, `"procrustes"` or `"neighbours"`.
        weighting: for `"neighbours"`: `"sparsemax"` or `"entmax15"`.
        temperature: for `"neighbours"`: the smaller, the fewer have a weight.

    Raises:
        `PartialEmbeddingError`: an unknown option; fewer than two shared words.
    """

    vectors: Mapping[str, Any]
    method: str = "ridge"
    weighting: str = "sparsemax"
    temperature: float = 0.1

    def __post_init__(self) -> None:
        for name, allowed in (
            ("method", ("ridge", "procrustes", "neighbours")),
            ("weighting", ("sparsemax", "entmax15")),
        ):
            if getattr(self, name) not in allowed:
                raise PartialEmbeddingError(f"Vectors({name}={getattr(self, name)!r}): choose one of {allowed}.")
        if not self.temperature > 0:
            raise PartialEmbeddingError(f"Vectors(temperature={self.temperature!r}) must be greater than 0.")

    def __call__(self, request: InitRequest) -> Tensor:
        rows = subtoken_mean(request)
        if request.role == "bias":
            return rows  # similar words are not equally frequent, which is what a bias tells
        ids, known = self._shared(request)
        wanted = {index: self._find(token) for index, token in enumerate(request.tokens)}
        found = {index: vector for index, vector in wanted.items() if vector is not None}
        lacking = [token for index, token in enumerate(request.tokens) if index not in found]
        if lacking:
            logger.warning("No vector for %s: they start at the mean of their pieces.", shorten(lacking))
        if not found:
            return rows
        device = request.table.device
        x = torch.stack(list(found.values())).to(device)
        old = request.table[torch.tensor(ids, device=device)].double()
        made = self._map(known.to(device), old.reshape(len(ids), -1), x)
        rows[list(found)] = made.reshape(-1, *rows.shape[1:]).float()
        return request.keep_norms(rows)

    def _find(self, token: str) -> Tensor | None:
        word = token.strip()
        vector = self.vectors.get(word, self.vectors.get(word.lower()))
        return None if vector is None else torch.as_tensor(vector, dtype=torch.float64)

    def _shared(self, request: InitRequest) -> tuple[list[int], Tensor]:
        trained = request.trained_rows.tolist()
        pairs = []
        for token_id, text in sorted(texts_by_id(request.tokenizer, len(request.table)).items()):
            vector = self.vectors.get(text.strip()) if trained[token_id] else None
            if vector is not None:
                pairs.append((token_id, torch.as_tensor(vector, dtype=torch.float64)))
        if len(pairs) < 2:
            raise PartialEmbeddingError(
                f"The vectors ({count(list(self.vectors), 'word')}) and the tokenizer share {count(pairs, 'word')}; "
                "at least two are needed to map one space to the other. Pass vectors of common words, too."
            )
        return [token_id for token_id, _ in pairs], torch.stack([vector for _, vector in pairs])

    def _map(self, known: Tensor, old: Tensor, x: Tensor) -> Tensor:
        if self.method == "neighbours":
            cosines = F.normalize(x, dim=1) @ F.normalize(known, dim=1).T
            weigh = sparsemax if self.weighting == "sparsemax" else entmax15
            mixed: Tensor = weigh(cosines / self.temperature) @ old
            return mixed
        x_mean, y_mean = known.mean(0), old.mean(0)
        known, old, x = known - x_mean, old - y_mean, x - x_mean
        if self.method == "ridge":
            predicted: Tensor = y_mean + x @ _ridge(known, old)
            return predicted
        left, values, right = torch.linalg.svd(known.T @ old, full_matrices=False)
        rotation = left @ right
        scale = values.sum() / (known @ rotation).square().sum().clamp(min=torch.finfo(known.dtype).tiny)
        rotated: Tensor = y_mean + scale * x @ rotation
        return rotated


def _ridge(known: Tensor, old: Tensor) -> Tensor:
    """`W [p, d]` for centred `X [n, p]`, `Y [n, d]`, with the penalty that generalised cross-validation finds best."""
    left, values, right = torch.linalg.svd(known, full_matrices=False)
    projected = left.T @ old
    outside = old.square().sum() - projected.square().sum()
    best, best_error = values, float("inf")
    for relative in _RIDGES:
        penalty = relative * values.square().mean().clamp(min=torch.finfo(values.dtype).tiny)
        shrink = values.square() / (values.square() + penalty)
        residual = outside + ((1 - shrink)[:, None] * projected).square().sum()
        freedom = len(known) - 1 - shrink.sum()
        error = (residual / freedom.square()).item() if freedom > 0 else float("inf")
        if error < best_error or relative == _RIDGES[0]:
            best, best_error = values / (values.square() + penalty), error
    weights: Tensor = right.T @ (best[:, None] * projected)
    return weights
