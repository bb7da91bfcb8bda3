"""`hf-partial-embed train` as it is used: cards, data sets, the Hub, interrupts; and each switch of the training.

The longer ones: `python -m pytest -m slow tests/cli/test_train_sessions.py`.
"""

from __future__ import annotations

import json
import re
import types

import huggingface_hub.errors
import pytest
import torch
from conftest import CORPUS
from safetensors.torch import load_file
from test_train_command import TEXTS, place, rows_of, run  # noqa: F401  # a fixture
from transformers import AutoTokenizer, Trainer

from hf_partial_embed.cli.data import read_data
from hf_partial_embed.cli.main import main

pytestmark = pytest.mark.filterwarnings("ignore::FutureWarning")

QUICK = ("--steps", 1, "--init", "subtoken_mean", "--no-picture")


def chats(place):  # noqa: F811
    """A file of conversations, for which the base gets a chat template."""
    tokenizer = AutoTokenizer.from_pretrained(place / "base")
    tokenizer.chat_template = "{% for m in messages %}[{{ m['role'] }}]{{ m['content'] }}{% endfor %}"
    tokenizer.save_pretrained(place / "base")
    path = place / "chat.jsonl"
    path.write_text(
        "".join(json.dumps({"messages": [{"role": "user", "content": text}]}) + "\n" for text in TEXTS), "utf-8"
    )
    return path


# ------------------------------------------------------------------------------------------------------ what is read


def test_cards_name_the_place_where_the_files_are(place):  # noqa: F811
    assert run(place, *QUICK) == 0
    for folder in ("rows", "merged"):
        card = (place / "out" / folder / "README.md").read_text()
        named = re.search(r"tokenizer, '(.*)', trainable|LlamaForCausalLM.from_pretrained\('(.*)'\)", card)
        assert named is not None and next(filter(None, named.groups())).endswith(folder), card
        assert "/new/" not in card and "In the tokenizer: 2 in the vocabulary of its model" in card


def test_conversations_are_evaluated_as_they_are_trained_on(place, capsys):  # noqa: F811
    path = chats(place)
    assert run(place, *QUICK, "--held-out", 0, data=path.name) == 0
    reports = []
    for adapted in ("rows", "merged"):
        capsys.readouterr()
        options = ["--texts", str(path), "--json", "--quiet"]
        assert main(["evaluate", str(place / "base"), str(place / "out" / adapted), *options]) == 0
        reports.append(json.loads(capsys.readouterr().out))
    assert reports[0]["texts"] == len(TEXTS)
    assert reports[0]["bytes"] == sum(len(f"[user]{text}".encode()) for text in TEXTS)
    assert reports[0]["tokens"] == reports[1]["tokens"]


class TestDataSets:
    @pytest.mark.parametrize("split", ["train", "other"])
    def test_hub_data_set_is_asked_for_its_split_and_column(self, place, monkeypatch, split):  # noqa: F811
        datasets = pytest.importorskip("datasets")
        asked = []

        def load_dataset(name, *, split):
            asked.append((name, split))
            return datasets.Dataset.from_dict({"body": TEXTS, "text": [text.upper() for text in TEXTS]})

        monkeypatch.setattr(datasets, "load_dataset", load_dataset)
        arguments = ["--split", split, "--column", "body", *QUICK, "--quiet"]
        base, tokens = str(place / "base"), str(place / "tokens.txt")
        assert main(["train", base, tokens, "me/data", str(place / "out"), *map(str, arguments)]) == 0
        assert asked == [("me/data", split)]

    def test_saved_splits(self, place):  # noqa: F811
        datasets = pytest.importorskip("datasets")
        parts = {name: datasets.Dataset.from_dict({"text": [name, *TEXTS]}) for name in ("train", "other")}
        datasets.DatasetDict(parts).save_to_disk(str(place / "set"))
        assert run(place, *QUICK, "--split", "other", data="set") == 0
        assert read_data(str(place / "set"), split="other", column=None).values[0] == "other"

    def test_a_split_that_is_not_there(self, place, capsys):  # noqa: F811
        datasets = pytest.importorskip("datasets")
        datasets.DatasetDict({"train": datasets.Dataset.from_dict({"text": TEXTS})}).save_to_disk(str(place / "set"))
        assert run(place, *QUICK, "--split", "test", data="set") == 2
        assert "--split test" in capsys.readouterr().err and not (place / "out").exists()


# ---------------------------------------------------------------------------------------------------------- bad input


@pytest.mark.parametrize(
    ("tokens", "message"),
    [
        ("", "has no token in it"),
        ("\n\n", "has no token in it"),
        ("<never>\n", "None of the tokens '<never>' occurs"),
        ("e\n", "already"),
    ],
)
def test_tokens_that_cannot_be_leave_nothing_behind(place, capsys, caplog, tokens, message):  # noqa: F811
    (place / "tokens.txt").write_text(tokens)
    before = set(place.iterdir())
    assert run(place, "--steps", 1) == 2
    assert message in capsys.readouterr().err and "start from the mean" not in caplog.text
    assert set(place.iterdir()) == before


