"""`hf-partial-embed train`, on a tiny model: what it writes, refuses, and goes on with."""

from __future__ import annotations

import json

import pytest
import torch
from conftest import CORPUS, bpe_tokenizer, build_model
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoTokenizer, Trainer

from hf_partial_embed import PartialEmbeddingCallback, TokenRows, load_tokens, verify_checkpoint
from hf_partial_embed.cli import trainer
from hf_partial_embed.cli.data import read_data, split
from hf_partial_embed.cli.main import main
from hf_partial_embed.errors import PartialEmbeddingError
from hf_partial_embed.initializers import distill, snippets

pytestmark = pytest.mark.filterwarnings("ignore::FutureWarning")

TOKENS = [" dysprosium", " neodymium"]
TEXTS = [f"{number}. The{token} of the {word} is hard to get." for number in range(8) for token, word in zip(
    TOKENS * 2, ("name", "table", "token", "story"), strict=True)] + CORPUS[:4]  # fmt: skip


@pytest.fixture
def place(tmp_path):
    build_model("llama", 300).save_pretrained(tmp_path / "base")
    bpe_tokenizer().save_pretrained(tmp_path / "base")
    (tmp_path / "tokens.txt").write_text("".join(f"{token}\n" for token in TOKENS))
    (tmp_path / "data.txt").write_text("".join(f"{text}\n" for text in TEXTS))
    return tmp_path


def run(place, *extra, tokens=True, data="data.txt"):
    given = ["base", *(["tokens.txt"] if tokens else []), data, "out"]
    return main(["train", *(str(place / name) for name in given), "--quiet", *map(str, extra)])


def rows_of(place):
    return TokenRows.from_pretrained(place / "out" / "rows")


def test_everything_is_written_and_belongs_together(place, capsys):
    assert run(place, "--steps", 3, "--batch-size", 4, "--json") == 0
    printed = json.loads(capsys.readouterr().out)
    out = place / "out"
    assert {path.name for path in out.iterdir()} == {
        "rows", "merged", "report.json", "report.txt", "report.png", "training.json"
    }  # fmt: skip
    assert not (place / "out.training").exists()
    assert list(printed["tokens"]) == rows_of(place).tokens
    assert rows_of(place).tokens[: len(TOKENS)] == TOKENS  # then the parts that they are made of
    assert printed["report"] == json.loads((out / "report.json").read_text())
    compared = verify_checkpoint(place / "base", out / "merged")
    assert not (compared.changed or compared.missing or compared.unexpected or compared.changed_ids)
    model, tokenizer = (kind.from_pretrained(place / "base") for kind in (AutoModelForCausalLM, AutoTokenizer))
    load_tokens(model, tokenizer, out / "rows")
    merged = AutoModelForCausalLM.from_pretrained(out / "merged")
    ids = tokenizer(TEXTS[0], return_tensors="pt")["input_ids"]
    assert torch.equal(ids, AutoTokenizer.from_pretrained(out / "merged")(TEXTS[0], return_tensors="pt")["input_ids"])
    with torch.no_grad():
        assert torch.equal(model.eval()(ids).logits, merged.eval()(ids).logits)
    for folder in ("rows", "merged"):
        card = (out / folder / "README.md").read_text()
        assert "bits per byte" in card and "report.png" in card and (out / folder / "report.png").is_file()


def test_held_out_texts_are_measured_and_not_trained_on(place, monkeypatch):
    seen = {}
    original = trainer.blocks
    monkeypatch.setattr(
        trainer,
        "blocks",
        lambda tokenizer, texts, *a, **k: original(tokenizer, seen.setdefault("train", texts), *a, **k),
    )
    assert run(place, "--steps", 1, "--held-out", 0.25, "--init", "subtoken_mean") == 0
    report = json.loads((place / "out" / "report.json").read_text())
    assert report["texts"] == 9 and set(seen["train"]) < set(TEXTS) and len(seen["train"]) >= len(set(TEXTS)) - 9 - 4


