"""The command that measures what tokens are worth on texts: `evaluate`."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

from ..errors import PartialEmbeddingError
from .data import read_file
from .numbers import natural, whole_number
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
        help="a text a line; or .jsonl: JSON lines, each a string or an object with `text` or `messages`",
    )  # fmt: skip
    made.add_argument("--column", metavar="NAME", help="field of the JSON lines (default: text, else messages)")
    made.add_argument("--picture", metavar="FILE", help="picture to be written (.png, .pdf, .svg)")
    whole = {"type": whole_number, "metavar": "N"}
    made.add_argument("--batch-size", default=8, help="windows in a batch (default: 8)", **whole)
    made.add_argument("--max-length", help="tokens in a window (default: the context, at most 4096)", **whole)
    made.add_argument("--stride", help="tokens of context of further windows (default: half)", **whole)
    made.add_argument("--time", type=natural, default=0, metavar="N", help="time generation on N texts (default: 0)")


def _evaluate(options: argparse.Namespace) -> int:
    data = read_file(Path(options.texts), column=options.column)
    picture = None if options.picture is None else _picture(Path(options.picture))
    from ..evaluation.evaluate import evaluate
    from ..files.pretrained import load_model, load_tokenizer

    arguments: dict[str, Any] = {
        "batch_size": options.batch_size, "max_length": options.max_length, "stride": options.stride,
        "timed_texts": options.time, "progress": not options.quiet,
    }  # fmt: skip
    if _is_checkpoint(Path(options.adapted)):
        tokenizer = load_tokenizer(options.adapted)
        texts = data.rendered(tokenizer)
        report = evaluate(options.base, (load_model(options.adapted), tokenizer), texts, **arguments)
    else:
        from ..attachment.partial import TokenRows

        rows, tokenizer = TokenRows.from_pretrained(options.adapted), load_tokenizer(options.base)
        texts = data.rendered(tokenizer)
        partial = rows.attach(load_model(options.base), tokenizer, trainable=False)
        report = evaluate(None, partial, texts, **arguments)
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
