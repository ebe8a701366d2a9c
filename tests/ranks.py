"""Runs a function on several ranks of this machine."""

from __future__ import annotations

import multiprocessing
from collections.abc import Callable
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.multiprocessing as mp

# Ranks are forked from a server that has imported these once and computed nothing, which takes a
# tenth of the time of as many fresh interpreters.
PRELOAD = ["torch.distributed.fsdp", "torch.distributed.tensor", "torch._dynamo", "cce_ext"]


def run_ranks(
    worker: Callable[..., None],
    world: int,
    folder: Path,
    *args: Any,
    timeout: float = 60,
    backend: str = "gloo",
) -> None:
    """``worker(rank, world, *args)`` on each of ``world`` ranks of a group, whose collectives
    wait for ``timeout`` seconds; over NCCL, one GPU a rank. An error on any rank is raised here; a rank may leave by
    os._exit(0)."""
    multiprocessing.get_context("forkserver").set_forkserver_preload(PRELOAD)
    arguments = (worker, world, str(folder / "store"), timeout, backend, args)
    mp.start_processes(_rank, arguments, nprocs=world, start_method="forkserver")


def _rank(
    rank: int,
    worker: Callable[..., None],
    world: int,
    store: str,
    timeout: float,
    backend: str,
    args: tuple,
) -> None:
    torch.set_num_threads(1)
    if "nccl" in backend:
        torch.cuda.set_device(rank)
    wait = timedelta(seconds=timeout)
    dist.init_process_group(
        backend, init_method=f"file://{store}", rank=rank, world_size=world, timeout=wait
    )
    worker(rank, world, *args)
    dist.destroy_process_group()
