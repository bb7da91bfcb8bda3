"""A long life: row sets are put on, trained, saved, taken off, loaded and merged in any order, and all holds.

A plain list of what each row set must be (tokens and rows) is kept beside the model. The default run takes a few
hundred steps; with

    pytest -m slow tests/test_soak.py

it is 10,000 on one model, with memory and the number of tensors looked at on the way.
"""

from __future__ import annotations

import copy
import gc
import random
import tempfile
from pathlib import Path

import pytest
import torch
from conftest import bpe_tokenizer, build_model, logits_of, run_model
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule
from states import assert_same, model_state, tokenizer_state
from transformers import AutoModelForCausalLM

from hf_partial_embed import PartialEmbeddingError, TokenRows, add_tokens, load_tokens, train_tokens
from hf_partial_embed.attachment.attachment import attachments_of

BASE = 300
IDS = torch.tensor([[5, 299, 7, 2]])


class Expected:
    """A row set, and what must be true of it."""

    def __init__(self, partial) -> None:
        self.partial = partial
        self.tokens = partial.tokens
        self.note()

    def note(self) -> None:
        """The rows as they are now are the right ones."""
        self.rows = {name: rows.clone() for name, rows in self.partial.token_rows().tensors().items()}


class Life:
    """The steps, with what must hold after each."""

    def __init__(self, strategy: str, tied: bool, folder: Path) -> None:
        self.strategy, self.folder = strategy, folder
        self.tokenizer = bpe_tokenizer()
        self.model = build_model("llama", BASE + 2, tied=tied)  # two spare rows
        self.model.requires_grad_(False)
        tables = {self.model.get_input_embeddings().weight, self.model.get_output_embeddings().weight}
        # For masked tables, whose identity lasts, and which grow: one without a state.
        self.optimizer = torch.optim.SGD(tables, lr=1e-2, weight_decay=0.1)
        self.live: list[Expected] = []
        self.off: list[TokenRows] = []
        self.steps = 0
        self.remember()

    def remember(self) -> None:
        self.before = {**model_state(self.model), **tokenizer_state(self.tokenizer)}
        self.old = {name: tensor.clone() for name, tensor in self.model.state_dict().items()}
        self.logits = logits_of(self.model, IDS)[..., :BASE]

    def add(self, count: int, special: bool) -> None:
        self.steps += 1
        tokens = [f"<{self.steps}-{number}>" for number in range(count)]
        partial = add_tokens(
            self.model, self.tokenizer, tokens, strategy=self.strategy, special=special, seed=self.steps
        )
        self._is_on(Expected(partial))

    def _is_on(self, expected: Expected) -> None:
        expected.partial.protect(self.optimizer)
        self.live.append(expected)

    def train_old(self, first: int) -> None:
        """Train rows of the vocabulary; those that train already are refused."""
        ids = [first, first + 7, first + 3]
        taken = {token_id for expected in self.live for token_id in expected.partial.token_ids}
        if taken & set(ids):
            with pytest.raises(PartialEmbeddingError, match="are trainable already"):
                train_tokens(self.model, self.tokenizer, ids, strategy=self.strategy)
        else:
            self._is_on(Expected(train_tokens(self.model, self.tokenizer, ids, strategy=self.strategy)))

    def step(self, which: int) -> None:
        """A step of an optimizer, with decay, over the rows of one set."""
        expected = self.live[which % len(self.live)]
        partial = expected.partial
        optimizer = self.optimizer
        if self.strategy == "split":
            optimizer = torch.optim.AdamW(partial.parameters(), lr=1e-3, weight_decay=0.1)
        ids = torch.tensor([[5, *partial.token_ids, 9]])
        run_model(self.model, ids, labels=ids).loss.backward()
        optimizer.step()
        self.model.zero_grad()
        for trained in self.live if self.strategy == "mask" else [expected]:  # there, all sets on the table
            trained.note()

    def save_and_load(self, which: int) -> None:
        """Save a set, take it off, and load it again; it comes last."""
        expected = self.live.pop(which % len(self.live))
        expected.partial.save_pretrained(self.folder)
        expected.partial.detach()
        if self.strategy == "split":
            expected.partial = load_tokens(self.model, self.tokenizer, self.folder)
        else:
            rows = TokenRows.from_pretrained(self.folder)
            expected.partial = rows.attach(self.model, self.tokenizer, strategy="mask")
        self._is_on(expected)

    def detach(self, which: int) -> None:
        expected = self.live.pop(which % len(self.live))
        rows = expected.partial.detach()
        assert all(torch.equal(rows.tensors()[name], kept) for name, kept in expected.rows.items())
        with pytest.raises(PartialEmbeddingError, match="not on a model any more"):
            expected.partial.detach()
        self.off.append(rows)

    def attach(self) -> None:
        rows = self.off.pop()
        try:
            partial = rows.attach(self.model, self.tokenizer, strategy=self.strategy)
        except PartialEmbeddingError as error:
            assert "are trainable already" in str(error), error
            return
        self._is_on(Expected(partial))
        assert all(torch.equal(kept, rows.tensors()[name]) for name, kept in self.live[-1].rows.items())

    def refuse(self) -> None:
        """What cannot be done changes nothing."""
        for call in (
            lambda: add_tokens(self.model, self.tokenizer, ["<fine>", "<s>"], strategy=self.strategy),
            lambda: train_tokens(self.model, self.tokenizer, [5, 10**6], strategy=self.strategy),
            lambda: load_tokens(self.model, self.tokenizer, self.folder / "nothing"),
        ):
            with pytest.raises(PartialEmbeddingError):
                call()

    def copy(self) -> None:
        """A copy is one of its own: what is done to it is not seen here."""
        other = copy.deepcopy(self.model)
        assert torch.equal(logits_of(other, IDS), logits_of(self.model, IDS))
        for parameter in other.parameters():
            parameter.data.zero_()

    def merge(self) -> None:
        """Merge all, the first one first; the model is then the start of a new life."""
        whole = logits_of(self.model, IDS)
        while self.live:
            self.live.pop(0).partial.merge()
        assert not attachments_of(self.model)
        torch.testing.assert_close(logits_of(self.model, IDS), whole)
        for name, value in self.model.state_dict().items():
            assert value.isfinite().all(), name
        self.model.save_pretrained(self.folder / "merged")
        loaded = AutoModelForCausalLM.from_pretrained(self.folder / "merged")
        assert torch.equal(logits_of(loaded, IDS), logits_of(self.model, IDS))

    def check(self) -> None:
        """What always holds."""
        trained: set[int] = set()
        for expected in self.live:
            partial = expected.partial
            partial.verify()
            assert partial.tokens == expected.tokens
            now = partial.token_rows().tensors()
            assert all(torch.equal(now[name], kept) for name, kept in expected.rows.items())
            assert not trained & set(partial.token_ids)
            trained |= set(partial.token_ids)
            if expected.tokens:
                assert self.tokenizer.convert_ids_to_tokens(partial.token_ids) == expected.tokens
        size = self.model.config.vocab_size
        assert size == len(self.model.get_input_embeddings()._parameters["weight"]) >= len(self.tokenizer)
        assert size == max(BASE + 2, len(self.tokenizer))
        keep = torch.tensor([row for row in range(BASE) if row not in trained])
        for name, tensor in self.model.state_dict().items():
            if name in self.old:
                old = self.old[name]
                same = (tensor[keep], old[keep]) if len(old) == BASE + 2 else (tensor, old)
                assert torch.equal(*same), name
        if not self.live:
            now = {**model_state(self.model), **tokenizer_state(self.tokenizer)}
            assert_same(self.before, now)
            assert torch.equal(logits_of(self.model, IDS)[..., :BASE], self.logits)


