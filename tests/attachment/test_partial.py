"""The promises of a `PartialEmbedding`, over models of every common kind."""

from __future__ import annotations

import copy
import io
import pickle
import subprocess
import sys
import types

import pytest
import torch
import torch.nn.functional as F
from added import add_tokens
from conftest import MODELS, PEFT_WARNING, bpe_tokenizer, build_model, logits_of, run_model, snapshot
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from hf_partial_embed import (
    FrozenRowsChangedError,
    PartialEmbeddingError,
    TokenRows,
    load_tokens,
    train_tokens,
)
from hf_partial_embed.attachment import attachment

TOKENS = ["<think>", "</think>", "praseodymium"]
KINDS = [(kind, tied) for kind in MODELS for tied in (True, False) if (kind, tied) != ("bert-encoder", False)]


@pytest.fixture(params=KINDS, ids=lambda case: f"{case[0]}-{'tied' if case[1] else 'untied'}")
def case(request):
    return request.param


def prepared(kind="llama", tied=True, *, strategy="split", dtype=torch.float32, **options):
    tokenizer = bpe_tokenizer()
    model = build_model(kind, len(tokenizer), tied=tied, dtype=dtype)
    partial = add_tokens(model, tokenizer, TOKENS, strategy=strategy, **options)
    return model, tokenizer, partial


def loss_of(model, ids):
    out = run_model(model, ids)
    if hasattr(out, "logits"):
        return F.cross_entropy(out.logits.flatten(0, 1).float(), ids.flatten())
    return out.last_hidden_state.float()[..., ::2].pow(2).mean() + out.last_hidden_state.float().mean()


def train(model, partial, steps=3, **options):
    """A loop of one's own over everything that requires grad."""
    parameters = [parameter for parameter in model.parameters() if parameter.requires_grad]
    optimizer = torch.optim.AdamW(parameters, **{"lr": 1e-2, "weight_decay": 0.1, **options})
    partial.protect(optimizer)
    ids = torch.tensor([[5, *partial.token_ids, 9, *partial.token_ids]])
    model.train()
    for _ in range(steps):
        loss_of(model, ids).backward()
        optimizer.step()
        optimizer.zero_grad()
    return model.eval()


def state_of(model, tokenizer):
    """Everything that must come back."""
    attributes = {
        name: {key: value for key, value in vars(module).items() if isinstance(value, (int, str, bool, float))}
        for name, module in model.named_modules()
    }
    return {
        "tensors": snapshot(model),
        "flags": {name: p.requires_grad for name, p in model.named_parameters(remove_duplicate=False)},
        "types": {name: type(module) for name, module in model.named_modules()},
        "attributes": attributes,
        "keys": sorted(vars(model)),
        "hooks": {name: (len(m._forward_hooks), len(m._forward_pre_hooks)) for name, m in model.named_modules()},
        "config": model.config.to_dict(),
        "tokenizer": tokenizer._tokenizer.to_str(),
        "length": len(tokenizer),
    }


def assert_same_state(now, before):
    assert now.keys() == before.keys()
    assert now["tensors"].keys() == before["tensors"].keys()
    for name, tensor in before["tensors"].items():
        assert torch.equal(now["tensors"][name], tensor), name
    for key in before.keys() - {"tensors"}:
        assert now[key] == before[key], key


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_old_logits_do_not_change_by_one_bit_when_tokens_are_added(case, dtype):
    kind, tied = case
    tokenizer = bpe_tokenizer()
    model = build_model(kind, len(tokenizer), tied=tied, dtype=dtype)
    for ids in (torch.tensor([[5, 6, 7, 8, 200]]), torch.tensor([[4]]), torch.randint(4, 290, (3, 17))):
        before = logits_of(model, ids)
        partial = add_tokens(model, tokenizer, TOKENS)
        after = logits_of(model, ids)
        assert torch.equal(after[..., : before.shape[-1]], before)
        partial.detach()


def test_old_logits_under_mask_are_those_of_before(case):
    kind, tied = case
    tokenizer = bpe_tokenizer()
    model = build_model(kind, len(tokenizer), tied=tied)
    ids = torch.randint(4, 290, (3, 17))
    before = logits_of(model, ids)
    add_tokens(model, tokenizer, TOKENS, strategy="mask")
    torch.testing.assert_close(logits_of(model, ids)[..., : before.shape[-1]], before)


