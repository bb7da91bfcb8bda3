"""Tokens that shorten a corpus most, chosen over a tokenizer as it is."""

from __future__ import annotations

import heapq
import logging
import math
import unicodedata
from bisect import bisect_left
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any

from tokenizers import Regex, pre_tokenizers
from tqdm.auto import tqdm  # type: ignore[import-untyped]

from ..errors import PartialEmbeddingError, shorten
from ..errors import count as counted
from .continued_bpe import Learned, Learner
from .corpus import Reader
from .pieces import Piece

__all__ = ["ChosenTokens", "choose_tokens"]

logger = logging.getLogger(__name__)

_SHOWN = 20


class ChosenTokens(list[str]):
    """Texts of tokens, best first, as `add_tokens` takes them; printed, it is a table.

    Each token's two parts are pieces of the base or stand before it in the list, unless `merges` has `None` for it.

    Attributes:
        pieces (`list[str]`): the tokens as the vocabulary writes them (`"Ġword"` for `" word"`).
        merges (`list[tuple[str, str] | None]`): the two pieces that each token joins, as the vocabulary writes them;
            `None` for a token that only a whole pre-token is read as.
        savings (`list[int]`): by how many tokens each one shortened the corpus, behind those before it.
        counts (`list[int]`): how often each one is used in the corpus when all of them are there. A token can be
            chosen for its own sake and then serve as a part of longer ones only: its count is then low, or 0.
        tokens_before, tokens_after (`int`): length of the corpus in tokens, added tokens in it left out.
        left_out (`dict[str, list[str]]`): words that were not chosen, although they save most, since words of the
            corpus that begin with them would become longer; and these words. Only WordPiece has such.
    """

    def __init__(
        self,
        tokens: Iterable[str],
        learned: list[Learned],
        counts: list[int],
        tokens_before: int,
        tokens_after: int,
        left_out: dict[str, list[str]],
    ) -> None:
        super().__init__(tokens)
        self.left_out = left_out
        self.merges = [entry.parts for entry in learned]
        self.savings = [entry.saved for entry in learned]
        self.counts = counts
        self.tokens_before, self.tokens_after = tokens_before, tokens_after
        self.pieces = [entry.piece for entry in learned]

    @property
    def saving(self) -> float:
        """The part of the corpus' tokens that is saved, between 0 and 1."""
        return 1 - self.tokens_after / self.tokens_before

    def measure(self, tokenizer: Any, texts: Iterable[str], *, progress: bool = False) -> dict[str, Any]:
        """What the tokens do to other texts, read by a copy of the base's model that has them.

        Args:
            tokenizer: the base tokenizer, without these tokens.
            texts: iterable of `str`, read once.
            progress: whether to show a bar on stderr.

        Returns:
            `dict` with `tokens_before`, `tokens_after`, `saving`, `longer`: the number of distinct pre-tokens that
            became longer (BPE: 0, a merge can only shorten), and `longer_words`: these, the most frequent first.

        Raises:
            `PartialEmbeddingError`: as `choose_tokens` does.
        """
        reader = Reader(tokenizer)
        pre_tokens = reader.count(texts, progress=progress)
        names = list(pre_tokens)
        before = after = 0
        longer = Counter[str]()
        now = reader.segment(names, _as_pieces(reader, self.pieces, self.merges))
        for name, old, new in zip(names, reader.segment(names), now, strict=True):
            before += len(old) * pre_tokens[name]
            after += len(new) * pre_tokens[name]
            if len(new) > len(old):
                longer[reader.surface(name) or name] += pre_tokens[name]
        return {
            "tokens_before": before,
            "tokens_after": after,
            "saving": 1 - after / before,
            "longer": len(longer),
            "longer_words": sorted(longer, key=lambda word: (-longer[word], word)),
        }

    def to_dict(self) -> dict[str, Any]:
        """All of it in plain values, for JSON."""
        return {
            "tokens_before": self.tokens_before,
            "tokens_after": self.tokens_after,
            "saving": self.saving,
            "tokens": [
                {"token": token, "saved": saved, "count": uses, "merge": None if parts is None else list(parts)}
                for token, saved, uses, parts in zip(self, self.savings, self.counts, self.merges, strict=True)
            ],
            "left_out": self.left_out,
        }

    def __str__(self) -> str:
        lines = [
            f"{counted(self, 'token')}: {self.tokens_before:,} tokens of the corpus become {self.tokens_after:,} "
            f"({-100 * self.saving:+.1f}%)",
            f"{'saved':>10}  {'used':>10}  token",
        ]
        rows = list(zip(self.savings, self.counts, self, strict=True))
        lines += [f"{saved:>10,}  {uses:>10,}  {token!r}" for saved, uses, token in rows[:_SHOWN]]
        if len(rows) > _SHOWN:
            lines.append(f"... {len(rows) - _SHOWN:,} more")
        if self.left_out:
            shown = shorten([f"{word} ({', '.join(longer[:3])})" for word, longer in self.left_out.items()])
            lines.append(
                f"left out {counted(list(self.left_out), 'word')}, since words of the corpus that begin with them "
                f"would become longer: {shown}"
            )
        return "\n".join(lines)


