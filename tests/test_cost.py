"""What a training step allocates: counted by the dispatcher, not timed."""

from __future__ import annotations

import copy

import pytest
import torch
import torch._dynamo.testing
import torch.nn.functional as F
from allocations import Allocations, memory_changes, peak_bytes
from conftest import bpe_tokenizer, build_model
from torch import nn

from hf_partial_embed import SplitEmbedding, SplitLinear, add_tokens
from hf_partial_embed.modules import digest

VOCABULARY, WIDTH, NEW, POSITIONS = 5000, 64, 8, 40


def step(embedding, head, ids) -> Allocations:
    with Allocations() as counted:
        hidden = embedding(ids)
        hidden = hidden if hidden.requires_grad else hidden.detach().requires_grad_(True)
        F.cross_entropy(head(hidden), ids).backward()
    return counted


def modules(tied: bool, size: int):
    torch.manual_seed(0)
    embedding, head = nn.Embedding(size, WIDTH), nn.Linear(WIDTH, size, bias=False)
    if tied:
        head.weight = embedding.weight
    return embedding, head


@pytest.mark.parametrize("where", ["appended", "scattered"])
def test_a_step_of_split_allocates_nothing_of_the_tables_size(tied, where):
    size = VOCABULARY + NEW
    embedding, head = modules(tied, size)
    ids = range(VOCABULARY, size) if where == "appended" else [5, 77, 3, *range(4000, 4005)]
    split = SplitEmbedding(embedding, trainable_ids=ids, base_size=VOCABULARY)
    if tied:
        split_head = SplitLinear(head, tied_to=split)
    else:
        split_head = SplitLinear(head, trainable_ids=ids, base_size=VOCABULARY)
    batch = torch.randint(0, size, (POSITIONS,))
    counted = step(split, split_head, batch)
    # The logits and their gradients are the largest things that are left.
    assert counted.largest()[0] == POSITIONS * size * 4, counted.largest()


def test_extra_bytes_of_a_step_do_not_grow_with_the_vocabulary(tied):
    extra = {}
    for vocabulary in (1000, 4000):
        size = vocabulary + NEW
        batch = torch.randint(0, size, (POSITIONS,))
        embedding, head = modules(tied, size)
        frozen = step(*(copy.deepcopy(m).requires_grad_(False) for m in (embedding, head)), batch)
        ids = range(vocabulary, size)
        split = SplitEmbedding(embedding, trainable_ids=ids, base_size=vocabulary)
        options = {"tied_to": split} if tied else {"trainable_ids": ids, "base_size": vocabulary}
        counted = step(split, SplitLinear(head, **options), batch)
        extra[vocabulary] = sum(counted.sizes) - sum(frozen.sizes)
    assert extra[1000] == extra[4000]


def extra_bytes(new: int, *, tied: bool, where: str = "appended", positions: int = POSITIONS) -> int:
    """Bytes that a step of embedding and head allocates beyond one of the same tables, frozen."""
    size = VOCABULARY + new
    embedding, head = modules(tied, size)
    batch = torch.randint(0, size, (positions,))
    frozen = step(*(copy.deepcopy(m).requires_grad_(False) for m in (embedding, head)), batch)
    ids = range(VOCABULARY, size) if where == "appended" else range(0, 2 * new, 2)
    options = {"base_size": VOCABULARY if where == "appended" else size}
    split = SplitEmbedding(embedding, trainable_ids=ids, **options)
    options = {"tied_to": split} if tied else {"trainable_ids": ids, **options}
    return sum(step(split, SplitLinear(head, **options), batch).sizes) - sum(frozen.sizes)


def test_extra_bytes_of_a_step_are_the_gradients_of_the_rows(tied):
    # One for the lookup and one for the head; where they are tied, one for both. The logits' columns are there anyway.
    per_row = (1 if tied else 2) * WIDTH * 4
    few, many, most = (extra_bytes(new, tied=tied) for new in (8, 512, 2048))
    assert (many - few, most - many) == (per_row * 504, per_row * 1536)
    # What remains is a few tensors of the size of the hidden states.
    assert few - per_row * 8 < 8 * POSITIONS * (WIDTH + 2) * 4


@pytest.mark.parametrize("fused", [True, False], ids=["fused", "not fused"])
def test_many_rows_cost_one_gradient_and_their_moments(fused):
    new, positions = 4096, 8
    size = VOCABULARY + new
    embedding, head = modules(True, size)
    batch = torch.randint(0, size, (positions,))
    split = SplitEmbedding(embedding, trainable_ids=range(VOCABULARY, size), base_size=VOCABULARY)
    head = SplitLinear(head, tied_to=split)
    rows = split.new_rows.weight
    optimizer = torch.optim.AdamW([rows], fused=fused)

    def whole_step() -> None:
        F.cross_entropy(head(split(batch)), batch).backward()
        optimizer.step()
        rows.grad = None

    first = [change for change in memory_changes(whole_step) if change >= rows.nbytes]
    later = [change for change in memory_changes(whole_step) if change >= rows.nbytes]
    assert len(first) == len(later) + 2  # the moments
    if fused:
        assert later == [rows.nbytes]  # the gradient: with the moments 12 bytes for each element of the rows
        logits = 3 * positions * size * 4  # they, their log-probabilities, and the gradient
        assert peak_bytes(whole_step) <= rows.nbytes + logits
    else:
        assert len(later) > 1


