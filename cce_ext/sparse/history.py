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

import torch
from torch import Tensor

#: share of rows on the exact way from which the matmuls over all rows are faster
MANY = 0.25
# Calls back: the last one's answer would often have to be waited for.
_BACK = 2
_KINDS = 64

# Backwards on several devices are on several threads.
_lock = threading.Lock()
_seen: OrderedDict[tuple, deque[tuple[Tensor, torch.cuda.Event]]] = OrderedDict()


def clear() -> None:
    """Forgets all calls."""
    _seen.clear()


def mostly_exact(kind: tuple, share: Tensor) -> bool:
    """Whether most rows of the call before the last one of this kind went the exact way, and keeps
    the share (1,) of this one's. False where there was none, and while a CUDA graph is captured,
    which must not depend on the past."""
    if torch.cuda.is_current_stream_capturing():
        return False
    with _lock:
        calls = _seen.setdefault(kind, deque())
        _seen.move_to_end(kind)
        if len(_seen) > _KINDS:
            _seen.popitem(last=False)
        if len(calls) < _BACK:
            many = False
            host = torch.empty(1, dtype=share.dtype, pin_memory=True)
            arrived = torch.cuda.Event()
        else:  # read, then used again: page-locked memory is slow to get
            host, arrived = calls.popleft()
            arrived.synchronize()
            many = host.item() > MANY
        host.copy_(share, non_blocking=True)
        arrived.record(
            torch.cuda.current_stream(share.device)
        )  # which may not be the current device
        calls.append((host, arrived))
    return many
