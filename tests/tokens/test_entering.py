"""Tokens that enter a tokenizer's vocabulary: what texts are read as, in place and back, in any order."""

from __future__ import annotations

import copy
import json
import logging

import pytest
import torch
from conftest import CORPUS, SPECIALS, TOKENIZERS, bpe_tokenizer, build_model, unigram_tokenizer, wordpiece_tokenizer
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import AddedToken, Tokenizer, decoders, models, normalizers, trainers
from transformers import AutoTokenizer, PreTrainedTokenizerFast

from hf_partial_embed import PartialEmbeddingError, TokenRows, add_tokens, load_tokens, word_forms
from hf_partial_embed.attachment import steps
from hf_partial_embed.files.rows_file import read_rows
from hf_partial_embed.formats import read_peft, write_peft, write_textual_inversion
from hf_partial_embed.initializers import Distill
from hf_partial_embed.initializers.snippets import snippets_of
from hf_partial_embed.tokens.entering import plan_tokens
from hf_partial_embed.training.diagnostics import split_elsewhere


def whole_first_tokenizer() -> PreTrainedTokenizerFast:
    """BPE that looks a whole pre-token up before it merges, with added tokens behind the vocabulary, as Llama 3."""
    tokenizer = bpe_tokenizer()
    tokenizer._tokenizer.model.ignore_merges = True
    tokenizer.add_tokens(["<|a|>", "<|b|>"], special_tokens=True)
    return tokenizer


def byte_fallback_tokenizer() -> PreTrainedTokenizerFast:
    """BPE with a byte for each character that it lacks and a space in front of every text, as Llama 2."""
    backend = Tokenizer(models.BPE(unk_token="<unk>", byte_fallback=True, fuse_unk=True))
    backend.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    backend.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    specials = [*SPECIALS, *(f"<0x{byte:02X}>" for byte in range(256))]
    trainer = trainers.BpeTrainer(vocab_size=360, special_tokens=specials, show_progress=False)
    backend.train_from_iterator([word for text in CORPUS for word in text.split()], trainer)
    state = backend.to_str()

    changed = json.loads(state)
    changed["added_tokens"] = [token for token in changed["added_tokens"] if token["content"] in SPECIALS]
    return PreTrainedTokenizerFast(
        tokenizer_object=Tokenizer.from_str(json.dumps(changed)), unk_token="<unk>", pad_token="<pad>",
        bos_token="<s>", eos_token="</s>",
    )  # fmt: skip


def copies(make):
    """Copies of one tokenizer: trainers do not number pieces of equal counts in the same order every time."""
    made = make()
    return lambda: copy.deepcopy(made)


BPE = {
    "bpe": copies(bpe_tokenizer),
    "whole-first": copies(whole_first_tokenizer),
    "byte-fallback": copies(byte_fallback_tokenizer),
}
ALL = {**BPE, "unigram": copies(unigram_tokenizer), "wordpiece": copies(wordpiece_tokenizer)}

WORDS = st.text("abcdeéghilmnoprstuy", min_size=2, max_size=9)
TEXTS = st.lists(
    st.one_of(
        WORDS, st.sampled_from([" ", "\n", ".", "(", "中", "\U0001f9ff", "<s>", "<|a|>", " the", "praseodymium"])
    ),
    max_size=12,
).map("".join)


def read(tokenizer, texts):
    return tokenizer(list(texts), add_special_tokens=False)["input_ids"]


def addable(tokenizer, words):
    """Those words that are new to the tokenizer and can enter its vocabulary."""
    found = []
    for word in dict.fromkeys(words):
        try:
            plan_tokens(tokenizer, [AddedToken(word, normalized=True)], [True], "vocabulary")
        except PartialEmbeddingError:
            continue
        found.append(word)
    return found


