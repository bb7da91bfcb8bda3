"""Trainable rows beside the frozen tables of a module, in plain PyTorch.

A partial module keeps each whole table as one frozen parameter of the ordinary name and shape, so that
ties, `state_dict` and everything that reads `weight.shape` see an ordinary module. The rows that train are a
parameter of their own, `[K, ...]`, in a child module called `new_rows`. Their values are written into the table
whenever it is read: by `state_dict`, by pickling, and as `module.weight`.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from ..errors import PartialEmbeddingError
from .sharding import is_dtensor, is_sharded, set_whole, whole, whole_rows, write_rows

__all__ = [
    "ForwardScope",
    "NewRows",
    "PartialModule",
    "RowIndex",
    "RowSource",
    "TableProperty",
    "note_size",
]


class NewRows(nn.Module):
    """The trainable rows of the tables of one module.

    There is one parameter for each table and row set: `weight` for the first set of rows of the table
    `weight`, `weight__1` for the next. It is a module of its own, which is called for the rows, because
    sharding, offloading and PEFT's `modules_to_save` all work on modules.
    """

    def __init__(self) -> None:
        super().__init__()
        self.shapes: dict[str, tuple[int, ...]] = {}

    def forward(self, table_name: str) -> Tensor:
        """The rows of all sets of one table, `[K, ...]`, in the order in which they were attached."""
        rows: list[Tensor] = [getattr(self, name) for name in self.set_names(table_name)]
        return rows[0] if len(rows) == 1 else torch.cat(rows)

    def set_names(self, table_name: str) -> list[str]:
        """Names of the parameters that hold rows of `table_name`, in the order of attachment."""
        return [name for name in self.shapes if name.partition("__")[0] == table_name]

    def add_set(self, table_name: str, rows: nn.Parameter) -> str:
        """Register `rows` as one more set of rows of `table_name`; returns the parameter's name."""
        name = self.next_name(table_name)
        self.register_parameter(name, rows)
        self.shapes[name] = tuple(rows.shape)
        return name

    def next_name(self, table_name: str) -> str:
        """The name that the next set of rows of `table_name` will have."""
        existing = self.set_names(table_name)
        number = 1 + max((int(name.partition("__")[2] or 0) for name in existing), default=-1)
        return f"{table_name}__{number}" if number else table_name

    def _load_from_state_dict(
        self,
        state_dict: dict[str, Any],
        prefix: str,
        local_metadata: dict[str, Any],
        strict: bool,
        missing_keys: list[str],
        unexpected_keys: list[str],
        error_msgs: list[str],
    ) -> None:
        # None is reported missing: a standard checkpoint has no such keys, and the parent module then takes the rows
        # from its table.
        missing: list[str] = []
        super()._load_from_state_dict(state_dict, prefix, local_metadata, strict, missing, unexpected_keys, error_msgs)


class RowIndex:
    """Which ids of a table are read from `new_rows`, in the order of the rows.

    Args:
        ids: the trainable ids of all row sets, one after another.
        base_size: number of rows that the table had before it grew for them.

    Attributes:
        contiguous: whether the ids are a range, in order.
        appended: whether they are a range after all rows that the table had before it grew.
    """

    def __init__(self, ids: Sequence[int], base_size: int) -> None:
        self.ids = tuple(ids)
        self.base_size = base_size
        self.row_of = {token_id: row for row, token_id in enumerate(self.ids)}
        self.start = self.ids[0] if self.ids else base_size
        self.stop = self.start + len(self.ids)
        self.contiguous = self.ids == tuple(range(self.start, self.stop))
        self.appended = self.contiguous and self.start >= base_size

    def __len__(self) -> int:
        return len(self.ids)

    def lookup(self, input_ids: Tensor, buffers: tuple[Tensor, Tensor] | None) -> tuple[Tensor, Tensor]:
        """For each id whether it is trainable (bool), and its row (any valid row where it is not)."""
        if self.contiguous:
            is_new = (input_ids >= self.start) & (input_ids < self.stop)
            return is_new, torch.where(is_new, input_ids - self.start, 0)
        assert buffers is not None
        sorted_ids, order = buffers
        wide = input_ids.to(torch.int64, memory_format=torch.contiguous_format)
        position = torch.searchsorted(sorted_ids, wide).clamp(max=len(self) - 1)
        return sorted_ids[position] == wide, order[position]


