"""The loss in plain eager PyTorch: stores all logits, differentiable any number of times. For
tests, small problems and second derivatives; every formula of the package is here in its shortest
form."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from cce_ext.options import LossOptions
from cce_ext.utils import softcapping


class RowStatistics(NamedTuple):
    """Per-row results of every implementation, shape (N,): float32 (float64 for float64 inputs),
    argmax int64.

    Rows whose target is ignored hold zeros, argmax -1. logit_sum is empty without label smoothing;
    max_logit, argmax and entropy are empty unless metrics were asked for.
    """

    nll: Tensor
    lse: Tensor
    target_logit: Tensor
    logit_sum: Tensor
    max_logit: Tensor
    argmax: Tensor
    entropy: Tensor


def logits(
    e: Tensor,
    c: Tensor,
    bias: Tensor | None,
    u: Tensor | None,
    lora_b: Tensor | None,
    options: LossOptions,
) -> Tensor:
    """z (N, V) = softcap(logit_scale * (e cᵀ + u bᵀ + bias)); float32, or float64 for float64
    inputs."""
    z = e @ c.T
    if u is not None and lora_b is not None:
        z = z + u @ lora_b.to(e.dtype).T
    if bias is not None:
        z = z + bias.to(e.dtype)
    return finish_logits(z, options)


def finish_logits(z: Tensor, options: LossOptions) -> Tensor:
    """logit_scale and softcap on raw products z, in float32 (float64 for float64)."""
    z = z.to(torch.float64 if z.dtype == torch.float64 else torch.float32) * options.logit_scale
    if options.softcap:
        z = softcapping(z, options.softcap)
    return z


def statistics(
    e: Tensor,
    c: Tensor,
    targets: Tensor,
    bias: Tensor | None,
    u: Tensor | None,
    lora_b: Tensor | None,
    options: LossOptions,
    metrics: bool = False,
) -> RowStatistics:
    """Everything about the rows, differentiable. Shapes: e (N, D), c (V, D), targets (N,), u (N,
    R), lora_b (V, R)."""
    return statistics_of_logits(logits(e, c, bias, u, lora_b, options), targets, options, metrics)


def shard_statistics(
    e: Tensor,
    c: Tensor,
    targets: Tensor,
    bias: Tensor | None,
    u: Tensor | None,
    lora_b: Tensor | None,
    options: LossOptions,
    start: int,
    total: int,
) -> Tensor:
    """(2, N): lse and target logit of ids start to start + V of a vocabulary of `total`, the latter 0
    where another shard has the target; with label smoothing (3, N): the sum of the logits too."""
    z = logits(e, c, bias, u, lora_b, options)
    sums = [z.sum(-1)] if options.label_smoothing else []
    return torch.stack([torch.logsumexp(z, -1), _target_logits(z, targets, start, total), *sums])


def _target_logits(z: Tensor, targets: Tensor, start: int, total: int) -> Tensor:
    """(N,): of logits z (N, V) of ids start to start + V; 0 where another shard of the vocabulary of
    `total` has the target, NaN where none has."""
    targets = targets.long()
    place = targets - start
    here = (place >= 0) & (place < z.shape[1])
    # gather itself must stay in range, and an empty shard has nothing to gather.
    found = z.gather(1, torch.where(here, place, 0)[:, None])[:, 0] if z.shape[1] else z.sum(-1)
    known = (targets >= 0) & (targets < total)
    return torch.where(known, torch.where(here, found, 0), torch.nan)


def token_nll(
    lse: Tensor, target_logit: Tensor, logit_sum: Tensor | None, smoothing: float, vocab: int
) -> Tensor:
    """-log p of the targets, smoothed; logit_sum: over all `vocab` entries, read with smoothing
    alone."""
    nll = lse - target_logit
    if smoothing:
        nll = (1 - smoothing) * nll + smoothing * (lse - logit_sum / vocab)
    return nll


def statistics_of_logits(
    z: Tensor, targets: Tensor, options: LossOptions, metrics: bool = False
) -> RowStatistics:
    """The same from finished logits z (N, V)."""
    targets = targets.long()
    vocab = z.shape[1]
    valid = targets != options.ignore_index
    zero = z.new_zeros(())

    def on_valid(x: Tensor) -> Tensor:
        return torch.where(valid, x, zero)

    lse = torch.logsumexp(z, -1)
    target_logit = _target_logits(z, targets, 0, vocab)
    empty = z.new_empty(0)
    smoothing = options.label_smoothing
    logit_sum = z.sum(-1) if smoothing else empty
    nll = token_nll(lse, target_logit, logit_sum, smoothing, vocab)
    max_logit, argmax, entropy = empty, targets.new_empty(0), empty
    if metrics:
        with torch.no_grad():
            top = z.max(-1)
            p = torch.softmax(z, -1)
            max_logit, argmax = on_valid(top.values), torch.where(valid, top.indices, -1)
            entropy = on_valid(lse - torch.where(p > 0, p * z, zero).sum(-1))
    return RowStatistics(
        on_valid(nll),
        on_valid(lse),
        on_valid(target_logit),
        on_valid(logit_sum) if smoothing else empty,
        max_logit,
        argmax,
        entropy,
    )
