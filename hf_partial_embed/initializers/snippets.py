"""Snippets of text around new tokens, as ids before the tokens are added and as ids afterwards."""

from __future__ import annotations

import re
from array import array
from collections.abc import Collection, Iterable, Iterator, Sequence
from dataclasses import dataclass
from itertools import chain, groupby, islice
from typing import Any

import torch

from ..errors import PartialEmbeddingError, shorten
from ..tokens.vocabulary import encode_all
from .registry import InitRequest
from .running import undisturbed

__all__ = [
    "PROMPTS",
    "Snippet",
    "generate_texts",
    "in_groups",
    "sample_of",
    "snippets_of",
    "texts_for",
]

# Beginnings of the texts that a model writes about a token, if none are given.
PROMPTS = ("This text is about {token}", "What is {token}?", "They said that {token}", "In short, {token}")

# Text cut out on either side of a token, in characters for each id of context.
_CHARACTERS = 12
_TEXTS_AT_ONCE = 1000
_PROMPTS_AT_ONCE = 64
_TOKENS_AT_ONCE = 64  # so that what is kept of a model's run does not grow with the number of tokens
_JOINED = 20  # texts that are read one behind the other
_SAMPLE = 256  # snippets of all tokens that tell every group where its tokens do not come


@dataclass(frozen=True)
class Snippet:
    """One occurrence of a new token.

    Attributes:
        token: which of the new tokens.
        original: ids of the text without the new token in the tokenizer.
        shortened: ids with it; the id at `start` is a placeholder, whose embedding is replaced by the new row.
        start: position of the new token in `shortened`, and of its first piece in `original`.
        end: position of its last piece in `original`.
        following: number of ids behind the token, which are the same in both.
    """

    token: int
    original: tuple[int, ...]
    shortened: tuple[int, ...]
    start: int
    end: int
    following: int


def snippets_of(request: InitRequest, texts: Sequence[str], *, context: int, limit: int) -> list[Snippet]:
    """Cut the occurrences of the new tokens out of texts.

    Args:
        request: has the tokens and the tokenizer.
        texts: any texts.
        context: largest number of ids before, and after, the token.
        limit: largest number of snippets for each token; the first ones are taken.

    Raises:
        `PartialEmbeddingError`: a token that occurs in no text with something before and behind it. A piece of the
            vocabulary that only stands inside of another new token there has no snippet, and is no error.
    """
    tokens = list(request.tokens)
    opening = _opening(request.tokenizer)
    preview = request.previewed()

    def around(texts: Sequence[str], wanted: Collection[int]) -> list[Snippet]:
        return [
            *_around_pieces(request, texts, opening, context, limit, wanted),
            *_around_added(request, texts, opening, context, limit, wanted),
        ]

    def lacking(snippets: Iterable[Snippet]) -> list[int]:
        seen = {snippet.token for snippet in snippets}
        return [
            row
            for row, text in enumerate(tokens)
            if row not in seen
            and (preview is None or preview.ids[row] is None or not any(text in tokens[other] for other in seen))
        ]

    snippets = around(texts, range(len(tokens)))
    missing = lacking(snippets)
    if missing and len(texts) > 1:
        # A token that only begins or ends texts has context where they are read one behind the other.
        joined = ["\n".join(texts[first : first + _JOINED]) for first in range(0, len(texts), _JOINED)]
        snippets += around(joined, set(missing))
        missing = lacking(snippets)
    if missing:
        raise PartialEmbeddingError(
            f"No text has {shorten([tokens[index] for index in missing])} with something before and behind it. Give "
            "texts in which each token occurs, written as the token is (with its leading space, if it has one), or "
            "use init='subtoken_mean'."
        )
    return snippets


def in_groups(snippets: Iterable[Snippet]) -> list[dict[int, list[Snippet]]]:
    """Snippets by token, for the tokens that are fitted at once."""
    found: dict[int, list[Snippet]] = {}
    for snippet in snippets:
        found.setdefault(snippet.token, []).append(snippet)
    return [{token: found[token] for token in group} for group in _parts(sorted(found), _TOKENS_AT_ONCE)]


