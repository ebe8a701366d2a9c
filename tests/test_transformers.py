"""Patched transformers models against the same models unpatched: loss and every gradient."""

from __future__ import annotations

import copy
import inspect
import pickle
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from cce_ext import diagnostics
from cce_ext.transformers import audit, cce_patch, cce_unpatch
from tests import families
from tests.training_step import Outcome, assert_same, is_fused, outcome

#: Families that must be built and fused, whatever becomes of the rest.
CORE = {
    *("llama", "phi3", "mistral", "gemma", "gemma2", "gemma3_text", "qwen2", "qwen3", "qwen2_moe"),
    *("mixtral", "cohere", "cohere2", "granite", "granitemoe", "olmo2", "gpt2", "gpt_neox", "opt"),
    *(
        "bloom",
        "falcon",
        "starcoder2",
        "stablelm",
        "phi",
        "glm",
        "nemotron",
        "deepseek_v3",
        "smollm3",
    ),
    *("hyperclovax", "gpt_oss", "gptj", "bert", "mamba", "jamba", "llama4_text", "gemma4_text"),
    *("LlavaForConditionalGeneration", "Qwen2VLForConditionalGeneration"),
    *("Qwen2_5_VLForConditionalGeneration", "PaliGemmaForConditionalGeneration"),
    *("MllamaForConditionalGeneration", "InternVLForConditionalGeneration"),
}


@pytest.fixture(autouse=True)
def _quiet() -> Iterator[None]:
    with families.silence():
        yield


def variants(model: nn.Module) -> dict[str, dict[str, Any]]:
    """Inputs for all the ways in which a trainer calls a model."""
    base = families.batch(model)
    kinds = [p.kind for p in inspect.signature(model.forward).parameters.values()]
    if inspect.Parameter.VAR_KEYWORD not in kinds:
        return {"plain": base}
    # Not what shifting the labels would give, so that shifting twice or not at all is noticed.
    shifted = base["labels"].flip(-1)
    return {
        "plain": base,
        "num_items": base | {"num_items_in_batch": torch.tensor(7)},
        "shift_labels": base | {"shift_labels": shifted, "num_items_in_batch": 5},
    }


@pytest.mark.parametrize("kind", families.causal_families() + families.vision_families())
def test_family(kind: str) -> None:
    try:
        model = families.build(kind)
    except Exception as error:
        if kind in CORE:
            raise
        pytest.skip(f"cannot be built by the general rule: {str(error).splitlines()[0]}")
    check_family(model, kind in CORE)
    known = families.documented()
    if known is not None:
        # docs/families.md, which `python -m tests.families` writes
        assert known[type(model).__name__] == audit(model).fused


def check_family(model: nn.Module, must_fuse: bool) -> None:
    inputs = variants(model)
    truths = {name: outcome(model, **values) for name, values in inputs.items()}
    before = dict(model.__dict__)
    cce_patch(model)
    fused = audit(model).fused
    assert fused or not must_fuse, str(audit(model))
    assert fused or audit(model).reason
    for name, values in inputs.items():
        assert_same(outcome(model, **values), truths[name])
        assert is_fused(model, **values) == fused
    assert (diagnostics().get("path") == "compiled") or not fused
    if fused:
        check_reductions(model, audit(model).shift)
    cce_unpatch(model)
    assert model.__dict__ == before
    assert_same(outcome(model, **inputs["plain"]), truths["plain"], 1e-7)


