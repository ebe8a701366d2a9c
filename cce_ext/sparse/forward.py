"""The training forward on CUDA: the loss, and the lists from which the sparse backward works.

A bound of each row's lse from a sample of its logits; one pass over the vocabulary, which also
collects the entries above bound + log ε and writes down the logits of a few rows; then the entries
that are kept, sorted by row, the mass of the others, and what those few rows drop, summed by class
and id. (Sorting by column is left to the backward: not every one needs it.) Nothing waits for the
device: every list has a fixed capacity. So memory follows from the shapes (``python -m
bench.sparse_memory`` adds it up). The pool of candidates is the largest array: callers let go of it
between `select_entries` and `sort_entries`.
"""

from __future__ import annotations

import math
from typing import Any, NamedTuple

import torch
from torch import Tensor

from cce_ext.blocked import Call
from cce_ext.cuda_backward import readable
from cce_ext.reference import RowStatistics
from cce_ext.sparse import tail
from cce_ext.sparse.products import picked

# Columns at equal distances, and the batch's most frequent targets, whose logits bound the lse from below. With the
# anchors of the classes they are 640 columns, whole tiles of a product.
SAMPLED_COLUMNS, FREQUENT_TARGETS = 384, 248
# Rows whose sampled logits are in memory at a time.
BOUND_ROWS = 8192
ROW_BLOCK = 128
# A sampled row's logits are written so many ids at a time.
LEVEL_COLUMNS = 32
#: ids whose kept entries are multiplied as a dense matrix: on trained heads they have 60 % of all
HOT_IDS = 1024


class Lists(NamedTuple):
    """What the backward needs beside the inputs. K: capacity of the lists, N rows, V ids, G groups.

    Kept entries are sorted by row (in row_order) and id.
    """

    rows: Tensor  # (K,) int32
    ids: Tensor  # (K,) int32
    logits: Tensor  # (K,) float32
    row_first: Tensor  # (N + 1,) int32: where the entries of a position in row_order start
    row_hot: Tensor  # (N,) int32: where those of hot ids start, which come last
    hot_ids: Tensor  # (H,) int64: the ids that most rows keep, ascending
    slots: Tensor  # (V,) int32: place in hot_ids, -1 for the others
    mass: Tensor  # (N, G) float32: Σ p softcap' of dropped entries
    exact_rows: Tensor  # (N,) bool: rows whose candidates are not all known
    row_order: Tensor  # (N,) int32
    # The sample of rows whose tails stand for all, S of them:
    sample: Tensor  # (S,) int64: row numbers
    sample_weight: Tensor  # (S,) float32: what each one's tail counts
    classes: Tensor  # (N,) int64: of the rows
    tail_sums: Tensor  # (classes, V) float32: what the sampled rows drop, times their weight
    # (5,) int64: candidates, kept entries, row blocks that overflowed, row blocks, rows that count (at least 1)
    tally: Tensor


def _growth(eps: float) -> float:
    """How many more entries are above eps than above 2⁻¹³: trained heads have 1.5 to 1.6 times as
    many a halving."""
    return (2.0**-13 / eps) ** 0.65


