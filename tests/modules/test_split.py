"""`SplitEmbedding` and `SplitLinear` in plain PyTorch."""

from __future__ import annotations

import copy
import io
import pickle
import subprocess
import sys

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from hf_partial_embed import PartialEmbeddingError, SplitEmbedding, SplitLinear
from hf_partial_embed.modules.rows import NewRows


class ScaledEmbedding(nn.Embedding):
    """Dresses the lookup of its base class, like Gemma's."""

    def forward(self, input):
        return super().forward(input) * 3.0


class NormedEmbedding(nn.Embedding):
    """Reads its weight itself, and never calls its base class."""

    def forward(self, input):
        return F.embedding(input, F.normalize(self.weight, dim=-1))


class TransposedLinear(nn.Linear):
    """A head with a product of its own."""

    def forward(self, input):
        out = input @ self.weight.T
        return out if self.bias is None else out + self.bias


def embedding(size: int = 10, width: int = 4, cls=nn.Embedding, **options) -> nn.Embedding:
    torch.manual_seed(0)
    return cls(size, width, **options)


def reference(table: torch.Tensor, ids: list[int]):
    """A plain leaf table: what autograd says of its rows is what the split rows must get."""
    whole = table.detach().clone().requires_grad_(True)
    return whole, lambda: whole.grad[torch.tensor(ids)]


def test_bottom_layer_does_not_import_transformers():
    code = (
        "import sys, hf_partial_embed as h\n"
        "h.SplitEmbedding, h.SplitLinear, h.mask_gradients, h.PartialEmbeddingError\n"
        "absent = {'transformers', 'tokenizers', 'huggingface_hub'}\n"
        "assert not absent & {name.split('.')[0] for name in sys.modules}"
    )
    subprocess.run([sys.executable, "-c", code], check=True)


def test_border_id_is_trainable_and_the_one_below_is_not():
    vectors = torch.randn(7, 3)
    module = SplitEmbedding.from_pretrained(vectors, num_new=2)
    module(torch.tensor([6, 7])).sum().backward()
    assert torch.equal(module(torch.tensor([6]))[0], vectors[6])
    assert torch.equal(module.new_rows.weight.grad, torch.tensor([[1.0] * 3, [0.0] * 3]))
    assert [p.shape for p in module.parameters() if p.requires_grad] == [(2, 3)]


@settings(max_examples=60, deadline=None)
@given(data=st.data())
def test_lookup_and_gradient_equal_those_of_one_table(data):
    size, width = data.draw(st.integers(1, 12)), data.draw(st.integers(1, 5))
    ids = data.draw(st.lists(st.integers(0, size - 1), min_size=1, unique=True))
    shape = data.draw(st.lists(st.integers(0, 4), max_size=3))
    dtype = data.draw(st.sampled_from([torch.int32, torch.int64]))
    torch.manual_seed(data.draw(st.integers(0, 99)))
    plain = nn.Embedding(size, width)
    whole, gradient = reference(plain.weight, ids)
    batch = torch.randint(0, size, shape, dtype=dtype)
    before = batch.clone()
    module = SplitEmbedding(plain, trainable_ids=ids)
    weights = torch.randn(*shape, width)
    (module(batch) * weights).sum().backward()
    expected = F.embedding(batch, whole)
    (expected * weights).sum().backward()
    assert torch.equal(module(batch), expected)
    assert torch.equal(module.new_rows.weight.grad, gradient())
    assert torch.equal(batch, before)


@settings(max_examples=60, deadline=None)
@given(data=st.data())
def test_linear_and_its_gradients_equal_those_of_one_table(data):
    size, width = data.draw(st.integers(1, 12)), data.draw(st.integers(1, 5))
    ids = data.draw(st.lists(st.integers(0, size - 1), min_size=1, unique=True))
    shape = data.draw(st.lists(st.integers(0, 3), max_size=2))
    bias = data.draw(st.booleans())
    torch.manual_seed(data.draw(st.integers(0, 99)))
    plain = nn.Linear(width, size, bias=bias, dtype=torch.float64)
    whole, gradient = reference(plain.weight, ids)
    hidden = torch.randn(*shape, width, dtype=torch.float64, requires_grad=True)
    weights = torch.randn(*shape, size, dtype=torch.float64)
    expected = F.linear(hidden, whole, plain.bias)
    (expected * weights).sum().backward()
    expected_grad, hidden.grad = hidden.grad, None
    module = SplitLinear(plain, trainable_ids=ids)
    out = module(hidden)
    (out * weights).sum().backward()
    torch.testing.assert_close(out, expected)
    torch.testing.assert_close(hidden.grad, expected_grad)
    torch.testing.assert_close(module.new_rows.weight.grad, gradient())
    if bias:
        torch.testing.assert_close(module.new_rows.bias.grad, weights.reshape(-1, size).sum(0)[ids])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("ids", [[90, 91, 92], [0, 1], [40, 41], [7, 3, 90]], ids=str)
