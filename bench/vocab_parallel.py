"""A head sharded over the vocabulary against one process that holds it whole.

``torchrun --nproc-per-node 2 -m bench.vocab_parallel [--quick] [--json FILE]``, on GPUs over NCCL
where there is one a rank, otherwise on the CPU over gloo. Parity is of the loss (relative) and of
all gradients (relative, the worst). Times are medians of a forward and backward, of the slowest
rank; the whole head runs on rank 0 alone. Bytes are what a rank receives when the collectives are
rings; they are counted in one step, the comparison of the ranks included.
"""

from __future__ import annotations

import argparse
import json
import os
import time
from pathlib import Path
from statistics import median
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from tqdm import tqdm

from bench.problems import random_inputs
from bench.timing import MB
from cce_ext import VocabParallelOptions, linear_cross_entropy

SHARDED = ("c", "lora_b")


class Row(NamedTuple):
    """One head. ``ratio`` is the sharded time over the whole head's; errors are relative."""

    head: str
    whole_ms: float
    sharded_ms: float
    ratio: float
    collectives: int
    received_mb: float
    loss_error: float
    gradient_error: float


class Traffic(TorchDispatchMode):
    """Counts the collectives of a region and the bytes that a rank receives in them, by rings: an
    all-reduce receives all parts but one twice, an all-gather the others' parts once."""

    def __init__(self, world: int) -> None:
        super().__init__()
        self.world, self.calls, self.bytes = world, 0, 0.0

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple = (), kwargs: dict | None = None
    ) -> Any:
        if func.namespace == "c10d":
            self.calls += 1
            if "allreduce" in func.__name__:
                self.bytes += 2 * (self.world - 1) / self.world * _bytes(args[0])
            elif "allgather" in func.__name__:
                self.bytes += _bytes(args[0]) - _bytes(args[1])
            else:
                raise RuntimeError(f"no rule for the bytes of {func.__name__}")
        return func(*args, **(kwargs or {}))


def _bytes(t: Any) -> int:
    """Size of a tensor, or of all in nested lists."""
    return t.numel() * t.element_size() if isinstance(t, Tensor) else sum(map(_bytes, t))


def make_head(
    n: int, v: int, d: int, rank: int, dtype: torch.dtype, device: torch.device
) -> tuple[dict[str, Tensor], Tensor]:
    """Tensors of a whole head, the same on every rank, and targets; with a low-rank update (rank >
    0) the classifier is frozen."""
    e, c, targets = random_inputs(n, v, d, dtype, device)
    leaves = {"e": e, "c": c}
    if rank:
        generator = torch.Generator().manual_seed(1)
        for name, rows, columns in (("lora_a", rank, d), ("lora_b", v, rank)):
            t = torch.randn(rows, columns, generator=generator) / columns**0.5
            leaves[name] = t.to(device, dtype)
    for name, t in leaves.items():
        t.requires_grad_(name != "c" or not rank)
    return leaves, targets


def step(leaves: dict[str, Tensor], targets: Tensor, parallel: Any = None) -> Tensor:
    """Forward and backward; the gradients are left in the leaves."""
    for t in leaves.values():
        t.grad = None
    loss = linear_cross_entropy(targets=targets, vocab_parallel_options=parallel, **leaves)
    loss.backward()
    return loss.detach()


def seconds(leaves: dict[str, Tensor], targets: Tensor, parallel: Any = None) -> float:
    """Time of one step."""
    if targets.is_cuda:
        torch.cuda.synchronize()
    start = time.perf_counter()
    step(leaves, targets, parallel)
    if targets.is_cuda:
        torch.cuda.synchronize()
    return time.perf_counter() - start


def slowest(value: float, device: torch.device) -> float:
    """The largest of the ranks' values."""
    t = torch.tensor(value, dtype=torch.float64, device=device)
    dist.all_reduce(t, op=dist.ReduceOp.MAX)
    return float(t)


def truth(
    leaves: dict[str, Tensor], targets: Tensor, repeats: int, bar: tqdm
) -> tuple[Tensor, dict[str, Tensor], float]:
    """Loss, gradients and seconds of the whole head, measured on rank 0 and known to all."""
    whole = {name: t.detach().requires_grad_(t.requires_grad) for name, t in leaves.items()}
    times, loss = [0.0], torch.zeros((), device=targets.device)
    if dist.get_rank() == 0:
        loss = step(whole, targets)
        times = []
        for _ in range(repeats):
            times.append(seconds(whole, targets))
            bar.update()
    dist.broadcast(loss, 0)
    gradients = {}
    for name, t in whole.items():
        if t.requires_grad:
            gradients[name] = torch.empty_like(t) if t.grad is None else t.grad
            dist.broadcast(gradients[name], 0)
    return loss, gradients, median(times)


