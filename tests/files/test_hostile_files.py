"""Row files of strangers: tens of thousands of damaged and hostile ones, of which each is refused or right.

The default run reads a few thousand; with

    pytest -m slow tests/files/test_hostile_files.py

it is 30,000. They are read in a process of its own, in which every import of a pickled name, every execution or
compilation of code, every process, connection and library is an error (Python's audit events tell of them).
"""

from __future__ import annotations

import json
import math
import os
import random
import re
import struct
import sys
import time
import unicodedata
from contextlib import suppress
from pathlib import Path

import pytest
import torch
import yaml
from cards import as_text, listed
from conftest import bpe_tokenizer, build_model, snapshot
from processes import posix, results_of, rows, run_forked
from quick import quick

from hf_partial_embed import PartialEmbeddingError, TokenRows, load_tokens
from hf_partial_embed.cli.main import main
from hf_partial_embed.files.hub import merged_card, rows_card
from hf_partial_embed.files.rows_file import ROWS_FILE

SIZES = {"F64": 8, "F32": 4, "F16": 2, "BF16": 2}
DTYPES = [*SIZES, "I64", "I32", "U8", "BOOL", "F8_E4M3", "C64", "F4", "f32", "", "F32\x1b[2J"]
NASTY = [
    "", "\x00", "\x1b[2J\x1b[31m", "../../../etc/passwd", "/etc/passwd", "C:\\x", "\u202e\u200b\x9b", "a\nb\r\n---\n",
    "<script>alert(1)</script>", "[x](javascript:alert(1))", "| a | b |", "`code`", "${jndi:ldap://x}", "{{7*7}}",
    "!!python/object/apply:os.system [id]", "__import__('os').system('id')", "\ud800", "x" * 100_000, "%s%n", "é" * 99,
]  # fmt: skip
JUNK = [
    None, True, False, 0, -1, 1.5, 2**31, 2**63, 2**64, 10**40, 1e308, float("inf"), float("nan"), "", "x", [], {},
    [[]], {"": None}, [None], *NASTY,
]  # fmt: skip
# What nobody who reads a row file has reason to do.
FORBIDDEN = {
    "pickle.find_class", "exec", "compile", "os.system", "os.exec", "os.posix_spawn", "subprocess.Popen",
    "socket.connect", "socket.getaddrinfo", "ctypes.dlopen", "code.__new__", "marshal.loads", "shutil.rmtree",
}  # fmt: skip


