"""Tokens in a tokenizer: which are new, adding them, taking them back. Through the public functions."""

from __future__ import annotations

import logging
import warnings

import pytest
import torch
from added import add_tokens
from conftest import SPECIALS, TOKENIZERS, bpe_tokenizer, build_model, unigram_tokenizer, wordpiece_tokenizer
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st
from states import (
    ALL_TOKENIZERS,
    SLOW_TOKENIZERS,
    assert_same,
    bert_legacy_tokenizer,
    byt5_tokenizer,
    esm_tokenizer,
    model_state,
    tokenizer_state,
)
from tokenizers import AddedToken, Tokenizer, models, pre_tokenizers
from transformers import AutoTokenizer, PreTrainedTokenizerFast

from hf_partial_embed import PartialEmbeddingError, TokenRows, train_tokens

NEW = ["<think>", "</think>", "zqx"]  # one after another no text of the vocabularies


@pytest.fixture(params=list(ALL_TOKENIZERS))
def family(request) -> str:
    return request.param


def model_for(tokenizer, **options):
    return build_model(vocab=max(tokenizer.get_vocab().values()) + 1, **options)


def encode(tokenizer, text: str) -> list[int]:
    return tokenizer(text, add_special_tokens=False)["input_ids"]


def error_of(call, *arguments, **options) -> str:
    with pytest.raises(PartialEmbeddingError) as caught:
        call(*arguments, **options)
    return str(caught.value)


def rows_of(*tokens: str, **options) -> TokenRows:
    return TokenRows(tokens=list(tokens), input_rows=torch.randn(len(tokens), 16), tied=True, **options)


