"""accelerate: loops without a Trainer, hooks of a device map, offload."""

from __future__ import annotations

import pytest
import torch
from accelerate import Accelerator, cpu_offload, disk_offload, dispatch_model
from accelerate.hooks import remove_hook_from_submodules
from accelerate.state import AcceleratorState
from conftest import bpe_tokenizer, build_model, logits_of, snapshot
from torch.utils.data import DataLoader

from hf_partial_embed import PartialEmbeddingError, add_tokens

TOKENS = ["<think>", "</think>"]
IDS = torch.tensor([[5, 300, 7, 301, 9]])


def prepared(kind="llama", tied=True, **options):
    tokenizer = bpe_tokenizer()
    model = build_model(kind, len(tokenizer), tied=tied).requires_grad_(False)
    return model, tokenizer, add_tokens(model, tokenizer, TOKENS, **options)


@pytest.fixture
def fresh_state():
    """accelerate keeps one state a process, which says in which precision it works."""
    AcceleratorState._reset_state(reset_partial_state=True)
    yield
    AcceleratorState._reset_state(reset_partial_state=True)


@pytest.mark.usefixtures("fresh_state")
@pytest.mark.parametrize("mixed_precision", ["no", "bf16"])
def test_accelerate_loop_trains_the_rows_and_nothing_else(tmp_path, tied, strategy, mixed_precision):
    model, _, partial = prepared(tied=tied, strategy=strategy)
    before, start = snapshot(model), partial.token_rows()
    accelerator = Accelerator(cpu=True, mixed_precision=mixed_precision, gradient_accumulation_steps=2)
    optimizer = torch.optim.AdamW(partial.param_groups(lr=0.1, weight_decay=0.1))
    loader = DataLoader([IDS[0]] * 4, batch_size=1)
    model, optimizer, loader = accelerator.prepare(model, optimizer, loader)
    partial.protect(optimizer)
    for ids in loader:
        with accelerator.accumulate(model):
            accelerator.backward(model(input_ids=ids, labels=ids).loss)
            if accelerator.sync_gradients:
                accelerator.clip_grad_norm_(model.parameters(), 1.0)
            optimizer.step()
            optimizer.zero_grad()
    partial.verify()
    for name, rows in partial.token_rows().tensors().items():
        assert not torch.isclose(rows, start.tensors()[name]).all(), name
    for name, value in accelerator.unwrap_model(model).state_dict().items():
        if "new_rows" not in name:
            assert torch.equal(value[:300], before[name][:300]), name
    accelerator.save_state(str(tmp_path))
    saved = partial.token_rows()
    with torch.no_grad():
        for parameter in partial.parameters():
            parameter.add_(1)
    accelerator.load_state(str(tmp_path))
    for name, rows in partial.token_rows().tensors().items():
        # The rows of a mask are of the tables themselves.
        assert torch.equal(rows, saved.tensors()[name]), name


@pytest.mark.parametrize("kind", ["llama", "gemma"])
@pytest.mark.parametrize("hooks_first", [True, False], ids=["tokens-on-a-dispatched-model", "dispatched-with-tokens"])
def test_device_map_hooks_run_the_forward_with_the_rows(kind, tied, hooks_first):
    expected = prepared(kind, tied)
    if hooks_first:
        tokenizer = bpe_tokenizer()
        model = build_model(kind, 300, tied=tied).requires_grad_(False)
        dispatch_model(model, {"": "cpu"}, force_hooks=True)
        partial = add_tokens(model, tokenizer, TOKENS)
    else:
        model, _, partial = prepared(kind, tied)
        dispatch_model(model, {"": "cpu"}, force_hooks=True)
    assert torch.equal(logits_of(model, IDS), logits_of(expected[0], IDS))
    for both in (model, expected[0]):
        both(input_ids=IDS, labels=IDS).loss.backward()
    for parameter, other in zip(partial.parameters(), expected[2].parameters(), strict=True):
        assert torch.equal(parameter.grad, other.grad)
    with torch.no_grad():
        for parameter in partial.parameters():
            parameter.normal_()
    trained = logits_of(model, IDS)
    partial.merge()
    torch.testing.assert_close(logits_of(model, IDS), trained)  # by the forward of plain modules
    assert hasattr(model.get_input_embeddings(), "_hf_hook")
    remove_hook_from_submodules(model)
    torch.testing.assert_close(logits_of(model, IDS), trained)


def test_detach_from_a_dispatched_model_gives_the_old_logits(tied):
    model = build_model("llama", 300, tied=tied)
    dispatch_model(model, {"": "cpu"}, force_hooks=True)
    before = logits_of(model, IDS.clamp(max=299))
    add_tokens(model, bpe_tokenizer(), TOKENS).detach()
    assert torch.equal(logits_of(model, IDS.clamp(max=299)), before)


@pytest.mark.parametrize("where", ["cpu", "disk"])
def test_offloaded_model_runs_and_says_what_it_cannot_do(tmp_path, tied, where):
    model, _, partial = prepared(tied=tied)
    expected = logits_of(model, IDS)
    if where == "cpu":
        cpu_offload(model, execution_device=torch.device("cpu"))
    else:
        disk_offload(model, str(tmp_path), execution_device=torch.device("cpu"))
    assert torch.equal(logits_of(model, IDS), expected)
    assert torch.equal(model(input_ids=IDS).logits, expected)  # also where gradients could be asked for
    for action in (
        partial.token_rows,
        partial.merge,
        partial.detach,
        partial.verify,
        lambda: list(partial.parameters()),
    ):
        with pytest.raises(PartialEmbeddingError, match="accelerate has offloaded the rows"):
            action()
    assert torch.equal(logits_of(model, IDS), expected)
