"""The Hugging Face Hub: finding a row file there, and publishing rows or merged models with a model card."""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from huggingface_hub import HfApi, ModelCard, ModelCardData, hf_hub_download
from huggingface_hub.errors import (
    EntryNotFoundError,
    HFValidationError,
    LocalEntryNotFoundError,
    RepositoryNotFoundError,
    RevisionNotFoundError,
)

from .errors import PartialEmbeddingError
from .rows_file import ROWS_FILE, write_atomically

__all__ = ["locate_rows", "merged_card", "rows_card", "upload", "write_card"]

_LIBRARY = "hf_partial_embed"
_SHOWN_TOKENS = 100


def locate_rows(
    source: str | os.PathLike[str], *, revision: str | None = None, token: str | bool | None = None
) -> Path:
    """The path of a row file: given itself, in a folder, or downloaded from a Hub repository.

    Raises:
        `PartialEmbeddingError`: there is none.
    """
    path = Path(source)
    if path.is_file():
        return path
    if path.is_dir():
        if not (path / ROWS_FILE).is_file():
            there = sorted(entry.name for entry in path.iterdir())
            raise PartialEmbeddingError(f"The folder {path} has no {ROWS_FILE}; it holds {there[:10]}.")
        return path / ROWS_FILE
    try:
        return Path(hf_hub_download(str(source), ROWS_FILE, revision=revision, token=token))
    except HFValidationError as error:
        raise PartialEmbeddingError(f"{source!r} is neither a file, a folder nor a Hub repository id.") from error
    except RevisionNotFoundError as error:
        raise PartialEmbeddingError(f"The Hub repository {source!r} has no revision {revision!r}.") from error
    except RepositoryNotFoundError as error:
        raise PartialEmbeddingError(
            f"There is no folder {str(source)!r} here, and no repository of that name on the Hub that you can "
            "read. Check the name, or pass token=."
        ) from error
    except LocalEntryNotFoundError as error:
        raise PartialEmbeddingError(f"Cannot reach the Hub for {source!r}: {error}") from error
    except EntryNotFoundError as error:
        raise PartialEmbeddingError(f"The Hub repository {source!r} has no {ROWS_FILE}.") from error


def upload(
    folder: Path,
    repo_id: str,
    *,
    private: bool | None,
    token: str | bool | None,
    revision: str | None,
    commit_message: str,
    create_pr: bool,
) -> str:
    """Create the repository where there is none, and upload a folder in one commit; returns its URL."""
    api = HfApi(token=token)
    repo_id = api.create_repo(repo_id, private=private, exist_ok=True).repo_id
    if revision is not None and not create_pr:
        api.create_branch(repo_id, branch=revision, exist_ok=True)
    info = api.upload_folder(
        repo_id=repo_id,
        folder_path=folder,
        revision=revision,
        commit_message=commit_message,
        create_pr=create_pr,
    )
    return str(info.pr_url or info.commit_url)


def write_card(folder: Path, card: ModelCard) -> None:
    """Write `README.md`, unless there is one that somebody else has written."""
    path = folder / "README.md"
    if path.is_file() and f"library_name: {_LIBRARY}" not in path.read_text("utf-8", errors="replace"):
        return
    write_atomically(path, lambda temporary: temporary.write_text(str(card), "utf-8"))


def rows_card(
    tokens: Sequence[str], sizes: dict[str, Sequence[int]], *, base_model: str | None, repo_id: str, file_bytes: int
) -> ModelCard:
    """The card of a repository of rows."""
    shapes = "\n".join(f"| `{name}` | {' × '.join(map(str, shape))} |" for name, shape in sizes.items())
    base = base_model or "the base model"
    text = f"""# {len(tokens)} trained token embeddings for {_escape(base)}

The embedding rows of {len(tokens)} tokens, trained with all other embedding rows of the model frozen.
The file is {file_bytes:,} bytes.

## Use

```python
from transformers import AutoModelForCausalLM, AutoTokenizer
from hf_partial_embed import load_tokens

model = AutoModelForCausalLM.from_pretrained({base!r})
tokenizer = AutoTokenizer.from_pretrained({base!r})
partial = load_tokens(model, tokenizer, {repo_id!r}, trainable=False)
```

`partial.merge()` makes an ordinary model of it, which `save_pretrained` and any server take.

## Tokens

{_token_list(tokens)}

## Rows

| tensor in `{ROWS_FILE}` | shape |
| --- | --- |
{shapes}
"""
    return _card(text, base_model, "adapter")


def merged_card(tokens: Sequence[str], *, base_model: str | None, repo_id: str, model_class: str) -> ModelCard:
    """The card of a merged model."""
    base = base_model or "its base model"
    text = f"""# {_escape(base)} with {len(tokens)} more tokens

An ordinary checkpoint: the base model, whose embeddings have {len(tokens)} more trained rows. Nothing but
`transformers` is needed to load it.

## Use

```python
from transformers import {model_class}, AutoTokenizer

model = {model_class}.from_pretrained({repo_id!r})
tokenizer = AutoTokenizer.from_pretrained({repo_id!r})
```

## Tokens

{_token_list(tokens)}
"""
    return _card(text, base_model, "finetune")


def _card(text: str, base_model: str | None, relation: str) -> ModelCard:
    tags = ["token-embeddings", "vocabulary-extension"]
    extra: dict[str, Any] = {}
    if base_model and not Path(base_model).exists():
        extra = {"base_model": base_model, "base_model_relation": relation}
    data = ModelCardData(library_name=_LIBRARY, tags=tags, **extra)
    return ModelCard(f"---\n{data.to_yaml()}\n---\n\n{text}")


def _token_list(tokens: Sequence[str]) -> str:
    shown = "\n".join(f"- {_escape(token)}" for token in tokens[:_SHOWN_TOKENS])
    rest = len(tokens) - _SHOWN_TOKENS
    return shown if rest <= 0 else f"{shown}\n- and {rest} more"


def _escape(text: str) -> str:
    """Text as it is, whatever it contains: nothing in it is Markdown or HTML, and all of it is visible."""
    visible = "".join(char if char.isprintable() else f"\\u{{{ord(char):x}}}" for char in text)
    safe = "".join(char if char.isalnum() or char == " " else f"&#{ord(char)};" for char in visible)
    return f"<code>{safe}</code>"
