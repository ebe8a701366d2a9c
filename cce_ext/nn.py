"""The loss as a module, alone or with its output layer."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor, nn

from cce_ext.checks import check_options, is_dtensor
from cce_ext.constants import IGNORE_INDEX
from cce_ext.distributed import VocabParallelOptions
from cce_ext.functional import linear_cross_entropy
from cce_ext.heads import Adapter, low_rank_update
from cce_ext.options import LinearCrossEntropyImpl
from cce_ext.reference import logits


class LinearCrossEntropy(nn.Module):
    """:func:`cce_ext.linear_cross_entropy` with its options fixed at construction; see there for
    each of them.

    ``forward(e, c, targets, bias=None, **lora)`` takes the tensors; lora: lora_a, lora_b,
    lora_scale, num_items.
    """

    def __init__(
        self,
        ignore_index: int = IGNORE_INDEX,
        softcap: float | None = None,
        reduction: str = "mean",
        shift: bool | int = 0,
        filter_eps: float | str | None = "auto",
        accum_e_fp32: bool = False,
        accum_c_fp32: bool = False,
        filter_e_grad: bool = True,
        filter_c_grad: bool = True,
        impl: str | LinearCrossEntropyImpl = "cce",
        return_lse: bool = False,
        vocab_parallel_options: VocabParallelOptions | None = None,
        *,
        logit_scale: float = 1.0,
        label_smoothing: float = 0.0,
        return_metrics: bool = False,
    ) -> None:
        super().__init__()
        self.options: dict[str, Any] = dict(
            ignore_index=ignore_index,
            softcap=softcap,
            reduction=reduction,
            shift=shift,
            filter_eps=filter_eps,
            accum_e_fp32=accum_e_fp32,
            accum_c_fp32=accum_c_fp32,
            filter_e_grad=filter_e_grad,
            filter_c_grad=filter_c_grad,
            impl=impl,
            return_lse=return_lse,
            vocab_parallel_options=vocab_parallel_options,
            logit_scale=logit_scale,
            label_smoothing=label_smoothing,
            return_metrics=return_metrics,
        )

    def forward(
        self,
        e: Tensor,
        c: Tensor | nn.Module,
        targets: Tensor,
        bias: Tensor | None = None,
        **lora: Any,
    ) -> torch.Tensor | tuple:
        return linear_cross_entropy(e, c, targets, bias, **self.options, **lora)

    def extra_repr(self) -> str:
        return ", ".join(f"{name}={value!r}" for name, value in self.options.items())


class LinearCrossEntropyHead(nn.Module):
    """An output layer that computes its own loss, in its own forward.

    That is what FSDP2, DDP and tensor parallelism need, whose hooks gather and reduce around a
    module's forward (docs/distributed.md). A weight that is a DTensor in the forward, Shard(0) on a
    one-dimensional mesh, is a vocabulary-parallel head without further options.

    Args:
        in_features: width D of the hidden states.
        out_features: rows V of the classifier on this rank.
        bias: whether there is a bias (V,).
        rank: R of a low-rank update, ``lora_a`` (R, D) and ``lora_b`` (V, R); weight and bias are
            frozen then. 0: none.
        lora_scale: factor of the update.
        reduce_e_grad: of a DTensor weight, as in :class:`VocabParallelOptions`.
        device, dtype: of the parameters.
        options: those of :class:`LinearCrossEntropy`.
    """

    def __init__(
        self,
        in_features: int,
        out_features: int,
        bias: bool = False,
        rank: int = 0,
        lora_scale: float = 1.0,
        reduce_e_grad: bool = True,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
        **options: Any,
    ) -> None:
        super().__init__()
        self.loss = LinearCrossEntropy(**options)
        self.lora_scale, self.reduce_e_grad = lora_scale, reduce_e_grad

        def empty(*shape: int, trained: bool = True) -> nn.Parameter:
            return nn.Parameter(torch.empty(shape, device=device, dtype=dtype), trained)

        frozen = rank > 0
        self.weight = empty(out_features, in_features, trained=not frozen)
        self.register_parameter("bias", empty(out_features, trained=not frozen) if bias else None)
        self.register_parameter("lora_a", empty(rank, in_features) if rank else None)
        self.register_parameter("lora_b", empty(out_features, rank) if rank else None)
        self.reset_parameters()

    @classmethod
    def from_linear(cls, linear: nn.Linear, **arguments: Any) -> LinearCrossEntropyHead:
        """A head that has ``linear``'s own parameters, tied ones too; ``arguments`` are those of the
        class."""
        weight, bias = linear.weight, linear.bias
        # On the meta device first, so that no second classifier is made only to be replaced.
        head = cls(
            *reversed(weight.shape),
            bias is not None,
            device="meta",
            dtype=weight.dtype,
            **arguments,
        )
        head.weight, head.bias = weight, bias
        if head.lora_a is None:
            return head
        for parameter in (weight, bias):
            if parameter is not None:
                parameter.requires_grad_(False)
        for name in ("lora_a", "lora_b"):
            empty = torch.empty_like(getattr(head, name), device=weight.device)
            setattr(head, name, nn.Parameter(empty))
        head._reset_update()
        return head

    def reset_parameters(self) -> None:
        """nn.Linear's initialisation; lora_a's is PEFT's, and lora_b starts at zero."""
        bound = 1 / math.sqrt(self.weight.shape[1])
        nn.init.uniform_(self.weight, -bound, bound)
        if self.bias is not None:
            nn.init.uniform_(self.bias, -bound, bound)
        if self.lora_a is not None:
            self._reset_update()

    def _reset_update(self) -> None:
        bound = 1 / math.sqrt(self.lora_a.shape[1])
        nn.init.uniform_(self.lora_a, -bound, bound)
        nn.init.zeros_(self.lora_b)

    def forward(
        self, e: Tensor, targets: Tensor | None = None, num_items: float | Tensor | None = None
    ) -> Tensor | tuple:
        """The loss of hidden states e (..., D), as :func:`cce_ext.linear_cross_entropy` returns it.
        Without targets the logits (..., V), float32, stored: for generation.

        Raises:
            ValueError: logits of a head that is sharded over the vocabulary.
        """
        options = dict(self.loss.options)
        if is_dtensor(self.weight):
            options["vocab_parallel_options"] = VocabParallelOptions.from_dtensor(
                self.weight, self.reduce_e_grad
            )
        if targets is None:
            return self._logits(e, options)
        return linear_cross_entropy(
            e,
            self.weight,
            targets,
            self.bias,
            lora_a=self.lora_a,
            lora_b=self.lora_b,
            lora_scale=self.lora_scale,
            num_items=num_items,
            **options,
        )

    def _logits(self, e: Tensor, options: dict[str, Any]) -> Tensor:
        if options["vocab_parallel_options"] is not None:
            raise ValueError(
                "targets must be given: the head is sharded over the vocabulary, and no rank has all "
                "logits"
            )
        adapters = ()
        if self.lora_a is not None:
            adapters = (Adapter(self.lora_a, self.lora_b, self.lora_scale),)
        names = ("ignore_index", "softcap", "logit_scale", "label_smoothing")
        numbers = check_options(*(options[name] for name in names))
        return logits(e, self.weight, self.bias, *low_rank_update(e, adapters), numbers)

    def extra_repr(self) -> str:
        rank = 0 if self.lora_a is None else self.lora_a.shape[0]
        out_features, in_features = self.weight.shape
        return f"in_features={in_features}, out_features={out_features}, rank={rank}"