def test_rows_train_and_nothing_else_moves_by_one_bit(case, strategy):
    kind, tied = case
    tokenizer = bpe_tokenizer()
    model = build_model(kind, len(tokenizer), tied=tied)
    model.requires_grad_(False)
    before = snapshot(model)
    partial = add_tokens(model, tokenizer, TOKENS, strategy=strategy)
    start = partial.token_rows()
    train(model, partial)
    partial.verify()
    after = model.state_dict()
    for name, tensor in before.items():
        now = after[name][..., : tensor.shape[-1]] if name == "final_logits_bias" else after[name][: len(tensor)]
        assert torch.equal(now, tensor), name
    for name, rows in partial.token_rows().tensors().items():
        assert not torch.isclose(rows, start.tensors()[name]).all(), name


def test_exactly_the_new_rows_are_trainable(case):
    kind, tied = case
    tokenizer = bpe_tokenizer()
    model = build_model(kind, len(tokenizer), tied=tied).requires_grad_(False)
    partial = add_tokens(model, tokenizer, TOKENS)
    trainable = [p for p in model.parameters() if p.requires_grad]
    assert {id(p) for p in trainable} == {id(p) for p in partial.parameters()}
    assert all(len(p) == len(TOKENS) for p in trainable)
    assert all(p.dtype == torch.float32 for p in trainable)


def test_body_keeps_the_requires_grad_that_the_user_gave_it(strategy):
    tokenizer = bpe_tokenizer()
    model = build_model("llama", len(tokenizer))
    model.model.layers[0].requires_grad_(False)
    before = {n: p.requires_grad for n, p in model.named_parameters() if "embed" not in n}
    partial = add_tokens(model, tokenizer, TOKENS, strategy=strategy)
    assert {n: p.requires_grad for n, p in model.named_parameters() if "embed" not in n} == before
    partial.merge()
    assert model.get_input_embeddings().weight.requires_grad


def test_merged_checkpoint_reloads_without_the_plugin(case, strategy, tmp_path):
    kind, tied = case
    model, tokenizer, partial = prepared(kind, tied, strategy=strategy)
    train(model, partial)
    model.save_pretrained(tmp_path, max_shard_size="20KB")
    tokenizer.save_pretrained(tmp_path)
    loaded, info = type(model).from_pretrained(tmp_path, output_loading_info=True)
    assert not any(info[key] for key in ("missing_keys", "unexpected_keys", "mismatched_keys", "error_msgs"))
    assert loaded.config.vocab_size == 303
    assert not any("new_rows" in name for name, _ in loaded.named_parameters())
    ids = torch.tensor([[5, *partial.token_ids, 9]])
    torch.testing.assert_close(logits_of(loaded, ids), logits_of(model, ids))
    head = loaded.get_output_embeddings()
    if head is not None:
        assert (head.weight is loaded.get_input_embeddings().weight) == tied


def test_a_process_without_the_package_loads_what_was_saved(tmp_path):
    model, tokenizer, partial = prepared()
    train(model, partial)
    model.save_pretrained(tmp_path)
    tokenizer.save_pretrained(tmp_path)
    ids = torch.tensor([tokenizer("a <think> b praseodymium")["input_ids"]])
    torch.save({"ids": ids, "logits": logits_of(model, ids)}, tmp_path / "expected.pt")
    code = """
import sys
sys.modules["hf_partial_embed"] = None
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer
folder = sys.argv[1]
expected = torch.load(folder + "/expected.pt")
tokenizer = AutoTokenizer.from_pretrained(folder)
assert tokenizer("a <think> b praseodymium", return_tensors="pt")["input_ids"].equal(expected["ids"])
with torch.no_grad():
    logits = AutoModelForCausalLM.from_pretrained(folder)(expected["ids"]).logits
torch.testing.assert_close(logits, expected["logits"])
"""
    subprocess.run([sys.executable, "-c", code, str(tmp_path)], check=True)


