"""One call of a model's forward with the loss computed inside its output layer.

Inside is where it has to be: FSDP, ZeRO-3 and offloading gather the layer's weight around its own
forward, forwards and backwards. So the layer's output, empty as it is, stays in the graph between
the loss and the weight: the gradient takes the way that it would take with real logits, and hooks
on that output fire before the weight is needed.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from cce_ext.functional import TokenMetrics, linear_cross_entropy
from cce_ext.heads import Head, resolve_head
from cce_ext.transformers.probe import Chain, forward_slot, output_layer
from cce_ext.transformers.standin import StandInLogits, UnexplainedError, no_logits, plain


class Options(NamedTuple):
    """How the loss is computed: linear_cross_entropy's options, and train_only; return_metrics:
    whether outputs carry per-token metrics."""

    impl: str
    reduction: str
    filter_eps: float | str | None
    accum_e_fp32: bool
    accum_c_fp32: bool
    filter_e_grad: bool
    filter_c_grad: bool
    train_only: bool
    return_metrics: bool


class _Box:
    """Carries a gradient past a tensor that has no elements."""

    gradient: Tensor | None = None


class _Enter(torch.autograd.Function):
    """A loss becomes logits (..., 0, V), with a memory and no elements, that depend on it."""

    @staticmethod
    def forward(ctx: Any, loss: Tensor, box: _Box, logits: Tensor) -> Tensor:
        ctx.box = box
        return no_logits(logits)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, None, None]:
        return ctx.box.gradient, None, None


class _Leave(torch.autograd.Function):
    """Empty logits become the loss that they stand for."""

    @staticmethod
    def forward(ctx: Any, logits: Tensor, loss: Tensor, box: _Box) -> Tensor:
        ctx.box, ctx.empty = box, (logits.shape, logits.dtype, logits.device)
        return loss.detach().clone()

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None, None]:
        ctx.box.gradient = gradient
        shape, dtype, device = ctx.empty
        return torch.empty(shape, dtype=dtype, device=device), None, None


class DirectCall:
    """What a patched model's output layer and loss function do during one call.

    Args:
        model: the transformers model; chain: what the probe saw; labels (..., T), kwargs: what the
            call was given, shift_labels (..., T) and ignore_index among it.

    Attributes:
        stored: why this call stores its logits after all; empty if it does not.
        metrics: facts of each token, if they were asked for and no logits are stored.
    """

    def __init__(
        self,
        model: Any,
        chain: Chain,
        options: Options,
        labels: Tensor,
        kwargs: dict[str, Any],
    ) -> None:
        self.head = output_layer(model)
        self.own_forward = getattr(self.head, forward_slot(self.head))
        self.own_loss = model.loss_function
        self.chain, self.options, self.stored = chain, options, ""
        self.labels, self.shift_labels = labels, kwargs.get("shift_labels")
        self.ignore_index = kwargs.get("ignore_index", -100)
        self.box = _Box()
        self.loss: Tensor | None = None
        self.metrics: TokenMetrics | None = None
        self.targets, self.shift = self.labels, chain.shift
        if self.shift_labels is not None:
            self.targets, self.shift = self.shift_labels, 0

    def head_forward(self, hidden: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        """Instead of logits (..., T, V): none of them, (..., 0, V), with the loss kept aside."""
        if self.loss is not None:
            raise UnexplainedError("its output layer runs twice")
        found, options = self.chain.meaning, self.options
        head = resolve_head(self.head)
        self.stored = unfit(head, found.vocab) or self._misfit(hidden)
        if args or kwargs:
            self.stored = "its output layer takes more than hidden states"
        if self.stored:
            return self.own_forward(hidden, *args, **kwargs)
        classifier, bias = self.head, None
        if found.vocab is not None:
            classifier = head.weight[: found.vocab]
            bias = None if head.bias is None else head.bias[: found.vocab]
        self.targets = self.targets.to(hidden.device)
        result = linear_cross_entropy(
            hidden,
            classifier,
            self.targets,
            bias,
            ignore_index=self.ignore_index,
            softcap=found.softcap,
            # "mean" is a division of the sum by a number that only the loss function is told.
            reduction="none" if options.reduction == "none" else "sum",
            shift=self.shift,
            filter_eps=options.filter_eps,
            accum_e_fp32=options.accum_e_fp32,
            accum_c_fp32=options.accum_c_fp32,
            filter_e_grad=options.filter_e_grad,
            filter_c_grad=options.filter_c_grad,
            impl=options.impl,
            logit_scale=found.logit_scale,
            return_metrics=options.return_metrics,
        )
        self.loss, self.metrics = result if options.return_metrics else (result, None)
        logits = hidden.new_empty((*hidden.shape[:-2], 0, head.weight.shape[0]))
        # A compiled graph has no hooks to serve, and its operations were checked by the probe.
        return (
            logits if torch.compiler.is_compiling() else _Enter.apply(self.loss, self.box, logits)
        )

    def loss_function(
        self,
        logits: Tensor,
        labels: Tensor | None = None,
        vocab_size: int | None = None,
        **kwargs: Any,
    ) -> Tensor:
        """The loss that the output layer kept, divided as asked for."""
        if self.loss is None:
            return self.own_loss(logits, labels, vocab_size, **kwargs)
        self._check(logits, labels, kwargs)
        loss = self.loss
        if not torch.compiler.is_compiling():
            loss = _Leave.apply(plain(logits), loss, self.box)
        if self.options.reduction != "mean":
            return loss
        items = kwargs.get("num_items_in_batch")
        if items is None:
            items = (self.targets[..., self.shift :] != self.ignore_index).sum().clamp(min=1)
        return loss / (items.to(loss.device) if isinstance(items, Tensor) else items)

    def _misfit(self, hidden: Tensor) -> str:
        """Why these hidden states (..., T, D) cannot be matched with the targets, or ''."""
        if hidden.shape[:-1] != self.targets.shape:
            shapes = f"{tuple(hidden.shape)} and {tuple(self.targets.shape)}"
            return f"hidden states and labels do not match: {shapes}"
        if self.shift and self.targets.shape[-1] < 2:
            return "there is no next token in a text of one token"
        return ""

    def _check(self, logits: Tensor, labels: Tensor | None, kwargs: dict[str, Any]) -> None:
        """Raises UnexplainedError where the model did not do what the loss was computed for."""
        # A wrapper around the output layer may have made plain tensors of them.
        if isinstance(logits, StandInLogits) and logits.steps != self.chain.steps:
            raise UnexplainedError("its logits are treated differently from call to call")
        if self.shift_labels is not None:
            used, given = kwargs.get("shift_labels"), self.shift_labels
        else:
            used, given = (labels if self.shift else kwargs.get("shift_labels")), self.labels
        moved = used is not None and used.device != given.device and used.shape == given.shape
        if used is not given and not moved:
            raise UnexplainedError("its labels are treated differently from call to call")
        if kwargs.get("ignore_index", -100) != self.ignore_index:
            raise UnexplainedError("its loss is not told ignore_index")


def unfit(head: Head, vocab: int | None) -> str:
    """Why the loss cannot be computed from an output layer's tensors, or ''. `vocab`: how many of
    its entries are used, None for all."""
    if head.fallback:
        return head.fallback
    if vocab is not None and head.adapters:
        return "its logits are cut to a part of the vocabulary, and its output layer has adapters"
    tensors = [head.weight, *(x for adapter in head.adapters for x in (adapter.a, adapter.b))]
    for tensor in tensors:
        # Subclasses are sharded or quantised: what they hold is not what their shape says.
        if type(tensor) not in (Tensor, nn.Parameter) and not torch.compiler.is_compiling():
            return f"a weight of its output layer is a {type(tensor).__name__}"
    return ""
