"""Properties that hold whatever the numbers are, searched by hypothesis."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from cce_ext import linear_cross_entropy

DEVICES = ["cpu"] + (["cuda"] if torch.cuda.is_available() else [])
problems = st.fixed_dictionaries(
    {
        "n": st.integers(1, 40),
        "v": st.integers(2, 300),
        "d": st.integers(1, 24),
        "seed": st.integers(0, 2**31 - 1),
        "softcap": st.sampled_from([None, 3.0, 30.0]),
        "smoothing": st.sampled_from([0.0, 0.2]),
    }
)
search = settings(max_examples=40, deadline=None, derandomize=True)


def make(p: dict, device: str) -> tuple[torch.Tensor, ...]:
    g = torch.Generator().manual_seed(p["seed"])
    dtype = torch.float64 if device == "cpu" else torch.bfloat16
    e = torch.randn(p["n"], p["d"], generator=g).to(device, dtype).requires_grad_()
    c = torch.randn(p["v"], p["d"], generator=g).to(device, dtype).requires_grad_()
    bias = (
        torch.randn(p["v"], generator=g)
        .to(device, torch.float32 if device == "cuda" else dtype)
        .requires_grad_()
    )
    return e, c, torch.randint(p["v"], (p["n"],), generator=g).to(device), bias


def tolerance(device: str) -> dict[str, float]:
    return {"rtol": 1e-9, "atol": 1e-9} if device == "cpu" else {"rtol": 2e-2, "atol": 2e-3}


@pytest.mark.parametrize("device", DEVICES)
@search
@given(p=problems, offset=st.floats(-20, 20))
def test_a_constant_in_the_bias_changes_nothing(device: str, p: dict, offset: float) -> None:
    e, c, t, bias = make(p, device)
    first = linear_cross_entropy(e, c, t, bias, label_smoothing=p["smoothing"], reduction="none")
    second = linear_cross_entropy(
        e, c, t, bias + offset, label_smoothing=p["smoothing"], reduction="none"
    )
    torch.testing.assert_close(
        first, second, **(tolerance(device) | {"atol": 1e-4 if device == "cuda" else 1e-9})
    )


@pytest.mark.parametrize("device", DEVICES)
@search
@given(p=problems)
def test_permuting_the_vocabulary_permutes_the_classifier_gradient(device: str, p: dict) -> None:
    e, c, t, bias = make(p, device)
    order = torch.randperm(p["v"], generator=torch.Generator().manual_seed(p["seed"])).to(device)
    place = torch.empty_like(order)
    place[order] = torch.arange(p["v"], device=device)
    options = dict(softcap=p["softcap"], label_smoothing=p["smoothing"], filter_eps=None)
    de, dc, db = torch.autograd.grad(linear_cross_entropy(e, c, t, bias, **options), (e, c, bias))
    permuted = linear_cross_entropy(e, c[order], place[t], bias[order], **options)
    de2, dc2, db2 = torch.autograd.grad(permuted, (e, c, bias))
    for x, y in ((de, de2), (dc, dc2), (db, db2)):
        torch.testing.assert_close(x, y, **tolerance(device))


@pytest.mark.parametrize("device", DEVICES)
@search
@given(p=problems, row=st.integers(0, 39))
def test_rows_are_independent(device: str, p: dict, row: int) -> None:
    e, c, t, bias = make(p, device)
    row %= p["n"]
    options = dict(softcap=p["softcap"], label_smoothing=p["smoothing"], reduction="none")
    whole = linear_cross_entropy(e, c, t, bias, **options)
    alone = linear_cross_entropy(e[row : row + 1], c, t[row : row + 1], bias, **options)
    torch.testing.assert_close(whole[row : row + 1], alone, rtol=1e-5, atol=1e-5)
    (de,) = torch.autograd.grad(whole[row], e)
    others = torch.arange(p["n"], device=device) != row
    assert (de[others] == 0).all()


@pytest.mark.parametrize("device", DEVICES)
@search
@given(p=problems)
def test_logit_gradients_of_a_row_sum_to_zero(device: str, p: dict) -> None:
    """Without a softcap the gradient by the bias, which is the sum over rows of that by the logits,
    sums to nothing."""
    e, c, t, bias = make(p, device)
    loss = linear_cross_entropy(
        e, c, t, bias, label_smoothing=p["smoothing"], reduction="sum", filter_eps=None
    )
    (db,) = torch.autograd.grad(loss, bias)
    assert abs(db.sum().item()) <= (1e-9 if device == "cpu" else 1e-2) * p["n"]
