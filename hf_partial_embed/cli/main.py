"""The command `hf-partial-embed`, for those who do not write Python."""

from __future__ import annotations

import argparse
import logging
import os
import sys
import traceback
from collections.abc import Callable, Sequence
from typing import Any

from .. import __version__
from ..errors import PartialEmbeddingError, visible
from .audit import add_audit
from .choose import add_choose
from .compare import add_verify
from .convert import add_convert
from .evaluate import add_evaluate
from .output import BAD_INPUT, CRASHED, INTERRUPTED, OK, VisibleFormatter, silence
from .prepare import add_add, add_merge
from .show import add_info, add_neighbours
from .train import add_train

__all__ = ["main"]


_DESCRIPTION = """\
Add tokens to a Hugging Face model, move their trained rows between files and models, and check that nothing else
of a model has changed. `train` does the whole of it; see add_tokens and PartialEmbeddingCallback for Python.

BASE, MODEL and ROWS are folders, files or repositories of the Hub. Nothing is unpickled and no code of a
repository is run."""

_EPILOG = """\
exit status:
  0    done; for verify: nothing differs but what may
  1    verify found a difference
  2    bad input: the message says what to do
  3    an error of the program, with its traceback"""


# In the order in which the help lists them.
_COMMANDS = (
    add_info, add_choose, add_audit, add_add, add_train, add_evaluate, add_merge, add_verify, add_convert,
    add_neighbours,
)  # fmt: skip


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command; returns its exit status."""
    parser = _parser()
    options = parser.parse_args(arguments)
    handler = logging.StreamHandler()
    handler.setFormatter(VisibleFormatter("%(levelname)s: %(message)s"))
    logging.getLogger("hf_partial_embed").addHandler(handler)
    try:
        if options.quiet:
            silence()
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
        logging.getLogger("hf_partial_embed").removeHandler(handler)


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

    for add in _COMMANDS:
        add(command)
    return parser
