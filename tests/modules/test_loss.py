"""The loss that never has all logits: the same numbers as the plain one, in memory that does not grow."""

from __future__ import annotations

import copy

import pytest
import torch
import torch.nn.functional as F
from allocations import Allocations, peak_bytes
from torch import nn

from hf_partial_embed import PartialEmbeddingError, SplitEmbedding, SplitLinear
from hf_partial_embed.modules import loss
from hf_partial_embed.modules.frozen_loss import frozen_normalizers, linear_cross_entropy_given
from hf_partial_embed.modules.loss import linear_cross_entropy, linear_log_probs
from hf_partial_embed.modules.steps import Steps

VOCABULARY, WIDTH, POSITIONS = 90, 16, 41
IDS = {"appended": range(VOCABULARY - 6, VOCABULARY), "scattered": [7, 3, 50, 89]}


@pytest.fixture(autouse=True)
def many_chunks(monkeypatch):
    monkeypatch.setattr(loss, "CHUNK_BYTES", 1)
    monkeypatch.setattr(loss, "CHUNK_POSITIONS", 8)
    monkeypatch.setattr(loss, "BLOCK_BYTES", 1)


def make_head(where="appended", *, bias=False, dtype=torch.float64, tied=False, size=VOCABULARY):
    torch.manual_seed(0)
    linear = nn.Linear(WIDTH, size, bias=bias, dtype=dtype)
    ids = IDS[where] if size == VOCABULARY else range(size - 6, size)
    base = min(ids) if where == "appended" else None
    if tied:
        embedding = nn.Embedding(size, WIDTH, dtype=dtype)
        linear.weight = embedding.weight
        split = SplitEmbedding(embedding, trainable_ids=ids, base_size=base)
        head = SplitLinear(linear, tied_to=split)
        return head, [*split.new_rows.parameters(), *([head.new_rows.bias] if bias else [])]
    head = SplitLinear(linear, trainable_ids=ids, base_size=base)
    return head, list(head.new_rows.parameters())


def batch(dtype=torch.float64, positions=POSITIONS, size=VOCABULARY, seed=1):
    generator = torch.Generator().manual_seed(seed)
    hidden = torch.randn(positions, WIDTH, generator=generator, dtype=torch.float64).to(dtype).requires_grad_(True)
    target = torch.randint(0, size, (positions,), generator=generator)
    target[::5] = -100
    target[1::7] = size - 1  # a trainable one
    return hidden, target


def gradients(value, hidden, rows):
    """The loss and all gradients; the factor stands for what a scaler or an accumulation multiplies it with."""
    return [value.detach(), *torch.autograd.grad(value * 3, [hidden, *rows])]


def plain_loss(head, hidden, target, *, z_loss=0.0, transform=lambda logits: logits, **options):
    logits = transform(head(hidden))
    value = F.cross_entropy(logits, target, **options)
    if z_loss:
        squares = logits.logsumexp(1).square()[target != options.get("ignore_index", -100)]
        value = value + z_loss * (squares.sum() if options.get("reduction") == "sum" else squares.mean())
    return value


@pytest.mark.parametrize("where", IDS)
@pytest.mark.parametrize("bias", [False, True], ids=["no-bias", "bias"])
def test_gradients_are_those_of_the_plain_loss(where, bias, tied):
    head, rows = make_head(where, bias=bias, tied=tied)
    hidden, target = batch()
    expected = gradients(plain_loss(head, hidden, target), hidden, rows)
    assert len(expected) == 3 + bias
    for value, other in zip(
        gradients(linear_cross_entropy(hidden, head, target), hidden, rows), expected, strict=True
    ):
        torch.testing.assert_close(value, other, rtol=1e-12, atol=1e-14)


