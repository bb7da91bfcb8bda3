"""What `partial.evaluate` costs beside the forwards that it needs: section `evaluating` of run.py."""

from __future__ import annotations

import pydoc_data.topics
import re
from collections import Counter
from collections.abc import Callable, Sequence
from typing import Any

import torch
from measure import peak_bytes, time_ratios

from hf_partial_embed import add_tokens
from hf_partial_embed.tokens.reading import TextReader

BARE = "body and head"


def paragraphs() -> list[str]:
    """Prose of Python's own manual."""
    pages = [pydoc_data.topics.topics[title] for title in sorted(pydoc_data.topics.topics)]
    found = [" ".join(part.split()) for page in pages for part in page.split("\n\n") if part[:1].isalpha()]
    return [text for text in found if 150 < len(text) < 400]


def words_of(texts: Sequence[str], tokenizer: Any, count: int) -> list[str]:
    """The most frequent words of several pieces, with the space before them."""
    found = Counter(word for text in texts for word in re.findall(r" [a-z]+\b", text))
    words = [word for word, _ in found.most_common()]
    pieces = tokenizer(words, add_special_tokens=False)["input_ids"]
    return [word for word, ids in zip(words, pieces, strict=True) if len(ids) > 1][:count]


def forwards_of(run: Callable[[], object], model: Any) -> tuple[list[dict[str, Any]], list[int]]:
    """What a call of `evaluate` gives the body, batch by batch, and how many positions go through the head at a time.

    Its trial of whether the two go apart, a few ids without a mask, is left out.
    """
    batches: list[dict[str, Any]] = []
    chunks: list[int] = []
    given: dict[str, Any] = {}

    def body(module: Any, args: Any, inputs: dict[str, Any]) -> None:
        given.update(inputs)

    def layer(module: Any, args: Any, output: Any) -> None:  # only where the body is run, and not replaced
        if given.get("attention_mask") is not None:
            batches.append(dict(given))

    def head(module: Any, args: Any, output: torch.Tensor) -> None:
        if batches and output.numel():
            chunks.append(output.numel() // output.shape[-1])

    handles = [
        model.base_model.register_forward_pre_hook(body, with_kwargs=True),
        model.base_model.layers[0].register_forward_hook(layer),
        model.get_output_embeddings().register_forward_hook(head),
    ]
    run()
    for handle in handles:
        handle.remove()
    return batches, chunks


def evaluating(
    model: Any, tokenizer: Any, device: torch.device, repetitions: int, *, tokens: int = 100, texts: int = 24
) -> list[dict[str, Any]]:
    """`evaluate` against the bare forwards that it needs: the same batches through the body, the same number of
    positions through the head in the same chunks, all logits thrown away.

    The tokens are pieces of the vocabulary. To read as the tokenizer did without them, it is loaded anew once, which
    takes the same time for any number of texts; that share is told beside the whole.
    """
    prose = paragraphs()
    partial = add_tokens(model.requires_grad_(False).eval(), tokenizer, words_of(prose, tokenizer, tokens))
    new = set(partial.token_ids)
    has = [not new.isdisjoint(ids) for ids in tokenizer(prose, add_special_tokens=False)["input_ids"]]
    with_new = [text for text, there in zip(prose, has, strict=True) if there][:texts]
    without = [text for text, there in zip(prose, has, strict=True) if not there][:texts]
    table = []
    for name, own in (
        (f"{len(with_new)} with new tokens", with_new),
        (f"the same and {len(without)} without", with_new + without),
    ):

        def evaluate(own: list[str] = own) -> object:
            return partial.evaluate(own, progress=False)

        def reading(own: list[str] = own) -> None:
            for reader in (TextReader(tokenizer, partial.token_ids), TextReader(tokenizer)):
                reader.read(own)

        batches, chunks = forwards_of(evaluate, model)
        width = model.get_input_embeddings().embedding_dim
        states = torch.randn(max(chunks), width, device=device, dtype=model.dtype)

        @torch.no_grad()
        def bare(batches: Any = batches, chunks: Any = chunks, states: torch.Tensor = states) -> None:
            for inputs in batches:
                model.base_model(**inputs)
            for count in chunks:
                model.get_output_embeddings()(states[None, :count])

        times = time_ratios({BARE: bare, "evaluate": evaluate, "reading": reading}, repetitions, device, BARE)
        table.append({
            "texts": name,
            "positions, body": sum(inputs["input_ids"].numel() for inputs in batches),
            "positions, head": sum(chunks),
            "body and head, seconds": times[BARE]["seconds"],
            "evaluate": times["evaluate"]["ratio"],
            "of it reading": times["reading"]["ratio"],
            "body and head, peak MB": peak_bytes(bare, device) / 1e6,
            "evaluate, peak MB": peak_bytes(evaluate, device) / 1e6,
        })  # fmt: skip
    partial.detach()
    return table
