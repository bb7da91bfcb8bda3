"""What an interrupted `train` leaves for its resume: settings, what it had decided, and the Trainer's checkpoints."""

from __future__ import annotations

import argparse
import contextlib
import json
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from ..errors import PartialEmbeddingError

__all__ = ["last_checkpoint", "open_work", "write_work"]

_SETTINGS = "settings.json"
# What may differ between a run and its resume, because it does not change what is trained.
_FREE = ("out", "force", "json", "quiet", "resume", "push_to_hub", "command", "run", "save_steps", "no_picture")


def _settings(options: argparse.Namespace) -> dict[str, Any]:
    return {name: value for name, value in vars(options).items() if name not in _FREE}


@contextlib.contextmanager
def open_work(work: Path, options: argparse.Namespace) -> Iterator[dict[str, Any]]:
    """The place for what a resume would need; gives what an interrupted run had decided.

    After an error it is gone again if there is nothing to go on from.

    Raises:
        `PartialEmbeddingError`: there is something and no --resume, or a --resume with nothing or with other settings.
    """
    held = _found(work, options)
    try:
        yield held
    except Exception:
        if not any(path.is_file() and path.name != _SETTINGS for path in work.rglob("*")):
            shutil.rmtree(work, ignore_errors=True)
        raise


def _found(work: Path, options: argparse.Namespace) -> dict[str, Any]:
    if not options.resume:
        if work.exists() and not options.force:
            raise PartialEmbeddingError(
                f"{work} holds an interrupted training. Go on with it by --resume, or pass --force to begin anew."
            )
        shutil.rmtree(work, ignore_errors=True)
        return {}
    try:
        held: dict[str, Any] = json.loads((work / _SETTINGS).read_text("utf-8"))
        before = held["settings"]
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise PartialEmbeddingError(f"There is no training to resume in {work}: {error}") from error
    now = _settings(options)
    differing = sorted(name for name in now if before.get(name) != now[name])
    if differing:
        told = ", ".join(f"{name} ({before.get(name)!r}, now {now[name]!r})" for name in differing)
        raise PartialEmbeddingError(f"The training in {work} was begun with other settings: {told}. Give the same.")
    return held


def write_work(work: Path, options: argparse.Namespace, **decided: Any) -> None:
    from ..files.rows_file import write_atomically

    work.mkdir(parents=True, exist_ok=True)
    content = json.dumps({"settings": _settings(options), **decided})
    write_atomically(work / _SETTINGS, lambda temporary: temporary.write_text(content, "utf-8"))


def last_checkpoint(work: Path) -> str | None:
    """The newest checkpoint that is whole: the Trainer writes its own state last."""
    whole = [path.parent for path in work.glob("checkpoint-*/trainer_state.json")]
    newest = max(whole, key=lambda path: int(path.name.rpartition("-")[2]), default=None)
    return None if newest is None else str(newest)
