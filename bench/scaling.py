"""Time and memory over N, V and D, and how near the forward is to what the machine can do:
``python -m bench.scaling [--json FILE]``; ``python -m bench.plots FILE`` draws it.

One of the three sizes changes at a time. The roof is measured in the same run: the throughput of a
large square matmul, and the bandwidth of a large copy.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any, NamedTuple

import torch

from bench.methods import METHODS, installed
from bench.problems import DATA, DTYPES, Config
from bench.results import Results, headline
from bench.speed import Work, run
from bench.timing import Call, Effort, Timer, summarise

KINDS = ("loss-fw", "loss-fw-bw")


class Sweep(NamedTuple):
    """The sizes in the middle (the Llama 3 output layer on a GPU) and those to try of each."""

    n: int
    v: int
    d: int
    ns: tuple[int, ...]
    vs: tuple[int, ...]
    ds: tuple[int, ...]


GPU = Sweep(
    8192, 128256, 4096,
    (1024, 2048, 4096, 8192, 16384, 32768, 65536),
    (16384, 32768, 65536, 128256, 256000, 512000),
    (1024, 2048, 3072, 4096, 6144, 8192),
)  # fmt: skip
CPU = Sweep(
    1024, 16384, 512, (256, 512, 1024, 2048, 4096), (4096, 8192, 16384, 32768), (256, 512, 1024)
)
QUICK = Sweep(64, 2048, 64, (32, 64), (1024, 2048), (32, 64))


def configurations(sweep: Sweep, dtype: str, data: str) -> list[Config]:
    """One configuration for each size, named after what changes: N, V or D."""
    middle = Config("", sweep.n, sweep.v, sweep.d, dtype, data)
    return [
        *(middle._replace(test_data="N", n=n) for n in sweep.ns),
        *(middle._replace(test_data="V", v=v) for v in sweep.vs),
        *(middle._replace(test_data="D", d=d) for d in sweep.ds),
    ]


def measure_roof(timer: Timer, dtype: torch.dtype, size: int) -> list[dict[str, Any]]:
    """TFLOP/s of a matmul (size, size, size), GB/s of a copy four times its size."""
    a = torch.randn(size, size, device=timer.device, dtype=torch.float32).to(dtype)
    b, out = a.clone(), torch.empty_like(a)
    matmul = Call(lambda: None, lambda _: torch.mm(a, b.T, out=out))
    source = torch.empty(4 * a.numel(), device=timer.device, dtype=dtype).fill_(1)
    target = torch.empty_like(source)
    copy = Call(lambda: None, lambda _: target.copy_(source))
    rows = []
    for name, call, unit, work in (
        ("matmul", matmul, "tflops", 2 * size**3 / 1e12),
        ("copy", copy, "gb_per_s", 2 * source.numel() * source.element_size() / 1e9),
    ):
        found = summarise(timer(call, Effort(1, 8, 0.35)))
        rows.append(
            {"name": name, "size": size, unit: work / (found.median / 1e3), "spread": found.spread}
        )
    return rows


def run_scaling(
    results: Results,
    work: Work,
    dtype: str,
    data: str,
    timer: Timer,
    path: Path | None,
    choose: Callable[[list[Config]], Iterable[Config]] = iter,
) -> None:
    """Measures the roof, then every size that ``choose`` lets pass."""
    gpu = timer.device.type == "cuda"
    size = 256 if work.quick else 8192 if gpu else 2048
    results.add("roof", measure_roof(timer, DTYPES[dtype], size))
    sweep = QUICK if work.quick else GPU if gpu else CPU
    run(results, "scaling", choose(configurations(sweep, dtype, data)), work, timer, path)


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--dtype", choices=list(DTYPES), help="bfloat16 on a GPU, float32 on a CPU")
    parser.add_argument("--data", choices=DATA, default="llm")
    parser.add_argument("--methods", nargs="+", choices=list(METHODS), default=installed())
    parser.add_argument("--no-memory", action="store_true", help="times alone")
    parser.add_argument("--quick", action="store_true", help="tiny sizes, to try it out")
    parser.add_argument("--json", type=Path, help="also write the rows to this file")
    args = parser.parse_args()
    device = torch.device(args.device)
    args.dtype = args.dtype or ("bfloat16" if device.type == "cuda" else "float32")
    results = Results.start(device, "bench.scaling")
    print(headline(results))
    work = Work(args.methods, KINDS, not args.no_memory, args.quick)
    run_scaling(results, work, args.dtype, args.data, Timer(device), args.json)


if __name__ == "__main__":
    main()
