"""The sparse gradient of a vocabulary in shards, on gloo ranks: the reference of the algorithm with
real collectives, and the sharded loss with that reference for its kernels."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor
from torch.multiprocessing.reductions import StorageWeakRef

from cce_ext import VocabParallelOptions
from cce_ext.distributed.vocab_parallel import ShardKernels, sharded_loss
from cce_ext.options import Filter, LossOptions
from cce_ext.reference import logits
from cce_ext.sparse import tail
from cce_ext.sparse.forward import Bounds, Found, Lists, Selected
from cce_ext.sparse.reference import Shard, SparseGradients, sparse_gradients
from cce_ext.sparse.shard import _by_groups
from tests.ranks import run_ranks
from tests.sparse_problem import EPS, NAMES, Problem, by_group, error, make

N, V = 128, 9001
SHARDED = ("c", "bias", "lora_b")
CASES: dict[str, dict[str, Any]] = {
    "plain": {},
    "bias": {"bias": True, "ignored": 0.4, "lse": True},
    "softcap": {"softcap": 30.0, "bias": True},
    "smoothing, low rank": {"label_smoothing": 0.1, "rank": 8, "logit_scale": 1.1},
}


def edges(world: int, uneven: bool) -> list[int]:
    """Where the shards begin and end. Ids are in the order of their frequency: the last shards
    have none that is kept often. The uneven split, of 4 ranks, has an empty shard."""
    if uneven:
        return [0, 600, 600, 8500, V]
    return [V * rank // world for rank in range(world + 1)]


def shard_of(problem: Problem, mine: slice) -> Problem:
    """What a rank with these ids holds."""
    parts = {name: getattr(problem, name) for name in SHARDED}
    return replace(problem, **{k: None if t is None else t[mine] for k, t in parts.items()})


def gathered_lse(x: Tensor) -> Tensor:
    """logsumexp over the ranks' x (N,)."""
    ranks = [torch.empty_like(x) for _ in range(dist.get_world_size())]
    dist.all_gather(ranks, x)
    return torch.logsumexp(torch.stack(ranks), 0)


def added(x: Tensor) -> Tensor:
    """Sum of the ranks' x."""
    x = x.clone()
    dist.all_reduce(x)
    return x


def of_shard(
    problem: Problem, start: int, capacity: int | None = None
) -> tuple[SparseGradients | None, Tensor]:
    """The reference on this rank's shard, None for an empty one, and the lse of all."""
    p = problem
    if p.c.shape[0] == 0:
        nothing = torch.full((N,), -torch.inf, dtype=p.e.dtype)
        lse = gathered_lse(nothing)
        gathered_lse(nothing)
        added(torch.zeros((), dtype=p.e.dtype))
        return None, lse
    z = logits(p.e, p.c, p.bias, p.u, p.lora_b, p.options)
    lse = gathered_lse(torch.logsumexp(z, -1))
    found = sparse_gradients(
        p.dnll, p.dlse, p.e, p.c, p.targets, p.bias, p.u, p.lora_b, p.options, EPS, capacity,
        Shard(start, V, lse, gathered_lse, added),
    )  # fmt: skip
    return found, lse


def check_errors(problem: Problem, whole: SparseGradients, got: dict[str, Tensor]) -> None:
    """got: whole gradients by e and u, this rank's rows of the others, by their names. No further
    from the exact ones than what one process makes, whose classes of rows, and ids that tilt the
    tail, are fewer."""
    limits = problem.errors(whole)
    for name, gradient in got.items():
        parts = [None] * dist.get_world_size()
        dist.all_gather_object(parts, gradient)
        found = torch.cat(parts) if name in SHARDED else gradient
        off = error(found, problem.exact[name])
        assert off <= 1.3 * limits[name] + 1e-6, f"{name}: {off:.1e}, {limits[name]:.1e} in one"


def algorithm(rank: int, world: int, uneven: bool) -> None:
    for name, case in CASES.items():
        problem, _ = make(n=N, v=V, **case)
        whole = problem.sparse()
        bounds = edges(world, uneven)
        mine = slice(bounds[rank], bounds[rank + 1])
        own = shard_of(problem, mine)
        found, lse = of_shard(own, mine.start)
        z = logits(problem.e, problem.c, problem.bias, problem.u, problem.lora_b, problem.options)
        torch.testing.assert_close(lse, torch.logsumexp(z, -1))
        got = {key: torch.zeros_like(t) for key, t in own.inputs().items()}
        if found is not None:
            assert not found.exact_rows.any()
            off = by_group(found.dproducts) - by_group(problem.exact["products"][:, mine])
            assert (off.abs() <= 1e-5 * problem.a.abs()[:, None]).all(), name
            assert (found.dproducts[problem.targets == -100] == 0).all()
            torch.testing.assert_close(found.dropped_share, whole.dropped_share)
            got = {key: getattr(found, NAMES[key]) for key in got}
        for key in ("e", "u"):
            if key in got:
                got[key] = added(got[key])
        counts = torch.zeros(N) if found is None else found.kept.float()
        assert torch.equal(added(counts), whole.kept.float())
        # By the bound of all shards, a shard without frequent ids has few candidates.
        seen = added(torch.zeros(N) if found is None else found.candidates.float())
        assert seen.mean() <= 1.5 * whole.candidates.float().mean()
        check_errors(problem, whole, got)


