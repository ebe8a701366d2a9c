"""However the kernels' blocks are put on a real GPU, alone, in twos or in fours, beside each other or one
after the other, they do the same work."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from bench.llm_data import llm_like
from cce_ext import linear_cross_entropy

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")

BF16 = torch.bfloat16


def losses(e: Tensor, c: Tensor, t: Tensor, **options) -> tuple[Tensor, Tensor]:
    return linear_cross_entropy(e, c, t, reduction="none", return_lse=True, **options)


# Row blocks: 1; 2; 3; 4; 5; 32 and 33 (one of 34 may lack rows); 125 (three of 128 may); 130.
@pytest.mark.parametrize("n", [100, 256, 300, 512, 600, 4096, 4150, 16000, 16640])
@pytest.mark.parametrize("v", [700, 20000, 60001])
def test_all_arrangements(n: int, v: int) -> None:
    """v: few units of work, some that only a part of the blocks has, many."""
    g = torch.Generator("cuda").manual_seed(n + v)
    e = torch.randn(n, 192, device="cuda", dtype=BF16, generator=g)
    c = torch.randn(v, 192, device="cuda", dtype=BF16, generator=g) / 8
    t = torch.randint(v, (n,), device="cuda", generator=g)
    t[::9] = -100
    expected = torch.cat([torch.logsumexp(part.float() @ c.float().T, 1) for part in e.split(1024)])
    expected[::9] = 0
    with torch.no_grad():
        nll, lse = losses(e, c, t)
    torch.testing.assert_close(lse, expected, rtol=0, atol=2e-5)
    leaves = e.detach().requires_grad_(), c.detach().requires_grad_()
    for options in ({}, {"filter_eps": None}):  # training, with candidates and without
        trained = losses(*leaves, t, **options)
        torch.testing.assert_close(trained[1], expected, rtol=0, atol=2e-5)
        torch.testing.assert_close(trained[0], nll, rtol=0, atol=2e-5)


def test_calls_that_share_the_chip() -> None:
    """Blocks of one call wait for others that another call keeps from starting, and do not wait in
    vain for ever."""
    problems = [llm_like(2048, 40000, 256, BF16, "cuda", seed) for seed in range(3)]
    alone = [losses(*p) for p in problems]
    streams = [torch.cuda.Stream() for _ in problems]
    together: list[tuple[Tensor, Tensor]] = []
    torch.cuda.synchronize()
    for _ in range(20):
        together = []
        for stream, p in zip(streams, problems, strict=True):
            with torch.cuda.stream(stream):
                together.append(losses(*p))
    torch.cuda.synchronize()
    for got, expected in zip(together, alone, strict=True):
        for x, y in zip(got, expected, strict=True):
            assert torch.equal(x, y)
