"""Logits that remember what was done to them.

:class:`StandInLogits` is a tensor that writes down each operation between a model's output layer and
its loss: factors, tanh, casts, a slice of the vocabulary. Anything else ends the record: while
probing the operation runs on real logits and is noted as unexplained, in a direct call, where there
are no logits, it raises :class:`UnexplainedError`.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor

Step = tuple[str, float]  # ("mul", factor), ("tanh", 0) or ("slice", entries kept)

_MUL = {"mul", "mul_", "multiply", "multiply_", "__mul__", "__rmul__", "__imul__"}
_DIV = {"div", "div_", "divide", "divide_", "true_divide", "true_divide_"}
_DIV |= {"__div__", "__truediv__", "__itruediv__", "__idiv__"}
_TANH = {"tanh", "tanh_"}
# A copy, a cast or a move: the loss is computed in float32 or better whatever the cast.
_SAME = {"float", "half", "bfloat16", "double", "to", "type", "type_as", "cpu", "cuda"}
_SAME |= {"contiguous", "clone", "detach", "alias", "requires_grad_", "view_as"}
# Questions about a tensor that do not look at its values.
_READS = {"__get__", "size", "dim", "ndimension", "numel", "nelement", "stride", "is_contiguous"}
_READS |= {"is_floating_point", "is_complex", "get_device", "element_size", "__len__", "__repr__"}
_READS |= {"register_hook", "retain_grad", "__format__", "__hash__"}


class UnexplainedError(RuntimeError):
    """A model uses logits that were not computed."""


class Meaning(NamedTuple):
    """A record as options of the loss: softcap * tanh(logit_scale * x / softcap), of the first
    `vocab` entries (None: of all)."""

    logit_scale: float = 1.0
    softcap: float | None = None
    vocab: int | None = None


def meaning(steps: tuple[Step, ...]) -> Meaning:
    """What a chain of steps amounts to.

    Raises:
        UnexplainedError: the loss has no options for such a chain.
    """
    inner, outer, capped, vocab = 1.0, 1.0, False, None
    for kind, value in steps:
        if kind == "slice":
            vocab = int(value)
        elif kind == "tanh":
            if capped:
                raise UnexplainedError("its logits go through tanh twice")
            capped = True
        elif capped:
            outer *= value
        else:
            inner *= value
    if not capped:
        return Meaning(inner, None, vocab)
    if outer == 0:
        raise UnexplainedError("its logits are multiplied by zero")
    # outer * tanh(inner * x) is softcap * tanh(logit_scale * x / softcap); tanh is odd.
    return Meaning(inner * outer, abs(outer), vocab)


class StandInLogits(Tensor):
    """Logits (..., T, V), real ones or none (T = 0), and the steps taken since the output layer."""

    steps: tuple[Step, ...]
    doubts: list[str] | None  # where unexplained operations are noted; None: they raise

    @classmethod
    def __torch_function__(
        cls, func: Any, types: Any, args: tuple = (), kwargs: dict | None = None
    ) -> Any:
        kwargs = kwargs or {}
        name = getattr(func, "__name__", str(func))
        with torch._C.DisableTorchFunctionSubclass():
            if name in _READS:
                result, step = func(*args, **kwargs), None
                if isinstance(result, Tensor):  # .data, .T and the like
                    _doubt(name, args, kwargs)
            else:
                step = _step(name, args, kwargs)
                if step is None:
                    _doubt(name, args, kwargs)
                    args, kwargs = _plain(args), _plain(kwargs)
                result = func(*args, **kwargs)
        if step is None or not isinstance(result, Tensor):
            return result
        source = _stand_ins(args)[0]
        if step == () and result.shape != source.shape:
            _doubt(name, args, kwargs)
            return plain(result)
        steps = (*source.steps, step) if step else source.steps
        if result is source:  # in place
            source.steps = steps
            return source
        return stand_in(result, steps, source.doubts)


def stand_in(
    logits: Tensor, steps: tuple[Step, ...] = (), doubts: list[str] | None = None
) -> StandInLogits:
    """Logits (..., T, V) as ones that remember; differentiable."""
    result = plain(logits).as_subclass(StandInLogits)
    result.steps, result.doubts = steps, doubts
    return result


def no_logits(logits: Tensor) -> StandInLogits:
    """Logits (..., 0, V) that remember and raise; neither a view, which FSDP warns of, nor
    differentiable."""
    result = Tensor._make_subclass(StandInLogits, logits)
    result.steps, result.doubts = (), None
    return result


def plain(logits: Tensor) -> Tensor:
    """The tensor itself, without a memory; differentiable."""
    return logits.as_subclass(Tensor) if isinstance(logits, StandInLogits) else logits


def _stand_ins(values: Any) -> list[StandInLogits]:
    """The stand-ins among arguments, lists of tensors included."""
    if isinstance(values, StandInLogits):
        return [values]
    if isinstance(values, dict):
        values = values.values()
    elif not isinstance(values, (tuple, list)):
        return []
    return [found for value in values for found in _stand_ins(value)]


def _plain(values: Any) -> Any:
    if isinstance(values, StandInLogits):
        return plain(values)
    if isinstance(values, dict):
        return {key: _plain(value) for key, value in values.items()}
    if type(values) in (tuple, list):
        return type(values)(_plain(value) for value in values)
    return values


def _doubt(name: str, args: Any, kwargs: Any) -> None:
    """Notes an operation that has no explanation, or raises where no real logits stand behind."""
    reason = f"it does {name.strip('_')} on its logits"
    for found in _stand_ins((args, kwargs)):
        if found.doubts is None:
            raise UnexplainedError(reason)
        found.doubts.append(reason)


def _step(name: str, args: tuple, kwargs: dict) -> Step | tuple[()] | None:
    """The step that an operation is; () for one that changes no value, None for an unknown one."""
    if len(_stand_ins((args, kwargs))) != 1:
        return None
    if name in _SAME:
        return () if isinstance(args[0], StandInLogits) else None
    if name in _TANH:
        return ("tanh", 0.0) if len(args) == 1 and not kwargs else None
    if name in ("neg", "neg_", "__neg__"):
        return ("mul", -1.0)
    if name == "__getitem__":
        return _slice(args)
    if name in _MUL | _DIV and len(args) == 2 and not kwargs:
        first, other = args
        if name in _MUL and isinstance(other, StandInLogits):
            first, other = other, first
        if isinstance(first, StandInLogits) and isinstance(other, (int, float)):
            return ("mul", float(other)) if name in _MUL else ("mul", 1.0 / other)
    return None


def _slice(args: tuple) -> Step | tuple[()] | None:
    """[..., :V'] is a slice of the vocabulary, [...] and [:, :] are nothing, the rest is unknown: a
    slice of the sequence may look like nothing on the short input of a probe."""
    logits, index = args
    index = index if isinstance(index, tuple) else (index,)
    if any(item is not Ellipsis and not isinstance(item, slice) for item in index):
        return None
    if index.count(Ellipsis) > 1:
        return None
    at_end = Ellipsis in index or len(index) == logits.dim()
    last = index[-1] if at_end and index[-1] is not Ellipsis else slice(None)
    rest = index[:-1] if last is index[-1] else index
    if any(item is not Ellipsis and item != slice(None) for item in rest):
        return None
    start, stop, stride = last.indices(logits.shape[-1])
    if start != 0 or stride != 1:
        return None
    return () if stop == logits.shape[-1] else ("slice", float(stop))
