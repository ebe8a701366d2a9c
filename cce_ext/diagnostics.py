"""What the last call of linear_cross_entropy in this process did, for users who wonder which path
they are on."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

_last: dict[str, Any] = {}
# Of the last sparse backward, on the device until somebody asks: tally, dropped share, exact rows.
_sparse: list[Tensor] = []


def record(**facts: Any) -> None:
    """Replaces what is known of the last call; nothing is recorded while torch.compile traces."""
    if torch.compiler.is_compiling():
        return
    _last.clear()
    _last.update(facts)
    _sparse.clear()


def record_backward(tally: Tensor, dropped_share: Tensor, exact: Tensor) -> None:
    """Keeps what a sparse backward found; nothing is read before `diagnostics` is called."""
    _sparse[:] = [tally, dropped_share, exact]


def diagnostics() -> dict[str, Any]:
    """Facts of the last call: path (compiled, blocked, triton, reference, torch_compile,
    vocab_parallel or module), reason (why not the compiled path; empty for that path and for
    triton), device, dtype, shape (N, V, D, R), filter (the resolved threshold and what it may
    filter) and, for compiled kernels on a GPU, exact (why the backward is exact; empty where it is
    sparse). Empty before the first call and for compiled callers.

    After a sparse backward also: candidates and kept (entries; of a row block's candidates no more
    than its pool holds), dropped_share (of the probability mass), row_blocks and overflowed_blocks
    (of 128 rows), exact_rows (rows that took the exact way). Only asking for them waits for the
    device.
    """
    facts = dict(_last)
    if _sparse:
        tally, share, exact = _sparse
        candidates, kept, overflowed, blocks, _ = tally.tolist()
        facts |= {
            "candidates": candidates,
            "kept": kept,
            "dropped_share": share.item(),
            "overflowed_blocks": overflowed,
            "row_blocks": blocks,
            "exact_rows": int(exact.sum()),
        }
    return facts
