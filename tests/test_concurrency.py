"""A model with rows elsewhere: copied, saved whole, in workers of a DataLoader, in spawned processes, in threads."""

from __future__ import annotations

import copy
import io
import itertools
import logging
import pickle
import sys
import threading
import warnings
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from added import add_tokens
from conftest import bpe_tokenizer, build_model, logits_of, run_model
from processes import rows
from quick import quick
from torch.utils.data import DataLoader, Dataset

from hf_partial_embed import TokenRows
from hf_partial_embed.attachment.steps import SCOPE

TOKENS = ["<think>", "</think>", "praseodymium"]
IDS = torch.tensor([[5, 300, 301, 302, 7]])


def prepared(strategy: str, tied: bool, seed: int = 0):
    tokenizer = bpe_tokenizer()
    model = build_model("phi", len(tokenizer), tied=tied, seed=seed)
    return model, tokenizer, add_tokens(model, tokenizer, TOKENS, strategy=strategy)


def train(partial, steps: int = 3) -> dict[str, torch.Tensor]:
    """A few steps of AdamW with decay; returns the rows."""
    optimizer = torch.optim.AdamW(partial.param_groups(lr=0.1, weight_decay=0.1))
    partial.protect(optimizer)
    for _ in range(steps):
        run_model(partial.model, IDS, labels=IDS).loss.backward()
        optimizer.step()
        partial.model.zero_grad()
    partial.verify()
    return partial.token_rows().tensors()


def assert_equal(one: dict[str, torch.Tensor], other: dict[str, torch.Tensor]) -> None:
    assert one.keys() == other.keys()
    assert all(torch.equal(one[name], other[name]) for name in one)


class Logits(Dataset):
    """Items that a model with rows computes, wherever it is."""

    def __init__(self, model, partial) -> None:
        self.model, self.partial = model, partial

    def __len__(self) -> int:
        return 4

    def __getitem__(self, index: int):
        ids = torch.tensor([[index, *self.partial.token_ids, 9]])
        with torch.no_grad():
            vectors = self.model.get_input_embeddings()(ids)[0]
        self.partial.verify()
        return ids[0], vectors, logits_of(self.model, ids)[0]


@pytest.mark.parametrize(
    ("strategy", "start_method"),
    quick(itertools.product(("split", "mask"), ("fork", "spawn")), lambda strategy, start: start == "fork"),
)
def test_workers_of_a_data_loader_compute_the_same(strategy, start_method):
    model, _, partial = prepared(strategy, tied=True)
    train(partial)
    loader = DataLoader(Logits(model, partial), num_workers=1, multiprocessing_context=start_method)
    for ids, vectors, logits in loader:
        with torch.no_grad():
            assert torch.equal(vectors, model.get_input_embeddings()(ids))
        assert torch.equal(logits, logits_of(model, ids))


def test_spawned_process_trains_a_model_that_it_was_sent(elsewhere, strategy, tied):
    _, _, partial = prepared(strategy, tied)
    found = elsewhere(train, copy.deepcopy(partial))  # torch shares the memory of what it sends
    assert_equal(found, train(partial))


def test_process_sends_a_model_back(elsewhere, strategy, tied):
    model, tokenizer, partial = elsewhere(prepared, strategy, tied)
    assert partial.model is model and partial.tokenizer is tokenizer
    rows = train(partial)
    assert_equal(rows, train(prepared(strategy, tied)[2]))
    assert_equal(partial.detach().tensors(), rows)
    base = build_model("phi", 300, tied=tied)
    assert all(torch.equal(value, base.state_dict()[name]) for name, value in model.state_dict().items())
    assert tokenizer._tokenizer.to_str() == bpe_tokenizer()._tokenizer.to_str()


@pytest.mark.parametrize("how", ["deepcopy", "pickle", "torch.save"])
def test_copy_trains_like_the_original_and_apart_from_it(strategy, tied, how):
    _, _, partial = prepared(strategy, tied)
    if how == "torch.save":
        buffer = io.BytesIO()
        torch.save(partial, buffer)
        buffer.seek(0)
        other = torch.load(buffer, weights_only=False)
    else:
        other = copy.deepcopy(partial) if how == "deepcopy" else pickle.loads(pickle.dumps(partial))
    before = partial.token_rows().tensors()
    rows = train(other)
    assert_equal(partial.token_rows().tensors(), before)
    partial.verify()
    assert_equal(train(partial), rows)


