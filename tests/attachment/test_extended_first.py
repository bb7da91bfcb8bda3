"""A tokenizer that was extended before the model: tokens without a row are new ones."""

from __future__ import annotations

import copy
import json
import logging

import pytest
import torch
from conftest import TOKENIZERS, bpe_tokenizer, build_model, logits_of, table_of
from states import assert_same, model_state, tokenizer_state

from hf_partial_embed import PartialEmbeddingError, TokenRows, add_tokens, load_tokens, train_tokens


def extended(tokens=("<a>",), spare=0):
    tokenizer = bpe_tokenizer()
    model = build_model("llama", len(tokenizer) + spare)
    tokenizer.add_tokens(list(tokens))
    return model, tokenizer


@pytest.mark.parametrize("kind", TOKENIZERS)
def test_tokens_of_the_tokenizer_without_a_row_are_new_rows(kind, tied, strategy):
    tokenizer = TOKENIZERS[kind]()
    before_extended, size = copy.deepcopy(tokenizer), len(tokenizer)
    model = build_model("llama", size, tied=tied)
    tokenizer.add_tokens(["<a>", "<b>"])
    before = {**model_state(model), **tokenizer_state(tokenizer)}
    plain = build_model("llama", size, tied=tied)
    other = add_tokens(plain, before_extended, ["<a>", "<new>", "<b>"], strategy=strategy)
    partial = add_tokens(model, tokenizer, ["<a>", "<new>", "<b>"], strategy=strategy)
    assert partial.token_ids == [size, size + 2, size + 1]
    assert model.config.vocab_size == len(tokenizer) == size + 3
    assert torch.equal(partial.token_rows().input_rows, other.token_rows().input_rows)  # from the same pieces
    assert [partial.expand([i]) for i in partial.token_ids] == [other.expand([i]) for i in other.token_ids]
    partial.verify()
    partial.detach()
    assert_same(before, {**model_state(model), **tokenizer_state(tokenizer)})
    assert tokenizer.convert_tokens_to_ids("<b>") == size + 1  # as the user has left it


def test_tokens_that_nobody_asked_for_get_a_row_too():
    model, tokenizer = extended(["<a>", "<b>"])
    ids = torch.tensor([[5, 9]])
    before = logits_of(model, ids)
    partial = add_tokens(model, tokenizer, ["<a>"])
    assert model.config.vocab_size == len(tokenizer) == 302
    assert partial.token_ids == [300]
    assert torch.equal(logits_of(model, ids)[..., :300], before)


def test_a_token_inside_of_the_table_is_one_that_exists():
    model, tokenizer = extended(spare=2)
    with pytest.raises(
        PartialEmbeddingError, match=r"'<a>' \(id 300\) is a token of this tokenizer already.*train_to"
    ):
        add_tokens(model, tokenizer, ["<a>"])
    assert train_tokens(model, tokenizer, ["<a>"]).token_ids == [300]


def test_train_tokens_names_the_way_out():
    model, tokenizer = extended()
    for tokens in (["<a>"], [300]):
        with pytest.raises(PartialEmbeddingError, match=r"table of 300 rows.*add_tokens.*, which grows the table"):
            train_tokens(model, tokenizer, tokens)


def test_way_out_for_pieces_of_the_vocabulary_without_a_row():
    plain, size = bpe_tokenizer(), 300
    tokenizer = copy.deepcopy(plain)
    add_tokens(build_model("llama", size), tokenizer, [" lanthan"]).merge()  # as someone adds merges by hand
    model = build_model("llama", size)
    before = {**model_state(model), **tokenizer_state(tokenizer)}
    token_id = tokenizer.get_vocab()["Ġlanthan"]
    way = r"table of 300 rows.*resize_token_embeddings\(len\(tokenizer\)\).*train_tokens\(.*init="
    for function, tokens in ((add_tokens, [" lanthan"]), (train_tokens, ["Ġlanthan"]), (train_tokens, [" lanthan"])):
        with pytest.raises(PartialEmbeddingError, match=way):
            function(model, tokenizer, tokens)
    with pytest.raises(PartialEmbeddingError, match=r"300 rows.*pieces.*resize_token_embeddings"):
        train_tokens(model, tokenizer, [token_id])
    assert_same(before, {**model_state(model), **tokenizer_state(tokenizer)})
    table = table_of(model).clone()
    model.resize_token_embeddings(len(tokenizer))
    partial = train_tokens(model, tokenizer, [" lanthan"], init="subtoken_mean")
    assert partial.token_ids == [token_id]
    left, right = json.loads(tokenizer._tokenizer.to_str())["model"]["merges"][-1]
    parts = table_of(model)[tokenizer.convert_tokens_to_ids([left, right])]
    torch.testing.assert_close(partial.token_rows().input_rows[0], parts.mean(0))
    assert torch.equal(table_of(model)[:size], table)


