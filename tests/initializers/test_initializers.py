"""Where new rows start. Through `add_tokens`."""

from __future__ import annotations

import pytest
import torch
from added import add_tokens
from conftest import (
    TOKENIZERS,
    bpe_tokenizer,
    build_model,
    logits_of,
    snapshot,
    table_of,
    unigram_tokenizer,
    wordpiece_tokenizer,
)
from states import ALL_TOKENIZERS, assert_same, model_state, tokenizer_state
from tokenizers import AddedToken, Tokenizer, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from hf_partial_embed import PartialEmbeddingError
from hf_partial_embed.initializers import INITIALIZERS, register

HUGE = 1e30
WORDS = ["<think>", "dysprosium name"]


@pytest.fixture(params=list(ALL_TOKENIZERS))
def any_tokenizer(request):
    return ALL_TOKENIZERS[request.param]()


def pieces_of(tokenizer, text: str) -> list[int]:
    """Ids of the text's pieces without padding and unknown ones, as the tokenizer has them now."""
    ids = tokenizer(text, add_special_tokens=False)["input_ids"]
    return [token_id for token_id in ids if token_id not in (tokenizer.unk_token_id, tokenizer.pad_token_id)]


def mean_of(table: torch.Tensor, ids) -> torch.Tensor:
    return table[torch.tensor(list(ids))].double().mean(0).float()


def bias_of(model) -> torch.Tensor:
    return dict(model.get_output_embeddings().named_parameters(recurse=False))["bias"].detach()


class TestSubtokenMean:
    @pytest.mark.parametrize("kind", ["llama", "phi", "gpt2", "bert", "t5"])
    def test_input_rows_come_from_input_rows_and_head_rows_from_head_rows(self, kind, tied, strategy):
        tokenizer = bpe_tokenizer()
        model = build_model(kind, tied=tied)
        inputs, heads = table_of(model).clone(), table_of(model, "output").clone()
        pieces = [pieces_of(tokenizer, word) for word in WORDS]
        rows = add_tokens(model, tokenizer, WORDS, strategy=strategy).token_rows()
        assert torch.equal(rows.input_rows, torch.stack([mean_of(inputs, ids) for ids in pieces]))
        if tied:
            assert rows.output_rows is None
        else:
            assert not torch.equal(inputs, heads)
            assert torch.equal(rows.output_rows, torch.stack([mean_of(heads, ids) for ids in pieces]))

    @pytest.mark.parametrize("kind", ["phi", "bert"])
    def test_entries_of_a_head_bias_come_from_its_entries(self, kind, tied):
        tokenizer = bpe_tokenizer()
        model = build_model(kind, tied=tied)
        bias = bias_of(model).clone()
        pieces = [pieces_of(tokenizer, word) for word in WORDS]
        rows = add_tokens(model, tokenizer, WORDS).token_rows()
        assert bias.abs().min() > 0
        assert torch.equal(rows.output_bias, torch.stack([mean_of(bias, ids) for ids in pieces]))

    def test_pieces_are_those_that_each_tokenizer_read_before(self, any_tokenizer):
        tokenizer = any_tokenizer
        model = build_model(vocab=len(tokenizer))
        words = ["<think>", "elementname", "nametalking"]
        pieces = [pieces_of(tokenizer, word) for word in words]
        assert all(len(ids) > 1 for ids in pieces)
        rows = add_tokens(model, tokenizer, words, special=True).token_rows()
        assert torch.equal(rows.input_rows, torch.stack([mean_of(table_of(model), ids) for ids in pieces]))

    def test_a_later_token_may_consist_of_an_earlier_one(self):
        tokenizer = bpe_tokenizer()
        model = build_model()
        first = add_tokens(model, tokenizer, ["zqx"])
        with torch.no_grad():
            next(first.parameters()).fill_(3.0)
        assert pieces_of(tokenizer, "azqx")[1:] == first.token_ids
        second = add_tokens(model, tokenizer, ["azqx"])
        a = table_of(model)[tokenizer.get_vocab()["a"]]
        assert torch.equal(second.token_rows().input_rows[0], ((a.double() + 3.0) / 2).float())

    def test_pieces_that_occur_twice_count_twice(self):
        tokenizer = bpe_tokenizer()
        model = build_model()
        ids = pieces_of(tokenizer, "zzzq")
        assert len(ids) == 4
        rows = add_tokens(model, tokenizer, ["zzzq"]).token_rows()
        table = table_of(model).double()
        expected = (3 * table[ids[0]] + table[ids[3]]) / 4
        assert torch.allclose(rows.input_rows[0].double(), expected, atol=1e-7)

    def test_unknown_pieces_do_not_enter(self):
        tokenizer = unigram_tokenizer()
        model = build_model(vocab=len(tokenizer))
        with torch.no_grad():
            model.get_input_embeddings().weight[tokenizer.unk_token_id] = HUGE
        rows = add_tokens(model, tokenizer, ["name☃name"]).token_rows()
        assert rows.input_rows.abs().max() < 1

    def test_token_of_unknown_pieces_only_starts_at_the_mean_of_all_rows(self):
        tokenizer = wordpiece_tokenizer()
        model = build_model(vocab=len(tokenizer))
        every = [index for index in range(len(tokenizer)) if index != tokenizer.pad_token_id]
        rows = add_tokens(model, tokenizer, ["☃", "文"]).token_rows()
        expected = mean_of(table_of(model), every)
        assert torch.allclose(rows.input_rows, torch.stack([expected, expected]), atol=1e-7)

    def test_mean_of_half_precision_rows_is_not_rounded(self):
        tokenizer = bpe_tokenizer()
        model = build_model(dtype=torch.bfloat16)
        rows = add_tokens(model, tokenizer, WORDS).token_rows()
        expected = mean_of(table_of(model), pieces_of(bpe_tokenizer(), WORDS[0]))
        assert rows.input_rows.dtype == torch.float32
        assert torch.equal(rows.input_rows[0], expected)
        assert not torch.equal(expected, expected.bfloat16().float())


