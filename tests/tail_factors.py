"""The factors of the tail's products in plain PyTorch: what kernels make of them on a GPU."""

from __future__ import annotations

import torch
from torch import Tensor

from cce_ext.sparse import tail
from cce_ext.sparse.products import Factors

# What shapes are multiplied by in float16; kShapeLift in csrc/cuda/sparse/tail.h.
LIFT = 64.0


def make_units(spread: tail.Spread, hot: Tensor | float, dtype: torch.dtype) -> Tensor:
    """(3,): of weights of hot ids, of mass, of products with shapes."""
    accumulate = spread.mass.dtype
    if dtype != torch.float16:
        return torch.ones(3, dtype=accumulate, device=spread.mass.device)
    top = spread.mass.sum(1).abs().max()
    if spread.uniform is not None:
        top = torch.maximum(top, (spread.uniform * tail.GROUP).abs().max())
    return torch.stack([torch.as_tensor(hot, dtype=accumulate).to(top.device), top, top / LIFT])


def make_factors(
    spread: tail.Spread, values: Tensor, ids: Tensor, units: Tensor, dtype: torch.dtype
) -> Factors:
    """Factors of this dtype, without a tilt; values (N, H): weights of the hot ids in units[0]."""
    member = tail.one_hot(spread.classes, tail.CLASSES, spread.mass.dtype)
    kinds, shape = spread.mass[:, :, None] * member[:, None], spread.shape
    if spread.uniform is not None:
        uniform = (spread.uniform * tail.GROUP)[:, None, None]
        kinds = torch.cat([kinds, uniform.expand(-1, kinds.shape[1], 1)], 2)
        shape = torch.cat([shape, shape.new_full((1, shape.shape[1]), 1 / tail.GROUP)])
    lift = LIFT if dtype == torch.float16 else 1.0
    rows = torch.cat([values.to(dtype), (kinds / units[1]).flatten(1).to(dtype)], 1)
    return Factors(rows, (shape * lift).to(dtype), ids[:0], ids, units)