def choose_tokens(
    tokenizer: Any,
    texts: Iterable[str],
    count: int | None = None,
    *,
    saving: float | None = None,
    min_count: int = 2,
    whole_words: bool = False,
    script: str | None = None,
    leave_out: Iterable[str] = (),
    progress: bool = False,
) -> ChosenTokens:
    """Choose the tokens that shorten a corpus most when they join the tokenizer's vocabulary.

    For BPE the tokenizer's training goes on over its own pieces of the corpus: the pair of neighbours that occurs
    most becomes a token, and so on. Where the tokenizer takes a whole pre-token of its vocabulary whatever the merges
    (`ignore_merges`: Llama 3, Mistral Nemo), each step takes the better of a pair and a whole pre-token. For Unigram
    and WordPiece whole words are chosen by what they save. Every token is made of whole characters and of old tokens'
    texts or earlier new ones': pieces for single bytes (`<0x0A>`) are no part of any.

    For BPE the saving that is told for each token is what the corpus then saves, to the token. For the other kinds it
    counts words that stand alone. WordPiece cuts a whole word of its vocabulary off the longer words that begin with
    it, which can take more pieces then: a word that would do that to a word of the texts is left out.

    Args:
        tokenizer: a fast tokenizer, or a processor that has one. It does not change.
        texts: iterable of `str`, read once and in batches. Memory grows with the number of distinct pre-tokens, not
            with the length of the corpus. Added tokens in the texts are left out.
        count: how many tokens to choose, parts among them: each is one row.
        saving: stop when this part of the corpus' tokens is saved, e.g. `0.1`. With `count`, whichever comes first.
        min_count: how often a token must occur in the corpus when it is chosen.
        whole_words: only words of letters, whole, in the forms in which they stand in the texts. For BPE without
            `ignore_merges` a word of more than two pieces brings parts, which stand before it and count as rows.
        script: only letters of one script, by its Unicode name (`"Cyrillic"`, `"Greek"`, `"Han"`), with marks, and
            with a space in front.
        leave_out: texts that do not become tokens, as they would stand in the result (a word that occurs inside of a
            sentence mostly has its leading space).
        progress: whether to show a bar on stderr.

    Returns:
        `ChosenTokens`, a list of `str`, best first. The same corpus gives the same list, whatever the order of its
        texts.

    Raises:
        `PartialEmbeddingError`: neither `count` nor `saving`, or values out of range; an unknown script; texts that
            are a single `str` or hold no text; a corpus in which nothing that may become a token occurs `min_count`
            times; a tokenizer without a fast backend.
    """
    _check_options(count, saving, min_count)
    left_out = _left_out(leave_out)
    in_script = _script_test(script)
    reader = Reader(tokenizer)

    def accept(piece: str) -> bool:
        text = reader.surface(piece)
        return text is not None and text not in left_out and in_script(text)

    pre_tokens = reader.count(texts, progress=progress)
    learner = Learner(reader, pre_tokens, min_count, accept)
    limit = math.inf if count is None else count
    goal = 0 if saving is None else math.floor(learner.before * (1 - saving))
    left_out_words: dict[str, list[str]] = {}
    words_only = whole_words or reader.kind != "BPE"
    steps = _words(learner, reader, limit, left_out_words) if words_only else _steps(learner, reader)
    with tqdm(total=count, desc="choosing", unit=" tokens", disable=not progress, delay=1) as bar:
        while len(learner.learned) < limit and learner.tokens > goal and next(steps, False):
            bar.update(len(learner.learned) - bar.n)
    chosen = _result(learner, reader, left_out_words)
    _report_shortage(chosen, count, saving, min_count)
    return chosen


