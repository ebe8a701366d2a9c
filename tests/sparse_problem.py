"""Problems for the sparse gradient: a head, upstream gradients and options; the exact gradients by
autograd, and the reference's."""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from functools import cached_property

import torch
from torch import Tensor

from bench.llm_data import llm_like
from cce_ext.options import LossOptions
from cce_ext.reference import finish_logits, statistics_of_logits
from cce_ext.sparse import tail
from cce_ext.sparse.reference import SparseGradients, sparse_gradients

EPS = 2.0**-13
NAMES = {"e": "de", "c": "dc", "bias": "dbias", "u": "du", "lora_b": "dlora_b"}


def error(x: Tensor, truth: Tensor) -> float:
    """‖x - truth‖ / ‖truth‖."""
    return ((x.double() - truth.double()).norm() / truth.double().norm().clamp(min=1e-30)).item()


@dataclass
class Problem:
    """Σ dnll nll + Σ dlse lse of a head, in the dtype of e. Shapes: e (N, D), c (V, D), targets (N,),
    dnll, dlse (N,), bias (V,), u (N, R), lora_b (V, R)."""

    e: Tensor
    c: Tensor
    targets: Tensor
    bias: Tensor | None = None
    u: Tensor | None = None
    lora_b: Tensor | None = None
    dnll: Tensor | None = None
    dlse: Tensor | None = None
    options: LossOptions = field(default_factory=LossOptions)

    def __post_init__(self) -> None:
        if self.dnll is None:
            self.dnll = torch.full((self.e.shape[0],), 1 / self.e.shape[0], dtype=self.e.dtype)

    def rows(self, rows: slice | Tensor) -> Problem:
        """Some of the rows, whose upstream gradients start anew."""
        u = None if self.u is None else self.u[rows]
        return replace(self, e=self.e[rows], targets=self.targets[rows], u=u, dnll=None, dlse=None)

    def vocabulary(self, size: int) -> Problem:
        """The first ids, and the rows whose targets are among them."""
        inside = self.targets < size
        return replace(self, c=self.c[:size]).rows(inside)

    def inputs(self) -> dict[str, Tensor]:
        """Those that there are, by name."""
        named = {name: getattr(self, name) for name in NAMES}
        return {name: t for name, t in named.items() if t is not None}

    @property
    def a(self) -> Tensor:
        """dnll + dlse, 0 at ignored rows."""
        total = self.dnll if self.dlse is None else self.dnll + self.dlse
        return torch.where(self.targets == self.options.ignore_index, 0, total)

    def sparse(self, eps: float = EPS, capacity: int | None = None) -> SparseGradients:
        """What the reference makes of it."""
        return sparse_gradients(
            self.dnll, self.dlse, self.e, self.c, self.targets, self.bias, self.u, self.lora_b,
            self.options, eps, capacity,
        )  # fmt: skip

    @cached_property
    def exact(self) -> dict[str, Tensor]:
        """Gradients by the inputs, and "products" (N, V), by autograd on stored logits."""
        leaves = {name: t.detach().clone().requires_grad_() for name, t in self.inputs().items()}
        products = leaves["e"] @ leaves["c"].T
        if "u" in leaves:
            products = products + leaves["u"] @ leaves["lora_b"].T
        if "bias" in leaves:
            products = products + leaves["bias"]
        z = finish_logits(products, self.options)
        rows = statistics_of_logits(z, self.targets, self.options)
        zero = torch.zeros_like(self.dnll)
        ignored = self.targets == self.options.ignore_index
        upstream = [torch.where(ignored, 0, self.dnll), zero if self.dlse is None else self.dlse]
        wanted = [products, *leaves.values()]
        got = torch.autograd.grad((rows.nll, rows.lse), wanted, upstream)
        return dict(zip(("products", *leaves), got, strict=True))

    def errors(self, found: SparseGradients) -> dict[str, float]:
        """Relative errors by the inputs' names."""
        return {
            name: error(getattr(found, NAMES[name]), self.exact[name]) for name in self.inputs()
        }


def eager_errors(problem: Problem) -> dict[str, float]:
    """Errors of de and dc by stored bfloat16 logits, as most training code makes them."""
    e, c = (t.to(torch.bfloat16).requires_grad_() for t in (problem.e, problem.c))
    z = finish_logits((e @ c.T).float(), problem.options)
    rows = statistics_of_logits(z, problem.targets, problem.options)
    de, dc = torch.autograd.grad(rows.nll, (e, c), problem.dnll.float())
    return {"e": error(de, problem.exact["e"]), "c": error(dc, problem.exact["c"])}


def made_head(n: int, v: int, d: int, dtype: torch.dtype = torch.float32, seed: int = 0) -> Problem:
    """A head that looks trained, of bfloat16 numbers in another dtype."""
    e, c, targets = llm_like(n, v, d, torch.bfloat16, "cpu", seed)
    return Problem(e.to(dtype), c.to(dtype), targets)


# name -> options, extra inputs, and the limit of candidates
CASES = {
    "plain": {},
    "bias": {"bias": True, "ignored": 0.4},
    "softcap": {"softcap": 30.0, "bias": True, "lse": True},
    "smoothing": {"label_smoothing": 0.1, "ignored": 0.1},
    "smoothing, lse": {"label_smoothing": 0.1, "lse": True},
    "scale": {"logit_scale": 1.3, "lse": True},
    "low rank": {"rank": 8, "softcap": 40.0},
    "overflow": {"bias": True, "rank": 4, "capacity": 150},
    "overflow, smoothing": {"label_smoothing": 0.2, "capacity": 150},
}


def make(
    bias: bool = False, ignored: float = 0.0, lse: bool = False, rank: int = 0,
    capacity: int | None = None, n: int = 300, v: int = 9001, dtype: torch.dtype = torch.float64,
    **options: float,
) -> tuple[Problem, int | None]:  # fmt: skip
    """A problem with upstream gradients of both signs, not finite where it must not matter."""
    g = torch.Generator().manual_seed(1)

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=g).to(dtype)

    p = made_head(n, v, 96, dtype)
    p.targets[torch.rand(n, generator=g) < ignored] = -100
    p.dnll = (1 + 0.5 * normal(n)) / n
    p.dnll[p.targets == -100] = torch.nan
    p.dlse = 0.1 * normal(n) / n if lse else None
    p.bias = 0.3 * normal(v) if bias else None
    if rank:
        p.u, p.lora_b = normal(n, rank), 0.3 * normal(v, rank) / rank**0.5
    p.options = LossOptions(**options)
    return p, capacity


def by_group(x: Tensor) -> Tensor:
    return torch.stack([part.sum(1) for part in x.split(tail.GROUP, 1)], 1)
