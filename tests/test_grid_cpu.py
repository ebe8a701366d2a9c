"""Every combination of options on the CPU against float64 eager PyTorch, over shapes at the edges
of the tiles."""

from __future__ import annotations

import itertools

import pytest
import torch

from cce_ext import linear_cross_entropy
from tests.oracle import Case, compare

SLACK = {torch.float64: 1e-12, torch.float32: 1e-5, torch.bfloat16: 1e-3, torch.float16: 1e-3}
# (batch, length, vocab, hidden): tile edges of the vocabulary (1024 and 2048 columns), one token,
# odd hidden sizes.
SHAPES = [
    (1, 3, 7, 3),
    (3, 5, 129, 17),
    (2, 7, 1023, 8),
    (2, 4, 1025, 33),
    (1, 5, 2047, 12),
    (2, 3, 2049, 5),
]


@pytest.mark.parametrize("rank", [0, 1, 8, 100, 256])
@pytest.mark.parametrize("ignored", [0.0, 0.4, 1.0])
@pytest.mark.parametrize("dtype", list(SLACK), ids=str)
def test_every_option(dtype: torch.dtype, ignored: float, rank: int) -> None:
    shapes = itertools.cycle(SHAPES)
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
@pytest.mark.parametrize(
    "shape", [(1, 1, 129, 8), (1, 1, 1, 4), (1, 257, 300, 16), (3, 700, 1100, 24)], ids=str
)
def test_row_blocks(shape: tuple[int, int, int, int], dtype: torch.dtype) -> None:
    """One token, one id, more rows than a forward block (256) and than a backward block (2048)."""
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
