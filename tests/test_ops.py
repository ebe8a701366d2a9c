"""The custom ops: schema, autograd, fake kernels, autocast and shards, and torch.compile over them."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor
from torch._dynamo.testing import CompileCounterWithBackend

from cce_ext import linear_cross_entropy
from cce_ext.options import LossOptions
from cce_ext.reference import RowStatistics, statistics
from tests.oracle import Case, compare

IGNORE = -100


def inputs(dtype: torch.dtype = torch.float64) -> dict[str, Tensor]:
    g = torch.Generator().manual_seed(0)
    make = lambda *shape: torch.randn(*shape, generator=g).to(dtype).requires_grad_()  # noqa: E731
    targets = torch.randint(11, (7,), generator=g)
    targets[2] = IGNORE
    return {
        "e": make(7, 6),
        "c": make(11, 6),
        "targets": targets,
        "bias": make(11),
        "u": make(7, 2),
        "lora_b": make(11, 2),
    }


@pytest.mark.parametrize("name", ["linear_ce", "blocked_ce"])
def test_opcheck_of_a_pair(name: str) -> None:
    p = inputs()
    forward = getattr(torch.ops.cce, f"{name}_forward").default
    torch.library.opcheck(forward, (*p.values(), IGNORE, 5.0, 0.7, 0.1, 0, 0, True))
    torch.library.opcheck(forward, (*p.values(), IGNORE, 0.0, 1.0, 0.0, 0, 0, False))
    plain = {key: t.detach() for key, t in p.items()}
    lse = forward(*plain.values(), IGNORE, 0.0, 1.0, 0.0, 0, 0, False)[1]
    e, c, targets, *rest = plain.values()
    backward = getattr(torch.ops.cce, f"{name}_backward").default
    arguments = (torch.ones(7), None, e, c, targets, lse, *rest, IGNORE, 0.0, 1.0, 0.0, 0, 0)
    torch.library.opcheck(backward, (*arguments, True, True, True, True, True))
    torch.library.opcheck(backward, (*arguments, True, False, False, True, False))


def test_opcheck_of_the_public_op() -> None:
    p = inputs()
    e = p["e"].detach().view(1, 7, 6).requires_grad_()
    torch.library.opcheck(torch.ops.cce.linear_ce.default, (e, p["c"], p["targets"][None]))
    nll, lse = torch.ops.cce.linear_ce(e, p["c"], p["targets"][None])
    assert nll.shape == lse.shape == (1, 7)


@pytest.mark.parametrize("softcap", [0.0, 4.0])
@pytest.mark.parametrize("smoothing", [0.0, 0.2])
def test_gradcheck(softcap: float, smoothing: float) -> None:
    p = inputs()

    def run(e: Tensor, c: Tensor, bias: Tensor, u: Tensor, lora_b: Tensor) -> Any:
        return torch.ops.cce.linear_ce(
            e, c, p["targets"], bias, u, lora_b, softcap=softcap, logit_scale=0.7,
            label_smoothing=smoothing,
        )  # fmt: skip

    assert torch.autograd.gradcheck(run, [p[k] for k in ("e", "c", "bias", "u", "lora_b")])


@pytest.mark.parametrize("name", ["linear_ce", "blocked_ce"])
def test_shards_combine_to_the_whole(name: str) -> None:
    p = {key: t.detach() for key, t in inputs().items()}
    options = LossOptions(softcap=5.0, label_smoothing=0.1)
    whole = statistics(*p.values(), options, metrics=True)
    op = getattr(torch.ops.cce, f"{name}_forward")
    valid = p["targets"] != IGNORE
    parts = []
    for start, stop in ((0, 4), (4, 11)):
        shard = [p["e"], p["c"][start:stop], p["targets"], p["bias"][start:stop], p["u"]]
        shard.append(p["lora_b"][start:stop])
        parts.append(RowStatistics(*op(*shard, *options, start, 11, True)))
    lse = torch.logaddexp(parts[0].lse, parts[1].lse)
    torch.testing.assert_close(lse[valid], whole.lse[valid])
    for field in ("target_logit", "logit_sum"):
        total = sum(getattr(part, field) for part in parts)
        torch.testing.assert_close(total, getattr(whole, field))
    best = torch.where(parts[0].max_logit >= parts[1].max_logit, parts[0].argmax, parts[1].argmax)
    assert torch.equal(best, whole.argmax)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16], ids=str)
def test_blocked_path(dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> None:
    """The path of devices without kernels, forced here, in blocks small enough to have several."""
    from cce_ext import blocked, paths

    monkeypatch.setattr(paths, "_compiled_reason", lambda device, dtype: "forced")
    monkeypatch.setattr(blocked, "_ROWS", 5)
    monkeypatch.setattr(blocked, "_COLUMNS", 16)
    for smoothing, softcap, ignored in ((0.0, None, 0.0), (0.1, 3.0, 0.4), (0.1, None, 1.0)):
        case = Case(
            2, 6, 50, 24, rank=3, dtype=dtype, bias=True, softcap=softcap, ignored=ignored,
            smoothing=smoothing, lse_weight=0.1, shift=1, logit_scale=0.7,
        )  # fmt: skip
        compare(case).check(
            {torch.float64: 1e-12, torch.float32: 1e-5, torch.bfloat16: 1e-3}[dtype]
        )


def test_compiled_with_any_number_of_rows() -> None:
    """One full graph for several N, forward and backward, equal to eager."""
    counter = CompileCounterWithBackend("aot_eager")

    def step(e: Tensor, c: Tensor, targets: Tensor, a: Tensor, b: Tensor) -> Tensor:
        return linear_cross_entropy(
            e, c, targets, shift=1, softcap=5.0, label_smoothing=0.1, lora_a=a, lora_b=b
        )

    compiled = torch.compile(step, backend=counter, fullgraph=True, dynamic=True)
    graphs = []
    for length in (5, 9, 17):
        g = torch.Generator().manual_seed(length)
        leaves = [torch.randn(*s, generator=g) for s in ((2, length, 6), (11, 6), (3, 6), (11, 3))]
        e, c, a, b = (t.requires_grad_() for t in leaves)
        targets = torch.randint(11, (2, length), generator=g)
        targets[0, 1] = IGNORE
        results = [run(e, c, targets, a, b) for run in (compiled, step)]
        torch.testing.assert_close(*results)
        mine, theirs = (torch.autograd.grad(loss, (e, c, a, b)) for loss in results)
        torch.testing.assert_close(mine, theirs)
        graphs.append(counter.frame_count)
    assert graphs == [graphs[0]] * 3, "another N was compiled anew"


def test_compiled_by_inductor() -> None:
    p = inputs(torch.float32)
    run = torch.compile(
        lambda e, c: torch.ops.cce.linear_ce(e, c, p["targets"])[0].sum(), fullgraph=True
    )
    loss = run(p["e"], p["c"])
    truth = linear_cross_entropy(p["e"], p["c"], p["targets"], reduction="sum")
    torch.testing.assert_close(loss, truth)
    torch.testing.assert_close(*(torch.autograd.grad(x, (p["e"], p["c"])) for x in (loss, truth)))
