"""`SplitEmbedding`: an embedding in which some rows train and all others stay frozen."""

from __future__ import annotations

import operator
from collections.abc import Iterable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..errors import PartialEmbeddingError
from .rows import PartialModule, TableProperty
from .splitting import (
    check_base_size,
    check_ids,
    check_module,
    fast_class,
    present_rows,
    share_state,
    split_class,
    split_module,
)

__all__ = ["SplitEmbedding"]


@fast_class(nn.Embedding)
class SplitEmbedding(PartialModule, nn.Embedding):
    """An `nn.Embedding` in which the rows `trainable_ids` train and all others are frozen.

    Args:
        embedding (`nn.Embedding`): the module to take over. Its weight is shared, not copied, and is
            frozen (`requires_grad=False`). A subclass keeps its own forward.
        trainable_ids (ids, in any order): the rows that train. They start at their present values.
        dtype (`torch.dtype`, *optional*): dtype of the trainable rows; the table's if not given.
        base_size (`int`, *optional*): number of rows that the table had before it grew, for the logits of a
            head that is tied to it; all rows if not given.

    Raises:
        `PartialEmbeddingError`: `embedding` is not an `nn.Embedding`, or is quantised; ids are out of range or
            repeated; `max_norm`, `sparse` or `scale_grad_by_freq` is set (`max_norm` rewrites frozen rows at every
            lookup; the other two concern the gradient of the whole table, which does not exist here).

    Example:
    ```python
    embedding = SplitEmbedding(nn.Embedding(1000, 64), trainable_ids=[3, 17, 999])
    embedding.new_rows.weight.shape  # torch.Size([3, 64]), the only trainable parameter
    ```
    """

    weight: Any = TableProperty("weight")
    _table_names = frozenset({"weight"})
    _unsplit_class = nn.Embedding

    def __new__(cls, embedding: nn.Embedding | None = None, *args: Any, **kwargs: Any) -> SplitEmbedding:
        made: SplitEmbedding = super().__new__(
            split_class(type(embedding), {"weight"}) if isinstance(embedding, nn.Embedding) else cls
        )
        return made

    def __init__(
        self,
        embedding: nn.Embedding,
        *,
        trainable_ids: Iterable[int],
        dtype: torch.dtype | None = None,
        base_size: int | None = None,
    ) -> None:
        check_module(embedding, nn.Embedding, "SplitEmbedding")
        ids = check_ids(trainable_ids, embedding.num_embeddings)
        check_base_size(base_size, embedding.num_embeddings)
        rows = {"weight": present_rows(embedding.weight, ids, dtype)}
        share_state(embedding, self)
        split_module(self, rows, ids, base_size=base_size)

    @classmethod
    def from_pretrained(  # type: ignore[override]
        cls,
        vectors: Any,
        num_new: int,
        *,
        padding_idx: int | None = None,
        dtype: torch.dtype | None = None,
        seed: int = 0,
    ) -> SplitEmbedding:
        """Pretrained vectors that stay frozen, followed by `num_new` rows that train.

        It replaces `nn.Embedding.from_pretrained(vectors)`: ids below `len(vectors)` read frozen rows, the
        `num_new` ids after them trainable ones. The new rows are drawn from a normal distribution with the mean
        and the standard deviation of the vectors in each dimension.

        Args:
            vectors (`torch.Tensor` of shape `(V, dim)`): the pretrained vectors, which are copied; or a NumPy array
                or nested list of this shape. The module has their dtype, as `torch.as_tensor` gives it.
            num_new (`int`): number of trainable rows, at least 1.
            padding_idx (`int`, *optional*): as in `nn.Embedding`, in `[-(V + num_new), V + num_new)`.
            dtype (`torch.dtype`, *optional*): dtype of the trainable rows; the vectors' if not given.
            seed (`int`): seed of the new rows' values.

        Returns:
            `SplitEmbedding` of `V + num_new` rows.

        Raises:
            `PartialEmbeddingError`: `vectors` is not a floating-point matrix, or `num_new` is below 1.
        """
        vectors, num_new = _matrix(vectors), _count(num_new)
        size, width = vectors.shape
        table = vectors.new_empty(size + num_new, width, requires_grad=False)
        table[:size] = vectors.detach()
        generator = torch.Generator().manual_seed(seed)
        noise = torch.randn(num_new, width, generator=generator, dtype=torch.float32).to(table.device)
        spread = vectors.detach().float().std(0, correction=0) if size else torch.ones(width)
        mean = vectors.detach().float().mean(0) if size else torch.zeros(width)
        table[size:] = (mean + spread * noise).to(table.dtype)
        if padding_idx is not None and padding_idx % (size + num_new) >= size:
            table[padding_idx] = 0
        embedding = nn.Embedding(size + num_new, width, padding_idx=padding_idx, _weight=table, _freeze=True)
        return cls(embedding, trainable_ids=range(size, size + num_new), dtype=dtype, base_size=size)

    @classmethod
    def check_options(cls, module: Any, names: Iterable[str]) -> None:
        """Refuse options of `nn.Embedding` that rewrite frozen rows or concern the gradient of the whole table."""
        if "weight" not in names:
            return
        reasons = {
            "max_norm": "it rewrites rows in place at every lookup, frozen ones too",
            "sparse": "the trainable rows have a small dense gradient of their own",
            "scale_grad_by_freq": "it counts ids over the whole table",
        }
        for option, reason in reasons.items():
            if getattr(module, option, None):
                raise PartialEmbeddingError(
                    f"Cannot split an embedding with {option}={getattr(module, option)!r}: {reason}. "
                    f"Build it without {option}."
                )

    def forward(self, input: Tensor) -> Tensor:
        """Look up frozen and trainable rows.

        Args:
            input (`torch.Tensor` of any shape, int32 or int64): ids; never changed in place.

        Returns:
            `torch.Tensor` of shape `(*input.shape, dim)`, in the table's dtype.

        Raises:
            `IndexError`: an id outside of the table, as `nn.Embedding` raises it.
        """
        source = self._row_sources["weight"]
        table: Tensor = self.raw_table("weight")
        # Detached, so that frozen rows get no gradient even after model.requires_grad_(True).
        old = F.embedding(input, table.detach())
        is_new, row = source.lookup(input)
        # As in nn.Embedding, the row at padding_idx gets no gradient.
        padding_row = None if self.padding_idx is None else source.index.row_of.get(self.padding_idx)
        rows = source.rows()
        if source.tied and _in_graph(rows):
            # looked_up is for the head.
            new, source.looked_up = _LookUp.apply(rows, row, padding_row)  # type: ignore[no-untyped-call]
        else:
            new = F.embedding(row, rows, padding_row)
        return torch.where(is_new.unsqueeze(-1), new.to(old.dtype), old)


