"""LinearCrossEntropyHead in one process: its loss, its logits and its parameters."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from cce_ext import LinearCrossEntropyHead, linear_cross_entropy

N, V, D, R = 7, 19, 6, 2
OPTIONS: list[dict[str, Any]] = [
    {},
    {"bias": True, "softcap": 3.0, "logit_scale": 0.5, "reduction": "sum"},
    {"bias": True, "rank": R, "lora_scale": 2.0, "label_smoothing": 0.1},
]


@pytest.mark.parametrize("options", OPTIONS, ids=["plain", "softcap", "lora"])
def test_loss_and_logits(options: dict[str, Any]) -> None:
    torch.manual_seed(0)
    head = LinearCrossEntropyHead(D, V, **options)
    if "rank" in options:
        assert not head.lora_b.any()  # the update starts at nothing
        nn.init.normal_(head.lora_b)
    e, targets = torch.randn(2, N, D, requires_grad=True), torch.randint(V, (2, N))
    z = head(e)
    assert z.shape == (2, N, V)
    expected = F.cross_entropy(
        z.flatten(0, 1),
        targets.flatten(),
        reduction=options.get("reduction", "mean"),
        label_smoothing=options.get("label_smoothing", 0.0),
    )
    torch.testing.assert_close(head(e, targets), expected)
    if options.get("reduction") != "sum":
        torch.testing.assert_close(head(e, targets, 5), expected * (2 * N / 5))
    head(e, targets).backward()
    trained = {name for name, p in head.named_parameters() if p.requires_grad}
    assert trained == (
        {"lora_a", "lora_b"} if "rank" in options else {*head._parameters} - absent(head)
    )
    assert all(p.grad is not None for p in head.parameters() if p.requires_grad)


def absent(head: nn.Module) -> set[str]:
    return {name for name, p in head._parameters.items() if p is None}


@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("rank", [0, R])
def test_from_linear(bias: bool, rank: int) -> None:
    linear = nn.Linear(D, V, bias, dtype=torch.float64)
    e, targets = torch.randn(N, D, dtype=torch.float64), torch.randint(V, (N,))
    expected = linear_cross_entropy(e, linear, targets, softcap=4.0)
    head = LinearCrossEntropyHead.from_linear(linear, rank=rank, softcap=4.0)
    assert head.weight is linear.weight
    assert head.bias is linear.bias
    assert linear.weight.requires_grad == (rank == 0)
    assert all(p.dtype == torch.float64 and not p.is_meta for p in head.parameters())
    torch.testing.assert_close(head(e, targets), expected)
    assert f"in_features={D}, out_features={V}, rank={rank}" in repr(head)
