"""No graph before the first new token: the same gradients, or the model runs as always and says so once."""

from __future__ import annotations

import copy
import logging
import re

import pytest
import torch
from conftest import bpe_tokenizer, build_model, run_model
from trainings import Texts, rows_of, setup, train
from transformers import (
    BloomConfig,
    BloomForCausalLM,
    LlamaConfig,
    LlamaForCausalLM,
    MistralConfig,
    MistralForCausalLM,
    OPTConfig,
    OPTForCausalLM,
)

from hf_partial_embed import ChunkedLoss, FrozenPrefix, PartialEmbeddingCallback, PartialEmbeddingError, add_tokens

SIZES = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2}
OTHERS = {
    "mistral": lambda: MistralForCausalLM(  # a window shorter than the prefix
        MistralConfig(vocab_size=300, num_key_value_heads=1, sliding_window=4, pad_token_id=1, **SIZES)
    ),
    "opt": lambda: OPTForCausalLM(OPTConfig(vocab_size=300, ffn_dim=32, word_embed_proj_dim=16, **SIZES)),
    "bloom": lambda: BloomForCausalLM(BloomConfig(vocab_size=300, hidden_size=16, n_layer=2, n_head=2)),
}
IDS = torch.tensor([[5, 6, 8, 7, 4, 3, 301, 9, 11], [5, 6, 8, 7, 5, 300, 301, 9, 12]])


def prepare(kind="llama", *, tied=True, dtype=torch.float64, **options):
    torch.manual_seed(0)
    model = OTHERS[kind]().to(dtype).eval() if kind in OTHERS else build_model(kind, tied=tied, dtype=dtype)
    model.requires_grad_(False)
    return model, add_tokens(model, bpe_tokenizer(), ["<a>", "<b>"], **options)


def gradients(model, partial, ids=IDS, **options):
    loss = run_model(model, ids, labels=ids, **options).loss
    return [loss.detach(), *torch.autograd.grad(loss, list(partial.parameters()))]


class Lengths:
    """How many positions the layers ran in each of their calls, and whether with a graph."""

    def __init__(self, model) -> None:
        self.calls = []
        layer = next(module for module in model.modules() if isinstance(module, torch.nn.ModuleList))[0]
        layer.register_forward_hook(self.see)

    def see(self, module, args, output) -> None:
        hidden = output[0] if isinstance(output, tuple) else output
        self.calls.append((hidden.shape[1], hidden.requires_grad))


@pytest.mark.parametrize("kind", ["llama", "phi", "gemma", "gpt2", *OTHERS])
def test_gradients_are_those_of_a_whole_graph(kind, tied):
    model, partial = prepare(kind, tied=tied)
    lengths = Lengths(model)
    expected = gradients(model, partial)
    with FrozenPrefix(model) as prefix:
        values = gradients(model, partial)
    assert prefix.reason is None
    assert lengths.calls[-2:] == [(5, False), (4, True)]
    for value, other in zip(values, expected, strict=True):
        torch.testing.assert_close(value, other, rtol=1e-5, atol=1e-6)  # the models compute their loss in float32


def test_gradients_of_the_hidden_states_are_those_of_a_whole_graph_to_the_last_digits(tied):
    model, partial = prepare(tied=tied)
    rows = next(iter(partial.parameters()))
    weights = torch.randn(*IDS.shape, 16, dtype=torch.float64)

    def gradient():
        hidden = model.get_decoder()(input_ids=IDS).last_hidden_state
        return torch.autograd.grad((hidden * weights).sum(), rows)[0]

    expected = gradient()
    with FrozenPrefix(model):
        torch.testing.assert_close(gradient(), expected, rtol=1e-12, atol=1e-13)


def test_padding_on_the_left_and_on_the_right(tied):
    model, partial = prepare(tied=tied)
    for mask in ([1, 1, 1, 1, 1, 1, 1, 1, 1], [0, 0, 1, 1, 1, 1, 1, 1, 1], [1, 1, 1, 1, 1, 1, 1, 1, 0]):
        options = {"attention_mask": torch.tensor([[1] * 9, mask])}
        expected = gradients(model, partial, **options)
        with FrozenPrefix(model) as prefix:
            values = gradients(model, partial, **options)
        assert prefix.reason is None and prefix._tried
        for value, other in zip(values, expected, strict=True):
            torch.testing.assert_close(value, other, rtol=1e-5, atol=1e-6)


def test_a_batch_without_new_tokens_gives_a_gradient_of_zero():
    model, partial = prepare(tied=False)
    lengths = Lengths(model)
    with FrozenPrefix(model):
        _, input_rows, output_rows = gradients(model, partial, IDS.clamp(max=299))
    assert lengths.calls[-2:] == [(8, False), (1, True)]
    assert not input_rows.any() and output_rows.any()


@pytest.mark.parametrize("case", ["first-token", "packed", "hidden-states", "no-grad", "inputs-embeds"])
def test_batches_that_cannot_be_cut_run_as_always(case):
    model, partial = prepare()
    lengths = Lengths(model)
    ids, options = IDS.clone(), {}
    if case == "first-token":
        ids[0, 0] = 300
    elif case == "packed":
        options["position_ids"] = torch.tensor([[0, 1, 2, 3, 0, 1, 2, 3, 4]] * 2)
    elif case == "hidden-states":
        options["output_hidden_states"] = True
    with FrozenPrefix(model) as prefix:
        if case == "no-grad":
            with torch.no_grad():
                model(input_ids=ids)
        elif case == "inputs-embeds":
            model(inputs_embeds=model.get_input_embeddings()(ids))
        else:
            gradients(model, partial, ids, **options)
    assert [length for length, _ in lengths.calls] == [9] and prefix.reason is None


