"""Diagnostics of token rows while they train.

They are cheap: each step costs a search for the batch's ids and no synchronisation with the device. Norms and the
leak are computed only at steps that are logged, the leak on a sample of positions.
"""

from __future__ import annotations

import bisect
import logging
import math
import re
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from ..attachment.partial import PartialEmbedding
from ..errors import shorten
from ..evaluation.leak import leak
from ..modules.sharding import gradient_norm, is_dtensor
from ..tokens.vocabulary import encode_all

__all__ = ["RowDiagnostics", "split_elsewhere"]

logger = logging.getLogger(__name__)

_SAMPLED_NORMS = 20_000
_SAMPLED_POSITIONS = 64
_KEPT_IDS = 1 << 19


class RowDiagnostics:
    """Watches the rows of one `PartialEmbedding` while a model trains.

    The names and meanings of what `values()` returns:

    | name | meaning |
    | --- | --- |
    | `grad_norm` | L2 norm of the rows' gradient, after clipping, over all processes |
    | `norm`, `output_norm` | mean L2 norm of the new rows, of the input embeddings and of the head |
    | `norm_percentile`, `output_norm_percentile` | the part of the old rows' norms that are smaller, in percent, mean over the new rows; near 0 or 100 they are unlike all others |
    | `unseen_inputs`, `unseen_labels` | number of tokens that no batch has had yet, as input or as label; parts of others do not count |
    | `least_seen` | how often the rarest token was an input so far |
    | `leak` | mean probability on the new tokens where none of them is the label, in this process's batch |

    Args:
        partial: the rows.
        model: what is called in training; `partial.model` if not given.
    """  # noqa: E501

    def __init__(self, partial: PartialEmbedding, model: Any = None) -> None:
        self.partial = partial
        self.model = partial.model if model is None else model
        self.sampling = False
        self._hooks: list[Any] = []
        self._hidden: Tensor | None = None
        self._labels: Tensor | None = None
        self._gradient: float | None = None
        self._asked_head = False
        self._leak: float | None = None
        self._kept: list[Tensor] | None = None
        self._watched = False
        self._had_labels = False

    def start(self) -> None:
        """Register the hooks."""
        device = next(self.partial.parameters()).device
        ids = torch.tensor(self.partial.token_ids, device=device)
        self._ids, self._order = ids.sort()
        self._inputs = torch.zeros(len(ids), dtype=torch.int64, device=device)
        self._targets = torch.zeros_like(self._inputs)
        self._old_norms = dict(self._norms_of_old_rows())
        self._kept = []
        self._hooks = [
            self.model.register_forward_pre_hook(self._before, with_kwargs=True),
            self.model.register_forward_hook(self._after, with_kwargs=True),
        ]
        backbone = getattr(self.partial.model, "base_model", None)
        if isinstance(backbone, torch.nn.Module) and backbone is not self.model:
            self._hooks.append(backbone.register_forward_hook(self._keep_hidden))

    def stop(self) -> None:
        """Remove the hooks."""
        for hook in self._hooks:
            hook.remove()
        self._hooks, self._kept, self._hidden = [], None, None

    def __getstate__(self) -> dict[str, Any]:
        # A copy or a pickle of the model, whose hooks refer to this, gets an idle one: nobody would read its values.
        return {"_hooks": []}

    def counts(self) -> dict[str, tuple[int, int]]:
        """How often each token was an input and a label so far, over all processes."""
        both = torch.stack([self._inputs, self._targets])
        if torch.distributed.is_available() and torch.distributed.is_initialized():
            torch.distributed.all_reduce(both)
        by_id = dict(zip(self._ids.tolist(), both.T.tolist(), strict=True))
        names = self.partial.tokens or [f"id {token_id}" for token_id in self.partial.token_ids]
        return {
            name: (by_id[token_id][0], by_id[token_id][1])
            for name, token_id in zip(names, self.partial.token_ids, strict=True)
        }

    def _asked_counts(self) -> dict[str, tuple[int, int]]:
        """`counts` without parts of other tokens: texts hardly ever have a part by itself."""
        kinds = self.partial.entries if self.partial.tokens else []
        parts = {token for token, kind in zip(self.partial.tokens, kinds, strict=True) if kind == "part"}
        return {token: found for token, found in self.counts().items() if token not in parts}

    @torch.no_grad()
    def look_at_gradients(self) -> None:
        """Record the norm of the present gradients, if this step is to be logged; call it on every process."""
        if not self.sampling:
            return
        found = [self._gradient_norm(table) for table in self.partial.trained_tables().values()]
        norms = [norm for norm in found if norm is not None]
        if norms:
            self._gradient = math.hypot(*norms)

    def values(self) -> dict[str, float]:
        """The values to be logged, see the class; those that are not known are left out."""
        found: dict[str, float] = {}
        if self._gradient is not None:
            found["grad_norm"] = self._gradient
        rows = self.partial.token_rows().tensors()
        for key, name in (("input_rows", "norm"), ("output_rows", "output_norm")):
            if key in rows:
                norms = rows[key].float().norm(dim=1)
                found[name] = norms.mean().item()
                old = self._old_norms.get(key)
                if old:
                    ranks = [bisect.bisect_left(old, norm) / len(old) for norm in norms.tolist()]
                    found[f"{name}_percentile"] = 100 * sum(ranks) / len(ranks)
        if self._watched:
            counts = self._asked_counts().values()
            found["unseen_inputs"] = sum(inputs == 0 for inputs, _ in counts)
            found["least_seen"] = min(inputs for inputs, _ in counts)
            if self._had_labels:
                found["unseen_labels"] = sum(labels == 0 for _, labels in counts)
        if self._leak is not None:
            found["leak"] = self._leak
        self._gradient = self._leak = None
        self._asked_head = False
        return found

    def end_of_epoch(self) -> None:
        """After the first epoch, warn of tokens that are not in the data, or are in it as other ids."""
        kept, self._kept = self._kept, None
        if kept is None or not self._watched:
            return
        counts = self._asked_counts()
        unseen = [token for token, (inputs, _) in counts.items() if not inputs]
        if unseen:
            logger.warning(
                "No batch of the first epoch has had %s, so their rows have not trained as inputs: %s.",
                f"{len(unseen)} of {len(counts)} tokens", shorten(unseen),
            )  # fmt: skip
        never = [token for token, (inputs, labels) in counts.items() if inputs and not labels]
        if never and self._had_labels:
            logger.warning(
                "No batch of the first epoch has had these tokens as labels, so the model does not learn to say them: "
                "%s. Does a mask of the labels, or of the prompt, hide them?",
                shorten(never),
            )
        if self.partial.tokens:
            sequences = [row for batch in kept for row in batch.reshape(-1, batch.shape[-1]).tolist()]
            split = split_elsewhere(
                self.partial.tokenizer,
                self.partial.tokens,
                self.partial.token_ids,
                sequences,
                self.partial.vocabulary_pieces(),
            )
            if split:
                logger.warning(
                    "The data has the text of these tokens as other ids, so it was tokenised before they were added "
                    "(or with another tokenizer): %s. Tokenise it again with partial.tokenizer.",
                    shorten([f"{token} ({number} times)" for token, number in split.items()]),
                )

    def _norms_of_old_rows(self) -> Any:
        new = set(self.partial.token_ids)
        for key, table in self.partial.trained_tables().items():
            if key not in ("input_rows", "output_rows") or table.sharded:
                continue  # a sharded table would have to be gathered
            step = max(1, table.size // _SAMPLED_NORMS)
            ids = [token_id for token_id in range(0, table.size, step) if token_id not in new]
            norms = table.rows(ids).float().norm(dim=1)
            yield key, sorted(norms[norms > 0].tolist())  # rows of zeros are padding or unused

    def _gradient_norm(self, table: Any) -> float | None:
        parameter, ids = self.partial.parameter_of(table), self.partial.token_ids
        if self.partial.strategy == "mask":
            return gradient_norm(parameter, table.shape, table.dim, ids)
        others = [size for dim, size in enumerate(table.shape) if dim != table.dim]
        return gradient_norm(parameter, (len(ids), *others))

    def _before(self, module: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        if not self._hooks or not module.training or torch.compiler.is_compiling():
            return
        ids = kwargs.get("input_ids", args[0] if args else None)
        labels = kwargs.get("labels")
        if isinstance(ids, Tensor) and not ids.is_floating_point():
            self._watched = True
            self._count(ids, self._inputs)
            if self._kept is not None and sum(batch.numel() for batch in self._kept) < _KEPT_IDS:
                self._kept.append(ids.detach())
        if isinstance(labels, Tensor) and not labels.is_floating_point():
            self._had_labels = True
            self._count(labels, self._targets)
            self._labels = labels if self.sampling else None

    def _count(self, ids: Tensor, counts: Tensor) -> None:
        flat = ids.detach().reshape(-1).to(self._ids.device)
        place = torch.searchsorted(self._ids, flat).clamp(max=len(self._ids) - 1)
        counts.scatter_add_(0, place, (self._ids[place] == flat).to(counts.dtype))

    def _keep_hidden(self, module: Any, args: object, output: Any) -> None:
        if self._hooks and self.sampling and not torch.compiler.is_compiling():
            hidden = getattr(output, "last_hidden_state", None)
            self._hidden = hidden.detach() if isinstance(hidden, Tensor) else None

    @torch.no_grad()
    def _after(self, module: Any, args: object, kwargs: dict[str, Any], output: Any) -> None:
        if not self._hooks:
            return
        hidden, labels = self._hidden, self._labels
        self._hidden = self._labels = None
        if not self.sampling or self._leak is not None or labels is None or not module.training:
            return
        model = self.partial.model
        causal = not model.config.is_encoder_decoder and bool(getattr(model, "can_generate", lambda: False)())
        logits = output.get("logits") if hasattr(output, "get") else None
        # A tensor subclass: logits that a chunked loss has not computed.
        has_logits = type(logits) is Tensor
        states = logits if has_logits else hidden if causal else None
        if states is None or states.dim() != 3 or states.shape[:2] != labels.shape:
            return
        if not has_logits:  # a fused loss: the head computes those of the sample
            if self._asked_head or not _can_be_asked(model.get_output_embeddings()):
                return
            self._asked_head = True
        sample = states.reshape(-1, states.shape[-1])[:1]
        if causal:
            states, labels = states[:, :-1], labels[:, 1:]
        is_new = torch.isin(labels, self._ids.to(labels.device))
        positions = ((labels != -100) & ~is_new).reshape(-1).nonzero().flatten()
        if len(positions):
            positions = positions[:: -(-len(positions) // _SAMPLED_POSITIONS)]
            sample = states.reshape(-1, states.shape[-1])[positions]
        # A sharded head has to run on all processes, at the same forward: a process without such a position gives
        # it any other one.
        logits = sample if has_logits else model.get_output_embeddings()(sample)
        if len(positions):
            self._leak = leak(logits, labels.reshape(-1)[positions], self.partial.token_ids)


def _can_be_asked(head: Any) -> bool:
    """Whether the head can be called outside of the model's forward: not if FSDP2 gathers it in another's group."""
    return not is_dtensor(head._parameters["weight"]) or hasattr(head, "unshard")


def split_elsewhere(
    tokenizer: Any,
    tokens: Sequence[str],
    ids: Sequence[int],
    sequences: Sequence[Sequence[int]],
    pieces: Sequence[Sequence[int]] | None = None,
) -> dict[str, int]:
    """How often the text of tokens is in tokenised data as other ids than theirs.

    Args:
        tokenizer: the tokenizer, which has the tokens.
        tokens: the tokens' texts.
        ids: their ids.
        sequences: ids of the data.
        pieces: for each token the ids that it is made of, which are looked for; empty for an added token, whose text
            is looked for in the decoded data.

    Returns:
        `dict[str, int]`: the number for each such token; an occurrence counts only where the present tokenizer reads
        the token there.
    """
    made_of = dict.fromkeys(ids, ()) if pieces is None else dict(zip(ids, map(tuple, pieces), strict=True))
    new = set(ids)
    segments: list[list[int]] = [[]]
    for sequence in sequences:
        for token_id in sequence:
            if token_id in new:
                segments.append([])
            else:
                segments[-1].append(token_id)
        segments.append([])
    segments = [segment for segment in segments if segment]
    windows: dict[int, list[str]] = {token_id: [] for token_id in ids}
    by_text = [token for token, token_id in zip(tokens, ids, strict=True) if not made_of[token_id]]
    if by_text:
        for text in tokenizer.batch_decode(segments):
            for token, token_id in zip(tokens, ids, strict=True):
                windows[token_id] += [
                    text[max(0, match.start() - 16) : match.end() + 16]
                    for match in (re.finditer(re.escape(token), text) if not made_of[token_id] else ())
                ]
    starts: dict[int, list[int]] = {}
    for token_id, parts in made_of.items():
        if parts:
            starts.setdefault(parts[0], []).append(token_id)
    for segment in segments:
        for at, first in enumerate(segment):
            for token_id in starts.get(first, ()):
                end = at + len(made_of[token_id])
                if tuple(segment[at:end]) == made_of[token_id]:
                    # The text around it decides whether its pieces are merged here.
                    windows[token_id].append(tokenizer.decode(segment[max(0, at - 8) : end + 8]))
    found: dict[str, int] = {}
    for token, token_id in zip(tokens, ids, strict=True):
        number = sum(token_id in read for read in encode_all(tokenizer, windows[token_id]))
        if number:
            found[token] = number
    return found
