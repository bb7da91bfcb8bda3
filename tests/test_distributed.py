"""Rows in two real processes (gloo): DDP, FSDP2 directly, by accelerate and by transformers, FSDP1, DeepSpeed ZeRO.

Each engine is started once and runs all of its cases, which are in `distributed_cases.py`. DeepSpeed is not among
what the tests install; with it (`DS_BUILD_OPS=0 pip install --no-build-isolation deepspeed`) its cases are run by

    python -m pytest -m slow tests/test_distributed.py
"""

from __future__ import annotations

import pytest
from processes import results

TRAININGS = [
    f"{tie}-{kind}"
    for tie in ("tied", "untied")
    for kind in ("float32", "bfloat16", "float32-accumulated", "float32-checkpointed")
]
OTHERS = {
    "ddp": ["mask", "bytes"],
    "ddp-trainer": ["mask"],
    "fsdp1": ["mask"],
    "fsdp2": [
        "mask", "bytes", "tokens-after-sharding", "rows-inside", "dtypes", "verify", "rate", "tensor-parallelism"
    ],
    "zero1-trainer": ["mask", "shared-group"],
    "zero3": ["mask", "tokens-after-loading"],
}  # fmt: skip
TORCH = ["ddp", "ddp-trainer", "fsdp1", "fsdp2", "fsdp2-trainer", "fsdp2-transformers"]
DEEPSPEED = [f"zero{stage}{trainer}" for stage in (1, 2, 3) for trainer in ("", "-trainer")]


def check(engine: str, case: str) -> None:
    found = results(engine)
    assert not found.get("process"), found["process"]
    assert case in found, f"{engine} has run {sorted(found)}"
    assert not found[case], found[case]


@pytest.mark.parametrize("case", TRAININGS)
@pytest.mark.parametrize("engine", TORCH)
def test_rows_equal_those_of_one_process_and_the_checkpoint_is_standard(engine, case):
    check(engine, case)


@pytest.mark.parametrize(
    ("engine", "case"), [(engine, case) for engine, cases in OTHERS.items() if engine in TORCH for case in cases]
)
def test_what_else_an_engine_does_or_refuses(engine, case):
    check(engine, case)


@pytest.mark.slow
@pytest.mark.parametrize("case", TRAININGS)
@pytest.mark.parametrize("engine", DEEPSPEED)
def test_rows_under_deepspeed_equal_those_of_one_process(engine, case):
    check(engine, case)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("engine", "case"), [(engine, case) for engine, cases in OTHERS.items() if engine in DEEPSPEED for case in cases]
)
def test_what_else_deepspeed_does_or_refuses(engine, case):
    check(engine, case)
