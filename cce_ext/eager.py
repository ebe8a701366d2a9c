"""The ops of an implementation without the wrappers that only compilers, modes and transforms need.

What ``torch.library.register_autograd`` makes of a formula goes through the dispatcher several
times and looks at the schema in Python. On the host that takes longer than all else together in a
call of a few rows. Where nothing but eager PyTorch on plain tensors is at work, the same formula is
a plain ``torch.autograd.Function``, and kernels are called straight away.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor, nn
from torch.amp.autocast_mode import _cast

#: dispatch keys of the devices on which autocast casts the ops' inputs
AUTOCAST_KEYS = {"cpu": "AutocastCPU", "cuda": "AutocastCUDA"}
# Tensors of an op: e, c, targets, bias, u, lora_b.
_INPUTS = 6
# Those that have a gradient: all but targets.
_DIFFERENTIABLE = (0, 1, 3, 4, 5)
_PLAIN = (Tensor, nn.Parameter)

_direct: dict[str, Callable[..., tuple]] = {}


def differentiates(inputs: Iterable[Tensor | None]) -> bool:
    """Whether a call with these inputs will have a backward."""
    return torch.is_grad_enabled() and any(t is not None and t.requires_grad for t in inputs)


def is_plain(tensors: Iterable[Tensor | None]) -> bool:
    """Whether nothing wants to see the ops themselves: no compiler, tracer, transform or mode is
    active, and the tensors are of no subclass."""
    return not (
        torch.compiler.is_compiling()
        or torch.jit.is_tracing()
        or torch._C._are_functorch_transforms_active()
        or torch._C._len_torch_dispatch_stack()
        or torch._C._len_torch_function_stack()
    ) and all(t is None or type(t) in _PLAIN for t in tensors)


def forward(name: str, *args: Any) -> tuple[Tensor, ...]:
    """``cce::<name>_forward``, in the shortest way that is right here."""
    if is_plain(args[:_INPUTS]):
        return _direct[name](*args)
    return getattr(torch.ops.cce, f"{name}_forward")(*args)


def backward(op: Callable[..., tuple], kernel: Callable[..., tuple]) -> Callable[..., tuple]:
    """What a formula calls with the gradients and saved tensors, then all arguments of the op.

    kernel: the op's own, or the op again, where autograd is no longer to be asked. With
    create_graph the op is called as it is, because it refuses to be differentiated again.
    """

    def call(tensors: Iterable[Tensor | None], *args: Any) -> tuple:
        if torch.is_grad_enabled() or not is_plain(tensors):
            return op(*args)
        with torch._C._AutoDispatchBelowAutograd():
            return kernel(*args)

    return call


def formula(op: Callable[..., tuple], kernel: Callable[..., tuple]) -> Callable[..., tuple]:
    """The backward of an op's pair for autograd; op, kernel: as in `backward`.

    The context has saved the inputs, the lse, and the lists of a sparse forward if there are any,
    and has the options that follow the inputs as ``options``.
    """
    run = backward(op, kernel)

    def gradients(ctx: Any, dnll: Tensor | None, dlse: Tensor | None, *_: Tensor | None) -> tuple:
        needs = ctx.needs_input_grad
        results: list[Tensor | None] = [None] * len(needs)
        if dnll is None and dlse is None:
            return tuple(results)
        saved = ctx.saved_tensors
        e, c, targets, bias, u, lora_b, lse, *lists = saved
        # Of one shard alone: no share of dropped mass that all shards have told each other.
        sparse = (lists, None) if lists else ()
        wanted = [needs[place] for place in _DIFFERENTIABLE]
        found = run(
            (dnll, dlse, *saved),
            dnll, dlse, e, c, targets, lse, bias, u, lora_b, *sparse, *ctx.options, *wanted,
        )  # fmt: skip
        for place, need, gradient in zip(_DIFFERENTIABLE, wanted, found, strict=True):
            results[place] = gradient if need else None
        return tuple(results)

    return gradients


def with_autocast(run: Callable[..., tuple], device: str) -> Callable[..., tuple]:
    """`run` on inputs cast to autocast's dtype, as F.linear's are; each gradient is cast back by
    autograd."""
    key = getattr(torch._C.DispatchKey, AUTOCAST_KEYS[device])
    keys = torch._C.DispatchKeySet(key)

    def autocast(*args: Any) -> tuple[Tensor, ...]:
        dtype = torch.get_autocast_dtype(device)
        with torch._C._ExcludeDispatchKeyGuard(keys):
            return run(*(_cast(a, device, dtype) for a in args))

    return autocast


def register(
    name: str,
    kernel: Callable[..., tuple],
    setup_context: Callable[[Any, tuple, tuple], None],
    formula: Callable[..., tuple],
) -> None:
    """The direct way of ``cce::<name>_forward``: its kernel (or itself), and the two functions that
    ``register_autograd`` was given."""

    def below_autograd(*args: Any) -> tuple[Tensor, ...]:
        with torch._C._AutoDispatchBelowAutograd():
            return kernel(*args)

    def forward_of_function(ctx: Any, *args: Any) -> tuple[Tensor, ...]:
        output = below_autograd(*args)
        setup_context(ctx, args, output)
        return output

    methods = {"forward": staticmethod(forward_of_function), "backward": staticmethod(formula)}
    function = type(f"cce_{name}", (torch.autograd.Function,), methods)

    def run(*args: Any) -> tuple[Tensor, ...]:
        inputs = args[:_INPUTS]
        return function.apply(*args) if differentiates(inputs) else below_autograd(*args)

    casting = {device: with_autocast(run, device) for device in AUTOCAST_KEYS}

    def direct(*args: Any) -> tuple[Tensor, ...]:
        device = args[0].device.type
        if device in casting and torch.is_autocast_enabled(device):
            return casting[device](*args)
        return run(*args)

    _direct[name] = direct
