"""The sparse backward on a real GPU: against the reference in float64, against the truth, and its
behaviour where lists overflow, calls are flat or numbers are not finite."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from bench.llm_data import llm_like
from bench.timing import graph_of
from cce_ext import diagnostics, eager, linear_cross_entropy
from cce_ext.options import LossOptions
from cce_ext.reference import logits
from cce_ext.sparse import forward as sparse_forward
from cce_ext.sparse import history
from tests.sparse_cuda_problem import BF16, EPS, FP16, Problem, compare, error

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")


@pytest.fixture(autouse=True)
def _recorded() -> None:
    history.clear()
    linear_cross_entropy(
        torch.zeros(1, 8, device="cuda"), torch.zeros(3, 8, device="cuda"),
        torch.zeros(1, device="cuda", dtype=torch.long),
    )  # fmt: skip


@pytest.mark.parametrize("n", [1, 16, 64, 128, 129, 300, 1500])
def test_rows(n: int) -> None:
    compare(Problem(n, 20000, 256, seed=n), 6e-3 if n == 1 else 4e-3)


@pytest.mark.parametrize("v", [16385, 16640, 20479, 20481, 40000])
def test_vocabularies(v: int) -> None:
    compare(Problem(400, v, 192, seed=v))


@pytest.mark.parametrize("dtype", [BF16, FP16], ids=str)
def test_options(dtype: torch.dtype) -> None:
    for seed, options in enumerate(
        (
            {"bias": True, "ignored": 0.4},
            {"softcap": 30.0},
            {"softcap": 30.0, "bias": True, "lse": True},
            {"label_smoothing": 0.1, "ignored": 0.1},
            {"label_smoothing": 0.1, "bias": True, "lse": True},
            {"logit_scale": 0.9, "lse": True},
            {"rank": 16},
            {"rank": 100, "bias": True, "softcap": 40.0},
            {"rank": 1, "label_smoothing": 0.1, "ignored": 0.9},
        )
    ):
        compare(Problem(600, 20000, 256, dtype, seed=seed, **options))


def test_hidden_sizes_that_are_no_multiple_of_a_tile() -> None:
    for d in (8, 40, 264, 1000):
        compare(Problem(300, 17000, d, seed=d), 6e-3)


def test_rows_with_thousands_of_kept_entries() -> None:
    """More than the row sort's shared memory takes: 3000 ids share each row's mass."""
    problem = Problem(4, 20000, 64)
    g = torch.Generator("cuda").manual_seed(0)
    common = torch.full((64,), 0.125, device="cuda")
    c = torch.randn(20000, 64, device="cuda", generator=g) * 0.03
    c += torch.where(torch.arange(20000, device="cuda")[:, None] % 20 < 3, common, -common)
    e = 8 * common + torch.randn(4, 64, device="cuda", generator=g) * 0.3
    problem.leaves = {"e": e.to(BF16).requires_grad_(), "c": c.to(BF16).requires_grad_()}
    problem.targets = torch.tensor([0, 1, 19999, 7], device="cuda")
    compare(problem)
    facts = diagnostics()
    assert facts["kept"] > 4 * 2048
    assert facts["exact_rows"] == 0


def test_overflowing_lists_go_the_exact_way(monkeypatch: pytest.MonkeyPatch) -> None:
    """Too few places for candidates, or for what is kept: those row blocks are exact, the others
    sparse as before."""
    problem = Problem(1000, 20000, 256, bias=True, rank=8, softcap=30.0)
    exact = problem.reference(eps=0.0)
    sparse = problem.gradients()
    monkeypatch.setattr(sparse_forward, "candidate_capacity", lambda n, v, eps: 64 * 128)
    got = problem.gradients()
    assert diagnostics()["overflowed_blocks"] > 0
    assert diagnostics()["exact_rows"] > 0
    assert error(got["e"], exact.de) <= error(sparse["e"], exact.de) + 1e-4
    assert error(got["c"], exact.dc) <= error(sparse["c"], exact.dc) + 1e-3
    assert error(got["bias"], exact.dbias) < 5e-3
    assert error(got["lora_b"], exact.dlora_b) < 1e-2
    # What is counted stops at the pool, whenever it was noticed to be full.
    facts = diagnostics()
    assert facts["candidates"] <= facts["row_blocks"] * 64 * 128
    for name, x in problem.gradients().items():
        assert torch.equal(x, got[name]), name
    assert diagnostics() == facts
    monkeypatch.undo()
    monkeypatch.setattr(sparse_forward, "kept_capacity", lambda n, v, eps: 30000)
    got = problem.gradients()
    assert 0 < diagnostics()["exact_rows"] <= 1000
    assert error(got["e"], exact.de) <= error(sparse["e"], exact.de) + 1e-4


@pytest.mark.parametrize("kind", ["random", "zero", "softcap", "small"])
def test_flat_calls_go_the_exact_way(kind: str) -> None:
    n, v, d = 700, 30000, 128
    e = torch.randn(n, d, device="cuda", dtype=BF16)
    c = torch.randn(v, d, device="cuda", dtype=BF16) * {"random": 0.02, "zero": 0.0}.get(kind, 0.3)
    t = torch.randint(v, (n,), device="cuda")
    softcap = 2.0 if kind == "softcap" else None
    if kind == "small":
        e = e * 0.1
    e, c = e.requires_grad_(), c.requires_grad_()

    def gradients(eps: float | None) -> tuple[Tensor, ...]:
        loss = linear_cross_entropy(e, c, t, softcap=softcap, filter_eps=eps)
        return torch.autograd.grad(loss, (e, c))

    got = gradients(EPS)
    assert diagnostics()["exact_rows"] == n
    for x, y in zip(got, gradients(None), strict=True):
        assert error(x, y) < 3e-3 or kind == "zero"
        assert torch.isfinite(x).all()


def test_the_exact_rows_have_all_multiprocessors() -> None:
    """The kernel for a list of rows does what the matmuls do some four times as slowly, not forty."""
    e, c, t = llm_like(1024, 60000, 1024, BF16, "cuda", 1)
    e, c = (0.05 * e.detach()).requires_grad_(), c.detach().requires_grad_()  # flat
    times = {}
    for eps in (EPS, None):
        for _ in range(3):
            history.clear()  # or the matmuls would take the third call
            loss = linear_cross_entropy(e, c, t, filter_eps=eps)
            start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            start.record()
            torch.autograd.grad(loss, (e, c))
            end.record()
        torch.cuda.synchronize()
        times[eps] = start.elapsed_time(end)
        assert diagnostics().get("exact_rows", 1024) == 1024
    assert times[EPS] < 15 * times[None], times


@pytest.mark.parametrize("n", [300, 2500])
def test_flat_calls_of_a_low_rank_head(n: int) -> None:
    """Fewer rows than the exact kernel takes at a time, and more."""
    problem = Problem(n, 20000, 128, rank=24, logit_scale=0.1)
    got = problem.gradients()
    assert diagnostics()["exact_rows"] == n
    for name, x in problem.gradients(e_grad=False, c_grad=False).items():
        assert error(got[name], x) < 4e-3, name


@pytest.mark.parametrize("v", [20001, 20003])
def test_flat_calls_with_a_ragged_vocabulary(v: int) -> None:
    """The last columns of the exact rows' logit gradients are no multiple of 16 bytes."""
    problem = Problem(300, v, 128, bias=True, softcap=2.0)
    got = problem.gradients()
    assert diagnostics()["exact_rows"] == 300
    expected = problem.reference()
    assert error(got["e"], expected.de) < 6e-3
    assert error(got["c"], expected.dc) < 6e-3


