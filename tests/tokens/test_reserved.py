"""New tokens that take over reserved ones: id and row, under another name."""

from __future__ import annotations

import json
import logging
import os
from pathlib import Path

import pytest
import torch
from conftest import (
    TOKENIZERS,
    bpe_tokenizer,
    build_model,
    logits_of,
    table_of,
    unigram_tokenizer,
    wordpiece_tokenizer,
)
from states import SLOW_TOKENIZERS, assert_same, model_state, tokenizer_state
from tokenizers import AddedToken, Tokenizer, models, pre_tokenizers, processors
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedTokenizerFast

from hf_partial_embed import PartialEmbeddingError, add_tokens, load_tokens, train_tokens
from hf_partial_embed.tokens.reserved import Renaming, is_reserved_name

RESERVED = [f"<|reserved_{number}|>" for number in range(4)]
TOKENS = ["<tool>", "</tool>"]
TEXT = "a name <tool> of the </tool> story"


def encode(tokenizer, text: str) -> list[int]:
    return tokenizer(text, add_special_tokens=False)["input_ids"]


def error_of(*arguments, **options) -> str:
    with pytest.raises(PartialEmbeddingError) as caught:
        add_tokens(*arguments, **options)
    return str(caught.value)


def reserving(family: str = "bpe"):
    """A tokenizer with reserved tokens, and a model whose rows for them are zero."""
    tokenizer = TOKENIZERS[family]()
    tokenizer.add_tokens([AddedToken(text, special=True, normalized=False) for text in RESERVED])
    tokenizer.add_tokens(["<after>"])
    return tokenizer, model_for(tokenizer)


def model_for(tokenizer, *, tied: bool = True, kind: str = "llama", spare: int = 0):
    model = build_model(kind, len(tokenizer) + spare, tied=tied)
    with torch.no_grad():
        for which in ("input",) if tied else ("input", "output"):
            table_of(model, which)[tokenizer.convert_tokens_to_ids(RESERVED)] = 0
    return model


@pytest.fixture(params=TOKENIZERS)
def family(request) -> str:
    return request.param


@pytest.mark.parametrize(
    ("text", "reserved"),
    [
        ("<|reserved_special_token_7|>", True), ("<unused0>", True), ("[unused1]", True), ("<SPECIAL_20>", True),
        ("<\uff5cplace\u2581holder\u2581no\u25817\uff5c>", True), ("madeupword0001", True), ("<|dummy_0|>", True),
        ("<|placeholder1|>", True), ("<|extra_0|>", True), (">>UNUSED_0<<", True), ("[control_8]", True),
        ("<extra_id_0>", False), ("reserved", False), ("\u0120unused", False), ("<|im_end|>", False), ("v1", False),
    ],
)  # fmt: skip
def test_names_of_reserved_tokens(text, reserved):
    assert is_reserved_name(text) is reserved


