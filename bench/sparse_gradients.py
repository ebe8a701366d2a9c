"""How good and how fast the sparse gradient is on one GPU: ``python -m bench.sparse_gradients
[--trained-head DIR] [--json FILE]``

Accuracy: relative errors of dE and dC, 16-bit outputs as they come, against float32 logits and
float32 products of the same bfloat16 inputs; beside stored bfloat16 logits (cross-entropy in float32,
as most training code does it) and, where it is installed, the published cut_cross_entropy. Speed:
medians by CUDA events at the Gemma 2 2B shape on data that look trained, as ratios to
``torch.mm(E, C.T, out=bf16)`` in the same run.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from tqdm import tqdm

from bench.llm_data import describe, llm_like
from bench.problems import SHAPES
from bench.stored_head import HELP, find_head
from bench.timing import Call, Effort, Timer, graph_of, matmul_call, summarise
from bench.trained_head import load_head
from cce_ext import diagnostics, linear_cross_entropy

BF16 = torch.bfloat16
EXPONENTS = range(10, 17)
DEFAULT = 13
ROWS = (1, 64, 8192)
# What the sparse backward is to keep, as ratios: to the matmul, and of memory to the gradients.
LIMITS = {"backward": 0.22, "forward + backward": 2.2, "memory": 0.10}

Gradients = tuple[Tensor, Tensor]
Loss = Callable[[Tensor, Tensor, Tensor, float], Tensor]


def error(x: Tensor, truth: Tensor) -> float:
    """‖x - truth‖ / ‖truth‖."""
    return ((x.float() - truth).norm() / truth.norm()).item()


def gradients(loss: Loss, e: Tensor, c: Tensor, targets: Tensor, scale: float) -> Gradients:
    """(dE, dC) of a mean loss."""
    e, c = e.detach().requires_grad_(), c.detach().requires_grad_()
    return torch.autograd.grad(loss(e, c, targets, scale), (e, c))


def true_gradients(e: Tensor, c: Tensor, targets: Tensor, scale: float) -> Gradients:
    """(dE, dC) in float32."""
    e, c = e.float(), c.float()
    g = torch.softmax((e @ c.T).mul_(scale), -1)
    g[torch.arange(len(targets), device=g.device), targets] -= 1
    g *= scale / len(targets)
    return g @ c, g.T @ e


def ours(eps: float | None) -> Loss:
    """linear_cross_entropy with a threshold."""

    def loss(e: Tensor, c: Tensor, targets: Tensor, scale: float) -> Tensor:
        return linear_cross_entropy(e, c, targets, filter_eps=eps, logit_scale=scale)

    return loss


def eager(e: Tensor, c: Tensor, targets: Tensor, scale: float) -> Tensor:
    """Stored logits in e's dtype, cross-entropy in float32."""
    return F.cross_entropy(F.linear(e, c).float() * scale, targets)


def published() -> Loss | None:
    """The published package's loss, if it is installed; it has no logit scale, so e takes it."""
    try:
        from cut_cross_entropy import linear_cross_entropy as cut
    except ImportError:
        return None
    return lambda e, c, targets, scale: cut((e * scale).to(e.dtype), c, targets)


def cases(
    e: Tensor, c: Tensor, targets: Tensor, kind: str
) -> dict[str, tuple[Tensor, Tensor, Tensor, float]]:
    """Heads to measure on: e, c, targets and a factor of the logits, by name."""
    g = torch.Generator(e.device).manual_seed(0)
    ids = torch.randperm(c.shape[0], device=e.device, generator=g)
    random_e = torch.randn(e.shape, device=e.device, generator=g).to(e.dtype)
    random_c = (torch.randn(c.shape, device=e.device, generator=g) * 0.02).to(c.dtype)
    return {
        kind: (e, c, targets, 1.0),
        "logits x 0.6": (e, c, targets, 0.6),
        "logits x 1.5": (e, c, targets, 1.5),
        "shuffled vocabulary": (e, c[ids], ids.argsort()[targets], 1.0),
        "random initialisation": (random_e, random_c, targets, 1.0),
    }


