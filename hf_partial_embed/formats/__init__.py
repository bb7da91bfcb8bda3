"""Token rows in the files of other libraries: PEFT adapters and textual-inversion embeddings.

Both directions go through `TokenRows`. Nothing is unpickled: formats whose files are pickles are refused.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from ..lazy import lazy_names

if TYPE_CHECKING:
    from .lora import read_lora, write_lora
    from .peft import read_peft, write_peft
    from .textual_inversion import read_textual_inversion, write_textual_inversion

__all__ = [
    "read_lora",
    "read_peft",
    "read_textual_inversion",
    "write_lora",
    "write_peft",
    "write_textual_inversion",
]

__getattr__, __dir__ = lazy_names(
    __name__,
    {
        "read_lora": "lora",
        "write_lora": "lora",
        "read_peft": "peft",
        "write_peft": "peft",
        "read_textual_inversion": "textual_inversion",
        "write_textual_inversion": "textual_inversion",
    },
)
