"""Keys and values before the first new token, kept from epoch to epoch: the same gradients without their forward."""

from __future__ import annotations

import contextlib
import copy
import errno
import functools
import io
import itertools
import logging
import re
import tempfile

import pytest
import torch
from conftest import bpe_tokenizer
from datasets import Dataset
from hypothesis import given, settings
from hypothesis import strategies as st
from test_chunked_loss import DRESSED
from test_prefix import IDS, OTHERS, SIZES, Lengths, gradients, prepare
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode
from trainings import Texts, arguments, rows_of, setup, train
from transformers import DataCollatorForLanguageModeling, LlamaConfig, LlamaForCausalLM, Trainer

from hf_partial_embed import (
    ChunkedLoss,
    FrozenPrefix,
    PartialEmbeddingCallback,
    PartialEmbeddingError,
    PrefixCache,
    add_tokens,
)

LOGGERS = ("hf_partial_embed.training.frozen_prefix", "hf_partial_embed.training.prefix_cache")


def attach(model):
    return model, add_tokens(model, bpe_tokenizer(), ["<a>", "<b>"])


def texts(size=8, length=12, seed=0):
    """Rows of ids; the first new token at another place in each, from a third of the text on."""
    generator = torch.Generator().manual_seed(seed)
    ids = torch.randint(4, 290, (size, length), generator=generator)
    for number, row in enumerate(ids):
        row[length // 3 + number % (length // 2) :: 3] = 300 + number % 2
    return ids


def epochs(ids, count=3, batch=4):
    """Batches, composed anew in each epoch."""
    for epoch in range(count):
        order = torch.randperm(len(ids), generator=torch.Generator().manual_seed(epoch))
        for first in range(0, len(ids), batch):
            yield epoch, order[first : first + batch]


def check(values, expected, **tolerance):
    for value, other in zip(values, expected, strict=True):
        torch.testing.assert_close(value, other, **(tolerance or {"rtol": 1e-5, "atol": 1e-6}))


def without_graph(lengths):
    """Positions that the layers ran without a graph, so far."""
    return sum(positions for positions, graph in lengths.calls if not graph)


def messages(caplog):
    return [record.getMessage() for record in caplog.records if record.name in LOGGERS]


@pytest.mark.parametrize(
    ("kind", "place"),
    [*((kind, "memory") for kind in ("llama", "phi", "gemma", "gpt2", *OTHERS)), ("gemma", "folder")],
)
def test_from_the_second_epoch_on_no_prefix_runs_and_the_gradients_are_those_of_a_whole_graph(
    kind, place, tied, tmp_path
):
    model, partial = prepare(kind, tied=tied)
    ids = texts()
    cache = PrefixCache(folder=tmp_path if place == "folder" else None)
    expected = [gradients(model, partial, ids[rows]) for _, rows in epochs(ids)]
    lengths = Lengths(model)
    with FrozenPrefix(model, cache) as prefix:
        for number, (epoch, rows) in enumerate(epochs(ids)):
            before = without_graph(lengths)
            check(gradients(model, partial, ids[rows]), expected[number])
            first = int((ids[rows] >= 300).any(0).int().argmax())
            assert lengths.calls[-1] == (12 - first, True)
            assert (without_graph(lengths) > before) is (epoch == 0)
        assert prefix.reason is None and prefix.cache is cache and len(cache) == 8
        assert not list(tmp_path.iterdir())
    assert len(cache) == 0 and cache.bytes == 0


@functools.cache
def two_alike():
    return prepare(tied=False), prepare(tied=False)


@pytest.mark.parametrize("chunked", [False, True], ids=["plain-loss", "chunked-loss"])
@settings(max_examples=10, deadline=None)
@given(data=st.data())
def test_any_lengths_padding_and_places(chunked, data):
    """Three steps on batches drawn from a few texts, which share beginnings."""
    (model, partial), (plain, plain_partial) = two_alike()
    side = data.draw(st.sampled_from(["left", "right"]))
    numbers = data.draw(st.lists(st.tuples(st.integers(3, 12), st.integers(0, 12)), min_size=3, max_size=5))
    rows = []
    for number, (length, first) in enumerate(numbers):
        row = torch.randint(4, 290, (length,), generator=torch.Generator().manual_seed(number % 3))
        row[first::2] = 300
        rows.append(row)
    cache = PrefixCache(max_bytes=data.draw(st.sampled_from([1 << 30, 10_000, 1])))
    with FrozenPrefix(model, cache), ChunkedLoss(model) if chunked else contextlib.nullcontext():
        for _ in range(3):
            chosen = data.draw(st.lists(st.sampled_from(range(len(rows))), min_size=1, max_size=3))
            width = max(len(rows[row]) for row in chosen) + data.draw(st.integers(0, 2))
            ids, mask = torch.ones(len(chosen), width, dtype=torch.long), torch.zeros(len(chosen), width)
            for place, row in enumerate(chosen):
                part = slice(0, len(rows[row])) if side == "right" else slice(width - len(rows[row]), width)
                ids[place, part], mask[place, part] = rows[row], 1
            # Labels at the padding, too: the hidden states there are the same.
            options = {"attention_mask": mask.long()}
            check(gradients(model, partial, ids, **options), gradients(plain, plain_partial, ids, **options))
            assert cache.bytes <= cache.max_bytes


def test_a_batch_that_comes_again_gives_the_same_bits_as_without_a_cache(tied):
    model, partial = prepare(tied=tied, dtype=torch.float32)
    ids = texts()
    ids[:, :6], ids[:, 6] = ids[:, :6].clamp(max=290), 300  # all texts begin alike, so that the same positions run
    with FrozenPrefix(model):
        expected = gradients(model, partial, ids)
    with FrozenPrefix(model, PrefixCache()):
        for _ in range(3):
            assert all(map(torch.equal, gradients(model, partial, ids), expected))


def test_file_and_memory_hold_the_same_bits(tmp_path):
    model, partial = prepare(dtype=torch.bfloat16)
    ids, found = texts(), []
    for folder in (None, tmp_path):
        with FrozenPrefix(model, PrefixCache(folder=folder)):
            found.append([gradients(model, partial, ids[rows]) for _, rows in epochs(ids)])
    for one, other in zip(*found, strict=True):
        assert all(map(torch.equal, one, other))


@pytest.mark.parametrize("place", ["memory", "folder"])
def test_beyond_the_bound_texts_are_computed_each_time_and_one_warning_says_so(place, tmp_path, caplog):
    model, partial = prepare()
    ids = texts()
    expected = [gradients(model, partial, ids[rows]) for _, rows in epochs(ids)]
    cache = PrefixCache(max_bytes=20_000, folder=tmp_path if place == "folder" else None)
    lengths = Lengths(model)
    with caplog.at_level(logging.WARNING), FrozenPrefix(model, cache):
        for number, (_, rows) in enumerate(epochs(ids)):
            check(gradients(model, partial, ids[rows]), expected[number])
            assert cache.bytes <= 20_000
            if cache._file is not None:
                assert cache._file.seek(0, io.SEEK_END) <= 20_000
        assert 2 <= len(cache) <= 6
    assert without_graph(lengths) > 0
    (message,) = messages(caplog)
    assert re.match(r"The prefixes of \d texts are kept .* of the 20.0 kB that it may take are in use", message), (
        message
    )


def test_a_full_disk_leaves_no_half_entry(tmp_path, caplog, monkeypatch):
    class Full:
        """A file on a disk with 10,000 bytes left."""

        def __init__(self, file):
            self.file = file

        def __getattr__(self, name):
            return getattr(self.file, name)

        def write(self, data):
            room = 10_000 - self.file.tell()
            if room <= 0:
                raise OSError(errno.ENOSPC, "No space left on device")
            return self.file.write(data[:room])

    make = tempfile.TemporaryFile
    monkeypatch.setattr(tempfile, "TemporaryFile", lambda **options: Full(make(**options)))
    model, partial = prepare()
    ids = texts()
    expected = [gradients(model, partial, ids[rows]) for _, rows in epochs(ids)]
    cache = PrefixCache(folder=tmp_path)
    with caplog.at_level(logging.WARNING), FrozenPrefix(model, cache):
        for number, (_, rows) in enumerate(epochs(ids)):
            check(gradients(model, partial, ids[rows]), expected[number])
        assert len(cache)
        entries = cache._entries.values()
        whole = sum(entry.size - entry.inputs.nbytes - entry.normalizers.nbytes for entry in entries)
        assert cache._file.seek(0, io.SEEK_END) == whole
    (message,) = messages(caplog)
    assert "No space left on device" in message


def double_a_weight(model):
    with torch.no_grad():
        model.model.layers[0].self_attn.v_proj.weight.mul_(2)


def other_data(model):
    parameter = model.model.layers[0].self_attn.v_proj.weight
    parameter.data = parameter.data * 2


def other_module(model):
    old = model.model.layers[0].self_attn.v_proj
    new = nn.Linear(old.in_features, old.out_features, bias=False, dtype=old.weight.dtype).requires_grad_(False)
    model.model.layers[0].self_attn.v_proj = new


@pytest.mark.parametrize("change", [double_a_weight, other_data, other_module])
def test_entries_of_other_weights_are_not_read(change):
    model, partial = prepare()
    ids = texts()
    with FrozenPrefix(model, PrefixCache()):
        gradients(model, partial, ids)
        change(model)
        values = gradients(model, partial, ids)
    check(values, gradients(model, partial, ids))


@pytest.mark.parametrize("chunked", [False, True], ids=["plain-loss", "chunked-loss"])
def test_autocast_has_entries_of_its_own(chunked):
    model, partial = prepare(dtype=torch.float32)
    ids = texts()
    found = []
    loss = ChunkedLoss(model) if chunked else contextlib.nullcontext()
    with loss, FrozenPrefix(model, PrefixCache()) as prefix:
        for enabled in (False, True, True, False):
            with torch.autocast("cpu", torch.bfloat16, enabled=enabled):
                found.append(gradients(model, partial, ids))
        assert prefix.reason is None and prefix.cache is not None
    with FrozenPrefix(model):
        for enabled, values in zip((False, True, True, False), found, strict=True):
            with torch.autocast("cpu", torch.bfloat16, enabled=enabled):
                check(values, gradients(model, partial, ids), rtol=2e-2 if enabled else 1e-5, atol=1e-3)


def test_a_save_of_the_model_between_two_steps_keeps_the_entries():
    model, partial = prepare()
    ids, lengths = texts(), Lengths(model)
    with FrozenPrefix(model, PrefixCache()):
        gradients(model, partial, ids)
        with torch.no_grad():
            next(iter(partial.parameters())).add_(1)
        model.state_dict()
        before = without_graph(lengths)
        values = gradients(model, partial, ids)
        assert without_graph(lengths) == before
    check(values, gradients(model, partial, ids))


def drops_activations():
    model, partial = prepare("gpt2")
    return model.train(), partial


def drops_activations_now_and_then():
    """A layer that the trial finds unchanged, as with a small probability of leaving layers out."""
    model, partial = prepare()
    model.model.layers[0].register_forward_hook(lambda *_: torch.rand(()) and None)
    return model, partial


@pytest.mark.parametrize(
    ("make", "reason"),
    [(drops_activations, "drops activations at random"), (drops_activations_now_and_then, "draws random numbers")],
)
def test_what_draws_random_numbers_is_not_kept(make, reason, caplog):
    model, partial = make()
    ids, lengths = texts(), Lengths(model)
    with caplog.at_level(logging.WARNING), FrozenPrefix(model, cache := PrefixCache()):
        for _ in range(2):
            gradients(model, partial, ids)
        assert not len(cache)
    (message,) = messages(caplog)
    assert reason in message and lengths.calls


def test_the_trial_is_repeated_when_the_mode_changes(caplog):
    model, partial = prepare("gpt2")
    ids = texts()
    with caplog.at_level(logging.WARNING), FrozenPrefix(model, PrefixCache()) as prefix:
        gradients(model, partial, ids)
        assert prefix.reason is None
        model.train()
        gradients(model, partial, ids)
        assert "drops activations" in prefix.reason


@pytest.mark.parametrize("kind", ["dynamic", "longrope"])
@pytest.mark.parametrize("kept", [False, True], ids=["each-time", "kept"])
def test_frequencies_that_depend_on_the_length_of_the_input(kind, kept, caplog):
    """Before the first new token they would be others than those of the whole text."""
    rope = {"rope_type": kind, "rope_theta": 10000.0, "factor": 4.0}
    if kind == "longrope":
        rope |= {"short_factor": [1.0] * 4, "long_factor": [3.0] * 4, "original_max_position_embeddings": 8}
    models = []
    for _ in range(2):
        torch.manual_seed(0)
        config = LlamaConfig(
            vocab_size=300, num_key_value_heads=2, pad_token_id=1, rope_parameters=dict(rope),
            max_position_embeddings=8 if kind == "dynamic" else 32, **SIZES,
        )  # fmt: skip
        models.append(attach(LlamaForCausalLM(config).double().eval().requires_grad_(False)))
    (model, partial), (plain, plain_partial) = models
    ids = texts(size=4)
    with caplog.at_level(logging.WARNING), FrozenPrefix(model, PrefixCache() if kept else None) as prefix:
        for _ in range(2):
            check(gradients(model, partial, ids), gradients(plain, plain_partial, ids))
        assert "depend on how long the input is" in prefix.reason
    assert len(messages(caplog)) == 1


def test_a_copy_of_the_model_begins_with_an_empty_cache(tmp_path):
    model, partial = prepare()
    ids = texts()
    with FrozenPrefix(model, cache := PrefixCache(folder=tmp_path)):
        gradients(model, partial, ids)
        other, rows = copy.deepcopy((model, partial))
        assert len(cache) == 8
        lengths = Lengths(other)
        for _ in range(2):
            gradients(other, rows, ids)
        assert lengths.calls == [(9, False), (8, True), (8, True)]


class Logits(TorchDispatchMode):
    """Counts the rows of all matrix products over the whole vocabulary, forward and backward."""

    def __init__(self) -> None:
        super().__init__()
        self.forward = self.backward = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        if func.overloadpacket in (torch.ops.aten.mm, torch.ops.aten.addmm):
            left, right = args[-2:]
            self.forward += left.shape[0] * (right.shape[1] >= 290)
            self.backward += left.shape[0] * (left.shape[1] >= 290)
        return out

    def take(self):
        found = self.forward, self.backward
        self.forward = self.backward = 0
        return found


@pytest.mark.parametrize("kind", ["llama", "phi", "gemma", "gpt2", "mistral", "opt", *DRESSED])
def test_with_the_chunked_loss_old_logits_of_a_prefix_are_computed_once(kind, tied):
    """DRESSED: models that scale or cap their logits. Phi has a bias."""
    if kind in DRESSED:
        torch.manual_seed(0)
        model, partial = attach(DRESSED[kind]().double().eval().requires_grad_(False))
    else:
        model, partial = prepare(kind, tied=tied)
    ids = texts()
    expected = [gradients(model, partial, ids[rows]) for _, rows in epochs(ids)]
    cache = PrefixCache()
    with ChunkedLoss(model), FrozenPrefix(model, cache) as prefix:
        gradients(model, partial, ids[:1])  # tried out here
        cache.clear()
        with Logits() as logits:
            for number, (epoch, rows) in enumerate(epochs(ids)):
                check(gradients(model, partial, ids[rows]), expected[number])
                first = int((ids[rows] >= 300).any(0).int().argmax())
                after = len(rows) * (11 - first)  # the last position has no label
                forward, backward = logits.take()
                assert backward == after
                assert forward == after if epoch > 1 else forward <= len(rows) * 11
        assert prefix.reason is None and prefix.cache is cache


def test_without_a_cache_the_prefix_has_no_gradient_through_the_head():
    model, partial = prepare()
    expected = gradients(model, partial, IDS)
    with ChunkedLoss(model), FrozenPrefix(model):
        gradients(model, partial, IDS)
        with Logits() as logits:
            check(gradients(model, partial, IDS), expected)
    assert logits.take() == (2 * 5 + 2 * 3, 2 * 3)


@pytest.mark.parametrize("kept", [False, True], ids=["each-time", "kept"])
def test_positions_without_a_label_need_no_logits(kept):
    model, partial = prepare()
    labels = IDS.clone()
    labels[:, :3] = -100  # the first five positions have no new token, and each label is that of the position before
    expected = gradients_of(model, partial, IDS, labels)
    with ChunkedLoss(model), FrozenPrefix(model, PrefixCache() if kept else None):
        gradients_of(model, partial, IDS, labels)
        with Logits() as logits:
            for again in (IDS, labels, labels):
                values = gradients_of(model, partial, IDS, again)
                logits.take() if again is IDS else None
        check(values, expected)
        assert logits.take() == (2 * 2 * (6 if not kept else 3), 2 * 2 * 3)


def test_labels_are_no_part_of_what_is_kept():
    model, partial = prepare()
    ids = texts()
    others = ids.roll(1, 0)
    others[:, :2] = -100
    expected = [gradients_of(model, partial, ids, labels) for labels in (ids, others)]
    with ChunkedLoss(model), FrozenPrefix(model, PrefixCache()):
        for labels, values in zip((ids, others, ids), (*expected, expected[0]), strict=True):
            check(gradients_of(model, partial, ids, labels), values)


def gradients_of(model, partial, ids, labels):
    loss = model(input_ids=ids, labels=labels).loss
    return [loss.detach(), *torch.autograd.grad(loss, list(partial.parameters()))]


def test_a_head_that_sees_other_hidden_states_computes_all_logits():
    """Something between the layers and the head: the positions are not recognised, and the loss is the plain one's."""
    model, partial = prepare(tied=False)
    ids = texts()
    model.lm_head.register_forward_pre_hook(lambda module, args: (args[0] * 2,))
    expected = gradients(model, partial, ids)
    with ChunkedLoss(model), FrozenPrefix(model, PrefixCache()) as prefix:
        for _ in range(2):
            check(gradients(model, partial, ids), expected)
        assert prefix.reason is None


def old_input_rows(model):
    with torch.no_grad():
        model.get_input_embeddings().raw_table("weight")[4:290].mul_(2)


def old_output_rows(model):
    with torch.no_grad():
        model.get_output_embeddings().raw_table("weight")[4:290].mul_(2)


def bias(model):
    with torch.no_grad():
        model.get_output_embeddings().raw_table("bias")[4:290].add_(torch.arange(286) / 100)


@pytest.mark.parametrize(
    ("change", "kind", "keeps"),
    [(old_input_rows, "llama", False), (old_output_rows, "llama", True), (bias, "phi", True)],
)
def test_old_logits_of_another_head_are_not_read(change, kind, keeps):
    model, partial = prepare(kind, tied=False)
    ids, lengths = texts(), Lengths(model)
    with ChunkedLoss(model), FrozenPrefix(model, PrefixCache()):
        gradients(model, partial, ids)
        change(model)
        before = without_graph(lengths)
        values = gradients(model, partial, ids)
        assert (without_graph(lengths) == before) is keeps
    check(values, gradients(model, partial, ids))


def test_a_save_keeps_the_old_logits_and_the_rows_are_new_in_each_step():
    model, partial = prepare()
    ids = texts()
    with ChunkedLoss(model), FrozenPrefix(model, PrefixCache()):
        gradients(model, partial, ids)
        with torch.no_grad():
            next(iter(partial.parameters())).add_(1)
        model.state_dict()
        with Logits() as logits:
            values = gradients(model, partial, ids)
        assert logits.take()[0] == len(ids) * 7
    check(values, gradients(model, partial, ids))


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: PrefixCache(max_bytes=0), "max_bytes=0 must be a whole number"),
        (lambda: PrefixCache(max_bytes=1.5), "max_bytes=1.5 must be"),
        (lambda: PrefixCache(folder="no/such"), "no folder 'no/such' for a prefix cache"),
        (lambda: PartialEmbeddingCallback(setup()[2], frozen_prefix="disk"), "frozen_prefix='disk' must be"),
    ],
)
def test_arguments_that_make_no_sense(make, message):
    with pytest.raises(PartialEmbeddingError, match=message):
        make()


