"""The chunked loss inside of models that know nothing of it, and inside of a Trainer."""

from __future__ import annotations

import copy

import pytest
import torch
import torch._dynamo.testing
from allocations import Allocations
from conftest import MODELS, bpe_tokenizer, build_model, run_model
from quick import quick
from torch import nn
from trainings import rows_of, setup, train
from transformers import (
    CohereConfig,
    CohereForCausalLM,
    Gemma2Config,
    Gemma2ForCausalLM,
    GraniteConfig,
    GraniteForCausalLM,
    LlamaForCausalLM,
)

from hf_partial_embed import ChunkedLoss, PartialEmbeddingCallback, PartialEmbeddingError, add_tokens
from hf_partial_embed.modules import loss

pytestmark = pytest.mark.filterwarnings("ignore:.*is_gradient_checkpointing. is deprecated:FutureWarning")
SMALL = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2}
SMALL.update(num_key_value_heads=2, pad_token_id=1, vocab_size=300)
# Their logits are scaled or soft-capped between head and loss.
DRESSED = {
    "cohere": lambda: CohereForCausalLM(CohereConfig(logit_scale=0.5, **SMALL)),
    "granite": lambda: GraniteForCausalLM(GraniteConfig(logits_scaling=4.0, **SMALL)),
    "gemma2": lambda: Gemma2ForCausalLM(Gemma2Config(final_logit_softcapping=2.0, head_dim=8, **SMALL)),
}


@pytest.fixture(autouse=True)
def many_chunks(monkeypatch):
    monkeypatch.setattr(loss, "CHUNK_BYTES", 1)
    monkeypatch.setattr(loss, "CHUNK_POSITIONS", 2)


def with_tokens(model, **options):
    tokenizer = bpe_tokenizer()
    model.requires_grad_(False)
    return add_tokens(model, tokenizer, ["<a>", "<b>"], **options)


IDS = torch.tensor([[5, 6, 300, 7, 301, 9], [300, 8, 9, 10, 11, 12]])
LABELS = IDS.clone()
LABELS[0, :2] = -100


def gradients(model, partial, **options):
    output = run_model(model, IDS, labels=LABELS, **options)
    return output, [output.loss.detach(), *torch.autograd.grad(output.loss, list(partial.parameters()))]


@pytest.mark.parametrize("kind", [*(kind for kind in MODELS if kind != "bert-encoder"), *DRESSED])
def test_gradients_of_a_model_are_those_of_its_plain_loss(kind, tied):
    model = (DRESSED[kind]() if kind in DRESSED else build_model(kind, 300, tied=tied)).double()
    partial = with_tokens(model)
    _, expected = gradients(model, partial)
    with ChunkedLoss(model):
        output, values = gradients(model, partial)
    assert output.logits is None
    for value, other in zip(values, expected, strict=True):
        torch.testing.assert_close(value, other, rtol=1e-5, atol=1e-6)  # the models compute their loss in float32


def test_number_of_items_of_an_accumulated_batch_is_what_divides(tied):
    model = build_model("llama", tied=tied)
    partial = with_tokens(model)
    options = {"num_items_in_batch": torch.tensor(17)}
    _, expected = gradients(model, partial, **options)
    with ChunkedLoss(model):
        _, values = gradients(model, partial, **options)
    for value, other in zip(values, expected, strict=True):
        torch.testing.assert_close(value, other, rtol=1e-5, atol=1e-6)


def test_logits_are_there_without_labels_and_without_a_graph():
    model = build_model("llama")
    with_tokens(model)
    expected = model(input_ids=IDS).logits
    with ChunkedLoss(model):
        assert torch.equal(model(input_ids=IDS).logits, expected)
        with torch.no_grad():
            output = model(input_ids=IDS, labels=LABELS)
        assert torch.equal(output.logits, expected.detach())
        generated = model.generate(IDS, max_new_tokens=2, do_sample=False)
    assert generated.shape == (2, 8)


def test_a_tuple_has_no_logits():
    model = build_model("llama")
    with_tokens(model)
    with ChunkedLoss(model):
        output = model(input_ids=IDS, labels=LABELS, return_dict=False, use_cache=False)
    assert len(output) == 1 and output[0].dim() == 0


