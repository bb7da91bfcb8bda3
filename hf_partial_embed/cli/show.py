"""Commands that say what a row file holds: `info`, `neighbours`."""

from __future__ import annotations

import argparse

from ..errors import count, visible
from .output import OK, AddCommand, add_reading, print_json, read_rows, say

__all__ = ["add_info", "add_neighbours"]


def add_info(command: AddCommand) -> None:
    """The arguments of `info`."""
    made = command(
        "info", _info, "say what a row file holds",
        "Say which tokens a row file holds, for which model, and how large its tensors are. PEFT adapters and\n"
        "textual-inversion files are read too.",
        "  hf-partial-embed info my-tokens\n  hf-partial-embed info me/my-tokens --json",
    )  # fmt: skip
    made.add_argument("source", metavar="ROWS", help="folder, file or Hub repository")
    add_reading(made)


def add_neighbours(command: AddCommand) -> None:
    """The arguments of `neighbours`."""
    made = command(
        "neighbours", _neighbours, "nearest old tokens of each new row",
        "Name the old tokens whose input embeddings have the largest cosine to each row: what it has come to mean.\n"
        "Of the base model only the tokenizer and this one table are read.",
        "  hf-partial-embed neighbours my-tokens HuggingFaceTB/SmolLM2-135M --count 3",
    )  # fmt: skip
    made.add_argument("source", metavar="ROWS", help="row file, folder or Hub repository")
    made.add_argument("base", metavar="BASE", help="model that the rows belong to")
    made.add_argument("--count", type=int, default=5, metavar="N", help="neighbours of each row (default: 5)")
    add_reading(made)


_SHOWN = 50


def _info(options: argparse.Namespace) -> int:
    from ..files.hub import entries_in_words
    from ..tokens.vocabulary import display_names

    rows = read_rows(options)
    names = [visible(name) for name in display_names(rows.tokens, rows.token_ids)]
    tensors = {
        name: {"shape": list(tensor.shape), "dtype": str(tensor.dtype).removeprefix("torch.")}
        for name, tensor in rows.tensors().items()
    }
    norms = rows.input_rows.float().norm(dim=1).tolist()
    if options.json:
        return print_json(
            tokens=rows.added_tokens, token_ids=rows.token_ids, base_model=rows.base_model, tied=rows.tied,
            tensors=tensors, input_norms=norms,
        )  # fmt: skip
    say(f"{count(rows.token_ids, 'token row')} for {visible(rows.base_model or 'an unnamed model')}")
    say(
        f"head: {'tied to the input embeddings' if rows.tied else 'own rows' if rows.output_rows is not None else '-'}"
    )
    for name, entry in tensors.items():
        say(f"{visible(name)}: {' x '.join(map(str, entry['shape']))}, {entry['dtype']}")
    entries = rows.entries
    if set(entries) - {"added"}:
        say("in the tokenizer: " + entries_in_words(entries))
    say("tokens, with the norms of their input rows:")
    marks = {"vocabulary": "  (vocabulary)", "part": "  (part)"}
    for name, norm, how in list(zip(names, norms, entries or ["added"] * len(names), strict=True))[:_SHOWN]:
        say(f"  {norm:8.3f}  {name}{marks.get(how, '')}")
    if len(names) > _SHOWN:
        say(f"  ... {len(names) - _SHOWN} more (--json lists all)")
    return OK


def _neighbours(options: argparse.Namespace) -> int:
    rows = read_rows(options)
    from ..evaluation.neighbours import name_tokens, nearest_rows
    from ..files.pretrained import input_table, load_tokenizer
    from ..tokens.entering import piece_id
    from ..tokens.stored import stored_pieces
    from ..tokens.vocabulary import display_names, known_id, plain_tokenizer

    tokenizer = plain_tokenizer(load_tokenizer(options.base), needed=True)
    table = input_table(options.base)
    own: set[int | None] = set(rows.token_ids)
    if rows.tokens:
        own = {
            known_id(tokenizer, text) if piece is None else piece_id(tokenizer, piece)
            for text, piece in zip(rows.tokens, stored_pieces(rows.added_tokens), strict=True)
        }
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
        return print_json(neighbours=found)
    for name, entries in found.items():
        say(f"{visible(name)}: " + ", ".join(f"{entry['token']!r} {entry['cosine']:.3f}" for entry in entries))
    return OK
