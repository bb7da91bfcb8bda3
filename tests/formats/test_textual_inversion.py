"""Textual-inversion files, with a CLIP text encoder of tiny configuration, and diffusers' own loader."""

from __future__ import annotations

import pytest
import torch
from safetensors.torch import load_file, save_file
from tokenizers import pre_tokenizers
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTokenizer

from hf_partial_embed import PartialEmbeddingError, TokenRows, add_tokens
from hf_partial_embed.formats import read_textual_inversion, write_textual_inversion
from hf_partial_embed.tokens import expand_placeholders, vector_tokens


def clip_tokenizer():
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    words = [*alphabet, *(f"{letter}</w>" for letter in alphabet), "ca", "cat</w>", "<|startoftext|>", "<|endoftext|>"]
    vocabulary = {word: number for number, word in enumerate(words)}
    return CLIPTokenizer(
        vocab=vocabulary, merges=[("c", "a"), ("ca", "t</w>")], bos_token="<|startoftext|>", eos_token="<|endoftext|>"
    )


def clip_encoder(width=16, seed=0):
    torch.manual_seed(seed)
    size = len(clip_tokenizer())
    config = CLIPTextConfig(
        vocab_size=size, hidden_size=width, intermediate_size=32, num_hidden_layers=2, num_attention_heads=2,
        max_position_embeddings=32, bos_token_id=size - 2, eos_token_id=size - 1, pad_token_id=size - 1,
    )  # fmt: skip
    return CLIPTextModel(config).eval().requires_grad_(False)


def encode(model, tokenizer, text):
    with torch.no_grad():
        return model(input_ids=torch.tensor([tokenizer(text)["input_ids"]])).last_hidden_state


def trained(num_vectors, width=16, seed=0):
    """An encoder that has learned a concept, by a step of training."""
    model, tokenizer = clip_encoder(width, seed), clip_tokenizer()
    tokens = vector_tokens("<cat>", num_vectors)
    partial = add_tokens(model, tokenizer, dict.fromkeys(tokens, "a cat"))
    if num_vectors > 1:
        expand_placeholders(tokenizer, tokens)
    optimizer = torch.optim.AdamW(partial.param_groups(lr=0.1))
    ids = torch.tensor([tokenizer("a photo of <cat>")["input_ids"]])
    target = torch.randn(1, ids.shape[1], width)
    (model(input_ids=ids).last_hidden_state - target).pow(2).mean().backward()
    optimizer.step()
    partial.verify()
    return model, tokenizer, partial


@pytest.mark.parametrize("num_vectors", [1, 3])
def test_concept_comes_back_from_its_file(tmp_path, num_vectors):
    model, tokenizer, partial = trained(num_vectors)
    write_textual_inversion(partial.token_rows(), tmp_path)
    file = load_file(tmp_path / "learned_embeds.safetensors")
    assert {name: tuple(vectors.shape) for name, vectors in file.items()} == {"<cat>": (num_vectors, 16)}

    rows = read_textual_inversion(tmp_path)
    other, other_tokenizer = clip_encoder(), clip_tokenizer()
    rows.attach(other, other_tokenizer)
    if num_vectors > 1:
        expand_placeholders(other_tokenizer)
    text = "my <cat>, and a <cat> again"
    assert (
        len(other_tokenizer(text)["input_ids"])
        == len(other_tokenizer("my , and a again")["input_ids"]) + 2 * num_vectors
    )
    assert torch.equal(encode(other, other_tokenizer, text), encode(model, tokenizer, text))


@pytest.mark.parametrize("num_vectors", [1, 3])
def test_diffusers_loads_what_was_written_to_the_same_states(tmp_path, num_vectors):
    mixin = pytest.importorskip("diffusers.loaders").TextualInversionLoaderMixin
    model, tokenizer, partial = trained(num_vectors)
    write_textual_inversion(partial.token_rows(), tmp_path / "cat.safetensors")

    class Pipeline(mixin):
        hf_device_map, components = None, {}

    pipeline = Pipeline()
    pipeline.tokenizer, pipeline.text_encoder = clip_tokenizer(), clip_encoder()
    pipeline.load_textual_inversion(str(tmp_path), weight_name="cat.safetensors")
    prompt = pipeline.maybe_convert_prompt("my <cat>", pipeline.tokenizer)
    theirs = encode(pipeline.text_encoder, pipeline.tokenizer, prompt)
    torch.testing.assert_close(theirs, encode(model, tokenizer, "my <cat>"), atol=1e-6, rtol=1e-6)


