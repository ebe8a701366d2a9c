"""The demo runs from start to end, and learns."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent


@pytest.mark.slow
def test_quick_demo() -> None:
    pytest.importorskip("tqdm")
    result = subprocess.run(
        [sys.executable, "-m", "examples.demo", "--quick", "--device", "cpu"],
        cwd=ROOT, capture_output=True, text=True, check=False, timeout=300,
    )  # fmt: skip
    assert result.returncode == 0, result.stderr
    last = result.stdout.rstrip().splitlines()[-1]
    assert last.startswith("demo: "), last
    seen = {name: float(value) for name, value in re.findall(r"(\w+)=(\S+)", last)}
    assert seen["loss"] < seen["unigram"] - 0.2, last
    assert 0 < seen["grad_error"] < 1e-4, last
    assert 1 < seen["perplexity"] < 1024, last
    assert "extra memory, MB" in result.stdout
