"""The exact backward on CUDA: logit gradients chunk by chunk, then ordinary matmuls.

Method: for a stretch of the vocabulary, ``cce::dlogits_`` recomputes the logits with the forward's
own mainloop and writes their gradient G as a 16-bit chunk (which, `exact_chunks` says); then dC = Gᵀ
E and dE += G C (likewise dB, dU, dbias), accumulated in fp32 over the chunks. Nothing waits for the device.
"""

from __future__ import annotations

import torch
from torch import Tensor

from cce_ext.exact_chunks import chunks


def _is_readable(t: Tensor, dtype: torch.dtype) -> bool:
    """Whether the kernels can read ``t`` (rows, cols) as it is."""
    cols = t.shape[1]
    pieces = t.stride(1) == 1 and t.stride(0) % 8 == 0 and t.data_ptr() % 16 == 0
    # What lies between two rows of a view may be anything, and rows may lie in one another.
    return t.dtype == dtype and pieces and cols % 8 == 0 and t.stride(0) >= cols


def readable(t: Tensor, dtype: torch.dtype) -> Tensor:
    """``t`` (rows, cols) as the kernels read it: 16-bit, rows at multiples of 16 bytes; a copy only
    where needed."""
    if _is_readable(t, dtype):
        return t
    rows, cols = t.shape
    if cols % 8 == 0:
        return t.to(dtype, memory_format=torch.contiguous_format, copy=True)
    padded = t.new_zeros(rows, -(-cols // 8) * 8, dtype=dtype)
    padded[:, :cols].copy_(t)
    return padded[:, :cols]


def row_vector(t: Tensor | None) -> Tensor | None:
    """``t`` (N,) as the kernels read it."""
    return None if t is None else t.float().contiguous()


def _place_in(rows: Tensor, n: int, columns: int) -> Tensor:
    """A matrix (n, columns) in the memory of contiguous rows that are large enough."""
    return rows.view(-1)[: n * columns].view(n, columns)


class _RowSum:
    """dE or dU: (N, width), summed in fp32 over the chunks."""

    def __init__(self, like: Tensor, width: int) -> None:
        self.total = torch.empty(like.shape[0], width, device=like.device, dtype=torch.float32)
        self.first = True

    def add(self, g: Tensor, weight: Tensor) -> None:
        if self.first:
            torch.mm(g, weight, out_dtype=torch.float32, out=self.total)
        else:
            torch.addmm(self.total, g, weight, out_dtype=torch.float32, out=self.total)
        self.first = False


def exact_backward(
    dnll: Tensor | None,
    dlse: Tensor | None,
    e: Tensor,
    c: Tensor,
    targets: Tensor,
    lse: Tensor,
    bias: Tensor | None,
    u: Tensor | None,
    lora_b: Tensor | None,
    ignore_index: int,
    softcap: float,
    logit_scale: float,
    label_smoothing: float,
    vocab_start: int,
    vocab_total: int,
    need_e: bool,
    need_c: bool,
    need_bias: bool,
    need_u: bool,
    need_lora_b: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """The CUDA kernel of ``cce::linear_ce_backward``; arguments and results as its schema says.

    Shapes: e (N, D), c (V, D), u (N, R), lora_b (V, R), bias (V,), the others (N,). Workspace: fp32
    dE (N, D) and dU (N, R), and one chunk of (N, columns) 16-bit numbers, together 284 MB unless
    ``CCE_BACKWARD_WORKSPACE_MB`` says otherwise, but 100 MB for the chunk at least, and a chunk's rows
    of C and B where the kernels cannot read them as they are. Chunks that are larger lie in rows of dC
    that are not yet filled.
    """
    n, v = e.shape[0], c.shape[0]
    no_grad = [t.dtype if t is not None else torch.float32 for t in (e, c, bias, u, lora_b)]
    if n == 0 or v == 0:
        wanted = (need_e, need_c, need_bias, need_u, need_lora_b)
        tensors = (e, c, bias, u, lora_b)
        return tuple(
            torch.zeros_like(t) if w and t is not None else e.new_empty(0, dtype=d)
            for w, t, d in zip(wanted, tensors, no_grad, strict=True)
        )
    vocab_total = vocab_total or vocab_start + v
    targets = targets.long().contiguous()
    order, count = torch.ops.cce.row_order(targets, ignore_index)
    e_ready = readable(e, e.dtype)
    u_ready = None if u is None else readable(u, e.dtype)
    bias32 = row_vector(bias)
    records = torch.ops.cce.row_gradients(
        row_vector(dnll),
        row_vector(dlse),
        lse.contiguous(),
        targets,
        order,
        count,
        label_smoothing,
        ignore_index,
        v,
        vocab_start,
        vocab_total,
    )

    de = _RowSum(e, e.shape[1]) if need_e else None
    du = _RowSum(e, u.shape[1]) if need_u and u is not None else None
    dc = torch.empty(c.shape, device=c.device, dtype=c.dtype) if need_c else None
    db = (
        torch.empty(lora_b.shape, device=c.device, dtype=lora_b.dtype)
        if need_lora_b and lora_b is not None
        else None
    )
    dbias = torch.empty_like(bias) if need_bias and bias is not None else None

    buffer: Tensor | None = None
    sums = 4 * sum(t.total.numel() for t in (de, du) if t is not None)
    copied = sum(
        2 * t.shape[1] for t in (c, lora_b) if t is not None and not _is_readable(t, e.dtype)
    )
    if db is not None and db.dtype != e.dtype:
        copied += 4 * db.shape[1]
    for first, last, in_dc in chunks(e, v, sums, dc, copied):
        columns = last - first
        if in_dc:
            g = _place_in(dc[last:], n, columns)
        else:
            if buffer is None:
                buffer = torch.empty(n, -(-columns // 8) * 8, device=e.device, dtype=e.dtype)
            g = buffer[:, :columns]
        c_chunk = readable(c[first:last], e.dtype)
        b_chunk = None if lora_b is None else readable(lora_b[first:last], e.dtype)
        torch.ops.cce.dlogits_(
            g,
            e_ready,
            c_chunk,
            None if bias32 is None else bias32[first:last],
            u_ready,
            b_chunk,
            order,
            count,
            records,
            first,
            softcap,
            logit_scale,
            label_smoothing,
        )
        if de is not None:
            de.add(g, c_chunk)
        if du is not None:
            du.add(g, b_chunk)
        if dc is not None:
            torch.mm(g.t(), e_ready, out=dc[first:last])
        if db is not None:
            if db.dtype == g.dtype:
                torch.mm(g.t(), u_ready, out=db[first:last])
            else:
                db[first:last].copy_(torch.mm(g.t(), u_ready, out_dtype=torch.float32))
        if dbias is not None:
            dbias[first:last].copy_(g.sum(0, dtype=torch.float32))
        del c_chunk, b_chunk  # copies, maybe: not beside those of the next chunk
    results = (
        None if de is None else de.total.to(e.dtype),
        dc,
        dbias,
        None if du is None else du.total.to(u.dtype),
        db,
    )
    return tuple(
        r if r is not None else e.new_empty(0, dtype=d)
        for r, d in zip(results, no_grad, strict=True)
    )
