"""What `partial.evaluate` costs beside the forwards that it needs: section `evaluating` of run.py."""

from __future__ import annotations

import pydoc_data.topics
import re
import statistics
import time
from collections import Counter
from collections.abc import Callable, Sequence
from functools import partial as partial_call
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


class Forwards:
    """The forwards of an `evaluate` while this context is entered: what it needs, and how long that took.

    Its trial of whether body and head go apart, a few ids without a mask, is left out.

    Attributes:
        batches: what the body was given, batch by batch.
        chunks: how many positions went through the head at a time.
        seconds: of these forwards, as `clock` has them.
    """

    def __init__(self, model: Any, clock: Callable[[], float]) -> None:
        self.model, self.clock = model, clock
        self.batches: list[dict[str, Any]] = []
        self.chunks: list[int] = []
        self.seconds = 0.0

    def __enter__(self) -> Forwards:
        body, head = self.model.base_model, self.model.get_output_embeddings()
        self._handles = [
            body.register_forward_pre_hook(self._given, with_kwargs=True),
            body.layers[0].register_forward_hook(self._run),  # not where a body is replaced
            body.register_forward_hook(self._body),
            head.register_forward_pre_hook(self._begin),
            head.register_forward_hook(self._head),
        ]
        return self

    def __exit__(self, *error: object) -> None:
        for handle in self._handles:
            handle.remove()

    def _begin(self, module: Any, args: Any) -> None:
        self._started = self.clock()

    def _given(self, module: Any, args: Any, inputs: dict[str, Any]) -> None:
        self._inputs, self._needed = dict(inputs), False
        self._begin(module, args)

    def _run(self, module: Any, args: Any, output: Any) -> None:
        if self._inputs.get("attention_mask") is not None:
            self.batches.append(self._inputs)
            self._needed = True

    def _body(self, module: Any, args: Any, output: Any) -> None:
        if self._needed:
            self.seconds += self.clock() - self._started

    def _head(self, module: Any, args: Any, output: torch.Tensor) -> None:
        if self.batches and output.numel():
            self.chunks.append(output.numel() // output.shape[-1])
            self.seconds += self.clock() - self._started


def evaluating(
    model: Any, tokenizer: Any, device: torch.device, repetitions: int, *, tokens: int = 100, texts: int = 24
) -> list[dict[str, Any]]:
    """`evaluate` against the bare forwards that it needs: the same batches through the body, the same number of
    positions through the head in the same chunks, all logits thrown away. They take turns; and since a machine with
    other work on it gives other times to each turn, `evaluate` is also told against the same forwards inside of it.

    The tokens are pieces of the vocabulary. To read as the tokenizer did without them, it is loaded anew once, which
    takes the same time for any number of texts; that share is told beside the whole.
    """

    def clock() -> float:
        if device.type != "cuda":
            return time.process_time()
        torch.cuda.synchronize(device)
        return time.perf_counter()

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
        inside: list[float] = []

        def evaluate(own: list[str] = own, inside: list[float] = inside) -> Forwards:
            with Forwards(model, clock) as forwards:
                start = clock()
                partial.evaluate(own, progress=False)
                inside.append((clock() - start) / forwards.seconds)
            return forwards

        def reading(own: list[str] = own) -> None:
            for reader in (TextReader(tokenizer, partial.token_ids), TextReader(tokenizer)):
                reader.read(own)

        needed = evaluate()
        width = model.get_input_embeddings().embedding_dim
        states = torch.randn(max(needed.chunks), width, device=device, dtype=model.dtype)

        @torch.no_grad()
        def bare(needed: Forwards = needed, states: torch.Tensor = states) -> None:
            for inputs in needed.batches:
                model.base_model(**inputs)
            for count in needed.chunks:
                model.get_output_embeddings()(states[None, :count])

        times = time_ratios({BARE: bare, "evaluate": evaluate, "reading": reading}, repetitions, device, BARE)
        table.append({
            "texts": name,
            "positions, body": sum(inputs["input_ids"].numel() for inputs in needed.batches),
            "positions, head": sum(needed.chunks),
            "body and head, seconds": times[BARE]["seconds"],
            "evaluate": times["evaluate"]["ratio"],
            "evaluate, to those inside": statistics.median(inside[-repetitions:]),
            "of it reading": times["reading"]["ratio"],
            "body and head, peak MB": peak_bytes(bare, device) / 1e6,
            "evaluate, peak MB": peak_bytes(partial_call(partial.evaluate, own, progress=False), device) / 1e6,
        })  # fmt: skip
    partial.detach()
    return table
