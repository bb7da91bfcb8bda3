"""Rows for which the early hidden states are those of the original tokenisation."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from ..errors import PartialEmbeddingError
from .head import FREQUENCY, CachedHead, CachedStates, new_bias
from .pieces import subtoken_mean
from .registry import InitRequest, register
from .running import Runner, decoder_layers, undisturbed
from .snippets import PROMPTS, Snippet, keep_unseen, snippets_of, texts_for
from .table_statistics import root_mean_square

__all__ = ["Distill"]

# Passes over the snippets, unless `steps` says otherwise.
_EPOCHS = 6


@dataclass(frozen=True)
class Distill:
    """Rows trained so that an early layer's hidden states are those of the original tokenisation.

    Short snippets of text with the new token are run up to `layer`, and the new rows `w`, nothing else, are trained
    (Adam, cosine schedule) on the loss

    `mean_p ‖h_p(w) - h̄_p‖² / mean_p ‖h̄_p‖²`

    over the positions `p` of the new token and of what follows it; `h̄` are the hidden states of the same
    snippet in the original tokenisation, at the last piece and behind it, computed once. The rows start at the
    mean of their pieces. The layers behind `layer` are not run, and nothing of the model changes.

    A row of a tied head is an output row, too, which has to predict the token where it belongs and only there. For it
    `head_weight` times the loss of `CachedHead` is added, on the hidden states of one pass of the whole model over
    the snippets. The rows
    of an untied head are fitted by `CachedHead` itself on the same texts; a head's bias and further tables
    start at the mean of the pieces.

    A piece of the vocabulary that serves only as a part of other new tokens in the texts stays at the mean of its
    pieces.

    Needs: a causal model; texts with the tokens, or a model that can generate them. Cost: for `S` snippets
    of `n` tokens `S` forwards, and `6·S` forwards with backward, through `layer` of the model's layers: on
    SmolLM2-135M with 12 tokens, 5 snippets each, some 20 seconds of one CPU core.
    Source: Dobler, Elliott and de Melo, "Token Distillation: Attention-aware Input Embeddings For New
    Tokens", 2025, which matches a late layer; an early one is cheaper, and serves as well here.

    Args:
        texts: any texts with the tokens in them, written as the tokens are (with their leading space, if they
            have one). About a token that is in none of them the model writes some, from `prompts`, if it can
            generate.
        layer: number, from 1, of the layer whose output is matched; a quarter of the layers if not given.
        steps: of Adam; six epochs over the snippets if not given.
        learning_rate: at the start of the schedule, in units of the root mean square of the table's trained rows.
        batch_size: snippets in a step.
        per_token: largest number of snippets for each token.
        context: largest number of ids before, and behind, the token in a snippet.
        head_weight: weight of the output's loss on a tied head. 0 saves the pass of the whole model, but then the new
            token is hardly predicted.
        frequency: of each new token among the tokens of running text, for the output's loss.
        prompts: beginnings of the texts that the model writes, with `{token}`.

    Raises:
        `PartialEmbeddingError`: a model that is not causal or has no list of layers; `layer` out of range; a token
            that is in no text; no texts, and a model that cannot generate.
    """

    texts: Sequence[str] | None = None
    layer: int | None = None
    steps: int | None = None
    learning_rate: float = 0.1
    batch_size: int = 12
    per_token: int = 8
    context: int = 16
    head_weight: float = 0.3
    frequency: float = FREQUENCY
    prompts: Sequence[str] = PROMPTS

    def __call__(self, request: InitRequest) -> Tensor:
        if request.role == "output":
            return CachedHead(
                self.texts,
                self.per_token,
                self.context,
                self.frequency,
                batch_size=self.batch_size,
                prompts=self.prompts,
            )(request)
        start = subtoken_mean(request)
        if request.role != "input":
            return start
        layer = self._layer(request)
        texts = texts_for(request, self.texts, prompts=self.prompts, per_token=self.per_token, length=self.context)
        snippets = snippets_of(request, texts, context=self.context, limit=self.per_token)
        # Snippets of similar lengths together need little padding.
        snippets.sort(key=lambda snippet: len(snippet.original))
        with undisturbed(request.model):
            runner = Runner(request.model, request.table)
            with torch.no_grad():
                targets = [
                    states
                    for first in range(0, len(snippets), self.batch_size)
                    for states in _matched(runner, layer, snippets[first : first + self.batch_size])
                ]
            cached = None
            if request.shared and self.head_weight:
                cached = CachedStates(request.model, snippets, self.batch_size, self.frequency)
            rows = self._fit(request, runner, layer, snippets, targets, start, cached)
            rows = keep_unseen(rows, start, snippets)
        return request.keep_norms(rows)

    def _layer(self, request: InitRequest) -> nn.Module:
        layers = decoder_layers(request.model)
        number = max(1, round(len(layers) / 4)) if self.layer is None else self.layer
        if not 1 <= number <= len(layers):
            raise PartialEmbeddingError(
                f"Distill(layer={self.layer}): {type(request.model).__name__} has layers 1 to {len(layers)}."
            )
        return layers[number - 1]

    def _fit(
        self,
        request: InitRequest,
        runner: Runner,
        layer: nn.Module,
        snippets: list[Snippet],
        targets: list[Tensor],
        start: Tensor,
        cached: CachedStates | None,
    ) -> Tensor:
        size = min(self.batch_size, len(snippets))
        steps = math.ceil(_EPOCHS * len(snippets) / size) if self.steps is None else self.steps
        top_rate = self.learning_rate * root_mean_square(request.table, request.trained_rows)
        rows = start.clone().requires_grad_(True)
        optimizer = torch.optim.Adam([rows], lr=top_rate, betas=(0.9, 0.99))
        bias = None if cached is None else new_bias(request)
        batches = _batches(len(snippets), size, request.generator)
        for step in range(steps):
            optimizer.param_groups[0]["lr"] = top_rate * (1 + math.cos(math.pi * step / steps)) / 2
            batch = next(batches)
            with torch.enable_grad():
                states = _matched(runner, layer, [snippets[index] for index in batch], rows)
                losses = [
                    (state - targets[index]).square().sum(-1) / targets[index].square().sum(-1).mean()
                    for index, state in zip(batch, states, strict=True)
                ]
                loss = torch.cat(losses).mean()
                if cached is not None:
                    loss = loss + self.head_weight * cached.loss(rows.double(), bias)
                (rows.grad,) = torch.autograd.grad(loss, [rows])
            optimizer.step()
        return rows.detach()


def _matched(runner: Runner, layer: nn.Module, batch: Sequence[Snippet], rows: Tensor | None = None) -> list[Tensor]:
    """Hidden states of each snippet from the new token on; without rows, from the token's last piece on."""
    if rows is None:
        hidden = runner.until(layer, [snippet.original for snippet in batch])
        firsts = [snippet.end for snippet in batch]
    else:
        places = [(snippet.start, snippet.token) for snippet in batch]
        hidden = runner.until(layer, [snippet.shortened for snippet in batch], rows, places)
        firsts = [snippet.start for snippet in batch]
    return [
        states[first : first + 1 + snippet.following].float()
        for states, first, snippet in zip(hidden, firsts, batch, strict=True)
    ]


def _batches(count: int, size: int, generator: torch.Generator) -> Iterator[list[int]]:
    """Endless batches of indices, in a new random order in each epoch."""
    order: list[int] = []
    while True:
        if len(order) < size:
            order += torch.randperm(count, generator=generator).tolist()
        yield order[:size]
        order = order[size:]


register("distill")(Distill())
