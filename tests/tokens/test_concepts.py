"""One placeholder in the text, several tokens in the model."""

from __future__ import annotations

import pytest
import torch
from conftest import TOKENIZERS, build_model, logits_of
from states import assert_same, tokenizer_state
from transformers import AutoTokenizer

from hf_partial_embed import PartialEmbeddingError, TokenRows, add_tokens
from hf_partial_embed.tokens import concepts_of, expand_placeholders, vector_tokens

CAT = ["<cat>_0", "<cat>_1", "<cat>_2"]


def test_tokens_of_a_concept_are_numbered_and_a_single_one_is_the_placeholder():
    assert vector_tokens("<cat>", 3) == CAT
    assert vector_tokens("<cat>", 1) == ["<cat>"]
    with pytest.raises(PartialEmbeddingError, match="num_vectors=0"):
        vector_tokens("<cat>", 0)


@pytest.mark.parametrize(
    ("tokens", "concepts"),
    [
        (CAT, {"<cat>": CAT}),
        (["<dog>", *CAT], {"<dog>": ["<dog>"], "<cat>": CAT}),
        (["x_0"], {"x_0": ["x_0"]}),  # one vector alone is no concept of several
        (["x", "x_0", "x_1"], {"x": ["x"], "x_0": ["x_0"], "x_1": ["x_1"]}),  # x is a token itself
        (["x_0", "x_1", "x_3"], {"x": ["x_0", "x_1"], "x_3": ["x_3"]}),
        (["a_0_0", "a_0_1"], {"a_0": ["a_0_0", "a_0_1"]}),
    ],
)
def test_concepts_are_found_in_the_names(tokens, concepts):
    assert concepts_of(tokens) == concepts


@pytest.mark.parametrize("family", ["bpe", "wordpiece"])
@pytest.mark.parametrize("text", ["a <cat> here", "<cat>", "x<cat>y <cat>", "<s><cat></s>"])
def test_placeholder_is_read_as_all_of_its_tokens(family, text):
    tokenizer = TOKENIZERS[family]()
    partial = add_tokens(build_model("llama", len(tokenizer)), tokenizer, [*CAT, "<dog>"])
    expand_placeholders(tokenizer, partial.tokens)
    written = tokenizer(text.replace("<cat>", "".join(CAT)))["input_ids"]
    assert tokenizer(text)["input_ids"] == written
    assert written.count(partial.token_ids[1]) == text.count("<cat>")
    assert tokenizer("<cat>_1 <dog>", add_special_tokens=False)["input_ids"].count(partial.token_ids[0]) == 0


def test_expansion_comes_back_with_the_saved_tokenizer(tmp_path, tokenizer):
    add_tokens(build_model("llama", len(tokenizer)), tokenizer, CAT)
    expand_placeholders(tokenizer)  # finds the concept in the vocabulary
    tokenizer.save_pretrained(tmp_path)
    again = AutoTokenizer.from_pretrained(tmp_path)
    assert again("my <cat>")["input_ids"] == tokenizer("my <cat>")["input_ids"]
    assert again("my <cat>")["input_ids"][-3:] == again.convert_tokens_to_ids(CAT)


def test_expansion_taken_off_leaves_the_tokenizer_as_it_was(tokenizer):
    before = tokenizer_state(tokenizer)
    partial = add_tokens(build_model("llama", len(tokenizer)), tokenizer, CAT)
    expansion = expand_placeholders(tokenizer, partial.tokens)
    expansion.remove()
    partial.detach()
    assert_same(before, tokenizer_state(tokenizer))


def test_each_vector_gets_its_own_gradient(tokenizer):
    model = build_model("llama", len(tokenizer)).requires_grad_(False)
    partial = add_tokens(model, tokenizer, dict.fromkeys(CAT, "a name"))
    expand_placeholders(tokenizer, CAT)
    ids = torch.tensor([tokenizer("The <cat> story")["input_ids"]])
    model(input_ids=ids, labels=ids).loss.backward()
    (rows,) = partial.parameters()
    assert (rows.grad.norm(dim=1) > 0).all()
    assert len({tuple(row) for row in rows.grad.tolist()}) == 3


def test_rows_of_a_concept_go_on_another_tokenizer(tmp_path, tokenizer):
    model = build_model("llama", len(tokenizer))
    partial = add_tokens(model, tokenizer, CAT)
    partial.save_pretrained(tmp_path)
    expand_placeholders(tokenizer, CAT)
    other_tokenizer, other = TOKENIZERS["bpe"](), build_model("llama", 300)
    rows = TokenRows.from_pretrained(tmp_path)
    rows.attach(other, other_tokenizer)
    expand_placeholders(other_tokenizer, rows.tokens)
    ids = torch.tensor([other_tokenizer("a <cat>")["input_ids"]])
    assert torch.equal(logits_of(other, ids), logits_of(model, torch.tensor([tokenizer("a <cat>")["input_ids"]])))


def test_special_tokens_cannot_be_expanded_and_the_tokenizer_stays_as_it_was(tokenizer):
    add_tokens(build_model("llama", len(tokenizer)), tokenizer, ["<cat>", "<z>_0", "<z>_1"], special=True)
    before = tokenizer_state(tokenizer)
    with pytest.raises(PartialEmbeddingError, match="Add the tokens without special=True"):
        expand_placeholders(tokenizer)
    with pytest.raises(PartialEmbeddingError, match="lacks 'q_0', 'q_1'"):
        expand_placeholders(tokenizer, ["q_0", "q_1"])
    with pytest.raises(PartialEmbeddingError, match="no concept of several vectors among '<cat>'"):
        expand_placeholders(tokenizer, ["<cat>"])
    assert_same(before, tokenizer_state(tokenizer))


def test_removing_in_the_wrong_order_is_an_error(tokenizer):
    add_tokens(build_model("llama", len(tokenizer)), tokenizer, [*CAT, "d_0", "d_1"])
    first = expand_placeholders(tokenizer, CAT)
    second = expand_placeholders(tokenizer, ["d_0", "d_1"])
    with pytest.raises(PartialEmbeddingError, match="put on last first"):
        first.remove()
    second.remove()
    first.remove()
    assert tokenizer._tokenizer.normalizer is None
