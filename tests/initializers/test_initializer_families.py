"""Initialisers that read tables only: normal, positional, copy, description, vectors, donor. Through `add_tokens`."""

from __future__ import annotations

import logging

import pytest
import torch
from added import add_tokens
from conftest import bpe_tokenizer, build_model, table_of, unigram_tokenizer, wordpiece_tokenizer
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import AddedToken

from hf_partial_embed import PartialEmbeddingError
from hf_partial_embed.initializers import (
    Copy,
    Description,
    Donor,
    MultivariateNormal,
    Positional,
    Vectors,
    entmax15,
    sparsemax,
)

HUGE = 1e30
WORDS = ["<think>", "dysprosium name"]


def rows_of(init, tokens=WORDS, *, model=None, tokenizer=None, seed=0):
    partial = add_tokens(model or build_model(), tokenizer or bpe_tokenizer(), tokens, init=init, seed=seed)
    return partial.token_rows()


def pieces_of(text: str) -> list[int]:
    return bpe_tokenizer()(text, add_special_tokens=False)["input_ids"]


def shared_words(tokenizer=None) -> dict[int, str]:
    """Ids of the tokens that are words of letters, with the word."""
    vocabulary = (tokenizer or bpe_tokenizer()).get_vocab()
    words = {token_id: text.removeprefix("Ġ") for text, token_id in vocabulary.items()}
    return {token_id: word for token_id, word in sorted(words.items()) if word.isalpha() and word.isascii()}


class TestMultivariateNormal:
    def test_mean_and_full_covariance_are_those_of_the_trained_rows(self):
        model = build_model(tied=False)
        table = table_of(model)
        with torch.no_grad():  # correlated, and not centred
            table.copy_(torch.randn(300, 16) @ torch.randn(16, 16) + torch.arange(16.0))
            table[1] = HUGE  # the padding
        trained = torch.cat([table[:1], table[2:]]).double()
        rows = rows_of("multivariate_normal", [f"<w{i}>" for i in range(4000)], model=model).input_rows.double()
        deviations = trained.std(0)
        assert ((rows.mean(0) - trained.mean(0)) / deviations).abs().max() < 0.1
        scaled = [(values - values.mean(0)) / deviations for values in (rows, trained)]
        covariances = [values.T @ values / len(values) for values in scaled]
        assert (covariances[0] - covariances[1]).abs().max() < 0.12

    def test_covariance_of_fewer_rows_than_dimensions(self):
        tokenizer = wordpiece_tokenizer()
        model = build_model(vocab=len(tokenizer), tied=False)
        with torch.no_grad():
            table_of(model)[:, 5] = 3.0  # a dimension without variance
        rows = rows_of("multivariate_normal", ["<x>", "<y>"], model=model, tokenizer=tokenizer).input_rows
        assert torch.allclose(rows[:, 5], torch.full((2,), 3.0), atol=1e-5)
        assert rows[0, :5].std() > 0

    def test_each_table_has_its_own(self):
        rows = rows_of("multivariate_normal", model=build_model("phi", tied=False)).tensors()
        assert set(rows) == {"input_rows", "output_rows", "output_bias"}
        assert rows["output_bias"].unique().numel() == 2

    def test_scale_zero_is_the_mean(self):
        means = rows_of("mean").input_rows
        assert torch.allclose(rows_of(MultivariateNormal(scale=0)).input_rows, means, atol=1e-6)

    def test_rows_more_scattered_than_the_old_ones_are_refused(self):
        with pytest.raises(PartialEmbeddingError, match="Give a number from 0 to 1"):
            MultivariateNormal(scale=1.5)


class TestPositional:
    def test_last_piece_counts_most_for_input_and_first_for_output(self):
        model = build_model(tied=False)
        tables = table_of(model).clone(), table_of(model, "output").clone()
        ids = torch.tensor(pieces_of(WORDS[1]))
        weights = torch.softmax(2 * torch.arange(len(ids), dtype=torch.float64), 0)
        rows = rows_of("positional", model=model)
        assert torch.allclose(rows.input_rows[1].double(), weights @ tables[0][ids].double(), atol=1e-7)
        assert torch.allclose(rows.output_rows[1].double(), weights.flip(0) @ tables[1][ids].double(), atol=1e-7)

    def test_rate_zero_is_the_mean_of_the_pieces(self):
        assert torch.allclose(rows_of(Positional(rate=0)).input_rows, rows_of("subtoken_mean").input_rows, atol=1e-7)


