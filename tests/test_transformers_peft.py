"""Adapters on the output layer of patched transformers models, against PEFT's own forward."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from torch import nn

from cce_ext import diagnostics
from cce_ext.transformers import audit, cce_patch, cce_unpatch
from tests import families
from tests.training_step import assert_same, is_fused, outcome

peft = pytest.importorskip("peft")

BOTH = ["embed_tokens", "lm_head"]
CASES: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {
    "untied": ({}, {"target_modules": ["lm_head"]}),
    "untied, with layers": ({}, {"target_modules": ["q_proj", "lm_head"]}),
    "untied, all linear": ({}, {"target_modules": "all-linear"}),
    "rsLoRA": ({}, {"target_modules": ["lm_head"], "use_rslora": True}),
    "tied": ({"tie_word_embeddings": True}, {"target_modules": BOTH}),
    "tied adapters": (
        {"tie_word_embeddings": True},
        {"target_modules": BOTH, "ensure_weight_tying": True},
    ),
    "DoRA": ({}, {"target_modules": ["lm_head"], "use_dora": True}),
    "DoRA, tied": (
        {"tie_word_embeddings": True},
        {"target_modules": BOTH, "use_dora": True},
    ),
    "dropout": ({}, {"target_modules": ["lm_head"], "lora_dropout": 0.3}),
    "bias": ({}, {"target_modules": ["lm_head"], "lora_bias": True}),
    "saved": ({}, {"target_modules": ["q_proj"], "modules_to_save": ["lm_head"]}),
    "saved, tied": (
        {"tie_word_embeddings": True},
        {
            "target_modules": ["q_proj"],
            "modules_to_save": ["lm_head", "embed_tokens"],
            "ensure_weight_tying": True,
        },
    ),
    "layers only": ({}, {"target_modules": ["q_proj"]}),
}


@pytest.fixture(autouse=True)
def _quiet() -> Iterator[None]:
    with families.silence():
        yield


def adapted(model: nn.Module, name: str = "default", **options: Any) -> peft.PeftModel:
    """The model with adapters whose B is not zero: at zero every wrong head looks right."""
    torch.manual_seed(1)
    config = peft.LoraConfig(task_type="CAUSAL_LM", r=4, lora_alpha=8, **options)
    wrapped = peft.get_peft_model(model, config, adapter_name=name)
    randomise(wrapped)
    return wrapped


def randomise(model: nn.Module) -> None:
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_" in name or "modules_to_save" in name:
                parameter.add_(torch.randn_like(parameter), alpha=0.2)


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("kind", ["llama", "gemma2"])
@pytest.mark.parametrize("first", ["patch", "adapter"])
def test_adapters(case: str, kind: str, first: str) -> None:
    changes, options = CASES[case]
    changes = {"tie_word_embeddings": False} | changes
    plain = adapted(families.build(kind, **changes), **options)
    inputs = families.batch(plain) | {"num_items_in_batch": 11}
    truth = outcome(plain, **inputs)

    model = families.build(kind, **changes)
    if first == "patch":
        assert cce_patch(model) is model
    wrapped = adapted(model, **options)
    if first == "adapter":
        assert cce_patch(wrapped) is wrapped
    assert_same(outcome(wrapped, **inputs), truth)
    assert diagnostics()["path"] == "compiled"
    rank = 4 if "lm_head" in options["target_modules"] else 0  # all-linear leaves out the head
    assert diagnostics()["shape"][-1] == rank
    assert is_fused(wrapped, **inputs)
    assert audit(wrapped).fused
    cce_unpatch(wrapped)
    assert not is_fused(wrapped, **inputs)
    assert_same(outcome(wrapped, **inputs), truth, 1e-7)


def test_the_adapter_matters() -> None:
    """The frozen base alone would give another loss, and no gradient for the adapter."""
    wrapped = cce_patch(adapted(families.build("llama"), target_modules=["lm_head"]))
    inputs = families.batch(wrapped)
    loss, gradients = outcome(wrapped, **inputs)
    with wrapped.disable_adapter():
        assert (loss - wrapped(**inputs).loss).abs() > 0.01
    assert {n.split(".")[-3] for n in gradients} == {"lora_A", "lora_B"}
    assert all(g.abs().max() > 0 for g in gradients.values())


def merged(model: Any) -> None:
    model.merge_adapter()


def disabled(model: Any) -> None:
    model.base_model.disable_adapter_layers()


def second(model: Any) -> None:
    config = peft.LoraConfig(r=2, lora_alpha=3, target_modules=["lm_head", "v_proj"])
    model.add_adapter("second", config)
    randomise(model)
    model.base_model.set_adapter(["default", "second"])


@pytest.mark.parametrize("change", [merged, disabled, second])
def test_states(change: Callable) -> None:
    wrapped = adapted(families.build("llama"), target_modules=["q_proj", "lm_head"])
    wrapped.base_model.model.model.embed_tokens.weight.requires_grad_()
    inputs = families.batch(wrapped)
    cce_patch(wrapped)
    active = wrapped(**inputs).loss
    change(wrapped)
    assert is_fused(wrapped, **inputs)
    mine = outcome(wrapped, **inputs)
    cce_unpatch(wrapped)
    assert_same(mine, outcome(wrapped, **inputs))
    assert ((active - mine[0]).abs() > 1e-3) == (change is not merged)


def test_float32_adapter_on_a_bfloat16_base() -> None:
    model = families.build("llama").to(torch.bfloat16)
    wrapped = adapted(model, target_modules=["lm_head"])
    assert wrapped.base_model.model.lm_head.lora_A["default"].weight.dtype == torch.float32
    truth = outcome(wrapped, **families.batch(wrapped))
    cce_patch(wrapped)
    assert_same(outcome(wrapped, **families.batch(wrapped)), truth, 2e-2)
    assert is_fused(wrapped, **families.batch(wrapped))


def test_dora_with_dropout_keeps_its_own_code() -> None:
    options = {"target_modules": ["lm_head"], "use_dora": True, "lora_dropout": 0.3}
    wrapped = adapted(families.build("llama"), **options)
    truth = outcome(wrapped, **families.batch(wrapped))
    cce_patch(wrapped)
    assert_same(outcome(wrapped, **families.batch(wrapped)), truth, 1e-6)
    assert "DoRA" in audit(wrapped).reason
    assert audit(wrapped.eval()).fused


def test_adapters_of_each_row_keep_their_own_code() -> None:
    """PEFT's mixed batches hand adapter names to each layer."""
    wrapped = adapted(families.build("llama"), target_modules=["lm_head"]).eval()
    inputs = families.batch(wrapped)
    names = ["__base__", "default"]
    truth = wrapped(**inputs, adapter_names=names).loss
    cce_patch(wrapped)
    torch.testing.assert_close(wrapped(**inputs, adapter_names=names).loss, truth)
    assert is_fused(wrapped, **inputs)


def test_generation_and_merging_after_patching() -> None:
    wrapped = adapted(families.build("llama"), target_modules=["lm_head"]).eval()
    tokens = families.batch(wrapped)["input_ids"]
    before = wrapped.generate(input_ids=tokens, max_new_tokens=5, do_sample=False)
    cce_patch(wrapped)
    after = wrapped.generate(input_ids=tokens, max_new_tokens=5, do_sample=False)
    assert torch.equal(before, after)
    loss = wrapped(**families.batch(wrapped)).loss
    plain = copy.deepcopy(wrapped).merge_and_unload()
    assert is_fused(plain, **families.batch(plain))
    torch.testing.assert_close(plain(**families.batch(plain)).loss, loss)
