"""The implementations that store the logits: the eager formula, or the same under torch.compile, which
fuses what follows the matmul."""

from __future__ import annotations

import functools
from collections.abc import Callable

import torch


@functools.cache
def run_as(name: str, formula: Callable) -> Callable:
    """A formula of :mod:`cce_ext.reference` as the implementation of this name runs it: as it is
    ("reference"), or compiled at its first call ("torch_compile")."""
    return torch.compile(formula) if name == "torch_compile" else formula