class TestCopy:
    @pytest.mark.parametrize("how", ["dict", "mapping", "one"])
    def test_row_is_that_of_the_source(self, how, tied):
        model = build_model(tied=tied)
        table = table_of(model).clone()
        tokens, init = {
            "dict": ({"<x>": "</s>", "<y>": "</s>"}, "copy"),
            "mapping": (["<x>", "<y>"], Copy({"<x>": "</s>", "<y>": "</s>"})),
            "one": (["<x>", "<y>"], Copy("</s>")),
        }[how]
        rows = rows_of(init, tokens, model=model)
        assert torch.equal(rows.input_rows, table[[3, 3]])

    def test_source_of_several_pieces_is_refused(self):
        with pytest.raises(PartialEmbeddingError, match="'<think>', 'dysprosium name' have no single token"):
            rows_of("copy")


class TestDescription:
    def test_row_is_the_mean_of_the_pieces(self):
        ids = pieces_of("the name")
        expected = table_of(build_model())[torch.tensor(ids)].double().mean(0).float()
        for tokens, init in (({"<x>": "the name"}, "description"), (["<x>"], Description({"<x>": "the name"}))):
            assert torch.equal(rows_of(init, tokens).input_rows[0], expected)

    @pytest.mark.parametrize("init", ["description", Description({"<think>": "a name"})])
    def test_token_without_a_description_is_refused(self, init):
        with pytest.raises(PartialEmbeddingError, match="'dysprosium name' have no description"):
            rows_of(init)


@settings(max_examples=60, deadline=None)
@given(st.lists(st.floats(-20, 20), min_size=1, max_size=12), st.booleans())
def test_sparse_weights_are_the_optimum_that_defines_them(numbers, sparse):
    scores = torch.tensor(numbers, dtype=torch.float64)
    weights = sparsemax(scores) if sparse else entmax15(scores)
    assert weights.min() >= 0
    assert weights.sum().item() == pytest.approx(1, abs=1e-8)
    # On the support the gradient of the regularised score is one number, and nowhere else is it larger.
    gradient = scores - weights if sparse else scores - 2 * weights.sqrt()
    support = weights > 1e-12
    top = gradient[support].max()
    assert torch.allclose(gradient[support], top, atol=1e-5)
    assert not (gradient[~support] > top + 1e-5).any()


class TestVectors:
    @pytest.fixture
    def tables(self):
        """A model whose rows are a linear image of the words' vectors, and vectors of new words."""
        tokenizer, model = bpe_tokenizer(), build_model(tied=False)
        generator = torch.Generator().manual_seed(5)
        words = shared_words()
        vectors = {word: torch.randn(8, generator=generator) for word in words.values()}
        mapping, shift = torch.linalg.qr(torch.randn(16, 8, generator=generator))[0].T, torch.randn(16)
        vectors["zqx"] = torch.randn(8, generator=generator)
        with torch.no_grad():
            for token_id, word in words.items():
                table_of(model)[token_id] = vectors[word] @ mapping + shift
            table_of(model)[1] = HUGE
        return model, tokenizer, vectors, vectors["zqx"] @ mapping + shift

    @pytest.mark.parametrize("method", ["ridge", "procrustes"])
    def test_linear_image_is_found_again(self, tables, method):
        model, tokenizer, vectors, expected = tables
        init = Vectors({word: vector.numpy() for word, vector in vectors.items()}, method=method)
        rows = rows_of(init, [" zqx", " Zqx"], model=model, tokenizer=tokenizer)
        assert torch.allclose(rows.input_rows, expected.expand(2, 16), atol=1e-3)

    @pytest.mark.parametrize("weighting", ["sparsemax", "entmax15"])
    def test_neighbours_of_a_known_word_are_that_word(self, tables, weighting):
        model, tokenizer, vectors, _ = tables
        known = next(iter(shared_words().items()))
        vectors["zqx"] = 3 * vectors[known[1]]
        same = [token_id for token_id, word in shared_words().items() if word == known[1]]
        expected = table_of(model)[same].mean(0)
        init = Vectors(vectors, method="neighbours", weighting=weighting, temperature=1e-3)
        rows = rows_of(init, [" zqx"], model=model, tokenizer=tokenizer)
        assert torch.allclose(rows.input_rows[0], expected, atol=1e-4)

    def test_word_without_a_vector_starts_at_its_pieces_and_is_named(self, tables, caplog):
        model, tokenizer, vectors, expected = tables
        with caplog.at_level(logging.WARNING):
            rows = rows_of(Vectors(vectors), [" zqx", "<none>"], model=model, tokenizer=tokenizer).input_rows
        assert "No vector for '<none>'" in caplog.text
        pieces = table_of(model)[torch.tensor(pieces_of("<none>"))].mean(0)
        assert torch.allclose(rows[1], pieces, atol=1e-6)
        assert torch.allclose(rows[0], expected, atol=1e-3)

    def test_no_shared_word_is_an_error(self):
        with pytest.raises(PartialEmbeddingError, match=r"share 0 words; at least two"):
            rows_of(Vectors({"zqx": torch.ones(3)}), ["zqx"])

    @pytest.mark.parametrize("option", [{"method": "nearest"}, {"weighting": "softmax"}, {"temperature": 0}])
    def test_unknown_options(self, option):
        with pytest.raises(PartialEmbeddingError, match=next(iter(option))):
            Vectors({}, **option)


