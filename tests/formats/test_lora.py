"""Rows of ids that the base has as a LoRA adapter, which PEFT loads; vLLM's part is in `tests/libraries`."""

from __future__ import annotations

import json

import pytest
import torch
from conftest import PEFT_WARNING, as_computed_everywhere, bpe_tokenizer, build_model, logits_of
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, BitsAndBytesConfig, LlamaConfig, LlamaForCausalLM

from hf_partial_embed import PartialEmbeddingError, TokenRows, add_tokens, load_tokens, train_tokens
from hf_partial_embed.formats import read_lora, write_lora

pytestmark = [
    pytest.mark.filterwarnings(PEFT_WARNING),
    pytest.mark.filterwarnings("ignore::FutureWarning"),
    pytest.mark.filterwarnings("ignore:Model has `tie_word_embeddings=True`:UserWarning"),
    pytest.mark.filterwarnings("ignore:Setting `save_embedding_layers`:UserWarning"),
    pytest.mark.filterwarnings("ignore:fan_in_fan_out:UserWarning"),
]

EXISTING = ["<s>", "</s>"]
IDS = torch.tensor([[5, 2, 7, 3, 9, 2]])


def trained(kind: str, tied: bool, dtype=torch.float32) -> tuple[TokenRows, torch.Tensor]:
    """Rows of two chat tokens, and the logits of the model that has them merged."""
    tokenizer, model = bpe_tokenizer(), build_model(kind, 300, tied=tied, dtype=dtype)
    partial = train_tokens(model, tokenizer, EXISTING)
    torch.manual_seed(1)
    with torch.no_grad():
        for parameter in partial.parameters():
            parameter.normal_()
    rows = partial.token_rows()
    return rows, logits_of(partial.merge(), IDS)


def user_lora(kind: str, tied: bool, folder, **options) -> torch.Tensor:
    """An adapter of somebody's on the body; returns the logits that it alone gives."""
    model = build_model(kind, 300, tied=tied)
    options = {"r": 3, "lora_alpha": 5, "target_modules": ["q_proj", "v_proj"], **options}
    peft_model = get_peft_model(model, LoraConfig(**options))
    torch.manual_seed(2)
    with torch.no_grad():
        for name, parameter in peft_model.named_parameters():
            if "lora_" in name:
                parameter.normal_(std=0.3)
    peft_model.save_pretrained(folder)
    return logits_of(peft_model.eval(), IDS)


def close(ours: torch.Tensor, expected: torch.Tensor) -> None:
    assert ((ours - expected).abs().max() / expected.abs().max()).item() <= 1e-5


@pytest.mark.parametrize("kind", ["llama", "gemma", "gpt2"])
def test_peft_gives_the_logits_of_the_merged_model(kind, tied, tmp_path):
    rows, expected = trained(kind, tied)
    base = build_model(kind, 300, tied=tied)
    plain = logits_of(base, IDS[:, :1])
    write_lora(rows, tmp_path, base, bpe_tokenizer())
    loaded = PeftModel.from_pretrained(base, tmp_path).eval()
    close(logits_of(loaded, IDS), expected)
    untouched = [token_id for token_id in range(300) if token_id not in (2, 3)]
    assert torch.equal(logits_of(loaded, IDS[:, :1])[..., untouched], plain[..., untouched])


