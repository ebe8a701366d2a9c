"""Everything that the documents show, in one run: ``python -m bench.full --out FOLDER``.

Writes FOLDER/results.json after every table, so that an interrupted run keeps what it has, and the
figures at the end. About ten minutes on an H200. Parts, the most wanted first: speed, variants
(softcap, float16, LoRA heads, few and many tokens), random (data), accuracy, scaling.
"""

from __future__ import annotations

import argparse
import time
import traceback
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path

import torch

from bench.accuracy import accuracy_methods, head_cases, synthetic_cases
from bench.accuracy import run as run_accuracy
from bench.methods import METHODS, installed
from bench.plots import draw
from bench.problems import DTYPES, MODELS, Config, named
from bench.results import Results, headline
from bench.scaling import KINDS as SCALING_KINDS
from bench.scaling import run_scaling
from bench.speed import Work, run
from bench.timing import KINDS, Timer
from bench.trained_head import load_head, make_head

PARTS = ("speed", "variants", "random", "accuracy", "scaling")
OWN = ("cce", "cce_exact")
EXPONENTS = (10, 11, 12, 13, 14, 15, 16)


class Full:
    """One run: its device, its file, and the time it has."""

    def __init__(self, args: argparse.Namespace) -> None:
        self.device = torch.device(args.device)
        self.timer = Timer(self.device)
        self.quick, self.head, self.train_seconds = args.quick, args.head, args.train_seconds
        self.path = args.out / "results.json"
        self.results = Results.start(self.device, "bench.full")
        self.deadline = time.monotonic() + args.seconds
        gpu = self.device.type == "cuda"
        self.dtype = "bfloat16" if gpu else "float32"
        self.models = ("quick",) if self.quick or not gpu else MODELS
        self.n = 64 if self.quick else 8192 if gpu else 2048
        self.methods = args.methods

    def in_time(self, configs: Iterable[Config]) -> Iterator[Config]:
        """The configurations that can still be started."""
        for config in configs:
            if time.monotonic() > self.deadline:
                print(f"\nout of time: {config.describe()} is left out")
            else:
                yield config

    def work(self, methods: Sequence[str], kinds: Sequence[str]) -> Work:
        """Without memory in a quick run: on a CPU it takes a process for each method."""
        return Work(methods, kinds, memory=not self.quick, quick=self.quick)

    def measure(self, configs: Iterable[Config], work: Work, section: str = "speed") -> None:
        """One table for each configuration."""
        run(self.results, section, self.in_time(configs), work, self.timer, self.path)

    def config(
        self, shape: str, n: int | None = None, dtype: str = "", **options: object
    ) -> Config:
        """LLM-like data unless said otherwise."""
        return named(shape, n or self.n, dtype or self.dtype, **{"data": "llm", **options})

    def speed(self) -> None:
        """Every model's shape."""
        configs = [self.config(shape) for shape in self.models]
        self.measure(configs, self.work(self.methods, KINDS))

    def variants(self) -> None:
        """Options, ranks and other numbers of tokens, on the first two shapes."""
        main, *others = self.models[:2]
        few = self.work(self.methods, ("loss-fw", "loss-fw-train", "loss-fw-bw"))
        alone = few._replace(methods=OWN)
        self.measure([self.config(main, softcap=30.0)], few)
        self.measure([self.config(main, rank=r) for r in (16, 64)], alone)
        self.measure(
            [self.config(main, rank=256)], few._replace(methods=(*OWN, "torch_compile", "eager"))
        )
        sizes = (self.n // 8, self.n * 4)
        self.measure([self.config(s, n) for n in sizes for s in (main, *others)], few)
        if self.device.type == "cuda":
            self.measure([self.config(main, dtype="float16")], alone)

    def random(self) -> None:
        """Random data, on which the default backward is exact."""
        configs = [self.config(shape, data="random") for shape in self.models]
        self.measure(configs, self.work(OWN, KINDS)._replace(memory=False))

    def accuracy(self) -> None:
        """Errors of the gradients; a head is trained if none is named."""
        methods = accuracy_methods(self.methods, EXPONENTS[::3] if self.quick else EXPONENTS)
        dtype = DTYPES["bfloat16"]
        cases = synthetic_cases(self.models[0], self.n, dtype, self.device)
        run_accuracy(self.results, cases, methods, self.path)
        if self.head is not None:
            head, name = load_head(self.head), f"trained head {self.head.stem}"
        else:
            small = dict(vocab=2048, limit=100_000, count=256, least=5) if self.quick else {}
            head = make_head(self.device, self.train_seconds, **small)
            name = "trained head"
        run_accuracy(self.results, head_cases(head, name, dtype, self.device), methods, self.path)

    def scaling(self) -> None:
        """Time and memory over N, V and D; compiling for every size would take longer than all the
        rest."""
        methods = [name for name in self.methods if name != "torch_compile"]
        work = self.work(methods, SCALING_KINDS)
        configs = self.in_time
        run_scaling(self.results, work, self.dtype, "llm", self.timer, self.path, configs)


def attempt(name: str, part: Callable[[], None]) -> None:
    """A part; its error is printed, and the next part is tried."""
    start = time.monotonic()
    print(f"\n== {name}", flush=True)
    try:
        part()
    except Exception:  # the rest of the run is worth more than a clean end
        traceback.print_exc()
    print(f"== {name} took {time.monotonic() - start:.0f} s", flush=True)


def main() -> None:
    """Measure, save, draw."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--out", type=Path, required=True, help="folder of the results")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--parts", nargs="+", choices=PARTS, default=list(PARTS))
    parser.add_argument("--methods", nargs="+", choices=list(METHODS), default=installed())
    parser.add_argument("--seconds", type=float, default=720,
                        help="no new table is begun after this time (720)")  # fmt: skip
    parser.add_argument("--head", type=Path, help="a trained head, as for bench.accuracy")
    parser.add_argument("--train-seconds", type=float, default=45,
                        help="to train a head where none is named (45)")  # fmt: skip
    parser.add_argument("--quick", action="store_true", help="tiny sizes, to try the command out")
    args = parser.parse_args()
    full = Full(args)
    print(headline(full.results))
    for name in args.parts:
        attempt(name, getattr(full, name))
    full.results.save(full.path)
    print(f"\n{full.path}")
    attempt("figures", lambda: print(*draw(full.results, args.out), sep="\n"))


if __name__ == "__main__":
    main()
