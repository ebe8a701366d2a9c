"""Vocabulary parallelism: every rank holds some rows of the classifier and all tokens; every rank
gets the same loss.

Method: each rank's logsumexp and target logit come from its own shard; one all-gather shows them to
all ranks, which take the logsumexp over the ranks and the sum of the target logits, of which one
rank holds each. The backward of a shard is the ordinary one with the global logsumexp, and the
hidden states' gradient is summed over the ranks in float32. The sparse backward too: what is kept
follows from the global logsumexp, the rest keeps its mass in each shard's groups of ids, and
whether a call is too flat for that is decided by what all shards together would drop.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor

from cce_ext.distributed.dtensor import shard_of
from cce_ext.eager import differentiates
from cce_ext.options import Filter, LossOptions
from cce_ext.reference import RowStatistics, token_nll
from cce_ext.sparse import shard
from cce_ext.sparse.forward import Bounds, sort_entries
from cce_ext.sparse.op import common_refusal, shard_refusal

# Renamed in PyTorch 2.13, whose old name warns.
_all_gather = getattr(dist, "all_gather_single", None) or dist.all_gather_into_tensor


@dataclass
class VocabParallelOptions:
    """This rank's part of the vocabulary.

    Args:
        start: first global id of this rank's rows of the classifier.
        stop: one past the last.
        group: the process group whose ranks hold the shards; None: the default group.
        reduce_e_grad: all-reduce the hidden states' gradient over the group (False where the
            caller's framework does it).
        vocab_size: size of the whole vocabulary; None: found at the first use.
        check: compare what the ranks are about to compute before they do, so that a rank that
            disagrees is an error on all of them and not a wait. Over a group that also takes CPU
            tensors (gloo, or "cpu:gloo,cuda:nccl") at each call, without waiting for a GPU; over
            NCCL alone at the first call of each shape and options, which waits for the GPU. Inside
            torch.compile nothing is compared.
    """

    start: int
    stop: int
    group: dist.ProcessGroup | None = None
    reduce_e_grad: bool = True
    vocab_size: int | None = None
    check: bool = True

    @classmethod
    def from_vocab(
        cls,
        vocab_size: int,
        group: dist.ProcessGroup | None = None,
        reduce_e_grad: bool = True,
        check: bool = True,
    ) -> VocabParallelOptions:
        """An even split of ``vocab_size`` ids over the group's ranks; the first ranks get one more
        where it is uneven."""
        rank, world = dist.get_rank(group), dist.get_world_size(group)
        each, extra = divmod(vocab_size, world)
        start = rank * each + min(rank, extra)
        return cls(start, start + each + (rank < extra), group, reduce_e_grad, vocab_size, check)

    @classmethod
    def from_dtensor(
        cls, weight: Tensor, reduce_e_grad: bool = True, check: bool = True
    ) -> VocabParallelOptions:
        """The split of a DTensor classifier (V, D) that is Shard(0) on a one-dimensional mesh, as
        tensor parallelism leaves it. Every rank of that mesh must hold the same tokens: call it
        inside the head's forward, where FSDP2 has gathered its own dimension of the mesh.

        Raises:
            TypeError: weight is not a DTensor.
            ValueError: another placement, or a mesh of more than one dimension.
        """
        shard = shard_of(weight)
        return cls(shard.start, shard.stop, shard.group, reduce_e_grad, shard.rows, check)

    def whole_vocab(self, device: torch.device) -> int:
        """Size of the whole vocabulary: the largest ``stop`` of the group."""
        if self.vocab_size is None:
            stop = torch.tensor(self.stop, device=device)
            dist.all_reduce(stop, op=dist.ReduceOp.MAX, group=self.group)
            self.vocab_size = int(stop)
        return self.vocab_size


class _ReduceGradient(torch.autograd.Function):
    """Identity whose gradient is summed over the ranks in float32."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, group: dist.ProcessGroup | None) -> Tensor:
        ctx.group = group
        return x.view_as(x)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        sum_of = _sum_of_pieces if grad.dtype.itemsize == 2 else _all_reduced
        return sum_of(grad, ctx.group), None


def _all_reduced(part: Tensor, group: dist.ProcessGroup | None) -> Tensor:
    total = part.clone(memory_format=torch.contiguous_format)  # the part is not ours to change
    dist.all_reduce(total, group=group)
    return total


