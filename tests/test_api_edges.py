"""How linear_cross_entropy behaves at its edges: wrong arguments, nothing to do, odd numbers."""

from __future__ import annotations

import itertools
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

import cce_ext
from cce_ext import (
    LinearCrossEntropy,
    LinearCrossEntropyImpl,
    compute_z_loss,
    linear_cross_entropy,
    paths,
)

N, V, D, R = 6, 11, 5, 3


def problem(**changes: Any) -> dict[str, Any]:
    g = torch.Generator().manual_seed(0)
    arguments: dict[str, Any] = {
        "e": torch.randn(2, N, D, generator=g),
        "c": torch.randn(V, D, generator=g),
        "targets": torch.randint(V, (2, N), generator=g),
    }
    return arguments | changes


WRONG = [
    ({"c": torch.zeros(V)}, ValueError, "c must have shape"),
    ({"c": torch.zeros(V, D + 1)}, ValueError, "D = 5"),
    (
        {"targets": torch.zeros(2, N + 1, dtype=torch.long)},
        ValueError,
        "targets must have e's shape",
    ),
    ({"targets": torch.zeros(2, N)}, TypeError, "targets must be integers"),
    ({"e": torch.zeros(2, N, D, dtype=torch.long)}, TypeError, "e must be"),
    ({"c": torch.zeros(V, D, dtype=torch.float64)}, TypeError, "c must have e's dtype"),
    ({"bias": torch.zeros(V + 1)}, ValueError, r"bias must have shape \(V,\) = \(11,\)"),
    ({"bias": torch.zeros(V, dtype=torch.long)}, TypeError, "bias must be floating point"),
    ({"c": torch.zeros(V, D, device="meta")}, ValueError, "c must be on e's device"),
    (
        {"targets": torch.zeros(2, N, dtype=torch.long, device="meta")},
        ValueError,
        "targets must be on",
    ),
    ({"lora_a": torch.zeros(R, D)}, ValueError, "lora_a and lora_b must be given together"),
    (
        {"lora_a": torch.zeros(R, D + 1), "lora_b": torch.zeros(V, R)},
        ValueError,
        "lora_a must have",
    ),
    (
        {"lora_a": torch.zeros(R, D), "lora_b": torch.zeros(V, R + 1)},
        ValueError,
        "lora_b must have",
    ),
    ({"lora_scale": float("nan")}, ValueError, "lora_scale must be finite"),
    ({"lora_scale": torch.tensor(1.0)}, TypeError, "lora_scale must be a number"),
    ({"logit_scale": float("inf")}, ValueError, "logit_scale must be finite"),
    ({"softcap": -1.0}, ValueError, "softcap must be at least 0"),
    ({"label_smoothing": 1.5}, ValueError, r"label_smoothing must be in \[0, 1\]"),
    ({"filter_eps": -1.0}, ValueError, "filter_eps must be a finite number"),
    ({"filter_eps": "low"}, ValueError, "filter_eps must be"),
    ({"impl": "fast"}, ValueError, "impl must be one of cce"),
    ({"reduction": "median"}, ValueError, "reduction must be one of mean, sum, none"),
    ({"shift": N}, ValueError, r"shift must be in \[0, T\) = \[0, 6\), got 6"),
    ({"shift": -1}, ValueError, "shift must be"),
    ({"shift": 1.0}, TypeError, "shift must be"),
    ({"bias": -100}, TypeError, "pass ignore_index="),
    ({"ignore_index": 1.5}, TypeError, "ignore_index must be an int"),
]


@pytest.mark.parametrize(("changes", "error", "message"), WRONG, ids=[w[2][:30] for w in WRONG])
def test_wrong_arguments_are_named(changes: dict, error: type, message: str) -> None:
    with pytest.raises(error, match=message):
        linear_cross_entropy(**problem(**changes))


def test_an_int_as_fourth_argument() -> None:
    p = problem()
    with pytest.raises(TypeError, match="ignore_index="):
        linear_cross_entropy(p["e"], p["c"], p["targets"], -100)


