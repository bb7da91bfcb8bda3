"""The row file: its format, writing it, and refusing damaged and hostile ones."""

import json
import os
import pickle
import random
import shutil
import struct
from pathlib import Path

import pytest
import torch
from conftest import bpe_tokenizer, build_model, snapshot
from hypothesis import given, settings
from hypothesis import strategies as st
from processes import rows
from safetensors.torch import load_file, save, save_file

from hf_partial_embed import PartialEmbeddingError, TokenRows, load_tokens
from hf_partial_embed.files.rows_file import FORMAT_VERSION, ROWS_FILE, read_rows, write_atomically

FLAGS = ("special", "lstrip", "rstrip", "single_word", "normalized")
DTYPES = [torch.float32, torch.bfloat16, torch.float16, torch.float64]


def same_bits(a: torch.Tensor, b: torch.Tensor) -> bool:
    return a.shape == b.shape and a.dtype == b.dtype and torch.equal(a.view(torch.uint8), b.view(torch.uint8))


# The format


@st.composite
def row_sets(draw) -> TokenRows:
    """Any row set: odd texts, every flag, every dtype, every finite bit pattern."""
    size, dim = draw(st.integers(1, 5)), draw(st.integers(1, 9))
    dtype = draw(st.sampled_from(DTYPES))
    generator = torch.Generator().manual_seed(draw(st.integers(0, 2**32)))

    def values(*shape: int) -> torch.Tensor:
        raw = torch.randint(0, 256, (*shape[:-1], shape[-1] * dtype.itemsize), generator=generator, dtype=torch.uint8)
        tensor = raw.view(dtype)
        return torch.where(tensor.isfinite(), tensor, -0.0)

    texts = draw(st.lists(st.text(min_size=1), min_size=size, max_size=size, unique=True))
    flags = st.fixed_dictionaries({flag: st.booleans() for flag in FLAGS})
    return TokenRows(
        tokens=texts,
        input_rows=values(size, dim),
        output_rows=draw(st.sampled_from([None, values(size, dim)])),
        output_bias=draw(st.sampled_from([None, values(size)])),
        extra_rows={name: values(size, 3, 2) for name in draw(st.sets(st.text(min_size=1), max_size=2))},
        token_ids=draw(st.lists(st.integers(0, 2**40), min_size=size, max_size=size, unique=True)),
        added_tokens=[{"content": text, **draw(flags)} for text in texts],
        base_model=draw(st.none() | st.text()),
        tied=draw(st.booleans()),
    )


@settings(max_examples=100, deadline=None)
@given(original=row_sets())
def test_any_row_set_comes_back_bit_for_bit(tmp_path_factory, original):
    path = tmp_path_factory.mktemp("rows", numbered=True) / ROWS_FILE
    original.save_file(path)
    loaded = TokenRows.from_pretrained(path)
    shutil.rmtree(path.parent)
    assert loaded.tensors().keys() == original.tensors().keys()
    for name, tensor in original.tensors().items():
        assert same_bits(loaded.tensors()[name], tensor), name
    for field in ("tokens", "token_ids", "added_tokens", "base_model", "tied"):
        assert getattr(loaded, field) == getattr(original, field), field


def test_file_has_the_documented_format(tmp_path):
    original = rows(2, 3, output_bias=torch.ones(2, dtype=torch.bfloat16), base_model="gpt2", tied=True)
    original.save_file(tmp_path / ROWS_FILE)
    data = (tmp_path / ROWS_FILE).read_bytes()
    length = struct.unpack("<Q", data[:8])[0]
    header = json.loads(data[8 : 8 + length])
    assert header.pop("__metadata__").keys() == {"hf_partial_embed"}
    assert {name: (entry["dtype"], entry["shape"]) for name, entry in header.items()} == {
        "input_rows": ("F32", [2, 3]),
        "output_bias": ("BF16", [2]),
    }
    start, stop = header["input_rows"]["data_offsets"]
    assert data[8 + length :][start:stop] == original.input_rows.numpy().tobytes()