def _sum_of_pieces(part: Tensor, group: dist.ProcessGroup | None) -> Tensor:
    """The sum over the ranks of 16-bit parts, in float32, rounded once: every rank adds up one piece
    of all parts, then all have all pieces. Half the bytes of an all-reduce in float32."""
    world, size = dist.get_world_size(group), part.numel()
    piece = -(-size // world)
    flat = part.new_empty(world * piece)  # what the last piece has too many nobody reads
    flat[:size].view(part.shape).copy_(part)
    parts = torch.empty_like(flat)
    dist.all_to_all_single(parts, flat, group=group)
    total = parts.view(world, piece).sum(0, dtype=torch.float32).to(part.dtype)
    _all_gather(flat, total, group=group)
    return flat[:size].view(part.shape)


def reduce_gradient(x: Tensor, parallel: VocabParallelOptions) -> Tensor:
    """``x``, whose gradient every rank holds a part of: the parts are summed over the group."""
    return _ReduceGradient.apply(x, parallel.group)


class ShardKernels(NamedTuple):
    """What computes a shard."""

    pair: tuple[Callable, Callable]  # the implementation's forward and backward
    filter: Filter | None  # None: this shard's backward is exact
    any_sparse: bool  # whether any shard's may be sparse; the same on all ranks


def shard_kernels(
    pair: str,
    inputs: tuple[Tensor | None, ...],
    options: LossOptions,
    wanted: Filter,
    total: int,
) -> tuple[ShardKernels, str | None]:
    """What computes this rank's shard with the ops of this name, and, for compiled kernels on a
    GPU, why its backward is exact ('' where it is sparse). inputs: e, c, targets, bias, u, lora_b;
    total: ids of the whole vocabulary."""
    e, c = inputs[:2]
    ops = tuple(getattr(torch.ops.cce, f"{pair}_{half}") for half in ("forward", "backward"))
    if pair != "linear_ce" or e.device.type != "cuda":
        return ShardKernels(ops, None, False), None
    # First what all ranks find alike: together they decide whether a call is too flat.
    reason = common_refusal(total, e.shape[0], options, wanted.eps)
    any_sparse = not reason and differentiates(inputs)
    if not reason:
        reason = shard_refusal(c, e.shape[0], wanted.eps)
    sparse = any_sparse and not reason
    return ShardKernels(ops, wanted if sparse else None, any_sparse), reason


class _ShardedLoss(torch.autograd.Function):
    """(nll, lse) over all shards from one rank's shard. One autograd function, because the shard's
    backward needs the global logsumexp, which only exists after the collective."""

    @staticmethod
    def forward(ctx, kernels, group, start, vocab_total, options, e, c, targets, bias, u, lora_b):
        ctx.kernels, ctx.group = kernels, group
        ctx.options = (*options, start, vocab_total)
        inputs = (e, c, targets, bias, u, lora_b)
        bounds = _whole_bounds(kernels, group, inputs, ctx.options) if kernels.any_sparse else None
        if kernels.filter is None:
            local = RowStatistics(*kernels.pair[0](*inputs, *ctx.options, False))
        else:
            eps = kernels.filter.eps
            local, found = shard.collect_shard(inputs, ctx.options, eps, bounds)
        sums = [local.logit_sum] if options.label_smoothing else []
        ranks = _gather(torch.stack([local.lse, local.target_logit, *sums]), group)
        nll, lse = _merge(ranks, targets, options, vocab_total)
        lists = ()
        if kernels.filter is not None:
            v = c.shape[0]
            selected = shard.select_shard(bounds, found, lse, targets, v, ctx.options, eps)
            found = found._replace(pool=None)  # frees it
            place = (options.ignore_index, start, vocab_total, eps)
            lists = sort_entries(bounds, found, selected, lse, targets, v, options.softcap, *place)
        ctx.save_for_backward(*inputs, lse, *lists)
        ctx.set_materialize_grads(False)
        return nll, lse

    @staticmethod
    def backward(ctx, dnll, dlse):
        none = (None,) * 5
        if dnll is None and dlse is None:
            return (*none, *(None,) * 6)
        e, c, targets, bias, u, lora_b, lse, *lists = ctx.saved_tensors
        kernels, options = ctx.kernels, ctx.options
        _, _, _, _, _, need_e, need_c, _, need_bias, need_u, need_b = ctx.needs_input_grad
        wanted = (need_e, need_c, need_bias, need_u, need_b)
        share = None
        if kernels.any_sparse:
            share = lse.new_zeros(1)
            if lists:
                share = torch.ops.cce.sparse_ce_share(dnll, dlse, targets, lists, options[0])
            dist.all_reduce(share, group=ctx.group)
        given = (dnll, dlse, e, c, targets, lse, bias, u, lora_b)
        if lists:
            op = torch.ops.cce.sparse_ce_backward
            grads = op(*given, lists, share, *options, *kernels.filter, *wanted)
        else:
            grads = kernels.pair[1](*given, *options, *wanted)
        de, dc, dbias, du, db = (g if w else None for g, w in zip(grads, wanted, strict=True))
        return (*none, de, dc, None, dbias, du, db)


def _whole_bounds(
    kernels: ShardKernels,
    group: dist.ProcessGroup | None,
    inputs: tuple[Tensor | None, ...],
    options: tuple,
) -> Bounds | None:
    """This shard's rows with lower bounds of the lse of all shards: the lse of what each of them
    bounds. None where this one is exact."""
    if kernels.filter is None:
        e = inputs[0]
        _gather(e.new_full((1, e.shape[0]), -torch.inf, dtype=torch.float32), group)
        return None
    eps = kernels.filter.eps
    bounds = Bounds(*torch.ops.cce.sparse_ce_bound(*inputs, *options, eps))
    ranks = _gather(bounds.bound2[None], group)[:, 0] * math.log(2)
    return bounds._replace(bound2=torch.logsumexp(ranks, 0) / math.log(2))


def _merge(
    ranks: Tensor, targets: Tensor, options: LossOptions, vocab_total: int
) -> tuple[Tensor, Tensor]:
    """nll and lse (N,) over all shards, from what `reference.shard_statistics` says of each
    (ranks, 2 or 3, N)."""
    lse = torch.logsumexp(ranks[:, 0], 0)
    smoothing = options.label_smoothing
    logit_sum = ranks[:, 2].sum(0) if smoothing else None
    nll = token_nll(lse, ranks[:, 1].sum(0), logit_sum, smoothing, vocab_total)
    valid = targets != options.ignore_index
    return torch.where(valid, nll, 0), torch.where(valid, lse, 0)


def _gather(part: Tensor, group: dist.ProcessGroup | None) -> Tensor:
    """Every rank's part (K, N), as (ranks, K, N).

    One all-gather does what max, sum and target logit would need two all-reduces for, a sum of
    exp(lse) being out of range before the maximum is known. Nothing is rounded on the way, and all
    ranks reduce the same numbers in the same order, so their losses are equal bit by bit. It moves
    more than a ring all-reduce would, but at 8 bytes a token latency is what counts.
    """
    ranks = part.new_empty(dist.get_world_size(group) * part.shape[0], part.shape[1])
    _all_gather(ranks, part, group=group)
    return ranks.view(-1, *part.shape)


def sharded_loss(
    kernels: ShardKernels,
    parallel: VocabParallelOptions,
    vocab_total: int,
    options: LossOptions,
    e: Tensor,
    c: Tensor,
    targets: Tensor,
    bias: Tensor | None,
    u: Tensor | None,
    lora_b: Tensor | None,
) -> tuple[Tensor, Tensor]:
    """nll and lse (N,) over all shards, the same on every rank. e, u and targets are whole; c,
    bias, lora_b this rank's."""
    device = e.device.type
    if torch.is_autocast_enabled(device) and e.dtype != torch.float64:
        # The backward must see what the forward saw, and no autocast reaches into it.
        dtype = torch.get_autocast_dtype(device)
        floats = (e, c, bias, u, lora_b)
        e, c, bias, u, lora_b = (None if t is None else t.to(dtype) for t in floats)
    call = (kernels, parallel.group, parallel.start, vocab_total, options)
    with torch.autocast(device, enabled=False):
        return _ShardedLoss.apply(*call, e, c, targets, bias, u, lora_b)


def stored_loss(
    statistics: Callable[..., Tensor],
    parallel: VocabParallelOptions,
    vocab_total: int,
    options: LossOptions,
    e: Tensor,
    c: Tensor,
    targets: Tensor,
    bias: Tensor | None,
    u: Tensor | None,
    lora_b: Tensor | None,
) -> tuple[Tensor, Tensor]:
    """The same with this rank's logits stored. statistics: `reference.shard_statistics`, or what
    torch.compile makes of it."""
    mine = statistics(e, c, targets, bias, u, lora_b, options, parallel.start, vocab_total)
    ranks = _gather(mine.detach(), parallel.group)
    # Of the other ranks nothing here has a gradient.
    ranks[dist.get_rank(parallel.group)] = mine
    return _merge(ranks, targets, options, vocab_total)
