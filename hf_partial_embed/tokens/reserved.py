"""Tokens that a tokenizer has in reserve: which they are by their names, and giving a token another name.

A token keeps its id when it is renamed, and the tokenizer its length: nothing else of it changes.
"""

from __future__ import annotations

import copy
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from tokenizers import AddedToken

from ..errors import PartialEmbeddingError, shorten
from .added import check_found, token_from_dict, token_to_dict
from .backend import change_state, cut_merges, rename_vocabulary, settings_kept
from .vocabulary import encode_all, known_id, read_all

__all__ = ["Renaming", "is_reserved_name", "pieces_without", "roles_of", "tokenizer_without"]

# `<|reserved_special_token_7|>`, `<unused0>`, `[unused1]`, `<SPECIAL_20>`, `madeupword0001`, DeepSeek's place holders.
# T5's `<extra_id_0>` is none of them: it was trained.
_RESERVED = re.compile(
    r"\W*\w*(?:reserved|unused|place[^a-z]?holder|dummy|madeupword|special|control|spare|extra)(?:[^a-z]|token|id|no)*\d+\W*",
    re.IGNORECASE,
)
_SENTINEL = re.compile(r"<extra_id_\d+>")


def is_reserved_name(text: str) -> bool:
    """Whether a token's text is of the kind that tokens in reserve have: such a word, and a number."""
    return _RESERVED.fullmatch(text) is not None and _SENTINEL.fullmatch(text) is None


def roles_of(tokenizer: Any, text: str) -> list[str]:
    """What a tokenizer uses a token for: `eos_token` and the like, the chat template, what is put around a text."""
    roles = [role for role, token in tokenizer.special_tokens_map.items() if isinstance(token, str) and token == text]
    if any(text in template for template in _templates(tokenizer.chat_template)):
        roles.append("the chat template")
    with settings_kept(tokenizer):
        around = tokenizer("", add_special_tokens=True, truncation=False, padding=False, verbose=False)["input_ids"]
    if not roles and known_id(tokenizer, text) in around:
        roles.append("what is put around each text")
    return roles


def _templates(template: Any) -> list[str]:
    return list(template.values()) if isinstance(template, dict) else [template] if template else []