@pytest.mark.parametrize("kind", BPE)
class TestPromise:
    @settings(max_examples=15, deadline=None)
    @given(words=st.lists(WORDS, min_size=1, max_size=6), texts=st.lists(TEXTS, min_size=1, max_size=5))
    def test_expanding_gives_what_the_base_tokenizer_reads(self, kind, words, texts):
        base, tokenizer = BPE[kind](), BPE[kind]()
        before = tokenizer._tokenizer.to_str()
        tokens = addable(tokenizer, [form for word in words for form in (word, " " + word)])
        if not tokens:
            return
        vocabulary = base.get_vocab()
        partial = add_tokens(build_model("llama", len(tokenizer)), tokenizer, tokens, entry="vocabulary")
        assert set(partial.entries) <= {"vocabulary", "part"}
        texts = [*texts, *tokens, *(f"a{token}s{token} {token}" for token in tokens)]
        for now, then in zip(read(tokenizer, texts), read(base, texts), strict=True):
            assert partial.expand(now) == then
            assert len(now) <= len(then)
        assert all(tokenizer.get_vocab()[text] == token_id for text, token_id in vocabulary.items())
        reached = {token_id for context in ("", "\n", "(", "1", "a") for ids in
                   read(tokenizer, [context + token for token in partial.tokens]) for token_id in ids}  # fmt: skip
        assert set(partial.token_ids[: len(tokens)]) <= reached
        partial.detach()
        assert tokenizer._tokenizer.to_str() == before

    def test_plain_reload_gives_the_same_ids(self, kind, tmp_path):
        tokenizer = BPE[kind]()
        add_tokens(build_model("llama", len(tokenizer)), tokenizer, [" lanthanum", "<x>", "praseodymic"])
        tokenizer.save_pretrained(tmp_path)
        again = AutoTokenizer.from_pretrained(tmp_path)
        texts = ["a lanthanum<x> praseodymic\nlanthanums", *CORPUS]
        assert read(again, texts) == read(tokenizer, texts)
        assert again.get_vocab() == tokenizer.get_vocab()


