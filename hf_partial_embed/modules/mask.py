"""Freezing rows of an ordinary `nn.Embedding` or `nn.Linear` by masking their gradient, in plain PyTorch.

The whole table stays one trainable parameter. A gradient of zero alone does not keep a row unchanged: weight
decay, momentum, and moments from steps before the mask move it, and optimizers such as Muon mix rows. So
`protect` writes the frozen rows back after each optimizer step.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.hooks import unserializable_hook

from ..errors import PartialEmbeddingError
from .rows import PartialModule
from .sharding import sharding_of
from .splitting import check_ids, check_module

__all__ = ["MaskHandle", "mask_gradients", "unwrap_optimizer"]


def mask_gradients(
    module: nn.Module,
    *,
    trainable_ids: Iterable[int] | None = None,
    frozen_ids: Iterable[int] | None = None,
) -> MaskHandle:
    """Make the gradient of frozen rows zero, with a hook on the parameter.

    Give either the rows that train or those that do not. The bias of an `nn.Linear` is masked with its weight.
    Frozen entries are set to zero, not multiplied by it, so infinite and NaN gradients are removed, too. Since
    the hook runs in the backward, gradient clipping sees the gradient of trainable rows only.

    Args:
        module (`nn.Embedding` or `nn.Linear`): of any network; its weight must require grad.
        trainable_ids: ids of the rows that train, in any order.
        frozen_ids: ids of the rows that do not, in any order.

    Returns:
        `MaskHandle`: call `handle.protect(optimizer)` before the first step, and `handle.remove()` to
        remove the mask.

    Raises:
        `PartialEmbeddingError`: not exactly one of the two sets of ids, ids out of range or repeated,
            a module of another kind, or a frozen or sharded weight.
    """
    if not isinstance(module, (nn.Embedding, nn.Linear)) or isinstance(module, PartialModule):
        raise PartialEmbeddingError(
            f"mask_gradients needs an nn.Embedding or nn.Linear, but got {type(module).__name__}."
        )
    check_module(module, nn.Embedding if isinstance(module, nn.Embedding) else nn.Linear, "mask_gradients")
    if (trainable_ids is None) == (frozen_ids is None):
        raise PartialEmbeddingError("mask_gradients needs exactly one of trainable_ids and frozen_ids.")
    size = module.weight.shape[0]
    if frozen_ids is not None:
        frozen = set(check_ids(frozen_ids, size))
        trainable_ids = [row for row in range(size) if row not in frozen]
    assert trainable_ids is not None
    ids = check_ids(trainable_ids, size)
    names = ["weight"] + (["bias"] if getattr(module, "bias", None) is not None else [])
    return MaskHandle(dict.fromkeys(names, module), ids).install()


class MaskHandle:
    """A gradient mask, active from `install` to `remove`; see `mask_gradients`.

    Args:
        tables: the module of each masked parameter, by the parameter's name.
        ids: the rows that train.
        dim: the dimension of the vocabulary in the parameters.

    Raises:
        `PartialEmbeddingError`: a parameter does not require grad, is sharded, or is not a plain `nn.Parameter`.
    """

    def __init__(self, tables: dict[str, nn.Module], ids: list[int], dim: int = 0) -> None:
        self._tables = dict(tables)
        self.ids = ids
        self._dim = dim
        self._masked: dict[str, tuple[nn.Parameter, Any]] = {}
        self._protected: list[Any] = []
        self._module_hooks: list[Any] = []
        for name in tables:
            parameter = self._parameter(name)
            if not parameter.requires_grad:
                raise PartialEmbeddingError(
                    f"The {name} of {type(tables[name]).__name__} does not require grad, so no row of it would "
                    "train. Call module.requires_grad_(True) first."
                )
            if type(parameter) is not nn.Parameter:
                raise PartialEmbeddingError(
                    f"The {name} of {type(tables[name]).__name__} is a {type(parameter).__name__}, whose rows "
                    "are not all here. A gradient mask cannot keep its frozen rows still: split it instead "
                    "(strategy='split')."
                )
            self._check_whole(name)

    def install(self) -> MaskHandle:
        """Register the hooks; the mask is active until `remove` is called."""
        self._hook_parameters()
        # The parameter may be replaced (deep copy, load_state_dict(assign=True)): the next forward hooks the new one.
        for module in {id(module): module for module in self._tables.values()}.values():
            self._module_hooks.append(module.register_forward_pre_hook(self._before_forward))
        return self

    def protect(self, optimizer: Any) -> None:
        """Keep the frozen rows unchanged under `optimizer`, whatever its update rule.

        Step hooks save them before each step and write them back after it, bit for bit, so weight decay,
        momentum and stale moments do not change them. This costs the memory of one more table;
        `SplitEmbedding` and `SplitLinear` do not need it.

        Args:
            optimizer (`torch.optim.Optimizer`): any optimizer, or a wrapper of one.

        Raises:
            `PartialEmbeddingError`: the optimizer does not hold the masked weight, or is not one.
        """
        inner = unwrap_optimizer(optimizer)
        if any(inner is protection.optimizer for protection in self._protected):
            return
        held = {id(parameter) for group in inner.param_groups for parameter in group["params"]}
        if not any(id(self._parameter(name)) in held for name in self._tables):
            raise PartialEmbeddingError(
                f"This {type(inner).__name__} does not hold the masked weight, so there is nothing to protect. "
                "Pass the optimizer that was made from the model's parameters. Where an engine (DeepSpeed ZeRO) steps "
                "on flattened parts of them instead, split the table (strategy='split')."
            )
        self._protected.append(_Protection(self, inner))
        self._protected[-1].begin()

    def remove(self) -> None:
        """Remove all hooks, of the mask and of its protection. Calling it twice does no harm."""
        for _, hook in self._masked.values():
            hook.remove()
        for hook in self._module_hooks:
            hook.remove()
        for protection in self._protected:
            protection.remove()
        self._masked, self._module_hooks, self._protected = {}, [], []

    def _parameter(self, name: str) -> nn.Parameter:
        parameter = self._tables[name]._parameters[name]
        assert parameter is not None
        return parameter

    def _ids_on(self, device: torch.device) -> Tensor:
        return torch.tensor(self.ids, device=device)

    def _hook_parameters(self) -> None:
        for name in self._tables:
            parameter = self._parameter(name)
            masked = self._masked.get(name)
            if masked is None or masked[0] is not parameter:
                if masked is not None:
                    masked[1].remove()
                self._masked[name] = (parameter, parameter.register_hook(self._mask))  # type: ignore[no-untyped-call]

    def _before_forward(self, module: nn.Module, args: object) -> None:
        if not torch.compiler.is_compiling():
            for name in self._tables:
                self._check_whole(name)
            self._hook_parameters()

    def _check_whole(self, name: str) -> None:
        module = self._tables[name]
        engine = sharding_of(module, self._parameter(name))
        if engine is not None:
            raise PartialEmbeddingError(
                f"The {name} of {type(module).__name__} is sharded by {engine}, whose optimizer steps on parts of it: "
                "a gradient mask cannot keep its frozen rows still there. Split it instead (strategy='split')."
            )

    @unserializable_hook  # type: ignore[untyped-decorator]
    def _mask(self, grad: Tensor) -> Tensor:
        if grad.is_sparse:
            grad = grad.coalesce()
            kept = torch.isin(grad.indices()[0], self._ids_on(grad.device))
            indices, values = grad.indices()[:, kept], grad.values()[kept]
            return torch.sparse_coo_tensor(indices, values, grad.shape, is_coalesced=True, check_invariants=True)
        ids = self._ids_on(grad.device)
        masked = torch.zeros_like(grad)
        return masked.index_copy_(self._dim, ids, grad.index_select(self._dim, ids))

    def __getstate__(self) -> dict[str, Any]:
        # A copied tensor has no hooks, and a protected optimizer holds the original's parameters: the copy starts
        # without either.
        return {**self.__dict__, "_masked": {}, "_protected": []}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state)


class _Protection:
    """The frozen rows of one mask under one optimizer."""

    def __init__(self, mask: MaskHandle, optimizer: Any) -> None:
        self.mask = mask
        self.optimizer = optimizer
        self._saved: dict[str, Tensor] = {}
        self._hooks: list[Any] = []

    def begin(self) -> None:
        """Register the step hooks."""
        self._hooks.append(self.optimizer.register_step_pre_hook(self._before_step))
        self._hooks.append(self.optimizer.register_step_post_hook(self._after_step))

    @torch.no_grad()
    def _before_step(self, *_: object) -> None:
        tables = self.mask._tables
        for name in tables:
            parameter = self.mask._parameter(name).detach()
            saved = self._saved.get(name)
            if saved is None or saved.shape != parameter.shape or saved.device != parameter.device:
                saved = self._saved[name] = torch.empty_like(parameter)
            saved.copy_(parameter)

    @torch.no_grad()
    def _after_step(self, *_: object) -> None:
        dim = self.mask._dim
        for name, saved in self._saved.items():
            parameter = self.mask._parameter(name)
            ids = self.mask._ids_on(parameter.device)
            saved.index_copy_(dim, ids, parameter.detach().index_select(dim, ids))
            parameter.copy_(saved)

    def remove(self) -> None:
        for hook in self._hooks:
            hook.remove()


def unwrap_optimizer(optimizer: Any) -> Any:
    """The `torch.optim.Optimizer` inside of a wrapper such as accelerate's.

    Raises:
        `PartialEmbeddingError`: it is not a `torch.optim.Optimizer`.
    """
    while hasattr(optimizer, "optimizer"):  # accelerate's wrapper is a torch.optim.Optimizer, without hooks
        optimizer = optimizer.optimizer
    if not isinstance(optimizer, torch.optim.Optimizer):
        raise PartialEmbeddingError(
            f"Cannot hook into the steps of {type(optimizer).__name__}: it is not a torch.optim.Optimizer. Use one "
            "that is."
        )
    return optimizer