@dataclass
class Renaming:
    """Tokens that have another name, and how to take that back.

    Attributes:
        tokenizer: whose they are.
        names: the new token for each old text.
    """

    tokenizer: Any
    names: dict[str, AddedToken]
    _ids: dict[str, int] = field(default_factory=dict)
    _added: dict[str, Any] = field(default_factory=dict)  # what the old ones were, where they were added tokens
    _merges: list[tuple[int, Any]] = field(default_factory=list)
    _parts: dict[str, tuple[Any, Any]] = field(default_factory=dict)
    _begun: bool = False

    def do(self) -> None:
        """Rename them.

        Raises:
            `PartialEmbeddingError`: a new token would not be found in its own text, or hide another one; the
                tokenizer is as it was.
        """
        tokenizer = self.tokenizer
        self._ids = {old: _id_of(tokenizer, old) for old in self.names}
        earlier = {text: i for text, i in tokenizer.get_added_vocab().items() if text not in self.names}
        read = read_all(tokenizer, earlier)
        found = {text: i for text, i in earlier.items() if i in read[text]}
        size, self._begun = len(tokenizer), True
        try:
            if tokenizer.is_fast:
                change_state(tokenizer._tokenizer, self._rename)
            else:
                self._rename_in_python()
            self._rename_parts()
            ids = {token.content: self._ids[old] for old, token in self.names.items()}
            moved = [text for text, token_id in ids.items() if known_id(tokenizer, text) != token_id]
            if moved or len(tokenizer) != size:
                raise PartialEmbeddingError(
                    f"{type(tokenizer).__name__} did not take {shorten(moved or list(ids))} in the place of "
                    f"{shorten(list(self.names))}. Leave reuse out, and the tokens get ids of their own."
                )
            check_found(tokenizer, {**found, **ids}, list(self.names.values()))
        except BaseException:
            self.undo()
            raise

    def undo(self) -> None:
        """Give them their old names; the tokenizer is as it was, bit for bit."""
        if not self._begun:
            return
        if self.tokenizer.is_fast:
            change_state(self.tokenizer._tokenizer, self._rename_back)
        else:
            self._rename_back_in_python()
        self._rename_parts_back()
        self._begun = False
        self._added, self._merges, self._parts = {}, [], {}

    def _rename(self, state: dict[str, Any]) -> None:
        names = {old: token.content for old, token in self.names.items()}
        self._merges = cut_merges(state["model"], names)
        rename_vocabulary(state["model"], names)
        added = {token["content"]: token for token in state["added_tokens"]}
        self._added = {old: added.pop(old, None) for old in names}
        for old, token in self.names.items():
            added[token.content] = {"id": self._ids[old], **token_to_dict(token)}
        state["added_tokens"] = sorted(added.values(), key=lambda token: token["id"])
        _rename_around(state, names)

    def _rename_back(self, state: dict[str, Any]) -> None:
        names = {token.content: old for old, token in self.names.items()}
        present = {token["content"] for token in state["added_tokens"]}
        names = {new: old for new, old in names.items() if new in present}  # none of them, if it was not done
        rename_vocabulary(state["model"], names)
        for index, merge in self._merges if names else ():
            state["model"]["merges"].insert(index, merge)
        added = [token for token in state["added_tokens"] if token["content"] not in names]
        added += [token for old, token in self._added.items() if token is not None and old in names.values()]
        state["added_tokens"] = sorted(added, key=lambda token: token["id"])
        _rename_around(state, names)

    def _rename_in_python(self) -> None:
        added = self.tokenizer._added_tokens_decoder
        outside = [old for old, token_id in self._ids.items() if token_id not in added]
        if outside:
            raise PartialEmbeddingError(
                f"{shorten(outside)} cannot be taken over: {type(self.tokenizer).__name__} is written in Python, and "
                "only its added tokens can be renamed. Load the tokenizer with AutoTokenizer in another backend."
            )
        self._added = {old: added[token_id] for old, token_id in self._ids.items()}
        self._set_in_python({old: token_from_dict(token_to_dict(token)) for old, token in self.names.items()})

    def _rename_back_in_python(self) -> None:
        self._set_in_python(self._added)

    def _set_in_python(self, tokens: Mapping[str, AddedToken]) -> None:
        tokenizer, trie = self.tokenizer, self.tokenizer.tokens_trie
        gone = {str(tokenizer._added_tokens_decoder[self._ids[old]]) for old in tokens}
        for old, token in tokens.items():
            tokenizer._added_tokens_decoder[self._ids[old]] = token
        tokenizer._added_tokens_encoder = {str(t): i for i, t in tokenizer._added_tokens_decoder.items()}
        came = {str(token) for token in tokens.values()}
        tokenizer.tokens_trie = type(trie)(sorted((trie._tokens - gone) | came))

    def _rename_parts(self) -> None:
        """Everything beside the vocabulary that names them: roles, lists, what is saved as the configuration."""
        names = {old: token.content for old, token in self.names.items()}
        plain = {token.content for token in self.names.values() if not token.special}
        for name in _PARTS:
            before = getattr(self.tokenizer, name, None)
            after = _renamed(before, names)
            if name == "_extra_special_tokens":
                after = [token for token in after if str(token) not in plain]
            if name == "init_kwargs":
                for key in ("extra_special_tokens", "additional_special_tokens"):
                    if isinstance(after.get(key), (list, tuple)):
                        after[key] = [token for token in after[key] if str(token) not in plain]
            if name == "chat_template":
                for old, new in names.items():
                    after = _replaced(after, old, new)
            if after != before:
                self._parts[name] = (before, copy.deepcopy(after))
                setattr(self.tokenizer, name, after)

    def _rename_parts_back(self) -> None:
        names = {token.content: old for old, token in self.names.items()}
        for name, (before, after) in self._parts.items():
            now = getattr(self.tokenizer, name)
            # What somebody has changed meanwhile stays changed.
            setattr(self.tokenizer, name, before if now == after else _renamed(now, names))


_PARTS = ("_special_tokens_map", "_extra_special_tokens", "init_kwargs", "chat_template")


def _id_of(tokenizer: Any, text: str) -> int:
    token_id = known_id(tokenizer, text)
    if token_id is None:
        raise PartialEmbeddingError(f"{text!r} is no token of this {type(tokenizer).__name__}: it cannot be renamed.")
    return token_id