class Hostile:
    """Makes row files that have something wrong with them, most of them only a little."""

    def __init__(self, seed: int) -> None:
        self.chance = random.Random(seed)

    def file(self) -> tuple[str, bytes]:
        """The kind of a file, and its bytes."""
        kind = self.chance.choice(["metadata", "tensors", "values", "header", "bytes", "cut", "long", "names", "many"])
        header, data = self._parts(self.chance.choice([1, 2, 2, 3]))
        getattr(self, f"_spoil_{kind}")(header, data)
        if kind == "many":
            self._many(header, data)
        text = json.dumps(header, ensure_ascii=self.chance.random() < 0.5).encode("utf-8", "surrogatepass")
        length = len(text)
        if kind == "long":
            length = self.chance.choice([length + 1, length * 2, 10**6, 2**26, 2**27, 2**31, 2**63, 2**64 - 1, 0, 1])
        if kind == "header":
            text = self._spoil_text(text)
            length = self.chance.choice([length, len(text)])
        whole = bytearray(struct.pack("<Q", length) + text + bytes(data))
        if kind == "bytes":
            for _ in range(self.chance.choice([1, 1, 2, 8])):
                at = self.chance.randrange(self.chance.choice([8, len(text) + 8, len(whole)]))
                whole[at] = self.chance.choice(
                    [whole[at] ^ (1 << self.chance.randrange(8)), self.chance.randrange(256)]
                )
        if kind == "cut":
            change = self.chance.choice([-1, 1]) * self.chance.choice([1, 4, 8, 100])
            whole = whole[:change] if change < 0 else whole + bytes(change)
        return kind, bytes(whole)

    def _parts(self, count: int) -> tuple[dict, bytearray]:
        """The header and the data of a good file."""
        flags = dict.fromkeys(("special", "lstrip", "rstrip", "single_word", "normalized"), False)
        metadata = {
            "format_version": 1,
            "tokens": [{"content": f"<{number}>", **flags} for number in range(count)],
            "token_ids": [300 + number for number in range(count)],
            "base_model": "gpt2",
            "tied": self.chance.random() < 0.5,
        }
        header: dict = {"__metadata__": {"hf_partial_embed": metadata}}
        data = bytearray()
        for name, shape in (
            ("input_rows", [count, 16]),
            ("output_rows", [count, 16]),
            ("output_bias", [count]),
            ("extra.x", [count, 3]),
        ):
            if name == "input_rows" or self.chance.random() < 0.3:
                dtype = self.chance.choice(list(SIZES))
                size = math.prod(shape) * SIZES[dtype]
                header[name] = {"dtype": dtype, "shape": shape, "data_offsets": [len(data), len(data) + size]}
                data += bytes(size)
        header["__metadata__"]["hf_partial_embed"] = json.dumps(metadata)
        return header, data

    def _metadata(self, header: dict, change) -> None:
        metadata = json.loads(header["__metadata__"]["hf_partial_embed"])
        metadata = change(metadata)
        header["__metadata__"]["hf_partial_embed"] = json.dumps(metadata)

    def _spoil_value(self, value):
        """A JSON value with junk somewhere in it."""
        if isinstance(value, (dict, list)) and value and self.chance.random() < 0.85:
            key = self.chance.choice(list(value) if isinstance(value, dict) else range(len(value)))
            what = self.chance.random()
            if what < 0.1:
                value = value.copy()
                del value[key]
            elif what < 0.2 and isinstance(value, list):
                value = [*value, value[key]]
            elif what < 0.25 and isinstance(value, dict):
                value = {**value, self.chance.choice(NASTY): value[key]}
            else:
                value = value.copy()
                value[key] = self._spoil_value(value[key])
            return value
        return self.chance.choice(JUNK)

    def _spoil_metadata(self, header: dict, data: bytearray) -> None:
        if self.chance.random() < 0.1:
            deep = self.chance.choice([10, 1000, 100_000])
            header["__metadata__"]["hf_partial_embed"] = self.chance.choice(["[" * deep, '{"a":' * deep, "1" * deep])
        else:
            self._metadata(header, self._spoil_value)

    def _spoil_tensors(self, header: dict, data: bytearray) -> None:
        entry = header[self.chance.choice([name for name in header if name != "__metadata__"])]
        what = self.chance.choice(["dtype", "shape", "offsets"])
        if what == "dtype":
            entry["dtype"] = self.chance.choice(DTYPES)
        elif what == "shape":
            sizes = [0, 1, 2, 3, 5, 16, 2**20, 2**32, 2**62, 2**64, -1, 1.5]
            entry["shape"] = [self.chance.choice(sizes) for _ in range(self.chance.choice([0, 1, 2, 3, 64]))]
        else:
            entry["data_offsets"] = [
                self.chance.choice([0, 1, 8, len(data), 2**40, 2**64, -1])
                for _ in range(self.chance.choice([1, 2, 2, 2, 3]))
            ]

    def _spoil_values(self, header: dict, data: bytearray) -> None:
        entry = header[self.chance.choice([name for name in header if name != "__metadata__"])]
        at, size = entry["data_offsets"][0], SIZES[entry["dtype"]]
        place = at + size * self.chance.randrange(math.prod(entry["shape"]))
        bad = {"F64": b"\0\0\0\0\0\0\xf0\x7f", "F32": b"\0\0\xc0\x7f", "F16": b"\0\xfc", "BF16": b"\x80\xff"}
        data[place : place + size] = bad[entry["dtype"]]

    def _spoil_names(self, header: dict, data: bytearray) -> None:
        name = self.chance.choice([name for name in header if name != "__metadata__"])
        header[self.chance.choice(["", "extra.", "input_rows."]) + self.chance.choice(NASTY)] = header.pop(name)

    def _many(self, header: dict, data: bytearray) -> None:
        """Many more tokens than rows, or rows than bytes."""
        count = self.chance.choice([1000, 10_000])
        if self.chance.random() < 0.5:
            self._metadata(header, lambda metadata: {**metadata, "token_ids": list(range(count))})
        else:
            self._metadata(header, lambda metadata: {**metadata, "tokens": [], "token_ids": list(range(count))})
            header["input_rows"] = {"dtype": "F32", "shape": [count, 2**30], "data_offsets": [0, len(data)]}

    def _spoil_text(self, text: bytes) -> bytes:
        at = self.chance.randrange(len(text))
        piece = self.chance.choice(
            [b"{", b"}", b"[" * 1000, b'"', b",", b"\x00", b"\xff", b"NaN", b"1e999", b'"a":' * 99]
        )
        return text[:at] + piece + text[at + self.chance.choice([0, 1, 9]) :]

    def _spoil_header(self, header: dict, data: bytearray) -> None:
        """Done on its text."""

    _spoil_bytes = _spoil_cut = _spoil_long = _spoil_many = _spoil_header


