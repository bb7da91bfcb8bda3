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

__all__ = ["PROMPTS", "Snippet", "generate_texts", "snippets_of", "texts_for"]

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
    tokens = list(request.tokens)
    pattern = _pattern(tokens)
    found: dict[int, list[tuple[str, str, str]]] = {index: [] for index in range(len(tokens))}
    reach = context * _CHARACTERS
    for text in texts:
        for match in pattern.finditer(text):
            occurrences = found[tokens.index(match.group())]
            if len(occurrences) < limit:
                before = text[max(0, match.start() - reach) : match.start()]
                occurrences.append((before, match.group(), text[match.end() : match.end() + reach]))
    flat = [(token, *parts) for token, occurrences in found.items() for parts in occurrences]
    befores = encode_all(request.tokenizer, [before for _, before, _, _ in flat], unknown=True)
    afters = encode_all(request.tokenizer, [after for _, _, _, after in flat], unknown=True)
    wholes = encode_all(request.tokenizer, ["".join(parts) for _, *parts in flat], unknown=True)
    opening = _opening(request.tokenizer)
    snippets = []
    for entry, lead, tail, whole in zip(flat, befores, afters, wholes, strict=True):
        snippet = _align(entry[0], opening, lead, tail, whole, context)
        if snippet is not None:
            snippets.append(snippet)
    missing = sorted(set(range(len(tokens))) - {snippet.token for snippet in snippets})
    if missing:
        raise PartialEmbeddingError(
            f"No text has {shorten([tokens[index] for index in missing])} with something before and behind it. Give "
            "texts in which each token occurs, written as the token is (with its leading space, if it has one), or "
            "use init='subtoken_mean'."
        )
    return snippets


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
    """The texts that were given, and generated ones for the tokens that have less than `per_token` in them; the
    same for all tables of a model.

    Raises:
        `PartialEmbeddingError`: there are no texts, and the model cannot generate.
    """
    given = list(texts or ())
    lacking = [max(0, per_token - number) for number in _count(request, given)]
    if not any(lacking) or (given and not _can_generate(request.model)):
        return given
    key = repr(("texts", tuple(prompts), lacking, length))
    if key not in request.memo:
        with undisturbed(request.model):
            request.memo[key] = generate_texts(request, prompts=prompts, numbers=lacking, length=length)
    generated: list[str] = request.memo[key]
    return [*given, *generated]


def _count(request: InitRequest, texts: Sequence[str]) -> list[int]:
    """How often each token's text is in texts."""
    numbers = dict.fromkeys(request.tokens, 0)
    for text in texts:
        for match in _pattern(request.tokens).finditer(text):
            numbers[match.group()] += 1
    return list(numbers.values())


def _pattern(tokens: Sequence[str]) -> re.Pattern[str]:
    # A tokenizer finds the longest added token that begins at a place.
    return re.compile("|".join(map(re.escape, sorted(tokens, key=len, reverse=True))))


def _can_generate(model: Any) -> bool:
    return hasattr(model, "generate") and bool(getattr(model, "can_generate", lambda: False)())


def generate_texts(request: InitRequest, *, prompts: Sequence[str], numbers: Sequence[int], length: int) -> list[str]:
    """Texts about the new tokens by the model itself, which reads them in their pieces.

    Args:
        request: whose model, tokenizer, tokens and random numbers.
        prompts: beginnings of texts, with `{token}` in it.
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
    beginnings = []
    for token, wanted in zip(request.tokens, numbers, strict=True):
        for number in range(wanted):
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