@pytest.mark.parametrize("way", ["add", "load"])
def test_a_warning_names_tokens_without_a_row_that_nobody_asked_for(way, caplog, tmp_path):
    tokenizer = bpe_tokenizer()
    add_tokens(build_model("llama", 300), tokenizer, [" lanthan"]).merge()  # as someone adds merges by hand
    pieces = len(tokenizer) - 300
    tokenizer.add_tokens(["<b>"])
    model = build_model("llama", 300)
    add_tokens(build_model("llama", 300), bpe_tokenizer(), ["<a>"]).save_pretrained(tmp_path)
    with caplog.at_level(logging.WARNING, logger="hf_partial_embed"):
        partial = add_tokens(model, tokenizer, ["<a>"]) if way == "add" else load_tokens(model, tokenizer, tmp_path)
    assert partial.token_ids == [300 + pieces + 1]
    (record,) = [record for record in caplog.records if "start at the mean" in record.getMessage()]
    assert f"{pieces + 1} tokens" in record.getMessage()
    assert all(
        name in record.getMessage() for name in ("' lanthan'", "'<b>'", "train_tokens(", 'init="subtoken_mean"')
    )
    left = train_tokens(model, tokenizer, [" lanthan", "<b>"], init="subtoken_mean")  # the remedy
    row = tokenizer.get_vocab()["Ġlanthan"]
    assert left.token_ids == [row, 300 + pieces]
    assert not torch.allclose(left.token_rows().input_rows[0], table_of(model)[:300].mean(0))


def test_no_warning_where_all_tokens_have_a_row_or_are_asked_for(caplog):
    model, tokenizer = extended(["<a>", "<b>"])
    with caplog.at_level(logging.WARNING, logger="hf_partial_embed"):
        add_tokens(model, tokenizer, ["<b>", "<a>", "<c>"]).detach()
        add_tokens(build_model("llama", 310), bpe_tokenizer(), ["<a>"])
    assert "start at the mean" not in caplog.text


def test_flags_are_those_that_the_tokenizer_has(caplog):
    model, tokenizer = extended()
    with caplog.at_level(logging.WARNING, logger="hf_partial_embed"):
        partial = add_tokens(model, tokenizer, ["<a>", "<b>"], special=True)
    assert "'<a>' are in the tokenizer already, as ordinary ones" in caplog.text
    assert [token["special"] for token in partial.token_rows().added_tokens] == [False, True]


def test_saved_rows_load_beside_a_tokenizer_that_has_their_tokens(tmp_path, strategy):
    model, tokenizer = build_model("llama", 300), bpe_tokenizer()
    saved = add_tokens(model, tokenizer, ["<a>", "<b>"])
    saved.save_pretrained(tmp_path)
    model, tokenizer = extended(["<b>"])
    before = {**model_state(model), **tokenizer_state(tokenizer)}
    partial = TokenRows.from_pretrained(tmp_path).attach(model, tokenizer, strategy=strategy)
    assert partial.token_ids == [301, 300]
    assert torch.equal(partial.token_rows().input_rows, saved.token_rows().input_rows)
    assert [partial.expand([i]) for i in partial.token_ids] == [saved.expand([i]) for i in saved.token_ids]
    partial.detach()
    assert_same(before, {**model_state(model), **tokenizer_state(tokenizer)})
    assert load_tokens(model, tokenizer, tmp_path).token_ids == [301, 300]