class TestTakingOver:
    @pytest.mark.parametrize("reuse", ["auto", RESERVED[1:3]], ids=["auto", "named"])
    @pytest.mark.parametrize("special", [True, False])
    def test_nothing_grows_and_all_else_stays(self, family, strategy, reuse, special, tmp_path):
        tokenizer, model = reserving(family)
        model.save_pretrained(tmp_path)  # which writes the classes into the config
        before = tokenizer_state(tokenizer), model_state(model)
        size, table, logits = len(tokenizer), table_of(model).clone(), logits_of(model, torch.tensor([[5, 6, 7]]))
        old = encode(tokenizer, "a name of the story <after>")
        partial = add_tokens(model, tokenizer, TOKENS, reuse=reuse, strategy=strategy, special=special)
        first = size - 5 + (0 if reuse == "auto" else 1)
        assert partial.token_ids == [first, first + 1]
        assert (len(tokenizer), model.config.vocab_size, len(table_of(model))) == (size, size, size)
        assert [i for i in encode(tokenizer, TEXT) if i >= size - 5] == partial.token_ids
        taken = RESERVED[:2] if reuse == "auto" else reuse
        assert not {*encode(tokenizer, " ".join(taken))} & {*partial.token_ids}
        assert encode(tokenizer, "a name of the story <after>") == old
        kept = [i for i in range(size) if i not in partial.token_ids]
        assert torch.equal(table_of(model)[kept], table[kept])
        assert torch.equal(logits_of(model, torch.tensor([[5, 6, 7]]))[..., kept], logits[..., kept])
        model.save_pretrained(tmp_path), tokenizer.save_pretrained(tmp_path)
        again = AutoTokenizer.from_pretrained(tmp_path)
        assert encode(again, TEXT) == encode(tokenizer, TEXT)
        assert again.get_vocab() == tokenizer.get_vocab()
        assert again.decode(encode(again, TEXT), skip_special_tokens=True).count("tool") == (0 if special else 2)
        reloaded = AutoModelForCausalLM.from_pretrained(tmp_path).eval()
        ids = torch.tensor([encode(tokenizer, TEXT)])
        torch.testing.assert_close(logits_of(reloaded, ids), logits_of(model, ids), rtol=0, atol=1e-6)
        partial.verify()
        partial.detach()
        assert_same(before[0], tokenizer_state(tokenizer))
        assert_same(before[1], model_state(model))

    @pytest.mark.parametrize("tied", [True, False])
    @pytest.mark.parametrize("kind", ["llama", "phi", "gemma", "gpt2", "bert", "bert-encoder", "t5"])
    def test_over_architectures(self, kind, tied, strategy):
        tokenizer, _ = reserving()
        model = build_model(kind, len(tokenizer), tied=tied)
        before = tokenizer_state(tokenizer), model_state(model)
        partial = add_tokens(model, tokenizer, TOKENS, reuse=RESERVED[:2], strategy=strategy)
        assert partial.token_ids == [300, 301]
        assert model.config.vocab_size == 305
        partial.detach()
        assert_same(before[0], tokenizer_state(tokenizer))
        assert_same(before[1], model_state(model))

    def test_piece_of_the_vocabulary_becomes_an_added_token(self):
        tokenizer = wordpiece_tokenizer()
        state = json.loads(tokenizer._tokenizer.to_str())
        vocabulary = state["model"]["vocab"]
        text = max(vocabulary, key=vocabulary.get)
        vocabulary["[unused1]"] = vocabulary.pop(text)
        tokenizer._tokenizer.__setstate__(json.dumps(state).encode())
        model, before, size = build_model("llama", len(tokenizer)), tokenizer_state(tokenizer), len(tokenizer)
        partial = add_tokens(model, tokenizer, ["<Tool>"], reuse=["[unused1]"])
        assert (partial.token_ids, len(tokenizer)) == ([size - 1], size)
        assert encode(tokenizer, "aname<Tool>s")[-2] == size - 1
        partial.detach()
        assert_same(before, tokenizer_state(tokenizer))

    @pytest.mark.parametrize("order", [[0, 1, 2], [2, 1, 0], [1, 0, 2], [1, 2, 0]])
    def test_several_sets_in_any_order(self, family, strategy, order):
        tokenizer, model = reserving(family)
        before = tokenizer_state(tokenizer), model_state(model)
        sets = [
            add_tokens(model, tokenizer, ["<a>"], reuse="auto", strategy=strategy),
            add_tokens(model, tokenizer, ["<b>"], strategy=strategy),
            add_tokens(model, tokenizer, ["<c>", "<d>"], reuse="auto", strategy=strategy),
        ]
        size = len(tokenizer)
        assert [ids for partial in sets for ids in partial.token_ids] == [size - 6, size - 1, size - 5, size - 4]
        for number in order:
            sets[number].detach()
            for other in sets:
                if other._attachment.attached:
                    assert encode(tokenizer, other.tokens[0])[-1] == other.token_ids[0]
        assert_same(before[0], tokenizer_state(tokenizer))
        assert_same(before[1], model_state(model))

    def test_padding_and_truncation_of_now_stay_set(self):
        tokenizer, model = reserving()
        partial = add_tokens(model, tokenizer, TOKENS, reuse="auto")
        tokenizer._tokenizer.enable_truncation(max_length=7)
        partial.detach()
        assert tokenizer._tokenizer.truncation["max_length"] == 7

    def test_rows_load_by_text_whether_the_target_reuses_or_grows(self, tmp_path):
        tokenizer, model = reserving()
        rows = add_tokens(model, tokenizer, TOKENS, reuse="auto").token_rows()
        rows.save_pretrained(tmp_path)
        grown, other = bpe_tokenizer(), build_model("llama", 300)
        loaded = load_tokens(other, grown, tmp_path)
        assert (loaded.token_ids, loaded.tokens) == ([300, 301], TOKENS)
        assert torch.equal(loaded.token_rows().input_rows, rows.input_rows)
        tokenizer, model = reserving()
        add_tokens(model, tokenizer, ["<x>", *TOKENS], reuse="auto").merge()
        loaded = load_tokens(model, tokenizer, tmp_path)
        assert loaded.token_ids == [301, 302]
        assert torch.equal(loaded.token_rows().input_rows, rows.input_rows)

    def test_python_tokenizer(self):
        for make in SLOW_TOKENIZERS.values():
            tokenizer = make()
            tokenizer.add_tokens([AddedToken(text, special=True, normalized=False) for text in RESERVED])
            model = build_model("llama", max(tokenizer.get_vocab().values()) + 1)
            before, size = tokenizer_state(tokenizer), len(tokenizer)
            partial = add_tokens(model, tokenizer, TOKENS, reuse=RESERVED[:2], special=True)
            assert partial.token_ids[0] in encode(tokenizer, "<tool>")
            assert len(tokenizer) == size
            partial.detach()
            assert_same(before, tokenizer_state(tokenizer))


