"""Pieces that come into a tokenizer's vocabulary: what each is made of, and what all kinds of models have in common.

A tokenizer's model is one of three kinds, each with a planner: BPE (`merges`), Unigram and WordPiece (here). A planner
says which pieces come in and what they are made of, over what is in the vocabulary now, and writes them into the
serialised model; it changes no tokenizer. See `entering` for that.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any, NamedTuple

from ..errors import PartialEmbeddingError
from .spelling import Spelling

__all__ = ["Piece", "Planner", "ScoredPieces", "WholeWords"]

_SCORE_MARGIN = 1e-3  # what a Unigram piece's score is above those of its pieces, for each of them but the first


class Piece(NamedTuple):
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
            made.append(piece._replace(parts=parts, made_of=ids, merged=False, rank=len(made)))
        return made, refused


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
            by_id[ids[piece.spelling]] = [piece.spelling, score + _SCORE_MARGIN * (len(piece.made_of) - 1)]
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
        whole: list[Piece] = []
        others: list[Piece] = []
        for piece in wanted:
            (whole if self.spelling.is_whole(piece.text, piece.spelling) else others).append(piece)
        made, refused = self._simple(whole)
        for piece in others:
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
