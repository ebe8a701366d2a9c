"""The training forward on CUDA: the loss, and the lists from which the sparse backward works.

A bound of each row's lse from a sample of its logits; one pass over the vocabulary, which also
collects the entries above bound + log ε; then those that are kept, sorted by row and by column, and
the mass of the others. Nothing waits for the device: every list has a fixed capacity.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
from torch import Tensor

from cce_ext.cuda_backward import readable
from cce_ext.reference import RowStatistics
from cce_ext.sparse import tail

# Columns at equal distances, and targets of the batch, whose logits bound the lse from below.
SAMPLED_COLUMNS = SAMPLED_TARGETS = 1024
# Rows whose sampled logits are in memory at a time.
_BOUND_ROWS = 4096
ROW_BLOCK = 128
#: ids whose kept entries are multiplied as a dense matrix: on trained heads they have 60 % of all
HOT_IDS = 1024


class Lists(NamedTuple):
    """What the backward needs beside the inputs. K: capacity of the lists, N rows, V ids, G groups.

    Kept entries are sorted by row (in row_order) and id; order lists them by id and row.
    """

    rows: Tensor  # (K,) int32
    ids: Tensor  # (K,) int32
    logits: Tensor  # (K,) float32
    order: Tensor  # (K,) int32
    row_first: Tensor  # (N + 1,) int32: where the entries of a position in row_order start
    row_hot: Tensor  # (N,) int32: where those of hot ids start, which come last
    column_first: Tensor  # (V + 1,) int32: where the entries of an id start in `order`
    hot_ids: Tensor  # (H,) int64: the ids that most rows keep, ascending
    slots: Tensor  # (V,) int32: place in hot_ids, -1 for the others
    mass: Tensor  # (N, G) float32: Σ p softcap' of dropped entries
    exact_rows: Tensor  # (N,) bool: rows whose candidates are not all known
    row_order: Tensor  # (N,) int32
    tally: Tensor  # (4,) int64: candidates, kept entries, row blocks that overflowed, row blocks


def _growth(eps: float) -> float:
    """How many more entries are above eps than above 2⁻¹³: trained heads have 1.5 to 1.6 times as
    many a halving."""
    return (2.0**-13 / eps) ** 0.65


def candidate_capacity(n: int, v: int, eps: float) -> int:
    """Candidates that a block of 128 rows can hold: 1024 a row at 2⁻¹³ (trained heads have 250 to
    450, in their worst blocks 920), more where there are few rows."""
    a_row = max(2**23 // max(n, 1), math.ceil(1024 * _growth(eps)))
    return min(v, a_row) * min(n, ROW_BLOCK)


def kept_capacity(n: int, v: int, eps: float) -> int:
    """Entries that the lists can hold, targets included: 320 a row at 2⁻¹³ (trained heads keep 110
    to 190), more where there are few rows."""
    return min(n * v, math.ceil(max(n * 320, 2**20) * _growth(eps))) + n


class Bounds(NamedTuple):
    """What the pass over the vocabulary wants to know of the rows beforehand."""

    order: Tensor  # (N,) int32: row numbers, those that count first
    count: Tensor  # (1,) int32: how many count
    target_logit: Tensor  # (N,): 0 where another shard holds the target
    bound2: Tensor  # (N,): a lower bound of the lse, base 2


class Found(NamedTuple):
    """What that pass leaves for later, when the lse is final. B blocks of 128 rows."""

    # By split of the vocabulary and position in the row order:
    max_sum: Tensor  # (splits, N, 2): the largest logit (base 2), Σ exp below it
    capped: Tensor  # (splits, N): the same sum with softcap'; empty without
    # Entries that may turn out to be kept:
    pool: Tensor  # (B, capacity, 2) int32
    counts: Tensor  # (B,) int32


def lower_bounds(
    e: Tensor,
    c: Tensor,
    targets: Tensor,
    bias: Tensor | None,
    u: Tensor | None,
    lora_b: Tensor | None,
    target_logit: Tensor,
    order: Tensor,
    count: Tensor,
    softcap: float,
    logit_scale: float,
    vocab_start: int,
) -> Tensor:
    """A lower bound (N,) of each row's lse, in base 2; see `reference.sparse_gradients`. That of a
    shard's lse is one of the whole vocabulary's."""
    n, v = e.shape[0], c.shape[0]
    strided = min(SAMPLED_COLUMNS, v)
    ids, counts = torch.ops.cce.bound_columns(
        targets, order, count, v, vocab_start, strided, min(SAMPLED_TARGETS, n)
    )
    columns = c[ids].T
    b_columns = None if lora_b is None else lora_b[ids].to(e.dtype).T
    sampled_bias = None if bias is None else bias[ids].float()
    parts = []
    for first in range(0, n, _BOUND_ROWS):
        part = slice(first, first + _BOUND_ROWS)
        products = torch.mm(e[part], columns, out_dtype=torch.float32)
        if u is not None:
            products = torch.addmm(products, u[part], b_columns, out_dtype=torch.float32)
        parts.append(
            torch.ops.cce.row_bounds(
                products, sampled_bias, counts, target_logit[part], strided, v, softcap, logit_scale
            )
        )
    return parts[0] if len(parts) == 1 else torch.cat(parts)


def bound_rows(
    e: Tensor,
    c: Tensor,
    targets: Tensor,
    bias: Tensor | None,
    u: Tensor | None,
    lora_b: Tensor | None,
    ignore_index: int,
    softcap: float,
    logit_scale: float,
    vocab_start: int,
    vocab_total: int,
) -> Bounds:
    """The order of the rows, their target logits, and bounds of their lse."""
    v = c.shape[0]
    vocab_total = vocab_total or vocab_start + v
    targets = targets.long().contiguous()
    e = readable(e, e.dtype)
    order, count = torch.ops.cce.row_order(targets, ignore_index)
    place = (ignore_index, softcap, logit_scale, vocab_start, vocab_total)
    target_logit = torch.ops.cce.target_logits(e, c, targets, bias, u, lora_b, *place, order, count)
    bound2 = lower_bounds(
        e, c, targets, bias, u, lora_b, _own(target_logit, targets, v, vocab_start, vocab_total),
        order, count, softcap, logit_scale, vocab_start,
    )  # fmt: skip
    return Bounds(order, count, target_logit, bound2)


def _own(target_logit: Tensor, targets: Tensor, v: int, start: int, total: int) -> Tensor:
    """Target logits (N,), -inf instead of 0 for targets of other shards, which bound nothing."""
    if v == total:
        return target_logit
    here = (targets >= start) & (targets < start + v)
    return torch.where(here, target_logit, -torch.inf)


def collect(
    e: Tensor,
    c: Tensor,
    targets: Tensor,
    bias: Tensor | None,
    u: Tensor | None,
    lora_b: Tensor | None,
    ignore_index: int,
    softcap: float,
    logit_scale: float,
    label_smoothing: float,
    vocab_start: int,
    vocab_total: int,
    metrics: bool,
    eps: float,
    bounds: Bounds,
) -> tuple[RowStatistics, Found]:
    """The pass over the vocabulary; other arguments as ``linear_ce_forward``'s."""
    n, v = e.shape[0], c.shape[0]
    options = (ignore_index, softcap, logit_scale, label_smoothing, vocab_start)
    nll, lse, *others, max_sum, capped, pool, counts = torch.ops.cce.training_forward(
        readable(e, e.dtype), c, targets.long().contiguous(), bias, u, lora_b, *options,
        vocab_total or vocab_start + v, metrics, *bounds, eps, candidate_capacity(n, v, eps),
    )  # fmt: skip
    rows = RowStatistics(nll, lse, bounds.target_logit, *others)
    return rows, Found(max_sum, capped, pool, counts)


