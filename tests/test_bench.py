"""The CPU benchmark runs, and its table is complete."""

from __future__ import annotations

import json
import math
import subprocess
import sys
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).resolve().parent.parent


@pytest.mark.slow
def test_quick_cpu_benchmark(tmp_path: Path) -> None:
    pytest.importorskip("tqdm")
    out = tmp_path / "cpu.json"
    result = subprocess.run(
        [sys.executable, "-m", "bench.cpu", "--quick", "--json", str(out)],
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=False,
        timeout=300,
    )
    assert result.returncode == 0, result.stderr
    lines = result.stdout.splitlines()
    assert lines[0].startswith(f"PyTorch {torch.__version__}")
    header = next(i for i, line in enumerate(lines) if line.startswith("method"))
    table = [line.split() for line in lines[header + 1 :]]
    names = {"eager", "cce"}
    if hasattr(torch.nn, "LinearCrossEntropyOptions"):
        names.add("torch_chunked")
    assert sorted((row[0], row[1]) for row in table) == sorted(
        (name, dtype) for name in names for dtype in ("float32", "bfloat16")
    )
    for row in table:
        milliseconds, ratio, extra = map(float, row[2:])
        assert math.isfinite(milliseconds) and milliseconds > 0, row  # noqa: PT018
        assert math.isfinite(ratio) and ratio > 0, row  # noqa: PT018
        assert math.isfinite(extra) and extra >= 0, row  # noqa: PT018
    facts = json.loads(out.read_text())
    assert len(facts["rows"]) == len(table)
    extra = {(row["method"], row["dtype"]): row["extra_mb"] for row in facts["rows"]}
    assert extra["cce", "float32"] < extra["eager", "float32"]
