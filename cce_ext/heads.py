"""Output layers given as modules: what they compute, as tensors that the loss can fuse.

``nn.Linear`` is a weight and a bias. A PEFT ``lora.Linear`` is its base layer plus its active
adapters, several of them joined along the rank; a ``ModulesToSaveWrapper`` is its active copy.
Reading ``.weight`` of a PEFT layer would give the frozen base alone, so no attribute is taken
without knowing the module. What cannot be fused (several DoRA adapters or one with active dropout,
other variants, quantised bases, unknown modules) is called as a module and its logits are stored;
``Head.fallback`` says why. PEFT is recognised by its attributes and never imported.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

_DORA = "DoRA adapter {!r} has active dropout, a bias or another adapter beside it"


class Adapter(NamedTuple):
    """One low-rank update of a head: scale * (dropout(e) aᵀ) bᵀ."""

    a: Tensor  # (R, D)
    b: Tensor  # (V, R)
    scale: float
    dropout: Callable[[Tensor], Tensor] | None = None  # None: none, or inactive


class Head(NamedTuple):
    """What an output layer computes. With a `fallback` reason only `module` may be used."""

    weight: Tensor | None  # (V, D); None: unknown, with a fallback reason
    bias: Tensor | None  # (V,)
    adapters: tuple[Adapter, ...] = ()
    module: nn.Module | None = None
    fallback: str = ""
    magnitude: Tensor | None = None  # (V,): a DoRA head's row lengths (dora.py); with one adapter


def low_rank_update(
    e: Tensor, adapters: tuple[Adapter, ...]
) -> tuple[Tensor | None, Tensor | None]:
    """U (N, R) and B (V, R) of e (N, D) and some adapters, their ranks joined; (None, None) without
    adapters.

    The scale goes into A, which is small, in A's own dtype; U has e's dtype (autocast's under
    autocast).
    """
    if not adapters:
        return None, None
    us = []
    for adapter in adapters:
        hidden = e if adapter.dropout is None else adapter.dropout(e)
        us.append(F.linear(hidden, (adapter.a * adapter.scale).to(e.dtype)))
    if len(adapters) == 1:
        return us[0], adapters[0].b
    return torch.cat(us, -1), torch.cat([adapter.b for adapter in adapters], 1)


def resolve_head(module: nn.Module) -> Head:
    """The head that a module is; with a fallback reason where only calling it is right."""
    if _is_modules_to_save(module):
        return resolve_head(_active_copy(module))
    if _is_lora(module):
        return _lora_head(module)
    return _linear_head(module)


def _linear_head(module: nn.Module) -> Head:
    weight = getattr(module, "weight", None)
    if not isinstance(module, nn.Linear):
        reason = f"{type(module).__name__} is not a known kind of linear layer"
    elif type(module).forward is not nn.Linear.forward:
        reason = f"{type(module).__name__} has a forward of its own"
    elif not weight.is_floating_point():
        reason = f"its weight is quantised ({weight.dtype})"
    else:
        return Head(weight, module.bias, module=module)
    return Head(weight, None, module=module, fallback=reason)


def _is_modules_to_save(module: nn.Module) -> bool:
    return hasattr(module, "modules_to_save") and hasattr(module, "original_module")


def _active_copy(module: Any) -> nn.Module:
    active = _names(module, "active_adapters", "active_adapter")
    if (
        getattr(module, "disable_adapters", False)
        or not active
        or active[0] not in module.modules_to_save
    ):
        return module.original_module
    return module.modules_to_save[active[0]]


def _is_lora(module: nn.Module) -> bool:
    return all(hasattr(module, name) for name in ("base_layer", "lora_A", "lora_B", "scaling"))


def _names(module: Any, *attributes: str) -> list[str]:
    """The first attribute that exists, a name or several, as a list."""
    for attribute in attributes:
        value = getattr(module, attribute, None)
        if value is not None:
            return [value] if isinstance(value, str) else list(value)
    return []


def _lora_head(module: Any) -> Head:
    base = resolve_head(module.base_layer)
    # Merged: the update is already in the base weight. Disabled: it is not wanted.
    if getattr(module, "merged", False) or getattr(module, "disable_adapters", False):
        if getattr(module, "merged", False) and getattr(module, "disable_adapters", False):
            # PEFT unmerges at its next forward; let it.
            return base._replace(
                module=module, fallback="its adapters are merged and disabled at the same time"
            )
        return base
    if base.fallback:
        return base._replace(module=module)
    adapters, bias, magnitude = [], base.bias, None
    names = [n for n in _names(module, "active_adapters", "active_adapter") if n in module.lora_A]
    for name in names:
        dropout = module.lora_dropout[name] if name in getattr(module, "lora_dropout", {}) else None
        if isinstance(dropout, nn.Identity) or not getattr(dropout, "training", False):
            dropout = None
        update_bias = getattr(module.lora_B[name], "bias", None)
        reason = _unfusable(module, name)
        if _is_dora(module, name):
            alone = len(names) == 1 and dropout is None and update_bias is None
            reason = reason or ("" if alone else _DORA.format(name))
            magnitude = module.lora_magnitude_vector[name].weight
        if reason:
            return base._replace(module=module, fallback=reason)
        scale = float(module.scaling[name])
        adapters.append(
            Adapter(module.lora_A[name].weight, module.lora_B[name].weight, scale, dropout)
        )
        if update_bias is not None:
            bias = update_bias * scale if bias is None else bias + update_bias * scale
    return Head(base.weight, bias, tuple(adapters), module, magnitude=magnitude)


def _is_dora(module: Any, name: str) -> bool:
    """Whether an adapter gives each row of the weight a learned length."""
    variant = getattr(module, "lora_variant", {})
    kind = type(variant[name]).__name__ if name in variant else ""
    return kind == "DoraLinearVariant" or getattr(module, "use_dora", {}).get(name, False)


def _unfusable(module: Any, name: str) -> str:
    """Why this adapter of a LoRA layer is more than a low-rank update, or ''."""
    variant = getattr(module, "lora_variant", {})
    if name in variant and not _is_dora(module, name):
        return f"adapter {name!r} is a LoRA variant ({type(variant[name]).__name__})"
    if getattr(module, "fan_in_fan_out", False):
        return "its weight is stored transposed (fan_in_fan_out)"
    return ""
