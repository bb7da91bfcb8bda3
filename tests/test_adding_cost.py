"""What adding and loading tokens costs: counted passes over the texts and the tables, not seconds."""

from __future__ import annotations

import gc
import time
from collections import Counter

import pytest
import torch
from conftest import bpe_tokenizer, build_model
from hypothesis import given, settings
from hypothesis import strategies as st
from states import ALL_TOKENIZERS
from tokenizers import AddedToken
from transformers import PreTrainedTokenizerFast

from hf_partial_embed import PartialEmbeddingError, add_tokens, load_tokens
from hf_partial_embed.initializers import pieces as piece_means
from hf_partial_embed.layout import tables
from hf_partial_embed.modules.digest import digests_through, row_digests
from hf_partial_embed.tokens import vocabulary
from hf_partial_embed.tokens.entering import plan_again, plan_tokens
from hf_partial_embed.tokens.merges import BytePairs
from hf_partial_embed.tokens.vocabulary import encode_all, known_id, known_ids

WORDS = [f" {a}{b}{c}" for a in ("lan", "pra", "dys") for b in ("tha", "seo", "pro") for c in ("num", "dym", "sium")]
KINDS = {
    "special": ([f"<|{word.strip()}|>" for word in WORDS], {"special": True}),
    "added": (WORDS, {"entry": "added"}),
    "vocabulary": (WORDS, {"entry": "vocabulary"}),
}


