"""cce_patch, cce_unpatch and audit."""

from __future__ import annotations

import dataclasses
import functools
import inspect
import logging
import types
from collections.abc import Callable
from typing import Any, NamedTuple, TypeVar

import torch
import transformers
from torch import nn
from transformers.models.auto import modeling_auto

from cce_ext import checks
from cce_ext.options import LinearCrossEntropyImpl, implementation_name, resolve_filter
from cce_ext.transformers.direct import DirectCall, Options
from cce_ext.transformers.probe import (
    Chain,
    forward_slot,
    obstacle,
    output_layer,
    probe,
    replaced,
    small_call,
    watch,
    without_memory,
)
from cce_ext.transformers.standin import UnexplainedError

logger = logging.getLogger(__name__)

TransformersModelT = TypeVar("TransformersModelT", bound=nn.Module)

_STATE = "_cce_state"  # the name of a model's _State among its attributes
# Earlier compilers call the output layer's own forward while it is replaced, or fail when it is put back: there the
# patched forward is left to Python, and what it calls is compiled.
_TRACEABLE = torch.__version__ >= (2, 13)
_MAPPINGS = ("MODEL_FOR_CAUSAL_LM_MAPPING_NAMES", "MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES")


@dataclasses.dataclass
class _State:
    """What is known of a model."""

    chains: dict[bool, Chain] = dataclasses.field(default_factory=dict)  # by model.training
    stored: str = ""  # why the last call with labels stored its logits; empty if it did not


class _Patch:
    """What a patched forward knows; kept as its attribute `cce`."""

    def __init__(self, options: Options, original: Callable, previous: Any) -> None:
        self.options = options
        self.original = original  # takes the model as its first argument
        self.previous = previous  # what the attribute was before; None: not there
        self.function: Callable | None = None
        self.enabled = True


class Audit(NamedTuple):
    """Whether a model's loss is computed without logits, and why not.

    patched: by cce_patch, the model itself or its class; fused: a call with labels in the model's
    present state stores no logits (or would not, if patched); reason: why not fused; head: kind of
    the output layer; logit_scale, softcap, vocab (None: all entries): what the model does with its
    logits; shift: position i predicts label i + shift.
    """

    patched: bool
    fused: bool
    reason: str
    head: str
    logit_scale: float
    softcap: float | None
    vocab: int | None
    shift: int

    def __str__(self) -> str:
        state = "patched" if self.patched else "not patched"
        if not self.fused:
            return f"{state}; not fused: {self.reason}"
        facts = [f"output layer {self.head}"]
        if self.logit_scale != 1:
            facts.append(f"logit_scale {self.logit_scale:g}")
        if self.softcap is not None:
            facts.append(f"softcap {self.softcap:g}")
        if self.vocab is not None:
            facts.append(f"first {self.vocab} entries")
        if not self.shift:
            facts.append("labels are not shifted")
        return f"{state}; {'fused' if self.patched else 'can be fused'}: {', '.join(facts)}"


def cce_patch(
    model_type_or_model: str | transformers.PretrainedConfig | TransformersModelT,
    impl: str | LinearCrossEntropyImpl = "cce",
    reduction: str = "mean",
    filter_eps: float | str | None = "auto",
    accum_e_fp32: bool = False,
    accum_c_fp32: bool = False,
    filter_e_grad: bool = True,
    filter_c_grad: bool = True,
    train_only: bool = False,
    *,
    return_metrics: bool = False,
) -> TransformersModelT | None:
    """Makes a transformers model compute its loss without logits when it is called with labels.

    Calls without labels, generation among them, are not touched. With labels the output's loss is
    that of the model's own code, and its logits are an empty tensor (..., 0, V). A model whose
    logits cannot be explained keeps its own code; :func:`audit` and a warning say why.

    Args:
        model_type_or_model: a model, which may be wrapped by PEFT; or a model type ("llama",
            "gemma2", any that transformers knows) or a configuration of that type, to patch the
            class for all its present and future models.
        impl, filter_eps, accum_e_fp32, accum_c_fp32, filter_e_grad, filter_c_grad: as for
            :func:`cce_ext.linear_cross_entropy`.
        reduction: "mean" (over the labels that count, or num_items_in_batch if it is given),
            "sum" or "none" (the loss of each token; (B, T - 1), or (B, T) with shift_labels).
        train_only: leave the model alone in eval mode, where its logits may be wanted.
        return_metrics: give outputs an attribute ``token_metrics``: target log-probability, most
            likely token, whether it is right, and entropy of each token, without gradient
            (:class:`cce_ext.TokenMetrics`, in the shape of reduction="none"). It is missing where
            logits are stored, and from tuples (return_dict=False).

    Returns:
        The model that was given; None for a model type.

    Raises:
        TypeError: neither a model nor a type. ValueError: an unknown type or option.
    """
    checks.check_reduction(reduction)
    name = implementation_name(impl)
    resolve_filter(name, filter_eps, filter_e_grad, filter_c_grad, torch.bfloat16)
    options = Options(
        name,
        reduction,
        filter_eps,
        accum_e_fp32,
        accum_c_fp32,
        filter_e_grad,
        filter_c_grad,
        train_only,
        return_metrics,
    )
    cce_unpatch(model_type_or_model)
    for target in _targets(model_type_or_model):
        if isinstance(target, type):
            target.forward = _patched(
                _Patch(options, target.forward, target.__dict__.get("forward"))
            )
            continue
        slot = forward_slot(target)
        previous = target.__dict__.get(slot)
        patch = _Patch(options, _unbound(target, previous), previous)
        # A bound method: copy.deepcopy binds the copy's one to the copy.
        target.__dict__[slot] = types.MethodType(_patched(patch), target)
    return model_type_or_model if isinstance(model_type_or_model, nn.Module) else None