def _steps(learner: Learner, reader: Reader) -> Iterator[bool]:
    """Choose a token at each step: the best pair or, with `ignore_merges`, a whole pre-token that saves more."""
    wholes = _Wholes(learner, reader) if reader.ignore_merges else None
    while True:
        pair, word = learner.best_pair(), wholes.best() if wholes else None
        if word is not None and (pair is None or word[0] > pair[0]):
            learner.take_whole(word[1])
        elif pair is not None:
            learner.merge(pair[1])
        else:
            return
        yield True


class _Wholes:
    """Whole pre-tokens by what one row each would save."""

    def __init__(self, learner: Learner, reader: Reader, *, only_words: bool = False, chains: bool = False) -> None:
        self._learner, self._chains = learner, chains
        texts = ((word, name) for word, name in enumerate(learner.names) if learner.counts[word] >= learner.min_count)
        self._heap = [
            (-self._gain(word), name, word)
            for word, name in texts
            if len(learner.words[word]) > 1 and (not only_words or _is_word(reader.surface(name)))
        ]
        heapq.heapify(self._heap)

    def _gain(self, word: int) -> int:
        """Saved tokens by row; a chain of merges has as many rows as it saves tokens."""
        return self._learner.counts[word] * (1 if self._chains else len(self._learner.words[word]) - 1)

    def best(self) -> tuple[int, int] | None:
        """What the best one saves, and which it is; it stays where it is."""
        while self._heap:
            gain, name, word = self._heap[0]
            if len(self._learner.words[word]) == 1 or name in self._learner.ids or not self._learner.may_enter(name):
                heapq.heappop(self._heap)
            elif -gain != self._gain(word):
                heapq.heapreplace(self._heap, (-self._gain(word), name, word))
            else:
                return -gain, word
        return None

    def drop(self) -> None:
        heapq.heappop(self._heap)


class _Lengthened:
    """Words of a corpus that become longer when a word that they begin with comes into a WordPiece vocabulary.

    WordPiece takes the longest piece from the left, so the new word is cut off where it is longer than the piece that
    stands there now, and what follows is read from another place. That hangs on these two words alone, since no
    further piece for the inside of words comes in: the order of choosing is of no matter.
    """

    def __init__(self, learner: Learner, reader: Reader) -> None:
        self._learner, self._reader = learner, reader
        self._places = sorted(range(len(learner.names)), key=learner.names.__getitem__)
        self._names = [learner.names[place] for place in self._places]

    def by(self, word: str) -> list[str]:
        begin = bisect_left(self._names, word + "\0")
        end = bisect_left(self._names, word + "\U0010ffff", begin)
        longer = [
            (name, len(ids))
            for name, place in zip(self._names[begin:end], self._places[begin:end], strict=True)
            if len(first := self._learner.text((ids := self._learner.words[place])[0])) < len(word)
            and word.startswith(first)  # not where the whole is unknown
        ]
        lengths = self._reader.lengths_behind_a_word([name[len(word) :] for name, _ in longer]) if longer else []
        return [name for (name, now), then in zip(longer, lengths, strict=True) if then > now]


def _words(learner: Learner, reader: Reader, limit: float, left_out: dict[str, list[str]]) -> Iterator[bool]:
    """Choose a whole word at each step, with the parts that it needs; `left_out` gets those that do harm."""
    lengthened = _Lengthened(learner, reader) if reader.kind == "WordPiece" else None
    chains = reader.kind == "BPE" and not reader.ignore_merges
    wholes = _Wholes(learner, reader, only_words=True, chains=chains)
    while (best := wholes.best()) is not None:
        word = best[1]
        if reader.kind != "BPE":
            longer = lengthened.by(learner.names[word]) if lengthened else []
            if longer:
                left_out[learner.names[word]] = longer
                wholes.drop()
            elif not all(reader.is_text(learner.text(token_id)) for token_id in learner.words[word]):
                wholes.drop()
            else:
                learner.take_whole(word)
                yield True
            continue
        # A merge of two pieces costs no more than the word alone, and serves longer words, too.
        chain = learner.chain(word) if chains or len(learner.words[word]) == 2 else None
        if chain is None and not chains:
            learner.take_whole(word)
        elif chain is None or len(learner.learned) + len(chain) > limit:
            wholes.drop()
            continue
        else:
            for pair in chain:
                learner.merge(pair)
        yield True


