"""What must hold of the sparse gradient on any head: its reference, on heads made here."""

from __future__ import annotations

import math
from dataclasses import replace

import pytest
import torch
from torch import Tensor

from cce_ext.options import LossOptions
from cce_ext.sparse import tail
from cce_ext.sparse.op import refusal
from cce_ext.sparse.products import column_product, of_ids, row_gradient
from cce_ext.sparse.reference import SparseGradients, sample_bound, sampled_columns
from tests.sparse_problem import (
    CASES,
    EPS,
    by_group,
    eager_errors,
    error,
    made_head,
    make,
)
from tests.tail_factors import make_factors, make_units, spread_columns

F64 = torch.float64


@pytest.mark.parametrize("name", CASES)
def test_every_row_and_group_keeps_its_mass(name: str) -> None:
    problem, capacity = make(**CASES[name])
    # Columns that tell de the sum of each group, tilt and all; hidden states of 0 there leave the
    # logits alone.
    width, group = problem.e.shape[1], torch.arange(problem.c.shape[0]) // tail.GROUP
    member = torch.nn.functional.one_hot(group).to(problem.c.dtype)
    zeros = problem.e.new_zeros(problem.e.shape[0], member.shape[1])
    problem = replace(
        problem, e=torch.cat([problem.e, zeros], 1), c=torch.cat([problem.c, member], 1)
    )
    found = problem.sparse(capacity=capacity)
    exact = found.exact_rows.sum()
    assert exact < (problem.targets != -100).sum(), "nothing was sparse"
    assert (exact > 0) == (capacity is not None)
    a = problem.a.abs()
    off = (by_group(found.dproducts) - by_group(problem.exact["products"])).abs()
    assert (off <= 1e-5 * a[:, None]).all()
    tilt = found.de - found.dproducts @ problem.c
    assert (tilt[:, width:].abs() <= 1e-12 * a[:, None]).all()
    assert tilt.norm() > 1e-5 * found.de.norm(), "nothing was tilted"
    total = found.dbias.sum() - problem.exact["products"].sum()
    assert total.abs() <= 1e-5 * a.sum()
    assert (found.dproducts[problem.targets == -100] == 0).all()


def test_mass_in_float32() -> None:
    problem, _ = make(bias=True, lse=True, softcap=30.0, dtype=torch.float32)
    off = by_group(problem.sparse().dproducts) - by_group(problem.exact["products"])
    assert (off.abs() <= 1e-5 * problem.a.abs()[:, None]).all()


def test_kept_entries_are_exact() -> None:
    problem, _ = make(bias=True, softcap=30.0, lse=True)
    found = problem.sparse()
    z = problem.options.softcap * torch.tanh(
        (problem.e @ problem.c.T + problem.bias) / problem.options.softcap
    )
    kept = (torch.softmax(z, -1) >= EPS).scatter_(1, problem.targets[:, None], True)
    assert kept.sum() == found.kept.sum() + len(problem.targets)
    exact = problem.exact["products"]
    # A kept entry, plus nothing of the tail: its shape is that of dropped entries, but a column that
    # one row keeps another row drops. Gradients by rows have the tilt beside this, by sampled ids.
    spread = (found.dproducts - exact)[kept].abs().sum()
    assert spread <= 0.1 * exact[kept].abs().sum()
    assert error(torch.where(kept, found.dproducts, 0), torch.where(kept, exact, 0)) < 1e-2


@pytest.mark.parametrize("name", CASES)
def test_no_threshold_is_the_exact_gradient(name: str) -> None:
    problem, _ = make(**CASES[name])
    found = problem.sparse(eps=0.0)
    assert not found.exact_rows.any()
    for gradient, off in problem.errors(found).items():
        assert off <= 5e-6, gradient


def test_smaller_thresholds_come_closer() -> None:
    problem, _ = make()
    errors = [problem.errors(problem.sparse(eps=2.0**-k)) for k in (11, 13, 15, 17)]
    for name in ("e", "c"):
        series = [found[name] for found in errors]
        assert series == sorted(series, reverse=True), (name, series)
        assert series[-1] < series[0] / 4, (name, series)


