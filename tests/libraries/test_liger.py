"""Liger's fused loss, which reads the head's weight in the model's forward; on a CPU in Triton's interpreter.

It needs `pip install --no-deps liger-kernel triton`; what is said without
Triton is tested in `tests/training/test_diagnostics.py`.
"""

from __future__ import annotations

import importlib.util
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

COMPARE = """
import json, sys
sys.path.insert(0, sys.argv[1])
import torch
from conftest import bpe_tokenizer, build_model
from liger_kernel.transformers import _apply_liger_kernel_to_instance
from hf_partial_embed import add_tokens

tokenizer = bpe_tokenizer()
model = build_model("llama", 300, tied=sys.argv[2] == "tied").requires_grad_(False)
partial = add_tokens(model, tokenizer, ["<think>", "</think>"])
ids = torch.tensor([[5, 300, 7, 301, 9, 4, 300]])
gradients = []
for fused in (False, True):
    if fused:
        _apply_liger_kernel_to_instance(
            model, rope=False, rms_norm=False, swiglu=False, cross_entropy=False, fused_linear_cross_entropy=True
        )
    output = model.train()(input_ids=ids, labels=ids)
    assert (output.logits is None) == fused
    output.loss.backward()
    gradients.append([rows.grad.clone() for rows in partial.parameters()])
    model.zero_grad()
print(json.dumps([[(a - b).abs().max().item(), a.abs().max().item()] for a, b in zip(*gradients)]))
"""


@pytest.mark.slow
@pytest.mark.parametrize("layout", ["tied", "untied"])
@pytest.mark.skipif(
    any(importlib.util.find_spec(name) is None for name in ("triton", "liger_kernel")),
    reason="needs triton and liger_kernel",
)
def test_ligers_fused_loss_gives_the_rows_the_gradients_of_the_plain_one(layout):
    result = subprocess.run(
        [sys.executable, "-c", COMPARE, str(Path(__file__).parents[1]), layout],
        env={**os.environ, "TRITON_INTERPRET": "1"}, capture_output=True, text=True,
    )  # fmt: skip
    assert result.returncode == 0, result.stderr[-2000:]
    differences = json.loads(result.stdout.splitlines()[-1])
    assert len(differences) == (1 if layout == "tied" else 2)
    for difference, size in differences:
        assert size > 1e-3 and difference < 1e-5