def assert_right(loaded: TokenRows) -> None:
    count = len(loaded.token_ids)
    assert count > 0 and len(loaded.tokens) in (0, count)
    assert len(set(loaded.token_ids)) == count and all(type(i) is int and i >= 0 for i in loaded.token_ids)
    assert len(set(loaded.tokens)) == len(loaded.tokens) and all(loaded.tokens)
    assert all(text.encode("utf-8") for text in loaded.tokens)
    for tensor in loaded.tensors().values():
        assert len(tensor) == count and tensor.is_floating_point() and tensor.isfinite().all() and tensor.numel()


def read_hostile_files(folder: str, count: int) -> dict[str, object]:
    """In a fork: read files; returns what happened, by kind of file."""
    import resource  # POSIX only

    model, tokenizer = build_model(), bpe_tokenizer()
    before, vocabulary, classes = snapshot(model), tokenizer.get_vocab(), [type(part) for part in model.modules()]
    path, hostile = Path(folder, ROWS_FILE), Hostile(count)
    rows(2, 16, tied=True).save_pretrained(folder)
    load_tokens(model, tokenizer, folder).detach()  # whatever is imported on first use
    for _ in range(200):
        path.write_bytes(hostile.file()[1])
        with suppress(PartialEmbeddingError):
            TokenRows.from_pretrained(path)
    "\x00".encode("unicode_escape")
    watching, seen = True, []

    def audit(event: str, arguments: tuple) -> None:
        if watching and event in FORBIDDEN:
            seen.append((event, repr(arguments)[:200]))

    sys.addaudithook(audit)
    eval("1")
    assert [event for event, _ in seen] == ["compile", "exec"]
    seen.clear()
    peak, slowest, results = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss, 0.0, {}
    attached = 0
    for number in range(count):
        kind, data = hostile.file()
        path.write_bytes(data)
        start = time.perf_counter()
        try:
            loaded = TokenRows.from_pretrained(folder)
            outcome = "right"
        except PartialEmbeddingError as error:
            outcome, text = "refused", str(error)
            assert len(text) < 2000, (kind, len(text), text[:200])
            assert text.isprintable(), (kind, text)
        slowest = max(slowest, time.perf_counter() - start)
        if outcome == "right":
            assert_right(loaded)
            if number % 3 == 0:
                try:
                    load_tokens(model, tokenizer, folder).detach()
                    attached += 1
                except PartialEmbeddingError as error:
                    assert str(error).isprintable(), str(error)
        results[kind, outcome] = results.get((kind, outcome), 0) + 1
    watching = False
    assert not seen, seen[:5]
    after = model.state_dict()
    assert after.keys() == before.keys() and all(torch.equal(after[name], before[name]) for name in before)
    assert tokenizer.get_vocab() == vocabulary and [type(part) for part in model.modules()] == classes
    assert sorted(os.listdir(folder)) == ["README.md", ROWS_FILE]
    grown = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - peak
    return {"results": results, "MiB": grown / 1024, "slowest": slowest, "attached": attached}


@posix
@pytest.mark.parametrize("count", [1000, pytest.param(30_000, marks=pytest.mark.slow)])
def test_hostile_file_is_refused_or_right(elsewhere, tmp_path, count):
    found = elsewhere(results_of, read_hostile_files, str(tmp_path), count)
    print(found)
    results = found["results"]
    assert sum(results.values()) == count
    kinds = {kind for kind, _ in results}
    assert len(kinds) == 9 and all(results.get((kind, "refused"), 0) for kind in kinds)
    assert not any(results.get((kind, "right"), 0) for kind in ("values", "cut", "many", "long"))
    assert results["metadata", "right"] > count // 500 and found["attached"] > 5
    assert found["MiB"] < 100 and found["slowest"] < 2


