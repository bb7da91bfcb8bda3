"""PEFT's `TrainableTokens` adapters, alone or inside of a LoRA adapter (`trainable_token_indices`).

Such an adapter holds the rows themselves, `[K, d]`, under `<module>.trainable_tokens_delta` (despite its name
it replaces the rows and is not added to them), and their ids in its config. It does not hold the tokens' texts,
so a tokenizer has to come with it.
"""

from __future__ import annotations

import json
import logging
import os
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers import AutoTokenizer

from ..attachment.partial import TokenRows
from ..errors import PartialEmbeddingError, shorten
from ..files.pretrained import has_tokenizer
from ..layout.tables import VocabularyLayout, find_layout, model_name
from ..modules.splitting import check_ids
from ..tokens.added import existing_tokens, token_to_dict
from ..tokens.stored import stored_ids
from ..tokens.vocabulary import plain_tokenizer
from .reading import fetch, load_tensors, write_json, write_tensors

__all__ = ["CONFIG", "PREFIX", "WEIGHTS", "is_peft_adapter", "module_names", "read_config", "read_peft", "write_peft"]

logger = logging.getLogger(__name__)

CONFIG, WEIGHTS = "adapter_config.json", "adapter_model.safetensors"
PREFIX, _SUFFIXES = "base_model.model.", (".token_adapter.trainable_tokens_delta", ".trainable_tokens_delta")
_HEAD = "lm_head"


def is_peft_adapter(source: str | os.PathLike[str]) -> bool:
    """Whether a folder holds a PEFT adapter."""
    return (Path(source) / CONFIG).is_file()


def read_peft(
    adapter: str | os.PathLike[str], tokenizer: Any = None, *, model: Any = None, revision: str | None = None
) -> TokenRows:
    """Read the token rows of a PEFT adapter.

    Args:
        adapter: folder or Hub id of a `TrainableTokens` adapter, or of a LoRA adapter that was trained
            with `trainable_token_indices`.
        tokenizer: the tokenizer that the rows were trained with, which knows the tokens' texts. If not
            given, the one that was saved with the adapter; where there is none, the rows have ids only
            and are attached by id.
        model: the base model, needed only where an adapter has different rows for two modules of which
            none is called `lm_head`. It may be on the meta device.
        revision: of the Hub repository.

    Returns:
        `TokenRows`, in the adapter's dtype.

    Raises:
        `PartialEmbeddingError`: the adapter has no token rows, has rows of more tables than input embeddings
            and head, is damaged, or is a pickle.
    """
    folder = Path(adapter)
    if folder.is_dir() and not (folder / WEIGHTS).is_file() and (folder / "adapter_model.bin").is_file():
        raise PartialEmbeddingError(
            f"{folder} has its weights as adapter_model.bin, a pickle, which is not read here. Save the adapter again "
            "with PEFT's save_pretrained(..., safe_serialization=True)."
        )
    config = read_config(fetch(adapter, CONFIG, revision=revision))
    tensors = load_tensors(fetch(adapter, WEIGHTS, revision=revision))
    rows = {name: tensor for key, tensor in tensors.items() if (name := _module_of(key)) is not None}
    if not rows:
        raise PartialEmbeddingError(
            f"The adapter {str(adapter)!r} ({config.get('peft_type')}) has no token rows: it was trained without "
            f"TrainableTokens and without trainable_token_indices. It holds {shorten(sorted(tensors), 4)}."
        )
    left = sorted(key for key in tensors if _module_of(key) is None)
    if left:
        logger.warning(
            "%s holds %d further tensors (%s), which are no token rows and stay where they are.",
            adapter, len(left), shorten(left, 3),
        )  # fmt: skip
    source, head = _input_and_head(rows, model, adapter)
    ids = _token_ids(config, source, rows[source], adapter)
    if head is not None and _token_ids(config, head, rows[head], adapter) != ids:
        raise PartialEmbeddingError(
            f"The adapter {str(adapter)!r} trains other tokens in {head} than in {source}. Rows of both are needed "
            "for each token."
        )
    tied = head is not None and torch.equal(rows[source], rows[head])
    if model is not None:
        tied = find_layout(model).tied if not _is_meta(model) else _meta_tied(model)
    known = _tokenizer(adapter, tokenizer, revision)
    tokens = [] if known is None else existing_tokens(known, ids)
    if not tokens:
        logger.warning(
            "No tokenizer has texts for the ids %s of %s: the rows are known by id only. Pass the tokenizer that they "
            "were trained with.",
            shorten(ids), adapter,
        )  # fmt: skip
    base = config.get("base_model_name_or_path")
    return TokenRows(
        tokens=[token.content for token in tokens],
        input_rows=rows[source],
        output_rows=None if head is None or tied else rows[head],
        token_ids=ids,
        added_tokens=[token_to_dict(token) for token in tokens],
        base_model=Path(base).name if base and os.path.isabs(base) else base or None,
        tied=tied,
    )


