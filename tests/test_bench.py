"""The benchmarks that a CPU can run do, and their tables are complete."""

from __future__ import annotations

import json
import resource
import subprocess
import sys
from pathlib import Path

import pytest

from bench.timing import KINDS

ROOT = Path(__file__).resolve().parent.parent


@pytest.mark.slow
def test_quick_benchmark(tmp_path: Path) -> None:
    pytest.importorskip("tqdm")
    out = tmp_path / "cpu.json"
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    result = subprocess.run(
        [sys.executable, "-m", "bench", "--device", "cpu", "--quick", "--json", str(out)],
        cwd=ROOT, capture_output=True, text=True, check=False, timeout=300,
    )  # fmt: skip
    assert result.returncode == 0, result.stderr
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    # Under a minute on two cores. Processor time, because other tests may run beside this one.
    assert after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime < 60
    facts = json.loads(out.read_text())
    rows = {(row["method"], row["kind"]): row for row in facts["speed"]}
    methods = {"cce", "cce_exact", "torch_compile", "eager"}
    assert {(m, k) for m in methods for k in KINDS} <= set(rows)
    header = result.stdout.index("method ")
    printed = [line.split() for line in result.stdout[header:].splitlines()[1:]]
    assert [(line[0], line[1]) for line in printed] == list(rows)
    for (method, kind), row in rows.items():
        if method not in methods | {"matmul"}:  # a peer may fail
            continue
        assert "error" not in row, row
        assert row["runtime_ms"] > 0
        assert row["x_matmul"] == pytest.approx(
            row["runtime_ms"] / rows["matmul", "matmul"]["runtime_ms"]
        )
        if method != "matmul":
            assert row["op_mem_mb"] >= row["extra_mb"], kind
    step = {method: rows[method, "loss-fw-bw"] for method in methods}
    # Both gradients of (128, 128) and (4096, 128) float32.
    for row in step.values():
        assert row["op_mem_mb"] - row["extra_mb"] == pytest.approx((128 + 4096) * 128 * 4 / 1e6)
    assert step["cce"]["path"]["path"] == "compiled"


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
