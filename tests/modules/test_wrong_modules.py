"""What `SplitEmbedding`, `SplitLinear` and `mask_gradients` are given by mistake, and what they take."""

from __future__ import annotations

import warnings

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as arrays
from torch import nn

from hf_partial_embed import PartialEmbeddingError, SplitEmbedding, SplitLinear, mask_gradients


class OwnBag(nn.EmbeddingBag):
    pass


def quantised() -> nn.Module:
    module = nn.Embedding(4, 3)
    module.weight = nn.Parameter(torch.zeros(4, 3, dtype=torch.int8), requires_grad=False)
    return module


def quantised_linear() -> nn.Module:
    module = nn.Linear(3, 4)
    module.weight = nn.Parameter(torch.zeros(6, 1, dtype=torch.uint8), requires_grad=False)
    return module


def split() -> nn.Module:
    return SplitEmbedding(nn.Embedding(4, 3), trainable_ids=[1])


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: nn.EmbeddingBag(4, 3), "EmbeddingBag.*mean or sum over each bag"),
        (lambda: OwnBag(4, 3), "OwnBag.*mean or sum over each bag"),
        (lambda: nn.Linear(3, 4), "Linear.*Use SplitLinear"),
        (lambda: nn.Parameter(torch.zeros(4, 3)), "Parameter.*nn.Embedding.from_pretrained"),
        (lambda: torch.zeros(4, 3), "Tensor.*nn.Embedding.from_pretrained"),
        (lambda: None, "NoneType"),
        (lambda: nn.Embedding, "type"),
        (quantised, "torch.int8.*before it is quantised"),
        (split, "is split already"),
    ],
)
def test_split_embedding_names_what_it_was_given(make, message):
    with pytest.raises(PartialEmbeddingError, match=message):
        SplitEmbedding(make(), trainable_ids=[1])


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: nn.Embedding(4, 3), "Embedding.*Use SplitEmbedding"),
        (lambda: nn.EmbeddingBag(4, 3), "EmbeddingBag"),
        (lambda: nn.Conv1d(3, 4, 1), "Conv1d"),
        (lambda: nn.Parameter(torch.zeros(4, 3)), "Parameter"),
        (lambda: None, "NoneType"),
        (quantised_linear, "torch.uint8.*before it is quantised"),
        (lambda: nn.LazyLinear(4), "LazyLinear.*Run it once"),
    ],
)
def test_split_linear_names_what_it_was_given(make, message):
    with pytest.raises(PartialEmbeddingError, match=message):
        SplitLinear(make(), trainable_ids=[1])


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: nn.EmbeddingBag(4, 3), "EmbeddingBag"),
        (lambda: nn.Parameter(torch.zeros(4, 3)), "Parameter"),
        (lambda: None, "NoneType"),
        (split, "SplitEmbedding"),
        (quantised, "torch.int8"),
        (lambda: nn.LazyLinear(4), "LazyLinear.*Run it once"),
    ],
)
def test_mask_gradients_names_what_it_was_given(make, message):
    with pytest.raises(PartialEmbeddingError, match=message):
        mask_gradients(make(), trainable_ids=[1])


def test_a_refused_module_is_as_it_was():
    module = nn.EmbeddingBag(4, 3)
    before = dict(vars(module))
    with pytest.raises(PartialEmbeddingError):
        SplitEmbedding(module, trainable_ids=[1])
    assert type(module) is nn.EmbeddingBag and vars(module) == before and module.weight.requires_grad


@pytest.mark.parametrize("ids", [None, 3, 1.5])
@pytest.mark.parametrize("use", [SplitEmbedding, mask_gradients])
def test_ids_that_are_no_list_are_named(use, ids):
    with pytest.raises(PartialEmbeddingError, match="ids"):
        use(nn.Embedding(4, 3), trainable_ids=ids)


@pytest.mark.parametrize("dtype", [torch.int64, torch.bool, "float32", torch.complex64])
def test_rows_of_a_dtype_that_cannot_train_are_refused(dtype):
    for make in (
        lambda: SplitEmbedding(nn.Embedding(4, 3), trainable_ids=[1], dtype=dtype),
        lambda: SplitLinear(nn.Linear(3, 4), trainable_ids=[1], dtype=dtype),
        lambda: SplitEmbedding.from_pretrained(torch.zeros(4, 3), 1, dtype=dtype),
    ):
        with pytest.raises(PartialEmbeddingError, match="cannot be trained"):
            make()


