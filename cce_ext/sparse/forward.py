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
from cce_ext.sparse.reference import sampled_columns

# Targets of the batch whose logits bound the lse from below.
_SAMPLED_TARGETS = 1024
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


class Partials(NamedTuple):
    """What each split of the vocabulary knows of the rows, by position in the row order: the mass
    of its entries once the lse is known."""

    order: Tensor  # (N,) int32: row numbers, those that count first
    count: Tensor  # (1,) int32: how many count
    max_sum: Tensor  # (splits, N, 2): the largest logit (base 2), Σ exp below it
    capped: Tensor  # (splits, N): the same sum with softcap'; empty without


class Candidates(NamedTuple):
    """Entries that may turn out to be kept. B blocks of 128 rows."""

    bound2: Tensor  # (N,): the lower bound of the lse from which they follow, base 2
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
    strided = sampled_columns(v, e.device)
    size = min(_SAMPLED_TARGETS, n)
    places = torch.arange(size, device=e.device) * count // size
    found = (targets[order[places]] - vocab_start).sort().values
    inside = (found >= 0) & (found < v)
    inside[1:] &= found[1:] != found[:-1]
    ids = torch.cat([strided, found.clamp(0, v - 1)])
    counts = torch.cat([torch.ones_like(strided, dtype=torch.uint8), inside.to(torch.uint8)])
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
                products, sampled_bias, counts, target_logit[part].contiguous(),
                strided.shape[0], v, softcap, logit_scale,
            )
        )  # fmt: skip
    return torch.cat(parts)


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
) -> tuple[RowStatistics, Partials, Candidates]:
    """The pass over the vocabulary: what needs no final lse. Arguments as ``linear_ce_forward``'s."""
    n, v = e.shape[0], c.shape[0]
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
    options = (ignore_index, softcap, logit_scale, label_smoothing, vocab_start, vocab_total)
    nll, lse, *others, max_sum, capped, pool, counts = torch.ops.cce.training_forward(
        e, c, targets, bias, u, lora_b, *options, metrics, order, count, target_logit, bound2, eps,
        candidate_capacity(n, v, eps),
    )  # fmt: skip
    rows = RowStatistics(nll, lse, target_logit, *others)
    return rows, Partials(order, count, max_sum, capped), Candidates(bound2, pool, counts)


def _own(target_logit: Tensor, targets: Tensor, v: int, start: int, total: int) -> Tensor:
    """Target logits (N,), -inf instead of 0 for targets of other shards, which bound nothing."""
    if v == total:
        return target_logit
    here = (targets >= start) & (targets < start + v)
    return torch.where(here, target_logit, -torch.inf)


def make_lists(
    candidates: Candidates,
    partials: Partials,
    lse: Tensor,
    target_logit: Tensor,
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
    bound2, pool, counts = candidates
    order, count, max_sum, capped = partials
    targets = targets.long().contiguous()
    n, device = targets.shape[0], targets.device
    place = (ignore_index, v, start, total or start + v)
    pooled = (pool, counts, bound2, order, count, lse, target_logit, targets, eps, *place)
    kept, exact, column_counts = torch.ops.cce.count_kept(*pooled)  # kept: (row blocks, parts)
    capacity = kept_capacity(n, v, eps)
    ends = kept.flatten().cumsum(0).view_as(kept)
    exact = exact | (ends[:, -1] > capacity).to(torch.uint8)
    # A key is the row's position, then one bit for hot ids, then the id; all ones, which no entry
    # has, beyond the last one.
    id_bits, row_bits = v.bit_length(), n.bit_length() + 1
    nothing = (1 << (id_bits + row_bits)) - 1
    hot_ids, slots = _hot_ids(column_counts, n)
    keys = torch.full((capacity,), nothing, device=device, dtype=torch.int64)
    logits = torch.zeros(capacity, device=device)
    torch.ops.cce.write_kept(*pooled, exact, ends - kept, slots, id_bits, keys, logits)
    tally = torch.stack(
        [
            counts.sum(),
            kept.sum(),
            (counts > pool.shape[1]).sum(),
            (count[0].long() + ROW_BLOCK - 1) // ROW_BLOCK,
        ]
    )
    keys, logits = torch.ops.cce.sort_pairs(keys, logits, id_bits + row_bits)
    starts = torch.arange(2 * n + 1, device=device) << id_bits
    boundaries = torch.searchsorted(keys, starts, out_int32=True)
    row_first, row_hot = boundaries[::2].contiguous(), boundaries[1::2].contiguous()
    ids = (keys & ((1 << id_bits) - 1)).int()
    rows = order[(keys >> (id_bits + 1)).clamp_(max=n - 1)]
    numbers = torch.arange(ids.shape[0], device=device, dtype=torch.int32)
    sorted_ids, by_id = torch.ops.cce.sort_pairs(ids, numbers, id_bits)
    columns = torch.arange(v + 1, device=device, dtype=torch.int32)
    column_first = torch.searchsorted(sorted_ids, columns, out_int32=True)
    mass = torch.ops.cce.dropped_mass(
        max_sum, capped, row_first, row_hot, ids, logits, order, count, lse, v, softcap
    )
    exact_rows = torch.zeros(n, device=device, dtype=torch.bool)
    exact_rows[order.long()] = exact.bool().repeat_interleave(ROW_BLOCK)[:n]
    exact_rows &= targets != ignore_index
    return Lists(
        rows, ids, logits, by_id, row_first, row_hot, column_first, hot_ids, slots, mass, exact_rows,
        order, tally,
    )  # fmt: skip


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
    options = (ignore_index, softcap, logit_scale, label_smoothing, vocab_start, vocab_total)
    rows, partials, candidates = collect(e, c, targets, bias, u, lora_b, *options, metrics, eps)
    lists = make_lists(
        candidates, partials, rows.lse, rows.target_logit, targets, ignore_index, softcap,
        (c.shape[0], vocab_start, vocab_total), eps,
    )  # fmt: skip
    return (*rows, *lists)


def _hot_ids(counts: Tensor, n: int) -> tuple[Tensor, Tensor]:
    """The ids with the largest counts (V,), ascending, and the place (V,) of each id among them, or
    -1. Ties go to the smaller id, so that every run chooses the same. n: no count is larger."""
    v = counts.shape[0]
    ids = torch.arange(v, device=counts.device, dtype=torch.int32)
    _, ranked = torch.ops.cce.sort_pairs(n - counts, ids, n.bit_length())
    hot = ranked[: min(HOT_IDS, v)].sort().values.long()
    slots = torch.full((v,), -1, device=counts.device, dtype=torch.int32)
    slots[hot] = ids[: hot.shape[0]]
    return hot, slots


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
