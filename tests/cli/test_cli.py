"""The command line, as a person meets it: output, files, exit status."""

from __future__ import annotations

import json
import os
import subprocess
import sys

import pytest
import torch
from conftest import bpe_tokenizer, build_model, logits_of
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, AutoTokenizer

from hf_partial_embed import TokenRows, add_tokens, train_tokens
from hf_partial_embed.cli.main import main
from hf_partial_embed.errors import visible

pytestmark = pytest.mark.filterwarnings("ignore::FutureWarning")

TOKENS = ["<think>", "praseodymium"]


@pytest.fixture(params=[True, False], ids=["tied", "untied"])
def base(request, tmp_path):
    """A saved base model with its tokenizer."""
    folder = tmp_path / "base"
    build_model("llama", 300, tied=request.param).save_pretrained(folder)
    bpe_tokenizer().save_pretrained(folder)
    return folder


@pytest.fixture
def rows(base, tmp_path):
    """A row file of it, in a folder, and the model with the rows on it."""
    model, tokenizer = AutoModelForCausalLM.from_pretrained(base), AutoTokenizer.from_pretrained(base)
    partial = add_tokens(model, tokenizer, TOKENS, entry="added")
    with torch.no_grad():
        for parameter in partial.parameters():
            parameter.normal_()
    partial.save_pretrained(tmp_path / "rows")
    return tmp_path / "rows", partial


def run(capsys, *arguments):
    """Status, standard output and standard error."""
    status = main([str(argument) for argument in arguments])
    captured = capsys.readouterr()
    return status, captured.out, captured.err


def run_json(capsys, *arguments):
    status, out, err = run(capsys, *arguments, "--json", "--quiet")
    assert err == ""
    return status, json.loads(out)


def test_info_says_what_a_row_file_holds(capsys, rows):
    folder, partial = rows
    status, out, _ = run(capsys, "info", folder)
    assert status == 0
    assert "2 token rows for base" in out and "<think>" in out and "input_rows: 2 x 16, float32" in out
    status, value = run_json(capsys, "info", folder / "token_rows.safetensors")
    assert [token["content"] for token in value["tokens"]] == TOKENS
    assert value["tensors"]["input_rows"] == {"shape": [2, 16], "dtype": "float32"}
    assert ("output_rows" in value["tensors"]) == (not value["tied"])
    assert value["input_norms"] == pytest.approx(partial.token_rows().input_rows.norm(dim=1).tolist())


def test_added_tokens_are_in_an_ordinary_checkpoint(capsys, base, tmp_path):
    (tmp_path / "tokens.txt").write_text("<think>\n\npraseodymium\n", "utf-8")
    out = tmp_path / "prepared"
    status, value = run_json(capsys, "add", base, tmp_path / "tokens.txt", out, "--special")
    assert status == 0 and value["tokens"] == {"<think>": 300, "praseodymium": 301}
    tokenizer = AutoTokenizer.from_pretrained(out)
    assert tokenizer("<think>", add_special_tokens=False)["input_ids"] == [300]
    model = AutoModelForCausalLM.from_pretrained(out)
    ids = torch.tensor([[5, 6, 7]])
    expected = logits_of(AutoModelForCausalLM.from_pretrained(base), ids)
    torch.testing.assert_close(logits_of(model, ids)[..., :300], expected)
    assert run(capsys, "verify", base, out, "--quiet")[0] == 0
    assert train_tokens(model, tokenizer, TOKENS).token_ids == [300, 301]


def test_words_enter_the_vocabulary(capsys, base, tmp_path):
    (tmp_path / "tokens.json").write_text('["<think>", " lanthan"]', "utf-8")
    out = tmp_path / "prepared"
    status, value = run_json(capsys, "add", base, tmp_path / "tokens.json", out, "--quiet")
    assert status == 0
    assert value["entries"] | {"<think>": "added", " lanthan": "vocabulary"} == value["entries"]
    assert set(value["entries"].values()) == {"added", "vocabulary", "part"}
    tokenizer = AutoTokenizer.from_pretrained(out)
    assert tokenizer("a lanthan", add_special_tokens=False)["input_ids"][-1] == value["tokens"][" lanthan"]
    assert run(capsys, "verify", base, out, "--quiet")[0] == 0
    status, text, _ = run(capsys, "add", base, tmp_path / "tokens.json", tmp_path / "as-added", "--entry", "added")
    assert status == 0 and "added 2 tokens" in text