class TestDonor:
    def test_combination_of_shared_tokens_is_carried_over(self):
        donor, donor_tokenizer = build_model(seed=3), bpe_tokenizer()
        donor_tokenizer.add_tokens([AddedToken("zqx", normalized=False)])
        donor.resize_token_embeddings(301, mean_resizing=False)
        a, b = 60, 200
        with torch.no_grad():
            table_of(donor)[300] = 2 * table_of(donor)[a] - 0.5 * table_of(donor)[b]
        model = build_model(tied=False)
        tables = table_of(model).clone(), table_of(model, "output").clone()
        rows = rows_of(Donor(donor, donor_tokenizer, nonzero=2), ["zqx"], model=model)
        for made, table in zip((rows.input_rows, rows.output_rows), tables, strict=True):
            assert torch.allclose(made[0], 2 * table[a] - 0.5 * table[b], atol=1e-5)

    def test_donor_of_another_width_and_family(self):
        donor_tokenizer = unigram_tokenizer()
        donor = build_model("gpt2", vocab=len(donor_tokenizer))
        rows = rows_of(Donor(donor, donor_tokenizer, nonzero=4), ["nametalk"])
        assert rows.input_rows.abs().max() > 0

    def test_missing_library_is_named(self, monkeypatch):
        monkeypatch.setitem(__import__("sys").modules, "sklearn.linear_model", None)
        with pytest.raises(PartialEmbeddingError, match=r'pip install "hf_partial_embed\[init\]"'):
            rows_of(Donor(build_model(), bpe_tokenizer()))

    def test_token_that_the_donor_cannot_read(self):
        tokenizer = wordpiece_tokenizer()
        donor = build_model(vocab=len(tokenizer))
        with pytest.raises(PartialEmbeddingError, match="cannot read '☃'"):
            rows_of(Donor(donor, tokenizer), ["☃"])


def loud_vectors() -> dict[str, torch.Tensor]:
    words = list(dict.fromkeys(shared_words().values()))
    vectors = {word: torch.randn(4, generator=torch.Generator().manual_seed(i)) for i, word in enumerate(words)}
    return {**vectors, "<think>": torch.full((4,), 1e4), "dysprosium name": torch.full((4,), -1e4)}


@pytest.mark.parametrize(
    "make",
    [
        lambda: "mean",
        lambda: "subtoken_mean",
        lambda: "positional",
        lambda: "multivariate_normal",
        lambda: Vectors(loud_vectors()),
        lambda: Vectors(loud_vectors(), method="procrustes"),
        lambda: Vectors(loud_vectors(), method="neighbours"),
        lambda: Donor(build_model(seed=4), bpe_tokenizer()),
    ],
    ids=["mean", "subtoken_mean", "positional", "normal", "ridge", "procrustes", "neighbours", "donor"],
)
def test_no_row_of_a_tied_head_is_longer_than_the_longest_old_one(make):
    model = build_model()
    with torch.no_grad():
        table_of(model)[1] = HUGE  # the padding is no measure
    trained = torch.cat([table_of(model)[:1], table_of(model)[2:]])
    longest = trained.norm(dim=1).max()
    assert (rows_of(make(), model=model).input_rows.norm(dim=1) <= longest * (1 + 1e-5)).all()