@pytest.mark.parametrize("kind", ALL)
@pytest.mark.parametrize("strategy", ["split", "mask"])
class TestSets:
    def test_come_and_go_in_any_order(self, kind, strategy):
        tokenizer, base = ALL[kind](), ALL[kind]()
        model = build_model("llama", len(tokenizer))
        states = [tokenizer._tokenizer.to_str()]
        first = add_tokens(model, tokenizer, ["praseodymic"], strategy=strategy)
        states.append(tokenizer._tokenizer.to_str())
        second = add_tokens(model, tokenizer, ["praseodymics", "<x>"], strategy=strategy)
        rows = dict(zip(second.tokens, second.token_rows().input_rows, strict=True))
        first.detach()
        now = dict(zip(second.tokens, second.token_rows().input_rows, strict=True))
        assert all(torch.equal(now[token], row) for token, row in rows.items())
        text = "praseodymics praseodymic<x>"
        if kind in BPE:
            ids = read(tokenizer, [text])[0]
            assert second.expand(ids[: ids.index(second.token_ids[1])]) == read(base, ["praseodymics praseodymic"])[0]
            assert second.token_ids[0] in read(tokenizer, ["\npraseodymics"])[0]
        second.detach()
        assert tokenizer._tokenizer.to_str() == states[0]

    def test_last_goes_first(self, kind, strategy):
        tokenizer = ALL[kind]()
        model = build_model("llama", len(tokenizer))
        first = add_tokens(model, tokenizer, ["praseodymic"], strategy=strategy)
        state = tokenizer._tokenizer.to_str()
        add_tokens(model, tokenizer, ["praseodymics", "<x>"], strategy=strategy).detach()
        assert tokenizer._tokenizer.to_str() == state
        assert first.tokens[0] == "praseodymic"

    def test_truncation_and_padding_of_now_stay(self, kind, strategy):
        tokenizer = ALL[kind]()
        partial = add_tokens(build_model("llama", len(tokenizer)), tokenizer, ["praseodymic"], strategy=strategy)
        tokenizer._tokenizer.enable_truncation(7)
        tokenizer._tokenizer.encode_special_tokens = True
        partial.detach()
        assert tokenizer._tokenizer.truncation["max_length"] == 7
        assert tokenizer._tokenizer.encode_special_tokens

    def test_row_file_brings_the_tokens_to_another_copy(self, kind, strategy, tmp_path):
        tokenizer = ALL[kind]()
        model = build_model("llama", len(tokenizer))
        partial = add_tokens(model, tokenizer, ["praseodymic", "<x>", " lanthanum"], strategy=strategy)
        partial.save_pretrained(tmp_path)
        other = ALL[kind]()
        loaded = load_tokens(build_model("llama", len(other)), other, tmp_path)
        assert other.get_vocab() == tokenizer.get_vocab()
        assert loaded.tokens == partial.tokens
        assert loaded.entries == partial.entries
        texts = ["praseodymic<x> lanthanum\npraseodymics lanthan", *CORPUS]
        assert read(other, texts) == read(tokenizer, texts)
        assert torch.equal(loaded.token_rows().input_rows, partial.token_rows().input_rows)

    def test_row_file_on_a_copy_that_was_extended(self, kind, strategy, tmp_path):
        tokenizer = ALL[kind]()
        add_tokens(build_model("llama", len(tokenizer)), tokenizer, ["praseodymic", "<x>"]).save_pretrained(tmp_path)
        other = ALL[kind]()
        grown = build_model("llama", len(other))
        add_tokens(grown, other, ["praseo", "dymics", "<y>"], strategy=strategy).merge()
        base = copy.deepcopy(other)
        loaded = TokenRows.from_pretrained(tmp_path).attach(grown, other, strategy=strategy)
        ids = read(other, ["\npraseodymic"])[0]
        assert loaded.token_ids[0] in ids
        if kind in BPE:
            assert loaded.expand(ids) == read(base, ["\npraseodymic"])[0]
        loaded.detach()
        assert other._tokenizer.to_str() == base._tokenizer.to_str()

    def test_handle_is_copied_with_its_model(self, kind, strategy):
        tokenizer = ALL[kind]()
        before = tokenizer._tokenizer.to_str()
        partial = add_tokens(build_model("llama", len(tokenizer)), tokenizer, ["praseodymic"], strategy=strategy)
        _, twin = copy.deepcopy((partial.model, partial))
        twin.detach()
        assert twin.tokenizer._tokenizer.to_str() == before
        assert partial.token_ids[0] in read(tokenizer, ["\npraseodymic"])[0]


class TestAuto:
    def test_words_enter_the_vocabulary_and_markers_do_not(self):
        tokenizer = bpe_tokenizer()
        tokens = [" lanthanum", "<think>", AddedToken("cerium"), "two words"]
        partial = add_tokens(build_model("llama", len(tokenizer)), tokenizer, tokens)
        assert partial.tokens[:4] == [str(token) for token in tokens]
        assert partial.entries[:4] == ["vocabulary", "added", "added", "added"]
        assert set(partial.entries[4:]) == {"part"}
        assert partial.token_ids == list(range(300, 300 + len(partial.tokens)))

    def test_special_tokens_are_added_ones(self):
        tokenizer = bpe_tokenizer()
        partial = add_tokens(build_model("llama", len(tokenizer)), tokenizer, [" lanthanum"], special=True)
        assert partial.entries == ["added"]

    def test_parts_start_at_the_mean_of_what_they_are_made_of(self):
        tokenizer = bpe_tokenizer()
        model = build_model("llama", len(tokenizer))
        table = model.get_input_embeddings().weight.detach().clone()
        partial = add_tokens(model, tokenizer, {" lanthanum": torch.ones(16)}, entry="vocabulary")
        rows = partial.token_rows().input_rows
        assert torch.equal(rows[0], torch.ones(16))
        for token_id, row in zip(partial.token_ids[1:], rows[1:], strict=True):
            assert torch.equal(row, table[partial.expand([token_id])].double().mean(0).float())


