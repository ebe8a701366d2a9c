"""Every combination of options on the CPU against float64 eager PyTorch, over shapes at the edges
of the tiles."""

from __future__ import annotations

import itertools

import pytest
import torch

from cce_ext import linear_cross_entropy
from tests.oracle import Case, compare
from tests.shapes import CPU_ROWS, CPU_TILES, Shape

SLACK = {torch.float64: 1e-12, torch.float32: 1e-5, torch.bfloat16: 1e-3, torch.float16: 1e-3}


@pytest.mark.parametrize("rank", [0, 1, 8, 100, 256])
@pytest.mark.parametrize("ignored", [0.0, 0.4, 1.0])
@pytest.mark.parametrize("dtype", list(SLACK), ids=str)
def test_every_option(dtype: torch.dtype, ignored: float, rank: int) -> None:
    shapes = itertools.cycle(CPU_TILES)
    options = itertools.product(
        (False, True), (None, 5.0), (0, 1, 2), ("mean", "sum", "none"), (0.0, 0.1)
    )
    for i, (bias, softcap, shift, reduction, smoothing) in enumerate(options):
        batch, length, vocab, hidden = next(shapes)
        case = Case(
            batch, length, vocab, hidden, rank, dtype, bias, softcap, shift, reduction, ignored, smoothing,
            logit_scale=(1.0, 0.7)[i % 2],
            lse_weight=(0.0, 0.1)[i // 2 % 2],
            strided=i % 3 == 0,
            adapter_dtype=torch.float32 if i % 4 == 0 and dtype != torch.float64 else None,
            seed=i,
        )  # fmt: skip
        compare(case).check(SLACK[dtype])


@pytest.mark.parametrize("dtype", list(SLACK), ids=str)
@pytest.mark.parametrize("shape", CPU_ROWS, ids=str)
def test_row_blocks(shape: Shape, dtype: torch.dtype) -> None:
    """One token, one id, more rows than a forward block and than a backward block."""
    for ignored in (0.0, 0.3):
        compare(Case(*shape, rank=4, dtype=dtype, bias=True, ignored=ignored)).check(SLACK[dtype])


def test_extreme_logits() -> None:
    """Far below zero, beyond float16's range, and a bias that decides everything."""
    for dtype in (torch.float32, torch.bfloat16):
        compare(Case(2, 4, 300, 64, dtype=dtype, spread=300.0)).check(SLACK[dtype])
    case = Case(2, 4, 300, 64)
    leaves = case.leaves()
    for offset in (-1e4, 1e4):
        bias = torch.full((300,), offset)
        shifted = linear_cross_entropy(leaves["e"], leaves["c"], case.targets(), bias)
        plain = linear_cross_entropy(leaves["e"], leaves["c"], case.targets())
        torch.testing.assert_close(shifted, plain, rtol=2e-3, atol=2e-3)
