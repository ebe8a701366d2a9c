"""The benchmarks that a CPU can run do, and their tables are complete."""

from __future__ import annotations

import json
import os
import resource
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from bench import sparse_gradients
from bench.llm_data import describe, llm_like
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
        preexec_fn=lambda: os.sched_setaffinity(0, sorted(os.sched_getaffinity(0))[:2]),
    )  # fmt: skip
    assert result.returncode == 0, result.stderr
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    # Under a minute on two cores, which is two minutes of processor time: other tests may run
    # beside this one, and cores that share a pipeline count more of it then.
    assert after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime < 120
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
    table = [line.split() for line in result.stdout.splitlines()[-len(facts["rows"]) :]]
    named = [[row["head"], row["backward"]] for row in facts["rows"]]
    assert [row[:2] for row in table] == named
    on_cpu = [["trained", "exact"], ["lora", "exact"]]
    assert [row for row in named if row[1] == "exact"] == on_cpu
    assert all(len(line) == len(facts["rows"][0]) for line in table)
    n, d, rank = (facts["shape"][key] for key in ("n", "d", "rank"))
    limit = 1e-5 if facts["dtype"] == "float32" else 1e-2
    for row in facts["rows"]:
        for time in ("whole_ms", "part_ms", "sharded_ms"):
            assert row[time] > 0
        assert row["strong"] == pytest.approx(row["whole_ms"] / row["sharded_ms"] / 2)
        assert row["weak"] == pytest.approx(row["part_ms"] / row["sharded_ms"])
        assert row["loss_error"] <= limit
        assert row["gradient_error"] <= max(limit, 2 * row["whole_error"])
        # Two ranks: dE in float32, 8 bytes a token for the loss, dA, and the comparison's few words.
        update = rank if row["head"] == "lora" else 0
        sparse = n + 1 if facts["device"] != "cpu" and row["backward"] == "default" else 0
        floor = 4 * (n * d + 2 * n + update * d + sparse)
        assert floor <= 1e6 * row["received_mb"] <= floor + 1000


@pytest.mark.slow
def test_quick_training_curves(tmp_path: Path) -> None:
    pytest.importorskip("tqdm")
    pytest.importorskip("matplotlib")
    out, picture = tmp_path / "curves.json", tmp_path / "curves.png"
    result = subprocess.run(
        [
            sys.executable, "-m", "bench.training_curves", "--quick", "--device", "cpu",
            "--json", str(out), "--plot", str(picture),
        ],
        cwd=ROOT, capture_output=True, text=True, check=False, timeout=300,
    )  # fmt: skip
    assert result.returncode == 0, result.stderr
    facts = json.loads(out.read_text())
    assert picture.stat().st_size > 1000
    assert facts["sparse_share"] > 0
    for name in ("default", "exact", "eager"):
        (run,) = facts["runs"][name]
        curve = list(run["held_out"].values())
        assert curve[-1] < curve[0] - 0.5, name
    assert facts["gaps"]["exact"] == [0.0]
    # The default's gradient is another one, and hardly worse.
    assert facts["runs"]["default"][0]["held_out"] != facts["runs"]["exact"][0]["held_out"]
    assert abs(facts["gaps"]["default"][0]) <= 0.003


def test_capped_data_are_as_sharp_as_others() -> None:
    shape = (256, 20000, 256, torch.float32, "cpu")
    plain = describe(*llm_like(*shape))
    capped = describe(*llm_like(*shape, softcap=30.0), softcap=30.0)
    for key in ("T", "loss", "above 2^-13"):
        assert capped[key] == pytest.approx(plain[key], rel=0.25), key
    assert describe(*llm_like(*shape), softcap=30.0)["T"] > 1.5 * plain["T"]


def test_accuracy_of_gradients(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    """The table of bench.sparse_gradients, on a CPU, where every threshold gives the same."""
    monkeypatch.setattr(sparse_gradients, "ROWS", (1, 32))
    monkeypatch.setattr(sparse_gradients, "EXPONENTS", (13,))
    head = llm_like(32, 3000, 64, torch.bfloat16, "cpu")
    rows = sparse_gradients.accuracy(*head, "made head")
    ours = [r for r in rows if r["method"] in ("exact", "2^-13")]
    assert len({r["head"] for r in rows}) == 5
    for exact, filtered in zip(ours[::2], ours[1::2], strict=True):
        assert exact["dE"] == filtered["dE"] < 2e-2
        assert exact["dC"] == filtered["dC"] < 2e-2
    sparse_gradients.show_accuracy(rows)
    assert capsys.readouterr().out.count("at most eager's error") == 10
