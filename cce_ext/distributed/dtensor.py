"""What a DTensor classifier's placement says, in plain tensors."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, NamedTuple

from cce_ext.checks import is_dtensor
from cce_ext.heads import Head

if TYPE_CHECKING:
    import torch.distributed as dist


class Shard0(NamedTuple):
    """This rank's rows [start, stop) of a tensor with ``rows`` rows, and the ranks that share it."""

    start: int
    stop: int
    rows: int
    group: dist.ProcessGroup


def shard_of(weight: Any, name: str = "weight") -> Shard0:
    """Rows of a DTensor that is Shard(0) on a one-dimensional mesh.

    Raises:
        TypeError: not a DTensor.
        ValueError: another placement, or a mesh of more than one dimension.
    """
    if not is_dtensor(weight):
        raise TypeError(
            f"{name} must be a DTensor, got {type(weight).__name__}; for a plain shard give start and "
            "stop, or use VocabParallelOptions.from_vocab"
        )
    mesh, placements = weight.device_mesh, weight.placements
    if mesh.ndim != 1 or not placements[0].is_shard(0):
        raise ValueError(
            f"{name} must be Shard(0) on a one-dimensional mesh, got {placements} on a mesh of shape "
            f"{tuple(mesh.shape)}; under FSDP2 ask inside the head's own forward, where FSDP2's "
            "dimension is gathered"
        )
    # torch.chunk's rule, which Shard follows: full chunks first, then a shorter one, then none.
    rows, rank, world = weight.shape[0], mesh.get_local_rank(), mesh.size()
    each = -(-rows // world)
    start, stop = min(rank * each, rows), min((rank + 1) * each, rows)
    return Shard0(start, stop, rows, mesh.get_group())


def _local(name: str, t: Any, sharded: bool) -> Any:
    """A DTensor's local tensor, differentiably, where its placement is what ``name`` must have:
    Shard(0) or, with ``sharded`` False, Replicate. Anything else than a DTensor as it is."""
    if not is_dtensor(t):
        return t
    if sharded:
        shard_of(t, name)
    elif not all(placement.is_replicate() for placement in t.placements):
        raise ValueError(
            f"{name} must be a plain tensor or a DTensor that is Replicate(), got {t.placements}; it "
            "belongs whole to every rank of a classifier sharded over the vocabulary"
        )
    return t.to_local()


def local_arguments(c: Any, bias: Any, lora_a: Any, lora_b: Any) -> tuple[Any, Any, Any, Any]:
    """The arguments of a sharded call with the local tensors of DTensors: c, bias and lora_b must be
    Shard(0), lora_a Replicate.

    Raises:
        ValueError: another placement.
    """
    return (
        _local("c", c, True),
        _local("bias", bias, True),
        _local("lora_a", lora_a, False),
        _local("lora_b", lora_b, True),
    )


def local_head(head: Head) -> Head:
    """The same for a module's tensors."""
    weight, bias, *_ = local_arguments(head.weight, head.bias, None, None)
    adapters = []
    for adapter in head.adapters:
        *_, a, b = local_arguments(None, None, adapter.a, adapter.b)
        adapters.append(adapter._replace(a=a, b=b))
    return head._replace(weight=weight, bias=bias, adapters=tuple(adapters))