@pytest.mark.parametrize(
    "options",
    [
        {"reduction": "sum"},
        {"ignore_index": 4},
        {"label_smoothing": 0.1},
        {"label_smoothing": 0.1, "reduction": "sum"},
        {"z_loss": 1e-2},
        {"z_loss": 1e-2, "label_smoothing": 0.2, "reduction": "sum"},
        {"transform": lambda logits: torch.tanh(logits / 3) * 3},
        {"transform": lambda logits: logits * 0.5, "z_loss": 1e-2, "label_smoothing": 0.1},
    ],
    ids=lambda options: "-".join(name if callable(value) else f"{name}={value}" for name, value in options.items()),
)
def test_options_are_those_of_the_plain_loss(options):
    head, rows = make_head()
    hidden, target = batch()
    if "ignore_index" in options:
        target[target == -100] = 4
    expected = gradients(plain_loss(head, hidden, target, **options), hidden, rows)
    for value, other in zip(
        gradients(linear_cross_entropy(hidden, head, target, **options), hidden, rows), expected, strict=True
    ):
        torch.testing.assert_close(value, other, rtol=1e-12, atol=1e-14)


@pytest.mark.parametrize("where", IDS)
def test_log_probs_of_single_positions_and_their_gradients(where):
    head, rows = make_head(where, bias=True)
    hidden, target = batch()
    target = target.clamp(min=0)
    weights = torch.rand(2, POSITIONS, dtype=torch.float64)
    transform = lambda logits: logits * 0.5  # noqa: E731
    log_probs = transform(head(hidden)).log_softmax(1)
    expected = (weights[0] * log_probs.gather(1, target[:, None])[:, 0] + weights[1] * log_probs.sum(1)).sum()
    picked, total = linear_log_probs(hidden, head, target, transform=transform)
    value = (weights[0] * picked + weights[1] * total).sum()
    for one, other in zip(gradients(value, hidden, rows), gradients(expected, hidden, rows), strict=True):
        torch.testing.assert_close(one, other, rtol=1e-12, atol=1e-12)


def test_a_head_without_trainable_rows_passes_its_gradient_to_the_hidden_states():
    head = nn.Linear(WIDTH, VOCABULARY, dtype=torch.float64).requires_grad_(False)
    hidden, target = batch()
    (expected,) = torch.autograd.grad(F.cross_entropy(head(hidden), target), hidden)
    (gradient,) = torch.autograd.grad(linear_cross_entropy(hidden, head, target), hidden)
    torch.testing.assert_close(gradient, expected, rtol=1e-12, atol=1e-14)


@pytest.mark.parametrize("autocast", [False, True], ids=["bf16-model", "autocast"])
def test_in_bfloat16_it_is_as_near_to_the_exact_gradient_as_the_plain_loss(autocast):
    dtype = torch.float32 if autocast else torch.bfloat16
    head, rows = make_head(dtype=dtype)
    hidden, target = batch(dtype)
    with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
        values = gradients(linear_cross_entropy(hidden, head, target), hidden, rows)
        plain = gradients(F.cross_entropy(head(hidden).float(), target), hidden, rows)
        frozen = gradients(given(head, hidden, target, POSITIONS), hidden, rows)
    exact_head = copy.deepcopy(head).double()
    exact_hidden = hidden.detach().double().requires_grad_(True)
    exact = gradients(
        F.cross_entropy(exact_head(exact_hidden), target), exact_hidden, exact_head.new_rows.parameters()
    )
    for value, other, truth in zip(values, plain, exact, strict=True):
        assert value.dtype == other.dtype
        assert (value.double() - truth).norm() <= 1.1 * (other.double() - truth).norm() + 1e-6
    for number in (0, 2):  # the loss, and the rows' gradient
        error = (frozen[number].double() - exact[number]).norm()
        assert error <= 1.1 * (plain[number].double() - exact[number]).norm() + 1e-6


def test_only_ignored_positions_give_what_the_plain_loss_gives():
    head, rows = make_head()
    hidden, target = batch()
    target[:] = -100
    for reduction in ("mean", "sum"):
        value = linear_cross_entropy(hidden, head, target, reduction=reduction)
        expected = F.cross_entropy(head(hidden), target, reduction=reduction)
        for one, other in zip(gradients(value, hidden, rows), gradients(expected, hidden, rows), strict=True):
            torch.testing.assert_close(one, other, equal_nan=True)