@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("shape", [(1, 1), (2, 33), (128,)], ids=str)
def test_old_logits_are_equal_to_the_bit(dtype, ids, bias, shape):
    torch.manual_seed(0)
    plain = nn.Linear(48, 93, bias=bias, dtype=dtype)
    hidden = torch.randn(*shape, 48).to(dtype)
    # A frozen weight, as the split module has it: torch takes another kernel where it may need a gradient.
    expected = copy.deepcopy(plain).requires_grad_(False)(hidden)
    out = SplitLinear(plain, trainable_ids=ids)(hidden)
    old = [row for row in range(93) if row not in ids]
    assert torch.equal(out[..., old], expected[..., old])


@pytest.mark.parametrize("shape", [(7,), (3, 7), (2, 3, 7)])
def test_outputs_may_be_changed_in_place(shape):
    head = SplitLinear(nn.Linear(7, 11), trainable_ids=[4, 9])
    outputs = head(torch.randn(shape, requires_grad=True))
    assert outputs.shape == (*shape[:-1], 11)
    assert not outputs._is_view()  # FSDP2 warns of views, whose hooks a change in place would drop
    outputs.add_(1).sum().backward()


def test_appended_columns_do_not_change_the_old_logits():
    torch.manual_seed(0)
    old = nn.Linear(576, 5003, bias=False)
    grown = nn.Linear(576, 5006, bias=False)
    grown.weight.data[:5003] = old.weight.data
    hidden = torch.randn(7, 576)
    with torch.no_grad():
        expected = old(hidden)
    out = SplitLinear(grown, trainable_ids=range(5003, 5006), base_size=5003)(hidden)
    assert torch.equal(out[:, :5003], expected)


@pytest.mark.parametrize("bad", [10, -1, 2**40])
def test_ids_out_of_range_raise_as_nn_embedding_does(bad):
    module = SplitEmbedding(embedding(), trainable_ids=[8, 9])
    with pytest.raises(IndexError) as plain:
        embedding()(torch.tensor([0, bad]))
    with pytest.raises(IndexError, match=str(plain.value)):
        module(torch.tensor([0, bad]))


@pytest.mark.parametrize("padding_idx", [0, 9, -1])
def test_padding_idx_gets_no_gradient(padding_idx):
    module = SplitEmbedding(embedding(padding_idx=padding_idx), trainable_ids=[9, 5])
    module(torch.tensor([0, 5, 9, 9])).sum().backward()
    expected = torch.tensor([[0.0 if padding_idx % 10 == 9 else 2.0] * 4, [1.0] * 4])
    assert torch.equal(module.new_rows.weight.grad, expected)


@pytest.mark.parametrize("option", [{"max_norm": 1.0}, {"sparse": True}, {"scale_grad_by_freq": True}], ids=str)
def test_unsupported_options_are_refused_by_name(option):
    plain = embedding(**option)
    with pytest.raises(PartialEmbeddingError, match=next(iter(option))):
        SplitEmbedding(plain, trainable_ids=[1])
    assert type(plain) is nn.Embedding
    assert plain.weight.requires_grad


@pytest.mark.parametrize(
    ("ids", "message"),
    [
        ([], "No row ids were given"),
        ([1, 1], "more than once: 1"),
        ([3, 10], "10 are outside of a table of 10 rows: valid ids are 0 to 9"),
        ([-1], "-1 are outside"),
        ([1.5], "whole numbers, but got 1.5"),
        ([True], "whole numbers, but got True"),
        (["a"], "whole numbers, but got 'a'"),
    ],
)
def test_bad_ids_are_refused(ids, message):
    with pytest.raises(PartialEmbeddingError, match=message):
        SplitEmbedding(embedding(), trainable_ids=ids)