def test_rows_come_back_in_a_fresh_model_by_their_text(case, strategy, tmp_path):
    kind, tied = case
    model, _, partial = prepared(kind, tied, strategy=strategy)
    model.requires_grad_(False)
    partial.requires_grad_(True)
    train(model, partial)
    partial.save_pretrained(tmp_path)
    tokenizer = bpe_tokenizer()
    tokenizer.add_tokens(["another"])  # so that the ids are others
    fresh = build_model(kind, 300, tied=tied)
    again = load_tokens(fresh, tokenizer, tmp_path)
    assert again.tokens == TOKENS
    assert again.token_ids == [301, 302, 303]
    assert partial.token_ids == [300, 301, 302]
    ids = torch.tensor([[5, 7, 9]])
    with_new = torch.cat([ids, torch.tensor([partial.token_ids])], 1)
    with_new_again = torch.cat([ids, torch.tensor([again.token_ids])], 1)
    torch.testing.assert_close(logits_of(fresh, with_new_again)[..., :16], logits_of(model, with_new)[..., :16])
    for name, rows in partial.token_rows().tensors().items():
        assert torch.equal(again.token_rows().tensors()[name], rows), name


def test_detach_restores_every_bit(case, strategy):
    kind, tied = case
    tokenizer = bpe_tokenizer()
    model = build_model(kind, len(tokenizer), tied=tied)
    model.get_input_embeddings().weight.requires_grad_(False)
    before = state_of(model, tokenizer)
    partial = add_tokens(model, tokenizer, TOKENS, strategy=strategy, special=True)
    first = next(iter(partial.parameters()))
    run_model(model, torch.tensor([[5, *partial.token_ids]]))
    with torch.no_grad():
        (first if strategy == "split" else first[partial.token_ids]).add_(1.0)
    rows = partial.detach()
    assert_same_state(state_of(model, tokenizer), before)
    assert rows.tokens == TOKENS
    with pytest.raises(PartialEmbeddingError, match="not on a model any more"):
        partial.detach()


def test_merge_gives_plain_modules_with_the_rows_written_in(case, strategy):
    kind, tied = case
    model, tokenizer, partial = prepared(kind, tied, strategy=strategy)
    plain = build_model(kind, 300, tied=tied)
    train(model, partial)
    ids = torch.tensor([[5, *partial.token_ids, 9]])
    expected, rows = logits_of(model, ids), partial.token_rows()
    assert partial.merge() is model
    torch.testing.assert_close(logits_of(model, ids), expected)
    assert {n: type(m) for n, m in model.named_modules()} == {n: type(m) for n, m in plain.named_modules()}
    assert set(model.state_dict()) == set(plain.state_dict())
    table = model.get_input_embeddings().weight
    assert torch.equal(table.detach()[[300, 301, 302]], rows.input_rows)
    assert sorted(vars(model)) == sorted(vars(plain))
    model.resize_token_embeddings(310)
    assert tokenizer.convert_tokens_to_ids(TOKENS) == [300, 301, 302]


def test_ties_keep_their_identity_outside_of_the_forward(strategy):
    model, _, partial = prepared("llama", True, strategy=strategy)
    for _ in range(2):
        assert model.lm_head.weight is model.get_input_embeddings().weight
        assert isinstance(model.lm_head.weight, nn.Parameter)
        model.tie_weights()
        train(model, partial, steps=1)
    assert model.lm_head.weight.shape == (303, 16)
    assert model.get_input_embeddings().num_embeddings == model.lm_head.out_features == 303
    partial.verify()


def fused_forward(self, input_ids=None, labels=None, **kwargs):
    """What a fused loss does: it runs the backbone and reads the head's weight itself."""
    hidden = self.model(input_ids=input_ids).last_hidden_state[:, :-1].flatten(0, 1)
    head = self.get_output_embeddings()
    chunks = zip(hidden.split(2), labels[:, 1:].flatten().split(2), strict=True)
    return sum(
        F.cross_entropy(F.linear(part, head.weight, head.bias), target, reduction="sum") for part, target in chunks
    )


def plain_loss(model, ids):
    logits = model(input_ids=ids).logits[:, :-1].flatten(0, 1)
    return F.cross_entropy(logits, ids[:, 1:].flatten(), reduction="sum")


