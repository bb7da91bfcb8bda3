"""Tables whose parameter does not hold their values: quantised ones, and ones that accelerate has offloaded.

Rows can only be added to an ordinary tensor. So while rows are attached, a quantised table is replaced by its
dequantised values, and an offloaded one stays on its execution device.
"""

from __future__ import annotations

import copy
import importlib
from collections.abc import Iterable, Iterator
from typing import Any

import torch
from torch import Tensor, nn

from ..modules.sharding import is_dtensor

__all__ = ["PlainTables", "is_plain", "is_quantized", "logical_shape", "offloaded_value", "plain_value", "tensor_of"]

_BITSANDBYTES = ("Params4bit", "Int8Params")


def is_plain(tensor: Tensor) -> bool:
    """Whether the tensor itself holds its values, or is a DTensor."""
    return (type(tensor) in (nn.Parameter, Tensor) or is_dtensor(tensor)) and not tensor.is_meta


def is_quantized(tensor: Tensor) -> bool:
    """Whether a tensor is quantised: of bitsandbytes, or of a class with a `dequantize` of its own (torchao)."""
    cls = type(tensor)
    own = cls.__mro__[: cls.__mro__.index(Tensor)] if cls is not Tensor else ()
    return cls.__name__ in _BITSANDBYTES or any("dequantize" in vars(base) for base in own)


def tensor_of(module: nn.Module, attribute: str) -> Any:
    """A parameter or buffer itself, past properties that the class has for the attribute."""
    return {**module._buffers, **module._parameters}[attribute]


def logical_shape(module: nn.Module, attribute: str) -> tuple[int, ...]:
    """The dequantised shape of a parameter or buffer; bitsandbytes packs two 4-bit numbers into a byte."""
    tensor = tensor_of(module, attribute)
    if tensor is None:
        return ()
    if type(tensor).__name__ == "Params4bit" and attribute == "weight":
        if isinstance(module, nn.Embedding):
            return module.num_embeddings, module.embedding_dim
        if isinstance(module, nn.Linear):
            return module.out_features, module.in_features
    return tuple(tensor.shape)


def offloaded_value(module: nn.Module, attribute: str) -> Tensor | None:
    """The value of a parameter that accelerate has offloaded, on its execution device; `None` if it has not."""
    for hook in _hooks(module):
        weights = getattr(hook, "weights_map", None)
        if getattr(hook, "offload", False) and weights is not None and attribute in weights:
            device = hook.execution_device
            value: Tensor = weights[attribute].to(device if device is not None else "cpu")
            return value
    return None


def plain_value(module: nn.Module, attribute: str, dtype: torch.dtype | None = None) -> Tensor:
    """The values of a parameter or buffer as an ordinary tensor: loaded, dequantised, or itself if it is one.

    Args:
        module, attribute: where it is.
        dtype: of dequantised values; what `dequantize` gives if not given.
    """
    tensor = tensor_of(module, attribute)
    if tensor.is_meta and (value := offloaded_value(module, attribute)) is not None:
        tensor = value
    if type(tensor).__name__ in _BITSANDBYTES:
        integration: Any = importlib.import_module("transformers.integrations.bitsandbytes")
        module.state_dict()  # undoes the packing of a forward on a CPU
        tensor = integration.dequantize_bnb_weight(tensor, getattr(module, "state", None))
    elif is_quantized(tensor):
        tensor = tensor.dequantize()
    else:
        dtype = tensor.dtype
    values: Tensor = tensor.detach()
    return values.to(dtype or values.dtype)


class PlainTables:
    """Replace quantised and offloaded tables by ordinary ones. A step of an attachment, see `steps`.

    Args:
        model: whose quantisation config is told of them.
        holders: for each table the modules that have it, with the attribute's name.
    """

    lasts = True

    def __init__(self, model: Any, holders: Iterable[list[tuple[nn.Module, str]]]) -> None:
        self._model = model
        self._holders = list(holders)
        self._undo: list[tuple[Any, str, str, Any]] = []
        self._classes: list[tuple[nn.Module, type[nn.Module]]] = []

    def do(self) -> None:
        """Replace the tables."""
        for places in self._holders:
            self._replace(self._model, places)

    def _replace(self, model: Any, places: list[tuple[nn.Module, str]]) -> None:
        module, attribute = places[0]
        tensor = module._parameters.get(attribute)
        if tensor is None or is_plain(tensor):
            return
        elsewhere = offloaded_value(module, attribute)
        quantized = is_quantized(tensor if elsewhere is None else elsewhere)
        value = plain_value(module, attribute, _compute_dtype(model) if quantized else None)
        plain = nn.Parameter(value.clone(), requires_grad=False)
        for holder, name in places:
            self._set(holder, "_parameters", name, plain)
            hook = holder.__dict__.get("_hf_hook")
            if hook is not None and any(getattr(part, "offload", False) for part in _hooks(holder)):
                self._set(holder, "__dict__", "_hf_hook", _staying(hook))
            if quantized:
                self._classes.append((holder, type(holder)))
                holder.__class__ = nn.Embedding if isinstance(holder, nn.Embedding) else nn.Linear
                self._keep_plain(model, holder)

    def _keep_plain(self, model: Any, module: nn.Module) -> None:
        """List the module as not quantised in the quantisation config, so that a checkpoint loads as it was saved."""
        name = next(name for name, child in model.named_modules() if child is module)
        settings = getattr(model.config, "quantization_config", None)
        for key in ("llm_int8_skip_modules", "modules_to_not_convert"):
            if key in getattr(settings, "__dict__", {}):
                base: Any = importlib.import_module("transformers.quantizers.base")
                skipped = settings.__dict__[key]
                listed = base.get_keys_to_not_convert(model) if skipped is None else skipped
                self._set(settings, "__dict__", key, [*listed, name])
        if getattr(settings, "include_input_output_embeddings", False):
            self._set(settings, "__dict__", "include_input_output_embeddings", False)

    def _set(self, owner: Any, members: str, name: str, value: Any) -> None:
        held = getattr(owner, members)
        self._undo.append((owner, members, name, held[name]))
        held[name] = value

    def undo(self) -> None:
        """Restore the tables, classes, hooks and settings."""
        while self._classes:
            module, cls = self._classes[-1]
            module.__class__ = cls
            self._classes.pop()
        while self._undo:
            owner, members, name, value = self._undo[-1]
            getattr(owner, members)[name] = value
            self._undo.pop()


def _hooks(module: nn.Module) -> Iterator[Any]:
    """Accelerate's hooks of a module; a `SequentialHook` has several."""
    hook = module.__dict__.get("_hf_hook")
    if hook is not None:
        yield from getattr(hook, "hooks", (hook,))


def _staying(hook: Any) -> Any:
    """A copy of accelerate's hook that moves inputs to the device, and leaves weights where they are."""
    made = copy.copy(hook)
    if hasattr(made, "hooks"):
        made.hooks = tuple(_staying(part) for part in made.hooks)
    elif getattr(made, "offload", False):
        made.offload, made.weights_map = False, None
    return made


def _compute_dtype(model: nn.Module) -> torch.dtype:
    floating = (p.dtype for p in model.parameters() if p.is_floating_point() and not is_quantized(p))
    return next(floating, torch.get_default_dtype())
