"""How a model's vocabulary grows, seen on copies of it that have no storage.

Nothing here knows an architecture by its name. What a plain load will build is said by the configuration,
so the model is built from it twice on the `meta` device (milliseconds at any size), as it is and with a
larger vocabulary: what differs is what the vocabulary is made of. Which entries of the configuration are
the vocabulary's size is found in the same way, by what grows with each.

Where a model is not what its configuration builds (it was changed by hand, or computes with values when
it is made), its own `resize_token_embeddings` is run on a copy without storage instead.
"""

from __future__ import annotations

import copy
import inspect
import itertools
import logging
import warnings
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from .errors import PartialEmbeddingError
from .storage import logical_shape, tensor_of

__all__ = [
    "REGISTRY",
    "Resizing",
    "input_weight",
    "named_counts",
    "named_tensors",
    "plan_growth",
    "try_call",
    "unread_tables",
]

# The attribute of a model under which its row sets are kept; a copy goes without them.
REGISTRY = "_partial_embeddings"

Shapes = dict[str, tuple[int, ...]]


@dataclass
class Resizing:
    """What has another size in a model of a larger vocabulary.

    Attributes:
        tensors: for each parameter and buffer of the vocabulary, by its name: its dimension of the
            vocabulary, and its sizes there now and in the vocabulary that was asked for.
        tails: of those, the ones that have rows behind the vocabulary, and how many. They belong to ids
            that the model computes from the vocabulary's size (prompts, an initial token).
        counts: integers of modules and configurations that follow, by the names that `named_counts`
            gives, with their values now and then.
    """

    tensors: dict[str, tuple[int, int, int]]
    counts: dict[str, tuple[int, int]]
    tails: dict[str, int] = field(default_factory=dict)


def plan_growth(model: Any, size: int) -> Resizing:
    """Find out what has to change in a model for its vocabulary to have `size` rows.

    Args:
        model: a `transformers` model, or a wrapper that passes its attributes through.
        size: ids below it are to have a row, in the input embeddings and in the head. Where they have
            that already, what belongs to the vocabulary is found all the same.

    Raises:
        `PartialEmbeddingError`: neither way gives an answer; says what each of them met.
    """
    if not hasattr(model, "config") and try_call(model, "get_input_embeddings") is None:
        raise PartialEmbeddingError(
            f"{type(model).__name__} has no input embeddings to add rows to: it has no configuration, and no "
            "get_input_embeddings(). Pass a transformers model; for a network of your own there is SplitEmbedding."
        )
    reasons = []
    for plan in (_by_building, _by_resizing):
        try:
            return plan(model, size)
        except _DifferentVocabularies:
            raise
        except Exception as error:  # noqa: BLE001  # a stranger's constructor may raise anything
            reasons.append(f"{type(error).__name__}: {error}")
    raise PartialEmbeddingError(
        f"{type(model).__name__} cannot grow its vocabulary to {size} rows. Building it from its configuration with a "
        f"larger vocabulary: {reasons[0]} Its own resize_token_embeddings: {reasons[1]} Pass the part of the model "
        "that has the token embeddings, if there is one."
    )


class _DifferentVocabularies(PartialEmbeddingError):
    """The input embeddings and the head have tokens of their own each; no other way helps."""


# --- a model built anew from its configuration ----------------------------------------------------------

_Path = tuple[str, ...]


