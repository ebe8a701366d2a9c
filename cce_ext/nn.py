"""The loss as a module."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from cce_ext.constants import IGNORE_INDEX
from cce_ext.distributed import VocabParallelOptions
from cce_ext.functional import linear_cross_entropy
from cce_ext.options import LinearCrossEntropyImpl


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