class TestMean:
    @pytest.mark.parametrize("kind", ["llama", "phi"])
    def test_every_token_starts_at_the_mean_of_each_table(self, kind, tied):
        tokenizer = bpe_tokenizer()
        model = build_model(kind, tied=tied)
        every = [index for index in range(300) if index != tokenizer.pad_token_id]
        tables = {"input_rows": table_of(model).clone()}
        if not tied:
            tables["output_rows"] = table_of(model, "output").clone()
        if kind == "phi":
            tables["output_bias"] = bias_of(model).clone()
        rows = add_tokens(model, tokenizer, WORDS, init="mean").token_rows().tensors()
        assert set(rows) == set(tables)
        for name, table in tables.items():
            expected = mean_of(table, every).expand(2, *table.shape[1:])
            assert torch.allclose(rows[name], expected, atol=1e-7), name

    def test_large_tables_are_summed_in_parts(self):
        tokenizer = bpe_tokenizer()
        tokenizer.add_tokens([f"<filler {index}>" for index in range(8500)])
        model = build_model(vocab=len(tokenizer))
        every = [index for index in range(len(tokenizer)) if index != tokenizer.pad_token_id]
        assert len(tokenizer) > 8192
        rows = add_tokens(model, tokenizer, ["<think>"], init="mean").token_rows()
        assert torch.allclose(rows.input_rows[0], mean_of(table_of(model), every), atol=1e-7)