def write_peft(rows: TokenRows, path: str | os.PathLike[str], model: Any, tokenizer: Any) -> None:
    """Write rows as a PEFT `TrainableTokens` adapter, and the tokenizer with the tokens beside it.

    It is loaded with PEFT, without this package:

    ```python
    tokenizer = AutoTokenizer.from_pretrained(path)
    model.resize_token_embeddings(max(len(tokenizer), model.get_input_embeddings().num_embeddings))
    model = PeftModel.from_pretrained(model, path)
    ```

    Args:
        rows: the rows.
        path: folder to be written to.
        model: the base model, with or without the rows on it.
        tokenizer: the tokenizer, which knows the tokens already (as it does while rows are attached).

    Raises:
        `PartialEmbeddingError`: rows that PEFT's adapter cannot hold (entries of a head's bias, rows of further
            tables); a model whose config says that its head is tied where it is not, or the other way round, since
            PEFT relies on the config.
    """
    tokenizer = plain_tokenizer(tokenizer, needed=bool(rows.tokens))
    base = model.get_base_model() if hasattr(model, "get_base_model") else model
    layout = find_layout(base)
    modules = module_names(base, layout)
    _check_representable(rows, base, layout)
    ids = stored_ids(tokenizer, rows.added_tokens) if rows.tokens else list(rows.token_ids)
    tensors = {f"{PREFIX}{modules['input']}.trainable_tokens_delta": rows.input_rows}
    if "output" in modules:
        head = rows.input_rows if layout.tied or (rows.output_rows is None and rows.tied) else rows.output_rows
        if head is None:
            raise PartialEmbeddingError(
                f"{type(base).__name__} has a head of its own, and these rows have none for it. Attach them to the "
                "model first, and write partial.token_rows()."
            )
        tensors[f"{PREFIX}{modules['output']}.trainable_tokens_delta"] = head
    config = {
        "auto_mapping": {"base_model_class": type(base).__name__, "parent_library": type(base).__module__},
        "base_model_name_or_path": rows.base_model or model_name(base),
        "inference_mode": True,
        "init_weights": True,
        "peft_type": "TRAINABLE_TOKENS",
        "target_modules": [modules["input"]] if layout.tied or "output" not in modules else sorted(modules.values()),
        "task_type": None,
        "token_indices": ids,
    }
    folder = Path(path)
    write_tensors(folder / WEIGHTS, tensors)
    write_json(folder / CONFIG, config)
    if rows.tokens:
        tokenizer.save_pretrained(folder)