def check_reductions(model: nn.Module, shift: int) -> None:
    """Reductions "none", with weights, and "sum": losses and gradients against stored logits. An
    auxiliary loss comes once on top of each entry."""
    inputs = families.batch(model)
    labels = inputs["labels"][:, shift:]
    weights = torch.rand(labels.shape, generator=torch.Generator().manual_seed(4))

    def stored() -> tuple[Tensor, Tensor]:
        output = cce_unpatch(model)(**inputs)
        logits = output.logits[:, : labels.shape[1]].float()
        tokens = nn.functional.cross_entropy(logits.mT, labels, reduction="none")
        return tokens, output.loss - tokens.sum() / (labels != -100).sum()

    def gradients(loss: Tensor) -> Outcome:
        model.zero_grad(set_to_none=True)
        loss.backward()
        return loss.detach(), {
            n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None
        }

    torch.manual_seed(3)
    tokens, extra = stored()
    truths = gradients((weights * tokens).sum() + weights.sum() * extra), None
    torch.manual_seed(3)
    tokens, extra = stored()
    truths = truths[0], gradients(tokens.sum() + extra)
    for reduction, truth in zip(("none", "sum"), truths, strict=True):
        cce_patch(model, reduction=reduction)
        torch.manual_seed(3)
        loss = model(**inputs).loss
        assert loss.shape == (labels.shape if reduction == "none" else ())
        assert_same(gradients((weights * loss).sum() if reduction == "none" else loss), truth)
    cce_patch(model)


@pytest.fixture
def llama() -> nn.Module:
    return families.build("llama")


def truth_of(model: nn.Module) -> Outcome:
    cce_unpatch(model)
    result = outcome(model, **families.batch(model))
    cce_patch(model)
    return result


def test_importing_the_package_leaves_transformers_alone() -> None:
    code = "import sys, cce_ext; assert 'transformers' not in sys.modules"
    subprocess.run([sys.executable, "-c", code], check=True)


def test_all_labels_ignored(llama: nn.Module) -> None:
    """0 as in the rest of the package, where the model's own code gives NaN."""
    cce_patch(llama)
    inputs = families.batch(llama)
    loss, gradients = outcome(llama, **inputs | {"labels": torch.full((2, 9), -100)})
    assert loss == 0
    assert all((g == 0).all() for g in gradients.values())


def test_ignore_index_and_positional_labels(llama: nn.Module) -> None:
    inputs = families.batch(llama)
    inputs["labels"] = inputs["labels"].clamp(min=0)
    truth = outcome(llama, **inputs, ignore_index=0)
    names = list(inspect.signature(llama.forward).parameters)
    position = names.index("labels")
    cce_patch(llama)
    assert list(inspect.signature(llama.forward).parameters) == names
    assert_same(outcome(llama, **inputs, ignore_index=0), truth)
    positional = [inputs["input_ids"], *[None] * (position - 1), inputs["labels"]]
    output = llama(*positional, ignore_index=0)
    torch.testing.assert_close(output.loss, truth[0])
    assert output.logits.shape == (2, 0, families.VOCAB)
    assert len(llama(*positional, return_dict=False)) == len(output)


def test_reductions(llama: nn.Module) -> None:
    inputs = families.batch(llama)
    logits = llama(input_ids=inputs["input_ids"]).logits[:, :-1]
    labels = inputs["labels"][:, 1:]
    tokens = nn.functional.cross_entropy(logits.mT, labels, reduction="none")
    for reduction, truth in (("none", tokens), ("sum", tokens.sum())):
        cce_patch(llama, reduction=reduction)
        torch.testing.assert_close(llama(**inputs).loss, truth)
    for impl in ("reference", "cce_exact"):
        cce_patch(llama, impl=impl)
        torch.testing.assert_close(llama(**inputs).loss, tokens.sum() / (labels != -100).sum())


def test_metrics_of_tokens(llama: nn.Module) -> None:
    inputs = families.batch(llama)
    logprobs = llama(input_ids=inputs["input_ids"]).logits[:, :-1].log_softmax(-1)
    labels = inputs["labels"][:, 1:]
    counts = labels != -100
    truth = outcome(llama, **inputs)
    cce_patch(llama, return_metrics=True)
    assert_same(outcome(llama, **inputs), truth)
    metrics = llama(**inputs).token_metrics
    chosen = logprobs.gather(-1, labels.clamp(min=0)[..., None])[..., 0]
    torch.testing.assert_close(metrics.logprob, torch.where(counts, chosen, 0))
    assert torch.equal(metrics.argmax[counts], logprobs.argmax(-1)[counts])
    assert torch.equal(metrics.correct, (logprobs.argmax(-1) == labels) & counts)
    entropy = -(logprobs.exp() * logprobs).sum(-1)
    torch.testing.assert_close(metrics.entropy, torch.where(counts, entropy, 0))
    assert not any(x.requires_grad for x in metrics)
    assert not hasattr(llama(input_ids=inputs["input_ids"]), "token_metrics")
    llama(**inputs, return_dict=False)
    cce_patch(llama)
    assert not hasattr(llama(**inputs), "token_metrics")