def test_a_target_out_of_range() -> None:
    p = problem()
    for bad in (V, -1):
        p["targets"][1, 2] = bad
        with pytest.raises(IndexError, match=rf"{bad} is out of range, expected \[0, 11\)"):
            linear_cross_entropy(**p)
        with pytest.raises(RuntimeError, match="out of range"):
            torch.ops.cce.linear_ce(p["e"], p["c"], p["targets"])


@pytest.mark.parametrize("impl", ["cce", "reference"])
@pytest.mark.parametrize("rows", [0, N])
def test_nothing_counts(impl: str, rows: int) -> None:
    """All targets ignored, or no rows at all: zeros, connected to the graph, never NaN."""
    e = torch.randn(2, rows, D, requires_grad=True)
    c = torch.randn(V, D, requires_grad=True)
    targets = torch.full((2, rows), -100)
    for reduction, shape in (("mean", ()), ("sum", ()), ("none", (2, rows))):
        loss = linear_cross_entropy(e, c, targets, reduction=reduction, impl=impl)
        assert loss.shape == shape
        assert (loss == 0).all()
        for gradient in torch.autograd.grad(loss.sum(), (e, c)):
            assert (gradient == 0).all()


@pytest.mark.parametrize("where", ["e", "c"])
@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_odd_numbers_propagate(where: str, value: float) -> None:
    p = problem()
    p[where].view(-1, D)[1, 2] = value
    leaves = [p["e"].requires_grad_(), p["c"].requires_grad_()]
    ours = linear_cross_entropy(**p, reduction="none")
    truth = F.cross_entropy(
        (p["e"] @ p["c"].T).flatten(0, 1), p["targets"].flatten(), reduction="none"
    )
    assert torch.equal(ours.flatten().isfinite(), truth.isfinite())
    mine, theirs = (torch.autograd.grad(x.sum(), leaves) for x in (ours, truth))
    assert not torch.isfinite(mine[0]).all()
    assert torch.equal(mine[0].isfinite().all(-1), theirs[0].isfinite().all(-1))


def test_like_any_loss() -> None:
    """Backward twice, in-place arithmetic on the loss, no_grad, inference_mode."""
    p = problem()
    e, c = p["e"].requires_grad_(), p["c"].requires_grad_()
    loss = linear_cross_entropy(**p)
    first = torch.autograd.grad(loss, (e, c), retain_graph=True)
    second = torch.autograd.grad(loss, (e, c))
    assert all(torch.equal(x, y) for x, y in zip(first, second, strict=True))
    for reduction in ("mean", "sum", "none"):
        loss = linear_cross_entropy(**p, reduction=reduction)
        assert not loss._is_view()
        loss *= 3
        loss += e.sum() * 0
        (gradient,) = torch.autograd.grad(loss.sum(), e)
        (plain,) = torch.autograd.grad(linear_cross_entropy(**p, reduction=reduction).sum(), e)
        torch.testing.assert_close(gradient, 3 * plain)
    for guard in (torch.no_grad(), torch.inference_mode()):
        with guard:
            torch.testing.assert_close(
                linear_cross_entropy(**p), linear_cross_entropy(**p, impl="reference")
            )


def test_only_some_inputs_require_gradients() -> None:
    names = ("e", "c", "bias", "lora_a", "lora_b")
    for wanted in itertools.product((False, True), repeat=len(names)):
        p = problem(bias=torch.randn(V), lora_a=torch.randn(R, D), lora_b=torch.randn(V, R))
        for name, want in zip(names, wanted, strict=True):
            p[name].requires_grad_(want)
        losses = [linear_cross_entropy(**p, impl=impl) for impl in ("cce", "reference")]
        leaves = [p[name] for name, want in zip(names, wanted, strict=True) if want]
        assert losses[0].requires_grad == bool(leaves)
        if leaves:
            for x, y in zip(*(torch.autograd.grad(loss, leaves) for loss in losses), strict=True):
                torch.testing.assert_close(x, y)


