"""Choosing tokens from a corpus: what is promised of the list, against a backend that really has the merges."""

from __future__ import annotations

import json
import os
import time
import unicodedata
from collections import Counter
from pathlib import Path

import pytest
from conftest import CORPUS, TOKENIZERS, bpe_tokenizer, cutting_wordpiece
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import AddedToken, Tokenizer, decoders, models, normalizers
from transformers import ByT5Tokenizer, PreTrainedTokenizerFast

from hf_partial_embed import PartialEmbeddingError, choose_tokens
from hf_partial_embed.tokens import ChosenTokens

TEXTS = [f"{line} Grüße, прасеодим and 日本語 naïve   spaces {n % 3}\n" for n, line in enumerate(CORPUS * 3)]


def ignoring(tokenizer: PreTrainedTokenizerFast) -> PreTrainedTokenizerFast:
    state = json.loads(tokenizer._tokenizer.to_str())
    state["model"]["ignore_merges"] = True
    return PreTrainedTokenizerFast(tokenizer_object=Tokenizer.from_str(json.dumps(state)), unk_token="<unk>")


def byte_fallback() -> PreTrainedTokenizerFast:
    """As Llama 2: no borders between pre-tokens, missing characters as bytes."""
    vocab = {"<unk>": 0, **{f"<0x{byte:02X}>": 1 + byte for byte in range(256)}}
    for char in "▁abcdefghijklmnopqrstuvwxyzATP.,;":
        vocab[char] = len(vocab)
    merges = [("▁", "t"), ("t", "h"), ("i", "n"), ("▁", "a"), ("▁a", "n"), ("▁t", "h"), ("th", "e")]
    for left, right in merges:
        vocab.setdefault(left + right, len(vocab))
    backend = Tokenizer(models.BPE(vocab, merges, unk_token="<unk>", fuse_unk=True, byte_fallback=True))
    backend.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    backend.decoder = decoders.Sequence([decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()])
    return PreTrainedTokenizerFast(tokenizer_object=backend, unk_token="<unk>")


BPE = {"bpe": bpe_tokenizer(), "ignore_merges": ignoring(bpe_tokenizer()), "byte_fallback": byte_fallback()}
ALL = {**BPE, **{kind: make() for kind, make in TOKENIZERS.items() if kind != "bpe"}}
bpe_kinds = pytest.mark.parametrize("base", BPE.values(), ids=BPE)
all_kinds = pytest.mark.parametrize("base", ALL.values(), ids=ALL)


def with_merges(backend: Tokenizer, chosen: ChosenTokens) -> Tokenizer:
    """The base with the chosen tokens in its vocabulary and their merges behind its own."""
    state = json.loads(backend.to_str())
    vocab, merges = state["model"]["vocab"], state["model"]["merges"]
    for token in state["added_tokens"]:
        vocab.setdefault(token["content"], token["id"])
    for entry, parts in zip(chosen.pieces, chosen.merges, strict=True):
        assert entry not in vocab
        vocab[entry] = max(vocab.values()) + 1
        if parts is not None:
            assert parts[0] in vocab and parts[1] in vocab and "".join(parts) == entry
            merges.append(list(parts))
    return Tokenizer.from_str(json.dumps(state))


def length(backend: Tokenizer, texts: list[str]) -> int:
    added = backend.get_added_tokens_decoder()
    encodings = backend.encode_batch(texts, add_special_tokens=False)
    return sum(token_id not in added for encoding in encodings for token_id in encoding.ids)


@bpe_kinds
@pytest.mark.parametrize("options", [{}, {"whole_words": True}, {"min_count": 6}], ids=str)
def test_expected_saving_is_what_a_tokenizer_with_the_merges_saves(base, options):
    before = base._tokenizer.to_str()
    chosen = choose_tokens(base, TEXTS, 40, **options)
    assert base._tokenizer.to_str() == before
    changed = with_merges(base._tokenizer, chosen)
    assert chosen.tokens_before == length(base._tokenizer, TEXTS)
    assert chosen.tokens_after == length(changed, TEXTS) < chosen.tokens_before
    assert sum(chosen.savings) == chosen.tokens_before - chosen.tokens_after and min(chosen.savings) > 0
    used = Counter(token for encoding in changed.encode_batch(TEXTS) for token in encoding.tokens)
    assert chosen.counts == [used[piece] for piece in chosen.pieces]
    other = [text.upper() + text for text in TEXTS]
    measured = chosen.measure(base, other)
    assert measured["tokens_before"] == length(base._tokenizer, other)
    assert measured["tokens_after"] == length(changed, other) and measured["longer"] == 0