def step(model, partial, shape):
    ids = torch.randint(0, 302, shape, generator=torch.Generator().manual_seed(shape[1]))
    ids[0, :2] = torch.tensor(partial.token_ids)
    labels = ids.clone()
    labels[:, 1] = -100
    output = model(input_ids=ids, labels=labels, use_cache=False)
    return output, [output.loss.detach(), *torch.autograd.grad(output.loss, list(partial.parameters()))]


@pytest.mark.parametrize("kind", quick(["llama", *DRESSED], lambda kind: kind == "llama"))
def test_a_compiled_model_has_the_same_gradients_from_one_graph_for_all_batch_shapes(kind):
    model = DRESSED[kind]() if kind in DRESSED else build_model(kind, 300)
    partial = with_tokens(model)
    torch._dynamo.reset()
    counter = torch._dynamo.testing.CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(model, backend=counter, fullgraph=True, dynamic=True)
    counts = []
    with ChunkedLoss(model):
        for shape in ((2, 6), (3, 9), (5, 12)):
            output, values = step(compiled, partial, shape)
            assert output.logits is None
            for value, other in zip(values, step(model, partial, shape)[1], strict=True):
                assert torch.equal(value, other)
            counts.append(counter.frame_count)
    assert counts[0] == counts[-1] > 0
    # Installing and removing it is seen by a model that is compiled already.
    output, _ = step(compiled, partial, shape)
    assert output.logits is not None
    with ChunkedLoss(model):
        assert step(compiled, partial, shape)[0].logits is None


@pytest.mark.parametrize("leave", ["merge", "detach", "exit"])
def test_it_comes_off_with_the_rows(leave):
    model = build_model("llama")
    hooks = len(model._forward_hooks), len(model._forward_pre_hooks)
    partial = with_tokens(model)
    chunked = ChunkedLoss(model).install()
    assert chunked.installed and chunked.install() is chunked
    if leave == "exit":
        chunked.remove()
        partial.merge()
    else:
        getattr(partial, leave)()
    assert not chunked.installed and "forward" not in model.lm_head.__dict__
    assert (len(model._forward_hooks), len(model._forward_pre_hooks)) == hooks
    ids = IDS.clamp(max=299)
    assert model(input_ids=ids, labels=ids).logits is not None


def test_a_copy_of_the_model_has_a_chunked_loss_of_its_own():
    model = build_model("llama")
    partial = with_tokens(model)
    chunked = ChunkedLoss(model).install()
    other, rows = copy.deepcopy((model, partial))
    chunked.remove()
    _, expected = gradients(model, partial)
    output, values = gradients(other, rows)
    assert output.logits is None
    for value, plain in zip(values, expected, strict=True):
        torch.testing.assert_close(value, plain, rtol=1e-5, atol=1e-6)


class OddLoss(LlamaForCausalLM):
    def forward(self, input_ids=None, labels=None, **kwargs):
        output = super().forward(input_ids=input_ids, **kwargs)
        output.loss = output.logits.softmax(-1).square().mean()
        return output


def test_another_loss_is_refused_by_name_and_changes_nothing():
    model = OddLoss(build_model("llama").config).eval()
    partial = with_tokens(model)
    with (
        ChunkedLoss(model),
        pytest.raises(PartialEmbeddingError, match=r"OddLoss.*softmax.*Leave chunked_loss"),
    ):
        model(input_ids=IDS, labels=LABELS)
    output, _ = gradients(model, partial)
    assert output.logits is not None


@pytest.mark.parametrize(
    ("make", "words"),
    [
        (lambda: with_tokens(build_model("llama"), strategy="mask"), "trains as a whole"),
        (lambda: with_tokens(build_model("bert-encoder")), r"get_output_embeddings\(\) of BertModel gave NoneType"),
    ],
    ids=["mask", "no-head"],
)
def test_a_model_that_cannot_is_refused_by_the_callback_at_once(make, words):
    partial = make()
    with pytest.raises(PartialEmbeddingError, match=words):
        PartialEmbeddingCallback(partial, chunked_loss=True)


