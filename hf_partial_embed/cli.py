"""The command `hf-partial-embed`, for those who do not write Python."""

from __future__ import annotations

import argparse
import contextlib
import json
import logging
import os
import sys
import tempfile
import traceback
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from . import __version__
from .errors import PartialEmbeddingError, count, shorten, visible

if TYPE_CHECKING:
    from .checkpoints import CheckpointReport
    from .partial import TokenRows

__all__ = ["main"]

OK, DIFFERS, BAD_INPUT, CRASHED, INTERRUPTED = 0, 1, 2, 3, 130

_DESCRIPTION = """\
Add tokens to a Hugging Face model, move their trained rows between files and models, and check that nothing else
of a model has changed. Training itself is done in Python: see add_tokens and PartialEmbeddingCallback.

BASE, MODEL and ROWS are folders, files or repositories of the Hub. Nothing is unpickled and no code of a
repository is run."""

_EPILOG = """\
exit status:
  0    done; for verify: nothing differs but what may
  1    verify found a difference
  2    bad input: the message says what to do
  3    an error of the program, with its traceback"""

_FORMATS = ("rows", "peft", "textual-inversion")
_SHOWN = 50


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command; returns its exit status."""
    parser = _parser()
    options = parser.parse_args(arguments)
    handler = logging.StreamHandler()
    handler.setFormatter(_VisibleFormatter("%(levelname)s: %(message)s"))
    logging.getLogger(__package__).addHandler(handler)
    try:
        if options.quiet:
            _silence()
        status: int = options.run(options)
        sys.stdout.flush()
        return status
    except PartialEmbeddingError as error:
        message = visible(str(error), keep="\n")
        print(f"{parser.prog} {options.command}: error: {message}", file=sys.stderr)
        return BAD_INPUT
    except BrokenPipeError:  # `... | head`: whoever read the output has seen enough
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return OK
    except OSError as error:
        print(f"{parser.prog} {options.command}: error: {visible(str(error))}", file=sys.stderr)
        return BAD_INPUT
    except KeyboardInterrupt:
        print("interrupted; nothing was left half written", file=sys.stderr)
        return INTERRUPTED
    except Exception:  # noqa: BLE001  # Python's own status would be 1, which here says that checkpoints differ
        traceback.print_exc()
        return CRASHED
    finally:
        logging.getLogger(__package__).removeHandler(handler)


class _VisibleFormatter(logging.Formatter):
    def format(self, record: logging.LogRecord) -> str:
        return visible(super().format(record), keep="\n")


def _silence() -> None:
    from transformers.utils import logging as transformers_logging

    transformers_logging.disable_progress_bar()  # type: ignore[no-untyped-call]
    transformers_logging.set_verbosity_error()  # type: ignore[no-untyped-call]


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        "hf-partial-embed",
        description=_DESCRIPTION,
        epilog=_EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--version", action="version", version=f"%(prog)s {__version__}")
    commands = parser.add_subparsers(dest="command", metavar="COMMAND", required=True)

    def command(
        name: str, run: Callable[[Any], int], summary: str, text: str, example: str
    ) -> argparse.ArgumentParser:
        made = commands.add_parser(
            name,
            help=summary,
            description=text,
            epilog=f"example:\n{example}",
            formatter_class=argparse.RawDescriptionHelpFormatter,
        )
        made.set_defaults(run=run)
        made.add_argument("--json", action="store_true", help="print one JSON object instead of text")
        made.add_argument("--quiet", action="store_true", help="no progress on stderr")
        return made

    made = command(
        "info", _info, "say what a row file holds",
        "Say which tokens a row file holds, for which model, and how large its tensors are. PEFT adapters and\n"
        "textual-inversion files are read too.",
        "  hf-partial-embed info my-tokens\n  hf-partial-embed info me/my-tokens --json",
    )  # fmt: skip
    made.add_argument("source", metavar="ROWS", help="folder, file or Hub repository")
    _add_reading(made)

    made = command(
        "add", _add, "add tokens to a model, ready to be trained",
        "Add tokens to a model and its tokenizer, start their rows from what they were made of before, and save\n"
        "both as an ordinary checkpoint. All old rows keep every bit.",
        "  printf '<think>\\n</think>\\n' > tokens.txt\n"
        "  hf-partial-embed add HuggingFaceTB/SmolLM2-135M tokens.txt prepared --special",
    )  # fmt: skip
    made.add_argument("model", metavar="MODEL", help="folder or Hub repository of the model")
    made.add_argument(
        "tokens", metavar="TOKENS",
        help="text file with a token a line; or a .json file: a list, or an object from token to description",
    )  # fmt: skip
    _add_out(made)
    made.add_argument("--special", action="store_true", help="add them as special tokens, which decoding can skip")
    made.add_argument("--init", default="subtoken_mean", metavar="NAME", help="initialiser (default: %(default)s)")
    made.add_argument("--seed", type=int, default=0, metavar="N", help="for initialisers that draw (default: 0)")

    made = command(
        "merge", _merge, "write rows into a model",
        "Put rows on their base model and save the result as an ordinary checkpoint, which transformers, vLLM,\n"
        "llama.cpp's converter and others load without this package.",
        "  hf-partial-embed merge HuggingFaceTB/SmolLM2-135M my-tokens merged\n"
        "  hf-partial-embed verify HuggingFaceTB/SmolLM2-135M merged",
    )  # fmt: skip
    made.add_argument("base", metavar="BASE", help="folder or Hub repository of the model that the rows belong to")
    made.add_argument("source", metavar="ROWS", help="row file, folder or Hub repository")
    _add_out(made)
    _add_reading(made)

    made = command(
        "verify", _verify, "compare two checkpoints bit for bit",
        "Compare two saved checkpoints bit for bit, piece by piece: no model is loaded, and memory does not grow\n"
        "with its size. Rows that only ADAPTED has may differ, and those named by --rows and --ids; anything else is\n"
        "reported, and the exit status is 1.",
        "  hf-partial-embed verify HuggingFaceTB/SmolLM2-135M merged && echo unchanged\n"
        "  hf-partial-embed verify Qwen/Qwen2.5-0.5B merged --rows my-tokens   # tokens on spare rows",
    )  # fmt: skip
    made.add_argument("base", metavar="BASE", help="checkpoint before")
    made.add_argument("adapted", metavar="ADAPTED", help="checkpoint after")
    made.add_argument("--rows", metavar="ROWS", help="row file whose tokens may differ, by ADAPTED's tokenizer")
    made.add_argument("--ids", type=_id_list, default=[], metavar="LIST", help="ids that may differ: 5,7,100-120")

    made = command(
        "convert", _convert, "convert between row files, PEFT and textual inversion",
        "Convert rows between the formats of this package (rows), of PEFT's TrainableTokens (peft) and of\n"
        "diffusers (textual-inversion). The format of SOURCE is found out.",
        "  hf-partial-embed convert peft-adapter my-tokens --to rows\n"
        "  hf-partial-embed convert my-tokens peft-adapter --to peft --base HuggingFaceTB/SmolLM2-135M\n"
        "  hf-partial-embed convert sdxl.safetensors cat --to rows --encoder clip_l --token '<cat>'",
    )  # fmt: skip
    made.add_argument("source", metavar="SOURCE", help="folder, file or Hub repository")
    _add_out(made)
    made.add_argument("--to", choices=_FORMATS, required=True, help="format to write")
    made.add_argument("--base", metavar="BASE", help="base model; needed to write peft")
    _add_reading(made)

    made = command(
        "neighbours", _neighbours, "nearest old tokens of each new row",
        "Name the old tokens whose input embeddings have the largest cosine to each row: what it has come to mean.\n"
        "Of the base model only the tokenizer and this one table are read.",
        "  hf-partial-embed neighbours my-tokens HuggingFaceTB/SmolLM2-135M --count 3",
    )  # fmt: skip
    made.add_argument("source", metavar="ROWS", help="row file, folder or Hub repository")
    made.add_argument("base", metavar="BASE", help="model that the rows belong to")
    made.add_argument("--count", type=int, default=5, metavar="N", help="neighbours of each row (default: 5)")
    _add_reading(made)
    return parser


def _add_out(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("out", metavar="OUT", help="folder to be written")
    parser.add_argument("--force", action="store_true", help="replace OUT where it exists")


def _add_reading(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--from", dest="format", choices=_FORMATS, help="format of the rows, where it is not found out"
    )
    parser.add_argument("--tokenizer", metavar="PATH", help="tokenizer with the tokens' texts, for a PEFT adapter")
    parser.add_argument("--token", metavar="TEXT", help="placeholder, for a textual-inversion file that has none")
    parser.add_argument("--encoder", choices=("clip_l", "clip_g"), help="of a textual-inversion file for two encoders")


def _id_list(text: str) -> list[int]:
    ids: list[int] = []
    for part in text.split(","):
        first, dash, last = part.strip().partition("-")
        if not first.isdecimal() or (dash and not last.isdecimal()):
            raise argparse.ArgumentTypeError(f"{part!r} is no id and no range of ids such as 100-120")
        ids.extend(range(int(first), int(last or first) + 1))
    return ids


def _info(options: argparse.Namespace) -> int:
    from .preparation import display_names

    rows = _read_rows(options)
    names = [visible(name) for name in display_names(rows.tokens, rows.token_ids)]
    tensors = {
        name: {"shape": list(tensor.shape), "dtype": str(tensor.dtype).removeprefix("torch.")}
        for name, tensor in rows.tensors().items()
    }
    norms = rows.input_rows.float().norm(dim=1).tolist()
    if options.json:
        return _print_json(
            tokens=rows.added_tokens, token_ids=rows.token_ids, base_model=rows.base_model, tied=rows.tied,
            tensors=tensors, input_norms=norms,
        )  # fmt: skip
    _print(f"{count(rows.token_ids, 'token row')} for {visible(rows.base_model or 'an unnamed model')}")
    _print(
        f"head: {'tied to the input embeddings' if rows.tied else 'own rows' if rows.output_rows is not None else '-'}"
    )
    for name, entry in tensors.items():
        _print(f"{visible(name)}: {' x '.join(map(str, entry['shape']))}, {entry['dtype']}")
    _print("tokens, with the norms of their input rows:")
    for name, norm in list(zip(names, norms, strict=True))[:_SHOWN]:
        _print(f"  {norm:8.3f}  {name}")
    if len(names) > _SHOWN:
        _print(f"  ... {len(names) - _SHOWN} more (--json lists all)")
    return OK


def _add(options: argparse.Namespace) -> int:
    tokens = _read_tokens(Path(options.tokens))
    _check_out(options)
    from .api import add_tokens
    from .pretrained import load_model, load_tokenizer

    model, tokenizer = load_model(options.model), load_tokenizer(options.model)
    partial = add_tokens(model, tokenizer, tokens, init=options.init, special=options.special, seed=options.seed)
    partial.merge()
    with _fresh_folder(options) as folder:
        model.save_pretrained(folder)
        tokenizer.save_pretrained(folder)
    if options.json:
        return _print_json(out=options.out, tokens=dict(zip(partial.tokens, partial.token_ids, strict=True)))
    _print(f"added {count(partial.token_ids, 'token')} with the ids {shorten(partial.token_ids)}; saved {options.out}")
    return OK


def _merge(options: argparse.Namespace) -> int:
    _check_out(options)
    rows = _read_rows(options)
    from .preparation import display_names
    from .pretrained import has_tokenizer, load_model, load_tokenizer

    model = load_model(options.base)
    # Rows by id need no tokenizer, but what is written should not lack it.
    tokenizer = load_tokenizer(options.base) if rows.tokens or has_tokenizer(options.base) else None
    partial = rows.attach(model, tokenizer if rows.tokens else None, trainable=False)
    partial.merge()
    with _fresh_folder(options) as folder:
        model.save_pretrained(folder)
        if tokenizer is not None:
            tokenizer.save_pretrained(folder)
    if options.json:
        names = display_names(partial.tokens, partial.token_ids)
        return _print_json(out=options.out, tokens=dict(zip(names, partial.token_ids, strict=True)))
    _print(f"merged {count(partial.token_ids, 'row')} at the ids {shorten(partial.token_ids)}; saved {options.out}")
    return OK


def _verify(options: argparse.Namespace) -> int:
    from .checkpoints import verify_checkpoint

    allowed = set(options.ids)
    if options.rows:
        from .partial import TokenRows
        from .preparation import plain_tokenizer
        from .pretrained import load_tokenizer
        from .vocabulary import find_ids

        rows = TokenRows.from_pretrained(options.rows)
        if rows.tokens:
            tokenizer = plain_tokenizer(load_tokenizer(options.adapted), needed=True)
            allowed.update(find_ids(tokenizer, rows.tokens))
        else:
            allowed.update(rows.token_ids)
    report = verify_checkpoint(options.base, options.adapted, progress=not options.quiet)
    unexpected = [token_id for token_id in report.changed_ids if token_id not in allowed]
    same = not (report.changed or report.missing or report.unexpected or unexpected)
    if options.json:
        _print_json(same=same, **_report_dict(report, unexpected))
    else:
        report.tables = {visible(name): table for name, table in report.tables.items()}
        _print(str(report))
        _print("only added or allowed rows differ" if same else f"DIFFERENT{_differences(report, unexpected)}")
    return OK if same else DIFFERS


def _report_dict(report: CheckpointReport, unexpected: list[int]) -> dict[str, Any]:
    return {
        "tensors_compared": report.compared,
        "changed_ids_not_allowed": unexpected,
        "tables": {
            name: {
                "base_rows": table.base_rows,
                "adapted_rows": table.adapted_rows,
                "changed_ids": table.changed_ids,
                "added_ids": table.added_ids,
            }
            for name, table in report.tables.items()
        },
        "changed": report.changed,
        "missing": report.missing,
        "unexpected": report.unexpected,
    }


def _differences(report: CheckpointReport, unexpected: list[int]) -> str:
    parts = [f"old rows {shorten(unexpected)}"] if unexpected else []
    parts += [
        f"{count(names, 'tensor')} {what} ({shorten(names, 4)})"
        for what, names in (("changed", report.changed), ("missing", report.missing), ("new", report.unexpected))
        if names
    ]
    return f": {'; '.join(parts)}"


def _convert(options: argparse.Namespace) -> int:
    rows = _read_rows(options)
    out = Path(options.out)
    if options.to == "textual-inversion":
        from .formats import write_textual_inversion

        if out.exists() and not options.force and (out.is_file() or any(out.iterdir())):
            raise PartialEmbeddingError(f"{out} exists. Choose another place, or pass --force to replace it.")
        write_textual_inversion(rows, out, token=options.token)
    else:
        _check_out(options)
        with _fresh_folder(options) as folder:
            if options.to == "rows":
                rows.save_pretrained(folder)
            else:
                _write_peft(rows, folder, options)
    if options.json:
        return _print_json(out=options.out, format=options.to, tokens=rows.tokens, token_ids=rows.token_ids)
    _print(f"wrote {count(rows.token_ids, 'row')} as {options.to}: {options.out}")
    return OK


def _write_peft(rows: TokenRows, folder: Path, options: argparse.Namespace) -> None:
    if not options.base:
        raise PartialEmbeddingError(
            "A PEFT adapter names modules and ids of its base model, which row files do not have. Pass --base."
        )
    from .formats import write_peft
    from .pretrained import load_model, load_tokenizer

    model = load_model(options.base)
    tokenizer = load_tokenizer(options.base) if rows.tokens else None
    partial = rows.attach(model, tokenizer)
    write_peft(partial.token_rows(), folder, model, tokenizer)


def _neighbours(options: argparse.Namespace) -> int:
    rows = _read_rows(options)
    from .neighbours import name_tokens, nearest_rows
    from .preparation import display_names, plain_tokenizer
    from .pretrained import input_table, load_tokenizer
    from .vocabulary import known_id

    tokenizer = plain_tokenizer(load_tokenizer(options.base), needed=True)
    table = input_table(options.base)
    own = {known_id(tokenizer, token) for token in rows.tokens} if rows.tokens else set(rows.token_ids)
    vocabulary = set(tokenizer.get_vocab().values())
    exclude = [token_id for token_id in range(len(table)) if token_id in own or token_id not in vocabulary]
    cosines, ids = nearest_rows(rows.input_rows, table, options.count, exclude=exclude)
    names = display_names(rows.tokens, rows.token_ids)
    found = {
        name: [
            {"token": text, "id": token_id, "cosine": round(cosine, 6)}
            for text, token_id, cosine in zip(name_tokens(tokenizer, near), near, values, strict=True)
        ]
        for name, near, values in zip(names, ids.tolist(), cosines.tolist(), strict=True)
    }
    if options.json:
        return _print_json(neighbours=found)
    for name, entries in found.items():
        _print(f"{visible(name)}: " + ", ".join(f"{entry['token']!r} {entry['cosine']:.3f}" for entry in entries))
    return OK


def _read_rows(options: argparse.Namespace) -> TokenRows:
    """Rows in whatever format they are."""
    kind = options.format or _format_of(Path(options.source))
    if kind == "peft":
        from .formats import read_peft
        from .pretrained import load_tokenizer, model_skeleton

        tokenizer = load_tokenizer(options.tokenizer) if options.tokenizer else None
        base = getattr(options, "base", None)
        return read_peft(options.source, tokenizer, model=model_skeleton(base) if base else None)
    if kind == "textual-inversion":
        from .formats import read_textual_inversion

        return read_textual_inversion(options.source, token=options.token, encoder=options.encoder)
    from .partial import TokenRows

    return TokenRows.from_pretrained(options.source)


def _format_of(source: Path) -> str:
    """Which format a file or folder is in; a Hub repository is taken for one of rows."""
    from .formats.files import PICKLES
    from .formats.peft import is_peft_adapter
    from .rows_file import ROWS_FILE, is_rows_file

    if source.is_file():
        return "rows" if is_rows_file(source) else "textual-inversion"
    if source.is_dir() and not (source / ROWS_FILE).is_file():
        if is_peft_adapter(source):
            return "peft"
        if any((source / f"learned_embeds{suffix}").is_file() for suffix in (".safetensors", *PICKLES)):
            return "textual-inversion"
    return "rows"


def _read_tokens(path: Path) -> list[str] | dict[str, str]:
    try:
        text = path.read_text("utf-8")
        if path.suffix == ".json":
            value = json.loads(text)
            if isinstance(value, list) and all(isinstance(token, str) for token in value):
                return value
            if isinstance(value, dict) and all(isinstance(description, str) for description in value.values()):
                return value
            raise PartialEmbeddingError(
                f"{path} must be a JSON list of tokens, or an object from each token to a description."
            )
    except (OSError, ValueError, RecursionError) as error:
        if isinstance(error, PartialEmbeddingError):
            raise
        raise PartialEmbeddingError(f"Cannot read the tokens from {path}: {error}") from error
    return [line for line in text.splitlines() if line]


def _check_out(options: argparse.Namespace) -> None:
    """Refuse an output folder with something in it before any work is done."""
    out = Path(options.out)
    if out.is_file() or (out.is_dir() and any(out.iterdir()) and not options.force):
        remedy = "" if out.is_file() else ", or pass --force to replace it"
        raise PartialEmbeddingError(f"{out} exists and is not empty. Choose another place{remedy}.")


@contextlib.contextmanager
def _fresh_folder(options: argparse.Namespace) -> Iterator[Path]:
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


def _print(text: str) -> None:
    print(visible(text, keep="\n"))


def _print_json(**values: Any) -> int:
    print(json.dumps(values, indent=2))  # ASCII: every control character is escaped
    return OK


if __name__ == "__main__":
    sys.exit(main())
