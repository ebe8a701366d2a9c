"""The matmuls of the sparse backward: what the tail and the kept entries of hot ids add to the
gradients.

Ordinary PyTorch on any device. Both are one product of factors: a row's factors are its weights of
the tilted and the hot ids and what it drops in each group and class; theirs are rows of the other
matrix, and each group's mean row by the shape of each class. By columns the last step, which spreads
a group's rows over its ids, is a kernel that adds the other entries too (csrc/cuda/sparse/columns.cu).
"""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
from torch import Tensor

from cce_ext.sparse.tail import GROUP, wide_mm

# Of a product, that leave most of a large GPU idle.
_FEW_TILES = 32


class Factors(NamedTuple):
    """Tilt, hot ids and tail in the dtype of the matmuls. K: kinds of rows, which are the classes
    and, with label smoothing, one more that is every row's; G groups.

    The gradients by rows alone have the tilt, whose j-th id weighs rows[n, j] units[2]. The weight
    of the i-th hot id is rows[n, J + i] units[0]; tail[n, j] =
    Σ_k rows[n, J + H + group(j) K + k] shape[k, j] units[2].
    """

    rows: Tensor  # (N, J + H + G K)
    shape: Tensor  # (K, V)
    tilted: Tensor  # (J,) ids, none where no gradient by rows is wanted
    hot: Tensor  # (H,) ids
    units: Tensor  # (3,) float32: ones unless the factors are float16

    def of_columns(self) -> Tensor:
        """(N, H + G K): those that gradients by columns have too."""
        return self.rows[:, self.tilted.shape[0] :]


def picked(a: Tensor, ids: Tensor, b: Tensor, others: Tensor, more: int = 0) -> Tensor:
    """Those rows of a, in b's dtype, then those rows of b, then room for more (i + j + more, width)."""
    count = ids.shape[0] + others.shape[0]
    out = b.new_empty(count + more, b.shape[1])
    if out.device.type == "cuda":
        torch.ops.cce.pick_rows_(out, a, ids, b, others)
    else:
        torch.cat([a[ids].to(b.dtype), b[others]], out=out[:count])
    return out


def of_ids(factors: Factors, weight: Tensor) -> Tensor:
    """(J + H + G K, width): weight's rows of the tilted and the hot ids, then room for the groups';
    weight (V, width)."""
    rows, _, tilted, hot, _ = factors
    more = rows.shape[1] - tilted.shape[0] - hot.shape[0]
    return picked(weight, tilted, weight, hot, more)


def row_gradient(factors: Factors, weight: Tensor, other: Tensor) -> Tensor:
    """(N, width): what tilt, hot ids and tail add to a gradient by rows, Σ_j g[n, j] weight[j];
    weight (V, width). other: `of_ids` of them; the groups' rows are written to it."""
    rows, shape, tilted, hot, units = factors
    kinds, (vocab, width) = shape.shape[0], weight.shape
    tilt, count = tilted.shape[0], tilted.shape[0] + hot.shape[0]
    whole = vocab // GROUP
    end = whole * GROUP
    centers = other[count:]
    if whole:
        grouped = shape[:, :end].view(kinds, whole, GROUP).transpose(0, 1)
        to = centers[: whole * kinds].view(whole, kinds, width)
        torch.bmm(grouped, weight[:end].view(whole, GROUP, width), out=to)
    if vocab > end:
        torch.mm(shape[:, end:], weight[end:], out=centers[whole * kinds :])
    if rows.dtype != torch.float16:  # needs no units: one product, rounded once
        return rows @ other
    total = wide_mm(rows[:, count:], centers).add_(wide_mm(rows[:, :tilt], other[:tilt]))
    total.mul_(units[2])
    total.addcmul_(wide_mm(rows[:, tilt:count], other[tilt:count]), units[0])
    return total.to(rows.dtype)


def column_product(factors: Factors, hidden: Tensor) -> Tensor:
    """(H + G K, width), at least float32: the rows' factors by hidden (N, width), from which
    ``cce::column_gradient_`` makes the gradient by columns: Σ_n g[n, j] hidden[n] of the i-th hot id
    is row i times units[0], and of every id Σ_k shape[k, j] row[H + group(j) K + k] times units[2].

    Few columns are few tiles, each of which would go through all N rows: there the rows are cut into
    parts that are multiplied at the same time.
    """
    columns = factors.of_columns()
    tiles = math.ceil(columns.shape[1] / 128) * math.ceil(hidden.shape[1] / 256)
    parts = math.gcd(max(hidden.shape[0], 1), 8) if tiles <= _FEW_TILES else 1
    if parts == 1 or hidden.device.type != "cuda":
        return wide_mm(columns.T, hidden)
    a, b = columns.unflatten(0, (parts, -1)).mT, hidden.unflatten(0, (parts, -1))
    return torch.bmm(a, b, out_dtype=torch.float32).sum(0)
