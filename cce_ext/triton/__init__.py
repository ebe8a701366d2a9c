"""The Triton path, impl="triton": a readable forward and an exact backward, to compare the compiled
kernels with.

Importing this package does not import Triton; :func:`forward` and :func:`backward` do at their
first call. TRITON_INTERPRET=1, set before that, makes Triton interpret the kernels, also for
tensors on a CPU. Method: Wijmans et al., arXiv 2411.09009.
"""

from __future__ import annotations

import importlib.util
import os

import torch
from torch import Tensor


def package_reason() -> str:
    """Why there is no Triton at all, or ''."""
    if importlib.util.find_spec("triton") is None:
        return "the triton package is not installed (pip install triton)"
    return ""


def interpreted() -> bool:
    """Whether Triton is asked to interpret its kernels rather than to compile them."""
    return os.environ.get("TRITON_INTERPRET", "").lower() in ("1", "true", "on", "yes", "y")


def unavailable_reason(device: torch.device) -> str:
    """Why the kernels cannot run on tensors of this device, and the way out; '' if they can."""
    if package_reason():
        return package_reason()
    if device.type != "cuda" and not interpreted():
        return (
            f"Triton has no compiler for {device.type} tensors; set TRITON_INTERPRET=1 before "
            "Python starts to interpret the kernels, or move the tensors to a GPU"
        )
    return ""


def forward(*args: object) -> tuple[Tensor, ...]:
    """:func:`cce_ext.triton.pair.forward`."""
    from cce_ext.triton import pair

    return pair.forward(*args)


def backward(*args: object) -> tuple[Tensor, ...]:
    """:func:`cce_ext.triton.pair.backward`."""
    from cce_ext.triton import pair

    return pair.backward(*args)