def late_tokens(data, index):
    """The first four to seven positions of a text have no new token."""
    ids = data.ids[index].clone()
    ids[: 4 + int(index) % 4].clamp_(max=250)
    return {"input_ids": ids, "labels": ids}


def test_trainer_trains_the_same_rows_and_goes_on_after_a_resume(tmp_path, monkeypatch):
    monkeypatch.setattr(Texts, "__getitem__", late_tokens)
    results = {}
    for name, options, steps in (
        ("plain", False, [12]), ("cache", "cache", [12]), ("resumed", PrefixCache(folder=tmp_path), [9, 12]),
    ):  # fmt: skip
        resume = None
        for last in steps:
            model, tokenizer, partial = setup(tied=False)
            callback = PartialEmbeddingCallback(partial, frozen_prefix=options, chunked_loss=name == "resumed")
            lengths = Lengths(model)
            data = {"optim": "sgd", "learning_rate": 1.0, "max_steps": last, "lr_scheduler_type": "constant"}
            train(model, tokenizer, partial, tmp_path / name, callbacks=[callback], resume=resume, **data)
            resume = str(tmp_path / name / "checkpoint-9")
            if name == "cache":  # two epochs of six steps each, the trial's calls before them
                assert all(graph for _, graph in lengths.calls[-6:])
                assert without_graph(lengths) > 0
        results[name] = rows_of(partial)
    for name in ("cache", "resumed"):
        check(results[name], results["plain"], rtol=1e-4, atol=1e-5)


