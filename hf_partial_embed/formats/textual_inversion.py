"""Textual-inversion files, as diffusers writes and loads them.

A file is a dict of tensors. diffusers writes one entry, from the placeholder token to its vectors, `[d]` or
`[n, d]`. Files for Stable Diffusion XL, which has two text encoders, have the entries `clip_l` and `clip_g`
and do not name the token; the AUTOMATIC1111 web UI writes `emb_params`, which does not either. A concept of
several vectors becomes one token for each: `<cat>_0`, `<cat>_1`, `<cat>_2` (see `tokens.concepts`).
Source: Gal et al., "An Image is Worth One Word", ICLR 2023.
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path

import torch
from torch import Tensor

from ..attachment.partial import TokenRows
from ..errors import PartialEmbeddingError, shorten
from ..tokens.concepts import concepts_of, vector_tokens
from .reading import PICKLES, fetch, load_tensors, refuse_pickle, write_tensors

__all__ = ["read_textual_inversion", "write_textual_inversion"]

FILE = "learned_embeds.safetensors"
ENCODERS = ("clip_l", "clip_g")
_NAMELESS = "emb_params"


def read_textual_inversion(
    source: str | os.PathLike[str],
    *,
    token: str | None = None,
    encoder: str | None = None,
    revision: str | None = None,
) -> TokenRows:
    """Read a textual-inversion file.

    Args:
        source: the file, a folder or a Hub repository with `learned_embeds.safetensors`.
        token: the placeholder; needed where the file does not name it (`clip_l`/`clip_g`, `emb_params`). For a
            file that names one, it is used instead of that name.
        encoder: `"clip_l"` or `"clip_g"`, for a file with vectors for two text encoders.
        revision: of the Hub repository.

    Returns:
        `TokenRows` with a token for each vector. With `tokens.expand_placeholders` the tokenizer reads the
        placeholder as all of them.

    Raises:
        `PartialEmbeddingError`: a pickle (`.bin`, `.pt`), another kind of file, or a file for which `token` or
            `encoder` is needed and not given.
    """
    path = _locate(source, revision)
    tensors = load_tensors(path)
    named, nameless = _entries(path, tensors, encoder)
    if nameless is not None:
        if token is None:
            raise PartialEmbeddingError(
                f"{path} does not say which token its vectors belong to. Give it: token='<{path.stem}>'."
            )
        named = {token: nameless}
    elif token is not None:
        if len(named) != 1:
            raise PartialEmbeddingError(
                f"{path} has vectors for {shorten(list(named))}; token={token!r} can only stand for one."
            )
        named = {token: next(iter(named.values()))}
    tokens: list[str] = []
    rows: list[Tensor] = []
    for name, vectors in named.items():
        _check_vectors(path, name, vectors)
        matrix = vectors.reshape(-1, vectors.shape[-1])
        tokens += vector_tokens(name, len(matrix))
        rows.append(matrix)
    widths = sorted({matrix.shape[1] for matrix in rows})
    if len(widths) > 1:
        raise PartialEmbeddingError(
            f"{path} has vectors of widths {widths}, for more than one text encoder. Give encoder=, one of "
            f"{sorted(tensors)}."
        )
    return TokenRows(tokens=tokens, input_rows=torch.cat(rows))


def write_textual_inversion(
    rows: TokenRows | Mapping[str, TokenRows], path: str | os.PathLike[str], *, token: str | None = None
) -> None:
    """Write the rows of one concept as a file that diffusers' `load_textual_inversion` takes.

    Args:
        rows: of a text encoder; or a dict from `"clip_l"` and `"clip_g"` to the rows of two encoders, which are
            loaded one at a time: `load_textual_inversion(state_dict["clip_l"], token=..., text_encoder=...)`.
        path: the file, `.safetensors`; or a folder, in which it is `learned_embeds.safetensors`.
        token: the placeholder of the concept to be written; needed where the rows have several.

    Raises:
        `PartialEmbeddingError`: the rows have no concept, or several and `token` does not say which; rows that the
            format has no place for, such as a head's.
    """
    path = Path(path)
    refuse_pickle(path)
    if path.suffix != ".safetensors":
        path = path / FILE
    if isinstance(rows, Mapping):
        unknown = sorted(set(rows) - set(ENCODERS))
        if unknown or not rows:
            raise PartialEmbeddingError(f"Text encoders {unknown} are unknown. Use {' and '.join(ENCODERS)}.")
        write_tensors(path, {name: _vectors(part, token)[1] for name, part in rows.items()})
    else:
        name, vectors = _vectors(rows, token)
        write_tensors(path, {name: vectors})


def _locate(source: str | os.PathLike[str], revision: str | None) -> Path:
    path = Path(source)
    if path.is_file():
        return path
    if path.is_dir() and not (path / FILE).is_file():
        pickles = sorted(entry for entry in path.iterdir() if entry.suffix in PICKLES)
        for pickle in pickles:
            refuse_pickle(pickle)
    return fetch(source, FILE, revision=revision)


def _entries(path: Path, tensors: dict[str, Tensor], encoder: str | None) -> tuple[dict[str, Tensor], Tensor | None]:
    """Vectors by token; or an empty dict and the vectors, for a file that does not name its token."""
    there = [name for name in ENCODERS if name in tensors]
    if there and set(there) == set(tensors):
        if encoder is None and len(there) == 1:
            encoder = there[0]
        if encoder not in there:
            raise PartialEmbeddingError(
                f"{path} has vectors for the text encoders {' and '.join(there)}. Say which one is meant: "
                f"encoder={there[0]!r}."
            )
        return {}, tensors[encoder]
    if encoder is not None:
        raise PartialEmbeddingError(
            f"{path} has no vectors for the text encoder {encoder!r}; it holds {shorten(sorted(tensors))}."
        )
    if set(tensors) == {_NAMELESS}:
        return {}, tensors[_NAMELESS]
    if not tensors:
        raise PartialEmbeddingError(f"{path} holds no tensors.")
    return tensors, None


def _check_vectors(path: Path, name: str, vectors: Tensor) -> None:
    if vectors.dim() not in (1, 2) or not vectors.is_floating_point() or not vectors.numel():
        raise PartialEmbeddingError(
            f"{path}: {name!r} has shape {tuple(vectors.shape)} and dtype {vectors.dtype}; vectors of a token are "
            "floating-point numbers of shape (d,) or (n, d). It is no textual-inversion file."
        )


def _vectors(rows: TokenRows, token: str | None) -> tuple[str, Tensor]:
    """The placeholder and the vectors `[n, d]` of the concept that is to be written."""
    beyond = sorted(set(rows.tensors()) - {"input_rows"})
    if beyond:
        raise PartialEmbeddingError(
            f"A textual-inversion file has no place for {shorten(beyond)}: it is for text encoders, which have no "
            "head."
        )
    pieces = [token for token, entry in zip(rows.tokens, rows.entries, strict=True) if entry != "added"]
    if pieces:
        raise PartialEmbeddingError(
            f"{shorten(pieces)} are in the vocabulary of the tokenizer's model. A textual-inversion file has no place "
            "for what they are made of, and whoever loads it adds them as added tokens, which cut other words. Use "
            "rows.save_pretrained, or add them with entry='added'."
        )
    concepts = concepts_of(rows.tokens)
    if token is None and len(concepts) != 1:
        raise PartialEmbeddingError(
            f"A textual-inversion file holds one concept, and these rows have "
            f"{shorten(list(concepts)) or 'no tokens'}. Say which: token=..., one file each."
        )
    name = next(iter(concepts)) if token is None else token
    if name not in concepts:
        raise PartialEmbeddingError(
            f"There is no concept {name!r} in these rows; there are {shorten(list(concepts))}."
        )
    index = [rows.tokens.index(member) for member in concepts[name]]
    return name, rows.input_rows[index]