@settings(max_examples=60, deadline=None)
@given(
    st.lists(st.text(alphabet="aab  Ġü語ж🙂\n.1", max_size=30), min_size=1, max_size=8),
    st.sampled_from(list(BPE.values())),
)
def test_any_corpus_gives_whole_characters_closed_under_parts_whatever_its_order(texts, base):
    try:
        chosen = choose_tokens(base, texts, 12)
    except PartialEmbeddingError as error:
        assert "can become a token" in str(error) or "hold nothing" in str(error)
        return
    assert len(set(chosen)) == len(chosen)
    assert chosen.tokens_after == length(with_merges(base._tokenizer, chosen), texts)
    assert not any("\ufffd" in token or "<0x" in token for token in chosen)
    again = choose_tokens(base, iter(texts[::-1]), 12)
    assert list(again) == list(chosen) and again.to_dict() == chosen.to_dict()


@all_kinds
def test_options_narrow_what_is_chosen(base):
    chosen = choose_tokens(base, TEXTS, 8, whole_words=True)
    bare = "".join(char for char in unicodedata.normalize("NFKD", " ".join(TEXTS)) if not unicodedata.combining(char))
    words = {word.strip(",.;") for text in (*TEXTS, bare) for word in text.lower().split()}
    parts = {part for merge in chosen.merges if merge for part in merge}
    wholes = [token for token, piece in zip(chosen, chosen.pieces, strict=True) if piece not in parts]
    assert wholes and all(word.strip().lower() in words for word in wholes)
    left = choose_tokens(base, TEXTS, 8, leave_out=chosen[:2])
    assert not set(chosen[:2]) & set(left)
    frequent = choose_tokens(base, TEXTS, 8, min_count=30)
    assert min(frequent.savings) >= 30


def test_only_letters_of_a_script():
    chosen = choose_tokens(BPE["bpe"], TEXTS, 6, script="Cyrillic")
    assert all(set(token.strip()) <= set("прасеодим") for token in chosen) and "".join(chosen).strip()


def test_stops_at_a_saving():
    many = choose_tokens(BPE["bpe"], TEXTS, 200)
    some = choose_tokens(BPE["bpe"], TEXTS, saving=0.1)
    assert some.saving >= 0.1 > 1 - (some.tokens_after + some.savings[-1]) / some.tokens_before
    assert list(some) == list(many[: len(some)])


def test_whole_pre_tokens_where_merges_are_ignored():
    chosen = choose_tokens(BPE["ignore_merges"], TEXTS, 40)
    assert None in chosen.merges and any(chosen.merges)
    assert chosen.tokens_after <= choose_tokens(BPE["bpe"], TEXTS, 40).tokens_after


def test_words_of_the_other_families_enter_whole():
    for kind in ("wordpiece", "unigram"):
        chosen = choose_tokens(ALL[kind], TEXTS, 5)
        assert set(chosen.merges) == {None} and sorted(chosen.savings, reverse=True) == chosen.savings
        assert "spaces" in [token.strip() for token in choose_tokens(ALL[kind], TEXTS, 20)]


def test_word_that_lengthens_another_one_is_left_out_of_wordpiece():
    base = cutting_wordpiece()
    chosen = choose_tokens(base, ["abcd fed"] * 9 + ["abcdef bad"] * 4, 3)
    assert list(chosen) == ["fed", "bad", "abcdef"] and chosen.left_out == {"abcd": ["abcdef"]}
    assert "left out 1 word" in str(chosen) and "'abcd (abcdef)'" in str(chosen)
    assert chosen.to_dict()["left_out"] == chosen.left_out
    # What is no word of the texts cannot be known, and is counted where it is met.
    chosen = choose_tokens(base, ["abcd fed"] * 9, 2)
    assert list(chosen) == ["fed", "abcd"] and not chosen.left_out
    assert chosen.measure(base, ["abcdef abcd", "fed abcdef"]) == {
        "tokens_before": 9, "tokens_after": 8, "saving": 1 - 8 / 9, "longer": 1, "longer_words": ["abcdef"],
    }  # fmt: skip


@settings(max_examples=40, deadline=None)
@given(st.lists(st.text("abcdef ", max_size=12), min_size=1, max_size=12))
def test_no_word_of_the_texts_becomes_longer_with_wordpiece(texts):
    base = cutting_wordpiece()
    try:
        chosen = choose_tokens(base, texts, 8, min_count=1)
    except PartialEmbeddingError as error:
        assert "can become a token" in str(error) or "hold nothing" in str(error)
        return
    state = json.loads(base._tokenizer.to_str())
    state["model"]["vocab"].update({word: len(base) + n for n, word in enumerate(chosen)})
    grown = Tokenizer.from_str(json.dumps(state))
    words = [word for text in texts for word in text.split()]
    assert all(length(grown, [word]) <= length(base._tokenizer, [word]) for word in words)
    assert chosen.tokens_after == length(grown, texts)
    measured = chosen.measure(base, texts)
    assert measured["longer"] == 0 and measured["tokens_after"] == chosen.tokens_after