def test_header_has_the_documented_content(tmp_path):
    rows(2, 3, base_model="gpt2", token_ids=[7, 5]).save_file(tmp_path / ROWS_FILE)
    _, metadata = read_rows(tmp_path / ROWS_FILE)
    plain = {"special": False, "lstrip": False, "rstrip": False, "single_word": False, "normalized": True}
    assert metadata == {
        "format_version": 1,
        "tokens": [{"content": "<0>", **plain}, {"content": "<1>", **plain}],
        "token_ids": [7, 5],
        "base_model": "gpt2",
        "tied": False,
    }


def test_further_tables_are_stored_under_their_parameter_name(tmp_path):
    rows(extra_rows={"model.per_layer.weight": torch.ones(2, 5)}).save_file(tmp_path / ROWS_FILE)
    assert load_file(tmp_path / ROWS_FILE).keys() == {"input_rows", "extra.model.per_layer.weight"}


def test_file_without_a_base_model_loads(tmp_path):
    write(tmp_path / ROWS_FILE, metadata(base_model=...))
    assert TokenRows.from_pretrained(tmp_path).base_model is None


def test_same_rows_give_the_same_bytes(tmp_path):
    for name in "ab":
        rows(extra_rows={"x": torch.ones(2, 1), "a": torch.ones(2, 1)}).save_file(tmp_path / name)
    assert (tmp_path / "a").read_bytes() == (tmp_path / "b").read_bytes()


@pytest.mark.parametrize("case", ["one tensor twice", "views", "transposed", "with gradient"])
def test_tensors_of_any_layout_can_be_saved(tmp_path, case):
    table = torch.randn(4, 4)
    pair = {
        "one tensor twice": (table, table),
        "views": (table[1:], table[:3]),
        "transposed": (table.T, table),
        "with gradient": (torch.nn.Parameter(table), table),
    }[case]
    original = TokenRows([str(number) for number in range(len(pair[0]))], pair[0], output_rows=pair[1])
    original.save_file(tmp_path / ROWS_FILE)
    loaded = TokenRows.from_pretrained(tmp_path)
    assert torch.equal(loaded.input_rows, pair[0]) and torch.equal(loaded.output_rows, pair[1])


# Writing


def test_saved_folder_holds_rows_and_card_only(tmp_path):
    rows().save_pretrained(tmp_path / "new" / "folder")
    rows().save_pretrained(tmp_path / "new" / "folder")
    assert sorted(os.listdir(tmp_path / "new" / "folder")) == ["README.md", ROWS_FILE]


@pytest.mark.skipif(os.name != "posix", reason="POSIX permissions")
def test_file_has_the_permissions_of_an_ordinary_one(tmp_path):
    rows().save_file(tmp_path / ROWS_FILE)
    (tmp_path / "ordinary").touch()
    assert (tmp_path / ROWS_FILE).stat().st_mode == (tmp_path / "ordinary").stat().st_mode


@pytest.mark.parametrize("error", [OSError("no space"), KeyboardInterrupt(), SystemExit()])
def test_error_while_writing_leaves_the_old_file_and_nothing_else(tmp_path, error):
    def write_half(temporary: Path) -> None:
        temporary.write_bytes(b"half")
        raise error

    path = tmp_path / ROWS_FILE
    path.write_bytes(b"old")
    with pytest.raises(type(error)):
        write_atomically(path, write_half)
    assert path.read_bytes() == b"old" and os.listdir(tmp_path) == [ROWS_FILE]


def test_saving_where_a_file_is_names_it(tmp_path):
    (tmp_path / "file").write_text("mine")
    with pytest.raises(
        PartialEmbeddingError, match=r"Cannot save to .*file: it is a file. Give the path of a folder."
    ):
        rows().save_pretrained(tmp_path / "file")
    with pytest.raises(OSError, match="file"):
        rows().save_pretrained(tmp_path / "file" / "below")
    assert (tmp_path / "file").read_text() == "mine"


def test_card_of_somebody_else_is_left_alone(tmp_path):
    (tmp_path / "README.md").write_text("# Mine\nlibrary_name: hf_partial_embed\n")
    rows().save_pretrained(tmp_path)
    assert (tmp_path / "README.md").read_text() == "# Mine\nlibrary_name: hf_partial_embed\n"


