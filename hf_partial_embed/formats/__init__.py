"""Token rows in the files of other libraries: PEFT adapters and textual-inversion embeddings.

Both directions go through `TokenRows`. Nothing is unpickled: formats whose files are pickles are refused.
"""

from __future__ import annotations

from .peft import read_peft, write_peft
from .textual_inversion import read_textual_inversion, write_textual_inversion

__all__ = ["read_peft", "read_textual_inversion", "write_peft", "write_textual_inversion"]
