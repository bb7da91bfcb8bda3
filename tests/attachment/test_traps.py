"""Warnings of what `transformers` and `tokenizers` do with ids that were not there when a model was made."""

from __future__ import annotations

import logging

import pytest
import torch
from conftest import TOKENIZERS, bpe_tokenizer, build_model
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import AddedToken, Tokenizer, models, pre_tokenizers
from transformers import (
    CLIPTextConfig,
    CLIPTextModel,
    Owlv2TextConfig,
    Owlv2TextModel,
    PreTrainedTokenizerFast,
    WhisperConfig,
    WhisperForConditionalGeneration,
    WhisperTokenizer,
)

from hf_partial_embed import PartialEmbeddingError, add_tokens, train_tokens

SMALL = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2}


def warnings_of(caplog, text: str) -> list[str]:
    return [record.message for record in caplog.records if text in record.message]


@pytest.fixture(autouse=True)
def _log(caplog):
    caplog.set_level(logging.WARNING, logger="hf_partial_embed")


# --- decoding -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("special", [False, True])
def test_byte_level_tokens_that_decode_to_something_else_are_named_once(caplog, special):
    tokenizer = bpe_tokenizer()
    tokens = [AddedToken(text, special=special) for text in ("<café>", "<tool>", "<Öl>", "<日本>")]
    partial = add_tokens(build_model(), tokenizer, tokens)
    assert tokenizer.decode([partial.token_ids[0]]) == "<caf�>"
    (message,) = warnings_of(caplog, "decode")
    assert "'<café>' as '<caf�>'" in message and "'<Öl>'" in message
    assert "<tool>" not in message and "日本" not in message


@pytest.mark.parametrize("kind", TOKENIZERS)
def test_tokens_that_decode_to_their_text_are_not_warned_of(caplog, kind):
    tokenizer = TOKENIZERS[kind]()
    add_tokens(build_model(vocab=len(tokenizer)), tokenizer, ["<tool>", "zirconium", "a b", "don't?", "<日本>"])
    assert not [record for record in caplog.records if record.name.endswith(".traps")]


@settings(max_examples=25, deadline=None)
@given(text=st.text(st.characters(min_codepoint=0x21, max_codepoint=0x17F), min_size=1, max_size=4))
def test_a_warning_comes_exactly_where_decoding_changes_the_text(text):
    tokenizer, seen = bpe_tokenizer(), []
    handler = logging.Handler()
    handler.emit = lambda record: seen.append(record.getMessage())
    logger = logging.getLogger("hf_partial_embed")
    logger.addHandler(handler)
    token = f"<{text}>"
    try:
        partial = add_tokens(build_model(), tokenizer, [AddedToken(token, normalized=False)])
    except PartialEmbeddingError:
        return
    finally:
        logger.removeHandler(handler)
    changes = "".join(tokenizer.decode(partial.token_ids).split()) != "".join(token.split())
    assert bool(seen) == changes


def test_the_remedies_of_the_message_work(caplog):
    # One character that bytes are not written as, such as a space, and the whole text is taken as it is.
    tokenizer = bpe_tokenizer()
    partial = add_tokens(build_model(), tokenizer, ["<café >", "<cafe>"])
    assert [tokenizer.decode([token_id]) for token_id in partial.token_ids] == ["<café >", "<cafe>"]
    assert not caplog.records


def test_a_tokenizer_that_cannot_decode_costs_no_rows(caplog, monkeypatch):
    tokenizer = bpe_tokenizer()

    def fails(*args, **kwargs):
        raise NotImplementedError("no text from ids")

    monkeypatch.setattr(tokenizer, "decode", fails)
    monkeypatch.setattr(tokenizer, "batch_decode", fails)
    partial = add_tokens(build_model(), tokenizer, ["<tool>"])
    assert partial.token_ids == [300]
    assert "no text from ids" in warnings_of(caplog, "decode")[0]


# --- pooling at the largest id --------------------------------------------------------------------------------------


