"""PEFT adapters of token rows, read and written; PEFT itself makes and loads them."""

from __future__ import annotations

import json

import pytest
import torch
from added import add_tokens
from conftest import PEFT_WARNING, bpe_tokenizer, build_model, logits_of
from peft import LoraConfig, PeftModel, TrainableTokensConfig, get_peft_model
from safetensors.torch import load_file, save_file

from hf_partial_embed import PartialEmbeddingError, TokenRows, train_tokens
from hf_partial_embed.formats import read_peft, write_peft

pytestmark = [
    pytest.mark.filterwarnings(PEFT_WARNING),
    pytest.mark.filterwarnings("ignore::FutureWarning"),
    pytest.mark.filterwarnings("ignore:Model has `tie_word_embeddings=True`:UserWarning"),
    pytest.mark.filterwarnings("ignore:fan_in_fan_out:UserWarning"),
]

TOKENS = ["<think>", "</think>", "praseodymium"]
TABLES = {"llama": ("embed_tokens", "q_proj"), "gpt2": ("wte", "c_attn")}
KINDS = pytest.mark.parametrize("kind", list(TABLES))
WRAPS = pytest.mark.parametrize("how", ["trainable-tokens", "lora"])


def grown(kind, tied):
    """A model and a tokenizer to which the tokens were added without this package."""
    tokenizer, model = bpe_tokenizer(), build_model(kind, 300, tied=tied)
    tokenizer.add_tokens(TOKENS)
    model.resize_token_embeddings(303, mean_resizing=False)
    return model, tokenizer


def peft_trained(kind, tied, how):
    """The same, with rows trained by PEFT."""
    model, tokenizer = grown(kind, tied)
    table, body = TABLES[kind]
    modules = [table] if tied else [table, "lm_head"]
    if how == "lora":
        indices = {name: [300, 301, 302] for name in modules}
        config = LoraConfig(r=2, target_modules=[body], trainable_token_indices=indices)
    else:
        config = TrainableTokensConfig(token_indices=[300, 301, 302], target_modules=modules)
    peft_model = get_peft_model(model, config)
    torch.manual_seed(1)
    with torch.no_grad():
        for name, parameter in peft_model.named_parameters():
            if "trainable_tokens_delta" in name:
                parameter.copy_(torch.randn_like(parameter))
    return peft_model.eval(), tokenizer


@KINDS
@WRAPS
def test_peft_rows_give_the_same_logits_here(tmp_path, kind, tied, how):
    peft_model, tokenizer = peft_trained(kind, tied, how)
    ids = torch.tensor([[5, 300, 7, 301, 302, 9]])
    expected = logits_of(peft_model, ids)
    peft_model.save_pretrained(tmp_path, save_embedding_layers=False)
    tokenizer.save_pretrained(tmp_path)

    rows = read_peft(tmp_path)
    assert rows.tokens == TOKENS and rows.token_ids == [300, 301, 302]
    assert (rows.output_rows is None) == tied
    model = build_model(kind, 300, tied=tied)
    rows.attach(model, bpe_tokenizer())
    torch.testing.assert_close(logits_of(model, ids), expected, atol=1e-6, rtol=1e-6)


@KINDS
def test_written_adapter_gives_the_same_logits_in_peft(tmp_path, kind, tied):
    from transformers import AutoTokenizer

    tokenizer, model = bpe_tokenizer(), build_model(kind, 300, tied=tied)
    partial = add_tokens(model, tokenizer, TOKENS, special=True)
    with torch.no_grad():
        for rows in partial.parameters():
            rows.normal_()
    ids = torch.tensor([[5, *partial.token_ids, 9, partial.token_ids[0]]])
    expected = logits_of(model, ids)
    write_peft(partial.token_rows(), tmp_path, model, tokenizer)

    plain = build_model(kind, 300, tied=tied)
    loaded_tokenizer = AutoTokenizer.from_pretrained(tmp_path)
    assert loaded_tokenizer.convert_tokens_to_ids(TOKENS) == partial.token_ids
    plain.resize_token_embeddings(len(loaded_tokenizer), mean_resizing=False)
    peft_model = PeftModel.from_pretrained(plain, tmp_path)
    torch.testing.assert_close(logits_of(peft_model, ids), expected, atol=1e-6, rtol=1e-6)
    assert torch.equal(logits_of(peft_model.merge_and_unload(), ids), logits_of(partial.merge(), ids))


