"""What earlier backwards of the same kind found, so that flat training phases run at full speed.

Whether a row goes the exact way is decided on the device, and a list of such rows has a kernel of
its own, made for few rows. Early in a training from scratch all rows are flat, call after call.
The gradient is then the same, but ordinary matmuls over all rows make it four times faster; only
the host can choose them. It goes by the call before the last one: that one's answer has arrived
long ago, so asking hardly ever waits, and the choice depends on the calls alone, never on timing.
"""

from __future__ import annotations

import threading
from collections import OrderedDict, deque
from typing import NamedTuple

import torch
from torch import Tensor

#: share of rows on the exact way from which the matmuls over all rows are faster
MANY = 0.25
# Calls back: the last one's answer would often have to be waited for.
_BACK = 2
_KINDS = 64


class Past(NamedTuple):
    """What is known when a backward starts, and where it puts its own answer."""

    mostly_exact: bool  # whether most rows of the call before the last one went the exact way
    answer: Tensor  # (1,) float32, page-locked: the share of this one's that do
    arrived: torch.cuda.Event | None  # None: nobody will ask


# Backwards on several devices are on several threads.
_lock = threading.Lock()
_seen: OrderedDict[tuple, deque[Past]] = OrderedDict()


def clear() -> None:
    """Forgets all calls."""
    _seen.clear()


def recall(kind: tuple, like: Tensor) -> Past:
    """Before a backward of this kind on like's device. Nothing is known while a CUDA graph is
    captured, which must not depend on the past."""
    if torch.cuda.is_current_stream_capturing():
        return Past(False, like.new_empty(1, dtype=torch.float32), None)
    with _lock:
        calls = _seen.get(kind, ())
        before = calls.popleft() if len(calls) >= _BACK else None
    if before is None:
        answer = torch.empty(1, dtype=torch.float32, pin_memory=True)
        return Past(False, answer, torch.cuda.Event())
    # Read, then used again: page-locked memory is slow to get.
    before.arrived.synchronize()
    return before._replace(mostly_exact=before.answer.item() > MANY)


def remember(kind: tuple, past: Past, like: Tensor) -> None:
    """After the kernel that answers is on its way, on the current stream of like's device."""
    if past.arrived is None:
        return
    past.arrived.record(torch.cuda.current_stream(like.device))  # maybe not the current device
    with _lock:
        _seen.setdefault(kind, deque()).append(past)
        _seen.move_to_end(kind)
        if len(_seen) > _KINDS:
            _seen.popitem(last=False)
