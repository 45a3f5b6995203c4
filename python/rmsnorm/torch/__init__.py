"""RMSNorm for torch: operators that autograd, torch.compile and torch.func know, and a module.

rms_norm and RMSNorm take the place of torch.nn.functional.rms_norm and torch.nn.RMSNorm.
"""

import torch

try:
    from . import batching  # noqa: F401  registers the rules of torch.vmap
    from .functional import add_rms_norm, rms_norm
    from .kernel_layers import kernel_mapping
    from .modules import RMSNorm
    from .replacement import LeftNorm, ReplacedNorm, Report, replace_rms_norms
except (AttributeError, ImportError) as error:
    # Operators that cost little need functions of torch that are not documented.
    raise ImportError(
        f"rmsnorm.torch is made for torch 2.13; torch {torch.__version__} lacks what it uses: "
        f"{error}. The functions of rmsnorm take its tensors without gradients"
    ) from error

__all__ = [
    "LeftNorm",
    "RMSNorm",
    "ReplacedNorm",
    "Report",
    "add_rms_norm",
    "kernel_mapping",
    "replace_rms_norms",
    "rms_norm",
]
