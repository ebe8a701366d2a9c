"""The tail of the sparse gradient: what the entries below the threshold are taken to be.

Row n spreads its dropped mass M[n, g] over vocabulary group g as ŵ[k, ·], the shape of its class k.
In the gradients by rows that spread is tilted, towards ids whose logits are larger in row n than in
the class: ŵ[k, j] (1 + β x[n, j]), by the logits of a sample of ids. Without it a row's tail pulls
at the hidden state only half as much along the hidden state's own direction as it should, step after
step, which training notices (docs/accuracy.md).
Everything here is ordinary PyTorch in any precision. On a GPU the same steps are a few kernels
(csrc/cuda/sparse/sample.cu, levels.cu, tail.cu and tilt.cu).
"""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
from torch import Tensor

#: ids of a vocabulary group: a whole number of the kernels' column tiles (192 and 256), as in csrc/cuda/params.h
GROUP = 4608
#: classes of rows, each with a tail shape of its own
CLASSES = 8
#: rows whose logits are written down to learn the shapes: an eighth of all, within these bounds
SAMPLE = (128, 256)
# Bytes that they may take, and how many are taken all the same.
_SAMPLE_BYTES, _SAMPLE_LEAST = 2**28, 32
#: a written logit is one of 255 steps of so many an octave, from so many octaves from the row's bound on
LEVELS, LOWEST = 8, -28
#: no row is thought to drop less
LEAST_SHARE = 2.0**-8
#: share of all classes' sum in each class's shape, so that no id that anybody gives mass is at zero
SHARED = 1e-3
#: share of the probability mass that may be dropped; flatter calls take the exact path
FLAT = 0.10
#: ids sampled for the tilt: twice as many lower the error of dE on a trained head by a fifth
TILT_IDS = 512
# Tilt β = TILT / (1 + TILT_DAMPING v), where v is the variance of a row's x: to first order it is 1, but
# what is dropped ends at the threshold, and the larger v, the less the first order says. So damped, the tails of
# a trained head pull along their hidden states as they should, within 4 %; 0.7 / (1 + 0.1 v) lacks 11 %.
TILT, TILT_DAMPING = 1.0, 0.2
# One unit of a tail's weight in the integers that ids are sampled by, and the most that counts.
_TILT_STEPS, _TILT_MOST = 2.0**25, 2.0**18
# Likewise of a row's share.
_SHARE_STEPS = 2.0**30
# Rows that drop less than this have no tail, and 1 / mass would not be finite.
_NOTHING = 1e-30


