"""Times and memory of single calls, on a GPU by CUDA events with a cold L2 cache, on a CPU by the
clock."""

from __future__ import annotations

import gc
import math
import statistics
import subprocess
import time
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor

from bench.methods import Loss
from bench.problems import Problem

MB = 1e6
KINDS = ("loss-fw", "loss-fw-train", "loss-bw", "loss-fw-bw")
KIND_HELP = """
  loss-fw        forward without gradients
  loss-fw-train  forward that a backward follows
  loss-bw        that backward
  loss-fw-bw     both
"""
# Calls of a few microseconds would otherwise be queued by the ten thousand.
_MOST_CALLS = 1000
# Calls of 50 ms took up to eight until their times no longer changed.
_LEAST_UNSETTLED = 12

Marks = tuple[torch.cuda.Event, torch.cuda.Event]


class Call(NamedTuple):
    """What is measured: ``run`` on what ``prepare`` made, which is not measured."""

    prepare: Callable[[], Any]
    run: Callable[[Any], Any]


def make_call(kind: str, loss: Loss, problem: Problem) -> Call:
    """The call of a kind. Gradients are returned, not stored: nothing has to be reset."""
    leaves = problem.leaves()

    def nothing() -> None:
        return None

    def forward(_: None) -> Tensor:
        with torch.no_grad():
            return loss(problem)

    def backward(value: Tensor) -> tuple[Tensor, ...]:
        return torch.autograd.grad(value, leaves)

    return {
        "loss-fw": Call(nothing, forward),
        "loss-fw-train": Call(nothing, lambda _: loss(problem)),
        "loss-bw": Call(lambda: loss(problem), backward),
        "loss-fw-bw": Call(nothing, lambda _: backward(loss(problem))),
    }[kind]


def matmul_call(e: Tensor, c: Tensor) -> Call:
    """``torch.mm(E, C.T)``, which stores the logits (N, V) in E's dtype: the unit of all times."""
    e, c = e.detach(), c.detach()

    def output() -> Tensor:
        return torch.empty(e.shape[0], c.shape[0], device=e.device, dtype=e.dtype)

    return Call(output, lambda out: torch.mm(e, c.T, out=out))


class Effort(NamedTuple):
    """How often a call is timed: in ``rounds`` rounds, in which the methods take turns, ``calls`` in
    a row at least, on a GPU for ``seconds``, after calls that do not count, on a GPU for as long,
    elsewhere one."""

    rounds: int
    calls: int
    seconds: float


class Timer:
    """Times calls on a device in ms.

    A GPU lowers its clocks by what it has been doing: after a rest it is up to a fifth faster than
    in sustained work, and how far it has to go down depends on what it does. So every method is
    measured in a row of its own calls, after enough of them to have settled, the matmul that is the
    unit included; not after a rest, and not in the state that another method has left behind."""

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self._flush: Tensor | None = None
        if device.type == "cuda":
            cache = torch.cuda.get_device_properties(device).L2_cache_size
            self._flush = torch.empty(max(4 * cache, 64 * 2**20), dtype=torch.int8, device=device)

    def __call__(self, call: Call, effort: Effort) -> list[float]:
        """Times of one round's calls."""
        call.run(call.prepare())
        if self._flush is None:
            return [self._cpu(call) for _ in range(effort.calls)]
        # All in one queue: waiting for one of them would be a rest. How many, an unhurried call tells.
        (each,) = self._finish([self._start(call)])
        enough = math.ceil(1e3 * effort.seconds / max(each, 1e-3))
        unsettled = min(max(enough, _LEAST_UNSETTLED), _MOST_CALLS)
        timed = min(max(enough, effort.calls), _MOST_CALLS)
        marks = [self._start(call) for _ in range(unsettled + timed)]
        return self._finish(marks)[unsettled:]

    def _cpu(self, call: Call) -> float:
        state = call.prepare()
        start = time.perf_counter()
        call.run(state)
        return 1e3 * (time.perf_counter() - start)

    def _start(self, call: Call) -> Marks:
        """Starts a call. Nothing waits for it: as in a training, launches are queued while earlier
        ones run, and what is timed is the GPU's work unless the host cannot keep up with it."""
        state = call.prepare()
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        self._flush.zero_()  # writing more than the L2 cache holds empties it
        start.record()
        call.run(state)
        end.record()
        return start, end

    def _finish(self, marks: list[Marks]) -> list[float]:
        torch.cuda.synchronize(self.device)
        return [start.elapsed_time(end) for start, end in marks]


class Times(NamedTuple):
    """Median in ms, and the distance of the 10th to the 90th percentile over the median."""

    median: float
    spread: float


def summarise(times: list[float]) -> Times:
    """Median and spread of some times."""
    median = statistics.median(times)
    if len(times) < 2:
        return Times(median, 0.0)
    deciles = statistics.quantiles(times, n=10, method="inclusive")
    return Times(median, (deciles[-1] - deciles[0]) / median)


class Memory(NamedTuple):
    """Peak in MB of 10⁶ bytes beyond what was there before the call; reserved is the allocator's
    hold on the GPU, None on a CPU."""

    allocated: float
    reserved: float | None


def cuda_memory(call: Call) -> Memory:
    """Peak GPU memory of a call."""
    state = call.prepare()
    torch.cuda.synchronize()
    gc.collect()  # what a cycle still holds would be freed in the middle of the call
    torch.cuda.empty_cache()
    allocated, reserved = torch.cuda.memory_allocated(), torch.cuda.memory_reserved()
    torch.cuda.reset_peak_memory_stats()
    result = call.run(state)
    torch.cuda.synchronize()
    peak = Memory(
        (torch.cuda.max_memory_allocated() - allocated) / MB,
        (torch.cuda.max_memory_reserved() - reserved) / MB,
    )
    del result, state
    return peak


def graph_of(
    step: Callable[[], tuple[Tensor, ...]],
) -> tuple[torch.cuda.CUDAGraph, tuple[Tensor, ...]]:
    """A CUDA graph of a step, and where its results will be."""
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        step()
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        results = step()
    return graph, results


def clocks(device: torch.device) -> dict[str, str]:
    """Clocks, power, temperature and throttling of a GPU as nvidia-smi reports them; nothing is
    set. Empty where it does not answer."""
    if device.type != "cuda":
        return {}
    fields = (
        "clocks.sm",
        "clocks.mem",
        "power.draw",
        "power.limit",
        "temperature.gpu",
        "clocks_event_reasons.active",
    )
    uuid = getattr(torch.cuda.get_device_properties(device), "uuid", None)
    command = ["nvidia-smi", f"--query-gpu={','.join(fields)}", "--format=csv,noheader"]
    if uuid is not None and torch.cuda.device_count() > 1:
        command.append(f"--id=GPU-{uuid}")
    try:
        out = subprocess.run(command, capture_output=True, text=True, check=True, timeout=20).stdout
    except (OSError, subprocess.SubprocessError):
        return {}
    return dict(zip(fields, (x.strip() for x in out.splitlines()[0].split(",")), strict=False))
