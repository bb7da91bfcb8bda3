"""`hf-partial-embed evaluate`: rows and merged checkpoints on a file of texts."""

from __future__ import annotations

import json

import pytest
from conftest import bpe_tokenizer, build_model
from test_cli import base, rows, run, run_json  # noqa: F401  # fixtures
from transformers import AutoTokenizer

from hf_partial_embed import evaluate

pytestmark = pytest.mark.filterwarnings("ignore::FutureWarning")

TEXTS = ["The praseodymium is hard to get <think> and", "A model reads words."]


@pytest.fixture
def texts(tmp_path):
    path = tmp_path / "texts.txt"
    path.write_text("\n".join([*TEXTS, "", ""]), "utf-8")
    return path


def test_rows_and_the_merged_checkpoint_give_the_same_report(capsys, base, rows, texts, tmp_path):  # noqa: F811
    folder, partial = rows
    expected = partial.evaluate(TEXTS, progress=False).to_dict()
    capsys.readouterr()  # what loading the fixtures has printed
    status, found = run_json(capsys, "evaluate", base, folder, "--texts", texts)
    assert status == 0 and found == json.loads(json.dumps(expected))
    assert run(capsys, "merge", base, folder, tmp_path / "merged", "--quiet")[0] == 0
    status, merged = run_json(capsys, "evaluate", base, tmp_path / "merged", "--texts", texts)
    assert status == 0
    assert merged["tokens"] == found["tokens"] and merged["bytes"] == len("".join(TEXTS).encode())
    for key in ("bits_per_byte", "bits_per_byte_new", "bits_per_byte_following"):
        assert merged[key] == pytest.approx(found[key], rel=1e-4)
    assert evaluate(base, tmp_path / "merged", TEXTS, progress=False).to_dict() == merged


def test_table_and_picture(capsys, base, rows, texts, tmp_path):  # noqa: F811
    pytest.importorskip("matplotlib")
    picture = tmp_path / "report.png"
    options = ("--picture", picture, "--batch-size", 2, "--max-length", 12, "--stride", 4)
    status, out, err = run(capsys, "evaluate", base, rows[0], "--texts", texts, *options)
    assert status == 0 and "bits per byte" in out and "'<think>'" in out and str(picture) in out
    assert picture.stat().st_size > 10_000 and "evaluate" in err
    assert run(capsys, "evaluate", base, rows[0], "--texts", texts, "--quiet")[2] == ""


def test_json_lines(capsys, base, rows, tmp_path):  # noqa: F811
    path = tmp_path / "texts.jsonl"
    path.write_text(json.dumps({"text": TEXTS[0] + "\n"}) + "\n" + json.dumps(TEXTS[1]), "utf-8")
    status, found = run_json(capsys, "evaluate", base, rows[0], "--texts", path)
    assert status == 0 and found["texts"] == 2 and found["bytes"] == len("".join(TEXTS).encode()) + 1


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (None, "Cannot read the texts"),
        ("", "has no text in it"),
        ("\n \n", "has no text"),
        ("{", "line 1, is no JSON"),
    ],
)
def test_files_without_texts(capsys, tmp_path, content, message):
    path = tmp_path / "texts.jsonl"
    if content is not None:
        path.write_text(content, "utf-8")
    status, out, err = run(capsys, "evaluate", "no-model", "no-rows", "--texts", path)  # found before they are loaded
    assert status == 2 and out == "" and message in err


def test_a_picture_that_cannot_be_written_is_refused_first(capsys, texts, tmp_path):
    for place in (tmp_path / "nowhere" / "report.png", tmp_path / "report.txt"):
        status, _, err = run(capsys, "evaluate", "no-model", "no-rows", "--texts", texts, "--picture", place)
        assert status == 2 and "--picture" in err


def test_a_base_of_another_model_is_refused_and_nothing_is_written(capsys, base, rows, texts, tmp_path):  # noqa: F811
    other = tmp_path / "other"
    build_model("llama", 250).save_pretrained(other)
    tokenizer = bpe_tokenizer(250)
    tokenizer.add_tokens(["<other>"])
    tokenizer.save_pretrained(other)
    assert len(AutoTokenizer.from_pretrained(other)) != 300
    run(capsys, "merge", base, rows[0], tmp_path / "merged", "--quiet")
    before = sorted(tmp_path.rglob("*"))
    picture = tmp_path / "report.png"
    status, out, err = run(capsys, "evaluate", other, tmp_path / "merged", "--texts", texts, "--picture", picture)
    assert status == 2 and out == "" and "do not belong together" in err
    assert sorted(tmp_path.rglob("*")) == before
