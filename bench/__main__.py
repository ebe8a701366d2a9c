"""Time and memory of the loss, by this package and by every other that is installed, beside the
matmul alone: ``python -m bench [--shapes gemma2 llama3] [--json FILE]``.

Without arguments: all five models' output layers on a GPU, a small one on a CPU.
"""

from __future__ import annotations

import argparse
import itertools
from pathlib import Path

import torch

from bench.methods import METHODS, installed
from bench.problems import DATA, DTYPES, MODELS, SHAPES, Config, named
from bench.results import Results, headline
from bench.speed import Work, run
from bench.timing import KIND_HELP, KINDS, Timer, clocks

COLUMNS = """
columns:
  runtime_ms   median; x_matmul: over the median of torch.mm(E, C.T) in the same run
  op_mem_mb    peak memory beyond inputs, gradients included (loss-bw: beyond what its forward left);
               extra_mb: without the gradients; reserved_mb: what the GPU's allocator took for it
  spread       10th to 90th percentile over the median
"""


def parse(arguments: list[str] | None = None) -> argparse.Namespace:
    """The command line, with the defaults of the device filled in."""
    parser = argparse.ArgumentParser(
        prog="python -m bench",
        description=__doc__,
        epilog=f"kinds:{KIND_HELP}{COLUMNS}",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--shapes", nargs="+", choices=list(SHAPES), metavar="SHAPE",
                        help=f"of {', '.join(SHAPES)}")  # fmt: skip
    parser.add_argument("--n", type=int, nargs="+", help="tokens (8192 on a GPU, 2048 on a CPU)")
    parser.add_argument("--dtype", nargs="+", choices=list(DTYPES))
    parser.add_argument("--data", nargs="+", choices=DATA, default=["random"],
                        help="llm: as a trained language model's (bench/llm_data.py)")  # fmt: skip
    parser.add_argument("--softcap", type=float, nargs="+", default=[0.0], help="0: none")
    parser.add_argument("--lora", type=int, nargs="+", default=[0], metavar="R",
                        help="ranks of a low-rank head whose classifier is frozen; 0: none")  # fmt: skip
    parser.add_argument("--methods", nargs="+", choices=list(METHODS), metavar="METHOD",
                        help=f"of {', '.join(METHODS)}; all that are installed")  # fmt: skip
    parser.add_argument("--kinds", nargs="+", choices=KINDS, default=list(KINDS))
    parser.add_argument("--no-memory", action="store_true", help="times alone")
    parser.add_argument("--quick", action="store_true", help="one small shape, few calls")
    parser.add_argument("--json", type=Path, help="also write the rows to this file")
    args = parser.parse_args(arguments)
    cpu = torch.device(args.device).type == "cpu"
    if args.shapes is None:
        quick = ["quick"] if cpu else ["gemma2"]
        args.shapes = quick if args.quick else ["small"] if cpu else list(MODELS)
    if args.n is None:
        args.n = [(128 if cpu else 1024) if args.quick else (2048 if cpu else 8192)]
    if args.dtype is None:
        args.dtype = ["float32"] if cpu else ["bfloat16"]
    if args.methods is None:
        args.methods = installed()
    return args


def configurations(args: argparse.Namespace) -> list[Config]:
    """Every combination of what was asked for."""
    return [
        named(shape, n, dtype, data=data, softcap=softcap, rank=rank)
        for shape, n, dtype, data, softcap, rank in itertools.product(
            args.shapes, args.n, args.dtype, args.data, args.softcap, args.lora
        )
    ]


def main() -> None:
    """Measure and print."""
    args = parse()
    device = torch.device(args.device)
    results = Results.start(device, "bench")
    print(headline(results))
    for name, value in clocks(device).items():
        print(f"  {name}: {value}")
    absent = [name for name in METHODS if name not in installed()]
    if absent:
        print(f"not installed here: {', '.join(absent)}")
    work = Work(args.methods, args.kinds, not args.no_memory, args.quick)
    run(results, "speed", configurations(args), work, Timer(device), args.json)


if __name__ == "__main__":
    main()
