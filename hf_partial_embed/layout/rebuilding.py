"""Find out how a vocabulary grows by building the model from its configuration on the meta device.

The model is built as it is and with a larger vocabulary, and the shapes are compared. Which fields of the
configuration are the vocabulary's size is found in the same way: by what grows with each of them.
"""

from __future__ import annotations

import copy
import inspect
from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from ..errors import PartialEmbeddingError
from .storage import logical_shape, tensor_of
from .structure import (
    Path,
    Resizing,
    Shapes,
    config_ints,
    grown_dims,
    input_weight,
    named_counts,
    named_tensors,
    output_weight,
    quiet,
    shapes_of,
    try_call,
)  # fmt: skip

__all__ = ["DifferentVocabularies", "resizing_by_building", "unread_tables"]


class DifferentVocabularies(PartialEmbeddingError):
    """Input embeddings and head have different vocabularies, which no other way of looking would change."""


def resizing_by_building(model: Any, size: int) -> Resizing:
    """What grows in a model for a vocabulary of `size`, found by building it from its configuration.

    Raises:
        `PartialEmbeddingError`: the configuration has no vocabulary size, or something grows otherwise than by one
            row for each token; whatever the model's constructor raises.
    """
    root, prefix = _built_part(model)
    builds = _Builds(type(root), root.config)
    before = shapes_of(builds.build({}))
    live = dict(named_tensors(root))
    for name, shape in before.items():
        if name in live and logical_shape(*live[name]) != shape:
            before[name] = ()  # not of the shape that the configuration builds: left out of the comparison

    values = _vocabulary_fields(root, builds, before, live)
    _check_one_vocabulary(model, values, root)
    step = max(1, size - min(values.values()))
    probed = builds.build({path: value + step for path, value in values.items()})
    wanted = builds.build({path: max(value, size) for path, value in values.items()})
    builds.check({path: max(value, size) for path, value in values.items()})

    tensors: dict[str, tuple[int, int, int]] = {}
    tails: dict[str, int] = {}
    now, then = shapes_of(probed), shapes_of(wanted)
    for name, dim in grown_dims(before, now).items():
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


def _join(prefix: str, count_name: str) -> str:
    module, _, attribute = count_name.partition(":")
    return f"{(prefix + module).rstrip('.')}:{attribute}"


class _Builds:
    """Models of one class on the meta device, for variations of one configuration."""

    def __init__(self, cls: type[nn.Module], config: Any) -> None:
        self.cls = cls
        self.config = config
        self._built: dict[frozenset[tuple[Path, int]], nn.Module] = {}

    def configured(self, values: dict[Path, int]) -> Any:
        """The configuration with some fields changed."""
        config = copy.deepcopy(self.config)
        for path, value in values.items():
            setattr(_follow(config, path[:-1]), path[-1], value)
        return config

    def build(self, values: dict[Path, int]) -> nn.Module:
        """The model with some fields of the configuration changed."""
        key = frozenset(values.items())
        if key not in self._built:
            with quiet(), torch.random.fork_rng(devices=[]), torch.device("meta"):
                self._built[key] = self.cls(self.configured(values))
        return self._built[key]

    def check(self, values: dict[Path, int]) -> None:
        """Run the configuration's own validation on the values, as loading it would."""
        if not hasattr(self.config, "validate"):
            return
        try:
            self.config.validate()
        except Exception:  # noqa: BLE001  # it does not accept the present values either
            return
        self.configured(values).validate()


def _vocabulary_fields(
    root: Any, builds: _Builds, before: Shapes, live: dict[str, tuple[nn.Module, str]]
) -> dict[Path, int]:
    """The fields of a configuration that are the size of the text vocabulary, with their values.

    These are the fields with which the input embeddings, a decoder's input embeddings or the head grow, and
    those that repeat the same size for another part of the model.
    """
    weight, head = input_weight(root), output_weight(root)
    sizes = {tensor.shape[0] for tensor in (weight, head) if isinstance(tensor, Tensor)}
    decoder = try_call(root, "get_decoder")
    decoded = input_weight(decoder) if isinstance(decoder, nn.Module) else None
    known = [weight, head, decoded if decoded is not None and decoded.shape[0] in sizes else None]
    main = {name for name, (module, attribute) in live.items() if _is_one_of(module, attribute, known)}
    candidates = {
        path: value
        for path, value in config_ints(builds.config)
        # BERT's type_vocab_size counts segments, not tokens.
        if value > 1 and (value in sizes or "vocab" in path[-1]) and path[-1] != "type_vocab_size"
    }
    chosen: dict[Path, int] = {}
    grows: dict[Path, set[str]] = {}
    others: dict[Path, set[str]] = {}
    tables: dict[Path, set[str]] = {}
    refused: list[str] = []
    for path, value in candidates.items():
        try:
            after = shapes_of(builds.build({path: value + 1}))
        except Exception as error:  # noqa: BLE001  # some sizes can only change together
            refused.append(f"{'.'.join(path)}: {error}")
            others[path] = set()
            continue
        all_grown = grown_dims(before, after)
        grown = {name for name, dim in all_grown.items() if after[name][dim] == before[name][dim] + 1}
        grows[path] = {name for name in grown & main if all_grown[name] == 0}
        if grows[path]:
            chosen[path] = value
        # Where the model does not say which its input embeddings are, any matrix may be the text's.
        tables[path] = {name for name in grown if len(before[name]) == 2 and not _is_head(live, name)}
        is_mirror = not all_grown and "vocab" in path[-1]
        if is_mirror or (path[-1].startswith("vocab_size") and len(grown) == len(all_grown)):
            others[path] = grown
    if weight is None:
        chosen = {path: candidates[path] for path in _text_tables(tables, live)}
    if not chosen:
        raise PartialEmbeddingError(
            "no entry of it makes token embeddings grow; tried "
            f"{['.'.join(path) for path in candidates] or 'none, since none is called a vocabulary'}"
            f"{', where ' + '; '.join(refused) if refused else ''}."
        )
    for path in list(chosen):  # a field that counts further rows of the same table (Molmo2) stays as it is
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