def test_the_place_is_looked_at_before_anything_is_imported(place, monkeypatch, capsys):  # noqa: F811
    (place / "out").mkdir()
    (place / "out" / "mine").touch()
    monkeypatch.setattr("hf_partial_embed.optional.need", lambda *_: pytest.fail("was imported"))
    assert run(place) == 2 and "--force" in capsys.readouterr().err
    (place / "out" / "mine").unlink()
    (place / "tokens.txt").unlink()
    assert run(place) == 2 and "Cannot read the tokens" in capsys.readouterr().err


# ------------------------------------------------------------------------------------------------------------ switches


@pytest.mark.parametrize(
    "switch",
    [
        ["--bf16"],
        *(
            pytest.param(switch, marks=pytest.mark.slow)
            for switch in (["--chunked-loss"], ["--frozen-prefix"], ["--frozen-prefix", "--prefix-cache", "0.01"])
        ),
    ],
    ids=" ".join,
)
def test_switches_of_the_training(place, monkeypatch, switch):  # noqa: F811
    """They reach the Trainer, and but for bfloat16 the rows that come out are those without them."""
    options = ["--steps", 4, "--batch-size", 4, "--init", "subtoken_mean", "--held-out", 0]
    assert run(place, *options) == 0
    plain = rows_of(place).input_rows
    seen = {}
    init = Trainer.__init__

    def noted(self, *args, **kwargs):
        init(self, *args, **kwargs)
        (callback,) = kwargs["callbacks"]
        seen.update(bf16=self.args.bf16, chunked=callback.chunked_loss, prefix=callback.frozen_prefix)

    monkeypatch.setattr(Trainer, "__init__", noted)
    assert run(place, *options, *switch, "--force") == 0
    rows = rows_of(place).input_rows
    name = switch[-2] if switch[-1] == "0.01" else switch[-1]
    assert seen["bf16"] == (name == "--bf16") and seen["chunked"] == (name == "--chunked-loss")
    assert (seen["prefix"] is not False) == ("--frozen-prefix" in switch)
    if name == "--prefix-cache":
        assert seen["prefix"].max_bytes == 10_000_000
    if name == "--bf16":
        assert rows.dtype == torch.float32 and not torch.equal(rows, plain)
        torch.testing.assert_close(rows, plain, rtol=0, atol=4 * 0.07)  # no step is longer than the rate
    else:
        torch.testing.assert_close(rows, plain, rtol=1e-3, atol=1e-5)
    assert not (place / "out.training").exists()  # nor the cache in it


@pytest.mark.parametrize("padding", ["none", "the end of a turn"])
def test_the_end_of_a_turn_is_learnt_whatever_the_padding_is(place, monkeypatch, padding):  # noqa: F811
    """Of many chat models the token that ends a turn is the padding, too; others have no padding at all."""
    path = chats(place)
    tokenizer = AutoTokenizer.from_pretrained(place / "base")
    tokenizer.chat_template = tokenizer.chat_template.replace("{% endfor %}", "</s>{% endfor %}")
    tokenizer.pad_token = None if padding == "none" else "</s>"
    tokenizer.save_pretrained(place / "base")
    assert AutoTokenizer.from_pretrained(place / "base").pad_token == tokenizer.pad_token
    seen = []
    step = Trainer.training_step

    def noted(self, model, inputs, *args, **kwargs):
        seen.append({name: values.clone() for name, values in inputs.items()})
        return step(self, model, inputs, *args, **kwargs)

    monkeypatch.setattr(Trainer, "training_step", noted)
    assert run(place, *QUICK, "--body", "full", "--batch-size", 8, data=path.name) == 0
    (batch,) = seen
    assert (batch["attention_mask"] == 0).any()
    for ids, labels, mask in zip(*(batch[name] for name in ("input_ids", "labels", "attention_mask")), strict=True):
        length = int(mask.sum())
        assert torch.equal(labels[:length], ids[:length]) and set(labels[length:].tolist()) <= {-100}
        assert labels[length - 1] == tokenizer.eos_token_id


# --------------------------------------------------------------------------------------------------- interrupt, resume