class ForwardScope:
    """Counts how many of the forwards it is hooked to are running.

    During a forward, `module.weight` is the whole table, differentiable in the trainable rows: fused losses read
    it there. Otherwise it is the parameter itself, so that ties keep their identity. The hooks are bound methods,
    so that a deep copy of the model has hooks of its own.
    """

    def __init__(self) -> None:
        self.depth = 0

    def enter(self, module: nn.Module, args: object) -> None:
        self.depth += 1

    def leave(self, module: nn.Module, args: object, output: object) -> None:
        if self.depth:  # no call between reading and writing it, at which another thread could run
            self.depth -= 1

    def hook(self, module: nn.Module, handles: list[Any]) -> None:
        """Count the forwards of `module`; each hook's handle is appended to `handles` as soon as it is registered."""
        handles.append(module.register_forward_pre_hook(self.enter))
        handles.append(module.register_forward_hook(self.leave, always_call=True))


class RowSource:
    """Where the trainable rows of a table are: in the `new_rows` of which module, under which name; and their ids.

    `shape` is the table's unsharded shape. A tied module shares the source of the module that owns the rows, which
    is `tied` then, and keeps the rows as the last lookup gave them on to the head.
    """

    def __init__(
        self, owner: PartialModule, table_name: str, index: RowIndex, shape: Sequence[int], dim: int = 0
    ) -> None:
        self.owner = owner
        self.table_name = table_name
        self.index = index
        self.shape = tuple(shape)
        self.dim = dim
        self.tied = False
        self.looked_up: Tensor | None = None

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "looked_up": None}  # part of a graph, which cannot be copied

    def rows(self) -> Tensor:
        """All trainable rows, `[K, ...]`, in their own dtype."""
        rows: Tensor = self.owner.new_rows(self.table_name)
        return rows

    def sets(self) -> list[tuple[str, Tensor, tuple[int, ...]]]:
        """The row sets: name in `new_rows`, parameter, and the parameter's unsharded shape."""
        holder = self.owner.new_rows
        return [(name, getattr(holder, name), holder.shapes[name]) for name in holder.set_names(self.table_name)]

    @property
    def sharded(self) -> bool:
        """Whether this process holds only a part of the rows at the moment."""
        return any(is_sharded(rows, shape) for _, rows, shape in self.sets())

    def whole_rows(self) -> Tensor:
        """All trainable rows, `[K, ...]`, detached. Where they are sharded, every process has to call it."""
        if not self.sharded:
            return self.rows().detach()  # a call of new_rows, at which accelerate's hook loads offloaded rows
        return torch.cat([whole(rows, shape) for _, rows, shape in self.sets()])

    def lookup(self, input_ids: Tensor) -> tuple[Tensor, Tensor]:
        return self.index.lookup(input_ids, self.owner.row_buffers(self.table_name))

    def ids(self, device: torch.device) -> Tensor:
        """The trainable ids, int64 `[K]`, on `device`."""
        if self.index.contiguous:
            return torch.arange(self.index.start, self.index.stop, device=device)
        sorted_ids, order = self.owner.row_buffers(self.table_name) or (None, None)
        assert sorted_ids is not None and order is not None
        return sorted_ids[torch.argsort(order)]


class _WholeTable(torch.autograd.Function):
    """A view of the table, with the trainable rows written in, whose gradient goes to those rows."""

    @staticmethod
    def forward(table: Tensor, rows: Tensor, ids: Tensor, dim: int) -> Tensor:
        # By .data, which leaves the version counter alone: for a forward whose backward is still to come the values
        # are the same, unless an optimizer has changed the rows, and then the rows' own counter makes it raise.
        table.data.index_copy_(dim, ids, rows.detach().to(table.dtype).movedim(0, dim))
        return table.view_as(table)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
        _, rows, ids, dim = inputs
        ctx.save_for_backward(rows, ids)
        ctx.dim = dim

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[None, Tensor, None, None]:
        rows, ids = ctx.saved_tensors
        return None, grad.index_select(ctx.dim, ids).movedim(ctx.dim, 0).to(rows.dtype), None, None


