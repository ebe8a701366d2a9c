"""Which implementation serves a call, and why it is not the compiled one."""

from __future__ import annotations

import functools

import torch
from torch import Tensor

from cce_ext import info, triton

#: implementations that are no pair of ops, and why their calls are not the compiled kernels'
STORES_LOGITS = {
    name: f"impl={name!r} stores the logits" for name in ("reference", "torch_compile")
}
_COMPILED_DTYPES = {
    "cpu": (torch.float64, torch.float32, torch.bfloat16, torch.float16),
    "cuda": (torch.bfloat16, torch.float16),
}


# The answer never changes within a process: torch.compile may ask while it traces and keep it.
@torch.compiler.assume_constant_result
def _compiled_reason(device: torch.device, dtype: torch.dtype) -> str:
    """Why the compiled ops cannot take these tensors, or ''; asked once a device and dtype."""
    return _find_reason(device, dtype)


@functools.lru_cache(maxsize=64)
def _find_reason(device: torch.device, dtype: torch.dtype) -> str:
    """What :func:`_compiled_reason` answers.

    Raises:
        RuntimeError: CUDA tensors, and the compiled library has no CUDA kernels at all.
    """
    if device.type not in _COMPILED_DTYPES:
        return f"no compiled kernels for {device.type} tensors"
    if device.type == "cuda":
        table = info.backends()
        if not any(backend.compiled for backend in table if backend.name.startswith("sm")):
            reasons = "\n".join(f"  {b.name}: {b.reason}" for b in table if b.reason)
            raise RuntimeError(
                f"e is on {device}, and this installation of cce_ext has no CUDA kernels:\n{reasons}\n"
                "Reinstall it where nvcc is found (CUDA_HOME names a toolkit), move the tensors to the "
                'CPU, or use impl="torch_compile".'
            )
        major, minor = torch.cuda.get_device_capability(device)
        if major < 8:
            return f"compiled kernels need compute capability 8.0 (Ampere), {device} has {major}.{minor}"
    if dtype not in _COMPILED_DTYPES[device.type]:
        return f"no compiled {device.type} kernels for {dtype}"
    return ""


@torch.compiler.assume_constant_result
def _triton_reason(device: torch.device) -> str:
    """Why Triton cannot take tensors of this device, or ''."""
    return triton.unavailable_reason(device)


def compute_dtype(e: Tensor) -> torch.dtype:
    """The dtype that the op will see, which autocast may change."""
    device = e.device.type
    if e.dtype != torch.float64 and torch.is_autocast_enabled(device):
        return torch.get_autocast_dtype(device)
    return e.dtype


def choose_pair(name: str, e: Tensor) -> tuple[str, str]:
    """The implementation pair that serves a call, or the name in STORES_LOGITS, and why it is not the
    compiled pair ('' where it is)."""
    if name in STORES_LOGITS:
        return name, STORES_LOGITS[name]
    if name == "triton":
        reason = _triton_reason(e.device)
        if reason:
            raise RuntimeError(
                f'impl="triton" cannot run: {reason}. Or use impl="cce_exact", the compiled kernels'
            )
        return "triton_ce", ""
    reason = _compiled_reason(e.device, compute_dtype(e))
    return ("blocked_ce", reason) if reason else ("linear_ce", "")
