"""linear_cross_entropy: checks, choice of a path, reductions. The work is in the ops."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from cce_ext import checks, eager
from cce_ext.compiled import run_as
from cce_ext.constants import IGNORE_INDEX
from cce_ext.diagnostics import record
from cce_ext.distributed.agreement import agree
from cce_ext.distributed.dtensor import local_arguments, local_head
from cce_ext.distributed.vocab_parallel import (
    VocabParallelOptions,
    reduce_gradient,
    shard_kernels,
    sharded_loss,
    stored_loss,
)
from cce_ext.dora import apply_magnitude
from cce_ext.heads import Adapter, Head, low_rank_update, resolve_head
from cce_ext.options import (
    LinearCrossEntropyImpl,
    LossOptions,
    implementation_name,
    resolve_filter,
)
from cce_ext.paths import STORES_LOGITS, choose_pair, compute_dtype
from cce_ext.reference import (
    RowStatistics,
    finish_logits,
    shard_statistics,
    statistics,
    statistics_of_logits,
)
from cce_ext.sparse.forward import Lists
from cce_ext.sparse.op import refusal


class TokenMetrics(NamedTuple):
    """Per-token facts, without gradient, in the shape of the unreduced loss.

    logprob: log-probability of the target (float); argmax: most likely token (int64, -1 at ignored
    tokens); correct: argmax is the target (bool); entropy: of the predicted distribution, in nats.
    Zeros at ignored tokens.
    """

    logprob: Tensor
    argmax: Tensor
    correct: Tensor
    entropy: Tensor


def linear_cross_entropy(
    e: Tensor,
    c: Tensor | nn.Module,
    targets: Tensor,
    bias: Tensor | None = None,
    ignore_index: int = IGNORE_INDEX,
    softcap: float | None = None,
    reduction: str = "mean",
    shift: bool | int = 0,
    return_lse: bool = False,
    filter_eps: float | str | None = "auto",
    accum_e_fp32: bool = False,
    accum_c_fp32: bool = False,
    filter_e_grad: bool = True,
    filter_c_grad: bool = True,
    impl: str | LinearCrossEntropyImpl = "cce",
    vocab_parallel_options: VocabParallelOptions | None = None,
    *,
    lora_a: Tensor | None = None,
    lora_b: Tensor | None = None,
    lora_scale: float = 1.0,
    logit_scale: float = 1.0,
    label_smoothing: float = 0.0,
    num_items: int | Tensor | None = None,
    return_metrics: bool = False,
) -> Tensor | tuple:
    """Cross-entropy of a linear output layer, without ever storing its logits.

    Computes ``F.cross_entropy(softcap(logit_scale * (e @ c.T + lora_scale * (e @ lora_a.T) @
    lora_b.T + bias)), targets)`` and its gradients. Method: cut cross-entropy (Wijmans et al.,
    arXiv 2411.09009); the low-rank head is a longer inner dimension, [E, U] [C, B]ᵀ with U =
    lora_scale * E Aᵀ.

    Args:
        e: hidden states (..., D); float64, float32, bfloat16 or float16.
        c: classifier (V, D) in e's dtype, **or the output layer itself**: an nn.Linear, a PEFT LoRA
            layer (its adapters are fused and trained) or a ModulesToSaveWrapper. Do not pass
            ``.weight`` of a PEFT layer: that is the frozen base.
        targets: token ids (...), integers in [0, V) or ignore_index.
        bias: (V,), any floating dtype.
        ignore_index: target value of tokens that do not count; they cost no matmul and get exactly
            zero gradients.
        softcap: logits become softcap * tanh(logits / softcap). None: not.
        reduction: "mean" over the tokens that count, "sum" or "none" (targets' shape, zeros at
            ignored tokens).
        shift: position i predicts the target at i + shift; True is 1. Nothing is copied for it;
            with "none" the result is shorter by shift.
        return_lse: also return the logsumexp of each token's logits, differentiable (for the
            z-loss).
        filter_eps: probability from which the backward of the compiled GPU kernels keeps an entry
            of a token's distribution: "auto" (2⁻¹³ for bfloat16; 2⁻¹⁵ for float16), "high" (2⁻¹⁵),
            a number, or None for the exact gradient. What the entries below weigh is not lost:
            their total is exact for each token and each 4608 ids, and is spread as it is in a
            sample of tokens, for the gradients of e and lora_a tilted by the token's own logits
            (cce_ext/sparse). Exact all the same: every other device and implementation;
            vocabularies of up to 16384 ids; label smoothing under a softcap; shards of up to 8192
            ids; calls whose tokens are so undecided that over a tenth of the probability would be
            dropped. ``diagnostics()`` says which it was.
        accum_e_fp32, accum_c_fp32: accepted for compatibility; sums are always float32 or better.
        filter_e_grad, filter_c_grad: whether the filter may act on the gradient of e, of c.
        impl: "cce" (default), a preset of it ("cce_exact", "cce_kahan", "cce_kahan_full",
            "cce_kahan_full_c", "cce_kahan_full_e", "cce_kahan_full_c_full_e"), "triton" (readable
            kernels to compare with, exact whatever the filter options say; not for float64),
            "torch_compile" or "reference" (both store logits).
        vocab_parallel_options: this rank holds rows [start, stop) of the classifier (and of bias
            and lora_b), as plain tensors or as DTensors that are Shard(0); every rank of the group
            must be given the same tokens (docs/distributed.md).
        lora_a: (R, D), any floating dtype and strides. lora_b: (V, R). lora_scale: factor of the
            update.
        logit_scale: factor of the logits, before the softcap.
        label_smoothing: weight of the uniform distribution in the target, in [0, 1].
        num_items: turns "mean" into sum / num_items (gradient accumulation).
        return_metrics: also return :class:`TokenMetrics`.

    Returns:
        The loss, float32 (float64 for float64 inputs); then lse and metrics if asked for. No token
        that counts: "mean" is 0 with zero gradients.

    Raises:
        TypeError, ValueError: an argument that does not fit, by name.
        IndexError: a target outside [0, V) on a CPU; on a GPU its loss is NaN instead, because a
            check would wait.
        RuntimeError: CUDA tensors and no CUDA kernels; impl="triton" where Triton cannot run;
            double backward.
    """
    checks.check_bias_type(bias)
    checks.check_reduction(reduction)
    name = implementation_name(impl)
    options = checks.check_options(ignore_index, softcap, logit_scale, label_smoothing)
    sharded = vocab_parallel_options is not None
    head = _head(e, c, targets, bias, lora_a, lora_b, lora_scale, sharded)
    weight, bias = head.weight, head.bias
    if not head.fallback:
        if head.module is not None:
            checks.check_tensors(e, weight, targets, bias)
        checks.check_dtypes(e, weight)
    shift = checks.check_shift(shift, targets)
    if vocab_parallel_options is not None:
        _check_parallel(vocab_parallel_options, weight, head, return_metrics)
    elif not head.fallback:  # a called module's logits tell its vocabulary
        checks.check_target_range(targets, weight.shape[0], ignore_index)
    if head.magnitude is not None:
        head = apply_magnitude(head)
        weight = head.weight

    shape = targets.shape
    if shift:
        targets = F.pad(targets[..., shift:], (0, shift), value=ignore_index)
    flat_targets = targets.reshape(-1)
    flat_e = e.reshape(flat_targets.shape[0], e.shape[-1])
    resolved = resolve_filter(name, filter_eps, filter_e_grad, filter_c_grad, compute_dtype(e))
    facts = dict(
        device=str(e.device),
        dtype=str(e.dtype),
        shape=(
            flat_e.shape[0],
            *(weight.shape if weight is not None else ()),
            sum(a.a.shape[0] for a in head.adapters),
        ),
        filter=resolved,
    )
    tally = None
    if vocab_parallel_options is not None:
        stats = _parallel_rows(
            name, flat_e, head, flat_targets, options, reduction, vocab_parallel_options, facts
        )
    else:
        stats, tally = _rows(name, flat_e, head, flat_targets, options, return_metrics, facts)

    def tokens(x: Tensor) -> Tensor:
        return x.reshape(shape)[..., : shape[-1] - shift] if shift else x.reshape(shape)

    loss = _reduce(stats.nll, flat_targets, ignore_index, tally, reduction, num_items, tokens)
    results: list[Any] = [loss]
    if return_lse:
        results.append(tokens(stats.lse).clone())
    if return_metrics:
        results.append(_metrics(stats, flat_targets, ignore_index, tokens))
    return results[0] if len(results) == 1 else tuple(results)


def _head(
    e: Tensor,
    c: Tensor | nn.Module,
    targets: Tensor,
    bias: Tensor | None,
    lora_a: Tensor | None,
    lora_b: Tensor | None,
    lora_scale: float,
    sharded: bool,
) -> Head:
    """``c`` as tensors, with an explicit bias and low-rank update joined to it; of a sharded head,
    this rank's. Checks the arguments where c is a tensor."""
    if sharded:
        c, bias, lora_a, lora_b = local_arguments(c, bias, lora_a, lora_b)
    if not isinstance(c, nn.Module):
        checks.check_tensors(e, c, targets, bias)
        scale = checks.check_low_rank(e, c, lora_a, lora_b, lora_scale)
        return Head(c, bias, () if lora_a is None else (Adapter(lora_a, lora_b, scale),))
    head = local_head(resolve_head(c)) if sharded else resolve_head(c)
    if bias is not None:
        raise ValueError("bias must be None when c is a module: the module's own bias is used")
    if lora_a is None and lora_b is None:
        return head
    if head.fallback or head.magnitude is not None:
        reason = head.fallback or "it is a DoRA layer"
        raise ValueError(f"lora_a and lora_b cannot be joined to this module: {reason}")
    scale = checks.check_low_rank(e, head.weight, lora_a, lora_b, lora_scale)
    return head._replace(adapters=(*head.adapters, Adapter(lora_a, lora_b, scale)))