def groups(vocab: int) -> int:
    return -(-vocab // GROUP)


def dropped_share(a: Tensor, mass: Tensor, exact: Tensor) -> Tensor:
    """T = Σ|a| m / Σ|a|, a scalar: the share of the probability mass that the filter drops, over
    the rows that are not exact anyway.

    Shapes: a (N,), mass (N,): each row's dropped mass; exact (N,) bool.
    """
    weight = torch.where(exact, 0, a).abs()
    total = weight.sum()
    return torch.where(total == 0, 0, (weight * mass).sum() / total)  # NaN stays NaN


def sample_size(n: int, vocab: int) -> int:
    """How many of n rows are sampled. On a trained head 128 of 1024 leave dE as it is, and dC has an
    error of 1.6e-3, where stored bfloat16 logits have 4e-3."""
    low, high = SAMPLE
    size = max(low, min(n // 8, high))
    return min(n, size, max(_SAMPLE_LEAST, _SAMPLE_BYTES // max(vocab, 1)))


class Sample(NamedTuple):
    """Rows that stand for all: row numbers (S,), and what each one's tail counts (S,)."""

    rows: Tensor
    weight: Tensor


def dropped_estimate(z: Tensor, bound: Tensor, eps: float, step: float) -> Tensor:
    """About what each row drops (N,), by the logits z (N, S) of a sample of ids, each of which
    stands for so many; bound (N,): of the row's lse.

    Nothing jumps where an entry crosses the threshold, so that rounding draws no other rows.
    """
    w = torch.exp(z - bound[:, None])
    dropped = torch.minimum(w, eps - w).clamp(min=0).sum(1) * step
    return dropped.nan_to_num(nan=LEAST_SHARE).clamp(LEAST_SHARE, 1)


def draw_rows(share: Tensor, valid: Tensor, size: int) -> Sample:
    """So many rows at equal steps of the cumulated share of those that are valid: a row's first slot
    counts the inverse of its share as often as it is drawn, its others nothing. All of them, if there
    are no more than that, and slots that nobody has and that count nothing.

    Shapes: share (N,), valid (N,) bool. The steps are counted in integers, so that the result does
    not depend on the order of a parallel sum.
    """
    order = valid.nonzero()[:, 0]
    if len(order) <= size:
        rows, weight = order.new_zeros(size), share.new_zeros(size)
        rows[: len(order)], weight[: len(order)] = order, 1
        rows[len(order) :] = order[-1] if len(order) else 0
        return Sample(rows, weight)
    end = (share[order].double() * _SHARE_STEPS).long().cumsum(0)
    step = end[-1] // size
    at = step // 2 + step * torch.arange(size, device=share.device)
    rows = order[torch.searchsorted(end, at, right=True)]
    drawn, times = torch.unique_consecutive(rows, return_counts=True)
    weight = share.new_zeros(size)
    weight[times.cumsum(0) - times] = times / share[drawn]
    return Sample(rows, weight)


def levels(z: Tensor, bound: Tensor) -> Tensor:
    """What the forward writes down of logits z (S, V), from 0 to 255; bound (S,): of the rows' lse."""
    octaves = (z - bound[:, None]) / math.log(2)
    return ((octaves - LOWEST) * LEVELS).round().clamp(0, 255)


def level_logits(written: Tensor, bound: Tensor) -> Tensor:
    """The logits (S, V) of these levels, -inf for 0."""
    z = bound[:, None] + (written / LEVELS + LOWEST) * math.log(2)
    return torch.where(written == 0, -torch.inf, z)


def anchors(valid: Tensor) -> Tensor:
    """A row (CLASSES,) for each class: those that are valid, at equal distances. valid (N,) bool."""
    order = valid.nonzero()[:, 0]
    steps = torch.arange(CLASSES, device=valid.device)
    return order[steps * len(order) // CLASSES] if len(order) else torch.zeros_like(steps)


def classify(e: Tensor, u: Tensor | None, anchors: Tensor) -> Tensor:
    """The class (N,) of each row: the anchor that is nearest, by dot product.

    Shapes: e (N, D), u (N, R) or None, anchors (CLASSES,): row numbers.
    """
    score = wide_mm(e, e[anchors].T)
    if u is not None:
        score = score + wide_mm(u, u[anchors].T)
    return score.argmax(1)


def wide_mm(a: Tensor, b: Tensor) -> Tensor:
    """a @ b with a result of at least float32."""
    if a.dtype in (torch.float32, torch.float64):
        return a @ b
    if a.device.type == "cuda":
        return torch.mm(a, b, out_dtype=torch.float32)
    return a.float() @ b.float()


def one_hot(classes: Tensor, count: int, dtype: torch.dtype) -> Tensor:
    """(N, count) zeros and ones; classes (N,) in [0, count)."""
    return (classes[:, None] == torch.arange(count, device=classes.device)).to(dtype)


def shapes(weights: Tensor) -> Tensor:
    """ŵ (K, V) of the classes' summed tails (K, V): mixed with their total, then normalised inside
    each group; a group in which nobody has any mass is uniform."""
    vocab = weights.shape[1]
    mixed = weights + SHARED * weights.sum(0)
    count = groups(vocab)
    whole = torch.nn.functional.pad(mixed, (0, count * GROUP - vocab)).unflatten(1, (count, GROUP))
    total = whole.sum(2, keepdim=True)
    width = torch.full((count, 1), GROUP, device=weights.device, dtype=weights.dtype)
    width[-1] = vocab - (count - 1) * GROUP
    normal = torch.where(total > 0, whole / torch.where(total > 0, total, 1), 1 / width)
    return normal.flatten(1)[:, :vocab]


class TiltIds(NamedTuple):
    """Ids at equal steps of the cumulated tail, ascending, some of them more than once (J,), and
    where those of each group start (G + 1,)."""

    ids: Tensor
    first: Tensor


def tilt_ids(sums: Tensor, count: int, start: float = 0.5) -> TiltIds:
    """The sample by the classes' summed tails (K, V), from so many steps on; without any tail only
    the id 0. Steps are counted in integers, so that the result does not depend on the order of a
    parallel sum."""
    total = torch.zeros_like(sums[0])
    for part in sums:  # in this order
        total = total + part
    total = total.nan_to_num(nan=0, posinf=_TILT_MOST).clamp(0, _TILT_MOST)
    steps = (total.double() * _TILT_STEPS).long()
    cumulated = steps.cumsum(0)
    step = cumulated[-1] // count
    at = step * torch.arange(count, device=sums.device) + (step.double() * start).long()
    ids = torch.where(step > 0, torch.searchsorted(cumulated, at, right=True), 0)
    starts = torch.arange(groups(sums.shape[1]) + 1, device=sums.device) * GROUP
    return TiltIds(ids, torch.searchsorted(ids, starts))


class Rows(NamedTuple):
    """What is known of the rows' tails. N rows, G groups, S samples."""

    classes: Tensor  # (N,)
    mass: Tensor  # (N, G)
    sample: Sample


def tilt(z: Tensor, known: TiltIds, rows: Rows) -> Tensor:
    """(N, J): how much more, or less, of the sampled ids row n's tail has than its class's, so that
    Σ_j tilt[n, j] C[ids[j]] is what the gradient by a row adds to the tail.

    z (N, J): logits of the sampled ids. x[n, j] is how far z lies above its mean over the class's
    sampled rows (with a little of all classes, as in `shapes`), and that above its mean over the
    group's sampled ids: no row's and no group's mass changes.
    """
    classes, mass, (sampled, weight) = rows
    row_mass = mass.sum(1)
    member = one_hot(classes[sampled], CLASSES, z.dtype) * (weight * row_mass[sampled])[:, None]
    member = member + SHARED * member.sum(1, keepdim=True)
    mean = member.T @ z[sampled] / member.sum(0)[:, None].clamp(min=_NOTHING)
    x = torch.where(z == -torch.inf, 0, z - mean[classes])  # masked ids are above no mean
    count = known.first.diff()
    place = torch.repeat_interleave(count)  # the group of each
    share = mass[:, place] / count[place]
    of_group = one_hot(place, mass.shape[1], z.dtype)
    x = x - ((x @ of_group) / count.clamp(min=1))[:, place]
    x = torch.where(share == 0, 0, x)
    v = (share * x.square()).sum(1) / row_mass.clamp(min=_NOTHING)
    return share * x * (TILT / (1 + TILT_DAMPING * v))[:, None]


class Spread(NamedTuple):
    """The tail in pieces: tail[n, j] = mass[n, group(j)] shape[classes[n], j] + uniform[n]."""

    mass: Tensor  # (N, G): dropped mass times what scales it
    classes: Tensor  # (N,)
    shape: Tensor  # (K, V)
    uniform: Tensor | None  # (N,): what label smoothing adds to each of a row's entries


def dense(tail: Spread) -> Tensor:
    """The whole tail (N, V), for the reference."""
    mass = tail.mass.repeat_interleave(GROUP, 1)[:, : tail.shape.shape[1]]
    result = mass * tail.shape[tail.classes]
    return result if tail.uniform is None else result + tail.uniform[:, None]


def column_sum(tail: Spread) -> Tensor:
    """(V,): Σ_n tail[n, j], the tail's gradient by the bias."""
    k, vocab = tail.shape.shape
    totals = one_hot(tail.classes, k, tail.mass.dtype).T @ tail.mass
    result = (totals.repeat_interleave(GROUP, 1)[:, :vocab] * tail.shape).sum(0)
    return result if tail.uniform is None else result + tail.uniform.sum()