def test_info_and_merge_tell_vocabulary_tokens_from_added_ones(capsys, base, tmp_path):
    model, tokenizer = AutoModelForCausalLM.from_pretrained(base), AutoTokenizer.from_pretrained(base)
    partial = add_tokens(model, tokenizer, ["<think>", " lan"])
    partial.save_pretrained(tmp_path / "rows")
    words = "1 in the vocabulary of its model, 2 in the vocabulary as parts of those, 1 added tokens"
    assert words in run(capsys, "info", tmp_path / "rows")[1]
    assert words in (tmp_path / "rows" / "README.md").read_text("utf-8")
    status, text, _ = run(capsys, "merge", base, tmp_path / "rows", tmp_path / "merged")
    assert status == 0 and words in text
    assert run(capsys, "verify", base, tmp_path / "merged", "--rows", tmp_path / "rows", "--quiet")[0] == 0


def test_descriptions_come_from_a_json_file(capsys, base, tmp_path):
    (tmp_path / "tokens.json").write_text(json.dumps({"Dy": "The elements"}), "utf-8")
    assert run(capsys, "add", base, tmp_path / "tokens.json", tmp_path / "out", "--quiet")[0] == 0
    tokenizer, table = AutoTokenizer.from_pretrained(base), load_file(base / "model.safetensors")
    pieces = tokenizer("The elements")["input_ids"]
    row = load_file(tmp_path / "out" / "model.safetensors")["model.embed_tokens.weight"][300]
    torch.testing.assert_close(row, table["model.embed_tokens.weight"][pieces].mean(0))


def test_merged_checkpoint_has_the_rows_and_verifies(capsys, base, rows, tmp_path):
    folder, partial = rows
    status, value = run_json(capsys, "merge", base, folder, tmp_path / "merged")
    assert status == 0 and value["tokens"] == dict(zip(TOKENS, partial.token_ids, strict=True))
    merged = AutoModelForCausalLM.from_pretrained(tmp_path / "merged")
    ids = torch.tensor([[5, *partial.token_ids, 9]])
    assert torch.equal(logits_of(merged, ids), logits_of(partial.merge(), ids))
    status, out, _ = run(capsys, "verify", base, tmp_path / "merged")
    assert status == 0 and out.endswith("only added or allowed rows differ\n")


def test_verify_finds_a_flipped_bit_and_says_where(capsys, base, rows, tmp_path):
    folder, _ = rows
    run(capsys, "merge", base, folder, tmp_path / "merged", "--quiet")
    path = tmp_path / "merged" / "model.safetensors"
    tensors = load_file(path)
    tensors["model.embed_tokens.weight"][17].view(torch.int32)[3] ^= 1
    tensors["model.norm.weight"][0] += 1
    save_file(tensors, path, metadata={"format": "pt"})
    status, out, _ = run(capsys, "verify", base, tmp_path / "merged")
    assert status == 1
    assert "DIFFERENT: old rows 17; 1 tensor changed ('model.norm.weight')" in out
    status, value = run_json(capsys, "verify", base, tmp_path / "merged", "--ids", "3,10-20")
    assert status == 1 and value["changed_ids_not_allowed"] == [] and value["changed"] == ["model.norm.weight"]
    assert value["tables"]["model.embed_tokens.weight"]["changed_ids"] == [17]