def test_loss_allows_operations_in_place(llama: nn.Module) -> None:
    truth = truth_of(llama)
    for labels in (families.batch(llama)["labels"], torch.full((2, 9), -100)):
        loss = llama(**families.batch(llama) | {"labels": labels}).loss
        assert not loss._is_view()
        loss += 1
        loss *= 2
        llama.zero_grad()
        loss.backward()
    loss = llama(**families.batch(llama)).loss
    loss *= 2
    llama.zero_grad()
    loss.backward(retain_graph=True)
    gradient = llama.lm_head.weight.grad.clone()
    torch.testing.assert_close(gradient, 2 * truth[1]["lm_head.weight"])
    loss.backward()
    torch.testing.assert_close(llama.lm_head.weight.grad, 2 * gradient)


def test_calls_without_labels_and_generation(llama: nn.Module) -> None:
    llama.eval()
    tokens = families.batch(llama)["input_ids"]

    def run() -> tuple[Tensor, Tensor]:
        torch.manual_seed(2)
        return llama(tokens).logits, llama.generate(tokens, max_new_tokens=6, do_sample=True)

    before = run()
    cce_patch(llama)
    for mine, truth in zip(run(), before, strict=True):
        assert torch.equal(mine, truth)
    llama(**families.batch(llama))
    for mine, truth in zip(run(), before, strict=True):
        assert torch.equal(mine, truth)


def test_train_only(llama: nn.Module) -> None:
    cce_patch(llama, train_only=True)
    inputs = families.batch(llama)
    assert is_fused(llama, **inputs)
    assert not is_fused(llama.eval(), **inputs)
    assert "eval mode" in audit(llama).reason
    assert audit(llama.train()).fused
    cce_patch(llama)
    with torch.no_grad():
        assert is_fused(llama.eval(), **inputs)


def test_random_numbers_are_those_of_the_unpatched_model() -> None:
    model = families.build("gpt2", resid_pdrop=0.3, embd_pdrop=0.3)
    truth = outcome(model, **families.batch(model))
    cce_patch(model)
    assert_same(outcome(model, **families.batch(model)), truth)  # with the probe in it
    assert_same(outcome(model, **families.batch(model)), truth)


def test_gradient_checkpointing(llama: nn.Module) -> None:
    truth = truth_of(llama)
    for reentrant in (False, True):
        llama.gradient_checkpointing_enable({"use_reentrant": reentrant})
        llama.enable_input_require_grads()
        assert is_fused(llama, **families.batch(llama))
        assert_same(outcome(llama, **families.batch(llama)), truth)


def test_deep_copies_are_patched_by_themselves(llama: nn.Module) -> None:
    truth = truth_of(llama)
    twin = copy.deepcopy(llama)
    with torch.no_grad():
        llama.lm_head.weight.zero_()
    assert_same(outcome(twin, **families.batch(twin)), truth)
    assert is_fused(twin, **families.batch(twin))
    cce_unpatch(llama)
    assert is_fused(twin, **families.batch(twin))


def test_saved_and_pickled_models(llama: nn.Module, tmp_path: Path) -> None:
    inputs = families.batch(llama)
    truth = outcome(llama, **inputs)
    cce_patch(llama)
    assert is_fused(llama, **inputs)
    llama.save_pretrained(tmp_path)
    for other in (
        type(llama).from_pretrained(tmp_path).train(),
        pickle.loads(pickle.dumps(llama)),
    ):
        assert not audit(other).patched
        assert_same(outcome(other, **inputs), truth, 1e-7)
        assert is_fused(cce_patch(other), **inputs)