def test_card_is_written_anew_until_its_mark_is_taken_off(tmp_path):
    path = tmp_path / "README.md"
    rows(2).save_pretrained(tmp_path)
    rows(3).save_pretrained(tmp_path)
    assert "# 3 trained token embeddings" in path.read_text("utf-8")
    kept = "\n".join(line for line in path.read_text("utf-8").splitlines() if "Remove this line" not in line)
    path.write_text(kept, "utf-8")
    rows(4).save_pretrained(tmp_path)
    assert path.read_text("utf-8") == kept and len(TokenRows.from_pretrained(tmp_path)) == 4


# Damaged and hostile files


def metadata(**changes) -> dict[str, object]:
    """The metadata of two rows; `...` leaves an entry out."""
    token = dict.fromkeys(FLAGS, False)
    whole = {
        "format_version": FORMAT_VERSION,
        "tokens": [{"content": "<a>", **token}, {"content": "<b>", **token}],
        "token_ids": [300, 301],
        "base_model": "gpt2",
        "tied": True,
        **changes,
    }
    return {key: value for key, value in whole.items() if value is not ...}


def write(path: Path, metadata: object, **tensors: torch.Tensor) -> None:
    text = metadata if isinstance(metadata, str) else json.dumps(metadata)
    save_file(tensors or {"input_rows": torch.ones(2, 16)}, path, metadata={"hf_partial_embed": text})


def token(**changes) -> dict[str, object]:
    return {"content": "<a>", **dict.fromkeys(FLAGS, False), **changes}


HOSTILE_METADATA = {
    "no JSON": "{",
    "no object": "[]",
    "endless nesting": "[" * 100_000,
    "a number of 5,000 digits": '{"format_version": ' + "1" * 5_000 + "}",
    "no version": metadata(format_version=...),
    "version true": metadata(format_version=True),
    "version 0": metadata(format_version=0),
    "version 1.5": metadata(format_version=1.5),
    "newer version": metadata(format_version=FORMAT_VERSION + 1),
    "no tokens": metadata(tokens=...),
    "tokens of another type": metadata(tokens={"<a>": 0, "<b>": 1}),
    "tokens without flags": metadata(tokens=["<a>", "<b>"]),
    "too few tokens": metadata(tokens=[token()]),
    "too many tokens": metadata(tokens=[token(), token(content="b"), token(content="c")]),
    "duplicate tokens": metadata(tokens=[token(), token(special=True)]),
    "empty token": metadata(tokens=[token(), token(content="")]),
    "token that is a number": metadata(tokens=[token(), token(content=5)]),
    "half of a surrogate pair": metadata(tokens=[token(), token(content="\ud800")]),
    "flag that is no bool": metadata(tokens=[token(), token(content="b", special=1)]),
    "no ids": metadata(token_ids=...),
    "negative id": metadata(token_ids=[300, -1]),
    "id that is a fraction": metadata(token_ids=[300, 301.0]),
    "id that is a bool": metadata(token_ids=[True, 301]),
    "duplicate ids": metadata(token_ids=[300, 300]),
    "no rows at all": metadata(tokens=[], token_ids=[]),
    "base model that is a number": metadata(base_model=5),
    "base model with half of a surrogate pair": metadata(base_model="\udfff"),
    "no tie": metadata(tied=...),
    "tie that is no bool": metadata(tied="yes"),
}
HOSTILE_TENSORS = {
    "no input rows": {"output_rows": torch.ones(2, 16)},
    "one-dimensional rows": {"input_rows": torch.ones(2)},
    "three-dimensional rows": {"input_rows": torch.ones(2, 4, 4)},
    "scalar": {"input_rows": torch.tensor(1.0)},
    "too few rows": {"input_rows": torch.ones(1, 16)},
    "too many rows": {"input_rows": torch.ones(3, 16)},
    "rows of width 0": {"input_rows": torch.ones(2, 0)},
    "wider than the model": {"input_rows": torch.ones(2, 17)},
    "integers": {"input_rows": torch.ones(2, 16, dtype=torch.int64)},
    "bools": {"input_rows": torch.ones(2, 16, dtype=torch.bool)},
    "eight-bit floats": {"input_rows": torch.ones(2, 16).to(torch.float8_e4m3fn)},
    "complex numbers": {"input_rows": torch.ones(2, 16, dtype=torch.complex64)},
    "NaN": {"input_rows": torch.full((2, 16), float("nan"))},
    "infinity": {"input_rows": torch.cat([torch.ones(31), torch.tensor([float("-inf")])]).view(2, 16)},
    "two-dimensional bias": {"input_rows": torch.ones(2, 16), "output_bias": torch.ones(2, 1)},
    "NaN in a further table": {"input_rows": torch.ones(2, 16), "extra.x": torch.full((2, 1), float("nan"))},
    "too few rows of a further table": {"input_rows": torch.ones(2, 16), "extra.x": torch.ones(1, 1)},
    "tensor of another name": {"input_rows": torch.ones(2, 16), "weight": torch.ones(2, 16)},
    "name that is a path": {"input_rows": torch.ones(2, 16), "../../../etc/passwd": torch.ones(2, 16)},
}