@pytest.mark.parametrize(("kind", "tied"), [("llama", True), ("llama", False), ("phi", True), ("phi", False)])
@pytest.mark.parametrize("ids", ["appended", "scattered"])
def test_a_fused_loss_that_reads_the_head_gets_the_same_gradients(kind, tied, ids, strategy):
    tokenizer = bpe_tokenizer()
    model = build_model(kind, len(tokenizer), tied=tied).requires_grad_(False)
    if ids == "appended":
        partial = add_tokens(model, tokenizer, TOKENS, strategy=strategy)
    else:
        partial = train_tokens(model, None, [30, 7, 55], strategy=strategy)
    with torch.no_grad():
        for rows in partial.parameters():
            rows.add_(torch.randn_like(rows), alpha=0.1) if strategy == "split" else None
    batch = torch.tensor([[5, *partial.token_ids, 9, *partial.token_ids, 30]])
    expected = plain_loss(model, batch)
    expected.backward()
    gradients = [p.grad.clone() for p in partial.parameters()]
    model.zero_grad()
    model.forward = types.MethodType(fused_forward, model)
    loss = model(input_ids=batch, labels=batch)
    loss.backward()
    torch.testing.assert_close(loss, expected)
    for parameter, gradient in zip(partial.parameters(), gradients, strict=True):
        torch.testing.assert_close(parameter.grad, gradient)


def test_resize_is_refused_while_rows_are_attached(strategy):
    model, tokenizer, partial = prepared(strategy=strategy)
    before = state_of(model, tokenizer)
    for module in (model, model.model):
        with pytest.raises(PartialEmbeddingError, match="merge"):
            module.resize_token_embeddings(400)
    assert_same_state(state_of(model, tokenizer), before)
    partial.detach()
    model.resize_token_embeddings(400)


def reload(model, state):
    tokenizer = bpe_tokenizer()
    fresh = build_model("llama", 300, tied=model.config.tie_word_embeddings, seed=5)
    add_tokens(fresh, tokenizer, TOKENS)
    fresh.load_state_dict(state)
    return fresh


def test_other_ways_of_saving_are_whole(tmp_path, tied):
    from accelerate import Accelerator
    from safetensors.torch import load_file
    from transformers import LlamaModel

    model, _, partial = prepared("llama", tied)
    train(model, partial)
    ids = torch.tensor([[5, *partial.token_ids, 9]])
    expected = logits_of(model, ids)
    assert torch.equal(logits_of(reload(model, model.state_dict()), ids), expected)

    torch.save(model.state_dict(), tmp_path / "state.pt")
    assert torch.equal(logits_of(reload(model, torch.load(tmp_path / "state.pt")), ids), expected)

    buffer = io.BytesIO()
    torch.save(model, buffer)
    buffer.seek(0)
    assert torch.equal(logits_of(torch.load(buffer, weights_only=False), ids), expected)

    Accelerator(cpu=True).save_model(model, str(tmp_path / "accelerate"))
    state = load_file(tmp_path / "accelerate" / "model.safetensors")
    plain = build_model("llama", 303, tied=tied)
    result = plain.load_state_dict(state, strict=False)
    assert {key.split(".")[-2] for key in result.unexpected_keys} == {"new_rows"}
    torch.testing.assert_close(logits_of(plain, ids), expected)

    model.model.save_pretrained(tmp_path / "body")
    body, info = LlamaModel.from_pretrained(tmp_path / "body", output_loading_info=True)
    assert not any(info[key] for key in ("missing_keys", "unexpected_keys", "mismatched_keys"))
    torch.testing.assert_close(body(ids).last_hidden_state, model.model(ids).last_hidden_state, check_device=False)


def test_standard_state_dict_can_be_loaded_strictly(tied):
    model, _, partial = prepared("llama", tied)
    train(model, partial)
    standard = {name: t.clone() for name, t in model.state_dict().items() if "new_rows" not in name}
    fresh = reload(model, standard)
    ids = torch.tensor([[5, *partial.token_ids, 9]])
    assert torch.equal(logits_of(fresh, ids), logits_of(model, ids))


@pytest.mark.parametrize("together", [True, False], ids=["with-handle", "model-alone"])
@pytest.mark.parametrize("how", ["deepcopy", "pickle"])
def test_copies_are_independent(strategy, tied, together, how):
    model, _, partial = prepared("llama", tied, strategy=strategy)
    ids = torch.tensor([[5, *partial.token_ids, 9]])
    expected = logits_of(model, ids)
    before = snapshot(model)
    thing = (model, partial) if together else (model, None)
    other, handle = copy.deepcopy(thing) if how == "deepcopy" else pickle.loads(pickle.dumps(thing))
    if handle is None:
        handle = type(partial)(attachment.attachments_of(other)[0])
    assert handle.model is other
    other.requires_grad_(False)
    handle.requires_grad_(True)
    train(other, handle)
    handle.verify()
    assert not torch.equal(logits_of(other, ids), expected)
    assert torch.equal(logits_of(model, ids), expected)
    handle.detach()
    assert other.config.vocab_size == 300
    assert model.config.vocab_size == 303
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())
    partial.verify()