@pytest.mark.slow
@pytest.mark.parametrize("body", ["lora", "full"])
@pytest.mark.parametrize("ends", [KeyboardInterrupt, RuntimeError], ids=["interrupted", "crashed"])
def test_other_bodies_resume_to_the_same_bits(place, monkeypatch, body, ends):  # noqa: F811
    """Rows and body; the end comes in the step behind the one that a checkpoint was written at."""
    if body == "lora":
        pytest.importorskip("peft")
    options = ["--steps", 4, "--batch-size", 4, "--save-steps", 2, "--body", body, "--body-learning-rate", "1e-2"]
    options += ["--init", "subtoken_mean", "--held-out", 0]
    assert run(place, *options) == 0
    whole, rows = load_file(place / "out/merged/model.safetensors"), rows_of(place).input_rows
    step, calls = Trainer.training_step, []

    def stops(self, *args, **kwargs):
        calls.append(1)
        if len(calls) == 4:
            raise ends
        return step(self, *args, **kwargs)

    (place / "out").rename(place / "first")
    monkeypatch.setattr(Trainer, "training_step", stops)
    assert run(place, *options) == {KeyboardInterrupt: 130, RuntimeError: 3}[ends]
    assert not (place / "out").exists() and not list(place.glob(".out*"))
    monkeypatch.setattr(Trainer, "training_step", step)
    assert run(place, *options, "--resume") == 0
    resumed = load_file(place / "out/merged/model.safetensors")
    assert torch.equal(rows_of(place).input_rows, rows)
    assert whole.keys() == resumed.keys() and all(torch.equal(whole[name], resumed[name]) for name in whole)


def test_an_interrupt_while_out_is_written_leaves_the_old_one_and_a_resume(place, monkeypatch):  # noqa: F811
    options = ["--steps", 2, "--batch-size", 4, "--save-steps", 1, "--init", "subtoken_mean", "--no-picture"]
    assert run(place, *options) == 0
    rows = rows_of(place).input_rows
    files = {path: path.read_bytes() for path in (place / "out").rglob("*") if path.is_file()}

    def stops(*args, **kwargs):
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr("hf_partial_embed.files.hub.add_to_card", stops)  # rows and model are written by then
        assert run(place, *options, "--force") == 130
    assert {path: path.read_bytes() for path in (place / "out").rglob("*") if path.is_file()} == files
    assert not list(place.glob(".out*")) and (place / "out.training").is_dir()
    assert run(place, *options, "--force", "--resume") == 0
    assert torch.equal(rows_of(place).input_rows, rows)


# ---------------------------------------------------------------------------------------------------------------- Hub


class Hub:
    """What `huggingface_hub.HfApi` is asked for."""

    def __init__(self, monkeypatch, *, upload=None, logged_in=True):
        self.pushed = {}
        self.upload, self.logged_in = upload, logged_in
        monkeypatch.setattr("hf_partial_embed.files.hub.HfApi", lambda token=None: self)

    def whoami(self):
        if not self.logged_in:
            raise huggingface_hub.errors.LocalTokenNotFoundError("Token is required.")

    def create_repo(self, repo_id, **options):
        return types.SimpleNamespace(repo_id=repo_id)

    def hf_hub_download(self, repo_id, name, *, revision):
        raise huggingface_hub.errors.EntryNotFoundError("no card")

    def upload_folder(self, *, repo_id, folder_path, commit_message, **options):
        if self.upload is not None:
            raise self.upload
        self.pushed = {path.name: path.read_bytes() for path in folder_path.iterdir()}
        return types.SimpleNamespace(pr_url=None, commit_url=f"https://hub/{repo_id}/commit/1 {commit_message}")


class TestPushToHub:
    def test_rows_and_card_are_published(self, place, monkeypatch, capsys):  # noqa: F811
        pytest.importorskip("matplotlib")
        hub = Hub(monkeypatch)
        assert run(place, *QUICK[:-1], "--push-to-hub", "me/rows", "--json") == 0
        assert json.loads(capsys.readouterr().out)["url"].startswith("https://hub/me/rows/commit/1")
        assert set(hub.pushed) == {"README.md", "report.png", "token_rows.safetensors"}
        card = hub.pushed["README.md"].decode()
        assert "load_tokens(model, tokenizer, 'me/rows', trainable=False)" in card and "bits per byte" in card

    @pytest.mark.parametrize(("repo", "logged_in"), [("a/b/c", True), ("me/rows", False)])
    def test_what_cannot_be_pushed_is_told_before_the_model_loads(
        self, place, monkeypatch, capsys, repo, logged_in  # noqa: F811
    ):  # fmt: skip
        Hub(monkeypatch, logged_in=logged_in)
        monkeypatch.setattr("hf_partial_embed.files.pretrained.load_model", lambda _: pytest.fail("was loaded"))
        assert run(place, *QUICK, "--push-to-hub", repo) == 2
        assert f"Cannot push to '{repo}'" in capsys.readouterr().err
        assert not (place / "out").exists() and not (place / "out.training").exists()

    def test_a_push_that_fails_leaves_out_and_says_how_to_publish_it(self, place, monkeypatch, capsys):  # noqa: F811
        Hub(monkeypatch, upload=OSError("connection lost"))
        assert run(place, *QUICK, "--push-to-hub", "me/rows") == 2
        message = capsys.readouterr().err
        assert "connection lost" in message and "push_to_hub('me/rows')" in message
        assert len(rows_of(place)) and not (place / "out.training").exists()


def test_a_body_that_is_not_frozen_learns_from_all_texts(place):  # noqa: F811
    (place / "data.txt").write_text("".join(f"{text}\n" for text in [*TEXTS, *CORPUS[:4]]))
    assert run(place, *QUICK, "--body", "full") == 0
