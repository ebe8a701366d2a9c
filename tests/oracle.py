"""What the loss should be: random problems, the plain PyTorch answer, and how close another answer must come.

The answer is torch.nn.functional.cross_entropy on stored logits, in float64; what the same code
gives in the tested dtype tells how much error that dtype excuses.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, field, replace

import torch
import torch.nn.functional as F
from torch import Tensor

from cce_ext import linear_cross_entropy

IGNORE = -100


@dataclass(frozen=True)
class Case:
    """One problem. batch x length tokens; rank 0: no adapter; ignored: share of tokens that do not count."""

    batch: int
    length: int
    vocab: int
    hidden: int
    rank: int = 0
    dtype: torch.dtype = torch.float32
    bias: bool = False
    softcap: float | None = None
    shift: int = 0
    reduction: str = "mean"
    ignored: float = 0.0
    smoothing: float = 0.0
    logit_scale: float = 1.0
    lse_weight: float = 0.0  # weight of mean(lse²) in what is differentiated
    strided: bool = False
    adapter_dtype: torch.dtype | None = None  # None: dtype
    spread: float = 1.0  # standard deviation of the classifier, times sqrt(hidden)
    seed: int = 0
    device: str = "cpu"

    def leaves(self) -> dict[str, Tensor]:
        """Leaf tensors that require gradients: e, c, bias, lora_a, lora_b."""
        g = torch.Generator().manual_seed(self.seed)

        def make(*shape: int, dtype: torch.dtype | None = None) -> Tensor:
            dtype = dtype or self.dtype
            if self.strided and len(shape) > 1:  # stored the other way round
                t = (
                    torch.randn(*shape[:-2], shape[-1], shape[-2], generator=g)
                    .to(dtype)
                    .transpose(-1, -2)
                )
            else:
                t = torch.randn(*shape, generator=g).to(dtype)
            return t.to(self.device).requires_grad_()

        adapter = self.adapter_dtype or self.dtype
        result = {
            "e": make(self.batch, self.length, self.hidden),
            "c": make(self.vocab, self.hidden),
        }
        with torch.no_grad():
            result["c"] *= self.spread * self.hidden**-0.5
        if self.bias:
            result["bias"] = make(self.vocab)
        if self.rank:
            result["lora_a"] = make(self.rank, self.hidden, dtype=adapter)
            result["lora_b"] = make(self.vocab, self.rank, dtype=adapter)
            with torch.no_grad():
                result["lora_a"] *= self.hidden**-0.5
                result["lora_b"] *= self.rank**-0.5
        return result

    def targets(self) -> Tensor:
        g = torch.Generator().manual_seed(self.seed + 1)
        t = torch.randint(self.vocab, (self.batch, self.length), generator=g)
        t[torch.rand(t.shape, generator=g) < self.ignored] = IGNORE
        return t.to(self.device)


def ours(case: Case, leaves: dict[str, Tensor], impl: str = "cce_exact") -> tuple[Tensor, Tensor]:
    """(loss, lse) of linear_cross_entropy."""
    return linear_cross_entropy(
        leaves["e"],
        leaves["c"],
        case.targets(),
        leaves.get("bias"),
        softcap=case.softcap,
        reduction=case.reduction,
        shift=case.shift,
        return_lse=True,
        impl=impl,
        lora_a=leaves.get("lora_a"),
        lora_b=leaves.get("lora_b"),
        lora_scale=0.5,
        logit_scale=case.logit_scale,
        label_smoothing=case.smoothing,
    )


def eager(case: Case, leaves: dict[str, Tensor]) -> tuple[Tensor, Tensor]:
    """(loss, lse) by stored logits, in the leaves' own dtype."""
    e, targets = leaves["e"], case.targets()
    if case.shift:
        e, targets = e[:, : -case.shift], targets[:, case.shift :]
    z = e @ leaves["c"].T
    if case.rank:
        z = z + 0.5 * (e @ leaves["lora_a"].to(e.dtype).T) @ leaves["lora_b"].to(e.dtype).T
    if case.bias:
        z = z + leaves["bias"]
    z = z * case.logit_scale
    if case.softcap:
        z = case.softcap * torch.tanh(z / case.softcap)
    if z.dtype != torch.float64:
        z = z.float()
    valid = targets != IGNORE
    loss = F.cross_entropy(
        z.flatten(0, 1),
        targets.flatten(),
        ignore_index=IGNORE,
        reduction="none",
        label_smoothing=case.smoothing,
    ).view(targets.shape)
    lse = torch.where(valid, torch.logsumexp(z, -1), 0)
    if case.reduction == "sum":
        loss = loss.sum()
    elif case.reduction == "mean":
        loss = loss.sum() / valid.sum().clamp(min=1)
    return loss, lse


