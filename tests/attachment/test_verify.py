"""`verify()` when the model, or only its tables, were cast after the rows were attached."""

from __future__ import annotations

import pytest
import torch
from conftest import bpe_tokenizer, build_model, table_of

from hf_partial_embed import FrozenRowsChangedError, add_tokens

TOKENS = ["<think>", "</think>", "praseodymium"]


CASTS = {
    "widened": (torch.bfloat16, [torch.float32]),
    "widened-half": (torch.float16, [torch.float32]),
    "widened-twice": (torch.bfloat16, [torch.float32, torch.float64]),
    "there-and-back": (torch.bfloat16, [torch.float32, torch.bfloat16]),
    "narrowed": (torch.float32, [torch.bfloat16]),
    "narrowed-half": (torch.float32, [torch.float16]),
    "narrowed-and-back": (torch.float32, [torch.bfloat16, torch.float32]),
}


@pytest.mark.parametrize("casts", CASTS)
def test_a_cast_of_the_whole_model_is_no_change(casts, tied, strategy, caplog):
    dtype, steps = CASTS[casts]
    tokenizer = bpe_tokenizer()
    model = build_model("llama", len(tokenizer), tied=tied, dtype=dtype)
    partial = add_tokens(model, tokenizer, TOKENS, strategy=strategy)
    for step in steps:
        model.to(step)
    partial.verify()
    assert ("rounded to that dtype" in caplog.text) == casts.startswith("narrowed")
    with torch.no_grad():
        row = table_of(model)[17]
        row[3] = torch.nextafter(row[3], torch.tensor(9.0, dtype=row.dtype))  # the smallest change there is
    with pytest.raises(FrozenRowsChangedError, match=r"embed_tokens\.weight: 1 row \(17\)"):
        partial.verify()


def test_a_cast_of_the_tables_values_alone_is_no_change(strategy):
    tokenizer = bpe_tokenizer()
    model = build_model("llama", len(tokenizer), dtype=torch.bfloat16)
    partial = add_tokens(model, tokenizer, TOKENS, strategy=strategy)
    for parameter in model.parameters():  # as peft's prepare_model_for_kbit_training does it
        parameter.data = parameter.data.to(torch.float32)
    partial.verify()


def test_a_cast_whose_outcome_cannot_be_known_is_told(caplog):
    tokenizer = bpe_tokenizer()
    model = build_model("llama", len(tokenizer), dtype=torch.bfloat16)
    partial = add_tokens(model, tokenizer, TOKENS)
    model.half()
    partial.verify()
    assert "was cast from torch.bfloat16 to torch.float16" in caplog.text
    assert "cannot be compared" in caplog.text
