"""Tokens in use that were never trained: found by the model's own rows; and other traps around tokens."""

from __future__ import annotations

import importlib.util
import json
import os
from pathlib import Path

import pytest
import torch
from conftest import bpe_tokenizer, build_model, snapshot, table_of
from torch import nn
from transformers import (
    AutoModelForCausalLM,
    AutoModelForMaskedLM,
    AutoTokenizer,
    BertTokenizerFast,
    LlamaConfig,
    LlamaForCausalLM,
)

from hf_partial_embed import PartialEmbeddingError, add_tokens, audit_tokens, train_tokens
from hf_partial_embed.cli.main import main

TEMPLATE = (
    "{% for message in messages %}{{ '<s>' + message['role'] + ' ' + message['content'] + '</s>' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<s>assistant ' }}{% endif %}"
)
SIZE, WIDTH = 400, 64


def trained_rows(seed: int = 0, size: int = SIZE) -> torch.Tensor:
    """Rows as training leaves them: around a mean, along a few axes more than along others, of several words."""
    generator = torch.Generator().manual_seed(seed)
    spread = torch.logspace(0, -1.5, WIDTH)
    axes, _ = torch.linalg.qr(torch.randn(WIDTH, WIDTH, generator=generator))
    words = torch.randn(size // 8, WIDTH, generator=generator)
    rows = words[torch.arange(size) % len(words)] + 0.7 * torch.randn(size, WIDTH, generator=generator)
    return 0.1 * (0.5 + rows * spread) @ axes.T


def trained_model(tied: bool = True, tokenizer=None, size: int = SIZE):
    config = LlamaConfig(
        vocab_size=size, hidden_size=WIDTH, intermediate_size=32, num_hidden_layers=1, num_attention_heads=2,
        num_key_value_heads=2, tie_word_embeddings=tied, bos_token_id=2, eos_token_id=3, pad_token_id=1,
    )  # fmt: skip
    model = LlamaForCausalLM(config).eval()
    for number, which in enumerate(("input", "output") if not tied else ("input",)):
        module = model.get_input_embeddings() if which == "input" else model.get_output_embeddings()
        module.weight = nn.Parameter(trained_rows(number, size))
    if tied:
        model.get_output_embeddings().weight = model.get_input_embeddings().weight
    return model


@pytest.fixture
def chat_tokenizer():
    tokenizer = bpe_tokenizer(SIZE)
    tokenizer.chat_template = TEMPLATE
    return tokenizer


def everything(tokenizer) -> list[list[int]]:
    return [[token_id] for token_id in tokenizer.get_vocab().values()]


def plant(kind: str, table: torch.Tensor, ids: list[int], seed: int = 5) -> None:
    generator = torch.Generator().manual_seed(seed)
    rms = table.square().mean().sqrt()
    with torch.no_grad():
        for row, token_id in enumerate(ids):
            draw = torch.randn(table.shape[1], generator=generator)
            table[token_id] = {
                "zero": draw * 0, "copy": table[150 + row], "draw": draw * 0.02, "loud draw": draw * rms,
                "mean": table.mean(0) + draw * 1e-6, "common": table[300] * 0 + 0.3, "nan": draw / 0 * 0,
                "short": table[token_id] * 0.01,
            }[kind]  # fmt: skip


class TestUntrainedRows:
    @pytest.fixture(params=[True, False], ids=["tied", "untied"])
    def model(self, request):
        return trained_model(request.param)

    def test_nothing_is_reported_of_a_trained_model(self, model, chat_tokenizer):
        report = audit_tokens(model, chat_tokenizer, everything(chat_tokenizer))
        assert report.untrained == []
        assert report.in_use == len(chat_tokenizer)

    @pytest.mark.parametrize("kind", ["zero", "copy", "draw", "loud draw", "mean", "common", "nan", "short"])
    @pytest.mark.parametrize("where", ["input", "output"])
    def test_planted_rows_are_found(self, model, chat_tokenizer, kind, where):
        planted = [3, 40, 60, 77, 100]
        plant(kind, table_of(model, where), planted)
        report = audit_tokens(model, chat_tokenizer, everything(chat_tokenizer))
        found = {row.id for row in report.rows}
        assert found >= set(planted)
        assert found - set(planted) <= ({*range(150, 155)} if kind == "copy" else set())
        assert all(where in row.tables or model.config.tie_word_embeddings for row in report.rows)

    @pytest.mark.parametrize("seed", range(5))
    def test_random_rows_are_found_at_any_scale(self, model, chat_tokenizer, seed):
        generator = torch.Generator().manual_seed(seed)
        ids = torch.randperm(len(chat_tokenizer), generator=generator)[:8].tolist()
        with torch.no_grad():
            table_of(model)[ids] = torch.randn(8, WIDTH, generator=generator) * 10.0 ** (seed - 3)
        report = audit_tokens(model, chat_tokenizer, everything(chat_tokenizer))
        assert {row.id for row in report.rows} == set(ids)

    def test_a_model_without_any_training_has_no_rows_to_compare_with(self, chat_tokenizer):
        report = audit_tokens(build_model("llama", SIZE), chat_tokenizer, everything(chat_tokenizer))
        assert [(row.token, row.kind) for row in report.rows] == [("<pad>", "zero")]

    def test_a_copy_is_told_from_its_source_by_the_words_around_it(self, chat_tokenizer):
        ids = chat_tokenizer.get_vocab()
        words = sorted(text for text in ids if text.isalpha() and len(text) > 1 and "Ġ" + text in ids)
        assert len(words) >= 10
        for word in words:  # "cal" among them, whose row in this model is like that of "s", which "</s>" is not
            model = trained_model()
            with torch.no_grad():
                table_of(model)[ids["Ġ" + word]] = table_of(model)[ids[word]] * 1.1
                table_of(model)[3] = table_of(model)[ids[word]]
            report = audit_tokens(model, chat_tokenizer, everything(chat_tokenizer))
            assert [row.id for row in report.rows] == [3], word

    def test_rows_near_those_of_unused_tokens_are_found(self):
        model, tokenizer = trained_model(size=SIZE + 20), bpe_tokenizer(SIZE)
        generator = torch.Generator().manual_seed(3)
        with torch.no_grad():
            table = table_of(model)
            common = torch.randn(WIDTH, generator=generator) * 0.3
            ids = [3, *range(len(tokenizer), len(table))]
            table[ids] = common + 0.02 * torch.randn(len(ids), WIDTH, generator=generator)
        report = audit_tokens(model, tokenizer, everything(tokenizer))
        assert report.untrained == ["</s>"]
        assert report.rows[0].kind == "unused"

    def test_the_row_of_the_padding_may_be_zero(self, chat_tokenizer):
        model = trained_model()
        plant("zero", table_of(model), [1])
        assert audit_tokens(model, chat_tokenizer).untrained == []
        assert audit_tokens(model, chat_tokenizer, [[1]]).untrained == ["<pad>"]

    def test_only_what_is_in_use_is_reported(self, chat_tokenizer):
        model = trained_model()
        plant("zero", table_of(model), [3, 250, 251])
        assert audit_tokens(model, chat_tokenizer).untrained == ["</s>"]
        report = audit_tokens(model, chat_tokenizer, [[250, 250], torch.tensor([[251]])])
        assert [row.id for row in report.rows] == [3, 250, 251]
        assert [row.severity for row in report.rows] == ["error", "warning", "warning"]
        assert [row.count for row in report.rows] == [0, 2, 1]

    def test_nothing_is_changed(self, model, chat_tokenizer):
        before, tokens = snapshot(model), chat_tokenizer._tokenizer.to_str()
        audit_tokens(model, chat_tokenizer, ["a text"])
        assert all(torch.equal(before[name], tensor) for name, tensor in snapshot(model).items())
        assert chat_tokenizer._tokenizer.to_str() == tokens

    @pytest.mark.parametrize("strategy", ["split", "mask"])
    def test_one_line_repairs_what_was_found(self, chat_tokenizer, strategy):
        model = trained_model()
        plant("common", table_of(model), [2, 3])
        report = audit_tokens(model, chat_tokenizer)
        assert report.remedy == "train_tokens(model, tokenizer, ['<s>', '</s>'], init='subtoken_mean')"
        train_tokens(model, chat_tokenizer, report.untrained, init="subtoken_mean", strategy=strategy)
        assert audit_tokens(model, chat_tokenizer).untrained == []


class TestProblems:
    def problems(self, model, tokenizer) -> list[str]:
        return [problem.what for problem in audit_tokens(model, tokenizer).problems]

    def test_none(self, chat_tokenizer):
        assert self.problems(trained_model(), chat_tokenizer) == []

    def test_generation_stops_at_what_the_template_never_writes(self, chat_tokenizer):
        model = trained_model()
        model.generation_config.eos_token_id = [0]
        (problem,) = audit_tokens(model, chat_tokenizer).problems
        assert problem.what == (
            "generation stops at ['<unk>'], but the chat template ends a reply with '</s>': generation runs on"
        )
        assert problem.remedy == "model.generation_config.eos_token_id = [0, 3]"
        model.generation_config.eos_token_id = [0, 3]
        assert self.problems(model, chat_tokenizer) == []

    def test_template_without_an_end(self, chat_tokenizer):
        chat_tokenizer.chat_template = TEMPLATE.replace(" + '</s>'", "")
        (what,) = self.problems(trained_model(), chat_tokenizer)
        assert what.startswith("the chat template writes no end token behind a reply")

    def test_padding_that_ends(self, chat_tokenizer):
        chat_tokenizer.pad_token = "</s>"
        (what,) = self.problems(trained_model(), chat_tokenizer)
        assert what.startswith("'</s>' pads and ends")

    def test_marker_of_the_template_in_pieces(self, chat_tokenizer):
        chat_tokenizer.chat_template = TEMPLATE.replace("<s>", "<|im_start|>")
        model = trained_model()
        (problem,) = audit_tokens(model, chat_tokenizer).problems
        assert "'<|im_start|>', which is no token" in problem.what
        assert problem.remedy == "add_tokens(model, tokenizer, ['<|im_start|>'], special=True)"
        add_tokens(model, chat_tokenizer, problem.tokens, special=True)
        assert self.problems(model, chat_tokenizer) == []

    def test_token_without_a_row(self, chat_tokenizer):
        model = trained_model(size=len(chat_tokenizer))
        chat_tokenizer.add_tokens(["<a>", "<b>"])
        (problem,) = audit_tokens(model, chat_tokenizer, ["<a>"]).problems
        assert problem.severity == "error"
        assert problem.tokens[-2:] == ["<a>", "<b>"]

    def test_template_that_refuses_the_conversation(self, chat_tokenizer):
        chat_tokenizer.chat_template = "{{ raise_exception('no') }}"
        (problem,) = audit_tokens(trained_model(), chat_tokenizer).problems
        assert (problem.severity, "refuses all sample conversations" in problem.what) == ("note", True)


class TestReport:
    def test_prints_by_severity_with_the_remedies(self, chat_tokenizer):
        model = trained_model()
        chat_tokenizer.pad_token = "</s>"
        plant("zero", table_of(model), [3, 250])
        report = audit_tokens(model, chat_tokenizer, [[250]])
        text = str(report)
        assert text.splitlines()[0] == f"{report.in_use} tokens in use: 2 untrained, 1 other problems"
        assert text.index("error   '</s>'") < text.index("warning " + repr(report.untrained[1]))
        assert "train_tokens(model, tokenizer, ['</s>'], init='subtoken_mean')" in text
        assert json.loads(json.dumps(report.to_dict()))["untrained"][0]["token"] == "</s>"

    @pytest.mark.parametrize(
        "data",
        [["a text"], [{"text": "a text"}], [[{"role": "user", "content": "a text"}]], [{"input_ids": [60, 70]}]],
    )
    def test_data_of_every_kind(self, chat_tokenizer, data):
        report = audit_tokens(trained_model(), chat_tokenizer, iter(data))
        assert report.in_use >= audit_tokens(trained_model(), chat_tokenizer).in_use

    @pytest.mark.parametrize("data", ["a text", [3.5], [{"nothing": 1}], 5])
    def test_data_of_another_kind(self, chat_tokenizer, data):
        with pytest.raises(PartialEmbeddingError, match="data"):
            audit_tokens(trained_model(), chat_tokenizer, data)

    def test_command(self, chat_tokenizer, tmp_path, capsys):
        model = trained_model()
        plant("zero", table_of(model), [3])
        model.save_pretrained(tmp_path / "model")
        chat_tokenizer.save_pretrained(tmp_path / "model")
        (tmp_path / "texts.txt").write_text("a text\nanother\n")
        arguments = ["audit", str(tmp_path / "model"), "--texts", str(tmp_path / "texts.txt"), "--quiet"]
        assert main(arguments) == 0
        assert "error   '</s>'" in capsys.readouterr().out
        assert main([*arguments, "--json"]) == 0
        assert json.loads(capsys.readouterr().out)["untrained"][0]["token"] == "</s>"
        assert main(["audit", str(tmp_path / "model"), "--texts", str(tmp_path / "none.txt")]) == 2


def albert():
    spec = importlib.util.find_spec("rxnmapper")
    if spec is None:
        pytest.skip("pip install --no-deps rxnmapper==0.4.3")
    folder = Path(spec.origin).parent / "models" / "transformers" / "albert_heads_8_uspto_all_1310k"
    return AutoModelForMaskedLM.from_pretrained(folder), BertTokenizerFast(
        str(folder / "vocab.txt"), do_lower_case=False
    )


def smollm2(tied: bool):
    folder = os.environ.get("SMOLLM2")
    if folder is None:
        pytest.skip("set SMOLLM2 to the folder of the model that the examples convert")
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    if not tied:
        model.lm_head.weight = nn.Parameter(model.get_input_embeddings().weight.detach().clone())
        model.config.tie_word_embeddings = False
    return model, AutoTokenizer.from_pretrained(folder)


REAL = {"albert": albert, "smollm2": lambda: smollm2(True), "smollm2-untied": lambda: smollm2(False)}


@pytest.mark.slow
@pytest.mark.parametrize("name", REAL)
def test_rows_planted_in_real_models(name):
    model, tokenizer = REAL[name]()
    generator = torch.Generator().manual_seed(0)
    size = len(tokenizer)
    used = torch.randperm(size, generator=generator)[: min(size, 1500)].tolist()
    untouched = audit_tokens(model, tokenizer, [used])
    assert [row.token for row in untouched.rows if row.id in used and row.kind != "equal"] == []
    for where in ("output",) if "untied" in name else ("input",):
        table = table_of(model, where)
        before = table.clone()
        for kind in ("zero", "draw", "loud draw", "copy"):
            planted = used[: 5 if name == "albert" else 15]
            with torch.no_grad():
                for token_id in planted:
                    draw = torch.randn(table.shape[1], generator=generator)
                    table[token_id] = {
                        "zero": draw * 0, "draw": draw * 0.02, "loud draw": draw * before.square().mean().sqrt(),
                        "copy": before[used[-1 - token_id % 500]],
                    }[kind]  # fmt: skip
            found = {row.id for row in audit_tokens(model, tokenizer, [used]).rows}
            table.copy_(before)
            assert found >= set(planted), kind
            false = found - set(planted) - {row.id for row in untouched.rows}
            assert len(false) <= 0.01 * len(used), kind
