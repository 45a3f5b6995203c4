"""RMSNorm for torch: operators that autograd, torch.compile and torch.func know, and a module.

rms_norm and RMSNorm take the place of torch.nn.functional.rms_norm and torch.nn.RMSNorm.
"""

from . import batching  # noqa: F401  registers the rules of torch.vmap
from .functional import add_rms_norm, rms_norm
from .modules import RMSNorm

__all__ = ["RMSNorm", "add_rms_norm", "rms_norm"]