class TestAdding:
    @pytest.mark.parametrize("special", [False, True])
    def test_each_token_is_one_id_in_text(self, family, special):
        tokenizer = ALL_TOKENIZERS[family]()
        size = len(tokenizer)
        partial = add_tokens(model_for(tokenizer), tokenizer, NEW, special=special)
        assert partial.tokens == NEW
        assert partial.token_ids == [size, size + 1, size + 2]
        for token, token_id in zip(NEW, partial.token_ids, strict=True):
            assert encode(tokenizer, token) == [token_id]
            assert encode(tokenizer, f"name {token} the").count(token_id) == 1
            assert tokenizer.convert_tokens_to_ids(token) == token_id

    def test_special_and_other_tokens_keep_their_order_when_mixed(self, family):
        tokenizer = ALL_TOKENIZERS[family]()
        size = len(tokenizer)
        special = {"<a>", "<c>", "<d>"}
        tokens = [AddedToken(text, special=text in special) for text in ("<a>", "<b>", "<c>", "<d>", "<e>")]
        partial = add_tokens(model_for(tokenizer), tokenizer, tokens)
        assert partial.token_ids == list(range(size, size + 5))
        assert {token.content for token in tokenizer.added_tokens_decoder.values() if token.special} >= special
        assert not {"<b>", "<e>"} & {t.content for t in tokenizer.added_tokens_decoder.values() if t.special}

    def test_decode_drops_special_tokens_only(self, family):
        tokenizer = ALL_TOKENIZERS[family]()
        model = model_for(tokenizer)
        dropped = add_tokens(model, tokenizer, ["<think>"], special=True)
        kept = add_tokens(model, tokenizer, ["<keep>"])
        ids = [*dropped.token_ids, *kept.token_ids]
        assert "<think>" in tokenizer.decode(ids)
        text = tokenizer.decode(ids, skip_special_tokens=True)
        assert "<think>" not in text
        assert "<keep>" in text

    def test_flags_of_an_added_token_are_kept_and_the_users_object_is_left_alone(self, family):
        tokenizer = ALL_TOKENIZERS[family]()
        given_token = AddedToken("<x>", lstrip=True, rstrip=True, normalized=False)
        partial = add_tokens(model_for(tokenizer), tokenizer, [given_token], special=True)
        assert (given_token.special, given_token.lstrip, given_token.normalized) == (False, True, False)
        there = tokenizer.added_tokens_decoder[partial.token_ids[0]]
        assert (there.special, there.lstrip, there.rstrip, there.normalized) == (True, True, True, False)
        saved = partial.token_rows().added_tokens
        assert saved == [
            {
                "content": "<x>", "special": True, "lstrip": True, "rstrip": True, "single_word": False,
                "normalized": False,
            }
        ]  # fmt: skip

    def test_any_iterable_of_tokens_is_taken_in_its_order(self):
        tokenizer = bpe_tokenizer()
        partial = add_tokens(model_for(tokenizer), tokenizer, (f"<{name}>" for name in "cab"))
        assert partial.tokens == ["<c>", "<a>", "<b>"]

    def test_a_dict_may_have_added_tokens_as_keys(self):
        tokenizer = bpe_tokenizer()
        starts = {AddedToken("<x>", special=True): "a name", "<y>": torch.ones(16)}
        partial = add_tokens(model_for(tokenizer), tokenizer, starts)
        assert partial.tokens == ["<x>", "<y>"]
        assert tokenizer.added_tokens_decoder[partial.token_ids[0]].special

    def test_saved_tokenizer_reloads_with_the_tokens(self, family, tmp_path):
        tokenizer = ALL_TOKENIZERS[family]()
        special = add_tokens(model_for(tokenizer), tokenizer, NEW, special=True)
        other = add_tokens(special.model, tokenizer, ["<keep>"])
        tokenizer.save_pretrained(tmp_path)
        reloaded = AutoTokenizer.from_pretrained(tmp_path) if tokenizer.is_fast else None
        reloaded = reloaded or type(tokenizer).from_pretrained(tmp_path)
        assert len(reloaded) == len(tokenizer)
        for token, token_id in zip([*NEW, "<keep>"], special.token_ids + other.token_ids, strict=True):
            assert encode(reloaded, token) == [token_id]
        text = reloaded.decode(special.token_ids + other.token_ids, skip_special_tokens=True)
        assert "<keep>" in text
        assert not any(token in text for token in NEW)

    def test_tokenizer_of_a_processor_is_used(self):
        class Processor:
            def __init__(self, tokenizer):
                self.tokenizer = tokenizer

        tokenizer = bpe_tokenizer()
        model, before = model_for(tokenizer), tokenizer_state(tokenizer)
        partial = add_tokens(model, Processor(tokenizer), NEW)
        assert partial.tokenizer is tokenizer
        assert encode(tokenizer, "<think>") == [300]
        rows = partial.detach()
        assert_same(before, tokenizer_state(tokenizer))
        assert rows.attach(model, Processor(tokenizer)).token_ids == [300, 301, 302]

    def test_tokenizer_without_an_unknown_token(self):
        tokenizer = PreTrainedTokenizerFast(tokenizer_object=bpe_tokenizer()._tokenizer)
        assert tokenizer.unk_token is None
        before, model = tokenizer_state(tokenizer), model_for(tokenizer)
        partial = add_tokens(model, tokenizer, NEW)
        assert [encode(tokenizer, token) for token in NEW] == [[300], [301], [302]]
        assert "'nothing here' " in error_of(train_tokens, model, tokenizer, ["nothing here"]).replace(".", " ")
        partial.detach()
        assert_same(before, tokenizer_state(tokenizer))

    def test_characters_beyond_a_byte_can_be_added_to_a_byte_tokenizer(self):
        tokenizer = byt5_tokenizer()  # it makes an id of any single character
        before, model = tokenizer_state(tokenizer), model_for(tokenizer)
        partial = add_tokens(model, tokenizer, ["€", "文"])
        assert partial.token_ids == [259, 260]
        assert encode(tokenizer, "a€文") == [100, 259, 260]
        rows = partial.detach()
        assert_same(before, tokenizer_state(tokenizer))
        assert "1 token not in the vocabulary: '€'" in error_of(train_tokens, model, tokenizer, ["€"])
        assert rows.attach(model, tokenizer).token_ids == [259, 260]

    def test_special_tokens_can_be_added_where_the_tokenizer_splits_them_in_text(self):
        for make in (bpe_tokenizer, byt5_tokenizer):
            tokenizer = make()
            tokenizer.split_special_tokens = True
            tokenizer(["x"])
            before = tokenizer_state(tokenizer)
            partial = add_tokens(model_for(tokenizer), tokenizer, ["<think>"], special=True)
            whole = tokenizer("<think>", add_special_tokens=False, split_special_tokens=False)["input_ids"]
            assert whole == partial.token_ids
            assert encode(tokenizer, "<think>") != partial.token_ids
            partial.detach()
            assert_same(before, tokenizer_state(tokenizer))

    def test_many_tokens_take_no_more_calls_than_few(self, monkeypatch):
        calls = []
        for name in ("__call__", "add_tokens", "get_vocab", "get_added_vocab", "__len__"):
            original = getattr(PreTrainedTokenizerFast, name)

            def counted(self, *arguments, _original=original, _name=name, **options):
                calls.append(_name)
                return _original(self, *arguments, **options)

            monkeypatch.setattr(PreTrainedTokenizerFast, name, counted)

        def calls_for(number: int) -> list[str]:
            tokenizer = bpe_tokenizer()
            model = model_for(tokenizer)
            calls.clear()
            partial = add_tokens(model, tokenizer, [f"zq{index}q" for index in range(number)])
            assert len(partial.token_ids) == number
            partial.detach()
            assert len(tokenizer) == 300
            return list(calls)

        assert calls_for(5000) == calls_for(10)


