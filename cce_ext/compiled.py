"""impl="torch_compile": the eager formula under torch.compile, which fuses what follows the matmul.
It stores the logits."""

from __future__ import annotations

import functools
from collections.abc import Callable

import torch


@functools.cache
def compiled(formula: Callable) -> Callable:
    """torch.compile of a formula of :mod:`cce_ext.reference`, compiled at its first call."""
    return torch.compile(formula)
