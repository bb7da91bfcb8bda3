"""A model with trainable rows as whoever walks it for its weights is to see it: as if it were merged."""

from __future__ import annotations

from torch import nn

from ..errors import PartialEmbeddingError, shorten
from .rows import PartialModule

__all__ = ["MergedView"]


class MergedView:
    """While it is open, a model's parameters and `state_dict()` are those of the merged model.

    The rows are written into the tables when it is opened, and `new_rows` is no child of its module for the time, so
    that `named_parameters()`, `state_dict()` and a walk over submodules have the names, shapes and values of an
    ordinary model of the grown vocabulary. Nothing is copied. The modules reach their rows as before: forwards run,
    and an optimizer keeps the parameters that it has. Under FSDP2 every process opens it.

    Args:
        model: the model, or what wraps it (PEFT).

    Raises:
        `PartialEmbeddingError`: on opening, tables or rows of which this process cannot see the whole (ZeRO-3, FSDP1,
            offloaded ones). Nothing has changed.
    """

    def __init__(self, model: nn.Module) -> None:
        self.model = model
        self._hidden: list[PartialModule] = []

    def __enter__(self) -> nn.Module:
        modules = [module for module in self.model.modules() if isinstance(module, PartialModule)]
        for module in modules:
            out_of_reach = set(module._row_sources) - set(module._names_here(collective=True))
            if out_of_reach:
                raise PartialEmbeddingError(
                    f"The rows of {type(module).__name__} cannot be written into {shorten(sorted(out_of_reach))}: "
                    "they are partitioned (DeepSpeed ZeRO-3, FSDP1) or offloaded. Hand on what model.save_pretrained "
                    "writes, or train under FSDP2, DDP or ZeRO-2."
                )
        for module in modules:
            module.write_rows(module._row_sources)
        try:
            for module in modules:
                if "new_rows" in module._modules:
                    self._hidden.append(module)  # first, so that an interrupt in between is put right
                    module.__dict__["new_rows"] = module._modules["new_rows"]
                    del module._modules["new_rows"]
        except BaseException:
            self.__exit__()
            raise
        return self.model

    def __exit__(self, *_: object) -> None:
        while self._hidden:
            module = self._hidden[-1]
            rows = module.__dict__.get("new_rows")
            if rows is not None:
                module._modules["new_rows"] = rows
                del module.__dict__["new_rows"]
            self._hidden.pop()
