"""`add_tokens` for tests that are about rows and added tokens: each token is one row, cut out of the text.

What else can come of a plain string is tested in `tests/tokens/test_entering.py`.
"""

from __future__ import annotations

from functools import partial

from hf_partial_embed import add_tokens as add_tokens_as

add_tokens = partial(add_tokens_as, entry="added")
