"""The small kernels of the sparse backward on a real GPU, each against its steps in plain PyTorch."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from cce_ext.sparse import tail
from tests.sparse_cuda_problem import BF16, FP16, error
from tests.tail_factors import LIFT, make_factors, make_units

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
    """a, d, mass by group and row, then what backward_sample_ finds."""
    dnll, dlse = normal(n, seed=1), normal(n, seed=2)
    mass = uniform(n, groups, seed=3) * 10 ** (-4 * uniform(n, 1, seed=4))
    a, d, row_mass, share = torch.ops.cce.backward_shares(dnll, dlse, targets, mass, listed, -100)
    found = torch.ops.cce.backward_sample_(
        a, d, row_mass, share, targets, listed, -100, flat, tail.sample_size(n), unit, smoothed
    )
    return (a, d, mass, row_mass, share, *found)


@pytest.mark.parametrize("n", [1, 5, 128, 1023, 1024, 1025, 9000])
@pytest.mark.parametrize("kind", ["none", "some", "flat"])
def test_exact_rows_units_and_sample(n: int, kind: str) -> None:
    targets = torch.where(uniform(n, seed=5) < 0.2, -100, 7)
    listed = (uniform(n, seed=6) < 0.3) & (kind == "some")
    flat = 0.0 if kind == "flat" else 1e9
    a, d, _, row_mass, share, exact, exact_share, d_all, rows, weight, order, count, units = (
        backward_rows(n, 3, targets, listed, flat, 0.5, 0.25)
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
    sample = tail.sample_rows(a, row_mass)
    assert torch.equal(rows, sample.rows)
    torch.testing.assert_close(weight, sample.weight)
    *_, ones = backward_rows(n, 3, targets, listed, flat, 0.0, 0.25)
    assert (ones == 1).all()


@DTYPES
@pytest.mark.parametrize(("samples", "width", "rank"), [(1, 8, 0), (7, 40, 5), (256, 264, 16)])
def test_sampled_rows(dtype: torch.dtype, samples: int, width: int, rank: int) -> None:
    n, v, start, total, smoothing = 300, 1000, 50, 2000, 0.1
    e = normal(n, width).to(dtype)
    padded = torch.zeros(n, -(-rank // 8) * 8, device="cuda", dtype=dtype)
    padded[:, :rank] = normal(n, rank, seed=1).to(dtype)
    u = padded[:, :rank] if rank else None
    rows = torch.randperm(n, generator=torch.Generator().manual_seed(2))[:samples].cuda()
    weight, lse = uniform(n, seed=3), normal(n, seed=4)
    targets = (uniform(n, seed=5) * 1200).long()
    targets[::7] = -100
    place = (smoothing, -100, v, start, total)
    e_sampled, u_sampled, order, count, records = torch.ops.cce.tail_rows(
        rows, weight, 4.0, e, u, lse, targets, *place
    )
    assert torch.equal(e_sampled, e[rows])
    if u is not None:
        assert torch.equal(u_sampled, u[rows])
    every = torch.arange(samples, device="cuda", dtype=torch.int32)
    assert torch.equal(order, every)
    assert count.tolist() == [samples]
    expected = torch.ops.cce.row_gradients(
        None, weight[rows] * 4, lse[rows], targets[rows], every, count, *place
    )
    assert torch.equal(records[:, :6], expected[:, :6])


@DTYPES
@pytest.mark.parametrize("smoothing", [False, True])
@pytest.mark.parametrize(("n", "v"), [(1, 16400), (5, 9216), (130, 20001), (600, 4608 * 5 + 1)])
def test_classes_and_factors(dtype: torch.dtype, smoothing: bool, n: int, v: int) -> None:
    groups, tilt, hot, scale = tail.groups(v), 40, 64, 0.7
    e = normal(n, 48).to(dtype)
    rows = torch.randperm(n, generator=torch.Generator().manual_seed(1)).cuda()[
        : tail.sample_size(n)
    ]
    step = max(1, rows.shape[0] // tail.CLASSES)
    anchors = e[rows][: step * tail.CLASSES : step]
    scores = tail.wide_mm(e, anchors.T)
    a, d, mass = normal(n, seed=2), normal(n, seed=3), uniform(n, groups, seed=4) * 1e-3
    expected = scores.argmax(1)
    share = -scale * 0.1 / v
    spread = tail.Spread(
        mass * (a * scale)[:, None],
        expected,
        torch.ones(tail.CLASSES, v, device="cuda"),
        d * share if smoothing else None,
    )
    units = make_units(spread, 1.0, dtype)
    factors, classes, member = torch.ops.cce.tail_classes(
        scores, e, a, d, mass, rows, units, tilt, hot, scale,
        share * tail.GROUP if smoothing else None,
    )  # fmt: skip
    factors = factors[:, tilt:]
    assert torch.equal(classes, expected)
    one_hot = tail.one_hot(expected[rows], tail.CLASSES, dtype).T
    assert torch.equal(member, one_hot)
    nothing = torch.zeros(n, hot, device="cuda")
    wanted = make_factors(spread, nothing, torch.arange(hot), units, dtype).rows
    assert factors.shape == wanted.shape
    torch.testing.assert_close(factors, wanted, rtol=LAST_BITS[dtype], atol=6e-8)
    assert (factors[:, :hot] == 0).all()
    # A product that is not a number is the largest, as in torch.argmax.
    scores[:, -1] = torch.nan
    _, classes, _ = torch.ops.cce.tail_classes(
        scores, e, a, d, mass, rows, units, 0, hot, scale, None
    )
    assert torch.equal(classes, scores.argmax(1))


@pytest.mark.parametrize("dtype", [BF16, FP16, torch.float32], ids=str)
@pytest.mark.parametrize("smoothing", [False, True])
@pytest.mark.parametrize("v", [4608, 9217, 20000, 32061, 4608 * 4 - 1])
def test_shapes(dtype: torch.dtype, smoothing: bool, v: int) -> None:
    sums = torch.exp(4 * normal(tail.CLASSES, v))
    sums[:, : tail.GROUP] = 0  # nobody drops anything there
    sums[3] = 0
    shape, totals = torch.ops.cce.tail_shapes(
        sums, torch.empty(0, device="cuda", dtype=dtype), tail.SHARED, smoothing
    )
    assert totals[0] == 0
    assert (totals[1:] > 0).all()
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
    _, totals = torch.ops.cce.tail_shapes(sums, sums, tail.SHARED, False)
    return tail.TiltIds(*torch.ops.cce.tilt_ids(sums, totals, count))


@pytest.mark.parametrize("count", [512, 1024])
@pytest.mark.parametrize("v", [4608, 9217, 20000, 4608 * 600 - 1])
@pytest.mark.parametrize("kind", ["spread", "few", "nothing", "not a number"])
def test_ids_of_the_tilt(count: int, v: int, kind: str) -> None:
    sums = torch.exp(4 * normal(tail.CLASSES, v)) * (2.0**18 / v / 3e4)  # of 256 rows, lifted
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
    mass = uniform(n, groups, seed=4) * 1e-2
    mass[:, 1] = 0
    mass[3::9] = 0
    a = normal(n, seed=5)
    classes = (uniform(n, seed=6) * (tail.CLASSES - 1)).long()  # nobody is of the last
    sample = tail.sample_rows(a, mass.sum(1))
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
    """Those with the largest counts, the smaller id first; for 6000 rows counts need two histograms."""
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
    assert tally.tolist() == [int(counts.sum()), int(counts.sum()), 0, blocks]
    voting = kept[:: 1 if blocks < 32 else 8]
    seen = torch.bincount(torch.cat(voting), minlength=v)
    expected = torch.argsort(-seen, stable=True)[:hot].sort().values
    assert torch.equal(hot_ids.cpu(), expected)
    places = torch.full((v,), -1).scatter_(0, expected, torch.arange(hot))
    assert torch.equal(slots.cpu().long(), places)


@DTYPES
@pytest.mark.parametrize("wide", [False, True])
@pytest.mark.parametrize("width", [1, 100, 3072])
def test_added_rows(dtype: torch.dtype, wide: bool, width: int) -> None:
    v, hot = 3000, 1024
    out = normal(v, width).to(torch.float32 if wide else dtype)
    ids = torch.randperm(v, generator=torch.Generator().manual_seed(1))[:hot].sort().values.cuda()
    product, unit = normal(hot + 3, width, seed=2), torch.tensor([0.3, 7.0], device="cuda")
    expected = out.clone()
    expected[ids] = (out[ids].float() + product[:hot] * 0.3).to(out.dtype)
    like = torch.empty(0, device="cuda", dtype=dtype)
    torch.ops.cce.add_rows_(out, ids, product, unit, like)
    limit = 1e-5 if wide else LAST_BITS[dtype]
    torch.testing.assert_close(out, expected, rtol=limit, atol=1e-5)


def test_segments_with_a_slot_have_no_entries() -> None:
    counts = torch.tensor([0, 3, 70, 5, 0, 200, 1, 90])
    first = torch.cat([torch.zeros(1, dtype=torch.long), counts.cumsum(0)]).int().cuda()
    slots = torch.tensor([-1, 0, -1, -1, 1, 2, -1, -1], dtype=torch.int32).cuda()
    total = int(counts.sum())
    source = normal(40, 264).to(BF16)
    items = (uniform(total) * 40).int()
    weights = normal(total, seed=1)
    segment = torch.repeat_interleave(torch.arange(8), counts).cuda()
    for used, there in ((None, torch.ones(8, device="cuda")), (slots, (slots < 0).float())):
        out, sums = torch.zeros(8, 264, device="cuda"), torch.zeros(8, device="cuda")
        torch.ops.cce.gather_(out, source, first, None, used, items, weights, None, None, sums)
        terms = weights[:, None] * source[items.long()].float()
        expected = torch.zeros_like(out).index_add_(0, segment, terms) * there[:, None]
        assert error(out, expected) < 1e-5
        assert error(sums, torch.zeros_like(sums).index_add_(0, segment, weights) * there) < 1e-5
