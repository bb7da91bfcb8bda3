"""TRL's GRPO: rows train on rewards, and a generation engine is handed the merged model's weights."""

from __future__ import annotations

import pytest
import torch
import trl.generation.vllm_generation as vllm_generation
from conftest import PEFT_WARNING, bpe_tokenizer, build_model, logits_of, snapshot
from datasets import Dataset
from peft import LoraConfig
from transformers import AutoModelForCausalLM
from trl import GRPOConfig, GRPOTrainer

from hf_partial_embed import PartialEmbeddingCallback, PartialEmbeddingError, add_tokens

pytestmark = [
    pytest.mark.filterwarnings("ignore::FutureWarning"),
    pytest.mark.filterwarnings("ignore::DeprecationWarning"),
    pytest.mark.filterwarnings("ignore::UserWarning"),
    pytest.mark.filterwarnings(PEFT_WARNING),
]

TOKENS = ["<think>", "</think>"]
PROMPTS = ["A name <think>", "Tools <think> are", "Every token </think>", "The story <think>"]
LORA = {"target_modules": ["q_proj"], "r": 2}
LORAS = {"rows": None, "rows-and-lora": LORA, "rows-in-the-adapter": {**LORA, "modules_to_save": ["new_rows"]}}


def cases(*fast):
    """Each way to train, tied and untied: those named run always, the others with `-m slow`."""
    return pytest.mark.parametrize(
        ("tied", "lora"),
        [
            pytest.param(tied == "tied", lora, id=f"{tied}-{name}", marks=() if (tied, name) in fast else slow)
            for tied in ("tied", "untied")
            for name, lora in LORAS.items()
        ],
    )


slow = pytest.mark.slow


def prepared(tied, dtype=torch.float32):
    tokenizer = bpe_tokenizer()
    tokenizer.padding_side = "left"
    model = build_model("llama", len(tokenizer), tied=tied, dtype=dtype).requires_grad_(False)
    partial = add_tokens(model, tokenizer, TOKENS)
    torch.manual_seed(1)
    start = torch.randn(len(TOKENS), 16) * 0.3  # says itself at times, so that there is something to reward
    with torch.no_grad():
        for rows in partial.parameters():
            rows.copy_(start)
    return model, tokenizer, partial


class Reward:
    """The part of an answer that is new tokens, which it reads as ids and as text."""

    def __init__(self, partial):
        self.new, self.prompts, self.seen, self.values = set(partial.token_ids), set(), 0, []

    __name__ = "reward"

    def __call__(self, prompts, completions, completion_ids, **_):
        rewards = []
        for text, ids in zip(completions, completion_ids, strict=True):
            found = [token_id for token_id in ids if token_id in self.new]
            assert sum(text.count(token) for token in TOKENS) == len(found), "the text has them, too"
            self.seen += len(found)
            rewards.append(len(found) / len(ids))
        self.prompts |= set(prompts)
        self.values.append(sum(rewards) / len(rewards))
        return rewards


def grpo(tmp_path, model, tokenizer, partial, lora=None, *, max_steps=20, **more):
    reward = Reward(partial)
    args = GRPOConfig(
        output_dir=str(tmp_path), max_steps=max_steps, per_device_train_batch_size=16, num_generations=8,
        max_completion_length=6, report_to=[], use_cpu=True, bf16=False, learning_rate=0.1, save_strategy="no",
        disable_tqdm=True, dataloader_pin_memory=False, seed=0, gradient_checkpointing=False, logging_steps=100,
        **more,
    )  # fmt: skip
    trainer = GRPOTrainer(
        model=model, reward_funcs=reward, args=args, train_dataset=Dataset.from_dict({"prompt": PROMPTS}),
        processing_class=tokenizer, peft_config=LoraConfig(**lora) if lora else None,
        callbacks=[PartialEmbeddingCallback(partial, learning_rate=0.1)],
    )  # fmt: skip
    if lora and "modules_to_save" not in lora:
        partial.requires_grad_(True)
    return trainer, reward


