"""Do the ranks of a sharded loss mean the same loss?

The loss's own collectives have buffers of the number of tokens: a rank that brings another number
makes its peers wait for bytes that never come, and one that brings other options makes them wrong
in silence. So the ranks first gather a vector of fixed size that says what each is about to do, and
each of them compares all.
"""

from __future__ import annotations

import struct
from collections.abc import Callable
from typing import TYPE_CHECKING, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor

from cce_ext.eager import differentiates
from cce_ext.heads import Head
from cce_ext.options import LossOptions

if TYPE_CHECKING:
    from cce_ext.distributed.vocab_parallel import VocabParallelOptions

_DTYPES = (torch.float64, torch.float32, torch.bfloat16, torch.float16)
_REDUCTIONS = ("mean", "sum", "none")


def _bits(x: float) -> int:
    return struct.unpack("<q", struct.pack("<d", x))[0]


def _float(bits: int) -> str:
    return f"{struct.unpack('<d', struct.pack('<q', bits))[0]:g}"


_NO_EPS = _bits(-1.0)
#: What every rank must say alike, and how a value reads in a message.
_FIELDS: tuple[tuple[str, Callable[[int], str]], ...] = (
    ("the number of tokens", str),
    ("e's last dimension", str),
    ("the rank of the low-rank update", str),
    ("e's dtype", lambda i: str(_DTYPES[i]).removeprefix("torch.")),
    ("whether there is a bias", lambda i: str(bool(i))),
    ("ignore_index", str),
    ("softcap", _float),
    ("logit_scale", _float),
    ("label_smoothing", _float),
    ("filter_eps", lambda i: "None" if i == _NO_EPS else _float(i)),
    ("reduction", lambda i: _REDUCTIONS[i]),
    ("reduce_e_grad", lambda i: str(bool(i))),
    ("whether e and each lora_a need gradients", bin),
    ("whether there is anything to train", lambda i: str(bool(i))),
    ("the targets (their checksum)", str),
)


class _Facts(NamedTuple):
    """One rank's words: its shard, what must be alike, and where and over what to compare."""

    shard: tuple[int, int]
    alike: tuple[int, ...]  # _FIELDS without the checksum
    device: torch.device
    group: dist.ProcessGroup
    waits: bool  # whether comparing waits for a GPU


# (group, shard, facts) -> vocabulary, where asking waits for a GPU. All ranks see the same calls,
# so they skip the same ones.
_agreed: dict[tuple, int] = {}


def agree(
    parallel: VocabParallelOptions,
    options: LossOptions,
    eps: float | None,
    reduction: str,
    e: Tensor,
    head: Head,
    targets: Tensor,
) -> int:
    """Compares this rank's call with the others' and returns the size of the whole vocabulary; e
    (N, D), targets (N,) after the shift; eps: the threshold of the filter.

    Raises:
        ValueError: on every rank, if the ranks disagree or their shards do not make one vocabulary.
    """
    facts = _facts(parallel, options, eps, reduction, e, head, targets.device)
    if not facts.waits:
        return _compare(facts, targets, parallel.vocab_size)
    # vocab_size is no part of the key: it may be known to one rank from an earlier call.
    key = (facts.group.group_name, facts.shard, facts.alike)
    if key not in _agreed:
        _agreed[key] = _compare(facts, targets, parallel.vocab_size)
    return _agreed[key]


def _facts(
    parallel: VocabParallelOptions,
    options: LossOptions,
    eps: float | None,
    reduction: str,
    e: Tensor,
    head: Head,
    device: torch.device,
) -> _Facts:
    if parallel.group is None and not dist.is_initialized():
        raise RuntimeError(
            "vocab_parallel_options: torch.distributed is not initialised; call "
            "torch.distributed.init_process_group first, or leave vocab_parallel_options out where "
            "one process holds the whole vocabulary"
        )
    group = parallel.group or dist.group.WORLD
    adapters = head.adapters
    replicated = [differentiates((t,)) for t in (e, *(a.a for a in adapters))]
    sharded = (head.weight, head.bias, *(a.b for a in adapters))
    alike = (
        *e.shape,
        sum(a.a.shape[0] for a in adapters),
        _DTYPES.index(e.dtype),
        int(head.bias is not None),
        options.ignore_index,
        *map(_bits, options[1:]),
        _NO_EPS if eps is None else _bits(eps),
        _REDUCTIONS.index(reduction),
        int(parallel.reduce_e_grad),
        sum(need << i for i, need in enumerate(replicated)),
        int(any(replicated) or differentiates(sharded)),
    )
    waits = "cpu:" not in dist.get_backend_config(group)
    device = device if waits else torch.device("cpu")
    return _Facts((parallel.start, parallel.stop), alike, device, group, waits)


def _compare(facts: _Facts, targets: Tensor, vocab_size: int | None) -> int:
    size = -1 if vocab_size is None else vocab_size
    mine = torch.tensor([*facts.shard, size, *facts.alike, 0], device=facts.device)
    if targets.device == facts.device:  # otherwise reading them would wait for the GPU
        weights = torch.arange(1, targets.numel() + 1, device=facts.device)
        mine[-1] = (targets * weights).sum()
    ranks = [torch.empty_like(mine) for _ in range(facts.group.size())]
    dist.all_gather(ranks, mine, group=facts.group)
    said = torch.stack(ranks).tolist()
    for i, (name, read) in enumerate(_FIELDS, start=3):
        if len({one[i] for one in said}) > 1:
            raise ValueError(
                f"vocab_parallel_options: the ranks disagree on {name}: "
                f"{_who([read(one[i]) for one in said])}. Every rank of the group must be given the "
                "same tokens and options; ranks with tokens of their own either gather them first "
                "or keep the whole vocabulary each"
            )
    return _vocabulary(said)


def _vocabulary(said: list[list[int]]) -> int:
    """Size of the vocabulary that the ranks' shards make up."""
    end = 0
    for start, stop, *_ in sorted(said):
        if start != end or stop < start:
            shards = _who([f"[{one[0]}, {one[1]})" for one in said])
            raise ValueError(
                "vocab_parallel_options: start and stop of the ranks must cover the vocabulary "
                f"without gap or overlap, got {shards}; VocabParallelOptions.from_vocab makes such a "
                "split"
            )
        end = stop
    sizes = [one[2] for one in said]
    if any(size not in (-1, end) for size in sizes):
        named = _who(["None" if size == -1 else str(size) for size in sizes])
        raise ValueError(
            f"vocab_parallel_options: the ranks' shards make a vocabulary of {end}, but vocab_size "
            f"is {named}; leave it out or correct it"
        )
    return end


def _who(values: list[str]) -> str:
    """'34 on rank 0, 2; 30 on rank 1', with the ranks' numbers in the group."""
    ranks: dict[str, list[str]] = {}
    for rank, value in enumerate(values):
        ranks.setdefault(value, []).append(str(rank))
    return "; ".join(f"{value} on rank {', '.join(where)}" for value, where in ranks.items())