class TestKnownTokens:
    def test_known_tokens_are_named_and_the_remedy_too(self):
        tokenizer = bpe_tokenizer()
        message = error_of(add_tokens, model_for(tokenizer), tokenizer, ["<new>", "<s>", "a"])
        assert message == (
            f"'<s>' (id 2), 'a' (id {tokenizer.get_vocab()['a']}) are tokens of this tokenizer already. Nothing was "
            "added. To train rows that exist, use train_tokens."
        )

    def test_one_known_token_is_named_with_its_spelling_in_the_vocabulary(self):
        message = error_of(add_tokens, build_model(), bpe_tokenizer(), ["<new>", "\n"])
        assert message == (
            "'\\n' (id 202, 'Ċ') is a token of this tokenizer already. Nothing was added. To train rows that exist, "
            "use train_tokens."
        )

    def test_a_long_list_of_known_tokens_is_cut_and_counted(self):
        tokenizer = wordpiece_tokenizer()
        known = sorted(tokenizer.get_vocab())[:20]
        message = error_of(add_tokens, model_for(tokenizer), tokenizer, known)
        assert " and 12 more are tokens of this tokenizer already." in message

    @pytest.mark.parametrize("special", [False, True])
    def test_what_the_tokenizer_reads_as_one_piece_is_known(self, special):
        tokenizer = wordpiece_tokenizer()
        word, word_id = max(
            ((text, token_id) for text, token_id in tokenizer.get_vocab().items() if text.isalpha()),
            key=lambda item: len(item[0]),
        )
        for text in (word.upper(), f" {word}", f"{word}\n", word.capitalize()):
            message = error_of(add_tokens, model_for(tokenizer), tokenizer, [text], special=special)
            assert message.startswith(f"{text!r} (id {word_id}, {word!r}) is a token of this tokenizer already.")

    def test_a_word_that_the_vocabulary_has_with_a_space_mark_is_known(self):
        tokenizer = unigram_tokenizer()
        marked = [text for text in tokenizer.get_vocab() if len(text) > 1 and text[0] == "▁" and text[1:].isalpha()]
        known = [text[1:] for text in marked if encode(tokenizer, text[1:]) == [tokenizer.get_vocab()[text]]]
        assert known
        for text in known:
            message = error_of(add_tokens, model_for(tokenizer), tokenizer, [text])
            assert f"{text!r} (id " in message
            assert "of this tokenizer already" in message

    def test_token_that_earlier_rows_added_is_known(self, family):
        tokenizer = ALL_TOKENIZERS[family]()
        first = add_tokens(model_for(tokenizer), tokenizer, ["<think>"])
        before, model_before = tokenizer_state(tokenizer), model_state(first.model)
        message = error_of(add_tokens, first.model, tokenizer, ["<new>", "<think>"])
        assert message.startswith(f"'<think>' (id {first.token_ids[0]}) is a token of this tokenizer already.")
        assert_same(before, tokenizer_state(tokenizer))
        assert_same(model_before, model_state(first.model))

    @pytest.mark.parametrize("known, variant", [("zqx", "ZQX"), ("zqx", " zqx"), ("zqx", "Zqx"), ("éz", "e\u0301z")])
    def test_variant_of_an_earlier_token_gets_no_second_row(self, known, variant):
        tokenizer = wordpiece_tokenizer()
        first = add_tokens(model_for(tokenizer), tokenizer, [known])
        message = error_of(add_tokens, first.model, tokenizer, [variant])
        assert message.startswith(f"{variant!r} (id {first.token_ids[0]}")
        assert "already" in message

    @pytest.mark.parametrize("forms", [("\u00e9z", "e\u0301z"), ("e\u0301z", "\u00e9z")])
    def test_unicode_form_of_an_earlier_token_is_known_without_a_normaliser(self, forms):
        for make in (bpe_tokenizer, byt5_tokenizer):
            tokenizer = make()
            first = add_tokens(model_for(tokenizer), tokenizer, [forms[0]])
            message = error_of(add_tokens, first.model, tokenizer, [forms[1]])
            assert message.startswith(f"{forms[1]!r} (id {first.token_ids[0]}, {forms[0]!r}) is a token")

    def test_unknown_characters_are_no_reason_to_call_a_token_known(self):
        tokenizer = wordpiece_tokenizer()  # reads "☃ a" as <unk>, a
        partial = add_tokens(model_for(tokenizer), tokenizer, ["☃", "☃ a"])
        assert [encode(tokenizer, text) for text in partial.tokens] == [[token_id] for token_id in partial.token_ids]


