"""A DoRA output layer as a classifier and a low-rank update that the loss can fuse.

DoRA (Liu et al., arXiv 2402.09353, section 4.3) gives each row of W + s B A the length m: logits are
g * (e Wᵀ + s (e Aᵀ) Bᵀ) with one factor g = m / ‖W + s B A‖ a vocabulary row, whose norm is a
constant for the gradient. The factor moves into the rows of W and of B. So the loss needs a scaled
copy of W, and m's gradient needs that copy's: (V, D) twice, instead of logits (N, V).
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from cce_ext.heads import Adapter, Head

# Rows in memory at a time in float32.
_ROWS = 4096


def apply_magnitude(head: Head) -> Head:
    """The head (weight (V, D), one adapter, magnitude (V,)) with its magnitude inside weight and
    adapter; differentiable by all of them."""
    (adapter,) = head.adapters
    factor = head.magnitude / row_norms(head.weight, adapter)
    b = (adapter.b * factor[:, None]).to(adapter.b.dtype)
    weight = _ScaleRows.apply(head.weight, factor)
    return head._replace(weight=weight, adapters=(adapter._replace(b=b),), magnitude=None)


@torch.no_grad()
def row_norms(weight: Tensor, adapter: Adapter) -> Tensor:
    """Lengths (V,) of the rows of weight + scale * b a, float32 (float64 for float64 weights)."""
    wide = torch.float64 if weight.dtype == torch.float64 else torch.float32
    a = adapter.a.to(wide) * adapter.scale
    norms = torch.empty(weight.shape[0], dtype=wide, device=weight.device)
    for first in range(0, weight.shape[0], _ROWS):
        rows = slice(first, first + _ROWS)
        update = adapter.b[rows].to(wide) @ a
        torch.linalg.vector_norm(weight[rows].to(wide) + update, dim=1, out=norms[rows])
    return norms


class _ScaleRows(torch.autograd.Function):
    """weight (V, D) times factor (V,), rounded once to weight's dtype; bounded memory beside the
    result."""

    @staticmethod
    def forward(ctx: Any, weight: Tensor, factor: Tensor) -> Tensor:
        ctx.save_for_backward(weight, factor)
        scaled = torch.empty_like(weight)
        for first in range(0, weight.shape[0], _ROWS):
            rows = slice(first, first + _ROWS)
            scaled[rows] = weight[rows].to(factor.dtype) * factor[rows, None]
        return scaled

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, Tensor | None]:
        weight, factor = ctx.saved_tensors
        need_weight, need_factor = ctx.needs_input_grad
        d_weight = torch.empty_like(weight) if need_weight else None
        d_factor = torch.empty_like(factor) if need_factor else None
        for first in range(0, weight.shape[0], _ROWS):
            rows = slice(first, first + _ROWS)
            part = gradient[rows].to(factor.dtype)
            if need_factor:
                d_factor[rows] = (part * weight[rows].to(factor.dtype)).sum(1)
            if need_weight:
                d_weight[rows] = part * factor[rows, None]
        return d_weight, d_factor