def read_config(path: Path) -> dict[str, Any]:
    try:
        config = json.loads(path.read_text("utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise PartialEmbeddingError(f"Cannot read {path}: {type(error).__name__}: {error}") from error
    if not isinstance(config, dict):
        raise PartialEmbeddingError(f"{path} is no adapter config: a JSON object is needed.")
    return config


def _module_of(key: str) -> str | None:
    """The module whose rows a tensor of the adapter holds; `None` for other tensors."""
    for suffix in _SUFFIXES:
        if key.endswith(suffix):
            return key.removesuffix(suffix).removeprefix(PREFIX)
    return None


def _input_and_head(rows: dict[str, Tensor], model: Any, adapter: object) -> tuple[str, str | None]:
    """Names of the modules whose rows are the input embeddings' and the head's; the latter may be `None`."""
    names = sorted(rows)
    if model is not None:
        inputs, outputs = _named(model, model.get_input_embeddings()), _named(model, model.get_output_embeddings())
        found = [name for name in names if name in inputs], [name for name in names if name in outputs]
        if not found[0]:
            raise PartialEmbeddingError(
                f"The adapter {adapter!r} has rows for {shorten(names)}; the input embeddings of "
                f"{type(model).__name__} are {shorten(sorted(inputs))}. Give the base model that it was trained on."
            )
        return found[0][0], found[1][0] if found[1] else None
    heads = [name for name in names if name.rpartition(".")[2] == _HEAD]
    others = [name for name in names if name not in heads]
    equal = [name for name in others[1:] if rows[name].shape != rows[others[0]].shape
             or not torch.equal(rows[name], rows[others[0]])]  # fmt: skip
    if not others or len(heads) > 1 or equal:
        raise PartialEmbeddingError(
            f"The adapter {adapter!r} has rows for {shorten(names)}, of which it does not say which are the input "
            "embeddings. Give the base model: read_peft(..., model=model)."
        )
    return others[0], heads[0] if heads else None


def _token_ids(config: dict[str, Any], module: str, rows: Tensor, adapter: object) -> list[int]:
    """The ids of the rows of a module, checked here because PEFT does not check them."""
    given = config.get("token_indices") or config.get("trainable_token_indices")
    if isinstance(given, dict):
        given = next(
            (ids for name, ids in given.items() if f".{module}".endswith(f".{name}")), next(iter(given.values()), None)
        )
    if not isinstance(given, list) or rows.dim() != 2 or len(given) != len(rows):
        size = len(given) if isinstance(given, list) else 0
        raise PartialEmbeddingError(
            f"The adapter {adapter!r} has {tuple(rows.shape)} numbers for {module}, but {size} token indices in its "
            "config. It is damaged."
        )
    return check_ids(given, 1 << 31)


def _tokenizer(adapter: str | os.PathLike[str], tokenizer: Any, revision: str | None) -> Any:
    if tokenizer is not None:
        return plain_tokenizer(tokenizer, needed=True)
    if Path(adapter).is_dir() and not has_tokenizer(adapter):
        return None
    try:
        return AutoTokenizer.from_pretrained(adapter, revision=revision or "main", trust_remote_code=False)
    except (OSError, ValueError) as error:
        logger.warning("The tokenizer that was saved with %s cannot be loaded: %s", adapter, error)
        return None


def _named(model: nn.Module, module: Any) -> set[str]:
    return {
        name for name, other in model.named_modules(remove_duplicate=False) if module is not None and other is module
    }


def _is_meta(model: nn.Module) -> bool:
    return any(parameter.is_meta for parameter in model.parameters())


def _meta_tied(model: Any) -> bool:
    """Whether head and input embeddings of a model on the meta device are one parameter."""
    head = model.get_output_embeddings()
    return head is not None and head.weight is model.get_input_embeddings().weight


def module_names(model: Any, layout: VocabularyLayout) -> dict[str, str]:
    names = {"input": min(_named(model, model.get_input_embeddings()), key=len)}
    if layout.has_head:
        names["output"] = min(_named(model, model.get_output_embeddings()), key=len)
    return names


def _check_representable(rows: TokenRows, model: Any, layout: VocabularyLayout) -> None:
    here = type(model).__name__
    beyond = sorted(name for name in rows.tensors() if name == "output_bias" or name.startswith("extra."))
    if beyond or layout.table("bias") is not None or layout.table("extra") is not None:
        raise PartialEmbeddingError(
            f"A PEFT TrainableTokens adapter holds rows of the input embeddings and of a head without a bias; {here} "
            f"and these rows have more ({shorten(beyond or [table.name for table in layout.tables[1:]])}), which "
            "would be lost. Use rows.save_pretrained, or publish the merged model."
        )
    says_tied = bool(model.config.get_text_config().tie_word_embeddings)
    if layout.has_head and says_tied != layout.tied:
        raise PartialEmbeddingError(
            f"The head of {here} is {'tied' if layout.tied else 'not tied'}, but its config says the contrary, which "
            "is what PEFT goes by. Use rows.save_pretrained, or publish the merged model."
        )
