"""How good the sparse gradient is on a head that was really trained (bench/stored_head.py says where
it is looked for): its reference in float32, before any rounding to 16 bit."""

from __future__ import annotations

from dataclasses import replace
from typing import NamedTuple

import pytest
import torch
from torch import Tensor

from bench.stored_head import HELP, find_head
from bench.trained_head import load_head
from cce_ext.options import LossOptions
from cce_ext.sparse import tail
from cce_ext.sparse.reference import SparseGradients
from tests.sparse_problem import EPS, Problem, error

FOLDER = find_head()
pytestmark = pytest.mark.skipif(FOLDER is None, reason=HELP)


class Found(NamedTuple):
    """A problem and its sparse gradients."""

    problem: Problem
    sparse: SparseGradients


@pytest.fixture(scope="module")
def head() -> Problem:
    """Every 8th row."""
    e, c, targets = load_head(FOLDER)
    return Problem(e[::8].float(), c.float(), targets[::8])


@pytest.fixture(scope="module")
def half(head: Problem) -> Found:
    """Every 16th row, with the default threshold."""
    problem = head.rows(slice(None, None, 2))
    return Found(problem, problem.sparse())


@pytest.fixture(scope="module")
def whole(head: Problem) -> Found:
    """Every 8th row, with the default threshold."""
    return Found(head, head.sparse())


def check(problem: Problem, found: SparseGradients, de: float, dc: float) -> None:
    errors = problem.errors(found)
    assert errors["e"] <= de
    assert errors["c"] <= dc


def test_default_threshold(whole: Found) -> None:
    assert not whole.sparse.exact_rows.any()
    assert 100 < whole.sparse.kept.float().mean() < 300
    check(*whole, 7.5e-3, 3.5e-3)


def test_mean_of_the_rows_and_columns_that_are_never_kept(whole: Found) -> None:
    """What an optimizer that averages or normalises notices."""
    problem, found = whole
    off = (found.de - problem.exact["e"]).mean(0)
    assert off.norm() <= 3e-2 * problem.exact["e"].mean(0).norm()
    p = torch.softmax(problem.e @ problem.c.T, -1)
    kept = (p >= EPS).any(0)
    kept[problem.targets] = True
    assert (~kept).sum() > 1000
    got, truth = found.dc[~kept], problem.exact["c"][~kept]
    assert torch.cosine_similarity(got, truth).median() >= 0.98
    ratio = (got.norm(dim=1) / truth.norm(dim=1)).median()
    assert 0.9 <= ratio <= 1.15


def test_a_tail_pulls_along_its_own_row(whole: Found, monkeypatch: pytest.MonkeyPatch) -> None:
    """By how much the tails' pull along the hidden states is off, in all: a bias, which training
    adds up step after step."""
    problem, found = whole
    p = torch.softmax(problem.e @ problem.c.T, -1)
    p[torch.arange(len(p)), problem.targets] = 0
    tails = torch.where(p < EPS, p, 0) @ problem.c * problem.dnll[:, None]
    pull = (tails * problem.e).sum()

    def off(sparse: SparseGradients) -> float:
        return (((sparse.de - problem.exact["e"]) * problem.e).sum() / pull).item()

    assert abs(off(found)) <= 0.25
    monkeypatch.setattr(tail, "TILT", 0.0)
    assert off(problem.sparse()) <= -0.4


@pytest.mark.parametrize("order", ["reversed", "shuffled"])
def test_other_orders_of_the_vocabulary(half: Found, order: str) -> None:
    problem = half.problem
    vocab = problem.c.shape[0]
    ids = torch.arange(vocab).flip(0)
    if order == "shuffled":
        ids = torch.randperm(vocab, generator=torch.Generator().manual_seed(0))
    other = replace(problem, c=problem.c[ids], targets=ids.argsort()[problem.targets])
    found = other.sparse()
    assert not found.exact_rows.any()
    if order == "reversed":
        assert error(found.dc, problem.exact["c"][ids]) <= 5e-3
    assert error(found.de, problem.exact["e"]) <= 2e-2


def test_few_places_for_candidates(half: Found) -> None:
    """Some row blocks overflow, then all."""
    problem = half.problem
    blocks = half.sparse.candidates.float().unflatten(0, (-1, 128)).mean(1)
    some = problem.sparse(capacity=int(blocks.median()))
    assert 0 < some.exact_rows.sum() < some.exact_rows.numel()
    check(problem, some, 7.5e-3, 3.5e-3)
    few = problem.rows(slice(128)).sparse(capacity=64)
    assert few.exact_rows.all()