def apply(function: type[torch.autograd.Function], *args: Any) -> Tensor:
    """`function.apply(*args)`, which has no type."""
    result: Tensor = function.apply(*args)  # type: ignore[no-untyped-call]
    return result


class PartialModule(nn.Module):
    """Base class of split modules: tables in which some rows train, whatever the module computes.

    A subclass of an embedding or a head with a forward of its own, and any other module with a parameter over the
    vocabulary, reads `module.<table>`, which is the whole table with the rows written in. The forwards of
    `SplitEmbedding` and `SplitLinear` do the two common operations without it.
    """

    _row_sources: dict[str, RowSource]
    _forward_scope: ForwardScope | None
    new_rows: Any

    @classmethod
    def check_options(cls, module: nn.Module, names: Iterable[str]) -> None:
        """Refuse a module whose options exclude trainable rows of the tables `names`; this class refuses none."""

    @staticmethod
    def index_buffers(table_name: str) -> tuple[str, str]:
        """Names of the buffers that `row_buffers` returns."""
        return f"_{table_name}_sorted_ids", f"_{table_name}_row_order"

    def row_buffers(self, table_name: str) -> tuple[Tensor, Tensor] | None:
        """Sorted trainable ids and the row of each, int64 `[K]`; `None` where ids are contiguous."""
        sorted_ids, order = (self._buffers.get(name) for name in self.index_buffers(table_name))
        return None if sorted_ids is None or order is None else (sorted_ids, order)

    def raw_table(self, name: str) -> Any:
        """The parameter itself; during a forward under FSDP1 the view of its flat parameter that replaces it."""
        return self._parameters[name] if name in self._parameters else self.__dict__[name]

    def table(self, name: str) -> Tensor:
        """The parameter itself, with the current rows written into it."""
        self.write_rows([name])
        table: Tensor = self.raw_table(name)
        return table

    def whole_table(self, name: str) -> Tensor:
        """The value of `module.<name>`: see `ForwardScope`."""
        table = self._parameters.get(name, self.__dict__.get(name))
        source = self.__dict__.get("_row_sources", {}).get(name)
        if table is None or source is None or table.is_meta:  # offloaded: accelerate reads the attribute to load it
            if name in self._parameters:
                return table  # type: ignore[return-value]
            raise AttributeError(f"{type(self).__name__!r} object has no attribute {name!r}")
        if torch.compiler.is_compiling():  # no side effects in a graph; the compiler drops this where it is not used
            ids = source.ids(table.device)
            return table.index_copy(source.dim, ids, source.rows().to(table.dtype).movedim(0, source.dim))
        scope = self._forward_scope
        in_forward = scope is None or scope.depth
        if is_sharded(table, source.shape) or (source.sharded and not in_forward):  # gathering needs every process
            return table
        if torch.is_grad_enabled() and in_forward:
            rows = source.rows()
            if rows.requires_grad:
                return apply(_WholeTable, table, rows, source.ids(table.device), source.dim)
        return self.table(name)

    @torch.no_grad()
    def write_rows(self, names: Iterable[str]) -> None:
        """Write the current rows into tables; where they are sharded, every process has to call it."""
        for name in names:
            source, table = self._row_sources[name], self.raw_table(name)
            if table is None or table.is_meta:
                continue
            write_rows(table, source.shape, source.ids(table.device), source.whole_rows(), source.dim)

    @torch.no_grad()
    def read_rows(self, name: str) -> None:
        """Take the rows from the table, as after a standard checkpoint was loaded into it.

        Rows that round to the table's values are kept: they are the exact ones, in a wider dtype.
        """
        source, table = self._row_sources[name], self.raw_table(name)
        stored = whole_rows(table, source.shape, source.ids(table.device), source.dim)
        offset = 0
        for _, rows, shape in source.sets():
            part = stored[offset : offset + shape[0]].to(rows.device)
            offset += shape[0]
            if not torch.equal(whole(rows, shape).to(part.dtype), part):
                set_whole(rows, shape, part)

    def _names_here(self, *, collective: bool) -> list[str]:
        """The tables that can be brought up to date now.

        Args:
            collective: whether every process calls it. Under FSDP2 all of them take part in `state_dict` and
                `load_state_dict`; FSDP1 gathers its parameters for these, and ZeRO-3 gathers them elsewhere.
        """
        names = []
        for name, source in self._row_sources.items():
            tensors = [(rows, shape) for _, rows, shape in source.sets()]
            tensors.append((self.raw_table(name), source.shape))
            if all(
                tensor is not None
                and not tensor.is_meta
                and (not is_sharded(tensor, shape) or (collective and is_dtensor(tensor)))
                for tensor, shape in tensors
            ):
                names.append(name)
        return names

    def _save_to_state_dict(self, destination: Any, prefix: str, keep_vars: bool) -> None:
        self.write_rows(self._names_here(collective=True))
        super()._save_to_state_dict(destination, prefix, keep_vars)

    def _load_from_state_dict(self, state_dict: dict[str, Any], prefix: str, *args: Any) -> None:
        super()._load_from_state_dict(state_dict, prefix, *args)
        for name in self._names_here(collective=True):
            if prefix + name in state_dict:
                self.read_rows(name)

    def __getstate__(self) -> dict[str, Any]:
        self.write_rows(self._names_here(collective=False))
        return self.__dict__

    def __reduce_ex__(self, protocol: Any) -> tuple[Any, ...]:
        # The class is made at run time, so what it is made from is pickled instead.
        names = tuple(sorted(self._table_names))
        return _rebuild, (self._make_class, self._unsplit_class, names), self.__getstate__()

    def __prepare_scriptable__(self) -> nn.Module:
        # torch.jit.script would replace this module, in the model itself, by whatever is returned here.
        raise PartialEmbeddingError(
            f"{type(self).__name__} cannot be compiled by torch.jit.script. Use torch.export.export, or "
            "script a copy of the model with a plain module in its place, such as "
            "nn.Embedding.from_pretrained(module.weight.detach().clone())."
        )

    _make_class: Callable[..., type[nn.Module]]
    _unsplit_class: type[nn.Module] = nn.Module
    _table_names: frozenset[str] = frozenset()

    def extra_repr(self) -> str:
        parts = [super().extra_repr()]
        for name, source in self._row_sources.items():
            parts.append(f"trainable rows of {name}={len(source.index)}")
        return ", ".join(part for part in parts if part)