def test_verify_names_the_ids_that_changed(strategy):
    model, _, partial = prepared(strategy=strategy)
    partial.verify()
    with torch.no_grad():
        model.get_input_embeddings().weight.data[[42, 7], 0] += 1.0
    with pytest.raises(FrozenRowsChangedError) as info:
        partial.verify()
    assert info.value.changed == {"model.embed_tokens.weight": [7, 42]}
    assert "model.embed_tokens.weight: 2 rows (7, 42)" in str(info.value)


def test_mask_without_protection_is_caught_by_verify():
    model, _, partial = prepared(strategy="mask")
    optimizer = torch.optim.AdamW(partial.parameters())
    loss_of(model, torch.tensor([[5, 300]])).backward()
    optimizer.step()
    with pytest.raises(FrozenRowsChangedError, match="protect"):
        partial.verify()


def test_flan_t5_trap_a_head_of_its_own_is_kept_though_the_config_says_tied(strategy, tmp_path):
    tokenizer = bpe_tokenizer()
    model = build_model("t5", len(tokenizer), tied=False)
    assert model.config.tie_word_embeddings
    head = model.lm_head.weight.detach().clone()
    ids = torch.tensor([[5, 6, 7]])
    before = logits_of(model, ids)
    partial = add_tokens(model, tokenizer, TOKENS, strategy=strategy)
    torch.testing.assert_close(logits_of(model, ids)[..., :300], before)
    assert torch.equal(model.lm_head.weight.detach()[:300], head)
    assert model.lm_head.weight is not model.shared.weight
    partial.detach()
    assert torch.equal(model.lm_head.weight, head)


def test_output_false_keeps_the_heads_new_rows_at_their_start():
    model, _, partial = prepared("llama", False, output=False)
    start = partial.token_rows().output_rows
    model.requires_grad_(False)
    partial.requires_grad_(True)
    assert len(list(partial.parameters())) == 1
    train(model, partial)
    assert torch.equal(partial.token_rows().output_rows, start)
    assert torch.equal(model.lm_head.weight.detach()[300:], start)


@pytest.mark.parametrize(
    ("tied", "options", "message"),
    [
        (True, {"output": False}, "one row for both"),
        (True, {"output": True}, "output=True is unknown"),
        (True, {"strategy": "hook"}, "strategy='hook' is unknown. Choose 'split' or 'mask'"),
        (True, {"init": "zeros"}, "init='zeros' is no initialiser. Choose one of"),
        (True, {"dtype": torch.int64}, "dtype=torch.int64 cannot be trained. Choose one of torch.float32"),
        (True, {"dtype": torch.float64, "strategy": "mask"}, "model's own tables, which are torch.float32"),
    ],
)
def test_bad_options_are_refused_and_nothing_has_changed(tied, options, message):
    tokenizer = bpe_tokenizer()
    model = build_model("llama", len(tokenizer), tied=tied)
    before = state_of(model, tokenizer)
    with pytest.raises(PartialEmbeddingError, match=message):
        add_tokens(model, tokenizer, TOKENS, **options)
    assert_same_state(state_of(model, tokenizer), before)


def test_a_model_without_token_embeddings_is_refused_by_name():
    tokenizer = bpe_tokenizer()
    with pytest.raises(PartialEmbeddingError, match="Linear has no input embeddings"):
        add_tokens(nn.Linear(3, 3), tokenizer, TOKENS)
    assert len(tokenizer) == 300


def test_a_module_that_has_kept_a_tensor_of_its_last_forward_is_no_obstacle():
    model, tokenizer, partial = prepared()
    model.model.kept = {"state": [model(torch.tensor([[5, 300]])).logits]}
    second = add_tokens(model, tokenizer, ["<second>"])
    second.detach()
    partial.detach()
    assert model.config.vocab_size == 300


