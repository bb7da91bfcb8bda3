"""The command that measures what tokens are worth on texts: `evaluate`."""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

from ..errors import PartialEmbeddingError
from .output import OK, AddCommand, print_json, say

__all__ = ["add_evaluate"]


def add_evaluate(command: AddCommand) -> None:
    """The arguments of `evaluate`."""
    made = command(
        "evaluate", _evaluate, "measure before and after on texts",
        "Compare a model that has new tokens with its base on texts: tokens, bits per byte, KL, adoption, leak, and\n"
        "each token, the worst first. ADAPTED is a row file or repository, which is put on BASE, or a merged\n"
        "checkpoint. Give texts that were not trained on, with the new tokens and without.",
        "  hf-partial-embed evaluate HuggingFaceTB/SmolLM2-135M my-tokens --texts held-out.txt\n"
        "  hf-partial-embed evaluate HuggingFaceTB/SmolLM2-135M merged --texts held-out.jsonl --picture report.png",
    )  # fmt: skip
    made.add_argument("base", metavar="BASE", help="folder or Hub repository of the model before")
    made.add_argument("adapted", metavar="ADAPTED", help="rows, or a merged checkpoint")
    made.add_argument(
        "--texts", required=True, metavar="FILE",
        help="a text a line; or .jsonl: JSON lines, each a string or an object with `text`",
    )  # fmt: skip
    made.add_argument("--picture", metavar="FILE", help="picture to be written (.png, .pdf, .svg)")
    made.add_argument("--batch-size", type=int, default=8, metavar="N", help="windows in a batch (default: 8)")
    made.add_argument(
        "--max-length", type=int, metavar="N", help="tokens in a window (default: the context, at most 4096)"
    )
    made.add_argument("--stride", type=int, metavar="N", help="tokens of context of further windows (default: half)")
    made.add_argument("--time", type=int, default=0, metavar="N", help="time generation on N texts (default: 0)")


def _evaluate(options: argparse.Namespace) -> int:
    texts = _read_texts(Path(options.texts))
    picture = None if options.picture is None else _picture(Path(options.picture))
    from ..evaluation.evaluate import evaluate

    arguments: dict[str, Any] = {
        "batch_size": options.batch_size, "max_length": options.max_length, "stride": options.stride,
        "timed_texts": options.time, "progress": not options.quiet,
    }  # fmt: skip
    if _is_checkpoint(Path(options.adapted)):
        report = evaluate(options.base, options.adapted, texts, **arguments)
    else:
        from ..api import load_tokens
        from ..files.pretrained import load_model, load_tokenizer

        model, tokenizer = load_model(options.base), load_tokenizer(options.base)
        report = evaluate(None, load_tokens(model, tokenizer, options.adapted, trainable=False), texts, **arguments)
    if picture is not None:
        from ..evaluation.plot import plot_report

        plot_report(report, path=picture)
    if options.json:
        return print_json(**report.to_dict())
    say(str(report))
    if picture is not None:
        say(f"\nwrote {picture}")
    return OK


def _is_checkpoint(adapted: Path) -> bool:
    """Whether it is a merged checkpoint; what is not here is looked for as rows on the Hub."""
    from ..files.rows_file import ROWS_FILE

    return (adapted / "config.json").is_file() and not (adapted / ROWS_FILE).is_file()


def _picture(path: Path) -> Path:
    """Where the picture goes; what is wrong with it is said before any model is loaded."""
    from ..optional import need

    need("matplotlib.figure", "plot", "--picture")
    if path.suffix.lower() not in (".png", ".pdf", ".svg"):
        raise PartialEmbeddingError(f"--picture {path}: name a .png, .pdf or .svg file.")
    if path.is_dir() or not path.parent.is_dir():
        raise PartialEmbeddingError(f"--picture {path}: there is no folder {path.parent}, or it is a folder itself.")
    return path


def _read_texts(path: Path) -> list[str]:
    """Texts of a file: its lines, or those of its JSON lines."""
    try:
        lines = [line for line in path.read_text("utf-8").split("\n") if line.strip()]
    except (OSError, ValueError) as error:
        raise PartialEmbeddingError(f"Cannot read the texts from {path}: {error}") from error
    lines = [line.removesuffix("\r") for line in lines]
    if path.suffix in (".jsonl", ".json"):
        lines = [_text_of(path, number, line) for number, line in enumerate(lines, 1)]
    if not any(lines):
        raise PartialEmbeddingError(f"{path} has no text in it.")
    return lines


def _text_of(path: Path, number: int, line: str) -> str:
    try:
        value = json.loads(line)
    except (ValueError, RecursionError) as error:
        raise PartialEmbeddingError(f"{path}, line {number}, is no JSON: {error}") from error
    text = value.get("text") if isinstance(value, dict) else value
    if not isinstance(text, str):
        raise PartialEmbeddingError(f'{path}, line {number}, is neither a string nor an object with "text".')
    return text