@pytest.mark.parametrize("init", ["mean", "subtoken_mean"])
class TestRowsThatEnterNoMean:
    """The rows that must stay out are huge here, so that one of them would show."""

    def rows(self, model, tokenizer, init, untrained: list[int]) -> dict[str, torch.Tensor]:
        with torch.no_grad():
            for table in (model.get_input_embeddings().weight, model.get_output_embeddings().weight):
                table[torch.tensor(untrained)] = HUGE
        # WordPiece does not know the second one, and the third one has padding in it.
        tokens = ["nametalk", "☃☃", AddedToken("na<pad>me", normalized=False)]
        return add_tokens(model, tokenizer, tokens, init=init).token_rows().tensors()

    @pytest.mark.parametrize("family", list(TOKENIZERS))
    def test_spare_rows_and_padding(self, init, family):
        tokenizer = TOKENIZERS[family]()
        size = len(tokenizer)
        model = build_model(vocab=size + 20, tied=False)
        rows = self.rows(model, tokenizer, init, [tokenizer.pad_token_id, *range(size, size + 20)])
        assert set(rows) == {"input_rows", "output_rows"}
        assert all(values.abs().max() < 1 for values in rows.values())

    def test_padding_of_the_tokenizer_where_the_embedding_knows_of_none(self, init):
        tokenizer = bpe_tokenizer()
        model = build_model("gpt2", tied=False)
        assert model.get_input_embeddings().padding_idx is None
        rows = self.rows(model, tokenizer, init, [tokenizer.pad_token_id])
        assert all(values.abs().max() < 1 for values in rows.values())

    def test_padding_of_the_embedding_where_the_tokenizer_knows_of_none(self, init):
        tokenizer = PreTrainedTokenizerFast(tokenizer_object=bpe_tokenizer()._tokenizer, unk_token="<unk>")
        assert tokenizer.pad_token_id is None
        model = build_model()
        assert model.get_input_embeddings().padding_idx == 1
        rows = self.rows(model, tokenizer, init, [1])
        assert all(values.abs().max() < 1 for values in rows.values())

    def test_rows_that_only_the_tokenizer_has(self, init):
        tokenizer = bpe_tokenizer()
        tokenizer.add_tokens(["talk"])
        model = build_model()
        rows = self.rows(model, tokenizer, init, [tokenizer.pad_token_id])
        assert model.get_input_embeddings().num_embeddings == 304
        assert all(0 < values.abs().max() < 1 for values in rows.values())

    def test_rows_in_gaps_between_ids(self, init):
        vocabulary = {text: index for index, text in enumerate(["<unk>", "<pad>", *"abcdef"])}
        vocabulary |= {"name": 40, "the": 41, "talk": 42, "##talk": 43, "na": 44, "me": 45, "##me": 46}
        backend = Tokenizer(models.WordPiece(vocabulary, unk_token="<unk>"))
        backend.pre_tokenizer = pre_tokenizers.Whitespace()
        tokenizer = PreTrainedTokenizerFast(tokenizer_object=backend, unk_token="<unk>", pad_token="<pad>")
        model = build_model(vocab=47)
        before = table_of(model).clone()
        rows = self.rows(model, tokenizer, init, [1, *range(8, 40)])
        assert rows["input_rows"].abs().max() < 1
        if init == "subtoken_mean":
            assert torch.equal(rows["input_rows"][0], mean_of(before, [40, 43]))