def test_encoder_without_a_head(tmp_path):
    tokenizer, model = bpe_tokenizer(), build_model("bert-encoder", 300)
    partial = train_tokens(model, tokenizer, EXISTING)
    with torch.no_grad():
        next(partial.parameters()).normal_()
    rows = partial.token_rows()
    expected = logits_of(partial.merge(), IDS)
    base = build_model("bert-encoder", 300)
    write_lora(rows, tmp_path, base, tokenizer)
    close(logits_of(PeftModel.from_pretrained(base, tmp_path).eval(), IDS), expected)


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"use_rslora": True},
        {"target_modules": r".*layers\.1.*(q_proj|down_proj)"},
        {"layers_to_transform": [1]},
        {"rank_pattern": {"q_proj": 5}, "alpha_pattern": {"q_proj": 7}},
    ],
    ids=["plain", "rslora", "pattern", "layers", "ranks"],
)
def test_joined_with_a_lora_both_are_exact(options, tied, tmp_path):
    rows, _ = trained("llama", tied)
    user_lora("llama", tied, tmp_path / "user", **options)
    base = build_model("llama", 300, tied=tied)
    write_lora(rows, tmp_path / "both", base, bpe_tokenizer(), lora=tmp_path / "user")
    close_to = build_model("llama", 300, tied=tied)
    rows.attach(close_to, bpe_tokenizer()).merge()
    expected = logits_of(PeftModel.from_pretrained(close_to, tmp_path / "user").eval(), IDS)
    close(logits_of(PeftModel.from_pretrained(base, tmp_path / "both").eval(), IDS), expected)


def test_rows_come_back_bit_for_bit(tied, tmp_path):
    rows, _ = trained("llama", tied)
    write_lora(rows, tmp_path, build_model("llama", 300, tied=tied), bpe_tokenizer())
    back = read_lora(tmp_path, bpe_tokenizer())
    assert back.tokens == rows.tokens
    for name, tensor in rows.tensors().items():
        assert torch.equal(back.tensors()[name], tensor)


def test_rows_on_spare_rows_of_the_base(tied, tmp_path):
    tokenizer, model = bpe_tokenizer(), build_model("llama", 320, tied=tied)
    partial = add_tokens(model, tokenizer, ["<think>"], special=True)
    rows = partial.token_rows()
    expected = logits_of(partial.merge(), torch.tensor([[5, 300, 7]]))
    base = build_model("llama", 320, tied=tied)
    write_lora(rows, tmp_path, base, tokenizer)
    loaded = PeftModel.from_pretrained(base, tmp_path).eval()
    close(logits_of(loaded, torch.tensor([[5, 300, 7]])), expected)
    tokens = {
        token.content for token in load_tokens(base, bpe_tokenizer(), tmp_path).tokenizer.added_tokens_decoder.values()
    }
    assert "<think>" in tokens


def test_bfloat16_base(tmp_path):
    rows, _ = trained("llama", True, dtype=torch.bfloat16)
    base = build_model("llama", 300, dtype=torch.bfloat16)
    write_lora(rows, tmp_path, base, bpe_tokenizer())
    loaded = PeftModel.from_pretrained(base.float(), tmp_path).eval()
    exact = build_model("llama", 300, dtype=torch.bfloat16).float()
    rows.attach(exact, bpe_tokenizer()).merge()
    close(logits_of(loaded, IDS), logits_of(exact, IDS))


@pytest.mark.filterwarnings("ignore")  # of the quantisers themselves
@pytest.mark.parametrize("skipped", ["lm_head", "none"], ids=["body", "body and head"])
def test_quantised_base(tmp_path, skipped):
    """A quantised body is no matter; of a quantised head the differences are to the values that it holds."""
    config = LlamaConfig(
        vocab_size=300, hidden_size=64, intermediate_size=128, num_hidden_layers=1, num_attention_heads=4
    )
    LlamaForCausalLM(config).save_pretrained(tmp_path / "base")
    settings = BitsAndBytesConfig(
        load_in_4bit=True, bnb_4bit_compute_dtype=torch.float32, llm_int8_skip_modules=[skipped]
    )

    def load():
        return as_computed_everywhere(
            AutoModelForCausalLM.from_pretrained(tmp_path / "base", quantization_config=settings, dtype=torch.float32)
        )

    generator = torch.Generator().manual_seed(1)
    rows = TokenRows(EXISTING, *torch.randn(2, 2, 64, generator=generator).unbind())
    write_lora(rows, tmp_path / "lora", load(), bpe_tokenizer())
    merged = load()
    rows.attach(merged, bpe_tokenizer()).merge()
    adapted = as_computed_everywhere(PeftModel.from_pretrained(load(), tmp_path / "lora").eval())
    close(logits_of(adapted, IDS), logits_of(merged, IDS))


