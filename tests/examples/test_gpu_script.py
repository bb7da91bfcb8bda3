"""What is prepared for a GPU, tried on the CPU with small sizes."""

from __future__ import annotations

import importlib
import json
import subprocess
import sys
from pathlib import Path

import pytest

BENCHMARK = Path(__file__).parents[2] / "examples" / "benchmark"


@pytest.mark.filterwarnings("ignore")
def test_the_checks_hold(monkeypatch, capsys):
    monkeypatch.syspath_prepend(BENCHMARK)
    checks = importlib.import_module("gpu_checks")
    assert checks.main(["--device", "cpu", "--shrink", "64", "--leave-out", "compile"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert sum(line.startswith("ok") for line in lines) == 9 and lines[-1] == "all hold"


@pytest.mark.slow
def test_script_prints_and_writes_everything(tmp_path):
    command = ["bash", str(BENCHMARK / "gpu.sh"), str(tmp_path), "cpu", "32"]
    result = subprocess.run(command, env={"PYTHON": sys.executable, "PATH": "/usr/bin:/bin"}, capture_output=True)
    assert result.returncode == 0, result.stdout.decode()[-3000:]
    assert (tmp_path / "checks.txt").read_text().splitlines()[-1] == "all hold"
    (path,) = tmp_path.glob("*-cpu.json")
    results = json.loads(path.read_text())["results"]
    assert len(results) == 6
    for found in results:
        rows = {row["method"]: row for row in found["rows"]}
        assert {"frozen limit", "split", "PEFT TrainableTokens", "mask", "full"} <= set(rows)
        assert rows["split"]["MB allocated beyond"] < rows["PEFT TrainableTokens"]["MB allocated beyond"]
