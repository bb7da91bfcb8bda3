"""Run the positions before a batch's first new token without an autograd graph.

In a causal model that is frozen apart from its token rows, the hidden states before the first new token of
a batch do not depend on any trainable input row. They are computed without a graph, their keys and values go
into the model's own cache, and the rest of the sequence runs with a graph on top of it. The head gets the hidden
states of all positions, so its rows have their gradient from the prefix, too. With a `ChunkedLoss` on the same model
only what the rows need is computed there: see `FrozenPositions`.

With a `PrefixCache` they are kept from one epoch to the next, for each text up to its own first new token: then only
texts that have no entry are computed.
"""

from __future__ import annotations

import hashlib
import inspect
import logging
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from transformers.cache_utils import DynamicCache
from transformers.utils.generic import ModelOutput

from ..attachment.additions import Addition
from ..errors import PartialEmbeddingError
from ..initializers.running import CACHES, LARGEST_ERROR
from ..modules.rows import PartialModule
from .frozen_positions import FrozenPositions
from .masked_attention import MaskedAttention
from .prefix_cache import PrefixCache

__all__ = ["FrozenPrefix"]

logger = logging.getLogger(__name__)

# A prefix that is a smaller part of the sequence does not pay for a second pass through the layers.
_WORTH = 1 / 16
_TOKENS = ("input_ids", "attention_mask", "position_ids")
# What a model may be given that its hidden states do not depend on.
_HARMLESS = ("labels", "num_items_in_batch", "use_cache")


