"""Run the positions before a batch's first new token without an autograd graph.

In a causal model that is frozen apart from its token rows, the hidden states before the first new token of
a batch do not depend on any trainable input row. They are computed without a graph, their keys and values go
into the model's own cache, and the rest of the sequence runs with a graph on top of it. The head gets the hidden
states of all positions, so its rows have their gradient from the prefix, too.
"""

from __future__ import annotations

import inspect
import logging
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode
from transformers.utils.generic import ModelOutput

from ..attachment.additions import Addition
from ..errors import PartialEmbeddingError
from ..modules.rows import PartialModule

__all__ = ["FrozenPrefix"]

logger = logging.getLogger(__name__)

# A prefix that is a smaller part of the sequence does not pay for a second pass through the layers.
_WORTH = 1 / 16
_LARGEST_ERROR = {torch.float64: 1e-6, torch.float32: 1e-3, torch.bfloat16: 5e-2, torch.float16: 5e-3}
_TOKENS = ("input_ids", "attention_mask", "position_ids")
_CACHES = ("cache", "past_key_values")  # what `transformers` calls the cache, since 5.24 and before


class FrozenPrefix(Addition):
    """Builds no graph for the positions before a batch's first new token, while it is installed.

    The loss and the gradients are the same; the later the first new token comes, the more time and activation memory
    is saved. Before its first use it is tried out on a few tokens. If the model computes other hidden states or
    gradients in this way (it is not causal, has no cache, or uses dropout), or anything but token rows trains, the
    model runs as always, and one warning says so. A single batch runs as always if it has other inputs than token
    ids, a mask over them and consecutive positions, or asks for more than the last hidden states.

    Only steps that build a graph are changed; compiled models are not. Also a context manager.

    Args:
        model: a causal model with trainable rows under `strategy="split"`.

    Raises:
        `PartialEmbeddingError`: the model has no split input embeddings.
    """

    def __init__(self, model: nn.Module) -> None:
        super().__init__(model)
        embeddings: Any = getattr(model, "get_input_embeddings", lambda: None)()
        if not isinstance(embeddings, PartialModule) or "weight" not in embeddings._row_sources:
            raise PartialEmbeddingError(
                f"A frozen prefix needs input embeddings of which some rows train by strategy='split', but "
                f"{type(model).__name__} has {type(embeddings).__name__}. Attach the rows with add_tokens first."
            )
        self.embeddings = embeddings
        get_decoder = getattr(model, "get_decoder", None)
        self.backbone: Any = get_decoder() if get_decoder is not None else getattr(model, "base_model", model)
        self.reason: str | None = None  # why the model runs as always
        self._tried = False
        # Some models call their layers with positional arguments.
        parameters = list(inspect.signature(type(self.backbone).forward).parameters.values())[1:]
        self._names = [p.name for p in parameters if p.kind is inspect.Parameter.POSITIONAL_OR_KEYWORD]

    def _put_on(self) -> None:
        name = type(self.backbone).__name__
        if getattr(getattr(self.model, "config", None), "is_encoder_decoder", False):
            self._give_up("its encoder looks at all tokens at once")
        elif "forward" in self.backbone.__dict__ or self.backbone is self.model:
            self._give_up(f"its {name} has a forward that something else has put in its place, or is all there is")
        if self.reason:
            return
        self.backbone.__dict__["forward"] = self._forward

    def _take_off(self) -> None:
        if self.backbone.__dict__.get("forward") == self._forward:
            del self.backbone.__dict__["forward"]

    def _plain(self, *args: Any, **kwargs: Any) -> Any:
        return type(self.backbone).forward(self.backbone, *args, **kwargs)

    def _forward(self, *args: Any, **kwargs: Any) -> Any:
        named = {**dict(zip(self._names, args, strict=False)), **kwargs}
        length = self._prefix_length(named) if len(args) <= len(self._names) else 0
        if length and self._can(named["input_ids"]):
            output = self._in_two(length, named)
            if output is not None:
                return output
        return self._plain(*args, **kwargs)

    def _prefix_length(self, kwargs: dict[str, Any]) -> int:
        """How many positions come before the first new token; 0 where a batch is to run as always."""
        ids = kwargs.get("input_ids")
        if self.reason or torch.compiler.is_compiling() or not torch.is_grad_enabled():
            return 0
        if not isinstance(ids, Tensor) or ids.dim() != 2 or _asks_for_more(kwargs):
            return 0
        mask, positions = kwargs.get("attention_mask"), kwargs.get("position_ids")
        if mask is not None and (not isinstance(mask, Tensor) or mask.shape != ids.shape):
            return 0
        if positions is not None and (positions.dim() != 2 or not bool((positions.diff(dim=1) == 1).all())):
            return 0  # several texts in one sequence
        is_new, _ = self.embeddings._row_sources["weight"].lookup(ids)
        first = is_new.any(0).int().argmax() if is_new.any() else ids.shape[1]
        # The last position always has a graph, so that rows that do not occur get a gradient of zero, not None.
        length = min(int(first), ids.shape[1] - 1)
        return length if length >= _WORTH * ids.shape[1] else 0

    def _in_two(self, length: int, kwargs: dict[str, Any]) -> Any:
        """The output over all positions; `None` where it has more than can be concatenated."""
        parts: list[dict[str, Any]] = [dict(kwargs), dict(kwargs)]
        for name in _TOKENS:
            if kwargs.get(name) is not None:
                parts[0][name] = kwargs[name][:, :length]
                parts[1][name] = kwargs[name][:, length:]
        if kwargs.get("attention_mask") is not None:
            parts[1]["attention_mask"] = kwargs["attention_mask"]  # over the cache and what follows it
        with torch.no_grad():
            before = self._plain(**{**parts[0], "use_cache": True})
        name, cache = _cache_of(before)
        with _SharedMasks():
            after = self._plain(**{**parts[1], "use_cache": True, name: cache})
        if _others(before) or _others(after):
            return None
        after.last_hidden_state = torch.cat([before.last_hidden_state, after.last_hidden_state], 1)
        if kwargs.get("use_cache") is False:
            after[_cache_of(after)[0]] = None
        return after

    def _can(self, ids: Tensor) -> bool:
        others = self._other_parameters()
        if others:
            self._give_up(f"something else than token rows trains ({others})")
        elif not self._tried:
            self._tried = True
            try:
                # The training's random numbers are those of a run without this.
                with torch.random.fork_rng([ids.device] if ids.device.type == "cuda" else []):
                    self._try_out(ids.device)
            except Exception as error:  # noqa: BLE001 whatever goes wrong, the plain way is there
                self._give_up(f"it cannot run in two parts: {type(error).__name__}: {error}")
        return not self.reason

    def _other_parameters(self) -> str:
        """Names of parameters that train beside token rows, or that are sharded."""
        rows = {
            id(parameter)
            for module in self.model.modules()
            if isinstance(module, PartialModule) and "new_rows" in module._modules
            for parameter in module.new_rows.parameters()
        }
        names = [name for name, p in self.model.named_parameters() if p.requires_grad and id(p) not in rows]
        sharded = [name for name, p in self.model.named_parameters() if hasattr(p, "full_tensor") or not p.numel()]
        return ", ".join((names + [f"{name}, sharded" for name in sharded])[:3])

    def _try_out(self, device: torch.device) -> None:
        """Compare both ways on a few tokens, in the mode that the model is in."""
        source = self.embeddings._row_sources["weight"]
        size, taken = source.index.base_size, source.index.row_of.keys() | {self.embeddings.padding_idx}
        old = [i for number in range(64) if (i := number * size // 64) not in taken][:6]
        new = source.index.ids[0]
        ids = torch.tensor([[*old[:4], new, *old[4:], new]], device=device)
        rows = [p for p in self.embeddings.new_rows.parameters() if p.requires_grad]
        found = []
        for output in (self._plain(input_ids=ids, use_cache=False), self._in_two(4, {"input_ids": ids})):
            if output is None:
                raise ValueError("it gives more than the last hidden states")
            hidden = output.last_hidden_state
            weights = torch.randn(hidden.shape, generator=torch.Generator().manual_seed(0)).to(hidden)
            found.append([hidden.detach(), *torch.autograd.grad((hidden * weights).sum(), rows)])
        for one, other in zip(*found, strict=True):
            error = float((one.double() - other.double()).norm() / one.double().norm())
            if not error <= _LARGEST_ERROR[found[0][0].dtype]:
                self._give_up(
                    f"in two parts it gives other hidden states or gradients (relative difference {error:.1g}): it "
                    "looks ahead, its cache is of another kind, or it drops activations at random"
                )
                return

    def _give_up(self, reason: str) -> None:
        self.reason = reason
        logger.warning(
            "%s runs with a graph for all positions, as without a frozen prefix: %s.",
            type(self.model).__name__,
            reason,
        )


class _SharedMasks(TorchFunctionMode):
    """Converts a boolean attention mask to a float one once for all layers.

    After a prefix attention needs an explicit mask. Given a boolean one, `scaled_dot_product_attention` converts it
    in every layer and keeps the result for the backward: for 1024 positions after 1024, 8 MiB a layer.
    """

    def __init__(self) -> None:
        super().__init__()
        self._masks: dict[tuple[Any, ...], tuple[Tensor, Tensor]] = {}

    def __torch_function__(self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        mask = kwargs.get("attn_mask") if func is F.scaled_dot_product_attention else None
        if mask is not None and mask.dtype is torch.bool:
            dtype = args[0].dtype
            key = (mask.data_ptr(), mask.shape, mask.stride(), dtype)
            if key not in self._masks:
                numeric = torch.zeros(mask.shape, dtype=dtype, device=mask.device)
                # The mask is kept, too, so that no other one gets its address in the meantime.
                self._masks[key] = mask, numeric.masked_fill_(~mask, -torch.inf)
            kwargs = {**kwargs, "attn_mask": self._masks[key][1]}
        return func(*args, **kwargs)


def _asks_for_more(kwargs: dict[str, Any]) -> bool:
    """Whether there are inputs that cannot be split along the sequence, or outputs that cannot be concatenated."""
    for name, value in kwargs.items():
        if name in (*_TOKENS, "use_cache", "labels") or value is None:
            continue
        is_number = isinstance(value, (int, float, str)) or (isinstance(value, Tensor) and not value.dim())
        if not is_number or (name.startswith("output_") and value) or (name == "return_dict" and not value):
            return True
    return False


def _cache_of(output: Any) -> tuple[str, Any]:
    for name in _CACHES:
        cache = getattr(output, name, None)
        if cache is not None:
            return name, cache
    raise ValueError("it has no cache")


def _others(output: ModelOutput) -> list[str]:
    return [name for name in output if name not in ("last_hidden_state", *_CACHES)]