def test_verify_allows_the_tokens_of_a_row_file(capsys, base, tmp_path):
    model, tokenizer = AutoModelForCausalLM.from_pretrained(base), AutoTokenizer.from_pretrained(base)
    partial = train_tokens(model, tokenizer, ["<s>"])  # an old row
    with torch.no_grad():
        next(partial.parameters()).normal_()
    partial.save_pretrained(tmp_path / "rows")
    assert run(capsys, "merge", base, tmp_path / "rows", tmp_path / "merged", "--quiet")[0] == 0
    assert run(capsys, "verify", base, tmp_path / "merged", "--quiet")[0] == 1
    assert run(capsys, "verify", base, tmp_path / "merged", "--rows", tmp_path / "rows", "--quiet")[0] == 0


def test_rows_go_to_peft_and_back(capsys, base, rows, tmp_path):
    folder, partial = rows
    assert run(capsys, "convert", folder, tmp_path / "peft", "--to", "peft", "--base", base, "--quiet")[0] == 0
    assert run(capsys, "convert", tmp_path / "peft", tmp_path / "again", "--to", "rows", "--quiet")[0] == 0
    before, after = partial.token_rows(), TokenRows.from_pretrained(tmp_path / "again")
    assert after.added_tokens == before.added_tokens
    for name, tensor in before.tensors().items():
        assert torch.equal(after.tensors()[name], tensor)


def test_rows_go_to_textual_inversion_and_back(capsys, tmp_path):
    TokenRows(tokens=["<cat>_0", "<cat>_1"], input_rows=torch.randn(2, 4)).save_pretrained(tmp_path / "rows")
    file = tmp_path / "cat.safetensors"
    assert run(capsys, "convert", tmp_path / "rows", file, "--to", "textual-inversion")[0] == 0
    assert load_file(file)["<cat>"].shape == (2, 4)
    assert run(capsys, "convert", tmp_path / "rows", file, "--to", "textual-inversion")[0] == 2  # it exists
    assert run(capsys, "info", file)[1].startswith("2 token rows")
    assert run(capsys, "convert", file, tmp_path / "again", "--to", "rows")[0] == 0
    assert TokenRows.from_pretrained(tmp_path / "again").tokens == ["<cat>_0", "<cat>_1"]


def test_neighbours_are_the_old_tokens_of_the_nearest_rows(capsys, base, tmp_path):
    tokenizer = AutoTokenizer.from_pretrained(base)
    table = load_file(base / "model.safetensors")["model.embed_tokens.weight"]
    rows = TokenRows(tokens=["<new>", "</s>"], input_rows=table[[40, 3]] * 2)
    rows.save_pretrained(tmp_path / "rows")
    status, value = run_json(capsys, "neighbours", tmp_path / "rows", base, "--count", "2")
    assert status == 0
    nearest = value["neighbours"]["<new>"][0]
    assert nearest == {"token": tokenizer.decode([40]), "id": 40, "cosine": pytest.approx(1)}
    assert all(entry["id"] != 3 for entry in value["neighbours"]["</s>"])  # no token is its own neighbour
    status, out, _ = run(capsys, "neighbours", tmp_path / "rows", base)
    assert status == 0 and out.startswith("<new>: ") and "1.000" in out


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["info", "{tmp}/nothing"], "no file or folder here"),
        (["info", "{tmp}"], "has no token_rows.safetensors"),
        (["merge", "{tmp}/nothing", "{rows}", "{tmp}/out"], "Cannot read the model"),
        (["merge", "{base}", "{rows}", "{base}"], "exists and is not empty"),
        (["verify", "{base}", "{rows}"], "has no model.safetensors"),
        (["convert", "{rows}", "{tmp}/out", "--to", "peft"], "Pass --base"),
        (["add", "{base}", "{tmp}/nothing.txt", "{tmp}/out"], "Cannot read the tokens"),
        (["add", "{base}", "{known}", "{tmp}/out"], "already. Nothing was added"),
        (["add", "{base}", "{new}", "{tmp}/out", "--init", "x"], "init='x' is no initialiser"),
        (["neighbours", "{rows}", "{base}", "--count", "0"], "0 neighbours were asked for"),
    ],
)
def test_bad_input_is_a_message_without_a_traceback(capsys, base, rows, tmp_path, arguments, message):
    (tmp_path / "known.txt").write_text("</s>\n")
    (tmp_path / "new.txt").write_text("<new>\n")
    places = {
        "tmp": tmp_path,
        "base": base,
        "rows": rows[0],
        "known": tmp_path / "known.txt",
        "new": tmp_path / "new.txt",
    }
    status, out, err = run(capsys, *(argument.format(**places) for argument in arguments))
    assert status == 2 and out == ""
    assert message in err and "Traceback" not in err and err.startswith(f"hf-partial-embed {arguments[0]}: error: ")
    assert not (tmp_path / "out").exists()
    assert not list(tmp_path.glob(".*"))


