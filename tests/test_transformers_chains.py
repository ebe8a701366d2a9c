"""What a model may do between its output layer and its loss, and what makes it keep its own code."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator

import pytest
import torch
import transformers
from torch import Tensor, nn

from cce_ext.transformers import audit, cce_patch, cce_unpatch
from cce_ext.transformers.standin import UnexplainedError, meaning
from tests import families
from tests.training_step import assert_same, is_fused, outcome

V = families.VOCAB


@pytest.fixture(autouse=True)
def _quiet() -> Iterator[None]:
    with families.silence():
        yield


class Chained(transformers.LlamaForCausalLM):
    """A Llama whose logits go through `chain`, and its loss through `after`."""

    chain = staticmethod(lambda logits: logits)
    after = staticmethod(lambda loss, logits: loss)

    def forward(
        self, input_ids: Tensor | None = None, labels: Tensor | None = None, **kwargs: object
    ) -> object:
        logits = type(self).chain(self.lm_head(self.model(input_ids).last_hidden_state))
        loss = None
        if labels is not None:
            loss = self.loss_function(logits, labels, logits.shape[-1], **kwargs)
            loss = type(self).after(loss, logits)
        return transformers.modeling_outputs.CausalLMOutput(loss=loss, logits=logits)


def chained(chain: Callable, after: Callable | None = None) -> nn.Module:
    members = {"chain": staticmethod(chain)}
    if after is not None:
        members["after"] = staticmethod(after)
    torch.manual_seed(0)
    model = type("Chained", (Chained,), members)(families.tiny_config("llama"))
    nn.init.normal_(model.lm_head.weight)
    return model


def in_place(logits: Tensor) -> Tensor:
    logits *= 0.5
    return logits.div_(2).tanh_() * 3


CHAINS: dict[str, tuple[Callable, tuple]] = {
    "nothing": (lambda x: x, (1, None, None)),
    "casts": (lambda x: x.to(torch.float64).float().contiguous().to(x.device), (1, None, None)),
    "factor": (lambda x: 0.25 * x, (0.25, None, None)),
    "factors": (lambda x: torch.mul(-x / 4, 2), (-0.5, None, None)),
    "softcap": (lambda x: torch.tanh(x / 2) * 2, (1, 2, None)),
    "softcap of a factor": (lambda x: 5 * torch.tanh(x * 0.3), (1.5, 5, None)),
    "factor of a softcap": (lambda x: (x.div(3).tanh() * 3) / 2, (0.5, 1.5, None)),
    "negative softcap": (lambda x: nn.functional.tanh(x) * -2, (-2, 2, None)),
    "in place": (in_place, (0.75, 3, None)),
    "slice": (lambda x: x[..., : V - 6], (1, None, V - 6)),
    "slice of three": (lambda x: 2 * x[:, :, : V - 6], (2, None, V - 6)),
    "whole slice": (lambda x: x[:, :, :V][...], (1, None, None)),
}


@pytest.mark.parametrize("name", CHAINS)
def test_explained(name: str) -> None:
    chain, (scale, softcap, vocab) = CHAINS[name]
    model = chained(chain)
    inputs = families.batch(model)
    inputs["labels"] = inputs["labels"].clamp(max=V - 7)
    truth = outcome(model, **inputs)
    cce_patch(model)
    found = audit(model)
    assert found.fused, found
    assert (found.logit_scale, found.softcap) == (pytest.approx(scale), pytest.approx(softcap))
    assert found.vocab == vocab
    assert is_fused(model, **inputs)
    assert_same(outcome(model, **inputs), truth)


def masked(logits: Tensor) -> Tensor:
    logits[..., 3:5] = -1e4
    return logits


UNEXPLAINED: dict[str, tuple[Callable, str]] = {
    "sum": (lambda x: x + 1, "does add"),
    "power": (lambda x: x**3, "does pow"),
    "itself": (lambda x: x * x, "does mul"),
    "learned factor": (lambda x: x * torch.ones(1, requires_grad=True), "does mul"),
    "inverse": (lambda x: 1 / (x + 20), "does add"),
    "rounding": (lambda x: torch.div(x, 0.5, rounding_mode="floor"), "does div"),
    "other entries": (lambda x: x[..., 6:], "does getitem"),
    "positions": (lambda x: x[:, -x.shape[1] :], "does getitem"),
    "mask": (masked, "does setitem"),
    "list": (lambda x: torch.cat([x, x], -1)[..., :V], "does cat"),
    "twice": (lambda x: x.tanh().tanh(), "tanh twice"),
    "zero": (lambda x: x.tanh() * 0, "multiplied by zero"),
    "shape": (lambda x: x.view(-1, V).view(x.shape), "does view"),
    "rounded": (lambda x: x.to(torch.bfloat16).float(), "not what its operations"),
    "raw data": (lambda x: x.data * 1 + x * 0, "does get"),
    "other data": (lambda x: torch.zeros(2, 9, V) + x.sum(), "does sum"),
}


@pytest.mark.parametrize("name", UNEXPLAINED)
def test_unexplained(name: str, caplog: pytest.LogCaptureFixture) -> None:
    chain, words = UNEXPLAINED[name]
    model = chained(chain)
    type(model).__name__ = f"Unexplained {name}"  # a warning is given once a name and reason
    inputs = families.batch(model)
    inputs["labels"] = inputs["labels"].clamp(max=V - 7)
    truth = outcome(model, **inputs)
    cce_patch(model)
    with caplog.at_level(logging.WARNING, "cce_ext.transformers"):
        for _ in range(2):
            assert_same(outcome(model, **inputs), truth, 1e-7)
    assert len(caplog.records) == 1
    assert words in caplog.text
    assert not is_fused(model, **inputs)
    found = audit(model)
    assert (found.patched, found.fused) == (True, False)
    assert words in str(found)


def test_other_uses_of_logits_are_noticed() -> None:
    """A z-loss after the loss would be NaN of empty logits."""
    model = chained(lambda x: x, lambda loss, x: loss + x.logsumexp(-1).square().mean())
    truth = outcome(model, **families.batch(model))
    cce_patch(model)
    assert "logsumexp" in audit(model).reason
    assert_same(outcome(model, **families.batch(model)), truth, 1e-7)


def test_a_chain_that_changes_is_noticed() -> None:
    """What the probe did not see happens later: the call is repeated by the model's own code."""
    factor = [1.0]
    model = chained(lambda x: x * factor[0], lambda loss, x: loss)
    inputs = families.batch(model)
    cce_patch(model)
    assert is_fused(model, **inputs)
    factor[0] = 2.0
    mine = outcome(model, **inputs)
    assert "from call to call" in audit(model).reason
    cce_unpatch(model)
    assert_same(mine, outcome(model, **inputs), 1e-7)
    cce_patch(model)
    assert audit(model).logit_scale == 2


