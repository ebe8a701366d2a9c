"""impl="torch_compile": the eager formula under torch.compile, which fuses what follows the matmul.
It stores the logits."""

from __future__ import annotations

import functools
from collections.abc import Callable

import torch

from cce_ext.reference import statistics


@functools.cache
def compiled_statistics() -> Callable[..., tuple]:
    """torch.compile of :func:`cce_ext.reference.statistics`, compiled at its first call."""
    return torch.compile(statistics)