def test_hidden_states_without_a_graph_get_no_gradient_and_rows_do():
    head, rows = make_head()
    hidden, target = batch()
    expected = torch.autograd.grad(F.cross_entropy(head(hidden), target), rows)
    value = linear_cross_entropy(hidden.detach(), head, target)
    for one, other in zip(torch.autograd.grad(value, rows), expected, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-12, atol=1e-14)


def given(head, hidden, target, count, **options):
    """The loss with normalizers of the first `count` positions, whose hidden states have no graph."""
    normalizers = torch.full(target.shape, torch.nan, dtype=torch.promote_types(torch.float32, hidden.dtype))
    transform = options.get("transform")
    normalizers[:count] = frozen_normalizers(hidden[:count].detach(), head, transform=transform)
    return linear_cross_entropy_given(hidden, head, target, normalizers, **options)


@pytest.mark.parametrize("where", IDS)
@pytest.mark.parametrize("bias", [False, True], ids=["no-bias", "bias"])
@pytest.mark.parametrize("count", [0, 17, POSITIONS])
@pytest.mark.parametrize(
    "options",
    [
        {},
        {"reduction": "sum", "ignore_index": 4},
        {"transform": Steps().then("div", 0.3).then("tanh").then("mul", 3.0)},
    ],
    ids=["mean", "sum", "capped"],
)
def test_positions_of_known_normalizers_give_the_same_loss_and_gradients(where, bias, tied, count, options):
    head, rows = make_head(where, bias=bias, tied=tied)
    hidden, target = batch()
    if "ignore_index" in options:
        target[target == -100] = 4
    expected = gradients(plain_loss(head, hidden, target, **options), hidden, rows)
    expected[1][:count] = 0
    values = gradients(given(head, hidden, target, count, **options), hidden, rows)
    for value, other in zip(values, expected, strict=True):
        torch.testing.assert_close(value, other, rtol=1e-12, atol=1e-14)


def test_normalizers_are_of_the_old_logits_whatever_the_rows_are():
    head, rows = make_head()
    hidden, _ = batch()
    found = []
    for factor in (1, 50):
        with torch.no_grad():
            rows[0].mul_(factor)
        found.append(frozen_normalizers(hidden, head))
    assert torch.equal(*found)
    torch.testing.assert_close(found[0], head(hidden)[:, : VOCABULARY - 6].logsumexp(1), rtol=1e-12, atol=1e-14)


def test_whole_heads_and_other_reductions_are_refused():
    hidden, target = batch()
    whole = nn.Linear(WIDTH, VOCABULARY, dtype=torch.float64)
    with pytest.raises(PartialEmbeddingError, match="trains as a whole"):
        linear_cross_entropy(hidden, whole, target)
    with pytest.raises(PartialEmbeddingError, match="'none' has no chunked form"):
        linear_cross_entropy(hidden, make_head()[0], target, reduction="none")
    target[3] = VOCABULARY
    with pytest.raises(IndexError, match="90 is out of bounds"):
        linear_cross_entropy(hidden, make_head()[0], target)


def counted_step(head, positions, size) -> Allocations:
    hidden, target = batch(torch.float32, positions, size)
    with Allocations() as counted:
        linear_cross_entropy(hidden, head, target).backward()
    return counted


@pytest.mark.parametrize("where", IDS)
def test_largest_allocation_is_a_chunk_however_many_positions(where):
    size = 4000 if where == "appended" else VOCABULARY
    head, _ = make_head(where, dtype=torch.float32, size=size)
    for positions in (64, 128):
        counted = counted_step(head, positions, size)
        hidden_bytes, chunk_bytes = positions * WIDTH * 4, 8 * size * 4
        assert counted.largest()[0] == max(hidden_bytes, chunk_bytes), counted.largest()
        assert not [size for size in counted.sizes if size >= positions * size * 4]


def test_bytes_held_at_once_do_not_grow_with_the_number_of_positions_times_the_vocabulary():
    extra = {}
    for positions in (64, 128):
        for size in (1000, 4000):
            head, _ = make_head(dtype=torch.float32, size=size)
            counted = counted_step(head, positions, size)
            big = [number for number in counted.sizes if number >= 8 * size * 4]
            extra[positions, size] = len(big)
    # One buffer of a chunk, whatever the number of chunks.
    assert set(extra.values()) == {1}, extra


