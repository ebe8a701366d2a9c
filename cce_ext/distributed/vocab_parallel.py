"""Vocabulary parallelism: every rank holds some rows of the classifier and all tokens; every rank
gets the same loss.

Method: each rank's logsumexp and target logit come from its own shard; the global logsumexp is that
of the ranks' (max all-reduce, then sum), the target logit the sum over ranks, of which one holds
it. The backward of a shard is the ordinary one with the global logsumexp, and the hidden states'
gradient is summed over the ranks in float32.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from cce_ext.options import LossOptions
from cce_ext.reference import RowStatistics


@dataclass
class VocabParallelOptions:
    """This rank's part of the vocabulary.

    Args:
        start: first global id of this rank's rows of the classifier.
        stop: one past the last.
        group: the process group whose ranks hold the shards; None: the default group.
        reduce_e_grad: all-reduce the hidden states' gradient over the group (False where the
            caller's framework does it).
        vocab_size: size of the whole vocabulary; None: found by one all-reduce at the first use.
    """

    start: int
    stop: int
    group: dist.ProcessGroup | None = None
    reduce_e_grad: bool = True
    vocab_size: int | None = None

    @classmethod
    def from_vocab(
        cls, vocab_size: int, group: dist.ProcessGroup | None = None, reduce_e_grad: bool = True
    ) -> VocabParallelOptions:
        """An even split of ``vocab_size`` ids over the group's ranks; the first ranks get one more
        where it is uneven."""
        rank, world = dist.get_rank(group), dist.get_world_size(group)
        each, extra = divmod(vocab_size, world)
        start = rank * each + min(rank, extra)
        return cls(start, start + each + (rank < extra), group, reduce_e_grad, vocab_size)

    def whole_vocab(self, device: torch.device) -> int:
        """Size of the whole vocabulary: the largest ``stop`` of the group."""
        if self.vocab_size is None:
            stop = torch.tensor(self.stop, device=device)
            dist.all_reduce(stop, op=dist.ReduceOp.MAX, group=self.group)
            self.vocab_size = int(stop)
        return self.vocab_size


def _sum_over_ranks(t: Tensor, group: dist.ProcessGroup | None) -> Tensor:
    t = t.contiguous()
    dist.all_reduce(t, group=group)
    return t


class _ReduceGradient(torch.autograd.Function):
    """Identity whose gradient is summed over the ranks in float32."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, group: dist.ProcessGroup | None) -> Tensor:
        ctx.group = group
        return x.view_as(x)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        acc = grad.to(torch.promote_types(grad.dtype, torch.float32), copy=True)
        return _sum_over_ranks(acc, ctx.group).to(grad.dtype), None


def reduce_gradient(x: Tensor, parallel: VocabParallelOptions) -> Tensor:
    """``x``, whose gradient every rank holds a part of: the parts are summed over the group."""
    return _ReduceGradient.apply(x, parallel.group)


class _ShardedLoss(torch.autograd.Function):
    """(nll, lse) over all shards from one rank's shard. One autograd function, because the shard's
    backward needs the global logsumexp, which only exists between the two collectives."""

    @staticmethod
    def forward(ctx, pair, parallel, vocab_total, options, e, c, targets, bias, u, lora_b):
        forward_op, ctx.backward_op = pair
        ctx.options = (*options, parallel.start, vocab_total)
        local = RowStatistics(*forward_op(e, c, targets, bias, u, lora_b, *ctx.options, False))
        lse = _combine_lse(local.lse, parallel)
        parts = [local.target_logit] + ([local.logit_sum] if options.label_smoothing else [])
        sums = _sum_over_ranks(torch.stack(parts), parallel.group)
        valid = targets != options.ignore_index
        nll = lse - sums[0]
        if options.label_smoothing:
            smooth = options.label_smoothing
            nll = (1 - smooth) * nll + smooth * (lse - sums[1] / vocab_total)
        nll, lse = torch.where(valid, nll, 0), torch.where(valid, lse, 0)
        ctx.save_for_backward(e, c, targets, bias, u, lora_b, lse)
        ctx.set_materialize_grads(False)
        return nll, lse

    @staticmethod
    def backward(ctx, dnll, dlse):
        none = (None,) * 4
        if dnll is None and dlse is None:
            return (*none, *(None,) * 6)
        e, c, targets, bias, u, lora_b, lse = ctx.saved_tensors
        _, _, _, _, need_e, need_c, _, need_bias, need_u, need_b = ctx.needs_input_grad
        wanted = (need_e, need_c, need_bias, need_u, need_b)
        grads = ctx.backward_op(
            dnll, dlse, e, c, targets, lse, bias, u, lora_b, *ctx.options, *wanted
        )
        de, dc, dbias, du, db = (g if w else None for g, w in zip(grads, wanted, strict=True))
        return (*none, de, dc, None, dbias, du, db)


def _combine_lse(lse: Tensor, parallel: VocabParallelOptions) -> Tensor:
    """logsumexp over the ranks. Two collectives rather than one sum of exp(lse): only the maximum
    keeps it in range."""
    top = lse.clone()
    dist.all_reduce(top, op=dist.ReduceOp.MAX, group=parallel.group)
    reference = torch.where(top == -torch.inf, 0, top)
    return reference + torch.log(_sum_over_ranks(torch.exp(lse - reference), parallel.group))


def sharded_loss(
    pair: tuple[Callable, Callable],
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
    return _ShardedLoss.apply(pair, parallel, vocab_total, options, e, c, targets, bias, u, lora_b)
