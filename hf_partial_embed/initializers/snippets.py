"""Short pieces of text around new tokens: as the tokenizer reads them now, and as it will."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch

from ..errors import PartialEmbeddingError, shorten
from ..tokens.vocabulary import encode_all
from .registry import InitRequest
from .running import undisturbed

__all__ = ["PROMPTS", "Snippet", "exchanged_snippets", "generate_texts", "snippets_of", "texts_for"]

# Beginnings of the texts that a model writes about a token, if none are given.
PROMPTS = ("This text is about {token}", "What is {token}?", "They said that {token}", "In short, {token}")

# Longest text that is cut out around a token, in characters for each token of context.
_CHARACTERS = 12


@dataclass(frozen=True)
class Snippet:
    """One occurrence of a new token.

    Attributes:
        token: which of the new tokens.
        original: ids as the tokenizer reads the text now.
        shortened: ids as it will read it; at `start` stands an id that is to be replaced.
        start: position of the new token in `shortened`, and of its first piece in `original`.
        end: position of its last piece in `original`.
        following: number of ids behind the token, the same ones in both.
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
        request: whose tokens, and whose tokenizer.
        texts: any texts.
        context: number of ids before and after the token, at most.
        limit: number of snippets for each token, at most; the first ones are taken.

    Raises:
        `PartialEmbeddingError`: no text has one of the tokens, or something behind it.
    """
    snippets = _cut(request, _occurrences(request, texts, context, limit), context)
    missing = sorted(set(range(len(request.tokens))) - {snippet.token for snippet in snippets})
    if missing:
        raise PartialEmbeddingError(
            f"No text has {shorten([request.tokens[index] for index in missing])} with something before and behind "
            "it. Give texts in which each token occurs, written as the token is (with its leading space, if it has "
            "one), or use init='subtoken_mean'."
        )
    return snippets


def exchanged_snippets(
    request: InitRequest, texts: Sequence[str], *, context: int, limit: int, count: int
) -> list[Snippet]:
    """Snippets in which a token stands where the texts have another of the new tokens.

    What is said there need not be true of it: the model tells from the token's pieces what it would expect
    behind them, and so the same texts ask about a token in many more ways than they speak of it.

    Args:
        request: whose tokens, tokenizer and random numbers.
        texts: any texts.
        context: number of ids before and after the token, at most.
        limit: number of places of each token that are made use of, at most.
        count: number of snippets for each token, at most; none where there is no other token.
    """
    places = _occurrences(request, texts, context, limit)
    made: list[_Occurrence] = []
    for token, text in enumerate(request.tokens):
        others = [place for place in places if place[0] != token]
        order = torch.randperm(len(others), generator=request.generator)[:count].tolist()
        made += [(token, before, text, after) for _, before, _, after in map(others.__getitem__, order)]
    return _cut(request, made, context)


# Which token, what is before it, its text, what is behind it.
_Occurrence = tuple[int, str, str, str]


def _occurrences(request: InitRequest, texts: Sequence[str], context: int, limit: int) -> list[_Occurrence]:
    tokens = list(request.tokens)
    # A tokenizer finds the longest added token that begins at a place.
    pattern = re.compile("|".join(map(re.escape, sorted(tokens, key=len, reverse=True))))
    number = {token: index for index, token in enumerate(tokens)}
    found: list[list[_Occurrence]] = [[] for _ in tokens]
    reach = context * _CHARACTERS
    for text in texts:
        for match in pattern.finditer(text):
            index = number[match.group()]
            if len(found[index]) < limit:
                before = text[max(0, match.start() - reach) : match.start()]
                found[index].append((index, before, match.group(), text[match.end() : match.end() + reach]))
    return [occurrence for occurrences in found for occurrence in occurrences]


def _cut(request: InitRequest, occurrences: Sequence[_Occurrence], context: int) -> list[Snippet]:
    """Snippets of occurrences; those with nothing around the token are left out."""
    befores = encode_all(request.tokenizer, [before for _, before, _, _ in occurrences], unknown=True)
    afters = encode_all(request.tokenizer, [after for _, _, _, after in occurrences], unknown=True)
    wholes = encode_all(request.tokenizer, ["".join(parts) for _, *parts in occurrences], unknown=True)
    opening = _opening(request.tokenizer)
    snippets = (
        _align(token, opening, lead, tail, whole, context)
        for (token, *_), lead, tail, whole in zip(occurrences, befores, afters, wholes, strict=True)
    )
    return [snippet for snippet in snippets if snippet is not None]


def _align(
    token: int, opening: list[int], before: list[int], after: list[int], whole: list[int], context: int
) -> Snippet | None:
    """Find where the token's pieces begin and end; `None` where nothing is left around them."""
    start = _common(before, whole)
    behind = _common(after[::-1], whole[start:][::-1])
    end = len(whole) - behind - 1
    dropped = max(0, start - context)
    following = min(behind, context)
    lead = [*opening, *whole[dropped:start]]
    # The first position of a text is unlike all others (attention gathers there): no place to learn at.
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


def _common(a: Sequence[int], b: Sequence[int]) -> int:
    """Length of the common beginning."""
    length = 0
    while length < min(len(a), len(b)) and a[length] == b[length]:
        length += 1
    return length


def _opening(tokenizer: Any) -> list[int]:
    """What the tokenizer puts in front of every text: `<s>`, or nothing."""
    (inner,) = encode_all(tokenizer, ["a"], unknown=True)
    outer = tokenizer("a")["input_ids"]
    for length in range(len(outer) - len(inner) + 1):
        if inner and outer[length : length + len(inner)] == inner:
            return list(outer[:length])
    return []


def texts_for(
    request: InitRequest, texts: Sequence[str] | None, *, prompts: Sequence[str], per_token: int, length: int
) -> Sequence[str]:
    """The texts that were given; else generated ones, the same for all tables of a model."""
    if texts is not None:
        return texts
    key = repr(("texts", tuple(prompts), per_token, length))
    if key not in request.memo:
        with undisturbed(request.model):
            request.memo[key] = generate_texts(request, prompts=prompts, per_token=per_token, length=length)
    generated: list[str] = request.memo[key]
    return generated


def generate_texts(request: InitRequest, *, prompts: Sequence[str], per_token: int, length: int) -> list[str]:
    """Texts about the new tokens by the model itself, which reads them in their pieces.

    Args:
        request: whose model, tokenizer, tokens and random numbers.
        prompts: beginnings of texts, with `{token}` in it.
        per_token: number of texts for each token.
        length: of each text, in tokens.

    Raises:
        `PartialEmbeddingError`: the model cannot generate.
    """
    model, tokenizer = request.model, request.tokenizer
    if not hasattr(model, "generate") or not getattr(model, "can_generate", lambda: False)():
        raise PartialEmbeddingError(
            f"{type(model).__name__} cannot generate texts. Give some: init=Distill(texts=[...])."
        )
    beginnings = []
    for token in request.tokens:
        for number in range(per_token):
            prompt = prompts[number % len(prompts)]
            # "about {token}" takes the space from the token, if that brings its own.
            glued = prompt.replace(" {token}", "{token}") if token[:1].isspace() else prompt
            beginnings.append(glued.replace("{token}", token))
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
        # Prompts of one length at a time: without padding, no model needs to be told how to pad.
        for indices in by_length.values():
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
