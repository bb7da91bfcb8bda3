"""`python -m hf_partial_embed.cli`."""

import sys

from .main import main

sys.exit(main())