def test_uses_that_appear_later_are_noticed() -> None:
    weight = [0.0]

    def z_loss(loss: Tensor, logits: Tensor) -> Tensor:
        return loss + weight[0] * logits.logsumexp(-1).square().mean() if weight[0] else loss

    model = chained(lambda x: x, z_loss)
    inputs = families.batch(model)
    cce_patch(model)
    assert is_fused(model, **inputs)
    weight[0] = 0.1
    mine = outcome(model, **inputs)
    assert torch.isfinite(mine[0])
    cce_unpatch(model)
    assert_same(mine, outcome(model, **inputs), 1e-7)


class Unusual(Chained):
    """Does with labels and output layer what `way` says."""

    way = ""

    def forward(
        self, input_ids: Tensor | None = None, labels: Tensor | None = None, **kwargs: object
    ) -> object:
        hidden = self.model(input_ids).last_hidden_state
        logits = self.lm_head(hidden)
        if self.way == "twice":
            logits = self.lm_head(hidden + 0 * logits.mean())
        if self.way == "other labels":
            labels = labels.roll(1)
        if self.way == "part":
            logits, labels = self.lm_head(hidden[:, 2:]), labels[:, 2:]
        if self.way == "own loss":
            loss = nn.functional.cross_entropy(logits.mT, labels)
        else:
            loss = self.loss_function(logits, labels, V, **kwargs)
        if self.way == "two losses":
            loss = loss + self.loss_function(logits, labels, V)
        return transformers.modeling_outputs.CausalLMOutput(loss=loss, logits=logits)


