"""Output layers given as modules: nn.Linear and PEFT's, against the module's own forward and stored logits."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from cce_ext import diagnostics, dora, linear_cross_entropy

peft = pytest.importorskip("peft")
N, D, V, R = 20, 12, 37, 4


class Model(nn.Module):
    """Just a head, where PEFT can find it by name."""

    def __init__(self, bias: bool, dtype: torch.dtype) -> None:
        super().__init__()
        self.lm_head = nn.Linear(D, V, bias=bias, dtype=dtype)


def lora_model(
    bias: bool = False, dtype: torch.dtype = torch.float64, **config: object
) -> nn.Module:
    """A PEFT model with an adapter on the head whose B is not zero."""
    torch.manual_seed(0)
    options = {"r": R, "lora_alpha": 8, "target_modules": ["lm_head"]} | config
    model = peft.get_peft_model(Model(bias, dtype), peft.LoraConfig(**options))
    return randomised(model, dtype)


def randomised(model: nn.Module, dtype: torch.dtype) -> nn.Module:
    for name, parameter in model.named_parameters():
        if "lora_" in name:
            parameter.data = torch.randn_like(parameter.data)
            if dtype == torch.float64:
                parameter.data = parameter.data.double()
    return model


def head_of(model: nn.Module) -> nn.Module:
    return model.base_model.model.lm_head


def data(dtype: torch.dtype = torch.float64) -> tuple[Tensor, Tensor]:
    g = torch.Generator().manual_seed(1)
    targets = torch.randint(V, (N,), generator=g)
    targets[3] = -100
    return torch.randn(N, D, generator=g).to(dtype).requires_grad_(), targets


def check(
    head: nn.Module, path: str = "compiled", rtol: float = 1e-9, dtype: torch.dtype = torch.float64
) -> None:
    """Loss and every gradient against the module's own forward."""
    e, targets = data(dtype)
    leaves = [e, *(p for p in head.parameters() if p.requires_grad)]
    loss = linear_cross_entropy(e, head, targets)
    truth = F.cross_entropy(head(e).to(loss.dtype), targets)
    torch.testing.assert_close(loss, truth, rtol=rtol, atol=rtol)
    assert diagnostics()["path"] == path
    mine = torch.autograd.grad(loss, leaves, allow_unused=True)
    theirs = torch.autograd.grad(truth, leaves, allow_unused=True)
    for x, y in zip(mine, theirs, strict=True):
        assert (x is None) == (y is None)
        if x is not None:
            assert x.dtype == y.dtype
            torch.testing.assert_close(x, y, rtol=10 * rtol, atol=rtol)
    frozen = [p for p in head.parameters() if not p.requires_grad]
    assert all(p.grad is None for p in frozen)


@pytest.mark.parametrize("bias", [False, True])
def test_linear(bias: bool) -> None:
    check(nn.Linear(D, V, bias=bias, dtype=torch.float64))


@pytest.mark.parametrize("bias", [False, True])
def test_lora(bias: bool) -> None:
    head = head_of(lora_model(bias))
    e, targets = data()
    check(head)
    # Without the adapter the loss is another one: the frozen base was not silently used.
    base = linear_cross_entropy(e, head.base_layer, targets)
    assert (linear_cross_entropy(e, head, targets) - base).abs() > 0.1


@pytest.mark.parametrize("use_rslora", [False, True])
def test_float32_adapter_on_a_bfloat16_base(use_rslora: bool) -> None:
    head = head_of(lora_model(dtype=torch.bfloat16, use_rslora=use_rslora))
    assert head.lora_A["default"].weight.dtype == torch.float32
    check(head, rtol=2e-2, dtype=torch.bfloat16)


def test_several_adapters() -> None:
    model = lora_model()
    model.add_adapter("second", peft.LoraConfig(r=2, lora_alpha=3, target_modules=["lm_head"]))
    randomised(model, torch.float64)
    model.base_model.set_adapter(["default", "second"])
    check(head_of(model))
    assert diagnostics()["shape"] == (N, V, D, R + 2)


def test_bias_of_an_adapter() -> None:
    check(head_of(lora_model(True, lora_bias=True)))


