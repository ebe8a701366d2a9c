"""Errors of loss and gradients against float32, by method: ``python -m bench.accuracy [--head
PATH] [--json FILE]``.

On data like a language model's, on random initialisation, and on a trained head (``python -m
bench.trained_head`` makes one, ``--head`` names another). Also for the trained head with its logits
scaled, its vocabulary shuffled, and for few tokens.
"""

from __future__ import annotations

import argparse
import functools
import re
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor
from tqdm import tqdm

from bench.llm_data import llm_like
from bench.methods import METHODS, Loss, cce, eager, installed
from bench.problems import DTYPES, SHAPES, Problem, random_inputs
from bench.results import Results, error_text, headline, path_taken
from bench.trained_head import DEFAULT_PATH, TrainedHead, load_head
from cce_ext import linear_cross_entropy
from cce_ext.options import LossOptions
from cce_ext.sparse.reference import sparse_gradients

# Logits of a block in float32; autograd keeps a few of that size.
_BLOCK_BYTES = {"cuda": 2**30, "cpu": 2**27}
ROUNDED = "float32, rounded"
INITIAL_STD = 0.02


class Truth(NamedTuple):
    """Loss and gradients by e and c of the same inputs, computed in float32 with stored logits."""

    loss: float
    gradients: tuple[Tensor, ...]