def test_rows_survive_the_way_there_and_back_bit_for_bit(tmp_path, tied):
    tokenizer, model = bpe_tokenizer(), build_model("llama", 300, tied=tied, dtype=torch.bfloat16)
    partial = add_tokens(model, tokenizer, TOKENS, special=True)
    before = partial.token_rows()
    write_peft(before, tmp_path, model, tokenizer)
    after = read_peft(tmp_path)
    assert after.added_tokens == before.added_tokens and after.tied == before.tied
    for name, rows in before.tensors().items():
        assert after.tensors()[name].dtype == rows.dtype and torch.equal(after.tensors()[name], rows)


def test_existing_tokens_and_ids_go_there_and_back(tmp_path):
    model = build_model("llama", 300)
    rows = train_tokens(model, None, [7, 250, 3]).token_rows()
    write_peft(rows, tmp_path, model, None)
    assert json.loads((tmp_path / "adapter_config.json").read_text())["token_indices"] == [7, 250, 3]
    again = read_peft(tmp_path)
    assert again.tokens == [] and again.token_ids == [7, 250, 3]
    assert torch.equal(again.input_rows, rows.input_rows)


def test_adapter_that_names_no_lm_head_needs_the_model(tmp_path):
    peft_model, tokenizer = peft_trained("llama", False, "trainable-tokens")
    peft_model.save_pretrained(tmp_path)
    tensors = load_file(tmp_path / "adapter_model.safetensors")
    save_file({key.replace("lm_head", "head"): value for key, value in tensors.items()},
              tmp_path / "adapter_model.safetensors")  # fmt: skip
    with pytest.raises(PartialEmbeddingError, match="does not say which are the input embeddings"):
        read_peft(tmp_path, tokenizer)
    model = build_model("llama", 303, tied=False)
    model.head = model.lm_head
    assert read_peft(tmp_path, tokenizer, model=model).output_rows is not None


def _damage_indices(folder):
    path = folder / "adapter_config.json"
    path.write_text(path.read_text().replace("300", "301"))


def _only_pickle(folder):
    (folder / "adapter_model.safetensors").rename(folder / "adapter_model.bin")


def _no_rows(folder):
    save_file({"base_model.model.x.lora_A.weight": torch.ones(1)}, folder / "adapter_model.safetensors")


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (_damage_indices, "given more than once"),
        (_only_pickle, "a pickle, which is not read here"),
        (_no_rows, "has no token rows"),
        (lambda folder: (folder / "adapter_config.json").write_text("[]"), "JSON object"),
        (lambda folder: (folder / "adapter_config.json").write_text("{}"), "but 0 token indices"),
        (lambda folder: (folder / "adapter_config.json").unlink(), "has no adapter_config.json"),
        (lambda folder: (folder / "adapter_model.safetensors").write_bytes(b"\0" * 64), "Cannot read"),
    ],
)
def test_damaged_adapter_is_an_error_that_says_how(tmp_path, damage, message):
    peft_model, tokenizer = peft_trained("llama", True, "trainable-tokens")
    peft_model.save_pretrained(tmp_path)
    damage(tmp_path)
    with pytest.raises(PartialEmbeddingError, match=message):
        read_peft(tmp_path, tokenizer)


def test_negative_ids_that_peft_takes_are_refused(tmp_path):
    peft_model, tokenizer = peft_trained("llama", True, "trainable-tokens")
    peft_model.save_pretrained(tmp_path)
    path = tmp_path / "adapter_config.json"
    path.write_text(path.read_text().replace("302", "-1"))
    with pytest.raises(PartialEmbeddingError, match=r"Row ids -1 are outside"):
        read_peft(tmp_path, tokenizer)


def test_what_an_adapter_cannot_hold_is_refused(tmp_path):
    tokenizer, model = bpe_tokenizer(), build_model("phi", 300, tied=False)  # a head with a bias
    partial = add_tokens(model, tokenizer, TOKENS)
    with pytest.raises(PartialEmbeddingError, match=r"'output_bias'.* would be lost"):
        write_peft(partial.token_rows(), tmp_path / "a", model, tokenizer)
    rows = TokenRows(tokens=TOKENS, input_rows=torch.ones(3, 16))
    untied, other = build_model("llama", 300, tied=False), bpe_tokenizer()
    other.add_tokens(TOKENS)
    with pytest.raises(PartialEmbeddingError, match="has a head of its own, and these rows have none"):
        write_peft(rows, tmp_path / "a", untied, other)
    untied.config.tie_word_embeddings = True
    with pytest.raises(PartialEmbeddingError, match="is not tied, but its config says the contrary"):
        write_peft(rows, tmp_path / "a", untied, other)
    assert not (tmp_path / "a").exists()
