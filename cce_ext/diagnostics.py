"""What the last call of linear_cross_entropy in this process did, for users who wonder which path
they are on."""

from __future__ import annotations

from typing import Any

import torch

_last: dict[str, Any] = {}


def record(**facts: Any) -> None:
    """Replaces what is known of the last call; nothing is recorded while torch.compile traces."""
    if torch.compiler.is_compiling():
        return
    _last.clear()
    _last.update(facts)


def diagnostics() -> dict[str, Any]:
    """Facts of the last call: path (compiled, blocked, triton, reference, torch_compile,
    vocab_parallel or module), reason (why not the compiled path; empty if it was), device, dtype,
    shape (N, V, D, R) and filter (the resolved threshold and what it may filter; the backward is
    exact on every device today). Empty before the first call and for compiled callers.
    """
    return dict(_last)
