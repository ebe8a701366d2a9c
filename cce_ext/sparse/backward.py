"""The sparse backward on CUDA: kept entries gathered by row and by column, the tail as a few small
products, and the exact way for a list of rows whose length only the device knows."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from cce_ext import diagnostics
from cce_ext.cuda_backward import exact_backward, readable, row_vector
from cce_ext.options import LossOptions
from cce_ext.sparse import history, tail
from cce_ext.sparse.forward import Lists

# Bytes of a chunk of the sampled rows' tails.
_TAIL_BYTES = 48 << 20
# Lifts the sampled tails, whose rows add up to about 1, out of float16's smallest numbers.
_LIFT = 2.0**10


class _Call(NamedTuple):
    """One backward: inputs as the kernels read them, upstream gradients by row, options."""

    e: Tensor  # (N, D)
    c: Tensor  # (V, D)
    targets: Tensor
    lse: Tensor
    bias: Tensor | None  # float32
    u: Tensor | None
    lora_b: Tensor | None  # e's dtype
    options: LossOptions
    vocab: tuple[int, int]  # first id, size of the whole vocabulary
    eps: float

    def records(
        self, dnll: Tensor | None, dlse: Tensor | None, order: Tensor, count: Tensor
    ) -> Tensor:
        o = self.options
        return torch.ops.cce.row_gradients(
            dnll, dlse, self.lse, self.targets, order, count, o.label_smoothing, o.ignore_index,
            self.c.shape[0], *self.vocab,
        )  # fmt: skip


def backward(
    dnll: Tensor | None,
    dlse: Tensor | None,
    e: Tensor,
    c: Tensor,
    targets: Tensor,
    lse: Tensor,
    bias: Tensor | None,
    u: Tensor | None,
    lora_b: Tensor | None,
    lists: list[Tensor],
    dropped_share: Tensor | None,
    ignore_index: int,
    softcap: float,
    logit_scale: float,
    label_smoothing: float,
    vocab_start: int,
    vocab_total: int,
    eps: float,
    e_grad: bool,
    c_grad: bool,
    need_e: bool,
    need_c: bool,
    need_bias: bool,
    need_u: bool,
    need_lora_b: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """The CUDA kernel of ``cce::sparse_ce_backward``; arguments and results as
    ``linear_ce_backward``'s, with the forward's lists, the threshold, and which gradients may be
    sparse: e_grad for those by rows (e, u), c_grad for those by columns (c, bias, lora_b).
    dropped_share (1,): that of all shards together; None: there is one."""
    place = (ignore_index, softcap, logit_scale, label_smoothing, vocab_start, vocab_total)
    inputs = (e, c, targets, lse, bias, u, lora_b)
    needs = (need_e, need_c, need_bias, need_u, need_lora_b)
    sparse = (e_grad, c_grad, c_grad, e_grad, c_grad)
    filtered = [need and may for need, may in zip(needs, sparse, strict=True)]
    exact = [need and not may for need, may in zip(needs, sparse, strict=True)]
    results = _sparse(dnll, dlse, *inputs, Lists(*lists), dropped_share, *place, eps, *filtered)
    if any(exact):
        others = exact_backward(dnll, dlse, *inputs, *place, *exact)
        results = tuple(o if x else r for r, o, x in zip(results, others, exact, strict=True))
    return results


def _sparse(
    dnll, dlse, e, c, targets, lse, bias, u, lora_b, lists, share, ignore_index, softcap,
    logit_scale, label_smoothing, vocab_start, vocab_total, eps, need_e, need_c, need_bias, need_u,
    need_lora_b,
):  # fmt: skip
    targets = targets.long().contiguous()
    dnll, dlse = row_vector(dnll), row_vector(dlse)
    a, d, row_mass, own_share = torch.ops.cce.backward_shares(
        dnll, dlse, targets, lists.mass, lists.exact_rows, ignore_index
    )
    share = own_share if share is None else share
    # From here on a and d are those of the sparse rows.
    exact, exact_share, d_all, sample, weight = torch.ops.cce.backward_sample_(
        a, d, row_mass, share, targets, lists.exact_rows, ignore_index, tail.FLAT,
        min(tail.SAMPLE, targets.shape[0]),
    )  # fmt: skip
    diagnostics.record_backward(lists.tally, share, exact)
    # Batches of about this size: few rows are flat more often than many.
    size = e.shape[0].bit_length()
    kind = (e.device.index, e.dtype, size, *c.shape, softcap, logit_scale, eps)
    flat = history.mostly_exact(kind)
    history.note(kind, exact_share)
    if flat:
        return exact_backward(
            d_all, dlse, e, c, targets, lse, bias, u, lora_b, ignore_index, softcap, logit_scale,
            label_smoothing, vocab_start, vocab_total, need_e, need_c, need_bias, need_u,
            need_lora_b,
        )  # fmt: skip

    call = _Call(
        readable(e, e.dtype),
        readable(c, c.dtype),  # a copy only where c starts in the middle of 16 bytes
        targets,
        lse.contiguous(),
        None if bias is None else bias.float().contiguous(),
        None if u is None else readable(u, e.dtype),
        None if lora_b is None else readable(lora_b, e.dtype),
        LossOptions(ignore_index, softcap, logit_scale, label_smoothing),
        (vocab_start, vocab_total or vocab_start + c.shape[0]),
        eps,
    )

    # What is there for each gradient: (N, width) or (V, width), and where it starts from.
    rows_of = [(need_e, call.c, e), (need_u and u is not None, call.lora_b, u)]
    columns_of = [(need_c, call.e, c), (need_lora_b and lora_b is not None, call.u, lora_b)]
    spread = _spread(call, lists, a, d, tail.Sample(sample, weight))
    # A bf16 matrix needs no unit; one for fp16 that no weight exceeds by much.
    unit = torch.ones(1, device=a.device)
    if call.e.dtype == torch.float16:
        unit = ((a.abs().max() + d.abs().max()) * abs(logit_scale) + 1e-30)[None]
    hot = call.e.new_zeros(call.e.shape[0], lists.hot_ids.shape[0])
    weights = torch.ops.cce.entry_weights(
        lists.row_first[-1:], lists.rows, lists.ids, lists.logits, a, d, call.lse,
        targets, softcap, logit_scale, label_smoothing, vocab_start, lists.slots, hot, unit,
    )  # fmt: skip
    kept = _Kept(lists, weights, tail.Dense(hot, unit, lists.hot_ids))
    dbias = tail.column_sum(spread) if need_bias and bias is not None else None
    by_row = [
        _row_gradient(spread, kept, source, like) if need else None
        for need, source, like in rows_of
    ]
    by_column = [
        _column_gradient(spread, kept, source, like) if need else None
        for need, source, like in columns_of
    ]
    if dbias is not None:
        # Only the sums of the weights are wanted.
        nothing = call.e.new_zeros(call.e.shape[0] + call.c.shape[0], 8)
        torch.ops.cce.gather_(
            nothing[: call.c.shape[0]], nothing[call.c.shape[0] :], lists.column_first[:-1],
            lists.column_first[1:].contiguous(), lists.rows, weights, lists.order, None, dbias,
        )  # fmt: skip
    del spread, kept, weights, hot
    _add_exact_rows(call, d_all, dlse, exact, by_row, by_column, dbias)
    results = (by_row[0], by_column[0], dbias, by_row[1], by_column[1])
    return tuple(
        e.new_empty(0, dtype=torch.float32 if t is None else t.dtype)
        if r is None
        else r.to(t.dtype)
        for r, t in zip(results, (e, c, bias, u, lora_b), strict=True)
    )


def _spread(call: _Call, lists: Lists, a: Tensor, d: Tensor, sample: tail.Sample) -> tail.Spread:
    """The tail of every row: sampled rows' logits again, their dropped entries by class."""
    o = call.options
    classes = tail.classify(call.e, call.u, sample.rows)
    member = tail.one_hot(classes[sample.rows], tail.CLASSES, call.e.dtype).T.contiguous()
    weights = _sampled_tails(call, sample.rows, sample.weight[sample.rows] * _LIFT, member)
    uniform = None
    if o.label_smoothing:
        uniform = d * (-o.logit_scale * o.label_smoothing / call.vocab[1])
    mass = lists.mass * (a * o.logit_scale)[:, None]
    return tail.Spread(mass, classes, tail.shapes(weights), uniform)