@pytest.mark.parametrize("size", [-1, 5, 1.5])
def test_a_base_size_outside_of_the_table_is_refused(size):
    for make in (
        lambda: SplitEmbedding(nn.Embedding(4, 3), trainable_ids=[1], base_size=size),
        lambda: SplitLinear(nn.Linear(3, 4), trainable_ids=[1], base_size=size),
    ):
        with pytest.raises(PartialEmbeddingError, match="base_size"):
            make()


def test_a_head_cannot_be_tied_to_an_embedding_that_is_not_split():
    embedding = nn.Embedding(4, 3)
    head = nn.Linear(3, 4, bias=False)
    head.weight = embedding.weight
    with pytest.raises(PartialEmbeddingError, match=r"Embedding.*Split the embedding first"):
        SplitLinear(head, tied_to=embedding)


# --- vectors --------------------------------------------------------------------------------------------------------


@settings(max_examples=40, deadline=None)
@given(
    vectors=arrays.arrays(
        st.sampled_from([np.float16, np.float32, np.float64]),
        arrays.array_shapes(min_dims=2, max_dims=2, max_side=5),
        elements=st.floats(-9, 9, width=16),
    ),
    order=st.sampled_from("CF"),
    writable=st.booleans(),
)
def test_numpy_vectors_give_what_a_tensor_of_them_gives(vectors, order, writable):
    vectors = np.array(vectors, order=order)
    vectors.flags.writeable = writable
    before = vectors.copy()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        module = SplitEmbedding.from_pretrained(vectors, num_new=2, seed=1)
    expected = SplitEmbedding.from_pretrained(torch.tensor(before), num_new=2, seed=1)
    assert torch.equal(module.weight, expected.weight) and module.weight.dtype == expected.weight.dtype
    assert torch.equal(module.new_rows.weight, expected.new_rows.weight)
    ids = torch.arange(len(vectors) + 2)
    module(ids).sum().backward()
    assert np.array_equal(vectors, before)
    assert torch.equal(module(ids)[: len(vectors)].detach(), torch.tensor(before))


def test_the_module_keeps_a_copy_of_the_vectors():
    vectors = np.ones((2, 3), np.float32)
    module = SplitEmbedding.from_pretrained(vectors, num_new=1)
    vectors[:] = 7
    assert torch.equal(module(torch.tensor([0, 1])).detach(), torch.ones(2, 3))


def test_lists_are_vectors_and_numpy_counts_are_counts():
    module = SplitEmbedding.from_pretrained([[1.0, 2.0], [3.0, 4.0]], num_new=np.int64(2))
    assert torch.equal(module(torch.tensor([1])).detach(), torch.tensor([[3.0, 4.0]]))
    assert module.new_rows.weight.shape == (2, 2)


@pytest.mark.parametrize(
    "vectors",
    [
        None, "glove.txt", {"a": [1.0]}, [[1.0], [1.0, 2.0]], [], 3.0, np.zeros((2, 3), np.int64), np.zeros(3),
        np.array([["a"]]), torch.zeros(2, 3).to_sparse(), torch.zeros(2, 3, dtype=torch.complex64),
        nn.Embedding(2, 3),
    ],
    ids=lambda vectors: type(vectors).__name__,
)  # fmt: skip
def test_vectors_that_are_no_matrix_are_named(vectors):
    with pytest.raises(PartialEmbeddingError, match="floating-point matrix"):
        SplitEmbedding.from_pretrained(vectors, num_new=1)


# --- TorchScript ----------------------------------------------------------------------------------------------------


def modules() -> list[tuple[nn.Module, torch.Tensor]]:
    torch.manual_seed(0)
    return [
        (SplitEmbedding.from_pretrained(torch.randn(5, 3), num_new=2), torch.tensor([1, 6])),
        (SplitEmbedding(nn.Embedding(5, 3), trainable_ids=[3, 1]), torch.tensor([1, 4])),
        (SplitLinear(nn.Linear(3, 5), trainable_ids=[3, 1]), torch.randn(2, 3)),
    ]


@pytest.mark.filterwarnings("ignore:.*torch.jit:DeprecationWarning")
def test_scripting_is_refused_with_what_works_in_its_place():
    for module, example in modules():
        for whole in (module, nn.Sequential(module)):
            with pytest.raises(PartialEmbeddingError, match=r"torch\.export\.export, or script a copy"):
                torch.jit.script(whole)
        exported = torch.export.export(module, (example,)).module()
        assert torch.equal(exported(example), module(example))


@pytest.mark.filterwarnings("ignore:.*torch.jit:DeprecationWarning")
def test_a_plain_module_with_the_rows_written_in_can_be_scripted():
    module, example = modules()[0]
    plain = nn.Embedding.from_pretrained(module.weight.detach().clone())
    assert torch.equal(torch.jit.script(plain)(example), module(example))
