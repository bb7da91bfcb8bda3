"""`add_tokens`, `train_tokens`, `load_tokens` and `detach` on a model and its tokenizer together."""

from __future__ import annotations

import copy
import itertools
import json

import pytest
import torch
from added import add_tokens
from conftest import TOKENIZERS, bpe_tokenizer, build_model, logits_of, run_model, table_of, unigram_tokenizer
from states import ALL_TOKENIZERS, assert_same, bits, model_state, tokenizer_state
from tokenizers import AddedToken

from hf_partial_embed import PartialEmbeddingError, TokenRows, load_tokens, train_tokens

A = ["<think>", "</think>"]
B = ["zqx", "praseodymium", "<b>"]


def encode(tokenizer, text: str) -> list[int]:
    return tokenizer(text, add_special_tokens=False)["input_ids"]


def error_of(call, *arguments, **options) -> str:
    with pytest.raises(PartialEmbeddingError) as caught:
        call(*arguments, **options)
    return str(caught.value)


def train(partial, steps: int = 2, seed: int = 0) -> None:
    """A few steps on ids of all kinds, so that every row of the partial has moved."""
    torch.manual_seed(seed)
    model = partial.model
    optimizer = torch.optim.AdamW(partial.param_groups(lr=0.1))
    partial.protect(optimizer)
    size = model.get_input_embeddings().num_embeddings
    before = partial.token_rows()
    for _ in range(steps):
        ids = torch.cat([torch.tensor(partial.token_ids), torch.randint(2, min(size, 250), (6,))])
        run_model(model, ids[None], labels=ids[None]).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    for name, rows in partial.token_rows().tensors().items():
        assert (rows != before.tensors()[name]).flatten(1).any(1).all() if rows.dim() > 1 else True, name


def same_rows(one: TokenRows, other: TokenRows) -> bool:
    here, there = one.tensors(), other.tensors()
    return (
        one.tokens == other.tokens and list(here) == list(there) and all(torch.equal(here[k], there[k]) for k in here)
    )


class Start:
    """A model and a tokenizer, and how they were."""

    def __init__(self, kind: str = "llama", *, tied: bool = True, vocab: int | None = None, tokenizer=None) -> None:
        self.tokenizer = tokenizer or bpe_tokenizer()
        self.model = build_model(kind, vocab or len(self.tokenizer), tied=tied)
        self.remember()

    def remember(self) -> None:
        self.before = tokenizer_state(self.tokenizer), model_state(self.model)

    def assert_as_before(self) -> None:
        assert_same(self.before[0], tokenizer_state(self.tokenizer))
        assert_same(self.before[1], model_state(self.model))


@pytest.fixture
def kind() -> str:
    return "phi"  # a head with a bias: tied or untied, it has more than one table


@pytest.fixture
def start(kind, tied) -> Start:
    return Start(kind, tied=tied)


class TestOneRowSet:
    @pytest.mark.parametrize("kind", ["llama", "phi", "gemma", "gpt2", "bert", "bert-encoder", "t5"])
    def test_detach_restores_every_bit_after_training(self, kind, tied, strategy):
        start = Start(kind, tied=tied)
        partial = add_tokens(start.model, start.tokenizer, A, strategy=strategy)
        if kind != "bert-encoder":
            train(partial)
        rows = partial.token_rows()
        assert same_rows(partial.detach(), rows)
        start.assert_as_before()

    @pytest.mark.parametrize("family", list(ALL_TOKENIZERS))
    def test_detach_restores_with_every_kind_of_tokenizer(self, family, strategy):
        start = Start(tokenizer=ALL_TOKENIZERS[family]())
        partial = add_tokens(start.model, start.tokenizer, [*A, *B], strategy=strategy, special=True)
        assert start.model.config.vocab_size == len(start.tokenizer)
        partial.detach()
        start.assert_as_before()

    def test_detached_rows_attach_again_with_the_same_logits(self, start, strategy):
        partial = add_tokens(start.model, start.tokenizer, A, strategy=strategy)
        train(partial)
        ids = torch.tensor([[5, *partial.token_ids, 9]])
        logits = logits_of(start.model, ids)
        again = partial.detach().attach(start.model, start.tokenizer, strategy=strategy)
        assert again.token_ids == partial.token_ids
        assert torch.equal(logits_of(start.model, ids), logits)
        again.detach()
        start.assert_as_before()

    def test_handle_that_is_off_says_so(self, start):
        partial = add_tokens(start.model, start.tokenizer, A)
        partial.detach()
        for call in (partial.detach, partial.merge, partial.verify, lambda: list(partial.parameters())):
            assert "these rows are not on a model any more (merged or detached)" in error_of(call)
        start.assert_as_before()


