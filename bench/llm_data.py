"""Hidden states, classifier and targets that look like a trained language model's.

Token frequencies are Zipfian; the classifier's rows share a direction along which they carry the
log-frequency, and every hidden state has a component along it; half of the rows are sharp (the
target has nearly all the mass), 35 % medium (a few dozen alternatives) and 15 % flat (hardly more
than the frequencies). `describe` measures what came out.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from cce_ext.utils import softcapping

_ALTERNATIVES = 64
_STEEPNESS = 1.5
# About the largest logits without a softcap.
_LARGEST = 20.0
# kind of row -> share, boost of the target's logit, boosts of the alternatives (low, high)
_KINDS = {
    "sharp": (0.50, 13.0, (2.0, 6.0)),
    "medium": (0.35, 9.5, (3.0, 6.5)),
    "flat": (0.15, 7.0, (2.0, 5.0)),
}


def llm_like(
    n: int,
    v: int,
    d: int,
    dtype: torch.dtype,
    device: str | torch.device,
    seed: int = 0,
    softcap: float = 0.0,
) -> tuple[Tensor, Tensor, Tensor]:
    """e (N, D), c (V, D) and targets (N,) int64.

    softcap: of the model, 0 for none. One that was trained under a cap has learned logits as much
    larger as the cap takes away: capped, they are as sharp as another model's.
    """
    g = torch.Generator(device).manual_seed(seed)
    frequency = 1 / (torch.arange(v, device=device) + 8.0)
    frequency /= frequency.sum()
    common = torch.randn(d, device=device, generator=g)
    common /= common.norm()
    c = torch.empty(v, d, device=device, dtype=dtype)
    # Strength of the common direction in e; its logits fall a little faster than the frequencies.
    strength = 4.0
    prior = _STEEPNESS * (frequency.log() - frequency.log().mean()) / strength
    for first in range(0, v, 16384):
        part = torch.randn(min(16384, v - first), d, device=device, generator=g) * d**-0.5
        part -= (part @ common)[:, None] * common
        c[first : first + 16384] = (part + prior[first : first + 16384, None] * common).to(dtype)

    sharpness = _sharpness(softcap)
    e = torch.empty(n, d, device=device, dtype=dtype)
    targets = torch.multinomial(frequency, n, replacement=True, generator=g)
    kind = torch.rand(n, device=device, generator=g)
    start = 0.0
    for share, boost, (low, high) in _KINDS.values():
        rows = torch.nonzero((kind >= start) & (kind < start + share))[:, 0]
        start += share
        for part in rows.split(1024) if rows.numel() else ():
            m = part.shape[0]
            others = torch.multinomial(
                frequency.sqrt(), m * _ALTERNATIVES, replacement=True, generator=g
            ).view(m, _ALTERNATIVES)
            boosts = low + (high - low) * torch.rand(m, _ALTERNATIVES, device=device, generator=g)
            ids = torch.cat([targets[part, None], others], 1)
            weights = torch.cat([torch.full((m, 1), boost, device=device), boosts], 1)
            mix = torch.bmm(weights[:, None], c[ids].float())[:, 0]
            # Of the chosen rows only what is their own; their frequency is everybody's already.
            mix -= (mix @ common)[:, None] * common
            e[part] = ((mix + strength * common) * sharpness).to(dtype)
    return e, c, targets


def _sharpness(softcap: float) -> float:
    """What the logits are multiplied by, so that the largest stay what they are."""
    if softcap <= _LARGEST:
        return 1.0
    return softcap * math.atanh(_LARGEST / softcap) / _LARGEST


def describe(
    e: Tensor, c: Tensor, targets: Tensor, rows: int = 256, softcap: float = 0.0
) -> dict[str, float]:
    """Mean over some rows: entries with p ≥ 2⁻¹² and 2⁻¹³, the largest p, and the loss; also T, the
    mass below 2⁻¹³."""
    e, targets = e[:rows], targets[:rows]
    logits = e.float() @ c.float().T
    p = torch.softmax(softcapping(logits, softcap) if softcap else logits, -1)
    own = p.gather(1, targets[:, None])[:, 0]
    return {
        "above 2^-12": (p >= 2.0**-12).sum(1).float().mean().item(),
        "above 2^-13": (p >= 2.0**-13).sum(1).float().mean().item(),
        "top 1": p.max(1).values.mean().item(),
        "loss": -own.log().mean().item(),
        "T": torch.where(p < 2.0**-13, p, 0).sum(1).mean().item(),
    }
