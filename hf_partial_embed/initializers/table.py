"""Rows from the mean and the covariance of the whole table."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from ..errors import PartialEmbeddingError
from .registry import InitRequest, register
from .table_statistics import mean_and_covariance

__all__ = ["MultivariateNormal", "mean"]


@register("mean")
def mean(request: InitRequest) -> Tensor:
    """The mean of all trained rows, the same for every token. One pass over the table.

    Source: Hewitt, "Initializing new word embeddings for pretrained language models", 2021, without its
    noise.
    """
    average, _ = mean_and_covariance(request.table, request.trained_rows, covariance=False)
    return average.float().expand(len(request.tokens), *request.table.shape[1:]).clone()


@dataclass(frozen=True)
class MultivariateNormal:
    """Draws from the normal distribution with the trained rows' mean `m` and full covariance `C`.

    `row = m + scale · L z` with `L Lᵀ = C` (Cholesky, or the symmetric root where `C` is singular) and
    `z` standard normal, in float64. transformers' `mean_resizing` multiplies `C` by 1e-9, so that its
    rows are almost equal; here they differ as much as old rows do. The token's text plays no part.

    Needs: the table. Cost: two passes over it, `V·d²` products and one factorisation, `d³`.
    Source: Hewitt, "Initializing new word embeddings for pretrained language models", 2021.

    Args:
        scale: of the noise, in [0, 1].
    """

    scale: float = 1.0

    def __post_init__(self) -> None:
        if not 0 <= self.scale <= 1:
            raise PartialEmbeddingError(
                f"MultivariateNormal(scale={self.scale!r}): rows more scattered than the old ones are louder than "
                "they. Give a number from 0 to 1."
            )

    def __call__(self, request: InitRequest) -> Tensor:
        average, covariance = mean_and_covariance(request.table, request.trained_rows)
        assert covariance is not None
        factor, failed = torch.linalg.cholesky_ex(covariance)
        if failed:  # fewer rows than dimensions, or a dimension without variance
            values, vectors = torch.linalg.eigh(covariance)
            factor = vectors * values.clamp(min=0).sqrt() @ vectors.T
        draws = torch.randn(len(request.tokens), len(factor), generator=request.generator, dtype=torch.float64)
        noise = draws.to(factor.device) @ factor.T
        rows = average + self.scale * noise.reshape(-1, *average.shape)
        return request.keep_norms(rows).float()


register("multivariate_normal")(MultivariateNormal())
