"""The command that chooses tokens from texts: `choose`."""

from __future__ import annotations

import argparse
import json
import os
import tempfile
from collections.abc import Iterator, Sequence
from pathlib import Path

from ..errors import PartialEmbeddingError, count, shorten
from .output import OK, AddCommand, print_json, read_tokens, say

__all__ = ["add_choose"]

_BLOCK = 1024  # characters of a text file that are one text
_HELD_OUT = 10  # each tenth text is held out


def add_choose(command: AddCommand) -> None:
    """The arguments of `choose`."""
    made = command(
        "choose", _choose, "choose tokens that shorten texts most",
        "Choose the tokens that shorten texts most when they join the tokenizer's vocabulary, and say what they\n"
        "save: on the texts that they were chosen from, and on each tenth text, which is held out. Of MODEL only\n"
        "the tokenizer is loaded. A text file is taken in blocks of whole lines, about a thousand characters each.",
        "  hf-partial-embed choose HuggingFaceTB/SmolLM2-135M notes.txt --count 1000 --out tokens.json\n"
        "  hf-partial-embed choose HuggingFaceTB/SmolLM2-135M data.jsonl --saving 0.1 --script Cyrillic\n"
        "  hf-partial-embed add HuggingFaceTB/SmolLM2-135M tokens.json prepared",
    )  # fmt: skip
    made.add_argument("model", metavar="MODEL", help="folder or Hub repository with the tokenizer")
    made.add_argument(
        "texts", metavar="TEXTS", nargs="+", help='text files, or .jsonl files of objects with the text under "text"'
    )
    made.add_argument("--count", type=int, metavar="N", help="how many tokens, each one row, parts among them")
    made.add_argument("--saving", type=float, metavar="X", help="stop when this part of the tokens is saved, e.g. 0.1")
    made.add_argument("--min-count", type=int, default=2, metavar="N", help="how often each must occur (default: 2)")
    made.add_argument("--whole-words", action="store_true", help="only whole words, with the parts that they need")
    made.add_argument("--script", metavar="NAME", help="only letters of one Unicode script, e.g. Cyrillic")
    made.add_argument("--leave-out", metavar="FILE", help="texts that do not become tokens, in a file like OUT")
    made.add_argument(
        "--out", metavar="FILE", help="file to write: .json for a list, else text with a token a line, for add"
    )
    made.add_argument("--force", action="store_true", help="replace FILE where it exists")


def _choose(options: argparse.Namespace) -> int:
    out = Path(options.out) if options.out else None
    if out is not None and (out.is_dir() or (out.exists() and not options.force)):
        remedy = "" if out.is_dir() else ", or pass --force to replace it"
        raise PartialEmbeddingError(f"{out} exists. Choose another file{remedy}.")
    leave_out = list(read_tokens(Path(options.leave_out))) if options.leave_out else []
    from ..files.pretrained import load_tokenizer
    from ..tokens.choosing import choose_tokens

    tokenizer, progress = load_tokenizer(options.model), not options.quiet
    tokens = choose_tokens(
        tokenizer, _texts(options.texts, held_out=False), options.count, saving=options.saving,
        min_count=options.min_count, whole_words=options.whole_words, script=options.script, leave_out=leave_out,
        progress=progress,
    )  # fmt: skip
    held_out = None
    if any(text.strip() for text in _texts(options.texts, held_out=True)):
        held_out = tokens.measure(tokenizer, _texts(options.texts, held_out=True), progress=progress)
    if out is not None:
        _write(out, tokens)
    if options.json:
        return print_json(out=options.out, **tokens.to_dict(), held_out=held_out)
    say(str(tokens))
    say(f"expected on these texts: {_line(tokens.tokens_before, tokens.tokens_after)}")
    if held_out is None:
        say(f"held out: nothing, there are fewer than {_HELD_OUT} texts")
    else:
        say(f"held-out tenth of the texts: {_line(held_out['tokens_before'], held_out['tokens_after'])}")
        if longer := held_out["longer_words"]:
            become = "becomes" if len(longer) == 1 else "become"
            say(f"{count(longer, 'word')} of the held-out texts {become} longer: {shorten(longer)}")
    if out is not None:
        say(f"wrote {count(tokens, 'token')} to {out}")
    return OK


def _line(before: int, after: int) -> str:
    return f"{before:,} tokens become {after:,} ({100 * (after - before) / before:+.1f}%)"


def _texts(paths: Sequence[str], *, held_out: bool) -> Iterator[str]:
    """The texts of all files but each tenth, or each tenth alone; read as they are asked for."""
    number = 0
    for path in map(Path, paths):
        for text in _jsonl(path) if path.suffix == ".jsonl" else _blocks(path):
            number += 1
            if (number % _HELD_OUT == 0) == held_out:
                yield text


def _blocks(path: Path) -> Iterator[str]:
    lines, size = list[str](), 0
    try:
        with path.open(encoding="utf-8", newline="") as file:
            for line in file:
                lines.append(line)
                size += len(line)
                if size >= _BLOCK:
                    yield "".join(lines)
                    lines, size = [], 0
    except UnicodeDecodeError as error:
        raise PartialEmbeddingError(f"{path} is no UTF-8 text: {error}. Convert it first.") from error
    if lines:
        yield "".join(lines)


def _jsonl(path: Path) -> Iterator[str]:
    with path.open("rb") as file:
        for number, line in enumerate(file, 1):
            if not line.strip():
                continue
            try:
                value = json.loads(line)
                text = value["text"] if isinstance(value, dict) else None
            except (ValueError, KeyError, RecursionError):
                text = None
            if not isinstance(text, str):
                raise PartialEmbeddingError(
                    f'Line {number} of {path} is no JSON object with a string under "text". Each line must be one.'
                )
            yield text


def _write(out: Path, tokens: Sequence[str]) -> None:
    if out.suffix == ".json":
        content = json.dumps(list(tokens), ensure_ascii=False, indent=1) + "\n"
    else:
        broken = [token for token in tokens if token.splitlines() != [token]]
        if broken:
            raise PartialEmbeddingError(
                f"{count(broken, 'token')} cannot stand on a line of {out}, such as {broken[0]!r}. Name a .json file."
            )
        content = "".join(f"{token}\n" for token in tokens)
    out.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix=f".{out.name}.", dir=out.parent) as folder:
        written = Path(folder) / out.name
        written.write_bytes(content.encode())
        os.replace(written, out)