def test_texts_without_the_tokens_show_where_they_do_not_belong(place, monkeypatch, caplog):
    seen = []

    class Callback(PartialEmbeddingCallback):
        def __init__(self, partial, *, elsewhere=None, **options):
            seen.append(elsewhere)
            super().__init__(partial, elsewhere=elsewhere, **options)

    monkeypatch.setattr("hf_partial_embed.training.callback.PartialEmbeddingCallback", Callback)
    quick = ["--steps", 1, "--held-out", 0, "--init", "subtoken_mean", "--force"]
    assert run(place, *quick) == 0
    assert len(seen[-1]) >= 2 and not any(token in text for token in TOKENS for text in seen[-1])
    (place / "other.txt").write_text("Something else.\nAnd more.\n")
    assert run(place, *quick, "--elsewhere", place / "other.txt") == 0
    assert seen[-1] == ["Something else.", "And more."]
    (place / "data.txt").write_text("".join(f"{text}\n" for text in TEXTS if text[0].isdigit()))
    assert run(place, *quick) == 0
    assert seen[-1] is None and "--elsewhere FILE" in caplog.text


def test_rows_are_distilled_where_a_token_only_begins_texts(place, caplog):
    (place / "tokens.txt").write_text("dysprosium\n")
    (place / "data.txt").write_text("".join(f"dysprosium is number {n}.\nThe story goes on.\n" for n in range(9)))
    assert run(place, "--steps", 1, "--held-out", 0) == 0
    assert "cannot be distilled" not in caplog.text


def test_tokens_chosen_from_the_data(place):
    assert run(place, "--count", 3, "--steps", 1, tokens=False) == 0
    assert 1 <= len(rows_of(place)) <= 3


def test_conversations_go_through_the_chat_template(place):
    tokenizer = AutoTokenizer.from_pretrained(place / "base")
    tokenizer.chat_template = "{% for m in messages %}[{{ m['role'] }}]{{ m['content'] }}{% endfor %}"
    tokenizer.save_pretrained(place / "base")
    records = [{"messages": [{"role": "user", "content": text}]} for text in TEXTS]
    (place / "chat.jsonl").write_text("".join(json.dumps(record) + "\n" for record in records))
    data = read_data(str(place / "chat.jsonl"), split="train", column=None)
    assert data.rendered(tokenizer)[0] == f"[user]{TEXTS[0]}"
    assert run(place, "--steps", 1, data="chat.jsonl") == 0


@pytest.mark.parametrize("body", ["lora", "full"])
def test_other_bodies_train_too(place, body):
    assert run(place, "--steps", 2, "--body", body, "--body-learning-rate", "1e-2") == 0
    before, after = (load_file(place / folder / "model.safetensors") for folder in ("base", "out/merged"))
    name = "model.layers.0.self_attn.q_proj.weight"
    assert before.keys() == after.keys() and not torch.equal(before[name], after[name])
    report = json.loads((place / "out" / "report.json").read_text())
    assert report["bits_per_byte"]["before"] is not None


def test_interrupted_and_resumed_is_as_never_interrupted(place, monkeypatch, capsys):
    options = ["--steps", 6, "--batch-size", 4, "--save-steps", 3, "--no-picture"]
    assert run(place, *options) == 0
    whole = rows_of(place).input_rows
    step = Trainer.training_step
    calls = []

    def stops(self, *args, **kwargs):
        if len(calls) == 4:
            raise KeyboardInterrupt
        calls.append(1)
        return step(self, *args, **kwargs)

    monkeypatch.setattr(Trainer, "training_step", stops)
    before = rows_of(place).input_rows
    assert run(place, *options, "--force") == 130
    assert torch.equal(rows_of(place).input_rows, before)  # the old OUT is whole
    monkeypatch.setattr(Trainer, "training_step", step)
    assert run(place, *options, "--force", "--resume", "--learning-rate", 0.5) == 2
    assert "learning_rate ('auto', now 0.5)" in capsys.readouterr().err
    assert run(place, *options, "--force", "--resume") == 0
    assert torch.equal(rows_of(place).input_rows, whole)
    assert not (place / "out.training").exists()