def sample_of(snippets: Sequence[Snippet]) -> list[Snippet]:
    """Some of them, from all over."""
    count = min(_SAMPLE, len(snippets))
    return [snippets[number * len(snippets) // count] for number in range(count)]


def _around_pieces(
    request: InitRequest, texts: Sequence[str], opening: list[int], context: int, limit: int, wanted: Collection[int]
) -> Iterator[Snippet]:
    """Snippets of tokens that become pieces of the vocabulary: where the tokenizer is going to find them."""
    preview = request.previewed()
    if preview is None:
        return
    rows = {preview.ids[row]: row for row in wanted if preview.ids[row] is not None}
    found = dict.fromkeys(rows, 0)
    for first in range(0, len(texts), _TEXTS_AT_ONCE):
        for ids in preview.read(texts[first : first + _TEXTS_AT_ONCE]):
            for at in [place for place, token_id in enumerate(ids) if token_id in rows]:
                lead = [*opening, *preview.expand(ids[max(0, at - context) : at])[-context:]]
                pieces = preview.expand(ids[at : at + 1])
                tail = preview.expand(ids[at + 1 : at + 1 + context])[:context]
                if found[ids[at]] == limit or not lead or not tail:
                    continue
                found[ids[at]] += 1
                yield Snippet(
                    token=rows[ids[at]],
                    original=(*lead, *pieces, *tail),
                    shortened=(*lead, pieces[-1], *tail),
                    start=len(lead),
                    end=len(lead) + len(pieces) - 1,
                    following=len(tail),
                )


def _around_added(
    request: InitRequest, texts: Sequence[str], opening: list[int], context: int, limit: int, wanted: Collection[int]
) -> Iterator[Snippet]:
    """Snippets of added tokens: wherever their text stands and is whole pieces of its own."""
    preview = request.previewed()
    rows = {token: row for row, token in enumerate(request.tokens) if preview is None or preview.ids[row] is None}
    if rows.keys().isdisjoint(request.tokens[row] for row in wanted):
        return
    pattern = _pattern(rows)
    # All of them, since many may be inside of longer words: numbers, for they are as many as the texts have.
    found = {row: array("q") for row in rows.values() if row in wanted}
    for number, text in enumerate(texts):
        for match in pattern.finditer(text):
            occurrences = found.get(rows[match.group()])
            if occurrences is not None:
                occurrences.extend((number, *match.span()))
    reach = context * _CHARACTERS
    candidates = {row: zip(*[iter(occurrences)] * 3, strict=True) for row, occurrences in found.items()}
    missing = dict.fromkeys(found, limit)
    while tried := [(row, *place) for row, number in missing.items() for place in islice(candidates[row], number)]:
        parts = [
            (texts[at][max(0, start - reach) : start], texts[at][start:end], texts[at][end : end + reach])
            for _, at, start, end in tried
        ]
        befores = encode_all(request.tokenizer, [before for before, _, _ in parts], unknown=True)
        afters = encode_all(request.tokenizer, [after for _, _, after in parts], unknown=True)
        wholes = encode_all(request.tokenizer, ["".join(part) for part in parts], unknown=True)
        for (row, *_), before, after, whole in zip(tried, befores, afters, wholes, strict=True):
            snippet = _align(row, opening, before, after, whole, context)
            if snippet is not None:
                missing[row] -= 1
                yield snippet


def _align(
    token: int, opening: list[int], before: list[int], after: list[int], whole: list[int], context: int
) -> Snippet | None:
    """Find where the token's pieces begin and end; `None` where there is no text on one side of them."""
    start = _common(before, whole)
    behind = _common(after[::-1], whole[start:][::-1])
    end = len(whole) - behind - 1
    dropped = max(0, start - context)
    following = min(behind, context)
    lead = [*opening, *whole[dropped:start]]
    # The first position of a text is left out: attention sinks make its hidden states unlike all others.
    if not lead or not following or end < start or behind < len(after):
        return None
    tail = whole[end + 1 : end + 1 + following]
    return Snippet(
        token=token,
        original=(*lead, *whole[start : end + 1], *tail),
        shortened=(*lead, whole[end], *tail),
        start=len(lead),
        end=len(lead) + end - start,
        following=following,
    )


def _common(a: Sequence[Any], b: Sequence[Any]) -> int:
    """Length of the common prefix."""
    length = 0
    while length < min(len(a), len(b)) and a[length] == b[length]:
        length += 1
    return length


def _opening(tokenizer: Any) -> list[int]:
    """Ids of the special tokens that the tokenizer puts in front of a text, such as `<s>`; may be empty."""
    (inner,) = encode_all(tokenizer, ["a"], unknown=True)
    outer = tokenizer("a")["input_ids"]
    for length in range(len(outer) - len(inner) + 1):
        if inner and outer[length : length + len(inner)] == inner:
            return list(outer[:length])
    return []


def texts_for(
    request: InitRequest, texts: Sequence[str] | None, *, prompts: Sequence[str], per_token: int, length: int
) -> Sequence[str]:
    """The given texts, and `per_token` generated ones for each token that is in none of them; the same for all
    tables of a model.

    Raises:
        `PartialEmbeddingError`: there are no texts, and the model cannot generate.
    """
    given = list(texts or ())
    pattern = _pattern(request.tokens)
    there = {match for text in given for match in pattern.findall(text)}
    # One that only stands inside of another new token there has no text of its own to learn from.
    missing = {t for t in request.tokens if t not in there and not any(t in other for other in there)}
    lacking = [per_token if token in missing else 0 for token in request.tokens]
    if not any(lacking) or (given and not _can_generate(request.model)):
        return given
    key = repr(("texts", tuple(prompts), lacking, length))
    if key not in request.memo:
        with undisturbed(request.model):
            request.memo[key] = generate_texts(request, prompts=prompts, numbers=lacking, length=length)
    generated: list[str] = request.memo[key]
    return [*given, *generated]


def _pattern(tokens: Iterable[str]) -> re.Pattern[str]:
    """Finds the longest token that begins at a place, as a tokenizer does with added tokens."""
    return re.compile(_any_of(sorted(set(tokens))))


def _any_of(words: list[str]) -> str:
    """An expression for any of some sorted words, with what they have in common written once: `re` tries alternatives
    one after another, and would try thousands of them at each place.
    """
    shared = words[0][: _common(words[0], words[-1])]
    tails = [word[len(shared) :] for word in words]
    longer = [_any_of(list(own)) for _, own in groupby(filter(None, tails), key=lambda tail: tail[0])]
    if not longer:
        return re.escape(shared)
    return f"{re.escape(shared)}(?:{'|'.join(longer)}){'' if tails[0] else '?'}"


def _parts(items: list[int], size: int) -> Iterator[list[int]]:
    return (items[first : first + size] for first in range(0, len(items), size))


def _can_generate(model: Any) -> bool:
    return hasattr(model, "generate") and bool(getattr(model, "can_generate", lambda: False)())


def generate_texts(request: InitRequest, *, prompts: Sequence[str], numbers: Sequence[int], length: int) -> list[str]:
    """Let the model write texts about the new tokens, which it still reads as their pieces.

    Args:
        request: has the model, the tokenizer, the tokens and the source of random numbers.
        prompts: beginnings of texts, each with `{token}` in it.
        numbers: of texts, for each token.
        length: of each text, in tokens.

    Raises:
        `PartialEmbeddingError`: the model cannot generate.
    """
    model, tokenizer = request.model, request.tokenizer
    if not _can_generate(model):
        raise PartialEmbeddingError(
            f"{type(model).__name__} cannot generate texts. Give some: init=Distill(texts=[...])."
        )
    preview = request.previewed()
    beginnings = []
    for row, (token, wanted) in enumerate(zip(request.tokens, numbers, strict=True)):
        for number in range(wanted):
            prompt = prompts[number % len(prompts)]
            # A token with a leading space of its own replaces the one in "about {token}". A piece of the vocabulary
            # without one is not found behind a space.
            if token[:1].isspace():
                prompt = prompt.replace(" {token}", "{token}")
            elif preview is not None and preview.ids[row] is not None:
                prompt = prompt.replace(" {token}", "\n{token}")
            beginnings.append(prompt.replace("{token}", token))
    opening = _opening(tokenizer)
    encoded = [[*opening, *ids] for ids in encode_all(tokenizer, beginnings, unknown=True)]
    device = request.table.device
    by_length: dict[int, list[int]] = {}
    for index, ids in enumerate(encoded):
        by_length.setdefault(len(ids), []).append(index)
    texts = [""] * len(encoded)
    seed = int(torch.randint(2**31, (1,), generator=request.generator))
    devices = [device] if device.type == "cuda" else []
    pad = next(i for i in (tokenizer.pad_token_id, tokenizer.eos_token_id, encoded[0][0]) if i is not None)
    with torch.random.fork_rng(devices=devices), torch.no_grad():
        torch.manual_seed(seed)
        # Prompts of one length at a time need no padding, whose side models disagree on.
        for indices in chain(*(_parts(indices, _PROMPTS_AT_ONCE) for indices in by_length.values())):
            prompted = torch.tensor([encoded[index] for index in indices], device=device)
            out = model.generate(
                input_ids=prompted,
                attention_mask=torch.ones_like(prompted),
                do_sample=True,
                temperature=1.0,
                top_k=50,
                max_new_tokens=length,
                min_new_tokens=min(4, length),
                pad_token_id=pad,
            )
            for index, generated in zip(indices, out[:, prompted.shape[1] :].tolist(), strict=True):
                texts[index] = beginnings[index] + tokenizer.decode(generated, skip_special_tokens=True)
    return texts
