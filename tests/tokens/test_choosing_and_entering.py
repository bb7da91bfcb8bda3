"""What `choose_tokens` gives goes into the vocabulary as foretold, and sets of both kinds keep their promise."""

from __future__ import annotations

import copy

import pytest
import torch
from conftest import bpe_tokenizer, build_model
from hypothesis import given, settings
from hypothesis import strategies as st
from test_choosing import BPE as CHOOSING
from test_entering import ALL, BPE, TEXTS, read
from tokenizers import AddedToken

from hf_partial_embed import PartialEmbeddingError, add_tokens, choose_tokens, load_tokens

WORDS = ["lanthanum", "Grüße", "прасеодим", "日本語", "naïve", "tokenised", "thinkers", "periodically"]
CHOSEN_FROM = [f"{a} {b}s and {a}{b}, ({b})\n" for a in WORDS for b in WORDS] * 2
HELD_OUT = [f"{b}{a} not {a}.{b}ed  {a}\n" for a in WORDS for b in WORDS]
kinds = pytest.mark.parametrize("base", CHOOSING.values(), ids=CHOOSING)


@kinds
@pytest.mark.parametrize("options", [{}, {"whole_words": True}], ids=str)
def test_chosen_tokens_save_what_was_foretold(base, options):
    chosen = choose_tokens(base, CHOSEN_FROM, 60, **options)
    tokenizer = copy.deepcopy(base)
    partial = add_tokens(build_model("llama", len(tokenizer)), tokenizer, chosen, entry="vocabulary")
    assert partial.tokens == list(chosen) and set(partial.entries) == {"vocabulary"}
    for texts, foretold in (
        (CHOSEN_FROM, {"tokens_before": chosen.tokens_before, "tokens_after": chosen.tokens_after}),
        (HELD_OUT, chosen.measure(base, HELD_OUT)),
    ):
        before, now = read(base, texts), read(tokenizer, texts)
        assert [sum(map(len, before)), sum(map(len, now))] == [foretold["tokens_before"], foretold["tokens_after"]]
        assert [partial.expand(ids) for ids in now] == before
    used = [token_id for ids in read(tokenizer, CHOSEN_FROM) for token_id in ids]
    assert [used.count(token_id) for token_id in partial.token_ids] == chosen.counts


@pytest.mark.parametrize("kind", ["unigram", "wordpiece"])
def test_words_of_the_other_families_save_what_was_foretold(kind):
    base, tokenizer = ALL[kind](), ALL[kind]()
    words = [word for word in WORDS if word.isascii()]
    texts = [f"{a} {b}s and {a}{b}, ({b})\n" for a in words for b in words]
    chosen = choose_tokens(base, texts, 12)
    partial = add_tokens(build_model("llama", len(tokenizer)), tokenizer, chosen, entry="vocabulary")
    used = [token_id for ids in read(tokenizer, texts) for token_id in ids]
    assert [len(used), *(used.count(i) for i in partial.token_ids)] == [chosen.tokens_after, *chosen.counts]
    assert chosen.measure(base, texts)["tokens_after"] == len(used) < chosen.tokens_before


@kinds
def test_extended_by_someone_else_between_choosing_and_adding(base):
    chosen = choose_tokens(base, CHOSEN_FROM, 40)
    other = choose_tokens(base, HELD_OUT, 12)
    theirs = [token for token in other if token not in chosen][:4]
    tokenizer = copy.deepcopy(base)
    model = build_model("llama", len(tokenizer))
    add_tokens(model, tokenizer, [*theirs, "<theirs>"]).merge()
    grown = copy.deepcopy(tokenizer)
    vocabulary = grown.get_vocab()
    present = [token for token, piece in zip(chosen, chosen.pieces, strict=True) if piece in vocabulary]
    if present:  # as parts of theirs: named, and nothing happens
        with pytest.raises(PartialEmbeddingError, match="already"):
            add_tokens(model, tokenizer, chosen, entry="vocabulary")
        assert tokenizer._tokenizer.to_str() == grown._tokenizer.to_str()
    left = [token for token in chosen if token not in present]
    partial = add_tokens(model, tokenizer, left, entry="vocabulary")
    for texts in (CHOSEN_FROM, HELD_OUT):
        assert [partial.expand(ids) for ids in read(tokenizer, texts)] == read(grown, texts)
    partial.detach()
    assert tokenizer._tokenizer.to_str() == grown._tokenizer.to_str()


