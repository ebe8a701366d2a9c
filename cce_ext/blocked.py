"""The blocked path: the same algorithm in plain PyTorch operators, for devices and dtypes without
compiled kernels.

A block of logits (at most 2048 x 8192 numbers, 64 MB in float32) is made by a matmul and folded
into per-row statistics; the backward recomputes it. Ignored rows are masked, not left out: finding
them would make the host wait for the device.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple

import torch
from torch import Tensor

from cce_ext.reference import token_nll
from cce_ext.utils import softcapping

_ROWS, _COLUMNS = 2048, 8192


def accumulate_dtype(e: Tensor) -> torch.dtype:
    """dtype of row statistics and sums: float64 for float64 inputs, else float32."""
    return torch.float64 if e.dtype == torch.float64 else torch.float32


class Call(NamedTuple):
    """The arguments that forward and backward share; see csrc/torch/library.cpp."""

    e: Tensor
    c: Tensor
    targets: Tensor
    bias: Tensor | None
    u: Tensor | None
    lora_b: Tensor | None
    ignore_index: int
    softcap: float
    logit_scale: float
    label_smoothing: float
    vocab_start: int
    vocab_total: int

    @property
    def vocab(self) -> int:
        return self.vocab_total or self.vocab_start + self.c.shape[0]

    def valid(self) -> Tensor:
        return self.targets != self.ignore_index

    def local_targets(self) -> Tensor:
        """Column of each row's target in this shard, -1 where it is elsewhere."""
        local = self.targets.long() - self.vocab_start
        return torch.where(self.valid() & (local >= 0) & (local < self.c.shape[0]), local, -1)

    def logits(self, rows: slice, columns: slice) -> Tensor:
        """z of one block, in the accumulation dtype."""
        z = self.e[rows] @ self.c[columns].T
        if self.u is not None:
            z = z + self.u[rows] @ self.lora_b[columns].to(self.e.dtype).T
        z = z.to(accumulate_dtype(self.e))
        if self.bias is not None:
            z = z + self.bias[columns].to(z.dtype)
        z = z * self.logit_scale
        return softcapping(z, self.softcap) if self.softcap else z


def slices(size: int, step: int) -> Iterator[slice]:
    """[0, size) in stretches of ``step``, the last one shorter."""
    return (slice(first, min(first + step, size)) for first in range(0, size, step))


def forward(*args: object) -> tuple[Tensor, ...]:
    """``cce::blocked_ce_forward``; arguments and results as ``cce::linear_ce_forward``."""
    *shared, metrics = args
    call = Call(*shared)
    blocks = [_forward_rows(call, rows, bool(metrics)) for rows in slices(call.e.shape[0], _ROWS)]
    if not blocks:
        acc = accumulate_dtype(call.e)
        return tuple(call.e.new_empty(0, dtype=torch.int64 if i == 5 else acc) for i in range(7))
    return tuple(torch.cat(parts) for parts in zip(*blocks, strict=True))


def _forward_rows(call: Call, rows: slice, metrics: bool) -> tuple[Tensor, ...]:
    n, acc = rows.stop - rows.start, accumulate_dtype(call.e)
    local = call.local_targets()[rows]

    def row(value: float) -> Tensor:
        return call.e.new_full((n,), value, dtype=acc)

    top, total, target_logit, logit_sum, weighted = row(-torch.inf), row(0), row(0), row(0), row(0)
    argmax = torch.zeros(n, dtype=torch.int64, device=call.e.device)
    for columns in slices(call.c.shape[0], _COLUMNS):
        z = call.logits(rows, columns)
        best = z.max(-1)
        new_top = torch.maximum(top, best.values)
        # exp(-inf - -inf) would be NaN where everything so far is -inf and simply weighs nothing.
        reference = torch.where(new_top == -torch.inf, 0, new_top)
        weight = torch.exp(z - reference[:, None])
        rescale = torch.exp(top - reference)
        total = total * rescale + weight.sum(-1)
        if metrics:
            weighted = weighted * rescale + torch.where(weight > 0, weight * z, 0).sum(-1)
            argmax = torch.where(best.values > top, best.indices + columns.start, argmax)
        if call.label_smoothing:
            logit_sum = logit_sum + z.sum(-1)
        here = (local >= columns.start) & (local < columns.stop)
        hit = z.gather(1, torch.where(here, local - columns.start, 0)[:, None])[:, 0]
        target_logit = torch.where(here, hit, target_logit)
        top = new_top
    return finish_rows(
        call,
        rows,
        top,
        total,
        target_logit,
        logit_sum if call.label_smoothing else None,
        weighted if metrics else None,
        argmax if metrics else None,
    )


