"""A head sharded over the vocabulary against one process that holds it whole.

``torchrun --nproc-per-node 2 -m bench.vocab_parallel [--quick] [--json FILE]``, on GPUs over NCCL
where there is one a rank, otherwise on the CPU over gloo. Data like a trained model's
(bench/llm_data.py); on GPUs the default and the exact backward, which are one on a CPU.

Times are medians of a forward and backward, of the slowest rank; on GPUs five steps in a row, as in
training, where nothing waits for the GPU between two of them:

  whole    one rank, the whole vocabulary; the others wait
  part     one rank, a vocabulary as large as a shard, on all ranks at once, nothing sent (on GPUs
           at least 16392 ids: smaller vocabularies have no sparse backward, such shards do)
  sharded  R ranks, the whole vocabulary
  strong   whole / (R x sharded): what is left of R times the speed
  weak     part / sharded: the efficiency from one rank to R at constant work a rank

Errors are relative, to float32: of the loss, and the largest of the gradients', of the whole head
and sharded. Bytes are what a rank receives when the collectives are rings; they are counted in one
step, the comparison of the ranks included.
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

from bench.llm_data import llm_like
from bench.timing import MB
from cce_ext import VocabParallelOptions, linear_cross_entropy
from cce_ext.sparse.op import SMALL_VOCAB

SHARDED = ("c", "lora_b")


class Row(NamedTuple):
    """One head by one backward, default or exact; see above."""

    head: str
    backward: str
    whole_ms: float
    part_ms: float
    sharded_ms: float
    strong: float
    weak: float
    collectives: int
    received_mb: float
    loss_error: float
    whole_error: float
    gradient_error: float


class Truth(NamedTuple):
    """Loss and gradients in float32, the same on every rank."""

    loss: Tensor
    gradients: dict[str, Tensor]


class Traffic(TorchDispatchMode):
    """Counts the collectives of a region and the bytes that a rank receives in them, by rings: an
    all-reduce receives all parts but one twice, an all-gather the others' parts once, an
    all-to-all a part from each of the others."""

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
            elif "alltoall" in func.__name__:
                self.bytes += (self.world - 1) / self.world * _bytes(args[0])
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
    e, c, targets = llm_like(n, v, d, dtype, device)
    leaves = {"e": e, "c": c}
    if rank:
        generator = torch.Generator().manual_seed(1)
        for name, rows, columns in (("lora_a", rank, d), ("lora_b", v, rank)):
            t = torch.randn(rows, columns, generator=generator) / columns**0.5
            leaves[name] = (t if name == "lora_a" else 0.1 * t).to(device, dtype)
    for t in (*leaves.values(), targets):
        dist.broadcast(t, 0)
    for name, t in leaves.items():
        t.requires_grad_(name != "c" or not rank)
    return leaves, targets


def step(leaves: dict[str, Tensor], targets: Tensor, **options: Any) -> Tensor:
    """Forward and backward; the gradients are left in the leaves."""
    for t in leaves.values():
        t.grad = None
    loss = linear_cross_entropy(targets=targets, **leaves, **options)
    loss.backward()
    return loss.detach()


def seconds(leaves: dict[str, Tensor], targets: Tensor, **options: Any) -> float:
    """Time of one step."""
    steps = 5 if targets.is_cuda else 1
    if targets.is_cuda:
        torch.cuda.synchronize()
    start = time.perf_counter()
    for _ in range(steps):
        step(leaves, targets, **options)
    if targets.is_cuda:
        torch.cuda.synchronize()
    return (time.perf_counter() - start) / steps


def slowest(value: float, device: torch.device) -> float:
    """The largest of the ranks' values."""
    t = torch.tensor(value, dtype=torch.float64, device=device)
    dist.all_reduce(t, op=dist.ReduceOp.MAX)
    return float(t)


def fresh(leaves: dict[str, Tensor], dtype: torch.dtype | None = None) -> dict[str, Tensor]:
    """The same tensors, or copies in another dtype, as leaves of their own."""
    return {
        name: t.detach().to(dtype or t.dtype).requires_grad_(t.requires_grad)
        for name, t in leaves.items()
    }


def find_truth(leaves: dict[str, Tensor], targets: Tensor) -> Truth:
    """Made by rank 0."""
    wide = fresh(leaves, torch.float32)
    loss = torch.zeros((), device=targets.device)
    if dist.get_rank() == 0:
        loss = step(wide, targets, filter_eps=None)
    dist.broadcast(loss, 0)
    gradients = {}
    for name, t in wide.items():
        if t.requires_grad:
            gradients[name] = torch.empty_like(t) if t.grad is None else t.grad
            dist.broadcast(gradients[name], 0)
    return Truth(loss, gradients)