class TestBadInput:
    @pytest.mark.parametrize(
        ("kind", "token", "message"),
        [
            ("bpe", "The", "is a token of this tokenizer already"),
            ("bpe", " New York", "pre-tokenizer cuts"),
            ("bpe", "a\ufffd", "half a character"),
            ("bpe", AddedToken("lanthanum", special=True), "only added tokens"),
            ("wordpiece", "Lanthanum", "normaliser changes"),
            ("wordpiece", "two words", "normaliser changes"),
            ("unigram", "a中", "does not know"),
            ("byte-fallback", "<0xE4>", "already"),
        ],
    )
    def test_is_refused_and_nothing_changes(self, kind, token, message):
        tokenizer = ALL[kind]()
        model = build_model("llama", len(tokenizer))
        before, weights = tokenizer._tokenizer.to_str(), copy.deepcopy(model.state_dict())
        with pytest.raises(PartialEmbeddingError, match=message):
            add_tokens(model, tokenizer, ["dysprosic", token], entry="vocabulary")
        assert tokenizer._tokenizer.to_str() == before
        assert all(torch.equal(weights[key], value) for key, value in model.state_dict().items())

    def test_rows_of_another_kind_of_tokenizer(self, tmp_path):
        tokenizer = bpe_tokenizer()
        add_tokens(build_model("llama", 300), tokenizer, [" lanthanum"]).save_pretrained(tmp_path)
        for kind, message in (("unigram", "Unigram"), ("byte-fallback", "spelled in another way")):
            other = ALL[kind]()
            before = other._tokenizer.to_str()
            with pytest.raises(PartialEmbeddingError, match=message):
                load_tokens(build_model("llama", len(other)), other, tmp_path)
            assert other._tokenizer.to_str() == before

    def test_missing_character_enters_with_byte_fallback(self):
        tokenizer, base = byte_fallback_tokenizer(), byte_fallback_tokenizer()
        partial = add_tokens(build_model("llama", len(tokenizer)), tokenizer, ["a中"], entry="vocabulary")
        assert partial.tokens == ["a中", "中"]
        text = "(a中 中中a a"
        assert partial.expand(read(tokenizer, [text])[0]) == read(base, [text])[0]
        assert tokenizer.decode(read(tokenizer, [text])[0]) == text

    def test_no_such_entry(self):
        with pytest.raises(PartialEmbeddingError, match="entry='merge'"):
            add_tokens(build_model("llama", 300), bpe_tokenizer(), ["x"], entry="merge")


class TestTelling:
    def test_added_token_that_cuts_other_words(self, caplog):
        tokenizer = bpe_tokenizer()
        with caplog.at_level(logging.WARNING, "hf_partial_embed"):
            add_tokens(build_model("llama", 300), tokenizer, ["oken", "<think>"], entry="added")
        (record,) = caplog.records
        assert "1 added token will be cut out of other words" in record.getMessage()
        assert "'oken (inside of" in record.getMessage()
        assert "<think>" not in record.getMessage()

    def test_word_without_its_space(self, caplog):
        tokenizer = bpe_tokenizer()
        with caplog.at_level(logging.WARNING, "hf_partial_embed"):
            add_tokens(build_model("llama", 300), tokenizer, ["lanthanum"])
        assert "without a leading space: 'lanthanum'" in caplog.text
        caplog.clear()
        tokenizer = bpe_tokenizer()
        add_tokens(build_model("llama", 300), tokenizer, word_forms(tokenizer, ["lanthanum"]))
        assert not caplog.records

    @pytest.mark.parametrize("kind", TOKENIZERS)
    def test_word_forms(self, kind):
        expected = ["zq"] if kind == "wordpiece" else [" zq", "zq"]
        assert word_forms(TOKENIZERS[kind](), ["zq", " zq"]) == expected