def make_lists(
    bounds: Bounds,
    found: Found,
    lse: Tensor,
    targets: Tensor,
    ignore_index: int,
    softcap: float,
    shard: tuple[int, int, int],
    eps: float,
) -> Lists:
    """Kept entries by row and by column, and the mass of the others, by the final lse (N,).

    shard: its ids, the first of them, ids in all (0: this shard is the whole).
    """
    v, start, total = shard
    n = lse.shape[0]
    *lists, tally = torch.ops.cce.keep_lists(
        found.pool, found.counts, bounds.bound2, bounds.order, bounds.count, lse,
        bounds.target_logit, targets.long().contiguous(), found.max_sum, found.capped, eps, softcap,
        ignore_index, v, start, total or start + v, kept_capacity(n, v, eps), min(HOT_IDS, v),
    )  # fmt: skip
    return Lists(*lists, bounds.order, tally)


def forward(
    e: Tensor,
    c: Tensor,
    targets: Tensor,
    bias: Tensor | None,
    u: Tensor | None,
    lora_b: Tensor | None,
    ignore_index: int,
    softcap: float,
    logit_scale: float,
    label_smoothing: float,
    vocab_start: int,
    vocab_total: int,
    metrics: bool,
    eps: float,
) -> tuple[Tensor, ...]:
    """The CUDA kernel of ``cce::sparse_ce_forward``: the seven results of ``linear_ce_forward``,
    then the fields of `Lists`."""
    inputs, place = (e, c, targets, bias, u, lora_b), (vocab_start, vocab_total)
    bounds = bound_rows(*inputs, ignore_index, softcap, logit_scale, *place)
    options = (ignore_index, softcap, logit_scale, label_smoothing, *place)
    rows, found = collect(*inputs, *options, metrics, eps, bounds)
    shard = (c.shape[0], *place)
    lists = make_lists(bounds, found, rows.lse, targets, ignore_index, softcap, shard, eps)
    return (*rows, *lists)


def fake_lists(like: Tensor, n: int, v: int, eps: float) -> Lists:
    """Tensors of the right shapes for tracing, where `like` is."""
    capacity = kept_capacity(n, v, eps)

    def new(*shape: int, dtype: torch.dtype = torch.int32) -> Tensor:
        return like.new_empty(shape, dtype=dtype)

    return Lists(
        new(capacity),
        new(capacity),
        new(capacity, dtype=torch.float32),
        new(capacity),
        new(n + 1),
        new(n),
        new(v + 1),
        new(min(HOT_IDS, v), dtype=torch.int64),
        new(v),
        new(n, tail.groups(v), dtype=torch.float32),
        new(n, dtype=torch.bool),
        new(n),
        new(4, dtype=torch.int64),
    )