class TestTwoRowSets:
    """A is put on first, then B; both train."""

    def put_on(self, start, strategy, **options):
        a = add_tokens(start.model, start.tokenizer, A, strategy=strategy, **options)
        train(a)
        b = add_tokens(start.model, start.tokenizer, B, strategy=strategy, **options)
        train(b, seed=1)
        assert a.token_ids == [300, 301]
        assert b.token_ids == [302, 303, 304]
        return a, b

    def test_last_off_first(self, start, strategy):
        a, b = self.put_on(start, strategy)
        rows_a, rows_b = a.token_rows(), b.token_rows()
        assert same_rows(b.detach(), rows_b)
        assert a.token_ids == [300, 301]
        assert same_rows(a.token_rows(), rows_a)
        assert encode(start.tokenizer, "<think>") == [300]
        assert start.tokenizer.convert_tokens_to_ids("zqx") == start.tokenizer.unk_token_id
        a.verify()
        assert same_rows(a.detach(), rows_a)
        start.assert_as_before()

    def test_first_off_first(self, start, strategy):
        a, b = self.put_on(start, strategy)
        rows_a, rows_b = a.token_rows(), b.token_rows()
        logits = logits_of(start.model, torch.tensor([[5, *b.token_ids, 7]]))
        assert same_rows(a.detach(), rows_a)
        assert b.token_ids == [300, 301, 302]
        assert b.tokens == B
        assert [encode(start.tokenizer, token) for token in B] == [[300], [301], [302]]
        assert start.tokenizer.convert_tokens_to_ids("<think>") == start.tokenizer.unk_token_id
        assert start.model.config.vocab_size == len(start.tokenizer) == 303
        assert same_rows(b.token_rows(), rows_b)
        fresh = logits_of(start.model, torch.tensor([[5, *b.token_ids, 7]]))
        keep = [*range(300), *range(302, 305)]
        assert torch.allclose(fresh, logits[..., torch.tensor(keep) if logits.shape[-1] == 305 else slice(None)])
        b.verify()
        assert same_rows(b.detach(), rows_b)
        start.assert_as_before()

    def test_second_goes_on_training_after_the_first_is_off(self, start, strategy):
        a, b = self.put_on(start, strategy)
        parameters = list(b.parameters())
        a.detach()
        if strategy == "split":  # so that an optimizer that holds them still holds what trains
            assert all(one is other for one, other in zip(parameters, b.parameters(), strict=True))
        train(b, seed=2)
        b.verify()
        b.detach()
        start.assert_as_before()

    def test_first_goes_on_training_after_the_second_is_off(self, start, strategy):
        a, b = self.put_on(start, strategy)
        b.detach()
        train(a, seed=2)
        a.verify()
        a.detach()
        start.assert_as_before()

    def test_training_one_leaves_the_other(self, start):
        a, b = self.put_on(start, "split")
        rows_a, rows_b = a.token_rows(), b.token_rows()
        train(b, seed=3)
        assert same_rows(a.token_rows(), rows_a)
        assert not same_rows(b.token_rows(), rows_b)
        a.verify()
        b.verify()

    def test_first_merged_under_the_second(self, start, strategy):
        a, b = self.put_on(start, strategy)
        rows_a, rows_b = a.token_rows(), b.token_rows()
        a.merge()
        assert b.token_ids == [302, 303, 304]
        assert same_rows(b.token_rows(), rows_b)
        assert [encode(start.tokenizer, token) for token in [*A, *B]] == [[300], [301], [302], [303], [304]]
        b.verify()
        train(b, seed=4)
        b.detach()
        assert len(start.tokenizer) == start.model.config.vocab_size == 302
        table = table_of(start.model)
        assert torch.equal(table[300:], rows_a.input_rows)
        alone = Start(start.model.config.model_type, tied=rows_a.output_rows is None)
        rows_a.attach(alone.model, alone.tokenizer, strategy=strategy).merge()
        assert_same(tokenizer_state(alone.tokenizer), tokenizer_state(start.tokenizer))
        for name, value in alone.model.state_dict().items():
            assert torch.equal(start.model.state_dict()[name], value), name

    def test_second_merged_over_the_first(self, start, strategy):
        a, b = self.put_on(start, strategy)
        rows_a, rows_b = a.token_rows(), b.token_rows()
        b.merge()
        assert same_rows(a.token_rows(), rows_a)
        a.verify()
        train(a, seed=4)
        a.verify()
        assert torch.equal(table_of(start.model)[302:305], rows_b.input_rows)

    def test_middle_one_of_three_off(self, start, strategy):
        a, b = self.put_on(start, strategy)
        c = add_tokens(start.model, start.tokenizer, ["<c>"], strategy=strategy, special=True)
        train(c, seed=5)
        rows_a, rows_c = a.token_rows(), c.token_rows()
        b.detach()
        assert (a.token_ids, c.token_ids) == ([300, 301], [302])
        assert encode(start.tokenizer, "<c></think>") == [302, 301]
        assert same_rows(a.token_rows(), rows_a)
        assert same_rows(c.token_rows(), rows_c)
        a.detach()
        assert c.token_ids == [300]
        c.detach()
        start.assert_as_before()

    @pytest.mark.parametrize("family", list(ALL_TOKENIZERS))
    @pytest.mark.parametrize("order", ["first", "last"])
    def test_every_kind_of_tokenizer(self, family, order):
        start = Start(tokenizer=ALL_TOKENIZERS[family]())
        size = len(start.tokenizer)
        a = add_tokens(start.model, start.tokenizer, A, special=True)
        b = add_tokens(start.model, start.tokenizer, B)
        off, on = (a, b) if order == "first" else (b, a)
        off.detach()
        assert on.token_ids == list(range(size, size + len(on.tokens)))
        assert [encode(start.tokenizer, token) for token in on.tokens] == [[token_id] for token_id in on.token_ids]
        on.detach()
        start.assert_as_before()

    def test_same_tokens_twice_are_refused_and_nothing_changes(self, start, strategy):
        a = add_tokens(start.model, start.tokenizer, A, strategy=strategy)
        rows = a.token_rows()
        start.remember()
        assert "already" in error_of(add_tokens, start.model, start.tokenizer, ["<new>", A[0]], strategy=strategy)
        message = error_of(rows.attach, start.model, start.tokenizer, strategy=strategy)
        assert "'<think>'" in message or "300" in message
        start.assert_as_before()

    def test_another_strategy_is_refused_and_nothing_changes(self, start):
        for one, other in itertools.permutations(["split", "mask"]):
            a = add_tokens(start.model, start.tokenizer, A, strategy=one)
            start.remember()
            for call in (
                lambda other=other: add_tokens(start.model, start.tokenizer, B, strategy=other),
                lambda other=other: train_tokens(start.model, start.tokenizer, ["a"], strategy=other),
            ):
                assert f"has rows attached with strategy={one!r}; rows with strategy={other!r} cannot" in error_of(
                    call
                )
                start.assert_as_before()
            a.detach()

    def test_rows_of_the_vocabulary_beside_new_ones(self, start, strategy):
        a = train_tokens(start.model, start.tokenizer, ["a", "Ġ"], strategy=strategy)
        train(a)
        b = add_tokens(start.model, start.tokenizer, B, strategy=strategy)
        train(b, seed=1)
        rows_b = b.token_rows()
        a.detach()
        assert same_rows(b.token_rows(), rows_b)
        b.verify()
        b.detach()
        start.assert_as_before()