@pytest.mark.parametrize("softcap", [30.0, 5.0])
def test_smoothing_under_a_softcap_is_exact(softcap: float) -> None:
    problem, _ = make(bias=True, lse=True, ignored=0.2, softcap=softcap, label_smoothing=0.1)
    found = problem.sparse()
    assert torch.equal(found.exact_rows, problem.targets != -100)
    for name, off in problem.errors(found).items():
        assert off <= 5e-6, name
    big = problem.c.new_empty(20000, 96)
    assert "softcap" in refusal(big, 300, problem.options, EPS)


def same(x: SparseGradients, y: SparseGradients) -> bool:
    return all(a is b or torch.equal(a, b) for a, b in zip(x, y, strict=True))


def test_twice_is_bitwise_the_same() -> None:
    problem, _ = make(bias=True, rank=4, ignored=0.2, dtype=torch.float32)
    first = problem.sparse()
    assert same(first, problem.sparse())
    threads = torch.get_num_threads()
    torch.set_num_threads(
        1
    )  # sums in another order: the same rows are sampled, the same entries kept
    try:
        alone = problem.sparse()
    finally:
        torch.set_num_threads(threads)
    assert torch.equal(first.kept, alone.kept)
    assert error(alone.dproducts, first.dproducts) < 1e-5


def test_overflow_costs_no_accuracy() -> None:
    problem = made_head(512, 20000, 128)
    free = problem.sparse()
    assert not free.exact_rows.any()
    blocks = free.candidates.float().unflatten(0, (4, 128)).mean(1)  # of 128 rows
    tight = problem.sparse(capacity=int(blocks.median()))
    assert 0 < tight.exact_rows.sum() < 512
    assert problem.errors(tight)["e"] <= problem.errors(free)["e"]
    assert problem.errors(tight)["c"] <= 3.5e-3
    assert problem.sparse(capacity=64).exact_rows.all()


@pytest.mark.parametrize("vocab", [700, 5000, 40000])
@pytest.mark.parametrize("spread", [0.0, 1.0, 3.0, 6.0])
def test_the_bound_is_below_the_logsumexp_and_close(vocab: int, spread: float) -> None:
    g = torch.Generator().manual_seed(vocab)
    z = torch.randn(200, vocab, generator=g, dtype=torch.float64) * spread
    strided, frequent = sampled_columns(vocab), torch.randperm(vocab, generator=g)[:300]
    off = torch.logsumexp(z, 1) - sample_bound(z, strided, frequent)
    assert off.min() >= -1e-9
    # Of an even spread the estimate can be trusted, and the bound is close; a quarter would be 1.4 below.
    assert off.mean() <= {0.0: 0.25, 1.0: 0.5}.get(spread, torch.inf)


