"""A problem for the sparse gradient on a GPU, with its reference in float64."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch
from torch import Tensor

from bench.llm_data import llm_like
from cce_ext import diagnostics
from cce_ext.options import LossOptions
from cce_ext.sparse.reference import SparseGradients, sparse_gradients

EPS = 2.0**-13
BF16, FP16 = torch.bfloat16, torch.float16


def error(x: Tensor, truth: Tensor) -> float:
    return ((x.double() - truth.double()).norm() / truth.double().norm().clamp(min=1e-30)).item()


class Problem:
    """LLM-like inputs with every option, and the gradients of Σ w nll + Σ x lse."""

    def __init__(
        self, n: int, v: int, d: int, dtype: torch.dtype = BF16, rank: int = 0, bias: bool = False,
        ignored: float = 0.0, lse: bool = False, seed: int = 0, eps: float = EPS,
        loss_scale: float = 1.0, **options: float,
    ) -> None:  # fmt: skip
        g = torch.Generator("cuda").manual_seed(seed)
        e, c, t = llm_like(n, v, d, dtype, "cuda", seed)
        t[torch.rand(n, device="cuda", generator=g) < ignored] = -100

        def normal(*shape: int, scale: float = 1.0) -> Tensor:
            return torch.randn(*shape, device="cuda", generator=g) * scale

        self.leaves = {"e": e, "c": c}
        if bias:
            self.leaves["bias"] = normal(v, scale=0.3)
        if rank:
            self.leaves["u"] = normal(n, rank).to(dtype)
            self.leaves["lora_b"] = normal(v, rank, scale=0.3 / rank**0.5)
        for name, leaf in self.leaves.items():
            self.leaves[name] = leaf.requires_grad_()
        self.targets = t
        # Not uniform, of both signs, and not finite where it must not matter.
        self.dnll = (1 + normal(n, scale=0.3)) * (loss_scale / n)
        self.dnll[t == -100] = torch.nan
        self.dlse = normal(n, scale=0.1 * loss_scale / n) if lse else None
        self.options = LossOptions(**options)
        self.eps = eps

    def loss(self, **filters: object) -> tuple[Tensor, Tensor]:
        """(nll, lse) by the op, sparse unless a filter says otherwise."""
        t = self.leaves
        o = self.options
        eps = filters.get("eps", self.eps)
        op = torch.ops.cce.sparse_ce_forward
        may = (filters.get("e_grad", True), filters.get("c_grad", True))
        inputs = (t["e"], t["c"], self.targets, t.get("bias"), t.get("u"), t.get("lora_b"))
        return op(*inputs, *o, 0, 0, False, eps, *may)[:2]

    def gradients(self, **filters: object) -> dict[str, Tensor]:
        nll, lse = self.loss(**filters)
        outputs, upstream = [nll], [self.dnll]
        if self.dlse is not None:
            outputs.append(lse)
            upstream.append(self.dlse)
        names = list(self.leaves)
        got = torch.autograd.grad(outputs, list(self.leaves.values()), upstream)
        return dict(zip(names, got, strict=True))

    def reference(self, eps: float | None = None, **limits: float) -> SparseGradients:
        t = {name: leaf.detach().double() for name, leaf in self.leaves.items()}
        if "lora_b" in t:  # the kernels read B in e's dtype
            t["lora_b"] = self.leaves["lora_b"].detach().to(self.leaves["e"].dtype).double()
        dlse = None if self.dlse is None else self.dlse.double()
        return sparse_gradients(
            self.dnll.double(), dlse, t["e"], t["c"], self.targets, t.get("bias"), t.get("u"),
            t.get("lora_b"), self.options, self.eps if eps is None else eps, **limits,
        )  # fmt: skip


def size_without_cancelling(problem: Problem, name: str) -> float:
    """About the norm of a gradient whose rows of G have the norm |dnll|. A row that is sure of its
    target has far less, p - 1, most of which is the rounding of its float32 logits."""
    factor = {"e": "c", "c": "e", "u": "lora_b", "lora_b": "u"}.get(name)
    rms = (
        1.0
        if factor is None
        else problem.leaves[factor].double().norm(dim=1).square().mean() ** 0.5
    )
    return float(problem.dnll.nan_to_num(0).double().norm() * rms)


def mismatches(problem: Problem, expected: SparseGradients, limit: float) -> Iterator[str]:
    """Where a call differs from the reference, which makes the same decisions, by more than 16-bit
    rounding. Gradients by rows may differ by as much more as two references that sample other ids
    for the tail's tilt: rounded tails put the steps of the sample elsewhere."""
    names = {"e": "de", "c": "dc", "bias": "dbias", "u": "du", "lora_b": "dlora_b"}
    for name, got in problem.gradients().items():
        truth = getattr(expected, names[name])
        norm = max(truth.norm().item(), 1e-2 * size_without_cancelling(problem, name))
        difference = (got.double() - truth).norm().item()
        if not difference <= limit * norm and name in ("e", "u"):
            one, other = (problem.reference(tilt_start=s) for s in (0.25, 0.75))
            difference -= (getattr(one, names[name]) - getattr(other, names[name])).norm().item()
        if not difference <= limit * norm:  # nor NaN
            yield f"{name}: {difference / max(norm, 1e-30):.1e}"
    facts = diagnostics()
    if facts["exact_rows"] != int(expected.exact_rows.sum()):
        yield f"{facts['exact_rows']} exact rows, not {int(expected.exact_rows.sum())}"
    share = expected.dropped_share.item()
    if facts["dropped_share"] != pytest.approx(share, abs=2e-3):
        yield f"share {facts['dropped_share']}, not {share}"


def compare(problem: Problem, limit: float = 4e-3) -> None:
    """No mismatch, and something was kept."""
    assert not list(mismatches(problem, problem.reference(), limit))
    assert diagnostics()["kept"] > 0
