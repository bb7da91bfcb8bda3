"""Rows with which a model goes on as it does behind the original tokenisation."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ..errors import PartialEmbeddingError
from .head import FREQUENCY, CachedHead, CachedStates, new_bias
from .pieces import subtoken_mean
from .registry import InitRequest, register
from .running import Runner, decoder_layers, undisturbed
from .snippets import PROMPTS, Snippet, exchanged_snippets, snippets_of, texts_for
from .table_statistics import root_mean_square

__all__ = ["Distill"]

# How often each snippet is seen, unless `steps` says otherwise.
_EPOCHS = 6


@dataclass(frozen=True)
class Distill:
    """Rows that are trained until the model cannot tell the new token from its pieces.

    Short snippets of text with the new token are run, and the new rows `w` alone follow the gradient (Adam,
    cosine schedule). The teacher is the same model on the same snippet in the original tokenisation, at the
    positions `p` of the last piece and of what follows it. They start at the mean of their pieces, and there
    are two stages:

    1. Hidden states `h` behind an early `layer`, `mean_p ‖h_p(w) - h̄_p‖² / mean_p ‖h̄_p‖²`. Cheap, since the
       layers behind it are not run; it gives what a word is made of.
    2. Predictions, `mean_p KL(P̄_p ‖ P_p(w))` over the old vocabulary, through the whole model: what the model
       knows of a word comes out in the later layers. Texts speak of each token in few ways, so the snippets
       are joined by as many again in which a token stands in the place of another, see `exchanges`.

    A row of a tied head has a second duty, to be predicted where it belongs and only there: `head_weight`
    times the loss of `CachedHead` is added for it, on states of one whole pass over the snippets. The rows
    of an untied head are fitted by `CachedHead` itself on the same texts; a head's bias and further tables
    start at the mean of the pieces. Nothing of the model changes.

    Needs: a causal model; texts with the tokens, or a model that can generate them. Cost: for `S` snippets
    of `n` tokens `S` forwards, and `6·S` forwards with backward, through `layer` of the model's layers; then for
    `S` snippets and the exchanged ones two forwards and a backward through all of them. Memory: the logits of
    `batch_size` snippets, twice.
    Source: Dobler, Elliott and de Melo, "Token Distillation: Attention-aware Input Embeddings For New
    Tokens", 2025, which matches a late layer. Predictions as a teacher: Hinton, Vinyals and Dean, "Distilling
    the Knowledge in a Neural Network", 2015.

    Args:
        texts: any texts with the tokens in them, written as the tokens are (with their leading space, if they
            have one). Without it the model writes some, from `prompts`.
        layer: whose output is matched, from 1; a quarter of the layers if not given.
        steps: of Adam in the first stage; 6 times through the snippets if not given.
        learning_rate: at the top, in units of the root mean square of the table's trained rows.
        batch_size: snippets in a step.
        per_token: number of snippets for each token, at most.
        context: number of ids before and behind the token in a snippet, at most.
        head_weight: of the output's loss on a tied head; 0 saves the whole pass, and the new token is hardly
            predicted.
        frequency: of each new token among the tokens of running text, for the output's loss.
        prompts: beginnings of the texts that the model writes, with `{token}`.
        prediction_steps: of Adam in the second stage; once through its snippets if not given, 0 leaves it out.
        exchanges: number of snippets for each token that are made of those of other tokens.

    Raises:
        `PartialEmbeddingError`: a model that is not causal, or not built of layers; a layer that there is
            not; a token that is in no text; a model without texts that cannot generate.
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
    prediction_steps: int | None = None
    exchanges: int = 4

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
        with undisturbed(request.model):
            runner = Runner(request.model, request.table)
            cached = None
            if request.shared and self.head_weight:
                cached = CachedStates(request.model, snippets, self.batch_size, self.frequency)
            rows = self._match_states(request, runner, layer, snippets, start, cached)
            if self.prediction_steps != 0:
                snippets += exchanged_snippets(
                    request, texts, context=self.context, limit=self.per_token, count=self.exchanges
                )
                rows = self._match_predictions(request, runner, snippets, rows, cached)
        return request.keep_norms(rows)

    def _layer(self, request: InitRequest) -> nn.Module:
        layers = decoder_layers(request.model)
        number = max(1, round(len(layers) / 4)) if self.layer is None else self.layer
        if not 1 <= number <= len(layers):
            raise PartialEmbeddingError(
                f"Distill(layer={self.layer}): {type(request.model).__name__} has layers 1 to {len(layers)}."
            )
        return layers[number - 1]

    def _match_states(
        self,
        request: InitRequest,
        runner: Runner,
        layer: nn.Module,
        snippets: list[Snippet],
        start: Tensor,
        cached: CachedStates | None,
    ) -> Tensor:
        # Batches of alike lengths have little padding.
        snippets = sorted(snippets, key=lambda snippet: len(snippet.original))
        with torch.no_grad():
            targets = [
                states.float()
                for first in range(0, len(snippets), self.batch_size)
                for states in _matched(partial(runner.until, layer), snippets[first : first + self.batch_size])
            ]

        def loss(rows: Tensor, batch: list[int]) -> Tensor:
            states = _matched(partial(runner.until, layer), [snippets[index] for index in batch], rows)
            losses = [
                (state.float() - targets[index]).square().sum(-1) / targets[index].square().sum(-1).mean()
                for index, state in zip(batch, states, strict=True)
            ]
            return torch.cat(losses).mean()

        return self._fit(request, start, len(snippets), self.steps, _EPOCHS, loss, cached)

    def _match_predictions(
        self, request: InitRequest, runner: Runner, snippets: list[Snippet], start: Tensor, cached: CachedStates | None
    ) -> Tensor:
        def loss(rows: Tensor, batch: list[int]) -> Tensor:
            chosen = [snippets[index] for index in batch]
            with torch.no_grad():  # run anew in each step: kept, they would be a table's width for every position
                targets = [logits.float().log_softmax(-1) for logits in _matched(runner.logits, chosen)]
            predicted = [logits.float().log_softmax(-1) for logits in _matched(runner.logits, chosen, rows)]
            divergences = [
                F.kl_div(one, other, reduction="none", log_target=True).sum(-1)
                for one, other in zip(predicted, targets, strict=True)
            ]
            return torch.cat(divergences).mean()

        return self._fit(request, start, len(snippets), self.prediction_steps, 1, loss, cached)

    def _fit(
        self,
        request: InitRequest,
        start: Tensor,
        count: int,
        steps: int | None,
        epochs: int,
        match: Callable[[Tensor, list[int]], Tensor],
        cached: CachedStates | None,
    ) -> Tensor:
        """Rows that follow the gradient of `match`, which gets the rows and the numbers of a batch's snippets."""
        size = min(self.batch_size, count)
        steps = math.ceil(epochs * count / size) if steps is None else steps
        top_rate = self.learning_rate * root_mean_square(request.table, request.trained_rows)
        rows = start.clone().requires_grad_(True)
        optimizer = torch.optim.Adam([rows], lr=top_rate, betas=(0.9, 0.99))
        bias = None if cached is None else new_bias(request)
        batches = _batches(count, size, request.generator)
        for step in range(steps):
            optimizer.param_groups[0]["lr"] = top_rate * (1 + math.cos(math.pi * step / steps)) / 2
            batch = next(batches)
            with torch.enable_grad():
                loss = match(rows, batch)
                if cached is not None:
                    loss = loss + self.head_weight * cached.loss(rows.double(), bias)
                (rows.grad,) = torch.autograd.grad(loss, [rows])
            optimizer.step()
        return rows.detach()


def _matched(run: Callable[..., Tensor], batch: Sequence[Snippet], rows: Tensor | None = None) -> list[Tensor]:
    """What a run gives for each snippet from the new token, or without rows from its last piece, on."""
    if rows is None:
        values = run([snippet.original for snippet in batch])
        firsts = [snippet.end for snippet in batch]
    else:
        places = [(snippet.start, snippet.token) for snippet in batch]
        values = run([snippet.shortened for snippet in batch], rows, places)
        firsts = [snippet.start for snippet in batch]
    return [
        value[first : first + 1 + snippet.following]
        for value, first, snippet in zip(values, firsts, batch, strict=True)
    ]


def _batches(count: int, size: int, generator: torch.Generator) -> Iterator[list[int]]:
    """Endless batches, each item once before any comes again."""
    order: list[int] = []
    while True:
        if len(order) < size:
            order += torch.randperm(count, generator=generator).tolist()
        yield order[:size]
        order = order[size:]


register("distill")(Distill())
