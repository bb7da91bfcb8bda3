"""Pieces that come into a tokenizer's vocabulary: what each is made of, planned over what is there now.

A tokenizer's model is one of three kinds, and each has a planner:

- BPE (`BytePairs`): a piece is made by one merge of two neighbours, behind all merges that are there. A new merge
  joins two pieces that the old merges leave side by side, and what it makes is neither an old piece nor made by
  another merge; so no old merge finds anything that it did not find before, and taking a text's new pieces apart
  again gives the ids that it had. With `ignore_merges` a whole pre-token of the vocabulary needs no merge.
- Unigram (`ScoredPieces`): a piece has the sum of its pieces' scores and a hair more.
- WordPiece (`WholeWords`): a piece is a whole word.

Nothing here changes a tokenizer: see `entering`.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from itertools import pairwise
from typing import Any

from ..errors import PartialEmbeddingError
from .spelling import Spelling

__all__ = ["KINDS", "Piece", "Planner", "planner_of"]

_Symbol = tuple[str, tuple[int, ...]]  # a piece's spelling, and what it was read as before

_HAIR = 1e-3  # what a Unigram piece's score is above those of its pieces, for each of them but the first


@dataclass(frozen=True)
class Piece:
    """A piece of a vocabulary that is to come.

    Attributes:
        text: what it stands for in running text; its spelling where it is no whole characters.
        spelling: how the tokenizer's model has it.
        asked: whether it was asked for; the others are parts of those.
        parts: the spellings that it is made of, one below it: two where it is merged.
        made_of: the ids that it was read as before.
        merged: whether there is a merge for it (BPE).
        rank: its place in the order in which the pieces of its set come in, parts first.
    """

    text: str
    spelling: str
    asked: bool = True
    parts: tuple[str, ...] = ()
    made_of: tuple[int, ...] = ()
    merged: bool = False
    rank: int = 0


class Planner:
    """What is common to the kinds.

    Args:
        backend: the Rust object inside of a fast tokenizer, which is only read.
        spelling: its spelling.
    """

    kind: str

    def __init__(self, backend: Any, spelling: Spelling) -> None:
        self.backend, self.spelling, self.model = backend, spelling, backend.model

    def base(self, spelling: str) -> list[tuple[str, int]]:
        """The pieces, and their ids, that a spelling is read as now.

        Raises:
            `PartialEmbeddingError`: it has something unknown.
        """
        raise NotImplementedError

    def plan(self, wanted: Iterable[Piece]) -> tuple[list[Piece], dict[str, PartialEmbeddingError]]:
        """Plan pieces, of which text, spelling and `asked` are given, in the order in which they are to come in.

        Returns:
            The pieces with the parts that they need, each behind its parts; and by spelling the reasons for those
            that cannot come in.
        """
        raise NotImplementedError

    @staticmethod
    def enter(model: dict[str, Any], pieces: Sequence[Piece], ids: dict[str, int], pins: dict[str, int]) -> None:
        """Write pieces into the serialised model.

        Args:
            model: the model's part of the state.
            pieces: in the order of their ranks.
            ids: of each spelling.
            pins: added tokens that get a place in the vocabulary, at the id that they have. Without one, a state
                with ids behind theirs would be loaded with other ids for them.
        """
        raise NotImplementedError

    @staticmethod
    def leave(model: dict[str, Any], pieces: Sequence[Piece], pins: Iterable[str]) -> None:
        """The inverse of `enter`."""
        raise NotImplementedError

    def reads(self, text: str) -> bool:
        """Whether the model would find an added token's text, if that had a place in the vocabulary.

        It would come to the model where it is not cut out, as with `split_special_tokens`.
        """
        raise NotImplementedError

    def _taken(self, spelling: str) -> bool:
        return self.backend.token_to_id(spelling) is not None

    def _tokenized(self, spelling: str) -> list[tuple[str, int]]:
        return [(token.value, token.id) for token in self.model.tokenize(spelling)]

    def _simple(self, wanted: Iterable[Piece]) -> tuple[list[Piece], dict[str, PartialEmbeddingError]]:
        """A plan where no piece needs parts of its own."""
        made: list[Piece] = []
        refused = {}
        for piece in wanted:
            try:
                base = self.base(piece.spelling)
            except PartialEmbeddingError as error:
                refused[piece.spelling] = error
                continue
            parts, ids = tuple(part for part, _ in base), tuple(token_id for _, token_id in base)
            made.append(replace(piece, parts=parts, made_of=ids, merged=False, rank=len(made)))
        return made, refused


class BytePairs(Planner):
    """BPE: byte-level, with byte fallback, and with `ignore_merges`."""

    kind = "BPE"

    def __init__(self, backend: Any, spelling: Spelling) -> None:
        super().__init__(backend, spelling)
        self.whole_first = bool(self.model.ignore_merges)
        self._made: dict[str, Piece] = {}
        self._ranks: dict[tuple[str, str], int] = {}
        self._wanted: set[str] = set()
        self._journal: list[tuple[str, Piece | None]] = []
        self._next = 0
        if self.model.dropout:
            raise PartialEmbeddingError(
                f"The tokenizer leaves out merges at random (dropout={self.model.dropout}), so no piece of its "
                "vocabulary has a text of its own. Add the tokens with entry='added'."
            )
        mark = self.model.continuing_subword_prefix or self.model.end_of_word_suffix
        if mark:
            raise PartialEmbeddingError(
                f"The tokenizer's BPE marks the inside or the end of words with {mark!r}, for which merges are not "
                "planned here. Add the tokens with entry='added'."
            )

    def base(self, spelling: str) -> list[tuple[str, int]]:
        if not self.whole_first:
            return self._read(spelling)
        # What merges make of it, also where it would be looked up as a whole.
        self.model.ignore_merges = False
        try:
            return self._read(spelling)
        finally:
            self.model.ignore_merges = True

    def _read(self, spelling: str) -> list[tuple[str, int]]:
        tokens = self._tokenized(spelling)
        if "".join(value for value, _ in tokens) != spelling:
            raise PartialEmbeddingError(
                f"{self.spelling.text_of(spelling) or spelling!r} has characters that the tokenizer's BPE does not "
                f"know: it reads {[value for value, _ in tokens]}. Add it with entry='added'."
            )
        return tokens

    def plan(self, wanted: Iterable[Piece]) -> tuple[list[Piece], dict[str, PartialEmbeddingError]]:
        listed = list(wanted)
        self._made, self._ranks = {}, {}
        self._wanted = {piece.spelling for piece in listed}
        refused = {}
        for piece in listed:
            self._journal = []
            try:
                self._plan_one(piece)
            except PartialEmbeddingError as error:
                self._take_back()  # the parts that it would have needed
                refused[piece.spelling] = error
        asked = {piece.spelling: piece for piece in listed}
        pieces = [
            replace(piece, text=asked[piece.spelling].text, asked=asked[piece.spelling].asked, rank=rank)
            if piece.spelling in asked and piece.spelling not in refused
            else replace(piece, rank=rank)
            for rank, piece in enumerate(self._made.values())
        ]
        return pieces, refused

    def reads(self, text: str) -> bool:
        return text in self.spelling.pre_tokens(text) and (self.whole_first or len(text) == 1)

    def _plan_one(self, piece: Piece) -> None:
        if piece.spelling in self._made:
            return
        symbols = self._merged(self._symbols(piece.spelling))
        if self.whole_first and len(symbols) > 2 and self.spelling.is_whole(piece.text, piece.spelling):
            self._put(piece.spelling, symbols, merged=False)
            return
        while len(symbols) > 1:
            at = self._choose(symbols, piece)
            pair = symbols[at : at + 2]
            joined = self._put(pair[0][0] + pair[1][0], pair, merged=True)
            symbols = _join(symbols, (pair[0][0], pair[1][0]), (joined.spelling, joined.made_of))

    def _choose(self, symbols: list[_Symbol], piece: Piece) -> int:
        """Where two neighbours are to be merged: what they make must have no other way to come about."""
        best: tuple[tuple[bool, bool, int], int] | None = None
        for at, ((left, _), (right, _)) in enumerate(pairwise(symbols)):
            join = left + right
            made = self._made.get(join)
            if (made is None and self._taken(join)) or (made is not None and (made.merged or not self.whole_first)):
                continue
            # Rather something that is wanted anyway, and no half characters.
            key = (join not in self._wanted, self.spelling.text_of(join) is None, at)
            if best is None or key < best[0]:
                best = key, at
        if best is None:
            raise PartialEmbeddingError(
                f"{piece.text!r} is read as {[part for part, _ in symbols]}, and what any two of these neighbours make "
                "is a token already, which other merges make: a merge for it would change how other texts are read. "
                "Add it with entry='added'."
            )
        return best[1]

    def _take_back(self) -> None:
        for spelling, before in reversed(self._journal):
            piece = self._made.pop(spelling)
            if piece.merged:
                del self._ranks[piece.parts[0], piece.parts[1]]
            if before is not None:
                self._made[spelling] = before

    def _put(self, spelling: str, symbols: Sequence[_Symbol], *, merged: bool) -> Piece:
        # A whole pre-token that gets a merge later comes in with that.
        self._journal.append((spelling, self._made.pop(spelling, None)))
        text = self.spelling.text_of(spelling)
        piece = Piece(
            text=spelling if text is None else text,
            spelling=spelling,
            asked=False,
            parts=tuple(part for part, _ in symbols),
            made_of=tuple(token_id for _, ids in symbols for token_id in ids),
            merged=merged,
        )
        self._made[spelling] = piece
        if merged:
            self._ranks[symbols[0][0], symbols[1][0]] = self._next = self._next + 1
        return piece

    def _symbols(self, spelling: str) -> list[_Symbol]:
        """What the old merges leave; a character that there are bytes for only comes in as a symbol by itself."""
        if not self.model.byte_fallback:
            return [(part, (token_id,)) for part, token_id in self.base(spelling)]
        symbols: list[_Symbol] = []
        start = 0
        for end, letter in enumerate([*spelling, ""]):
            if letter and self.model.token_to_id(letter) is not None:
                continue
            if spelling[start:end]:
                symbols += [(part, (token_id,)) for part, token_id in self.base(spelling[start:end])]
            if letter:
                symbols.append(self._character(letter))
            start = end + 1
        return symbols

    def _character(self, letter: str) -> _Symbol:
        if letter not in self._made:
            tokens = self._tokenized(letter)
            if self._taken(letter) or not all(value.startswith("<0x") for value, _ in tokens):
                raise PartialEmbeddingError(
                    f"The tokenizer's BPE knows neither {letter!r} nor bytes for it. Add the token with entry='added'."
                )
            self._put(letter, [(value, (token_id,)) for value, token_id in tokens], merged=False)
        return letter, self._made[letter].made_of

    def _merged(self, symbols: list[_Symbol]) -> list[_Symbol]:
        """What the new merges, which come behind all old ones, make of symbols."""
        while True:
            ranks = [
                self._ranks.get((left, right), -1)
                for (left, _), (right, _) in pairwise(symbols)
            ]  # fmt: skip
            known = [rank for rank in ranks if rank >= 0]
            if not known:
                return symbols
            at = ranks.index(min(known))
            pair = (symbols[at][0], symbols[at + 1][0])
            symbols = _join(symbols, pair, (pair[0] + pair[1], self._made[pair[0] + pair[1]].made_of))

    @staticmethod
    def enter(model: dict[str, Any], pieces: Sequence[Piece], ids: dict[str, int], pins: dict[str, int]) -> None:
        model["vocab"].update(pins)
        model["vocab"].update(ids)
        model["merges"].extend(list(piece.parts) for piece in pieces if piece.merged)

    @staticmethod
    def leave(model: dict[str, Any], pieces: Sequence[Piece], pins: Iterable[str]) -> None:
        for spelling in [*(piece.spelling for piece in pieces), *pins]:
            model["vocab"].pop(spelling, None)
        gone = {piece.parts for piece in pieces if piece.merged}
        model["merges"] = [pair for pair in model["merges"] if tuple(pair) not in gone]


class ScoredPieces(Planner):
    """Unigram."""

    kind = "Unigram"

    def __init__(self, backend: Any, spelling: Spelling) -> None:
        super().__init__(backend, spelling)
        vocabulary = backend.get_vocab(False)
        single = {piece for piece in vocabulary if len(piece) == 1}
        markers = {token.content for token in backend.get_added_tokens_decoder().values()}
        loose = next((p for p in vocabulary if p not in markers and not single.issuperset(p)), None)
        if loose is not None:
            # Else the score of the unknown, which goes by the lowest of all pieces, decides how texts are read.
            raise PartialEmbeddingError(
                f"The tokenizer's Unigram has the piece {loose!r}, of which a character is no piece by itself, so a "
                "further piece can change how unknown text is read. Add the tokens with entry='added'."
            )

    def base(self, spelling: str) -> list[tuple[str, int]]:
        tokens = self._tokenized(spelling)
        unknown = [letter for letter in spelling if self.model.token_to_id(letter) is None]
        if unknown or "".join(value for value, _ in tokens) != spelling:
            raise PartialEmbeddingError(
                f"{self.spelling.text_of(spelling)!r} has characters that the tokenizer's Unigram does not know: "
                f"{unknown}. Add it with entry='added'."
            )
        return tokens

    def plan(self, wanted: Iterable[Piece]) -> tuple[list[Piece], dict[str, PartialEmbeddingError]]:
        return self._simple(wanted)

    def reads(self, text: str) -> bool:
        # Its score is below that of whatever else it can be read as, save for what is unknown.
        return any(self.model.token_to_id(letter) is None for letter in text)

    @staticmethod
    def enter(model: dict[str, Any], pieces: Sequence[Piece], ids: dict[str, int], pins: dict[str, int]) -> None:
        table = model["vocab"]
        scores = {token_id: score for token_id, (_, score) in enumerate(table)}
        by_id: dict[int, list[Any]] = {}
        for piece in pieces:
            score = sum(scores[token_id] for token_id in piece.made_of)
            by_id[ids[piece.spelling]] = [piece.spelling, score + _HAIR * (len(piece.made_of) - 1)]
        lowest = min(score for _, score in table)
        for text, token_id in pins.items():
            # Below whatever else it can be read as: an added token is not to be found by the model.
            by_id[token_id] = [text, min(lowest, 0.0) * (len(text) + 1) - 100.0]
        for token_id in sorted(by_id):
            assert token_id == len(table), (token_id, len(table))
            table.append(by_id[token_id])

    @staticmethod
    def leave(model: dict[str, Any], pieces: Sequence[Piece], pins: Iterable[str]) -> None:
        gone = {*(piece.spelling for piece in pieces), *pins}
        model["vocab"] = [entry for entry in model["vocab"] if entry[0] not in gone]


class WholeWords(Planner):
    """WordPiece."""

    kind = "WordPiece"

    def base(self, spelling: str) -> list[tuple[str, int]]:
        prefix = self.model.continuing_subword_prefix
        tokens = self._tokenized(spelling)
        if "".join(value.removeprefix(prefix) if at else value for at, (value, _) in enumerate(tokens)) != spelling:
            raise PartialEmbeddingError(
                f"{spelling!r} has something that the tokenizer's WordPiece does not know: it reads "
                f"{[value for value, _ in tokens]}. Add it with entry='added'."
            )
        return tokens

    def plan(self, wanted: Iterable[Piece]) -> tuple[list[Piece], dict[str, PartialEmbeddingError]]:
        listed = list(wanted)
        whole = [piece for piece in listed if self.spelling.is_whole(piece.text, piece.spelling)]
        made, refused = self._simple(whole)
        for piece in listed:
            if piece not in whole:
                refused[piece.spelling] = PartialEmbeddingError(
                    f"{piece.text!r} is no whole word by itself, and only such come into a WordPiece vocabulary. "
                    "Add it with entry='added'."
                )
        return made, refused

    def reads(self, text: str) -> bool:
        return any(part.startswith(text) for part in self.spelling.pre_tokens(text))

    @staticmethod
    def enter(model: dict[str, Any], pieces: Sequence[Piece], ids: dict[str, int], pins: dict[str, int]) -> None:
        model["vocab"].update(pins)
        model["vocab"].update(ids)

    @staticmethod
    def leave(model: dict[str, Any], pieces: Sequence[Piece], pins: Iterable[str]) -> None:
        for spelling in [*(piece.spelling for piece in pieces), *pins]:
            model["vocab"].pop(spelling, None)


KINDS: dict[str, type[Planner]] = {planner.kind: planner for planner in (BytePairs, ScoredPieces, WholeWords)}


def _join(symbols: list[_Symbol], pair: tuple[str, str], joined: _Symbol) -> list[_Symbol]:
    """Put one symbol in the place of each pair, from the left."""
    out: list[_Symbol] = []
    for symbol in symbols:
        if out and (out[-1][0], symbol[0]) == pair:
            out[-1] = joined
        else:
            out.append(symbol)
    return out


def planner_of(tokenizer: Any) -> Planner:
    """The planner for a tokenizer's model.

    Raises:
        `PartialEmbeddingError`: no fast tokenizer, or one whose model takes no pieces.
    """
    if not getattr(tokenizer, "is_fast", False):
        raise PartialEmbeddingError(
            f"{type(tokenizer).__name__} is written in Python and takes no pieces into its vocabulary. Load it with "
            "AutoTokenizer where it has a tokenizer.json (tiktoken and SentencePiece files are converted to one), or "
            "add the tokens with entry='added'."
        )
    backend = tokenizer._tokenizer
    kind = type(backend.model).__name__
    if kind not in KINDS:
        raise PartialEmbeddingError(
            f"The tokenizer's model is {kind}, which takes no pieces into its vocabulary; {', '.join(KINDS)} do. Add "
            "the tokens with entry='added'."
        )
    return KINDS[kind](backend, Spelling(backend))
