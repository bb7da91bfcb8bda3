"""The Hugging Face Hub: finding a row file there, and publishing rows or merged models with a model card."""

from __future__ import annotations

import html
import logging
import os
import re
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from huggingface_hub import HfApi, ModelCard, ModelCardData, hf_hub_download
from huggingface_hub.errors import (
    EntryNotFoundError,
    GatedRepoError,
    HfHubHTTPError,
    HFValidationError,
    LocalEntryNotFoundError,
    RepositoryNotFoundError,
    RevisionNotFoundError,
)
from huggingface_hub.utils import validate_repo_id  # type: ignore[attr-defined]

from ..errors import PartialEmbeddingError, count
from .rows_file import ROWS_FILE, write_atomically

__all__ = [
    "add_to_card", "check_upload", "entries_in_words", "hub_errors", "locate_rows", "merged_card", "rows_card",
    "upload", "write_card",
]  # fmt: skip

logger = logging.getLogger(__name__)

# Base of the HTTP library's errors, also those without a response. Versions of huggingface_hub differ in the library.
_HTTPError: type[Exception] = next(base for base in HfHubHTTPError.__mro__ if base.__name__ == "HTTPError")

_LIBRARY = "hf_partial_embed"
_CARD = "README.md"
_MARK = f"<!-- {_LIBRARY} writes this card anew at every save. Remove this line to keep a card of your own. -->"
_SHOWN_TOKENS = 100


def locate_rows(
    source: str | os.PathLike[str], *, revision: str | None = None, token: str | bool | None = None
) -> Path:
    """The path of a row file: given itself, in a folder, or downloaded from a Hub repository.

    Raises:
        `PartialEmbeddingError`: there is none.
    """
    path = Path(source)
    if os.path.isfile(path):
        return path
    if os.path.isdir(path):
        if not (path / ROWS_FILE).is_file():
            there = sorted(entry.name for entry in path.iterdir())
            raise PartialEmbeddingError(f"The folder {path} has no {ROWS_FILE}; it holds {there[:10]}.")
        return path / ROWS_FILE
    with hub_errors(f"Cannot read rows from {str(source)!r}", revision):
        return Path(hf_hub_download(str(source), ROWS_FILE, revision=revision, token=token))


@contextmanager
def hub_errors(problem: str, revision: str | None = None) -> Iterator[None]:
    """Turn any error of `huggingface_hub` into a `PartialEmbeddingError` that says what to do."""
    try:
        yield
    except (_HTTPError, EntryNotFoundError, OSError, ValueError, RuntimeError) as error:
        raise PartialEmbeddingError(f"{problem}: {_reason(error, revision)}") from error


def _reason(error: Exception, revision: str | None) -> str:
    log_in = "log in (`hf auth login`) or pass token="
    if isinstance(error, HFValidationError):
        return f"it is no file or folder here, and no repository id of the Hub. {error}"
    if isinstance(error, RevisionNotFoundError):
        return f"the Hub repository has no branch, tag or commit {revision!r}. Its page lists those that it has."
    if isinstance(error, GatedRepoError):
        return f"the Hub repository is gated. Ask for access on its page, then {log_in}."
    if isinstance(error, RepositoryNotFoundError):
        return (
            "there is no such folder here, and no repository of that name on the Hub that you can read. Check the "
            f"name; for a private repository {log_in}."
        )
    if isinstance(error, LocalEntryNotFoundError):
        return f"the Hub cannot be reached, and the local cache has no copy. {error.__cause__ or error}"
    if isinstance(error, EntryNotFoundError):
        return f"the Hub repository has no {ROWS_FILE}. A whole model is loaded with from_pretrained of its class."
    if isinstance(error, HfHubHTTPError) and error.response.status_code in (401, 403):
        return f"{error}\nTo be let in, {log_in} with a token that has the permission."
    if isinstance(error, RuntimeError) and error.__cause__:  # an upload: what went wrong is the cause
        return f"{error} {error.__cause__}"
    return str(error)


