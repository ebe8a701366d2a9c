"""Speed and memory on one GPU, as ratios to the matmul alone in the same run: ``python -m bench.gpu
[--json FILE]``.

The matmul is ``torch.mm(E, C.T, out=bf16)`` at the same shape; medians over several runs on random
data. Memory is the peak beyond inputs, and for backward kinds beyond the gradients too.
"""

from __future__ import annotations

import argparse
import json
import statistics
from collections.abc import Callable

import torch
from tqdm import tqdm

from cce_ext import build_info, linear_cross_entropy

# name -> (V, D) of the model's output layer
SHAPES = {
    "gemma2": (256000, 2304),
    "llama3": (128256, 4096),
    "qwen": (151936, 2048),
    "phi3.5": (32064, 3072),
    "mistral-nemo": (131072, 5120),
}


def time_ms(run: Callable[[], object], repeats: int) -> list[float]:
    """Times of single calls in ms, by CUDA events, after two warm-up calls."""
    times = []
    for i in range(repeats + 2):
        start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        start.record()
        run()
        end.record()
        torch.cuda.synchronize()
        if i >= 2:
            times.append(start.elapsed_time(end))
    return times


def peak_mb(run: Callable[[], object]) -> float:
    """Peak memory of a call beyond what was allocated before it, in MB of 10⁶ bytes."""
    torch.cuda.synchronize()
    before = torch.cuda.memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    result = run()
    torch.cuda.synchronize()
    peak = torch.cuda.max_memory_allocated() - before
    del result
    return peak / 1e6


def matmul_ms(e: torch.Tensor, c: torch.Tensor, repeats: int) -> list[float]:
    """Times of the matmul alone, which stores the logits (N, V) in e's dtype."""
    out = torch.empty(e.shape[0], c.shape[0], device=e.device, dtype=e.dtype)
    return time_ms(lambda: torch.mm(e, c.T, out=out), repeats)


def measure(name: str, n: int, dtype: torch.dtype, rank: int, repeats: int) -> list[dict]:
    """Rows of the table for one shape: the matmul, the forward, forward + exact backward, the LoRA
    head's step."""
    v, d = SHAPES[name]
    e = torch.randn(n, d, device="cuda", dtype=dtype, requires_grad=True)
    c = (torch.randn(v, d, device="cuda", dtype=dtype) * d**-0.5).requires_grad_()
    t = torch.randint(v, (n,), device="cuda")
    a = torch.randn(rank, d, device="cuda", requires_grad=True)
    b = (torch.randn(v, rank, device="cuda") * 1e-2).requires_grad_()
    frozen = c.detach()
    matmul = statistics.median(matmul_ms(e.detach(), frozen, repeats))

    def forward(**options: float) -> torch.Tensor:
        with torch.no_grad():
            return linear_cross_entropy(e, c, t, filter_eps=None, **options)

    def step() -> tuple[torch.Tensor, ...]:
        return torch.autograd.grad(linear_cross_entropy(e, c, t, filter_eps=None), (e, c))

    def lora_step() -> tuple[torch.Tensor, ...]:
        loss = linear_cross_entropy(
            e, frozen, t, filter_eps=None, lora_a=a, lora_b=b, lora_scale=2.0
        )
        return torch.autograd.grad(loss, (e, a, b))

    size = e.element_size()
    kinds = {
        "forward": (forward, 0),
        "forward, softcap 30": (lambda: forward(softcap=30.0), 0),
        "forward + exact backward": (step, size * (e.numel() + c.numel())),
        f"LoRA head R={rank}, forward + exact backward": (
            lora_step,
            size * e.numel() + 4 * (a.numel() + b.numel()),
        ),
    }
    rows = [
        {
            "shape": name,
            "n": n,
            "kind": "matmul",
            "ms": matmul,
            "ratio": 1.0,
            "spread": 0.0,
            "memory_mb": 0.0,
        }
    ]
    for kind, (run, gradients) in kinds.items():
        times = time_ms(run, repeats)
        median = statistics.median(times)
        rows.append(
            {
                "shape": name,
                "n": n,
                "kind": kind,
                "ms": median,
                "ratio": median / matmul,
                "spread": (max(times) - min(times)) / median,
                "memory_mb": peak_mb(run) - gradients / 1e6,
            }
        )
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--shapes", nargs="*", default=["gemma2", "llama3"], choices=list(SHAPES))
    parser.add_argument("--n", type=int, default=8192)
    parser.add_argument("--rank", type=int, default=256)
    parser.add_argument("--repeats", type=int, default=8)
    parser.add_argument("--dtype", default="bfloat16", choices=["bfloat16", "float16"])
    parser.add_argument("--json", help="also write the rows to this file")
    args = parser.parse_args()
    if not torch.cuda.is_available():
        raise SystemExit("bench.gpu needs a CUDA device; bench.cpu measures the CPU path")
    rows: list[dict] = []
    for name in tqdm(args.shapes, desc="shapes", leave=False):
        rows += measure(name, args.n, getattr(torch, args.dtype), args.rank, args.repeats)
        torch.cuda.empty_cache()
    facts = build_info()
    print(
        f"{torch.cuda.get_device_name()}, torch {torch.__version__}, commit {facts.get('git_commit', 'unknown')}"
    )
    print(
        f"{'shape':<14}{'N':>7} {'kind':<44}{'ms':>9}{'x matmul':>10}{'spread':>8}{'extra MB':>10}"
    )
    for r in rows:
        print(
            f"{r['shape']:<14}{r['n']:>7} {r['kind']:<44}{r['ms']:>9.2f}{r['ratio']:>10.3f}{r['spread']:>8.1%}"
            f"{r['memory_mb']:>10.1f}"
        )
    if args.json:
        with open(args.json, "w") as f:
            json.dump(
                {"device": torch.cuda.get_device_name(), "torch": torch.__version__, "rows": rows},
                f,
                indent=1,
            )


if __name__ == "__main__":
    main()
