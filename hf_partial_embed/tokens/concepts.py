"""Concepts of several vectors: one placeholder in a text, as many tokens in the model.

The vectors of `<cat>` are the tokens `<cat>_0`, `<cat>_1`, `<cat>_2`. `expand_placeholders` teaches a
tokenizer to read `<cat>` as all of them, by a step in front of its normaliser:

```python
tokens = vector_tokens("<cat>", 3)
partial = add_tokens(text_encoder, tokenizer, {token: "a cat" for token in tokens})
expand_placeholders(tokenizer, tokens)
tokenizer("a photo of <cat>")  # ... <cat>_0 <cat>_1 <cat>_2
```

The step is saved in `tokenizer.json` with the rest of the tokenizer. Some classes (`CLIPTokenizer`) make
their normaliser anew when they are loaded; after loading one of those, `expand_placeholders(tokenizer)`
finds the concepts in the vocabulary and puts the step back.
"""

from __future__ import annotations

import re
from collections.abc import Iterable
from typing import Any

from tokenizers import Regex, normalizers

from ..errors import PartialEmbeddingError, shorten
from .vocabulary import encode_all, known_id, plain_tokenizer

__all__ = ["Expansion", "concepts_of", "expand_placeholders", "vector_tokens"]

_NUMBERED = re.compile(r"(.+)_(0|[1-9][0-9]*)", re.DOTALL)


def vector_tokens(placeholder: str, num_vectors: int) -> list[str]:
    """Names of the tokens of a concept; the placeholder itself where there is one vector only."""
    if num_vectors < 1:
        raise PartialEmbeddingError(f"num_vectors={num_vectors!r}: a concept has at least one vector.")
    return [placeholder] if num_vectors == 1 else [f"{placeholder}_{number}" for number in range(num_vectors)]


def concepts_of(tokens: Iterable[str]) -> dict[str, list[str]]:
    """Tokens by the placeholder of their concept; any other token is a concept by itself.

    `X_0`, `X_1`, ... are the vectors of `X` if there are two or more of them and `X` is no token.
    """
    there = list(tokens)
    known = set(there)
    concepts: dict[str, list[str]] = {}
    for token in there:
        match = _NUMBERED.fullmatch(token)
        name = match.group(1) if match else token
        number = 0
        while f"{name}_{number}" in known:
            number += 1
        if match is None or name in known or number < 2 or int(match.group(2)) >= number:
            concepts[token] = [token]
        else:
            concepts[name] = vector_tokens(name, number)
    return concepts


class Expansion:
    """Placeholders that a tokenizer reads as several tokens, until `remove()`.

    Attributes:
        placeholders: the tokens of each placeholder.
    """

    def __init__(self, tokenizer: Any, placeholders: dict[str, list[str]]) -> None:
        self.placeholders = placeholders
        self._backend = tokenizer._tokenizer
        self._before = self._backend.normalizer
        self._set = self._with_steps(placeholders)
        self._backend.normalizer = self._set

    def _with_steps(self, placeholders: dict[str, list[str]]) -> Any:
        before = self._before
        # In front of the normaliser, which may do things to a text that no placeholder survives. A
        # tokenizer that does not tell cases apart does not do so here.
        fold = "(?i)" if before is not None and before.normalize_str("Aa") == before.normalize_str("aA") else ""
        longest_first = sorted(placeholders, key=len, reverse=True)
        steps = [
            # The tokens' own texts begin with the placeholder, and stay as they are.
            normalizers.Replace(Regex(rf"{fold}{re.escape(name)}(?!_[0-9])"), "".join(placeholders[name]))
            for name in longest_first
        ]
        return normalizers.Sequence([*steps, *([] if before is None else [before])])

    def remove(self) -> None:
        """Let the tokenizer read placeholders as it did before.

        Raises:
            `PartialEmbeddingError`: something else has changed the normaliser since.
        """
        if str(self._backend.normalizer) != str(self._set):
            raise PartialEmbeddingError(
                "The tokenizer's normaliser has been changed since these placeholders were expanded. Take off what "
                "was put on last first."
            )
        self._backend.normalizer = self._before


def expand_placeholders(tokenizer: Any, tokens: Iterable[str] | None = None) -> Expansion:
    """Let a tokenizer read the placeholder of each concept as all tokens of the concept.

    Args:
        tokenizer: a fast tokenizer that has the tokens.
        tokens: the tokens; if not given, the concepts are those of all added tokens.

    Returns:
        `Expansion`, whose `remove()` takes it back (before `partial.detach()`, if at all).

    Raises:
        `PartialEmbeddingError`: no concept of several vectors, tokens that are missing, a tokenizer
            that cannot do it, or in which a placeholder would not give its tokens. The tokenizer is as
            it was.
    """
    tokenizer = plain_tokenizer(tokenizer, needed=True)
    given = list(tokenizer.get_added_vocab() if tokens is None else tokens)
    placeholders = {name: members for name, members in concepts_of(given).items() if len(members) > 1}
    if not placeholders:
        raise PartialEmbeddingError(
            f"There is no concept of several vectors among {shorten(given)}: its tokens are called '<name>_0', "
            "'<name>_1' and so on; vector_tokens('<name>', n) makes them."
        )
    if not getattr(tokenizer, "is_fast", False):
        raise PartialEmbeddingError(
            f"{type(tokenizer).__name__} is written in Python and takes no further normaliser. Write the tokens into "
            "the text instead of the placeholder: ''.join(vector_tokens(name, n))."
        )
    ids: dict[str, list[int]] = {}
    for name, members in placeholders.items():
        found = [known_id(tokenizer, member) for member in members]
        missing = [member for member, token_id in zip(members, found, strict=True) if token_id is None]
        if missing:
            raise PartialEmbeddingError(f"The tokenizer lacks {shorten(missing)}. Add them with add_tokens first.")
        ids[name] = [token_id for token_id in found if token_id is not None]
    expansion = Expansion(tokenizer, placeholders)
    read = dict(zip(ids, encode_all(tokenizer, [f"a {name} b" for name in ids], unknown=True), strict=True))
    wrong = [name for name in ids if not _contains(read[name], ids[name])]
    if wrong:
        expansion.remove()
        raise PartialEmbeddingError(
            f"{type(tokenizer).__name__} would not read {shorten(wrong)} as {shorten(placeholders[wrong[0]])}, but as "
            f"{tokenizer.convert_ids_to_tokens(read[wrong[0]])}. Add the tokens without special=True (AddedToken("
            "..., normalized=True)): special ones are looked for before anything is expanded."
        )
    return expansion


def _contains(ids: list[int], part: list[int]) -> bool:
    return any(ids[start : start + len(part)] == part for start in range(len(ids)))