@pytest.mark.parametrize(
    ("way", "words"),
    [
        ("twice", "its output layer runs 2 times|does mean"),
        ("other labels", "changes the labels"),
        ("part", "output layer runs 2 times|changes the labels"),
        ("own loss", "by loss_function"),
        ("two losses", "loss_function 2 times"),
    ],
)
def test_unusual_losses(way: str, words: str) -> None:
    torch.manual_seed(0)
    model = type("Unusual", (Unusual,), {"way": way})(families.tiny_config("llama"))
    inputs = families.batch(model)
    truth = outcome(model, **inputs)
    cce_patch(model)
    assert any(word in audit(model).reason for word in words.split("|")), audit(model)
    assert_same(outcome(model, **inputs), truth, 1e-7)


def test_other_loss_functions_and_heads_stay() -> None:
    model = families.build("llama")
    inputs = families.batch(model)
    model.loss_function = lambda logits, labels, vocab_size, **_: logits.square().mean()
    truth = outcome(model, **inputs)
    cce_patch(model)
    assert_same(outcome(model, **inputs), truth, 1e-7)
    assert "causal language modelling" in audit(model).reason
    del model._loss_function
    assert audit(model).fused

    class Scaled(nn.Linear):
        def forward(self, x: Tensor) -> Tensor:
            return 2 * super().forward(x)

    model.set_output_embeddings(Scaled(32, V))
    truth = outcome(cce_unpatch(model), **inputs)
    cce_patch(model)
    assert_same(outcome(model, **inputs), truth, 1e-7)
    assert "forward of its own" in audit(model).reason
    model.lm_head = nn.Linear(32, V)
    assert audit(model).fused
    forward = model.lm_head.forward
    model.lm_head.forward = lambda x: 3 * forward(x)
    assert "was replaced" in audit(model).reason


def test_models_that_need_more_than_tokens_are_watched_at_their_first_call() -> None:
    class Picky(Chained):
        def forward(
            self, input_ids: Tensor | None = None, labels: Tensor | None = None, **kwargs: object
        ) -> object:
            if kwargs.pop("pixels", None) is None:
                raise ValueError("pixels")
            return super().forward(input_ids, labels, **kwargs)

    torch.manual_seed(0)
    model = Picky(families.tiny_config("llama"))
    inputs = families.batch(model) | {"pixels": torch.zeros(1)}
    truth = outcome(model, **inputs)
    cce_patch(model)
    assert "pixels" in audit(model).reason
    assert_same(outcome(model, **inputs), truth, 1e-7)  # by its own code
    assert is_fused(model, **inputs)
    assert audit(model).fused
    assert_same(outcome(model, **inputs), truth)


def test_lengths_that_do_not_match_fail_as_in_the_model() -> None:
    model = families.build("llama")
    inputs = families.batch(model)
    cce_patch(model)
    with pytest.raises(ValueError, match="batch_size"):
        model(**inputs, logits_to_keep=3)
    one = {name: value[:, :1] for name, value in inputs.items()}
    assert model(**one).loss.isnan()  # the mean of nothing, as in the model's own code


def test_meaning() -> None:
    assert meaning(()) == (1.0, None, None)
    assert meaning((("mul", 2.0), ("tanh", 0.0), ("mul", 3.0), ("slice", 5.0))) == (6.0, 3.0, 5)
    with pytest.raises(UnexplainedError):
        meaning((("tanh", 0.0), ("tanh", 0.0)))
