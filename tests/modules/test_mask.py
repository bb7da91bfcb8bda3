"""`mask_gradients`, and frozen rows under every optimizer of torch, by both methods."""

from __future__ import annotations

import copy
import inspect

import pytest
import torch
from torch import nn

from hf_partial_embed import PartialEmbeddingError, SplitEmbedding, SplitLinear, mask_gradients

# SparseAdam takes no dense gradients, which is all that either method gives.
OPTIMIZERS = {
    name: cls
    for name, cls in vars(torch.optim).items()
    if inspect.isclass(cls) and issubclass(cls, torch.optim.Optimizer) and name not in ("Optimizer", "SparseAdam")
}
NEW = [3, 8, 9]
FROZEN = [row for row in range(10) if row not in NEW]


def test_the_table_of_optimizers_is_that_of_torch():
    assert {"Adadelta", "Adafactor", "Adam", "AdamW", "ASGD", "LBFGS", "Muon", "NAdam", "SGD"} <= set(OPTIMIZERS)


def settings_of(cls: type) -> list[dict]:
    """Weight decay and momentum where the optimizer has them, and each implementation for the CPU."""
    known = inspect.signature(cls).parameters
    base = {"lr": 0.1}
    base |= {"weight_decay": 0.1} if "weight_decay" in known else {}
    base |= {"momentum": 0.9} if "momentum" in known and cls is not torch.optim.Muon else {}
    settings = [{"lr": 0.1}, base]
    settings += [base | {"foreach": flag} for flag in (True, False) if "foreach" in known]
    settings += [base | {"fused": True} for _ in (0,) if "fused" in known]
    settings += [base | {"nesterov": True} for _ in (0,) if "nesterov" in known]
    settings += [base | {"amsgrad": True} for _ in (0,) if "amsgrad" in known]
    settings += [base | {"maximize": True} for _ in (0,) if "maximize" in known]
    return settings


CASES = [(name, options) for name, cls in OPTIMIZERS.items() for options in settings_of(cls)]


class Tagger(nn.Module):
    """An embedding and a head, as one would write them without transformers."""

    def __init__(self, bias: bool) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.embedding = nn.Embedding(10, 4)
        self.head = nn.Linear(4, 10, bias=bias)

    def forward(self, ids):
        return self.head(torch.tanh(self.embedding(ids)))


def step(model, optimizer, ids):
    def closure():
        optimizer.zero_grad()
        loss = nn.functional.cross_entropy(model(ids).flatten(0, 1), ids.flatten())
        loss.backward()
        return loss

    if isinstance(optimizer, torch.optim.LBFGS):
        optimizer.step(closure)
    else:
        closure()
        optimizer.step()


def old_rows(model) -> list[torch.Tensor]:
    state = model.state_dict()
    return [state[name][FROZEN] for name in ("embedding.weight", "head.weight", "head.bias") if name in state]


def new_rows(model) -> list[torch.Tensor]:
    state = model.state_dict()
    return [state[name][NEW] for name in ("embedding.weight", "head.weight", "head.bias") if name in state]


IDS = torch.tensor([[0, 3, 8], [9, 4, 3]])


@pytest.mark.parametrize(("name", "options"), CASES, ids=str)
@pytest.mark.parametrize("method", ["split", "mask", "mask after unmasked steps"])
def test_frozen_rows_do_not_move_by_one_bit(name, options, method):
    model = Tagger(bias=name != "Muon")  # Muon takes matrices only
    make = OPTIMIZERS[name]
    if method == "split":
        model.embedding = SplitEmbedding(model.embedding, trainable_ids=NEW)
        model.head = SplitLinear(model.head, trainable_ids=NEW)
        optimizer = make([parameter for parameter in model.parameters() if parameter.requires_grad], **options)
    else:
        optimizer = make(model.parameters(), **options)
        if method == "mask after unmasked steps":
            step(model, optimizer, IDS)
        for module in (model.embedding, model.head):
            mask_gradients(module, trainable_ids=NEW).protect(optimizer)
    frozen, trained = old_rows(model), new_rows(model)
    for _ in range(4):
        step(model, optimizer, IDS)
    assert all(torch.equal(now, before) for now, before in zip(old_rows(model), frozen, strict=True))
    assert not any(torch.equal(now, before) for now, before in zip(new_rows(model), trained, strict=True))


def test_without_protection_decay_moves_frozen_rows():
    """Why `protect` exists: if torch changes this, the documentation is wrong."""
    model = Tagger(bias=False)
    optimizer = torch.optim.AdamW(model.parameters())
    for module in (model.embedding, model.head):
        mask_gradients(module, trainable_ids=NEW)
    frozen = old_rows(model)
    step(model, optimizer, IDS)
    assert not torch.equal(old_rows(model)[0], frozen[0])


@pytest.mark.parametrize("ids", [{"trainable_ids": [1, 9]}, {"frozen_ids": [0, *range(2, 9)]}], ids=str)
def test_gradient_of_frozen_rows_is_zero_from_the_backward_on(ids):
    module = nn.Linear(4, 10)
    expected = copy.deepcopy(module)
    hidden = torch.randn(3, 4)
    mask_gradients(module, **ids)
    module(hidden).pow(2).sum().backward()
    expected(hidden).pow(2).sum().backward()
    keep = torch.zeros(10, dtype=torch.bool)
    keep[[1, 9]] = True
    for got, full in ((module.weight.grad, expected.weight.grad), (module.bias.grad, expected.bias.grad)):
        assert torch.equal(got[keep], full[keep])
        assert not got[~keep].any()


