"""Argument checks of linear_cross_entropy. Each message names the argument, what was expected and what came."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

from cce_ext.options import LossOptions

_DTENSOR_MESSAGE = (
    "{name} is a torch.distributed.tensor.DTensor, which linear_cross_entropy cannot take as it is. "
    "Call it inside the head module's own forward, where FSDP2 has already gathered the weight; for "
    "a head that tensor parallelism shards over the vocabulary, also pass vocab_parallel_options="
    "VocabParallelOptions.from_dtensor(weight) there, or {name}.to_local() with options of your own."
)
_DTENSOR_INPUT_MESSAGE = (
    "{name} is a torch.distributed.tensor.DTensor; pass a plain tensor, whole on every rank: "
    "{name}.to_local() if it is Replicate(), otherwise {name}.redistribute(placements=[Replicate()])"
    ".to_local(grad_placements=[Partial()]) with reduce_e_grad=False in vocab_parallel_options."
)
_ZERO3_HINT = (
    ", the rest of it being on other ranks (DeepSpeed ZeRO-3). Call linear_cross_entropy inside the "
    "head module's own forward, where it is gathered"
)
_REDUCTIONS = ("mean", "sum", "none")
_INTEGERS = (torch.int64, torch.int32, torch.int16, torch.int8, torch.uint8)


def _shape(t: Tensor) -> str:
    return str(tuple(t.shape))


def is_dtensor(t: Any) -> bool:
    """Whether t is a DTensor; by name, so that torch.distributed.tensor is not imported for
    everybody."""
    return type(t) is not Tensor and any(b.__name__ == "DTensor" for b in type(t).__mro__[:-1])


def check_number(
    name: str, value: Any, low: float | None = None, high: float | None = None
) -> float:
    """``value`` as a float, if it is a finite real number in [low, high]."""
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        raise TypeError(f"{name} must be a number, got {type(value).__name__}")
    if not -math.inf < value < math.inf:  # math.isfinite would break a compiled graph
        raise ValueError(f"{name} must be finite, got {value}")
    if low is not None and value < low or high is not None and value > high:
        wanted = f"at least {low:g}" if high is None else f"in [{low:g}, {high:g}]"
        raise ValueError(f"{name} must be {wanted}, got {value}")
    return float(value)


def check_options(
    ignore_index: int, softcap: float | None, logit_scale: float, label_smoothing: float
) -> LossOptions:
    if isinstance(ignore_index, bool) or not isinstance(ignore_index, int):
        raise TypeError(f"ignore_index must be an int, got {type(ignore_index).__name__}")
    return LossOptions(
        ignore_index,
        0.0 if softcap is None else check_number("softcap", softcap, low=0.0),
        check_number("logit_scale", logit_scale),
        check_number("label_smoothing", label_smoothing, low=0.0, high=1.0),
    )


def check_reduction(reduction: str) -> None:
    if reduction not in _REDUCTIONS:
        raise ValueError(f"reduction must be one of {', '.join(_REDUCTIONS)}; got {reduction!r}")


def check_shift(shift: bool | int, targets: Tensor) -> int:
    """``shift`` as an int in [0, T)."""
    if not isinstance(shift, int):
        raise TypeError(f"shift must be a bool or an int, got {type(shift).__name__}")
    shift = int(shift)
    length = targets.shape[-1] if targets.dim() else 0
    if shift == 0:
        return 0
    if shift < 0 or shift >= length:
        raise ValueError(f"shift must be in [0, T) = [0, {length}), got {shift}")
    return shift


def check_bias_type(bias: Any) -> None:
    if bias is not None and not isinstance(bias, Tensor):
        raise TypeError(
            f"bias (the 4th positional argument) must be a Tensor or None, got {type(bias).__name__}. "
            "Callers from before bias existed: pass ignore_index=... by name."
        )


def check_tensors(e: Any, c: Any, targets: Any, bias: Tensor | None) -> None:
    """Types, ranks, shapes and devices of what every head has."""
    for name, t in (("e", e), ("c", c), ("targets", targets), ("bias", bias)):
        if t is None and name == "bias":
            continue
        if not isinstance(t, Tensor):
            raise TypeError(f"{name} must be a Tensor, got {type(t).__name__}")
        if is_dtensor(t):
            message = _DTENSOR_INPUT_MESSAGE if name in ("e", "targets") else _DTENSOR_MESSAGE
            raise TypeError(message.format(name=name))
    if e.dim() < 1 or not e.is_floating_point():
        raise (ValueError if e.is_floating_point() else TypeError)(
            f"e must be a floating-point tensor of shape (..., D), got {e.dtype} of shape {_shape(e)}"
        )
    if targets.dtype not in _INTEGERS:
        raise TypeError(f"targets must be integers (int64, say), got {targets.dtype}")
    if e.shape[:-1] != targets.shape:
        raise ValueError(
            f"targets must have e's shape without its last dimension, {tuple(e.shape[:-1])}, got {_shape(targets)}"
        )
    _check_matrix("c", c, "(V, D)", e.shape[-1], e)
    if bias is not None:
        if bias.dim() != 1 or bias.shape[0] != c.shape[0]:
            raise ValueError(f"bias must have shape (V,) = ({c.shape[0]},), got {_shape(bias)}")
        _check_like("bias", bias, e)
    if targets.device != e.device:
        raise ValueError(f"targets must be on e's device, {e.device}, got {targets.device}")


def check_low_rank(e: Tensor, c: Tensor, lora_a: Any, lora_b: Any, lora_scale: Any) -> float:
    """``lora_scale`` as a float, after checking A (R, D) and B (V, R)."""
    if (lora_a is None) != (lora_b is None):
        raise ValueError("lora_a and lora_b must be given together")
    scale = check_number("lora_scale", lora_scale)
    if lora_a is None:
        return scale
    for name, t in (("lora_a", lora_a), ("lora_b", lora_b)):
        if not isinstance(t, Tensor):
            raise TypeError(f"{name} must be a Tensor, got {type(t).__name__}")
        if is_dtensor(t):
            raise TypeError(_DTENSOR_MESSAGE.format(name=name))
    _check_matrix("lora_a", lora_a, "(R, D)", e.shape[-1], e)
    expected = (c.shape[0], lora_a.shape[0])
    if tuple(lora_b.shape) != expected:
        raise ValueError(f"lora_b must have shape (V, R) = {expected}, got {_shape(lora_b)}")
    _check_like("lora_b", lora_b, e)
    return scale


def _check_matrix(name: str, t: Tensor, shape: str, columns: int, e: Tensor) -> None:
    if t.dim() != 2 or t.shape[1] != columns:
        raise ValueError(
            f"{name} must have shape {shape} with D = {columns}, e's last dimension; got {_shape(t)}"
            f"{_ZERO3_HINT if hasattr(t, 'ds_id') else ''}"
        )
    _check_like(name, t, e)


def _check_like(name: str, t: Tensor, e: Tensor) -> None:
    if not t.is_floating_point():
        raise TypeError(f"{name} must be floating point, got {t.dtype}")
    if t.device != e.device:
        raise ValueError(f"{name} must be on e's device, {e.device}, got {t.device}")


def check_dtypes(e: Tensor, c: Tensor) -> None:
    if e.dtype != c.dtype and not torch.is_autocast_enabled(e.device.type):
        raise TypeError(
            f"c must have e's dtype, {e.dtype}, got {c.dtype}; cast one of them, or use torch.autocast"
        )


def check_target_range(targets: Tensor, vocab: int, ignore_index: int) -> None:
    """IndexError for a target outside [0, V), as F.cross_entropy raises it. CPU only: on a GPU it would wait."""
    if targets.device.type != "cpu" or targets.numel() == 0 or torch.compiler.is_compiling():
        return
    if type(targets) is not Tensor:  # fake tensors have no data
        return
    outside = ((targets < 0) | (targets >= vocab)) & (targets != ignore_index)
    if bool(outside.any()):
        first = targets[outside][0].item()
        raise IndexError(
            f"targets: {first} is out of range, expected [0, {vocab}) or ignore_index = {ignore_index}"
        )
