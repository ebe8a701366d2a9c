"""The losses to compare: this package's, plain PyTorch's, and other packages' where installed."""

from __future__ import annotations

import functools
from collections.abc import Callable
from importlib import metadata
from importlib.util import find_spec

import torch
import torch.nn.functional as F
from torch import Tensor

from bench.problems import LORA_SCALE, Problem
from cce_ext import linear_cross_entropy

Loss = Callable[[Problem], Tensor]


class UnsupportedError(Exception):
    """A method has no such option."""


def cce(problem: Problem, **options: object) -> Tensor:
    """This package."""
    p = problem
    low_rank = {}
    if p.lora_a is not None:
        low_rank = dict(lora_a=p.lora_a, lora_b=p.lora_b, lora_scale=LORA_SCALE)
    return linear_cross_entropy(p.e, p.c, p.targets, softcap=p.softcap, **low_rank, **options)


def eager(problem: Problem) -> Tensor:
    """What most training code does: logits in the model's dtype, their cross-entropy in float32. A
    low-rank update is computed as PEFT does, in its own dtype."""
    logits = F.linear(problem.e, problem.c)
    if problem.lora_a is not None:
        x = problem.e.to(problem.lora_a.dtype)
        update = F.linear(F.linear(x, problem.lora_a), problem.lora_b) * LORA_SCALE
        logits = (logits + update).to(logits.dtype)
    if problem.softcap:
        logits = problem.softcap * torch.tanh(logits / problem.softcap)
    return F.cross_entropy(logits.float(), problem.targets)


def _plain(problem: Problem, softcap: bool = False) -> None:
    """Raises for what the method that asks does not have."""
    if problem.lora_a is not None:
        raise UnsupportedError("no low-rank head")
    if problem.softcap and not softcap:
        raise UnsupportedError("no softcap")


def torch_chunked(problem: Problem) -> Tensor:
    """PyTorch's own chunked loss (2.13 and newer)."""
    _plain(problem)
    options = torch.nn.LinearCrossEntropyOptions()
    return F.linear_cross_entropy(problem.e, problem.c, problem.targets, options=options)


def cut_cross_entropy(problem: Problem, impl: str = "cce") -> Tensor:
    """The published kernels (Wijmans et al., arXiv 2411.09009)."""
    from cut_cross_entropy import linear_cross_entropy as published

    _plain(problem, softcap=True)
    options = {} if impl == "cce" else {"filter_eps": None}
    return published(
        problem.e, problem.c, problem.targets, softcap=problem.softcap, impl=impl, **options
    )


def liger(problem: Problem) -> Tensor:
    """Liger's chunked loss, the classifier's gradient summed in float32 as the others do."""
    from liger_kernel.transformers import LigerFusedLinearCrossEntropyLoss

    _plain(problem, softcap=True)
    loss = LigerFusedLinearCrossEntropyLoss(softcap=problem.softcap, accum_dtype=torch.float32)
    return loss(problem.c, problem.e, problem.targets)


def quack(problem: Problem) -> Tensor:
    """QuACK's chunked loss, in the pipeline that it picks itself."""
    from quack.linear_cross_entropy import chunked_linear_cross_entropy

    _plain(problem)
    # It fails where the chunk is as long as the rows are wide.
    chunk = 4096 if problem.e.shape[1] != 4096 else 2048
    return chunked_linear_cross_entropy(problem.e, problem.c, problem.targets, chunk_size=chunk)


OWN: dict[str, Loss] = {
    "cce": cce,
    "cce_exact": functools.partial(cce, impl="cce_exact"),
    "torch_compile": functools.partial(cce, impl="torch_compile"),
    "eager": eager,
}
PEERS: dict[str, Loss] = {
    "torch_chunked": torch_chunked,
    "cut-cross-entropy": cut_cross_entropy,
    "cut-cross-entropy-exact": functools.partial(cut_cross_entropy, impl="cce_exact"),
    "liger-kernel": liger,
    "quack-kernels": quack,
}
METHODS = OWN | PEERS
#: distribution and module of a peer that is a package
PACKAGES = {
    "cut-cross-entropy": "cut_cross_entropy",
    "cut-cross-entropy-exact": "cut_cross_entropy",
    "liger-kernel": "liger_kernel",
    "quack-kernels": "quack",
}


def installed() -> list[str]:
    """Names of the methods that can be tried here, this package's first: a peer that breaks the
    device must not take the others along."""
    found = list(OWN)
    if hasattr(torch.nn, "LinearCrossEntropyOptions"):
        found.append("torch_chunked")
    return found + [name for name, module in PACKAGES.items() if find_spec(module)]


def versions() -> dict[str, str]:
    """Versions of the peers that are installed."""
    found = {}
    for name in ("cut-cross-entropy", "liger-kernel", "quack-kernels", "triton"):
        try:
            found[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            continue
    return found
