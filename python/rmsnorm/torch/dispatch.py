"""The three ways of a call: straight to a kernel, recorded by autograd, or by torch's dispatcher.

`with_rstd` asks for rstd as the last result. The other arguments are those of the operators.
rmsnorm.rms_norm and rmsnorm.add_rms_norm come here with tensors that require grad.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from . import operators
from .eager import is_eager, requires_grad
from .gradients import apply_add_rms_norm, apply_rms_norm


def rms_norm(
    with_rstd: bool, x: Tensor, weight: Tensor | None, bias: Tensor | None, *options: Any
) -> Any:
    """y, or (y, rstd)."""
    if not is_eager(x, weight, bias):
        y, rstd = torch.ops.rmsnorm.rms_norm(x, weight, bias, *options)
        return (y, rstd) if with_rstd else y
    if requires_grad(x, weight, bias):
        return apply_rms_norm(x, weight, bias, *options, with_rstd)
    return operators.rms_norm(x, weight, bias, *options, with_rstd=with_rstd)


def add_rms_norm(
    with_rstd: bool,
    x: Tensor,
    residual: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    *options: Any,
) -> Any:
    """(y, residual_out), or (y, residual_out, rstd)."""
    if not is_eager(x, residual, weight, bias):
        results = torch.ops.rmsnorm.add_rms_norm(x, residual, weight, bias, *options)
        return results if with_rstd else results[:2]
    if requires_grad(x, residual, weight, bias):
        return apply_add_rms_norm(x, residual, weight, bias, *options, with_rstd)
    return operators.add_rms_norm(x, residual, weight, bias, *options, with_rstd=with_rstd)
