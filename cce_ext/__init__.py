"""Linear cross-entropy without stored logits: :func:`linear_cross_entropy` and its custom op
``torch.ops.cce.linear_ce``."""

from cce_ext import ops as _ops
from cce_ext._version import __version__
from cce_ext.diagnostics import diagnostics
from cce_ext.distributed import VocabParallelOptions
from cce_ext.functional import TokenMetrics, linear_cross_entropy
from cce_ext.info import Backend, backends, build_info
from cce_ext.nn import LinearCrossEntropy, LinearCrossEntropyHead
from cce_ext.options import LinearCrossEntropyImpl
from cce_ext.utils import compute_z_loss

_ops.register()

__all__ = [
    "Backend",
    "LinearCrossEntropy",
    "LinearCrossEntropyHead",
    "LinearCrossEntropyImpl",
    "TokenMetrics",
    "VocabParallelOptions",
    "__version__",
    "backends",
    "build_info",
    "compute_z_loss",
    "diagnostics",
    "linear_cross_entropy",
]