class Counted:
    """How often each text is read by the backend, and how often pieces are planned and tables digested."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.texts: Counter[str] = Counter()
        self.calls: Counter[str] = Counter()
        read, plan, digest = vocabulary.read_by_backend, BytePairs.plan, tables.digests_through
        monkeypatch.setattr(vocabulary, "read_by_backend", lambda b, texts: self.texts.update(texts) or read(b, texts))
        monkeypatch.setattr(BytePairs, "plan", lambda p, wanted: self.calls.update(["plan"]) or plan(p, wanted))
        monkeypatch.setattr(tables, "digests_through", lambda *a: self.calls.update(["digest"]) or digest(*a))


@pytest.mark.parametrize("kind", KINDS)
def test_each_text_is_read_at_most_once_before_and_once_after(kind, tied, tmp_path, monkeypatch):
    tokens, options = KINDS[kind]
    counted = Counted(monkeypatch)
    tokenizer = bpe_tokenizer()
    add_tokens(build_model("llama", len(tokenizer), tied=tied), tokenizer, tokens, **options).save_pretrained(tmp_path)
    assert all(0 < counted.texts[token] <= 2 for token in tokens), counted.texts
    assert counted.calls == Counter(plan=kind == "vocabulary", digest=1 if tied else 2)  # each table once, in float32
    counted.texts.clear()
    counted.calls.clear()
    tokenizer = bpe_tokenizer()
    load_tokens(build_model("llama", len(tokenizer), tied=tied), tokenizer, tmp_path)
    assert all(counted.texts[token] <= 2 for token in tokens), counted.texts
    assert counted.calls == Counter(plan=kind == "vocabulary", digest=1 if tied else 2)


@pytest.mark.parametrize("running", [True, False])
def test_the_collector_waits_for_plans_and_not_for_initialisers(running, tmp_path, monkeypatch):
    seen: dict[str, bool] = {}
    plan = BytePairs.plan
    monkeypatch.setattr(BytePairs, "plan", lambda *a: seen.update(plan=gc.isenabled()) or plan(*a))

    def zeros(request):
        seen["init"] = gc.isenabled()
        return torch.zeros(len(request.tokens), *request.table.shape[1:])

    tokenizer, again = bpe_tokenizer(), bpe_tokenizer()
    model = build_model("llama", len(tokenizer))
    (gc.enable if running else gc.disable)()
    try:
        add_tokens(model, tokenizer, WORDS, entry="vocabulary", init=zeros).save_pretrained(tmp_path)
        assert seen == {"plan": False, "init": running}
        with pytest.raises(PartialEmbeddingError):
            add_tokens(model, tokenizer, WORDS, entry="vocabulary")
        assert gc.isenabled() == running
        load_tokens(build_model("llama", len(again)), again, tmp_path)
        assert gc.isenabled() == running
    finally:
        gc.enable()


TEXTS = st.lists(st.text(st.sampled_from("abelnps Ä中\n<>|\U0001f9ff"), max_size=12), max_size=6)


@pytest.mark.parametrize("family", ALL_TOKENIZERS)
@settings(max_examples=10, deadline=None)
@given(texts=TEXTS)
def test_texts_are_read_as_the_tokenizer_reads_them(family, texts):
    tokenizer = ALL_TOKENIZERS[family]()
    if tokenizer.is_fast:
        tokenizer._tokenizer.enable_truncation(3)
        tokenizer._tokenizer.enable_padding(length=9)
        tokenizer._tokenizer.encode_special_tokens = True
        before = tokenizer._tokenizer.to_str()
    read = encode_all(tokenizer, texts, unknown=True)
    if tokenizer.is_fast:
        assert tokenizer._tokenizer.to_str() == before
        assert tokenizer._tokenizer.encode_special_tokens
    options = {"add_special_tokens": False, "truncation": False, "padding": False, "split_special_tokens": False}
    assert read == (tokenizer(texts, **options)["input_ids"] if texts else [])
    assert known_ids(tokenizer, texts) == [known_id(tokenizer, text) for text in texts]


def test_a_tokenizer_that_does_more_than_its_backend_is_asked_itself():
    class Shouting(PreTrainedTokenizerFast):
        def _encode_plus(self, text, *args, **options):
            return super()._encode_plus([part.upper() for part in text], *args, **options)

    tokenizer = Shouting(tokenizer_object=bpe_tokenizer()._tokenizer, unk_token="<unk>")
    assert (
        encode_all(tokenizer, ["name"])
        == encode_all(bpe_tokenizer(), ["NAME"])
        != encode_all(bpe_tokenizer(), ["name"])
    )


@settings(max_examples=25, deadline=None)
@given(words=st.lists(st.text("abcdelmnoprst", min_size=2, max_size=9), min_size=1, max_size=12, unique=True))
def test_planning_planned_pieces_again_gives_the_same(words):
    tokenizer = bpe_tokenizer()
    tokens = [AddedToken(f" {word}", normalized=True) for word in words]
    new = [token for token in tokens if known_id(tokenizer, "Ġ" + token.content[1:]) is None]
    entering = plan_tokens(tokenizer, new, [True] * len(new), "auto")
    planned = sorted((piece for piece in entering.pieces if piece), key=lambda piece: piece.rank)
    assert plan_again(tokenizer, planned) == planned


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("shape", [(200, 24), (200,), (200, 3, 8)])
def test_means_of_many_are_bit_for_bit_those_of_each(dtype, shape, monkeypatch):
    monkeypatch.setattr(piece_means, "_NUMBERS", 300)  # several parts
    torch.manual_seed(0)
    table = torch.randn(shape).to(dtype)
    sequences = [torch.randint(0, 200, (1 + n % 7,)).tolist() for n in range(60)]
    request = type("Request", (), {"table": table})
    rows = piece_means._means(request, sequences)
    assert torch.equal(rows, torch.stack([table[ids].double().mean(0).float() for ids in sequences]))
    weights = [torch.rand(len(ids), dtype=torch.float64).tolist() for ids in sequences]
    for row, ids, shares in zip(piece_means._means(request, sequences, weights), sequences, weights, strict=True):
        share = torch.tensor(shares, dtype=torch.float64)
        assert torch.equal(row, (torch.tensordot(share, table[ids].double(), 1) / share.sum()).float())


@pytest.mark.parametrize("width", [1, 7, 64])
def test_digests_in_one_pass_are_those_of_each_cast(width):
    table = torch.randn(5000, width)
    ways = [[], [torch.bfloat16], [torch.float16], [torch.bfloat16, torch.float32]]
    for way, found in zip(ways, digests_through(table, ways), strict=True):
        cast = table
        for dtype in way:
            cast = cast.to(dtype)
        assert torch.equal(found, row_digests(cast))


@pytest.mark.slow
@pytest.mark.parametrize("kind", KINDS)
def test_time_is_linear_in_the_number_of_tokens(kind):
    """`pytest -m slow tests/test_adding_cost.py`: four times as many tokens take at most six times as long."""
    spent = {}
    for count in (4096, 16384):
        # Letters only: a pre-tokenizer cuts digits out of words.
        words = [f"q{number:05}z".translate(str.maketrans("0123456789", "abcdefghij")) for number in range(count)]
        tokens = [f"<|{word}|>" if kind == "special" else f" {word}" for word in words]
        tokenizer = bpe_tokenizer()
        model = build_model("llama", len(tokenizer))
        start = time.process_time()
        add_tokens(model, tokenizer, tokens, **KINDS[kind][1])
        spent[count] = time.process_time() - start
    assert spent[16384] < 6 * spent[4096], spent