def _rows(
    name: str,
    e: Tensor,
    head: Head,
    targets: Tensor,
    options: LossOptions,
    metrics: bool,
    facts: dict[str, Any],
) -> tuple[RowStatistics, Tensor | None]:
    """Row statistics of e (N, D) by the implementation of this name, and the tally of a sparse
    forward."""
    if head.fallback:
        record(path="module", reason=head.fallback, **facts)
        z = finish_logits(head.module(e), options)
        checks.check_target_range(targets, z.shape[-1], options.ignore_index)
        return statistics_of_logits(z, targets, options, metrics), None
    u, b = low_rank_update(e, head.adapters)
    pair, reason = choose_pair(name, e)
    inputs = (e, head.weight, targets, head.bias, u, b)
    if pair in STORES_LOGITS:
        record(path=pair, reason=reason, **facts)
        return run_as(pair, statistics)(*inputs, options, metrics), None
    if pair == "linear_ce" and e.device.type == "cuda" and eager.differentiates(inputs):
        exact = refusal(head.weight, e.shape[0], options, facts["filter"].eps)
        facts["exact"] = exact
        if not exact:
            pair = "sparse_ce"
    path = {"linear_ce": "compiled", "sparse_ce": "compiled"}
    record(path=path.get(pair, pair.removesuffix("_ce")), reason=reason, **facts)
    arguments = (*inputs, *options, 0, 0, metrics)
    known = len(RowStatistics._fields)
    if pair != "sparse_ce":
        return RowStatistics(*eager.forward(pair, *arguments)[:known]), None
    results = eager.forward(pair, *arguments, *facts["filter"])
    return RowStatistics(*results[:known]), Lists(*results[known:]).tally


