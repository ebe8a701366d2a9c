"""Shapes of output layers, and inputs for them: random, or like a trained language model's."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from bench.llm_data import llm_like

#: name -> (V, D) of a model's output layer; the last two are for a CPU
SHAPES = {
    "gemma2": (256000, 2304),
    "llama3": (128256, 4096),
    "qwen": (151936, 2048),
    "phi3.5": (32064, 3072),
    "mistral-nemo": (131072, 5120),
    "small": (32064, 1024),
    "quick": (4096, 128),
}
MODELS = ("gemma2", "llama3", "qwen", "phi3.5", "mistral-nemo")
DATA = ("random", "llm")
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
#: factor of the low-rank update, alpha / R of the usual LoRA settings
LORA_SCALE = 2.0


class Config(NamedTuple):
    """What one block of a table was measured on: N tokens of an output layer (V, D).

    ``data``: random or llm. ``softcap``: 0 for none. ``rank``: of a low-rank head whose classifier
    is frozen, 0 for a trained classifier.
    """

    test_data: str
    n: int
    v: int
    d: int
    dtype: str
    data: str = "random"
    softcap: float = 0.0
    rank: int = 0

    def describe(self) -> str:
        """One line for people."""
        text = f"{self.test_data} {self.n} x {self.v} x {self.d} {self.dtype} {self.data}"
        if self.softcap:
            text += f" softcap {self.softcap:g}"
        return text + (f" LoRA {self.rank}" if self.rank else "")


def named(shape: str, n: int, dtype: str, **options: object) -> Config:
    """The configuration of a named shape."""
    v, d = SHAPES[shape]
    return Config(shape, n, v, d, dtype, **options)


class Problem(NamedTuple):
    """Inputs of a loss: e (N, D), c (V, D), targets (N,); lora_a (R, D), lora_b (V, R) in float32 or
    None; softcap or None."""

    e: Tensor
    c: Tensor
    targets: Tensor
    lora_a: Tensor | None = None
    lora_b: Tensor | None = None
    softcap: float | None = None

    def leaves(self) -> tuple[Tensor, ...]:
        """What gets a gradient."""
        return tuple(t for t in self[:5] if t is not None and t.requires_grad)

    def gradient_bytes(self) -> int:
        """Size of the gradients, which every method has to return."""
        return sum(t.numel() * t.element_size() for t in self.leaves())


def random_inputs(
    n: int, v: int, d: int, dtype: torch.dtype, device: str | torch.device = "cpu", seed: int = 0
) -> tuple[Tensor, Tensor, Tensor]:
    """e (N, D), c (V, D) and targets (N,) int64; logits have standard deviation 2.5."""
    g = torch.Generator(device).manual_seed(seed)
    e = torch.randn(n, d, generator=g, device=device).to(dtype)
    c = torch.randn(v, d, generator=g, device=device).mul_(2.5 / d**0.5).to(dtype)
    return e, c, torch.randint(v, (n,), generator=g, device=device)


def make_problem(config: Config, device: str | torch.device, seed: int = 0) -> Problem:
    """Inputs of a configuration, the same for the same seed and device type."""
    dtype = DTYPES[config.dtype]
    shape = (config.n, config.v, config.d, dtype, device, seed)
    llm = config.data == "llm"
    e, c, targets = llm_like(*shape, config.softcap) if llm else random_inputs(*shape)
    softcap = config.softcap or None
    if not config.rank:
        return Problem(e.requires_grad_(), c.requires_grad_(), targets, softcap=softcap)
    g = torch.Generator(device).manual_seed(seed + 1)
    a = torch.randn(config.rank, config.d, generator=g, device=device) * config.d**-0.5
    # Not zero, as it is before the first step: a method that ignores B must be seen to.
    b = torch.randn(config.v, config.rank, generator=g, device=device) * 1e-2
    return Problem(e.requires_grad_(), c, targets, a.requires_grad_(), b.requires_grad_(), softcap)
