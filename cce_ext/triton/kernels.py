"""The Triton kernels: one recomputes tiles of logits and folds them into row statistics, the other
turns them into a chunk of logit gradients.

Written to be read, as a second opinion on the compiled kernels: one tile size for every dtype and
GPU, no atomics, no tuning. Loops have constant bounds, because the interpreter of Triton 3.6 takes
no others with NumPy 2.4. Method: cut cross-entropy (Wijmans et al., arXiv 2411.09009), with the
low-rank head as a longer inner dimension. Row offsets are 64-bit, because N x D and V x D may
exceed 2^31.
"""

from __future__ import annotations

import triton
import triton.language as tl

# Rows, vocabulary ids and inner dimension of a tile.
BLOCK_N, BLOCK_V, BLOCK_K = 64, 128, 32
NUM_WARPS = 8

# The interpreter keeps bfloat16 as its bits in 16-bit integers: its dot multiplies those, and its
# conversion cuts off what a GPU rounds.
INTERPRETED = tl.constexpr(triton.knobs.runtime.interpret)


@triton.jit
def _add_product(
    acc,
    x_ptr,
    x_row_stride,
    x_col_stride,
    w_ptr,
    w_row_stride,
    w_col_stride,
    rows,
    columns,
    n,
    v,
    DEPTH: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    """acc (BLOCK_N, BLOCK_V) float32 += X[rows] W[columns]ᵀ, for X (n, DEPTH) and W (v, DEPTH)."""
    x_rows = x_ptr + rows.to(tl.int64)[:, None] * x_row_stride
    w_rows = w_ptr + columns.to(tl.int64)[:, None] * w_row_stride
    for start in range(0, DEPTH, BLOCK_K):
        k = start + tl.arange(0, BLOCK_K)
        x_inside = (rows < n)[:, None] & (k < DEPTH)[None, :]
        w_inside = (columns < v)[:, None] & (k < DEPTH)[None, :]
        k = k.to(tl.int64)[None, :]  # a transposed matrix has a long way between its columns
        x = tl.load(x_rows + k * x_col_stride, mask=x_inside, other=0.0)
        # A float32 adapter over 16-bit hidden states is rounded to theirs.
        w = tl.load(w_rows + k * w_col_stride, mask=w_inside, other=0.0).to(x.dtype)
        if INTERPRETED:
            x, w = x.to(tl.float32), w.to(tl.float32)
        acc = tl.dot(x, tl.trans(w), acc, input_precision="ieee")
    return acc


@triton.jit
def _tanh(x):
    """tanh to a relative error of 1e-6; the fraction alone would lose all digits near zero."""
    t = tl.exp(-2.0 * tl.abs(x))
    large = (1.0 - t) / (1.0 + t)
    s = x * x
    series = x * (1.0 + s * (-1.0 / 3.0 + s * (2.0 / 15.0 + s * (-17.0 / 315.0))))
    return tl.where(tl.abs(x) < 0.25, series, tl.where(x < 0, -large, large))


@triton.jit
def _logits_tile(
    rows,
    columns,
    e_ptr,
    e_row_stride,
    e_col_stride,
    c_ptr,
    c_row_stride,
    c_col_stride,
    bias_ptr,
    bias_stride,
    u_ptr,
    u_row_stride,
    u_col_stride,
    lora_b_ptr,
    lora_b_row_stride,
    lora_b_col_stride,
    n,
    v,
    softcap,
    logit_scale,
    D: tl.constexpr,
    R: tl.constexpr,
    HAS_SOFTCAP: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_V: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    """z (BLOCK_N, BLOCK_V) = softcap(logit_scale * ([E, U] [C, B]ᵀ + bias)), float32.

    What lies outside of (n, v) is finite but means nothing.
    """
    z = tl.zeros([BLOCK_N, BLOCK_V], dtype=tl.float32)
    z = _add_product(
        z, e_ptr, e_row_stride, e_col_stride, c_ptr, c_row_stride, c_col_stride,
        rows, columns, n, v, D, BLOCK_K,
    )  # fmt: skip
    if u_ptr is not None:
        z = _add_product(
            z, u_ptr, u_row_stride, u_col_stride, lora_b_ptr, lora_b_row_stride, lora_b_col_stride,
            rows, columns, n, v, R, BLOCK_K,
        )  # fmt: skip
    if bias_ptr is not None:
        offsets = columns.to(tl.int64) * bias_stride
        z += tl.load(bias_ptr + offsets, mask=columns < v, other=0.0).to(tl.float32)[None, :]
    z = z * logit_scale
    if HAS_SOFTCAP:
        z = softcap * _tanh(z / softcap)
    return z


@triton.jit
def forward_kernel(
    local_ptr,
    top_ptr,
    total_ptr,
    target_logit_ptr,
    logit_sum_ptr,
    weighted_ptr,
    argmax_ptr,
    e_ptr,
    e_row_stride,
    e_col_stride,
    c_ptr,
    c_row_stride,
    c_col_stride,
    bias_ptr,
    bias_stride,
    u_ptr,
    u_row_stride,
    u_col_stride,
    lora_b_ptr,
    lora_b_row_stride,
    lora_b_col_stride,
    n,
    v,
    softcap,
    logit_scale,
    D: tl.constexpr,
    R: tl.constexpr,
    HAS_SOFTCAP: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_V: tl.constexpr,
    BLOCK_K: tl.constexpr,
    SPLIT_COLUMNS: tl.constexpr,
):
    """Statistics of BLOCK_N rows over one split of SPLIT_COLUMNS vocabulary ids, whole tiles.

    Grid: (row blocks, splits). Inputs: e (n, D), c (v, D), u (n, R), lora_b (v, R), bias (v,), with
    strides; local (n,) int64, each row's target column or -1. Outputs (splits, n), float32: top =
    max z, total = Σ exp(z - top), target_logit (0 in the splits without it), logit_sum = Σ z,
    weighted = Σ exp(z - top) z; argmax int64. u, lora_b, bias, logit_sum may be None, and so may
    weighted and argmax, both or neither.
    """
    rows = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)
    split = tl.program_id(1)
    local = tl.load(local_ptr + rows, mask=rows < n, other=-1)
    top = tl.full([BLOCK_N], float("-inf"), dtype=tl.float32)
    total = tl.zeros([BLOCK_N], dtype=tl.float32)
    target_logit = tl.zeros([BLOCK_N], dtype=tl.float32)
    logit_sum = tl.zeros([BLOCK_N], dtype=tl.float32)
    weighted = tl.zeros([BLOCK_N], dtype=tl.float32)
    argmax = tl.zeros([BLOCK_N], dtype=tl.int64)

    for offset in range(0, SPLIT_COLUMNS, BLOCK_V):
        start = split * SPLIT_COLUMNS + offset
        columns = start + tl.arange(0, BLOCK_V)
        inside = (columns < v)[None, :]
        z = _logits_tile(
            rows, columns, e_ptr, e_row_stride, e_col_stride, c_ptr, c_row_stride, c_col_stride,
            bias_ptr, bias_stride, u_ptr, u_row_stride, u_col_stride,
            lora_b_ptr, lora_b_row_stride, lora_b_col_stride,
            n, v, softcap, logit_scale, D, R, HAS_SOFTCAP, BLOCK_N, BLOCK_V, BLOCK_K,
        )  # fmt: skip
        if logit_sum_ptr is not None:
            logit_sum += tl.sum(tl.where(inside, z, 0.0), 1)
        target_logit += tl.sum(tl.where(columns[None, :] == local[:, None], z, 0.0), 1)
        z = tl.where(inside, z, float("-inf"))
        best = tl.max(z, 1)
        new_top = tl.maximum(top, best)
        # exp(-inf - -inf) would be NaN where everything so far is -inf and simply weighs nothing.
        reference = tl.where(new_top == float("-inf"), 0.0, new_top)
        weight = tl.exp(z - reference[:, None])
        rescale = tl.exp(top - reference)
        total = total * rescale + tl.sum(weight, 1)
        if argmax_ptr is not None:
            weighted = weighted * rescale + tl.sum(tl.where(weight > 0, weight * z, 0.0), 1)
            # NaN is never the best; some interpreters refuse a row of nothing else.
            place = tl.argmax(tl.where(z == z, z, float("-inf")), 1)
            argmax = tl.where(best > top, start + place, argmax)
        top = new_top

    out = split.to(tl.int64) * n + rows
    tl.store(top_ptr + out, top, mask=rows < n)
    tl.store(total_ptr + out, total, mask=rows < n)
    tl.store(target_logit_ptr + out, target_logit, mask=rows < n)
    if logit_sum_ptr is not None:
        tl.store(logit_sum_ptr + out, logit_sum, mask=rows < n)
    if argmax_ptr is not None:
        tl.store(weighted_ptr + out, weighted, mask=rows < n)
        tl.store(argmax_ptr + out, argmax, mask=rows < n)


@triton.jit
def dlogits_kernel(
    g_ptr,
    g_row_stride,
    local_ptr,
    valid_ptr,
    lse_ptr,
    a_ptr,
    uniform_ptr,
    target_ptr,
    e_ptr,
    e_row_stride,
    e_col_stride,
    c_ptr,
    c_row_stride,
    c_col_stride,
    bias_ptr,
    bias_stride,
    u_ptr,
    u_row_stride,
    u_col_stride,
    lora_b_ptr,
    lora_b_row_stride,
    lora_b_col_stride,
    n,
    v,
    softcap,
    logit_scale,
    D: tl.constexpr,
    R: tl.constexpr,
    HAS_SOFTCAP: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_V: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    """G (n, v), the gradient of the products [E, U] [C, B]ᵀ + bias of a vocabulary chunk:

        G[i, j] = (a[i] p[i, j] - uniform[i] - target[i] [j = local[i]]) softcap' logit_scale

    Grid: (row blocks, column blocks). Inputs as for forward_kernel, c, bias and lora_b of the chunk
    alone and local counted from its first column; valid (n,) int8, lse, a, uniform, target (n,)
    float32. G may have any dtype and is zero in rows that are not valid.
    """
    rows = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)
    columns = tl.program_id(1) * BLOCK_V + tl.arange(0, BLOCK_V)
    z = _logits_tile(
        rows, columns, e_ptr, e_row_stride, e_col_stride, c_ptr, c_row_stride, c_col_stride,
        bias_ptr, bias_stride, u_ptr, u_row_stride, u_col_stride,
        lora_b_ptr, lora_b_row_stride, lora_b_col_stride,
        n, v, softcap, logit_scale, D, R, HAS_SOFTCAP, BLOCK_N, BLOCK_V, BLOCK_K,
    )  # fmt: skip
    inside = rows < n
    local = tl.load(local_ptr + rows, mask=inside, other=-1)
    valid = tl.load(valid_ptr + rows, mask=inside, other=0) != 0
    lse = tl.load(lse_ptr + rows, mask=inside, other=0.0)
    a = tl.load(a_ptr + rows, mask=inside, other=0.0)
    uniform = tl.load(uniform_ptr + rows, mask=inside, other=0.0)
    target = tl.load(target_ptr + rows, mask=inside, other=0.0)

    g = a[:, None] * tl.exp(z - lse[:, None]) - uniform[:, None]
    g -= tl.where(columns[None, :] == local[:, None], target[:, None], 0.0)
    if HAS_SOFTCAP:
        saturation = z / softcap
        g *= (1.0 - saturation) * (1.0 + saturation)
    g *= logit_scale
    # A choice rather than a product: an ignored row may hold NaN.
    g = tl.where(valid[:, None], g, 0.0)
    out = g_ptr + rows.to(tl.int64)[:, None] * g_row_stride + columns[None, :]
    tl.store(out, g.to(g_ptr.dtype.element_ty), mask=inside[:, None] & (columns < v)[None, :])