def test_rows_of_another_width_are_refused_with_both_widths():
    _, _, partial = prepared()
    rows = partial.detach()
    tokenizer = bpe_tokenizer()
    from transformers import GPT2Config, GPT2LMHeadModel

    wide = GPT2LMHeadModel(GPT2Config(vocab_size=300, n_embd=32, n_layer=1, n_head=2, n_positions=32))
    before = state_of(wide, tokenizer)
    with pytest.raises(PartialEmbeddingError, match=r"3 rows of width 16 to GPT2LMHeadModel: .* 32 wide"):
        rows.attach(wide, tokenizer)
    assert_same_state(state_of(wide, tokenizer), before)


def test_rows_with_a_head_of_their_own_do_not_go_on_a_tied_model():
    _, _, partial = prepared("llama", False)
    rows, tokenizer = partial.detach(), bpe_tokenizer()
    with pytest.raises(PartialEmbeddingError, match="its head is tied"):
        rows.attach(build_model("llama", 300, tied=True), tokenizer)


def test_another_base_model_is_a_warning(caplog):
    model, tokenizer, partial = prepared()
    rows = partial.detach()
    rows.base_model, model.config._name_or_path = "org/one", "org/two"
    rows.attach(model, tokenizer)
    assert "trained on 'org/one' and are attached to 'org/two'" in caplog.text


def test_several_row_sets_load_one_after_another(tied, strategy):
    sets = []
    for tokens in (["<a>", "<b>"], ["<c>"]):
        tokenizer = bpe_tokenizer()
        model = build_model("llama", 300, tied=tied)
        partial = add_tokens(model, tokenizer, tokens)
        with torch.no_grad():
            for rows in partial.parameters():
                rows.uniform_()
        sets.append(partial.detach())
    tokenizer = bpe_tokenizer()
    model = build_model("llama", 300, tied=tied)
    handles = [rows.attach(model, tokenizer, strategy=strategy) for rows in sets]
    assert [handle.token_ids for handle in handles] == [[300, 301], [302]]
    model.requires_grad_(False)
    for handle in handles:
        handle.requires_grad_(True)
    ids = torch.tensor([[300, 302, 301]])
    before = [handle.token_rows() for handle in handles]
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.1)
    for handle in handles:
        handle.protect(optimizer)
    loss_of(model, ids).backward()
    optimizer.step()
    for handle, rows, start in zip(handles, sets, before, strict=True):
        handle.verify()
        assert torch.equal(start.input_rows, rows.input_rows)
        assert not torch.isclose(handle.token_rows().input_rows, start.input_rows).all(1).any()


@pytest.mark.parametrize("trainable", [True, False])
def test_loaded_rows_train_or_not(tmp_path, trainable):
    _, _, partial = prepared()
    partial.save_pretrained(tmp_path)
    partial.detach()
    again = load_tokens(partial.model, partial.tokenizer, tmp_path, trainable=trainable)
    assert all(p.requires_grad == trainable for p in again.parameters())


@pytest.mark.parametrize(("kind", "tied"), [case for case in KINDS if "bert" not in case[0]])
def test_generate_equals_that_of_the_merged_model(kind, tied, strategy):
    model, _, partial = prepared(kind, tied, strategy=strategy)
    train(model, partial)
    ids = torch.tensor([[5, *partial.token_ids, 9]])
    options = {"max_new_tokens": 8, "do_sample": False, "pad_token_id": 1}
    live = model.generate(ids, **options)
    partial.merge()
    assert torch.equal(model.generate(ids, **options), live)


# T5 itself does not compile to one graph.
COMPILED = [(kind, tied, strategy) for kind, tied in KINDS if kind != "t5" for strategy in ("split", "mask")]


@pytest.mark.slow  # test_cost.py compiles a plain one
@pytest.mark.parametrize(("kind", "tied", "strategy"), COMPILED, ids=str)
def test_model_compiles_to_one_graph(kind, tied, strategy):
    model, _, partial = prepared(kind, tied, strategy=strategy)
    model.requires_grad_(False)
    partial.requires_grad_(True)
    torch._dynamo.reset()
    compiled = torch.compile(model, backend="aot_eager", fullgraph=True)
    for length in (6, 9):
        ids = torch.cat([torch.tensor([partial.token_ids]), torch.randint(4, 290, (1, length))], 1)
        loss_of(model, ids).backward()
        expected = [p.grad.clone() for p in partial.parameters() if p.grad is not None]
        model.zero_grad()
        loss_of(compiled, ids).backward()
        got = [p.grad.clone() for p in partial.parameters() if p.grad is not None]
        model.zero_grad()
        for one, other in zip(got, expected, strict=True):
            torch.testing.assert_close(one, other)


