"""RMSNorm on arrays of NumPy, torch, JAX and everything else that speaks DLPack, without a copy.

``y = x / sqrt(mean(x**2) + eps) * weight``, rounded as in the model that the weights are from. See
rms_norm, add_rms_norm, mean_square and rms_norm_apply, rms_norm_backward for their gradients, and
variant for the options of a model. rmsnorm.torch has torch operators and a module.
"""

from ._core import (
    ExportedArray,
    __version__,
    add_rms_norm,
    get_num_threads,
    info,
    mean_square,
    rms_norm,
    rms_norm_apply,
    rms_norm_backward,
    set_num_threads,
)
from .variants import variant

__all__ = [
    "ExportedArray",
    "__version__",
    "add_rms_norm",
    "get_num_threads",
    "info",
    "mean_square",
    "rms_norm",
    "rms_norm_apply",
    "rms_norm_backward",
    "set_num_threads",
    "variant",
]
