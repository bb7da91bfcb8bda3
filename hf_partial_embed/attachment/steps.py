"""The steps of an attachment: small changes, each of which can undo itself.

They hold data, no closures, so that an attachment can be deep-copied together with its model.
"""

from __future__ import annotations

import inspect
import types
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, Protocol

import torch
from tokenizers import AddedToken
from torch import Tensor, nn

from ..layout.tables import Table
from ..modules.mask import MaskHandle
from ..modules.rows import ForwardScope, PartialModule
from ..modules.sharding import is_dtensor, shard_with
from ..modules.splitting import next_row_name, split_module, unsplit_module
from ..tokens.added import add_to_tokenizer, remove_from_tokenizer
from ..tokens.entering import enter_pieces, places, take_back
from ..tokens.pieces import Piece
from ..tokens.reserved import Renaming

__all__ = [
    "SCOPE",
    "AddTokens",
    "EnterPieces",
    "Freeze",
    "HideRows",
    "Mask",
    "OpenScope",
    "RenameTokens",
    "SetAttribute",
    "Split",
    "Step",
    "WriteRows",
]

# The attribute of a model that holds its ForwardScope.
SCOPE = "_partial_embedding_scope"


class Step(Protocol):
    """A change that can be undone, also if it was done, or undone, only in part."""

    lasts: bool  # whether merge() leaves it done

    def do(self) -> None: ...

    def undo(self) -> None: ...


class AddTokens:
    """Add tokens to a tokenizer; `ids` has the ids that they got."""

    lasts = True

    def __init__(self, tokenizer: Any, tokens: list[AddedToken], places: dict[str, int] | None = None) -> None:
        self.tokenizer, self.tokens, self.places, self.ids = tokenizer, tokens, places, list[int]()
        self.begun = False

    def do(self) -> None:
        self.begun = True
        self.ids = add_to_tokenizer(self.tokenizer, self.tokens, self.places)

    def undo(self) -> None:
        if self.begun:
            remove_from_tokenizer(self.tokenizer, [token.content for token in self.tokens])
            self.begun = False


class EnterPieces:
    """Enter pieces into a tokenizer's vocabulary.

    Args:
        tokenizer: a fast one.
        tokens: the new tokens of the set, in the order of their ids.
        entries: for each the piece that it is, planned for the present vocabulary; `None` for an added token, whose id
            is reserved where pieces come after it.
    """

    lasts = True

    def __init__(self, tokenizer: Any, tokens: list[AddedToken], entries: list[Piece | None]) -> None:
        self.tokenizer, self.tokens, self.entries = tokenizer, tokens, entries
        self.ids, self.pins = dict[str, int](), dict[str, int]()
        self.begun = False

    @property
    def pieces(self) -> list[Piece]:
        return [piece for piece in self.entries if piece is not None]

    def do(self) -> None:
        self.ids, self.pins = places(self.tokenizer, self.tokens, self.entries)
        self.begun = True
        enter_pieces(self.tokenizer, self.pieces, self.ids, self.pins)

    def undo(self) -> None:
        if self.begun:
            take_back(self.tokenizer, self.pieces, self.pins)
            self.begun = False


class RenameTokens:
    """Rename tokens of the tokenizer that new tokens take over."""

    lasts = True

    def __init__(self, tokenizer: Any, names: dict[str, AddedToken]) -> None:
        self.renaming = Renaming(tokenizer, names)

    def do(self) -> None:
        self.renaming.do()

    def undo(self) -> None:
        self.renaming.undo()


class WriteRows:
    """Write rows into a table; the old values are kept for `undo`."""

    lasts = True

    def __init__(self, table: Table, ids: list[int], rows: Tensor) -> None:
        self.table, self.ids, self.values, self.before = table, ids, rows.detach(), None

    before: Tensor | None

    def do(self) -> None:
        self.before = self.table.rows(self.ids)
        self.table.write(self.ids, self.values)
        self.values = self.values[:0]

    def undo(self) -> None:
        if self.before is not None:
            self.table.write(self.ids, self.before)
            self.before = None


