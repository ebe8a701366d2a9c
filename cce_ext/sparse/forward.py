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
from cce_ext.sparse import tail
from cce_ext.sparse.reference import sampled_columns

# Targets of the batch whose logits bound the lse from below.
_SAMPLED_TARGETS = 1024
# Rows whose sampled logits are in memory at a time.
_BOUND_ROWS = 4096
_ROW_BLOCK = 128
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
    return min(v, a_row) * min(n, _ROW_BLOCK)


def kept_capacity(n: int, v: int, eps: float) -> int:
    """Entries that the lists can hold, targets included: 320 a row at 2⁻¹³ (trained heads keep 110
    to 190), more where there are few rows."""
    return min(n * v, math.ceil(max(n * 320, 2**20) * _growth(eps))) + n


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
    """A lower bound (N,) of each row's lse, in base 2; see `reference.sparse_gradients`."""
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
    v = c.shape[0]
    vocab_total = vocab_total or vocab_start + v
    targets = targets.long().contiguous()
    e = readable(e, e.dtype)
    order, count = torch.ops.cce.row_order(targets, ignore_index)
    place = (ignore_index, softcap, logit_scale, vocab_start, vocab_total)
    target_logit = torch.ops.cce.target_logits(e, c, targets, bias, u, lora_b, *place, order, count)
    bound2 = lower_bounds(
        e, c, targets, bias, u, lora_b, target_logit, order, count, softcap, logit_scale, vocab_start
    )  # fmt: skip
    options = (ignore_index, softcap, logit_scale, label_smoothing, vocab_start, vocab_total)
    rows, found, keys, logits = _collect(
        (e, c, targets, bias, u, lora_b, *options, metrics, order, count, target_logit, bound2),
        eps,
        (ignore_index, v, vocab_start, vocab_total),
    )
    keys, logits = torch.ops.cce.sort_pairs(keys, logits, found.id_bits + found.row_bits)
    lists = _lists(found, keys, logits, order, count, rows.lse, targets, ignore_index, softcap, v)
    return (rows.nll, rows.lse, target_logit, *rows[2:], *lists)


class _Rows(NamedTuple):
    """What the forward says of each row (N,); empty where it was not asked for."""

    nll: Tensor
    lse: Tensor
    logit_sum: Tensor
    max_logit: Tensor
    argmax: Tensor
    entropy: Tensor


class _Found(NamedTuple):
    """What goes with the kept entries. A key is the row's position, then one bit for hot ids, then
    the id."""

    id_bits: int
    row_bits: int
    hot_ids: Tensor
    slots: Tensor
    exact: Tensor  # (row blocks,) uint8: blocks that go the exact way
    max_sum: Tensor  # (splits, N, 2): partials of the forward
    capped: Tensor  # (splits, N) or empty
    tally: Tensor


def _collect(
    inputs: tuple, eps: float, place: tuple[int, int, int, int]
) -> tuple[_Rows, _Found, Tensor, Tensor]:
    """The forward, and the kept ones of its candidates, whose memory is free again afterwards:
    keys (K,) int64, all ones beyond the last entry, and logits (K,)."""
    targets, (order, count, target_logit, bound2) = inputs[2], inputs[-4:]
    n, v, device = targets.shape[0], place[1], targets.device
    nll, lse, *others, max_sum, capped, pool, counts = torch.ops.cce.training_forward(
        *inputs, eps, candidate_capacity(n, v, eps)
    )
    pooled = (pool, counts, bound2, order, count, lse, target_logit, targets, eps, *place)
    kept, exact, column_counts = torch.ops.cce.count_kept(*pooled)  # kept: (row blocks, parts)
    capacity = kept_capacity(n, v, eps)
    ends = kept.flatten().cumsum(0).view_as(kept)
    exact = exact | (ends[:, -1] > capacity).to(torch.uint8)
    # A larger number than any position and id, in as many bits.
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
            (count[0].long() + _ROW_BLOCK - 1) // _ROW_BLOCK,
        ]
    )
    found = _Found(id_bits, row_bits, hot_ids, slots, exact, max_sum, capped, tally)
    return _Rows(nll, lse, *others), found, keys, logits


def _lists(
    found: _Found,
    keys: Tensor,
    logits: Tensor,
    order: Tensor,
    count: Tensor,
    lse: Tensor,
    targets: Tensor,
    ignore_index: int,
    softcap: float,
    v: int,
) -> Lists:
    """The lists of kept entries, from sorted keys and logits, and the mass of the others."""
    n, device, id_bits = targets.shape[0], targets.device, found.id_bits
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
        found.max_sum, found.capped, row_first, row_hot, ids, logits, order, count, lse, v, softcap
    )
    exact_rows = torch.zeros(n, device=device, dtype=torch.bool)
    exact_rows[order.long()] = found.exact.bool().repeat_interleave(_ROW_BLOCK)[:n]
    exact_rows &= targets != ignore_index
    return Lists(
        rows, ids, logits, by_id, row_first, row_hot, column_first, found.hot_ids, found.slots, mass,
        exact_rows, order, found.tally,
    )  # fmt: skip


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


def fake_lists(e: Tensor, c: Tensor, eps: float) -> Lists:
    """Tensors of the right shapes for tracing."""
    n, v = e.shape[0], c.shape[0]
    capacity = kept_capacity(n, v, eps)

    def new(*shape: int, dtype: torch.dtype = torch.int32) -> Tensor:
        return e.new_empty(shape, dtype=dtype)

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