@pytest.mark.parametrize(("world", "uneven"), [(2, False), (4, True)])
def test_shards_keep_what_the_whole_keeps(world: int, uneven: bool, tmp_path: Path) -> None:
    run_ranks(algorithm, world, tmp_path, uneven)


def decisions(rank: int, world: int) -> None:
    bounds = edges(world, False)
    mine = slice(bounds[rank], bounds[rank + 1])
    # Flat: no shard drops a tenth of the mass, all together do.
    problem, _ = make(n=N, v=V)
    problem.e = problem.e * 0.55
    own = shard_of(problem, mine)
    alone, _ = of_shard(own, mine.start)
    assert alone.dropped_share > tail.FLAT
    parts = [None] * world
    p = torch.softmax(problem.e @ problem.c.T, -1)[:, mine]
    dropped = torch.where(p < EPS, p, 0).sum(1).mean()
    dist.all_gather_object(parts, float(dropped))
    assert min(parts) < tail.FLAT < sum(parts)
    assert alone.exact_rows.all()
    assert error(alone.dc, problem.exact["c"][mine]) <= 1e-6
    assert error(added(alone.de), problem.exact["e"]) <= 1e-6
    # A row that is not a number makes the call exact everywhere.
    problem, _ = make(n=N, v=V)
    problem.dnll[5] = torch.nan
    found, _ = of_shard(shard_of(problem, mine), mine.start)
    assert found.exact_rows.all()
    # Lists that overflow on one rank make rows exact on that rank alone.
    problem, _ = make(n=N, v=V, bias=True)
    found, _ = of_shard(shard_of(problem, mine), mine.start, 100 if rank == 0 else None)
    assert bool(found.exact_rows.any()) == (rank == 0)
    off = by_group(found.dproducts) - by_group(problem.exact["products"][:, mine])
    assert (off.abs() <= 1e-5 * problem.a.abs()[:, None]).all()


def test_what_the_ranks_decide(tmp_path: Path) -> None:
    run_ranks(decisions, 2, tmp_path)


