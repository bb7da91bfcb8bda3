"""What is tried out in a process of its own, which may be killed, and the rows that it saves."""

from __future__ import annotations

import os
import pickle
import signal
import traceback
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor
from contextlib import contextmanager
from multiprocessing import get_context
from tempfile import TemporaryFile
from typing import Any

import pytest
import torch

from hf_partial_embed import TokenRows

posix = pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork")


def rows(size: int = 2, dim: int = 16, fill: float | None = None, **options) -> TokenRows:
    values = torch.randn(size, dim, generator=torch.Generator().manual_seed(0))
    tokens = [f"<{number}>" for number in range(size)]
    return TokenRows(tokens, values if fill is None else torch.full_like(values, fill), **options)


@contextmanager
def fresh_process() -> Iterator[Callable[..., Any]]:
    """Runs functions in a new process of one thread.

    A fork does not take along the threads that torch computes with, and would wait for them.
    """
    with ProcessPoolExecutor(1, get_context("spawn"), initializer=torch.set_num_threads, initargs=(1,)) as pool:
        yield lambda function, *arguments: pool.submit(function, *arguments).result()


def forked(function: Callable[..., object], *arguments: Any) -> int:
    """Run a function in a fork, which then ends without cleaning up; returns the process id."""
    process = os.fork()
    if process == 0:
        try:
            function(*arguments)
            os._exit(0)
        except BaseException:  # noqa: BLE001 -- nothing may unwind into the parent's code
            traceback.print_exc()
            os._exit(1)
    return process


def exit_code(process: int) -> int:
    return os.waitstatus_to_exitcode(os.waitpid(process, 0)[1])


def run_forked(function: Callable[..., object], *arguments: Any) -> int:
    """The exit status of a function that is run in a fork."""
    return exit_code(forked(function, *arguments))


def results_of(function: Callable[..., Any], *arguments: Any) -> Any:
    """What a function returns that is run in a fork."""
    with TemporaryFile() as file:

        def run() -> None:
            file.write(pickle.dumps(function(*arguments)))
            file.flush()

        assert run_forked(run) == 0, "it has failed in the fork: see what it has written to stderr"
        file.seek(0)
        return pickle.loads(file.read())


def kill(process: int) -> None:
    """End a fork at once, in whatever it does."""
    os.kill(process, signal.SIGKILL)
    assert exit_code(process) == -signal.SIGKILL, "the fork has ended by itself"
