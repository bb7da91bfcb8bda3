"""Make rows of any module's tables trainable, in place, and undo it.

The module's class is replaced by one that reads the trainable rows from the parameter `new_rows.weight`,
`[K, dim]`, and all others from the frozen table. For embeddings and heads that is `SplitEmbedding` and
`SplitLinear`, whose forwards allocate nothing of the table's size; they register with `fast_class`.
Any other module reads the whole table, with the rows written in.
"""

from __future__ import annotations

import operator
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from ..errors import PartialEmbeddingError, shorten
from .rows import ForwardScope, NewRows, PartialModule, RowIndex, RowSource, TableProperty

__all__ = [
    "check_base_size",
    "check_ids",
    "check_module",
    "fast_class",
    "next_row_name",
    "present_rows",
    "share_state",
    "split_class",
    "split_module",
    "unsplit_module",
]


# The split class for a class of torch.nn and its subclasses; filled by fast_class where split classes are defined.
_FAST_CLASSES: dict[type[nn.Module], type[PartialModule]] = {}


def fast_class(plain: type[nn.Module]) -> Callable[[type[Any]], type[Any]]:
    """Class decorator: register the split class for modules of class `plain` and its subclasses."""

    def announce(cls: type[Any]) -> type[Any]:
        cls._make_class = staticmethod(split_class)
        _FAST_CLASSES[plain] = cls
        return cls

    return announce


def split_class(base: type[nn.Module], names: Iterable[str]) -> type[Any]:
    """The class that a module of class `base` gets when rows of its parameters `names` train.

    A fast class (`SplitEmbedding`, `SplitLinear`) comes *between* a subclass and its `nn` base in the MRO, so that a
    subclass that scales or otherwise changes the result of `super().forward()` still does.
    """
    if issubclass(base, PartialModule):
        names = frozenset(names) | base._table_names
        base = base._unsplit_class
    names = frozenset(names)
    plain = next((plain for plain in _FAST_CLASSES if issubclass(base, plain)), None)
    fast: type[Any] = PartialModule if plain is None else _FAST_CLASSES[plain]
    extra = names - fast._table_names
    if base is plain and not extra:
        return fast
    key = (base, frozenset(extra))
    if key not in _CLASSES:
        bases = (base, fast) if fast is not PartialModule else (PartialModule, base)
        members: dict[str, Any] = {name: TableProperty(name) for name in extra}
        members.update(
            _make_class=staticmethod(split_class),
            _unsplit_class=base,
            _table_names=extra | fast._table_names,
            __module__=base.__module__,
            __qualname__=f"Split{base.__qualname__}",
            __doc__=base.__doc__,
        )
        if fast is not PartialModule:
            members["__init__"] = fast.__init__
        _CLASSES[key] = type(f"Split{base.__name__}", bases, members)
    return _CLASSES[key]


_CLASSES: dict[tuple[type[nn.Module], frozenset[str]], type[Any]] = {}


def split_module(
    module: nn.Module,
    rows: dict[str, nn.Parameter],
    ids: Sequence[int],
    *,
    shared: dict[str, RowSource] | None = None,
    dims: dict[str, int] | None = None,
    scope: ForwardScope | None = None,
    base_size: int | None = None,
) -> dict[str, str]:
    """Make rows of a module's tables trainable, in place, and freeze the tables.

    The module's class becomes that of `split_class`; its parameters keep their names and identity.

    Args:
        module: any module.
        rows: the trainable rows by the name of their table, `[K, ...]` each.
        ids: the ids of the rows in the tables, in the order of the rows.
        shared: tables whose rows live in another split module (a tied head), with their source there.
        dims: dimension of the vocabulary, for tables where it is not the first.
        scope: counts the forwards during which `module.<table>` is differentiable; always, if not given.
        base_size: number of rows that the tables had before they grew; their present size if not given.

    Returns:
        For each table in `rows` the name that its parameter has in `module.new_rows`.

    Raises:
        `PartialEmbeddingError`: the module has options that exclude trainable rows, see `check_options`.
    """
    shared = shared or {}
    cls = split_class(type(module), {*rows, *shared})
    cls.check_options(module, {*rows, *shared})
    module.__dict__.setdefault("_row_sources", {})
    module.__class__ = cls
    assert isinstance(module, PartialModule)
    module.__dict__["_forward_scope"] = scope
    if rows and "new_rows" not in module._modules:
        module.add_module("new_rows", NewRows())
    names = {}
    for name, parameter in rows.items():
        names[name] = module.new_rows.add_set(name, parameter)
        before = module._row_sources[name].index.ids if name in module._row_sources else ()
        index_rows(module, name, (*before, *ids), (dims or {}).get(name, 0), base_size)
    for name, source in shared.items():
        module._row_sources[name] = source
        source.tied = True
    for name in (*rows, *shared):
        table = module._parameters[name]
        assert table is not None
        table.requires_grad_(False)
    return names


