"""Forward and backward of an output layer on a CPU.

``python -m bench.cpu [--quick] [--json FILE]``. Times are medians; the methods take turns, so the
ratios of one run hold on a machine that is not quiet. Memory is the peak of one step beyond inputs
and gradients, each method in a process of its own.
"""

from __future__ import annotations

import argparse
import json
import platform
from pathlib import Path
from statistics import median
from typing import NamedTuple

import torch
from tqdm import tqdm

from bench.step import cpu_peak_mb, make_inputs, methods, timed_step

DTYPES = (torch.float32, torch.bfloat16)


class Row(NamedTuple):
    """One method at one dtype. ``ratio`` is its time over the eager one's."""

    method: str
    dtype: str
    milliseconds: float
    ratio: float
    extra_mb: float


def measure(n: int, v: int, d: int, dtype: torch.dtype, repeats: int, bar: tqdm) -> list[Row]:
    """All methods at one dtype: one warm-up, then ``repeats`` rounds."""
    losses = methods()
    name = str(dtype).removeprefix("torch.")
    peak: dict[str, float] = {}
    for method in losses:
        bar.set_description(f"{name} {method} memory")
        peak[method] = cpu_peak_mb(method, n, v, d, dtype)
        bar.update()
    inputs = make_inputs(n, v, d, dtype)
    seconds: dict[str, list[float]] = {method: [] for method in losses}
    for repeat in range(repeats + 1):
        for method, loss in losses.items():
            bar.set_description(f"{name} {method} time")
            taken = timed_step(loss, *inputs)
            if repeat > 0:
                seconds[method].append(taken)
            bar.update()
    times = {method: 1e3 * median(values) for method, values in seconds.items()}
    return [
        Row(method, name, times[method], times[method] / times["eager"], peak[method])
        for method in losses
    ]


def main() -> None:
    """Measure and print a table."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--quick", action="store_true", help="a small shape, median of 2")
    parser.add_argument("--json", type=Path, help="also write the numbers to this file")
    args = parser.parse_args()
    n, v, d = (256, 8192, 128) if args.quick else (2048, 32064, 1024)
    repeats = 2 if args.quick else 5

    print(
        f"PyTorch {torch.__version__}, {torch.get_num_threads()} threads, {platform.machine()}, "
        f"{torch.backends.cpu.get_cpu_capability()}; N={n} V={v} D={d}, median of {repeats}",
        flush=True,
    )
    if "torch_chunked" not in methods():
        print("this PyTorch has no LinearCrossEntropyOptions: torch_chunked is left out")
    rows: list[Row] = []
    with tqdm(total=len(DTYPES) * len(methods()) * (repeats + 2), leave=False) as bar:
        for dtype in DTYPES:
            rows += measure(n, v, d, dtype, repeats, bar)
    form = "{:<14} {:<9} {:>12} {:>9} {:>9}"
    print(form.format("method", "dtype", "fwd+bwd ms", "vs eager", "extra MB"))
    for row in rows:
        print(
            form.format(
                row.method,
                row.dtype,
                f"{row.milliseconds:.1f}",
                f"{row.ratio:.2f}",
                f"{row.extra_mb:.1f}",
            )
        )
    if args.json:
        facts = {
            "torch": torch.__version__,
            "threads": torch.get_num_threads(),
            "cpu": torch.backends.cpu.get_cpu_capability(),
            "shape": {"n": n, "v": v, "d": d},
            "repeats": repeats,
            "rows": [row._asdict() for row in rows],
        }
        args.json.write_text(json.dumps(facts, indent=2) + "\n")


if __name__ == "__main__":
    main()
