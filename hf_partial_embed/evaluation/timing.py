"""What fewer tokens are worth: seconds that a model takes to generate a text."""

from __future__ import annotations

import time
from collections.abc import Sequence
from typing import Any

import torch

from .alignment import AlignedText

__all__ = ["seconds_per_text"]

_PROMPT = 8
_MOST_TOKENS = 128


@torch.no_grad()
def seconds_per_text(
    before: tuple[Any, Any], after: tuple[Any, Any], texts: Sequence[AlignedText]
) -> tuple[float | None, float | None]:
    """Seconds to generate as many tokens as a text has, before and after, the mean over the texts.

    What is generated does not matter, only how long: after up to 8 tokens of the text it is greedy decoding of
    as many further ones as there are. Of long texts 128 tokens are generated, and the time is multiplied. Before
    and after take turns.

    Args:
        before, after: model and tokenizer.
        texts: the texts.
    """
    totals = [0.0, 0.0]
    timed = [text for text in texts if min(len(reading.ids) for reading in text.readings.values()) > _PROMPT]
    for number, text in enumerate(timed):
        whole = len(text.readings["before"].ids)
        share = min(1.0, _MOST_TOKENS / whole)
        for side, (model, tokenizer) in enumerate((before, after)):
            ids = text.readings["after" if side else "before"].ids
            if not number:
                _generate(model, tokenizer, ids[:_PROMPT], 2)  # first calls take longer
            new = max(1, round(len(ids) * share) - _PROMPT)
            start = time.perf_counter()
            _generate(model, tokenizer, ids[:_PROMPT], new)
            totals[side] += (time.perf_counter() - start) * len(ids) / (new + _PROMPT)
    if not timed:
        return None, None
    return totals[0] / len(timed), totals[1] / len(timed)


def _generate(model: Any, tokenizer: Any, prompt: Sequence[int], new: int) -> None:
    ids = torch.tensor([list(prompt)], device=model.device)
    model.generate(
        input_ids=ids, attention_mask=torch.ones_like(ids), max_new_tokens=new, min_new_tokens=new, do_sample=False,
        num_beams=1, pad_token_id=tokenizer.pad_token_id or tokenizer.eos_token_id or 0,
    )  # fmt: skip