def cce_unpatch(model_type_or_model: Any) -> Any:
    """Takes back :func:`cce_patch`, for a model or a model type; nothing happens where there is no
    patch. Returns what cce_patch returns and raises what it raises."""
    for target in _targets(model_type_or_model):
        for slot in ("forward", "_old_forward"):
            value = target.__dict__.get(slot)
            patch = _patch_of(value)
            if patch is None:
                continue
            if getattr(value, "__func__", value) is not patch.function:
                patch.enabled = False  # wrapped by something else since, which stays
            elif patch.previous is None:
                delattr(target, slot)
            elif isinstance(patch.previous, types.MethodType):  # of the model this one is a copy of
                setattr(target, slot, types.MethodType(patch.previous.__func__, target))
            else:
                setattr(target, slot, patch.previous)
        if not isinstance(target, type):
            target.__dict__.pop(_STATE, None)
    return model_type_or_model if isinstance(model_type_or_model, nn.Module) else None


def audit(model: nn.Module) -> Audit:
    """Says whether a model's loss is fused in its present state (its mode, its adapters), patched
    or not, by a call with a few tokens. Where the model is sharded, all ranks have to ask.

    Raises:
        TypeError: not a transformers model, wrapped or not.
    """
    model = _unwrap(model)
    patch = _active_patch(model)
    if patch is None:
        cce_patch(model)
        try:
            return audit(model)._replace(patched=False)
        finally:
            cce_unpatch(model)
    head, reason = output_layer(model), obstacle(model)
    if not reason and patch.options.train_only and not model.training:
        reason = "it is in eval mode, and the patch is for training only"
    state = _state_of(model)
    if not reason:
        try:
            with small_call(model) as inputs:
                model(**inputs)
        except Exception as error:
            if model.training not in state.chains:
                reason = (
                    f"not known before a call with labels; a call with tokens alone says: {error}"
                )
        reason = reason or state.stored
    chain = Chain() if reason else state.chains[model.training]
    kind = f"{type(head).__module__.split('.')[0]}'s {type(head).__name__}" if head else ""
    return Audit(True, not reason, reason, kind, *chain.meaning, chain.shift)


def _patched(patch: _Patch) -> Callable[..., Any]:
    """The original forward, with the loss computed in the output layer if it is given labels."""
    original = patch.original
    names = [name for name in inspect.signature(original).parameters if name != "self"]
    position = names.index("labels") if "labels" in names else None

    @functools.wraps(original)
    def forward(self: Any, *args: Any, **kwargs: Any) -> Any:
        labels = kwargs.get("labels")
        if labels is None and position is not None and position < len(args):
            labels = args[position]
        skipped = not patch.enabled or (patch.options.train_only and not self.training)
        # None where something wraps the forward that does not say what it wraps.
        if labels is None or skipped or _active_patch(self) not in (None, patch):
            return original(self, *args, **kwargs)
        state = _state_of(self)
        state.stored = obstacle(self)
        if not state.stored:
            chain = _chain_of(self, original)
            if chain is None:
                chain, output = watch(self, functools.partial(original, self), args, kwargs, labels)
                state.chains[self.training] = chain
                return output
            state.stored = chain.reason
        if not state.stored:
            call = DirectCall(self, chain, patch.options, labels, kwargs)
            try:
                with replaced(self, call.head, call.head_forward, call.loss_function):
                    output = without_memory(original(self, *args, **kwargs))
                state.stored = call.stored
                _tell(self, call.stored)
                if call.metrics is not None and not isinstance(output, tuple):
                    output.token_metrics = call.metrics
                return output
            except UnexplainedError as error:
                state.stored = str(error)
                state.chains[self.training] = Chain(reason=state.stored)
        _tell(self, state.stored)
        return original(self, *args, **kwargs)

    if not _TRACEABLE:
        forward = torch.compiler.disable(forward, recursive=False)
    forward.cce = patch
    patch.function = forward
    return forward