def candidate_capacity(n: int, v: int, eps: float) -> int:
    """Candidates that a block of 128 rows can hold: 1024 a row at 2⁻¹³ (trained heads have 200 to
    350, in their worst blocks 720), more where there are few rows."""
    a_row = max(2**23 // max(n, 1), math.ceil(1024 * _growth(eps)))
    return min(v, a_row) * min(n, ROW_BLOCK)


def kept_capacity(n: int, v: int, eps: float) -> int:
    """Entries that the lists can hold, targets included: 320 a row at 2⁻¹³ (trained heads keep 110
    to 190), more where there are few rows."""
    return min(n * v, math.ceil(max(n * 320, 2**20) * _growth(eps))) + n


def prepare(*args: Any) -> Call:
    """The arguments of ``linear_ce_forward`` up to vocab_total, as the kernels read them."""
    call = Call(*args)
    return call._replace(
        e=readable(call.e, call.e.dtype),
        targets=call.targets.long().contiguous(),
        vocab_total=call.vocab,
    )


class Bounds(NamedTuple):
    """What the pass over the vocabulary wants to know of the rows beforehand."""

    order: Tensor  # (N,) int32: row numbers, those that count first
    count: Tensor  # (1,) int32: how many count
    target_logit: Tensor  # (N,): 0 where another shard holds the target
    bound2: Tensor  # (N,): a lower bound of the lse, base 2
    share: Tensor  # (N,): about what the row will drop
    classes: Tensor  # (N,) int64: which rows' tails are alike


class Found(NamedTuple):
    """What that pass leaves for later, when the lse is final. B blocks of 128 rows."""

    # By split of the vocabulary and position in the row order:
    max_sum: Tensor  # (splits, N, 2): a reference near the lse (base 2), Σ exp beside it
    capped: Tensor  # (splits, N): the same sum with softcap'; empty without
    # Of the sample of rows:
    sample: Tensor  # (S,) int64: row numbers
    draws: Tensor  # (S,): how often each was drawn, over its share; 0 where there is none
    levels: Tensor  # (S, V and up to 31 more) uint8: their logits
    # Entries that may turn out to be kept:
    pool: Tensor  # (B, capacity, 2) int32
    counts: Tensor  # (B,) int32


class Selected(NamedTuple):
    """Kept entries by row, inside a row in no order, and what their lists will need of the
    selection."""

    keys: Tensor  # (K,) int32: whether the id is hot, id
    logits: Tensor  # (K,) float32
    exact: Tensor  # (B,) uint8: row blocks whose candidates are not all known
    row_first: Tensor  # see Lists
    hot_ids: Tensor
    slots: Tensor
    tally: Tensor


def lower_bounds(
    call: Call, target_logit: Tensor, order: Tensor, count: Tensor, eps: float
) -> tuple[Tensor, Tensor, Tensor]:
    """A lower bound (N,) of each row's lse, in base 2, about what the row will drop, and its class;
    see `reference.sparse_gradients`. The bound of a shard's lse is one of the whole vocabulary's."""
    e, c, targets, bias, u, lora_b, _, softcap, logit_scale, *_ = call
    n, v = e.shape[0], c.shape[0]
    strided = min(SAMPLED_COLUMNS, v)
    ids, counts, anchors = torch.ops.cce.bound_columns(
        targets, order, count, v, call.vocab_start, strided, min(FREQUENT_TARGETS, v)
    )  # fmt: skip
    columns = picked(c, ids, e, anchors).T
    b_columns = None if lora_b is None else picked(lora_b, ids, u, anchors).T
    sampled_bias = None if bias is None else bias[ids].float()
    parts = []
    for first in range(0, n, BOUND_ROWS):
        part = slice(first, first + BOUND_ROWS)
        products = torch.mm(e[part], columns, out_dtype=torch.float32)
        if u is not None:
            torch.addmm(products, u[part], b_columns, out_dtype=torch.float32, out=products)
        parts.append(
            torch.ops.cce.row_bounds(
                products, sampled_bias, counts, target_logit[part], strided, v, eps, softcap,
                logit_scale,
            )
        )  # fmt: skip
    if len(parts) == 1:
        return parts[0]
    return tuple(torch.cat(results) for results in zip(*parts, strict=True))


def bound_rows(call: Call, eps: float) -> Bounds:
    """The order of the rows, their target logits, bounds of their lse, about what they drop, their
    classes."""
    order, count = torch.ops.cce.row_order(call.targets, call.ignore_index)
    ignore_index, softcap, logit_scale, _, *place = call[6:]
    target_logit = torch.ops.cce.target_logits(
        *call[:6], ignore_index, softcap, logit_scale, *place, order, count
    )
    own = _own(target_logit, call.targets, call.c.shape[0], *place)
    return Bounds(order, count, target_logit, *lower_bounds(call, own, order, count, eps))


def _own(target_logit: Tensor, targets: Tensor, v: int, start: int, total: int) -> Tensor:
    """Target logits (N,), -inf instead of 0 for targets of other shards, which bound nothing."""
    if v == total:
        return target_logit
    here = (targets >= start) & (targets < start + v)
    return torch.where(here, target_logit, -torch.inf)


def collect(call: Call, metrics: bool, eps: float, bounds: Bounds) -> tuple[RowStatistics, Found]:
    """The pass over the vocabulary."""
    order, count, target_logit, bound2, share, _ = bounds
    n, v = call.e.shape[0], call.c.shape[0]
    size = tail.sample_size(n, v)
    starts, sample, draws = torch.ops.cce.draw_rows(share, bound2, order, count, size)
    nll, lse, *others, max_sum, capped, pool, counts, levels = torch.ops.cce.training_forward(
        *call, metrics, order, count, target_logit, starts, eps, candidate_capacity(n, v, eps), size
    )
    rows = RowStatistics(nll, lse, target_logit, *others)
    return rows, Found(max_sum, capped, sample, draws, levels, pool, counts)


def select_entries(
    bounds: Bounds,
    pool: Tensor,
    counts: Tensor,
    lse: Tensor,
    targets: Tensor,
    shard_size: int,
    ignore_index: int,
    vocab_start: int,
    vocab_total: int,
    eps: float,
) -> Selected:
    """The kept entries, by the final lse (N,); targets (N,) int64. The pool is of no use
    afterwards."""
    capacity = kept_capacity(lse.shape[0], shard_size, eps)
    order, count, target_logit, bound2, *_ = bounds
    selected = torch.ops.cce.select_kept(
        pool, counts, order, count, target_logit, bound2, lse, targets, eps, ignore_index,
        shard_size, vocab_start, vocab_total, capacity, min(HOT_IDS, shard_size),
    )  # fmt: skip
    return Selected(*selected)


def sort_entries(
    bounds: Bounds,
    found: Found,
    selected: Selected,
    lse: Tensor,
    targets: Tensor,
    shard_size: int,
    softcap: float,
    ignore_index: int,
    vocab_start: int,
    vocab_total: int,
    eps: float,
) -> Lists:
    """Kept entries by row, the mass of the others, what the sampled rows drop. found: its pool and
    counts are not needed. Overwrites the levels."""
    keys, logits, exact, row_first, hot_ids, slots, tally = selected
    *entries, row_hot, mass, exact_rows = torch.ops.cce.sort_kept(
        keys, logits, exact, row_first, found.max_sum, found.capped, bounds.order, bounds.count,
        lse, shard_size, softcap,
    )  # fmt: skip
    tail_sums, weight = torch.ops.cce.level_sums(
        found.levels, found.sample, found.draws, bounds.classes, bounds.bound2, lse, targets,
        exact_rows, shard_size, eps, softcap, ignore_index, vocab_start, vocab_total,
    )  # fmt: skip
    return Lists(
        *entries, row_first, row_hot, hot_ids, slots, mass, exact_rows, bounds.order, found.sample,
        weight, bounds.classes, tail_sums, tally,
    )  # fmt: skip


def forward(call: Call, metrics: bool, eps: float) -> tuple[Tensor, ...]:
    """The CUDA kernel of ``cce::sparse_ce_forward``: the seven results of ``linear_ce_forward``,
    then the fields of `Lists`."""
    v = call.c.shape[0]
    place = (call.ignore_index, call.vocab_start, call.vocab_total, eps)
    bounds = bound_rows(call, eps)
    rows, found = collect(call, metrics, eps, bounds)
    selected = select_entries(bounds, found.pool, found.counts, rows.lse, call.targets, v, *place)
    found = found._replace(pool=None)  # its last reference: the sort takes its place
    lists = sort_entries(bounds, found, selected, rows.lse, call.targets, v, call.softcap, *place)
    return (*rows, *lists)


def fake_lists(like: Tensor, n: int, v: int, capacity: int) -> Lists:
    """Tensors of the right shapes for tracing, where `like` is."""

    def new(*shape: int, dtype: torch.dtype = torch.int32) -> Tensor:
        return like.new_empty(shape, dtype=dtype)

    samples = tail.sample_size(n, v)
    return Lists(
        new(capacity),
        new(capacity),
        new(capacity, dtype=torch.float32),
        new(n + 1),
        new(n),
        new(min(HOT_IDS, v), dtype=torch.int64),
        new(v),
        new(n, tail.groups(v), dtype=torch.float32),
        new(n, dtype=torch.bool),
        new(n),
        new(samples, dtype=torch.int64),
        new(samples, dtype=torch.float32),
        new(n, dtype=torch.int64),
        new(tail.CLASSES, v, dtype=torch.float32),
        new(5, dtype=torch.int64),
    )