def test_a_training_step_never_has_all_logits(tied):
    model = build_model("llama", tied=tied)
    partial = with_tokens(model)
    ids = IDS.repeat(4, 1)
    logits = ids.numel() * model.config.vocab_size * 4
    for chunked in (False, True):
        with Allocations() as counted:
            if chunked:
                with ChunkedLoss(model):
                    model(input_ids=ids, labels=ids).loss.backward()
            else:
                model(input_ids=ids, labels=ids).loss.backward()
        assert (counted.largest()[0] >= logits) is not chunked, counted.largest()
    assert all(rows.grad is not None for rows in partial.parameters())


TRAININGS = [
    {},
    {"gradient_accumulation_steps": 2},
    {"label_smoothing_factor": 0.1},
    {"label_smoothing_factor": 0.1, "gradient_accumulation_steps": 2},
    {"bf16": True},
    {"bf16": True, "label_smoothing_factor": 0.1},
    {"eval_strategy": "steps", "eval_steps": 3},
]


@pytest.mark.parametrize(
    ("tied", "options"),
    quick(
        [(tied, options) for tied in (True, False) for options in TRAININGS],
        lambda tied, options: TRAININGS.index(options) % 2 == tied,
    ),
    ids=str,
)
def test_trainer_trains_the_same_rows_with_it(tmp_path, tied, options):
    def run(chunked, **options):
        model, tokenizer, partial = setup(tied=tied)
        callback = PartialEmbeddingCallback(partial, chunked_loss=chunked)
        trainer = train(
            model, tokenizer, partial, tmp_path / str(chunked), callbacks=[callback], save_strategy="no",
            optim="sgd", learning_rate=1.0, **options,
        )  # fmt: skip
        assert "forward" not in model.lm_head.__dict__
        losses = torch.tensor([entry["loss"] for entry in trainer.state.log_history if "loss" in entry])
        return [*rows_of(partial), losses]

    values, plain = run(True, **options), run(False, **options)
    if options.pop("bf16", False):  # as near to the run in float32 as the plain loss is
        for value, other, exact in zip(values, plain, run(False, **options), strict=True):
            assert (value - exact).norm() <= 1.5 * (other - exact).norm() + 1e-4
    else:
        for value, other in zip(values, plain, strict=True):
            torch.testing.assert_close(value, other, rtol=1e-4, atol=1e-5)


def test_trainer_with_lora_around_the_model(tmp_path):
    from peft import LoraConfig, get_peft_model

    results = []
    for chunked in (False, True):
        torch.manual_seed(0)
        model, tokenizer, partial = setup()
        wrapped = get_peft_model(model, LoraConfig(target_modules=["q_proj"], r=2))
        partial.requires_grad_(True)
        calls = []
        hook = partial.model.lm_head.register_forward_hook(lambda *args, calls=calls: calls.append(type(args[2])))
        callback = PartialEmbeddingCallback(partial, chunked_loss=chunked)
        train(wrapped, tokenizer, partial, tmp_path / str(chunked), callbacks=[callback], save_strategy="no")
        hook.remove()
        assert any(kind is not torch.Tensor for kind in calls) is chunked  # diagnostics ask the head, too
        results.append(rows_of(partial))
    for value, other in zip(results[1], results[0], strict=True):
        torch.testing.assert_close(value, other, rtol=1e-4, atol=1e-4)


def test_a_head_that_lora_has_wrapped_is_refused():
    from peft import LoraConfig, get_peft_model

    model = build_model("llama", tied=False)
    with_tokens(model)
    get_peft_model(model, LoraConfig(target_modules=["lm_head"], r=2))
    with pytest.raises(PartialEmbeddingError, match="chunked"):
        ChunkedLoss(model)


def test_offloaded_heads_are_refused():
    model = build_model("llama")
    with_tokens(model)
    model.lm_head.__dict__["_hf_hook"] = object()
    with pytest.raises(PartialEmbeddingError, match="offloaded"):
        ChunkedLoss(model)
    assert isinstance(model.lm_head, nn.Linear)
