"""Find out how a vocabulary grows by the model's own `resize_token_embeddings`, on a copy on the meta device."""

from __future__ import annotations

import copy
import inspect
import itertools
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves

from ..errors import PartialEmbeddingError
from .storage import logical_shape, tensor_of
from .structure import Resizing, grown_dims, input_weight, members_of, named_counts, quiet, shapes_of

__all__ = ["REGISTRY", "resizing_by_itself"]

# The attribute of a model that holds its row sets; the copy is made without them.
REGISTRY = "_partial_embeddings"


def resizing_by_itself(model: Any, size: int) -> Resizing:
    """What grows in a model for a vocabulary of `size`, found by its own `resize_token_embeddings`.

    Raises:
        `PartialEmbeddingError`: it has no input embeddings, or does not grow all of its tables; whatever the model's
            own method raises.
    """
    weight = input_weight(model)
    if weight is None:
        raise PartialEmbeddingError("it has no input embeddings: get_input_embeddings() gives no table.")
    present = weight.shape[0]
    asked = max(size, present + 1)
    skeleton = _copy_without_storage(model)
    before = shapes_of(skeleton)
    counts_before = dict(named_counts(skeleton))
    _resize(skeleton, asked)
    after = shapes_of(skeleton)
    tensors = {
        name: (dim, before[name][dim], after[name][dim] if asked == size else before[name][dim])
        for name, dim in grown_dims(before, after).items()
    }
    short = {name: old for name, (_, old, new) in tensors.items() if new < size and len(before[name]) == 2}
    if short:
        raise PartialEmbeddingError(
            f"ids go up to {size - 1}, but {short} have fewer rows than the input embeddings' {present}, and it does "
            "not grow one without the other."
        )
    counts = {
        name: (counts_before[name][2], value)
        for name, (_, _, value) in named_counts(skeleton)
        if name in counts_before and counts_before[name][2] != value
    }
    return Resizing(tensors, counts if asked == size else {})


def _copy_without_storage(model: nn.Module) -> Any:
    """A copy on the meta device, with the same ties, configurations and classes."""
    memo: dict[int, Any] = {}
    for module, attribute in itertools.chain.from_iterable(members_of(module) for module in model.modules()):
        tensor = tensor_of(module, attribute)
        empty = torch.empty(logical_shape(module, attribute), dtype=tensor.dtype, device="meta")
        is_parameter = isinstance(tensor, nn.Parameter)
        memo[id(tensor)] = nn.Parameter(empty, requires_grad=tensor.requires_grad) if is_parameter else empty
    for module in model.modules():
        for value in module.__dict__.values():  # tensors that a module has cached in its last forward
            for leaf in tree_leaves(value) if isinstance(value, (Tensor, list, tuple, dict)) else ():
                if isinstance(leaf, Tensor) and id(leaf) not in memo:
                    memo[id(leaf)] = torch.empty(leaf.shape, dtype=leaf.dtype, device="meta")
        for attachment in module.__dict__.get(REGISTRY, ()):
            memo[id(attachment)] = None
    skeleton = copy.deepcopy(model, memo)
    for module in skeleton.modules():
        module.__dict__.pop("resize_token_embeddings", None)
    return skeleton


def _resize(skeleton: Any, size: int) -> None:
    """Let `transformers` resize the copy, without the initialisation of values."""
    for module in skeleton.modules():
        for name in dir(type(module)):
            if name.startswith("_init_added_") or name == "_init_weights":
                module.__dict__[name] = _compute_nothing
    known = inspect.signature(skeleton.resize_token_embeddings).parameters
    options = {"mean_resizing": False} if "mean_resizing" in known else {}
    with quiet():
        skeleton.resize_token_embeddings(size, **options)


def _compute_nothing(*args: object, **kwargs: object) -> None:
    """Replaces the initialisation of the copy's new rows, which have no values."""