def _in_graph(rows: Tensor) -> bool:
    """Whether these are a parameter (not several sets, nor part of a flat one) whose gradient is wanted."""
    wanted = torch.is_grad_enabled() and rows.requires_grad
    return wanted and type(rows) is nn.Parameter and not torch.compiler.is_compiling()


class _LookUp(torch.autograd.Function):
    """A lookup of rows, and all rows once more, for a head that is tied to them.

    Autograd would have a gradient of the size of all rows from each of the two, and add them. Here the few rows of
    the lookup's are added to the head's. At 32,768 rows the other gradient, to be allocated and filled with zeros,
    would be a tenth of the step.
    """

    @staticmethod
    def forward(rows: Tensor, row: Tensor, padding_row: int | None) -> tuple[Tensor, Tensor]:
        return F.embedding(row, rows), rows.view_as(rows)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
        rows, row, ctx.padding_row = inputs
        ctx.size = rows.shape[0]
        # A copy that is no saved tensor, since this backward may be part of several: the head's may come later.
        ctx.row = row.clone()
        ctx.set_materialize_grads(False)

    @staticmethod
    def backward(ctx: Any, grad: Tensor | None, grad_rows: Tensor | None) -> tuple[Tensor | None, None, None]:
        if grad is None:
            return grad_rows, None, None
        padding_row = -1 if ctx.padding_row is None else ctx.padding_row
        # 16 bits would lose a small addend after the other. And a graph of the backward allows no change in place.
        if grad_rows is None or torch.is_grad_enabled() or grad_rows.dtype.itemsize < 4:
            dense = torch.ops.aten.embedding_dense_backward(grad, ctx.row, ctx.size, padding_row, False)
            return dense if grad_rows is None else grad_rows + dense, None, None
        if padding_row >= 0:
            grad = grad.masked_fill((ctx.row == padding_row).unsqueeze(-1), 0)
        # In place: it is the head's, made for this.
        return grad_rows.index_add_(0, ctx.row.flatten(), grad.reshape(-1, grad.shape[-1])), None, None


def _matrix(vectors: Any) -> Tensor:
    """The vectors as a tensor, copied only where that is needed."""
    seen = type(vectors).__name__
    if not isinstance(vectors, Tensor):
        # as_tensor warns about read-only memory, such as a memory-mapped file.
        writable = getattr(getattr(vectors, "flags", None), "writeable", True)
        try:
            vectors = torch.as_tensor(vectors) if writable else torch.tensor(vectors)
        except (TypeError, ValueError, RuntimeError) as error:
            raise PartialEmbeddingError(
                "SplitEmbedding.from_pretrained needs a floating-point matrix of shape (V, dim), as a tensor, a NumPy "
                f"array or a nested list, but got {seen}: {error}"
            ) from error
    if vectors.dim() != 2 or not vectors.is_floating_point() or vectors.layout != torch.strided:
        raise PartialEmbeddingError(
            f"SplitEmbedding.from_pretrained needs a floating-point matrix of shape (V, dim), but got {seen} of shape "
            f"{tuple(vectors.shape)}, {vectors.dtype}, {vectors.layout}."
        )
    matrix: Tensor = vectors
    return matrix


def _count(num_new: Any) -> int:
    try:
        count = 0 if isinstance(num_new, bool) else operator.index(num_new)
    except TypeError:
        count = 0
    if count < 1:
        raise PartialEmbeddingError(
            f"num_new={num_new!r} is not a number of rows that can train. Pass an int of at least 1, "
            "or use nn.Embedding.from_pretrained where nothing is to be learned."
        )
    return count
