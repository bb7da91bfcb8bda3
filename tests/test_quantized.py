"""Bodies quantised by bitsandbytes or torchao: embeddings and head stay as they are, and rows train."""

from __future__ import annotations

import pytest
import torch
from conftest import bpe_tokenizer, logits_of, run_model
from transformers import AutoModelForCausalLM, BitsAndBytesConfig, LlamaConfig, LlamaForCausalLM, TorchAoConfig

from hf_partial_embed import add_tokens

TOKENS = ["<think>", "</think>"]
IDS = torch.tensor([[5, 300, 7, 301, 9]])
pytestmark = [
    pytest.mark.filterwarnings("ignore"),  # of the libraries, at import
]


def config_of(name):
    if name == "torchao-int8":
        pytest.importorskip("torchao")
        from torchao.quantization import Int8WeightOnlyConfig

        return TorchAoConfig(Int8WeightOnlyConfig())
    pytest.importorskip("bitsandbytes")
    if name == "bitsandbytes-4bit":
        return BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_compute_dtype=torch.float32)
    return BitsAndBytesConfig(load_in_8bit=True)


@pytest.fixture
def base(tmp_path, tied):
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=300, hidden_size=64, intermediate_size=128, num_hidden_layers=2, num_attention_heads=2,
        num_key_value_heads=2, tie_word_embeddings=tied, pad_token_id=1,
    )  # fmt: skip
    LlamaForCausalLM(config).save_pretrained(tmp_path / "base")
    return tmp_path / "base"


@pytest.mark.parametrize("name", ["bitsandbytes-4bit", "bitsandbytes-8bit", "torchao-int8"])
def test_rows_train_on_a_quantised_body(base, tied, tmp_path, name):
    model = AutoModelForCausalLM.from_pretrained(
        base, quantization_config=config_of(name), device_map="cpu", dtype=torch.float32
    )
    body = model.model.layers[0].self_attn.q_proj.weight
    assert type(body) is not torch.nn.Parameter or body.dtype == torch.int8
    before = logits_of(model, IDS.clamp(max=299))
    partial = add_tokens(model, bpe_tokenizer(), TOKENS)
    assert torch.equal(logits_of(model, IDS.clamp(max=299))[..., :300], before)
    start = partial.token_rows()
    optimizer = torch.optim.AdamW(partial.param_groups(lr=0.01))
    for _ in range(2):
        run_model(model, IDS, labels=IDS).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    partial.verify()
    for key, rows in partial.token_rows().tensors().items():
        assert not torch.isclose(rows, start.tensors()[key]).all(), key
    expected = logits_of(model, IDS)
    model.save_pretrained(tmp_path / "quantised")
    again = AutoModelForCausalLM.from_pretrained(tmp_path / "quantised", device_map="cpu")
    for part in ("get_input_embeddings", "get_output_embeddings"):
        assert torch.equal(getattr(again, part)().weight, getattr(model, part)().weight)
    if name != "bitsandbytes-4bit":  # it repacks the body at the first forward on a CPU, and saves it otherwise
        torch.testing.assert_close(logits_of(again, IDS), expected, atol=1e-5, rtol=1e-5)
    plain = AutoModelForCausalLM.from_pretrained(base)
    partial.token_rows().attach(plain, bpe_tokenizer())  # the rows go on the model that is not quantised, too