def index_rows(
    module: PartialModule, name: str, ids: Sequence[int], dim: int = 0, base_size: int | None = None
) -> None:
    """Set the ids of a table's trainable rows; keeps the `RowSource` object, which tied modules share."""
    table = module._parameters[name]
    assert table is not None
    if name in module._row_sources:
        index = RowIndex(ids, module._row_sources[name].index.base_size)
        module._row_sources[name].index = index
    else:
        index = RowIndex(ids, table.shape[dim] if base_size is None else base_size)
        module._row_sources[name] = RowSource(module, name, index, table.shape, dim)
    _drop_index_buffers(module, name)
    if not index.contiguous:
        for buffer, values in zip(
            PartialModule.index_buffers(name), torch.tensor(index.ids, device=table.device).sort(), strict=True
        ):
            module.register_buffer(buffer, values, persistent=False)


def _drop_index_buffers(module: nn.Module, name: str) -> None:
    for buffer in PartialModule.index_buffers(name):
        module._buffers.pop(buffer, None)
        module._non_persistent_buffers_set.discard(buffer)


def next_row_name(module: nn.Module, table_name: str) -> str:
    """The name that `split_module` will give to the next rows of a table."""
    holder = getattr(module, "new_rows", None)
    return table_name if holder is None else str(holder.next_name(table_name))


def unsplit_module(module: nn.Module, names: dict[str, str], shared: Iterable[str], ids: Sequence[int]) -> None:
    """Undo `split_module` for one row set, also if it was done in part; no value is written.

    After an interrupt it can be called again.

    Args:
        module: the split module.
        names: what `split_module` returned.
        shared: names of the tables whose rows live in another module.
        ids: ids of the row set.
    """
    sources: dict[str, RowSource] = module.__dict__.get("_row_sources", {})
    own = set(ids)
    for name, parameter_name in names.items():
        holder: Any = module._modules.get("new_rows")
        if holder is not None:
            holder._parameters.pop(parameter_name, None)
            holder.shapes.pop(parameter_name, None)
        if name not in sources:
            continue
        left = [token_id for token_id in sources[name].index.ids if token_id not in own]
        if left:
            assert isinstance(module, PartialModule)
            index_rows(module, name, left)
        else:
            _drop_index_buffers(module, name)
            del sources[name]
    for name in shared:
        source = sources.get(name)
        if source is not None and source.table_name not in source.owner.__dict__.get("_row_sources", {}):
            del sources[name]
    if not sources:
        module._modules.pop("new_rows", None)
        for name in (*names, *shared):
            _drop_index_buffers(module, name)
        if isinstance(module, PartialModule):
            base: Any = module._unsplit_class
            module.__class__ = base
        module.__dict__.pop("_row_sources", None)
        module.__dict__.pop("_forward_scope", None)


