"""The operators as functions, which go past torch's dispatcher where nobody has to hear of them.

rmsnorm.rms_norm and rmsnorm.add_rms_norm call these with tensors that require grad. The arguments
are those of the operators.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from . import batching  # noqa: F401  registers its rules
from .eager import is_eager
from .gradients import apply_add_rms_norm, apply_rms_norm


def rms_norm(
    x: Tensor, weight: Tensor | None, bias: Tensor | None, *options: Any
) -> tuple[Tensor, Tensor]:
    call = apply_rms_norm if is_eager(x, weight, bias) else torch.ops.rmsnorm.rms_norm
    y, rstd = call(x, weight, bias, *options)
    return y, rstd


def add_rms_norm(
    x: Tensor, residual: Tensor, weight: Tensor | None, bias: Tensor | None, *options: Any
) -> tuple[Tensor, Tensor, Tensor]:
    eager = is_eager(x, residual, weight, bias)
    call = apply_add_rms_norm if eager else torch.ops.rmsnorm.add_rms_norm
    y, residual_out, rstd = call(x, residual, weight, bias, *options)
    return y, residual_out, rstd