@pytest.mark.parametrize("v", [300, tail.GROUP, 9001, 3 * tail.GROUP - 1])
@pytest.mark.parametrize("parts", [1, 3, 18])
def test_splits_of_a_group_are_merged(v: int, parts: int) -> None:
    g = torch.Generator().manual_seed(0)
    x = 20 * torch.randn(40, v, generator=g, dtype=torch.float64)
    x[:7, : tail.GROUP] = -torch.inf
    weight = torch.rand(40, v, generator=g, dtype=torch.float64)

    def partials(size: int) -> tuple[Tensor, Tensor, Tensor]:
        largest = torch.stack([part.amax(1) for part in x.split(size, 1)])
        pieces = [
            torch.exp2(part - torch.where(top == -torch.inf, 0, top)[:, None])
            for part, top in zip(x.split(size, 1), largest, strict=True)
        ]
        capped = zip(pieces, weight.split(size, 1), strict=True)
        sums = (
            torch.stack([p.sum(1) for p in pieces]),
            torch.stack([(p * w).sum(1) for p, w in capped]),
        )
        return largest, *sums

    none = Found(*(torch.empty(0) for _ in Found._fields))
    largest, total, capped = partials(tail.GROUP // parts)
    found = none._replace(max_sum=torch.stack([largest, total], -1), capped=capped)
    merged = _by_groups(found, v)
    expected = partials(tail.GROUP)
    for got, truth in zip((*merged.max_sum.unbind(-1), merged.capped), expected, strict=True):
        torch.testing.assert_close(got, truth)


class Kernels:
    """The reference in place of the CUDA kernels. A call's inputs wait here for its later parts."""

    def __init__(self) -> None:
        self.library = torch.library.Library("cce", "IMPL")
        for name in ("bound", "collect", "select", "share", "backward"):
            self.library.impl(f"sparse_ce_{name}", getattr(self, name), "CPU")
        self.library.impl("sort_kept", self.sort, "CPU")
        self.library.impl("level_sums", self.sums, "CPU")
        self.calls: list[str] = []

    def reference(
        self,
        dnll: Tensor | None,
        dlse: Tensor | None,
        lse: Tensor,
        bound: Callable,
        add_up: Callable,
    ) -> SparseGradients:
        e, c, targets, bias, u, lora_b, *options, start, total = self.call
        where = Shard(start, total, lse, bound, add_up)
        return sparse_gradients(
            dnll, dlse, e, c, targets, bias, u, lora_b, LossOptions(*options), EPS, shard=where
        )

    def bound(self, *call: Any) -> tuple[Tensor, ...]:
        *call, eps = call
        assert eps == EPS
        self.call = call
        e, c, _, bias, u, lora_b, *options, _, _ = call
        known = []
        lse = torch.logsumexp(logits(e, c, bias, u, lora_b, LossOptions(*options)), -1)
        self.reference(None, None, lse, lambda x: known.append(x) or x, lambda x: x)
        (own,) = known
        order, classes = torch.zeros(e.shape[0], dtype=torch.int32), torch.zeros(e.shape[0]).long()
        ones = torch.ones_like(own)
        return Bounds(order, order[:1].clone(), ones * 0, own / math.log(2), ones, classes)

    def collect(self, *call: Any) -> tuple[Tensor, ...]:
        known = len(Bounds._fields)
        (*inputs, eps), bounds = call[:-known], Bounds(*call[-known:])
        assert eps == EPS
        nll, lse, own, *others = torch.ops.cce.linear_ce_forward(*inputs, False)
        bounds.target_logit.copy_(own)
        self.whole_bound = bounds.bound2 * math.log(2)
        found = Found(*(torch.zeros(1) for _ in Found._fields))
        self.pool = StorageWeakRef(found.pool.untyped_storage())
        return (nll, lse, *others, *found)

    def select(self, *call: Any) -> tuple[Tensor, ...]:
        self.lse = call[len(Bounds._fields) + 2]
        return tuple(torch.zeros(1) for _ in Selected._fields)

    def sort(self, *call: Any) -> tuple[Tensor, ...]:
        assert self.pool.expired(), "the pool takes memory while the lists are sorted"
        known = ("row_first", "hot_ids", "slots", "row_order", "tally")
        known += ("sample", "sample_weight", "classes", "tail_sums")
        return tuple(torch.zeros(1) for name in Lists._fields if name not in known)

    def sums(self, *call: Any) -> tuple[Tensor, ...]:
        return torch.zeros(1), torch.zeros(1)

    def share(self, dnll, dlse, targets, lists, ignore_index) -> Tensor:
        known = []
        add_up = lambda x: known.append(x) or x  # noqa: E731
        self.reference(dnll, dlse, self.lse, lambda _: self.whole_bound, add_up)
        return known[0][None].clone()

    def backward(self, dnll, dlse, e, c, targets, lse, bias, u, lora_b, lists, share, *rest):
        assert torch.equal(lse, self.lse)
        valid = targets != -100
        assert (self.whole_bound[valid] <= lse[valid]).all()
        self.calls.append("backward")
        found = self.reference(dnll, dlse, lse, lambda _: self.whole_bound, lambda _: share[0])
        self.found = found
        results = (found.de, found.dc, found.dbias, found.du, found.dlora_b)
        return tuple(torch.empty(0) if t is None else t for t in results)


def through_the_loss(rank: int, world: int) -> None:
    kernels = Kernels()
    pair = (torch.ops.cce.linear_ce_forward, torch.ops.cce.linear_ce_backward)
    bounds = edges(world, False)
    mine = slice(bounds[rank], bounds[rank + 1])
    parallel = VocabParallelOptions(mine.start, mine.stop)
    for one_exact in (False, True):
        for name, case in (*CASES.items(), ("flat", {"logit_scale": 0.55})):
            problem, _ = make(n=N, v=V, dtype=torch.float32, **case)
            problem.dnll = torch.where(problem.targets == -100, 0, problem.dnll)
            own = shard_of(problem, mine)
            leaves = {k: t.clone().requires_grad_() for k, t in own.inputs().items()}
            sparse = not (one_exact and rank == 1)
            filters = Filter(EPS, True, True) if sparse else None
            nll, lse = sharded_loss(
                ShardKernels(pair, filters, True), parallel, V, problem.options, leaves["e"],
                leaves["c"], problem.targets, leaves.get("bias"), leaves.get("u"),
                leaves.get("lora_b"),
            )  # fmt: skip
            total = (nll * problem.dnll).sum()
            if problem.dlse is not None:
                total = total + (lse * torch.where(problem.targets == -100, 0, problem.dlse)).sum()
            got = dict(zip(leaves, torch.autograd.grad(total, list(leaves.values())), strict=True))
            for key in ("e", "u"):
                if key in got:
                    got[key] = added(got[key])
            whole = problem.sparse()
            assert whole.exact_rows.any() == (name == "flat")
            if sparse:  # by its own bound, rank 1 would have thousands
                seen = kernels.found.candidates.float().mean()
                assert seen <= 1.5 * whole.candidates.float().mean()
            if sparse and name == "flat" and not one_exact:
                assert kernels.found.exact_rows.all()
            elif sparse and name != "flat":
                assert not kernels.found.exact_rows.any()
            if name != "flat" or not one_exact:
                check_errors(problem, whole, got)
    assert len(kernels.calls) == (len(CASES) + 1) * (2 - rank)


def test_through_the_loss(tmp_path: Path) -> None:
    run_ranks(through_the_loss, 2, tmp_path)