@all_kinds
def test_added_tokens_in_the_texts_are_no_words(base):
    other = PreTrainedTokenizerFast(tokenizer_object=Tokenizer.from_str(base._tokenizer.to_str()), unk_token="<unk>")
    other.add_tokens([AddedToken("<zzyyzz>", special=True), AddedToken("qqvvqq", normalized=False)])
    marked = [f"<zzyyzz>{text} qqvvqq <zzyyzz>" for text in TEXTS]
    chosen = choose_tokens(other, marked, 60, min_count=1)
    assert not any("zz" in token or "qq" in token for token in chosen)


def test_texts_are_read_once_and_in_batches():
    line = "Praseodymium and neodymium are twins; dysprosium is hard to get. " * 8
    alive = []

    class Text(str):
        def __init__(self, _: str) -> None:
            alive.append(1)

        def __del__(self) -> None:
            alive.pop()

    most = 0

    def stream():
        nonlocal most
        for _ in range(8_000):  # four times what is held at once
            yield Text(line)
            most = max(most, len(alive))

    chosen = choose_tokens(BPE["bpe"], stream(), 3)
    assert chosen.tokens_before == 8_000 * length(BPE["bpe"]._tokenizer, [line])
    assert most * len(line) < 2**21


def test_result_prints_as_a_table_and_as_plain_values():
    chosen = choose_tokens(BPE["bpe"], TEXTS, 25)
    lines = str(chosen).splitlines()
    assert lines[0].startswith("25 tokens: ") and repr(chosen[0]) in lines[2] and lines[-1] == "... 5 more"
    values = json.loads(json.dumps(chosen.to_dict()))
    assert [entry["token"] for entry in values["tokens"]] == list(chosen)
    assert values["saving"] == pytest.approx(chosen.saving)


def test_fewer_than_asked_for_is_said(caplog):
    with caplog.at_level("WARNING", "hf_partial_embed"):
        chosen = choose_tokens(BPE["bpe"], ["praseodymium praseodymium"], 500)
    assert 0 < len(chosen) < 500 and "500 were asked for" in caplog.text and "min_count" in caplog.text


@pytest.mark.parametrize(
    ("texts", "options", "message"),
    [
        ("one text", {"count": 3}, r"iterable of str.*pass \[text\]"),
        ([], {"count": 3}, "0 texts were given"),
        (["", "<s>"], {"count": 3}, "2 texts were given"),
        (["xq"], {"count": 3}, "occurs 2 times"),
        ([b"bytes"], {"count": 3}, "must be a str"),
        (["\ud800 a"], {"count": 3}, "lone surrogate"),
        (TEXTS, {"count": 0}, "at least 1, but is 0"),
        (TEXTS, {"count": 3, "min_count": 0}, "min_count must be"),
        (TEXTS, {"count": 3, "saving": 10}, "between 0 and 1"),
        (TEXTS, {}, "count=1000"),
        (TEXTS, {"count": 3, "script": "Klingonish"}, "no Unicode script"),
        (TEXTS, {"count": 3, "leave_out": "the"}, r"Pass \['the'\]"),
    ],
)
def test_bad_input_is_named(texts, options, message):
    with pytest.raises(PartialEmbeddingError, match=message):
        choose_tokens(BPE["bpe"], texts, **options)


def test_tokenizers_that_hold_no_pieces_are_refused():
    with pytest.raises(PartialEmbeddingError, match="no fast backend"):
        choose_tokens(ByT5Tokenizer(), TEXTS, 3)
    backend = Tokenizer(models.WordLevel({"a": 0, "<unk>": 1}, unk_token="<unk>"))
    with pytest.raises(PartialEmbeddingError, match="WordLevel"):
        choose_tokens(PreTrainedTokenizerFast(tokenizer_object=backend), TEXTS, 3)
    marked = Tokenizer(models.BPE({"a</w>": 0, "b": 1}, [], end_of_word_suffix="</w>"))
    with pytest.raises(PartialEmbeddingError, match="</w>"):
        choose_tokens(PreTrainedTokenizerFast(tokenizer_object=marked), TEXTS, 3)


REAL = [Path(path) for path in os.environ.get("TOKENIZERS", "").split(os.pathsep) if path]


@pytest.mark.slow
@pytest.mark.parametrize("path", REAL, ids=str)
def test_real_tokenizers(path):
    """`TOKENIZERS`: paths of tokenizer.json files, of BPE."""
    backend = Tokenizer.from_file(str(path))
    texts = [file.read_text("utf-8", "replace") for file in sorted(Path(os.__file__).parent.glob("*.py"))]
    start = time.process_time()
    chosen = choose_tokens(backend, texts, 1000)
    assert time.process_time() - start < 2.5e-6 * sum(map(len, texts)) + 3
    assert chosen.tokens_after == length(with_merges(backend, chosen), texts)