def _by_building(model: Any, size: int) -> Resizing:
    root, prefix = _built_part(model)
    builds = _Builds(type(root), root.config)
    before = _shapes(builds.build({}))
    live = dict(named_tensors(root))
    for name, shape in before.items():
        if name in live and logical_shape(*live[name]) != shape:
            before[name] = ()  # not what the configuration says; it must not be one of the vocabulary

    values = _vocabulary_fields(root, builds, before, live)
    _check_one_vocabulary(model, values, root)
    step = max(1, size - min(values.values()))
    probed = builds.build({path: value + step for path, value in values.items()})
    wanted = builds.build({path: max(value, size) for path, value in values.items()})
    builds.check({path: max(value, size) for path, value in values.items()})

    tensors: dict[str, tuple[int, int, int]] = {}
    tails: dict[str, int] = {}
    now, then = _shapes(probed), _shapes(wanted)
    for name, dim in _grown(before, now).items():
        if name not in live:
            raise PartialEmbeddingError(f"{name}, which its configuration builds, is not in the model.")
        old, new = before[name][dim], then[name][dim]
        if now[name][dim] != old + step:
            raise PartialEmbeddingError(
                f"{name} would grow from {old} to {now[name][dim]} rows for {step} more tokens: it has several rows "
                "for each."
            )
        tensors[prefix + name] = (dim, old, new)
        tail = min(max(0, old - value) for value in values.values())
        if tail:
            tails[prefix + name] = tail
    counts_before = dict(named_counts(builds.build({})))
    counts = {}
    for name, (_, _, value) in named_counts(wanted):
        if name in counts_before and counts_before[name][2] != value:
            counts[_join(prefix, name)] = (counts_before[name][2], value)
    return Resizing(tensors, counts, tails)


class _Builds:
    """Models of one class without storage, for variations of one configuration."""

    def __init__(self, cls: type[nn.Module], config: Any) -> None:
        self.cls = cls
        self.config = config
        self._built: dict[frozenset[tuple[_Path, int]], nn.Module] = {}

    def configured(self, values: dict[_Path, int]) -> Any:
        """The configuration with some entries changed."""
        config = copy.deepcopy(self.config)
        for path, value in values.items():
            setattr(_follow(config, path[:-1]), path[-1], value)
        return config

    def build(self, values: dict[_Path, int]) -> nn.Module:
        """The model with some entries of the configuration changed."""
        key = frozenset(values.items())
        if key not in self._built:
            with _quiet(), torch.random.fork_rng(devices=[]), torch.device("meta"):
                self._built[key] = self.cls(self.configured(values))
        return self._built[key]

    def check(self, values: dict[_Path, int]) -> None:
        """Let the configuration say whether the values go together, as it does when it is loaded."""
        if not hasattr(self.config, "validate"):
            return
        try:
            self.config.validate()
        except Exception:  # noqa: BLE001  # it has something against the present ones, too
            return
        self.configured(values).validate()


def _vocabulary_fields(
    root: Any, builds: _Builds, before: Shapes, live: dict[str, tuple[nn.Module, str]]
) -> dict[_Path, int]:
    """The entries of a configuration that are the size of the text's vocabulary, with their values.

    They are the ones with which the input embeddings, a decoder's or the head grow, and those that say
    the same of another part of the model.
    """
    weight, head = input_weight(root), getattr(try_call(root, "get_output_embeddings"), "weight", None)
    sizes = {tensor.shape[0] for tensor in (weight, head) if isinstance(tensor, Tensor)}
    decoder = try_call(root, "get_decoder")
    decoded = input_weight(decoder) if isinstance(decoder, nn.Module) else None
    known = [weight, head, decoded if decoded is not None and decoded.shape[0] in sizes else None]
    main = {name for name, (module, attribute) in live.items() if _is_one_of(module, attribute, known)}
    candidates = {
        path: value
        for path, value in _config_ints(builds.config)
        # BERT's type_vocab_size counts segments, not tokens.
        if value > 1 and (value in sizes or "vocab" in path[-1]) and path[-1] != "type_vocab_size"
    }
    chosen: dict[_Path, int] = {}
    grows: dict[_Path, set[str]] = {}
    others: dict[_Path, set[str]] = {}
    tables: dict[_Path, set[str]] = {}
    refused: list[str] = []
    for path, value in candidates.items():
        try:
            after = _shapes(builds.build({path: value + 1}))
        except Exception as error:  # noqa: BLE001  # some sizes can only change together
            refused.append(f"{'.'.join(path)}: {error}")
            others[path] = set()
            continue
        all_grown = _grown(before, after)
        grown = {name for name, dim in all_grown.items() if after[name][dim] == before[name][dim] + 1}
        grows[path] = {name for name in grown & main if all_grown[name] == 0}
        if grows[path]:
            chosen[path] = value
        # Without input embeddings that are known as such, any table of vectors may be the text's.
        tables[path] = {name for name in grown if len(before[name]) == 2 and not _is_head(live, name)}
        is_mirror = not all_grown and "vocab" in path[-1]
        if is_mirror or (path[-1].startswith("vocab_size") and len(grown) == len(all_grown)):
            others[path] = grown
    if weight is None:
        chosen = {path: candidates[path] for path in _text_tables(tables, live)}
    if not chosen:
        raise PartialEmbeddingError(
            f"no entry of its configuration makes the token embeddings grow; tried {['.'.join(p) for p in candidates]}"
            f"{', where ' + '; '.join(refused) if refused else ''}."
        )
    for path in list(chosen):  # a number of further rows of the same table (Molmo2) stays what it is
        if not path[-1].startswith("vocab_size") and any(
            grows[path] & grows[other] for other in chosen if other[-1].startswith("vocab_size")
        ):
            del chosen[path]
    same = set(chosen.values())
    return chosen | {
        path: candidates[path]
        for path, grown in others.items()
        if candidates[path] in same and _is_same_vocabulary(builds.config, path, grown, next(iter(chosen)), main)
    }


