"""Rows from the rows of pieces: of the token's own text, of a description, of another token."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import chain

import torch
from torch import Tensor

from ..errors import PartialEmbeddingError, shorten
from ..tokens.vocabulary import encode_all
from .registry import InitRequest, register
from .table import mean

__all__ = ["Copy", "Description", "Positional", "subtoken_mean"]

_NUMBERS = 1 << 20  # of pieces' rows at a time, so that memory does not grow with the number of tokens


@register("subtoken_mean")
def subtoken_mean(request: InitRequest) -> Tensor:
    """For each token the mean of the rows of its pieces; no other rows are read.

    A token without pieces (its text was unknown to the tokenizer) starts at the mean of all rows.
    Source: Gee et al., "Fast Vocabulary Transfer for Language Model Compression", EMNLP 2022.
    """
    return _means(request, request.pieces)


@dataclass(frozen=True)
class Positional:
    """A mean of the pieces' rows in which their position counts.

    `row = Σ w_i e_i / Σ w_i` over the pieces `i = 1…n`, with `w_i = exp(rate · i)` for input rows, since
    the text that follows was predicted at the last piece, and `w_i = exp(-rate · i)` for output rows, since the
    first piece is the one to be predicted. Rows of a tied table are taken as input rows.

    Needs: the pieces' rows. Cost: reading them.
    Source: Nakash et al., "AdaptiVocab: Enhancing LLM Efficiency in Focused Domains through Lightweight
    Vocabulary Adaptation", 2025, section 3.3, where the rate is 2; it does not say how to treat tied rows.

    Args:
        rate: 0 is the plain mean.
    """

    rate: float = 2.0

    def __call__(self, request: InitRequest) -> Tensor:
        sign = 1.0 if request.role in ("input", "extra") else -1.0
        weights = []
        for pieces in request.pieces:
            steps = sign * self.rate * torch.arange(len(pieces), dtype=torch.float64)
            weights.append(torch.softmax(steps, 0).tolist())
        return _means(request, request.pieces, weights)


@dataclass(frozen=True)
class Description:
    """The mean of the rows of the pieces of a description in words.

    Needs: a description of every token. Cost: reading the rows.

    Args:
        texts: descriptions by token. Without it they are what `add_tokens` was given, a dict from token to
            description: `add_tokens(model, tokenizer, {"<Dy>": "a soft silvery metal"}, init="description")`.
    """

    texts: Mapping[str, str] | None = None

    def __call__(self, request: InitRequest) -> Tensor:
        if self.texts is None:
            lacking = [
                token for token, described in zip(request.tokens, request.described, strict=True) if not described
            ]  # fmt: skip
            given: Sequence[Sequence[int]] = request.pieces
        else:
            given = _known(request, encode_all(request.tokenizer, [self.texts.get(t, "") for t in request.tokens]))
            lacking = [token for token, pieces in zip(request.tokens, given, strict=True) if not pieces]
        if lacking:
            raise PartialEmbeddingError(
                f"Tokens {shorten(lacking)} have no description that the tokenizer can read. Pass tokens as a dict "
                "from each token to its description, or init=Description({...})."
            )
        return _means(request, given)


@dataclass(frozen=True)
class Copy:
    """The row of another token.

    On a tied head the copy has the logit of its source in every context, and the two share the probability, until
    training separates them.

    Needs: a token to copy from. Cost: one row.

    Args:
        sources: the token to copy from for each new token, or one for all. Without it they are what
            `add_tokens` was given, a dict from token to source: `add_tokens(model, tokenizer, {"<x>": "the"},
            init="copy")`.
    """

    sources: str | Mapping[str, str] | None = None

    def __call__(self, request: InitRequest) -> Tensor:
        if self.sources is None:
            given: Sequence[Sequence[int]] = request.pieces
        else:
            by_token = dict.fromkeys(request.tokens, self.sources) if isinstance(self.sources, str) else self.sources
            given = _known(request, encode_all(request.tokenizer, [by_token.get(t, "") for t in request.tokens]))
        several = [token for token, pieces in zip(request.tokens, given, strict=True) if len(pieces) != 1]
        if several:
            raise PartialEmbeddingError(
                f"Tokens {shorten(several)} have no single token to copy from. Name one that the tokenizer reads as "
                "one token (with its leading space, if it has one): init=Copy({...}), or init='subtoken_mean'."
            )
        return _means(request, given)


def _known(request: InitRequest, sequences: Sequence[Sequence[int]]) -> list[list[int]]:
    """Ids that have a trained row, as `request.pieces` are."""
    return [[i for i in ids if i < len(request.table) and i != request.padding] for ids in sequences]


def _means(
    request: InitRequest, sequences: Sequence[Sequence[int]], weights: Sequence[Sequence[float]] | None = None
) -> Tensor:
    """Means of rows, weighted if there are weights, summed in float64; where there are none, the mean of all rows."""
    table = request.table
    rows = torch.empty(len(sequences), *table.shape[1:], dtype=torch.float32, device=table.device)
    counts = [len(ids) for ids in sequences]
    lengths = torch.tensor(counts)
    starts = lengths.cumsum(0) - lengths
    flat = torch.tensor([*chain.from_iterable(sequences)], dtype=torch.int64)
    shares_of = None if weights is None else torch.tensor([*chain.from_iterable(weights)], dtype=torch.float64)
    for length in sorted(set(counts)):
        members = (lengths == length).nonzero().flatten()
        if not length:
            rows[members.to(table.device)] = mean(request)[0]
            continue
        step = max(1, _NUMBERS // (length * max(1, table[:1].numel())))
        for start in range(0, len(members), step):
            part = members[start : start + step]
            places = starts[part, None] + torch.arange(length)
            given = table[flat[places].to(table.device)].double()
            if shares_of is None:
                means = given.sum(1) / length
            else:
                shares = shares_of[places].to(table.device)
                shares = shares.reshape(len(part), length, *(1 for _ in table.shape[1:]))
                means = (shares * given).sum(1) / shares.sum(1)
            rows[part.to(table.device)] = means.float()
    return rows


register("positional")(Positional())
register("description")(Description())
register("copy")(Copy())
