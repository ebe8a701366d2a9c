"""One training step of an output layer by several methods: its memory and its time.

``python -m bench.step METHOD N V D DTYPE`` prints the peak memory of one step on a CPU, in MB. The
benchmarks start it as a process of its own, because a process that has already run other methods
has memory to spare.
"""

from __future__ import annotations

import resource
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor

from cce_ext import linear_cross_entropy

Loss = Callable[[Tensor, Tensor, Tensor], Tensor]
ROOT = Path(__file__).resolve().parent.parent
MB = 1e6


def eager_loss(e: Tensor, c: Tensor, targets: Tensor) -> Tensor:
    """What most training code does: logits, then their cross-entropy."""
    return F.cross_entropy(F.linear(e, c), targets)


def chunked_loss(e: Tensor, c: Tensor, targets: Tensor) -> Tensor:
    """PyTorch's own chunked loss (2.13 and newer)."""
    return F.linear_cross_entropy(e, c, targets, options=torch.nn.LinearCrossEntropyOptions())


def methods() -> dict[str, Loss]:
    """The methods that this PyTorch has, by name; the first is the one to compare with."""
    found: dict[str, Loss] = {"eager": eager_loss}
    if hasattr(torch.nn, "LinearCrossEntropyOptions"):
        found["torch_chunked"] = chunked_loss
    found["cce"] = linear_cross_entropy
    return found


def make_inputs(
    n: int, v: int, d: int, dtype: torch.dtype, device: str | torch.device = "cpu", seed: int = 0
) -> tuple[Tensor, Tensor, Tensor]:
    """Hidden states (n, d), classifier (v, d), targets (n,); logits of standard deviation 2.5."""
    generator = torch.Generator().manual_seed(seed)
    e = torch.randn(n, d, generator=generator).to(device, dtype)
    c = (torch.randn(v, d, generator=generator) * (2.5 / d**0.5)).to(device, dtype)
    targets = torch.randint(v, (n,), generator=generator).to(device)
    return e.requires_grad_(), c.requires_grad_(), targets


def step(loss: Loss, e: Tensor, c: Tensor, targets: Tensor) -> Tensor:
    """Forward and backward; the gradients are left in e.grad and c.grad."""
    e.grad = c.grad = None
    value = loss(e, c, targets)
    value.backward()
    return value.detach()


def timed_step(loss: Loss, e: Tensor, c: Tensor, targets: Tensor) -> float:
    """Seconds of one step."""
    if e.is_cuda:
        torch.cuda.synchronize(e.device)
    start = time.perf_counter()
    step(loss, e, c, targets)
    if e.is_cuda:
        torch.cuda.synchronize(e.device)
    return time.perf_counter() - start


def gradient_bytes(e: Tensor, c: Tensor) -> int:
    """Size of both gradients, which every method has to return."""
    return e.numel() * e.element_size() + c.numel() * c.element_size()


def cuda_peak_mb(loss: Loss, e: Tensor, c: Tensor, targets: Tensor) -> float:
    """Peak GPU memory of one step beyond inputs and gradients."""
    step(loss, e, c, targets)
    e.grad = c.grad = None
    torch.cuda.synchronize(e.device)
    before = torch.cuda.memory_allocated(e.device)
    torch.cuda.reset_peak_memory_stats(e.device)
    step(loss, e, c, targets)
    peak = torch.cuda.max_memory_allocated(e.device)
    return (peak - before - gradient_bytes(e, c)) / MB


def cpu_peak_mb(method: str, n: int, v: int, d: int, dtype: torch.dtype) -> float:
    """Peak resident memory of one step beyond inputs and gradients, in a fresh process."""
    name = str(dtype).removeprefix("torch.")
    command = [sys.executable, "-m", "bench.step", method, str(n), str(v), str(d), name]
    result = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    if result.returncode:
        raise RuntimeError(f"the memory of {method} could not be measured:\n{result.stderr}")
    return float(result.stdout.split()[-1])


def _peak_resident_bytes() -> int:
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def _resident_bytes() -> int:
    pages = int(Path("/proc/self/statm").read_text().split()[1])
    return pages * resource.getpagesize()


def _main() -> None:
    method, n, v, d, name = sys.argv[1:]
    loss, dtype = methods()[method], getattr(torch, name)
    step(loss, *make_inputs(8, 64, 16, dtype))  # the libraries' own start-up
    e, c, targets = make_inputs(int(n), int(v), int(d), dtype)
    # Inputs are made in float32, so memory has been higher than it is now: fill the difference,
    # then watch the peak.
    slack = torch.ones(max(_peak_resident_bytes() - _resident_bytes(), 1), dtype=torch.uint8)
    before = _peak_resident_bytes()
    step(loss, e, c, targets)
    peak = max(_peak_resident_bytes() - before - gradient_bytes(e, c), 0) / MB
    del slack
    print(f"{peak:.1f}")


if __name__ == "__main__":
    _main()