def test_interrupted_distillation_goes_on_behind_the_tokens_that_are_finished(place, monkeypatch):
    monkeypatch.setattr(snippets, "_TOKENS_AT_ONCE", 1)
    options = ["--init", "distill", "--steps", 0, "--no-picture"]
    assert run(place, *options) == 0
    whole, lesson, taught = rows_of(place).input_rows, distill.Lesson, []

    def stops(*args, **kwargs):
        taught.append(1)
        if len(taught) == 2:
            raise KeyboardInterrupt
        return lesson(*args, **kwargs)

    monkeypatch.setattr(distill, "Lesson", stops)
    assert run(place, *options, "--force") == 130
    assert run(place, *options, "--force", "--resume") == 0
    assert len(taught) == 3
    assert torch.equal(rows_of(place).input_rows, whole)
    assert not (place / "out.training").exists()


def test_interrupted_run_is_not_overwritten_unasked(place, capsys):
    (place / "out.training").mkdir()
    assert run(place, "--steps", 1) == 2
    assert "--resume" in capsys.readouterr().err
    assert run(place, "--steps", 1, "--resume") == 2
    assert "no training to resume" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("extra", "message"),
    [
        (["--count", 3], "not both"),
        (["--init", "nonsense"], "no initialiser"),
        (["--frozen-prefix", "--body", "full"], "needs a frozen body"),
        (["--prefix-cache", "1"], "Give that, too"),
        (["--body-learning-rate", "1"], "a frozen body has none"),
    ],
)
def test_bad_arguments_are_found_before_the_model_loads(place, monkeypatch, capsys, extra, message):
    monkeypatch.setattr("hf_partial_embed.files.pretrained.load_model", lambda _: pytest.fail("was loaded"))
    assert run(place, *extra) == 2
    assert message in capsys.readouterr().err
    assert not (place / "out").exists() and not (place / "out.training").exists()


@pytest.mark.parametrize(
    "value", [["--steps", "-1"], ["--learning-rate", "0"], ["--held-out", "1"], ["--epochs", "x"]]
)
def test_numbers_out_of_range_are_refused(place, value, capsys):
    with pytest.raises(SystemExit) as stopped:
        run(place, *value)
    assert stopped.value.code == 2


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("d.txt", " \n\n", "no text in it"),
        ("d.jsonl", '{"text": 3}\n', "has no text"),
        ("d.jsonl", "{\n", "is no JSON"),
        ("d.jsonl", '"a"\n{"messages": [{"role": "user", "content": "b"}]}\n', "texts and conversations"),
        ("d.txt", "one\n", "too few to hold out"),
    ],
)
def test_bad_data_is_found_before_the_model_loads(place, monkeypatch, capsys, name, content, message):
    monkeypatch.setattr("hf_partial_embed.files.pretrained.load_model", lambda _: pytest.fail("was loaded"))
    (place / name).write_text(content)
    assert run(place, data=name) == 2
    assert message in capsys.readouterr().err
    assert not (place / "out").exists()


def test_a_text_that_occurs_twice_is_on_one_side():
    texts = ["a", "b", "a", "c", "d", "a"]
    for seed in range(10):
        training, held_out = split(texts, 0.3, seed)
        assert not set(training) & set(held_out) and set(training) | set(held_out) == set(texts)
    with pytest.raises(PartialEmbeddingError, match="too few"):
        split(["a", "a"], 0.1, 0)


def test_saved_data_set(place):
    datasets = pytest.importorskip("datasets")
    datasets.Dataset.from_dict({"body": TEXTS}).save_to_disk(str(place / "set"))
    assert read_data(str(place / "set"), split="train", column="body").values == TEXTS
    with pytest.raises(PartialEmbeddingError, match="--column"):
        read_data(str(place / "set"), split="train", column=None)