def test_infinite_and_nan_gradients_of_frozen_rows_vanish():
    module = nn.Embedding(4, 2)
    mask_gradients(module, trainable_ids=[3])
    factor = torch.tensor([[float("inf")], [float("nan")], [1.0]])
    (module(torch.tensor([0, 1, 3])) * factor).sum().backward()
    assert torch.equal(module.weight.grad, torch.tensor([[0.0, 0.0]] * 3 + [[1.0, 1.0]]))


def test_gradients_accumulate():
    module = nn.Embedding(4, 2)
    mask_gradients(module, trainable_ids=[3])
    for _ in range(2):
        module(torch.tensor([0, 3])).sum().backward()
    assert torch.equal(module.weight.grad, torch.tensor([[0.0, 0.0]] * 3 + [[2.0, 2.0]]))


def test_sparse_gradients_are_masked():
    module = nn.Embedding(6, 2, sparse=True)
    handle = mask_gradients(module, trainable_ids=[5, 2])
    optimizer = torch.optim.SparseAdam(module.parameters())
    handle.protect(optimizer)
    before = module.weight.detach().clone()
    module(torch.tensor([0, 2, 2, 5])).sum().backward()
    assert torch.equal(module.weight.grad.to_dense().any(1).nonzero().flatten(), torch.tensor([2, 5]))
    optimizer.step()
    assert torch.equal((module.weight != before).any(1).nonzero().flatten(), torch.tensor([2, 5]))


def test_clip_norm_counts_trainable_rows_only():
    model = Tagger(bias=True)
    for module in (model.embedding, model.head):
        mask_gradients(module, trainable_ids=NEW)
    nn.functional.cross_entropy(model(IDS).flatten(0, 1), IDS.flatten()).backward()
    expected = torch.cat([p.grad[NEW].flatten() for p in model.parameters()]).norm()
    torch.testing.assert_close(nn.utils.clip_grad_norm_(model.parameters(), 1.0), expected)


def test_remove_takes_mask_and_protection_off():
    module = nn.Embedding(4, 2)
    handle = mask_gradients(module, trainable_ids=[3])
    optimizer = torch.optim.SGD(module.parameters(), lr=1.0)
    handle.protect(optimizer)
    handle.remove()
    handle.remove()
    before = module.weight.detach().clone()
    module(torch.tensor([0])).sum().backward()
    optimizer.step()
    assert torch.equal(module.weight[0], before[0] - 1.0)
    assert not module._forward_pre_hooks


def test_deep_copy_is_masked_by_itself():
    module = nn.Embedding(4, 2)
    mask_gradients(module, trainable_ids=[3])
    other = copy.deepcopy(module)
    other(torch.tensor([0, 3])).sum().backward()
    assert torch.equal(other.weight.grad, torch.tensor([[0.0, 0.0]] * 3 + [[1.0, 1.0]]))
    assert module.weight.grad is None


def test_mask_follows_an_exchanged_parameter():
    module = nn.Embedding(4, 2)
    handle = mask_gradients(module, trainable_ids=[3])
    module.load_state_dict({"weight": torch.zeros(4, 2)}, assign=True)
    module.weight.requires_grad_(True)
    module(torch.tensor([0, 3])).sum().backward()
    assert torch.equal(module.weight.grad, torch.tensor([[0.0, 0.0]] * 3 + [[1.0, 1.0]]))
    handle.remove()


def test_tied_weight_is_masked_once_for_both():
    table, head = nn.Embedding(10, 4), nn.Linear(4, 10, bias=False)
    head.weight = table.weight
    mask_gradients(table, trainable_ids=NEW)
    head(table(IDS)).sum().backward()
    assert not table.weight.grad[FROZEN].any()
    assert table.weight.grad[NEW].all()


@pytest.mark.parametrize(
    ("make", "options", "message"),
    [
        (lambda: nn.Embedding(4, 2), {}, "exactly one"),
        (lambda: nn.Embedding(4, 2), {"trainable_ids": [1], "frozen_ids": [2]}, "exactly one"),
        (lambda: nn.Embedding(4, 2), {"trainable_ids": [4]}, "outside of a table of 4 rows"),
        (lambda: nn.Embedding(4, 2), {"frozen_ids": range(4)}, "No row ids"),
        (lambda: nn.LayerNorm(4), {"trainable_ids": [1]}, "LayerNorm"),
        (lambda: nn.Embedding(4, 2).requires_grad_(False), {"trainable_ids": [1]}, "does not require grad"),
        (
            lambda: SplitEmbedding(nn.Embedding(4, 2), trainable_ids=[1]),
            {"trainable_ids": [1]},
            "SplitEmbedding",
        ),
    ],
)
def test_bad_input_is_refused(make, options, message):
    module = make()
    with pytest.raises(PartialEmbeddingError, match=message):
        mask_gradients(module, **options)
    assert not module._forward_pre_hooks


def test_protecting_an_optimizer_of_other_parameters_is_refused():
    handle = mask_gradients(nn.Embedding(4, 2), trainable_ids=[3])
    with pytest.raises(PartialEmbeddingError, match="does not hold the masked weight"):
        handle.protect(torch.optim.SGD(nn.Linear(2, 2).parameters(), lr=0.1))
    with pytest.raises(PartialEmbeddingError, match=r"not a torch\.optim\.Optimizer"):
        handle.protect(object())
