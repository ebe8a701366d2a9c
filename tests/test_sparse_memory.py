"""Memory of the sparse path: what it lets go of, and the sums of what it holds."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.multiprocessing.reductions import StorageWeakRef

from bench.llm_data import llm_like
from bench.sparse_memory import column_bytes, forward_peaks
from cce_ext.sparse import forward as sparse_forward
from cce_ext.sparse.forward import Bounds, Lists, Selected

# Sums of arrays leave out those with a few bytes a row or a vocabulary entry.
SMALL = 4 << 20


class Kernels:
    """Ops that compute nothing, and look at what is still in memory."""

    def __init__(self) -> None:
        self.library = torch.library.Library("cce", "IMPL")
        for name in ("draw_rows", "training_forward", "select_kept", "sort_kept", "level_sums"):
            self.library.impl(name, getattr(self, name), "CPU")
        self.pool: StorageWeakRef | None = None
        self.calls: list[str] = []

    def draw_rows(self, *call: Any) -> tuple[Tensor, ...]:
        return torch.zeros(1), torch.zeros(2, dtype=torch.long), torch.zeros(2)

    def training_forward(self, *call: Any) -> tuple[Tensor, ...]:
        results = [torch.zeros(1) for _ in range(11)]
        self.pool = StorageWeakRef(results[8].untyped_storage())
        return tuple(results)

    def select_kept(self, pool: Tensor, *call: Any) -> tuple[Tensor, ...]:
        assert pool.untyped_storage()._cdata == self.pool.cdata
        self.calls.append("select")
        return tuple(torch.zeros(1) for _ in Selected._fields)

    def sort_kept(self, *call: Any) -> tuple[Tensor, ...]:
        assert self.pool.expired(), "the pool takes memory while the lists are sorted"
        self.calls.append("sort")
        return tuple(torch.zeros(1) for _ in range(6))

    def level_sums(self, *call: Any) -> tuple[Tensor, ...]:
        assert self.pool.expired()
        self.calls.append("sums")
        return torch.zeros(1), torch.zeros(2)


@pytest.fixture
def kernels() -> Iterator[Kernels]:
    made = Kernels()
    yield made
    made.library._destroy()


def test_candidates_are_gone_before_the_sort(
    kernels: Kernels, monkeypatch: pytest.MonkeyPatch
) -> None:
    bounds = Bounds(*(torch.zeros(1) for _ in Bounds._fields))
    monkeypatch.setattr(sparse_forward, "bound_rows", lambda call, eps: bounds)
    e, c, targets = torch.zeros(2, 8), torch.zeros(20, 8), torch.zeros(2, dtype=torch.long)
    call = sparse_forward.prepare(e, c, targets, None, None, None, -100, 0.0, 1.0, 0.0, 0, 0)
    assert call.vocab_total == 20
    results = sparse_forward.forward(call, False, 2.0**-13)
    assert len(results) == 7 + len(Lists._fields)
    assert kernels.calls == ["select", "sort", "sums"]


@pytest.mark.parametrize("eps", [2.0**-13, 2.0**-15])
@pytest.mark.parametrize("n", [128, 1024, 8192, 65536])
def test_no_sort_is_higher_than_the_selection(n: int, eps: float) -> None:
    """What a sort in place would save does not matter, nor does what the backward's takes."""
    peaks = forward_peaks(n, 128256, 4096, 0, eps)
    assert peaks["sort"] < peaks["selection"]
    assert peaks["result"] + column_bytes(n, 128256, eps) < peaks["selection"]


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
@pytest.mark.parametrize("rank", [0, 64])
def test_peak(rank: int) -> None:
    n, v, d, eps = 4096, 65536, 512, 2.0**-13
    e, c, targets = llm_like(n, v, d, torch.bfloat16, "cuda", 0)
    u = lora_b = None
    if rank:
        u = torch.randn(n, rank, device="cuda").to(e.dtype)
        lora_b = torch.randn(v, rank, device="cuda") * 0.01
    call = (e, c, targets, None, u, lora_b, -100, 0.0, 1.0, 0.0, 0, 0, False, eps, True, True)
    torch.ops.cce.sparse_ce_forward(*call)  # libraries' own workspaces stay
    torch.cuda.synchronize()
    before = torch.cuda.memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    torch.ops.cce.sparse_ce_forward(*call)
    peak = torch.cuda.max_memory_allocated() - before
    expected = max(forward_peaks(n, v, d, rank, eps).values())
    assert 0.8 * expected < peak < expected + SMALL
