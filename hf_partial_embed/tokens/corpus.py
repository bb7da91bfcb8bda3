"""A corpus as a fast tokenizer's model meets it: distinct pre-tokens with their counts, and the pieces of each."""

from __future__ import annotations

import copy
import json
import re
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from typing import Any

from tokenizers import Regex, Tokenizer, models, pre_tokenizers
from tqdm.auto import tqdm  # type: ignore[import-untyped]

from ..errors import PartialEmbeddingError
from .backend import changed_copy
from .pieces import Piece
from .planners import KINDS
from .spelling import Spelling
from .vocabulary import plain_tokenizer

__all__ = ["Reader"]

_BATCH = 1 << 20  # characters handed to the backend at once
_WORD_CUT = r"▁?[\p{L}\p{M}]+|▁?[^\p{L}\p{M}▁]+|▁+"  # a word, or what stands between words
_SPACE_CUT = r"\n+|▁*[^▁\n]+|▁+"  # a word with the spaces before it
_BYTE = re.compile(r"<0x[0-9A-F]{2}>")
_STEM = "\ue000"  # a word of one character that no text has


class Reader:
    """What choosing tokens needs to know of a fast tokenizer, which it does not change.

    Attributes:
        kind: `"BPE"`, `"Unigram"` or `"WordPiece"`.
        ignore_merges: whether a whole pre-token in the vocabulary is taken as it is, whatever the merges.
        num_ids: the first id behind those of the vocabulary.

    Raises:
        `PartialEmbeddingError`: a tokenizer without a fast backend, or one whose pieces are not plain texts.
    """

    def __init__(self, tokenizer: Any) -> None:
        backend = _backend(tokenizer)
        self._backend, model = backend, backend.model
        self._spelling = Spelling(backend)
        self.kind = type(model).__name__
        if self.kind not in ("BPE", "Unigram", "WordPiece"):
            raise PartialEmbeddingError(
                f"Tokens can be chosen for BPE, Unigram and WordPiece tokenizers, but this one is {self.kind}. Take "
                'frequent words of the texts yourself, and add them with add_tokens(..., entry="added").'
            )
        marks = [getattr(model, name, None) for name in ("continuing_subword_prefix", "end_of_word_suffix")]
        if self.kind == "BPE" and any(marks):
            raise PartialEmbeddingError(
                f"This BPE tokenizer marks where a piece stands in its word ({next(filter(None, marks))!r}), so the "
                "text of a token does not say which piece it would be. Take frequent words of the texts yourself, "
                'and add them with add_tokens(..., entry="added").'
            )
        self.ignore_merges = self.kind == "BPE" and bool(getattr(model, "ignore_merges", False))
        if getattr(model, "dropout", None):
            model = copy.deepcopy(model)  # the same text would be read differently each time
            model.dropout = None
        self._segmenter = Tokenizer(model)
        self._byte_fallback = bool(getattr(model, "byte_fallback", False))
        unknown = getattr(model, "unk_token", None)
        if self.kind == "Unigram":
            unknown = json.loads(model.__getstate__())["unk_id"]
            unknown = None if unknown is None else self._segmenter.id_to_token(unknown)
        self._unknown = unknown
        self.num_ids = 1 + max(self._segmenter.get_vocab().values())
        self._stem: Any = None
        self._counter = self._make_counter()

    def _make_counter(self) -> Tokenizer:
        """A tokenizer that reads each pre-token as one token with the pre-token's own text.

        So the backend itself cuts out added tokens, normalises and pre-tokenises, in parallel. The text of an unknown
        piece is what Unigram keeps and the other models do not.
        """
        backend, pre_tokenizer = self._backend, self._backend.pre_tokenizer
        counter = Tokenizer(models.Unigram([("\ue000 no piece \ue000", 0.0)], 0, False))
        cut = _WORD_CUT if self.kind == "Unigram" else None
        if cut is None and len(self._spelling.pre_tokens("a a")) == 1:
            # Else whole texts would be the pre-tokens, no two of them the same. No piece reaches over these borders.
            cut = _SPACE_CUT
        if cut is not None:
            split = pre_tokenizers.Split(Regex(cut), "isolated")
            pre_tokenizer = split if pre_tokenizer is None else pre_tokenizers.Sequence([pre_tokenizer, split])
        if backend.normalizer is not None:
            counter.normalizer = backend.normalizer
        if pre_tokenizer is not None:
            counter.pre_tokenizer = pre_tokenizer
        added = backend.get_added_tokens_decoder().values()
        # In one call each: every call builds the search for all of them anew.
        counter.add_special_tokens([token for token in added if token.special])
        counter.add_tokens([token for token in added if not token.special])
        return counter

    def count(self, texts: Iterable[str], *, progress: bool = False) -> dict[str, int]:
        """How often each pre-token occurs; added tokens are left out. Texts are read once, in batches.

        Raises:
            `PartialEmbeddingError`: texts that are no iterable of `str`, or hold no pre-token at all.
        """
        counts: Counter[str] = Counter()
        given = 0
        with tqdm(desc="counting", unit=" texts", disable=not progress, delay=1) as bar:
            for batch in _batches(texts):
                try:
                    encodings = self._counter.encode_batch(batch, add_special_tokens=False)
                except (TypeError, UnicodeEncodeError) as error:
                    raise PartialEmbeddingError(
                        "A text is no valid Unicode: it has a lone surrogate, which no tokenizer reads. Decode the "
                        "bytes that it came from with errors='replace', or leave it out."
                    ) from error
                for encoding in encodings:
                    tokens, ids = encoding.tokens, encoding.ids
                    counts.update(
                        (token for token, number in zip(tokens, ids, strict=True) if not number)
                        if any(ids)
                        else tokens
                    )
                given += len(batch)
                bar.update(len(batch))
        if not counts:
            raise PartialEmbeddingError(
                f"The texts hold nothing to choose tokens from: {given} texts were given, with no text beside the "
                "tokenizer's added tokens. Texts that were read once (a generator, an open file) are empty the second "
                "time."
            )
        return dict(counts)

    def segment(self, pre_tokens: Sequence[str], pieces: Sequence[Piece] = ()) -> list[list[int]]:
        """The ids that the model reads each pre-token as.

        Args:
            pre_tokens: any number of them.
            pieces: further pieces that the model is to have, with ids behind all others, in this order.
        """
        return _ids(self._with(pieces) if pieces else self._segmenter, pre_tokens)

    def lengths_behind_a_word(self, rests: Sequence[str]) -> list[int]:
        """In how many pieces WordPiece reads a whole word of its vocabulary and what follows it in the same word."""
        if self._stem is None:
            self._stem = self._with([Piece(_STEM, _STEM)])
        return [len(ids) for ids in _ids(self._stem, [_STEM + rest for rest in rests])]

    def _with(self, pieces: Sequence[Piece]) -> Any:
        ids = {piece.spelling: self.num_ids + place for place, piece in enumerate(pieces)}
        enter = KINDS[self.kind].enter
        return changed_copy(self._segmenter, lambda state: enter(state["model"], pieces, ids, {}))

    def piece(self, token_id: int) -> str:
        """The text of an id, as the vocabulary writes it."""
        return str(self._segmenter.id_to_token(token_id))

    def token_id(self, piece: str) -> int | None:
        """The id of a piece of the vocabulary."""
        token_id: int | None = self._segmenter.token_to_id(piece)
        return token_id

    def is_known(self, piece: str) -> bool:
        """Whether there is such a piece, or an added token of this text."""
        return self._backend.token_to_id(piece) is not None

    def is_text(self, piece: str) -> bool:
        """Whether a piece stands for its own text: not for a single byte, nor for what is unknown."""
        return piece != self._unknown and not (self._byte_fallback and _BYTE.fullmatch(piece))

    def surface(self, piece: str) -> str | None:
        """The text that a piece stands for, `None` where a character is cut or the pre-tokenizer would cut it."""
        text = self._spelling.text_of(piece)
        return text if text is not None and len(self._spelling.pre_tokens(text)) == 1 else None


