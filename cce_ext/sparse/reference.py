"""The sparse gradient on stored logits, every step visible, in any precision: what the GPU path is
checked against."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

from cce_ext.options import LossOptions
from cce_ext.reference import logits
from cce_ext.sparse import tail
from cce_ext.sparse.forward import FREQUENT_TARGETS, ROW_BLOCK, SAMPLED_COLUMNS

# Counts of targets from here on are equal: kHotBins - 1 of csrc/cuda/sparse/lists.h.
_MOST_COUNTED = 4095


class SparseGradients(NamedTuple):
    """Gradients by the inputs (None for an input that is not there), the gradient by the logits
    without the tilt, which de and du have and the others have not, and what the filter did."""

    de: Tensor
    dc: Tensor
    dbias: Tensor
    du: Tensor | None
    dlora_b: Tensor | None
    dproducts: Tensor  # (N, V)
    candidates: Tensor  # (N,) per row
    kept: Tensor  # (N,) per row, the target not counted
    dropped_share: Tensor  # T
    exact_rows: Tensor  # (N,) bool: rows that took the exact path


class Shard(NamedTuple):
    """What a shard of the vocabulary has to be told of the others."""

    start: int  # its first id
    vocab: int  # ids in all
    lse: Tensor  # (N,) over all shards
    merge_bounds: Callable[[Tensor], Tensor]  # (N,): of that lse, from those of this shard's own
    add_up: Callable[[Tensor], Tensor]  # what all shards drop, from what this one does


def _same(x: Tensor) -> Tensor:
    return x


def sample_bound(z: Tensor, strided: Tensor, frequent: Tensor) -> Tensor:
    """A value (N,) that lies below each row's lse unless the row is very odd, but not by much.

    z (N, V): the logits; strided (S,): ids at equal distances; frequent (T,): other ids that are
    likely to have mass. The frequent ids and the eight largest strided ones count once, the other
    strided ones for the ids between them, of that four standard errors less; but never more than
    three quarters less than the estimate.
    """
    vocab, count = z.shape[1], strided.shape[0]
    known = torch.logsumexp(z[:, frequent], -1)
    once = torch.zeros(vocab, dtype=torch.bool, device=z.device).index_fill_(0, frequent, True)
    others = torch.where(once[strided], -torch.inf, z[:, strided])
    top = others.topk(min(8, count), -1)
    reference = torch.maximum(known, top.values[:, 0])
    reference = torch.where(reference == -torch.inf, 0, reference)
    seen = torch.exp(known - reference) + torch.exp(top.values - reference[:, None]).sum(-1)
    rest = torch.exp(others.scatter(1, top.indices, -torch.inf) - reference[:, None])
    estimate = seen + rest.sum(-1) * (vocab / count)
    error = rest.square().sum(-1).sqrt() * (vocab / count)
    least = torch.maximum(seen, torch.maximum(estimate - 4 * error, estimate / 4))
    return reference + torch.log(least)


def sampled_columns(vocab: int, device: torch.device | str = "cpu") -> Tensor:
    """Ids at equal distances, up to SAMPLED_COLUMNS."""
    count = min(SAMPLED_COLUMNS, vocab)
    return torch.arange(count, device=device) * vocab // count


def frequent_targets(targets: Tensor, start: int, vocab: int) -> Tensor:
    """Up to FREQUENT_TARGETS of a shard's ids that are targets most often, ascending; of equal
    ones, as are those that are targets _MOST_COUNTED times and more, the smaller ids. targets: of the
    rows that count; start, vocab: the shard's first id and size.

    The ids that a batch has as targets are those that its rows give mass: the lse over them is a
    lower bound of the lse that is close wherever the vocabulary's order says nothing.
    """
    ids = targets.long() - start
    counts = torch.bincount(ids[(ids >= 0) & (ids < vocab)], minlength=vocab)
    counts = counts.clamp(max=_MOST_COUNTED)
    return counts.argsort(descending=True, stable=True)[:FREQUENT_TARGETS].sort().values


def sparse_gradients(
    dnll: Tensor | None,
    dlse: Tensor | None,
    e: Tensor,
    c: Tensor,
    targets: Tensor,
    bias: Tensor | None,
    u: Tensor | None,
    lora_b: Tensor | None,
    options: LossOptions,
    eps: float,
    capacity: int | None = None,
    shard: Shard | None = None,
    tilt_start: float = 0.5,
) -> SparseGradients:
    """Gradients of Σ dnll nll + dlse lse with entries below the probability ``eps`` replaced by
    their tail.

    Shapes: dnll, dlse (N,), e (N, D), c (V, D), targets (N,), bias (V,), u (N, R), lora_b (V, R).
    capacity: candidates a row, pooled over 128 rows that count; None: no limit. shard: what there
    is beside the given rows of c (and of bias and lora_b), whose part of the gradients by e and u
    the results then are; None: nothing. tilt_start: of `tail.tilt_ids`; another one
    shows how much the sample matters.
    """
    z = logits(e, c, bias, u, lora_b, options)
    if shard is None:
        shard = Shard(0, z.shape[1], torch.logsumexp(z, -1), _same, _same)
    vocab, lse = z.shape[1], shard.lse
    scale, smoothing = options.logit_scale, options.label_smoothing
    valid = targets != options.ignore_index
    slot = targets.long() - shard.start
    here = valid & (slot >= 0) & (slot < vocab)  # where this shard holds the target
    slot = torch.where(here, slot, 0)
    is_target = torch.zeros_like(z, dtype=torch.bool).scatter_(1, slot[:, None], here[:, None])
    p = torch.exp(z - lse[:, None])
    capped = 1 - (z / options.softcap) ** 2 if options.softcap else None
    weight = p if capped is None else p * capped

    def upstream(x: Tensor | None) -> Tensor:
        return torch.zeros_like(lse) if x is None else torch.where(valid, x.to(z.dtype), 0)

    d = upstream(dnll)
    a = d + upstream(dlse)

    # Forward: candidates; finish: what is kept, and the mass of what is not.
    frequent = frequent_targets(targets[valid], shard.start, vocab)
    strided = sampled_columns(vocab, z.device)
    bound = sample_bound(z, strided, frequent)
    own = torch.where(here, z.gather(1, slot[:, None])[:, 0], -torch.inf)
    bound = torch.maximum(bound, own) - 0.01 * math.log(2)
    others = torch.where(torch.isin(strided, frequent), -torch.inf, z[:, strided])
    drops = tail.dropped_estimate(others, bound, eps, vocab / len(strided))
    bound = shard.merge_bounds(bound)
    candidate = (z >= bound[:, None] + math.log(eps)) if eps > 0 else z == z
    kept = (p >= eps) & ~is_target
    keeps = kept | is_target
    kept_weight = torch.where(keeps, weight, 0)

    def by_group(x: Tensor) -> Tensor:
        return torch.stack([part.sum(1) for part in x.split(tail.GROUP, 1)], 1)

    mass = (by_group(weight) - by_group(kept_weight)).clamp(min=0)
    mass = torch.where(valid[:, None], mass, 0)

    # Which rows go the exact way.
    exact = _overflowed(candidate, valid, capacity) | _blocks(bound > lse, valid)
    unknown = exact
    share = shard.add_up(tail.dropped_share(a, mass.sum(1), exact))
    # A smoothed target under a softcap has a tail of another shape. A NaN share is exact too.
    never = bool(smoothing and options.softcap)
    exact = (exact | ~(share <= tail.FLAT) | never) & valid

    # Backward: the shape of the tail, then kept entries and tail together.
    a_sparse, d_sparse = torch.where(exact, 0, a), torch.where(exact, 0, d)
    sample = tail.draw_rows(drops.float(), valid, tail.sample_size(len(z), vocab))
    rows = sample.rows
    sample = tail.Sample(rows, torch.where(unknown[rows], 0, sample.weight).to(z.dtype))
    classes = tail.classify(e, u, tail.anchors(valid))
    written = tail.level_logits(tail.levels(z[rows], bound[rows]), bound[rows])
    dropped = torch.exp(written - lse[rows, None])
    dropped = torch.where(is_target[rows] | (dropped >= eps), 0, dropped)
    if capped is not None:
        slope = (1 - (written / options.softcap) ** 2).clamp(min=0)
        dropped = torch.where(dropped == 0, 0, dropped * slope)
    dropped *= sample.weight[:, None]
    weights = tail.one_hot(classes[rows], tail.CLASSES, z.dtype).T @ dropped
    spread = tail.Spread(
        scale * a_sparse[:, None] * mass,
        classes,
        tail.shapes(weights),
        -scale * d_sparse * (smoothing / shard.vocab) if smoothing else None,
    )
    target_part = d * (1 - smoothing) * scale
    if capped is not None:
        target_part = target_part * capped.gather(1, slot[:, None])[:, 0]
    target_part = torch.where(is_target, target_part[:, None], 0)
    g = kept_weight.mul_(scale * a[:, None]).sub_(target_part).add_(tail.dense(spread))
    ids = tail.tilt_ids(weights, min(tail.TILT_IDS, vocab), tilt_start)
    tilt = tail.tilt(z[:, ids.ids], ids, tail.Rows(classes, mass, sample))
    tilt *= (scale * a_sparse)[:, None]
    everything = a[exact, None] * p[exact] - d[exact, None] * (smoothing / shard.vocab)
    everything -= (d * (1 - smoothing))[exact, None] * is_target[exact]
    g[exact] = everything * scale if capped is None else everything * scale * capped[exact]
    g[~valid] = 0

    def by_rows(source: Tensor) -> Tensor:
        return g @ source + tilt @ source[ids.ids]

    return SparseGradients(
        by_rows(c),
        g.T @ e,
        g.sum(0),
        None if u is None else by_rows(lora_b.to(g.dtype)),
        None if u is None else g.T @ u,
        g,
        candidate.sum(1),
        kept.sum(1),
        share,
        exact,
    )


def _blocks(rows: Tensor, valid: Tensor) -> Tensor:
    """Rows (N,) of the blocks of 128 valid rows in which any valid row has the mark."""
    block = (valid.cumsum(0) - 1).clamp(min=0) // ROW_BLOCK
    marked = torch.zeros(block.shape[0], dtype=torch.int64, device=rows.device)
    marked.index_add_(0, block, (rows & valid).long())
    return marked[block] > 0


def _overflowed(candidate: Tensor, valid: Tensor, capacity: int | None) -> Tensor:
    """Rows (N,) of the blocks whose candidates do not fit."""
    if capacity is None:
        return torch.zeros_like(valid)
    block = (valid.cumsum(0) - 1).clamp(min=0) // ROW_BLOCK
    total = torch.zeros(block.shape[0], dtype=torch.int64, device=valid.device)
    total.index_add_(0, block, torch.where(valid, candidate.sum(1), 0))
    return total[block] > capacity * ROW_BLOCK
