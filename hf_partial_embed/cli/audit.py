"""The command that looks for tokens of a model that were never trained: `audit`."""

from __future__ import annotations

import argparse
from pathlib import Path

from ..errors import PartialEmbeddingError
from .output import OK, AddCommand, print_json, say

__all__ = ["add_audit"]


def add_audit(command: AddCommand) -> None:
    """The arguments of `audit`."""
    made = command(
        "audit", _audit, "find tokens in use whose rows were never trained",
        "Say which tokens that will be used (by the chat template, at the end of a text, as padding, and in TEXTS)\n"
        "have rows that were never trained, and what else is wrong around tokens; each with its remedy. The model is\n"
        "loaded, but not run.",
        "  hf-partial-embed audit HuggingFaceTB/SmolLM2-135M --texts train.txt",
    )  # fmt: skip
    made.add_argument("model", metavar="MODEL", help="folder or Hub repository of the model")
    made.add_argument("--texts", metavar="FILE", help="text file with a text a line")


def _audit(options: argparse.Namespace) -> int:
    texts = None
    if options.texts:
        try:
            texts = Path(options.texts).read_text("utf-8").splitlines()
        except (OSError, ValueError) as error:
            raise PartialEmbeddingError(f"Cannot read the texts from {options.texts}: {error}") from error
    from ..evaluation.audit import audit_tokens
    from ..files.pretrained import load_model, load_tokenizer

    report = audit_tokens(load_model(options.model), load_tokenizer(options.model), texts)
    if options.json:
        return print_json(**report.to_dict())
    say(str(report))
    return OK
