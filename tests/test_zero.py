"""Heads under DeepSpeed's ZeRO-3 on gloo ranks: the loss and every gradient against one process.
DeepSpeed is not among the development requirements; without it this is skipped. Its first run on a
CPU compiles a helper of its own, which takes a minute."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import pytest
import torch

from cce_ext import linear_cross_entropy
from tests.ranks import run_ranks
from tests.test_fsdp import Model, equal, mean_over, my_tokens, truth

CONFIG: dict[str, Any] = {
    "train_micro_batch_size_per_gpu": 1,
    "zero_optimization": {"stage": 3, "stage3_param_persistence_threshold": 0},
    "zero_allow_untested_optimizer": True,
}


def zero3(rank: int, world: int) -> None:
    os.environ |= {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(world)}
    os.environ["LOCAL_SIZE"] = str(world)
    import deepspeed

    for kind in ("trained", "lora", "linear"):
        loss, expected = truth(kind)
        model = Model(kind)
        trained = [p for p in model.parameters() if p.requires_grad]
        engine, *_ = deepspeed.initialize(
            model=model,
            optimizer=torch.optim.SGD(trained, lr=0.1),
            config=CONFIG,
            dist_init_required=False,
        )
        x, targets, items = my_tokens(kind, rank, world)
        if kind == "trained":
            with pytest.raises(ValueError, match="c must have shape.*ZeRO-3"):
                linear_cross_entropy(x, model.head.weight, targets)
        found = engine(x, targets, items)
        engine.backward(found)
        equal(mean_over(found), loss)
        for name, parameter in model.named_parameters():
            if not parameter.requires_grad:
                continue
            gradient = deepspeed.utils.safe_get_full_grad(parameter)
            error = (gradient - expected[name]).norm() / expected[name].norm().clamp(min=1)
            assert error <= 1e-5, f"{kind}: {name} is off by {error:.1e}"


@pytest.mark.slow
@pytest.mark.parametrize("world", [2, 4])
def test_zero3_equals_one_process(world: int, tmp_path: Path) -> None:
    pytest.importorskip("deepspeed")
    run_ranks(zero3, world, tmp_path)