class TestChoice:
    def test_reserved_by_evidence_then_spare_rows_then_growth(self, caplog):
        tokenizer, _ = reserving()
        model = model_for(tokenizer, spare=1)
        with torch.no_grad():
            table_of(model)[300] = table_of(model)[50] * 0.9  # reserved by its name only
        with caplog.at_level(logging.INFO, "hf_partial_embed"):
            partial = add_tokens(model, tokenizer, ["<a>", "<b>", "<c>", "<d>", "<e>"], reuse="auto")
        assert partial.token_ids == [301, 302, 303, 305, 306]
        assert "'<a>' takes over '<|reserved_1|>' (id 301, untrained: input zero)." in caplog.text
        assert "'<d>' get spare rows of the tables." in caplog.text
        assert "'<e>' get new rows, and the tables grow: of 4 reserved tokens, 3 have" in caplog.text

    def test_rows_that_train_are_not_taken(self):
        tokenizer, model = reserving()
        add_tokens(model, tokenizer, ["<|reserved_9|>"], reuse="auto", init=lambda r: torch.zeros(1, 16))
        assert add_tokens(model, tokenizer, ["<b>"], reuse="auto").token_ids == [301]

    def test_tokens_of_the_template_are_not_taken(self):
        tokenizer, model = reserving()
        tokenizer.chat_template = "{{ '<|reserved_0|>' }}"
        assert add_tokens(model, tokenizer, ["<b>"], reuse="auto").token_ids == [301]


class TestBadInput:
    BAD = {
        "no such token": (["<|reserved_9|>", RESERVED[0]], "'<|reserved_9|>' cannot be taken over"),
        "twice": ([RESERVED[0]] * 2, "'<|reserved_0|>' would be taken over twice"),
        "too few": (RESERVED[:1], "2 tokens cannot take over 1 name: '</tool>' would be left"),
        "eos": (["</s>", RESERVED[0]], "Tokens in use would be taken over: '</s>' (eos_token)"),
        "template": ([RESERVED[3], RESERVED[0]], "'<|reserved_3|>' (the chat template)"),
        "trained": (["a", RESERVED[0]], "'a' would be taken over, but by name they are not reserved"),
        "a word": ("<|reserved_0|>", "reuse='<|reserved_0|>' is unknown. Pass 'auto', or a list"),
        "ids": ([300, 301], "reuse must be a list of tokens"),
    }

    @pytest.mark.parametrize("case", BAD)
    def test_changes_nothing(self, case, strategy):
        reuse, message = self.BAD[case]
        tokenizer, model = reserving()
        tokenizer.chat_template = "{{ '<|reserved_3|>' }}"
        before = tokenizer_state(tokenizer), model_state(model)
        assert message in error_of(model, tokenizer, TOKENS, reuse=reuse, strategy=strategy)
        assert_same(before[0], tokenizer_state(tokenizer))
        assert_same(before[1], model_state(model))

    @pytest.mark.parametrize("family", TOKENIZERS)
    def test_force_renames_whatever_uses_it(self, family, tmp_path):
        tokenizer, model = reserving(family)
        tokenizer.chat_template = "{% for m in messages %}{{ m['content'] + '</s>' }}{% endfor %}"
        tokenizer._tokenizer.post_processor = processors.TemplateProcessing(
            "<s> $A </s>", special_tokens=[("<s>", 2), ("</s>", 3)]
        )
        before = tokenizer_state(tokenizer)
        partial = add_tokens(model, tokenizer, ["<end>"], special=True, reuse=["</s>"], force=True)
        assert (partial.token_ids, tokenizer.eos_token, tokenizer.eos_token_id) == ([3], "<end>", 3)
        assert tokenizer("a")["input_ids"][-1] == 3
        assert tokenizer.apply_chat_template([{"role": "user", "content": "a"}], tokenize=False) == "a<end>"
        tokenizer.save_pretrained(tmp_path)
        again = AutoTokenizer.from_pretrained(tmp_path)
        assert (again.eos_token, len(again)) == ("<end>", len(tokenizer))
        assert again("a")["input_ids"] == tokenizer("a")["input_ids"]
        partial.detach()
        assert_same(before, tokenizer_state(tokenizer))

    @pytest.mark.parametrize("family", TOKENIZERS)
    def test_force_takes_a_trained_word(self, family):
        tokenizer, model = reserving(family)
        before = tokenizer_state(tokenizer)
        text = tokenizer.convert_ids_to_tokens(len(tokenizer) - 10)
        partial = add_tokens(model, tokenizer, ["<tool>"], reuse=[text], force=True)
        assert partial.token_ids == [len(tokenizer) - 10]
        partial.detach()
        assert_same(before, tokenizer_state(tokenizer))

    def test_token_that_would_not_be_found_leaves_everything(self):
        tokenizer, model = reserving()
        before = tokenizer_state(tokenizer)
        error_of(model, tokenizer, ["<aft"], reuse="auto", special=True)
        assert_same(before, tokenizer_state(tokenizer))