class Freeze:
    """Switch a parameter's `requires_grad` off."""

    lasts = False

    def __init__(self, module: nn.Module, attribute: str) -> None:
        self.module, self.attribute, self.before = module, attribute, None

    before: bool | None

    def do(self) -> None:
        parameter = self.module._parameters[self.attribute]
        assert parameter is not None
        self.before = parameter.requires_grad
        parameter.requires_grad_(False)

    def undo(self) -> None:
        parameter = self.module._parameters[self.attribute]
        if self.before is not None and parameter is not None:
            parameter.requires_grad_(self.before)
            self.before = None


class Split:
    """Split the modules that hold a table: its first holder owns the rows, tied ones share them."""

    lasts = False

    def __init__(self, table: Table, rows: nn.Parameter, ids: list[int], scope: ForwardScope) -> None:
        self.table, self.rows, self.ids, self.scope = table, rows, ids, scope
        self.row_name = ""
        self._done: list[tuple[nn.Module, dict[str, str], list[str]]] = []
        self._hooks: list[Any] = []

    def do(self) -> None:
        (owner, name), *tied = self.table.holders
        self.row_name = next_row_name(owner, name)
        self._done.append((owner, {name: self.row_name}, []))
        with _hooked_forward_kept(owner):
            split_module(
                owner,
                {name: self.rows},
                self.ids,
                dims={name: self.table.dim},
                scope=self.scope,
                base_size=self.table.size,
            )
        assert isinstance(owner, PartialModule)
        for module, attribute in tied:
            self._done.append((module, {}, [attribute]))
            with _hooked_forward_kept(module):
                shared = {attribute: owner._row_sources[name]}
                split_module(module, {}, self.ids, shared=shared, scope=self.scope)
        if is_dtensor(self.table.tensor):
            shard_with(owner.new_rows, self.table.tensor)
        for module, _ in self.table.holders:
            # A module with a forward of its own reads the table, and may be called outside of the model's forward.
            if isinstance(module, PartialModule) and module._unsplit_class not in (nn.Embedding, nn.Linear):
                self.scope.hook(module, self._hooks)

    def undo(self) -> None:
        for hook in self._hooks:
            hook.remove()
        self._hooks = []
        # The owner first: a tied module drops the shared rows once the owner has none left.
        for module, names, shared in self._done:
            with _hooked_forward_kept(module):
                unsplit_module(module, names, shared, self.ids)
        self._done = []


class Mask:
    """Mask a table's gradient. The masks of several row sets on one table each let the rows of all sets through."""

    lasts = False

    def __init__(self, table: Table, ids: list[int], others: list[MaskHandle]) -> None:
        self.table, self.ids, self.others, self.handle = table, ids, others, None

    handle: MaskHandle | None

    def do(self) -> None:
        module, attribute = self.table.holders[0]
        others = self.others[0].ids if self.others else []
        self.handle = MaskHandle({attribute: module}, [*others, *self.ids], self.table.dim)
        self.handle.install()
        for other in self.others:
            other.ids = [*other.ids, *self.ids]

    def undo(self) -> None:
        if self.handle is not None:
            own = set(self.ids)
            for other in self.others:
                other.ids = [token_id for token_id in other.ids if token_id not in own]
            self.handle.remove()
            self.handle = None


class OpenScope:
    """Hook the model's forward, once for all its row sets."""

    lasts = False

    def __init__(self, model: nn.Module) -> None:
        self.model, self.hooks, self.begun = model, list[Any](), False

    def do(self) -> None:
        if getattr(self.model, SCOPE, None) is None:
            self.begun = True
            scope = ForwardScope()
            scope.hook(self.model, self.hooks)
            self.model.__dict__[SCOPE] = scope

    def undo(self) -> None:
        if self.begun:
            for hook in self.hooks:
                hook.remove()
            self.model.__dict__.pop(SCOPE, None)
            self.hooks, self.begun = [], False


class HideRows:
    """Make `save_pretrained` write the rows in the tables only, not under keys of their own."""

    lasts = False

    def __init__(self, model: nn.Module) -> None:
        self.model, self.steps = model, list[SetAttribute]()

    def do(self) -> None:
        keys = [
            f"{name}.{key}" if name else key
            for name, module in self.model.named_modules(remove_duplicate=False)
            if isinstance(module, PartialModule) and "new_rows" in module._modules
            for key in (f"new_rows.{row_name}" for row_name in module.new_rows._parameters)
        ]
        for method in (_SavePretrained, _GatherForSave):
            if hasattr(type(self.model), method.name):
                step = SetAttribute(self.model, method.name, method(self.model))
                self.steps.append(step)
                step.do()
        for prefix, module in self.model.named_modules():
            if hasattr(type(module), "_keys_to_ignore_on_save"):
                start = f"{prefix}." if prefix else ""
                own = [key.removeprefix(start) for key in keys if key.startswith(start)]
                ignored = sorted({*(module._keys_to_ignore_on_save or ()), *own})
                step = SetAttribute(module, "_keys_to_ignore_on_save", ignored)
                self.steps.append(step)
                step.do()

    def undo(self) -> None:
        while self.steps:
            self.steps[-1].undo()
            self.steps.pop()


