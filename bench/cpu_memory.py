"""Peak memory of one method on a CPU: ``python -m bench.cpu_memory METHOD CONFIG KIND ...``.

The benchmarks start it as a process of its own, because a process that has already run other methods
has memory to spare. CONFIG is a `bench.problems.Config` as JSON; prints MB of 10⁶ bytes, as JSON, by
kind.
"""

from __future__ import annotations

import ctypes
import json
import resource
import subprocess
import sys
from pathlib import Path

import torch

from bench.methods import METHODS
from bench.problems import Config, make_problem
from bench.timing import MB, make_call

ROOT = Path(__file__).resolve().parent.parent


def cpu_memory(method: str, config: Config, kinds: tuple[str, ...]) -> dict[str, float]:
    """Peak resident memory beyond inputs of each kind, in MB, in a fresh process.

    Raises:
        RuntimeError: the process failed.
    """
    command = [sys.executable, "-m", "bench.cpu_memory", method, json.dumps(config), *kinds]
    result = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    if result.returncode:
        raise RuntimeError(f"the memory of {method} could not be measured:\n{result.stderr}")
    return json.loads(result.stdout.splitlines()[-1])


def _peak_resident_bytes() -> int:
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def _resident_bytes() -> int:
    pages = int(Path("/proc/self/statm").read_text().split()[1])
    return pages * resource.getpagesize()


def _return_free_memory() -> None:
    """glibc keeps what was freed; the next call must not find it."""
    trim = getattr(ctypes.CDLL(None), "malloc_trim", None)
    if trim is not None:
        trim(0)


def _main() -> None:
    method, text, *kinds = sys.argv[1:]
    config = Config(*json.loads(text))
    loss = METHODS[method]
    # The libraries' own start-up. What is compiled for a shape must be warmed up at that shape.
    first = config if method == "torch_compile" else config._replace(n=8, v=64, d=16)
    for kind in kinds:
        call = make_call(kind, loss, make_problem(first, "cpu"))
        call.run(call.prepare())
    problem = make_problem(config, "cpu")
    peaks = {}
    for kind in kinds:
        call = make_call(kind, loss, problem)
        state = call.prepare()
        _return_free_memory()
        # Memory has been higher than it is now: fill the difference, then watch the peak.
        slack = torch.ones(max(_peak_resident_bytes() - _resident_bytes(), 1), dtype=torch.uint8)
        before = _peak_resident_bytes()
        result = call.run(state)
        peaks[kind] = max(_peak_resident_bytes() - before, 0) / MB
        del slack, result, state
    print(json.dumps(peaks))


if __name__ == "__main__":
    _main()