def test_a_nan_upstream_makes_the_call_exact() -> None:
    problem = Problem(300, 20000, 128)
    problem.dnll[5] = torch.nan
    got = problem.gradients()
    assert diagnostics()["exact_rows"] == 300
    others = torch.arange(300, device="cuda") != 5
    assert torch.isnan(got["e"][5]).all()
    assert error(got["e"][others], problem.reference().de[others]) < 4e-3
    assert torch.isnan(got["c"]).all()


def test_what_may_be_sparse() -> None:
    problem = Problem(500, 20000, 256, bias=True, rank=8)
    both, rows_only = problem.gradients(), problem.gradients(c_grad=False)
    columns_only, none = (
        problem.gradients(e_grad=False),
        problem.gradients(e_grad=False, c_grad=False),
    )
    for name in ("e", "u"):
        assert torch.equal(rows_only[name], both[name])
        assert torch.equal(columns_only[name], none[name])
    for name in ("c", "bias", "lora_b"):
        assert torch.equal(columns_only[name], both[name])
        assert torch.equal(rows_only[name], none[name])
    assert not torch.equal(both["e"], none["e"])


def test_twice_is_bitwise_the_same() -> None:
    problem = Problem(1500, 40000, 256, rank=8, bias=True, ignored=0.2, softcap=30.0)
    first = problem.gradients()
    for _ in range(3):
        for name, x in problem.gradients().items():
            assert torch.equal(x, first[name]), name
    nll, _ = problem.loss()
    leaves = list(problem.leaves.values())
    again = [torch.autograd.grad(nll, leaves, problem.dnll, retain_graph=True) for _ in range(2)]
    for x, y in zip(*again, strict=True):
        assert torch.equal(x, y)


