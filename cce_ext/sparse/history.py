"""What earlier backwards of the same kind found, so that flat training phases run at full speed.

Whether a row goes the exact way is decided on the device, and a list of such rows has a kernel of
its own, made for few rows. Early in a training from scratch all rows are flat, call after call.
The gradient is then the same, but ordinary matmuls over all rows make it four times faster; only
the host can choose them. It goes by the call before the last one: that one's answer has arrived
long ago, so asking hardly ever waits, and the choice depends on the calls alone, never on timing.
"""

from __future__ import annotations

from collections import OrderedDict, deque

import torch
from torch import Tensor

#: share of rows on the exact way from which the matmuls over all rows are faster
MANY = 0.25
# Calls back: the last one's answer would often have to be waited for.
_BACK = 2
_KINDS = 64

_seen: OrderedDict[tuple, deque[tuple[Tensor, torch.cuda.Event]]] = OrderedDict()


def clear() -> None:
    """Forgets all calls."""
    _seen.clear()


def mostly_exact(kind: tuple) -> bool:
    """Whether most rows of the call before the last one of this kind went the exact way; False
    where there was none, and while a CUDA graph is captured, which must not depend on the past."""
    calls = _seen.get(kind)
    if calls is None or len(calls) < _BACK or torch.cuda.is_current_stream_capturing():
        return False
    share, arrived = calls[0]
    arrived.synchronize()
    return share.item() > MANY


def note(kind: tuple, share: Tensor) -> None:
    """Keeps a call's share (1,) of rows that went the exact way."""
    if torch.cuda.is_current_stream_capturing():
        return
    host = torch.empty(1, dtype=share.dtype, pin_memory=True)
    host.copy_(share, non_blocking=True)
    arrived = torch.cuda.Event()
    arrived.record()
    _seen.setdefault(kind, deque(maxlen=_BACK)).append((host, arrived))
    _seen.move_to_end(kind)
    if len(_seen) > _KINDS:
        _seen.popitem(last=False)
