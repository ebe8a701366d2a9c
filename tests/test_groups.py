"""How the Hopper kernels deal out their work, by their own headers, compiled for the host."""

from __future__ import annotations

import os
import shutil
import subprocess
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
COMPILER = os.environ.get("CXX") or shutil.which("c++") or shutil.which("g++")


@pytest.mark.skipif(not COMPILER, reason="needs a C++ compiler")
def test_every_tile_has_one_block(tmp_path: Path) -> None:
    program = tmp_path / "groups"
    source = ROOT / "tests" / "host"
    subprocess.run(
        [
            COMPILER, "-std=c++17", "-O1", f"-I{source}", f"-I{ROOT / 'csrc'}", source / "groups.cpp",
            "-o", program,
        ],
        check=True,
    )  # fmt: skip
    result = subprocess.run([program], capture_output=True, text=True, timeout=60)
    assert result.returncode == 0, result.stdout