def test_gradients_of_lookup_and_tied_head_meet_in_one_tensor_whatever_is_used():
    torch.manual_seed(0)
    ids = torch.tensor([[3, 11, 11, 2, 12]])
    base = nn.Embedding(14, 6, padding_idx=12, dtype=torch.float64)
    head = nn.Linear(6, 14, bias=False, dtype=torch.float64)
    head.weight = base.weight
    reference = base.weight.detach().clone().requires_grad_(True)
    split = SplitEmbedding(base, trainable_ids=range(10, 14))
    head = SplitLinear(head, tied_to=split)
    rows = split.new_rows.weight

    def plain_lookup():
        return F.embedding(ids, reference, padding_idx=12)

    losses = {
        "both": (lambda: head(split(ids)).square().sum(), lambda: (plain_lookup() @ reference.t()).square().sum()),
        "lookup alone": (lambda: split(ids).square().sum(), lambda: plain_lookup().square().sum()),
        "another lookup after it": (
            lambda: head(split(ids) + split(ids)).square().sum(),
            lambda: (2 * plain_lookup() @ reference.t()).square().sum(),
        ),
        "head alone, after a lookup that nothing used": (
            lambda: (split(ids), head(base_states).square().sum())[1],
            lambda: (base_states @ reference.t()).square().sum(),
        ),
        "head twice": (
            lambda: head(head(split(ids))[..., :6]).square().sum(),
            lambda: ((plain_lookup() @ reference.t())[..., :6] @ reference.t()).square().sum(),
        ),
    }
    base_states = torch.randn(2, 6, dtype=torch.float64)
    for name, (own, plain) in losses.items():
        (expected,) = torch.autograd.grad(plain(), reference)
        for _ in range(2):
            (gradient,) = torch.autograd.grad(own(), rows)
            torch.testing.assert_close(gradient, expected[10:], msg=name)
        value = own()
        value.backward(retain_graph=True)
        value.backward()
        torch.testing.assert_close(rows.grad, 2 * expected[10:], msg=name)
        rows.grad = None
        # A second derivative.
        (again,) = torch.autograd.grad(own(), rows, create_graph=True)
        (twice,) = torch.autograd.grad(again.square().sum(), rows)
        (first,) = torch.autograd.grad(plain(), reference, create_graph=True)
        (second,) = torch.autograd.grad(first[10:].square().sum(), reference)
        torch.testing.assert_close(twice, second[10:], msg=name)
    split(ids)
    copy.deepcopy((split, head))  # after a lookup whose head has not come


def test_extra_bytes_for_scattered_rows_stay_within_four_gradients_and_their_columns(tied):
    few, many = (extra_bytes(new, tied=tied, where="scattered") for new in (64, 1024))
    columns = 2 * POSITIONS * 4  # of the logits and of their gradient
    indices = 8 * 8
    assert many - few <= 960 * (16 * WIDTH + columns + indices)


@pytest.mark.parametrize("kind", ["llama", "gemma", "phi", "gpt2", "bert", "t5"])
def test_training_a_model_allocates_nothing_of_the_tables_size(kind, tied):
    tokenizer = bpe_tokenizer()
    model = build_model(kind, 20_000, tied=tied).requires_grad_(False)
    partial = add_tokens(model, tokenizer, ["<a>", "<b>"])
    ids = torch.tensor([[5, 6, *partial.token_ids]])
    options = {"decoder_input_ids": ids} if model.config.is_encoder_decoder else {}
    optimizer = torch.optim.AdamW(partial.parameters())
    with Allocations() as counted:
        F.cross_entropy(model(input_ids=ids, **options).logits.flatten(0, 1), ids.flatten()).backward()
        optimizer.step()
    table = model.get_input_embeddings().weight.numel() * 4
    assert counted.largest()[0] < table / 2, counted.largest()


def test_adding_tokens_copies_the_table_once(tied, monkeypatch):
    monkeypatch.setattr(digest, "_CHUNK_BYTES", 1 << 16)  # this table is smaller than a part of a real one
    tokenizer = bpe_tokenizer()
    model = build_model("llama", 300, tied=tied)
    model.resize_token_embeddings(20_000, mean_resizing=False)
    model.config.vocab_size = 20_000
    while len(tokenizer) < 20_000:
        tokenizer.add_tokens([f"t{i}" for i in range(len(tokenizer), 20_000)])
    table = model.get_input_embeddings().weight.numel() * 4
    with Allocations() as counted:
        add_tokens(model, tokenizer, ["<a>", "<b>"])
    large = [size for size, name in zip(counted.sizes, counted.names, strict=True) if size >= table]
    assert len(large) == (1 if tied else 2), list(zip(counted.sizes, counted.names, strict=True))[:50]


@pytest.mark.parametrize("tied", [True, pytest.param(False, marks=pytest.mark.slow)], ids=["tied", "untied"])
def test_a_compiled_model_is_one_graph_for_all_batch_shapes(tied):
    model = build_model("llama", tied=tied).requires_grad_(False)
    partial = add_tokens(model, bpe_tokenizer(), ["<a>", "<b>"])
    torch._dynamo.reset()
    counter = torch._dynamo.testing.CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(model, backend=counter, fullgraph=True, dynamic=True)
    counts = []
    for shape in ((2, 6), (3, 9), (5, 12)):
        ids = torch.randint(4, 290, shape)
        ids[:, 2] = partial.token_ids[0]
        compiled(input_ids=ids, labels=ids, use_cache=False).loss.backward()
        counts.append(counter.frame_count)
    assert counts[0] == counts[-1] > 0  # nothing was compiled for the shapes after the first
    assert all(rows.grad is not None for rows in partial.parameters())