class TestDescriptions:
    @pytest.mark.parametrize("special", [False, True])
    def test_row_is_the_mean_of_the_descriptions_pieces(self, any_tokenizer, special, tied):
        tokenizer = any_tokenizer
        model = build_model(vocab=len(tokenizer), tied=tied)
        heads = table_of(model, "output").clone()
        starts = {"<zq1>": "the name is.", "<zq2>": "name"}
        pieces = [pieces_of(tokenizer, text) for text in starts.values()]
        rows = add_tokens(model, tokenizer, starts, special=special).token_rows()
        assert torch.equal(rows.input_rows, torch.stack([mean_of(table_of(model), ids) for ids in pieces]))
        if not tied:
            assert torch.equal(rows.output_rows, torch.stack([mean_of(heads, ids) for ids in pieces]))

    def test_description_of_one_word_is_that_words_row(self):
        tokenizer = bpe_tokenizer()
        model = build_model()
        rows = add_tokens(model, tokenizer, {"<x>": "</s>"}).token_rows()
        assert torch.equal(rows.input_rows[0], table_of(model)[3])

    def test_description_counts_beside_another_initialiser(self):
        tokenizer = bpe_tokenizer()
        model = build_model()
        expected = mean_of(table_of(model), pieces_of(tokenizer, "a name"))
        rows = add_tokens(model, tokenizer, {"<x>": "a name", "<y>": torch.ones(16)}, init="mean").token_rows()
        assert torch.equal(rows.input_rows[0], expected)

    @pytest.mark.parametrize("text", ["", "☃", "<unk>"])
    def test_description_without_known_words_is_refused(self, text):
        tokenizer = wordpiece_tokenizer()
        model = build_model(vocab=len(tokenizer))
        before, model_before = tokenizer_state(tokenizer), model_state(model)
        with pytest.raises(PartialEmbeddingError) as caught:
            add_tokens(model, tokenizer, {"<x>": "name", "<y>": text, "<z>": text})
        assert str(caught.value) == "The descriptions of '<y>', '<z>' have no tokens. Describe them in words."
        assert_same(before, tokenizer_state(tokenizer))
        assert_same(model_before, model_state(model))

    def test_description_of_padding_only_is_refused(self):
        tokenizer = bpe_tokenizer()
        model = build_model()
        with pytest.raises(PartialEmbeddingError, match="The descriptions of '<x>' have no tokens"):
            add_tokens(model, tokenizer, {"<x>": "<pad>"})


class TestGivenRows:
    @pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16, torch.float16])
    def test_tensor_is_the_input_row(self, dtype, strategy):
        tokenizer = bpe_tokenizer()
        model = build_model(tied=False)
        heads = table_of(model, "output").clone()
        given = torch.randn(2, 16).to(dtype)
        pieces = pieces_of(tokenizer, "<x>")
        partial = add_tokens(model, tokenizer, {"<x>": given[0], "<y>": given[1]}, strategy=strategy)
        rows = partial.token_rows()
        assert torch.equal(rows.input_rows, given.float())
        assert torch.equal(rows.output_rows[0], mean_of(heads, pieces))

    def test_tensors_and_descriptions_may_be_mixed(self):
        tokenizer = bpe_tokenizer()
        model = build_model()
        given = torch.randn(16)
        expected = mean_of(table_of(model), pieces_of(tokenizer, "the name"))
        rows = add_tokens(model, tokenizer, {"<x>": "the name", "<y>": given, "<z>": "the name"}).token_rows()
        assert torch.equal(rows.input_rows, torch.stack([expected, given, expected]))

    def test_given_tensor_is_copied(self):
        given = torch.randn(16, requires_grad=True)
        partial = add_tokens(build_model(), bpe_tokenizer(), {"<x>": given})
        with torch.no_grad():
            next(partial.parameters()).zero_()
        assert given.abs().min() > 0
        assert given.grad is None


