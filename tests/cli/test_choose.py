"""The command that chooses tokens, as a person meets it."""

from __future__ import annotations

import json

import pytest
from conftest import CORPUS, bpe_tokenizer, build_model, cutting_wordpiece
from test_cli import run, run_json
from transformers import AutoTokenizer

from hf_partial_embed import choose_tokens

TEXT = "".join(f"{number} dysprosium and praseodymium, {line}\n" for number in range(60) for line in CORPUS[:4])


@pytest.fixture
def base(tmp_path):
    """Only a tokenizer: no model is needed."""
    bpe_tokenizer().save_pretrained(tmp_path / "base")
    return tmp_path / "base"


@pytest.fixture
def texts(tmp_path):
    (tmp_path / "texts.txt").write_text(TEXT, "utf-8")
    return tmp_path / "texts.txt"


def test_tokens_file_holds_what_was_chosen_and_both_savings_are_told(capsys, base, texts, tmp_path):
    out = tmp_path / "tokens.json"
    status, value = run_json(capsys, "choose", base, texts, "--count", "12", "--out", out)
    tokens = json.loads(out.read_text("utf-8"))
    assert status == 0 and tokens == [entry["token"] for entry in value["tokens"]] and len(tokens) == 12
    assert 0 < value["held_out"]["saving"] < 1 and value["held_out"]["longer"] == 0
    assert value["tokens_before"] > 8 * value["held_out"]["tokens_before"]
    status, shown, _ = run(capsys, "choose", base, texts, "--count", "12", "--quiet")
    assert status == 0 and "held-out tenth of the texts:" in shown and "expected on these texts:" in shown


def test_words_that_become_longer_are_named(capsys, tmp_path):
    cutting_wordpiece().save_pretrained(tmp_path / "base")
    path = tmp_path / "texts.jsonl"
    path.write_text("".join(json.dumps({"text": text}) + "\n" for text in [*["abcd fed"] * 9, "abcdef"]), "utf-8")
    status, shown, _ = run(capsys, "choose", tmp_path / "base", path, "--count", "2", "--quiet")
    assert status == 0 and "1 word of the held-out texts becomes longer: 'abcdef'" in shown


def test_add_takes_the_file(capsys, base, texts, tmp_path):
    build_model("llama", 300).save_pretrained(base)
    out = tmp_path / "tokens.txt"
    arguments = ["--count", "3", "--whole-words", "--min-count", "50"]
    assert run(capsys, "choose", base, texts, *arguments, "--out", out, "--quiet")[0] == 0
    status, value = run_json(capsys, "add", base, out, tmp_path / "prepared")
    assert status == 0 and list(value["tokens"]) == out.read_text("utf-8").splitlines()


def test_jsonl_and_few_texts(capsys, base, tmp_path):
    path = tmp_path / "texts.jsonl"
    path.write_text("".join(json.dumps({"text": text}) + "\n" for text in CORPUS[:4] * 2), "utf-8")
    status, value = run_json(capsys, "choose", base, path, "--count", "3")
    assert status == 0 and value["held_out"] is None
    chosen = choose_tokens(AutoTokenizer.from_pretrained(base), CORPUS[:4] * 2, 3)
    assert [entry["token"] for entry in value["tokens"]] == list(chosen)
    path.write_text('{"text": "a"}\n{"content": "b"}\n', "utf-8")
    status, _, err = run(capsys, "choose", base, path, "--count", "3")
    assert status == 2 and "Line 2 of" in err and '"text"' in err


def test_left_out_texts_do_not_become_tokens(capsys, base, texts, tmp_path):
    _, first = run_json(capsys, "choose", base, texts, "--count", "5")
    gone = first["tokens"][0]["token"]
    (tmp_path / "no.json").write_text(json.dumps([gone]), "utf-8")
    _, second = run_json(capsys, "choose", base, texts, "--count", "5", "--leave-out", tmp_path / "no.json")
    assert gone not in [entry["token"] for entry in second["tokens"]]


def test_bad_input_is_said_and_nothing_is_written(capsys, base, texts, tmp_path):
    out = tmp_path / "tokens.txt"
    lines = tmp_path / "lines.txt"
    lines.write_text("one\n\n\n\ntwo\n\n\n\n" * 400, "utf-8")
    cases = [
        (["--count", "5"], lines, "Name a .json file"),  # a token with line breaks
        ([], texts, "count=1000"),
        (["--count", "0"], texts, "at least 1"),
        (["--count", "5", "--script", "Klingonish"], texts, "no Unicode script"),
        (["--count", "5"], tmp_path / "missing.txt", "missing.txt"),
    ]
    for arguments, source, message in cases:
        status, _, err = run(capsys, "choose", base, source, *arguments, "--out", out, "--quiet")
        assert status == 2 and message in err and not out.exists()
    out.write_text("mine")
    status, _, err = run(capsys, "choose", base, texts, "--count", "5", "--out", out)
    assert status == 2 and "--force" in err and out.read_text() == "mine"
