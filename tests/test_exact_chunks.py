"""Chunks of the exact backward on CUDA: which there are, and, with its kernels' work done by PyTorch on a
CPU, that their G may lie in rows of dC."""

from __future__ import annotations

from collections.abc import Iterator
from types import SimpleNamespace
from typing import Any
from unittest.mock import Mock

import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st
from torch import Tensor

from cce_ext import cuda_backward
from cce_ext.cuda_backward import exact_backward
from cce_ext.exact_chunks import Work, chunks, plan

N, V = 160, 4000


def test_chunks_fill_waves() -> None:
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
def test_chunks_have_room(n: int, d: int, v: int, trained: bool, most: int) -> None:
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


class Kernels:
    """The ops of the exact backward on a CPU, of a loss without options."""

    def __init__(self) -> None:
        self.library = torch.library.Library("cce", "IMPL")
        for name in ("column_tile", "row_order", "row_gradients", "dlogits_"):
            self.library.impl(name, getattr(self, name), "CPU")
        self.aten = torch.library.Library("aten", "IMPL")
        self.aten.impl("mm.dtype_out", self.mm, "CPU")
        self.aten.impl("addmm.dtype_out", self.addmm, "CPU")
        self.aten.impl("mm.dtype", lambda a, b, dtype: a.to(dtype) @ b.to(dtype), "CPU")

    def column_tile(self, like: Tensor) -> int:
        return 192

    def row_order(self, targets: Tensor, ignore_index: int) -> tuple[Tensor, Tensor]:
        order = torch.arange(len(targets), dtype=torch.int32)
        return order, torch.tensor([len(targets)], dtype=torch.int32)

    def row_gradients(
        self, dnll: Tensor, dlse: None, lse: Tensor, targets: Tensor, *_: Any
    ) -> Tensor:
        self.rows = (dnll, lse, targets)
        return torch.empty(len(targets), 8, dtype=torch.int32)

    def dlogits_(self, out: Tensor, e: Tensor, c: Tensor, bias: Tensor | None, *rest: Any) -> None:
        u, lora_b, _, _, _, first, *_ = rest
        z = e.float() @ c.float().T + (0 if bias is None else bias)
        if u is not None:
            z += u.float() @ lora_b.float().T
        dnll, lse, targets = self.rows
        p = torch.exp(z - lse[:, None])
        p -= (targets[:, None] == torch.arange(first, first + len(c))).float()
        out.copy_(dnll[:, None] * p)

    def mm(self, a: Tensor, b: Tensor, dtype: torch.dtype, *, out: Tensor) -> Tensor:
        return out.copy_(a.to(dtype) @ b.to(dtype))

    def addmm(self, x: Tensor, a: Tensor, b: Tensor, dtype: torch.dtype, **rest: Any) -> Tensor:
        return rest["out"].copy_(x + a.to(dtype) @ b.to(dtype))


@pytest.fixture
def kernels(monkeypatch: pytest.MonkeyPatch) -> Iterator[Kernels]:
    chip = SimpleNamespace(multi_processor_count=132)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda _: chip)
    monkeypatch.setenv("CCE_BACKWARD_WORKSPACE_MB", "0.25")
    found = Kernels()
    yield found
    found.library._destroy()
    found.aten._destroy()


@pytest.mark.parametrize("trained", [False, True])
@pytest.mark.parametrize("rank", [0, 16])
@pytest.mark.parametrize(("d", "strided"), [(512, False), (512, True), (265, False), (8, False)])
def test_gradients_of_many_chunks(
    monkeypatch: pytest.MonkeyPatch,
    kernels: Kernels,
    d: int,
    strided: bool,
    rank: int,
    trained: bool,
) -> None:
    """As by autograd on stored logits. A classifier of 265 columns, or one stored the other way round, is
    copied chunk by chunk; one of 8 has no room for anything."""
    choice = Mock(wraps=chunks)
    monkeypatch.setattr(cuda_backward, "chunks", choice)
    g = torch.Generator().manual_seed(0)

    def make(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=g).bfloat16()

    e = make(N, d) / d**0.5
    c = make(d, V).T if strided else make(V, d)
    u, lora_b = (make(N, rank), make(V, rank).float()) if rank else (None, None)
    bias, targets, dnll = (
        torch.randn(V, generator=g),
        torch.randint(V, (N,), generator=g),
        torch.ones(N),
    )
    leaves = [
        None if x is None else x.clone().float().requires_grad_() for x in (e, c, bias, u, lora_b)
    ]
    e32, c32, bias32, u32, b32 = leaves
    z = e32 @ c32.T + bias32 + (u32 @ b32.bfloat16().float().T if rank else 0)
    loss = torch.nn.functional.cross_entropy(z, targets, reduction="sum")
    loss.backward()
    lse = torch.logsumexp(z.detach(), 1)
    needs = (True, trained, True, rank > 0, rank > 0)
    got = exact_backward(
        dnll, None, e, c, targets, lse, bias, u, lora_b, -100, 0.0, 1.0, 0.0, 0, 0, *needs
    )  # fmt: skip
    for leaf, mine, need in zip(leaves, got, needs, strict=True):
        if need:
            assert ((mine.float() - leaf.grad).norm() / leaf.grad.norm()) < 4e-3
        else:
            assert mine.numel() == 0
    (call,) = choice.call_args_list
    found = chunks(*call.args)
    assert len(found) > 2
    if trained and d == 512 and not strided and not rank:
        assert sum(x.last - x.first for x in found if x.in_dc) > V / 2
    if not trained or d == 8:
        assert not any(x.in_dc for x in found)
