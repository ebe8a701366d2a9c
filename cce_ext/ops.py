"""The custom ops as PyTorch sees them: autograd, autocast and shapes for every implementation.

An implementation is a pair of ops ``<name>_forward`` and ``<name>_backward`` with one pair of
signatures (csrc/torch/library.cpp); :func:`register_pair` gives each the same autograd formula,
autocast rule and fake kernels. ``torch.ops.cce.linear_ce`` is the public op: a composite over the
compiled pair.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from cce_ext import _load, blocked, eager, triton
from cce_ext.blocked import accumulate_dtype
from cce_ext.cuda_backward import exact_backward
from cce_ext.sparse import op as sparse

# Inputs of a forward op, in order.
_NO_DOUBLE_BACKWARD = (
    "double backward is not supported by linear_cross_entropy: its gradients are not differentiable again. "
    'Use impl="reference", which is plain PyTorch, for second derivatives.'
)

_library = torch.library.Library("cce", "FRAGMENT")


def _fake_forward(
    e, c, targets, bias, u, lora_b, ignore_index, softcap, logit_scale, label_smoothing, *rest
):
    metrics = rest[-1]
    n = targets.shape[0]
    acc = accumulate_dtype(e)

    def row(wanted: bool, dtype: torch.dtype = acc) -> Tensor:
        return e.new_empty(n if wanted else 0, dtype=dtype)

    return (
        row(True),
        row(True),
        row(True),
        row(label_smoothing > 0),
        row(metrics),
        row(metrics, torch.int64),
        row(metrics),
    )


def _fake_backward(dnll, dlse, e, c, targets, lse, bias, u, lora_b, *rest):
    def like(t: Tensor | None, wanted: bool) -> Tensor:
        if t is None:
            return e.new_empty(0, dtype=torch.float32)
        return t.new_empty(t.shape if wanted else (0,))

    return tuple(like(t, w) for t, w in zip((e, c, bias, u, lora_b), rest[-5:], strict=True))


def _setup_context(ctx: Any, inputs: tuple, output: tuple) -> None:
    e, c, targets, bias, u, lora_b, *options, _ = inputs
    nll, lse, *others = output
    ctx.save_for_backward(e, c, targets, bias, u, lora_b, lse)
    ctx.options = options
    ctx.set_materialize_grads(False)
    ctx.mark_non_differentiable(*others)


def _refuse_double_backward(ctx: Any, *_: Tensor | None) -> tuple:
    raise RuntimeError(_NO_DOUBLE_BACKWARD)


_OPTIONS = "int ignore_index, float softcap, float logit_scale, float label_smoothing, int vocab_start, int vocab_total"
_FORWARD_SIGNATURE = (
    f"(Tensor e, Tensor c, Tensor targets, Tensor? bias, Tensor? u, Tensor? lora_b, {_OPTIONS}, bool metrics) -> "
    "(Tensor nll, Tensor lse, Tensor target_logit, Tensor logit_sum, Tensor max_logit, Tensor argmax, Tensor entropy)"
)
_BACKWARD_SIGNATURE = (
    "(Tensor? dnll, Tensor? dlse, Tensor e, Tensor c, Tensor targets, Tensor lse, Tensor? bias, Tensor? u, "
    f"Tensor? lora_b, {_OPTIONS}, bool need_e, bool need_c, bool need_bias, bool need_u, bool need_lora_b) -> "
    "(Tensor de, Tensor dc, Tensor dbias, Tensor du, Tensor dlora_b)"
)


def define_pair(name: str, forward: Callable[..., tuple], backward: Callable[..., tuple]) -> None:
    """Defines an implementation that is written in Python, for every device, and registers it."""
    for suffix, signature, kernel in (
        ("forward", _FORWARD_SIGNATURE, forward),
        ("backward", _BACKWARD_SIGNATURE, backward),
    ):
        _library.define(f"{name}_{suffix}{signature}")
        _library.impl(f"{name}_{suffix}", kernel, "CompositeExplicitAutograd")
    register_pair(name)


def register_pair(name: str) -> None:
    """Registers autograd, autocast, fake kernels and the direct way for ``cce::<name>_forward`` and
    ``cce::<name>_backward``."""
    forward, backward = f"cce::{name}_forward", f"cce::{name}_backward"
    backward_op = getattr(torch.ops.cce, f"{name}_backward").default
    torch.library.register_fake(forward, _fake_forward, lib=_library)
    torch.library.register_fake(backward, _fake_backward, lib=_library)
    formula = eager.formula(backward_op, backward_op)
    torch.library.register_autograd(forward, formula, setup_context=_setup_context, lib=_library)
    torch.library.register_autograd(
        backward,
        _refuse_double_backward,
        setup_context=lambda ctx, inputs, output: None,
        lib=_library,
    )
    forward_op = getattr(torch.ops.cce, f"{name}_forward").default
    for device, key in eager.AUTOCAST_KEYS.items():
        _library.impl(f"{name}_forward", eager.with_autocast(forward_op, device), key)
    eager.register(name, forward_op, _setup_context, formula)


def linear_ce(
    e: Tensor,
    c: Tensor,
    targets: Tensor,
    bias: Tensor | None = None,
    u: Tensor | None = None,
    lora_b: Tensor | None = None,
    *,
    ignore_index: int = -100,
    softcap: float = 0.0,
    logit_scale: float = 1.0,
    label_smoothing: float = 0.0,
) -> tuple[Tensor, Tensor]:
    """``torch.ops.cce.linear_ce``: per-token negative log-likelihood and logsumexp, without storing
    logits.

    Shapes: e (..., D), c (V, D), targets (...) integers, bias (V,), u (..., R) = lora_scale * e @
    lora_a.T, lora_b (V, R). Returns nll and lse in targets' shape, float32 (float64 for float64
    inputs); zeros where targets == ignore_index.
    """
    nll, lse, *_ = torch.ops.cce.linear_ce_forward(
        e.reshape(-1, e.shape[-1]),
        c,
        targets.reshape(-1),
        bias,
        None if u is None else u.reshape(-1, u.shape[-1]),
        lora_b,
        ignore_index,
        softcap,
        logit_scale,
        label_smoothing,
        0,
        0,
        False,
    )
    return nll.view(targets.shape), lse.view(targets.shape)


def register() -> None:
    """Loads the compiled library and registers everything about its ops that is written in Python.
    Call once."""
    _load.load()
    _library.impl("linear_ce", linear_ce, "CompositeImplicitAutograd")
    if torch._C._dispatch_has_kernel_for_dispatch_key("cce::linear_ce_forward", "CUDA"):
        _library.impl("linear_ce_backward", exact_backward, "CUDA")
    register_pair("linear_ce")
    sparse.register(_library, _fake_forward, _fake_backward, _refuse_double_backward)
    define_pair("blocked_ce", blocked.forward, blocked.backward)
    define_pair("triton_ce", triton.forward, triton.backward)