def largest_error(leaves: dict[str, Tensor], truth: Truth, mine: slice) -> float:
    """Of the gradients in the leaves; mine: the ids of those that are sharded."""
    errors = []
    for name, gradient in truth.gradients.items():
        part = gradient[mine] if name in SHARDED else gradient
        off = (leaves[name].grad.float() - part).norm() / part.norm().clamp(min=1e-30)
        errors.append(float(off))
    return max(errors)


def on_all(repeats: int, bar: tqdm, *call: Any, **options: Any) -> float:
    """Median seconds of a step on all ranks at once, of the slowest."""
    times = []
    for _ in range(repeats):
        dist.barrier()
        times.append(slowest(seconds(*call, **options), call[1].device))
        bar.update()
    return median(times)


def measure(
    name: str,
    backward: str,
    head: tuple[dict[str, Tensor], Tensor],
    part: tuple[dict[str, Tensor], Tensor],
    truth: Truth,
    repeats: int,
    bar: tqdm,
) -> Row:
    """One head by one backward: whole, then a part of its size, then sharded."""
    options: dict[str, Any] = {} if backward == "default" else {"filter_eps": None}
    (leaves, targets), device, world = head, head[1].device, dist.get_world_size()
    bar.set_description(f"{name} {backward} whole")
    whole, whole_times, whole_error = fresh(leaves), [0.0], 0.0
    if dist.get_rank() == 0:
        step(whole, targets, **options)  # warm-up
        whole_error = largest_error(whole, truth, slice(None))
        whole_times = []
        for _ in range(repeats):
            whole_times.append(seconds(whole, targets, **options))
            bar.update()
    del whole
    bar.set_description(f"{name} {backward} part")
    step(*part, **options)
    part_time = on_all(repeats, bar, *part, **options)

    parallel = VocabParallelOptions.from_vocab(leaves["c"].shape[0])
    options["vocab_parallel_options"] = parallel
    mine = slice(parallel.start, parallel.stop)
    shard = fresh({k: t[mine].clone() if k in SHARDED else t for k, t in leaves.items()})
    for key, t in leaves.items():
        shard[key].requires_grad_(t.requires_grad)
    bar.set_description(f"{name} {backward} sharded")
    step(shard, targets, **options)
    with Traffic(world) as traffic:
        loss = step(shard, targets, **options)
    gradient_error = largest_error(shard, truth, mine)
    sharded = on_all(repeats, bar, shard, targets, **options)
    whole_time = slowest(median(whole_times), device)  # which only rank 0 knows
    return Row(
        name,
        backward,
        1e3 * whole_time,
        1e3 * part_time,
        1e3 * sharded,
        whole_time / (world * sharded),
        part_time / sharded,
        traffic.calls,
        slowest(traffic.bytes, device) / MB,
        slowest(float((loss - truth.loss).abs() / truth.loss.abs()), device),
        slowest(whole_error, device),
        slowest(gradient_error, device),
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
        n, v, d, rank = (256, 8192, 128, 8) if device.type == "cpu" else (1024, 65536, 512, 16)
    dtype = torch.float32 if device.type == "cpu" else torch.bfloat16
    repeats = 2 if args.quick else 5 if device.type == "cpu" else 10
    backwards = ("exact",) if device.type == "cpu" else ("default", "exact")
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
    part_size = v // dist.get_world_size()
    if device.type == "cuda":
        part_size = max(part_size, SMALL_VOCAB + 8)
    steps = 3 * repeats * len(heads) * len(backwards)
    with tqdm(total=steps, leave=False, disable=not first) as bar:
        for name, low_rank in heads.items():
            head = make_head(n, v, d, low_rank, dtype, device)
            part = make_head(n, part_size, d, low_rank, dtype, device)
            truth = find_truth(*head)
            for backward in backwards:
                rows.append(measure(name, backward, head, part, truth, repeats, bar))
    if first:
        _print(rows)
        if args.json:
            facts["rows"] = [row._asdict() for row in rows]
            args.json.write_text(json.dumps(facts, indent=2) + "\n")
    dist.destroy_process_group()


def _print(rows: list[Row]) -> None:
    form = "{:<8} {:<9} {:>9} {:>9} {:>11} {:>7} {:>6} {:>12} {:>12} {:>11} {:>12} {:>15}"
    titles = ("head", "backward", "whole ms", "part ms", "sharded ms", "strong", "weak")
    errors = ("loss error", "whole error", "sharded error")
    print(form.format(*titles, "collectives", "received MB", *errors))
    for row in rows:
        name, backward, *times, strong, weak, collectives, received = row[:9]
        print(
            form.format(
                name,
                backward,
                *(f"{ms:.1f}" for ms in times),
                f"{strong:.2f}",
                f"{weak:.2f}",
                collectives,
                f"{received:.2f}",
                *(f"{error:.1e}" for error in row[9:]),
            )
        )


if __name__ == "__main__":
    main()
