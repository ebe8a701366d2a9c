"""Finds out, by one small call, what a model does between its output layer and its loss.

The model's own forward runs with an output layer that returns real logits which remember what is
done to them, and with a loss function that looks at what it is given. No table of model families:
the code that runs is what tells. What was understood is then checked against the numbers.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from transformers.loss.loss_utils import ForCausalLMLoss

from cce_ext.transformers.standin import (
    Meaning,
    StandInLogits,
    Step,
    UnexplainedError,
    meaning,
    plain,
    stand_in,
)
from cce_ext.utils import softcapping

PROBE_LENGTH = 4


class Chain(NamedTuple):
    """What happens between a model's output layer and its loss; with a reason, nothing else holds."""

    steps: tuple[Step, ...] = ()
    meaning: Meaning = Meaning()
    shift: int = 1  # position i predicts label i + shift
    reason: str = ""


def output_layer(model: Any) -> nn.Module | None:
    """The module that makes the model's logits; None: it has none, or several."""
    head = model.get_output_embeddings()
    return head if isinstance(head, nn.Module) and not isinstance(head, nn.ModuleList) else None


def forward_slot(module: nn.Module) -> str:
    """The attribute that module(...) ends up calling: accelerate's hooks keep the forward they wrap
    in another one."""
    hooked = "_hf_hook" in module.__dict__ and "_old_forward" in module.__dict__
    return "_old_forward" if hooked else "forward"


@contextlib.contextmanager
def replaced(
    model: Any, head: nn.Module, head_forward: Callable, loss_function: Callable
) -> Iterator[None]:
    """The output layer's forward and the model's loss function are others for a while."""
    targets = ((head, forward_slot(head), head_forward), (model, "_loss_function", loss_function))
    before = [module.__dict__.get(name) for module, name, _ in targets]
    try:
        for module, name, value in targets:
            module.__dict__[name] = value
        yield
    finally:
        for (module, name, _), value in zip(targets, before, strict=True):
            if value is None:
                del module.__dict__[name]
            else:
                module.__dict__[name] = value


def obstacle(model: Any) -> str:
    """Why a model cannot be served whatever its forward does, or ''."""
    head = output_layer(model)
    if head is None:
        return "get_output_embeddings() is not one module"
    own = head.__dict__.get(forward_slot(head))
    if own is not None and getattr(own, "__func__", None) is not type(head).forward:
        return "the forward of its output layer was replaced by something else"
    if model.loss_function is not ForCausalLMLoss:
        name = getattr(model.loss_function, "__name__", type(model.loss_function).__name__)
        return f"its loss is not the causal language modelling loss, but {name}"
    return ""


def probe(model: Any, forward: Callable[..., Any]) -> Chain:
    """Runs forward(**arguments) on a few tokens and says what was seen.

    Raises:
        Exception: whatever the model raises if it needs other inputs than tokens.
    """
    with small_call(model) as inputs:
        return watch(model, forward, (), inputs, inputs["labels"])[0]


@contextlib.contextmanager
def small_call(model: Any) -> Iterator[dict[str, Tensor]]:
    """Inputs of a few tokens, to be used without gradient and without touching the random state."""
    device = model.get_input_embeddings().weight.device
    if device.type == "meta":  # offloaded: accelerate's hooks move the inputs
        device = torch.device("cpu")
    tokens = _harmless_tokens(model).to(device)
    try:
        with torch.no_grad(), torch.random.fork_rng([device] if device.type == "cuda" else []):
            yield {"input_ids": tokens, "labels": tokens}
    finally:
        # Before PyTorch 2.11 autocast keeps weights that it cast without gradient for the calls that come.
        torch.clear_autocast_cache()