def _is_same_vocabulary(config: Any, path: Path, grown: set[str], known: Path, main: set[str]) -> bool:
    """Whether a field that has the same value as a known one is the size of the same vocabulary.

    It is if nothing grows with it, or only siblings of a known table, or if both fields are equal in the default
    configuration, too. Otherwise they are equal by chance, as in a tiny model for tests.
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


def _text_tables(tables: dict[Path, set[str]], live: dict[str, tuple[nn.Module, str]]) -> list[Path]:
    """Which fields are the text vocabulary's size, in a model that does not say which its input embeddings are."""
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


def _check_one_vocabulary(model: Any, values: dict[Path, int], root: Any) -> None:
    """Refuse models whose input embeddings and head have different vocabularies.

    Input embeddings padded to more rows than the head are accepted where one configuration has both sizes. In all
    other cases an id that is new in one vocabulary would be a token of the other.
    """
    if len(set(values.values())) == 1:
        return
    weight, head = input_weight(root), output_weight(root)
    head_is_longer = weight is not None and isinstance(head, Tensor) and head.shape[0] > weight.shape[0]
    if head_is_longer or len({path[:-1] for path in values}) > 1:
        listed = ", ".join(f"{'.'.join(path)}={value}" for path, value in values.items())
        raise DifferentVocabularies(
            f"{type(model).__name__} has vocabularies of several sizes ({listed}): an id that is new in one is a "
            "token of another. Add the tokens to the part that has them, e.g. model.get_decoder()."
        )


def _built_part(model: Any) -> tuple[Any, str]:
    """The part of a model that its configuration builds, without wrappers such as PEFT's, and its name's prefix."""
    if not hasattr(type(model), "config_class") and hasattr(model, "get_base_model"):
        inner = model.get_base_model()
        return inner, next(f"{name}." for name, module in model.named_modules() if module is inner and name)
    return model, ""


def _follow(config: Any, path: Path) -> Any:
    for attribute in path:
        config = getattr(config, attribute)
    return config


def _is_head(live: dict[str, tuple[nn.Module, str]], name: str) -> bool:
    return name not in live or isinstance(live[name][0], nn.Linear)


def _is_one_of(module: nn.Module, attribute: str, tensors: Iterable[Any]) -> bool:
    tensor = tensor_of(module, attribute)
    return tensor is not None and any(tensor is other for other in tensors)


def unread_tables(model: Any, names: Iterable[str]) -> set[str]:
    """Which of several tables of embeddings a forward over token ids does not read, as far as that can be found out.

    The forward runs on the meta device, where it fails if it needs a value, or more than ids. Lookups of embeddings
    come first, so a forward that has failed after it read two tables, an encoder's and a decoder's, has told enough;
    otherwise encoder and decoder are run one by one.

    Args:
        model: a model, or a wrapper of one.
        names: all names of all these tables.

    Returns:
        Names of the tables that are not read; empty where nothing is known.
    """
    root, prefix = _built_part(model)
    try:
        skeleton = _Builds(type(root), root.config).build({}).eval()
    except Exception:  # noqa: BLE001  # a model that is not what its configuration builds: nothing is known
        return set()
    tables = {prefix + name: id(tensor_of(*holder)) for name, holder in named_tensors(skeleton)}
    tables = {name: tables[name] for name in names if name in tables}
    with _Reads(set(tables.values())) as reads:
        told = _runs_over_ids(skeleton) or len(reads.seen) > 1
        if not told:
            parts = [try_call(skeleton, "get_encoder"), try_call(skeleton, "get_decoder")]
            parts = [part for part in parts if isinstance(part, nn.Module) and part is not skeleton]
            for part in parts:
                _runs_over_ids(part)
            own = [reads.watched & {id(parameter) for parameter in part.parameters()} for part in parts]
            told = any(own) and all(held & reads.seen for held in own if held)
    return {name for name, tensor in tables.items() if tensor not in reads.seen} if told else set()


@torch.no_grad()
def _runs_over_ids(skeleton: nn.Module) -> bool:
    """Whether a forward over token ids alone runs to its end."""
    ids = torch.zeros(1, 4, dtype=torch.int64, device="meta")
    known = inspect.signature(skeleton.forward).parameters
    with quiet():
        try:
            skeleton(**{name: ids for name in ("input_ids", "decoder_input_ids") if name in known})
        except Exception:  # noqa: BLE001  # for instance where it needs a value
            return False
    return True


class _Reads(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Records which of the watched tensors are given to an operator."""

    def __init__(self, watched: set[int]) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.watched = watched
        self.seen: set[int] = set()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        leaves = tree_leaves((args, kwargs))
        self.seen |= {id(leaf) for leaf in leaves if isinstance(leaf, Tensor)} & self.watched
        return func(*args, **(kwargs or {}))
