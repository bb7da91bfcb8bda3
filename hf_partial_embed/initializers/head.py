"""Rows of an untied head, fitted on cached states."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import cached_property, partial
from itertools import chain
from typing import Any

import torch
from torch import Tensor
from tqdm.auto import tqdm  # type: ignore[import-untyped]

from ..errors import PartialEmbeddingError
from .pieces import subtoken_mean
from .registry import InitRequest, register
from .running import Runner, undisturbed
from .snippets import PROMPTS, Snippet, in_groups, sample_of, snippets_of, texts_for

__all__ = ["CachedHead", "CachedStates", "frequency_among", "logit_shape", "new_bias"]

# Default frequency of a new token among the tokens of running text: ten times that of an average token of a
# vocabulary of 50,000. On SmolLM2 the leak in snippets from texts of the same kind was below 1% with the study's 12
# tokens, and 2% with 60; at a tenth of the value a token is hardly predicted where it belongs.
FREQUENCY = 2e-4
# Of all new tokens together: thousands at the frequency above would be all that a model writes. 5,000 words of several
# pieces took 0.41 of the probability where none of them was, and take 0.08 with this bound.
FREQUENCY_OF_ALL = 0.02


def frequency_among(count: int, given: float | None) -> float:
    """Of one of `count` new tokens, if the user gives none."""
    return min(FREQUENCY, FREQUENCY_OF_ALL / count) if given is None else given


@dataclass(frozen=True)
class CachedHead:
    """Head rows fitted by cross-entropy on cached hidden states, without further passes through the body.

    One pass over texts in the original tokenisation gives the states `h` before the head and the
    log-sum-exp `z` of the old logits. With the old rows frozen, these are all that the loss of new rows `w`
    depends on. With `s = log(exp z + Σ_k exp(w_k · h + b_k))` it is

    `mean_old(s - z) + frequency · Σ_k mean_k(s - w_k · h - b_k) + penalty · ‖w - w₀‖²/2`

    the first mean over the positions that an old token follows, the others over those that token `k` follows.
    It is convex in `w` (not quite with capped logits, as in Gemma 2) and is minimised by L-BFGS.
    `w₀` is the mean of the pieces' rows. Positions between the token's pieces are left out, since they do not
    occur once the token exists. The new tokens' biases `b` are the means of their pieces'.

    Snippets are cut out around the tokens, which are far more frequent in them than in running text: rows fitted
    without weights would predict the tokens everywhere. The weights make a token occur once in `1 / frequency`
    positions.

    Tokens are taken in groups of 64, each with the snippets of its own tokens and a sample of 256 of all, where the
    other tokens are left in their pieces.

    Only the rows of an untied head are fitted; those of other tables, a tied one among them, start at the mean of the
    pieces.

    Needs: texts with the tokens, or a model that can generate them. Cost: one forward of the whole model
    over the snippets (for 12 tokens, 5 snippets each: 2,000 tokens), then `N·K·d` for each iteration.
    Source: the loss is the model's own; texts around the token as in Dobler, Elliott and de Melo, "Token
    Distillation", 2025; weights for cases that were sampled by their outcome: King and Zeng, "Logistic
    Regression in Rare Events Data", 2001.

    Args:
        texts: any texts with the tokens in them, written as the tokens are. About a token that is in
            none of them the model writes some, if it can generate.
        per_token: largest number of snippets for each token.
        context: largest number of ids before, and behind, the token in a snippet.
        frequency: of each new token among the tokens of running text, which the snippets cannot tell; 2e-4 if not
            given, but at most 0.02 for all of them together.
        penalty: of the distance from `w₀`, in units of the states' mean square.
        iterations: largest number of L-BFGS iterations.
        batch_size: snippets in a pass.
        prompts: beginnings of the texts that the model writes, with `{token}`.
        progress: whether to show a progress bar, after a second.

    Raises:
        `PartialEmbeddingError`: a token that is in no text; no texts, and a model that cannot generate; a model whose
            logits are not its head's output, scaled or capped.
    """

    texts: Sequence[str] | None = None
    per_token: int = 8
    context: int = 16
    frequency: float | None = None
    penalty: float = 3e-4
    iterations: int = 200
    batch_size: int = 12
    prompts: Sequence[str] = PROMPTS
    progress: bool = True

    def __call__(self, request: InitRequest) -> Tensor:
        start = subtoken_mean(request)
        if request.role != "output":
            return start
        texts = texts_for(request, self.texts, prompts=self.prompts, per_token=self.per_token, length=self.context)
        snippets = snippets_of(request, texts, context=self.context, limit=self.per_token)
        groups = in_groups(snippets)
        frequency = frequency_among(len(start), self.frequency)
        rows, bias = start.clone(), new_bias(request)
        bar = tqdm(groups, desc="fitting", unit=" groups", delay=1, disable=not self.progress)
        with undisturbed(request.model), bar:
            read = partial(CachedStates.of, request.model, batch_size=self.batch_size, frequency=frequency)
            sample = read(sample_of(snippets)) if len(groups) > 1 else None
            for group in bar:
                tokens = list(group)
                cached = read([*chain(*group.values())]).of_group(tokens)
                if sample is not None:
                    cached = cached.with_more(sample.states, sample.sums, sample.of_group(tokens).labels)
                own_bias = None if bias is None else bias[tokens]
                rows[tokens] = self._fit(start[tokens].double(), cached, own_bias).to(rows)
        return rows

    def _fit(self, start: Tensor, cached: CachedStates, bias: Tensor | None) -> Tensor:
        penalty = self.penalty * cached.states.square().mean()
        rows = start.clone().requires_grad_(True)
        optimizer = torch.optim.LBFGS(
            [rows],
            max_iter=self.iterations,
            tolerance_grad=1e-3 * cached.frequency,
            tolerance_change=1e-6 * cached.frequency,
            line_search_fn="strong_wolfe",
        )

        def closure() -> Tensor:
            loss = cached.loss(rows, bias) + penalty * (rows - start).square().sum() / 2
            (rows.grad,) = torch.autograd.grad(loss, [rows])
            return loss.detach()

        with torch.enable_grad():
            optimizer.step(closure)  # type: ignore[no-untyped-call]
        return rows.detach()


@dataclass(frozen=True)
class CachedStates:
    """What the loss of new head rows depends on, of a model run over texts.

    Attributes:
        states (`torch.Tensor` of shape `(N, d)`): what the head is given, in float64.
        sums (`torch.Tensor` of shape `(N,)`): log-sum-exp of the old logits.
        labels (`torch.Tensor` of shape `(N,)`): which new token follows, -1 where none does.
        shape: from the head's output to the model's logits.
        frequency: of each new token.
    """

    states: Tensor
    sums: Tensor
    labels: Tensor
    shape: Callable[[Tensor], Tensor]
    frequency: float

    @classmethod
    @torch.no_grad()
    def of(cls, model: Any, snippets: Sequence[Snippet], batch_size: int, frequency: float) -> CachedStates:
        """All positions of snippets in the original tokenisation, but those between a token's pieces."""
        runner = Runner(model)
        ordered = sorted(snippets, key=lambda snippet: len(snippet.original))
        states, sums, labels = [], [], []
        for first in range(0, len(ordered), batch_size):
            batch = ordered[first : first + batch_size]
            kept = [[i for i in range(len(s.original) - 1) if not s.start <= i < s.end] for s in batch]
            hidden, raw, logits = runner.head([snippet.original for snippet in batch], kept)
            if not first:
                shape = logit_shape(model, raw, logits)
            states.append(hidden.double())
            sums.append(logits.float().logsumexp(-1).double())
            for snippet, positions in zip(batch, kept, strict=True):
                labels += [snippet.token if i == snippet.start - 1 else -1 for i in positions]
        joined = torch.cat(states)
        return cls(joined, torch.cat(sums), torch.tensor(labels, device=joined.device), shape, frequency)

    def of_group(self, group: Sequence[int]) -> CachedStates:
        """The same with labels in a group of the tokens; the other tokens are left in their pieces."""
        places = {token: place for place, token in enumerate(group)}
        labels = [places.get(label, -1) for label in self.labels.tolist()]
        return replace(self, labels=torch.tensor(labels, device=self.labels.device))

    def with_more(self, states: Tensor, sums: Tensor, labels: Tensor) -> CachedStates:
        return replace(
            self,
            states=torch.cat([self.states, states.to(self.states)]),
            sums=torch.cat([self.sums, sums.to(self.sums)]),
            labels=torch.cat([self.labels, labels.to(self.labels)]),
        )

    @cached_property
    def weights(self) -> Tensor:
        """Of each position in the loss, `[N]`. They sum to one over the positions that an old token follows, and to
        `frequency` over those that one new token follows.
        """
        alike = torch.bincount(self.labels + 1)[self.labels + 1]
        return torch.where(self.labels < 0, 1.0, self.frequency).double() / alike

    def loss(self, rows: Tensor, bias: Tensor | None) -> Tensor:
        """Weighted cross-entropy over the positions, up to a constant that does not depend on the rows."""
        raw = self.states @ rows.T
        logits = self.shape(raw if bias is None else raw + bias)
        total = torch.logaddexp(self.sums, logits.logsumexp(1))
        own = logits.gather(1, self.labels.clamp(min=0)[:, None])[:, 0]
        weighted: Tensor = self.weights @ (total - torch.where(self.labels >= 0, own, self.sums))
        return weighted


