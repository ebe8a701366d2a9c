"""The scenario that this package is for: a Llama 3.2 3B head (hidden 3072, vocabulary 128256) with
PEFT adapters of rank 256 on embed_tokens and lm_head, in bfloat16, against stock PEFT. With its real
shapes on a GPU; the same code on a CPU with small ones."""

from __future__ import annotations

import copy
import functools
from collections.abc import Iterator
from typing import Any, NamedTuple

import pytest
import torch
import transformers
from torch import nn

from cce_ext import diagnostics
from cce_ext.transformers import audit, cce_patch
from tests import families
from tests.training_step import Outcome, is_fused, outcome

peft = pytest.importorskip("peft")

needs_gpu = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
TARGETS = ["embed_tokens", "lm_head"]
# Each gradient of a low-rank factor passes once through bfloat16, with a relative error of 2⁻⁹ an
# entry, on its way to the float32 adapter.
SLACK = 2.0**-9


class Scenario(NamedTuple):
    """Shapes of the model and of the batch."""

    device: str
    hidden: int
    vocab: int
    rank: int
    batch: tuple[int, int]

    def config(self, tied: bool) -> transformers.LlamaConfig:
        return transformers.LlamaConfig(
            hidden_size=self.hidden,
            vocab_size=self.vocab,
            intermediate_size=2 * self.hidden,
            num_hidden_layers=1,
            num_attention_heads=self.hidden // 64,
            num_key_value_heads=1,
            tie_word_embeddings=tied,
            pad_token_id=None,
        )

    def inputs(self) -> dict[str, torch.Tensor]:
        generator = torch.Generator().manual_seed(1)
        tokens = torch.randint(self.vocab, self.batch, generator=generator)
        labels = tokens.clone()
        labels[:, : self.batch[1] // 8] = -100
        return {"input_ids": tokens.to(self.device), "labels": labels.to(self.device)}


SMALL = Scenario("cpu", 64, 500, 16, (2, 24))
LLAMA = Scenario("cuda", 3072, 128256, 256, (2, 512))


@pytest.fixture(autouse=True)
def _quiet() -> Iterator[None]:
    with families.silence():
        yield
    if torch.cuda.is_available():
        torch.cuda.empty_cache()


def adapted(
    scenario: Scenario, tied: bool, spread: float, dtype: torch.dtype, **options: Any
) -> nn.Module:
    """Stock PEFT over a model of this dtype whose weights bfloat16 can hold, B not zero. `spread`:
    about the standard deviation of the adapter's share in a logit."""
    torch.manual_seed(0)
    with torch.device(scenario.device):
        model = transformers.LlamaForCausalLM(scenario.config(tied)).to(torch.bfloat16).to(dtype)
    config = peft.LoraConfig(
        task_type="CAUSAL_LM", r=scenario.rank, lora_alpha=2 * scenario.rank,
        target_modules=TARGETS, **options,
    )  # fmt: skip
    wrapped = peft.get_peft_model(model, config).to(scenario.device)
    # The output layer's A sees hidden states of unit variance.
    sizes = {"A": (3 * scenario.hidden) ** -0.5, "B": spread / (2 * (scenario.rank / 3) ** 0.5)}
    embed, head = wrapped.base_model.model.model.embed_tokens, wrapped.get_output_embeddings()
    pairs = {
        "B": (embed.lora_embedding_A["default"], head.lora_B["default"].weight),
        "A": (embed.lora_embedding_B["default"], head.lora_A["default"].weight),
    }
    generator = torch.Generator(scenario.device).manual_seed(2)
    noise = functools.partial(torch.randn, generator=generator, device=scenario.device)
    with torch.no_grad():
        for name, (of_embedding, of_head) in pairs.items():
            assert of_embedding.dtype == of_head.dtype == torch.float32
            for parameter in (of_head, of_embedding):
                parameter.copy_(sizes[name] * noise(parameter.shape))
            if options.get("ensure_weight_tying"):
                # Transposed views of each other, until PEFT casts them to float32 one by one.
                assert of_head.stride() == (1, of_head.shape[0])
                of_head.copy_(of_embedding.T)
    return wrapped


def relative_errors(found: Outcome, truth: Outcome) -> dict[str, float]:
    """Of the loss and of each gradient: ‖x - truth‖ / ‖truth‖."""
    assert found[1].keys() == truth[1].keys()
    pairs = {"loss": (found[0], truth[0])} | {n: (found[1][n], truth[1][n]) for n in truth[1]}
    return {
        name: ((x.double() - y.double()).norm() / y.double().norm()).item()
        for name, (x, y) in pairs.items()
    }


def check(scenario: Scenario, impl: str, tied: bool, spread: float, **options: Any) -> None:
    """Loss and adapter gradients: ours and stock PEFT's in bfloat16 against stock PEFT in float32."""
    inputs = scenario.inputs()
    truth = outcome(adapted(scenario, tied, spread, torch.float32, **options), **inputs)
    model = adapted(scenario, tied, spread, torch.bfloat16, **options)
    theirs = relative_errors(outcome(model, **inputs), truth)
    cce_patch(model, impl=impl)
    assert audit(model).fused
    mine = relative_errors(outcome(model, **inputs), truth)
    facts = diagnostics()
    assert facts["path"] == "compiled"
    shape = (inputs["input_ids"].numel(), scenario.vocab, scenario.hidden, scenario.rank)
    assert facts["shape"] == shape
    assert is_fused(model, **inputs)
    # A and B of embedding and output layer; the base is frozen.
    assert [("lora_" in name) for name in mine if name != "loss"] == [True] * 4
    check_errors(mine, theirs)


def check_errors(mine: dict[str, float], theirs: dict[str, float]) -> None:
    assert max(theirs.values()) < 0.1, theirs  # the truth is of the same model
    worse = {n: (e, theirs[n]) for n, e in mine.items() if not e <= 2 * theirs[n] + SLACK}
    assert not worse, f"ours, stock code's: {worse}; all of ours: {mine}"


CASES = pytest.mark.parametrize(
    ("tied", "options"),
    [(False, {}), (True, {}), (True, {"ensure_weight_tying": True})],
    ids=["untied", "tied", "tied adapters"],
)
# Nearly flat distributions, and ones with a few likely tokens.
SPREADS = pytest.mark.parametrize("spread", [0.5, 6.0], ids=["flat", "sharp"])


@CASES
@SPREADS
@pytest.mark.parametrize("impl", ["cce", "cce_exact"])
def test_small(impl: str, tied: bool, options: dict[str, Any], spread: float) -> None:
    check(SMALL, impl, tied, spread, **options)


@needs_gpu
@CASES
@SPREADS
@pytest.mark.parametrize("impl", ["cce", "cce_exact"])
def test_llama_3b_head(impl: str, tied: bool, options: dict[str, Any], spread: float) -> None:
    check(LLAMA, impl, tied, spread, **options)


@needs_gpu
def test_memory_of_a_step() -> None:
    """No logits (4096 x 128256), and no gradient for the frozen classifier."""
    scenario = LLAMA._replace(batch=(8, 512))
    inputs = scenario.inputs()
    model = cce_patch(adapted(scenario, True, 6.0, torch.bfloat16))
    outcome(model, **inputs)
    gradients = sum(4 * p.numel() for p in model.parameters() if p.requires_grad)
    model.zero_grad(set_to_none=True)
    torch.cuda.synchronize()
    before = torch.cuda.memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    model(**inputs).loss.backward()
    torch.cuda.synchronize()
    extra = torch.cuda.max_memory_allocated() - before - gradients
    # One bfloat16 copy of the logits; PEFT's own code has several, in float32 too.
    assert extra < 2 * inputs["input_ids"].numel() * scenario.vocab, f"{extra / 1e6:.0f} MB"


@pytest.mark.parametrize("device", ["cpu", pytest.param("cuda", marks=needs_gpu)])
@pytest.mark.parametrize("kind", ["llama", "gemma2", "cohere"])
def test_families(kind: str, device: str) -> None:
    """Tiny models in bfloat16: a softcap and a logit scale among them."""
    model = families.build(kind).to(device, torch.bfloat16)
    inputs = {name: value.to(device) for name, value in families.batch(model).items()}
    truth = outcome(copy.deepcopy(model).float(), **inputs)
    theirs = relative_errors(outcome(model, **inputs), truth)
    mine = relative_errors(outcome(cce_patch(model), **inputs), truth)
    assert is_fused(model, **inputs)
    check_errors(mine, theirs)
