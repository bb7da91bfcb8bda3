"""Runs the cases of `distributed_cases.py` in two real processes (gloo), once for each engine."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
from functools import cache
from pathlib import Path

from torch.distributed import TCPStore

CASES = Path(__file__).with_name("distributed_cases.py")
SECONDS = 300


def open_store() -> tuple[TCPStore, dict[str, str]]:
    """A store in this process, at a port of the system's choice that is held as long as the store is, and the
    variables that let other processes meet there: as clients, as under torchrun."""
    store = TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
    return store, {
        "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(store.port), "TORCHELASTIC_USE_AGENT_STORE": "True",
        "TORCHELASTIC_RESTART_COUNT": "0",
    }  # fmt: skip


@cache
def results(engine: str) -> dict[str, str]:
    """What became of each case of an engine: an empty text, or what was raised, with the process's number."""
    store, meeting = open_store()
    with tempfile.TemporaryDirectory() as folder:
        processes = []
        for rank in range(2):
            env = {
                **os.environ, "RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": "2",
                "OMP_NUM_THREADS": "1", "DS_ACCELERATOR": "cpu", "ACCELERATE_USE_CPU": "true", **meeting,
            }  # fmt: skip
            with (Path(folder) / f"{rank}.log").open("w") as log:
                command = [sys.executable, str(CASES), engine, folder]
                processes.append(subprocess.Popen(command, env=env, stdout=log, stderr=subprocess.STDOUT))
        try:
            for process in processes:
                process.wait(SECONDS)
        finally:
            for process in processes:
                process.kill()
            del store
        found: dict[str, str] = {}
        for rank, process in enumerate(processes):
            path = Path(folder) / f"{rank}.json"
            cases = json.loads(path.read_text()) if path.is_file() else {}
            if process.returncode:
                cases["process"] = (Path(folder) / f"{rank}.log").read_text()[-3000:]
            for case, error in cases.items():
                found[case] = found.get(case, "") + (f"rank {rank}: {error}\n" if error else "")
        return found