def check_upload(repo_id: str) -> None:
    """Check that a repository has a name that can be, and that somebody is logged in to push to it.

    Raises:
        `PartialEmbeddingError`: one of them is not so.
    """
    with hub_errors(f"Cannot push to {repo_id!r}"):
        validate_repo_id(repo_id)
        HfApi().whoami()


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
    """Upload a folder, creating repository and branch where there are none; returns the URL of the commit.

    A model card in the repository that this package has not written is kept.
    """
    if create_pr and revision not in (None, "main"):
        raise PartialEmbeddingError(
            f"create_pr=True opens a pull request against the main branch; revision={revision!r} cannot be had "
            "with it. Leave out one of them."
        )
    api = HfApi(token=token)
    with hub_errors(f"Cannot push to {repo_id!r}", revision):
        repo_id = api.create_repo(repo_id, private=private, exist_ok=True).repo_id
        if revision is not None and not create_pr and not revision.startswith("refs/"):
            api.create_branch(repo_id, branch=revision, exist_ok=True)
        keep_card = _has_card_of_its_own(api, repo_id, revision)
        if keep_card:
            logger.warning("The %s of %s is not by %s; it was left as it is.", _CARD, repo_id, _LIBRARY)
        info = api.upload_folder(
            repo_id=repo_id,
            folder_path=folder,
            revision=revision,
            commit_message=commit_message,
            create_pr=create_pr,
            ignore_patterns=[_CARD] if keep_card else None,
        )
    return str(info.pr_url or info.commit_url)


def _has_card_of_its_own(api: HfApi, repo_id: str, revision: str | None) -> bool:
    try:
        path = api.hf_hub_download(repo_id, _CARD, revision=revision)
    except EntryNotFoundError:
        return False
    return not _is_ours(Path(path))


def _is_ours(card: Path) -> bool:
    return _MARK in card.read_text("utf-8", errors="replace")


def write_card(folder: Path, card: ModelCard) -> None:
    """Write `README.md`, unless there is one that this package has not written."""
    path = folder / _CARD
    if not path.is_file() or _is_ours(path):
        write_atomically(path, lambda temporary: temporary.write_text(str(card), "utf-8"))


def add_to_card(folder: Path, section: str) -> None:
    """Add a section to the card in a folder, unless it is somebody else's."""
    path = folder / _CARD
    if _is_ours(path):
        text = f"{path.read_text('utf-8').rstrip()}\n\n{section}"
        write_atomically(path, lambda temporary: temporary.write_text(text, "utf-8"))


def rows_card(
    tokens: Sequence[str],
    sizes: dict[str, Sequence[int]],
    *,
    base_model: str | None,
    repo_id: str,
    file_bytes: int,
    entries: Sequence[str] = (),
) -> ModelCard:
    """The card of a repository of rows."""
    hub_id = _hub_id(base_model)
    name = hub_id or Path(base_model or "").name
    base = hub_id or f"path/to/{name or 'the-base-model'}"
    source = Path(repo_id).name if os.path.isabs(repo_id) else repo_id
    shapes = "\n".join(f"| {_name(tensor)} | {' × '.join(map(str, shape))} |" for tensor, shape in sizes.items())
    text = f"""# {count(tokens, "trained token embedding")}{f" for {_escape(name)}" if name else ""}

The embedding rows of {count(tokens, "token")}, trained while all other rows of the model's embeddings stayed
frozen to the bit. `{ROWS_FILE}` holds these rows and nothing else of the model; it is {file_bytes:,} bytes long.

## Use

With `{_LIBRARY}` installed, put the rows on the model that they were trained on:

```python
from hf_partial_embed import load_tokens
from transformers import AutoModelForCausalLM, AutoTokenizer

model = AutoModelForCausalLM.from_pretrained({base!r})  # or another class that fits it
tokenizer = AutoTokenizer.from_pretrained({base!r})
partial = load_tokens(model, tokenizer, {source!r}, trainable=False)
```

`load_tokens` adds the tokens that the tokenizer does not have. After `partial.merge()` the model is an ordinary
one: its `save_pretrained` writes a checkpoint that loads without `{_LIBRARY}`.

## Tokens

{_entries(entries)}{_token_list(tokens)}

## Tensors

| name | shape |
| --- | --- |
{shapes}
"""
    return _card(text, hub_id, "adapter", _LIBRARY)