def _state_of(model: Any) -> _State:
    return model.__dict__.setdefault(_STATE, _State())


def _chain_of(model: Any, original: Callable) -> Chain | None:
    """What a probe sees, now or before, in the model's present mode; None: the model needs more
    than a few tokens, so that the first call with labels has to tell."""
    chains = _state_of(model).chains
    if model.training not in chains:
        try:
            chains[model.training] = _probe(model, functools.partial(original, model))
        except Exception as error:
            logger.info("%s cannot be probed with tokens: %s", type(model).__name__, error)
            return None
    return chains[model.training]


# A compiler need not see it: one call, whose result stays.
_probe = torch.compiler.disable(probe)


@torch.compiler.assume_constant_result
@functools.lru_cache(maxsize=1024)
def _warn_once(name: str, reason: str) -> None:
    logger.warning("%s stores its logits for the loss: %s", name, reason)


def _tell(model: Any, reason: str) -> None:
    if reason:
        _warn_once(type(model).__name__, reason)


def _patch_of(forward: Any) -> _Patch | None:
    """The patch of a forward, also where something else wraps it: functools.wraps copies it, and
    accelerate's mixed precision leaves nothing but __wrapped__."""
    while forward is not None:
        patch = getattr(forward, "cce", None)
        if isinstance(patch, _Patch) and patch.enabled:
            return patch
        forward = getattr(forward, "__wrapped__", None)
    return None


def _active_patch(model: Any) -> _Patch | None:
    """The patch that serves a model: its own before its class's."""
    for owner in (model.__dict__, vars(type(model))):
        for slot in ("forward", "_old_forward"):
            patch = _patch_of(owner.get(slot))
            if patch is not None:
                return patch
    return _patch_of(type(model).forward)


def _unbound(model: Any, previous: Any) -> Callable:
    """The forward below any patch, taking the model as its first argument. `previous`: what stands
    in its place on the instance."""
    if previous is None:
        forward = type(model).forward
    elif getattr(previous, "__self__", None) is model:
        forward = previous.__func__
    else:
        forward = functools.wraps(previous)(lambda _, *args, **kwargs: previous(*args, **kwargs))
    patch = _patch_of(forward)
    return patch.original if patch and forward is patch.function else forward


def _targets(model_type_or_model: Any) -> list[Any]:
    """The model, or the classes of a model type."""
    if isinstance(model_type_or_model, nn.Module):
        return [_unwrap(model_type_or_model)]
    kind = getattr(model_type_or_model, "model_type", model_type_or_model)
    if not isinstance(kind, str):
        raise TypeError(
            "model_type_or_model must be a transformers model, a configuration or a model type such "
            f'as "llama"; got {type(model_type_or_model).__name__}'
        )
    names = {getattr(modeling_auto, mapping).get(kind) for mapping in _MAPPINGS} - {None}
    if not names:
        raise ValueError(
            f"model_type_or_model is no model type with a language model that transformers "
            f"{transformers.__version__} knows: {kind!r}. Give the model itself"
        )
    return [getattr(transformers, name) for name in sorted(names)]


def _unwrap(model: Any) -> Any:
    """The transformers model inside PEFT's, a parallel or a compiled wrapper."""
    inner = model
    while not isinstance(inner, transformers.PreTrainedModel):
        if hasattr(inner, "get_base_model"):
            inner = inner.get_base_model()
        elif isinstance(inner, nn.Module) and {"module", "_orig_mod"} & set(inner._modules):
            inner = inner._modules.get("module", inner._modules.get("_orig_mod"))
        else:
            raise TypeError(f"model must be a transformers model, got {type(model).__name__}")
    return inner
