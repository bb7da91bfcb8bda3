"""What the commands share: exit statuses, printing, reading arguments, and writing folders."""

from __future__ import annotations

import argparse
import contextlib
import json
import logging
import os
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..errors import PartialEmbeddingError, visible

if TYPE_CHECKING:
    from ..attachment.partial import TokenRows

__all__ = [
    "BAD_INPUT",
    "CRASHED",
    "DIFFERS",
    "FORMATS",
    "INTERRUPTED",
    "OK",
    "AddCommand",
    "VisibleFormatter",
    "add_out",
    "add_reading",
    "check_out",
    "fresh_folder",
    "print_json",
    "read_rows",
    "read_tokens",
    "say",
    "silence",
]

OK, DIFFERS, BAD_INPUT, CRASHED, INTERRUPTED = 0, 1, 2, 3, 130

# Adds a command to the parser: its name, what runs it, a summary, a text and an example; gives its own parser.
AddCommand = Callable[[str, Callable[[Any], int], str, str, str], argparse.ArgumentParser]

FORMATS = ("rows", "peft", "textual-inversion")


def add_out(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("out", metavar="OUT", help="folder to be written")
    parser.add_argument("--force", action="store_true", help="replace OUT where it exists")


def add_reading(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--from", dest="format", choices=FORMATS, help="format of the rows, where it is not found out")
    parser.add_argument("--tokenizer", metavar="PATH", help="tokenizer with the tokens' texts, for a PEFT adapter")
    parser.add_argument("--token", metavar="TEXT", help="placeholder, for a textual-inversion file that has none")
    parser.add_argument("--encoder", choices=("clip_l", "clip_g"), help="of a textual-inversion file for two encoders")


def read_rows(options: argparse.Namespace) -> TokenRows:
    """Rows in whatever format they are."""
    kind = options.format or _format_of(Path(options.source))
    if kind == "peft":
        from ..files.pretrained import load_tokenizer, model_skeleton
        from ..formats import read_peft

        tokenizer = load_tokenizer(options.tokenizer) if options.tokenizer else None
        base = getattr(options, "base", None)
        return read_peft(options.source, tokenizer, model=model_skeleton(base) if base else None)
    if kind == "textual-inversion":
        from ..formats import read_textual_inversion

        return read_textual_inversion(options.source, token=options.token, encoder=options.encoder)
    from ..attachment.partial import TokenRows

    return TokenRows.from_pretrained(options.source)


def _format_of(source: Path) -> str:
    """Which format a file or folder is in; a Hub repository is taken for one of rows."""
    from ..files.rows_file import ROWS_FILE, is_rows_file
    from ..formats.peft import is_peft_adapter
    from ..formats.reading import PICKLES

    if source.is_file():
        return "rows" if is_rows_file(source) else "textual-inversion"
    if source.is_dir() and not (source / ROWS_FILE).is_file():
        if is_peft_adapter(source):
            return "peft"
        if any((source / f"learned_embeds{suffix}").is_file() for suffix in (".safetensors", *PICKLES)):
            return "textual-inversion"
    return "rows"


def read_tokens(path: Path) -> list[str] | dict[str, str]:
    """Tokens of a file, from each to its description where there are any.

    Raises:
        `PartialEmbeddingError`: it cannot be read, or has none.
    """
    try:
        text = path.read_text("utf-8")
        value = json.loads(text) if path.suffix == ".json" else [line for line in text.splitlines() if line]
    except (OSError, ValueError, RecursionError) as error:
        raise PartialEmbeddingError(f"Cannot read the tokens from {path}: {error}") from error
    strings = value.values() if isinstance(value, dict) else value
    if not isinstance(value, (list, dict)) or not all(isinstance(entry, str) for entry in strings):
        raise PartialEmbeddingError(
            f"{path} must be a JSON list of tokens, or an object from each token to a description."
        )
    if not value:
        raise PartialEmbeddingError(f"{path} has no token in it.")
    return value


def check_out(options: argparse.Namespace) -> None:
    """Refuse an output folder with something in it before any work is done."""
    out = Path(options.out)
    if out.is_file() or (out.is_dir() and any(out.iterdir()) and not options.force):
        remedy = "" if out.is_file() else ", or pass --force to replace it"
        raise PartialEmbeddingError(f"{out} exists and is not empty. Choose another place{remedy}.")


@contextlib.contextmanager
def fresh_folder(options: argparse.Namespace) -> Iterator[Path]:
    """A folder that takes the place of OUT when all has been written to it; on an error nothing has changed."""
    out = Path(options.out)
    out.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix=f".{out.name}.", dir=out.parent) as name:
        folder = Path(name) / "new"
        folder.mkdir()
        yield folder
        old = Path(name) / "old"
        if out.exists():
            os.replace(out, old)
        try:
            os.replace(folder, out)
        except BaseException:
            if old.exists():
                os.replace(old, out)
            raise


def say(text: str) -> None:
    print(visible(text, keep="\n"))


def print_json(**values: Any) -> int:
    print(json.dumps(values, indent=2))  # ASCII: every control character is escaped
    return OK


class VisibleFormatter(logging.Formatter):
    def format(self, record: logging.LogRecord) -> str:
        return visible(super().format(record), keep="\n")


def silence() -> None:
    from transformers.utils import logging as transformers_logging

    transformers_logging.disable_progress_bar()  # type: ignore[no-untyped-call]
    transformers_logging.set_verbosity_error()  # type: ignore[no-untyped-call]
