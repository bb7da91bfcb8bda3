"""An exception at any line of the package leaves model and tokenizer as they were, bit for bit.

The default run injects one at the first pass of every line of the modules that change something; with

    pytest -m slow tests/test_injected_faults.py

one at every line of the package that each call runs, each time that it runs.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable
from typing import Any

import pytest
import torch
from conftest import bpe_tokenizer, build_model, logits_of
from injection import first_moments, interrupted, moments_of
from states import assert_same, bits, model_state, tokenizer_state

from hf_partial_embed import ChunkedLoss, PartialEmbedding, TokenRows, add_tokens, load_tokens, train_tokens
from hf_partial_embed.attachment import steps as step_module
from hf_partial_embed.attachment.attachment import Attachment, attachments_of
from hf_partial_embed.layout.resizing import REGISTRY

FIRST, SECOND, THIRD = ["<first>", "praseodymium"], ["<second>"], ["<third>", "<fourth>"]
CHANGING = (
    "attachment.additions", "attachment.attachment", "attachment.growth", "attachment.partial", "attachment.steps",
    "layout.storage", "modules.mask", "modules.rows", "modules.splitting", "modules.embedding", "modules.linear",
    "tokens",
)  # fmt: skip


class Situation:
    """A model and a tokenizer with row sets on them, and all that an error must leave as it is."""

    def __init__(self, strategy: str, tied: bool) -> None:
        self.strategy = strategy
        self.tokenizer = bpe_tokenizer()
        self.model = build_model("phi", len(self.tokenizer), tied=tied)  # its head has a bias
        self.model.requires_grad_(False)
        self.model.model.layers[0].requires_grad_(True)
        self.partials: list[Any] = []

    def put_on(self, tokens: list[str]) -> Any:
        partial = add_tokens(self.model, self.tokenizer, tokens, strategy=self.strategy)
        self.partials.append(partial)
        with torch.no_grad():
            for number, (parameter, _) in enumerate(partial.rows_and_tables()):
                target = parameter if self.strategy == "split" else parameter[partial.token_ids]
                moved = target + 0.25 + number  # as if trained
                parameter.copy_(moved) if self.strategy == "split" else parameter.index_copy_(
                    0, torch.tensor(partial.token_ids), moved
                )
        for parameter in partial.parameters():
            parameter.grad = torch.ones_like(parameter)
        return partial

    def state(self) -> dict[str, object]:
        sets = [
            (
                partial._attachment.attached,
                partial.token_ids,
                partial.tokens,
                {name: bits(rows) for name, rows in partial.token_rows().tensors().items()},
                [(id(p), p.requires_grad, None if p.grad is None else bits(p.grad)) for p in parameters_of(partial)],
            )
            for partial in self.partials
        ]
        return {
            "sets": sets,
            **{f"model {key}": value for key, value in model_state(self.model).items()},
            **{f"tokenizer {key}": value for key, value in tokenizer_state(self.tokenizer).items()},
            "gradients": {
                name: (None if parameter.grad is None else bits(parameter.grad), len(parameter._backward_hooks or ()))
                for name, parameter in self.model.named_parameters()
            },
            "logits": bits(logits_of(self.model, torch.tensor([[5, 299, 7]]))),
        }


def parameters_of(partial) -> list[torch.nn.Parameter]:
    return list(partial.parameters()) if partial._attachment.attached else []


class Operation:
    """A call of which either nothing or all must have been done.

    Args:
        situation: what it changes.
        call: the call.
        handle: the row set that it takes off; `None` where it puts one on.
    """

    def __init__(self, situation: Situation, call: Callable[[], Any], handle: Any = None) -> None:
        self.situation, self.run, self.handle = situation, call, handle
        self.sets_before = len(attachments_of(situation.model))
        self.before = situation.state()

    @property
    def done(self) -> bool:
        return len(attachments_of(self.situation.model)) != self.sets_before

    def assert_done(self) -> None:
        """All of it has been done, and what it returns is not lost."""
        assert self.done
        if self.handle is None:
            PartialEmbedding(attachments_of(self.situation.model)[-1]).detach()
            assert_same(self.before, self.situation.state())
        else:
            number = self.situation.partials.index(self.handle)
            rows = {name: bits(rows) for name, rows in self.handle.token_rows().tensors().items()}
            assert rows == self.before["sets"][number][3]
            for partial in self.situation.partials:
                if partial is not self.handle:
                    partial.verify()


def added(situation, folder):
    situation.put_on(FIRST)
    return Operation(
        situation,
        lambda: add_tokens(situation.model, situation.tokenizer, SECOND, strategy=situation.strategy),
    )


def added_alone(situation, folder):
    return Operation(
        situation,
        lambda: add_tokens(situation.model, situation.tokenizer, FIRST, strategy=situation.strategy, special=True),
    )


def trained(situation, folder):
    return Operation(
        situation,
        lambda: train_tokens(situation.model, situation.tokenizer, [250, 3, 77], strategy=situation.strategy),
    )


def loaded(situation, folder):
    situation.put_on(SECOND).save_pretrained(folder)
    situation.partials.pop().detach()

    def call():
        if situation.strategy == "split":
            return load_tokens(situation.model, situation.tokenizer, folder, trainable=False)
        return TokenRows.from_pretrained(folder).attach(situation.model, situation.tokenizer, strategy="mask")

    return Operation(situation, call)


def detached(situation, folder):
    first = situation.put_on(FIRST)
    return Operation(situation, first.detach, first)


def detached_under_others(situation, folder):
    first = situation.put_on(FIRST)
    situation.put_on(SECOND)
    situation.put_on(THIRD)
    return Operation(situation, first.detach, first)


def merged(situation, folder):
    first = situation.put_on(FIRST)
    return Operation(situation, first.merge, first)


def merged_under_others(situation, folder):
    first = situation.put_on(FIRST)
    situation.put_on(SECOND)
    return Operation(situation, first.merge, first)


OPERATIONS = [added_alone, added, trained, loaded, detached, detached_under_others, merged, merged_under_others]


def moments_of_operation(make, strategy, tied, folder, modules=()):
    """All moments of one of the operations, the second time that it runs in a process."""
    make(Situation(strategy, tied), folder).run()
    return moments_of(make(Situation(strategy, tied), folder).run, modules)


def inject(make, strategy, tied, folder, moments) -> int:
    """Interrupt an operation at each moment in turn; returns how often it had been done when that came."""
    operation, done = None, 0
    for moment in moments:
        operation = operation or make(Situation(strategy, tied), folder)
        assert interrupted(operation.run, moment), f"{moment} did not come"
        try:
            if operation.done:  # it had nothing left to do but to return
                done += 1
                operation.assert_done()
                operation = None
                continue
            assert_same(operation.before, operation.situation.state())
            for partial in operation.situation.partials:
                partial.verify()
        except BaseException as error:
            raise AssertionError(f"after an exception at {moment}") from error
    operation = operation or make(Situation(strategy, tied), folder)
    operation.run()  # after all that it works
    operation.assert_done()
    return done


CASES = [
    pytest.param(make, strategy, tied, number, id=f"{make.__name__}-{strategy}-{'tied' if tied else 'untied'}")
    for number, (make, strategy, tied) in enumerate(itertools.product(OPERATIONS, ("split", "mask"), (True, False)))
]


@pytest.mark.parametrize(
    ("make", "strategy", "tied", "number"),
    # Of each operation two that have nothing in common; what an operation does differs little between the others.
    [case for case in CASES if (case.values[1] == "split") == case.values[2]],
)
def test_an_exception_at_some_lines_leaves_everything_as_it_was(make, strategy, tied, number, tmp_path):
    moments = first_moments(moments_of_operation(make, strategy, tied, tmp_path, CHANGING))
    assert inject(make, strategy, tied, tmp_path, moments[number::32]) <= 3


@pytest.mark.slow
@pytest.mark.parametrize(("make", "strategy", "tied", "number"), CASES)
def test_an_exception_at_any_line_leaves_everything_as_it_was(make, strategy, tied, number, tmp_path):
    moments = first_moments(moments_of_operation(make, strategy, tied, tmp_path))
    done = inject(make, strategy, tied, tmp_path, moments)
    print(f"{len(moments)} exceptions injected, {done} of them when all had been done")
    assert len(moments) > 90 and done <= 10


@pytest.mark.parametrize("every", [9, pytest.param(1, marks=pytest.mark.slow)])
def test_an_undo_that_is_interrupted_begins_again(monkeypatch, tied, strategy, every):
    """The last step fails, and while the others are taken back there comes an interrupt.

    In `Attachment` itself there are lines (its `except`) at which an interrupt is too early for that.
    """
    situation = Situation(strategy, tied)
    situation.put_on(FIRST)
    before = situation.state()

    def add():
        add_tokens(situation.model, situation.tokenizer, SECOND, strategy=strategy)

    def add_in_vain():
        with pytest.raises(RuntimeError, match="the disk is on fire"):
            add()

    doing = {moment.site for moment in moments_of(add)}
    PartialEmbedding(attachments_of(situation.model)[-1]).detach()
    original = step_module.SetAttribute.do

    def fail(self):
        original(self)
        if self.name == REGISTRY:
            raise RuntimeError("the disk is on fire")

    monkeypatch.setattr(step_module.SetAttribute, "do", fail)
    moments = first_moments(moments_of(add_in_vain, set(CHANGING) - {"attachment.attachment"}))
    undoing = [moment for moment in moments if moment.site not in doing]
    assert_same(before, situation.state())
    assert len(undoing) > 40
    for moment in undoing[::every]:
        assert interrupted(add, moment), moment
        try:
            assert_same(before, situation.state())
        except AssertionError as error:
            raise AssertionError(f"after an interrupt at {moment}") from error


@pytest.mark.parametrize("error", [RuntimeError("mine"), KeyboardInterrupt()])
@pytest.mark.parametrize("call", [1, 2, 3])
def test_an_exception_in_an_initialiser_of_ones_own_changes_nothing(strategy, error, call):
    situation = Situation(strategy, tied=False)  # input, head and bias: three calls
    situation.put_on(FIRST)
    before, calls = situation.state(), []

    def init(request):
        calls.append(request.role)
        if len(calls) == call:
            raise error
        return torch.zeros(len(request.tokens), *request.table.shape[1:])

    with pytest.raises(type(error)):
        add_tokens(situation.model, situation.tokenizer, SECOND, init=init, strategy=strategy)
    assert len(calls) == call
    assert_same(before, situation.state())


def test_an_exception_while_additions_are_off_puts_them_on_again(monkeypatch):
    situation = Situation("split", tied=True)
    partial = situation.put_on(FIRST)
    loss = ChunkedLoss(situation.model).install()
    for name in ("detach", "merge"):
        with monkeypatch.context() as patch:
            patch.setattr(Attachment, name, lambda self: 1 / 0)
            with pytest.raises(ZeroDivisionError):
                getattr(partial, name)()
        assert loss.installed
    partial.detach()
    assert not loss.installed