def test_the_direct_way_is_the_same_as_the_registered_ops(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    problem = Problem(300, 20000, 128)
    e, c = problem.leaves["e"], problem.leaves["c"]
    names = set()

    def step() -> tuple[Tensor, ...]:
        loss = linear_cross_entropy(e, c, problem.targets, reduction="sum")
        node = loss.grad_fn.next_functions[0][0]
        names.add(type(node).__name__)
        return (loss, *torch.autograd.grad(loss, (e, c)))

    got = step()
    monkeypatch.setattr(eager, "is_plain", lambda tensors: False)
    for x, y in zip(got, step(), strict=True):
        assert torch.equal(x, y)
    assert len(names) == 2
    monkeypatch.undo()
    (gradient,) = torch.autograd.grad(
        linear_cross_entropy(e, c, problem.targets), e, create_graph=True
    )
    with pytest.raises(RuntimeError, match="double backward is not supported"):
        gradient.float().sum().backward()


def test_nothing_waits_for_the_device() -> None:
    problem = Problem(300, 20000, 128, bias=True, rank=4)
    problem.gradients()
    torch.cuda.set_sync_debug_mode("error")
    try:
        problem.gradients()
    finally:
        torch.cuda.set_sync_debug_mode("default")


def test_a_step_is_captured_in_a_graph() -> None:
    problem = Problem(300, 20000, 128)
    e, c = problem.leaves["e"], problem.leaves["c"]
    t = problem.targets

    def step() -> tuple[Tensor, ...]:
        loss = linear_cross_entropy(e, c, t)
        return (loss.detach(), *torch.autograd.grad(loss, (e, c)))

    graph, captured = graph_of(step)
    other = Problem(300, 20000, 128, seed=1, ignored=0.3)
    for scale in (1.0, 0.05):  # sparse, then flat
        with torch.no_grad():
            e.copy_(other.leaves["e"] * scale)
            c.copy_(other.leaves["c"])
            t.copy_(other.targets)
        graph.replay()
        for got, expected in zip(captured, step(), strict=True):
            assert torch.equal(got, expected)


def test_nan_and_inf_reach_loss_and_gradients() -> None:
    for value in (torch.nan, torch.inf):
        problem = Problem(200, 20000, 64)
        with torch.no_grad():
            problem.leaves["e"][3, 5] = value
        nll, _ = problem.loss()
        got = problem.gradients()
        assert not torch.isfinite(nll[3])
        assert torch.isnan(got["e"][3]).any()
        assert torch.isnan(got["c"]).any()


@pytest.mark.parametrize(
    ("heavy", "rest", "options"),
    [
        (-700.0, -torch.inf, {}),
        (700.0, 0.0, {}),
        (700.0, 0.0, {"label_smoothing": 0.1}),
        (60.0, -60.0, {"softcap": 60.0}),  # capped they are 46 and -46
    ],
    ids=["no bound", "far above", "far above, smoothed", "far above, capped"],
)
def test_rows_whose_mass_the_bound_does_not_see(
    heavy: float, rest: float, options: dict[str, float]
) -> None:
    """All of it is in three ids that are neither targets nor sampled. The sample's logits are all
    -inf, or so far below that the exponentials beside the bound leave float's range."""
    g = torch.Generator("cuda").manual_seed(0)
    n, v, d = 200, 20001, 64
    e = torch.randn(n, d, device="cuda", generator=g).to(BF16).requires_grad_()
    c = (torch.randn(v, d, device="cuda", generator=g) * 0.02).to(BF16).requires_grad_()
    bias = torch.full((v,), rest, device="cuda")
    bias[[7001, 12347, 20000]] = heavy
    t = torch.full((n,), 5, device="cuda")
    nll, lse = linear_cross_entropy(
        e, c, t, bias=bias, reduction="none", return_lse=True, **options
    )
    got = torch.autograd.grad(nll.sum(), (e, c))
    assert diagnostics()["exact_rows"] == 0
    exact = [x.detach().double().requires_grad_() for x in (e, c)]
    loss_options = LossOptions(**options)
    z = logits(*exact, bias, None, None, loss_options)
    expected = torch.nn.functional.cross_entropy(
        z, t, reduction="none", label_smoothing=loss_options.label_smoothing
    )
    torch.testing.assert_close(nll.double(), expected, rtol=1e-5, atol=5e-3)
    torch.testing.assert_close(lse.double(), z.logsumexp(1), rtol=1e-5, atol=5e-3)
    for x, y in zip(got, torch.autograd.grad(expected.sum(), exact), strict=True):
        assert error(x, y) < 1e-2


@pytest.mark.parametrize("v", [5001, 20001])
@pytest.mark.parametrize("softcap", [None, 30.0])
def test_the_most_likely_token_of_no_numbers_is_in_the_vocabulary(
    v: int, softcap: float | None
) -> None:
    """The last tile's columns beyond the vocabulary are none of its tokens."""
    g = torch.Generator("cuda").manual_seed(0)
    e = torch.randn(40, 64, device="cuda", generator=g).to(BF16)
    e[7] = torch.nan
    c = torch.randn(v, 64, device="cuda", generator=g).to(BF16)
    t = torch.arange(40, device="cuda")
    for leaf in (e, e.clone().requires_grad_()):
        _, metrics = linear_cross_entropy(leaf, c, t, softcap=softcap, return_metrics=True)
        assert 0 <= metrics.argmax[7] < v
        expected = (e.double() @ c.double().T).argmax(1)
        assert torch.equal(metrics.argmax[:7], expected[:7])


def test_ignored_rows_are_exactly_zero() -> None:
    problem = Problem(500, 20000, 128, ignored=0.9)
    got = problem.gradients()
    assert (got["e"][problem.targets == -100] == 0).all()
    problem.targets[:] = -100
    problem.dnll[:] = 1.0
    for x in problem.gradients().values():
        assert (x == 0).all()


def test_ignored_rows_do_not_depend_on_what_memory_held() -> None:
    """Rows that count are brought together in fresh memory, whose rest may hold anything."""
    problem = Problem(300, 17000, 128, ignored=0.2)
    expected = problem.gradients()
    for value in (torch.inf, torch.nan, 1e4):
        sizes = [2**k for k in range(12, 24)]
        poison = [torch.full((size,), value, device="cuda", dtype=BF16) for size in sizes * 3]
        torch.cuda.synchronize()
        del poison
        for name, got in problem.gradients().items():
            assert torch.equal(got, expected[name]), (value, name)


def test_rows_that_do_not_count_drop_nothing() -> None:
    problem = Problem(300, 20000, 128, ignored=0.5)
    t, o = problem.leaves, problem.options
    problem.loss()  # libraries' own workspaces stay
    poison = torch.full((64 << 20,), torch.nan, device="cuda")
    del poison
    inputs = (t["e"], t["c"], problem.targets, None, None, None)
    results = torch.ops.cce.sparse_ce_forward(*inputs, *o, 0, 0, False, EPS, True, True)
    ignored = problem.targets == -100
    assert (results[2][ignored] == 0).all()  # target logits
    mass = sparse_forward.Lists(*results[7:]).mass
    assert (mass[ignored] == 0).all()
    assert (mass[~ignored].sum(1) > 0).all()


def test_no_rows() -> None:
    e = torch.zeros(0, 64, device="cuda", dtype=BF16, requires_grad=True)
    c = torch.randn(20000, 64, device="cuda", dtype=BF16, requires_grad=True)
    loss = linear_cross_entropy(e, c, torch.zeros(0, device="cuda", dtype=torch.long))
    de, dc = torch.autograd.grad(loss, (e, c))
    assert loss == 0
    assert de.shape == (0, 64)
    assert (dc == 0).all()


def test_compile_and_autocast() -> None:
    problem = Problem(300, 20000, 128)
    e, c, t = problem.leaves["e"], problem.leaves["c"], problem.targets

    def step(e: Tensor, c: Tensor) -> Tensor:
        return linear_cross_entropy(e, c, t)

    expected = torch.autograd.grad(step(e, c), (e, c))
    got = torch.autograd.grad(torch.compile(step, fullgraph=True)(e, c), (e, c))
    for x, y in zip(got, expected, strict=True):
        assert error(x, y) < 1e-3
    wide_e, wide_c = (x.detach().float().requires_grad_() for x in (e, c))
    with torch.autocast("cuda", dtype=BF16):
        loss = step(wide_e, wide_c)
    assert diagnostics()["exact"] == ""
    for x, y in zip(torch.autograd.grad(loss, (wide_e, wide_c)), expected, strict=True):
        assert x.dtype == torch.float32
        assert error(x, y) < 1e-3


def test_flat_calls_take_the_matmuls_from_the_third_on() -> None:
    problem = Problem(300, 20000, 128, logit_scale=0.1)
    listed = [problem.gradients() for _ in range(2)]  # by the list of exact rows
    assert diagnostics()["exact_rows"] == 300
    for name, x in problem.gradients().items():
        assert torch.equal(listed[0][name], listed[1][name])
        assert error(x, listed[0][name]) < 3e-3
    torch.cuda.synchronize()
    times = []
    for clear in (True, False):
        if clear:
            history.clear()
        big = Problem(4096, 60000, 512, logit_scale=0.1)
        for _ in range(1 if clear else 2):
            big.gradients()
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        big.gradients()
        end.record()
        torch.cuda.synchronize()
        times.append(start.elapsed_time(end))
    assert times[1] < times[0]
