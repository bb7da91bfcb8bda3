"""Rows for which the early hidden states are those of the original tokenisation."""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from tqdm.auto import tqdm  # type: ignore[import-untyped]

from ..errors import PartialEmbeddingError
from .finished import FinishedRows, digest_of
from .head import CachedHead, CachedStates, frequency_among, new_bias
from .matching import Lesson, can_reuse, fit, trimmed
from .pieces import subtoken_mean
from .registry import InitRequest, register
from .running import Runner, decoder_layers, undisturbed
from .snippets import PROMPTS, Snippet, in_groups, sample_of, snippets_of, texts_for
from .table_statistics import root_mean_square

__all__ = ["Distill"]

_STEPS = 30  # for each token, unless `steps` says otherwise
_FOLLOWING = 8  # ids behind a token whose states are matched
_HEAD = 30  # weight of the output's loss beside that of one snippet, at `head_weight=1`
_VERSION = 3  # of the computation, for rows that an interrupted run has left


@dataclass(frozen=True)
class Distill:
    """Rows trained so that an early layer's hidden states are those of the original tokenisation.

    Short snippets of text with the new token are run up to `layer`, and its row `w`, nothing else, is trained (Adam,
    cosine schedule) on the loss

    `mean_p ‖h_p(w) - h̄_p‖² / mean_p ‖h̄_p‖²`

    over the positions `p` of the new token and of up to eight ids behind it; `h̄` are the hidden states of the same
    snippet in the original tokenisation, at the last piece and behind it, computed once. The row starts at the
    mean of its pieces. The layers behind `layer` are not run, and nothing of the model changes.

    A row of a tied head is an output row, too, which has to predict the token where it belongs and only there. For it
    `30 · head_weight` times the loss of `CachedHead` is added, on the hidden states of passes of the whole model:
    where the token is to come in its own snippets, and everywhere in a sample of 256 of all snippets. The rows
    of an untied head are fitted by `CachedHead` itself on the same texts; a head's bias and further tables
    start at the mean of the pieces.

    A piece of the vocabulary that serves only as a part of other new tokens in the texts stays at the mean of its
    pieces.

    The tokens are taken in groups of 64. In each step every token of the group has one of its snippets, and the rows
    are apart from one another but for the output's loss, so more tokens take more groups, and no more memory than
    their rows and the ids of their snippets. What comes before the token in a snippet is run once, and its keys and
    values are kept (models that have no such cache run all of it in each step).

    Needs: a causal model; texts with the tokens, or a model that can generate them. Cost for each token, with `s`
    snippets: `s · 17` positions of the whole model, `s · 11` of the layers up to `layer`, and there `9 · steps` with
    backward. SmolLM2-135M is best loaded in bfloat16, as it is published.
    Source: Dobler, Elliott and de Melo, "Token Distillation: Attention-aware Input Embeddings For New
    Tokens", 2025, which matches a late layer; an early one is cheaper, and serves as well here.

    Args:
        texts: any texts with the tokens in them, written as the tokens are (with their leading space, if they
            have one). About a token that is in none of them the model writes some, from `prompts`, if it can
            generate.
        layer: number, from 1, of the layer whose output is matched; a quarter of the layers if not given.
        steps: of Adam for each token; 30 if not given.
        learning_rate: at the start of the schedule, in units of the root mean square of the table's trained rows.
        batch_size: snippets that are run at once.
        per_token: largest number of snippets for each token.
        context: largest number of ids before, and behind, the token in a snippet.
        head_weight: weight of the output's loss on a tied head. 0 saves the pass of the whole model, but then the new
            token is hardly predicted.
        frequency: of each new token among the tokens of running text, for the output's loss; 2e-4 if not given, but
            at most 0.02 for all of them together.
        prompts: beginnings of the texts that the model writes, with `{token}`.
        resume: folder for the rows of each group as soon as it is finished. Called again with the same model, tokens,
            texts, settings and seed, as after an interruption, these are taken from there and come out the same.
        progress: whether to show a progress bar, after a second.

    Raises:
        `PartialEmbeddingError`: a model that is not causal or has no list of layers; `layer` out of range; a token
            that is in no text; no texts, and a model that cannot generate;
            a file in `resume` that is damaged or of another run.
    """

    texts: Sequence[str] | None = None
    layer: int | None = None
    steps: int | None = None
    learning_rate: float = 0.1
    batch_size: int = 32
    per_token: int = 8
    context: int = 16
    head_weight: float = 0.3
    frequency: float | None = None
    prompts: Sequence[str] = PROMPTS
    resume: str | os.PathLike[str] | None = None
    progress: bool = True

    def __call__(self, request: InitRequest) -> Tensor:
        if request.role == "output":
            return CachedHead(
                self.texts,
                self.per_token,
                self.context,
                self.frequency,
                batch_size=self._whole,
                prompts=self.prompts,
                progress=self.progress,
            )(request)
        start = subtoken_mean(request)
        if request.role != "input":
            return start
        layers, depth = self._layers(request)
        texts = texts_for(request, self.texts, prompts=self.prompts, per_token=self.per_token, length=self.context)
        found = snippets_of(request, texts, context=self.context, limit=self.per_token)
        snippets = [trimmed(snippet, _FOLLOWING) for snippet in found]
        groups = in_groups(snippets)
        turns = self._turns(request, groups)
        rows = start.clone()
        bar = tqdm(total=sum(map(len, groups)), desc="distilling", unit=" tokens", delay=1, disable=not self.progress)
        with undisturbed(request.model), bar:
            finished = None
            if self.resume is not None:
                finished = FinishedRows(self.resume, self._key(request, start, groups, turns))
            matching = None
            for number, group in enumerate(groups):
                made = None if finished is None else finished.get(number)
                if made is None:
                    if matching is None:
                        matching = _Matching(self, request, layers[depth - 1], depth, snippets)
                    made = matching.rows(group, start[[*group]], turns)
                    if finished is not None:
                        finished.put(number, made)
                rows[[*group]] = made.to(rows)
                bar.update(len(group))
        return request.keep_norms(rows)

    @property
    def _whole(self) -> int:
        """Snippets that are run at once where each has logits at all of its positions, which take the most memory."""
        return max(1, self.batch_size // 4)

    def _turns(self, request: InitRequest, groups: Sequence[Mapping[int, Sequence[Snippet]]]) -> list[int]:
        """Which of its snippets each token has in each step; all of them before one comes again."""
        steps = _STEPS if self.steps is None else self.steps
        most = max((len(own) for group in groups for own in group.values()), default=1)
        order: list[int] = []
        while len(order) < steps:
            order += torch.randperm(most, generator=request.generator).tolist()
        return order[:steps]

    def _key(
        self,
        request: InitRequest,
        start: Tensor,
        groups: Sequence[Mapping[int, Sequence[Snippet]]],
        turns: Sequence[int],
    ) -> str:
        """Of all that the rows depend on; how they are computed in this release is a part of it."""
        settings = (_VERSION, self.layer, self.learning_rate, self.batch_size, self.head_weight, self.frequency)
        return digest_of([settings, tuple(request.tokens), turns, start, request.table, request.model,
                          *groups])  # fmt: skip

    def _layers(self, request: InitRequest) -> tuple[list[nn.Module], int]:
        layers = decoder_layers(request.model)
        number = max(1, round(len(layers) / 4)) if self.layer is None else self.layer
        if not 1 <= number <= len(layers):
            raise PartialEmbeddingError(
                f"Distill(layer={self.layer}): {type(request.model).__name__} has layers 1 to {len(layers)}."
            )
        return layers, number


class _Matching:
    """Fits the rows of one group after another.

    Args:
        options: of the initialiser.
        request: for the input table.
        layer: whose output is matched.
        depth: its number.
        snippets: all of them.
    """

    def __init__(
        self, options: Distill, request: InitRequest, layer: nn.Module, depth: int, snippets: list[Snippet]
    ) -> None:
        self.options, self.layer, self.depth = options, layer, depth
        self.runner = Runner(request.model, request.table)
        ordered = sorted(snippets, key=lambda snippet: snippet.start)
        self.reuse = can_reuse(self.runner, layer, ordered[-1:])
        self.together = self.reuse and can_reuse(self.runner, layer, [ordered[0], ordered[-1]])
        self.rate = options.learning_rate * root_mean_square(request.table, request.trained_rows)
        self.cached, self.bias = None, None
        if request.shared and options.head_weight:
            frequency = frequency_among(len(request.tokens), options.frequency)
            self.cached = CachedStates.of(request.model, sample_of(snippets), options._whole, frequency)
            self.bias = new_bias(request)

    def rows(self, group: Mapping[int, list[Snippet]], start: Tensor, turns: Sequence[int]) -> Tensor:
        options = self.options
        lesson = Lesson(self.runner, self.layer, self.depth, list(group.values()), options.batch_size, self.reuse,
                        self.together, head=self.cached is not None)  # fmt: skip
        cached, bias = None, None
        if self.cached is not None:
            cached = self.cached.of_group([*group]).with_more(lesson.states, lesson.sums, lesson.labels)
            bias = None if self.bias is None else self.bias[[*group]]

        def loss(rows: Tensor, turn: int) -> Iterator[Tensor]:
            for part in lesson.turns[turn % len(lesson.turns)]:
                yield part.loss(self.runner, self.layer, rows)
            if cached is not None:
                yield _HEAD * options.head_weight * cached.loss(rows.double(), bias)

        return fit(loss, start, turns, self.rate)


register("distill")(Distill())
