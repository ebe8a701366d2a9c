"""The sparse gradient of one shard of the vocabulary.

Its forward comes in parts, because the shards tell each other two things on the way. Lower bounds
of their own lse, before the pass over the vocabulary: by its own bound a shard of rare ids would
take thousands of entries a row for candidates, none of which is kept in the end. Then the lse
itself: what is kept, and what the others weigh, follows from that of all shards. The parts are ops,
because torch.compile cannot look inside; the last, `sort_entries`, is two compiled ones.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from cce_ext.cuda_backward import row_vector
from cce_ext.reference import RowStatistics
from cce_ext.sparse import tail
from cce_ext.sparse.forward import (
    LEVEL_COLUMNS,
    ROW_BLOCK,
    Bounds,
    Found,
    Lists,
    Selected,
    bound_rows,
    candidate_capacity,
    collect,
    fake_lists,
    kept_capacity,
    prepare,
    select_entries,
)


def _tensors(kind: type[NamedTuple], *known: str) -> str:
    return ", ".join(f"Tensor {name}" for name in kind._fields if name not in known)


_INPUTS = "Tensor e, Tensor c, Tensor targets, Tensor? bias, Tensor? u, Tensor? lora_b"
_OPTIONS = "int ignore_index, float softcap, float logit_scale, float label_smoothing, int vocab_start, int vocab_total"
_BOUND = f"sparse_ce_bound({_INPUTS}, {_OPTIONS}, float eps) -> ({_tensors(Bounds)})"
# An op must not return what it was given: statistics without target_logit.
_COLLECT = (
    f"sparse_ce_collect({_INPUTS}, {_OPTIONS}, float eps, {_tensors(Bounds)}) -> "
    f"({_tensors(RowStatistics, 'target_logit')}, {_tensors(Found)})"
)
_SELECT = (
    f"sparse_ce_select({_tensors(Bounds)}, Tensor pool, Tensor counts, Tensor lse, Tensor targets, "
    "int shard_size, int ignore_index, int vocab_start, int vocab_total, "
    f"float eps) -> ({_tensors(Selected)})"
)
_SHARE = (
    "sparse_ce_share(Tensor? dnll, Tensor? dlse, Tensor targets, Tensor[] lists, int ignore_index) "
    "-> Tensor"
)
# Arguments of the first two ops: inputs, options.
_CALL = 12


def collect_shard(
    inputs: tuple[Tensor | None, ...], options: tuple, eps: float, bounds: Bounds
) -> tuple[RowStatistics, Found]:
    """The pass over the shard, whose bounds are those of the whole lse. inputs: e, c, targets,
    bias, u, lora_b; options: the fields of LossOptions, the shard's first id, ids in all."""
    nll, lse, *others = torch.ops.cce.sparse_ce_collect(*inputs, *options, eps, *bounds)
    metrics = len(RowStatistics._fields) - 3
    rows = RowStatistics(nll, lse, bounds.target_logit, *others[:metrics])
    return rows, Found(*others[metrics:])


def select_shard(
    bounds: Bounds,
    found: Found,
    lse: Tensor,
    targets: Tensor,
    shard_size: int,
    options: tuple,
    eps: float,
) -> Selected:
    """What the shard keeps, by the lse (N,) of all shards; the pool is of no use afterwards."""
    ignore_index, _, _, _, start, total = options
    selected = torch.ops.cce.sparse_ce_select(
        *bounds, found.pool, found.counts, lse, targets, shard_size, ignore_index, start, total, eps
    )
    return Selected(*selected)