def _is_same_vocabulary(config: Any, path: _Path, grown: set[str], known: _Path, main: set[str]) -> bool:
    """Whether an entry that has the value of a known one is meant to have it.

    It is where nothing or a neighbour of a known table grows with it, or where the two are equal in the
    configuration as it is by default. Else they are equal by chance, as in a small model for tests.
    """
    parents = {name.rpartition(".")[0].rpartition(".")[0] for name in main}
    if all(name.rpartition(".")[0].rpartition(".")[0] in parents for name in grown):
        return True
    try:
        default = type(config)()
        values = {getattr(_follow(default, place[:-1]), place[-1]) for place in (path, known)}
    except Exception:  # noqa: BLE001  # not every configuration has a default, nor parts in it
        return False
    return len(values) == 1


def _text_tables(tables: dict[_Path, set[str]], live: dict[str, tuple[nn.Module, str]]) -> list[_Path]:
    """Which sizes are those of the text's tokens, in a model that does not say where its embeddings are."""
    found = {path: names for path, names in tables.items() if names}
    if len(found) > 1:
        found = {path: names for path, names in found.items() if any("text" in part for part in path)} or found
    distinct = {frozenset(id(tensor_of(*live[name])) for name in names if name in live) for names in found.values()}
    if len(distinct) > 1:
        listed = {".".join(path): sorted(names) for path, names in found.items()}
        raise PartialEmbeddingError(
            f"it has several tables of embeddings, {listed}, and does not say which is the text's."
        )
    return list(found)


def _check_one_vocabulary(model: Any, values: dict[_Path, int], root: Any) -> None:
    """Refuse models whose input embeddings and head have vocabularies of their own.

    One may be padded to a longer table (of one configuration, the input embeddings), but ids that are new
    in one vocabulary would be tokens in the other.
    """
    if len(set(values.values())) == 1:
        return
    weight, head = input_weight(root), getattr(try_call(root, "get_output_embeddings"), "weight", None)
    head_is_longer = weight is not None and isinstance(head, Tensor) and head.shape[0] > weight.shape[0]
    if head_is_longer or len({path[:-1] for path in values}) > 1:
        listed = ", ".join(f"{'.'.join(path)}={value}" for path, value in values.items())
        raise _DifferentVocabularies(
            f"{type(model).__name__} has vocabularies of several sizes ({listed}): an id that is new in one is a "
            "token of another. Add the tokens to the part that has them, e.g. model.get_decoder()."
        )