class Bomb:
    """Unpickling it makes a file."""

    def __init__(self, path: Path) -> None:
        self.path = str(path)

    def __reduce__(self):
        return open, (self.path, "w")


def raw_files(folder: Path) -> dict[str, bytes]:
    header = json.dumps({"x": {"dtype": "F32", "shape": [2**62, 2**62], "data_offsets": [0, 8]}}).encode()
    overlap = {"dtype": "F32", "shape": [2, 16], "data_offsets": [0, 128]}
    twice = json.dumps({"input_rows": overlap, "output_rows": overlap}).encode()
    torch.save({"input_rows": torch.ones(2, 16), "bomb": Bomb(folder / "bomb")}, folder / "torch")
    return {
        "empty": b"",
        "zeros": bytes(1000),
        "text": b"version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 1\n",
        "header longer than the file": struct.pack("<Q", 10**6) + b"{}",
        "header longer than any memory": struct.pack("<Q", 2**63) + b"{}",
        "header that is no JSON": struct.pack("<Q", 2) + b"]{",
        "tensor of 2¹²⁴ numbers": struct.pack("<Q", len(header)) + header + bytes(8),
        "overlapping tensors": struct.pack("<Q", len(twice)) + twice + bytes(128),
        "other safetensors": save({"input_rows": torch.ones(2, 16)}),
        "other safetensors with metadata": save({"input_rows": torch.ones(2, 16)}, metadata={"format": "pt"}),
        "pickle": pickle.dumps(Bomb(folder / "bomb")),
        "torch.save": (folder / "torch").read_bytes(),
    }


RAW_FILES = [
    "empty", "zeros", "text", "header longer than the file", "header longer than any memory", "header that is no JSON",
    "tensor of 2¹²⁴ numbers", "overlapping tensors", "other safetensors", "other safetensors with metadata", "pickle",
    "torch.save",
]  # fmt: skip


@pytest.fixture(scope="module")
def attach_to_nothing():
    """Asserts that a row file is refused, and that model and tokenizer have not changed."""
    model, tokenizer = build_model(), bpe_tokenizer()
    before, vocabulary = snapshot(model), tokenizer.get_vocab()
    modules = [type(module) for module in model.modules()]

    def check(path: Path) -> PartialEmbeddingError:
        with pytest.raises(PartialEmbeddingError) as caught:
            load_tokens(model, tokenizer, path)
        assert tokenizer.get_vocab() == vocabulary
        assert [type(module) for module in model.modules()] == modules
        after = model.state_dict()
        assert after.keys() == before.keys() and all(torch.equal(after[name], before[name]) for name in before)
        return caught.value

    return check


def test_file_that_the_hostile_ones_are_made_from_is_good(tmp_path):
    write(tmp_path / ROWS_FILE, metadata())
    assert load_tokens(build_model(), bpe_tokenizer(), tmp_path).tokens == ["<a>", "<b>"]


@pytest.mark.parametrize("case", HOSTILE_METADATA)
def test_hostile_metadata_is_refused(attach_to_nothing, tmp_path, case):
    write(tmp_path / ROWS_FILE, HOSTILE_METADATA[case])
    assert ROWS_FILE in str(attach_to_nothing(tmp_path))


@pytest.mark.parametrize("case", HOSTILE_TENSORS)
def test_hostile_tensors_are_refused(attach_to_nothing, tmp_path, case):
    write(tmp_path / ROWS_FILE, metadata(), **HOSTILE_TENSORS[case])
    attach_to_nothing(tmp_path)


@pytest.mark.parametrize("case", RAW_FILES)
def test_file_of_another_kind_is_refused(attach_to_nothing, tmp_path, case):
    (tmp_path / ROWS_FILE).write_bytes(raw_files(tmp_path)[case])
    attach_to_nothing(tmp_path)
    assert not (tmp_path / "bomb").exists()


