"""Loads libcce_ops.so, the library with every compiled op, into PyTorch."""

import os
from pathlib import Path

import torch

LIBRARY_NAME = "libcce_ops.so"
LIBRARY_VARIABLE = "CCE_OPS_LIBRARY"

_loaded: Path | None = None


def library_path() -> Path:
    """The library that `load` takes: $CCE_OPS_LIBRARY if set, else the one beside this file."""
    override = os.environ.get(LIBRARY_VARIABLE)
    return Path(override) if override else Path(__file__).with_name(LIBRARY_NAME)


def loaded_library() -> Path | None:
    """The library that `load` loaded, None before."""
    return _loaded


def load() -> Path:
    """Loads the library once and returns its path; later calls return the same path.

    Raises:
        ImportError: the library is missing or does not load, or another copy of cce_ext has
            already defined the `cce` ops in this process (a second definition would crash it).
    """
    global _loaded
    if _loaded is not None:
        return _loaded
    path = library_path()
    if torch._C._dispatch_has_kernel("cce::linear_ce_forward"):
        raise ImportError(
            f"the ops cce::* are already defined in this process, by another copy of cce_ext, so "
            f"{path} cannot be loaded too. Keep one copy: remove the other from sys.path, or "
            f"restart the interpreter after reinstalling."
        )
    if not path.is_file():
        raise ImportError(_missing_message(path))
    try:
        torch.ops.load_library(str(path))
    except OSError as error:
        raise ImportError(
            f"{path} does not load with torch {torch.__version__}: {error}. It needs Linux on the "
            f"machine's architecture and torch >= 2.10; rebuild it here with `pip install "
            f"--no-build-isolation .` in the source folder."
        ) from error
    _loaded = path
    return path


def _missing_message(path: Path) -> str:
    if os.environ.get(LIBRARY_VARIABLE):
        return f"${LIBRARY_VARIABLE} names {path}, which is not a file: correct it or unset it."
    return (
        f"{path} is missing: the compiled ops of cce_ext are not built. In the source folder run "
        f"`pip install --no-build-isolation -e .` (needs torch, pybind11, cmake, ninja and a C++17 "
        f"compiler), or set ${LIBRARY_VARIABLE} to a built {LIBRARY_NAME}."
    )