def test_merged_and_disabled() -> None:
    model = lora_model()
    e, targets = data()
    head = head_of(model)
    active = linear_cross_entropy(e, head, targets)
    with model.disable_adapter():
        disabled = linear_cross_entropy(e, head, targets)
        torch.testing.assert_close(disabled, F.cross_entropy(head(e), targets))
    assert (active - disabled).abs() > 0.1
    model.merge_adapter()
    torch.testing.assert_close(linear_cross_entropy(e, head, targets), active)


def test_active_dropout_is_fused() -> None:
    head = head_of(lora_model(lora_dropout=0.5)).train()
    e, targets = data()
    torch.manual_seed(5)
    loss = linear_cross_entropy(e, head, targets)
    assert diagnostics()["path"] == "compiled"
    torch.manual_seed(5)
    torch.testing.assert_close(loss, F.cross_entropy(head(e), targets))
    check(head.eval())


def test_modules_to_save() -> None:
    config = peft.LoraConfig(r=R, target_modules=["other"], modules_to_save=["lm_head"])
    base = Model(True, torch.float64)
    base.other = nn.Linear(3, 3)
    head = peft.get_peft_model(base, config).base_model.model.lm_head
    with torch.no_grad():
        head.modules_to_save["default"].weight.mul_(2)
    check(head)


@pytest.mark.parametrize("bias", [False, True])
def test_dora(bias: bool) -> None:
    """Rows in several blocks, lengths that are not those of the weight."""
    head = head_of(lora_model(bias, use_dora=True, use_rslora=True))
    magnitude = head.lora_magnitude_vector["default"].weight
    magnitude.data = magnitude.data.double() * torch.linspace(0.5, 2, V, dtype=torch.float64)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(dora, "_ROWS", 16)
        check(head)
        head.base_layer.weight.requires_grad_()
        check(head)
    assert diagnostics()["shape"] == (N, V, D, R)
    e, targets = data()
    with pytest.raises(ValueError, match="DoRA"):
        linear_cross_entropy(e, head, targets, lora_a=torch.ones(1, D), lora_b=torch.ones(V, 1))


def test_dora_on_a_bfloat16_base() -> None:
    check(head_of(lora_model(dtype=torch.bfloat16, use_dora=True)), rtol=2e-2, dtype=torch.bfloat16)


def test_what_cannot_be_fused_is_called() -> None:
    model = lora_model(use_dora=True, lora_dropout=0.5).train()
    e, targets = data()
    linear_cross_entropy(e, head_of(model), targets)
    assert "DoRA" in diagnostics()["reason"]
    check(head_of(model.eval()))
    model.add_adapter("second", peft.LoraConfig(r=2, target_modules=["lm_head"]))
    model.base_model.set_adapter(["default", "second"])
    check(head_of(randomised(model, torch.float64)), path="module", rtol=1e-6)
    assert "DoRA" in diagnostics()["reason"]

    class Scaled(nn.Linear):
        def forward(self, x: Tensor) -> Tensor:
            return 2 * super().forward(x)

    check(Scaled(D, V, dtype=torch.float64), path="module")
    assert "forward of its own" in diagnostics()["reason"]
    check(nn.Sequential(nn.Linear(D, V, dtype=torch.float64)), path="module")
    assert "not a known kind" in diagnostics()["reason"]


def test_explicit_adapter_joins_a_module() -> None:
    head = nn.Linear(D, V, dtype=torch.float64)
    e, targets = data()
    a = torch.randn(R, D, dtype=torch.float64, requires_grad=True)
    b = torch.randn(R, V, dtype=torch.float64).T.requires_grad_()
    loss = linear_cross_entropy(e, head, targets, lora_a=a, lora_b=b, lora_scale=0.5)
    truth = F.cross_entropy(head(e) + 0.5 * (e @ a.T) @ b.T, targets)
    torch.testing.assert_close(loss, truth)
    for x, y in zip(*(torch.autograd.grad(t, (e, a, b)) for t in (loss, truth)), strict=True):
        torch.testing.assert_close(x, y)
    with pytest.raises(ValueError, match="bias must be None when c is a module"):
        linear_cross_entropy(e, head, targets, torch.zeros(V))
