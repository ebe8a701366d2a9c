"""The benchmark of LoRA heads runs, small, and its two ways of training agree."""

from __future__ import annotations

import json
import math
from pathlib import Path

import pytest

pytest.importorskip("peft")
pytest.importorskip("transformers")
pytest.importorskip("tqdm")


def test_quick(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    from bench.lora import main

    out = tmp_path / "lora.json"
    main(["--device", "cpu", "--quick", "--repeats", "1", "--steps", "12", "--json", str(out)])
    facts = json.loads(out.read_text())
    methods = ["matmul", "cce", "cce_exact", "eager"]
    assert [row["method"] for row in facts["head"]] == 2 * methods
    assert all(math.isfinite(row["ms"]) and row["ms"] > 0 for row in facts["head"])
    own, *patched = facts["training"]
    assert own["impl"] == "stored"
    assert own["losses"][-1] < own["losses"][0] - 0.1
    for row in patched:
        assert row["largest_gap"] < 0.02  # bfloat16
        assert row["norm_of_b"] > 0.1
    assert "x matmul" in capsys.readouterr().out