class TestCallables:
    def test_called_once_for_each_table(self):
        seen = []

        def ones(request):
            seen.append(request)
            return torch.ones(len(request.tokens), *request.table.shape[1:])

        tokenizer = bpe_tokenizer()
        model = build_model("phi", tied=False)
        rows = add_tokens(model, tokenizer, WORDS, init=ones).token_rows().tensors()
        assert [request.role for request in seen] == ["input", "output", "bias"]
        assert [tuple(request.table.shape) for request in seen] == [(300, 16), (300, 16), (300,)]
        assert all(bool((values == 1).all()) for values in rows.values())
        fresh = bpe_tokenizer()
        for request in seen:
            assert request.tokens == WORDS
            assert [list(ids) for ids in request.pieces] == [pieces_of(fresh, word) for word in WORDS]
            assert request.trained_rows.tolist() == [index != 1 for index in range(300)]
            assert request.model is model
            assert request.tokenizer is tokenizer

    def test_sees_model_and_tokenizer_before_anything_is_added(self):
        sizes = []

        def init(request):
            sizes.append((len(request.tokenizer), request.model.config.vocab_size, len(request.table)))
            return torch.zeros(len(request.tokens), *request.table.shape[1:])

        add_tokens(build_model(), bpe_tokenizer(), WORDS, init=init)
        assert sizes == [(300, 300, 300)]

    def test_random_rows_follow_the_seed(self):
        def noise(request):
            return torch.randn(len(request.tokens), *request.table.shape[1:], generator=request.generator)

        def rows(seed):
            state = torch.random.get_rng_state()
            rows = add_tokens(build_model(), bpe_tokenizer(), WORDS, init=noise, seed=seed).token_rows().input_rows
            torch.random.set_rng_state(state)
            return rows

        assert torch.equal(rows(3), rows(3))
        assert not torch.equal(rows(3), rows(4))

    def test_half_precision_and_whole_numbers_are_converted(self):
        for dtype in (torch.bfloat16, torch.float64, torch.int64):
            init = lambda request, dtype=dtype: torch.ones(1, 16, dtype=dtype)  # noqa: E731
            rows = add_tokens(build_model(), bpe_tokenizer(), ["<x>"], init=init).token_rows()
            assert torch.equal(rows.input_rows, torch.ones(1, 16))

    def test_rows_with_a_graph_are_cut_from_it(self):
        weight = torch.ones(1, 16, requires_grad=True)
        partial = add_tokens(build_model(), bpe_tokenizer(), ["<x>"], init=lambda request: weight * 2)
        (parameter,) = partial.parameters()
        assert parameter.is_leaf
        assert torch.equal(parameter.detach(), torch.full((1, 16), 2.0))

    def test_message_names_the_initialiser_and_both_shapes(self):
        def transposed(request):
            return torch.zeros(16, 2)

        with pytest.raises(PartialEmbeddingError) as caught:
            add_tokens(build_model(), bpe_tokenizer(), WORDS, init=transposed)
        assert str(caught.value) == (
            "The initialiser 'transposed' gave a tensor of shape (16, 2) for the input rows of 2 tokens; a tensor of "
            "shape (2, 16) is needed."
        )

    def test_message_names_the_tokens_whose_rows_are_not_finite(self):
        class Half:
            def __call__(self, request):
                rows = torch.zeros(2, 16)
                rows[1, 3] = torch.nan
                return rows

        with pytest.raises(PartialEmbeddingError) as caught:
            add_tokens(build_model(), bpe_tokenizer(), WORDS, init=Half())
        assert str(caught.value) == (
            "The initialiser 'Half' gave infinite or NaN values for 'dysprosium name', in the input rows; finite ones "
            "are needed."
        )

    def test_registered_name(self, monkeypatch):
        copied = dict(INITIALIZERS)
        for module in ("registry", "by_name"):
            monkeypatch.setattr(f"hf_partial_embed.initializers.{module}.INITIALIZERS", copied)

        @register("sevens")
        def sevens(request):
            return torch.full((len(request.tokens), *request.table.shape[1:]), 7.0)

        rows = add_tokens(build_model(), bpe_tokenizer(), WORDS, init="sevens").token_rows()
        assert bool((rows.input_rows == 7).all())

    def test_unknown_name(self):
        with pytest.raises(PartialEmbeddingError) as caught:
            add_tokens(build_model(), bpe_tokenizer(), WORDS, init="subtoken-mean")
        assert str(caught.value) == (
            f"init='subtoken-mean' is no initialiser. Choose one of {sorted(INITIALIZERS)}, or pass a function."
        )


@pytest.mark.parametrize("init", ["mean", "subtoken_mean"])
def test_initialisation_changes_no_old_row_and_no_old_logit(init, strategy, tied):
    tokenizer = bpe_tokenizer()
    model = build_model("phi", tied=tied)
    ids = torch.tensor([[5, 70, 3, 299]])
    before, logits = snapshot(model), logits_of(model, ids)
    add_tokens(model, tokenizer, WORDS, init=init, strategy=strategy)
    after = snapshot(model)
    for name, value in before.items():
        assert torch.equal(after[name][: len(value)] if value.dim() else after[name], value), name
    assert torch.allclose(logits_of(model, ids)[..., :300], logits, atol=1e-6)
