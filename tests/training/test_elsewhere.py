"""`elsewhere`: texts in which new tokens do not belong, and the step that all rows take together."""

from __future__ import annotations

import pytest
import torch
from added import add_tokens
from conftest import bpe_tokenizer, build_model
from trainings import TOKENS, Texts, arguments, setup
from transformers import Gemma2Config, Gemma2ForCausalLM, Trainer

from hf_partial_embed import PartialEmbeddingCallback, PartialEmbeddingError
from hf_partial_embed.evaluation.leak import leak
from hf_partial_embed.training.elsewhere import Elsewhere
from hf_partial_embed.training.optimizers import SharedStep, auto_learning_rate

pytestmark = pytest.mark.filterwarnings("ignore::FutureWarning")

TEXTS = ["a text without any of them", "another one, which is longer than the first", "with <think> in it"]


def trained(folder, elsewhere=TEXTS, resume=None, *, tied=True, strategy="split", dtype=torch.float32, **options):
    model, _, partial = setup(tied=tied, strategy=strategy, dtype=dtype)
    trainer = Trainer(
        model=model,
        args=arguments(folder, **options),
        train_dataset=Texts(partial.token_ids),
        callbacks=[PartialEmbeddingCallback(partial, learning_rate=1e-2, elsewhere=elsewhere)],
    )
    trainer.train(resume_from_checkpoint=resume)
    partial.verify()
    return partial


def leak_in(partial, text):
    ids = torch.tensor([partial.tokenizer(text)["input_ids"]])
    with torch.no_grad():
        logits = partial.model.eval()(ids).logits
    return leak(logits, torch.zeros_like(ids), partial.token_ids)


@pytest.mark.parametrize("strategy", ["split", "mask"])
def test_tokens_leave_texts_where_they_do_not_belong(tied, strategy):
    _, _, partial = setup(tied=tied, strategy=strategy)
    before = [leak_in(partial, text) for text in TEXTS[:2]]
    elsewhere = Elsewhere([partial], TEXTS)
    elsewhere.start()
    optimizer = torch.optim.Adam(partial.parameters(), lr=0.05)
    partial.protect(optimizer)
    optimizer.register_step_pre_hook(elsewhere.before_step)
    for _ in range(10):
        optimizer.step()
    assert all(leak_in(partial, text) < 0.8 * was for text, was in zip(TEXTS, before, strict=False))
    partial.verify()


@pytest.mark.parametrize("strategy", ["split", "mask"])
@pytest.mark.parametrize("family", ["llama", "capped", "phi"])  # plain, with capped logits, with a head's bias
def test_gradient_is_that_of_the_texts_own_loss(family, strategy):
    tokenizer = bpe_tokenizer()
    if family == "capped":
        sizes = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2}
        config = Gemma2Config(
            vocab_size=len(tokenizer), num_key_value_heads=2, head_dim=8, final_logit_softcapping=0.05, **sizes
        )
        model = Gemma2ForCausalLM(config).requires_grad_(False).eval()
    else:
        model = build_model(family, len(tokenizer), tied=family != "phi").requires_grad_(False).eval()
    partial = add_tokens(model, tokenizer, TOKENS, special=True, strategy=strategy)
    elsewhere = Elsewhere([partial], TEXTS, weight=3.0)
    elsewhere.start()
    elsewhere.before_step()
    found = [parameter.grad.clone() for parameter in partial.parameters() if parameter.grad is not None]

    model.zero_grad()
    costs = []
    for text in TEXTS[:2]:
        logits = model(torch.tensor([tokenizer(text)["input_ids"]])).logits[0]
        share = logits.log_softmax(-1)[:, partial.token_ids].logsumexp(-1)
        costs.append(-torch.log1p(-share.exp()))
    (3.0 * torch.cat(costs).mean()).backward()
    head = model.get_output_embeddings()
    with_head = [
        table for table in partial.trained_tables().values() if any(module is head for module, _ in table.holders)
    ]
    expected = [partial.parameter_of(table).grad for table in with_head]
    assert len(found) == len(expected)
    for ours, theirs in zip(found, expected, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-3, atol=1e-6)


