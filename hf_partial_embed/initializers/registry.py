"""What an initialiser is given and has to return, and the initialisers by name."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

import torch
from torch import Tensor

from ..tokens.entering import Preview
from .table_statistics import norm_range, trained_mask

__all__ = ["INITIALIZERS", "InitRequest", "Initializer", "register"]


@dataclass(frozen=True)
class InitRequest:
    """What an initialiser is given.

    Attributes:
        table: the old rows of the table, `[V, ...]`, in the model's dtype; not to be changed.
        role: `"input"`, `"output"`, `"bias"` or `"extra"`.
        tokens: the new tokens' texts, `K` of them.
        pieces: for each token the ids of what its text, or its description, consisted of before it was
            added; ids of padding and of unknown tokens are left out.
        padding: id of the padding, whose row is not trained; `None` where there is none.
        model, tokenizer: as they were passed to `add_tokens`, before anything was added.
        generator: source of random numbers, seeded with `add_tokens(..., seed=)`.
        described: for each token whether `pieces` are those of a description.
        preview: makes the tokenizer as it is going to be, where some of the tokens become pieces of its
            vocabulary; else `None`.
        memo: shared by the calls for all tables within one `add_tokens`, for costly results that serve several of them
            (texts that a model has generated).
        untrained: ids of rows of the table that the tokens will take: they enter no mean.
    """

    table: Tensor
    role: str
    tokens: Sequence[str]
    pieces: Sequence[Sequence[int]]
    padding: int | None
    model: Any
    tokenizer: Any
    generator: torch.Generator
    described: Sequence[bool] = ()
    preview: Callable[[], Preview] | None = None
    memo: dict[str, Any] = field(default_factory=dict)
    untrained: Sequence[int] = ()

    @cached_property
    def trained_rows(self) -> Tensor:
        """Bool `[V]`: rows that belong to a token. Spare rows, rows in gaps between ids and the padding row have not
        been trained, and should not enter a mean.
        """
        trained = trained_mask(len(self.table), self.tokenizer, self.padding)
        trained[[token_id for token_id in self.untrained if token_id < len(trained)]] = False
        return trained

    def previewed(self) -> Preview | None:
        """The tokenizer as it is going to be, made once; `None` where no token becomes a piece of the vocabulary."""
        if self.preview is not None and "preview" not in self.memo:
            self.memo["preview"] = self.preview()
        found: Preview | None = self.memo.get("preview")
        return found

    @property
    def shared(self) -> bool:
        """Whether the rows are input rows and output rows at once, because the head is tied."""
        tables = [
            getattr(getattr(self.model, f"get_{which}_embeddings")(), "_parameters", {}).get("weight")
            for which in ("input", "output")
        ]
        return self.role == "input" and tables[0] is not None and tables[0] is tables[1]

    def keep_norms(self, rows: Tensor) -> Tensor:
        """Shorten rows of a tied table that are longer than its longest trained row.

        A row of a tied table is an output row, too. A long one gives its token large logits in every context, and so
        takes probability where the token does not belong.
        """
        if not self.shared:
            return rows
        _, longest = norm_range(self.table, self.trained_rows)
        norms = rows.norm(dim=1, keepdim=True).clamp(min=torch.finfo(rows.dtype).tiny)
        shorter: Tensor = rows * (longest / norms).clamp(max=1)
        return shorter


Initializer = Callable[[InitRequest], Tensor]

INITIALIZERS: dict[str, Initializer] = {}


def register(name: str) -> Callable[[Initializer], Initializer]:
    """Make an initialiser known under a name."""

    def add(initializer: Initializer) -> Initializer:
        INITIALIZERS[name] = initializer
        return initializer

    return add
