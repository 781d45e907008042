"""Draws many rows' tokens where their logits are: the rule of `sampling.draw`, on the device.

Knows logits, uniform numbers and cuts; does not know requests, seeds or models.

Shapes: R rows, V vocabulary.
"""

from typing import NamedTuple

import torch
from torch import Tensor


class Cuts(NamedTuple):
    """What each row's draw may take: temperature float64 (R,), above 0; top_k int64 (R,), 0 for all; top_p float64
    (R,), in (0, 1]."""

    temperature: Tensor
    top_k: Tensor
    top_p: Tensor


def draw_rows(logits: Tensor, at: Tensor, cuts: Cuts, ordered: bool) -> tuple[Tensor, Tensor]:
    """The token of each row at `at` float64 (R,), in [0, 1), of its cut distribution, int64 (R,), and its
    log-probability under the whole one, float64 (R,): NaN where the logits have no finite maximum.

    `ordered`: whether any row has a top_k or a top_p: their tokens are counted from the likeliest (of equal ones the
    lower id), those of the others by id. In float64, as on the host: a draw differs only where `at` falls within
    rounding of a border between two tokens.
    """
    logits = logits.double()
    largest = logits.amax(-1, keepdim=True)
    share = ((logits - largest) / cuts.temperature[:, None]).exp()
    if ordered:
        sorted_share, ids = share.sort(dim=-1, descending=True, stable=True)
        cut = (cuts.top_k > 0) & (cuts.top_k < share.shape[-1]) | (cuts.top_p < 1)
        by_id = torch.arange(share.shape[-1], device=share.device).expand_as(ids)
        ids = torch.where(cut[:, None], ids, by_id)
        share = torch.where(cut[:, None], _kept(sorted_share, cuts), share)
    reached = share.cumsum(-1)
    place = torch.searchsorted(reached, at[:, None] * reached[:, -1:], right=True)
    # Rounding may put `at` behind all of them.
    last = torch.where(share > 0, torch.arange(share.shape[-1], device=share.device), 0).amax(-1, keepdim=True)
    place = place.minimum(last)
    token = ids.gather(-1, place) if ordered else place
    logprob = logits.gather(-1, token) - largest - (logits - largest).exp().sum(-1, keepdim=True).log()
    return token[:, 0], logprob[:, 0]


def _kept(share: Tensor, cuts: Cuts) -> Tensor:
    """Shares in descending order, zero beyond the row's cut: the k largest, and of those the ones before which less
    than top_p of them all stands."""
    rank = torch.arange(share.shape[-1], device=share.device)
    most = torch.where(cuts.top_k > 0, cuts.top_k, share.shape[-1])
    share = share * (rank < most[:, None])
    reached = share.cumsum(-1)
    before = torch.cat([torch.zeros_like(reached[:, :1]), reached[:, :-1]], -1)
    inside = (before < cuts.top_p[:, None] * share.sum(-1, keepdim=True)) | (cuts.top_p[:, None] >= 1)
    return share * (inside | (rank == 0))
