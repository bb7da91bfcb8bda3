"""Running a model on snippets of text, up to a layer or to the head, and leaving it unchanged."""

from __future__ import annotations

import copy
import inspect
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from transformers import DynamicCache

from ..errors import PartialEmbeddingError

__all__ = ["CACHES", "LARGEST_ERROR", "Before", "Runner", "decoder_layers", "undisturbed"]


CACHES = ("cache", "past_key_values")  # what `transformers` calls keys and values, since 5.24 and before

# Relative difference within which a text run in two parts, on its first part's cache, is the same as run whole.
LARGEST_ERROR = {torch.float64: 1e-6, torch.float32: 1e-3, torch.bfloat16: 5e-2, torch.float16: 5e-3}


class _Reached(Exception):
    """Carries the output of a layer out of the forward, which it ends."""

    def __init__(self, value: Tensor) -> None:
        self.value = value


def decoder_layers(model: Any) -> list[nn.Module]:
    """The blocks of a causal model, first to last, found by structure: the list of modules that is as long
    as the config says, or else has the most parameters.

    Raises:
        `PartialEmbeddingError`: an encoder-decoder, or no such list.
    """
    config = model.config
    if getattr(config, "is_encoder_decoder", False):
        raise PartialEmbeddingError(
            f"{type(model).__name__} is an encoder-decoder, and only causal models can be distilled. Use "
            "init='subtoken_mean'."
        )
    text_config = config.get_text_config() if hasattr(config, "get_text_config") else config
    wanted = getattr(text_config, "num_hidden_layers", None)
    lists = [module for module in model.modules() if isinstance(module, nn.ModuleList) and len(module)]
    lists = [layers for layers in lists if len(layers) == wanted] or lists
    sizes = [sum(parameter.numel() for parameter in layers.parameters()) for layers in lists]
    if not any(sizes):
        raise PartialEmbeddingError(
            f"{type(model).__name__} has no list of layers (nn.ModuleList) whose hidden states could be matched. Use "
            "init='subtoken_mean'."
        )
    return list(lists[sizes.index(max(sizes))])


@contextmanager
def undisturbed(model: nn.Module) -> Iterator[None]:
    """Evaluation mode and no gradients of the model's own parameters; afterwards all flags are as they were before."""
    training = [module for module in model.modules() if module.training]
    learning = [parameter for parameter in model.parameters() if parameter.requires_grad]
    try:
        for module in training:
            module.training = False
        for parameter in learning:
            parameter.requires_grad_(False)
        yield
    finally:
        for module in training:
            module.training = True
        for parameter in learning:
            parameter.requires_grad_(True)