def test_state_dict_loads_with_weights_only(strategy, tied, tmp_path):
    model, _, partial = prepared(strategy, tied)
    train(partial)
    torch.save(model.state_dict(), tmp_path / "state.pt")
    state = torch.load(tmp_path / "state.pt", weights_only=True)
    fresh, _, again = prepared(strategy, tied)
    fresh.load_state_dict(state)
    assert_equal(again.token_rows().tensors(), partial.token_rows().tensors())
    plain = build_model("phi", 303, tied=tied)
    wanted = {name: value for name, value in state.items() if "new_rows" not in name}
    plain.load_state_dict(wanted)
    assert torch.equal(logits_of(plain, IDS).argmax(-1), logits_of(model, IDS).argmax(-1))
    torch.testing.assert_close(logits_of(plain, IDS), logits_of(model, IDS))


def test_whole_model_is_no_file_of_weights_only(strategy, tmp_path):
    """As any whole model: it is a pickle of classes, which `weights_only` does not read."""
    model, _, _ = prepared(strategy, tied=True)
    torch.save(model, tmp_path / "model.pt")
    with pytest.raises(pickle.UnpicklingError, match="Weights only load failed"):
        torch.load(tmp_path / "model.pt", weights_only=True)
    whole = torch.load(tmp_path / "model.pt", weights_only=False)
    assert torch.equal(logits_of(whole, IDS), logits_of(model, IDS))


@pytest.fixture
def hasty_threads():
    """Threads take turns as often as they can."""
    before = sys.getswitchinterval()
    sys.setswitchinterval(1e-6)
    yield
    sys.setswitchinterval(before)


def in_threads(function, arguments: list) -> list:
    """Results of a function that starts in as many threads at once."""
    barrier = threading.Barrier(len(arguments))

    def run(argument):
        barrier.wait()
        return function(argument)

    with ThreadPoolExecutor(len(arguments)) as pool:
        return list(pool.map(run, arguments))


@pytest.mark.usefixtures("hasty_threads")
def test_threads_share_a_model(strategy, tied):
    model, _, partial = prepared(strategy, tied)
    train(partial)
    expected = logits_of(model, IDS)

    def work(number: int) -> bool:
        good = True
        for _ in range(20):
            if number % 2:
                good = good and torch.equal(logits_of(model, IDS), expected)
            else:
                partial.token_rows()
                run_model(model, IDS, labels=IDS).loss.item()
        return good

    assert all(in_threads(work, list(range(4))))
    partial.verify()
    if strategy == "split":
        assert getattr(model, SCOPE).depth == 0
    if tied:
        assert model.get_output_embeddings().weight is model.get_input_embeddings().weight


@pytest.mark.usefixtures("hasty_threads")
def test_threads_with_models_of_their_own_do_not_disturb_each_other(strategy):
    # Made before, since torch's random numbers are those of the process.
    models = [build_model("phi", 300, tied=bool(seed % 2), seed=seed) for seed in range(3)]
    copies = copy.deepcopy(models)

    def work(model):
        tokenizer = bpe_tokenizer()
        partial = add_tokens(model, tokenizer, TOKENS, strategy=strategy)
        return partial.token_ids, train(partial)

    alone = [work(model) for model in copies]
    settings = logging.root.manager.disable, list(warnings.filters)
    together = in_threads(work, models)
    assert (logging.root.manager.disable, list(warnings.filters)) == settings
    for (ids, expected), (found_ids, found) in zip(alone, together, strict=True):
        assert ids == found_ids
        assert_equal(found, expected)


@pytest.mark.usefixtures("hasty_threads")
def test_threads_that_save_to_one_place_leave_a_whole_file(tmp_path):
    sets = [rows(8, 64, fill=float(number)) for number in range(3)]

    def work(number: int) -> None:
        for _ in range(10):
            sets[number].save_pretrained(tmp_path)
            assert len(TokenRows.from_pretrained(tmp_path).input_rows.unique()) == 1

    in_threads(work, list(range(3)))
    assert sorted(path.name for path in tmp_path.iterdir()) == ["README.md", "token_rows.safetensors"]
