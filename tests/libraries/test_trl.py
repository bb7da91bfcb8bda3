"""TRL's trainers, whose losses read the head's weight and bias themselves instead of calling it."""

from __future__ import annotations

import copy

import pytest
import torch
from conftest import PEFT_WARNING, bpe_tokenizer, build_model, logits_of, snapshot
from datasets import Dataset
from peft import LoraConfig
from trl import DPOConfig, DPOTrainer, SFTConfig, SFTTrainer

from hf_partial_embed import PartialEmbeddingCallback, add_tokens

pytestmark = [
    pytest.mark.filterwarnings("ignore::FutureWarning"),
    pytest.mark.filterwarnings(PEFT_WARNING),
    pytest.mark.filterwarnings("ignore:.*padding-free:UserWarning"),
]

TOKENS = ["<think>", "</think>"]
TEXTS = [
    "A name <think> twins </think> is told.",
    "The <think> elements have a story </think> of names, and every token is a piece.",
    "Tools <think> are called </think> by name.",
    "A model <think> reads tokens </think>.",
] * 2
LORA = {"target_modules": ["q_proj"], "r": 2}


def prepared(kind="llama", tied=True):
    tokenizer = bpe_tokenizer()
    model = build_model(kind, len(tokenizer), tied=tied).requires_grad_(False)
    partial = add_tokens(model, tokenizer, TOKENS, special=True)
    return model, tokenizer, partial


def options(tmp_path, **more):
    return dict(
        output_dir=str(tmp_path), max_steps=2, per_device_train_batch_size=4, report_to=[], use_cpu=True, bf16=False,
        learning_rate=1e-2, save_strategy="no", disable_tqdm=True, dataloader_pin_memory=False, seed=0,
        activation_checkpointing=False, **more,
    )  # fmt: skip


def sft(tmp_path, kind, tied, *, lora=False, **more):
    model, tokenizer, partial = prepared(kind, tied)
    config = LoraConfig(**LORA, modules_to_save=["new_rows"]) if lora else None
    trainer = SFTTrainer(
        model=model, args=SFTConfig(**options(tmp_path, **more)), train_dataset=Dataset.from_dict({"text": TEXTS}),
        processing_class=tokenizer, peft_config=config,
        callbacks=[PartialEmbeddingCallback(partial, learning_rate=1e-2)],
    )  # fmt: skip
    return trainer, model, partial


def plain_gradients(tmp_path, partial, batch):
    """Gradients of the whole tables of an ordinary model, from the ordinary loss, at the new rows."""
    partial.model.save_pretrained(tmp_path / "plain")
    plain = type(partial.model).from_pretrained(tmp_path / "plain")
    tables = [plain.get_input_embeddings().weight]
    if plain.get_output_embeddings().weight is not tables[0]:
        tables.append(plain.get_output_embeddings().weight)
    if plain.get_output_embeddings().bias is not None:
        tables.append(plain.get_output_embeddings().bias)
    for table in tables:
        table.requires_grad_(True)
    plain(**batch).loss.backward()
    return [table.grad[partial.token_ids] for table in tables]


@pytest.mark.parametrize(("kind", "tied"), [("llama", True), ("llama", False), ("phi", False)])
@pytest.mark.parametrize("more", [{}, {"packing": True, "max_length": 64}], ids=["padded", "packed"])
def test_sft_gradients_are_those_of_the_plain_loss_on_a_plain_model(tmp_path, kind, tied, more):
    trainer, model, partial = sft(tmp_path, kind, tied, **more)
    batch = next(iter(trainer.get_train_dataloader()))
    assert (batch["input_ids"] == partial.token_ids[0]).any()
    expected = plain_gradients(tmp_path, partial, batch)
    model.train()
    trainer.compute_loss(model, {**batch}).backward()
    parameters = list(partial.parameters())
    assert len(parameters) == len(expected) == {"llama": 1 if tied else 2, "phi": 3}[kind]
    for parameter, gradient in zip(parameters, expected, strict=True):
        assert gradient.norm() > 0
        torch.testing.assert_close(parameter.grad, gradient, atol=1e-6, rtol=1e-4)


@pytest.mark.parametrize("lora", [False, True], ids=["rows", "rows-and-lora"])
@pytest.mark.parametrize("more", [{}, {"packing": True, "max_length": 64}, {"loss_type": "chunked_nll"}],
                         ids=["nll", "packed", "chunked_nll"])  # fmt: skip
def test_sft_trains_rows_and_moves_nothing_else(tmp_path, tied, lora, more):
    trainer, model, partial = sft(tmp_path, "llama", tied, lora=lora, **more)
    before, start = snapshot(model), partial.token_rows()
    trainer.train()
    for name, rows in partial.token_rows().tensors().items():
        assert not torch.isclose(rows, start.tensors()[name]).all(), name
    partial.verify()
    for name, value in snapshot(model).items():
        if name.endswith(".weight") and name in before and "new_rows" not in name and "lora" not in name:
            assert torch.equal(value[:300], before[name][:300]), name


def test_labels_can_be_smoothed_which_takes_the_models_own_logits(tmp_path):
    trainer, _, partial = sft(tmp_path, "llama", False, label_smoothing_factor=0.1)
    start = partial.token_rows()
    trainer.train()
    assert not torch.isclose(partial.token_rows().output_rows, start.output_rows).all()


PAIRS = {
    "prompt": ["A name <think>", "Tools <think>"] * 4,
    "chosen": [" twins </think> is told.", " are called </think> by name."] * 4,
    "rejected": [" elements", " </think> </think> story"] * 4,
}


def dpo(tmp_path, tied, *, reference=None, peft_config=None, prepare=prepared):
    model, tokenizer, partial = prepare(tied=tied)
    trainer = DPOTrainer(
        model=model, ref_model=reference(model) if reference else None, processing_class=tokenizer,
        args=DPOConfig(**options(tmp_path)), train_dataset=Dataset.from_dict(PAIRS), peft_config=peft_config,
        callbacks=[PartialEmbeddingCallback(partial, learning_rate=1e-2)],
    )  # fmt: skip
    return trainer, model, partial


def test_dpo_trains_rows_against_a_reference_that_stays(tmp_path, tied):
    trainer, model, partial = dpo(tmp_path, tied, reference=copy.deepcopy)
    ids = torch.tensor([[5, *partial.token_ids, 9]])
    reference_logits, start = logits_of(trainer.ref_model, ids), partial.token_rows()
    batch = next(iter(trainer.get_train_dataloader()))
    loss = trainer.compute_loss(model, batch)
    torch.testing.assert_close(loss.detach(), torch.tensor(2.0).log(), atol=1e-5, rtol=0)  # policy = reference
    trainer.train()
    assert torch.equal(logits_of(trainer.ref_model, ids), reference_logits)
    for name, rows in partial.token_rows().tensors().items():
        assert not torch.isclose(rows, start.tensors()[name]).all(), name
    partial.verify()


def test_dpo_with_lora_has_the_untrained_rows_as_its_reference(tmp_path, tied):
    config = LoraConfig(**LORA, modules_to_save=["new_rows"])
    trainer, _, partial = dpo(tmp_path, tied, peft_config=config)
    ids = torch.tensor([[5, *partial.token_ids, 9]])
    start = logits_of(trainer.model, ids)
    trainer.train()
    trainer.model.eval()
    with trainer.model.disable_adapter():
        assert torch.equal(logits_of(trainer.model, ids), start)  # what DPO takes for the reference
    assert not torch.isclose(logits_of(trainer.model, ids), start).all()
    partial.verify()