class TestSpareRows:
    """The table is longer than the tokenizer, as Qwen's is."""

    @pytest.mark.parametrize("family", list(ALL_TOKENIZERS))
    def test_are_used_and_nothing_grows(self, family, tied, strategy):
        tokenizer = ALL_TOKENIZERS[family]()
        size = len(tokenizer)
        start = Start(tokenizer=tokenizer, vocab=size + 8, tied=tied)
        storage = start.model.get_input_embeddings().weight.data_ptr()
        partial = add_tokens(start.model, tokenizer, [*A, *B], strategy=strategy)
        assert partial.token_ids == list(range(size, size + 5))
        assert start.model.config.vocab_size == start.model.get_input_embeddings().num_embeddings == size + 8
        assert table_of(start.model).shape == table_of(start.model, "output").shape == (size + 8, 16)
        assert table_of(start.model).data_ptr() == storage
        partial.detach()
        start.assert_as_before()

    def test_get_their_bits_back_after_training(self, kind, tied, strategy):
        start = Start(kind, vocab=320, tied=tied)
        spare = bits(table_of(start.model)[300:])
        partial = add_tokens(start.model, start.tokenizer, A, strategy=strategy)
        train(partial)
        partial.verify()
        rows = partial.detach()
        assert bits(table_of(start.model)[300:]) == spare
        start.assert_as_before()
        again = rows.attach(start.model, start.tokenizer, strategy=strategy)
        again.merge()
        assert torch.equal(table_of(start.model)[300:302], rows.input_rows)
        assert bits(table_of(start.model)[302:]) == spare[2 * 16 * 4 :]

    def test_are_filled_first_and_then_the_table_grows(self, tied, strategy):
        start = Start(vocab=303, tied=tied)
        partial = add_tokens(start.model, start.tokenizer, [*A, *B], strategy=strategy)
        assert partial.token_ids == [300, 301, 302, 303, 304]
        assert start.model.config.vocab_size == table_of(start.model).shape[0] == 305
        train(partial)
        partial.detach()
        start.assert_as_before()

    @pytest.mark.parametrize("order", ["first", "last"])
    def test_of_two_row_sets(self, kind, tied, strategy, order):
        start = Start(kind, vocab=304, tied=tied)
        a = add_tokens(start.model, start.tokenizer, A, strategy=strategy)
        train(a)
        b = add_tokens(start.model, start.tokenizer, B, strategy=strategy)
        train(b, seed=1)
        assert start.model.config.vocab_size == 305
        off, on = (a, b) if order == "first" else (b, a)
        rows = on.token_rows()
        off.detach()
        assert start.model.config.vocab_size == 304
        assert on.token_ids == list(range(300, 300 + len(on.tokens)))
        assert same_rows(on.token_rows(), rows)
        on.detach()
        start.assert_as_before()