@pytest.mark.parametrize(
    ("vectors", "num_new", "message"),
    [
        (torch.randn(3), 1, r"shape \(3,\)"),
        (torch.ones(3, 2, dtype=torch.int64), 1, "int64"),
        (torch.randn(3, 2), 0, "num_new=0"),
        (torch.randn(3, 2), True, "num_new=True"),
    ],
)
def test_from_pretrained_refuses_what_cannot_train(vectors, num_new, message):
    with pytest.raises(PartialEmbeddingError, match=message):
        SplitEmbedding.from_pretrained(vectors, num_new)


def test_from_pretrained_new_rows_are_like_the_vectors_and_reproducible():
    vectors = torch.randn(4000, 3) * torch.tensor([1.0, 5.0, 0.1]) + torch.tensor([0.0, 3.0, -1.0])
    one, two = (SplitEmbedding.from_pretrained(vectors, num_new=4000, seed=1) for _ in range(2))
    rows = one.new_rows.weight.detach()
    assert torch.equal(rows, two.new_rows.weight.detach())
    torch.testing.assert_close(rows.mean(0), vectors.mean(0), atol=0.3, rtol=0)
    torch.testing.assert_close(rows.std(0), vectors.std(0), rtol=0.1, atol=0)
    assert torch.equal(one.weight[:4000], vectors)


def test_wrapping_shares_the_weight_and_freezes_it():
    plain = embedding()
    module = SplitEmbedding(plain, trainable_ids=[2])
    assert module._parameters["weight"] is plain.weight
    assert not plain.weight.requires_grad
    assert isinstance(module, nn.Embedding)
    assert type(plain) is nn.Embedding


def test_frozen_rows_stay_still_after_requires_grad_was_called_on_the_whole_network():
    network = nn.Sequential(
        SplitEmbedding(embedding(), trainable_ids=[7]), SplitLinear(nn.Linear(4, 6), trainable_ids=[2])
    )
    before = {name: tensor.clone() for name, tensor in network.state_dict().items()}
    network.requires_grad_(True)
    optimizer = torch.optim.AdamW(network.parameters(), lr=0.1, weight_decay=0.1)
    network(torch.tensor([0, 7])).pow(2).sum().backward()
    optimizer.step()
    after = network.state_dict()
    for name, row in (("0.weight", 7), ("1.weight", 2), ("1.bias", 2)):
        changed = (after[name] != before[name]).reshape(len(after[name]), -1).any(1).nonzero().flatten()
        assert changed.tolist() == [row]


def test_splitting_a_split_module_is_refused():
    with pytest.raises(PartialEmbeddingError, match="split already"):
        SplitEmbedding(SplitEmbedding(embedding(), trainable_ids=[1]), trainable_ids=[2])


def test_subclass_keeps_its_own_forward_and_its_rows_train():
    plain = embedding(cls=ScaledEmbedding)
    expected = plain(torch.arange(10)).detach()
    module = SplitEmbedding(plain, trainable_ids=[7, 2])
    out = module(torch.arange(10))
    out.sum().backward()
    assert isinstance(module, ScaledEmbedding)
    assert isinstance(module, SplitEmbedding)
    assert torch.equal(out, expected)
    assert torch.equal(module.new_rows.weight.grad, torch.full((2, 4), 3.0))


def test_embedding_with_a_forward_of_its_own_trains_its_rows():
    plain = embedding(cls=NormedEmbedding)
    whole, gradient = reference(plain.weight, [7, 2])
    weights = torch.randn(10, 4)
    (F.normalize(whole, dim=-1) * weights).sum().backward()
    module = SplitEmbedding(plain, trainable_ids=[7, 2])
    (module(torch.arange(10)) * weights).sum().backward()
    torch.testing.assert_close(module.new_rows.weight.grad, gradient())


def test_head_with_a_forward_of_its_own_trains_its_rows_and_bias():
    torch.manual_seed(0)
    plain = TransposedLinear(4, 10)
    whole, gradient = reference(plain.weight, [7, 2])
    hidden, weights = torch.randn(5, 4), torch.randn(5, 10)
    ((hidden @ whole.T) * weights).sum().backward()
    module = SplitLinear(plain, trainable_ids=[7, 2])
    (module(hidden) * weights).sum().backward()
    torch.testing.assert_close(module.new_rows.weight.grad, gradient())
    torch.testing.assert_close(module.new_rows.bias.grad, weights.sum(0)[[7, 2]])