class _Method:
    """Replaces a method of a model, on the instance, while rows are attached."""

    name: str

    def __init__(self, model: Any) -> None:
        self.model, self.before = model, model.__dict__.get(self.name)

    @property
    def original(self) -> Any:
        return self.before or types.MethodType(getattr(type(self.model), self.name), self.model)


class _SavePretrained(_Method):
    """Writes the rows into the tables of a state dict that an engine has gathered."""

    name = "save_pretrained"

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        given = inspect.signature(self.original).bind(*args, **kwargs).arguments.get("state_dict")
        if given is not None:
            _write_rows_into(given, self.model)
        return self.original(*args, **kwargs)


class _GatherForSave(_Method):
    """Drops the keys of the rows once more: transformers gathers a model that it has sharded after it drops keys."""

    name = "gather_sharded_state_dict_for_save"

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        gathered = self.original(*args, **kwargs)
        hidden = set(self.model._keys_to_ignore_on_save or ())
        return {key: value for key, value in gathered.items() if key not in hidden}


@torch.no_grad()
def _write_rows_into(state_dict: dict[str, Any], model: nn.Module) -> None:
    """Write the rows of a state dict into its tables, where it has both, whole.

    Engines (DeepSpeed ZeRO-3, accelerate) gather parameters without the modules' `state_dict`, which would do it.

    Args:
        state_dict: whole tensors by the names that the model has for them; tables are changed in place.
        model: the model with the rows.
    """
    modules = list(model.named_modules(remove_duplicate=False))
    prefixes = {id(module): f"{name}." if name else "" for name, module in modules}
    for prefix, module in modules:
        for name, source in getattr(module, "_row_sources", {}).items() if isinstance(module, PartialModule) else ():
            table = state_dict.get(f"{prefix}.{name}" if prefix else name)
            keys = [f"{prefixes[id(source.owner)]}new_rows.{key}" for key, _, _ in source.sets()]
            if table is None or any(key not in state_dict for key in keys):
                continue
            sets = [state_dict[key] for key in keys]
            if any(type(tensor) not in (Tensor, nn.Parameter) or tensor.is_meta for tensor in (table, *sets)):
                continue
            if tuple(table.shape) == source.shape and sum(map(len, sets)) == len(source.index):
                rows = torch.cat([part.detach() for part in sets]).to(table)
                index = torch.tensor(source.index.ids, device=table.device)
                table.detach().index_copy_(source.dim, index, rows.movedim(0, source.dim))


class SetAttribute:
    """Set an attribute on the instance; `undo` restores the old value, or removes it where there was none."""

    lasts = False

    def __init__(self, owner: Any, name: str, value: Any) -> None:
        self.owner, self.name, self.value = owner, name, value
        self.done, self.had, self.before = False, False, None

    def do(self) -> None:
        self.had = self.name in self.owner.__dict__
        self.before = self.owner.__dict__.get(self.name)
        self.done = True
        self.owner.__dict__[self.name] = self.value

    def undo(self) -> None:
        if self.done and self.had:
            self.owner.__dict__[self.name] = self.before
        elif self.done:
            self.owner.__dict__.pop(self.name, None)
        self.done = False


@contextmanager
def _hooked_forward_kept(module: nn.Module) -> Iterator[None]:
    """Make accelerate's hook call the forward of the class that the module has after the change.

    The hook keeps the bound forward of the class that it found on the instance, where it stays when the hook is
    removed.
    """
    before = type(module).forward
    try:
        yield
    finally:
        for name in ("forward", "_old_forward"):
            if getattr(module.__dict__.get(name), "__func__", None) is before:
                module.__dict__[name] = types.MethodType(type(module).forward, module)