def accuracy(e: Tensor, c: Tensor, targets: Tensor, kind: str) -> list[dict[str, Any]]:
    """One row a head, number of tokens and method."""
    rows = []
    other = published()
    for name, (e_, c_, t_, scale) in tqdm(cases(e, c, targets, kind).items(), desc="accuracy"):
        for n in sorted({min(n, len(t_)) for n in ROWS}):
            inputs = (e_[:n], c_, t_[:n], scale)
            truth = true_gradients(*inputs)
            losses: dict[str, Loss | None] = {"eager": eager, "exact": ours(None)}
            losses |= {f"2^-{k}": ours(2.0**-k) for k in EXPONENTS}
            losses["cut_cross_entropy"] = other
            for method, loss in losses.items():
                if loss is None:
                    continue
                row = {"head": name, "n": n, "method": method}
                try:
                    found = gradients(loss, *inputs)
                except Exception as problem:  # a peer that fails must not end the run
                    if loss is not other:
                        raise
                    rows.append(row | {"error": f"{type(problem).__name__}: {problem}"})
                    continue
                row |= {"dE": error(found[0], truth[0]), "dC": error(found[1], truth[1])}
                facts = diagnostics() if method.startswith("2^") else {}
                if "kept" in facts:
                    row |= {
                        "kept per row": facts["kept"] / n,
                        "candidates per row": facts["candidates"] / n,
                        "T": facts["dropped_share"],
                        "exact rows": facts["exact_rows"],
                    }
                rows.append(row)
                del found
            del truth
    return rows


def peaks(e: Tensor, c: Tensor, targets: Tensor) -> dict[str, float]:
    """Peak bytes of a step: of the forward beyond the inputs, of both beyond inputs and gradients."""
    result = {}

    def peak() -> int:
        torch.cuda.synchronize()
        return torch.cuda.max_memory_allocated()

    torch.cuda.synchronize()
    before = torch.cuda.memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    loss = linear_cross_entropy(e, c, targets)
    result["forward"] = peak() - before
    torch.cuda.synchronize()
    result["kept for the backward"] = torch.cuda.memory_allocated() - before
    torch.cuda.reset_peak_memory_stats()
    found = torch.autograd.grad(loss, (e, c))
    size = sum(x.numel() * x.element_size() for x in found)
    result["backward beyond gradients"] = peak() - before - size
    result["gradients"] = size
    return result


def as_call(run: Callable[[], object]) -> Call:
    """A call with nothing to prepare."""
    return Call(lambda: None, lambda _: run())


def step_times(
    timer: Timer,
    e: Tensor,
    c: Tensor,
    targets: Tensor,
    step: Callable[[], object],
    effort: Effort,
) -> dict[str, list[float]]:
    """Times in ms of a step and its parts."""
    loss = linear_cross_entropy(e, c, targets)

    def forward() -> Tensor:
        with torch.no_grad():
            return linear_cross_entropy(e, c, targets)

    work = {
        "forward, no grad": forward,
        "forward, training": lambda: linear_cross_entropy(e, c, targets),
        "backward": lambda: torch.autograd.grad(loss, (e, c), retain_graph=True),
        "forward + backward": step,
    }
    return {name: timer(as_call(run), effort) for name, run in tqdm(work.items(), desc="speed")}


def speed(n: int, repeats: int) -> dict[str, Any]:
    """Times, memory and reproducibility of a step at the Gemma 2 2B shape."""
    v, d = SHAPES["gemma2"]
    e, c, targets = llm_like(n, v, d, BF16, "cuda")
    data = describe(e, c, targets)
    timer, effort = Timer(e.device), Effort(1, repeats, 0.5)
    matmul = summarise(timer(matmul_call(e, c), effort))
    e, c = e.requires_grad_(), c.requires_grad_()
    size = (e.numel() + c.numel()) * e.element_size()

    def step() -> tuple[Tensor, ...]:
        loss = linear_cross_entropy(e, c, targets)
        return (loss.detach(), *torch.autograd.grad(loss, (e, c)))

    memory = peaks(e, c, targets)
    first, second = step(), step()
    facts = diagnostics()
    same = all(torch.equal(x, y) for x, y in zip(first, second, strict=True))
    del second
    times = step_times(timer, e, c, targets, step, effort)
    torch.cuda.empty_cache()
    graph, results = graph_of(step)
    times["forward + backward, CUDA graph"] = timer(as_call(graph.replay), effort)
    graph.replay()
    torch.cuda.synchronize()
    replayed = all(torch.equal(x, y) for x, y in zip(first, results, strict=True))
    found = {"matmul": matmul} | {name: summarise(values) for name, values in times.items()}
    rows = [
        {"kind": k, "ms": t.median, "ratio": t.median / matmul.median, "spread": t.spread}
        for k, t in found.items()
    ]
    return {
        "n": n,
        "shape": (v, d),
        "data": data,
        "rows": rows,
        "memory": memory,
        "memory_ratio": memory["backward beyond gradients"] / size,
        "diagnostics": {k: x for k, x in facts.items() if isinstance(x, (int, float))},
        "twice_equal": same,
        "graph_equal": replayed,
    }


