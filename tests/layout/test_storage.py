"""Models whose tables are quantised, offloaded or placed by a device map."""

from __future__ import annotations

import pytest
import torch
from added import add_tokens
from conftest import as_computed_everywhere, bpe_tokenizer, logits_of
from transformers import AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM

TOKENS = ["<think>", "</think>", "praseodymium"]


@pytest.fixture
def folder(tmp_path, tied):
    """A saved model of a width that the quantisers take."""
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=320, hidden_size=64, intermediate_size=128, num_hidden_layers=2, num_attention_heads=4,
        tie_word_embeddings=tied, pad_token_id=1,
    )  # fmt: skip
    LlamaForCausalLM(config).save_pretrained(tmp_path / "base")
    return tmp_path / "base"


def train(model, partial, steps=2):
    model.requires_grad_(False)
    partial.requires_grad_(True)
    optimizer = torch.optim.AdamW(partial.parameters(), lr=1e-2, weight_decay=0.1)
    ids = torch.tensor([[5, *partial.token_ids, 9, *partial.token_ids]])
    for _ in range(steps):
        model(input_ids=ids, labels=ids).loss.backward()
        assert all(parameter.grad.any() for parameter in partial.parameters())
        optimizer.step()
        optimizer.zero_grad()
    partial.verify()
    return ids


def assert_reloads(model, ids, path):
    """A checkpoint saved now gives the same logits when it is loaded without us."""
    expected = logits_of(model, ids)
    model.save_pretrained(path)
    loaded, info = AutoModelForCausalLM.from_pretrained(path, output_loading_info=True)
    assert not info["missing_keys"] and not info["unexpected_keys"]
    torch.testing.assert_close(logits_of(as_computed_everywhere(loaded), ids), expected)


def hooks_of(model):
    return {name: module.__dict__.get("_hf_hook") for name, module in model.named_modules()}


@pytest.mark.parametrize("where", ["cpu", "disk"])
def test_rows_train_on_an_offloaded_model_and_detach_gives_it_back(folder, tmp_path, where):
    from accelerate import cpu_offload, disk_offload

    tokenizer = bpe_tokenizer()
    model = AutoModelForCausalLM.from_pretrained(folder)
    ids = torch.tensor([[5, 6, 7, 8, 200]])
    before = logits_of(model, ids)
    if where == "cpu":
        cpu_offload(model, execution_device=torch.device("cpu"))
    else:
        disk_offload(model, str(tmp_path / "offloaded"), execution_device=torch.device("cpu"))
    assert model.get_input_embeddings().weight.is_meta
    hooks = hooks_of(model)
    partial = add_tokens(model, tokenizer, TOKENS)
    assert torch.equal(logits_of(model, ids)[..., :300], before[..., :300])
    trained = train(model, partial)
    rows = partial.detach()
    assert hooks_of(model) == hooks
    assert model.get_input_embeddings().weight.is_meta and model.config.vocab_size == 320
    assert torch.equal(logits_of(model, ids), before)

    again = rows.attach(model, tokenizer)
    plain = AutoModelForCausalLM.from_pretrained(folder)
    rows.attach(plain, bpe_tokenizer())
    torch.testing.assert_close(logits_of(model, trained), logits_of(plain, trained))
    assert again.token_ids == partial.token_ids


@pytest.mark.filterwarnings("ignore:Attempting to save a model with offloaded modules")
def test_rows_train_on_a_model_whose_layers_lie_on_disk(folder, tmp_path, tied):
    plain = AutoModelForCausalLM.from_pretrained(folder)
    places = {"model.embed_tokens": "cpu", "lm_head": "cpu", "model.norm": "cpu", "model.rotary_emb": "cpu"}
    places |= {"model.layers.0": "disk", "model.layers.1": "cpu"}
    model = AutoModelForCausalLM.from_pretrained(folder, device_map=places, offload_folder=str(tmp_path / "offload"))
    ids = torch.tensor([[5, 6, 7, 8, 200]])
    before = logits_of(model, ids)
    assert torch.equal(before, logits_of(plain, ids))
    partial = add_tokens(model, bpe_tokenizer(), TOKENS)
    assert torch.equal(logits_of(model, ids)[..., :300], before[..., :300])
    trained = train(model, partial)
    assert_reloads(model, trained, tmp_path / "merged")
    partial.detach()
    assert torch.equal(logits_of(model, ids), before)


def quantized(folder, kind, **options):
    if kind == "torchao":
        from torchao.quantization import Int8WeightOnlyConfig
        from transformers import TorchAoConfig

        settings = TorchAoConfig(Int8WeightOnlyConfig(), **options)
    else:
        from transformers import BitsAndBytesConfig

        settings = BitsAndBytesConfig(
            load_in_4bit=kind == "4bit", load_in_8bit=kind == "8bit", bnb_4bit_compute_dtype=torch.float32, **options
        )
    model = AutoModelForCausalLM.from_pretrained(folder, quantization_config=settings, dtype=torch.float32)
    return as_computed_everywhere(model)


@pytest.mark.filterwarnings("ignore")  # of the quantisers themselves
@pytest.mark.parametrize("kind", ["4bit", "8bit", "torchao"])
def test_rows_train_beside_a_quantised_body(folder, tmp_path, kind):
    model = quantized(folder, kind)
    ids = torch.tensor([[5, 6, 7, 8, 200]])
    before = logits_of(model, ids)
    partial = add_tokens(model, bpe_tokenizer(), TOKENS)
    assert torch.equal(logits_of(model, ids)[..., :300], before[..., :300])
    trained = train(model, partial)
    assert_reloads(model, trained, tmp_path / "merged")
    partial.detach()
    assert torch.equal(logits_of(model, ids), before)


QUANTIZED_HEADS = {
    "4bit": {"llm_int8_skip_modules": ["none"]},
    "8bit": {"llm_int8_skip_modules": ["none"]},
    "torchao": {"modules_to_not_convert": ["none"], "include_input_output_embeddings": True},
}


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("tied", [False], ids=["untied"], indirect=True)
@pytest.mark.parametrize("kind", QUANTIZED_HEADS)
def test_a_quantised_head_becomes_an_ordinary_one_until_detach(folder, tmp_path, kind):
    model = quantized(folder, kind, **QUANTIZED_HEADS[kind])
    head = model.lm_head
    cls, weight, settings = type(head), head._parameters["weight"], model.config.quantization_config.to_dict()
    assert type(weight) is not torch.nn.Parameter
    ids = torch.tensor([[5, 6, 7, 8, 200]])
    before = logits_of(model, ids)
    partial = add_tokens(model, bpe_tokenizer(), TOKENS)
    # 8-bit matrix products of bitsandbytes round the activations too, which an ordinary head does not.
    tolerance = {"rtol": 0.05, "atol": 0.02} if kind == "8bit" else {}
    torch.testing.assert_close(logits_of(model, ids)[..., :300], before[..., :300], **tolerance)
    trained = train(model, partial)
    assert_reloads(model, trained, tmp_path / "merged")
    partial.detach()
    assert type(model.lm_head) is cls and model.lm_head._parameters["weight"] is weight
    assert model.config.quantization_config.to_dict() == settings
    assert torch.equal(logits_of(model, ids), before)