@pytest.mark.parametrize("n", [16, 512])
def test_improbable_targets(half: Found, n: int) -> None:
    some = half.problem.rows(slice(n))
    targets = (some.e @ some.c.T).argmin(1)
    problem = replace(some, targets=targets)
    assert problem.errors(problem.sparse())["e"] <= 4e-3


def test_ignored_rows(half: Found) -> None:
    g = torch.Generator().manual_seed(0)
    n = half.problem.e.shape[0]
    ignored = torch.rand(n, generator=g) < 0.9
    dnll = torch.where(ignored, torch.nan, 1 / n)
    targets = torch.where(ignored, -100, half.problem.targets)
    problem = replace(half.problem, targets=targets, dnll=dnll)
    found = problem.sparse()
    check(problem, found, 7e-3, 4e-3)
    assert (found.de[ignored] == 0).all()


def test_a_row_follows_its_own_upstream_alone(half: Found) -> None:
    """What stands for its tail is chosen before any upstream gradient is known."""
    every = half.problem.rows(slice(300))
    dnll = torch.zeros(300)
    dnll[7] = every.dnll[7]
    alone, all_rows = replace(every, dnll=dnll).sparse(), every.sparse()
    assert not alone.exact_rows.any()
    torch.testing.assert_close(alone.de[7], all_rows.de[7], rtol=1e-4, atol=1e-9)
    assert (alone.de[:7] == 0).all()


@pytest.mark.parametrize("n", [1, 16, 64, 128, 129, 300])
def test_rows(half: Found, n: int) -> None:
    problem = half.problem.rows(slice(n))
    check(problem, problem.sparse(), 8e-3, 5e-3)


def test_flatter_and_sharper_logits(half: Found) -> None:
    """What is dropped decides: flat calls are exact, sharp ones better than the head as it is."""
    errors = {}
    for scale in (0.3, 1.0, 1.5):
        problem = replace(half.problem.rows(slice(256)), options=LossOptions(logit_scale=scale))
        found = problem.sparse()
        assert found.exact_rows.all() if scale < 1 else not found.exact_rows.any()
        errors[scale] = problem.errors(found)
    assert errors[0.3]["e"] <= 1e-5
    assert errors[1.5]["e"] < errors[1.0]["e"]


def test_extreme_biases(half: Found) -> None:
    g = torch.Generator().manual_seed(0)
    problem = half.problem.rows(slice(256))
    vocab = problem.c.shape[0]
    bias = torch.zeros(vocab)
    bias[torch.rand(vocab, generator=g) < 0.5] = -1e4
    bias[torch.randint(vocab, (50,), generator=g)] += 20.0
    bias[-8192:] = -torch.inf
    targets = torch.where(problem.targets < vocab - 8192, problem.targets, -100)
    problem = replace(problem, bias=bias, targets=targets)
    found = problem.sparse()
    assert all(torch.isfinite(x).all() for x in found[:3])
    assert problem.errors(found)["e"] <= 1e-2


def trained_update(
    e: Tensor, products: Tensor, targets: Tensor, rank: int
) -> tuple[Tensor, Tensor]:
    """A (R, D) and B (V, R) of a low-rank update, B trained by Adam from zero."""
    g = torch.Generator().manual_seed(0)
    a = torch.randn(rank, e.shape[1], generator=g) * e.shape[1] ** -0.5
    b = torch.zeros(products.shape[1], rank)
    u = e @ a.T
    optimizer = torch.optim.Adam([b], lr=3e-3)
    for _ in range(10):
        p = torch.softmax(products + u @ b.T, -1)
        p[torch.arange(len(targets)), targets] -= 1
        b.grad = p.T @ u / len(targets)
        optimizer.step()
    return a, b


def test_low_rank_head(half: Found) -> None:
    some = half.problem.rows(slice(None, None, 2))
    products = some.e @ some.c.T
    a, b = trained_update(some.e, products, some.targets, 16)
    # du + de through the base, as a frozen base has it: dA is what is left of u's gradient.
    problem = replace(some, u=some.e @ a.T, lora_b=b)
    found = problem.sparse()
    assert not found.exact_rows.any()
    errors = problem.errors(found)
    assert errors["u"] <= 1.5e-2
    assert errors["lora_b"] <= 5e-3
    assert error(found.du.T @ some.e, problem.exact["u"].T @ some.e) <= 1.5e-2