def truth(problem: Problem) -> Truth:
    """Plain PyTorch in float32, a block of rows at a time."""
    n, v = problem.e.shape[0], problem.c.shape[0]
    rows = max(1, _BLOCK_BYTES[problem.e.device.type] // (4 * v))
    c = problem.c.detach().float().requires_grad_()
    loss, de, dc = 0.0, [], torch.zeros_like(c)
    for first in range(0, n, rows):
        e = problem.e.detach()[first : first + rows].float().requires_grad_()
        part = problem._replace(e=e, c=c, targets=problem.targets[first : first + rows])
        value = eager(part) * (e.shape[0] / n)
        gradients = torch.autograd.grad(value, (e, c))
        loss += value.item()
        de.append(gradients[0])
        dc += gradients[1]
    return Truth(loss, (torch.cat(de), dc))


def distance(x: Tensor, y: Tensor) -> float:
    """Norm of x - y over that of y."""
    return (torch.linalg.norm(x.float() - y) / torch.linalg.norm(y)).item()


def errors(loss: float, gradients: tuple[Tensor, ...], expected: Truth) -> dict[str, float]:
    """Relative errors; ``de_mean`` is that of the mean over the rows of dE, which shows a bias that
    all tokens share."""
    (de, dc), (true_de, true_dc) = gradients, expected.gradients
    return {
        "loss_error": abs(loss - expected.loss) / abs(expected.loss),
        "de_error": distance(de, true_de),
        "dc_error": distance(dc, true_dc),
        "de_mean_error": distance(de.float().mean(0), true_de.mean(0)),
    }


class Case(NamedTuple):
    """Inputs with a name."""

    name: str
    e: Tensor
    c: Tensor
    targets: Tensor


def synthetic_cases(shape: str, n: int, dtype: torch.dtype, device: torch.device) -> Iterator[Case]:
    """LLM-like data, then random initialisation, at a named shape."""
    v, d = SHAPES[shape]
    yield Case(f"llm-like, {shape}", *llm_like(n, v, d, dtype, device))
    e, c, targets = random_inputs(n, v, d, dtype, device)
    c = (c.float() * (INITIAL_STD / c.float().std())).to(dtype)
    yield Case(f"random initialisation, {shape}", e, c, targets)


def head_cases(
    head: TrainedHead, name: str, dtype: torch.dtype, device: torch.device
) -> Iterator[Case]:
    """A trained head as it is, with flatter and sharper logits, with a shuffled vocabulary, and for
    64 tokens and 1."""
    e, c = (t.to(device, dtype) for t in (head.e, head.c))
    targets = head.targets.to(device)
    yield Case(name, e, c, targets)
    for scale in (0.6, 1.5):
        yield Case(f"{name}, logits x {scale}", (e.float() * scale).to(dtype), c, targets)
    order = torch.randperm(c.shape[0], generator=torch.Generator().manual_seed(0)).to(device)
    yield Case(f"{name}, shuffled vocabulary", e, c[order], order.argsort()[targets])
    for n in (64, 1):
        rows = torch.arange(n, device=device) * (e.shape[0] // n)
        yield Case(name, e[rows], c, targets[rows])


Step = Callable[[Problem], tuple[Tensor, tuple[Tensor, ...]]]
ALGORITHM = "algorithm"
_THRESHOLD = re.compile(r", eps 2\^-(\d+)$")


def threshold(row: dict[str, Any]) -> int:
    """K of a row that was measured with the threshold 2^-K, 0 of others."""
    found = _THRESHOLD.search(row["method"])
    return int(found.group(1)) if found else 0


def _step(loss: Loss) -> Step:
    def step(problem: Problem) -> tuple[Tensor, tuple[Tensor, ...]]:
        value = loss(problem)
        return value, torch.autograd.grad(value, problem.leaves())

    return step


def algorithm(problem: Problem, eps: float) -> tuple[Tensor, tuple[Tensor, ...]]:
    """The sparse gradient in float64 on stored logits (cce_ext/sparse/reference.py), rounded to the
    inputs' dtype: what the filter does, without what a kernel's precision does."""
    e, c = problem.e.detach(), problem.c.detach()
    n = e.shape[0]
    dnll = torch.full((n,), 1 / n, dtype=torch.float64, device=e.device)
    inputs = (e.double(), c.double(), problem.targets, None, None, None)
    found = sparse_gradients(dnll, None, *inputs, LossOptions(), eps)
    value = linear_cross_entropy(*inputs[:3], filter_eps=None)
    return value, (found.de.to(e.dtype), found.dc.to(c.dtype))


def accuracy_methods(
    names: Iterable[str],
    exponents: Iterable[int],
    kernels: bool = True,
    reference: bool = False,
) -> dict[str, Step]:
    """The methods by name, then for each threshold this package's ``kernels``, and the ``reference``
    of the sparse gradient in float64."""
    found = {name: _step(METHODS[name]) for name in names}
    for k in exponents if kernels else ():
        found[f"cce, eps 2^-{k}"] = _step(functools.partial(cce, filter_eps=2.0**-k))
    for k in exponents if reference else ():
        found[f"{ALGORITHM}, eps 2^-{k}"] = functools.partial(algorithm, eps=2.0**-k)
    return found


def measure_case(case: Case, methods: dict[str, Step], bar: tqdm) -> list[dict[str, Any]]:
    """Rows of a case, the first what rounding the true gradients to the dtype costs."""
    problem = Problem(
        case.e.detach().requires_grad_(), case.c.detach().requires_grad_(), case.targets
    )
    expected = truth(problem)
    n, (v, d) = case.e.shape[0], case.c.shape
    about = dict(case=case.name, n=n, v=v, d=d, dtype=str(case.e.dtype).removeprefix("torch."))
    rounded = tuple(g.to(case.e.dtype) for g in expected.gradients)
    rows = [{"method": ROUNDED, **about, **errors(expected.loss, rounded, expected)}]
    for name, step in methods.items():
        bar.set_postfix_str(f"{case.name}: {name}")
        row: dict[str, Any] = {"method": name, **about}
        try:
            value, gradients = step(problem)
            row |= errors(value.item(), gradients, expected)
            if name.startswith("cce"):
                row["path"] = path_taken()
            del value, gradients
        except Exception as error:  # a peer may raise anything
            row["error"] = error_text(error)
        rows.append(row)
        bar.update()
    return rows


_FORM = "{:<24} {:>7} {:>10} {:>10} {:>10} {:>14}  {}"


def show(rows: list[dict[str, Any]]) -> None:
    """Prints the rows of a case."""
    first = rows[0]
    print(f"\n{first['case']}: {first['n']} x {first['v']} x {first['d']}, {first['dtype']}")
    print(_FORM.format("method", "n", "loss", "dE", "dC", "mean of dE", "exact rows"))
    for row in rows:
        if "error" in row:
            print(f"{row['method']:<24} {row['error']}")
            continue
        exact = row["path"].get("exact_rows", "all") if "path" in row else "-"
        numbers = (f"{row[k]:.1e}" for k in ("loss_error", "de_error", "dc_error", "de_mean_error"))
        print(_FORM.format(row["method"], row["n"], *numbers, exact))
    print(end="", flush=True)


def run(
    results: Results, cases: Iterable[Case], methods: dict[str, Step], path: Path | None
) -> None:
    """Measures and prints the cases, saving after each."""
    with tqdm(
        desc="accuracy", leave=False, disable=None, bar_format="{desc} {n_fmt} {postfix}"
    ) as bar:
        torch.compiler.reset()
        for case in cases:
            rows = measure_case(case, methods, bar)
            show(rows)
            results.add("accuracy", rows)
            results.save(path)
            if case.e.is_cuda:
                torch.cuda.empty_cache()


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--shape", choices=list(SHAPES), help="of the synthetic data")
    parser.add_argument("--n", type=int, help="tokens of the synthetic data")
    parser.add_argument("--dtype", default="bfloat16", choices=list(DTYPES))
    parser.add_argument("--methods", nargs="+", choices=list(METHODS), default=installed())
    parser.add_argument("--eps", type=int, nargs="*", default=[], metavar="K",
                        help="also thresholds 2^-K, such as 10 12 14 16")  # fmt: skip
    parser.add_argument("--algorithm", action="store_true",
                        help="with --eps: the sparse gradient in float64 too, on a CPU as well")  # fmt: skip
    parser.add_argument("--head", type=Path, default=DEFAULT_PATH,
                        help="of bench.trained_head, or a folder of .npy files")  # fmt: skip
    parser.add_argument("--only", choices=["synthetic", "head"], help="leave the other data out")
    parser.add_argument("--json", type=Path, help="also write the rows to this file")
    args = parser.parse_args()
    device, dtype = torch.device(args.device), DTYPES[args.dtype]
    gpu = device.type == "cuda"
    shape, n = args.shape or ("gemma2" if gpu else "small"), args.n or (8192 if gpu else 512)
    results = Results.start(device, "bench.accuracy")
    # On a CPU the threshold changes nothing: every backward is exact there.
    methods = accuracy_methods(args.methods, args.eps, gpu, args.algorithm)
    print(headline(results))
    if args.only != "head":
        run(results, synthetic_cases(shape, n, dtype, device), methods, args.json)
    if args.only == "synthetic":
        return
    try:
        head = load_head(args.head)
    except FileNotFoundError as error:
        print(f"\n{error}")
        return
    name = "trained head" if args.head == DEFAULT_PATH else f"trained head {args.head.stem}"
    run(results, head_cases(head, name, dtype, device), methods, args.json)


if __name__ == "__main__":
    main()