class Runner:
    """Runs a causal model over sequences of ids, in which new rows may stand for ids that do not exist yet.

    A forward hook puts the rows into the output of the embedding module, so that everything behind it (position
    embeddings, projections, further tables) runs as always. The module itself may only scale its rows, as Gemma's
    does.

    Args:
        model: the model, inside of `undisturbed`.
        table (`torch.Tensor` of shape `(V, d)`, *optional*): its input embeddings; needed for new rows.

    Raises:
        `PartialEmbeddingError`: the embedding module does more than scale its rows.
    """

    def __init__(self, model: Any, table: Tensor | None = None) -> None:
        self.model = model
        self.embeddings: nn.Module = model.get_input_embeddings()
        self.device = next(self.embeddings.parameters()).device
        self.scale = 1.0 if table is None else self._scale(table)
        parameters = inspect.signature(model.forward).parameters
        open_ended = any(parameter.kind is parameter.VAR_KEYWORD for parameter in parameters.values())
        self.cache_name = next((name for name in CACHES if name in parameters), None)
        self.options = {"use_cache": False} if open_ended or "use_cache" in parameters else {}
        self.takes_positions = "position_ids" in parameters

    @torch.no_grad()
    def _scale(self, table: Tensor) -> float:
        norms = table[: min(len(table), 1024)].float().norm(dim=1)
        ids = norms.topk(min(8, len(norms))).indices
        rows, seen = table[ids].float(), self.embeddings(ids).float()
        if seen.shape == rows.shape:
            scale: float = ((rows * seen).sum() / (rows * rows).sum()).item()
            if torch.allclose(seen, scale * rows, rtol=0.02, atol=0.02 * abs(scale) * rows.abs().max().item()):
                return scale
        raise PartialEmbeddingError(
            f"{type(self.embeddings).__name__} makes more of a row than a multiple of it, so new rows cannot be tried "
            "out before they are added. Use init='subtoken_mean'."
        )

    def new_cache(self) -> Before | None:
        """For the keys and values of what comes first; `None` where the model takes none."""
        return None if self.cache_name is None else Before(DynamicCache(config=self.model.config))

    def until(
        self,
        layer: nn.Module,
        sequences: Sequence[Sequence[int]],
        rows: Tensor | None = None,
        places: Sequence[tuple[int, int]] = (),
        cache: Before | None = None,
    ) -> Tensor:
        """The output of a layer; the layers behind it are not run.

        Args:
            layer: a module of the model.
            sequences: `B` lists of ids, padded on the right to the longest; on the left if `cache` is empty, so that
                what follows stands behind each.
            rows (`torch.Tensor` of shape `(K, d)`, *optional*): new rows; gradients reach them.
            places: for each sequence, if `rows` are given, the position of its new token and the index of its row.
            cache: keys and values of what comes before the sequences, if anything does; theirs are added.

        Returns:
            `torch.Tensor` of shape `(B, longest, d)`.
        """

        def stop(_: nn.Module, __: Any, out: Any) -> None:
            raise _Reached(out if isinstance(out, Tensor) else out[0])

        handle = layer.register_forward_hook(stop)
        try:
            self._forward(sequences, rows, places, cache)
        except _Reached as reached:
            return reached.value
        finally:
            handle.remove()
        raise PartialEmbeddingError(
            f"{type(self.model).__name__} does not run its layer {type(layer).__name__} for a text. Use "
            "init='subtoken_mean'."
        )

    def head(
        self, sequences: Sequence[Sequence[int]], positions: Sequence[Sequence[int]], cache: Before | None = None
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Run the whole model; the head only where it is asked for.

        Args:
            sequences: `B` lists of ids, padded as in `until`.
            positions: for each sequence where its states are wanted, `N` in all, counted with the padding.
            cache: takes the keys and values of the sequences, if it is given.

        Returns:
            The head's input `(N, d)`, its output, and the model's logits, both `(N, V)`.
        """
        rows = torch.tensor([row for row, at in enumerate(positions) for _ in at], device=self.device)
        columns = torch.tensor([column for at in positions for column in at], device=self.device)
        head = self.model.get_output_embeddings()
        seen: list[tuple[Tensor, Tensor]] = []

        def choose(_: nn.Module, args: tuple[Any, ...]) -> tuple[Any, ...]:
            return (args[0][rows, columns][None], *args[1:])

        handles = [
            head.register_forward_pre_hook(choose),
            head.register_forward_hook(lambda _, args, out: seen.append((args[0], out))),
        ]
        try:
            out = self._forward(sequences, None, (), cache)
        finally:
            for handle in handles:
                handle.remove()
        if len(seen) != 1 or seen[0][1].shape != out.logits.shape:
            raise PartialEmbeddingError(
                f"{type(self.model).__name__} does not make its logits of one call of its head. Use "
                "init='subtoken_mean'."
            )
        (states, raw), logits = seen[0], out.logits
        return states[0], raw[0], logits[0]

    def _forward(
        self,
        sequences: Sequence[Sequence[int]],
        rows: Tensor | None,
        places: Sequence[tuple[int, int]],
        cache: Before | None = None,
    ) -> Any:
        longest = max(map(len, sequences))
        padding = [longest - len(ids) for ids in sequences]
        first = cache is not None and cache.mask is None
        made = [[ids[-1]] * pad + [*ids] if first else [*ids] + [ids[-1]] * pad
                for ids, pad in zip(sequences, padding, strict=True)]  # fmt: skip
        ids = torch.tensor(made, device=self.device)
        columns = torch.arange(longest, device=self.device)
        pads = torch.tensor(padding, device=self.device)[:, None]
        mask = (columns >= pads if first else columns < longest - pads).long()
        options: dict[str, Any] = dict(self.options)
        if cache is not None and self.cache_name is not None:
            if cache.mask is None:
                cache.mask = mask
            else:
                mask = torch.cat([cache.mask, mask], 1)
            options |= {"use_cache": True, self.cache_name: cache.cache}
            if self.takes_positions and not cache.mask.all():
                options["position_ids"] = (mask.cumsum(1) - 1).clamp(min=0)[:, -longest:]
        handle = None
        if rows is not None:
            at = torch.tensor([position for position, _ in places], device=self.device)
            which = torch.tensor([row for _, row in places], device=self.device)
            new = torch.arange(longest, device=self.device) == at[:, None]
            handle = self.embeddings.register_forward_hook(self._replace(new, rows[which] * self.scale))
        try:
            # The kernels that save memory on long texts are several times slower on these short ones in bfloat16.
            with sdpa_kernel(SDPBackend.MATH):
                return self.model(input_ids=ids, attention_mask=mask, **options)
        finally:
            if handle is not None:
                handle.remove()

    @staticmethod
    def _replace(new: Tensor, rows: Tensor) -> Callable[[nn.Module, Any, Tensor], Tensor]:
        def replace(_: nn.Module, __: Any, out: Tensor) -> Tensor:
            # Leave other calls of the module alone, whose ids are not those of the text.
            if out.shape[:2] != new.shape:
                return out
            return torch.where(new[..., None], rows[:, None].to(out.dtype), out)

        return replace


def _cache_of(output: Any) -> Any:
    return next((cache for name in CACHES if (cache := getattr(output, name, None)) is not None), None)


@dataclass
class Before:
    """Keys and values of what comes before some sequences.

    Attributes:
        cache: of `transformers`, to which a forward adds.
        mask (`torch.Tensor` of shape `(B, P)`, *optional*): 1 for an id, 0 for padding; `None` while it is empty.
    """

    cache: Any
    mask: Tensor | None = None

    def branch(self, depth: int | None = None) -> Before:
        """One to which a forward adds without changing this one, whose tensors stay where they are.

        Args:
            depth: how many layers of the model it is for, the first ones; all if not given.
        """
        made = copy.copy(self.cache)
        # A layer puts new tensors in place of its old ones.
        made.layers = [copy.copy(layer) for layer in self.cache.layers]
        for layer in made.layers[len(made.layers) if depth is None else depth :]:
            layer.reset()
        return Before(made, self.mask)