def _is_word(text: str | None) -> bool:
    letters = (text or "").removeprefix(" ")
    return bool(letters) and all(char.isalpha() or unicodedata.category(char)[0] == "M" for char in letters)


def _as_pieces(reader: Reader, pieces: Sequence[str], merges: Sequence[tuple[str, str] | None]) -> list[Piece]:
    """Chosen tokens as the model's planner writes them into its vocabulary."""
    return [
        Piece(piece, piece, parts=parts or (), made_of=tuple(ids), merged=parts is not None)
        for piece, parts, ids in zip(pieces, merges, reader.segment(pieces), strict=True)
    ]


def _result(learner: Learner, reader: Reader, left_out: dict[str, list[str]]) -> ChosenTokens:
    learned, words, tokens = learner.learned, learner.words, learner.tokens
    uses = dict.fromkeys(learner.ids.values(), 0)
    if reader.kind != "BPE":  # what they do inside of other words is known by reading these
        pieces = _as_pieces(reader, [entry.piece for entry in learned], [entry.parts for entry in learned])
        words = reader.segment(learner.names, pieces)
        tokens = sum(count * len(ids) for count, ids in zip(learner.counts, words, strict=True))
        uses = dict.fromkeys(range(reader.num_ids, reader.num_ids + len(learned)), 0)
    for ids, times in zip(words, learner.counts, strict=True):
        for token_id in ids:
            if token_id in uses:
                uses[token_id] += times
    texts = [reader.surface(entry.piece) or entry.piece for entry in learned]
    return ChosenTokens(texts, learned, list(uses.values()), learner.before, tokens, left_out)


def _check_options(count: int | None, saving: float | None, min_count: int) -> None:
    if count is None and saving is None:
        raise PartialEmbeddingError(
            "How many tokens? Pass count=1000 for a number of rows, or saving=0.1 for as many as save a tenth."
        )
    for name, value in (("count", count), ("min_count", min_count)):
        if value is not None and (isinstance(value, bool) or not isinstance(value, int) or value < 1):
            raise PartialEmbeddingError(f"{name} must be an int of at least 1, but is {value!r}.")
    if saving is not None and not 0 < saving < 1:
        raise PartialEmbeddingError(
            f"saving must be a part of the corpus' tokens between 0 and 1, but is {saving!r}. For 10% pass 0.1."
        )


def _left_out(texts: Iterable[str]) -> set[str]:
    if isinstance(texts, str):
        raise PartialEmbeddingError(f"leave_out must be a list of texts, but got {texts!r}. Pass [{texts!r}].")
    return set(texts)


def _script_test(script: str | None) -> Callable[[str], bool]:
    if script is None:
        return lambda text: True
    if not script.replace("_", "").replace(" ", "").isalpha():
        raise PartialEmbeddingError(f"script must be the name of a Unicode script such as 'Cyrillic', got {script!r}.")
    try:
        # The backend's own regular expressions know all scripts, which Python's do not.
        pattern = Regex(rf"\A ?(?:\p{{{script}}}\p{{M}}*)+\z")
    except Exception as error:
        raise PartialEmbeddingError(
            f"There is no Unicode script {script!r}. Names are such as 'Cyrillic', 'Greek', 'Han', 'Arabic', 'Latin'."
        ) from error
    split = pre_tokenizers.Split(pattern, "removed")
    return lambda text: not split.pre_tokenize_str(text)


def _report_shortage(chosen: ChosenTokens, count: int | None, saving: float | None, min_count: int) -> None:
    if not chosen:
        raise PartialEmbeddingError(
            f"Nothing in the corpus ({chosen.tokens_before:,} tokens) can become a token: no pair of its pieces and "
            f"no word that the options allow occurs {min_count} times. Give more text, or a smaller min_count."
        )
    if saving is not None and chosen.saving < saving and (count is None or len(chosen) < count):
        logger.warning(
            "The corpus allows %s, which save %.1f%% of its tokens; %.1f%% were asked for.",
            counted(chosen, "token"), 100 * chosen.saving, 100 * saving,
        )  # fmt: skip
    elif saving is None and count is not None and len(chosen) < count:
        logger.warning(
            "The corpus allows %s; %d were asked for. No further one occurs %d times. The rarest: %s. Give more "
            "text, or a smaller min_count.",
            counted(chosen, "token"), count, min_count, shorten(chosen[-3:]),
        )  # fmt: skip