def test_two_encoders_each_get_their_rows(tmp_path):
    parts = {"clip_l": trained(2)[2].token_rows(), "clip_g": trained(2, width=32, seed=1)[2].token_rows()}
    path = tmp_path / "sdxl.safetensors"
    write_textual_inversion(parts, path)
    assert {name: tuple(t.shape) for name, t in load_file(path).items()} == {"clip_l": (2, 16), "clip_g": (2, 32)}
    for encoder, rows in parts.items():
        again = read_textual_inversion(path, token="<cat>", encoder=encoder)
        assert again.tokens == ["<cat>_0", "<cat>_1"] and torch.equal(again.input_rows, rows.input_rows)
    with pytest.raises(PartialEmbeddingError, match=r"text encoders clip_l and clip_g. Say which"):
        read_textual_inversion(path, token="<cat>")
    with pytest.raises(PartialEmbeddingError, match="does not say which token"):
        read_textual_inversion(path, encoder="clip_g")


def test_two_encoders_load_in_diffusers(tmp_path):
    mixin = pytest.importorskip("diffusers.loaders").TextualInversionLoaderMixin
    width = {"clip_l": 16, "clip_g": 32}
    sources = {name: trained(2, width=width[name], seed=number) for number, name in enumerate(width)}
    path = tmp_path / "sdxl.safetensors"
    write_textual_inversion({name: partial.token_rows() for name, (_, _, partial) in sources.items()}, path)

    class Pipeline(mixin):
        hf_device_map, components = None, {}

    for number, (name, (model, tokenizer, _)) in enumerate(sources.items()):
        encoder, their_tokenizer = clip_encoder(width[name], seed=number), clip_tokenizer()
        state = {name: load_file(path)[name]}  # as the documentation of Stable Diffusion XL has it
        Pipeline().load_textual_inversion(state[name], token="<cat>", text_encoder=encoder, tokenizer=their_tokenizer)
        prompt = Pipeline().maybe_convert_prompt("my <cat>", their_tokenizer)
        theirs = encode(encoder, their_tokenizer, prompt)
        torch.testing.assert_close(theirs, encode(model, tokenizer, "my <cat>"), atol=1e-6, rtol=1e-6)


def test_vector_without_a_dimension_of_its_own_and_the_web_uis_key_are_read(tmp_path):
    path = tmp_path / "x.safetensors"
    save_file({"<cat>": torch.arange(4.0)}, path)
    assert read_textual_inversion(path).tokens == ["<cat>"]
    assert read_textual_inversion(path, token="<dog>").tokens == ["<dog>"]
    save_file({"emb_params": torch.ones(2, 4)}, path)
    assert read_textual_inversion(path, token="<dog>").tokens == ["<dog>_0", "<dog>_1"]
    with pytest.raises(PartialEmbeddingError, match="token='<x>'"):
        read_textual_inversion(path)


def test_pickles_are_refused_unopened_with_the_remedy(tmp_path):
    (tmp_path / "learned_embeds.bin").write_bytes(b"cposix\nsystem\n")
    for source in (tmp_path / "learned_embeds.bin", tmp_path):
        with pytest.raises(PartialEmbeddingError, match=r"is a pickle.*weights_only=True"):
            read_textual_inversion(source)
    rows = TokenRows(tokens=["<cat>"], input_rows=torch.ones(1, 4))
    with pytest.raises(PartialEmbeddingError, match="is a pickle"):
        write_textual_inversion(rows, tmp_path / "out.pt")


@pytest.mark.parametrize(
    ("tensors", "message"),
    [
        ({"<cat>": torch.ones(1, 2, 3)}, r"shape \(1, 2, 3\)"),
        ({"<cat>": torch.ones(3, dtype=torch.int64)}, "no textual-inversion file"),
        ({"<cat>": torch.tensor([1.0, float("nan")])}, "infinite or NaN"),
        ({"<a>": torch.ones(2), "<b>": torch.ones(3)}, r"widths \[2, 3\]"),
    ],
)
def test_other_files_are_errors(tmp_path, tensors, message):
    save_file(tensors, tmp_path / "x.safetensors")
    with pytest.raises(PartialEmbeddingError, match=message):
        read_textual_inversion(tmp_path / "x.safetensors")


def test_one_concept_is_written_and_nothing_is_lost_silently(tmp_path):
    rows = TokenRows(tokens=["<a>", "<b>_0", "<b>_1"], input_rows=torch.arange(6.0).reshape(3, 2))
    with pytest.raises(PartialEmbeddingError, match=r"these rows have '<a>', '<b>'. Say which"):
        write_textual_inversion(rows, tmp_path)
    with pytest.raises(PartialEmbeddingError, match="no concept '<c>'"):
        write_textual_inversion(rows, tmp_path, token="<c>")
    write_textual_inversion(rows, tmp_path, token="<b>")
    assert torch.equal(load_file(tmp_path / "learned_embeds.safetensors")["<b>"], rows.input_rows[1:])
    with_head = TokenRows(tokens=["<a>"], input_rows=torch.ones(1, 2), output_rows=torch.ones(1, 2))
    with pytest.raises(PartialEmbeddingError, match="no place for 'output_rows'"):
        write_textual_inversion(with_head, tmp_path)