def real_tokenizers() -> dict[str, Path]:
    """Folders of real tokenizer files, where `REAL_TOKENIZERS` names the folder that has them."""
    folder = os.environ.get("REAL_TOKENIZERS")
    files = sorted(Path(folder).glob("*/package/models/tokenizer.json")) if folder else []
    return {path.parents[2].name: path.parent for path in files}


@pytest.mark.slow
@pytest.mark.parametrize("name", ["deepseek_v3", "gemma3", "gpt2", "llama2", "llama3_2", "mistral_nemo", "qwen2_5"])
def test_real_tokenizers(name, tmp_path):
    folder = real_tokenizers().get(name)
    if folder is None:
        pytest.skip("set REAL_TOKENIZERS to a folder with NAME/package/models/tokenizer.json")
    tokenizer = AutoTokenizer.from_pretrained(folder)
    if name == "llama2":  # transformers itself reads what follows `<s>` in another way after a save and a reload
        tokenizer.save_pretrained(tmp_path / "base")
        tokenizer = AutoTokenizer.from_pretrained(tmp_path / "base")
    base, parts = tokenizer._tokenizer.to_str(), str(tokenizer.init_kwargs)
    vocabulary, size = tokenizer.get_vocab(), len(tokenizer)
    reserved = [text for text, _ in sorted(vocabulary.items(), key=lambda item: item[1]) if is_reserved_name(text)][:3]
    # Without reserved ones: pieces of the vocabulary, as `force=True` takes them.
    taken = reserved or [tokenizer.convert_ids_to_tokens(i) for i in (20000, 25001, 30002)]
    texts = [
        "def f(x):\n    return x  # caf\u00e9 \U0001f600",
        "The quick brown fox's 1234 tokens.",
        " ".join(RESERVED),
    ]
    plain = [encode(tokenizer, text) for text in texts]
    new = ["<tool>", "<|call|>", "</tool>"]
    added = [AddedToken(token, special=token == "<|call|>", normalized=False) for token in new]
    renaming = Renaming(tokenizer, dict(zip(taken, added, strict=True)))
    renaming.do()
    ids = [vocabulary[text] for text in taken]
    assert len(tokenizer) == size
    assert [i for i in encode(tokenizer, "x <tool> y <|call|>z</tool>") if i in ids] == ids
    assert not any(encode(tokenizer, text) == [i] for text, i in zip(taken, ids, strict=True))
    changed = {text: i for text, i in tokenizer.get_vocab().items() if vocabulary.get(text) != i}
    assert changed == dict(zip(new, ids, strict=True))
    if reserved:
        assert [encode(tokenizer, text) for text in texts] == plain
    tokenizer.save_pretrained(tmp_path)
    again = AutoTokenizer.from_pretrained(tmp_path)
    assert again.get_vocab() == tokenizer.get_vocab()
    for text in [*texts, "x <tool> y <|call|>z</tool>", *taken]:
        assert encode(again, text) == encode(tokenizer, text)
    renaming.undo()
    assert tokenizer._tokenizer.to_str() == base
    assert str(tokenizer.init_kwargs) == parts


def test_unigram_scores_stay(family):
    tokenizer = unigram_tokenizer()
    before = tokenizer._tokenizer.to_str()
    renaming = Renaming(tokenizer, {"</s>": AddedToken("<e>", special=True)})
    renaming.do()
    renaming.undo()
    renaming.undo()
    assert tokenizer._tokenizer.to_str() == before


