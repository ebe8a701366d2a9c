"""What is compiled in, what can run here, and why the rest cannot: `python -m cce_ext.info`."""

import ctypes
import json
import os
from typing import Any, NamedTuple

import torch

from cce_ext import _load, triton
from cce_ext._version import __version__


class Backend(NamedTuple):
    """One way to compute the loss.

    `compiled`: this installation has it. `available`: it runs on this machine now; if not,
    `reason` says why.
    """

    name: str
    compiled: bool
    available: bool
    reason: str


def build_info() -> dict[str, Any]:
    """How the loaded ops library was built.

    Keys: version, git_commit, compiler, build_type, sanitizer, torch_headers, torch_target (the
    oldest torch that it runs with), cuda_toolkit (None in a CPU-only build), cuda_archs, backends
    (name -> compiled in), library (its path, None if not loaded), torch (the running version).
    A fact that is not known is absent.
    """
    path = _load.loaded_library()
    facts = _library_facts(path) if path is not None else _module_facts()
    facts.setdefault("version", __version__)
    return {**facts, "library": str(path) if path else None, "torch": torch.__version__}


def backends() -> list[Backend]:
    """The backends by name: cpu, sm80, sm90 (compiled), triton, blocked (pure PyTorch)."""
    facts = build_info()
    return [
        _cpu_backend(),
        _gpu_backend("sm80", facts),
        _gpu_backend("sm90", facts),
        _triton_backend(),
        Backend("blocked", True, True, ""),
    ]


def _library_facts(path: os.PathLike[str]) -> dict[str, Any]:
    """The facts inside the library itself, {} for a library without them."""
    try:
        read = ctypes.CDLL(str(path)).cce_build_facts
    except (OSError, AttributeError):
        return {}
    read.restype = ctypes.c_char_p
    return json.loads(read().decode())


def _module_facts() -> dict[str, Any]:
    """The facts in _C, {} where it was not built for this Python."""
    try:
        from cce_ext import _C
    except ImportError:
        return {}
    return _C.build_info()


def _has_kernel(key: str) -> bool:
    name = "cce::linear_ce_forward"
    return torch._C._dispatch_has_kernel(name) and torch._C._dispatch_has_kernel_for_dispatch_key(
        name, key
    )


def _cpu_backend() -> Backend:
    if _has_kernel("CPU"):
        return Backend("cpu", True, True, "")
    return Backend("cpu", False, False, f"no compiled ops are loaded from {_load.library_path()}")


# name -> lowest and highest compute capability that the backend's code runs on
_CAPABILITIES = {"sm80": ((8, 0), None), "sm90": ((9, 0), (9, 0))}


def _gpu_backend(name: str, facts: dict[str, Any]) -> Backend:
    # A library without facts: its CUDA kernels are at least those of sm80.
    known = facts.get("backends", {"sm80": _has_kernel("CUDA")})
    if not (known.get(name, False) and _has_kernel("CUDA")):
        reason = f"{name} kernels are not compiled in"
        if not _has_kernel("CUDA"):
            reason += " (a CPU-only build; rebuild where nvcc is found, or with CCE_WITH_CUDA=1)"
        return Backend(name, False, False, reason)
    reason = _gpu_reason(facts) or _capability_reason(name)
    return Backend(name, True, not reason, reason)


def _gpu_reason(facts: dict[str, Any]) -> str:
    """Why no CUDA kernel at all can run here, or ''."""
    if torch.version.cuda is None:
        return f"torch {torch.__version__} was built without CUDA"
    if not torch.cuda.is_available():
        return "no CUDA device is visible, or its driver does not work with this torch"
    driver = _driver_version()
    toolkit = facts.get("cuda_toolkit")
    # Minor versions are compatible within a major one.
    if toolkit and driver and driver // 1000 < int(toolkit.split(".")[0]):
        return (
            f"the driver supports CUDA {driver // 1000}.{driver % 1000 // 10}, cce_ext was built "
            f"with toolkit {toolkit}: update the driver or rebuild with an older toolkit"
        )
    return ""


def _driver_version() -> int:
    """CUDA version that the driver supports, 1000 * major + 10 * minor; 0 if it is unknown."""
    version = ctypes.c_int(0)
    try:
        ctypes.CDLL("libcuda.so.1").cuDriverGetVersion(ctypes.byref(version))
    except OSError:
        return 0
    return version.value


def _capability_reason(name: str) -> str:
    lowest, highest = _CAPABILITIES[name]
    found = []
    for device in range(torch.cuda.device_count()):
        capability = torch.cuda.get_device_capability(device)
        if lowest <= capability and (highest is None or capability <= highest):
            return ""
        found.append(f"{torch.cuda.get_device_name(device)}: {capability[0]}.{capability[1]}")
    wanted = f"{lowest[0]}.{lowest[1]}" + ("" if highest == lowest else " or newer")
    return f"needs compute capability {wanted}, found {', '.join(found)}"


def _triton_backend() -> Backend:
    reason = triton.package_reason()
    if reason:
        return Backend("triton", False, False, reason)
    if triton.interpreted() or torch.cuda.is_available():
        return Backend("triton", True, True, "")
    return Backend(
        "triton", True, False, "no CUDA device is visible (TRITON_INTERPRET=1 interprets on a CPU)"
    )


def main() -> None:
    """Prints `build_info` and `backends` as two tables."""
    print("cce_ext")
    for key, value in build_info().items():
        if key == "backends":
            continue
        text = ", ".join(value) if isinstance(value, list) else value
        print(f"  {key:<14} {'none' if text in (None, '') else text}")
    print("\nbackend   compiled  available  reason if not")
    for backend in backends():
        compiled, available = ("yes" if flag else "no" for flag in backend[1:3])
        print(f"{backend.name:<9} {compiled:<9} {available:<10} {backend.reason}".rstrip())


if __name__ == "__main__":
    main()