class TestColliding:
    @pytest.mark.parametrize("variant", ["Zqx", " zqx", "zqx\n", "zq\u200bx", "\uff5aqx"])
    def test_tokens_that_read_the_same_are_refused(self, variant):
        families = {"\uff5aqx": ["unigram"], "Zqx": ["wordpiece", "bert-legacy"], "zq\u200bx": ["wordpiece"]}
        for name in families.get(variant, ["wordpiece", "bert-legacy"]):
            tokenizer = ALL_TOKENIZERS[name]()
            before = tokenizer_state(tokenizer)
            model = model_for(tokenizer)
            for tokens in (["zqx", variant], [variant, "zqx"]):
                message = error_of(add_tokens, model, tokenizer, tokens)
                assert all(repr(token) in message for token in tokens) or "never be used" in message
                assert_same(before, tokenizer_state(tokenizer))

    def test_message_names_both_and_what_they_read_as(self):
        tokenizer = bert_legacy_tokenizer()
        message = error_of(add_tokens, model_for(tokenizer), tokenizer, ["zq", "ZQ"])
        assert message == (
            "BertTokenizerLegacy reads 'zq' and 'ZQ' as the same text, ['z', '##q']: they would be two rows for one "
            "thing. Give one of them."
        )

    def test_case_tells_tokens_apart_that_are_not_normalised(self):
        for make in (wordpiece_tokenizer, bert_legacy_tokenizer):
            tokenizer = make()
            partial = add_tokens(model_for(tokenizer), tokenizer, ["<ZQ>", "<zq>"], special=True)
            assert [encode(tokenizer, token) for token in partial.tokens] == [[i] for i in partial.token_ids]

    def test_space_does_not_tell_special_tokens_apart_where_the_tokenizer_drops_it(self):
        tokenizer = wordpiece_tokenizer()
        message = error_of(add_tokens, model_for(tokenizer), tokenizer, ["zqx", " zqx"], special=True)
        assert "reads 'zqx' and ' zqx' as the same text" in message

    def test_space_tells_tokens_apart_where_the_tokenizer_keeps_it(self):
        for make in (bpe_tokenizer, byt5_tokenizer):
            tokenizer = make()
            partial = add_tokens(model_for(tokenizer), tokenizer, ["zqx", " zqx", "zqx "])
            bare, before, after = partial.token_ids
            assert encode(tokenizer, "zqx") == [bare]
            assert before in encode(tokenizer, "a zqx")
            assert after in encode(tokenizer, "zqx a")

    def test_unknown_characters_that_collide_after_the_normaliser_are_refused(self):
        tokenizer = wordpiece_tokenizer()
        before = tokenizer_state(tokenizer)
        message = error_of(add_tokens, model_for(tokenizer), tokenizer, ["Ж", "ж"])
        lost, kept = ("Ж", "ж") if message.startswith("Token 'Ж'") else ("ж", "Ж")  # either may win
        assert message == (
            f"Token {lost!r} would never be used: TokenizersBackend would read its text as [{kept!r}]. Give it "
            "another text, or pass AddedToken(..., normalized=False)."
        )
        assert_same(before, tokenizer_state(tokenizer))

    def test_token_that_the_normaliser_deletes_is_refused(self):
        tokenizer = wordpiece_tokenizer()
        before = tokenizer_state(tokenizer)
        message = error_of(add_tokens, model_for(tokenizer), tokenizer, ["zqx", "\u200b"])
        assert message.startswith(
            "Token '\\u200b' would never be used: TokenizersBackend would read its text as nothing."
        )
        assert_same(before, tokenizer_state(tokenizer))
        partial = add_tokens(model_for(tokenizer), tokenizer, [AddedToken("\u200b", normalized=False)])
        assert encode(tokenizer, "\u200b") == partial.token_ids

    def test_token_that_another_one_always_covers_is_refused(self):
        for tokens in ([AddedToken("zq", special=True, normalized=False), "azqb"], ["<s>zq"]):
            tokenizer = bpe_tokenizer()
            before = tokenizer_state(tokenizer)
            message = error_of(add_tokens, model_for(tokenizer), tokenizer, tokens)
            assert f"Token {tokens[-1]!r} would never be used: TokenizersBackend would read its text as ['" in message
            assert_same(before, tokenizer_state(tokenizer))
            remedied = [*tokens[:-1], AddedToken(tokens[-1], normalized=False)]
            partial = add_tokens(model_for(tokenizer), tokenizer, remedied)
            assert encode(tokenizer, tokens[-1]) == partial.token_ids[-1:]

    @pytest.mark.parametrize("family", list(TOKENIZERS))
    def test_token_that_would_cover_an_earlier_one_is_refused(self, family):
        tokenizer = TOKENIZERS[family]()
        earlier = add_tokens(model_for(tokenizer), tokenizer, ["azqb"])
        before, model_before = tokenizer_state(tokenizer), model_state(earlier.model)
        message = error_of(add_tokens, earlier.model, tokenizer, ["zq"], special=True)
        assert message.startswith("Token 'azqb' would be lost: TokenizersBackend would read its text as ['")
        assert message.endswith("Give the new one another text.")
        assert_same(before, tokenizer_state(tokenizer))
        assert_same(model_before, model_state(earlier.model))
        inside = add_tokens(earlier.model, tokenizer, ["zq"])
        assert encode(tokenizer, "azqb") == earlier.token_ids
        assert inside.token_ids[0] in encode(tokenizer, "zqb")

    def test_earlier_token_that_was_lost_already_is_no_obstacle(self):
        tokenizer = bpe_tokenizer()
        tokenizer.add_tokens(["azqb"])
        tokenizer.add_tokens(["zq"], special_tokens=True)
        assert add_tokens(model_for(tokenizer), tokenizer, ["<think>"]).token_ids == encode(tokenizer, "<think>")

    def test_capitals_in_a_lower_casing_python_tokenizer_need_the_remedy_that_is_named(self):
        tokenizer = bert_legacy_tokenizer()
        before = tokenizer_state(tokenizer)
        message = error_of(add_tokens, model_for(tokenizer), tokenizer, ["zqx", "Qzx"])
        assert message == (
            "BertTokenizerLegacy did not take 'Qzx' as a token of its own. Give it another text, or pass "
            "AddedToken('Qzx', normalized=False)."
        )
        assert_same(before, tokenizer_state(tokenizer))
        partial = add_tokens(model_for(tokenizer), tokenizer, ["zqx", AddedToken("Qzx", normalized=False)])
        assert encode(tokenizer, "Qzx zqx") == partial.token_ids[::-1]

    @pytest.mark.parametrize("text", ["ZQX", " zqx"])
    def test_attached_rows_get_no_second_row_either(self, text):
        tokenizer = wordpiece_tokenizer()
        first = add_tokens(model_for(tokenizer), tokenizer, ["zqx"])
        before, model_before = tokenizer_state(tokenizer), model_state(first.model)
        with pytest.raises(PartialEmbeddingError):
            rows_of(text).attach(first.model, tokenizer)
        assert_same(before, tokenizer_state(tokenizer))
        assert_same(model_before, model_state(first.model))

    def test_attached_rows_do_not_hide_a_word_of_the_vocabulary(self):
        tokenizer = bert_legacy_tokenizer()
        fast = wordpiece_tokenizer()
        word = max((text for text in fast.get_vocab() if text.isalpha()), key=len)
        for tokenizer, text in ((bert_legacy_tokenizer(), " name"), (fast, word.upper())):
            before, model = tokenizer_state(tokenizer), model_for(tokenizer)
            with pytest.raises(PartialEmbeddingError, match="already"):
                rows_of(text).attach(model, tokenizer)
            assert_same(before, tokenizer_state(tokenizer))


