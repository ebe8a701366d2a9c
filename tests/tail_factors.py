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


def spread_columns(factors: Factors, product: Tensor) -> Tensor:
    """(V, width), of product's dtype: what tail and hot ids add to a gradient by columns, from
    column_product's result."""
    _, shape, _, hot, units = factors
    vocab = shape.shape[1]
    by_group = (product[hot.shape[0] :] * units[2]).unflatten(0, (-1, shape.shape[0]))
    by_group = torch.cat(  # (G, K, width); label smoothing's is not rounded
        [by_group[:, : tail.CLASSES].to(shape.dtype), by_group[:, tail.CLASSES :]], 1
    )
    group = torch.arange(vocab, device=shape.device) // tail.GROUP
    out = torch.zeros(vocab, product.shape[1], dtype=product.dtype, device=product.device)
    for k, of_kind in enumerate(shape.to(product.dtype)):
        out += of_kind[:, None] * by_group[group, k]
    out[hot] += product[: hot.shape[0]] * units[0]
    return out