def note_size(module: nn.Module, name: str) -> None:
    """Update the recorded shape of a table that has become longer or shorter."""
    if isinstance(module, PartialModule) and name in module._row_sources:
        module._row_sources[name].shape = tuple(module.raw_table(name).shape)


class TableProperty:
    """The attribute `module.<name>`: the whole table. `nn.Module.__setattr__` assigns parameters without it.

    A plain tensor is accepted where there is no parameter: FSDP1 replaces parameters by views of its flat one.
    """

    def __init__(self, name: str) -> None:
        self.name = name

    def __get__(self, module: PartialModule | None, owner: type) -> Any:
        return self if module is None else module.whole_table(self.name)

    def __set__(self, module: PartialModule, value: object) -> None:
        if isinstance(value, Tensor) and self.name not in module._parameters:
            module.__dict__[self.name] = value
            return
        raise TypeError(
            f"cannot assign {type(value).__name__} as {self.name!r} of {type(module).__name__}: "
            "a torch.nn.Parameter is needed"
        )

    def __delete__(self, module: PartialModule) -> None:
        if self.name not in module.__dict__:
            raise AttributeError(self.name)
        del module.__dict__[self.name]


def _rebuild(make_class: Callable[..., type[nn.Module]], base: type[nn.Module], names: tuple[str, ...]) -> nn.Module:
    cls = make_class(base, names)
    return cls.__new__(cls)