BAD_TOKENS = {
    "empty string": (["<new>", ""], "A token is the empty string, which no text contains. Leave it out."),
    "no tokens": ([], "No tokens were given: name at least one."),
    "empty dict": ({}, "No tokens were given: name at least one."),
    "twice": (["<new>", "zqx", "<new>"], "Token '<new>' is given twice. Give each token once."),
    "twice, once with flags": (
        ["<new>", AddedToken("<new>", special=True)],
        "Token '<new>' is given twice. Give each token once.",
    ),
    "unicode forms": (
        ["\u00e9zq", "e\u0301zq"],
        "Tokens '\\xe9zq' and 'e\\u0301zq' are the same text, 'ézq', in two Unicode forms. Give one of them.",
    ),
    "a string": ("<new>", "tokens must be a list, but got the single token '<new>'. Pass ['<new>']."),
    "an added token": (
        AddedToken("<new>"),
        "tokens must be a list, but got the single token '<new>'. Pass ['<new>'].",
    ),
    "a number": (5, "tokens must be a list of str or AddedToken, but got 5."),
    "none": (None, "tokens must be a list of str or AddedToken, but got None."),
    "number among tokens": (["<new>", 7], "A token must be a str or an AddedToken, but got 7 (int)."),
    "bytes among tokens": ([b"zqx"], "A token must be a str or an AddedToken, but got b'zqx' (bytes)."),
    "lone surrogate": (["<new>", "zq\ud800"], "Token 'zq\\ud800' is no valid Unicode: it has a lone surrogate"),
    "known": (["<new>", "the known one"], "is a token of this tokenizer already"),
    "never found": (["<new>", "<think>", "the unfindable one"], "Token 'the unfindable one' would never be used"),
    "start of another type": ({"<new>": 3}, "Token '<new>' starts from 3: give a description (str) or its row"),
    "no description": ({"<new>": ""}, "The descriptions of '<new>' have no tokens. Describe them in words."),
    "row of another width": ({"<new>": torch.zeros(3)}, "The row given for '<new>' has shape (3,)"),
    "rows for one token": ({"<new>": torch.zeros(2, 16)}, "The row given for '<new>' has shape (2, 16)"),
    "whole numbers": ({"<new>": torch.zeros(16, dtype=torch.int64)}, "and dtype torch.int64; finite floating-point"),
    "not finite": ({"<new>": torch.full((16,), torch.nan)}, "finite floating-point numbers of shape (16,) are needed"),
}

BAD_OPTIONS = {
    "init": ({"init": "magic"}, "init='magic' is no initialiser. Choose one of ["),
    "init of another type": ({"init": ["mean"]}, "init=['mean'] is no initialiser."),
    "strategy": ({"strategy": "magic"}, "strategy='magic' is unknown. Choose 'split' or 'mask'."),
    "output": ({"output": "no"}, "output='no' is unknown. Choose 'auto' or False."),
    "no output rows of a tied head": ({"output": False}, "output=False cannot be had on a model whose head is tied"),
    "dtype": (
        {"dtype": torch.int8},
        "dtype=torch.int8 cannot be trained. Choose one of torch.float32, torch.bfloat16, torch.float16, "
        "torch.float64.",
    ),
    "dtype under mask": ({"dtype": torch.float16, "strategy": "mask"}, "strategy='mask' trains the model's own"),
    "rows of another shape": (
        {"init": lambda request: torch.zeros(2)},
        "gave a tensor of shape (2,) for the input rows of 3",
    ),
    "no rows": (
        {"init": lambda request: None},
        "gave NoneType for the input rows of 3 tokens; a tensor of shape (3, 16) is needed.",
    ),
    "rows not finite": (
        {"init": lambda request: torch.full((3, 16), torch.inf)},
        "gave infinite or NaN values for '<think>', '</think>', 'zqx', in the input rows; finite ones are needed.",
    ),
}