def test_pickles_are_refused(capsys, base, rows, tmp_path):
    (tmp_path / "x.pt").write_bytes(b"cposix\nsystem\n")
    status, _, err = run(capsys, "info", tmp_path / "x.pt")
    assert status == 2 and "is a pickle" in err
    (base / "model.safetensors").rename(base / "pytorch_model.bin")
    status, _, err = run(capsys, "merge", base, rows[0], tmp_path / "out")
    assert status == 2 and "safetensors" in err


def test_force_replaces_the_folder_and_an_error_leaves_it(capsys, base, rows, tmp_path):
    out = tmp_path / "out"
    out.mkdir()
    (out / "old.txt").write_text("x")
    assert run(capsys, "merge", base, tmp_path / "nothing", out, "--force", "--quiet")[0] == 2
    assert (out / "old.txt").exists()
    assert run(capsys, "merge", base, rows[0], out, "--force", "--quiet")[0] == 0
    assert not (out / "old.txt").exists() and (out / "model.safetensors").exists()


def test_rows_by_id_are_merged_and_the_tokenizer_is_kept(capsys, base, tmp_path):
    model = AutoModelForCausalLM.from_pretrained(base)
    partial = train_tokens(model, None, [7, 250])
    with torch.no_grad():
        next(partial.parameters()).fill_(1)
    partial.save_pretrained(tmp_path / "rows")
    assert "id 250" in run(capsys, "info", tmp_path / "rows")[1]
    assert run(capsys, "merge", base, tmp_path / "rows", tmp_path / "out", "--quiet")[0] == 0
    assert run(capsys, "verify", base, tmp_path / "out", "--ids", "7,250", "--quiet")[0] == 0
    assert len(AutoTokenizer.from_pretrained(tmp_path / "out")) == 300
    assert run(capsys, "neighbours", tmp_path / "rows", base)[1].startswith("id 7: ")


def test_folder_comes_back_when_the_new_one_cannot_take_its_place(capsys, base, rows, tmp_path, monkeypatch):
    out = tmp_path / "out"
    out.mkdir()
    (out / "old.txt").write_text("x")
    replace = os.replace

    def fail(source, target):
        if str(source).endswith("new"):
            raise OSError("no space left")
        replace(source, target)

    monkeypatch.setattr(os, "replace", fail)
    status, _, err = run(capsys, "merge", base, rows[0], out, "--force", "--quiet")
    assert status == 2 and "no space left" in err and (out / "old.txt").exists()


def test_a_crash_is_not_the_status_of_a_difference(capsys, base, monkeypatch):
    monkeypatch.setattr("hf_partial_embed.files.checkpoints.verify_checkpoint", lambda *_, **__: 1 / 0)
    status, _, err = run(capsys, "verify", base, base)
    assert status == 3 and "ZeroDivisionError" in err


def test_control_characters_of_strangers_are_escaped(capsys, tmp_path):
    token = "\x1b[2J\x9b\u202e\nevil"
    TokenRows(tokens=[token], input_rows=torch.ones(1, 4)).save_pretrained(tmp_path)
    _, out, _ = run(capsys, "info", tmp_path)
    assert "\\x1b[2J\\x9b\\u202e\\nevil" in out
    assert not set(out) & {"\x1b", "\x9b", "\u202e"}
    _, value = run_json(capsys, "info", tmp_path)
    assert value["tokens"][0]["content"] == token
    assert visible("é 文\t", keep="\t") == "é 文\t"


