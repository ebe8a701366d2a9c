"""One training step of a transformers model, and how two of them are compared."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

Outcome = tuple[Tensor, dict[str, Tensor]]


def outcome(model: nn.Module, **inputs: Any) -> Outcome:
    """Loss and the gradient of every parameter that has one."""
    model.zero_grad(set_to_none=True)
    torch.manual_seed(3)
    loss = model(**inputs).loss
    loss.backward()
    gradients = {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}
    return loss.detach(), gradients


def assert_same(mine: Outcome, theirs: Outcome, tolerance: float = 1e-5) -> None:
    """Gradients are compared on the scale of each parameter's largest entry."""
    torch.testing.assert_close(mine[0], theirs[0], rtol=tolerance, atol=tolerance)
    assert mine[1].keys() == theirs[1].keys()
    largest = max(x.abs().max().item() for x in theirs[1].values() if x.numel())
    for name, gradient in theirs[1].items():
        if gradient.numel():
            atol = tolerance * (10 * gradient.abs().max().item() + largest)
            torch.testing.assert_close(
                mine[1][name], gradient, rtol=0, atol=atol, msg=lambda m, n=name: f"{n}: {m}"
            )


def is_fused(model: nn.Module, **inputs: Any) -> bool:
    """Whether a call gives a loss and no logits."""
    logits = model(**inputs).logits
    assert type(logits) is Tensor
    return logits.shape[-2] == 0
