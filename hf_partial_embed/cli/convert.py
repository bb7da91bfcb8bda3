"""The command that converts rows between formats: `convert`."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import TYPE_CHECKING

from ..errors import PartialEmbeddingError, count
from .output import FORMATS, OK, AddCommand, add_out, add_reading, check_out, fresh_folder, print_json, read_rows, say

if TYPE_CHECKING:
    from ..attachment.partial import TokenRows

__all__ = ["add_convert"]


def add_convert(command: AddCommand) -> None:
    """The arguments of `convert`."""
    made = command(
        "convert", _convert, "convert between row files, PEFT, LoRA and textual inversion",
        "Convert rows between the formats of this package (rows), of PEFT's TrainableTokens (peft), of LoRA adapters\n"
        "for engines that serve many on one base (lora) and of diffusers (textual-inversion). The format of SOURCE\n"
        "is found out.",
        "  hf-partial-embed convert peft-adapter my-tokens --to rows\n"
        "  hf-partial-embed convert my-tokens peft-adapter --to peft --base HuggingFaceTB/SmolLM2-135M\n"
        "  hf-partial-embed convert my-tokens adapter --to lora --base grown-base --lora my-lora\n"
        "  hf-partial-embed convert sdxl.safetensors cat --to rows --encoder clip_l --token '<cat>'",
    )  # fmt: skip
    made.add_argument("source", metavar="SOURCE", help="folder, file or Hub repository")
    add_out(made)
    made.add_argument("--to", choices=(*FORMATS, "lora"), required=True, help="format to write")
    made.add_argument("--base", metavar="BASE", help="base model; needed to write peft and lora")
    made.add_argument(
        "--lora", metavar="ADAPTER", help="LoRA adapter of the same base to be joined with, for --to lora"
    )
    add_reading(made)


def _convert(options: argparse.Namespace) -> int:
    rows = read_rows(options)
    out = Path(options.out)
    if options.to == "textual-inversion":
        from ..formats import write_textual_inversion

        if out.exists() and not options.force and (out.is_file() or any(out.iterdir())):
            raise PartialEmbeddingError(f"{out} exists. Choose another place, or pass --force to replace it.")
        write_textual_inversion(rows, out, token=options.token)
    else:
        check_out(options)
        with fresh_folder(options) as folder:
            if options.to == "rows":
                rows._save(folder, repo_id=options.out)
            elif options.to == "peft":
                _write_peft(rows, folder, options)
            else:
                _write_lora(rows, folder, options)
    if options.json:
        return print_json(out=options.out, format=options.to, tokens=rows.tokens, token_ids=rows.token_ids)
    say(f"wrote {count(rows.token_ids, 'row')} as {options.to}: {options.out}")
    return OK


def _write_peft(rows: TokenRows, folder: Path, options: argparse.Namespace) -> None:
    _need_base(options)
    from ..files.pretrained import load_model, load_tokenizer
    from ..formats import write_peft

    model = load_model(options.base)
    tokenizer = load_tokenizer(options.base) if rows.tokens else None
    partial = rows.attach(model, tokenizer)
    write_peft(partial.token_rows(), folder, model, tokenizer)


def _write_lora(rows: TokenRows, folder: Path, options: argparse.Namespace) -> None:
    _need_base(options)
    from ..files.pretrained import load_model, load_tokenizer
    from ..formats import write_lora

    tokenizer = None
    if rows.tokens:  # ids as they are given on this base: tokens that it lacks take its spare rows
        model, tokenizer = load_model(options.base), load_tokenizer(options.base)
        rows = rows.attach(model, tokenizer, trainable=False).token_rows()
    write_lora(rows, folder, load_model(options.base), tokenizer, lora=options.lora)


def _need_base(options: argparse.Namespace) -> None:
    if not options.base:
        raise PartialEmbeddingError(
            "An adapter names modules and ids of its base model, which row files do not have. Pass --base."
        )
