"""Commands that write a model with rows in it: `add`, `merge`."""

from __future__ import annotations

import argparse
from pathlib import Path

from ..errors import PartialEmbeddingError, count, shorten
from .output import (
    OK,
    AddCommand,
    add_out,
    add_reading,
    check_out,
    fresh_folder,
    print_json,
    read_rows,
    read_tokens,
    say,
)

__all__ = ["add_add", "add_merge"]


def add_add(command: AddCommand) -> None:
    """The arguments of `add`."""
    made = command(
        "add", _add, "add tokens to a model, ready to be trained",
        "Add tokens to a model and its tokenizer, start their rows from what they were made of before, and save\n"
        "both as an ordinary checkpoint. All old rows keep every bit.",
        "  printf '<think>\\n</think>\\n' > tokens.txt\n"
        "  hf-partial-embed add HuggingFaceTB/SmolLM2-135M tokens.txt prepared --special\n"
        "  hf-partial-embed add HuggingFaceTB/SmolLM2-135M grown --spare 100 --pad-to-multiple-of 64   # for adapters",
    )  # fmt: skip
    made.add_argument("model", metavar="MODEL", help="folder or Hub repository of the model")
    made.add_argument(
        "tokens", metavar="TOKENS", nargs="?",
        help="text file with a token a line; or a .json file: a list, or an object from token to description; may be "
        "left out with --spare",
    )  # fmt: skip
    add_out(made)
    made.add_argument("--special", action="store_true", help="add them as special tokens, which decoding can skip")
    made.add_argument(
        "--entry", default="auto", choices=("auto", "added", "vocabulary"),
        help="how they enter the tokenizer: cut out of texts (added), or as pieces of its vocabulary (default: auto)",
    )  # fmt: skip
    made.add_argument("--init", default="subtoken_mean", metavar="NAME", help="initialiser (default: %(default)s)")
    made.add_argument("--seed", type=int, default=0, metavar="N", help="for initialisers that draw (default: 0)")
    made.add_argument("--spare", type=int, default=0, metavar="N", help="rows besides that no token has yet")
    made.add_argument(
        "--pad-to-multiple-of", type=int, default=1, metavar="N", help="more spare rows, up to a multiple of N"
    )


def add_merge(command: AddCommand) -> None:
    """The arguments of `merge`."""
    made = command(
        "merge", _merge, "write rows into a model",
        "Put rows on their base model and save the result as an ordinary checkpoint, which transformers, vLLM,\n"
        "llama.cpp's converter and others load without this package.",
        "  hf-partial-embed merge HuggingFaceTB/SmolLM2-135M my-tokens merged\n"
        "  hf-partial-embed verify HuggingFaceTB/SmolLM2-135M merged",
    )  # fmt: skip
    made.add_argument("base", metavar="BASE", help="folder or Hub repository of the model that the rows belong to")
    made.add_argument("source", metavar="ROWS", help="row file, folder or Hub repository")
    add_out(made)
    add_reading(made)


def _add(options: argparse.Namespace) -> int:
    tokens = read_tokens(Path(options.tokens)) if options.tokens else []
    spare, multiple = options.spare, options.pad_to_multiple_of
    if spare < 0 or multiple < 1:
        raise PartialEmbeddingError(f"--spare {spare} --pad-to-multiple-of {multiple}: at least 0 and 1 are needed.")
    wants_rows = spare or multiple > 1
    if not options.tokens and not wants_rows:
        raise PartialEmbeddingError("Nothing is to be added. Give a file of tokens, or --spare N.")
    check_out(options)
    from ..api import add_tokens
    from ..attachment.growth import add_spare_rows
    from ..files.hub import entries_in_words
    from ..files.pretrained import load_model, load_tokenizer

    model, tokenizer = load_model(options.model), load_tokenizer(options.model)
    added: dict[str, int] = {}
    entries: list[str] = []
    if options.tokens:
        partial = add_tokens(
            model, tokenizer, tokens, init=options.init, special=options.special, entry=options.entry,
            seed=options.seed,
        )  # fmt: skip
        entries = partial.entries
        partial.merge()
        added = dict(zip(partial.tokens, partial.token_ids, strict=True))
    rows = 0
    if wants_rows:
        there = model.get_input_embeddings().num_embeddings
        size = -(-max(len(tokenizer) + spare, there) // multiple) * multiple
        rows = add_spare_rows(model, size) if size > there else 0
    with fresh_folder(options) as folder:
        model.save_pretrained(folder)
        tokenizer.save_pretrained(folder)
    free = model.get_input_embeddings().num_embeddings - len(tokenizer)
    if options.json:
        return print_json(
            out=options.out, tokens=added, entries=dict(zip(added, entries, strict=True)), spare_rows=free,
            rows_added=rows + len(added),
        )  # fmt: skip
    if added:
        say(f"added {count(list(added), 'token')} with the ids {shorten(list(added.values()))}")
    if set(entries) - {"added"}:
        say("in the tokenizer: " + entries_in_words(entries))
    if wants_rows:
        say(f"{count(range(free), 'row')} that no token has yet, {rows} of them new")
    say(f"saved {options.out}")
    return OK


def _merge(options: argparse.Namespace) -> int:
    check_out(options)
    rows = read_rows(options)
    from ..files.hub import entries_in_words
    from ..files.pretrained import has_tokenizer, load_model, load_tokenizer
    from ..tokens.vocabulary import display_names

    model = load_model(options.base)
    # Rows by id need no tokenizer, but what is written should not lack it.
    tokenizer = load_tokenizer(options.base) if rows.tokens or has_tokenizer(options.base) else None
    partial = rows.attach(model, tokenizer if rows.tokens else None, trainable=False)
    partial.merge()
    with fresh_folder(options) as folder:
        model.save_pretrained(folder)
        if tokenizer is not None:
            tokenizer.save_pretrained(folder)
    if options.json:
        names = display_names(partial.tokens, partial.token_ids)
        return print_json(out=options.out, tokens=dict(zip(names, partial.token_ids, strict=True)))
    say(f"merged {count(partial.token_ids, 'row')} at the ids {shorten(partial.token_ids)}; saved {options.out}")
    if set(partial.entries) - {"added"}:
        say("in the tokenizer: " + entries_in_words(partial.entries))
    return OK
