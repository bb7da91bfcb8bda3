"""The script for models of billions of parameters, with a tiny one."""

from __future__ import annotations

import importlib
from pathlib import Path

import pytest


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("offload", [False, True], ids=["in memory", "on the disk"])
def test_every_stage_runs(monkeypatch, tmp_path, offload):
    monkeypatch.syspath_prepend(Path(__file__).parents[2] / "examples" / "benchmark")
    script = importlib.import_module("large_model")
    options = ["--size", "tiny", "--steps", "2", "--positions", "16", "--output", str(tmp_path)]
    lines = script.main([*options, *(["--offload"] if offload else [])])
    assert [line["stage"] for line in lines] == ["train"] * 5 + ["load"] * 2 + ["verify"]
    assert lines[-1]["said"].endswith("nothing else differs")
