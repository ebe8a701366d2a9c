"""The benchmarks that a CPU can run do, and their tables are complete."""

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


@pytest.mark.slow
def test_quick_vocab_parallel_benchmark(tmp_path: Path) -> None:
    pytest.importorskip("tqdm")
    out = tmp_path / "vocab_parallel.json"
    launch = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2"]
    result = subprocess.run(
        [*launch, "-m", "bench.vocab_parallel", "--quick", "--json", str(out)],
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=False,
        timeout=300,
    )
    assert result.returncode == 0, result.stderr
    facts = json.loads(out.read_text())
    table = [line.split() for line in result.stdout.splitlines()[-2:]]
    assert (
        [row[0] for row in table] == [row["head"] for row in facts["rows"]] == ["trained", "lora"]
    )
    assert all(len(line) == len(facts["rows"][0]) for line in table)
    n, d, rank = (facts["shape"][key] for key in ("n", "d", "rank"))
    limit = 1e-5 if facts["dtype"] == "float32" else 1e-2
    for row in facts["rows"]:
        assert row["whole_ms"] > 0
        assert row["sharded_ms"] > 0
        assert row["loss_error"] <= limit
        assert row["gradient_error"] <= limit
        # Two ranks: dE in float32, 8 bytes a token for the loss, dA, and the comparison's few words.
        update = rank if row["head"] == "lora" else 0
        floor = 4 * (n * d + 2 * n + update * d)
        assert floor <= 1e6 * row["received_mb"] <= floor + 1000