class Soak(RuleBasedStateMachine):
    """`Life` with steps that hypothesis chooses, and shortens where one fails."""

    @initialize(strategy=st.sampled_from(["split", "mask"]), tied=st.booleans())
    def begin(self, strategy: str, tied: bool) -> None:
        self.folder = tempfile.TemporaryDirectory()
        self.life = Life(strategy, tied, Path(self.folder.name))

    @precondition(lambda self: len(self.life.live) < 4)
    @rule(count=st.integers(1, 3), special=st.booleans())
    def add(self, count: int, special: bool) -> None:
        self.life.add(count, special)

    @precondition(lambda self: len(self.life.live) < 4)
    @rule(first=st.integers(4, 280))
    def train_old(self, first: int) -> None:
        self.life.train_old(first)

    @precondition(lambda self: self.life.live)
    @rule(which=st.integers(0, 3))
    def step(self, which: int) -> None:
        self.life.step(which)

    @precondition(lambda self: self.life.live)
    @rule(which=st.integers(0, 3))
    def save_and_load(self, which: int) -> None:
        self.life.save_and_load(which)

    @precondition(lambda self: self.life.live)
    @rule(which=st.integers(0, 3))
    def detach(self, which: int) -> None:
        self.life.detach(which)

    @precondition(lambda self: self.life.off and len(self.life.live) < 4)
    @rule()
    def attach(self) -> None:
        self.life.attach()

    @rule()
    def refuse(self) -> None:
        self.life.refuse()

    @rule()
    def copy(self) -> None:
        self.life.copy()

    @precondition(lambda self: self.life.live)
    @rule()
    def merge(self) -> None:
        life = self.life
        life.merge()
        self.life = Life(life.strategy, life.model.config.tie_word_embeddings, life.folder)

    @invariant()
    def holds(self) -> None:
        if hasattr(self, "life"):
            self.life.check()

    def teardown(self) -> None:
        if not hasattr(self, "life"):
            return
        while self.life.live:
            self.life.detach(len(self.life.live) - 1)
        self.life.check()
        self.folder.cleanup()


