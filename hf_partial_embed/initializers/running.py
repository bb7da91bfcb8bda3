"""Running a model on snippets of text, as far as is needed and without leaving a trace on it."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from ..errors import PartialEmbeddingError

__all__ = ["Runner", "decoder_layers", "undisturbed"]


class _Reached(Exception):
    """Carries what a layer put out, and ends the forward there."""

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
    """No dropout and no gradient of the model's own parameters inside; all flags as they were afterwards."""
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

    The rows are put in behind the embedding module, so whatever follows it (position embeddings,
    projections, tables of its own over the ids) is the model's business. What the module itself makes of
    a row must be a multiple of it, as in Gemma.

    Args:
        model: the model, inside of `undisturbed`.
        table (`torch.Tensor` of shape `(V, d)`, *optional*): its input embeddings; needed for new rows.

    Raises:
        `PartialEmbeddingError`: the embedding module does more than to scale its rows.
    """

    def __init__(self, model: Any, table: Tensor | None = None) -> None:
        self.model = model
        self.embeddings: nn.Module = model.get_input_embeddings()
        self.device = next(self.embeddings.parameters()).device
        self.scale = 1.0 if table is None else self._scale(table)
        parameters = inspect.signature(model.forward).parameters
        open_ended = any(parameter.kind is parameter.VAR_KEYWORD for parameter in parameters.values())
        self.options = {"use_cache": False} if open_ended or "use_cache" in parameters else {}

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

    def until(
        self,
        layer: nn.Module,
        sequences: Sequence[Sequence[int]],
        rows: Tensor | None = None,
        places: Sequence[tuple[int, int]] = (),
    ) -> Tensor:
        """What a layer puts out; the layers behind it are not run.

        Args:
            layer: a module of the model.
            sequences: `B` lists of ids, padded on the right to the longest.
            rows (`torch.Tensor` of shape `(K, d)`, *optional*): new rows; gradients reach them.
            places: for each sequence, if there are `rows`, the position of a new token and which row it has.

        Returns:
            `torch.Tensor` of shape `(B, longest, d)`.
        """

        def stop(_: nn.Module, __: Any, out: Any) -> None:
            raise _Reached(out if isinstance(out, Tensor) else out[0])

        handle = layer.register_forward_hook(stop)
        try:
            self._forward(sequences, rows, places)
        except _Reached as reached:
            return reached.value
        finally:
            handle.remove()
        raise PartialEmbeddingError(
            f"{type(self.model).__name__} does not run its layer {type(layer).__name__} for a text. Use "
            "init='subtoken_mean'."
        )

    def head(self, sequences: Sequence[Sequence[int]]) -> tuple[Tensor, Tensor, Tensor]:
        """A whole pass.

        Returns:
            What the head is given `(B, longest, d)`, what it makes of it, and the model's logits
            `(B, longest, V)`.
        """
        seen: list[tuple[Tensor, Tensor]] = []
        handle = self.model.get_output_embeddings().register_forward_hook(
            lambda _, args, out: seen.append((args[0], out))
        )
        try:
            out = self._forward(sequences, None, ())
        finally:
            handle.remove()
        if len(seen) != 1 or seen[0][1].shape != out.logits.shape:
            raise PartialEmbeddingError(
                f"{type(self.model).__name__} does not make its logits of one call of its head. Use "
                "init='subtoken_mean'."
            )
        return (*seen[0], out.logits)

    def _forward(
        self, sequences: Sequence[Sequence[int]], rows: Tensor | None, places: Sequence[tuple[int, int]]
    ) -> Any:
        longest = max(map(len, sequences))
        ids = torch.tensor([[*ids, *[ids[-1]] * (longest - len(ids))] for ids in sequences], device=self.device)
        mask = torch.tensor([[1] * len(ids) + [0] * (longest - len(ids)) for ids in sequences], device=self.device)
        handle = None
        if rows is not None:
            at = torch.tensor([position for position, _ in places], device=self.device)
            which = torch.tensor([row for _, row in places], device=self.device)
            new = torch.arange(longest, device=self.device) == at[:, None]
            handle = self.embeddings.register_forward_hook(self._replace(new, rows[which] * self.scale))
        try:
            return self.model(input_ids=ids, attention_mask=mask, **self.options)
        finally:
            if handle is not None:
                handle.remove()

    @staticmethod
    def _replace(new: Tensor, rows: Tensor) -> Callable[[nn.Module, Any, Tensor], Tensor]:
        def replace(_: nn.Module, __: Any, out: Tensor) -> Tensor:
            # Other calls (a table over other ids, a probe) are not those of the text.
            if out.shape[:2] != new.shape:
                return out
            return torch.where(new[..., None], rows[:, None].to(out.dtype), out)

        return replace