@pytest.mark.parametrize("strategy", ["split", "mask"])
def test_step_is_adams_with_own_and_shared_parts_as_parameters(strategy):
    partial = setup(strategy=strategy)[2]
    (parameter,) = partial.parameters()
    at = partial.token_ids if strategy == "mask" else list(range(len(TOKENS)))
    target = torch.randn(len(TOKENS), parameter.shape[1], generator=torch.Generator().manual_seed(0))
    own, shared = parameter.detach()[at].requires_grad_(True), torch.zeros(1, parameter.shape[1], requires_grad=True)
    expected = torch.optim.Adam(
        [{"params": [own]}, {"params": [shared], "lr": 2.5 * auto_learning_rate(partial)}], lr=0.01
    )
    made = torch.optim.Adam([parameter], lr=0.01)
    made.register_step_post_hook(SharedStep(made, [partial], top_rate=0.01))
    for _ in range(20):
        for optimizer, value in ((expected, lambda: own + shared), (made, lambda: parameter[at])):
            optimizer.zero_grad()
            (value() - target).pow(4).sum().backward()
            optimizer.step()
        torch.testing.assert_close(parameter.detach()[at], (own + shared).detach(), rtol=1e-4, atol=1e-5)


def test_the_log_tells_what_leaks_there(tmp_path):
    """Of the rows as a step left them; the last log is of those that the training ends with."""
    model, _, partial = setup()
    trainer = Trainer(
        model=model,
        args=arguments(tmp_path, logging_steps=1),
        train_dataset=Texts(partial.token_ids),
        callbacks=[PartialEmbeddingCallback(partial, learning_rate=1e-2, elsewhere=TEXTS)],
    )
    trainer.train()
    logged = [entry["rows/leak_elsewhere"] for entry in trainer.state.log_history if "loss" in entry]
    sizes = [len(partial.tokenizer(text)["input_ids"]) for text in TEXTS[:2]]
    expected = sum(size * float(leak_in(partial, text)) for size, text in zip(sizes, TEXTS, strict=False)) / sum(sizes)
    assert len(logged) == trainer.state.global_step and len(set(logged)) == len(logged)
    assert logged[-1] == pytest.approx(expected, rel=1e-4)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_resumed_is_as_never_interrupted(tmp_path, dtype):
    whole = trained(tmp_path / "whole", dtype=dtype)
    resumed = trained(tmp_path / "again", resume=str(tmp_path / "whole" / "checkpoint-3"), dtype=dtype)
    for one, other in zip(whole.parameters(), resumed.parameters(), strict=True):
        assert torch.equal(one, other)
    without = trained(tmp_path / "without", None, dtype=dtype)
    assert not torch.equal(next(whole.parameters()), next(without.parameters()))


def test_what_cannot_have_it_is_refused(tmp_path):
    _, _, partial = setup()
    with pytest.raises(PartialEmbeddingError, match="none of the 2 given is one"):
        PartialEmbeddingCallback(partial, elsewhere=["<think>", "praseodymium and more"])
    model, _, partial = setup(freeze_body=False)
    callback = PartialEmbeddingCallback(partial, elsewhere=TEXTS)
    trainer = Trainer(
        model=model, args=arguments(tmp_path), train_dataset=Texts(partial.token_ids), callbacks=[callback]
    )
    before = partial.token_rows().input_rows
    with pytest.raises(PartialEmbeddingError, match="nothing but the rows may train"):
        trainer.train()
    assert torch.equal(partial.token_rows().input_rows, before)
    with pytest.raises(PartialEmbeddingError, match="needs a causal model"):
        other = build_model("bert", len(bpe_tokenizer()), tied=True)
        PartialEmbeddingCallback(add_tokens(other, bpe_tokenizer(), TOKENS, special=True), elsewhere=TEXTS)