class TestErrorsChangeNothing:
    @pytest.mark.parametrize("case", list(BAD_TOKENS))
    def test_bad_tokens(self, family, case):
        tokens, message = BAD_TOKENS[case]
        tokenizer = ALL_TOKENIZERS[family]()
        if case == "known":
            tokens = [tokens[0], tokenizer.all_special_tokens[0]]
        if case == "never found":
            if not tokenizer.is_fast:  # the longest match wins there, so nothing hides a token
                return
            tokenizer.add_tokens(["unfindable"], special_tokens=True)
        self.check(tokenizer, tokens, {}, message)

    @pytest.mark.parametrize("family", ["unigram", "bert-legacy"])
    @pytest.mark.parametrize("case", list(BAD_OPTIONS))
    def test_bad_options(self, family, case):
        self.check(ALL_TOKENIZERS[family](), NEW, *BAD_OPTIONS[case])

    @staticmethod
    def check(tokenizer, tokens, options, message):
        model = model_for(tokenizer)
        before, model_before = tokenizer_state(tokenizer), model_state(model)
        assert message in error_of(add_tokens, model, tokenizer, tokens, **options)
        assert_same(before, tokenizer_state(tokenizer))
        assert_same(model_before, model_state(model))

    def test_error_of_an_initialiser_itself(self, family):
        def broken(request):
            raise RuntimeError("no rows today")

        tokenizer = ALL_TOKENIZERS[family]()
        model = model_for(tokenizer)
        before, model_before = tokenizer_state(tokenizer), model_state(model)
        with pytest.raises(RuntimeError, match="no rows today"):
            add_tokens(model, tokenizer, NEW, init=broken)
        assert_same(before, tokenizer_state(tokenizer))
        assert_same(model_before, model_state(model))

    @pytest.mark.parametrize("step", ["_split", "_mask"])
    def test_error_after_the_tokenizer_has_taken_the_tokens(self, family, step, monkeypatch):
        from hf_partial_embed.attachment import attachment

        def fails(*arguments):
            raise MemoryError

        monkeypatch.setattr(attachment.Attachment, step, fails)
        tokenizer = ALL_TOKENIZERS[family]()
        model = model_for(tokenizer)
        before, model_before = tokenizer_state(tokenizer), model_state(model)
        with pytest.raises(MemoryError):
            add_tokens(model, tokenizer, NEW, special=True, strategy=step[1:])
        assert_same(before, tokenizer_state(tokenizer))
        assert_same(model_before, model_state(model))

    @pytest.mark.parametrize(
        "tokenizer, name", [(None, "NoneType"), ("gpt2", "str"), (torch.nn.Linear(2, 2), "Linear")]
    )
    def test_something_else_than_a_tokenizer(self, tokenizer, name):
        model = build_model()
        before = model_state(model)
        message = error_of(add_tokens, model, tokenizer, NEW)
        assert message.startswith(f"A tokenizer is needed, but got {name}. Pass the model's tokenizer, e.g.")
        assert_same(before, model_state(model))

    def test_something_else_than_a_model(self):
        tokenizer = bpe_tokenizer()
        before = tokenizer_state(tokenizer)
        message = error_of(add_tokens, torch.nn.Linear(2, 2), tokenizer, NEW)
        assert message.startswith("Linear has no input embeddings to add rows to")
        assert_same(before, tokenizer_state(tokenizer))

    def test_tokenizer_that_takes_no_tokens(self):
        class Fixed:  # as MistralCommonBackend
            is_fast = False
            unk_token = unk_token_id = None

            def __len__(self):
                return 300

            def convert_tokens_to_ids(self, token):
                return None

        model = build_model()
        before = model_state(model)
        for call in (lambda: add_tokens(model, Fixed(), NEW), lambda: rows_of(*NEW).attach(model, Fixed())):
            with pytest.raises(PartialEmbeddingError, match="Fixed takes no new tokens"):
                call()
            assert_same(before, model_state(model))


class TestGapsBetweenIds:
    @staticmethod
    def with_gap() -> PreTrainedTokenizerFast:
        vocabulary = {text: index for index, text in enumerate([*SPECIALS, *"abcdefgh"]) if text != "c"}
        backend = Tokenizer(models.WordPiece(vocabulary, unk_token="<unk>"))
        backend.pre_tokenizer = pre_tokenizers.Whitespace()
        return PreTrainedTokenizerFast(tokenizer_object=backend, unk_token="<unk>", pad_token="<pad>")

    def test_id_of_another_token_is_not_given_again(self):
        tokenizer = self.with_gap()
        model = model_for(tokenizer)
        before, model_before = tokenizer_state(tokenizer), model_state(model)
        assert error_of(add_tokens, model, tokenizer, ["<new>"]) == (
            "TokenizersBackend would give the new token '<new>' the id 11, which another token has: its 11 ids go up "
            "to 11, with gaps. Give the tokenizer a token for each id first."
        )
        assert_same(before, tokenizer_state(tokenizer))
        assert_same(model_before, model_state(model))

    def test_nor_by_a_python_tokenizer_that_would_overwrite_the_token(self):
        tokenizer = byt5_tokenizer()
        model = model_for(tokenizer)
        first = add_tokens(model, tokenizer, ["<a>"])
        tokenizer.add_tokens(["<own>"])
        first.detach()
        before, model_before = tokenizer_state(tokenizer), model_state(model)
        assert before["vocabulary"]["<own>"] == len(tokenizer) == 260
        for special in (False, True):
            message = error_of(add_tokens, model, tokenizer, ["<b>"], special=special)
            assert "would give the new token '<b>' the id 260, which another token has" in message
            assert_same(before, tokenizer_state(tokenizer))
            assert_same(model_before, model_state(model))

    def test_rows_of_tokens_behind_a_gap_can_be_trained_by_their_text(self):
        tokenizer = self.with_gap()
        partial = train_tokens(model_for(tokenizer), tokenizer, ["h", "d"])
        assert partial.token_ids == [11, 7]
        by_id = train_tokens(model_for(tokenizer), tokenizer, [11, 7])
        assert by_id.tokens == ["h", "d"]