class TestFormats:
    def test_peft_adapter_goes_by_the_ids_of_the_pieces(self, tmp_path):
        tokenizer = bpe_tokenizer()
        model = build_model("llama", 300)
        rows = add_tokens(model, tokenizer, [" lan", "<x>"]).token_rows()
        write_peft(rows, tmp_path, model, tokenizer)
        again = read_peft(tmp_path)
        assert again.token_ids == rows.token_ids
        assert torch.equal(again.input_rows, rows.input_rows)
        other = bpe_tokenizer()
        with pytest.raises(PartialEmbeddingError, match="written as its pieces are"):
            again.attach(build_model("llama", 300), other)  # the adapter does not say what they are made of
        assert len(other) == 300

    def test_textual_inversion_has_no_place_for_pieces(self, tmp_path):
        rows = add_tokens(build_model("bert", 300), bpe_tokenizer(), [" lan"]).token_rows()
        bare = TokenRows(rows.tokens, rows.input_rows, added_tokens=rows.added_tokens)
        with pytest.raises(PartialEmbeddingError, match="in the vocabulary of the tokenizer's model"):
            write_textual_inversion(bare, tmp_path)

    def test_version_is_1_where_nothing_is_new(self, tmp_path):
        for entry, version in (("added", 1), ("vocabulary", 2)):
            partial = add_tokens(build_model("llama", 300), bpe_tokenizer(), [" lan"], entry=entry)
            partial.save_pretrained(tmp_path / entry)
            assert read_rows(tmp_path / entry / "token_rows.safetensors")[1]["format_version"] == version


class TestInitialisers:
    def test_teacher_reads_the_exact_pieces(self):
        tokenizer, base = bpe_tokenizer(), bpe_tokenizer()
        texts = ["The lanthan is a metal.", "A lanthan, and lanthanum too."] * 3
        seen = []

        def look(request):
            seen.extend(snippets_of(request, texts, context=6, limit=4) if request.role == "input" else [])
            return torch.zeros(len(request.tokens), *request.table.shape[1:])

        partial = add_tokens(build_model("llama", 300), tokenizer, [" lanthan"], init=look)
        assert len(seen) == 4
        for snippet in seen:
            found = snippet.original[snippet.start : snippet.end + 1]
            assert list(found) == partial.expand(partial.token_ids[:1])
            assert base.decode(snippet.original) in " ".join(texts)

    def test_distill_writes_its_own_texts(self):
        tokens = [" lanthan", "dysprosic", "<x>"]
        partial = add_tokens(
            build_model("llama", 300), bpe_tokenizer(), tokens, init=Distill(steps=1, per_token=2, context=6)
        )
        assert partial.tokens[:3] == tokens


def test_data_that_was_tokenised_before_is_noticed():
    tokenizer, base = bpe_tokenizer(), bpe_tokenizer()
    partial = add_tokens(build_model("llama", 300), tokenizer, [" lanthan", "<x>"])
    texts = ["a lanthan <x>", "lanthan"]
    arguments = (tokenizer, partial.tokens, partial.token_ids)
    before = split_elsewhere(*arguments, read(base, texts), partial.vocabulary_pieces())
    assert before == {" lanthan": 1, "<x>": 1}
    assert split_elsewhere(*arguments, read(tokenizer, texts), partial.vocabulary_pieces()) == {}


@pytest.mark.parametrize("kind", ALL)
def test_error_at_any_step_leaves_everything(kind, monkeypatch):
    tokenizer = ALL[kind]()
    model = build_model("llama", len(tokenizer))
    add_tokens(model, tokenizer, ["dysprosic"])
    before, weights = tokenizer._tokenizer.to_str(), copy.deepcopy(model.state_dict())
    for step in ("EnterPieces", "AddTokens", "WriteRows", "Split", "HideRows"):
        do = getattr(steps, step).do

        def fail(self, do=do):
            do(self)
            raise KeyboardInterrupt

        monkeypatch.setattr(getattr(steps, step), "do", fail)
        with pytest.raises(KeyboardInterrupt):
            add_tokens(model, tokenizer, ["dysprosics", AddedToken("<x>")])
        assert tokenizer._tokenizer.to_str() == before, step
        monkeypatch.undo()
        assert tokenizer._tokenizer.to_str() == before, step
        assert all(torch.equal(weights[key], value) for key, value in model.state_dict().items())