def read_large_header(folder: str, kind: str) -> None:
    """In a fork with little memory: a header of 30 MB that is all there."""
    import resource  # POSIX only

    size = 30 << 20
    header = {
        "tensors": b'{"__metadata__":{"hf_partial_embed":"{}"}'
        + b"".join(b',"%d":{"dtype":"F32","shape":[0],"data_offsets":[0,0]}' % number for number in range(size // 60))
        + b"}",
        "metadata": json.dumps({"__metadata__": {"hf_partial_embed": "[" * (size // 2)}}).encode(),
        "ids": json.dumps(
            {"__metadata__": {"hf_partial_embed": json.dumps({"token_ids": list(range(size // 10))})}}
        ).encode(),
        "spaces": b"{" + b" " * size + b"}",
    }[kind]
    Path(folder, ROWS_FILE).write_bytes(struct.pack("<Q", len(header)) + header)
    used = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
    resource.setrlimit(resource.RLIMIT_AS, (used + (1 << 30), resource.RLIM_INFINITY))
    start = time.perf_counter()
    with pytest.raises(PartialEmbeddingError) as caught:
        TokenRows.from_pretrained(folder)
    assert time.perf_counter() - start < 20 and len(str(caught.value)) < 2000


@posix
@pytest.mark.skipif(not os.path.exists("/proc/self/statm"), reason="needs /proc")
@pytest.mark.parametrize("kind", quick(["tensors", "metadata", "ids", "spaces"], lambda kind: kind != "tensors"))
def test_large_header_takes_little_memory_and_time(elsewhere, tmp_path, kind):
    assert elsewhere(run_forked, read_large_header, str(tmp_path), kind) == 0


# Texts of strangers, where they are shown


def odd_texts(count: int) -> list[str]:
    chance = random.Random(5)
    pieces = (
        [text for text in NASTY if text and len(text) < 1000 and text.isascii()]
        + list("*_`[]()<>&|#!~-+.\\\"'{}$@:\n\t\r ")
        + ["\u202e", "\u200b", "\x85", "\u2028", "ﷺ", "e\u0301"]
    )
    made = {"".join(chance.choices(pieces, k=chance.randint(1, 6))) for _ in range(count)}
    return sorted(made)


def test_tokens_of_strangers_are_text_in_a_card():
    markdown = pytest.importorskip("markdown_it").MarkdownIt("commonmark", {"linkify": False}).enable("table")
    texts = odd_texts(1500)
    for start in range(0, len(texts), 100):
        tokens = texts[start : start + 100]
        for card in (
            rows_card(tokens, {"input_rows": (len(tokens), 4)}, base_model=tokens[0], repo_id="me/x", file_bytes=1),
            merged_card(tokens, base_model=tokens[-1], repo_id="me/x", model_class="LlamaForCausalLM"),
        ):
            assert listed(card.text) == [as_text(token) for token in tokens]
            page = markdown.render(card.text)
            assert set(re.findall(r"<(\w+)", page)) <= {
                "h1", "h2", "p", "code", "pre", "ul", "li", "table", "thead", "tbody", "tr", "th", "td"
            }  # fmt: skip
            assert page.count("<li>") == len(tokens) and page.count("<h1>") == 1


@pytest.mark.parametrize("name", ["null", "true", "1e5", "0x1F", "~", "2020-01-01", "a/b", "yes", "é/ü", "1", "-"])
def test_front_matter_of_a_card_says_the_name_of_the_base_model_and_nothing_else(name):
    card = rows_card(["<a>"], {"input_rows": (1, 4)}, base_model=name, repo_id="me/x", file_bytes=1)
    front = yaml.safe_load(card.content.split("---\n")[1])
    assert front.get("base_model", name) == name and set(front) <= {
        "base_model", "base_model_relation", "library_name", "tags"
    }  # fmt: skip


def test_names_of_extra_tables_are_text_in_a_card(tmp_path):
    markdown = pytest.importorskip("markdown_it").MarkdownIt("commonmark", {"linkify": False}).enable("table")
    for number, name in enumerate([text for text in NASTY if text and "\ud800" not in text]):
        folder = tmp_path / str(number)
        rows(1, 4, extra_rows={name: torch.ones(1, 2)}).save_pretrained(folder)
        TokenRows.from_pretrained(folder).save_pretrained(folder)
        page = markdown.render((folder / "README.md").read_text("utf-8").split("---\n", 2)[2])
        assert "<script" not in page and "href=" not in page and page.count("<h1>") == 1, name
        assert page.count("<tr>") == 3, name


def test_what_the_command_prints_of_strangers_is_printable(tmp_path, capsys):
    texts = list({unicodedata.normalize("NFC", text): text for text in odd_texts(300)}.values())
    options = {"base_model": "x\x1b[2J\n\u202e", "extra_rows": {"\x1b[2J\n": torch.ones(len(texts), 1)}}
    TokenRows(tokens=texts, input_rows=torch.ones(len(texts), 4), **options).save_pretrained(tmp_path)
    for arguments in ([], ["--json"]):
        assert main(["info", str(tmp_path), *arguments]) == 0
        out, error = capsys.readouterr()
        shown = out + error
        if arguments:
            assert json.loads(out)["base_model"] == options["base_model"] and shown.isascii()
        assert all(line.isprintable() for line in shown.split("\n"))
        assert arguments or len(shown.split("\n")) == 57  # no line that a name has made