def _built_part(model: Any) -> tuple[Any, str]:
    """The part of a model that its configuration builds, and where it is: PEFT and others wrap it."""
    if not hasattr(type(model), "config_class") and hasattr(model, "get_base_model"):
        inner = model.get_base_model()
        return inner, next(f"{name}." for name, module in model.named_modules() if module is inner and name)
    return model, ""


def _config_ints(config: Any) -> Iterator[tuple[_Path, int]]:
    for path, owner, attribute, value in _walk_config(config, (), set()):
        del owner
        yield (*path, attribute), value


def _follow(config: Any, path: _Path) -> Any:
    for attribute in path:
        config = getattr(config, attribute)
    return config


def _is_head(live: dict[str, tuple[nn.Module, str]], name: str) -> bool:
    return name not in live or isinstance(live[name][0], nn.Linear)


def _is_one_of(module: nn.Module, attribute: str, tensors: Iterable[Any]) -> bool:
    tensor = tensor_of(module, attribute)
    return tensor is not None and any(tensor is other for other in tensors)


@contextmanager
def _quiet() -> Iterator[None]:
    """What a model says while it is made concerns a model that nobody will see."""
    before = logging.root.manager.disable
    logging.disable(logging.CRITICAL)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        logging.disable(before)


def unread_tables(model: Any, names: Iterable[str]) -> set[str]:
    """Which of several tables of embeddings a forward over token ids does not read, as far as that can be told.

    The forward runs without storage. Some stop where they look at a value; lookups of embeddings come first,
    so a forward that has read two tables, an encoder's and a decoder's, tells enough.

    Args:
        model: a model, or a wrapper of one.
        names: of the tables, all names of each.
    """
    root, prefix = _built_part(model)
    skeleton = _Builds(type(root), root.config).build({}).eval()
    ids = torch.zeros(1, 4, dtype=torch.int64, device="meta")
    known = inspect.signature(skeleton.forward).parameters
    inputs = {name: ids for name in ("input_ids", "decoder_input_ids") if name in known}
    tables = {prefix + name: id(tensor_of(*holder)) for name, holder in named_tensors(skeleton)}
    tables = {name: tables[name] for name in names if name in tables}
    finished = True
    with _quiet(), torch.no_grad(), _Reads(set(tables.values())) as reads:
        try:
            skeleton(**inputs)
        except Exception:  # noqa: BLE001  # for instance a value that is looked at
            finished = False
    if not finished and len(reads.seen) < 2:
        return set()
    return {name for name, tensor in tables.items() if tensor not in reads.seen}