@cases(("tied", "rows"), ("untied", "rows-and-lora"))
def test_rows_learn_from_rewards_and_nothing_frozen_moves(tmp_path, tied, lora):
    model, tokenizer, partial = prepared(tied)
    trainer, reward = grpo(tmp_path, model, tokenizer, partial, lora)
    before, start = snapshot(model), partial.token_rows()
    trainer.train()
    assert trainer.state.global_step == 20
    assert reward.seen > 0 and reward.prompts == set(PROMPTS)
    for name, rows in partial.token_rows().tensors().items():
        assert not torch.isclose(rows, start.tensors()[name]).all(), name
    partial.verify()
    frozen = {name: value for name, value in before.items() if "new_rows" not in name and "lora_" not in name}
    after = snapshot(model)
    for name, value in frozen.items():
        assert torch.equal(after[name][:300], value[:300]), name
    assert len(frozen) > 20 - tied
    print(
        f"reward of the first 5 steps {sum(reward.values[:5]) / 5:.2f}, of the last {sum(reward.values[-5:]) / 5:.2f}"
    )
    assert sum(reward.values[-5:]) > 2 * sum(reward.values[:5])


class Engine:
    """In the place of TRL's client of a vLLM server: a plain model of transformers, loaded by name, strictly."""

    model = None  # an ordinary checkpoint of the grown vocabulary
    received: list

    def __init__(self, **_):
        self.received = []

    def init_communicator(self, device):
        pass

    def get_server_info(self):
        return {"model_config": {"logprobs_mode": "processed_logprobs"}}

    def update_named_params(self, metadata, named_params):
        state = {name: tensor.clone() for name, tensor in named_params}
        assert [(name, str(t.dtype).removeprefix("torch."), list(t.shape)) for name, t in state.items()] == metadata
        own = dict(self.model.named_parameters())
        assert {name: (t.shape, t.dtype) for name, t in own.items()} == {
            n: (t.shape, t.dtype) for n, t in state.items()
        }
        assert list(own) == list(state)
        self.model.load_state_dict(state, strict=not self.model.config.tie_word_embeddings)
        self.received.append(state)

    def reset_prefix_cache(self):
        pass

    def generate(self, prompts, n, max_tokens, **_):
        answers = []
        for ids in prompts:
            if max(ids) >= self.model.config.vocab_size:  # in the words of vLLM; see test_vllm.py
                raise Exception(f"Request failed: 400, Token id {max(ids)} is out of vocabulary")
            out = self.model.generate(
                torch.tensor([ids] * n), attention_mask=torch.ones(n, len(ids), dtype=torch.long), do_sample=True,
                max_new_tokens=max_tokens, min_new_tokens=max_tokens,
            )  # fmt: skip
            answers += out[:, len(ids) :].tolist()
        return {"prompt_ids": prompts, "completion_ids": answers, "logprobs": [[[0.0]] * len(ids) for ids in answers]}


@pytest.fixture
def engine(monkeypatch):
    monkeypatch.setattr(vllm_generation, "is_vllm_available", lambda: True)
    monkeypatch.setattr(vllm_generation, "VLLMClient", Engine)
    original = vllm_generation.VLLMGeneration.sync_weights
    yield {"use_vllm": True, "vllm_mode": "server", "vllm_importance_sampling_correction": False}
    assert vllm_generation.VLLMGeneration.sync_weights is original, "TRL is as it was after the training"


