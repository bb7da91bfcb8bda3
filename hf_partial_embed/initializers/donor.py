"""Rows of another model's tokens, rebuilt from the tokens that both models have."""

from __future__ import annotations

import importlib
import warnings
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from ..errors import PartialEmbeddingError, count, shorten
from ..tokens.vocabulary import encode_all, texts_by_id
from .pieces import subtoken_mean
from .registry import InitRequest
from .table_statistics import trained_mask

__all__ = ["Donor"]


@dataclass(frozen=True)
class Donor:
    """A donor model's row as a sparse combination of shared tokens, rebuilt from this model's rows of them.

    For each new token with the donor's row `x`, orthogonal matching pursuit finds at most `nonzero` tokens that both
    vocabularies have, and coefficients `c`, so that `x ≈ Σ c_i D_i` with the donor's rows `D` of these tokens. The
    new row is `Σ c_i B_i` with this model's rows `B`. Where the donor reads the token as several pieces, too, `x` is
    the mean of their rows. Head rows are made of head rows if the donor has a head.

    Needs: scikit-learn (`pip install "hf_partial_embed[init]"`) and the donor's model and tokenizer.
    Cost: `n·d·nonzero` for each token, with `n` shared tokens.
    Source: Goddard and Fernandes Neto, "Training-Free Tokenizer Transplantation via Orthogonal Matching
    Pursuit", 2025; the pursuit: Pati, Rezaiifar and Krishnaprasad, 1993.

    Args:
        model: the donor.
        tokenizer: the donor's.
        nonzero: largest number of shared tokens in a combination.

    Raises:
        `PartialEmbeddingError`: scikit-learn is missing; no shared tokens; the donor cannot read a token.
    """

    model: Any
    tokenizer: Any
    nonzero: int = 64

    def __call__(self, request: InitRequest) -> Tensor:
        if request.role in ("bias", "extra"):
            return subtoken_mean(request)
        try:
            linear_model = importlib.import_module("sklearn.linear_model")
        except ImportError as error:
            raise PartialEmbeddingError(
                'Donor needs scikit-learn. Install it with pip install "hf_partial_embed[init]".'
            ) from error
        donor = self._table(request.role)
        own_ids, donor_ids = self._shared(request, donor)
        dictionary = donor[donor_ids].double().cpu()
        wanted = self._wanted(request, donor).double().cpu()
        norms = dictionary.norm(dim=1).clamp(min=torch.finfo(torch.float64).tiny)
        most = max(1, min(self.nonzero, len(own_ids), dictionary.shape[1]))
        with warnings.catch_warnings():
            # It warns where a row is a combination of fewer tokens, which is no problem here.
            warnings.filterwarnings("ignore", message="[\\s\\S]*Orthogonal matching pursuit ended prematurely")
            coefficients = linear_model.orthogonal_mp(
                (dictionary / norms[:, None]).T.numpy(), wanted.T.numpy(), n_nonzero_coefs=most
            )
        weights = torch.as_tensor(coefficients).reshape(len(own_ids), -1).T / norms
        old = request.table[torch.tensor(own_ids, device=request.table.device)].double()
        rows = (weights.to(old.device) @ old).float()
        return request.keep_norms(rows)

    def _table(self, role: str) -> Tensor:
        head = self.model.get_output_embeddings() if role == "output" else None
        module = self.model.get_input_embeddings() if head is None else head
        weight: Tensor = module.weight.detach()
        return weight

    def _shared(self, request: InitRequest, donor: Tensor) -> tuple[list[int], list[int]]:
        """Ids of the shared tokens in this vocabulary and in the donor's, in the same order."""
        trained = request.trained_rows.tolist()
        there_trained = trained_mask(len(donor), self.tokenizer, self.tokenizer.pad_token_id).tolist()
        there = {
            text: token_id
            for token_id, text in texts_by_id(self.tokenizer, len(donor)).items()
            if there_trained[token_id]
        }
        here = sorted(texts_by_id(request.tokenizer, len(request.table)).items())
        pairs = [(token_id, there[text]) for token_id, text in here if trained[token_id] and text in there]
        if not pairs:
            raise PartialEmbeddingError(
                f"The donor's tokenizer ({count(list(there), 'token')}) shares no token with this one's "
                f"({count(here, 'token')}). Take a donor whose vocabulary overlaps."
            )
        return [own for own, _ in pairs], [other for _, other in pairs]

    def _wanted(self, request: InitRequest, donor: Tensor) -> Tensor:
        pieces = encode_all(self.tokenizer, list(request.tokens))
        pieces = [[i for i in ids if i < len(donor) and i != self.tokenizer.pad_token_id] for ids in pieces]
        unread = [token for token, ids in zip(request.tokens, pieces, strict=True) if not ids]
        if unread:
            raise PartialEmbeddingError(
                f"The donor's tokenizer cannot read {shorten(unread)}. Take another donor, or init='subtoken_mean'."
            )
        return torch.stack([donor[torch.tensor(ids, device=donor.device)].double().mean(0) for ids in pieces])