def dropping():
    model, partial = prepare("gpt2")
    return model.train(), partial


def training_body():
    model, partial = prepare()
    model.model.norm.weight.requires_grad_(True)
    return model, partial


@pytest.mark.parametrize(
    ("make", "reason"),
    [
        (dropping, "drops activations at random"),
        (training_body, r"something else than token rows trains \(model.norm.weight\)"),
        (lambda: prepare("bert"), "it has no cache"),
        (lambda: prepare("t5"), "its encoder looks at all tokens"),
    ],
    ids=["dropout", "body-trains", "looks-ahead", "encoder-decoder"],
)
def test_a_model_that_cannot_runs_as_always_and_says_so_once(make, reason, caplog):
    model, partial = make()
    torch.manual_seed(1)
    expected = gradients(model, partial)
    with caplog.at_level(logging.WARNING, "hf_partial_embed.training.frozen_prefix"), FrozenPrefix(model):
        for _ in range(2):
            torch.manual_seed(1)
            values = gradients(model, partial)
            for value, other in zip(values, expected, strict=True):
                assert torch.equal(value, other)
    messages = [
        record.getMessage() for record in caplog.records if record.name == "hf_partial_embed.training.frozen_prefix"
    ]
    assert len(messages) == 1
    assert re.search(reason, messages[0]), messages


def test_it_needs_split_embeddings():
    model, _ = prepare(strategy="mask")
    with pytest.raises(PartialEmbeddingError, match="frozen prefix needs input embeddings of which some rows train"):
        FrozenPrefix(model)


@pytest.mark.parametrize("leave", ["merge", "detach", "exit"])
def test_it_comes_off_with_the_rows(leave):
    model, partial = prepare()
    prefix = FrozenPrefix(model).install()
    assert "forward" in model.model.__dict__
    prefix.remove() if leave == "exit" else getattr(partial, leave)()
    assert "forward" not in model.model.__dict__ and not prefix.installed


def test_a_copy_of_the_model_has_a_prefix_of_its_own():
    model, partial = prepare()
    FrozenPrefix(model).install()
    other, rows = copy.deepcopy((model, partial))
    lengths, own = Lengths(other), Lengths(model)
    gradients(other, rows)
    assert lengths.calls[-2:] == [(5, False), (4, True)] and not own.calls


def test_less_is_kept_for_the_backward():
    torch.manual_seed(0)  # as wide as real layers are, relative to their heads
    sizes = {**SIZES, "intermediate_size": 128, "num_key_value_heads": 2, "pad_token_id": 1}
    model = LlamaForCausalLM(LlamaConfig(vocab_size=300, **sizes)).requires_grad_(False)
    add_tokens(model, bpe_tokenizer(), ["<a>", "<b>"])
    ids = torch.randint(4, 250, (1, 64))
    ids[0, 32::3] = 300

    def kept() -> int:
        sizes = {}

        def pack(tensor):
            sizes[tensor.untyped_storage().data_ptr()] = (tensor.untyped_storage().nbytes(), tensor)
            return tensor

        with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
            model.get_decoder()(input_ids=ids)
        own = {parameter.untyped_storage().data_ptr() for parameter in model.parameters()}
        return sum(size for pointer, (size, _) in sizes.items() if pointer not in own)

    whole = kept()
    with FrozenPrefix(model):
        kept()  # tries it out
        assert kept() < 0.6 * whole


def late_tokens(texts, index):
    """The first four positions of a text have no new token."""
    ids = texts.ids[index].clone()
    ids[:4].clamp_(max=250)
    return {"input_ids": ids, "labels": ids}


@pytest.mark.parametrize("chunked", [False, True], ids=["plain-loss", "chunked-loss"])
def test_trainer_trains_the_same_rows_with_it(tmp_path, tied, chunked, monkeypatch):
    results = []
    for frozen in (False, True):
        model, tokenizer, partial = setup(tied=tied)
        monkeypatch.setattr(Texts, "__getitem__", late_tokens)
        lengths = Lengths(model)
        callback = PartialEmbeddingCallback(partial, frozen_prefix=frozen, chunked_loss=frozen and chunked)
        data = {"gradient_accumulation_steps": 2, "optim": "sgd", "learning_rate": 1.0, "save_strategy": "no"}
        train(model, tokenizer, partial, tmp_path / str(frozen), callbacks=[callback], **data)
        results.append(rows_of(partial))
        assert any(call[1] and call[0] < 10 for call in lengths.calls) is frozen
        assert "forward" not in model.model.__dict__
    for value, other in zip(results[1], results[0], strict=True):
        torch.testing.assert_close(value, other, rtol=1e-4, atol=1e-5)


def test_together_with_the_chunked_loss():
    model, partial = prepare()
    expected = gradients(model, partial)
    with ChunkedLoss(model), FrozenPrefix(model):
        values = gradients(model, partial)
    for value, other in zip(values, expected, strict=True):
        torch.testing.assert_close(value, other, rtol=1e-5, atol=1e-6)