def test_weight_is_whole_and_differentiable_for_who_reads_it():
    module = SplitEmbedding(embedding(), trainable_ids=[7, 2])
    with torch.no_grad():
        module.new_rows.weight.add_(1.0)
    expected = module(torch.arange(10))
    assert torch.equal(module.weight, expected)
    hidden = torch.randn(3, 4)
    F.linear(hidden, module.weight).sum().backward()
    torch.testing.assert_close(module.new_rows.weight.grad, hidden.sum(0).expand(2, 4))
    with torch.no_grad():
        assert module.weight is module._parameters["weight"]


def test_rows_changed_between_forward_and_backward_of_a_read_weight_is_an_error():
    module = SplitEmbedding(embedding(), trainable_ids=[7])
    loss = module.weight.pow(2).sum()
    with torch.no_grad():
        module.new_rows.weight.add_(1.0)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()


def test_tied_head_sees_new_rows_and_adds_to_their_gradient():
    torch.manual_seed(0)
    table, head = nn.Embedding(10, 4), nn.Linear(4, 10, bias=False)
    head.weight = table.weight
    whole, gradient = reference(table.weight, [8, 9])
    batch = torch.tensor([1, 8, 9])
    F.linear(F.embedding(batch, whole), whole).pow(2).sum().backward()
    split = SplitEmbedding(table, trainable_ids=[8, 9])
    split_head = SplitLinear(head, tied_to=split)
    split_head(split(batch)).pow(2).sum().backward()
    torch.testing.assert_close(split.new_rows.weight.grad, gradient())
    names = [name for name, _ in nn.ModuleDict({"a": split, "b": split_head}).named_parameters()]
    assert names == ["a.weight", "a.new_rows.weight"]


def test_tied_to_another_weight_is_refused():
    split = SplitEmbedding(embedding(), trainable_ids=[1])
    with pytest.raises(PartialEmbeddingError, match="shares its weight"):
        SplitLinear(nn.Linear(4, 10), tied_to=split)
    with pytest.raises(PartialEmbeddingError, match="exactly one"):
        SplitLinear(nn.Linear(4, 10))


def copies_of(module: nn.Module):
    yield "deepcopy", copy.deepcopy(module)
    yield "pickle", pickle.loads(pickle.dumps(module))
    buffer = io.BytesIO()
    torch.save(module, buffer)
    buffer.seek(0)
    yield "torch.save", torch.load(buffer, weights_only=False)


@pytest.mark.parametrize("ids", [[8, 9], [7, 2]], ids=str)
@pytest.mark.parametrize("cls", [nn.Embedding, ScaledEmbedding])
def test_copies_are_whole_and_independent(cls, ids):
    module = SplitEmbedding(embedding(cls=cls), trainable_ids=ids)
    batch = torch.arange(10)
    with torch.no_grad():
        module.new_rows.weight.add_(1.0)
    expected = module(batch).detach()
    for how, other in copies_of(module):
        assert type(other) is type(module), how
        assert torch.equal(other(batch), expected), how
        other(batch).sum().backward()
        with torch.no_grad():
            other.new_rows.weight.zero_()
        assert torch.equal(module(batch), expected), how
        assert module.new_rows.weight.grad is None


def test_state_dict_holds_the_whole_table_with_the_current_rows():
    module = SplitEmbedding(embedding(), trainable_ids=[7, 2])
    with torch.no_grad():
        module.new_rows.weight.copy_(torch.arange(8.0).view(2, 4))
    state = module.state_dict()
    assert torch.equal(state["weight"][[7, 2]], torch.arange(8.0).view(2, 4))
    plain = nn.Embedding(10, 4)
    plain.load_state_dict({"weight": state["weight"]})
    assert torch.equal(plain(torch.arange(10)), module(torch.arange(10)))


@pytest.mark.parametrize("with_rows", [True, False])
def test_loading_a_state_dict_brings_the_rows(with_rows):
    source = SplitEmbedding(embedding(), trainable_ids=[7, 2])
    with torch.no_grad():
        source.new_rows.weight.uniform_()
    state = source.state_dict()
    if not with_rows:
        state = {"weight": state["weight"]}
    target = SplitEmbedding(nn.Embedding(10, 4), trainable_ids=[7, 2])
    target.load_state_dict(state)
    assert torch.equal(target.new_rows.weight, source.new_rows.weight)


