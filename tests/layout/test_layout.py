"""What belongs to a model's vocabulary: cases that a sweep over default configurations does not have."""

from __future__ import annotations

import pytest
import torch
import zoo
from conftest import logits_of
from states import assert_same, model_state, tokenizer_state
from transformers import (
    AutoModelForCausalLM,
    EncoderDecoderConfig,
    EncoderDecoderModel,
    LlamaConfig,
    LlamaForCausalLM,
    XLMWithLMHeadModel,
)

from hf_partial_embed import PartialEmbeddingError, add_tokens
from hf_partial_embed.layout.tables import find_layout

TOKENS = ["<new0>", "<new1>", "<new2>"]


def test_sizes_that_are_equal_by_chance_stay_what_they_are(tied, tmp_path):
    config = LlamaConfig(
        vocab_size=64, hidden_size=64, intermediate_size=64, max_position_embeddings=64, num_hidden_layers=2,
        num_attention_heads=4, tie_word_embeddings=tied, pad_token_id=1,
    )  # fmt: skip
    model = LlamaForCausalLM(config).eval()
    ids = torch.arange(4, 20)[None]
    before, settings = logits_of(model, ids), model.config.to_dict()
    partial = add_tokens(model, zoo.tokenizer_of(64), TOKENS)
    assert torch.equal(logits_of(model, ids)[..., :64], before)
    assert model.config.to_dict() == settings | {"vocab_size": 67}
    model.save_pretrained(tmp_path)
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path)
    new = torch.tensor([[5, *partial.token_ids]])
    torch.testing.assert_close(logits_of(loaded, new), logits_of(model, new))


def test_vocabularies_of_different_sizes_are_refused_and_the_part_that_has_the_tokens_takes_them():
    encoder, decoder = (zoo.shrink(zoo.CONFIG_MAPPING["bert"]()) for _ in range(2))
    decoder.vocab_size = 90
    config = EncoderDecoderConfig.from_encoder_decoder_configs(encoder, decoder)
    model = EncoderDecoderModel(config)
    tokenizer = zoo.tokenizer_of(90)
    before = model_state(model), tokenizer_state(tokenizer)
    message = r"encoder.vocab_size=103, decoder.vocab_size=90.*Add the tokens to the part that has them"
    with pytest.raises(PartialEmbeddingError, match=message):
        add_tokens(model, tokenizer, TOKENS)
    assert_same(before[0], model_state(model))
    assert_same(before[1], tokenizer_state(tokenizer))
    partial = add_tokens(model.decoder, tokenizer, TOKENS)
    assert partial.token_ids == [90, 91, 92]
    assert model.decoder.get_input_embeddings().weight.shape[0] == 93
    assert model.encoder.get_input_embeddings().weight.shape[0] == 103


def test_an_adaptive_softmax_is_refused_by_name():
    config = zoo.config_for("XLMWithLMHeadModel", False)
    config.asm, config.asm_cutoffs, config.asm_div_value = True, [20, 60], 2.0
    with pytest.raises(PartialEmbeddingError, match=r"pred_layer\.proj is an adaptive softmax"):
        add_tokens(XLMWithLMHeadModel(config), zoo.tokenizer_of(zoo.VOCAB), TOKENS)


def test_a_model_of_which_nothing_is_known_is_refused_with_what_was_tried():
    model = torch.nn.Module()
    model.config = LlamaConfig(vocab_size=64)
    with pytest.raises(PartialEmbeddingError) as caught:
        add_tokens(model, zoo.tokenizer_of(64), TOKENS)
    for part in (
        "Module cannot grow its vocabulary to 67 rows",
        "Built from its configuration: ",
        "resize_token_embeddings: ",
    ):
        assert part in str(caught.value)


def test_rows_behind_the_vocabulary_stay_at_their_distance_from_its_end():
    model = zoo.build("MllamaForCausalLM")  # eight rows more than the vocabulary, for the image token
    table = model.get_input_embeddings().weight.detach().clone()
    partial = add_tokens(model, zoo.tokenizer_of(zoo.VOCAB), TOKENS)
    grown = model.get_input_embeddings().weight.detach()
    assert len(table) == zoo.VOCAB + 8 and len(grown) == zoo.VOCAB + 3 + 8
    assert torch.equal(grown[: zoo.VOCAB], table[: zoo.VOCAB])
    assert torch.equal(grown[-8:], table[-8:])
    partial.detach()
    assert torch.equal(model.get_input_embeddings().weight, table)


def test_a_row_between_the_old_ones_and_the_new_is_the_mean_and_no_large_logit():
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=60, hidden_size=32, intermediate_size=64, num_hidden_layers=1, num_attention_heads=4,
        tie_word_embeddings=False, pad_token_id=1,
    )  # fmt: skip
    model = LlamaForCausalLM(config).eval()  # two rows shorter than its tokenizer, as Gemma3's is by one
    head = model.lm_head.weight.detach().clone()
    partial = add_tokens(model, zoo.tokenizer_of(62), TOKENS)
    assert partial.token_ids == [62, 63, 64]
    torch.testing.assert_close(model.lm_head.weight[60:62], head.mean(0).expand(2, -1))
    assert torch.equal(model.lm_head.weight[:60], head)


def test_an_integer_table_takes_the_row_of_the_first_piece():
    model = zoo.build("DeepseekV4ForCausalLM")
    routers = [module for module in model.modules() if "tid2eid" in module._buffers]
    assert routers
    for router in routers:
        router.tid2eid = torch.randint(0, 4, router.tid2eid.shape)
    partial = add_tokens(model, zoo.tokenizer_of(zoo.VOCAB), {"<new0>": "w50 w60", "<new1>": "w61"})
    for router in routers:
        assert torch.equal(router.tid2eid[partial.token_ids], router.tid2eid[[50, 61]])


def test_finding_the_layout_changes_nothing_and_draws_no_random_numbers():
    model = zoo.build("T5Gemma2ForConditionalGeneration")
    before, random = model_state(model), torch.get_rng_state()
    find_layout(model, 200)
    assert torch.equal(torch.get_rng_state(), random)
    assert_same(before, model_state(model))


def test_a_model_that_its_configuration_does_not_build_grows_by_its_own_method(tied):
    model = zoo.build("Gemma3nForCausalLM", tied)  # two tables of embeddings

    def refuses(self, config):
        raise RuntimeError("made by hand")

    model.__class__ = type("MadeByHand", (type(model),), {"__init__": refuses})
    before = logits_of(model, torch.arange(50, 60)[None])
    partial = add_tokens(model, zoo.tokenizer_of(zoo.VOCAB), TOKENS)
    assert partial.token_ids == [zoo.VOCAB, zoo.VOCAB + 1, zoo.VOCAB + 2]
    assert torch.equal(logits_of(model, torch.arange(50, 60)[None])[..., : zoo.VOCAB], before)
    assert len(list(partial.parameters())) == (2 if tied else 3)