def watch(
    model: Any, forward: Callable[..., Any], args: tuple, kwargs: dict[str, Any], labels: Tensor
) -> tuple[Chain, Any]:
    """Runs the model's own code once, with stored logits, and says what was seen. Also returns what
    the model returned. There must be no :func:`obstacle`."""
    head = output_layer(model)
    own_forward, own_loss = getattr(head, forward_slot(head)), model.loss_function
    given: list[Tensor] = []  # raw logits, one for each call of the output layer
    doubts: list[str] = []
    chains: list[Chain] = []

    def head_forward(*args: Any, **kwargs: Any) -> Tensor:
        logits = own_forward(*args, **kwargs)
        given.append(logits.detach().clone())  # the model may go on in place
        return stand_in(logits, (), doubts)

    def loss_function(
        logits: Tensor, labels_: Tensor | None = None, vocab_size: int | None = None, **options: Any
    ) -> Tensor:
        labels_ = options.pop("labels", labels_)
        seen = labels_, options.get("shift_labels")
        chains.append(_chain(given, logits, labels, seen, vocab_size))
        return own_loss(plain(logits), labels_, vocab_size, **options)

    with replaced(model, head, head_forward, loss_function):
        output = forward(*args, **kwargs)
    if not chains:
        chain = Chain(reason="it does not compute its loss by loss_function")
    elif doubts:
        chain = Chain(reason=doubts[0])
    elif len(chains) != 1:
        chain = Chain(reason=f"it calls its loss_function {len(chains)} times")
    elif len(given) != 1:
        chain = Chain(reason=f"its output layer runs {len(given)} times")
    else:
        chain = chains[0]
    return chain, without_memory(output)


def without_memory(output: Any) -> Any:
    """A model's output with plain logits, empty ones where none were computed."""
    if isinstance(output, StandInLogits):
        return plain(output).detach() if output.doubts is None else plain(output)
    if isinstance(output, tuple):
        values = [without_memory(value) for value in output]
        return type(output)(*values) if hasattr(output, "_fields") else type(output)(values)
    if isinstance(output, dict):  # a ModelOutput: its fields are kept in step
        for key, value in output.items():
            new = without_memory(value)
            if new is not value:
                output[key] = new
    return output


def _chain(
    given: list[Tensor],
    logits: Tensor,
    labels: Tensor,
    seen: tuple[Tensor | None, Tensor | None],
    vocab_size: int | None,
) -> Chain:
    """The chain that ends in these logits and labels."""
    if not isinstance(logits, StandInLogits):
        return Chain(reason="its loss is not computed from the logits of its output layer alone")
    shifts = [shift for shift, value in zip((1, 0), seen, strict=True) if _same(value, labels)]
    if not shifts:
        return Chain(reason="it changes the labels before its loss")
    if vocab_size is not None and vocab_size != logits.shape[-1]:
        return Chain(
            reason=f"vocab_size is {vocab_size}, its logits have {logits.shape[-1]} entries"
        )
    try:
        found = meaning(logits.steps)
    except UnexplainedError as error:
        return Chain(reason=str(error))
    raw, final = given[-1].double()[..., : found.vocab] * found.logit_scale, plain(logits)
    if found.softcap is not None:
        raw = softcapping(raw, found.softcap)
    exact = {given[-1].dtype, final.dtype} <= {torch.float32, torch.float64}
    tolerance = 1e-4 if exact else 3e-2
    if not torch.allclose(final.double(), raw, rtol=tolerance, atol=tolerance):
        return Chain(reason="its logits are not what its operations on them explain")
    return Chain(logits.steps, found, shifts[0])


def _same(value: Tensor | None, labels: Tensor) -> bool:
    """Whether these are the labels that came in, perhaps on another device."""
    if value is None or value is labels:
        return value is labels
    return value.device != labels.device and torch.equal(value.cpu(), labels.cpu())


def _harmless_tokens(model: Any) -> Tensor:
    """A short text (1, T) without special tokens, which may stand for an image or end a text."""
    config = model.config.get_text_config()
    special: set[int] = set()
    for facts in (model.config.to_dict(), config.to_dict()):
        for name, value in facts.items():
            if name.endswith(("token_id", "token_index")):
                special.update(value if isinstance(value, list) else [value])
    size = model.get_input_embeddings().weight.shape[0]
    tokens = [token for token in range(min(size, 1000)) if token not in special] or [0]
    return torch.tensor([[tokens[i % len(tokens)] for i in range(PROBE_LENGTH)]])