def test_float32_rows_on_a_bfloat16_table_survive_a_reload_of_what_they_round_to():
    module = SplitEmbedding(embedding().bfloat16(), trainable_ids=[7, 2], dtype=torch.float32)
    with torch.no_grad():
        module.new_rows.weight.uniform_()
    exact = module.new_rows.weight.detach().clone()
    module.load_state_dict({"weight": module.state_dict()["weight"]})
    assert torch.equal(module.new_rows.weight, exact)
    assert module(torch.tensor([7])).dtype == torch.bfloat16


@pytest.mark.parametrize("move", [lambda m: m.to(torch.float64), lambda m: m.half(), lambda m: m.bfloat16()])
@pytest.mark.parametrize("ids", [[8, 9], [7, 2]], ids=str)
def test_module_can_be_converted(move, ids):
    module = move(SplitEmbedding(embedding(), trainable_ids=ids))
    out = module(torch.arange(10))
    out.sum().backward()
    assert out.dtype == module.new_rows.weight.dtype == module.weight.dtype
    assert torch.equal(out, module.weight)


def compiled_cases():
    torch.manual_seed(0)
    table, head = nn.Embedding(10, 4), nn.Linear(4, 10)
    head.weight = table.weight
    tied = SplitEmbedding(table, trainable_ids=[8, 9])
    yield "appended", SplitEmbedding(embedding(), trainable_ids=[8, 9]), "ids"
    yield "scattered", SplitEmbedding(embedding(), trainable_ids=[7, 2]), "ids"
    yield "scaled", SplitEmbedding(embedding(cls=ScaledEmbedding), trainable_ids=[8, 9]), "ids"
    yield "normed", SplitEmbedding(embedding(cls=NormedEmbedding), trainable_ids=[8, 9]), "ids"
    yield "linear", SplitLinear(nn.Linear(4, 10), trainable_ids=[8, 9]), "hidden"
    yield "linear-scattered", SplitLinear(nn.Linear(4, 10), trainable_ids=[7, 2]), "hidden"
    yield "linear-own-forward", SplitLinear(TransposedLinear(4, 10), trainable_ids=[7, 2]), "hidden"
    yield "tied", nn.Sequential(tied, SplitLinear(head, tied_to=tied)), "ids"


@pytest.mark.parametrize("name", [name for name, _, _ in compiled_cases()])
def test_compiles_to_one_graph_with_the_same_gradients(name):
    module, kind = next((module, kind) for case, module, kind in compiled_cases() if case == name)
    torch._dynamo.reset()
    compiled = torch.compile(module, backend="aot_eager", fullgraph=True)
    for size in (3, 5):
        batch = torch.randint(0, 10, (2, size)) if kind == "ids" else torch.randn(2, size, 4)
        weights = torch.randn(2, size, module(batch).shape[-1])
        expected = module(batch)
        (expected * weights).sum().backward()
        gradients = [p.grad.clone() for p in module.parameters() if p.requires_grad]
        module.zero_grad()
        out = compiled(batch)
        (out * weights).sum().backward()
        torch.testing.assert_close(out, expected)
        for parameter, gradient in zip((p for p in module.parameters() if p.requires_grad), gradients, strict=True):
            torch.testing.assert_close(parameter.grad, gradient)
        module.zero_grad()


def test_second_backward_is_that_of_a_plain_linear():
    torch.manual_seed(0)
    module = SplitLinear(nn.Linear(3, 6, dtype=torch.float64), trainable_ids=[4, 5])
    hidden = torch.randn(2, 3, dtype=torch.float64, requires_grad=True)
    torch.autograd.gradgradcheck(lambda x: module(x).pow(3), (hidden,))


def test_autocast_gives_what_a_plain_linear_gives():
    torch.manual_seed(0)
    plain = nn.Linear(8, 10)
    hidden = torch.randn(3, 8)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        expected = copy.deepcopy(plain).requires_grad_(False)(hidden)
        out = SplitLinear(plain, trainable_ids=[8, 9])(hidden)
    assert out.dtype == torch.bfloat16
    assert torch.equal(out[:, :8], expected[:, :8])


@pytest.mark.parametrize("rows", [1, 3])
def test_rows_of_several_sets_are_one_after_another(rows):
    holder = NewRows()
    sets = [nn.Parameter(torch.randn(rows, 2)) for _ in range(3)]
    names = [holder.add_set("weight", parameter) for parameter in sets]
    assert names == ["weight", "weight__1", "weight__2"]
    assert torch.equal(holder("weight"), torch.cat(sets))
