"""Rows of ids that the base has, as an ordinary LoRA adapter, for engines that serve many adapters on one base.

Changed rows of a table are a change of low rank: of `K` rows it is `B A` with `A [K, V]` one-hot over their ids and
`B [d, K]` the differences to the base's rows. A head has it the other way round, the differences as `A [K, d]` and
the ids one-hot as `B [V, K]`; a tied head needs its own part, since an engine adds to what a module puts out and not
to its weight. Whoever loads such an adapter needs no new token, no new shape and not this package.

The one-hots are stored densely, since the format has nothing else: `2 · V · K` bytes for each table, in bfloat16, in
which 0 and 1 are exact. The rows themselves lie beside the adapter as a row file, which is what `read_lora` takes.
"""

from __future__ import annotations

import json
import math
import os
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ..attachment.attachment import attachments_of
from ..attachment.partial import TokenRows
from ..errors import PartialEmbeddingError, count, shorten
from ..files.rows_file import ROWS_FILE
from ..layout.tables import VocabularyLayout, find_layout, model_name
from ..tokens.vocabulary import find_ids, known_id, plain_tokenizer
from .peft import CONFIG, PREFIX, WEIGHTS, module_names, read_config
from .reading import fetch, load_tensors, write_json, write_tensors

__all__ = ["read_lora", "write_lora"]

# Initialisations of PEFT that change the base's weights when an adapter is loaded.
_CHANGING = ("pissa", "olora", "corda", "loftq")


def write_lora(
    rows: TokenRows,
    path: str | os.PathLike[str],
    model: Any,
    tokenizer: Any,
    lora: str | os.PathLike[str] | None = None,
) -> None:
    """Write rows as a LoRA adapter over the base model as it is, alone or joined with a LoRA adapter.

    PEFT and vLLM load it as any other (`PeftModel.from_pretrained(base, path)`; `--enable-lora --max-lora-rank N`
    with `N` at least the number of rows). The logits are those of the merged model.

    Args:
        rows: the rows.
        path: folder to be written to: the adapter, and the row file.
        model: the base model that is served, without the rows on it.
        tokenizer: a tokenizer that has the tokens at ids of the base's: one in which they took over reserved
            tokens, or one that they were added to where the base has spare rows. May be `None` for rows by id.
        lora: folder or Hub id of a LoRA adapter of the same base, which becomes a part of the one that is written.
            Its own modules keep their rank and scaling.

    Raises:
        `PartialEmbeddingError`: the base has no row for a token, its embeddings have another width,
            rows are attached to it; a head's bias or further tables, which have no LoRA; `lora` is of another kind,
            another base, or changes the same rows. Nothing is written.
    """
    tokenizer = plain_tokenizer(tokenizer, needed=bool(rows.tokens))
    base = model.get_base_model() if hasattr(model, "get_base_model") else model
    layout = find_layout(base)
    _check_plain(base, layout)
    _check_rows(rows, base, layout)
    ids = _ids(rows, tokenizer, base, layout)
    config, tensors = _empty(base, rows) if lora is None else _read(lora, base, layout, ids)
    scaling = _scaling(config)
    names = module_names(base, layout)
    changed = {"input": (layout.tables[0], rows.input_rows)}
    if layout.has_head:
        table = layout.tables[0] if layout.tied else layout.table("output")
        given = rows.input_rows if layout.tied or rows.output_rows is None else rows.output_rows
        assert table is not None
        changed["output"] = (table, given)
    for role, (table, values) in changed.items():
        # In float64, so that base and difference add up to the row but for the last rounding of who adds them.
        difference = (values.double() - table.rows(ids).double().cpu()) / scaling
        hot = torch.zeros(len(ids), table.size, dtype=torch.bfloat16)
        hot[torch.arange(len(ids)), torch.tensor(ids)] = 1
        module = f"{PREFIX}{names[role]}"
        if role == "input":
            tensors[f"{module}.lora_embedding_A"] = hot
            tensors[f"{module}.lora_embedding_B"] = difference.float().T
        else:
            tensors[f"{module}.lora_A.weight"] = difference.float()
            tensors[f"{module}.lora_B.weight"] = hot.T
    config = _with_modules(config, [names[role] for role in changed], len(ids), scaling, tensors, alone=lora is None)
    folder = Path(path)
    write_tensors(folder / WEIGHTS, tensors)
    write_json(folder / CONFIG, config)
    rows.save_file(folder / ROWS_FILE)
    if rows.tokens:
        tokenizer.save_pretrained(folder)