class FrozenPrefix(Addition):
    """Builds no graph for the positions before a batch's first new token, while it is installed.

    The loss and the gradients are the same; the later the first new token comes, the more time and activation memory
    is saved. Before its first use it is tried out on a few tokens. If the model computes other hidden states or
    gradients in this way (it is not causal, has no cache, or uses dropout), or anything but token rows trains, the
    model runs as always, and one warning says so. A single batch runs as always if it has other inputs than token
    ids, a mask over them and consecutive positions, or asks for more than the last hidden states.

    With a cache, a text's prefix is computed once, up to its own first new token, and read from then on; a batch
    asks for as much of it as comes before the first new token of the whole batch. The cache is emptied when this is
    installed or removed, and when frozen weights, autocast or the model's mode have changed since.

    Only steps that build a graph are changed; compiled models are not. Also a context manager.

    Args:
        model: a causal model with trainable rows under `strategy="split"`.
        cache (`PrefixCache`, *optional*): keeps keys, values and hidden states for the next epochs.

    Raises:
        `PartialEmbeddingError`: the model has no split input embeddings.
    """

    def __init__(self, model: nn.Module, cache: PrefixCache | None = None) -> None:
        super().__init__(model)
        self.cache = cache
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
        self.positions: FrozenPositions | None = None  # without a graph in the latest forward, while `noted`
        self.noted = False
        self._tried: set[bool] = set()  # in which modes
        self._weights: Any = None  # as they were when the cache's entries were made
        self._frequencies: Any = None
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
        if self.cache is not None:
            self.cache.clear()

    def _take_off(self) -> None:
        if self.cache is not None:
            self.cache.clear()
        if self.backbone.__dict__.get("forward") == self._forward:
            del self.backbone.__dict__["forward"]

    def _plain(self, *args: Any, **kwargs: Any) -> Any:
        return type(self.backbone).forward(self.backbone, *args, **kwargs)

    def _forward(self, *args: Any, **kwargs: Any) -> Any:
        named = {**dict(zip(self._names, args, strict=False)), **kwargs}
        length = self._prefix_length(named) if len(args) <= len(self._names) else 0
        possible = length and self._can(named["input_ids"])
        self.positions = None  # those of an earlier forward, or of the trial
        if possible:
            if self.cache is not None and (weights := self._frozen_weights()) != self._weights:
                self.cache.clear()
                self._weights = weights
            output = self._in_two(length, named, self.cache)
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

    def _in_two(self, length: int, kwargs: dict[str, Any], kept: PrefixCache | None = None) -> Any:
        """The output over all positions; `None` where it has more than can be concatenated."""
        parts: list[dict[str, Any]] = [dict(kwargs), dict(kwargs)]
        for name in _TOKENS:
            if kwargs.get(name) is not None:
                parts[0][name] = kwargs[name][:, :length]
                parts[1][name] = kwargs[name][:, length:]
        if kwargs.get("attention_mask") is not None:
            parts[1]["attention_mask"] = kwargs["attention_mask"]  # over the cache and what follows it
        keys: list[bytes | None] = [None] * len(kwargs["input_ids"])
        with torch.no_grad():
            if kept is None:
                before = self._plain(**{**parts[0], "use_cache": True})
                name, cache = _cache_of(before)
                hidden, more = before.last_hidden_state, _others(before)
                frequencies = self._buffers()
            else:
                name = next(name for name in CACHES if name in self._names)
                hidden, cache, frequencies, keys = self._from_cache(length, kwargs, kept, name)
                more = []
        with MaskedAttention():
            after = self._plain(**{**parts[1], "use_cache": True, name: cache})
        if more or _others(after):
            return None
        if frequencies != self._buffers():
            self._give_up("its buffers depend on how long the input is (dynamic rotary frequencies)")
            return None
        if self.noted:
            self.positions = FrozenPositions(hidden, keys, kept)
        after.last_hidden_state = torch.cat([hidden, after.last_hidden_state], 1)
        if kwargs.get("use_cache") is False:
            after[_cache_of(after)[0]] = None
        return after

    def _from_cache(
        self, length: int, kwargs: dict[str, Any], kept: PrefixCache, name: str
    ) -> tuple[Tensor, DynamicCache, Any, list[bytes | None]]:
        """Hidden states and keys and values of the first `length` positions, read where that is possible.

        And the entries' keys; `None` for a text that has none.
        """
        texts = self._texts(kwargs)
        missing = [row for row, text in enumerate(texts) if not kept.covers(text.key, text.inputs[:length])]
        tensors: list[Tensor] = []  # of the whole batch, positions first: hidden states, then keys, values, keys, ...
        if missing:
            # All that comes before a text's first new token, since the next batch may ask for more of it.
            wanted = [texts[row].own for row in missing if kept.has_room(texts[row].own)]
            computed = self._compute(missing, max([length, *wanted]), kwargs, kept, name)
            for number, row in enumerate(missing):
                text = texts[row]
                until = min(max(length, text.own), len(computed[0]))
                kept.keep(text.key, text.inputs[:until], [tensor[:until, number] for tensor in computed])
            if len(missing) == len(texts):
                tensors = [tensor[:length] for tensor in computed]
            else:
                tensors = [tensor.new_empty(length, len(texts), *tensor.shape[2:]) for tensor in computed]
                for tensor, one in zip(tensors, computed, strict=True):
                    tensor[:, missing] = one[:length]
        for row in sorted(set(range(len(texts))) - set(missing)):
            tensors = tensors or kept.like(texts[row].key, length, len(texts))
            kept.read_into(texts[row].key, [tensor[:, row] for tensor in tensors])
        cache = DynamicCache()
        for layer, (keys, values) in enumerate(zip(tensors[1::2], tensors[2::2], strict=True)):
            cache.update(keys.movedim(0, -2), values.movedim(0, -2), layer)
        keys_here = [text.key if kept.covers(text.key, text.inputs[:length]) else None for text in texts]
        return tensors[0].transpose(0, 1), cache, self._frequencies, keys_here

    def _compute(
        self, rows: list[int], positions: int, kwargs: dict[str, Any], kept: PrefixCache, name: str
    ) -> list[Tensor]:
        """Hidden states, keys and values of some texts of a batch, each `(positions, texts, ...)`."""
        inputs = {**kwargs, "use_cache": True, name: DynamicCache()}  # all layers keep all positions there
        for token in _TOKENS:
            if (values := kwargs.get(token)) is not None:
                inputs[token] = (values if len(values) == 1 else values[rows])[:, :positions]
        device = kwargs["input_ids"].device
        random = _random_state(device)
        output = self._plain(**inputs)
        if _others(output):
            raise ValueError("it gives more than the last hidden states")
        if not all(map(torch.equal, random, _random_state(device))):
            kept.close("the model draws random numbers in a pass")
        found = self._buffers()
        if not len(kept):
            self._frequencies = found
        elif found != self._frequencies:
            self._frequencies = None  # unlike those after any pass
        cache = _cache_of(output)[1]
        tensors = [output.last_hidden_state.transpose(0, 1)]
        for layer in cache.layers:
            tensors += [layer.keys.movedim(-2, 0), layer.values.movedim(-2, 0)]
        return tensors

    def _texts(self, kwargs: dict[str, Any]) -> list[_Text]:
        """The texts of a batch."""
        ids = kwargs["input_ids"]
        given = [kwargs.get(name) for name in _TOKENS]
        inputs = torch.stack([ids if values is None else values.expand_as(ids) for values in given], -1)
        inputs = inputs.double().cpu()  # which holds ids, positions and any mask exactly
        is_new = self.embeddings._row_sources["weight"].lookup(ids)[0].cpu()
        others = {name: value for name, value in kwargs.items() if name not in (*_TOKENS, *_HARMLESS)}
        settings = repr((sorted(others.items()), [values is not None for values in given])).encode()
        texts = []
        for row, new in zip(inputs, is_new, strict=True):
            # Without a new token a text is all its own, but for the padding after it, which is another in each batch.
            seen = row[:, 1] != 0 if given[1] is not None else torch.ones(len(row), dtype=torch.bool)
            own = int(new.int().argmax()) if new.any() else len(row) - int(seen.flip(0).int().argmax())
            key = hashlib.blake2b(row[:own].contiguous().numpy().tobytes() + settings, digest_size=16).digest()
            texts.append(_Text(key, row, own))
        return texts

    def _frozen_weights(self) -> Any:
        """What hidden states depend on beside inputs and buffers; it differs after any change in place.

        A table gets the rows' values at each save, past its version counter.
        """
        device = self.embeddings.raw_table("weight").device.type
        weights = [
            (parameter.data_ptr(), parameter._version)
            for module in self.backbone.modules()
            for parameter in module._parameters.values()
            if parameter is not None and not parameter.requires_grad
        ]
        autocast = torch.is_autocast_enabled(device) and torch.get_autocast_dtype(device)
        return autocast, self.backbone.training, weights

    def _buffers(self) -> list[list[float]]:
        """Values of small buffers: a rotary embedding may change its frequencies with the length of the input."""
        return [b.flatten().tolist() for b in self.backbone.buffers() if b.is_floating_point() and b.numel() <= 4096]

    def _can(self, ids: Tensor) -> bool:
        others = self._other_parameters()
        if others:
            self._give_up(f"something else than token rows trains ({others})")
        elif self.backbone.training not in self._tried:
            self._tried.add(self.backbone.training)
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
        ids = torch.tensor([[*old[:4], new, *old[4:], new], [*reversed(old), new, new]], device=device)
        plain = self._tried_on(self._plain(input_ids=ids, use_cache=False))
        error = _difference(self._tried_on(self._in_two(4, {"input_ids": ids})), plain)
        if error:
            self._give_up(
                f"in two parts it gives other hidden states or gradients (relative difference {error:.1g}): it "
                "looks ahead, its cache is of another kind, or it drops activations at random"
            )
        elif self.cache is not None:
            try:
                kept = PrefixCache()
                kept.silent = True
                self._in_two(4, {"input_ids": ids.flip(0)}, kept)  # other batches than those that are read
                error = _difference(self._tried_on(self._in_two(4, {"input_ids": ids}, kept)), plain)
                reason = f"with them it gives other hidden states or gradients (relative difference {error:.1g})"
                if kept.closed:
                    error, reason = 1.0, kept.closed
            except Exception as problem:  # noqa: BLE001 whatever goes wrong, there is a way without a cache
                error, reason = 1.0, f"{type(problem).__name__}: {problem}"
            if error:
                self.cache = None
                logger.warning("Keys and values of %s are not kept: %s.", type(self.model).__name__, reason)

    def _tried_on(self, output: Any) -> list[Tensor]:
        """Hidden states, and gradients of the rows."""
        if output is None:
            raise ValueError("it gives more than the last hidden states")
        hidden = output.last_hidden_state
        weights = torch.randn(hidden.shape, generator=torch.Generator().manual_seed(0)).to(hidden)
        rows = [parameter for parameter in self.embeddings.new_rows.parameters() if parameter.requires_grad]
        return [hidden.detach(), *torch.autograd.grad((hidden * weights).sum(), rows)]

    def _give_up(self, reason: str) -> None:
        self.reason = reason
        logger.warning(
            "%s runs with a graph for all positions, as without a frozen prefix: %s.",
            type(self.model).__name__,
            reason,
        )


class _Text(NamedTuple):
    """A row of a batch: what it is found by, its inputs `(positions, inputs)`, how many come before a new token."""

    key: bytes
    inputs: Tensor
    own: int


def _difference(found: list[Tensor], expected: list[Tensor]) -> float:
    """The largest relative difference, or 0 where it is within rounding."""
    errors = [
        float((a.double() - b.double()).norm() / b.double().norm()) for a, b in zip(found, expected, strict=True)
    ]
    beyond = [error for error in errors if not error <= LARGEST_ERROR[expected[0].dtype]]
    return beyond[0] if beyond else 0.0


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
    for name in CACHES:
        cache = getattr(output, name, None)
        if cache is not None:
            return name, cache
    raise ValueError("it has no cache")


def _others(output: ModelOutput) -> list[str]:
    return [name for name in output if name not in ("last_hidden_state", *CACHES)]


def _random_state(device: torch.device) -> list[Tensor]:
    return [torch.get_rng_state(), *([torch.cuda.get_rng_state(device)] if device.type == "cuda" else [])]