def new_bias(request: InitRequest) -> Tensor | None:
    """The head's bias for the new tokens, `[K]`: the means of their pieces' entries; `None` without a bias."""
    bias = dict(request.model.get_output_embeddings().named_parameters(recurse=False)).get("bias")
    return None if bias is None else subtoken_mean(replace(request, table=bias.detach(), role="bias")).double()


def logit_shape(model: Any, raw: Tensor, logits: Tensor) -> Callable[[Tensor], Tensor]:
    """The function from the head's output to the model's logits: a multiple, or a soft cap."""
    raw, logits = raw.float(), logits.float()
    tolerance = 0.02 * logits.abs().max().item()
    scale = ((raw * logits).sum() / raw.square().sum().clamp(min=1e-12)).item()
    if torch.allclose(logits, scale * raw, rtol=0, atol=tolerance):
        return lambda values: scale * values
    config = model.config.get_text_config()
    cap = getattr(config, "final_logit_softcapping", None)
    if cap and torch.allclose(logits, cap * torch.tanh(raw / cap), rtol=0, atol=tolerance):
        return lambda values: cap * torch.tanh(values / cap)
    raise PartialEmbeddingError(
        f"{type(model).__name__} changes its head's output in a way that is not known here, so head rows cannot be "
        "fitted on it. Use init='subtoken_mean'."
    )


register("cached_head")(CachedHead())
