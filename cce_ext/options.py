"""The options of a call: implementations, presets, and what the filter threshold means."""

from __future__ import annotations

import enum
import math
from typing import NamedTuple

import torch

from cce_ext.constants import IGNORE_INDEX


class LinearCrossEntropyImpl(enum.IntEnum):
    """Names that ``impl`` accepts, as an enum; the strings are the names in lower case."""

    CCE = 0
    TORCH_COMPILE = 1
    CCE_EXACT = 2
    CCE_KAHAN = 3
    CCE_KAHAN_FULL = 4
    CCE_KAHAN_FULL_C = 5
    CCE_KAHAN_FULL_E = 6
    CCE_KAHAN_FULL_C_FULL_E = 7
    TRITON = 8
    REFERENCE = 9


class Filter(NamedTuple):
    """Which gradients may be sparse, and from which probability on an entry is kept. eps None:
    nothing is filtered."""

    eps: float | None
    e_grad: bool
    c_grad: bool


class LossOptions(NamedTuple):
    """The numbers of the loss, resolved and checked; fields as in csrc/core/params.h."""

    ignore_index: int = IGNORE_INDEX
    softcap: float = 0.0
    logit_scale: float = 1.0
    label_smoothing: float = 0.0


#: preset -> (filter dE, filter dC); None: as the caller's options say. Sums are fp32 in every
#: preset.
PRESETS: dict[str, tuple[bool, bool] | None] = {
    "cce": None,
    "cce_exact": (False, False),
    "cce_kahan": (True, True),
    "cce_kahan_full": (False, False),
    "cce_kahan_full_c": (True, False),
    "cce_kahan_full_e": (False, True),
    "cce_kahan_full_c_full_e": (False, False),
}
IMPLEMENTATIONS = tuple(impl.name.lower() for impl in LinearCrossEntropyImpl)


def implementation_name(impl: str | LinearCrossEntropyImpl) -> str:
    """``impl`` as its lower-case name.

    Raises:
        ValueError: no such implementation.
    """
    name = impl.name.lower() if isinstance(impl, LinearCrossEntropyImpl) else impl
    if name not in IMPLEMENTATIONS:
        raise ValueError(f"impl must be one of {', '.join(IMPLEMENTATIONS)}; got {impl!r}")
    return name


def resolve_eps(filter_eps: float | str | None, dtype: torch.dtype) -> float | None:
    """The filter threshold as a probability.

    "auto": 2⁻¹³ for bfloat16, 2⁻¹⁵ for float16; "high": 2⁻¹⁵; None: exact.

    Raises:
        ValueError: another string, a negative number or NaN.
        TypeError: neither number, string nor None.
    """
    if filter_eps is None:
        return None
    if filter_eps == "auto":
        return 2.0**-13 if dtype == torch.bfloat16 else 2.0**-15
    if filter_eps == "high":
        return 2.0**-15
    if isinstance(filter_eps, str):
        raise ValueError(f'filter_eps must be "auto", "high", a number or None; got {filter_eps!r}')
    if not isinstance(filter_eps, (int, float)):
        raise TypeError(
            f'filter_eps must be "auto", "high", a number or None; got {type(filter_eps).__name__}'
        )
    if not (math.isfinite(filter_eps) and filter_eps >= 0):
        raise ValueError(f"filter_eps must be a finite number of at least 0; got {filter_eps}")
    return float(filter_eps)


def resolve_filter(
    impl: str,
    filter_eps: float | str | None,
    filter_e_grad: bool,
    filter_c_grad: bool,
    dtype: torch.dtype,
) -> Filter:
    """What a preset and the caller's options come to. A preset other than "cce" overrides the
    options, as published."""
    eps = resolve_eps(filter_eps, dtype)
    preset = PRESETS.get(impl, (False, False))
    if preset is not None:
        filter_e_grad, filter_c_grad = preset
        if filter_e_grad or filter_c_grad:
            eps = resolve_eps("auto", dtype)
    filters = eps is not None and (filter_e_grad or filter_c_grad)
    return Filter(eps if filters else None, filters and filter_e_grad, filters and filter_c_grad)