def show_accuracy(rows: list[dict[str, Any]]) -> None:
    print(
        f"\n{'head':<24}{'tokens':>7}  {'method':<18}{'dE':>9}{'dC':>9}{'kept':>7}{'T':>8}{'exact':>7}"
    )
    for r in rows:
        if "error" in r:
            print(f"{r['head']:<24}{r['n']:>7}  {r['method']:<18}{r['error']}")
            continue
        tail = ""
        if "T" in r:
            tail = f"{r['kept per row']:>7.0f}{r['T']:>8.4f}{r['exact rows']:>7}"
        print(f"{r['head']:<24}{r['n']:>7}  {r['method']:<18}{r['dE']:>9.1e}{r['dC']:>9.1e}{tail}")
    found = {(r["head"], r["n"], r["method"]): r for r in rows}
    for (head, n, method), r in found.items():
        if method == f"2^-{DEFAULT}":
            base = found[head, n, "eager"]
            verdict = "met" if r["dE"] <= base["dE"] and r["dC"] <= base["dC"] else "missed"
            print(f"at most eager's error, {head}, {n} tokens: {verdict}")


def show_speed(facts: dict[str, Any]) -> None:
    v, d = facts["shape"]
    print(f"\nN = {facts['n']}, V = {v}, D = {d}; data: {facts['data']}")
    print(f"diagnostics: {facts['diagnostics']}")
    print(f"{'':<34}{'ms':>9}{'x matmul':>10}{'spread':>8}{'limit':>8}")
    for r in facts["rows"]:
        limit = LIMITS.get(r["kind"], "")
        print(f"{r['kind']:<34}{r['ms']:>9.2f}{r['ratio']:>10.3f}{r['spread']:>8.1%}{limit:>8}")
    for name, size in facts["memory"].items():
        print(f"memory, {name:<26}{size / 1e6:>9.1f} MB")
    print(
        f"memory beyond inputs and gradients is {facts['memory_ratio']:.1%} of the gradients (limit "
        f"{LIMITS['memory']:.0%}); twice bitwise equal: {facts['twice_equal']}; a CUDA graph of the "
        f"step gives the same bits: {facts['graph_equal']}"
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--trained-head", help="default: where tests look for it")
    parser.add_argument("--only", choices=["accuracy", "speed"])
    parser.add_argument("--n", type=int, default=8192)
    parser.add_argument("--repeats", type=int, default=8)
    parser.add_argument("--json", help="also write everything to this file")
    args = parser.parse_args()
    if not torch.cuda.is_available():
        raise SystemExit("bench.sparse_gradients needs a CUDA device: CPU gradients are exact")
    facts: dict[str, Any] = {"device": torch.cuda.get_device_name(), "torch": torch.__version__}
    print(f"{facts['device']}, torch {facts['torch']}")

    def save() -> None:
        if args.json:
            with open(args.json, "w") as f:
                json.dump(facts, f, indent=1)

    if args.only != "speed":
        folder = args.trained_head or find_head()
        if folder is None:
            print(f"{HELP}; measured on data that look trained instead")
            kind, head = "made head", llm_like(8192, 49152, 512, BF16, "cuda")
        else:
            kind, head = "trained head", tuple(x.cuda() for x in load_head(Path(folder)))
        facts["accuracy"] = accuracy(*head, kind)
        del head
        torch.cuda.empty_cache()
        show_accuracy(facts["accuracy"])
        save()
    if args.only != "accuracy":
        facts["speed"] = speed(args.n, args.repeats)
        show_speed(facts["speed"])
        save()


if __name__ == "__main__":
    main()
