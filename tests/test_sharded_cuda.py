"""The sharded loss on CUDA tensors against one process and against float32: two ranks on one GPU
over gloo, and over NCCL where there are two GPUs."""

from __future__ import annotations

import functools
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard

from bench.llm_data import llm_like
from cce_ext import (
    LinearCrossEntropyHead,
    VocabParallelOptions,
    diagnostics,
    linear_cross_entropy,
)
from tests.ranks import run_ranks

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
N, V, D, R = 1000, 40000, 256, 16
SHARDED = ("c", "bias", "lora_b")
EVEN = [0, V // 2, V]
#: name -> where the shards end, options of the loss and of the problem, and whether each rank's
#: backward is sparse.
CASES: dict[str, dict[str, Any]] = {
    "default": {"sparse": (True, True)},
    "exact": {"filter_eps": None, "sparse": (False, False)},
    "low rank": {"rank": R, "sparse": (True, True)},
    "low rank, exact": {"rank": R, "filter_eps": None, "sparse": (False, False)},
    "options": {"bias": True, "softcap": 30.0, "ignored": 0.3, "sparse": (True, True)},
    "smoothing": {"label_smoothing": 0.1, "edges": [0, 9000, V], "sparse": (True, True)},
    "a small shard": {"edges": [0, V - 8000, V], "sparse": (True, False)},
    "an empty shard": {"edges": [0, 0, V], "sparse": (False, True)},
    "flat": {"logit_scale": 0.3, "sparse": (True, True)},
    "only dE": {"filter_c_grad": False, "sparse": (True, True)},
}
OF_THE_LOSS = ("filter_eps", "softcap", "label_smoothing", "logit_scale", "filter_c_grad")


@functools.cache
def head() -> tuple[Tensor, Tensor, Tensor]:
    """e, c and targets like a trained model's."""
    return llm_like(N, V, D, torch.bfloat16, "cpu")


def problem(case: dict[str, Any], device: torch.device) -> tuple[dict[str, Tensor], Tensor]:
    """Made on the CPU: the same on every rank."""
    e, c, targets = head()
    g = torch.Generator().manual_seed(1)

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=g)

    leaves = {"e": e, "c": c}
    if case.get("bias"):
        leaves["bias"] = 0.3 * normal(V)
    if case.get("rank"):
        leaves["lora_a"] = normal(R, D) / D**0.5
        leaves["lora_b"] = 0.3 * normal(V, R) / R**0.5
    targets = torch.where(torch.rand(N, generator=g) < case.get("ignored", 0.0), -100, targets)
    return {name: t.to(device) for name, t in leaves.items()}, targets.to(device)


def step(
    leaves: dict[str, Tensor], targets: Tensor, case: dict[str, Any], **how: Any
) -> tuple[Tensor, dict[str, Tensor]]:
    """Loss, and gradients by name."""
    leaves = {name: t.detach().clone().requires_grad_() for name, t in leaves.items()}
    options = {name: case[name] for name in OF_THE_LOSS if name in case} | how
    loss = linear_cross_entropy(targets=targets, **leaves, **options)
    gradients = torch.autograd.grad(loss, list(leaves.values()))
    return loss.detach(), dict(zip(leaves, gradients, strict=True))


def error(x: Tensor, truth: Tensor) -> float:
    return ((x.float() - truth).norm() / truth.norm().clamp(min=1e-30)).item()


def gathered(part: Tensor) -> Tensor:
    parts = [None] * dist.get_world_size()
    dist.all_gather_object(parts, part.cpu())
    return torch.cat(parts).to(part.device)


def parity(rank: int, world: int) -> None:
    device = torch.device("cuda", torch.cuda.current_device())
    for name, case in CASES.items():
        leaves, targets = problem(case, device)
        wide = {key: t.float() for key, t in leaves.items()}
        true_loss, truth = step(wide, targets, case, impl="reference")
        loss, single = step(leaves, targets, case)
        edges = case.get("edges", EVEN)
        mine = slice(edges[rank], edges[rank + 1])
        shard = {key: t[mine] if key in SHARDED else t for key, t in leaves.items()}
        parallel = VocabParallelOptions(mine.start, mine.stop)
        got_loss, got = step(shard, targets, case, vocab_parallel_options=parallel)
        facts = diagnostics()
        assert facts["path"] == "vocab_parallel"
        sparse = case["sparse"][rank]
        assert (facts["exact"] == "") == sparse, (name, facts)
        assert ("kept" in facts) == sparse
        if sparse:
            valid = int((targets != -100).sum())
            assert facts["exact_rows"] == (valid if name == "flat" else 0), (name, facts)
            assert facts["overflowed_blocks"] == 0
        limit = 2 * (loss - true_loss).abs() + 1e-4
        assert (got_loss - true_loss).abs() <= limit, name
        for key, gradient in got.items():
            assert gradient.dtype == leaves[key].dtype
            whole = gathered(gradient) if key in SHARDED else gradient
            off, limit = error(whole, truth[key]), 2 * error(single[key], truth[key]) + 1e-4
            assert off <= limit, (
                f"{name}: d{key} is off by {off:.1e}, one process by half of {limit:.1e}"
            )
        again_loss, again = step(shard, targets, case, vocab_parallel_options=parallel)
        assert torch.equal(again_loss, got_loss)
        for key, gradient in got.items():
            assert torch.equal(again[key], gradient), (name, key)


