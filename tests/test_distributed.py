"""Rows in two real processes (gloo): DDP, FSDP2 directly, by accelerate and by transformers, FSDP1, DeepSpeed ZeRO.

Each engine is started once and runs all of its cases, which are in `distributed_cases.py`. DDP and FSDP2 in a loop of
one's own are run by default. With the slow tests come both in a Trainer, FSDP1, FSDP2 as transformers loads it, and
DeepSpeed, which is not among what the tests install (`DS_BUILD_OPS=0 pip install --no-build-isolation deepspeed`):

    python -m pytest -m slow tests/test_distributed.py
"""

from __future__ import annotations

import socket

import pytest
from distributed_cases import OTHERS, SETTINGS, TRAININGS
from two_processes import open_store, results

CASES = [setting.name for setting in SETTINGS]
SLOW = {"ddp-trainer", "fsdp1", "fsdp2-trainer", "fsdp2-transformers"}


def marked(engine: str, *values: str):
    return pytest.param(
        engine, *values, marks=[pytest.mark.slow] if engine.startswith("zero") or engine in SLOW else []
    )


def check(engine: str, case: str) -> None:
    found = results(engine)
    assert not found.get("process"), found["process"]
    assert case in found, f"{engine} has run {sorted(found)}"
    assert not found[case], found[case]


def test_the_port_where_processes_meet_is_never_free_for_others():
    store, meeting = open_store()
    with socket.socket() as other, pytest.raises(OSError, match="in use"):
        other.bind(("127.0.0.1", int(meeting["MASTER_PORT"])))
    assert store.port == int(meeting["MASTER_PORT"])


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("engine", [marked(engine) for engine in TRAININGS])
def test_rows_equal_those_of_one_process_and_the_checkpoint_is_standard(engine, case):
    check(engine, case)


@pytest.mark.parametrize(
    ("engine", "case"), [marked(engine, case) for engine, cases in OTHERS.items() for case in cases]
)
def test_what_else_an_engine_does_or_refuses(engine, case):
    check(engine, case)