def test_double_backward_is_refused() -> None:
    p = problem()
    e = p["e"].requires_grad_()
    (gradient,) = torch.autograd.grad(linear_cross_entropy(**p), e, create_graph=True)
    with pytest.raises(RuntimeError, match="double backward is not supported"):
        gradient.sum().backward()
    (gradient,) = torch.autograd.grad(
        linear_cross_entropy(**p, impl="reference"), e, create_graph=True
    )
    gradient.sum().backward()


@pytest.mark.parametrize("shift", [0, 1, 2])
def test_shapes_and_metrics(shift: int) -> None:
    p = problem()
    p["targets"][0, 3] = -100
    loss, lse, metrics = linear_cross_entropy(
        **p, shift=shift, reduction="none", return_lse=True, return_metrics=True
    )
    z = (p["e"] @ p["c"].T)[:, : N - shift]
    t = p["targets"][:, shift:]
    valid = t != -100
    assert loss.shape == lse.shape == t.shape
    torch.testing.assert_close(lse, torch.where(valid, z.logsumexp(-1), 0))
    logp = z.log_softmax(-1)
    torch.testing.assert_close(
        metrics.logprob, torch.where(valid, logp.gather(-1, t.clamp(min=0)[..., None])[..., 0], 0)
    )
    torch.testing.assert_close(metrics.entropy, torch.where(valid, -(logp.exp() * logp).sum(-1), 0))
    assert torch.equal(metrics.argmax, torch.where(valid, z.argmax(-1), -1))
    assert torch.equal(metrics.correct, valid & (z.argmax(-1) == t))
    assert not any(m.requires_grad for m in metrics)


def test_num_items() -> None:
    p = problem()
    total = linear_cross_entropy(**p, reduction="sum")
    torch.testing.assert_close(linear_cross_entropy(**p, num_items=7), total / 7)
    torch.testing.assert_close(linear_cross_entropy(**p, num_items=torch.tensor(7)), total / 7)


@pytest.mark.parametrize("impl", list(LinearCrossEntropyImpl))
def test_every_implementation_gives_the_same_loss(impl: LinearCrossEntropyImpl) -> None:
    device = "cpu"
    if impl is LinearCrossEntropyImpl.TRITON:
        pytest.importorskip("triton")
        if torch.cuda.is_available():  # else it is interpreted
            device = "cuda"
    p = {name: x.to(device) for name, x in problem().items()}
    e = p["e"].requires_grad_()
    truth = linear_cross_entropy(**p, impl="reference", softcap=4.0)
    expected = torch.autograd.grad(truth, e)
    for name in (impl, impl.name.lower()):
        loss = linear_cross_entropy(
            **p, impl=name, softcap=4.0, accum_e_fp32=True, accum_c_fp32=True
        )
        torch.testing.assert_close(loss, truth)
        torch.testing.assert_close(torch.autograd.grad(loss, e), expected)


def test_presets_say_what_may_be_filtered() -> None:
    p = problem()
    expected = {
        "cce": (2.0**-15, True, True),  # float32: as float16
        "cce_exact": (None, False, False),
        "cce_kahan": (2.0**-15, True, True),
        "cce_kahan_full": (None, False, False),
        "cce_kahan_full_c": (2.0**-15, True, False),
        "cce_kahan_full_e": (2.0**-15, False, True),
        "cce_kahan_full_c_full_e": (None, False, False),
    }
    for impl, filters in expected.items():
        linear_cross_entropy(**p, impl=impl)
        assert tuple(cce_ext.diagnostics()["filter"]) == filters, impl
    linear_cross_entropy(**p, filter_eps=0.25, filter_c_grad=False)
    assert tuple(cce_ext.diagnostics()["filter"]) == (0.25, True, False)


def test_module_and_z_loss() -> None:
    p = problem()
    p["targets"][0] = -100
    module = LinearCrossEntropy(shift=1, return_lse=True, reduction="sum")
    loss, lse = module(p["e"], p["c"], p["targets"])
    torch.testing.assert_close(loss, linear_cross_entropy(**p, shift=1, reduction="sum"))
    assert "shift=1" in repr(module)
    valid = p["targets"][:, 1:] != -100
    expected = lse[valid].square()
    for reduction, value in (("mean", expected.mean()), ("sum", expected.sum())):
        torch.testing.assert_close(
            compute_z_loss(lse, p["targets"], shift=1, reduction=reduction), value
        )
    assert compute_z_loss(lse, torch.full((2, N), -100), shift=True) == 0
    with pytest.raises(ValueError, match="targets must have lse's shape"):
        compute_z_loss(lse, p["targets"])