def merged_card(
    tokens: Sequence[str],
    *,
    base_model: str | None,
    repo_id: str,
    model_class: str,
    entries: Sequence[str] = (),
) -> ModelCard:
    """The card of a merged model."""
    hub_id = _hub_id(base_model)
    name = hub_id or Path(base_model or "").name
    title = f"{_escape(name)} with trained token embeddings" if name else "A model with trained token embeddings"
    what = count(tokens, "token") if tokens else "some tokens"
    listed = f"\n## Tokens\n\n{_entries(entries)}{_token_list(tokens)}\n" if tokens else ""
    text = f"""# {title}

The embedding rows of {what} were trained with `{_LIBRARY}`, and all other rows of the embeddings stayed
frozen to the bit. This is an ordinary checkpoint: `transformers` alone loads it.

## Use

```python
from transformers import AutoTokenizer, {model_class}

model = {model_class}.from_pretrained({repo_id!r})
tokenizer = AutoTokenizer.from_pretrained({repo_id!r})
```
{listed}"""
    return _card(text, hub_id, "finetune", "transformers")


def _hub_id(base_model: str | None) -> str | None:
    """The base model's name if it can be a Hub id; `None` for a path, which means nothing on another machine."""
    is_id = base_model and re.fullmatch(r"(\w[\w.-]*/)?\w[\w.-]*", base_model) and not os.path.exists(base_model)
    return base_model if is_id else None


def _card(text: str, base_model: str | None, relation: str, library: str) -> ModelCard:
    extra: dict[str, Any] = {"base_model": base_model, "base_model_relation": relation} if base_model else {}
    data = ModelCardData(library_name=library, tags=["token-embeddings", "vocabulary-extension"], **extra)
    return ModelCard(f"---\n{data.to_yaml()}\n---\n\n{_MARK}\n\n{text}")


def entries_in_words(entries: Sequence[str]) -> str:
    """How many of some tokens entered the tokenizer in which way."""
    kinds = {
        "vocabulary": "in the vocabulary of its model",
        "part": "in the vocabulary as parts of those",
        "added": "added tokens",
    }
    return ", ".join(f"{entries.count(kind)} {words}" for kind, words in kinds.items() if kind in entries)


def _entries(entries: Sequence[str]) -> str:
    if not set(entries) - {"added"}:
        return ""
    return (
        f"In the tokenizer: {entries_in_words(entries)}. Added tokens are cut out of a text before the tokenizer's "
        "model reads it; those in its vocabulary are what the model makes of a text that it reads.\n\n"
    )


def _token_list(tokens: Sequence[str]) -> str:
    shown = "\n".join(f"- {_escape(token)}" for token in tokens[:_SHOWN_TOKENS])
    rest = len(tokens) - _SHOWN_TOKENS
    return shown if rest <= 0 else f"{shown}\n- and {rest} more"


def _name(tensor: str) -> str:
    """The name of a tensor as Markdown: a code span, or escaped where it has unusual characters."""
    return f"`{tensor}`" if re.fullmatch(r"[\w.]+", tensor) else _escape(tensor)


def _escape(text: str) -> str:
    """Any text as literal text: no Markdown or HTML in it takes effect, and invisible characters are shown."""
    return f"<code>{''.join(map(_escape_char, text))}</code>"


def _escape_char(char: str) -> str:
    if not char.isprintable():
        return f"&#92;u&#123;{ord(char):x}&#125;"
    if char == " ":
        return "&nbsp;"  # HTML drops spaces at the ends and joins several into one
    if char in "<>&":
        return html.escape(char)
    return char if char.isalnum() or not char.isascii() else f"&#{ord(char)};"