def test_size_is_what_the_format_needs(tmp_path):
    rows, _ = trained("llama", True)
    write_lora(rows, tmp_path, build_model("llama", 300), bpe_tokenizer())
    tensors = load_file(tmp_path / "adapter_model.safetensors")
    assert sum(tensor.nbytes for tensor in tensors.values()) == 2 * (2 * 300 * 2 + 4 * 16 * 2)


def refused(message: str, rows, model, tokenizer, folder, **options) -> None:
    with pytest.raises(PartialEmbeddingError, match=message):
        write_lora(rows, folder, model, tokenizer, **options)
    assert not folder.exists()


def test_base_without_a_row_is_an_error_that_says_the_ways(tmp_path):
    tokenizer = bpe_tokenizer()
    rows = add_tokens(build_model("llama", 300), tokenizer, ["<think>"]).token_rows()
    refused("300 rows and none for '<think>'.*reuse='auto'.*--spare", rows, build_model(), tokenizer, tmp_path / "out")


def test_rows_that_are_attached_are_refused(tmp_path):
    tokenizer, model = bpe_tokenizer(), build_model()
    partial = train_tokens(model, tokenizer, EXISTING)
    refused("Rows are attached.*detach", partial.token_rows(), model, tokenizer, tmp_path / "out")


def test_what_has_no_lora_is_refused(tmp_path):
    rows, _ = trained("llama", True)
    refused("16 wide .* 32", TokenRows(["<s>"], torch.zeros(1, 16)), _wider(), bpe_tokenizer(), tmp_path / "out")
    refused("no LoRA", rows, build_model("phi"), bpe_tokenizer(), tmp_path / "out")
    refused(
        "none for it", TokenRows(["<s>"], torch.zeros(1, 16)), build_model(tied=False), bpe_tokenizer(), tmp_path / "o"
    )


def _wider():
    return LlamaForCausalLM(
        LlamaConfig(vocab_size=300, hidden_size=32, intermediate_size=32, num_hidden_layers=1, num_attention_heads=2)
    )


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"use_dora": True}, "DoRA"),
        ({"modules_to_save": ["lm_head"]}, "modules_to_save"),
        ({"target_modules": ["q_proj", "embed_tokens"]}, "embed_tokens, too"),
        ({"target_modules": ["q_proj", "lm_head"]}, "lm_head, too"),
        ({"trainable_token_indices": [4, 5]}, "trainable_token_indices"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_adapters_that_cannot_be_joined_are_refused(options, message, tmp_path):
    rows, _ = trained("llama", False)
    user_lora("llama", False, tmp_path / "user", **options)
    model = build_model(tied=False)
    refused(message, rows, model, bpe_tokenizer(), tmp_path / "out", lora=tmp_path / "user")


def test_adapter_of_another_base_is_refused(tmp_path):
    rows, _ = trained("llama", True)
    user_lora("llama", True, tmp_path / "user")
    config = json.loads((tmp_path / "user" / "adapter_config.json").read_text())
    for change in ({"peft_type": "IA3"}, {"init_lora_weights": "pissa_niter_4"}):
        (tmp_path / "user" / "adapter_config.json").write_text(json.dumps({**config, **change}))
        refused("Cannot join", rows, build_model(), bpe_tokenizer(), tmp_path / "out", lora=tmp_path / "user")
    (tmp_path / "user" / "adapter_config.json").write_text(json.dumps(config))
    wide = TokenRows(["<s>"], torch.zeros(1, 32))
    refused("does not fit", wide, _wider_tied(), bpe_tokenizer(), tmp_path / "out", lora=tmp_path / "user")


def _wider_tied():
    model = _wider()
    model.lm_head.weight = model.model.embed_tokens.weight
    return model


def test_folder_without_rows_is_an_error(tmp_path):
    user_lora("llama", True, tmp_path)
    with pytest.raises(PartialEmbeddingError, match="no rows of tokens beside it"):
        read_lora(tmp_path)
