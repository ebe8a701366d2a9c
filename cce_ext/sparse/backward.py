"""The sparse backward on CUDA: kept entries gathered by row and by column, the tail as a few small
products, and the exact way for a list of rows whose length only the device knows."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor

from cce_ext import diagnostics
from cce_ext.cuda_backward import exact_backward, readable, row_vector
from cce_ext.options import LossOptions
from cce_ext.sparse import history, products, tail
from cce_ext.sparse.forward import Lists


class _Call(NamedTuple):
    """One backward: inputs as the kernels read them, upstream gradients by row, options."""

    e: Tensor  # (N, D)
    c: Tensor  # (V, D)
    lse: Tensor
    bias: Tensor | None  # float32
    u: Tensor | None
    lora_b: Tensor | None  # e's dtype
    options: LossOptions
    vocab: tuple[int, int]  # first id, size of the whole vocabulary


def backward(*args: Any) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """The CUDA kernel of ``cce::sparse_ce_backward``: :func:`gradients`, as an op must return them."""
    e, c, _, _, bias, u, lora_b = args[2:9]
    return tuple(
        e.new_empty(0, dtype=torch.float32 if t is None else t.dtype) if g is None else g
        for g, t in zip(gradients(*args), (e, c, bias, u, lora_b), strict=True)
    )


def gradients(
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
) -> tuple[Tensor | None, Tensor | None, Tensor | None, Tensor | None, Tensor | None]:
    """What ``cce::sparse_ce_backward`` computes; arguments and results as ``linear_ce_backward``'s,
    with the forward's lists, the threshold, and which gradients may be sparse: e_grad for those by
    rows (e, u), c_grad for those by columns (c, bias, lora_b). dropped_share (1,): that of all
    shards together; None: there is one. None: a gradient that is not needed."""
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
    dnll = None if dnll is None else dnll.float()
    dlse = row_vector(dlse)
    total = vocab_total or vocab_start + c.shape[0]
    half = e.dtype == torch.float16  # in bfloat16 no factor needs a unit
    # Batches of about this size: few rows are flat more often than many.
    size = e.shape[0].bit_length()
    kind = (e.device.index, e.dtype, size, *c.shape, softcap, logit_scale, eps)
    past = history.recall(kind, e)
    # a and d are those of the sparse rows.
    a, d, row_mass, own_share, exact, d_all, order, count, units = torch.ops.cce.backward_rows(
        dnll, dlse, targets, lists.mass, lists.exact_rows, share, past.answer, ignore_index,
        tail.FLAT, abs(logit_scale) if half else 0.0,
        abs(logit_scale) * label_smoothing / total * tail.GROUP,
    )  # fmt: skip
    history.remember(kind, past, e)
    diagnostics.record_backward(lists.tally, own_share if share is None else share, exact)
    if past.mostly_exact:
        return exact_backward(
            d_all, dlse, e, c, targets, lse, bias, u, lora_b, ignore_index, softcap, logit_scale,
            label_smoothing, vocab_start, vocab_total, need_e, need_c, need_bias, need_u,
            need_lora_b,
        )  # fmt: skip

    call = _Call(
        readable(e, e.dtype),
        readable(c, c.dtype),  # a copy only where c starts in the middle of 16 bytes
        lse.contiguous(),
        None if bias is None else bias.float().contiguous(),
        None if u is None else readable(u, e.dtype),
        # A float32 adapter is copied, but the copy is gone before there are gradients by columns.
        None if lora_b is None else readable(lora_b, e.dtype),
        LossOptions(ignore_index, softcap, logit_scale, label_smoothing),
        (vocab_start, total),
    )

    # What is there for each gradient: (N, width) or (V, width), and where it starts from.
    rows_of = [(need_e, call.c, e), (need_u and u is not None, call.lora_b, u)]
    columns_of = [(need_c, call.e, c), (need_lora_b and lora_b is not None, call.u, lora_b)]
    factors, of_ids, dbias = _factors(
        call, lists, a, d, row_mass, units, any(need for need, *_ in rows_of),
        need_bias and bias is not None,
    )  # fmt: skip
    weights = torch.ops.cce.entry_weights(
        lists.row_first, lists.rows, lists.ids, lists.logits, a, d, call.lse,
        targets, softcap, logit_scale, label_smoothing, vocab_start, lists.slots,
        factors.of_columns(), units,
    )  # fmt: skip
    kept = _Kept(lists, weights, factors)
    by_row = [
        _row_gradient(kept, source, others, like) if need else None
        for (need, source, like), others in zip(rows_of, of_ids, strict=True)
    ]
    del rows_of, of_ids
    call = call._replace(lora_b=None)
    by_column: list[Tensor | None] = [None, None]
    if dbias is not None or any(need for need, *_ in columns_of):
        columns = _Columns(*torch.ops.cce.sort_columns(lists.ids, lists.row_first, c.shape[0]))
        by_column = [
            _column_gradient(kept, columns, source, like) if need else None
            for need, source, like in columns_of
        ]
        if dbias is not None:
            _add_weights(dbias, kept, columns, call.e)
        del columns
    del factors, kept, weights
    # Rows on the exact list, by recomputed logits: rows are overwritten, columns are added to. An
    # empty list costs an empty launch.
    torch.ops.cce.exact_rows_(
        by_row[0], by_column[0], dbias, by_row[1], by_column[1], call.e, call.c, call.bias, call.u,
        None if lora_b is None else _rows_of_adapter(lora_b, e.dtype), order, count, d_all, dlse,
        call.lse, targets, ignore_index, softcap, logit_scale, label_smoothing, *call.vocab,
    )  # fmt: skip
    results = (by_row[0], by_column[0], dbias, by_row[1], by_column[1])
    return tuple(
        None if r is None else r.to(t.dtype)
        for r, t in zip(results, (e, c, bias, u, lora_b), strict=True)
    )


def _factors(
    call: _Call,
    lists: Lists,
    a: Tensor,
    d: Tensor,
    row_mass: Tensor,
    units: Tensor,
    need_rows: bool,
    need_bias: bool,
) -> tuple[products.Factors, list[Tensor | None], Tensor | None]:
    """The tail of every row, in the shape of what the sampled rows of its class drop. Columns of hot
    ids are zeros. With its tilt, if gradients by rows are needed, and `products.of_ids` of C and of
    B; if that by the bias is, what the tail adds to it."""
    o, classes, sums = call.options, lists.classes, lists.tail_sums
    smoothing = o.label_smoothing > 0
    uniform = -o.logit_scale * o.label_smoothing / call.vocab[1]  # of d, by entry
    of_rows = torch.ops.cce.tail_factors(
        classes, call.e, a, d, lists.mass, units, tail.TILT_IDS if need_rows else 0,
        lists.hot_ids.shape[0], o.logit_scale, uniform * tail.GROUP if smoothing else None,
    )  # fmt: skip
    shape, tilted, first = torch.ops.cce.tail_shapes(
        sums, call.e, tail.SHARED, smoothing, tail.TILT_IDS if need_rows else 0
    )
    factors = products.Factors(of_rows, shape, tilted, lists.hot_ids, units)
    of_ids: list[Tensor | None] = [None, None]
    if need_rows:
        of_ids = [None if w is None else products.of_ids(factors, w) for w in (call.c, call.lora_b)]
        _tilt(call, lists, factors, of_ids, first, row_mass, a)
    dbias = None
    if need_bias:  # not of rounded numbers
        mass = lists.mass * (a * o.logit_scale)[:, None]
        wide, *_ = torch.ops.cce.tail_shapes(sums, sums, tail.SHARED, False, 0)
        spread = tail.Spread(mass, classes, wide, d * uniform if smoothing else None)
        dbias = tail.column_sum(spread)
    return factors, of_ids, dbias


def _tilt(
    call: _Call,
    lists: Lists,
    factors: products.Factors,
    of_ids: list[Tensor | None],
    first: Tensor,
    row_mass: Tensor,
    a: Tensor,
) -> None:
    """`tail.tilt` into the first columns of the rows' factors; of the logits of the sampled ids in
    16 bits. first: where those of each group start."""
    ids, (of_c, of_b) = factors.tilted, of_ids
    out = factors.rows[:, : tail.TILT_IDS]
    torch.mm(call.e, of_c[: tail.TILT_IDS].T, out=out)
    if of_b is not None:
        torch.addmm(out, call.u, of_b[: tail.TILT_IDS].T, out=out)
    torch.ops.cce.tilt_(
        out, ids, first, lists.classes, lists.sample, lists.sample_weight, row_mass, lists.mass, a,
        call.bias, call.options.softcap, call.options.logit_scale, tail.SHARED, tail.TILT,
        tail.TILT_DAMPING, factors.units,
    )  # fmt: skip


def _rows_of_adapter(lora_b: Tensor, dtype: torch.dtype) -> Tensor:
    """lora_b (V, R) for the exact rows, without a copy where it is float32, as adapters usually are."""
    if lora_b.dtype == torch.float32 and lora_b.stride(1) == 1:
        return lora_b
    return readable(lora_b, dtype)


class _Columns(NamedTuple):
    """Kept entries by id."""

    order: Tensor  # (K,) int32: their numbers, by id and row
    first: Tensor  # (V + 1,) int32: where the entries of an id start in `order`


class _Kept(NamedTuple):
    """Kept entries and their weights: by the lists, and those of hot ids in the factors."""

    lists: Lists
    weights: Tensor  # (K,)
    factors: products.Factors


def _row_gradient(kept: _Kept, source: Tensor, of_ids: Tensor, like: Tensor) -> Tensor:
    """The gradient by `like` (N, width): tail with its tilt and kept entries; source (V, width),
    of_ids: `products.of_ids` of it."""
    lists = kept.lists
    out = products.row_gradient(kept.factors, source, of_ids)
    torch.ops.cce.gather_(
        out, source, lists.row_first, lists.row_hot, lists.ids, kept.weights, None,
        lists.row_order, None,
    )  # fmt: skip
    return out.to(like.dtype)


def _column_gradient(kept: _Kept, columns: _Columns, source: Tensor, like: Tensor) -> Tensor:
    """The gradient by `like` (V, width): tail and kept entries; source (N, width)."""
    lists, factors = kept.lists, kept.factors
    dtype = like.dtype if like.dtype == source.dtype else torch.float32
    out = torch.empty(like.shape, device=like.device, dtype=dtype)
    torch.ops.cce.column_gradient_(
        out, source, products.column_product(factors, source), factors.shape, factors.units,
        columns.first, lists.slots, lists.rows, kept.weights, columns.order,
    )  # fmt: skip
    return out


def _add_weights(dbias: Tensor, kept: _Kept, columns: _Columns, e: Tensor) -> None:
    """The sums of the entries' weights by id, added to dbias (V,)."""
    n, v = e.shape[0], dbias.shape[0]
    nothing = e.new_zeros(v + n, 8)  # what is gathered does not matter
    torch.ops.cce.gather_(
        nothing[:v], nothing[v:], columns.first, None, kept.lists.rows, kept.weights,
        columns.order, None, dbias,
    )  # fmt: skip
