"""What goes with the cross-entropy: the cap of its logits, the z-loss."""

from __future__ import annotations

import torch
from torch import Tensor

from cce_ext.checks import check_reduction
from cce_ext.constants import IGNORE_INDEX


def softcapping(logits: Tensor, softcap: float) -> Tensor:
    """softcap * tanh(logits / softcap): what the loss's option of that name does to its logits, for
    those who need the logits themselves. Any shape and floating dtype."""
    return softcap * torch.tanh(logits / softcap)


def compute_z_loss(
    lse: Tensor,
    targets: Tensor | None = None,
    shift: bool | int = 0,
    ignore_index: int = IGNORE_INDEX,
    reduction: str = "mean",
) -> Tensor:
    """The z-loss, the mean of squared logsumexps, which keeps logits from drifting (PaLM, arXiv
    2204.02311, section 5).

    Args:
        lse: logsumexp of each token, as ``linear_cross_entropy(..., return_lse=True)`` returns it;
            with a shift it is already shorter than targets by shift.
        targets: the targets given to the loss; tokens at ignore_index do not count. None: all
            tokens count.
        shift: the shift given to the loss.
        reduction: "mean" over the tokens that count (0 if none does), "sum" or "none".

    Raises:
        ValueError: unknown reduction, or targets that do not fit lse.
    """
    check_reduction(reduction)
    z_loss = lse.pow(2)
    count: Tensor | int = z_loss.numel()
    if targets is not None:
        if int(shift):
            targets = targets[..., int(shift) :]
        if targets.shape != lse.shape:
            raise ValueError(
                f"targets must have lse's shape {tuple(lse.shape)} after the shift, got {tuple(targets.shape)}"
            )
        valid = targets != ignore_index
        z_loss = torch.where(valid, z_loss, 0.0)
        count = valid.sum()
    if reduction == "none":
        return z_loss
    total = z_loss.sum()
    if reduction == "sum":
        return total
    return total / (count.clamp(min=1) if isinstance(count, Tensor) else max(count, 1))