class TestTokenizerLongerThanTheTable:
    """As Gemma 3's, which has ids that no row belongs to."""

    def start(self, tied: bool = True) -> Start:
        tokenizer = bpe_tokenizer()
        tokenizer.add_tokens(["<image>", "<audio>"], special_tokens=True)
        return Start(tokenizer=tokenizer, vocab=300, tied=tied)

    def test_new_rows_come_behind_its_last_id(self, tied, strategy):
        start = self.start(tied)
        logits = logits_of(start.model, torch.tensor([[5, 7]]))
        partial = add_tokens(start.model, start.tokenizer, A, strategy=strategy)
        assert partial.token_ids == [302, 303]
        assert start.model.config.vocab_size == table_of(start.model).shape[0] == 304
        assert torch.allclose(logits_of(start.model, torch.tensor([[5, 7]]))[..., :300], logits, atol=1e-6)
        assert logits_of(start.model, torch.tensor([[300, 301, 302, 303]])).isfinite().all()
        train(partial)
        partial.verify()
        partial.detach()
        start.assert_as_before()

    def test_tokens_that_have_no_row_cannot_be_trained(self, strategy):
        start = self.start()
        for tokens in (["<image>"], ["a", "<audio>"], [301]):
            message = error_of(train_tokens, start.model, start.tokenizer, tokens, strategy=strategy)
            assert "300" in message or "301" in message
            start.assert_as_before()

    def test_saved_rows_give_such_tokens_a_row(self, strategy):
        start = self.start()
        rows = TokenRows(tokens=["<audio>", "<image>"], input_rows=torch.randn(2, 16), tied=True)
        partial = rows.attach(start.model, start.tokenizer, strategy=strategy)
        assert partial.token_ids == [301, 300]
        assert start.model.config.vocab_size == 302
        assert torch.equal(partial.token_rows().input_rows, rows.input_rows)
        partial.detach()
        start.assert_as_before()


