"""The small kernels of the sparse backward on a real GPU, each against its steps in plain PyTorch."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from bench.llm_data import llm_like
from cce_ext.options import LossOptions
from cce_ext.reference import logits
from cce_ext.sparse import forward as sparse_forward
from cce_ext.sparse import tail
from cce_ext.sparse.reference import frequent_targets, sampled_columns
from tests.sparse_cuda_problem import BF16, FP16, error
from tests.tail_factors import LIFT, make_factors, make_units, spread_columns

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")

DTYPES = pytest.mark.parametrize("dtype", [BF16, FP16], ids=str)
LAST_BITS = {BF16: 2.0**-7, FP16: 2.0**-10}


def normal(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)).cuda()


def uniform(*shape: int, seed: int = 0) -> Tensor:
    return torch.rand(*shape, generator=torch.Generator().manual_seed(seed)).cuda()


def backward_rows(
    n: int, groups: int, targets: Tensor, listed: Tensor, flat: float, unit: float, smoothed: float
) -> tuple[Tensor, ...]:
    """The mass by group and row, the share of exact rows, then what backward_rows finds."""
    dnll, dlse = normal(n, seed=1), normal(n, seed=2)
    mass = uniform(n, groups, seed=3) * 10 ** (-4 * uniform(n, 1, seed=4))
    exact_share = torch.empty(1, pin_memory=True)
    found = torch.ops.cce.backward_rows(
        dnll, dlse, targets, mass, listed, None, exact_share, -100, flat, unit, smoothed
    )
    torch.cuda.synchronize()
    share = torch.ops.cce.dropped_share(dnll, dlse, targets, mass, listed, -100)
    assert torch.equal(found[3], share)
    return (mass, exact_share.cuda(), *found)


@pytest.mark.parametrize("n", [1, 5, 128, 1023, 1024, 1025, 9000])
@pytest.mark.parametrize("kind", ["none", "some", "flat"])
def test_exact_rows_and_units(n: int, kind: str) -> None:
    targets = torch.where(uniform(n, seed=5) < 0.2, -100, 7)
    listed = (uniform(n, seed=6) < 0.3) & (kind == "some")
    flat = 0.0 if kind == "flat" else 1e9
    _, exact_share, a, d, row_mass, share, exact, d_all, order, count, units = backward_rows(
        n, 3, targets, listed, flat, 0.5, 0.25
    )
    valid = targets != -100
    expected = valid & (listed | (kind == "flat") & ~(share <= 0))
    assert torch.equal(exact, expected)
    assert int(count) == int(expected.sum())
    assert torch.equal(order.long(), torch.argsort((~expected).byte(), stable=True))
    torch.testing.assert_close(exact_share[0], expected.sum() / valid.sum().clamp(min=1))
    dnll = torch.where(valid, normal(n, seed=1), 0)
    assert torch.equal(d_all, dnll)
    assert torch.equal(d, torch.where(expected, 0, dnll))
    top = torch.maximum((a.abs() * row_mass).max() * 0.5, d.abs().max() * 0.25).clamp(
        min=torch.finfo(torch.float32).tiny
    )
    hot = (a.abs().max() + d.abs().max()) * 0.5 + 1e-30
    torch.testing.assert_close(units, torch.stack([hot, top, top / LIFT]))
    *_, ones = backward_rows(n, 3, targets, listed, flat, 0.0, 0.25)
    assert (ones == 1).all()


@DTYPES
@pytest.mark.parametrize("other", [None, torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize("width", [1, 8, 20, 520])
@pytest.mark.parametrize("layout", ["rows", "columns", "from the middle"])
def test_picked_rows(
    dtype: torch.dtype, other: torch.dtype | None, width: int, layout: str
) -> None:
    a = normal(300, width, seed=1).to(other or dtype)
    b = normal(70, width, seed=2).to(dtype)
    if layout == "columns":
        a = a.T.contiguous().T
    elif layout == "from the middle":
        a = torch.cat([a, a], 1)[:, 1 : 1 + width]
    ids = torch.tensor([299, 0, 7, 7, 150], device="cuda")
    others = torch.arange(69, -1, -3, device="cuda")
    out = torch.full((len(ids) + len(others) + 3, width), 5.0, device="cuda", dtype=dtype)
    torch.ops.cce.pick_rows_(out, a, ids, b, others)
    assert torch.equal(out[:-3], torch.cat([a[ids].to(dtype), b[others]]))
    assert (out[-3:] == 5).all()
    torch.ops.cce.pick_rows_(out, b, others[:0], a.to(dtype), ids)
    assert torch.equal(out[:5], a[ids].to(dtype))
    pieces = normal(9, 3 * width, seed=3).to(dtype)[:, ::3]
    with pytest.raises(RuntimeError, match="columns of a and b"):
        torch.ops.cce.pick_rows_(out, pieces[:, :-1], ids, b, others)


@pytest.mark.parametrize("n", [1, 5, 127, 128, 129, 511, 1024, 9000, 100000])
@pytest.mark.parametrize("ignored", [0.0, 0.3, 1.0])
def test_drawn_rows(n: int, ignored: float) -> None:
    targets = torch.where(uniform(n, seed=5) < ignored, -100, 7)
    valid = targets != -100
    share = (uniform(n, seed=1) ** 3).clamp(min=tail.LEAST_SHARE)
    bound2, size = normal(n, seed=2), tail.sample_size(n, 20000)
    order, count = torch.ops.cce.row_order(targets, -100)
    starts, rows, draws = torch.ops.cce.draw_rows(share, bound2, order, count, size)
    expected = tail.draw_rows(share, valid, size)
    assert torch.equal(rows, expected.rows)
    torch.testing.assert_close(draws, expected.weight)
    there = order[: int(count)].long()
    starts = starts[: int(count)].contiguous()
    assert torch.equal(starts.view(torch.float32)[:, 0], bound2[there])
    slots = torch.full((n,), -1, dtype=torch.int32, device="cuda")
    used = draws > 0
    slots[rows[used]] = torch.arange(size, device="cuda", dtype=torch.int32)[used]
    assert torch.equal(starts[:, 1], slots[there])


@DTYPES
@pytest.mark.parametrize("softcap", [0.0, 25.0])
@pytest.mark.parametrize(("n", "v"), [(1, 16400), (130, 20001), (2500, 16700)])
def test_sums_of_what_sampled_rows_drop(dtype: torch.dtype, softcap: float, n: int, v: int) -> None:
    """From the pass over the vocabulary on: the levels' order in memory is the kernels' own."""
    eps, d, scale = 2.0**-13, 64, 0.8
    e, c, targets = llm_like(n, v, d, dtype, "cuda", n)
    targets[::5] = -100 if n > 1 else targets[::5]
    bias = normal(v)
    bias[100:200] = -torch.inf
    targets[(targets >= 100) & (targets < 200)] = 7
    call = sparse_forward.prepare(e, c, targets, bias, None, None, -100, softcap, scale, 0.0, 0, 0)
    bounds = sparse_forward.bound_rows(call, eps)
    stats, found = sparse_forward.collect(call, False, eps, bounds)
    exact = uniform(n, seed=3) < (0.1 if n > 1 else 0)
    sums, weight = torch.ops.cce.level_sums(
        found.levels, found.sample, found.draws, bounds.classes, bounds.bound2, stats.lse, targets,
        exact, v, eps, softcap, -100, 0, v,
    )  # fmt: skip
    anchors = tail.anchors(targets != -100)
    score = e.double() @ e[anchors].double().T
    nearest = score.gather(1, bounds.classes[:, None])[:, 0]
    assert (nearest >= score.amax(1) - 1e-4 * score.abs().amax()).all()
    rows = found.sample
    assert torch.equal(weight, torch.where(exact[rows], 0, found.draws))
    # Levels from logits in float64 may be the next ones: a step is 9 %.
    z = logits(e.double(), c.double(), bias.double(), None, None, LossOptions(-100, softcap, scale))
    z, lse, bound = z[rows], stats.lse.double()[rows], bounds.bound2.double()[rows] * math.log(2)
    written = tail.level_logits(tail.levels(z, bound), bound)
    dropped = torch.exp(written - lse[:, None])
    is_target = torch.arange(v, device="cuda") == targets[rows, None]
    dropped = torch.where(is_target | (dropped >= eps), 0, dropped)
    if softcap:
        slope = (1 - (written / softcap) ** 2).clamp(min=0)
        dropped = torch.where(dropped == 0, 0, dropped * slope)
    member = tail.one_hot(bounds.classes[rows], tail.CLASSES, torch.float64)
    expected = member.T @ (dropped * weight[:, None])
    assert error(sums, expected) < 5e-3
    assert ((sums - expected).abs() <= 0.1 * expected.abs().amax(0) + eps * weight.max()).all()
    close = (sums - expected).abs() <= 1e-4 * expected.abs() + 1e-12
    assert close.double().mean() > 0.98
    assert (sums[:, 100:200] == 0).all()
    assert expected.sum() > 0


@DTYPES
@pytest.mark.parametrize("smoothing", [False, True])
@pytest.mark.parametrize(("n", "v"), [(1, 16400), (5, 9216), (130, 20001), (600, 4608 * 5 + 1)])
def test_factors(dtype: torch.dtype, smoothing: bool, n: int, v: int) -> None:
    groups, tilt, hot, scale = tail.groups(v), 40, 64, 0.7
    like = torch.empty(0, device="cuda", dtype=dtype)
    a, d, mass = normal(n, seed=2), normal(n, seed=3), uniform(n, groups, seed=4) * 1e-3
    expected = (uniform(n, seed=5) * tail.CLASSES).long().clamp(max=tail.CLASSES - 1)
    share = -scale * 0.1 / v
    spread = tail.Spread(
        mass * (a * scale)[:, None],
        expected,
        torch.ones(tail.CLASSES, v, device="cuda"),
        d * share if smoothing else None,
    )
    units = make_units(spread, 1.0, dtype)
    factors = torch.ops.cce.tail_factors(
        expected, like, a, d, mass, units, tilt, hot, scale,
        share * tail.GROUP if smoothing else None,
    )[:, tilt:]  # fmt: skip
    nothing = torch.zeros(n, hot, device="cuda")
    wanted = make_factors(spread, nothing, torch.arange(hot), units, dtype).rows
    assert factors.shape == wanted.shape
    torch.testing.assert_close(factors, wanted, rtol=LAST_BITS[dtype], atol=6e-8)
    assert (factors[:, :hot] == 0).all()


@pytest.mark.parametrize("dtype", [BF16, FP16, torch.float32], ids=str)
@pytest.mark.parametrize("smoothing", [False, True])
@pytest.mark.parametrize("v", [4608, 9217, 20000, 32061, 4608 * 4 - 1])
def test_shapes(dtype: torch.dtype, smoothing: bool, v: int) -> None:
    sums = torch.exp(4 * normal(tail.CLASSES, v))
    sums[:, : tail.GROUP] = 0  # nobody drops anything there
    sums[3] = 0
    like = torch.empty(0, device="cuda", dtype=dtype)
    shape, ids, first = torch.ops.cce.tail_shapes(sums, like, tail.SHARED, smoothing, 512)
    # The groups' weights, by the ids drawn by them: none in the first group, some in every other one.
    if v > tail.GROUP:
        assert first[:2].tolist() == [0, 0]
        assert (first.diff()[1:-1] > 0).all()
        assert ids[0] >= tail.GROUP
    none = torch.ops.cce.tail_shapes(sums, like, tail.SHARED, smoothing, 0)
    assert torch.equal(none[0], shape)
    assert none[1].shape == (0,)
    assert first.shape == (tail.groups(v) + 1,)
    assert shape.shape == (tail.CLASSES + smoothing, v)
    assert shape.stride(0) % 8 == 0
    expected = tail.shapes(sums.double())
    lift = LIFT if dtype == FP16 else 1.0
    got = shape.double() / lift
    limit = LAST_BITS.get(dtype, 1e-5)
    least = 6e-8 / lift if dtype == FP16 else 1e-12
    torch.testing.assert_close(got[: tail.CLASSES], expected, rtol=limit, atol=least)
    torch.testing.assert_close(
        got[tail.CLASSES :],
        torch.full_like(got[tail.CLASSES :], 1 / tail.GROUP),
        rtol=limit,
        atol=0,
    )


def sampled_ids(sums: Tensor, count: int) -> tail.TiltIds:
    """What the kernels find."""
    _, ids, first = torch.ops.cce.tail_shapes(sums, sums, tail.SHARED, False, count)
    return tail.TiltIds(ids, first)


@pytest.mark.parametrize("count", [512, 1024])
@pytest.mark.parametrize("v", [4608, 9217, 20000, 4608 * 600 - 1])
@pytest.mark.parametrize("kind", ["spread", "few", "nothing", "not a number"])
def test_ids_of_the_tilt(count: int, v: int, kind: str) -> None:
    sums = torch.exp(4 * normal(tail.CLASSES, v)) * (2.0**8 / v / 3e4)  # of 256 rows
    if kind == "few":
        sums[:, 7:-3] = 0
    elif kind == "nothing":
        sums.zero_()
    elif kind == "not a number":
        sums[2, ::5], sums[3, 1] = torch.nan, torch.inf
    found, expected = sampled_ids(sums, count), tail.tilt_ids(sums, count)
    assert torch.equal(found.ids, expected.ids)
    assert torch.equal(found.first.long(), expected.first)


@DTYPES
@pytest.mark.parametrize("softcap", [0.0, 20.0])
@pytest.mark.parametrize(
    ("n", "v", "count"), [(1, 16400, 512), (130, 20001, 512), (600, 70000, 1024)]
)
def test_tilt(dtype: torch.dtype, softcap: float, n: int, v: int, count: int) -> None:
    groups, scale = tail.groups(v), 0.7
    sums = torch.exp(4 * normal(tail.CLASSES, v, seed=1))
    known = sampled_ids(sums, count)
    products, bias = (4 * normal(n, count, seed=2)).to(dtype), normal(v, seed=3)
    bias[known.ids[::100]] = -torch.inf
    mass = uniform(n, groups, seed=4) * 1e-2
    mass[:, 1] = 0
    mass[3::9] = 0
    a = normal(n, seed=5)
    classes = (uniform(n, seed=6) * (tail.CLASSES - 1)).long()  # nobody is of the last
    every = torch.ones(n, dtype=torch.bool, device="cuda")
    sample = tail.draw_rows(uniform(n, seed=7).clamp(min=tail.LEAST_SHARE), every, 64)
    z = (products.double() + bias[known.ids]) * scale
    z = softcap * torch.tanh(z / softcap) if softcap else z
    rows = tail.Rows(classes, mass.double(), tail.Sample(sample.rows, sample.weight.double()))
    known = tail.TiltIds(known.ids, known.first.long())
    expected = tail.tilt(z, known, rows) * (a * scale)[:, None]
    unit = 3.0 if dtype == FP16 else 1.0
    units = torch.tensor([1.0, unit, unit / LIFT], device="cuda")
    torch.ops.cce.tilt_(
        products, known.ids, known.first.int(), classes, *sample, mass.sum(1), mass, a, bias,
        softcap, scale, tail.SHARED, tail.TILT, tail.TILT_DAMPING, units,
    )  # fmt: skip
    got = products.double() * (unit / LIFT if dtype == FP16 else 1.0)
    assert n == 1 or expected.abs().max() > 1e-6  # one row is its class
    torch.testing.assert_close(got, expected, rtol=2 * LAST_BITS[dtype], atol=1e-8)
    # No row's and no group's mass changes.
    assert (got.sum(1).abs() <= 1e-2 * got.abs().sum(1) + 1e-12).all()


@pytest.mark.parametrize(("n", "v"), [(128, 20000), (200, 4608 * 30), (6000, 16500)])
@pytest.mark.parametrize("frequent", [1.0, 40.0])
def test_hot_ids(n: int, v: int, frequent: float) -> None:
    """Those with the largest counts, the smaller id first."""
    hot, blocks, per_block = 1024, -(-n // 128), 9000
    pool = torch.zeros(blocks, per_block, 2, dtype=torch.int32)
    kept = []
    for block in range(blocks):  # no entry twice
        ids = ((uniform(per_block, seed=block) ** frequent) * (v - 1)).long().cpu()
        entries = torch.unique((torch.arange(per_block) % 64) << 25 | ids)
        pool[block, : len(entries), 0] = entries.int()
        kept.append(entries & (1 << 25) - 1)
    counts = torch.tensor([len(ids) for ids in kept], dtype=torch.int32).cuda()
    zeros = torch.zeros(n, device="cuda")
    order, count = torch.ops.cce.row_order(torch.zeros(n, dtype=torch.int64).cuda(), -100)
    *_, hot_ids, slots, tally = torch.ops.cce.select_kept(
        pool.cuda(), counts, order, count, zeros, zeros - 1, zeros,
        torch.full((n,), v, device="cuda"), 2.0**-13, -100, v, 0, 2 * v, blocks * per_block, hot,
    )  # fmt: skip
    assert tally.tolist() == [int(counts.sum()), int(counts.sum()), 0, blocks, n]
    voting = kept[:: 1 if blocks < 32 else 8]
    seen = torch.bincount(torch.cat(voting), minlength=v)
    expected = torch.argsort(-seen, stable=True)[:hot].sort().values
    assert torch.equal(hot_ids.cpu(), expected)
    places = torch.full((v,), -1).scatter_(0, expected, torch.arange(hot))
    assert torch.equal(slots.cpu().long(), places)


@pytest.mark.parametrize("start", [0, 700])
@pytest.mark.parametrize(
    ("n", "frequent"), [(1, 1.0), (300, 3.0), (5000, 1.0), (5000, 6.0), (90000, 9.0)]
)
def test_columns_of_the_bound(n: int, frequent: float, start: int) -> None:
    """Few targets, more distinct ones than there is room for, many of one id, several beyond what
    is counted; in a shard, too."""
    v, strided = 3000, 384
    targets = (uniform(n, seed=1) ** frequent * (v + 2 * start)).long()
    targets[::7] = -100
    order, count = torch.ops.cce.row_order(targets, -100)
    ids, counts, anchors = torch.ops.cce.bound_columns(
        targets, order, count, v, start, strided, sparse_forward.FREQUENT_TARGETS
    )
    assert torch.equal(anchors, tail.anchors(targets != -100))
    expected = frequent_targets(targets[targets != -100].cpu(), start, v)
    assert ids[strided:].tolist() == expected.tolist()
    columns = sampled_columns(v)
    assert torch.equal(ids[:strided].cpu(), columns)
    assert torch.equal(counts.cpu() == 1, ~torch.isin(columns, expected))


@DTYPES
@pytest.mark.parametrize("smoothing", [False, True])
@pytest.mark.parametrize("wide", [False, True])
@pytest.mark.parametrize(("width", "padding"), [(1, 0), (100, 4), (264, 0), (264, 8), (1000, 3)])
def test_gradient_by_columns(
    dtype: torch.dtype, smoothing: bool, wide: bool, width: int, padding: int
) -> None:
    """Tail, hot ids and lists of all lengths, in rows that may be longer than they are wide."""
    n, v, hot = 300, 2 * tail.GROUP + 77, 40
    ids = torch.randperm(v, generator=torch.Generator().manual_seed(1))[:hot].sort().values.cuda()
    classes = torch.zeros(n, dtype=torch.int64, device="cuda")
    shape = tail.shapes(torch.exp(4 * normal(tail.CLASSES, v, seed=2)))
    spread = tail.Spread(
        normal(n, 3), classes, shape, normal(n, seed=3) / tail.GROUP if smoothing else None
    )
    units = torch.tensor([3.0, 1.0, 1 / LIFT if dtype == FP16 else 1.0], device="cuda")
    factors = make_factors(spread, normal(n, hot), ids, units, dtype)
    product = normal(factors.rows.shape[1], width, seed=4)
    # Most ids have no entries, a few have many; those of hot ids must not be read.
    counts = (500 * uniform(v, seed=5) ** 16).int()
    first = torch.cat([torch.zeros_like(counts[:1]), counts.cumsum(0)]).int()
    total, slots = int(first[-1]), torch.full((v,), -1, dtype=torch.int32, device="cuda")
    slots[ids] = torch.arange(hot, dtype=torch.int32, device="cuda")
    items, weights = (uniform(total, seed=6) * n).int(), normal(total, seed=7) / 30
    source = normal(n, width, seed=8).to(dtype)
    order = torch.randperm(total, generator=torch.Generator().manual_seed(9)).cuda().int()
    out = torch.full((v, width + padding), torch.nan, device="cuda")
    out = out.to(torch.float32 if wide else dtype)
    torch.ops.cce.column_gradient_(
        out[:, :width], source, product, factors.shape, units, first, slots, items, weights, order
    )
    segment = torch.repeat_interleave(torch.arange(v, device="cuda"), counts)
    terms = weights[order.long(), None] * source[items[order.long()].long()].float()
    expected = torch.zeros(v, width, device="cuda").index_add_(0, segment, terms)
    expected[ids] = 0
    expected += spread_columns(factors, product)
    limit = 1e-5 if wide else LAST_BITS[dtype]
    torch.testing.assert_close(out[:, :width].float(), expected, rtol=limit, atol=1e-5)
    assert torch.isnan(out[:, width:]).all()


def test_gathered_segments() -> None:
    counts = torch.tensor([0, 3, 70, 5, 0, 200, 1, 90])
    first = torch.cat([torch.zeros(1, dtype=torch.long), counts.cumsum(0)]).int().cuda()
    total = int(counts.sum())
    source = normal(40, 264).to(BF16)
    items = (uniform(total) * 40).int()
    weights = normal(total, seed=1)
    segment = torch.repeat_interleave(torch.arange(8), counts).cuda()
    out, sums = torch.zeros(8, 264, device="cuda"), torch.zeros(8, device="cuda")
    torch.ops.cce.gather_(out, source, first, None, items, weights, None, None, sums)
    terms = weights[:, None] * source[items.long()].float()
    assert error(out, torch.zeros_like(out).index_add_(0, segment, terms)) < 1e-5
    assert error(sums, torch.zeros_like(sums).index_add_(0, segment, weights)) < 1e-5