def read_lora(path: str | os.PathLike[str], tokenizer: Any = None) -> TokenRows:
    """Take the rows out of a folder that `write_lora` has written, bit for bit.

    Args:
        path: the folder, or a Hub id.
        tokenizer: if given, it has to know the tokens.

    Raises:
        `PartialEmbeddingError`: there is no such adapter, it holds no rows of tokens, or other ids than the row file
            beside it; the tokenizer lacks a token.
    """
    tensors = load_tensors(fetch(path, WEIGHTS))
    hot = [tensor for key, tensor in tensors.items() if key.endswith("lora_embedding_A")]
    beside = Path(path) / ROWS_FILE
    if len(hot) != 1 or (Path(path).is_dir() and not beside.is_file()):
        raise PartialEmbeddingError(
            f"The adapter {str(path)!r} has no rows of tokens beside it ({ROWS_FILE}): it was not written by "
            "write_lora, and its differences are nothing without the base's rows. Load it with PEFT."
        )
    rows = TokenRows.from_pretrained(path)
    if len(hot[0]) < len(rows) or not bool((hot[0][-len(rows) :].float().sum(1) == 1).all()):
        raise PartialEmbeddingError(
            f"{str(path)!r} holds {count(rows.token_ids, 'row')} in {ROWS_FILE} and an adapter of other rows. Write "
            "it again."
        )
    if tokenizer is not None and rows.tokens:
        find_ids(plain_tokenizer(tokenizer, needed=True), rows.tokens)
    return rows


def _check_plain(base: Any, layout: VocabularyLayout) -> None:
    """Refuse a base that is not the one that will be served."""
    name = type(base).__name__
    if attachments_of(base):
        raise PartialEmbeddingError(
            f"Rows are attached to this {name}, so the rows of the base cannot be told from them. Call "
            "partial.detach() first and write what it returns, or load the base again."
        )
    if layout.table("extra") is not None or layout.table("bias") is not None:
        others = [table.name for table in layout.tables if table.role in ("extra", "bias")]
        raise PartialEmbeddingError(
            f"{name} has more for each token than embeddings and a head ({shorten(others)}), for which there is no "
            "LoRA. Publish the merged model: partial.merge()."
        )


def _check_rows(rows: TokenRows, base: Any, layout: VocabularyLayout) -> None:
    beyond = sorted(name for name in rows.tensors() if name == "output_bias" or name.startswith("extra."))
    if beyond:
        raise PartialEmbeddingError(
            f"These rows have more than a LoRA adapter can hold: {shorten(beyond)}. Publish the merged model."
        )
    (width,) = layout.tables[0].row_shape
    if rows.input_rows.shape[1] != width:
        raise PartialEmbeddingError(
            f"The rows are {rows.input_rows.shape[1]} wide and the embeddings of {type(base).__name__} {width}: they "
            f"were trained on {rows.base_model or 'another model'!r}. Give that base model."
        )
    if layout.tied and rows.output_rows is not None:
        raise PartialEmbeddingError(
            f"The rows have output rows of their own, but the head of {type(base).__name__} is tied. Give the base "
            "model that they were trained on."
        )
    if layout.has_head and not layout.tied and rows.output_rows is None and not rows.tied:
        raise PartialEmbeddingError(
            f"{type(base).__name__} has a head of its own, and these rows have none for it. Attach them to the model "
            "first, and write what partial.detach() returns."
        )


def _ids(rows: TokenRows, tokenizer: Any, base: Any, layout: VocabularyLayout) -> list[int]:
    """Where the base has the rows."""
    size = min(table.size for table in layout.tables if table.role in ("input", "output"))
    if rows.tokens:
        known = {token: known_id(tokenizer, token) for token in rows.tokens}
        lacking = [token for token, token_id in known.items() if token_id is None or token_id >= size]
        ids = [token_id for token_id in known.values() if token_id is not None]
    else:
        ids = list(rows.token_ids)
        lacking = [f"id {token_id}" for token_id in ids if token_id >= size]
    if lacking:
        raise PartialEmbeddingError(
            f"{type(base).__name__} has {size} rows and none for {shorten(lacking)}, and a LoRA adapter cannot bring "
            "new ones. Two ways: let the tokens take over reserved ones (add_tokens(..., reuse='auto')), or grow the "
            "base once for all adapters (hf-partial-embed add MODEL OUT --spare N), serve that, and load rows onto it."
        )
    return ids


def _empty(base: Any, rows: TokenRows) -> tuple[dict[str, Any], dict[str, Tensor]]:
    size = len(rows)
    config: dict[str, Any] = {
        "base_model_name_or_path": rows.base_model or model_name(base),
        "bias": "none",
        "fan_in_fan_out": False,
        "inference_mode": True,
        "init_lora_weights": True,
        "lora_alpha": size,
        "lora_dropout": 0.0,
        "peft_type": "LORA",
        "r": size,
        "target_modules": [],
        "task_type": None,
    }
    return config, {}