class TestTrainTokens:
    def test_texts_and_ids_in_any_order(self, kind, tied, strategy):
        start = Start(kind, tied=tied)
        texts = ["a", "<s>", "Ġ", "e"]
        ids = [start.tokenizer.convert_tokens_to_ids(text) for text in texts]
        assert ids != sorted(ids)
        rows = table_of(start.model)[torch.tensor(ids)].clone()
        for tokens in (texts, ids, torch.tensor(ids), tuple(ids), [AddedToken(text) for text in texts]):
            partial = train_tokens(start.model, start.tokenizer, tokens, strategy=strategy)
            assert (partial.token_ids, partial.tokens) == (ids, texts)
            assert torch.equal(partial.token_rows().input_rows, rows)
            partial.detach()
            start.assert_as_before()

    def test_only_these_rows_train(self, kind, tied, strategy):
        start = Start(kind, tied=tied)
        before = table_of(start.model).clone()
        partial = train_tokens(start.model, None, [250, 3, 77], strategy=strategy)
        train(partial)
        partial.verify()
        rows = partial.token_rows()
        partial.merge()
        changed = (table_of(start.model) != before).any(1).nonzero().flatten().tolist()
        assert changed == [3, 77, 250]
        assert torch.equal(table_of(start.model)[torch.tensor([250, 3, 77])], rows.input_rows)

    def test_ids_need_no_tokenizer(self, start, strategy):
        partial = train_tokens(start.model, None, [299, 0, 150], strategy=strategy)
        assert (partial.tokenizer, partial.tokens, partial.token_ids) == (None, [], [299, 0, 150])
        train(partial)
        partial.detach()
        start.assert_as_before()

    def test_rows_start_anew_from_what_their_texts_are_read_as_without_them(self, kind, tied, strategy):
        start = Start(kind, tied=tied)
        *_, (left, right) = json.loads(start.tokenizer._tokenizer.to_str())["model"]["merges"]
        end, word = "</s>", left + right
        before = table_of(start.model).clone()
        head = table_of(start.model, "output").clone()
        partial = train_tokens(start.model, start.tokenizer, [end, word], init="subtoken_mean", strategy=strategy)
        pieces = [[start.tokenizer.convert_tokens_to_ids(p) for p in parts] for parts in (list("</s>"), [left, right])]
        rows = partial.token_rows()
        for row, ids in enumerate(pieces):
            torch.testing.assert_close(rows.input_rows[row], before[ids].mean(0))
            if not tied:
                torch.testing.assert_close(rows.output_rows[row], head[ids].mean(0))
        others = [i for i in range(len(before)) if i not in partial.token_ids]
        train(partial)
        partial.verify()
        assert partial.expand(partial.token_ids) == partial.token_ids
        partial.detach()
        start.assert_as_before()
        assert torch.equal(table_of(start.model)[others], before[others])

    @pytest.mark.parametrize("family", TOKENIZERS)
    @pytest.mark.parametrize("init", ["mean", "positional", "multivariate_normal"])
    def test_rows_start_anew_with_every_kind_of_tokenizer(self, family, init):
        start = Start(tokenizer=TOKENIZERS[family](), vocab=300)
        ids = [3, 30, 40, 50, 60]
        before = table_of(start.model)[ids].clone()
        partial = train_tokens(start.model, start.tokenizer, ids, init=init)
        again = train_tokens(build_model("llama", 300), copy.deepcopy(start.tokenizer), ids, init=init)
        assert torch.equal(partial.token_rows().input_rows, again.token_rows().input_rows)
        assert (partial.token_rows().input_rows != before).any(1).all()
        partial.detach()
        start.assert_as_before()

    def test_the_row_that_starts_anew_enters_no_mean(self):
        start = Start()
        with torch.no_grad():
            table_of(start.model)[3] = 1e6
        start.remember()
        partial = train_tokens(start.model, start.tokenizer, ["</s>"], init="mean")
        assert partial.token_rows().input_rows.abs().max() < 1
        partial.detach()
        start.assert_as_before()

    def test_head_rows_that_do_not_train_do_not_start_anew(self, strategy):
        start = Start(tied=False)
        head = table_of(start.model, "output").clone()
        partial = train_tokens(
            start.model, start.tokenizer, ["</s>"], init="subtoken_mean", output=False, strategy=strategy
        )
        assert torch.equal(table_of(partial.model, "output"), head)
        assert torch.equal(partial.token_rows().output_rows, head[3:4])

    @pytest.mark.parametrize(
        ("tokens", "options", "message"),
        [
            (["</s>"], {"init": "magic"}, "init='magic' is no initialiser"),
            ([305, 5], {"init": "mean"}, "Rows 305, 5 have no text to start anew from"),
            ([5], {"init": "mean", "tokenizer": None}, "there is no tokenizer"),
        ],
    )
    def test_rows_that_cannot_start_anew_change_nothing(self, tokens, options, message):
        start = Start(vocab=310)
        tokenizer = options.get("tokenizer", start.tokenizer)
        assert message in error_of(train_tokens, start.model, tokenizer, tokens, init=options["init"])
        start.assert_as_before()

    def test_tokenizer_keeps_its_tokens_when_the_rows_are_taken_off(self):
        start = Start(tokenizer=unigram_tokenizer())
        piece = start.tokenizer.convert_ids_to_tokens(20)
        train_tokens(start.model, start.tokenizer, [piece, "<s>"]).detach()
        start.assert_as_before()

    def test_spare_rows_can_be_trained_by_id(self, strategy):
        start = Start(vocab=310)
        partial = train_tokens(start.model, start.tokenizer, [305, 5], strategy=strategy)
        assert (partial.token_ids, partial.tokens) == ([305, 5], [])
        train(partial)
        partial.detach()
        start.assert_as_before()

    BAD = {
        "out of range": ([5, 300], "Row ids 300 are outside of a table of 300 rows: valid ids are 0 to 299."),
        "negative": ([5, -1], "Row ids -1 are outside of a table of 300 rows: valid ids are 0 to 299."),
        "twice": ([5, 7, 5], "Row ids are given more than once: 5."),
        "bool": ([True, 5], "Row ids must be whole numbers, but got True, 5."),
        "float": ([5.0], "Row ids must be whole numbers, but got 5.0."),
        "none among ids": ([5, None], "Row ids must be whole numbers, but got 5, None."),
        "float tensor": (torch.tensor([5.0, 6.0]), "Row ids must be whole numbers, but got 5.0, 6.0."),
        "bool tensor": (torch.tensor([True]), "Row ids must be whole numbers, but got True."),
        "empty": ([], "No row ids were given: name at least one row."),
        "mixed": (["a", 5], "Give tokens or ids, not both: 'a', 5."),
        "mixed the other way": ([5, "a"], "Give tokens or ids, not both: 5, 'a'."),
        "missing": (["a", "nope"], "1 token not in the vocabulary: 'nope'. Use add_tokens for new ones."),
        "same text twice": (["a", "a"], "Tokens 'a', 'a' share one row. Give each token once."),
        "a text": ("name", "'name'"),
        "an id": (5, "5"),
        "an id in a tensor": (torch.tensor(5), "5"),
        "none": (None, "None"),
    }

    @pytest.mark.parametrize("case", list(BAD))
    def test_bad_tokens_change_nothing(self, case, strategy):
        tokens, message = self.BAD[case]
        start = Start()
        assert message in error_of(train_tokens, start.model, start.tokenizer, tokens, strategy=strategy)
        start.assert_as_before()

    @pytest.mark.parametrize("tokens", [["a"], [AddedToken("a")]])
    def test_texts_need_a_tokenizer(self, tokens):
        start = Start()
        message = error_of(train_tokens, start.model, None, tokens)
        assert message.startswith("A tokenizer is needed, but got NoneType. Pass the model's tokenizer")
        start.assert_as_before()

    @pytest.mark.parametrize(
        "options", [{"strategy": "magic"}, {"output": "no"}, {"output": False}, {"dtype": torch.int8}]
    )
    def test_bad_options_change_nothing(self, options):
        start = Start()
        error_of(train_tokens, start.model, start.tokenizer, ["a"], **options)
        start.assert_as_before()

    def test_rows_that_another_set_trains_are_named(self, start, strategy):
        first = add_tokens(start.model, start.tokenizer, A, strategy=strategy)
        old = train_tokens(start.model, start.tokenizer, [9, 4, 30], strategy=strategy)
        start.remember()
        for tokens, named in ((["</think>"], "301"), ([30, 8, 4], "4, 30"), ([4, 300], "300")):
            message = error_of(train_tokens, start.model, start.tokenizer, tokens, strategy=strategy)
            assert message == (
                f"Rows {named} are trainable already, in another row set of this model. Train them there, or detach() "
                "that one first."
            )
            start.assert_as_before()
        old.detach()
        train_tokens(start.model, start.tokenizer, [30, 8, 4], strategy=strategy).detach()
        first.verify()

    def test_many_tokens_take_no_more_calls_than_few(self, monkeypatch):
        tokenizer = bpe_tokenizer()
        texts = [f"zq{index}q" for index in range(2000)]
        tokenizer.add_tokens(texts)
        model = build_model(vocab=len(tokenizer))
        calls = []
        for name in ("__call__", "__len__", "get_vocab", "get_added_vocab", "added_tokens_decoder"):
            original = getattr(type(tokenizer), name)
            if isinstance(original, property):

                def read(self, _original=original, _name=name):
                    calls.append(_name)
                    return _original.fget(self)

                monkeypatch.setattr(type(tokenizer), name, property(read))
                continue

            def counted(self, *arguments, _original=original, _name=name, **options):
                calls.append(_name)
                return _original(self, *arguments, **options)

            monkeypatch.setattr(type(tokenizer), name, counted)

        def calls_for(tokens) -> list[str]:
            calls.clear()
            partial = train_tokens(model, tokenizer, tokens)
            assert partial.tokens[0] == texts[0]
            partial.detach()
            return list(calls)

        assert len(calls_for(texts)) == len(calls_for(texts[:5]))
        assert len(calls_for(range(300, 2300))) == len(calls_for(range(300, 305)))