def check_module(module: Any, plain: type[nn.Module], user: str) -> None:
    """Check that a module is of class `plain`, and has a table whose rows can train.

    Args:
        module: what was given.
        plain: `nn.Embedding` or `nn.Linear`.
        user: name of the caller, for the message.

    Raises:
        `PartialEmbeddingError`: it is not; names what was given instead, and what to do with it.
    """
    kind = type(module).__name__
    if not isinstance(module, plain):
        other = next((fast for base, fast in _FAST_CLASSES.items() if isinstance(module, base)), None)
        if isinstance(module, nn.EmbeddingBag):
            remedy = "Split an nn.Embedding of the same weight, and take the mean or sum over each bag of its output."
        elif isinstance(module, Tensor):
            remedy = f"Put it into a module first, such as nn.{plain.__name__}"
            remedy += ".from_pretrained(...)." if plain is nn.Embedding else "."
        elif other is not None:
            remedy = f"Use {other.__name__} for it."
        else:
            remedy = f"Pass the nn.{plain.__name__} itself."
        raise PartialEmbeddingError(f"{user} needs an nn.{plain.__name__}, but got {kind}. {remedy}")
    weight = module._parameters.get("weight")
    if weight is not None and isinstance(weight, nn.parameter.UninitializedParameter):
        raise PartialEmbeddingError(f"{user} got {kind}, whose weight has no shape yet. Run it once first.")
    if weight is not None and not weight.is_floating_point():
        raise PartialEmbeddingError(
            f"{user} got {kind} with a weight of {weight.dtype}, whose rows cannot be trained. Split the module "
            "before it is quantised, or leave it out of the quantisation."
        )


def check_base_size(base_size: Any, size: int) -> None:
    if base_size is not None and (type(base_size) is not int or not 0 <= base_size <= size):
        raise PartialEmbeddingError(
            f"base_size={base_size!r} is not a number of rows that a table of {size} had before it grew: give an int "
            f"from 0 to {size}, or nothing."
        )


def check_ids(ids: Iterable[int], size: int, remedy: str = "") -> list[int]:
    """The ids as a list of ints.

    Args:
        ids: of rows.
        size: number of rows of the table.
        remedy: a further sentence for ids outside of it.

    Raises:
        `PartialEmbeddingError`: none, repeated, not whole numbers, or outside of `[0, size)`.
    """
    if not isinstance(ids, Iterable):
        raise PartialEmbeddingError(f"Row ids must be a list of whole numbers, but got {ids!r}.")
    values = ids.flatten().tolist() if isinstance(ids, Tensor) else list(ids)
    try:
        checked = [operator.index(value) for value in values if not isinstance(value, bool)]
    except TypeError:
        checked = []
    if len(checked) != len(values):
        raise PartialEmbeddingError(f"Row ids must be whole numbers, but got {shorten(values)}.")
    if not checked:
        raise PartialEmbeddingError("No row ids were given: name at least one row.")
    outside = [value for value in checked if not 0 <= value < size]
    if outside:
        raise PartialEmbeddingError(
            f"Row ids {shorten(outside)} are outside of a table of {size} rows: valid ids are 0 to {size - 1}."
            + (f" {remedy}" if remedy else "")
        )
    if len(set(checked)) != len(checked):
        repeated = sorted({value for value in checked if checked.count(value) > 1})
        raise PartialEmbeddingError(f"Row ids are given more than once: {shorten(repeated)}.")
    return checked


def present_rows(table: Tensor, ids: Sequence[int], dtype: torch.dtype | None) -> nn.Parameter:
    """A parameter `[K, ...]` with the present values of rows of a table, in `dtype` (the table's if not given)."""
    if dtype is not None and not (isinstance(dtype, torch.dtype) and dtype.is_floating_point):
        raise PartialEmbeddingError(f"dtype={dtype} cannot be trained. Choose a floating-point torch.dtype.")
    index = torch.tensor(list(ids), device=table.device)
    return nn.Parameter(table.detach().index_select(0, index).to(dtype or table.dtype).clone())


def share_state(source: nn.Module, target: nn.Module) -> None:
    """Give `target` the parameters, buffers, hooks and attributes of `source`, without copying any."""
    if isinstance(source, PartialModule):
        raise PartialEmbeddingError(
            f"This {type(source).__name__} is split already. Wrap the module that it was made from."
        )
    for name, value in source.__dict__.items():
        target.__dict__[name] = value.copy() if isinstance(value, (dict, set)) else value
