"""Time and memory of every method and kind on one configuration."""

from __future__ import annotations

import gc
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
from tqdm import tqdm

from bench.cpu_memory import cpu_memory
from bench.methods import METHODS, OWN
from bench.problems import Config, Problem, make_problem
from bench.results import Results, error_text, path_taken
from bench.timing import (
    MB,
    Call,
    Effort,
    Timer,
    clocks,
    cuda_memory,
    make_call,
    matmul_call,
    summarise,
)

MATMUL = "matmul"
Row = dict[str, Any]


# Rounds keep the ratios honest while the machine's speed drifts.
_EFFORT = {"cuda": Effort(2, 6, 0.35), "cpu": Effort(3, 2, 0.0)}
_QUICK = {"cuda": Effort(1, 3, 0.2), "cpu": Effort(1, 2, 0.0)}
# From this many products on, a few calls are enough, and take long enough.
_LARGE = {"cuda": 10**13, "cpu": 10**12}


class Work(NamedTuple):
    """What to measure on each configuration."""

    methods: Sequence[str]
    kinds: Sequence[str]
    memory: bool = True
    quick: bool = False

    def effort(self, config: Config, device: str) -> Effort:
        """How often."""
        large = config.n * config.v * config.d > _LARGE[device]
        return (_QUICK if self.quick or large else _EFFORT)[device]


def measure(config: Config, work: Work, timer: Timer) -> list[Row]:
    """Rows of a configuration: the matmul's, then one for each method and kind. An error, such as
    too little memory, ends up in its row and does not stop the others."""
    torch.compiler.reset()  # every configuration is compiled for its own shape
    problem = make_problem(config, timer.device)
    effort = work.effort(config, timer.device.type)
    run = _Run(config, problem, timer, effort)
    entries: list[tuple[str, str, Call]] = [(MATMUL, MATMUL, matmul_call(problem.e, problem.c))]
    for method in work.methods:
        for kind in work.kinds:
            entries.append((method, kind, make_call(kind, METHODS[method], problem)))
    steps = len(entries) * (effort.rounds + work.memory)
    with tqdm(total=steps, desc=config.describe(), leave=False, disable=None) as bar:
        for _ in range(effort.rounds):
            for method, kind, call in entries:
                bar.set_postfix_str(f"{method} {kind}")
                run.time(method, kind, call)
                bar.update()
        if work.memory:
            run.memory(entries, work.kinds, bar)
    return run.rows(entries)


class _Run:
    """Collects the numbers of one configuration."""

    def __init__(self, config: Config, problem: Problem, timer: Timer, effort: Effort) -> None:
        self.config, self.problem, self.timer, self.effort = config, problem, timer, effort
        self.times: dict[tuple[str, str], list[float]] = {}
        self.facts: dict[tuple[str, str], Row] = {}
        self.errors: dict[tuple[str, str], str] = {}

    def attempt(self, method: str, kind: str, work: Callable[[], Any]) -> Any:
        """What ``work`` returns; None, and a note, where it fails."""
        if (method, kind) in self.errors:
            return None
        try:
            return work()
        except Exception as error:  # a peer may raise anything
            self.errors[method, kind] = error_text(error)
        # Only here have the error and the tensors that its frames held gone.
        gc.collect()
        if self.timer.device.type == "cuda":
            torch.cuda.empty_cache()
        return None

    def time(self, method: str, kind: str, call: Call) -> None:
        first = (method, kind) not in self.times
        times = self.attempt(method, kind, lambda: self.timer(call, self.effort))
        self.times.setdefault((method, kind), []).extend(times or [])
        if first and method in OWN and method != "eager" and times:
            self.facts.setdefault((method, kind), {})["path"] = path_taken()

    def memory(self, entries: list[tuple[str, str, Call]], kinds: Sequence[str], bar: tqdm) -> None:
        cuda = self.timer.device.type == "cuda"
        processes: dict[str, dict[str, float]] = {}
        for method, kind, call in entries:
            bar.set_postfix_str(f"{method} {kind} memory")
            bar.update()
            if method == MATMUL:
                continue
            if cuda:
                peak = self.attempt(method, kind, lambda call=call: cuda_memory(call))
            else:
                if method not in processes:
                    good = tuple(k for k in kinds if (method, k) not in self.errors)
                    work = lambda m=method, k=good: cpu_memory(m, self.config, k)  # noqa: E731
                    processes[method] = self.attempt(method, kind, work) or {}
                peak = processes[method].get(kind)
            if peak is None:
                continue
            allocated, reserved = (peak.allocated, peak.reserved) if cuda else (peak, None)
            gradients = (
                self.problem.gradient_bytes() / MB if kind in ("loss-bw", "loss-fw-bw") else 0.0
            )
            self.facts.setdefault((method, kind), {}).update(
                op_mem_mb=allocated, extra_mb=allocated - gradients, reserved_mb=reserved
            )

    def rows(self, entries: list[tuple[str, str, Call]]) -> list[Row]:
        unit = self.times.get((MATMUL, MATMUL))
        matmul = summarise(unit).median if unit else None
        rows = []
        for method, kind, _ in entries:
            times = self.times.get((method, kind))
            row = {"method": method, "kind": kind, **self.config._asdict()}
            if times:
                found = summarise(times)
                row |= {
                    "runtime_ms": found.median,
                    "spread": found.spread,
                    "x_matmul": found.median / matmul if matmul else None,
                    "calls": len(times),
                }
            row |= self.facts.get((method, kind), {})
            if (method, kind) in self.errors:
                row["error"] = self.errors[method, kind]
            rows.append(row)
        return rows


_FORM = "{:<24} {:<14} {:>11} {:>10} {:<13} {:>9} {:>7} {:>9} {:>12}"
HEADER = _FORM.format(
    "method", "kind", "runtime_ms", "op_mem_mb", "test_data", "x_matmul", "spread", "extra_mb",
    "reserved_mb",
)  # fmt: skip


def line(row: Row) -> str:
    """A row of the printed table."""

    def number(key: str, form: str) -> str:
        return "-" if row.get(key) is None else format(row[key], form)

    text = _FORM.format(
        row["method"],
        row["kind"],
        number("runtime_ms", ".2f"),
        number("op_mem_mb", ".1f"),
        row["test_data"],
        number("x_matmul", ".3f"),
        number("spread", ".1%"),
        number("extra_mb", ".1f"),
        number("reserved_mb", ".1f"),
    )
    return f"{text}  {row['error']}" if "error" in row else text


def show(config: Config, rows: list[Row]) -> None:
    """Prints the table of a configuration."""
    print(f"\n{config.describe()}\n{HEADER}")
    for row in rows:
        print(line(row))
    print(end="", flush=True)


def run(
    results: Results,
    section: str,
    configs: Iterable[Config],
    work: Work,
    timer: Timer,
    path: Path | None,
) -> None:
    """Measures and prints the configurations, saving after each."""
    for config in configs:
        try:
            rows = measure(config, work, timer)
        except torch.OutOfMemoryError as error:  # not even the inputs fit
            rows = [
                {"method": "inputs", "kind": "-", **config._asdict(), "error": error_text(error)}
            ]
        rows[0]["clocks"] = clocks(timer.device)
        show(config, rows)
        results.add(section, rows)
        results.save(path)
        if timer.device.type == "cuda":
            torch.cuda.empty_cache()
