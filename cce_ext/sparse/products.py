"""The matmuls of the sparse backward: what the tail and the kept entries of hot ids add to the
gradients.

Ordinary PyTorch on any device. Both are one product of factors: a row's factors are its weights of
the hot ids and what it drops in each group and class; theirs are rows of the other matrix, and
each group's mean row by the shape of each class.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from cce_ext.sparse.tail import GROUP, wide_mm


class Factors(NamedTuple):
    """Tail and hot ids in the dtype of the matmuls. K: kinds of rows, which are the classes and,
    with label smoothing, one more that is every row's; G groups.

    tail[n, j] = Σ_k rows[n, H + group(j) K + k] shape[k, j] units[2]; the weight of the i-th hot
    id is rows[n, i] units[0].
    """

    rows: Tensor  # (N, H + G K)
    shape: Tensor  # (K, V)
    hot: Tensor  # (H,) ids
    units: Tensor  # (3,) float32: ones unless the factors are float16


class Tilt(NamedTuple):
    """What the gradients by rows add to the tail: Σ_j rows[n, j] C[ids[j]], in the unit of the
    products with shapes. J sampled ids. None: not needed, or no low-rank head."""

    rows: Tensor | None  # (N, J), in the dtype of the factors
    c: Tensor | None  # (J, D): rows of the classifier
    lora_b: Tensor | None  # (J, R)


def row_gradient(factors: Factors, tilt: Tensor, weight: Tensor, tilted: Tensor) -> Tensor:
    """(N, width): what tail and hot ids add to a gradient by rows, Σ_j g[n, j] weight[j]; weight
    (V, width); tilt (N, J) and tilted (J, width) as in `Tilt`."""
    rows, shape, hot, units = factors
    kinds, whole = shape.shape[0], weight.shape[0] // GROUP
    other = rows.new_empty(rows.shape[1], weight.shape[1])
    count, end = hot.shape[0], whole * GROUP
    torch.index_select(weight, 0, hot, out=other[:count])
    centers = other[count:]
    if whole:
        grouped = shape[:, :end].unflatten(1, (whole, GROUP)).transpose(0, 1)
        to = centers[: whole * kinds].unflatten(0, (whole, kinds))
        torch.bmm(grouped, weight[:end].unflatten(0, (whole, GROUP)), out=to)
    if weight.shape[0] > end:
        torch.mm(shape[:, end:], weight[end:], out=centers[whole * kinds :])
    if rows.dtype != torch.float16:  # needs no units: one product, rounded once
        return (rows @ other).addmm_(tilt, tilted)
    total = wide_mm(rows[:, count:], centers).add_(wide_mm(tilt, tilted)).mul_(units[2])
    total.addcmul_(wide_mm(rows[:, :count], other[:count]), units[0])
    return total.to(rows.dtype)


def column_gradient(factors: Factors, hidden: Tensor, out: Tensor) -> Tensor:
    """out (V, width) = what the tail adds to a gradient by columns, Σ_n g[n, j] hidden[n]; hidden
    (N, width). out may be wider than hidden.

    Returns (H, width), at least float32: what the rows of the hot ids still lack, in units[0].
    """
    rows, shape, hot, units = factors
    product = wide_mm(rows.T, hidden)
    centers = product[hot.shape[0] :]
    if hidden.dtype == torch.float16:
        centers = centers * units[2]
    centers = centers.to(hidden.dtype).unflatten(0, (-1, shape.shape[0]))  # (G, K, width)
    whole = out.shape[0] // GROUP
    if whole:
        grouped = shape[:, : whole * GROUP].T.unflatten(0, (whole, GROUP))
        _bmm(grouped, centers[:whole], out[: whole * GROUP].unflatten(0, (whole, GROUP)))
    ids = slice(whole * GROUP, None)
    if out.shape[0] % GROUP:
        _bmm(shape[:, ids].T[None], centers[-1:], out[ids][None])
    return product[: hot.shape[0]]


def _bmm(a: Tensor, b: Tensor, out: Tensor) -> None:
    """out = a @ b, batched; out may be wider than they are."""
    if out.dtype == a.dtype:
        torch.bmm(a, b, out=out)
    elif a.device.type == "cuda":
        torch.bmm(a, b, out_dtype=out.dtype, out=out)
    else:
        out.copy_(torch.bmm(a, b))