@cases(("untied", "rows"), ("tied", "rows-in-the-adapter"))
@pytest.mark.parametrize(
    "dtype", [torch.float32, pytest.param(torch.bfloat16, marks=slow)], ids=["float32", "bfloat16"]
)
def test_engine_is_handed_the_merged_models_weights(tmp_path, tied, lora, dtype, engine, monkeypatch):
    model, tokenizer, partial = prepared(tied, dtype)
    model.save_pretrained(tmp_path / "grown")
    monkeypatch.setattr(Engine, "model", AutoModelForCausalLM.from_pretrained(tmp_path / "grown", dtype=dtype))
    trainer, reward = grpo(tmp_path, model, tokenizer, partial, lora, max_steps=3, **engine)
    client = trainer.vllm_generation.vllm_client
    trainer.train()
    assert len(client.received) == 3 and reward.values
    tables = ["model.embed_tokens.weight", *([] if tied else ["lm_head.weight"])]
    for name in tables:
        old = [state[name][:300] for state in client.received]
        assert all(torch.equal(table, old[0]) for table in old)
        new = [state[name][300:] for state in client.received]
        assert not torch.equal(new[0], new[1]) and not torch.equal(new[1], new[2]), "the rows of each step"
    if lora is None:  # with the weights of the last step it is the model, to the bit
        with partial.as_merged():
            client.update_named_params(
                [(n, str(p.dtype).removeprefix("torch."), list(p.shape)) for n, p in model.named_parameters()],
                model.named_parameters(),
            )
        partial.verify()
        ids = torch.tensor([[5, *partial.token_ids, 9]])
        assert torch.equal(logits_of(client.model.eval(), ids), logits_of(partial.merge().eval(), ids))


def test_engine_with_fewer_rows_is_found_before_the_first_step(tmp_path, engine, monkeypatch):
    model, tokenizer, partial = prepared(True)
    monkeypatch.setattr(Engine, "model", build_model("llama", 300))
    trainer, _ = grpo(tmp_path, model, tokenizer, partial, **engine)
    start = partial.token_rows()
    callback = next(c for c in trainer.callback_handler.callbacks if isinstance(c, PartialEmbeddingCallback))
    with pytest.raises(
        PartialEmbeddingError, match=r"no row for id 301 .*LlamaForCausalLM has 302 rows.*save_pretrained"
    ):
        trainer.train()
    assert trainer.state.global_step == 0 and not trainer.vllm_generation.vllm_client.received
    assert torch.equal(partial.token_rows().input_rows, start.input_rows)
    callback._remove_hooks()  # what on_train_end does


@pytest.mark.parametrize("kind", ["llama", "phi", "gpt2", "gemma", "t5", "bert"])
def test_as_merged_has_the_names_shapes_and_values_of_the_merged_model(kind, tied, strategy):
    tokenizer = bpe_tokenizer()
    model = build_model(kind, len(tokenizer), tied=tied)
    partial = add_tokens(model, tokenizer, TOKENS[:1], strategy=strategy)
    second = add_tokens(model, tokenizer, TOKENS[1:], strategy=strategy)
    with torch.no_grad():
        for rows in (*partial.parameters(), *second.parameters()):
            rows[-1:].normal_()
    names, ids = [name for name, _ in model.named_parameters()], torch.tensor([[5, 300, 301, 9]])
    logits, parameters = logits_of(model, ids), [*partial.parameters(), *second.parameters()]
    with partial.as_merged() as plain:
        found = {name: value.detach().clone() for name, value in plain.named_parameters()}
        state = snapshot(plain)
        assert torch.equal(logits_of(plain, ids), logits)  # it still runs
        with second.as_merged():
            assert list(dict(model.named_parameters())) == list(found)
    assert [name for name, _ in model.named_parameters()] == names
    after = [*partial.parameters(), *second.parameters()]
    assert all(ours is theirs for ours, theirs in zip(after, parameters, strict=True))
    second.merge()
    merged = partial.merge()
    for ours, theirs in ((found, dict(merged.named_parameters())), (state, merged.state_dict())):
        assert list(ours) == list(theirs)
        assert all(torch.equal(ours[name], theirs[name]) for name in ours)


def test_state_dict_outside_has_the_rows_in_the_tables_and_keys_of_their_own():
    model, _, partial = prepared(False)
    with torch.no_grad():
        for rows in partial.parameters():
            rows.normal_()
    state = model.state_dict()
    assert torch.equal(state["model.embed_tokens.weight"][300:], partial.token_rows().input_rows)
    assert {name for name in state if "new_rows" in name} == {
        "model.embed_tokens.new_rows.weight", "lm_head.new_rows.weight"
    }  # fmt: skip
