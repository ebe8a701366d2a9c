"""The examples of per-token losses: right numbers, and they learn."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
import torch.nn.functional as F

from cce_ext.transformers import cce_patch, cce_unpatch
from examples import perplexity, preference
from tests import families


@pytest.fixture(autouse=True)
def _quiet():
    with families.silence():
        yield


@pytest.mark.parametrize(("window", "stride"), [(64, 32), (16, 8), (16, 15), (50, 7)])
def test_token_losses(window: int, stride: int) -> None:
    """Each token once, with the context that its window has."""
    model = perplexity.random_model().eval()
    tokens = torch.randint(256, (50,), generator=torch.Generator().manual_seed(0))
    truth = torch.empty(49)
    for i in range(49):  # predicts token i + 1, in the first window that has it
        first = max(0, -(-(i + 2 - window) // stride) * stride)
        logits = model(tokens[None, first : i + 1]).logits[0, -1]
        truth[i] = F.cross_entropy(logits, tokens[i + 1])
    cce_patch(model, reduction="none")
    mine = perplexity.token_losses(model, tokens, window, stride)
    torch.testing.assert_close(mine, truth.detach(), rtol=1e-4, atol=1e-4)
    with pytest.raises(ValueError, match="stride must be"):
        perplexity.token_losses(model, tokens, window, window)


def test_perplexity(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    text = tmp_path / "text.txt"
    text.write_text("no surprises here " * 20)
    value = perplexity.main(["--text", str(text), "--window", "64", "--stride", "32"])
    assert 200 < value < 330  # random weights: about the vocabulary of 256
    assert "359 tokens" in capsys.readouterr().out


def test_logprobs() -> None:
    """Of policy and reference, against log_softmax of stored logits."""
    model = preference.make_model()
    with torch.no_grad():
        model.get_output_embeddings().lora_B["default"].weight.normal_(std=0.1)
    tokens = torch.randint(512, (3, 12))
    counts = preference.counted(tokens)

    def truth() -> torch.Tensor:
        logits = model(input_ids=tokens).logits[:, :-1]
        found = logits.log_softmax(-1).gather(-1, tokens[:, 1:, None])[..., 0]
        return torch.where(counts[:, 1:], found, 0)

    policy, expected = preference.token_logprobs(model, tokens, counts), truth()
    torch.testing.assert_close(policy, expected)
    parameter = model.get_output_embeddings().lora_A["default"].weight
    grads = [torch.autograd.grad(x.sum(), parameter)[0] for x in (policy, expected)]
    torch.testing.assert_close(*grads)
    assert (policy[:, : preference.PROMPT - 1] == 0).all()
    reference = preference.reference_logprobs(model, tokens, counts)
    with model.disable_adapter():
        torch.testing.assert_close(reference, truth())
    assert (policy - reference).abs().max() > 0.01
    cce_unpatch(model)


def test_dpo_learns(capsys: pytest.CaptureFixture) -> None:
    margins = preference.main(["dpo", "--steps", "25"])
    assert margins[0] == pytest.approx(0, abs=1e-5)  # B is zero: policy and reference are the same
    assert margins[-1] > 0.3
    assert "dpo: mean margin" in capsys.readouterr().out


def test_grpo_learns() -> None:
    rewards = preference.main(["grpo", "--steps", "12"])
    assert sum(rewards[-3:]) / 3 > sum(rewards[:3]) / 3 + 0.1