TestAnyOrder = Soak.TestCase
TestAnyOrder.settings = settings(max_examples=10, stateful_step_count=15, deadline=None, derandomize=True)


def resident_bytes() -> int:
    return int(Path("/proc/self/statm").read_text().split()[1]) * 4096


def live_tensors() -> int:
    gc.collect()
    return sum(issubclass(type(value), torch.Tensor) for value in gc.get_objects())  # no look at lazy objects


@pytest.mark.slow
@pytest.mark.timeout(3000)
@pytest.mark.skipif(not Path("/proc/self/statm").exists(), reason="needs /proc")
def test_ten_thousand_steps_leave_nothing_behind(strategy, tied, tmp_path):
    chance = random.Random(11)
    life = Life(strategy, tied, tmp_path)
    measured = []
    counts: dict[str, int] = {}
    for number in range(2500):  # of each of the four kinds
        choices = ["step", "step", "save_and_load", "detach", "refuse", "copy"] if life.live else ["refuse", "copy"]
        if len(life.live) < 4:
            choices += ["add", "add", "train_old"] + (["attach"] if life.off else [])
        action = "merge" if life.live and chance.random() < 0.03 else chance.choice(choices)
        arguments = {
            "add": (chance.randint(1, 3), chance.random() < 0.5),
            "train_old": (chance.randint(4, 280),),
        }.get(action, (chance.randrange(4),) if action in ("step", "save_and_load", "detach") else ())
        getattr(life, action)(*arguments)
        if action == "merge":
            life = Life(strategy, tied, tmp_path)
        counts[action] = counts.get(action, 0) + 1
        life.check()
        if number % 250 == 249:  # all off: what there is now must not grow
            while life.live:
                life.detach(chance.randrange(4))
            life.off.clear()
            life.check()
            measured.append((live_tensors(), resident_bytes()))
    print(counts, [(tensors, round(size / 2**20, 1)) for tensors, size in measured])
    assert len({tensors for tensors, _ in measured[1:]}) == 1
    assert measured[-1][1] - measured[2][1] < 8 << 20