class TestTakingBack:
    @pytest.mark.parametrize("special", [False, True])
    def test_tokenizer_is_as_it_was(self, family, special):
        tokenizer = ALL_TOKENIZERS[family]()
        tokenizer.add_tokens(["<mine>"], special_tokens=True)
        tokenizer.add_tokens(["<other>"])
        before = tokenizer_state(tokenizer)
        partial = add_tokens(model_for(tokenizer), tokenizer, [*NEW, "ünï", "a\nb"], special=special)
        assert len(tokenizer) == before["sizes"][0] + 5
        partial.detach()
        assert_same(before, tokenizer_state(tokenizer))

    def test_whoever_holds_the_backend_sees_the_same_tokens(self):
        tokenizer = bpe_tokenizer()
        backend = tokenizer.backend_tokenizer
        partial = add_tokens(model_for(tokenizer), tokenizer, NEW)
        assert backend.token_to_id("zqx") == 302
        partial.detach()
        assert tokenizer.backend_tokenizer is backend
        assert backend.token_to_id("zqx") is None

    def test_tokens_can_be_added_again_and_again(self, family):
        tokenizer = ALL_TOKENIZERS[family]()
        model, before = model_for(tokenizer), tokenizer_state(tokenizer)
        ids = []
        for _ in range(3):
            partial = add_tokens(model, tokenizer, NEW)
            ids.append(partial.token_ids)
            partial.detach()
            assert_same(before, tokenizer_state(tokenizer))
        assert ids[0] == ids[1] == ids[2]

    @pytest.mark.parametrize("kind", list(TOKENIZERS))
    def test_truncation_and_padding_stay_set(self, kind):
        tokenizer = TOKENIZERS[kind]()
        tokenizer._tokenizer.enable_truncation(5, stride=2, direction="left")
        tokenizer._tokenizer.enable_padding(length=7, pad_id=1, pad_token="<pad>", pad_to_multiple_of=2)
        backend = tokenizer._tokenizer.to_str()
        model = model_for(tokenizer)
        error_of(add_tokens, model, tokenizer, ["<new>", "<s>"])
        assert tokenizer._tokenizer.to_str() == backend
        partial = add_tokens(model, tokenizer, [*NEW, "a long one of more than five pieces"])
        assert tokenizer._tokenizer.truncation["max_length"] == 5
        partial.detach()
        assert tokenizer._tokenizer.to_str() == backend
        train_tokens(model, tokenizer, ["<s>"]).detach()
        error_of(train_tokens, model, tokenizer, ["no such token"])
        assert tokenizer._tokenizer.to_str() == backend

    def test_truncation_does_not_shorten_a_description(self):
        tokenizer = bpe_tokenizer()
        description = "The elements of the periodic table have names"
        pieces = encode(tokenizer, description)
        tokenizer._tokenizer.enable_truncation(2)
        model = model_for(tokenizer)
        partial = add_tokens(model, tokenizer, {"<new>": description})
        expected = model.get_input_embeddings().weight[torch.tensor(pieces)].double().mean(0).float()
        assert torch.equal(partial.token_rows().input_rows[0], expected)

    def test_pre_tokenizer_written_in_python_survives(self):
        class Letters:
            def pre_tokenize(self, text):
                text.split(lambda _, part: [part[index : index + 1] for index in range(len(str(part)))])

        tokenizer = wordpiece_tokenizer()
        tokenizer._tokenizer.pre_tokenizer = pre_tokenizers.PreTokenizer.custom(Letters())
        text = "a the name"
        ids, vocabulary, model = encode(tokenizer, text), tokenizer.get_vocab(), model_for(tokenizer)
        error_of(add_tokens, model, tokenizer, ["Ж", "ж"])
        assert (encode(tokenizer, text), tokenizer.get_vocab()) == (ids, vocabulary)
        partial = add_tokens(model, tokenizer, NEW)
        assert encode(tokenizer, f"{text}zqx") == [*ids, partial.token_ids[2]]
        partial.detach()
        assert (encode(tokenizer, text), tokenizer.get_vocab()) == (ids, vocabulary)

    def test_tokenizer_that_splits_at_its_whole_vocabulary_goes_on_doing_so(self):
        tokenizer = esm_tokenizer()
        before = tokenizer_state(tokenizer)
        protein = encode(tokenizer, "LAGVS")
        assert len(protein) == 5
        model = model_for(tokenizer)
        error_of(add_tokens, model, tokenizer, ["<new>", "<pad>"])
        partial = add_tokens(model, tokenizer, ["<site>", "XX"])
        assert encode(tokenizer, "LA<site>GV") == [*protein[:2], partial.token_ids[0], *protein[2:4]]
        partial.detach()
        assert encode(tokenizer, "LAGVS") == protein
        assert_same(before, tokenizer_state(tokenizer))


