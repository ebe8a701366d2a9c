"""The sparse gradient of one shard of the vocabulary.

Between the two halves of its forward the lse becomes that of all shards: candidates were found by a
bound of the shard's own lse, which bounds the whole one as well; what is kept, and what the others
weigh, follows from the whole one. The halves are ops, because torch.compile cannot look inside.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from cce_ext.reference import RowStatistics
from cce_ext.sparse import tail
from cce_ext.sparse.backward import shard_share
from cce_ext.sparse.forward import (
    ROW_BLOCK,
    Candidates,
    Lists,
    Partials,
    candidate_capacity,
    collect,
    fake_lists,
    make_lists,
)


def _tensors(kind: type[NamedTuple], *known: str) -> str:
    return ", ".join(f"Tensor {name}" for name in kind._fields if name not in known)


_COLLECT = (
    "sparse_ce_collect(Tensor e, Tensor c, Tensor targets, Tensor? bias, Tensor? u, Tensor? lora_b, "
    "int ignore_index, float softcap, float logit_scale, float label_smoothing, int vocab_start, "
    f"int vocab_total, float eps) -> ({_tensors(RowStatistics)}, {_tensors(Partials)}, "
    f"{_tensors(Candidates)})"
)
# An op must not return what it was given: the lists without their row_order.
_LIST = (
    f"sparse_ce_list({_tensors(Candidates)}, {_tensors(Partials)}, Tensor lse, Tensor target_logit, "
    "Tensor targets, int ignore_index, float softcap, int shard_size, int vocab_start, "
    f"int vocab_total, float eps) -> ({_tensors(Lists, 'row_order')})"
)
_SHARE = (
    "sparse_ce_share(Tensor? dnll, Tensor? dlse, Tensor targets, Tensor[] lists, int ignore_index) "
    "-> Tensor"
)


class Begun(NamedTuple):
    """A forward that waits for the lse of all shards."""

    rows: RowStatistics  # of the shard
    partials: Partials
    candidates: Candidates


def begin(inputs: tuple[Tensor | None, ...], options: tuple, eps: float) -> Begun:
    """The pass over the shard. inputs: e, c, targets, bias, u, lora_b; options: the fields of
    LossOptions, the shard's first id, ids in all."""
    results = torch.ops.cce.sparse_ce_collect(*inputs, *options, eps)
    rows, partials = len(RowStatistics._fields), len(Partials._fields)
    return Begun(
        RowStatistics(*results[:rows]),
        Partials(*results[rows : rows + partials]),
        Candidates(*results[rows + partials :]),
    )


def finish(
    begun: Begun, lse: Tensor, targets: Tensor, shard_size: int, options: tuple, eps: float
) -> Lists:
    """What the shard's backward needs, by the lse (N,) of all shards."""
    ignore_index, softcap, _, _, start, total = options
    rows, partials, candidates = begun
    *lists, tally = torch.ops.cce.sparse_ce_list(
        *candidates, *partials, lse, rows.target_logit, targets, ignore_index, softcap, shard_size,
        start, total, eps,
    )  # fmt: skip
    return Lists(*lists, partials.order, tally)


def _by_groups(partials: Partials, v: int) -> Partials:
    """One split a group of the vocabulary: how many the kernels make is their own business, but
    torch.compile must know a tensor's shape."""
    groups, splits = tail.groups(v), partials.max_sum.shape[0]
    if splits == groups:
        return partials
    sizes = (p for p in range(2, tail.GROUP + 1) if tail.GROUP % p == 0)
    parts = next(p for p in sizes if -(-v // (tail.GROUP // p)) == splits)
    missing = (0, 0, 0, groups * parts - splits)
    top, total = partials.max_sum.unbind(-1)
    top = F.pad(top, missing, value=-torch.inf).unflatten(0, (groups, parts))
    largest = top.amax(1)
    factor = torch.exp2(top - torch.where(largest == -torch.inf, 0, largest)[:, None])

    def merge(x: Tensor) -> Tensor:
        x = F.pad(x, missing).unflatten(0, (groups, parts))
        return torch.where(top == -torch.inf, 0, x * factor).sum(1)

    capped = partials.capped
    return partials._replace(
        max_sum=torch.stack([largest, merge(total)], -1),
        capped=merge(capped) if capped.shape[0] else capped,
    )


def _collect(*args: Any) -> tuple[Tensor, ...]:
    *inputs, eps = args
    rows, partials, candidates = collect(*inputs, False, eps)
    return (*rows, *_by_groups(partials, args[1].shape[0]), *candidates)


def _list(*args: Any) -> tuple[Tensor, ...]:
    candidates, partials, args = Candidates(*args[:3]), Partials(*args[3:7]), args[7:]
    lse, target_logit, targets, ignore_index, softcap, *shard, eps = args
    shared = (lse, target_logit, targets, ignore_index, softcap)
    return _without_row_order(make_lists(candidates, partials, *shared, tuple(shard), eps))


def _without_row_order(lists: Lists) -> tuple[Tensor, ...]:
    return tuple(t for name, t in lists._asdict().items() if name != "row_order")


def _fake_collect(dense: Callable[..., tuple]) -> Callable[..., tuple]:
    def fake(*args: Any) -> tuple:
        *inputs, eps = args
        (n, v), softcap, like = (args[0].shape[0], args[1].shape[0]), args[7], args[0]
        groups, blocks = tail.groups(v), -(-n // ROW_BLOCK)

        def new(*shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
            return like.new_empty(shape, dtype=dtype)

        return (
            *dense(*inputs, False),
            *Partials(
                new(n, dtype=torch.int32),
                new(1, dtype=torch.int32),
                new(groups, n, 2),
                new(groups, n) if softcap else new(0),
            ),
            *Candidates(
                new(n),
                new(blocks, candidate_capacity(n, v, eps), 2, dtype=torch.int32),
                new(blocks, dtype=torch.int32),
            ),
        )

    return fake


def _fake_list(*args: Any) -> tuple[Tensor, ...]:
    targets, v, eps = args[9], args[12], args[-1]
    return _without_row_order(fake_lists(targets, targets.shape[0], v, eps))


def _fake_share(dnll, dlse, targets, lists, ignore_index) -> Tensor:
    return targets.new_empty((), dtype=torch.float32)


def register(library: torch.library.Library, fake_forward: Callable[..., tuple]) -> None:
    """Defines the ops in `library`; fake_forward: shapes of ``linear_ce_forward``'s results."""
    for schema, kernel, fake in (
        (_COLLECT, _collect, _fake_collect(fake_forward)),
        (_LIST, _list, _fake_list),
        (_SHARE, shard_share, _fake_share),
    ):
        name = library.define(schema)
        library.impl(name, kernel, "CUDA")
        torch.library.register_fake(f"cce::{name}", fake, lib=library)