def finish_rows(
    call: Call,
    rows: slice,
    top: Tensor,
    total: Tensor,
    target_logit: Tensor,
    logit_sum: Tensor | None,
    weighted: Tensor | None,
    argmax: Tensor | None,
) -> tuple[Tensor, ...]:
    """A forward op's results for some rows, from sums over this shard's logits z.

    top = max z, total = Σ exp(z - top), logit_sum = Σ z (None without label smoothing), weighted =
    Σ exp(z - top) z and argmax, a column of the shard (None without metrics).
    """
    valid = call.valid()[rows]
    lse = top + torch.log(total)
    unknown = (call.targets[rows] < 0) | (call.targets[rows] >= call.vocab)
    target_logit = torch.where(unknown, torch.nan, target_logit)
    nll = token_nll(lse, target_logit, logit_sum, call.label_smoothing, call.vocab)

    def on_valid(x: Tensor) -> Tensor:
        return torch.where(valid, x, 0)

    def none() -> Tensor:
        return lse.new_empty(0)

    return (
        on_valid(nll),
        on_valid(lse),
        on_valid(target_logit),
        none() if logit_sum is None else on_valid(logit_sum),
        none() if argmax is None else on_valid(top),
        none().long() if argmax is None else torch.where(valid, argmax + call.vocab_start, -1),
        none() if weighted is None else on_valid(lse - weighted / total),
    )


def upstream(call: Call, gradient: Tensor | None) -> Tensor:
    """A row gradient (N,) in the accumulation dtype, zero where rows are ignored or it is None."""
    if gradient is None:
        return call.e.new_zeros(call.e.shape[0], dtype=accumulate_dtype(call.e))
    return torch.where(call.valid(), gradient.to(accumulate_dtype(call.e)), 0)


def backward(
    dnll: Tensor | None,
    dlse: Tensor | None,
    e: Tensor,
    c: Tensor,
    targets: Tensor,
    lse: Tensor,
    *rest: object,
):
    """``cce::blocked_ce_backward``; arguments and results as ``cce::linear_ce_backward``."""
    call = Call(e, c, targets, *rest[:9])
    needs = rest[9:]
    acc = accumulate_dtype(e)
    inputs = (e, c, call.bias, call.u, call.lora_b)
    sums = [
        t.new_zeros(t.shape, dtype=acc) if need and t is not None else None
        for t, need in zip(inputs, needs, strict=True)
    ]
    de, dc, dbias, du, db = sums
    valid = call.valid()

    d = upstream(call, dnll)
    a = d + upstream(call, dlse)
    local = call.local_targets()
    for columns in slices(c.shape[0], _COLUMNS):
        for rows in slices(e.shape[0], _ROWS):
            g = _dlogits(call, rows, columns, a[rows], d[rows], lse[rows], local[rows])
            g = torch.where(valid[rows, None], g, 0)
            if dbias is not None:
                dbias[columns] += g.sum(0)
            g = g.to(e.dtype)
            if de is not None:
                de[rows] += g @ c[columns]
            if dc is not None:
                dc[columns] += g.T @ e[rows]
            if du is not None:
                du[rows] += g @ call.lora_b[columns].to(e.dtype)
            if db is not None:
                db[columns] += g.T @ call.u[rows]
    return tuple(
        total.to(t.dtype)
        if total is not None
        else e.new_empty(0, dtype=torch.float32 if t is None else t.dtype)
        for total, t in zip(sums, inputs, strict=True)
    )


def _dlogits(
    call: Call, rows: slice, columns: slice, a: Tensor, d: Tensor, lse: Tensor, local: Tensor
) -> Tensor:
    """dloss/dproduct of one block: (a p - d ((1 - eps) [j = t] + eps / V)) softcap' logit_scale."""
    z = call.logits(rows, columns)
    g = (
        a[:, None] * torch.exp(z - lse[:, None])
        - (d * (call.label_smoothing / call.vocab))[:, None]
    )
    here = (local >= columns.start) & (local < columns.stop)
    hit = torch.where(here, d * (1 - call.label_smoothing), 0)
    g.scatter_add_(1, torch.where(here, local - columns.start, 0)[:, None], -hit[:, None])
    if call.softcap:
        g = g * (1 - (z / call.softcap) ** 2)
    return g * call.logit_scale