OPTIONS = {
    "plain": {},
    "weighted": {"z_loss": 1e-2, "reduction": "sum"},
    "capped": {"transform": Steps().then("float32").then("div", 3.0).then("tanh"), "z_loss": 1e-2},
    "function": {"transform": lambda logits: torch.tanh(logits / 3) * 3},
}


@pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS)
@pytest.mark.parametrize("where", IDS)
def test_blocks_of_a_chunk_in_bfloat16_change_no_bit(monkeypatch, where, options):
    head, rows = make_head(where, bias=True, dtype=torch.bfloat16)
    hidden, target = batch(torch.bfloat16)
    transform = options.get("transform")

    def results():
        values = gradients(linear_cross_entropy(hidden, head, target, **options), hidden, rows)
        picked, total = linear_log_probs(hidden, head, target.clamp(min=0), transform=transform)
        values += gradients((picked * torch.linspace(0, 1, POSITIONS) + total * 1e-3).sum(), hidden, rows)
        return [*values, frozen_normalizers(hidden, head, transform=transform)]

    found = []
    for positions in (1, 3, 8):
        monkeypatch.setattr(loss, "BLOCK_BYTES", positions * VOCABULARY * 4)
        found.append(results())
    for values in zip(*found, strict=True):
        assert torch.equal(values[0], values[1]) and torch.equal(values[0], values[2])


def compiled_loss(head, **options):
    torch._dynamo.reset()
    return torch.compile(
        lambda hidden, target: linear_cross_entropy(hidden, head, target, **options),
        backend="aot_eager", fullgraph=True, dynamic=True,
    )  # fmt: skip


@pytest.mark.parametrize(
    "options",
    [
        {},
        {
            "label_smoothing": 0.1,
            "z_loss": 1e-2,
            "reduction": "sum",
            "transform": Steps().then("div", 3.0).then("tanh"),
        },
    ],
    ids=["plain", "all options"],
)
@pytest.mark.parametrize("where", IDS)
def test_compiled_it_is_one_operator_with_the_same_bits(where, options):
    head, rows = make_head(where, bias=True, dtype=torch.float32)
    compiled = compiled_loss(head, **options)
    for positions in (POSITIONS, 19):
        hidden, target = batch(torch.float32, positions)
        expected = gradients(linear_cross_entropy(hidden, head, target, **options), hidden, rows)
        for value, other in zip(gradients(compiled(hidden, target), hidden, rows), expected, strict=True):
            assert torch.equal(value, other)
    target[0] = VOCABULARY
    with pytest.raises(IndexError, match="90 is out of bounds"):
        compiled(hidden, target)


def test_compiled_its_peak_is_that_of_eager():
    size = 4000
    head, rows = make_head(dtype=torch.float32, size=size)
    hidden, target = batch(torch.float32, 128, size)
    compiled = compiled_loss(head)

    def peak(function):
        gradients(function(hidden, target), hidden, rows)
        return peak_bytes(lambda: gradients(function(hidden, target), hidden, rows))

    eager = peak(lambda hidden, target: linear_cross_entropy(hidden, head, target))
    assert eager < 128 * size * 4
    assert peak(compiled) <= eager + 1024


@pytest.mark.parametrize("transform", [None, Steps().then("float32").then("tanh")], ids=["plain", "capped"])
def test_peak_in_bfloat16_is_the_logits_of_a_chunk_in_bfloat16(monkeypatch, transform):
    monkeypatch.setattr(loss, "CHUNK_POSITIONS", 256)
    size = 4000
    head, rows = make_head(dtype=torch.bfloat16, size=size)
    hidden, target = batch(torch.bfloat16, 512, size)
    peaks = [
        peak_bytes(lambda way=way: gradients(way(hidden, target), hidden, rows))
        for way in (
            lambda hidden, target: linear_cross_entropy(hidden, head, target, transform=transform),
            compiled_loss(head, transform=transform),
        )
    ]
    assert max(peaks) < 256 * size * 2 * 1.25, peaks