def measure(name: str, leaves: dict[str, Tensor], targets: Tensor, repeats: int, bar: tqdm) -> Row:
    """One head: whole, then sharded."""
    device = targets.device
    bar.set_description(f"{name} whole")
    expected_loss, expected, whole = truth(leaves, targets, repeats, bar)
    parallel = VocabParallelOptions.from_vocab(leaves["c"].shape[0])
    mine = slice(parallel.start, parallel.stop)
    shard = {
        key: (t.detach()[mine].clone() if key in SHARDED else t.detach()).requires_grad_(
            t.requires_grad
        )
        for key, t in leaves.items()
    }
    bar.set_description(f"{name} sharded")
    step(shard, targets, parallel)  # warm-up
    with Traffic(dist.get_world_size()) as traffic:
        loss = step(shard, targets, parallel)
    errors = []
    for key, gradient in expected.items():
        part = gradient[mine] if key in SHARDED else gradient
        error = (shard[key].grad - part).float().norm() / part.float().norm().clamp(min=1e-30)
        errors.append(float(error))
    times = []
    for _ in range(repeats):
        dist.barrier()
        times.append(slowest(seconds(shard, targets, parallel), device))
        bar.update()
    sharded = median(times)
    return Row(
        name,
        1e3 * whole,
        1e3 * sharded,
        sharded / whole if whole else 0.0,  # only rank 0 knows the whole head's time
        traffic.calls,
        slowest(traffic.bytes, device) / MB,
        slowest(float((loss - expected_loss).abs() / expected_loss.abs()), device),
        slowest(max(errors), device),
    )


def start() -> torch.device:
    """Joins the ranks; returns this rank's device."""
    if "LOCAL_RANK" not in os.environ:
        raise SystemExit("start it as: torchrun --nproc-per-node 2 -m bench.vocab_parallel")
    local, ranks = int(os.environ["LOCAL_RANK"]), int(os.environ["LOCAL_WORLD_SIZE"])
    if torch.cuda.is_available() and torch.cuda.device_count() >= ranks:
        device = torch.device("cuda", local)
        torch.cuda.set_device(device)
        dist.init_process_group("cpu:gloo,cuda:nccl")
        return device
    dist.init_process_group("gloo")
    return torch.device("cpu")


def main() -> None:
    """Measure, and print a table on rank 0."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--quick", action="store_true", help="a small shape, median of 2")
    parser.add_argument("--json", type=Path, help="also write the numbers to this file")
    args = parser.parse_args()
    device = start()
    first = dist.get_rank() == 0
    n, v, d, rank = (2048, 32064, 1024, 64) if device.type == "cpu" else (8192, 128256, 4096, 256)
    if args.quick:
        n, v, d, rank = 256, 8192, 128, 8
    dtype = torch.float32 if device.type == "cpu" else torch.bfloat16
    repeats = 2 if args.quick else 5
    facts = {
        "torch": torch.__version__,
        "ranks": dist.get_world_size(),
        "backend": dist.get_backend_config(),
        "threads": torch.get_num_threads(),
        "device": torch.cuda.get_device_name() if device.type == "cuda" else "cpu",
        "dtype": str(dtype).removeprefix("torch."),
        "shape": {"n": n, "v": v, "d": d, "rank": rank},
        "repeats": repeats,
    }
    if first:
        print(
            f"PyTorch {facts['torch']}, {facts['ranks']} ranks over {facts['backend']}, "
            f"{facts['device']}, {facts['threads']} threads, {facts['dtype']}; N={n} V={v} D={d} "
            f"R={rank}, median of {repeats}",
            flush=True,
        )
    heads = {"trained": 0, "lora": rank}
    rows = []
    with tqdm(total=2 * repeats * len(heads), leave=False, disable=not first) as bar:
        for name, low_rank in heads.items():
            leaves, targets = make_head(n, v, d, low_rank, dtype, device)
            rows.append(measure(name, leaves, targets, repeats, bar))
    if first:
        _print(rows)
        if args.json:
            facts["rows"] = [row._asdict() for row in rows]
            args.json.write_text(json.dumps(facts, indent=2) + "\n")
    dist.destroy_process_group()


def _print(rows: list[Row]) -> None:
    form = "{:<8} {:>10} {:>11} {:>9} {:>12} {:>12} {:>11} {:>14}"
    titles = ("head", "whole ms", "sharded ms", "vs whole", "collectives", "received MB")
    print(form.format(*titles, "loss error", "gradient error"))
    for row in rows:
        print(
            form.format(
                row.head,
                f"{row.whole_ms:.1f}",
                f"{row.sharded_ms:.1f}",
                f"{row.ratio:.2f}",
                row.collectives,
                f"{row.received_mb:.2f}",
                f"{row.loss_error:.1e}",
                f"{row.gradient_error:.1e}",
            )
        )


if __name__ == "__main__":
    main()