def test_gradient_checkpointing_gives_the_same_gradients(tied):
    model, _, partial = prepared("llama", tied)
    ids = torch.tensor([[5, *partial.token_ids, 9]])
    model.train()
    gradients = []
    for on in (False, True):
        if on:
            enable = getattr(model, "activation_checkpointing_enable", None) or model.gradient_checkpointing_enable
            enable({"use_reentrant": False})  # its name in transformers 5.0
        loss_of(model, ids).backward()
        gradients.append([p.grad.clone() for p in partial.parameters()])
        model.zero_grad()
    assert all(torch.equal(a, b) for a, b in zip(*gradients, strict=True))


@pytest.mark.filterwarnings(PEFT_WARNING)
@pytest.mark.parametrize("order", ["before", "after"])
def test_lora_before_or_after_trains_rows_beside_the_adapter(order, tied, tmp_path):
    from peft import LoraConfig, PeftModel, get_peft_model

    tokenizer = bpe_tokenizer()
    model = build_model("llama", 300, tied=tied)
    ids = torch.tensor([[5, 300, 301, 302, 9]])
    config = LoraConfig(target_modules=["q_proj"], r=2, init_lora_weights=False)
    if order == "before":
        peft_model = get_peft_model(model, config)
        partial = add_tokens(peft_model, tokenizer, TOKENS)
    else:
        partial = add_tokens(model, tokenizer, TOKENS)
        peft_model = get_peft_model(model, config)
        partial.requires_grad_(True)
    before = {n: p.detach().clone() for n, p in peft_model.named_parameters()}
    train(peft_model, partial)
    moved = {n for n, p in peft_model.named_parameters() if not torch.equal(p, before[n])}
    assert all("lora_" in name or "new_rows" in name for name in moved)
    assert any("lora_" in name for name in moved)
    assert any("new_rows" in name for name in moved)
    expected = logits_of(peft_model, ids)
    partial.save_pretrained(tmp_path / "rows")
    peft_model.save_pretrained(tmp_path / "adapter", save_embedding_layers=False)

    tokenizer = bpe_tokenizer()
    again = PeftModel.from_pretrained(build_model("llama", 300, tied=tied), tmp_path / "adapter").eval()
    load_tokens(again, tokenizer, tmp_path / "rows")
    torch.testing.assert_close(logits_of(again, ids), expected)


@pytest.mark.filterwarnings(PEFT_WARNING)
def test_rows_are_saved_with_the_adapter_when_its_config_says_so(tied, tmp_path):
    from peft import LoraConfig, PeftModel, get_peft_model
    from safetensors.torch import load_file

    model, _, partial = prepared("llama", tied)
    config = LoraConfig(target_modules=["q_proj"], r=2, modules_to_save=["new_rows"])
    peft_model = get_peft_model(model, config)
    assert all(p.requires_grad for p in partial.parameters())
    train(peft_model, partial)
    ids = torch.tensor([[5, *partial.token_ids, 9]])
    expected = logits_of(peft_model, ids)
    peft_model.save_pretrained(tmp_path, save_embedding_layers=False)
    saved = load_file(tmp_path / "adapter_model.safetensors")
    rows = {name: tensor for name, tensor in saved.items() if "new_rows" in name}
    assert len(rows) == (1 if tied else 2)
    assert all(tensor.shape == (3, 16) for tensor in rows.values())

    tokenizer = bpe_tokenizer()
    fresh = build_model("llama", 300, tied=tied)
    add_tokens(fresh, tokenizer, TOKENS)
    again = PeftModel.from_pretrained(fresh, tmp_path).eval()
    torch.testing.assert_close(logits_of(again, ids), expected)
    assert torch.equal(partial.token_rows().input_rows, next(t for n, t in rows.items() if "embed" in n))


STEPS = [name for name, value in vars(attachment).items() if hasattr(value, "do") and name != "Step"]