def _check_parallel(
    parallel: VocabParallelOptions, weight: Tensor, head: Head, metrics: bool
) -> None:
    if weight.shape[0] != parallel.stop - parallel.start:
        raise ValueError(
            f"c must hold vocab_parallel_options' rows, {parallel.stop - parallel.start} of them "
            f"([{parallel.start}, {parallel.stop})); got {weight.shape[0]}"
        )
    if head.fallback or head.magnitude is not None:
        reason = head.fallback or "it is a DoRA layer"
        raise ValueError(f"c cannot be sharded over the vocabulary: {reason}")
    if metrics:
        raise ValueError("return_metrics does not take vocab_parallel_options")


def _parallel_rows(
    name: str,
    e: Tensor,
    head: Head,
    targets: Tensor,
    options: LossOptions,
    reduction: str,
    parallel: VocabParallelOptions,
    facts: dict[str, Any],
) -> RowStatistics:
    """nll and lse over all shards. A is replicated, B sharded like c."""
    # First: what cannot run must not keep the other ranks waiting.
    pair, reason = choose_pair(name, e)
    if parallel.check and not torch.compiler.is_compiling():
        eps = facts["filter"].eps
        total = agree(parallel, options, eps, reduction, e, head, targets)
    else:
        total = parallel.whole_vocab(e.device)
    checks.check_target_range(targets, total, options.ignore_index)
    # Before U is made of them: what reaches e and A through U is a part of this rank's, and is
    # summed with the rest. dA (R, D) is less to sum than dU (N, R).
    if parallel.reduce_e_grad:
        e = reduce_gradient(e, parallel)
    adapters = tuple(a._replace(a=reduce_gradient(a.a, parallel)) for a in head.adapters)
    u, b = low_rank_update(e, adapters)
    inputs = (e, head.weight, targets, head.bias, u, b)
    if pair in STORES_LOGITS:
        record(path="vocab_parallel", reason=reason, **facts)
        run = run_as(pair, shard_statistics)
        return _of_shards(*stored_loss(run, parallel, total, options, *inputs))
    kernels, exact = shard_kernels(pair, inputs, options, facts["filter"], total)
    if exact is not None:
        facts["exact"] = exact
    record(path="vocab_parallel", reason=reason, **facts)
    return _of_shards(*sharded_loss(kernels, parallel, total, options, *inputs))


def _of_shards(nll: Tensor, lse: Tensor) -> RowStatistics:
    none = nll.new_empty(0)
    return RowStatistics(nll, lse, none, none, none, none, none)


def _reduce(
    nll: Tensor,
    targets: Tensor,
    ignore_index: int,
    tally: Tensor | None,
    reduction: str,
    num_items: int | Tensor | None,
    tokens: Any,
) -> Tensor:
    """tally: of a sparse forward, which has counted the tokens that count."""
    if reduction == "none":
        return tokens(nll).clone()
    total = nll.sum()
    if reduction == "sum":
        return total
    if num_items is not None:
        return total / (num_items.to(total.device) if isinstance(num_items, Tensor) else num_items)
    if tally is not None:
        return total / tally[-1]
    return total / (targets != ignore_index).sum().clamp(min=1)


def _metrics(stats: RowStatistics, targets: Tensor, ignore_index: int, tokens: Any) -> TokenMetrics:
    valid = targets != ignore_index
    logprob = torch.where(valid, stats.target_logit - stats.lse, 0).detach()
    correct = valid & (stats.argmax == targets)
    return TokenMetrics(
        *(tokens(x.detach()).clone() for x in (logprob, stats.argmax, correct, stats.entropy))
    )