def others(rank: int, world: int) -> None:
    """torch.compile, autocast and a call without gradients."""
    device = torch.device("cuda", torch.cuda.current_device())
    leaves, targets = problem({}, device)
    parallel = VocabParallelOptions.from_vocab(V)
    mine = slice(parallel.start, parallel.stop)
    e, c = (t.clone().requires_grad_() for t in (leaves["e"], leaves["c"][mine]))

    def loss_of(e: Tensor, c: Tensor) -> Tensor:
        return linear_cross_entropy(e, c, targets, vocab_parallel_options=parallel)

    loss = loss_of(e, c)
    expected = torch.autograd.grad(loss, (e, c))
    assert diagnostics()["kept"] > 0
    if "nccl" in str(
        dist.get_backend_config()
    ):  # traced collectives of CUDA tensors crash over gloo
        compiled = torch.compile(loss_of, fullgraph=True, backend="aot_eager")(e, c)
        torch.testing.assert_close(compiled, loss)
        for x, y in zip(torch.autograd.grad(compiled, (e, c)), expected, strict=True):
            assert error(x, y.float()) < 1e-3
    wide = [t.detach().float().requires_grad_() for t in (e, c)]
    with torch.autocast("cuda", dtype=torch.bfloat16):
        cast = loss_of(*wide)
    assert diagnostics()["exact"] == ""
    for x, y in zip(torch.autograd.grad(cast, wide), expected, strict=True):
        assert x.dtype == torch.float32
        assert error(x, y.float()) < 5e-3
    with torch.no_grad():
        torch.testing.assert_close(loss_of(e, c), loss)
    assert "kept" not in diagnostics()


def waits(rank: int, world: int) -> None:
    """Over NCCL nothing waits for the GPU, not even the comparison of the ranks."""
    leaves, targets = problem({}, torch.device("cuda", rank))
    parallel = VocabParallelOptions.from_vocab(V)
    mine = slice(parallel.start, parallel.stop)
    e, c = (t.clone().requires_grad_() for t in (leaves["e"], leaves["c"][mine]))
    for mode in ("default", "error"):
        torch.cuda.set_sync_debug_mode(mode)
        loss = linear_cross_entropy(e, c, targets, vocab_parallel_options=parallel)
        torch.autograd.grad(loss, (e, c))
    torch.cuda.set_sync_debug_mode("default")


def fsdp(rank: int, world: int) -> None:
    """FSDP2, a trained head and a low-rank one: every rank has some of the tokens and a piece of
    every parameter."""
    device = torch.device("cuda", torch.cuda.current_device())
    mesh = init_device_mesh("cuda", (world,))
    for case in ({}, {"rank": R}):
        leaves, targets = problem(case, device)
        leaves = {name: t.bfloat16() for name, t in leaves.items()}
        wide = {name: t.float() for name, t in leaves.items()}
        true_loss, truth = step(wide, targets, case, impl="reference")
        loss, single = step(leaves, targets, case)
        head = LinearCrossEntropyHead(D, V, device=device, dtype=torch.bfloat16, **case)
        names = {"weight": "c", "lora_a": "lora_a", "lora_b": "lora_b"}
        with torch.no_grad():
            for name, parameter in head.named_parameters():
                parameter.copy_(leaves[names[name]])
        fully_shard(head, mesh=mesh)
        e = leaves["e"].chunk(world)[rank].clone().requires_grad_()
        found = head(e, targets.chunk(world)[rank], num_items=N / world)
        found.backward()
        assert diagnostics()["exact"] == "", diagnostics()
        got = found.detach().clone()
        dist.all_reduce(got)
        assert (got / world - true_loss).abs() <= 2 * (loss - true_loss).abs() + 1e-4
        gradients = {"e": gathered(e.grad) / world}
        for name, parameter in head.named_parameters():
            if parameter.requires_grad:
                gradients[names[name]] = parameter.grad.full_tensor()
        assert len(gradients) == (3 if case else 2)
        for name, gradient in gradients.items():
            limit = 2 * error(single[name], truth[name]) + 1e-4
            assert error(gradient, truth[name]) <= limit, (case, name)


@pytest.mark.parametrize("worker", [parity, others])
def test_two_ranks_on_one_gpu(worker: Any, tmp_path: Path) -> None:
    run_ranks(worker, 2, tmp_path)


@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two GPUs")
@pytest.mark.parametrize("worker", [parity, others, waits, fsdp])
def test_two_gpus(worker: Any, tmp_path: Path) -> None:
    run_ranks(worker, 2, tmp_path, backend="cpu:gloo,cuda:nccl")