@pytest.mark.parametrize("when", ["before", "after"])
@pytest.mark.parametrize("step", STEPS)
def test_a_fault_in_any_step_leaves_everything_as_it_was(monkeypatch, strategy, tied, step, when):
    tokenizer = bpe_tokenizer()
    model = build_model("phi", len(tokenizer), tied=tied)
    first = add_tokens(model, tokenizer, ["<first>"], strategy=strategy)
    before, rows = state_of(model, tokenizer), first.token_rows()
    cls, calls = getattr(attachment, step), 0
    original = cls.do

    def broken(self):
        nonlocal calls
        calls += 1
        if calls == 2 or step in ("AddTokens", "PlainTables", "Growth", "OpenScope", "HideRows"):
            if when == "after":
                original(self)
            raise RuntimeError("injected")
        original(self)

    monkeypatch.setattr(cls, "do", broken)
    try:
        add_tokens(model, tokenizer, TOKENS, strategy=strategy)
    except RuntimeError:
        assert_same_state(state_of(model, tokenizer), before)
        assert torch.equal(first.token_rows().input_rows, rows.input_rows)
        first.verify()
    else:
        assert calls < 2  # this strategy takes the step once or never


@settings(max_examples=25, deadline=None)
@given(data=st.data())
def test_any_order_of_attaching_and_detaching_ends_where_it_began(data):
    tokenizer = bpe_tokenizer()
    model = build_model("llama", 305, tied=data.draw(st.booleans()))  # five spare rows
    strategy = data.draw(st.sampled_from(["split", "mask"]))
    before = state_of(model, tokenizer)
    live: dict[str, tuple] = {}
    for number in range(data.draw(st.integers(2, 6))):
        if live and data.draw(st.booleans()):
            name = data.draw(st.sampled_from(sorted(live)))
            partial, rows = live.pop(name)
            assert torch.equal(partial.detach().input_rows, rows)
        else:
            tokens = [f"<{number}-{i}>" for i in range(data.draw(st.integers(1, 4)))]
            partial = add_tokens(model, tokenizer, tokens, strategy=strategy)
            live[tokens[0]] = (partial, partial.token_rows().input_rows)
        for partial, rows in live.values():
            partial.verify()
            assert torch.equal(partial.token_rows().input_rows, rows)
            assert [tokenizer.convert_ids_to_tokens(i) for i in partial.token_ids] == partial.tokens
            assert torch.equal(model.get_input_embeddings().weight.detach()[partial.token_ids], rows)
    for partial, _ in live.values():
        partial.detach()
    assert_same_state(state_of(model, tokenizer), before)


def test_token_rows_refuses_rows_that_do_not_fit_its_tokens():
    with pytest.raises(PartialEmbeddingError, match="input_rows has 3 rows, but there are 2 tokens"):
        TokenRows(tokens=["a", "b"], input_rows=torch.zeros(3, 4), token_ids=[0, 1])


def test_diverged_rows_are_not_saved_over_good_ones_and_can_be_taken_off(tmp_path):
    model, _, partial = prepared()
    partial.save_pretrained(tmp_path)
    with torch.no_grad():
        next(partial.parameters())[1, 0] = float("nan")
    with pytest.raises(PartialEmbeddingError, match=r"input_rows has infinite or NaN values for '</think>'"):
        partial.save_pretrained(tmp_path)
    assert torch.isfinite(TokenRows.from_pretrained(tmp_path).input_rows).all()
    partial.detach()
    assert model.config.vocab_size == 300


def test_repr_says_what_it_is():
    _, _, partial = prepared()
    assert repr(partial) == (
        "PartialEmbedding(3 tokens: '<think>', '</think>', 'praseodymium'; split, LlamaForCausalLM)"
    )
    partial.merge()
    assert repr(partial).endswith("not attached)")


@pytest.mark.parametrize("load", [False, True], ids=["added", "loaded"])
def test_expand_gives_each_new_token_as_its_pieces(load, tokenizer):
    model, tokens = build_model(vocab=len(tokenizer)), ["<think>", "praseodymium"]
    size, pieces = len(tokenizer), tokenizer(tokens)["input_ids"]
    lead, tail = tokenizer(["A model", "reads"])["input_ids"]
    partial = add_tokens(model, tokenizer, tokens)
    if load:
        partial = partial.detach().attach(model, tokenizer)
    ids = tokenizer("A model<think>reads")["input_ids"]
    assert max(ids) >= size
    assert partial.expand(ids) == [*lead, *pieces[0], *tail]
    assert partial.expand(partial.token_ids) == [*pieces[0], *pieces[1]]


def test_expand_leaves_tokens_that_were_there(tokenizer):
    partial = train_tokens(build_model(vocab=len(tokenizer)), tokenizer, [10, 20])
    assert partial.expand([9, 10, 20]) == [9, 10, 20]
