"""The Triton path, impl="triton": a readable forward and an exact backward, to compare the compiled
kernels with.

Importing this package does not import Triton: :func:`forward` and :func:`backward` do at their
first call. With TRITON_INTERPRET=1 in the environment Triton interprets the kernels, also on a CPU;
it must be there before Triton is first imported, which parts of PyTorch do. Method: Wijmans et al.,
arXiv 2411.09009.
"""

from __future__ import annotations

import torch
from torch import Tensor


def package_reason() -> str:
    """Why there is no Triton at all, or ''."""
    try:
        import triton  # noqa: F401
    except ImportError as error:
        return f"Triton does not import: {error} (pip install triton)"
    return ""


def interpreted() -> bool:
    """Whether Triton interprets kernels. The environment may have changed since its import; its own
    library functions tell."""
    from triton import JITFunction, language

    return not isinstance(language.max, JITFunction)


def unavailable_reason(device: torch.device) -> str:
    """Why the kernels cannot run on tensors of this device, and the way out; '' if they can."""
    reason = package_reason()
    if not reason and device.type != "cuda" and not interpreted():
        reason = (
            f"Triton cannot compile for {device.type} tensors; move them to a GPU, or set "
            "TRITON_INTERPRET=1 before Python starts to interpret the kernels"
        )
    return reason


def forward(*args: object) -> tuple[Tensor, ...]:
    """:func:`cce_ext.triton.pair.forward`."""
    from cce_ext.triton import pair

    return pair.forward(*args)


def backward(*args: object) -> tuple[Tensor, ...]:
    """:func:`cce_ext.triton.pair.backward`."""
    from cce_ext.triton import pair

    return pair.backward(*args)
