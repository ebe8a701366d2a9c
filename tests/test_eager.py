"""The direct way of a call: the same results as by the registered ops, and only where nobody wants to
see those."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from cce_ext import eager, linear_cross_entropy

NAMES = ("e", "c", "bias", "lora_a", "lora_b")


def problem(dtype: torch.dtype = torch.float32) -> dict[str, Any]:
    g = torch.Generator().manual_seed(0)
    shapes = {"e": (9, 6), "c": (11, 6), "bias": (11,), "lora_a": (2, 6), "lora_b": (11, 2)}
    leaves = {
        name: torch.randn(*shape, generator=g).to(dtype).requires_grad_()
        for name, shape in shapes.items()
    }
    return leaves | {"targets": torch.randint(11, (9,), generator=g), "label_smoothing": 0.1}


def step(p: dict[str, Any]) -> tuple[Tensor, ...]:
    loss, lse = linear_cross_entropy(**p, return_lse=True)
    leaves = [p[name] for name in NAMES if p[name].requires_grad]
    return (loss, lse, *torch.autograd.grad(loss + lse.sum(), leaves))


class Seen(TorchDispatchMode):
    """Names of the ops of this package that a mode gets to see."""

    def __init__(self) -> None:
        super().__init__()
        self.names: set[str] = set()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func.namespace == "cce":
            self.names.add(func._opname)
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("autocast", [False, True])
def test_the_same_as_by_the_registered_ops(autocast: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    calls = []
    direct = eager._direct["linear_ce"]

    def spy(*args: Any) -> tuple:
        calls.append(args)
        return direct(*args)

    monkeypatch.setitem(eager._direct, "linear_ce", spy)
    with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
        got = step(problem())
    assert len(calls) == 1
    monkeypatch.setattr(eager, "is_plain", lambda tensors: False)
    with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
        expected = step(problem())
    assert len(calls) == 1
    for x, y in zip(got, expected, strict=True):
        assert x.dtype == y.dtype
        assert torch.equal(x, y)


def test_a_mode_sees_the_ops() -> None:
    with Seen() as seen:
        step(problem())
    assert {"linear_ce_forward", "linear_ce_backward"} <= seen.names


def test_a_subclass_reaches_the_ops() -> None:
    seen = set()

    class Wrapped(Tensor):
        @classmethod
        def __torch_function__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None):
            seen.add(str(func))
            return super().__torch_function__(func, types, args, kwargs or {})

    p = problem()
    p["e"] = p["e"].detach().as_subclass(Wrapped)
    step(p)
    assert any("linear_ce_forward" in name for name in seen)


def test_transforms_and_tracing_are_not_plain() -> None:
    x = torch.ones(3)
    found = {}

    def look(name: str, t: Tensor) -> Tensor:
        found[name] = eager.is_plain((x, None))
        return t * 2

    look("eager", x)
    torch.func.vmap(lambda t: look("vmap", t))(x)
    torch.func.grad(lambda t: look("grad", t).sum())(x)
    with torch.device("cpu"):
        look("function mode", x)
    assert found == {"eager": True, "vmap": False, "grad": False, "function mode": False}


def test_saved_tensors_pass_through_hooks() -> None:
    """Offloading and checkpointing replace what is saved; what is not differentiable stays so."""
    packed = []

    def pack(t: Tensor) -> Tensor:
        packed.append(t.shape)
        return t.clone()

    p = problem()
    with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
        got = step(p)
    assert torch.Size((11, 6)) in packed
    for x, y in zip(got, step(problem()), strict=True):
        assert torch.equal(x, y)
    p = problem()
    p["c"].requires_grad_(False)
    assert len(step(p)) == 2 + len(NAMES) - 1
    arguments = (p["e"], p["c"], p["targets"], None, None, None, -100, 0.0, 1.0, 0.0, 0, 0, True)
    nll, lse, *others = eager.forward("linear_ce", *arguments)
    assert nll.requires_grad
    assert lse.requires_grad
    assert not any(t.requires_grad for t in others)
    with torch.no_grad():
        assert not eager.forward("linear_ce", *arguments)[0].requires_grad


@pytest.mark.parametrize(
    "wanted", [("e", "u", "lora_b"), ("e", "c", "bias", "u", "lora_b"), ("c",)]
)
def test_the_sparse_pair_has_gradients_where_they_are_wanted(
    wanted: tuple[str, ...], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Shapes and dtypes alone: its kernels are for GPUs."""
    monkeypatch.setattr(eager, "is_plain", lambda tensors: False)
    n, v, d, r = 130, 20000, 64, 8
    half, single = torch.bfloat16, torch.float32
    kinds = {
        "e": ((n, d), half),
        "c": ((v, d), half),
        "bias": ((v,), single),
        "u": ((n, r), half),
        "lora_b": ((v, r), single),
    }
    t = {
        name: torch.empty(shape, dtype=dtype, device="meta", requires_grad=name in wanted)
        for name, (shape, dtype) in kinds.items()
    }
    targets = torch.empty(n, dtype=torch.long, device="meta")
    nll, lse, *_ = torch.ops.cce.sparse_ce_forward(
        t["e"], t["c"], targets, t["bias"], t["u"], t["lora_b"],
        -100, 0.0, 1.0, 0.0, 0, 0, False, 2.0**-13, True, True,
    )  # fmt: skip
    (nll.sum() + lse.sum()).backward()
    for name, (shape, dtype) in kinds.items():
        if name not in wanted:
            assert t[name].grad is None
        else:
            assert t[name].grad.shape == shape
            assert t[name].grad.dtype == dtype