def _rename_around(state: dict[str, Any], names: Mapping[str, str]) -> None:
    if state.get("post_processor"):
        state["post_processor"] = _renamed(state["post_processor"], names)
    if state.get("padding") and state["padding"]["pad_token"] in names:
        state["padding"]["pad_token"] = names[state["padding"]["pad_token"]]


def _renamed(value: Any, names: Mapping[str, str]) -> Any:
    """A copy in which every text that is one of the names is the other; other objects are the same ones."""
    if isinstance(value, str):
        return names.get(value, value)
    if isinstance(value, AddedToken):
        new = names.get(value.content)
        return value if new is None else token_from_dict({**token_to_dict(value), "content": new})
    if isinstance(value, dict):
        if set(value) == {"Sequence"}:  # of a post-processor: "A" and "B" are the texts, not tokens
            return value
        return {_renamed(key, names): _renamed(entry, names) for key, entry in value.items()}
    if isinstance(value, (list, tuple)):
        return type(value)(_renamed(entry, names) for entry in value)
    return value


def _replaced(template: Any, old: str, new: str) -> Any:
    if isinstance(template, dict):
        return {key: value.replace(old, new) for key, value in template.items()}
    return template.replace(old, new) if isinstance(template, str) else template


def tokenizer_without(tokenizer: Any, ids: Sequence[int]) -> Any:
    """A copy of a tokenizer that does not find some of its tokens in any text; every id stays what it is.

    Raises:
        `PartialEmbeddingError`: a tokenizer written in Python, and a token that is not an added one.
    """
    without = copy.deepcopy(tokenizer)
    # Texts that no text has: two private-use characters around a number.
    names = {text: f"\U000f0000{token_id}\U000f0001" for token_id in ids if (text := _text(without, token_id))}
    renaming = Renaming(without, {old: AddedToken(new, normalized=False, special=True) for old, new in names.items()})
    renaming.do()
    return without


def _text(tokenizer: Any, token_id: int) -> str | None:
    text: str | None = tokenizer.convert_ids_to_tokens(token_id)
    return text


def pieces_without(tokenizer: Any, without: Any, ids: Sequence[int]) -> list[list[int]]:
    """What the texts of tokens are read as by a copy of their tokenizer that does not have them.

    An added token's text goes the way that any text goes. A piece of the vocabulary is given to the tokenizer's
    model as it stands in a word: a BPE piece comes back as what it was merged from, one level down where these
    pieces are not among the tokens themselves. One from the inside of words (`##ing`, or with BPE `ing` beside
    `ing</w>`) is read there.

    Args:
        tokenizer: the tokenizer.
        without: `tokenizer_without(tokenizer, ids)`.
        ids: of the tokens.

    Returns:
        For each token the ids of its pieces, empty where there are none (a single character).
    """
    added = tokenizer.added_tokens_decoder
    texts = [str(_text(tokenizer, token_id)) for token_id in ids]
    read = encode_all(without, [text if i in added else "" for text, i in zip(texts, ids, strict=True)])
    model = without._tokenizer.model if without.is_fast else None
    pieces = []
    for text, token_id, whole in zip(texts, ids, read, strict=True):
        if token_id not in added and model is not None:
            whole = _pieces_of(model, text, stem=str(_text(without, token_id)))
        pieces.append([i for i in whole if i != token_id and i != without.unk_token_id])
    return pieces


def _pieces_of(model: Any, text: str, stem: str) -> list[int]:
    """What a model reads a piece of its vocabulary as, in the place in a word that its marks say.

    Args:
        model: without the piece.
        text: the piece, as the vocabulary has it.
        stem: a text that has no part in any other piece, to stand where the word goes on.
    """
    prefix = getattr(model, "continuing_subword_prefix", None) or ""
    suffix = getattr(model, "end_of_word_suffix", None) or ""
    begin = stem if prefix and text.startswith(prefix) and text != prefix else ""
    bare = text.removeprefix(prefix) if begin else text
    end = stem if suffix and not bare.endswith(suffix) else ""
    bare = bare if end else bare.removesuffix(suffix)
    tokens = model.tokenize(begin + bare + end)
    # BPE reads what it does not know as unknown, or leaves it out: as many tokens, whatever stands beside it.
    before, behind = (len(model.tokenize(side)) if side else 0 for side in (begin, end))
    return [token.id for token in tokens[before : len(tokens) - behind]]
