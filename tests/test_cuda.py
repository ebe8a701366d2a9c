"""The CUDA kernels on a real GPU: shapes that break things, determinism, streams, graphs,
memory."""

from __future__ import annotations

import itertools
import os
from unittest.mock import Mock

import pytest
import torch

from bench.llm_data import llm_like
from bench.timing import graph_of
from cce_ext import cuda_backward, diagnostics, linear_cross_entropy
from cce_ext.exact_chunks import chunks
from cce_ext.sparse import history
from tests.oracle import Case, compare, differentiate, ours
from tests.shapes import GPU_HUGE, GPU_TILES

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
SLACK = 1e-4
REPEATS = int(os.environ.get("CCE_REPEATS", "200"))
DTYPES = [torch.bfloat16, torch.float16]


@pytest.mark.parametrize("rank", [0, 1, 8, 100, 256])
@pytest.mark.parametrize("ignored", [0.0, 0.4])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_every_option(dtype: torch.dtype, ignored: float, rank: int) -> None:
    shapes = itertools.cycle(GPU_TILES)
    options = itertools.product(
        (False, True), (None, 5.0), (0, 1, 2), ("mean", "sum", "none"), (0.0, 0.1)
    )
    for i, (bias, softcap, shift, reduction, smoothing) in enumerate(options):
        batch, length, vocab, hidden = next(shapes)
        case = Case(
            batch, max(length, shift + 1), vocab, hidden, rank, dtype, bias, softcap, shift, reduction, ignored,
            smoothing,
            logit_scale=(1.0, 0.7)[i % 2],
            lse_weight=(0.0, 0.1)[i // 2 % 2],
            strided=i % 3 == 0,
            adapter_dtype=torch.float32 if i % 4 == 0 else None,
            seed=i,
            device="cuda",
        )  # fmt: skip
        compare(case).check(SLACK)
        assert diagnostics()["path"] == "compiled"


@pytest.mark.parametrize("rank", [0, 24])
@pytest.mark.parametrize(
    "options",
    [{}, {"strided": True}, {"softcap": 5.0}, {"smoothing": 0.1, "bias": True}],
    ids=lambda options: "-".join(options) or "plain",
)
def test_a_small_workspace(monkeypatch: pytest.MonkeyPatch, rank: int, options: dict) -> None:
    """Chunks of the exact backward, whose G lies in rows of dC that are not filled yet, then in the
    workspace."""
    monkeypatch.setenv("CCE_BACKWARD_WORKSPACE_MB", "1")
    choice = Mock(wraps=chunks)
    monkeypatch.setattr(cuda_backward, "chunks", choice)
    for dtype, vocab, hidden in (
        (torch.bfloat16, 9000, 512),
        (torch.float16, 7001, 265),
        (torch.bfloat16, 30000, 8),
    ):
        case = Case(
            2, 300, vocab, hidden, rank, dtype, ignored=0.2,
            adapter_dtype=torch.float32, device="cuda", **options,
        )  # fmt: skip
        choice.reset_mock()
        compare(case).check(SLACK)
        assert choice.called
        for call in choice.call_args_list:
            found = chunks(*call.args)
            assert len(found) > 2
            # Of a classifier that is read as it is; one of eight columns has no room for anything.
            if hidden == 8 or (hidden == 512 and not rank and not options):
                assert any(c.in_dc for c in found) == (hidden != 8)


def test_all_ignored_and_no_rows() -> None:
    for shape in ((2, 64, 300, 40), (1, 0, 300, 40)):
        case = Case(*shape, rank=8, dtype=torch.bfloat16, bias=True, ignored=1.0, device="cuda")
        leaves = case.leaves()
        for name, x in differentiate(case, ours, leaves).items():
            assert (x == 0).all(), name


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_breaking_shapes(dtype: torch.dtype) -> None:
    """One column tile with a small softcap (padding must not count), logits far below zero, a large
    bias, wide rows."""
    compare(Case(1, 64, 129, 64, dtype=dtype, softcap=2.0, device="cuda")).check(SLACK)
    compare(
        Case(1, 64, 129, 64, dtype=dtype, bias=True, softcap=2.0, smoothing=0.1, device="cuda")
    ).check(SLACK)
    compare(Case(1, 100, 1000, 4096, rank=16, dtype=dtype, bias=True, device="cuda")).check(SLACK)
    compare(Case(2, 100, 1000, 256, dtype=dtype, spread=300.0, device="cuda")).check(SLACK)
    e, c = (torch.randn(n, 64, device="cuda", dtype=dtype) for n in (50, 300))
    t = torch.randint(300, (50,), device="cuda")
    for offset in (-1e4, 6e4):
        bias = torch.full((300,), offset, device="cuda")
        torch.testing.assert_close(
            linear_cross_entropy(e, c, t, bias), linear_cross_entropy(e, c, t), rtol=2e-3, atol=2e-2
        )


def test_logits_beyond_float16() -> None:
    """Logits of 1e5 overflow float16 but not the float32 that they are kept in, where neighbours
    are 2⁻⁷ apart."""
    e = torch.full((4, 64), 30.0, device="cuda", dtype=torch.float16)
    c = torch.full((10, 64), 52.0, device="cuda", dtype=torch.float16)
    c[3] = 53.0
    t = torch.tensor([3, 3, 0, 1], device="cuda")
    loss = linear_cross_entropy(e, c, t, reduction="none")
    expected = torch.tensor([0.0, 0.0, 1920.0, 1920.0], device="cuda")
    torch.testing.assert_close(loss, expected, rtol=0, atol=2.0**-6)


@pytest.mark.parametrize("shape", GPU_HUGE, ids=str)
def test_more_than_two_billion(shape: tuple[int, int, int]) -> None:
    """N x V, and V x D, beyond 2³¹: loss and gradients of some rows against the formula."""
    n, v, d = shape
    g = torch.Generator("cuda").manual_seed(0)
    e = torch.randn(n, d, device="cuda", dtype=torch.bfloat16, generator=g).requires_grad_()
    c = (
        torch.randn(v, d, device="cuda", dtype=torch.bfloat16, generator=g) * d**-0.5
    ).requires_grad_()
    t = torch.randint(v, (n,), device="cuda", generator=g)
    t[-1], t[-2] = v - 1, v - 1
    loss = linear_cross_entropy(e, c, t, reduction="none", filter_eps=None)
    de, dc = torch.autograd.grad(loss.sum(), (e, c))
    rows = torch.tensor([0, 1, n // 2, n - 2, n - 1], device="cuda")
    z = e[rows].float() @ c.float().T
    truth = torch.nn.functional.cross_entropy(z, t[rows], reduction="none")
    torch.testing.assert_close(loss[rows], truth, rtol=1e-4, atol=1e-4)
    p = torch.softmax(z, -1)
    p[torch.arange(5), t[rows]] -= 1
    torch.testing.assert_close(de[rows].float(), p @ c.float(), rtol=2e-2, atol=2e-2)
    assert dc[v - 1].float().norm() > 1  # two rows have it as their target
    assert torch.isfinite(dc[:: max(1, v // 1000)]).all()


def test_twice_is_bitwise_the_same() -> None:
    for case in (
        Case(
            2, 300, 9000, 256, rank=16, dtype=torch.bfloat16, bias=True, ignored=0.3, device="cuda"
        ),
        Case(1, 1000, 30000, 128, dtype=torch.float16, softcap=10.0, device="cuda"),
    ):
        leaves = case.leaves()
        first = differentiate(case, ours, leaves)
        for _ in range(3):
            again = differentiate(case, ours, leaves)
            for name, x in first.items():
                assert torch.equal(x, again[name]), f"{case}: {name} changed"


def test_repeated_launches_change_no_bit() -> None:
    """CCE_REPEATS steps (200 by default) of one sparse and one exact problem: none hangs, none
    differs."""
    for options in ({}, {"filter_eps": None, "softcap": 30.0}):
        e, c, t = llm_like(512, 17000, 128, torch.bfloat16, "cuda")
        t[::7] = -100
        e, c = e.requires_grad_(), c.requires_grad_()
        changed = torch.zeros((), dtype=torch.long, device="cuda")
        first: tuple[torch.Tensor, ...] = ()
        for _ in range(REPEATS):
            loss = linear_cross_entropy(e, c, t, **options)
            got = (loss.detach(), *torch.autograd.grad(loss, (e, c)))
            first = first or got
            for x, y in zip(got, first, strict=True):
                changed += (x != y).sum()
        assert changed == 0, f"{options}: {changed} values in {REPEATS} steps"


def test_ignored_rows_are_untouched_by_nan() -> None:
    case = Case(1, 400, 3000, 64, dtype=torch.bfloat16, device="cuda")
    leaves = case.leaves()
    t = case.targets()
    t[0, 100:300] = -100
    upstream = torch.ones(1, 400, device="cuda")
    upstream[0, 100:300] = torch.nan
    loss = linear_cross_entropy(leaves["e"], leaves["c"], t, reduction="none")
    de, dc = torch.autograd.grad(loss, (leaves["e"], leaves["c"]), upstream)
    assert (loss[0, 100:300] == 0).all()
    assert (de[0, 100:300] == 0).all()
    assert torch.isfinite(de).all()
    assert torch.isfinite(dc).all()


def test_a_target_out_of_range_is_nan_in_its_row_only() -> None:
    e, c = (torch.randn(n, 32, device="cuda", dtype=torch.bfloat16) for n in (6, 50))
    t = torch.tensor([0, 50, 3, -1, -100, 49], device="cuda")
    loss = linear_cross_entropy(e, c, t, reduction="none")
    assert torch.isnan(loss).tolist() == [False, True, False, True, False, False]
    assert loss[4] == 0


def test_other_streams_and_poisoned_outputs() -> None:
    case = Case(1, 500, 5000, 128, dtype=torch.bfloat16, device="cuda")
    leaves = case.leaves()
    expected = differentiate(case, ours, leaves)
    poison = [torch.full((1 << 24,), torch.nan, device="cuda") for _ in range(4)]
    torch.cuda.synchronize()
    del poison
    stream = torch.cuda.Stream()
    with torch.cuda.stream(stream):
        got = differentiate(case, ours, leaves)
    stream.synchronize()
    for name, x in expected.items():
        assert torch.equal(x, got[name]), name


@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two GPUs")
def test_tensors_on_another_than_the_current_device() -> None:
    """A few calls of each kind, so that flat ones look back at earlier ones."""
    e, c, t = llm_like(300, 17000, 128, torch.bfloat16, "cuda:1")
    e, c = e.requires_grad_(), c.requires_grad_()

    def steps(**options: object) -> list[tuple[torch.Tensor, ...]]:
        history.clear()
        losses = [linear_cross_entropy(e, c, t, **options) for _ in range(4)]
        return [(loss.detach(), *torch.autograd.grad(loss, (e, c))) for loss in losses]

    for options in ({}, {"logit_scale": 0.1}, {"filter_eps": None}):
        with torch.cuda.device(1):
            expected = steps(**options)
        with torch.cuda.device(0):
            got = steps(**options)
        for call, other in zip(got, expected, strict=True):
            for x, y in zip(call, other, strict=True):
                assert torch.equal(x, y), options


@pytest.mark.parametrize(("n", "v"), [(300, 5000), (512, 20000)])
def test_a_step_is_captured_in_a_graph(n: int, v: int) -> None:
    """Forward and backward, replayed on new data: nothing waits for the device, nothing depends on
    the data's counts. The larger one's kernels are two launches that overlap."""
    e = torch.randn(n, 128, device="cuda", dtype=torch.bfloat16, requires_grad=True)
    c = torch.randn(v, 128, device="cuda", dtype=torch.bfloat16, requires_grad=True)
    t = torch.randint(v, (n,), device="cuda")

    def step() -> tuple[torch.Tensor, ...]:
        loss = linear_cross_entropy(e, c, t, filter_eps=None)
        return (loss.detach(), *torch.autograd.grad(loss, (e, c)))

    graph, captured = graph_of(step)
    with torch.no_grad():
        e.normal_()
        t.random_(v)
        t[::3] = -100
    graph.replay()
    for got, expected in zip(captured, step(), strict=True):
        assert torch.equal(got, expected)


def test_memory() -> None:
    """No logits: a forward takes less than 16 MB, a step less than 0.3 GB beyond its gradients."""
    n, v, d = 8192, 128256, 2048
    e = torch.randn(n, d, device="cuda", dtype=torch.bfloat16, requires_grad=True)
    c = torch.randn(v, d, device="cuda", dtype=torch.bfloat16, requires_grad=True)
    t = torch.randint(v, (n,), device="cuda")

    def peak(run) -> float:
        torch.cuda.synchronize()
        before = torch.cuda.memory_allocated()
        torch.cuda.reset_peak_memory_stats()
        result = run()
        torch.cuda.synchronize()
        del result
        return (torch.cuda.max_memory_allocated() - before) / 1e6

    with torch.no_grad():
        assert peak(lambda: linear_cross_entropy(e, c, t)) < 16
    gradients = 2 * (e.numel() + c.numel()) / 1e6
    both = peak(lambda: torch.autograd.grad(linear_cross_entropy(e, c, t, filter_eps=None), (e, c)))
    assert both - gradients < 300
    frozen = c.detach()
    only_e = peak(
        lambda: torch.autograd.grad(linear_cross_entropy(e, frozen, t, filter_eps=None), e)
    )
    assert only_e < 300 + 2 * e.numel() / 1e6  # no (V, D) array for a frozen classifier


def test_opcheck() -> None:
    e = torch.randn(20, 16, device="cuda", dtype=torch.bfloat16, requires_grad=True)
    c = torch.randn(30, 16, device="cuda", dtype=torch.bfloat16, requires_grad=True)
    t = torch.randint(30, (20,), device="cuda")
    torch.library.opcheck(torch.ops.cce.linear_ce.default, (e, c, t))
    torch.library.opcheck(
        torch.ops.cce.linear_ce_forward.default,
        (e, c, t, None, None, None, -100, 0.0, 1.0, 0.0, 0, 0, True),
    )


def test_fp32_takes_the_blocked_path() -> None:
    compare(Case(2, 50, 700, 40, rank=4, dtype=torch.float32, bias=True, device="cuda")).check(1e-5)
    assert diagnostics()["path"] == "blocked"
    assert "float32" in diagnostics()["reason"]