def test_the_bound_counts_no_id_twice() -> None:
    z = torch.randn(5, 300, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    every = torch.arange(300)
    bound = sample_bound(z, sampled_columns(300), every)
    torch.testing.assert_close(bound, torch.logsumexp(z, 1), rtol=0, atol=1e-12)
    # No frequent ids, and rows without any mass but one id's.
    z[:, 1:] = -torch.inf
    alone = sample_bound(z, sampled_columns(300), every[:0])
    torch.testing.assert_close(alone, z[:, 0], rtol=0, atol=1e-12)


@pytest.mark.parametrize("kind", ["random", "zero", "small", "softcap"])
def test_flat_calls_are_exact(kind: str) -> None:
    g = torch.Generator().manual_seed(0)
    n, v, d = 256, 20000, 128
    problem = made_head(n, v, d)
    if kind == "random":
        problem.c = torch.randn(v, d, generator=g) * 0.02
        problem.e = torch.randn(n, d, generator=g)
    elif kind == "zero":
        problem.c = torch.zeros(v, d)
    elif kind == "small":
        problem.e = problem.e * 0.3
    else:
        problem.options = LossOptions(softcap=2.0)
    found = problem.sparse()
    assert found.dropped_share > tail.FLAT
    assert found.exact_rows.all()
    eager = eager_errors(problem)
    for name, off in problem.errors(found).items():
        assert off <= min(1e-5, 2 * eager[name] + 1e-4), name


@pytest.mark.parametrize("n", [1, 16, 64, 128, 129, 300])
def test_rows(n: int) -> None:
    problem = made_head(n, 20000, 128, seed=n)
    found = problem.sparse()
    assert not found.exact_rows.any()
    errors = problem.errors(found)
    assert errors["e"] <= 8e-3
    assert errors["c"] <= 5e-3


@pytest.mark.parametrize("v", [129, 1000, 4097, 5000, 8321])
def test_vocabularies(v: int) -> None:
    problem = made_head(256, v, 128, seed=v)
    eager = eager_errors(problem)
    for name, off in problem.errors(problem.sparse()).items():
        assert off <= 2 * eager[name] + 1e-4, name


def test_extreme_biases() -> None:
    g = torch.Generator().manual_seed(0)
    n, v = 300, 20000
    problem = made_head(n, v, 128)
    bias = torch.zeros(v)
    bias[torch.rand(v, generator=g) < 0.5] = -1e4
    bias[torch.randint(v, (50,), generator=g)] += 20.0
    bias[tail.GROUP : 2 * tail.GROUP] = -torch.inf  # a whole group
    bias[v // tail.GROUP * tail.GROUP :] = -torch.inf  # the last, ragged one
    problem.targets[bias[problem.targets] == -torch.inf] = -100
    problem.bias = bias
    found = problem.sparse()
    assert not found.exact_rows.any()
    for name in ("e", "c"):
        assert torch.isfinite(problem.exact[name]).all()
    assert problem.errors(found)["e"] <= 1e-2
    assert all(torch.isfinite(x).all() for x in found[:3])


def test_a_nan_upstream_reaches_what_it_reaches_in_eager() -> None:
    problem, _ = make(n=64)
    problem.dnll[5] = torch.nan
    found = problem.sparse()
    assert found.exact_rows.all()
    others = torch.arange(64) != 5
    assert torch.isnan(found.de[5]).all()
    assert error(found.de[others], problem.exact["e"][others]) < 1e-6
    assert torch.isnan(found.dc).all()


def test_rows_that_drop_next_to_nothing() -> None:
    """Margins of 90 and more: 1 / mass has no number."""
    problem = made_head(40, 5000, 64)
    problem.e = problem.e * 30
    found = problem.sparse()
    assert all(torch.isfinite(x).all() for x in found[:3])
    assert problem.errors(found)["e"] < 1e-4
    assert found.dropped_share >= 0


def test_shapes_are_normal_in_every_group() -> None:
    weights = torch.rand(3, 2 * tail.GROUP + 100, dtype=F64)
    weights[:, tail.GROUP : 2 * tail.GROUP] = 0  # nobody drops anything there
    weights[1:, 7] = 0
    shape = tail.shapes(weights)
    assert torch.allclose(by_group(shape), torch.ones(3, 3, dtype=F64))
    assert (shape[:, tail.GROUP : 2 * tail.GROUP] == 1 / tail.GROUP).all()
    assert 0 < shape[1, 7] < 1e-2 * shape[0, 7]  # no id that any class gives mass is at zero


@pytest.mark.parametrize("smoothing", [0.0, 0.1])
@pytest.mark.parametrize("dtype", [F64, torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_products_of_the_tail(dtype: torch.dtype, smoothing: float) -> None:
    """What a GPU makes of the factored tail, against the whole one."""
    g = torch.Generator().manual_seed(0)
    n, v, d, k = 200, 2 * tail.GROUP + 77, 24, tail.CLASSES

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=g, dtype=F64)

    shape = tail.shapes(torch.exp(4 * normal(k, v)))  # from 1e-9 to 1e-1
    accumulate = F64 if dtype == F64 else torch.float32
    spread = tail.Spread(
        (normal(n, 3) * 1e-4).to(accumulate),
        torch.randint(k, (n,), generator=g),
        shape.to(accumulate),
        (normal(n) * smoothing * 1e-6).to(accumulate) if smoothing else None,
    )
    e, c = (normal(n, d) + 1).to(dtype), (normal(v, d) + 1).to(dtype)
    ids = torch.randperm(v, generator=g)[:50].sort().values
    values = normal(n, 50) * (torch.rand(n, 50, generator=g) < 0.2)
    whole = tail.dense(spread).double()
    whole[:, ids] += values.to(dtype).double() * 1e-4
    limit = {F64: 1e-12, torch.float32: 1e-5}.get(dtype, 6e-3)
    lift = 2.0**20 if dtype == torch.float16 else 1.0  # what a loss scale does
    spread = spread._replace(
        mass=spread.mass * lift, uniform=None if not smoothing else spread.uniform * lift
    )
    units = make_units(spread, 1e-4 * lift, dtype)
    values = values.to(dtype).to(accumulate) * (1e-4 * lift) / units[0]
    factors = make_factors(spread, values, ids, units, dtype)
    untilted = row_gradient(factors, c, of_ids(factors, c))
    tilted = torch.randint(v, (40,), generator=g)
    tilt = normal(n, 40).to(accumulate) * (1e-5 * lift)
    columns = torch.cat([(tilt / units[2]).to(dtype), factors.rows], 1)
    factors = factors._replace(rows=columns, tilted=tilted)
    by_row = row_gradient(factors, c, of_ids(factors, c))
    wide = spread_columns(factors, column_product(factors, e))
    rows = whole @ c.double() + tilt.double() / lift @ c[tilted].double()
    assert error(by_row / lift, rows) < limit
    assert error(untilted / lift, whole @ c.double()) < limit
    truth = whole.T @ e.double()
    assert error(wide / lift, truth) < limit
    # Each id's own error: Adam asks for nothing else. Those that float16 has numbers for.
    there = truth.norm(dim=1) * lift > (1e-3 if dtype == torch.float16 else 0)
    assert there.sum() > v / 4
    off = (wide.to(dtype).double() / lift - truth)[there].norm(dim=1) / truth[there].norm(dim=1)
    assert off.quantile(0.9) < 2 * limit
    without = tail.dense(spread).double().sum(0)
    assert error(tail.column_sum(spread), without) < 1e-5


@pytest.mark.parametrize("n", [0, 1, 40, 100, 101, 700, 5000])
def test_drawn_rows_stand_for_all(n: int) -> None:
    g = torch.Generator().manual_seed(n)
    size, share = 100, torch.rand(n, generator=g).square().clamp(min=tail.LEAST_SHARE)
    valid = torch.rand(n, generator=g) < 0.9
    rows, weight = tail.draw_rows(share, valid, size)
    used = weight > 0
    drawn = rows[used]
    assert len(rows) == len(weight) == size
    assert valid[drawn].all()
    assert (drawn.diff() > 0).all(), "ascending, none twice"
    count = int(valid.sum())
    if count <= size:
        assert not used[count:].any()
        assert torch.equal(drawn, valid.nonzero()[:, 0])
        assert (weight[used] == 1).all()
        return
    # Each draw stands for an equal part of what all drop.
    draws = (weight * share[rows]).round()
    assert draws.sum() == size
    expected = share[drawn] * size / share[valid].sum()
    assert ((draws[used] - expected).abs() < 1).all()


def test_rows_that_drop_much_are_drawn_more_than_once() -> None:
    share = torch.full((1000,), tail.LEAST_SHARE)
    share[[3, 700]] = 1.0
    rows, weight = tail.draw_rows(share, torch.ones(1000, dtype=torch.bool), 100)
    total = (998 * tail.LEAST_SHARE + 2) / 100
    for row in (3, 700):
        slots = weight[rows == row]
        assert len(slots) > 1
        assert slots[0] == pytest.approx(1 / total, abs=1)
        assert (slots[1:] == 0).all()


def test_written_logits() -> None:
    bound = torch.tensor([3.0, -20.0], dtype=F64)
    z = bound[:, None] + torch.linspace(-40, 12, 2000, dtype=F64) * math.log(2)
    z[:, 0] = -torch.inf
    written = tail.levels(z, bound)
    assert (written == written.round()).all()
    assert written.min() == 0
    assert written.max() == 255
    back = tail.level_logits(written, bound)
    inside = (written > 0) & (written < 255)
    assert inside.sum() > 1000
    assert (back - z)[inside].abs().max() <= math.log(2) / 16 + 1e-9
    assert (back[written == 0] == -torch.inf).all()


def test_sampled_ids_follow_the_tail() -> None:
    vocab, count = 3 * tail.GROUP + 100, 1000
    sums = torch.rand(tail.CLASSES, vocab, dtype=F64)
    sums[:, tail.GROUP : 2 * tail.GROUP] = 0
    sums[:, 7] = sums.sum() / tail.CLASSES / 3  # a quarter of all
    ids, first = tail.tilt_ids(sums, count)
    assert (ids.diff() >= 0).all()
    assert (ids == 7).sum() == pytest.approx(count / 4, abs=2)
    share = [(part.sum() / sums.sum()).item() for part in sums.split(tail.GROUP, 1)]
    assert first.diff().tolist() == pytest.approx([count * s for s in share], abs=1.01)
    for group, (start, end) in enumerate(zip(first[:-1], first[1:], strict=True)):
        assert (ids[start:end] // tail.GROUP == group).all()
    nothing = tail.tilt_ids(torch.zeros_like(sums), count)
    assert (nothing.ids == 0).all()
    assert nothing.first.tolist() == [0, count, count, count, count]


def test_the_tilt_leaves_every_mass_alone() -> None:
    n, vocab, count = 50, 3 * tail.GROUP, 200
    g = torch.Generator().manual_seed(0)
    known = tail.tilt_ids(torch.rand(tail.CLASSES, vocab, generator=g, dtype=F64), count)
    mass = torch.rand(n, 3, generator=g, dtype=F64) / 30
    mass[::5] = 0
    mass[:, 1] *= torch.rand(n, generator=g) > 0.5
    classes = torch.randint(tail.CLASSES, (n,), generator=g)
    share = torch.rand(n, generator=g, dtype=F64).clamp(min=tail.LEAST_SHARE)
    sample = tail.draw_rows(share, torch.ones(n, dtype=torch.bool), 30)
    z = 3 * torch.randn(n, count, generator=g, dtype=F64)
    tilt = tail.tilt(z, known, tail.Rows(classes, mass, sample))
    assert (tilt[mass.sum(1) == 0] == 0).all()
    for group, (start, end) in enumerate(zip(known.first[:-1], known.first[1:], strict=True)):
        part = tilt[:, start:end]
        assert (part.sum(1).abs() <= 1e-12).all()
        assert (part[mass[:, group] == 0] == 0).all()
        # Ids of larger logits get more, those of the same logits as in the class nothing.
        some = mass[:, group] > 0
        assert ((part * z[:, start:end]).sum(1)[some] > 0).float().mean() > 0.95
    level = torch.full_like(z, 2.0)
    assert (tail.tilt(level, known, tail.Rows(classes, mass, sample)).abs() <= 1e-15).all()


def test_masked_ids_tilt_nothing() -> None:
    """Where nothing is dropped the id 0 stands for all, and a bias of -inf may mask it."""
    n, count = 20, 40
    known = tail.tilt_ids(torch.zeros(tail.CLASSES, 2 * tail.GROUP, dtype=F64), count)
    mass = torch.full((n, 2), 1e-9, dtype=F64)  # left by rounding
    sample = tail.draw_rows(torch.ones(n, dtype=F64), torch.ones(n, dtype=torch.bool), 10)
    rows = tail.Rows(torch.zeros(n, dtype=torch.long), mass, sample)
    masked = torch.full((n, count), -torch.inf, dtype=F64)
    assert (tail.tilt(masked, known, rows) == 0).all()


def test_which_calls_are_refused() -> None:
    c, plain = torch.empty(20000, 64), LossOptions()
    assert refusal(c, 100, plain, EPS) == ""
    assert "always exact" in refusal(c[:16384], 100, plain, EPS)
    assert "below 2^-24" in refusal(c, 100, plain, 0.0)
    assert "no rows" in refusal(c, 0, plain, EPS)
    assert "16 bytes" in refusal(c[:, :60].contiguous(), 100, plain, EPS)
    assert "16 bytes" in refusal(torch.empty(64, 20000).T, 100, plain, EPS)
    assert "too long" in refusal(torch.empty(2**24, 64, device="meta"), 100, plain, EPS)


def test_replaced_upstream_keeps_its_sign() -> None:
    """Negative weights, as in policy gradients: the tail follows."""
    problem = made_head(300, 20000, 128)
    weights = torch.where(torch.arange(300) % 2 == 0, 1.0, -1.0) / 300
    problem = replace(problem, dnll=weights)
    found = problem.sparse()
    assert not found.exact_rows.any()
    assert problem.errors(found)["e"] <= 8e-3
    assert problem.errors(found)["c"] <= 2e-2
