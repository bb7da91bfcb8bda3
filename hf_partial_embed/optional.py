"""Packages that only some functions need: imported when used, with an error that names the extra."""

from __future__ import annotations

import importlib
from typing import Any

from .errors import PartialEmbeddingError

__all__ = ["need"]


def need(module: str, extra: str, purpose: str) -> Any:
    """Import a module that one of this package's extras installs.

    Args:
        module: its name.
        extra: the extra.
        purpose: what it is needed for, as the subject of the error message.

    Returns:
        The module.

    Raises:
        `PartialEmbeddingError`: it is not installed; says which extra to install.
    """
    try:
        return importlib.import_module(module)
    except ModuleNotFoundError as error:
        if (error.name or "").partition(".")[0] != module.partition(".")[0]:
            raise  # it is installed, and a module that it imports is missing
        package = module.partition(".")[0]
        raise PartialEmbeddingError(
            f'{purpose} needs {package}, which is not installed: pip install "hf_partial_embed[{extra}]".'
        ) from error