@pytest.mark.parametrize("ids", [[10**30, 5], [2**63, 5], [304, 305]])
def test_ids_outside_of_the_table_are_refused(attach_to_nothing, tmp_path, ids):
    write(tmp_path / ROWS_FILE, metadata(tokens=[], token_ids=ids))
    attach_to_nothing(tmp_path)


def test_name_of_a_table_never_becomes_a_path(tmp_path):
    write(tmp_path / "in", metadata(), **{"input_rows": torch.ones(2, 16), "extra.../x": torch.ones(2, 1)})
    loaded = TokenRows.from_pretrained(tmp_path / "in")
    loaded.save_pretrained(tmp_path / "out" / "rows")
    assert loaded.extra_rows.keys() == {"../x"} and os.listdir(tmp_path / "out") == ["rows"]


def test_message_says_what_a_newer_version_needs(tmp_path):
    write(tmp_path / ROWS_FILE, metadata(format_version=3))
    with pytest.raises(PartialEmbeddingError, match=r"format version 3; .* up to 2. Upgrade hf_partial_embed."):
        TokenRows.from_pretrained(tmp_path)


def test_message_says_how_a_whole_model_is_loaded(tmp_path):
    save_file({"x": torch.ones(1)}, tmp_path / ROWS_FILE)
    with pytest.raises(PartialEmbeddingError, match=r"no row file: .* A whole model is loaded with from_pretrained"):
        TokenRows.from_pretrained(tmp_path)


def test_message_names_shape_and_dtype(tmp_path):
    write(tmp_path / ROWS_FILE, metadata(), input_rows=torch.ones(3, 16, dtype=torch.int64))
    with pytest.raises(PartialEmbeddingError, match=r"'input_rows' has shape \(3, 16\) and dtype I64, .* 2 tokens"):
        TokenRows.from_pretrained(tmp_path)


def test_message_names_what_a_folder_without_rows_holds(tmp_path):
    (tmp_path / "model.safetensors").touch()
    with pytest.raises(PartialEmbeddingError, match=rf"has no {ROWS_FILE}; it holds \['model.safetensors'\]"):
        TokenRows.from_pretrained(tmp_path)


@pytest.fixture(scope="module")
def good_file(tmp_path_factory) -> bytes:
    path = tmp_path_factory.mktemp("good") / ROWS_FILE
    further = {"output_rows": torch.ones(2, 4), "output_bias": torch.ones(2), "extra_rows": {"x": torch.ones(2, 1)}}
    rows(2, 4, **further).save_file(path)
    return path.read_bytes()


def test_file_truncated_at_any_length_is_refused(good_file, tmp_path):
    path = tmp_path / ROWS_FILE
    path.write_bytes(good_file)
    for length in range(len(good_file) - 1, -1, -1):
        os.truncate(path, length)
        with pytest.raises(PartialEmbeddingError):
            read_rows(path)


def test_file_with_something_behind_its_end_is_refused(good_file, tmp_path):
    (tmp_path / ROWS_FILE).write_bytes(good_file + b"x")
    with pytest.raises(PartialEmbeddingError):
        read_rows(tmp_path / ROWS_FILE)


def test_mutated_file_is_refused_or_whole(good_file, tmp_path):
    path, chance = tmp_path / ROWS_FILE, random.Random(0)
    header = 8 + struct.unpack("<Q", good_file[:8])[0]
    refused = 0
    for _ in range(3000):
        data = bytearray(good_file)
        for _ in range(chance.choice([1, 1, 2, 5])):
            at = chance.randrange(chance.choice([header, len(data)]))
            printable = ord(chance.choice('0123456789"{}[],:\\-+.eE truefalsn'))
            data[at] = chance.choice([chance.randrange(256), data[at] ^ (1 << chance.randrange(8)), printable])
        path.write_bytes(data)
        try:
            loaded = TokenRows.from_pretrained(path)
        except PartialEmbeddingError:
            refused += 1
        else:
            assert len(loaded.input_rows) == len(set(loaded.tokens)) == 2
            assert all(tensor.isfinite().all() and len(tensor) == 2 for tensor in loaded.tensors().values())
    assert 1000 < refused < 3000