def _sampled_tails(call: _Call, rows: Tensor, weight: Tensor, member: Tensor) -> Tensor:
    """(K, V): what the sampled rows drop, times their weight, summed by class; rows (R,), weight
    (R,), member (K, R) ones and zeros."""
    v, size, o = call.c.shape[0], rows.shape[0], call.options
    # A call of its own over copies of these rows: neighbours in memory are loaded as tiles.
    sampled = call._replace(
        e=call.e[rows],
        u=None if call.u is None else readable(call.u[rows], call.u.dtype),
        targets=call.targets[rows],
        lse=call.lse[rows],
    )
    order = torch.arange(size, device=rows.device, dtype=torch.int32)
    count = torch.full((1,), size, device=rows.device, dtype=torch.int32)
    records = sampled.records(None, weight, order, count)
    sums = torch.empty(member.shape[0], v, device=rows.device)
    tile = torch.ops.cce.column_tile(call.e)
    step = max(tile, _TAIL_BYTES // (2 * size) // tile * tile)
    buffer = torch.empty(size, -(-min(step, v) // 8) * 8, device=rows.device, dtype=call.e.dtype)
    for first in range(0, v, step):
        columns = slice(first, min(first + step, v))
        part = buffer[:, : columns.stop - first]
        torch.ops.cce.dlogits_(
            part, sampled.e, call.c[columns],
            None if call.bias is None else call.bias[columns],
            sampled.u, None if call.lora_b is None else call.lora_b[columns],
            order, count, records, first, o.softcap, o.logit_scale, o.label_smoothing,
            tail_eps=call.eps,
        )  # fmt: skip
        sums[:, columns] = tail.wide_mm(member, part)
    return sums


class _Kept(NamedTuple):
    """Kept entries and their weights: those of hot ids as a matrix, the others by the lists."""

    lists: Lists
    weights: Tensor  # (K,)
    hot: tail.Dense


def _row_gradient(spread: tail.Spread, kept: _Kept, source: Tensor, like: Tensor) -> Tensor:
    """The gradient by `like` (N, width): tail and kept entries; source (V, width)."""
    lists = kept.lists
    out = tail.row_gradient(spread, kept.hot, source)
    torch.ops.cce.gather_(
        out, source, lists.row_first[:-1], lists.row_hot, lists.ids, kept.weights, None,
        lists.row_order, None,
    )  # fmt: skip
    return out.to(like.dtype)


def _column_gradient(spread: tail.Spread, kept: _Kept, source: Tensor, like: Tensor) -> Tensor:
    """The gradient by `like` (V, width): tail and kept entries; source (N, width)."""
    lists = kept.lists
    dtype = like.dtype if like.dtype == source.dtype else torch.float32
    out = torch.empty(like.shape, device=like.device, dtype=dtype)
    tail.column_gradient(spread, kept.hot, source, out)
    first, last = lists.column_first[:-1], lists.column_first[1:]
    cold = torch.where(lists.slots < 0, last, first)
    torch.ops.cce.gather_(
        out, source, first, cold, lists.rows, kept.weights, lists.order, None, None
    )
    return out


def _add_exact_rows(
    call: _Call,
    d: Tensor,
    dlse: Tensor | None,
    exact: Tensor,
    by_row: list[Tensor | None],
    by_column: list[Tensor | None],
    dbias: Tensor | None,
) -> None:
    """Gradients of the rows on the exact list, by recomputed logits: rows are overwritten, columns
    are added to. An empty list costs an empty launch."""
    order, count = torch.ops.cce.row_order(torch.where(exact, 0, -1), -1)
    o = call.options
    torch.ops.cce.exact_rows_(
        by_row[0], by_column[0], dbias, by_row[1], by_column[1], call.e, call.c, call.bias, call.u,
        call.lora_b, order, count, call.records(d, dlse, order, count), o.softcap, o.logit_scale,
        o.label_smoothing,
    )  # fmt: skip