class _Reads(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Notes which of some tensors operators are given."""

    def __init__(self, watched: set[int]) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.watched = watched
        self.seen: set[int] = set()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        leaves = tree_leaves((args, kwargs))
        self.seen |= {id(leaf) for leaf in leaves if isinstance(leaf, Tensor)} & self.watched
        return func(*args, **(kwargs or {}))


# --- the model's own resize_token_embeddings ------------------------------------------------------------


def _by_resizing(model: Any, size: int) -> Resizing:
    weight = input_weight(model)
    if weight is None:
        raise PartialEmbeddingError("it has no input embeddings: get_input_embeddings() gives no table.")
    present = weight.shape[0]
    asked = max(size, present + 1)
    skeleton = _copy_without_storage(model)
    before = _shapes(skeleton)
    counts_before = dict(named_counts(skeleton))
    _resize(skeleton, asked)
    after = _shapes(skeleton)
    tensors = {
        name: (dim, before[name][dim], after[name][dim] if asked == size else before[name][dim])
        for name, dim in _grown(before, after).items()
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
    """A copy on `meta`: ties, configurations and classes as they are."""
    memo: dict[int, Any] = {}
    for module, attribute in itertools.chain.from_iterable(_members(module) for module in model.modules()):
        tensor = tensor_of(module, attribute)
        empty = torch.empty(logical_shape(module, attribute), dtype=tensor.dtype, device="meta")
        is_parameter = isinstance(tensor, nn.Parameter)
        memo[id(tensor)] = nn.Parameter(empty, requires_grad=tensor.requires_grad) if is_parameter else empty
    for module in model.modules():
        for value in module.__dict__.values():  # states that a module has kept from its last forward
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
    """Let `transformers` resize a copy without storage; no values are computed."""
    for module in skeleton.modules():
        for name in dir(type(module)):
            if name.startswith("_init_added_") or name == "_init_weights":
                module.__dict__[name] = _compute_nothing
    known = inspect.signature(skeleton.resize_token_embeddings).parameters
    options = {"mean_resizing": False} if "mean_resizing" in known else {}
    with _quiet():
        skeleton.resize_token_embeddings(size, **options)


def _compute_nothing(*args: object, **kwargs: object) -> None:
    """Stands for the initialisation of a copy's new rows, which have no values."""


# --- reading a model ------------------------------------------------------------------------------------


def try_call(model: nn.Module, name: str) -> Any:
    """What a method without arguments gives; `None` where the model has no answer."""
    try:
        return getattr(model, name)()
    except (AttributeError, NotImplementedError, TypeError):
        return None


def input_weight(model: nn.Module) -> Any:
    """The table of the input embeddings; `None` where the model does not say which it is."""
    weight = getattr(try_call(model, "get_input_embeddings"), "weight", None)
    return weight if isinstance(weight, Tensor) and weight.dim() == 2 else None


def named_tensors(model: nn.Module) -> Iterator[tuple[str, tuple[nn.Module, str]]]:
    """The module and the attribute of each parameter and buffer, by every name that it has.

    Where a layer of PEFT has taken the place of a module, the one inside it is meant, by the name that it
    had before.
    """
    for prefix, module in model.named_modules(remove_duplicate=False):
        for _, attribute in _members(module):
            name = f"{prefix}.{attribute}" if prefix else attribute
            yield name, (module, attribute)
            if ".base_layer." in name:
                yield name.replace(".base_layer.", "."), (module, attribute)


def named_counts(model: nn.Module) -> Iterator[tuple[str, tuple[Any, str, int]]]:
    """Every integer attribute of the modules and of the configurations that they carry, by a stable name."""
    seen: set[int] = set()
    for prefix, module in model.named_modules():
        for attribute, value in module.__dict__.items():
            if type(value) is int:
                yield f"{prefix}:{attribute}", (module, attribute, value)
            elif _is_config(value):
                for path, owner, name, number in _walk_config(value, (attribute,), seen):
                    yield f"{prefix}:{'.'.join((*path, name))}", (owner, name, number)


def _walk_config(config: Any, path: _Path, seen: set[int]) -> Iterator[tuple[_Path, Any, str, int]]:
    if id(config) in seen:
        return
    seen.add(id(config))
    for attribute, value in vars(config).items():
        if type(value) is int:
            yield path, config, attribute, value
        elif _is_config(value):
            yield from _walk_config(value, (*path, attribute), seen)


def _is_config(value: Any) -> bool:
    return hasattr(value, "to_diff_dict")


def _join(prefix: str, count_name: str) -> str:
    module, _, attribute = count_name.partition(":")
    return f"{(prefix + module).rstrip('.')}:{attribute}"


def _members(module: nn.Module) -> list[tuple[nn.Module, str]]:
    members = (module._parameters, module._buffers)
    return [(module, name) for group in members for name, tensor in group.items() if tensor is not None]


def _shapes(model: nn.Module) -> Shapes:
    return {name: logical_shape(*holder) for name, holder in named_tensors(model)}


def _grown(before: Shapes, after: Shapes) -> dict[str, int]:
    """Names of the tensors that have become larger in one dimension, with that dimension."""
    grown = {}
    for name, shape in after.items():
        old = before.get(name, ())
        if len(old) == len(shape):
            differ = [dim for dim, (a, b) in enumerate(zip(old, shape, strict=True)) if a != b]
            if len(differ) == 1:
                grown[name] = differ[0]
    return grown
