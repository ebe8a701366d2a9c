"""No N x V array is ever made: resident memory of a fresh process over a call where it would be 2
GB."""

from __future__ import annotations

import subprocess
import sys

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from cce_ext.exact_chunks import Work, plan

SCRIPT = """
import resource, torch
from cce_ext import linear_cross_entropy
torch.set_num_threads(2)
n, v, d = 4096, 128000, 64
e = torch.randn(n, d, dtype=torch.{dtype}, requires_grad=True)
c = torch.randn(v, d, dtype=torch.{dtype}, requires_grad=True)
t = torch.randint(v, (n,))
linear_cross_entropy(e[:8], c[:64], t[:8] % 64).backward()  # libraries' own start-up
before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
linear_cross_entropy(e, c, t).backward()
after = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
print("grew", (after - before) / 1024)
"""


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_no_logits_are_stored(dtype: str) -> None:
    out = subprocess.run(
        [sys.executable, "-c", SCRIPT.format(dtype=dtype)],
        capture_output=True,
        text=True,
        check=True,
        timeout=300,
    ).stdout
    grown_mb = float(out.split()[-1])
    gradients_mb = (128000 + 4096) * 64 * 4 / 2**20
    # N x V would be 2000 MB in float32, 1000 MB in bfloat16.
    assert grown_mb < gradients_mb + 150, (
        f"the call took {grown_mb:.0f} MB beside {gradients_mb:.0f} MB of gradients"
    )


def test_chunks_of_the_exact_backward_fill_waves() -> None:
    """No more than the workspace takes, and not the counts whose tiles just start another wave."""
    n, d, v, tile, most = 8192, 5120, 131072, 192, 36
    work = Work(n, d, sums=4 * n * d, dc_row=0, tile=tile, blocks=132)
    found = plan(work, v, most, v)
    tiles = found[0].last // tile
    assert most // 2 < tiles <= most
    assert all(c.last - c.first == tiles * tile for c in found[:-1])
    # A matmul of 53 x 20 tiles of 128 x 256 starts a ninth wave for four of them; so it does with 54.
    assert tiles not in (35, 36)
    assert len(plan(work, v, 1, v)) == -(-v // tile)
    # Five tiles, the next ones with full waves, take Hopper's blocks as long as six: they go two by two.
    few = plan(Work(32768, 4096, 4 * 32768 * 4096, 0, tile, 132), 128256, 8, v)
    assert few[0].last // tile == 8


@settings(max_examples=300, deadline=None)
@given(
    n=st.integers(1, 40000),
    d=st.integers(1, 1000).map(lambda x: 8 * x),
    v=st.integers(1, 300000),
    trained=st.booleans(),
    most=st.integers(1, 400),
)
@example(n=8192, d=5120, v=131072, trained=True, most=17)
def test_chunks_of_the_exact_backward_have_room(
    n: int, d: int, v: int, trained: bool, most: int
) -> None:
    """Each id once; G in the workspace, or in the rows of dC that are not filled yet; few where dC
    has room."""
    work = Work(n, d, sums=4 * n * d, dc_row=2 * d * trained, tile=192, blocks=132)
    found = plan(work, v, most, v)
    assert [c.first for c in found] == [0, *(c.last for c in found[:-1])]
    assert found[-1].last == v
    own = [c.last - c.first for c in found if not c.in_dc]
    assert max(own) == own[0] <= most * 192
    for c in found:
        assert c.first < c.last <= v
        assert c.last % 192 == 0 or c.last == v
        if c.in_dc:
            assert 2 * n * (c.last - c.first) <= (v - c.last) * 2 * d * trained
            assert c.last - c.first >= most * 192
    assert len(found) <= len(plan(work._replace(dc_row=0), v, most, v)) + 1
    assert all(c.last - c.first <= 40 * 192 for c in plan(work, v, most, 40) if c.in_dc)
    if (n, d, v, trained, most) == (8192, 5120, 131072, True, 17):
        assert len(found) <= 12  # of which dC holds most; 41 without it