def _read(
    lora: str | os.PathLike[str], base: Any, layout: VocabularyLayout, ids: list[int]
) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """An adapter that rows can be joined with."""
    config, tensors = read_config(fetch(lora, CONFIG)), load_tensors(fetch(lora, WEIGHTS))
    reason = _refusal(config)
    if reason:
        raise PartialEmbeddingError(f"Cannot join rows with the adapter {str(lora)!r}: {reason}")
    there = dict(base.named_modules(remove_duplicate=False))
    tables = set(module_names(base, layout).values())
    for key, tensor in tensors.items():
        name, part = _module_of(key)
        module = there.get(name)
        if module is None:
            raise PartialEmbeddingError(
                f"The adapter {str(lora)!r} changes {name}, which {type(base).__name__} does not have. Give the base "
                "model that it was trained on."
            )
        if name in tables:
            raise PartialEmbeddingError(
                f"The adapter {str(lora)!r} changes {name}, too ({key}): what a token's row is to be would be said "
                "twice. Train the LoRA on other modules, or publish the merged model."
            )
        weight = getattr(module, "weight", None)
        sizes = {"lora_A": -1, "lora_B": 0}
        if part in sizes and weight is not None and weight.dim() == 2 and type(module).__name__ != "Conv1D":
            width = getattr(module, "in_features" if part == "lora_A" else "out_features", None)
            if width is not None and tensor.shape[sizes[part]] != width:
                raise PartialEmbeddingError(
                    f"The adapter {str(lora)!r} has {key} of shape {tuple(tensor.shape)}, which does not fit {name} "
                    f"({width}). Give the base model that it was trained on."
                )
    return config, tensors


def _refusal(config: dict[str, Any]) -> str | None:
    """Why rows cannot become a part of an adapter, if they cannot."""
    if config.get("peft_type") != "LORA":
        return f"it is a {config.get('peft_type')} adapter. Give a LoRA adapter."
    if config.get("use_dora"):
        return "it is a DoRA adapter, which scales whole rows by their norm. Merge it, or train with use_dora=False."
    for key in ("modules_to_save", "trainable_token_indices"):
        if config.get(key):
            return f"it has {key}={config[key]!r}, which engines that serve adapters refuse. Train it without."
    init = config.get("init_lora_weights")
    if isinstance(init, str) and init.lower().startswith(_CHANGING):
        return (
            f"init_lora_weights={init!r} changes the base when it is loaded. Save it as a plain LoRA first: "
            "save_pretrained(..., path_initial_model_for_weight_conversion=...)."
        )
    return None


def _module_of(key: str) -> tuple[str, str]:
    """The module that a tensor of an adapter belongs to, and which of its tensors it is."""
    name = key.removeprefix(PREFIX).replace(".base_layer.", ".")
    for part in ("lora_A", "lora_B", "lora_embedding_A", "lora_embedding_B", "lora_bias"):
        if f".{part}" in name:
            return name.partition(f".{part}")[0], part
    return name.rpartition(".")[0], name.rpartition(".")[2]


def _scaling(config: dict[str, Any]) -> float:
    """What an engine multiplies `B A` with: `alpha / r`, or `alpha / √r` under rsLoRA."""
    rank, alpha = config["r"], config["lora_alpha"]
    return float(alpha / math.sqrt(rank) if config.get("use_rslora") else alpha / rank)


def _with_modules(
    config: dict[str, Any],
    names: list[str],
    rank: int,
    scaling: float,
    tensors: dict[str, Tensor],
    *,
    alone: bool,
) -> dict[str, Any]:
    """The config of the joined adapter: the rows' modules have a rank of their own, and the scaling of the others."""
    if alone:
        return {**config, "target_modules": sorted(names)}
    joined = dict(config)
    selecting = ("layers_to_transform", "layers_pattern", "exclude_modules")
    targets = config.get("target_modules")
    if not isinstance(targets, list) or any(config.get(key) for key in selecting):
        # A pattern, or one that passes over some layers, would pass over these modules as well.
        targets = {name for name, part in map(_module_of, tensors) if part.startswith("lora_")}
        joined.update(dict.fromkeys(selecting))
    joined["target_modules"] = sorted({*targets, *names})
    alpha = scaling * (math.sqrt(rank) if config.get("use_rslora") else rank)
    escaped = [name.replace(".", r"\.") for name in names]
    joined["rank_pattern"] = {**(config.get("rank_pattern") or {}), **dict.fromkeys(escaped, rank)}
    joined["alpha_pattern"] = {**(config.get("alpha_pattern") or {}), **dict.fromkeys(escaped, alpha)}
    json.dumps(joined)  # what is wrong with it is found before anything is written
    return joined