def differentiate(case: Case, run: Callable, leaves: dict[str, Tensor]) -> dict[str, Tensor]:
    """Outputs and gradients of a non-uniform weighting of the outputs."""
    loss, lse = run(case, leaves)
    weights = torch.linspace(0.5, 1.5, loss.numel(), device=loss.device, dtype=loss.dtype).view(
        loss.shape
    )
    total = (loss * weights).sum()
    if case.lse_weight:
        total = total + case.lse_weight * lse.square().mean()
    grads = torch.autograd.grad(total, list(leaves.values()))
    return {"loss": loss.detach(), "lse": lse.detach()} | {
        f"d{name}": grad for name, grad in zip(leaves, grads, strict=True)
    }


def squared_error(x: Tensor, truth: Tensor) -> float:
    """‖x - truth‖² in float64."""
    return (x.double() - truth.double()).square().sum().item()


@dataclass
class Comparison:
    """Errors of one case: name -> (ours, torch in the same dtype)."""

    case: Case
    errors: dict[str, tuple[float, float]] = field(default_factory=dict)

    def failures(self, slack: float) -> list[str]:
        return [
            f"{name}: {mine:.2e} > 2 x {theirs:.2e} + {slack:.0e}"
            for name, (mine, theirs) in self.errors.items()
            if not mine <= 2 * theirs + slack
        ]

    def check(self, slack: float) -> None:
        failures = self.failures(slack)
        assert not failures, f"{self.case}: " + "; ".join(failures)


def repeats(case: Case) -> int:
    """How many random draws of a case are pooled: in 16 bit the error of a handful of numbers is luck, ours and eager's
    alike, and on a GPU the slack is too small to cover it. Enough draws for some 64 tokens that count."""
    if case.device == "cpu":
        return 1
    tokens = case.batch * case.length * (1 - case.ignored)
    narrow = case.vocab < 16 or case.hidden < 8 or case.rank == 1
    return max(8 if narrow else 1, min(32, math.ceil(64 / tokens) if tokens else 1))


def compare(case: Case, run: Callable = ours) -> Comparison:
    """Runs a case three ways: ours, eager in the same dtype, eager in float64.

    Errors are ‖x - truth‖ / ‖truth‖; where the truth is next to nothing (the loss of a vocabulary of one, which is the
    difference of two equal numbers) they are relative to ‖lse‖. Several draws count as one long vector.
    """
    sums: dict[str, list[float]] = {}
    for i in range(repeats(case)):
        for name, squares in _compare_draw(replace(case, seed=case.seed + 7919 * i), run).items():
            sums[name] = [x + y for x, y in zip(sums.get(name, [0.0] * 3), squares, strict=True)]
    result = Comparison(case)
    for name, (mine, theirs, norm) in sums.items():
        scale = norm if norm > 1e-6 else max(1.0, sums["lse"][2])
        result.errors[name] = (math.sqrt(mine / scale), math.sqrt(theirs / scale))
    return result


def _compare_draw(case: Case, run: Callable) -> dict[str, tuple[float, float, float]]:
    """Squared errors of ours and eager's, and the squared norm of the truth, of each output and gradient."""
    leaves = case.leaves()
    exact_case = replace(case, dtype=torch.float64, adapter_dtype=torch.float64)
    exact = {name: t.detach().double().requires_grad_() for name, t in leaves.items()}
    truth = differentiate(exact_case, eager, exact)
    mine = differentiate(case, run, leaves)
    theirs = differentiate(case, eager, leaves)
    squares = {}
    for name, t in truth.items():
        assert mine[name].shape == t.shape, (
            f"{case}: {name} has shape {mine[name].shape}, expected {t.shape}"
        )
        if name.startswith("d"):
            assert mine[name].dtype == leaves[name[1:]].dtype, (
                f"{case}: {name} is {mine[name].dtype}"
            )
        squares[name] = (
            squared_error(mine[name], t),
            squared_error(theirs[name], t),
            t.double().square().sum().item(),
        )
    return squares