def word_tokenizer() -> PreTrainedTokenizerFast:
    """The end token has the largest id, as in CLIP."""
    vocabulary = {word: i for i, word in enumerate(["<unk>", "<pad>", "w2", "w3", "w4", "w5", "<s>", "</s>"])}
    backend = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    backend.pre_tokenizer = pre_tokenizers.Whitespace()
    return PreTrainedTokenizerFast(
        tokenizer_object=backend, unk_token="<unk>", pad_token="<pad>", bos_token="<s>", eos_token="</s>"
    )


def pools_at_the_new_token(model, new: int) -> bool:
    """Whether the pooled state is that of a new token in front of the end token."""
    with torch.no_grad():
        out = model(input_ids=torch.tensor([[6, new, 3, 7]]))
    return torch.equal(out.pooler_output[0], out.last_hidden_state[0, 1])


def clip(eos: int):
    config = CLIPTextConfig(vocab_size=8, eos_token_id=eos, bos_token_id=6, pad_token_id=1, **SMALL)
    return CLIPTextModel(config).eval()


def owl(eos: int):
    config = Owlv2TextConfig(vocab_size=8, eos_token_id=eos, bos_token_id=6, pad_token_id=1, **SMALL)
    return Owlv2TextModel(config).eval()


@pytest.mark.parametrize(("make", "eos", "expected"), [(clip, 2, True), (clip, 7, False), (owl, 7, True)])
def test_pooling_at_the_largest_id_is_told(caplog, make, eos, expected):
    model, tokenizer = make(eos), word_tokenizer()
    partial = add_tokens(model, tokenizer, ["<cat-toy>"])
    assert pools_at_the_new_token(model, partial.token_ids[0]) == expected
    messages = warnings_of(caplog, "largest id")
    assert len(messages) == len(caplog.records) == expected
    if make is clip and expected:
        assert "eos_token_id = 7" in messages[0]
        for module in model.modules():  # the remedy of the message
            if getattr(module, "eos_token_id", None) == 2:
                module.eos_token_id = 7
        assert not pools_at_the_new_token(model, partial.token_ids[0])


def test_rows_that_exist_are_not_warned_of(caplog):
    train_tokens(clip(2), word_tokenizer(), ["w4"])
    assert not caplog.records


# --- ids behind the timestamps --------------------------------------------------------------------------------------


def whisper():
    letters = sorted(pre_tokenizers.ByteLevel.alphabet())
    specials = ["<|endoftext|>", "<|startoftranscript|>", "<|notimestamps|>"]
    texts = [*letters, *specials, "<|0.00|>", "<|0.02|>", "<|0.04|>"]
    tokenizer = WhisperTokenizer(vocab={text: i for i, text in enumerate(texts)}, merges=[])
    tokenizer.add_special_tokens({"extra_special_tokens": specials[1:]})
    config = WhisperConfig(
        vocab_size=len(texts), d_model=16, encoder_layers=1, decoder_layers=1, encoder_attention_heads=2,
        decoder_attention_heads=2, encoder_ffn_dim=32, decoder_ffn_dim=32, pad_token_id=256, bos_token_id=256,
        eos_token_id=256, decoder_start_token_id=257, max_source_positions=32,
    )  # fmt: skip
    model = WhisperForConditionalGeneration(config)
    model.generation_config.no_timestamps_token_id = 258
    return model, tokenizer


@pytest.mark.parametrize("special", [False, True])
def test_ids_that_are_taken_for_timestamps_are_told(caplog, special):
    model, tokenizer = whisper()
    spoken = [tokenizer.convert_tokens_to_ids(token) for token in ("<|0.02|>", "a", "<|0.04|>")]
    assert tokenizer.decode(spoken, decode_with_timestamps=True) == "<|0.02|>a<|0.04|>"
    partial = add_tokens(model, tokenizer, ["<laughs>"], special=special)
    decoded = tokenizer.decode([spoken[1], *partial.token_ids], decode_with_timestamps=True)
    assert decoded == "a<|0.06|>"
    (message,) = [record.message for record in caplog.records]
    assert "timestamp" in message and "'<laughs>'" in message
    assert tokenizer.decode(partial.token_ids) == "<laughs>"  # the remedy of the message