def _by_groups(found: Found, v: int) -> Found:
    """One split a group of the vocabulary: how many the kernels make is their own business, but
    torch.compile must know a tensor's shape."""
    groups, splits = tail.groups(v), found.max_sum.shape[0]
    if splits == groups:
        return found
    sizes = (p for p in range(2, tail.GROUP + 1) if tail.GROUP % p == 0)
    parts = next(p for p in sizes if -(-v // (tail.GROUP // p)) == splits)
    missing = (0, 0, 0, groups * parts - splits)
    top, total = found.max_sum.unbind(-1)
    top = F.pad(top, missing, value=-torch.inf).unflatten(0, (groups, parts))
    largest = top.amax(1)
    factor = torch.exp2(top - torch.where(largest == -torch.inf, 0, largest)[:, None])

    def merge(x: Tensor) -> Tensor:
        x = F.pad(x, missing).unflatten(0, (groups, parts))
        return torch.where(top == -torch.inf, 0, x * factor).sum(1)

    capped = found.capped
    return found._replace(
        max_sum=torch.stack([largest, merge(total)], -1),
        capped=merge(capped) if capped.shape[0] else capped,
    )


def _bound(*args: Any) -> tuple[Tensor, ...]:
    *call, eps = args
    return tuple(bound_rows(prepare(*call), eps))


def _collect(*args: Any) -> tuple[Tensor, ...]:
    call, (eps, *bounds) = prepare(*args[:_CALL]), args[_CALL:]
    rows, found = collect(call, False, eps, Bounds(*bounds))
    return (*_without(rows, "target_logit"), *_by_groups(found, call.c.shape[0]))


def _select(*args: Any) -> tuple[Tensor, ...]:
    known = len(Bounds._fields)
    bounds, (pool, counts, lse, targets, *place, eps) = Bounds(*args[:known]), args[known:]
    targets = targets.long().contiguous()
    return tuple(select_entries(bounds, pool, counts, lse, targets, *place, eps))


def _share(
    dnll: Tensor | None,
    dlse: Tensor | None,
    targets: Tensor,
    lists: list[Tensor],
    ignore_index: int,
) -> Tensor:
    known = Lists(*lists)
    return torch.ops.cce.dropped_share(
        row_vector(dnll), row_vector(dlse), targets.long().contiguous(), known.mass,
        known.exact_rows, ignore_index,
    )  # fmt: skip


def _without(fields: NamedTuple, *known: str) -> tuple[Tensor, ...]:
    return tuple(t for name, t in fields._asdict().items() if name not in known)


def _fake_bound(*args: Any) -> tuple[Tensor, ...]:
    e, n = args[0], args[0].shape[0]
    numbers, floats = torch.int32, torch.float32
    return (
        e.new_empty(n, dtype=numbers),
        e.new_empty(1, dtype=numbers),
        e.new_empty(n, dtype=floats),
        e.new_empty(n, dtype=floats),
        e.new_empty(n, dtype=floats),
        e.new_empty(n, dtype=torch.int64),
    )


def _fake_collect(dense: Callable[..., tuple]) -> Callable[..., tuple]:
    def fake(*args: Any) -> tuple:
        e, c, softcap, eps = args[0], args[1], args[7], args[_CALL]
        n, v = e.shape[0], c.shape[0]
        groups, blocks = tail.groups(v), -(-n // ROW_BLOCK)

        def new(*shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
            return e.new_empty(shape, dtype=dtype)

        rows, samples = RowStatistics(*dense(*args[:_CALL], False)), tail.sample_size(n, v)
        return (
            *_without(rows, "target_logit"),
            new(groups, n, 2),
            new(groups, n) if softcap else new(0),
            new(samples, dtype=torch.int64),
            new(samples),
            new(samples, -(-v // LEVEL_COLUMNS) * LEVEL_COLUMNS, dtype=torch.uint8),
            new(blocks, candidate_capacity(n, v, eps), 2, dtype=torch.int32),
            new(blocks, dtype=torch.int32),
        )

    return fake


def _fake_select(*args: Any) -> tuple[Tensor, ...]:
    known = len(Bounds._fields)
    pool, lse, v, eps = args[known], args[known + 2], args[known + 4], args[-1]
    n = lse.shape[0]
    capacity = kept_capacity(n, v, eps)
    lists = fake_lists(lse, n, v, capacity)
    exact = lse.new_empty(pool.shape[0], dtype=torch.uint8)
    return (
        lists.ids, lists.logits, exact, lists.row_first, lists.hot_ids, lists.slots, lists.tally
    )  # fmt: skip


def _fake_sort(keys: Tensor, *args: Any) -> tuple[Tensor, ...]:
    lse, v = args[7], args[8]
    lists = fake_lists(lse, lse.shape[0], v, keys.shape[0])
    others = ("sample", "sample_weight", "classes", "tail_sums")
    return _without(lists, "row_first", "hot_ids", "slots", "row_order", "tally", *others)


def _fake_sums(levels: Tensor, rows: Tensor, draws: Tensor, *args: Any) -> tuple[Tensor, ...]:
    v = args[5]
    return draws.new_empty(tail.CLASSES, v), torch.empty_like(draws)


def _fake_share(dnll, dlse, targets, lists, ignore_index) -> Tensor:
    return targets.new_empty(1, dtype=torch.float32)


def register(library: torch.library.Library, fake_forward: Callable[..., tuple]) -> None:
    """Defines the ops in `library`; fake_forward: shapes of ``linear_ce_forward``'s results."""
    for schema, kernel, fake in (
        (_BOUND, _bound, _fake_bound),
        (_COLLECT, _collect, _fake_collect(fake_forward)),
        (_SELECT, _select, _fake_select),
        (_SHARE, _share, _fake_share),
    ):
        name = library.define(schema)
        library.impl(name, kernel, "CUDA")
        torch.library.register_fake(f"cce::{name}", fake, lib=library)
    torch.library.register_fake("cce::sort_kept", _fake_sort, lib=library)
    torch.library.register_fake("cce::level_sums", _fake_sums, lib=library)