class TestRowsWithoutTokens:
    def test_round_trip_by_id(self, kind, tied, strategy, tmp_path):
        start = Start(kind, tied=tied)
        partial = train_tokens(start.model, None, [250, 3, 77], strategy=strategy)
        train(partial)
        partial.save_pretrained(tmp_path)
        rows = partial.detach()
        start.assert_as_before()
        loaded = TokenRows.from_pretrained(tmp_path)
        assert (loaded.tokens, loaded.token_ids) == ([], [250, 3, 77])
        assert same_rows(loaded, rows)
        for tokenizer in (None, start.tokenizer):
            again = load_tokens(start.model, tokenizer, tmp_path)
            assert (again.token_ids, again.tokens) == ([250, 3, 77], [])
            assert same_rows(again.token_rows(), rows)
            again.detach()
            start.assert_as_before()

    def test_ids_that_the_model_lacks_are_refused(self, strategy):
        start = Start()
        rows = TokenRows(tokens=[], input_rows=torch.randn(2, 16), token_ids=[5, 320], tied=True)
        assert error_of(rows.attach, start.model, None, strategy=strategy) == (
            "Row ids 320 are outside of a table of 300 rows: valid ids are 0 to 299."
        )
        start.assert_as_before()


class TestLoading:
    def saved(self, folder, *, tied: bool = True, special: bool = True):
        there = Start(tied=tied)
        partial = add_tokens(there.model, there.tokenizer, A, special=special)
        train(partial)
        partial.save_pretrained(folder)
        return partial.token_rows()

    @pytest.mark.parametrize("family", list(TOKENIZERS))
    def test_ids_are_given_afresh_by_text(self, family, tmp_path):
        rows = self.saved(tmp_path)
        tokenizer = TOKENIZERS[family]()
        tokenizer.add_tokens(["<mine>"])
        start = Start(tokenizer=tokenizer)
        size = len(tokenizer)
        partial = load_tokens(start.model, tokenizer, tmp_path)
        assert partial.token_ids == [size, size + 1]
        assert [encode(tokenizer, token) for token in A] == [[size], [size + 1]]
        assert tokenizer.decode(partial.token_ids, skip_special_tokens=True) == ""
        assert torch.equal(partial.token_rows().input_rows, rows.input_rows)
        partial.detach()
        start.assert_as_before()

    def test_tokens_that_the_tokenizer_knows_keep_their_ids(self, tmp_path, strategy):
        rows = self.saved(tmp_path)
        tokenizer = bpe_tokenizer()
        tokenizer.add_tokens(["</think>"], special_tokens=True)
        start = Start(tokenizer=tokenizer)
        partial = TokenRows.from_pretrained(tmp_path).attach(start.model, tokenizer, strategy=strategy)
        assert partial.token_ids == [301, 300]
        assert torch.equal(table_of(start.model)[torch.tensor([301, 300])], rows.input_rows)
        partial.detach()
        start.assert_as_before()

    def test_twice_into_one_model_is_refused_and_changes_nothing(self, tmp_path):
        self.saved(tmp_path)
        start = Start()
        first = load_tokens(start.model, start.tokenizer, tmp_path)
        start.remember()
        message = error_of(load_tokens, start.model, start.tokenizer, tmp_path)
        assert message.startswith("Rows 300, 301 are trainable already, in another row set of this model.")
        start.assert_as_before()
        first.verify()

    def test_several_row_sets_one_after_another(self, tmp_path, strategy):
        sets = [["<a>"], ["<b>", "<c>"], ["<d>"]]
        for index, tokens in enumerate(sets):
            there = Start()
            add_tokens(there.model, there.tokenizer, tokens, init="mean").save_pretrained(tmp_path / str(index))
        start = Start()
        partials = [
            TokenRows.from_pretrained(tmp_path / str(index)).attach(start.model, start.tokenizer, strategy=strategy)
            for index in (2, 0, 1)
        ]
        assert [partial.token_ids for partial in partials] == [[300], [301], [302, 303]]
        for partial in (partials[1], partials[0], partials[2]):
            partial.detach()
        start.assert_as_before()

    @pytest.mark.parametrize(
        "tokens, message",
        [
            (["<x>", "<x>"], "Token '<x>' is given twice"),
            (["<x>", ""], "empty string"),
            (["zq\ud800", "<x>"], "no valid Unicode"),
            (["\u00e9zq", "e\u0301zq"], "two Unicode forms"),
        ],
    )
    def test_rows_of_bad_tokens_are_refused(self, tokens, message):
        start = Start()
        assert message in error_of(
            lambda: TokenRows(tokens=tokens, input_rows=torch.randn(2, 16), tied=True).attach(
                start.model, start.tokenizer
            )
        )
        start.assert_as_before()

    def test_rows_of_another_width_are_refused_and_nothing_changes(self, tmp_path, strategy):
        start = Start()
        rows = TokenRows(tokens=A, input_rows=torch.randn(2, 24), tied=True, base_model="some/base")
        assert error_of(rows.attach, start.model, start.tokenizer, strategy=strategy) == (
            "Cannot attach 2 rows of width 24 to LlamaForCausalLM: its input embeddings are 16 wide. The rows were "
            "trained on 'some/base'; load that base model."
        )
        start.assert_as_before()

    def test_head_rows_do_not_go_on_a_tied_head(self, tmp_path, strategy):
        rows = self.saved(tmp_path, tied=False)
        start = Start()
        assert "its head is tied to the input embeddings" in error_of(
            rows.attach, start.model, start.tokenizer, strategy=strategy
        )
        start.assert_as_before()

    def test_nothing_there_to_load(self, tmp_path):
        start = Start()
        assert str(tmp_path / "none") in error_of(load_tokens, start.model, start.tokenizer, tmp_path / "none")
        start.assert_as_before()