def test_batches_sorted_by_the_first_new_token_in_a_trainer(tmp_path):
    """As the guide says: a column, and a collator that leaves it out. Each epoch has other batches."""
    model, tokenizer, partial = setup()
    new, generator = set(partial.token_ids), torch.Generator().manual_seed(0)
    rows = torch.randint(4, 250, (64, 16), generator=generator)
    for number, row in enumerate(rows):
        row[number * 7 % 16 :: 3] = partial.token_ids[0]
    data = Dataset.from_dict({"input_ids": rows.tolist()})

    def place(row):
        ids = row["input_ids"]
        return {"length": next((place for place, token in enumerate(ids) if token in new), len(ids))}

    collate, places = DataCollatorForLanguageModeling(tokenizer, mlm=False), []

    def without_length(rows):
        places.append([row["length"] for row in rows])
        return collate([{"input_ids": row["input_ids"]} for row in rows])

    options = {
        "train_sampling_strategy": "group_by_length", "remove_unused_columns": False, "max_steps": 32,
        "save_strategy": "no", "learning_rate": 1e-5, "logging_strategy": "no",
    }  # fmt: skip
    lengths = Lengths(model)
    Trainer(
        model=model, args=arguments(tmp_path, **options), train_dataset=data.map(place), data_collator=without_length,
        callbacks=[PartialEmbeddingCallback(partial, frozen_prefix="cache", diagnostics=False)],
    ).train()  # fmt: skip
    first, second = places[:16], places[16:32]
    assert sum(map(min, first)) > 0.7 * sum(sum(batch) / 4 for batch in first)  # shuffled: 0.35
    assert first != second and sorted(itertools.chain(*first)) == sorted(itertools.chain(*second))
    assert without_graph(lengths)
