"""`verify_checkpoint`: two saved checkpoints, compared bit for bit."""

import json
import os
import shutil
import struct
import subprocess
import sys

import pytest
import torch
from conftest import bpe_tokenizer, build_model
from safetensors.torch import load_file, save_file

from hf_partial_embed import PartialEmbeddingError, add_tokens, verify_checkpoint

VOCABULARY = 300


def edit(folder, change) -> None:
    """Apply a function to the tensors of a checkpoint in one file."""
    tensors = load_file(folder / "model.safetensors")
    change(tensors)
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})


def flip_bit(tensor: torch.Tensor, *index: int) -> None:
    """Flip the lowest bit of a byte; the last index counts bytes."""
    tensor.view(torch.uint8)[index] ^= 1


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    """A saved model, by kind, tie and dtype."""
    made = {}

    def save(kind="llama", tied=True, dtype=torch.float32):
        key = (kind, tied, dtype)
        if key not in made:
            made[key] = tmp_path_factory.mktemp("base")
            build_model(kind, VOCABULARY, tied=tied, dtype=dtype).save_pretrained(made[key])
        return made[key]

    return save


@pytest.fixture
def pair(saved, tmp_path):
    """A checkpoint and a copy of it to change."""
    shutil.copytree(saved(), tmp_path / "adapted")
    return saved(), tmp_path / "adapted"


def test_checkpoint_equals_itself(saved):
    report = verify_checkpoint(saved(), str(saved()))
    assert report.only_added_rows and report.changed_ids == []
    assert report.compared == len(load_file(saved() / "model.safetensors"))
    assert [(table.base_rows, table.adapted_rows, table.added_ids) for table in report.tables.values()] == [
        (VOCABULARY, VOCABULARY, [])
    ]