def test_text_that_is_another_piece_s_name_for_a_byte():
    tokenizer = bpe_tokenizer()
    base = copy.deepcopy(tokenizer)
    assert {"ü", "ł"} <= set(tokenizer.get_vocab())  # the bytes 0xFC and 0xA0; as texts two pieces each
    partial = add_tokens(build_model("llama", 300), tokenizer, ["ü", "ł", " naï"])
    assert partial.entries == ["vocabulary"] * 3 + ["part"] * 2
    ids = read(tokenizer, [" naïüł"])[0]
    assert ids == [partial.token_ids[2], *partial.token_ids[:2]]
    assert partial.expand(ids) == read(base, [" naïüł"])[0]


@pytest.mark.parametrize("kind", BPE)
@settings(max_examples=8, deadline=None)
@given(texts=st.lists(TEXTS | st.sampled_from(["<x> lanthan", "a<y>praseodymics<x>", "<y> <z>"]), max_size=6))
def test_expanding_with_added_and_vocabulary_tokens_in_several_sets(kind, texts):
    tokenizer = BPE[kind]()
    model = build_model("llama", len(tokenizer))
    marks = copy.deepcopy(tokenizer)
    marks.add_tokens([AddedToken("<x>"), AddedToken("<y>")])
    first = add_tokens(model, tokenizer, [AddedToken("<x>"), "praseodymic", " lanthan"])
    second = add_tokens(model, tokenizer, ["praseodymics", AddedToken("<y>"), " lanthanum"])
    texts = [*texts, "a lanthanum<x> praseodymics<y>praseodymic lanthan"]
    renamed = {
        handle.token_ids[handle.tokens.index(mark)]: marks.get_vocab()[mark]
        for handle, mark in ((first, "<x>"), (second, "<y>"))
    }
    for now, then in zip(read(tokenizer, texts), read(marks, texts), strict=True):
        # Each set takes its own apart; an added token was made of its text's pieces, so it is left in place here.
        taken_apart = []
        for token_id in now:
            ids = [token_id] if token_id in renamed else first.expand(second.expand([token_id]))
            taken_apart += [renamed.get(part, part) for part in ids]
        assert taken_apart == then


@pytest.mark.parametrize("kind", ALL)
def test_rows_go_to_and_fro_between_copies_that_were_extended_differently(kind, tmp_path):
    here, there = ALL[kind](), ALL[kind]()
    model, other = build_model("llama", len(here)), build_model("llama", len(there))
    add_tokens(model, here, ["<mine>", "praseody"]).merge()
    add_tokens(other, there, ["praseo", "dymics", "lantha", "<theirs>", "<theirs too>"]).merge()
    partial = add_tokens(model, here, ["praseodymic", "<x>", " lanthanum"])
    with torch.no_grad():
        for parameter in partial.parameters():
            parameter.normal_()
    partial.save_pretrained(tmp_path / "rows")
    text = "\npraseodymic<x> lanthanum"
    expanded, grown = partial.expand(read(here, [text])[0]), read(there, [text])[0]
    loaded = load_tokens(other, there, tmp_path / "rows")
    rows = dict(zip(partial.tokens, partial.token_rows().input_rows, strict=True))
    theirs = dict(zip(loaded.tokens, loaded.token_rows().input_rows, strict=True))
    asked = ["praseodymic", "<x>", " lanthanum"]
    assert all(torch.equal(rows[token], theirs[token]) for token in asked)
    assert set(loaded.token_ids[:3]) <= set(read(there, [text])[0])
    if kind in BPE:
        base = copy.deepcopy(there)
        loaded.detach()
        assert read(there, [text])[0] == grown
        loaded = load_tokens(other, there, tmp_path / "rows")
        assert there._tokenizer.to_str() == base._tokenizer.to_str()
    loaded.save_pretrained(tmp_path / "again")
    partial.detach()
    back = load_tokens(model, here, tmp_path / "again")
    again = dict(zip(back.tokens, back.token_rows().input_rows, strict=True))
    assert all(torch.equal(rows[token], again[token]) for token in asked)
    assert set(back.token_ids[:3]) <= set(read(here, [text])[0])
    if kind in BPE:
        assert back.expand(read(here, [text])[0]) == expanded