def test_wrapped_after_patching(llama: nn.Module) -> None:
    """By something that hides what it wraps."""
    cce_patch(llama)
    inner = llama.forward
    llama.forward = lambda *args, **kwargs: inner(*args, **kwargs)
    assert is_fused(llama, **families.batch(llama))


def test_a_call_that_fails_leaves_nothing_behind(llama: nn.Module) -> None:
    cce_patch(llama)
    inputs = families.batch(llama)
    llama(**inputs)
    before = dict(llama.lm_head.__dict__), set(llama.__dict__)
    with pytest.raises(IndexError):
        llama(**inputs | {"labels": torch.full((2, 9), families.VOCAB)})
    assert before == (dict(llama.lm_head.__dict__), set(llama.__dict__))


def test_autocast(llama: nn.Module) -> None:
    inputs = families.batch(llama)
    with torch.autocast("cpu", torch.bfloat16):
        truth = outcome(llama, **inputs)
        cce_patch(llama)
        assert_same(outcome(llama, **inputs), truth, 2e-2)
    assert diagnostics()["path"] == "compiled"


def test_compiled_model(llama: nn.Module) -> None:
    truth = truth_of(llama)
    assert audit(llama).fused  # probes, which a compiler cannot
    fullgraph = torch.__version__ >= (2, 13)
    compiled = torch.compile(llama, backend="aot_eager", fullgraph=fullgraph)
    for _ in range(2):
        output = compiled(**families.batch(llama))
        assert output.logits.shape == (2, 0, families.VOCAB)
        llama.zero_grad()
        output.loss.backward()
        torch.testing.assert_close(output.loss, truth[0])
        torch.testing.assert_close(llama.lm_head.weight.grad, truth[1]["lm_head.weight"])


@pytest.mark.parametrize("name", ["llama", "gemma2", "LlavaForConditionalGeneration"])
def test_patch_of_a_model_type(name: str) -> None:
    model = families.build(name)
    kind = model.config.model_type
    inputs = families.batch(model)
    truth = outcome(model, **inputs)
    owner = type(model)
    before = owner.forward
    assert cce_patch(kind) is None
    try:
        assert audit(model).patched
        assert_same(outcome(model, **inputs), truth)
        assert is_fused(model, **inputs)
        later = families.build(name)
        assert is_fused(later, **inputs)
        # The model's own patch comes first.
        cce_patch(model, reduction="none")
        assert model(**inputs).loss.shape == (2, 8)
        cce_unpatch(model)
        assert_same(outcome(model, **inputs), truth)
        cce_patch(model.config, train_only=True)
        assert not is_fused(model.eval(), **inputs)
    finally:
        cce_unpatch(kind)
    assert owner.forward is before
    assert not is_fused(model, **inputs)


def test_what_cannot_be_patched() -> None:
    for call in (cce_patch, cce_unpatch):
        with pytest.raises(TypeError, match="model must be a transformers model"):
            call(nn.Linear(2, 2))
        with pytest.raises(TypeError, match="model_type_or_model must be"):
            call(3)
        with pytest.raises(ValueError, match="no model type"):
            call("lama")
    with pytest.raises(ValueError, match="impl must be"):
        cce_patch("llama", impl="fast")
    with pytest.raises(ValueError, match="reduction must be"):
        cce_patch("llama", reduction="max")
    with pytest.raises(ValueError, match="filter_eps must be"):
        cce_patch("llama", filter_eps="low")


def test_images_among_the_tokens() -> None:
    model = families.build("LlavaForConditionalGeneration")
    inputs = families.batch(model)
    inputs["input_ids"][:, 1:5] = model.config.image_token_id
    inputs["labels"][:, 1:5] = -100
    inputs["pixel_values"] = torch.randn(2, 3, 32, 32)
    truth = outcome(model, **inputs)
    assert any("vision" in name for name in truth[1])
    cce_patch(model)
    assert_same(outcome(model, **inputs), truth)
    assert is_fused(model, **inputs)