def _ids(backend: Any, pre_tokens: Sequence[str]) -> list[list[int]]:
    return [
        encoding.ids
        for start in range(0, len(pre_tokens), _BATCH >> 4)
        for encoding in backend.encode_batch_fast(
            list(pre_tokens[start : start + (_BATCH >> 4)]), add_special_tokens=False
        )
    ]


def _backend(tokenizer: Any) -> Any:
    if isinstance(tokenizer, Tokenizer):
        return tokenizer
    tokenizer = plain_tokenizer(tokenizer, needed=True)
    if not getattr(tokenizer, "is_fast", False):
        raise PartialEmbeddingError(
            f"{type(tokenizer).__name__} has no fast backend, which says how a text is cut into pre-tokens. Load it "
            "with AutoTokenizer.from_pretrained(..., use_fast=True), from a folder with a tokenizer.json."
        )
    return tokenizer._tokenizer


def _batches(texts: Iterable[str]) -> Iterator[list[str]]:
    if isinstance(texts, (str, bytes)) or not isinstance(texts, Iterable):
        shown = repr(texts if not isinstance(texts, (str, bytes)) else texts[:60])
        raise PartialEmbeddingError(
            f"texts must be an iterable of str, but got {shown} ({type(texts).__name__}). For one text pass [text], "
            "for a file the open file."
        )
    batch: list[str] = []
    size = 0
    for text in texts:
        if not isinstance(text, str):
            raise PartialEmbeddingError(
                f"Each text must be a str, but one is {str(text)[:60]!r} ({type(text).__name__}). Pass the column "
                "that holds the text."
            )
        batch.append(text)
        size += len(text) + 64  # empty texts take room, too
        if size >= _BATCH:
            yield batch
            batch, size = [], 0
    if batch:
        yield batch