class TestMergesWithPrefix:
    """BPE whose right parts have a prefix inside of a word, which is not in what a merge makes."""

    @pytest.fixture
    def pair(self):
        vocabulary = ["<unk>", "<pad>", "a", "b", "c", "##b", "##c", "##bc", "abc", "##bcc", "abcc"]
        merges = [("##b", "##c"), ("a", "##bc"), ("##bc", "##c"), ("abc", "##c")]
        ids = {text: token_id for token_id, text in enumerate(vocabulary)}
        backend = Tokenizer(models.BPE(ids, merges, continuing_subword_prefix="##", unk_token="<unk>"))
        backend.pre_tokenizer = pre_tokenizers.Whitespace()
        tokenizer = PreTrainedTokenizerFast(tokenizer_object=backend, unk_token="<unk>")
        return build_model("llama", len(tokenizer)), tokenizer

    def test_merged_word_starts_anew_from_its_parts(self, pair):
        model, tokenizer = pair
        before, old = tokenizer_state(tokenizer), table_of(model, "input").detach().clone()
        partial = train_tokens(model, tokenizer, ["abc"], init="subtoken_mean")
        expected = old[tokenizer.convert_tokens_to_ids(["a", "##bc"])].mean(0)
        torch.testing.assert_close(partial.token_rows().input_rows[0], expected)
        assert_same(before, tokenizer_state(tokenizer))

    def test_merged_word_is_taken_over_and_comes_back(self, pair):
        model, tokenizer = pair
        before, model_before = tokenizer_state(tokenizer), model_state(model)
        taken, ids = tokenizer.convert_tokens_to_ids("abc"), encode(tokenizer, "abc abcc b")
        partial = add_tokens(model, tokenizer, ["<t>"], reuse=["abc"], force=True)
        assert partial.token_ids == [taken] == encode(tokenizer, "<t>")
        assert tokenizer.convert_ids_to_tokens(encode(tokenizer, "abc")) == ["a", "##bc"]
        partial.detach()
        assert encode(tokenizer, "abc abcc b") == ids
        assert_same(before, tokenizer_state(tokenizer))
        assert_same(model_before, model_state(model))


class TestPiecesFromInsideOfWords:
    """A piece that stands behind others in its word is what the tokenizer reads there, without it."""

    def expected(self, model, tokenizer, token, pieces):
        old = table_of(model, "input").detach().clone()
        before = tokenizer_state(tokenizer)
        partial = train_tokens(model, tokenizer, [token], init="subtoken_mean")
        row = old[tokenizer.convert_tokens_to_ids(pieces)].mean(0)
        torch.testing.assert_close(partial.token_rows().input_rows[0], row)
        assert_same(before, tokenizer_state(tokenizer))

    def wrapped(self, model, **options):
        backend = Tokenizer(model)
        backend.pre_tokenizer = pre_tokenizers.Whitespace()
        tokenizer = PreTrainedTokenizerFast(tokenizer_object=backend, **options)
        return build_model("llama", len(tokenizer)), tokenizer

    def test_wordpiece(self):
        pieces = ["<unk>", "<pad>", "a", "ing", "##i", "##n", "##g", "##in", "##ing"]
        ids = {text: token_id for token_id, text in enumerate(pieces)}
        made = self.wrapped(models.WordPiece(ids, unk_token="<unk>"), unk_token="<unk>")
        self.expected(*made, "##ing", ["##in", "##g"])

    @pytest.mark.parametrize("unknown", [{"unk_token": "<unk>"}, {}], ids=["unk", "no unk"])
    def test_bpe_with_a_prefix(self, unknown):
        pieces = ["<unk>", "<pad>", "a", "b", "c", "##b", "##c", "bc", "##bc", "abc"]
        merges = [("b", "##c"), ("##b", "##c"), ("a", "##bc")]
        ids = {text: token_id for token_id, text in enumerate(pieces)}
        made = self.wrapped(models.BPE(ids, merges, continuing_subword_prefix="##", **unknown), **unknown)
        self.expected(*made, "##bc", ["##b", "##c"])

    @pytest.mark.parametrize(("token", "parts"), [("ab", ["a", "b"]), ("ab</w>", ["a", "b</w>"])])
    def test_bpe_with_a_suffix(self, token, parts):
        pieces = ["<unk>", "<pad>", "a", "b", "c", "a</w>", "b</w>", "c</w>", "ab", "ab</w>"]
        ids = {text: token_id for token_id, text in enumerate(pieces)}
        model = models.BPE(ids, [("a", "b"), ("a", "b</w>")], end_of_word_suffix="</w>", unk_token="<unk>")
        self.expected(*self.wrapped(model, unk_token="<unk>"), token, parts)