@pytest.mark.parametrize("kind", ["llama", "phi", "gpt2", "t5", "bert"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_added_tokens_are_only_added_rows(saved, tmp_path, kind, tied, dtype, strategy):
    model = build_model(kind, VOCABULARY, tied=tied, dtype=dtype)
    partial = add_tokens(model, bpe_tokenizer(), ["<a>", "<b>", "<c>"], strategy=strategy)
    with torch.no_grad():
        for parameter in partial.parameters():
            parameter[-3:] += 1
    model.save_pretrained(tmp_path)
    base = saved(kind, tied, dtype)
    report = verify_checkpoint(base, tmp_path)
    assert report.only_added_rows, report
    stored = load_file(base / "model.safetensors").items()
    assert report.tables.keys() == {name for name, tensor in stored if len(tensor) == VOCABULARY}
    assert all(table.added_ids == partial.token_ids for table in report.tables.values())


def test_segment_embeddings_are_no_rows_of_tokens(saved, tmp_path):
    shutil.copytree(saved("bert"), tmp_path / "adapted")
    name = "bert.embeddings.token_type_embeddings.weight"
    edit(tmp_path / "adapted", lambda tensors: flip_bit(tensors[name], 0, 0))
    report = verify_checkpoint(saved("bert"), tmp_path / "adapted")
    assert report.changed == [name] and report.changed_ids == []


def test_flipped_bit_in_an_old_row_is_found_by_its_id(pair):
    edit(pair[1], lambda tensors: flip_bit(tensors["model.embed_tokens.weight"], 123, 7))
    report = verify_checkpoint(*pair)
    assert report.changed_ids == [123] and report.tables["model.embed_tokens.weight"].changed_ids == [123]
    assert not report.only_added_rows and report.changed == []


@pytest.mark.parametrize("ids", [[0], [VOCABULARY - 1], [0, 1, 150, VOCABULARY - 1], list(range(VOCABULARY))])
@pytest.mark.parametrize("piece", [1, 64, 1000, 1 << 22])
def test_rows_are_found_wherever_the_pieces_are_cut(pair, monkeypatch, ids, piece):
    monkeypatch.setattr("hf_partial_embed.files.checkpoints._PIECE_BYTES", piece)
    edit(pair[1], lambda tensors: [flip_bit(tensors["model.embed_tokens.weight"], row, row % 16) for row in ids])
    assert verify_checkpoint(*pair).changed_ids == ids


def test_old_rows_changed_in_a_checkpoint_with_added_ones_are_found(saved, tmp_path):
    model = build_model(vocab=VOCABULARY)
    add_tokens(model, bpe_tokenizer(), ["<a>"])
    model.save_pretrained(tmp_path)
    edit(tmp_path, lambda tensors: flip_bit(tensors["model.embed_tokens.weight"], 5, 0))
    report = verify_checkpoint(saved(), tmp_path)
    table = report.tables["model.embed_tokens.weight"]
    assert (table.changed_ids, table.added_ids) == ([5], [VOCABULARY])


def test_rows_trained_in_spare_places_are_changed_rows(tmp_path):
    model = build_model(vocab=VOCABULARY + 20)
    model.save_pretrained(tmp_path / "base")
    partial = add_tokens(model, bpe_tokenizer(), ["<a>", "<b>"])
    model.save_pretrained(tmp_path / "adapted")
    report = verify_checkpoint(tmp_path / "base", tmp_path / "adapted")
    assert report.changed_ids == partial.token_ids == [VOCABULARY, VOCABULARY + 1]
    assert report.tables["model.embed_tokens.weight"].added_ids == []


def test_other_tensors_that_changed_are_named(pair):
    changed = ["model.layers.0.self_attn.q_proj.weight", "model.norm.weight"]
    edit(pair[1], lambda tensors: [flip_bit(tensors[name], 0) for name in changed])
    report = verify_checkpoint(*pair)
    assert report.changed == changed and report.changed_ids == [] and not report.only_added_rows


def test_last_bit_of_a_tensor_counts(pair):
    def change(tensors):
        tensors["model.norm.weight"].view(torch.uint8)[-1] ^= 128

    edit(pair[1], change)
    assert verify_checkpoint(*pair).changed == ["model.norm.weight"]


@pytest.mark.parametrize(
    "change",
    [
        lambda tensor: tensor.to(torch.float16),
        lambda tensor: tensor.view(torch.int32),
        lambda tensor: tensor[:8].clone(),
        lambda tensor: tensor.repeat(2),
        lambda tensor: tensor.view(1, -1),
    ],
    ids=["dtype", "same bits in another dtype", "shorter", "longer", "shape"],
)
def test_tensor_of_another_shape_or_dtype_has_changed(pair, change):
    edit(pair[1], lambda tensors: tensors.update({"model.norm.weight": change(tensors["model.norm.weight"])}))
    assert verify_checkpoint(*pair).changed == ["model.norm.weight"]


@pytest.mark.parametrize("shape", [(VOCABULARY - 1, 16), (VOCABULARY + 1, 17)])
def test_table_that_lost_rows_or_became_wider_has_changed(pair, shape):
    edit(pair[1], lambda tensors: tensors.update({"model.embed_tokens.weight": torch.zeros(shape)}))
    (pair[1] / "config.json").write_text(json.dumps({"vocab_size": shape[0]}))
    report = verify_checkpoint(*pair)
    assert report.changed == ["model.embed_tokens.weight"] and report.tables == {}


def test_missing_and_unexpected_tensors_are_named(pair):
    def rename(tensors):
        tensors["model.other.weight"] = tensors.pop("model.norm.weight")

    edit(pair[1], rename)
    report = verify_checkpoint(*pair)
    assert (report.missing, report.unexpected) == (["model.norm.weight"], ["model.other.weight"])
    assert not report.only_added_rows


def test_head_that_was_untied_is_unexpected(saved, tmp_path):
    untied = build_model(vocab=VOCABULARY, tied=False)
    untied.load_state_dict(build_model(vocab=VOCABULARY).state_dict())
    untied.save_pretrained(tmp_path)
    report = verify_checkpoint(saved(), tmp_path)
    assert report.unexpected == ["lm_head.weight"] and report.missing == report.changed == report.changed_ids == []


def test_both_tables_of_an_untied_model_are_reported(saved, tmp_path):
    shutil.copytree(saved(tied=False), tmp_path / "adapted")
    edit(tmp_path / "adapted", lambda tensors: flip_bit(tensors["lm_head.weight"], 9, 0))
    edit(tmp_path / "adapted", lambda tensors: flip_bit(tensors["model.embed_tokens.weight"], 4, 0))
    report = verify_checkpoint(saved(tied=False), tmp_path / "adapted")
    assert {name: table.changed_ids for name, table in report.tables.items()} == {
        "lm_head.weight": [9],
        "model.embed_tokens.weight": [4],
    }
    assert report.changed_ids == [4, 9]


def test_sharded_checkpoint_is_compared_with_one_in_one_file(saved, tmp_path):
    model = build_model(vocab=VOCABULARY, tied=False)
    model.save_pretrained(tmp_path, max_shard_size="10KB")
    assert len(list(tmp_path.glob("model-*.safetensors"))) > 2
    for pair in [(saved(tied=False), tmp_path), (tmp_path, saved(tied=False)), (tmp_path, tmp_path)]:
        report = verify_checkpoint(*pair)
        assert report.only_added_rows and report.compared == len(load_file(saved(tied=False) / "model.safetensors"))


def test_shards_that_were_cut_elsewhere_are_compared(saved, tmp_path):
    model = build_model(vocab=VOCABULARY, tied=False)
    model.save_pretrained(tmp_path / "base", max_shard_size="20KB")
    partial = add_tokens(model, bpe_tokenizer(), ["<a>", "<b>"])
    model.save_pretrained(tmp_path / "adapted", max_shard_size="10KB")
    report = verify_checkpoint(tmp_path / "base", tmp_path / "adapted")
    assert report.only_added_rows and all(table.added_ids == partial.token_ids for table in report.tables.values())


BITS = {  # NaNs of several payloads, infinities, zeros of both signs
    torch.bfloat16: [0x7FC0, 0x7FC1, 0xFFC0, 0x7F81, 0x7F80, 0xFF80, 0x0000, -0x8000],
    torch.float32: [0x7FC00000, 0x7FC00001, -0x400000, 0x7F800001, 0x7F800000, -0x800000, 0, -(2**31)],
}


@pytest.mark.parametrize("dtype", BITS, ids=str)
def test_values_are_compared_by_their_bits(tmp_path, dtype):
    integer = {2: torch.int16, 4: torch.int32}[dtype.itemsize]
    bits = torch.tensor([value - 2**16 if dtype.itemsize == 2 and value >= 2**15 else value for value in BITS[dtype]])
    table = bits.to(integer).view(dtype).unsqueeze(1)
    (tmp_path / "config.json").write_text(json.dumps({"vocab_size": len(table)}))
    for shift in range(len(table)):
        for folder, values in (("base", table), ("adapted", table.roll(shift, 0))):
            (tmp_path / folder).mkdir(exist_ok=True)
            shutil.copy(tmp_path / "config.json", tmp_path / folder)
            save_file({"table": values.contiguous()}, tmp_path / folder / "model.safetensors")
        expected = list(range(len(table))) if shift else []
        assert verify_checkpoint(tmp_path / "base", tmp_path / "adapted").changed_ids == expected


@pytest.mark.parametrize(
    "tensor",
    [
        torch.tensor(1.0),
        torch.zeros(3, 0),
        torch.zeros(0, 3),
        torch.ones(3, 2, dtype=torch.bool),
        torch.ones(3, 2, dtype=torch.int8),
        torch.ones(3, 2, dtype=torch.uint16),
        torch.ones(3, 2, dtype=torch.complex64),
        torch.ones(3, 2).to(torch.float8_e4m3fn),
        torch.ones(4, 2, dtype=torch.uint8).view(torch.float4_e2m1fn_x2),
    ],
    ids=lambda tensor: f"{tensor.dtype} {tuple(tensor.shape)}",
)
def test_tensors_of_any_shape_and_dtype_are_compared(tmp_path, tensor):
    for name, shift in (("base", 0), ("same", 0), ("other", 1)):
        (tmp_path / name).mkdir()
        values = tensor.clone()
        if values.numel():
            values.reshape(-1).view(torch.uint8)[-1] ^= shift
        save_file({"x": values}, tmp_path / name / "model.safetensors")
    assert verify_checkpoint(tmp_path / "base", tmp_path / "same").only_added_rows
    assert verify_checkpoint(tmp_path / "base", tmp_path / "other").changed == (["x"] if tensor.numel() else [])


def test_table_of_a_sub_config_is_a_table(pair):
    (pair[1] / "config.json").write_text(json.dumps({"text_config": {"vocab_size": VOCABULARY}}))
    for sources in (pair, pair[::-1], (pair[1], pair[1])):
        assert list(verify_checkpoint(*sources).tables) == ["model.embed_tokens.weight"]


def test_without_a_config_tensors_are_compared_as_wholes(pair):
    (pair[1] / "config.json").unlink()
    edit(pair[1], lambda tensors: flip_bit(tensors["model.embed_tokens.weight"], 5, 0))
    report = verify_checkpoint(*pair)
    assert report.changed == ["model.embed_tokens.weight"] and report.tables == {}


def test_report_reads_well(pair, tmp_path):
    model = build_model(vocab=VOCABULARY)
    add_tokens(model, bpe_tokenizer(), ["<a>"])
    model.save_pretrained(tmp_path / "grown")

    def change(tensors):
        flip_bit(tensors["model.embed_tokens.weight"], 5, 0)
        flip_bit(tensors["model.norm.weight"], 0)

    edit(tmp_path / "grown", change)
    assert str(verify_checkpoint(pair[0], tmp_path / "grown")).splitlines() == [
        "20 tensors compared",
        "model.embed_tokens.weight: 300 rows, 1 row changed (5), 1 row added",
        "changed: 'model.norm.weight'",
    ]


# What is no checkpoint


def test_folder_without_safetensors_is_an_error_that_names_what_is_there(saved, tmp_path):
    torch.save({}, tmp_path / "pytorch_model.bin")
    with pytest.raises(PartialEmbeddingError, match=r"no model.safetensors .* it holds \['pytorch_model.bin'\]. Save"):
        verify_checkpoint(saved(), tmp_path)


def test_source_that_is_nowhere_is_an_error(saved, tmp_path):
    with pytest.raises(
        PartialEmbeddingError, match=r"Cannot read the checkpoint '.*/nowhere': it is no file or folder"
    ):
        verify_checkpoint(saved(), tmp_path / "nowhere")


INDEX = "model.safetensors.index.json"
DAMAGE = {
    "empty file": {"model.safetensors": b""},
    "no safetensors": {"model.safetensors": bytes(100)},
    "header too long": {"model.safetensors": struct.pack("<Q", 2**62) + b"{}"},
    "config that is no JSON": {"config.json": b"{"},
    "config that is no object": {"config.json": b"[1]"},
    "config that is no text": {"config.json": b"\xff\xfe\xff"},
    "index that is no JSON": {INDEX: b"{"},
    "index that is no object": {INDEX: b"[1]"},
    "index without a weight map": {INDEX: b"{}"},
    "weight map that is no object": {INDEX: b'{"weight_map": [1]}'},
    "file name that is a number": {INDEX: b'{"weight_map": {"x": 1}}'},
    "file name that is a list": {INDEX: b'{"weight_map": {"x": [1]}}'},
    "shard that is not there": {INDEX: b'{"weight_map": {"x": "model-00001.safetensors"}}'},
    "shard outside of the folder": {INDEX: b'{"weight_map": {"x": "../outside.safetensors"}}'},
}


@pytest.mark.parametrize("case", DAMAGE)
def test_damaged_checkpoint_is_an_error_that_names_it(pair, case):
    shutil.copy(pair[1] / "model.safetensors", pair[1].parent / "outside.safetensors")
    for name, data in DAMAGE[case].items():
        (pair[1] / name).write_bytes(data)
    for sources in (pair, pair[::-1]):
        with pytest.raises(PartialEmbeddingError, match=r"Cannot read the checkpoint '.*adapted'"):
            verify_checkpoint(*sources)


def test_truncated_checkpoint_is_an_error(pair):
    path = pair[1] / "model.safetensors"
    for length in (0, 7, 8, 100, path.stat().st_size - 1):
        os.truncate(path, min(length, path.stat().st_size))
        with pytest.raises(PartialEmbeddingError, match="Cannot read the checkpoint"):
            verify_checkpoint(*pair)
        shutil.copy(pair[0] / "model.safetensors", path)


# Memory: all of the process, mapped files included, and its highest point

MEASURE = """
import sys
from pathlib import Path
from hf_partial_embed import verify_checkpoint

def peak():
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith("VmHWM:"))

verify_checkpoint(sys.argv[1], sys.argv[1])
Path("/proc/self/clear_refs").write_text("5")  # lets the peak start again from the present size
before = peak()
report = verify_checkpoint(sys.argv[2], sys.argv[3])
print(peak() - before, len(report.changed_ids), len(report.changed))
"""


def sparse_checkpoint(folder, **shapes) -> None:
    """A checkpoint of zeros, written without taking place in memory or on the disk."""
    header, size = {}, 0
    for name, shape in shapes.items():
        length = 4 * shape[0] * shape[1]
        header[name] = {"dtype": "F32", "shape": shape, "data_offsets": [size, size + length]}
        size += length
    text = json.dumps(header).encode()
    folder.mkdir()
    (folder / "config.json").write_text('{"vocab_size": 100000}')
    with open(folder / "model.safetensors", "wb") as file:
        file.write(struct.pack("<Q", len(text)) + text)
        file.truncate(8 + len(text) + size)
        file.seek(8 + len(text) + 4)
        file.write(folder.name.encode())


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
def test_memory_does_not_grow_with_the_checkpoint(saved, tmp_path):
    shapes = {"table": [100_000, 500], "flat": [1, 25_000_000]}
    for name in ("one", "two"):
        sparse_checkpoint(tmp_path / name, **shapes)
        assert (tmp_path / name / "model.safetensors").stat().st_size > 300_000_000
    command = [sys.executable, "-c", MEASURE, saved(), tmp_path / "one", tmp_path / "two"]
    output = subprocess.run(command, check=True, capture_output=True, text=True).stdout
    kilobytes, changed_ids, changed = map(int, output.split())
    assert (changed_ids, changed) == (1, 0)
    assert kilobytes < 40_000, f"{kilobytes} kB more"