def test_usage_errors_and_help(capsys):
    for arguments in ([], ["merge"], ["verify", "a", "b", "--ids", "x"], ["convert", "a", "b"]):
        with pytest.raises(SystemExit) as exit_info:
            main(arguments)
        assert exit_info.value.code == 2
    capsys.readouterr()
    for command in ("info", "add", "merge", "verify", "convert", "neighbours"):
        with pytest.raises(SystemExit) as exit_info:
            main([command, "--help"])
        assert exit_info.value.code == 0
        assert (
            f"example:\n  {'printf' if command == 'add' else 'hf-partial-embed ' + command}" in capsys.readouterr().out
        )


def test_help_needs_neither_torch_nor_transformers():
    code = "import sys; from hf_partial_embed.cli.main import main\ntry: main(['--help'])\nexcept SystemExit: pass\n"
    code += "assert not {'torch', 'transformers'} & set(sys.modules)"
    subprocess.run([sys.executable, "-c", code], check=True, capture_output=True)


def test_command_is_installed_under_its_name():
    result = subprocess.run(
        [sys.executable, "-m", "hf_partial_embed.cli", "--version"], check=True, capture_output=True, text=True
    )
    assert result.stdout == "hf-partial-embed 0.1.0\n"


def test_add_grows_a_base_for_adapters(base, capsys, tmp_path):
    out = tmp_path / "grown"
    status, result = run_json(capsys, "add", base, out, "--spare", 10, "--pad-to-multiple-of", 64)
    assert (status, result["tokens"], result["spare_rows"], result["rows_added"]) == (0, {}, 20, 20)
    model, plain = AutoModelForCausalLM.from_pretrained(out), AutoModelForCausalLM.from_pretrained(base)
    assert model.config.vocab_size == 320
    for name, tensor in plain.state_dict().items():
        assert torch.equal(model.state_dict()[name][: len(tensor)], tensor), name
    partial = add_tokens(model, AutoTokenizer.from_pretrained(out), ["<think>"])
    assert model.config.vocab_size == 320 and partial.token_ids == [300]


def test_add_says_what_is_wrong_with_spare_rows(capsys, base, tmp_path):
    for arguments in ((), ("--spare", -1), ("--pad-to-multiple-of", 0)):
        status, _, err = run(capsys, "add", base, tmp_path / "out", *arguments)
        assert status == 2 and ("Nothing is to be added" in err or "at least 0 and 1" in err)
        assert not (tmp_path / "out").exists()


@pytest.mark.filterwarnings("ignore:Model has `tie_word_embeddings=True`:UserWarning")
def test_convert_to_lora_alone_and_joined(base, rows, capsys, tmp_path):
    from peft import LoraConfig, PeftModel, get_peft_model

    folder, partial = rows
    assert run(capsys, "convert", folder, tmp_path / "adapter", "--to", "lora", "--base", base)[0] == 2
    run(capsys, "add", base, tmp_path / "grown", "--spare", 4)
    user = get_peft_model(AutoModelForCausalLM.from_pretrained(base), LoraConfig(r=2, target_modules=["q_proj"]))
    user.save_pretrained(tmp_path / "lora")
    capsys.readouterr()
    ids = torch.tensor([[5, 300, 7, 301]])
    for more in ((), ("--lora", tmp_path / "lora")):
        out = tmp_path / f"adapter{len(more)}"
        status, said, _ = run(capsys, "convert", folder, out, "--to", "lora", "--base", tmp_path / "grown", *more)
        assert (status, said.strip()) == (0, f"wrote 2 rows as lora: {out}")
        loaded = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(tmp_path / "grown"), out).eval()
        torch.testing.assert_close(
            logits_of(loaded, ids)[..., :302], logits_of(partial.model, ids)[..., :302], rtol=1e-5, atol=1e-6
        )
