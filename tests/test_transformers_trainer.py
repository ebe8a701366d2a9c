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
    assert str(audit(twin)).startswith("patched; fused")


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
    assert str(audit(twin)).startswith("patched; fused")
    assert is_fused(twin, **collate(texts(3)))
    before = type(twin).forward
    cce_patch(cce_unpatch(twin))  # above accelerate's wrapper, which stays
    assert is_fused(twin, **collate(texts(3)))
    assert not is_fused(cce_unpatch(twin), **collate(texts(3)))
    assert type(twin).forward is before


def loop(model: nn.Module, folder: Path, lr: float) -> tuple[list[float], list[float]]:
    """A trainer's loop as TRL's were written: bfloat16, gradient checkpointing, accumulation over
    batches of different lengths with one num_items_in_batch, and after each two steps an evaluation of
    loss and token accuracy. Returns the loss of each step, and both of each evaluation."""
    state = accelerate.state.AcceleratorState
    state._reset_state(reset_partial_state=True)
    accelerator = accelerate.Accelerator(
        mixed_precision="bf16", cpu=True, gradient_accumulation_steps=3, project_dir=folder
    )
    model.gradient_checkpointing_enable({"use_reentrant": False})
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=lr)
    model, optimizer = accelerator.prepare(model, optimizer)
    batches = [collate(texts(27)[i : i + 3]) for i in range(0, 27, 3)]
    losses, evaluations = [], []
    for step in range(6):
        model.train()
        window = [batches[(3 * step + i) % len(batches)] for i in range(3)]
        items = sum((batch["labels"][:, 1:] != -100).sum() for batch in window)
        total = 0.0
        for batch in window:
            with accelerator.accumulate(model):
                loss = model(**batch, num_items_in_batch=items, use_cache=False).loss
                total += loss.item()
                accelerator.backward(loss * accelerator.gradient_accumulation_steps)
                if accelerator.sync_gradients:
                    accelerator.clip_grad_norm_(model.parameters(), 1.0)
                optimizer.step()
                optimizer.zero_grad()
        losses.append(total)
        if step % 2:
            model.eval()
            with torch.no_grad():
                output = model(**batches[0])
            evaluations.append(output.loss.item())
            if output.logits.shape[1]:
                found = output.logits[:, :-1].argmax(-1) == batches[0]["labels"][:, 1:]
                evaluations.append(found.sum().item())
    state._reset_state(reset_partial_state=True)
    return losses, evaluations


@pytest.mark.parametrize("train_only", [False, True])
@pytest.mark.parametrize("adapters", [False, True])
def test_loop(adapters: bool, train_only: bool, tmp_path: Path) -> None:
    model = families.build("gemma2", tie_word_embeddings=False)
    if adapters:
        peft = pytest.importorskip("peft")
        config = peft.LoraConfig(r=4, target_modules=["q_proj", "lm_head"], lora_dropout=0.1)
        model = peft.get_peft_model(model, config)
        model.enable_input_require_grads()
    twin = cce_patch(copy.deepcopy(model), train_only=train_only)
    curves = []
    for each in (model, twin):
        torch.manual_seed(0)  # dropout
        curves.append(loop(each, tmp_path, 2e-2 if adapters else 3e-3))
    (theirs, evaluated), (mine, checked) = curves
    assert theirs[-1] < theirs[0] - 0.02
    assert mine == pytest.approx(theirs, abs=2e-2)
    if not train_only:  # losses alone: there are no logits
        evaluated = evaluated[::2]
    assert len(checked) == len(evaluated) == (6 if train_only else 3)
    assert checked[::2] == pytest.approx(evaluated[::2], abs=2e-2)
    assert str(audit(twin.train())).startswith("patched; fused")


def test_trainer_with_metrics_of_logits(tmp_path: Path) -> None:
    """compute_metrics has to be given logits: train_only leaves them in evaluation."""
    model = families.build("llama")
    seen: list[tuple[int, ...]] = []

    def accuracy(prediction: transformers.EvalPrediction) -> dict[str, float]:
        seen.append(prediction.predictions.shape)
        hits = prediction.predictions[:, :-1].argmax(-1) == prediction.label_ids[:, 1:]
        return {"accuracy": float(hits[prediction.label_ids[:, 1:] != -100].mean())}

    def evaluate(model: nn.Module) -> dict[str, float]:
        arguments = transformers.TrainingArguments(
            output_dir=str(tmp_path), per_device_eval_batch_size=3, report_to=[], use_cpu=True,
            disable_tqdm=True,
        )  # fmt: skip
        rows = [row for row in texts(27) if len(row["input_ids"]) == 7]
        trainer = transformers.Trainer(
            model, arguments, eval_dataset=rows, data_collator=collate, compute_metrics=accuracy
        )
        return {k: v for k, v in trainer.evaluate().items() if k in ("eval_loss", "eval_accuracy")}

    truth = evaluate(model)
    assert evaluate(cce_patch(model, train_only=True)) == pytest.approx(truth, abs=1e-6)
    assert seen[0] == seen[1] == (4, 7, families.VOCAB)


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