@pytest.mark.parametrize("adapter", [False, True])
def test_autocast(adapter: bool) -> None:
    p = problem()
    if adapter:
        p |= {"lora_a": torch.randn(R, D), "lora_b": torch.randn(V, R)}
    names = [name for name in p if name != "targets"]
    for name in names:
        p[name].requires_grad_()
    exact = linear_cross_entropy(**p)
    with torch.autocast("cpu", torch.bfloat16):
        loss = linear_cross_entropy(**p)
    torch.testing.assert_close(loss, exact, rtol=2e-2, atol=2e-2)
    for gradient in torch.autograd.grad(loss, [p[name] for name in names]):
        assert gradient.dtype == torch.float32


def test_checkpointing() -> None:
    from torch.utils.checkpoint import checkpoint

    p = problem()
    e = p["e"].requires_grad_()
    loss = checkpoint(
        lambda x: linear_cross_entropy(x, p["c"], p["targets"]), e, use_reentrant=False
    )
    (gradient,) = torch.autograd.grad(loss, e)
    torch.testing.assert_close(gradient, torch.autograd.grad(linear_cross_entropy(**p), e)[0])


@pytest.fixture
def one_rank(tmp_path: Any) -> Any:
    torch.distributed.init_process_group(
        "gloo", init_method=f"file://{tmp_path}/store", rank=0, world_size=1
    )
    yield
    torch.distributed.destroy_process_group()


def test_dtensor_and_ddp(one_rank: None) -> None:
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.tensor import Shard, distribute_tensor

    p = problem()
    sharded = distribute_tensor(p["c"], init_device_mesh("cpu", (1,)), [Shard(0)])
    with pytest.raises(TypeError, match="c is a torch.distributed.tensor.DTensor.*to_local"):
        linear_cross_entropy(p["e"], sharded, p["targets"])

    class Model(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.head = torch.nn.Linear(D, V)

        def forward(self, e: Tensor, t: Tensor) -> Tensor:
            return linear_cross_entropy(e, self.head, t)

    model = torch.nn.parallel.DistributedDataParallel(Model())
    model(p["e"], p["targets"]).backward()
    assert model.module.head.weight.grad.norm() > 0


class TestDevices:
    """Which path a device takes, without having the device."""

    @pytest.fixture(autouse=True)
    def fresh(self) -> Any:
        paths._find_reason.cache_clear()
        yield
        paths._find_reason.cache_clear()

    def test_cuda_tensors_in_a_cpu_build(self, monkeypatch: pytest.MonkeyPatch) -> None:
        table = [
            cce_ext.Backend("cpu", True, True, ""),
            cce_ext.Backend("sm80", False, False, "sm80 kernels are not compiled in"),
        ]
        monkeypatch.setattr(paths.info, "backends", lambda: table)
        with pytest.raises(
            RuntimeError, match="(?s)no CUDA kernels.*sm80 kernels are not.*Reinstall"
        ):
            paths._find_reason(torch.device("cuda", 0), torch.bfloat16)

    def test_gpus_older_than_ampere_take_the_blocked_path(
        self, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        table = [cce_ext.Backend("sm80", True, True, "")]
        monkeypatch.setattr(paths.info, "backends", lambda: table)
        monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (7, 5))
        reason = paths._find_reason(torch.device("cuda", 0), torch.float16)
        assert "compute capability 8.0" in reason
        assert "7.5" in reason

    def test_dtypes_without_kernels(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(
            paths.info, "backends", lambda: [cce_ext.Backend("sm80", True, True, "")]
        )
        monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (9, 0))
        assert paths._find_reason(torch.device("cuda", 0), torch.bfloat16) == ""
        assert "float32" in paths._find_reason(torch.device("cuda", 0), torch.float32)
        assert "mps" in paths._find_reason(torch.device("mps"), torch.float32)
