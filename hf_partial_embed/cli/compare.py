"""The command that compares checkpoints: `verify`."""

from __future__ import annotations

import argparse
from typing import TYPE_CHECKING, Any

from ..errors import count, shorten, visible
from .output import DIFFERS, OK, AddCommand, print_json, say

if TYPE_CHECKING:
    from ..files.checkpoints import CheckpointReport

__all__ = ["add_verify"]


def add_verify(command: AddCommand) -> None:
    """The arguments of `verify`."""
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


def _id_list(text: str) -> list[int]:
    ids: list[int] = []
    for part in text.split(","):
        first, dash, last = part.strip().partition("-")
        if not first.isdecimal() or (dash and not last.isdecimal()):
            raise argparse.ArgumentTypeError(f"{part!r} is no id and no range of ids such as 100-120")
        ids.extend(range(int(first), int(last or first) + 1))
    return ids


def _verify(options: argparse.Namespace) -> int:
    from ..files.checkpoints import verify_checkpoint

    allowed = set(options.ids)
    if options.rows:
        from ..attachment.partial import TokenRows
        from ..files.pretrained import load_tokenizer
        from ..tokens.stored import stored_ids
        from ..tokens.vocabulary import plain_tokenizer

        rows = TokenRows.from_pretrained(options.rows)
        if rows.tokens:
            tokenizer = plain_tokenizer(load_tokenizer(options.adapted), needed=True)
            allowed.update(stored_ids(tokenizer, rows.added_tokens))
        else:
            allowed.update(rows.token_ids)
    report = verify_checkpoint(options.base, options.adapted, progress=not options.quiet)
    unexpected = [token_id for token_id in report.changed_ids if token_id not in allowed]
    same = not (report.changed or report.missing or report.unexpected or unexpected)
    if options.json:
        print_json(same=same, **_report_dict(report, unexpected))
    else:
        report.tables = {visible(name): table for name, table in report.tables.items()}
        say(str(report))
        say("only added or allowed rows differ" if same else f"DIFFERENT{_differences(report, unexpected)}")
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
