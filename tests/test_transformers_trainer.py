"""Patched models in transformers.Trainer and under FSDP."""

from __future__ import annotations

import copy
import os
import socket
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
import transformers
from torch import distributed, nn

from cce_ext.transformers import audit, cce_patch, cce_unpatch
from tests import families
from tests.training_step import is_fused

accelerate = pytest.importorskip("accelerate")


@pytest.fixture(autouse=True)
def _quiet() -> Iterator[None]:
    with families.silence():
        yield


def texts(count: int) -> list[dict[str, list[int]]]:
    """Texts of different lengths, which no rule joins."""
    generator = torch.Generator().manual_seed(0)
    result = []
    for i in range(count):
        tokens = torch.randint(10, 80, (4 + i % 7,), generator=generator).tolist()
        result.append({"input_ids": tokens, "labels": [-100, *tokens[1:]]})
    return result


def collate(rows: list[dict[str, list[int]]]) -> dict[str, torch.Tensor]:
    length = max(len(row["input_ids"]) for row in rows)

    def padded(name: str, value: int) -> torch.Tensor:
        return torch.tensor([row[name] + [value] * (length - len(row[name])) for row in rows])

    tokens = padded("input_ids", 0)
    return {"input_ids": tokens, "labels": padded("labels", -100), "attention_mask": tokens.ne(0)}


def curve(model: nn.Module, folder: Path, **options: object) -> tuple[list[float], float]:
    """The loss of each step, and the loss of an evaluation after them."""
    arguments = transformers.TrainingArguments(
        output_dir=str(folder),
        per_device_train_batch_size=3,
        per_device_eval_batch_size=3,
        gradient_accumulation_steps=2,
        max_steps=10,
        learning_rate=1e-2,
        logging_steps=1,
        save_strategy="no",
        report_to=[],
        use_cpu=True,
        disable_tqdm=True,
        seed=0,
        **options,
    )
    trainer = transformers.Trainer(
        model, arguments, train_dataset=texts(24), eval_dataset=texts(7), data_collator=collate
    )
    trainer.train()
    losses = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
    return losses, trainer.evaluate()["eval_loss"]


@pytest.mark.parametrize("kind", ["llama", "gemma2", "mixtral"])
@pytest.mark.parametrize("checkpointing", [False, True])
def test_trainer(kind: str, checkpointing: bool, tmp_path: Path) -> None:
    model = families.build(kind)
    twin = cce_patch(copy.deepcopy(model))
    theirs = curve(model, tmp_path, gradient_checkpointing=checkpointing)
    mine = curve(twin, tmp_path, gradient_checkpointing=checkpointing)
    assert len(mine[0]) == 10
    assert theirs[0][-1] < theirs[0][0] - 0.1  # something was learned
    assert mine[0] == pytest.approx(theirs[0], abs=1e-4)
    assert mine[1] == pytest.approx(theirs[1], abs=1e-4)
    for x, y in zip(twin.parameters(), model.parameters(), strict=True):
        torch.testing.assert_close(x, y, rtol=1e-3, atol=1e-3)
    assert audit(twin).fused


def test_trainer_with_adapters(tmp_path: Path) -> None:
    peft = pytest.importorskip("peft")
    config = peft.LoraConfig(
        r=4, target_modules=["embed_tokens", "lm_head"], ensure_weight_tying=True
    )
    curves = []
    for patched in (False, True):
        torch.manual_seed(0)
        model = peft.get_peft_model(families.build("llama", tie_word_embeddings=True), config)
        curves.append(curve(cce_patch(model) if patched else model, tmp_path / str(patched)))
    assert curves[1][0] == pytest.approx(curves[0][0], abs=1e-4)
    assert curves[1][1] == pytest.approx(curves[0][1], abs=1e-4)


def test_trainer_in_bfloat16(tmp_path: Path) -> None:
    """accelerate wraps the forward for autocast; the patch is below it and stays."""
    model = families.build("llama")
    twin = cce_patch(copy.deepcopy(model))
    theirs = curve(model, tmp_path, bf16=True)
    mine = curve(twin, tmp_path, bf16=True)
    assert mine[0] == pytest.approx(theirs[0], abs=2e-2)
    assert audit(twin).fused


@pytest.mark.parametrize("first", ["patch", "offload"])
def test_offloaded_weights(first: str) -> None:
    """accelerate brings the weights in around each layer's forward, and wraps that forward."""
    model = families.build("gemma2", tie_word_embeddings=False)
    inputs = families.batch(model)
    with torch.no_grad():
        truth = model(**inputs).loss
        if first == "patch":
            cce_patch(model)
        accelerate.cpu_offload(model, torch.device("cpu"))
        if first == "offload":
            cce_patch(model)
        assert model.lm_head.weight.is_meta
        assert audit(model).fused
        output = model(**inputs)
        torch.testing.assert_close(output.loss, truth)
        assert output.logits.shape == (2, 0, families.VOCAB)
        accelerate.hooks.remove_hook_from_module(model, recurse=True)
        assert is_fused(model, **inputs)
        cce_unpatch(model)
        assert not is_fused(model, **inputs)
        torch.testing.assert_close(model(**inputs).loss, truth)


def shard(rank: int, port: int, tied: bool) -> None:
    """One of two ranks: gradients of a sharded patched model against those of a whole plain one."""
    from torch.distributed.fsdp import fully_shard

    os.environ.update(MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port))
    torch.set_num_threads(1)
    distributed.init_process_group("gloo", rank=rank, world_size=2)
    mesh = distributed.init_device_mesh("cpu", (2,))
    whole = families.build("gemma2", tie_word_embeddings=tied)
    model = cce_patch(copy.deepcopy(whole))
    units = list(model.model.layers) if tied else [*model.model.layers, model.lm_head]
    for unit in units:
        fully_shard(unit, mesh=mesh, reshard_after_forward=True)
    fully_shard(model, mesh=mesh)
    tokens = torch.randint(10, 80, (4, 9), generator=torch.Generator().manual_seed(5))
    for _ in range(2):
        whole.zero_grad()
        model.zero_grad()
        whole(input_ids=tokens, labels=tokens).loss.backward()
        part = tokens[2 * rank : 2 * rank + 2]
        output = model(input_ids=part, labels=part)
        output.loss.backward()
        assert output.logits.shape[1] == 0
        for mine, truth in zip(model.parameters(), whole.parameters(), strict=True):
            torch.testing.assert_close(mine.grad.full_tensor(), truth.grad, rtol=1e-4, atol=1e-5)
    assert audit(model).fused
    distributed.destroy_process_group()


@pytest.mark.skipif(not distributed.is_available(), reason="torch.distributed is not built")
@pytest.mark.parametrize("tied", [False, True])
def test_fsdp(tied: bool) -> None:
    """The output layer as a unit of its own is resharded after its forward: its weight is only
    there in the backward if the loss hangs on the layer's output."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    torch.multiprocessing.spawn(shard, (port, tied), nprocs=2)
