"""``cce::triton_ce_forward`` and ``cce::triton_ce_backward``: launches of the Triton kernels, and
what PyTorch does between them.

Forward: the vocabulary is cut into splits, one kernel folds each into partial row statistics, and
the partials are merged here. Backward, always exact: for a chunk of the vocabulary the kernel
writes the logit gradients G in e's dtype, from which ordinary matmuls make dC = Gᵀ E and dE += G C
(likewise dB, dU, dbias) with float32 sums. Method: Wijmans et al., arXiv 2411.09009. Nothing waits
for the device.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from cce_ext.blocked import Call, finish_rows, slices, upstream
from cce_ext.triton.kernels import (
    BLOCK_K,
    BLOCK_N,
    BLOCK_V,
    INTERPRETED,
    NUM_WARPS,
    dlogits_kernel,
    forward_kernel,
)

# Most vocabulary ids of one program of the forward: few enough to keep a GPU busy with few rows.
SPLIT_COLUMNS = 4096
# Bytes of a chunk of logit gradients, unless one column of tiles is more.
CHUNK_BYTES = 256 * 2**20
# CUDA's limit of the second dimension of a grid.
_MAX_COLUMN_BLOCKS = 65535


def _check_dtype(e: Tensor) -> None:
    if e.dtype not in (torch.float32, torch.bfloat16, torch.float16):
        raise TypeError(
            f'e must be float32, bfloat16 or float16 with impl="triton", got {e.dtype}; use '
            'impl="cce_exact"'
        )


def _launch(
    kernel: Any,
    columns: int,
    call: Call,
    c: Tensor,
    bias: Tensor | None,
    lora_b: Tensor | None,
    *arguments: Tensor | int | None,
    **constants: int,
) -> None:
    """Runs a kernel over all rows and ``columns`` blocks of the vocabulary that c, bias and lora_b
    hold."""
    n, d = call.e.shape
    if n == 0 or columns == 0:
        return
    u = call.u
    none = (None, 0, 0)
    with torch.cuda.device_of(call.e):
        kernel[(-(-n // BLOCK_N), columns)](
            *arguments,
            call.e, *call.e.stride(),
            c, *c.stride(),
            *((None, 0) if bias is None else (bias, *bias.stride())),
            *(none if u is None else (u, *u.stride())),
            *(none if u is None else (lora_b, *lora_b.stride())),
            n, c.shape[0], call.softcap, call.logit_scale,
            D=d, R=0 if u is None else u.shape[1], HAS_SOFTCAP=call.softcap != 0,
            BLOCK_N=BLOCK_N, BLOCK_V=BLOCK_V, BLOCK_K=BLOCK_K, num_warps=NUM_WARPS, **constants,
        )  # fmt: skip


def forward(*args: object) -> tuple[Tensor, ...]:
    """``cce::triton_ce_forward``; arguments and results as ``cce::linear_ce_forward``.

    Shapes: e (N, D), c (V, D), u (N, R), lora_b (V, R), bias (V,), targets (N,); any strides.
    Statistics are float32.

    Raises:
        TypeError: e is not float32, bfloat16 or float16.
    """
    *shared, metrics = args
    call = Call(*shared)
    _check_dtype(call.e)
    v = call.c.shape[0]
    splits = max(1, -(-v // SPLIT_COLUMNS))
    split_columns = -(-v // (splits * BLOCK_V)) * BLOCK_V  # evenly, in whole tiles

    def partials(wanted: bool = True, dtype: torch.dtype = torch.float32) -> Tensor | None:
        shape = (splits, call.e.shape[0])
        return torch.empty(shape, dtype=dtype, device=call.e.device) if wanted else None

    top, total, target_logit = partials(), partials(), partials()
    logit_sum = partials(call.label_smoothing > 0)
    weighted, argmax = partials(metrics), partials(metrics, torch.int64)
    _launch(
        forward_kernel, splits, call, call.c, call.bias, call.lora_b,
        call.local_targets().contiguous(), top, total, target_logit, logit_sum, weighted, argmax,
        SPLIT_COLUMNS=split_columns,
    )  # fmt: skip

    best = top.max(0)
    # As in the kernel: a split, or a whole row, may be -inf throughout.
    weight = torch.exp(top - torch.where(best.values == -torch.inf, 0, best.values))
    return finish_rows(
        call,
        slice(None),
        best.values,
        (total * weight).sum(0),
        target_logit.sum(0),
        None if logit_sum is None else logit_sum.sum(0),
        (weighted * weight).sum(0) if metrics else None,
        argmax.gather(0, best.indices[None])[0] if metrics else None,
    )


def _product(x: Tensor, y: Tensor) -> Tensor:
    """x y with float32 sums and result; x and y of one dtype."""
    if x.is_cuda and x.dtype != torch.float32:
        return torch.mm(x, y, out_dtype=torch.float32)
    return x.float() @ y.float()


def _chunk_columns(e: Tensor) -> int:
    """Vocabulary ids of a chunk: whole tiles, at least one of them."""
    column_bytes = max(1, e.shape[0]) * e.element_size() * BLOCK_V
    return BLOCK_V * min(_MAX_COLUMN_BLOCKS, max(1, CHUNK_BYTES // column_bytes))


def backward(
    dnll: Tensor | None,
    dlse: Tensor | None,
    e: Tensor,
    c: Tensor,
    targets: Tensor,
    lse: Tensor,
    *rest: object,
) -> tuple[Tensor, ...]:
    """``cce::triton_ce_backward``; arguments and results as ``cce::linear_ce_backward``.

    Workspace: one chunk of G (``CHUNK_BYTES``) and the float32 sums of dE (N, D) and dU (N, R).

    Raises:
        TypeError: e is not float32, bfloat16 or float16.
    """
    call = Call(e, c, targets, *rest[:9])
    _check_dtype(e)
    inputs = (e, c, call.bias, call.u, call.lora_b)
    need_e, need_c, need_bias, need_u, need_lora_b = (
        need and t is not None for need, t in zip(rest[9:], inputs, strict=True)
    )

    d = upstream(call, dnll)
    a = d + upstream(call, dlse)
    local = call.local_targets()
    rows = [call.valid().to(torch.int8), lse.float(), a]
    rows += [d * (call.label_smoothing / call.vocab), d * (1 - call.label_smoothing)]
    rows = [t.contiguous() for t in rows]

    de = e.new_zeros(e.shape, dtype=torch.float32) if need_e else None
    du = e.new_zeros(call.u.shape, dtype=torch.float32) if need_u else None
    dc = c.new_empty(c.shape) if need_c else None
    dbias = call.bias.new_empty(call.bias.shape) if need_bias else None
    db = call.lora_b.new_empty(call.lora_b.shape) if need_lora_b else None
    for columns in slices(c.shape[0], _chunk_columns(e)):
        width = columns.stop - columns.start
        g = e.new_empty(e.shape[0], width, dtype=torch.float32 if INTERPRETED else e.dtype)
        c_chunk = c[columns]
        bias_chunk = None if call.bias is None else call.bias[columns]
        b_chunk = None if call.lora_b is None else call.lora_b[columns]
        _launch(
            dlogits_kernel, -(-width // BLOCK_V), call, c_chunk, bias_chunk, b_chunk,
            g, g.stride(0), (local - columns.start).contiguous(), *rows,
        )  # fmt: skip
        g = g.to(e.dtype)
        if need_e:
            de += _product(g, c_chunk)
        if need_c:
            dc[columns] = _product(g.T, e)
        if need_bias:
            dbias[columns] = g.sum(0, dtype=torch.float32)
        if need_u:
            du += _product(g, b_chunk.to(e.dtype))
        if need_lora_b:
            db[columns] = _product(g.T, call.u)
    return tuple(
        grad.to(t.dtype)
        if grad is not None
        else e.new_empty(0, dtype=torch.float32 if t is None else t.dtype)
        for grad, t in zip((de, dc, dbias, du, db), inputs, strict=True)
    )