class TestFindingTokens:
    def test_missing_tokens_are_named(self):
        tokenizer = bpe_tokenizer()
        message = error_of(train_tokens, build_model(), tokenizer, ["<s>", "nope", "", "zqx"])
        assert message == "3 tokens not in the vocabulary: 'nope', '', 'zqx'. Use add_tokens for new ones."

    def test_text_is_matched_exactly_first_and_then_as_the_piece_that_it_is_read_as(self):
        tokenizer = bpe_tokenizer()
        partial = train_tokens(build_model(), tokenizer, ["Ġ", "\n", "a"])
        assert partial.token_ids == [224, 202, tokenizer.get_vocab()["a"]]
        assert partial.tokens == ["Ġ", "Ċ", "a"]

    @pytest.mark.parametrize("text", ["☃ a", "a ☃", "☃"])
    def test_piece_beside_unknown_ones_is_not_taken_for_the_token(self, text):
        tokenizer = wordpiece_tokenizer()
        message = error_of(train_tokens, model_for(tokenizer), tokenizer, [text])
        assert message == f"1 token not in the vocabulary: {text!r}. Use add_tokens for new ones."

    def test_unknown_token_itself_can_be_trained(self, family):
        tokenizer = ALL_TOKENIZERS[family]()
        partial = train_tokens(model_for(tokenizer), tokenizer, [tokenizer.unk_token])
        assert partial.token_ids == [tokenizer.unk_token_id]

    @pytest.mark.parametrize("tokens", [["the", "THE"], ["the", "the"], ["the", " the "]])
    def test_two_names_of_one_row_are_refused(self, tokens):
        tokenizer = bert_legacy_tokenizer()
        message = error_of(train_tokens, model_for(tokenizer), tokenizer, tokens)
        assert message == f"Tokens {tokens[0]!r}, {tokens[1]!r} share one row. Give each token once."

    def test_lone_surrogates_are_refused(self, family):
        tokenizer = ALL_TOKENIZERS[family]()
        message = error_of(train_tokens, model_for(tokenizer), tokenizer, ["\udc80"])
        assert message.startswith("Token '\\udc80' is no valid Unicode: it has a lone surrogate")


# Spaces, marks, what normalisers join or drop, what vocabularies mark words with, and special tokens' letters.
TROUBLE = " \n\u00a0\u200b\u0301\u0307eéEzZq①1ﬁfiIİ\u0131ßsS\u017f▁Ġ#<>/unkpad文\U0001f600\x00\ufffd"


class TestAnyText:
    models: dict[str, tuple] = {}

    @settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
    @given(
        tokens=st.lists(
            st.text(max_size=6) | st.text(alphabet=TROUBLE, min_size=1, max_size=6), min_size=1, max_size=5
        ),
        special=st.booleans(),
    )
    @example(tokens=["\x00"], special=False)
    @example(tokens=["\u0301", "e\u0301"], special=False)
    @example(tokens=["ﬁ", "fi"], special=False)
    @example(tokens=["İ", "i̇"], special=False)
    @example(tokens=["ß", "SS", "ss"], special=False)
    @example(tokens=["zq", "zqz", "qz"], special=False)
    @example(tokens=["▁zq", "zq"], special=False)
    @example(tokens=["Ġzq", " zq"], special=False)
    @example(tokens=["\u2028", "\u00a0", "\u3000"], special=True)
    @example(tokens=["<s", "s>"], special=True)
    @example(tokens=["##zq", "zq"], special=False)
    def test_is_refused_or_found_in_its_own_text(self, family, tokens, special):
        if family not in self.models:
            tokenizer = ALL_TOKENIZERS[family]()
            model = model_for(tokenizer)
            self.models[family] = tokenizer, model, tokenizer_state(tokenizer), model_state(model)
        tokenizer, model, before, model_before = self.models[family]
        try:
            partial = add_tokens(model, tokenizer, tokens, special=special)
        except PartialEmbeddingError:
            pass
        else:
            assert partial.token_ids == list(range(before["sizes"][0], before["sizes"][0] + len(tokens)))
            for token, token_id in zip(tokens, partial.token_ids, strict=True):
                assert encode(tokenizer, token).count(token_id) == 1
            partial.detach()
        assert_same(before, tokenizer_state(tokenizer))
        assert_same(model_before, model_state(model))


def test_nothing_is_logged_or_warned_about(family, caplog):
    tokenizer = ALL_TOKENIZERS[family]()
    model = model_for(tokenizer)
    with warnings.catch_warnings(), caplog.at_level(logging.WARNING):
        warnings.simplefilter("error")
        add_tokens(model, tokenizer, [*NEW, "word " * 800]).detach()
    assert not caplog.records


def test_slow_families_are_slow():
    assert not any(make().is_fast for make in SLOW_TOKENIZERS.values())
