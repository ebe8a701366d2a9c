"""``cce::sparse_ce_forward`` and ``cce::sparse_ce_backward`` as PyTorch sees them, and which calls
they serve."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from cce_ext import eager
from cce_ext.options import LossOptions
from cce_ext.sparse import shard
from cce_ext.sparse.backward import backward, gradients
from cce_ext.sparse.forward import Lists, fake_lists, forward, kept_capacity, prepare

#: vocabularies up to this size are always exact: their matmuls are cheap, their softmax dense
SMALL_VOCAB = 16384
#: so are shards of a larger one up to this size: their matmuls are cheap, their softmax is not dense
SMALL_SHARD = 8192
_OPTIONS = "int ignore_index, float softcap, float logit_scale, float label_smoothing, int vocab_start, int vocab_total"
_FILTER = "float eps, bool e_grad, bool c_grad"
_LISTS = ", ".join(f"Tensor {name}" for name in Lists._fields)
_FORWARD = (
    f"sparse_ce_forward(Tensor e, Tensor c, Tensor targets, Tensor? bias, Tensor? u, Tensor? lora_b, {_OPTIONS}, "
    f"bool metrics, {_FILTER}) -> (Tensor nll, Tensor lse, Tensor target_logit, Tensor logit_sum, "
    f"Tensor max_logit, Tensor argmax, Tensor entropy, {_LISTS})"
)
_BACKWARD = (
    "sparse_ce_backward(Tensor? dnll, Tensor? dlse, Tensor e, Tensor c, Tensor targets, Tensor lse, Tensor? bias, "
    f"Tensor? u, Tensor? lora_b, Tensor[] lists, Tensor? dropped_share, {_OPTIONS}, {_FILTER}, bool need_e, "
    "bool need_c, bool need_bias, bool need_u, bool need_lora_b) -> (Tensor de, Tensor dc, Tensor dbias, Tensor du, "
    "Tensor dlora_b)"
)


def refusal(c: Tensor, n: int, options: LossOptions, eps: float | None) -> str:
    """Why a call takes the exact backward, or '' where it is sparse. eps None: no filter."""
    return common_refusal(c.shape[0], n, options, eps) or _refusal_of_c(c, n, eps)


def shard_refusal(c: Tensor, n: int, eps: float) -> str:
    """Why one shard of a vocabulary, which `common_refusal` does not refuse, is exact, or ''."""
    if c.shape[0] <= SMALL_SHARD:
        return f"a shard of at most {SMALL_SHARD} ids is always exact"
    return _refusal_of_c(c, n, eps)


def common_refusal(vocab: int, n: int, options: LossOptions, eps: float | None) -> str:
    """Why no rank of a sharded call is sparse, or ''. vocab: ids in all."""
    if eps is None:
        return "no filter was asked for"
    if vocab <= SMALL_VOCAB:
        return f"a vocabulary of at most {SMALL_VOCAB} ids is always exact"
    if options.label_smoothing and options.softcap:
        return "label smoothing under a softcap is always exact"
    if eps < 2.0**-24:
        return "a threshold below 2^-24 is exact"
    if n == 0:
        return "there are no rows"
    return ""


def _refusal_of_c(c: Tensor, n: int, eps: float) -> str:
    vocab = c.shape[0]
    if c.stride(1) != 1 or c.stride(0) % 8 or c.shape[1] % 8 or c.stride(0) < c.shape[1]:
        return "the rows of c do not lie one after another at multiples of 16 bytes"
    # A row block counts its candidates, up to 128 a vocabulary entry, in 32 bits.
    if vocab >= 2**24 or kept_capacity(n, vocab, eps) >= 2**31:
        return "the lists would be too long"
    return ""


def _forward_cuda(*args: Any) -> tuple[Tensor, ...]:
    *call, metrics, eps, _, _ = args  # which gradients may be sparse matters to the backward alone
    return forward(prepare(*call), metrics, eps)


def _fake_forward(dense: Callable[..., tuple]) -> Callable[..., tuple]:
    def fake(*args: Any) -> tuple:
        *shared, eps, _, _ = args
        e, n, v = args[0], args[0].shape[0], args[1].shape[0]
        return (*dense(*shared), *fake_lists(e, n, v, kept_capacity(n, v, eps)))

    return fake


def _setup_context(ctx: Any, inputs: tuple, output: tuple) -> None:
    e, c, targets, bias, u, lora_b, *rest = inputs
    *options, _, eps, e_grad, c_grad = rest
    lse, others = output[1], output[2:]
    ctx.save_for_backward(e, c, targets, bias, u, lora_b, lse, *output[-len(Lists._fields) :])
    ctx.options = (*options, eps, e_grad, c_grad)
    ctx.set_materialize_grads(False)
    ctx.mark_non_differentiable(*others)


def register(
    library: torch.library.Library,
    fake_forward: Callable[..., tuple],
    fake_backward: Callable[..., tuple],
    refuse_double: Callable[..., tuple],
) -> None:
    """Defines the pair in `library`; fake_forward, fake_backward: shapes of ``linear_ce``'s."""
    shard.register(library, fake_forward)
    library.define(_FORWARD)
    library.define(_BACKWARD)
    library.impl("sparse_ce_forward", _forward_cuda, "CUDA")
    library.impl("sparse_ce_backward", backward, "CUDA")
    names = ("cce::sparse_ce_forward", "cce::sparse_ce_backward")
    torch.library.register_fake(names[0], _fake_forward(fake_forward), lib=library)
    torch.library.register_fake(names[1], fake_backward, lib=library)
    forward_op, backward_op = (
        getattr(torch.ops.cce, f"sparse_ce_{half}").default for half in ("forward", "backward")
    )
    formula = eager.formula(backward_op, gradients)
    torch.library.register_autograd(names[0], formula, setup_context=_setup_context, lib=library)
    torch.library.register_autograd(
        names[1], refuse_double, setup_context=lambda ctx, inputs, output: None, lib=library
    )
    library.impl(
        "sparse_ce_forward", eager.with_autocast(forward_op, "cuda"), eager.AUTOCAST_KEYS["cuda"]
    )
    eager.register("sparse_ce", _forward_cuda, _setup_context, formula)
