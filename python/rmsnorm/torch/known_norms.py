"""The formulas by which models normalize: how torch computes each, and how this library does.

T is the dtype of x, x32 = float32(x), and r = 1/sqrt(mean(x32**2) + eps).
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from .functional import autocast_dtype, rms_norm


@dataclass(frozen=True)
class Formula:
    """One row of the table.

    Attributes:
        text: The formula, for reading.
        parameters: The names of its parameters, in the order in which the functions take them.
        definition: From x, eps and the parameters: what a model asks torch to compute, operation by
            operation. The dtypes and the order of operations are what a module is recognised by.
        compute: The same function, by rms_norm: from x, normalized_shape, eps, weight and bias. It
            raises TypeError or ValueError for what only torch's operations compute.
    """

    text: str
    parameters: tuple[str, ...]
    definition: Callable[..., Tensor]
    compute: Callable[
        [Tensor, tuple[int, ...], float | None, Tensor | None, Tensor | None], Tensor | None
    ]


_HALF = (torch.float16, torch.bfloat16)


def _rstd(x: Tensor, eps: float) -> Tensor:
    return torch.rsqrt(x.float().square().mean(-1, keepdim=True) + eps)


def _normed(x: Tensor, eps: float) -> Tensor:
    return x.float() * _rstd(x, eps)


def _define_once(x: Tensor, eps: float, weight: Tensor) -> Tensor:
    return (weight.float() * _normed(x, eps)).to(x.dtype)


def _define_unweighted(x: Tensor, eps: float) -> Tensor:
    return _normed(x, eps).to(x.dtype)


def _define_before_weight(x: Tensor, eps: float, weight: Tensor) -> Tensor:
    return weight * _normed(x, eps).to(x.dtype)


def _define_with_bias(x: Tensor, eps: float, weight: Tensor, bias: Tensor) -> Tensor:
    return weight * _normed(x, eps).to(x.dtype) + bias


def _define_around_zero(x: Tensor, eps: float, weight: Tensor) -> Tensor:
    return (_normed(x, eps) * (1.0 + weight.float())).to(x.dtype)


def _define_of_rstd(x: Tensor, eps: float) -> Tensor:
    return x * _rstd(x, eps).to(x.dtype)


def _define_by_weight_dtype(x: Tensor, eps: float, weight: Tensor) -> Tensor:
    y = _normed(x, eps)
    return weight * (y.to(weight.dtype) if weight.dtype in _HALF else y)


def _define_by_torch(x: Tensor, eps: float, weight: Tensor | None = None) -> Tensor:
    # Not by torch.nn.functional, whose function somebody may have put another in the place of.
    return torch.rms_norm(x, x.shape[-1:], weight, eps)


def _by_torch(
    x: Tensor, shape: tuple[int, ...], eps: float | None, weight: Tensor | None, bias: Tensor | None
) -> Tensor:
    return rms_norm(x, shape, weight, eps)


def _define_before_weight_by_torch(x: Tensor, eps: float, weight: Tensor) -> Tensor:
    return weight * torch.rms_norm(x, x.shape[-1:], None, eps)


# The dtype of the result is written out in the others, whose operations know no autocast.


def _once(
    x: Tensor, shape: tuple[int, ...], eps: float | None, weight: Tensor | None, bias: Tensor | None
) -> Tensor:
    return rms_norm(x, shape, weight, eps, out_dtype=x.dtype)


def _once_around_zero(
    x: Tensor, shape: tuple[int, ...], eps: float | None, weight: Tensor | None, bias: Tensor | None
) -> Tensor:
    return rms_norm(x, shape, weight, eps, weight_offset=1.0, out_dtype=x.dtype)


def _before_weight(
    x: Tensor, shape: tuple[int, ...], eps: float | None, weight: Tensor | None, bias: Tensor | None
) -> Tensor:
    out_dtype = x.dtype
    for parameter in (weight, bias):
        if parameter is not None:
            out_dtype = torch.promote_types(out_dtype, parameter.dtype)
    return rms_norm(
        x,
        shape,
        weight,
        eps,
        bias=bias,
        rounding="before_weight",
        out_dtype=out_dtype,
    )


def _before_weight_by_torch(
    x: Tensor, shape: tuple[int, ...], eps: float | None, weight: Tensor | None, bias: Tensor | None
) -> Tensor:
    if autocast_dtype(x) is None:
        return _before_weight(x, shape, eps, weight, bias)
    assert weight is not None
    return weight * rms_norm(x, shape, None, eps)


def _by_weight_dtype(
    x: Tensor, shape: tuple[int, ...], eps: float | None, weight: Tensor | None, bias: Tensor | None
) -> Tensor | None:
    assert weight is not None
    if weight.dtype not in _HALF:
        if x.dtype == torch.float64 != weight.dtype:
            # Classes differ in whether they convert x, and recognition takes that for equal.
            return None
        return rms_norm(x, shape, weight, eps, out_dtype=weight.dtype)
    if x.dtype == weight.dtype:
        return rms_norm(x, shape, weight, eps, rounding="before_weight", out_dtype=x.dtype)
    # No rounding of rms_norm is to the dtype of the weight.
    return weight * rms_norm(x, shape, None, eps, out_dtype=weight.dtype)


def _of_rstd(
    x: Tensor, shape: tuple[int, ...], eps: float | None, weight: Tensor | None, bias: Tensor | None
) -> Tensor:
    return rms_norm(x, shape, weight, eps, rounding="rstd", out_dtype=x.dtype)


# Torch's own function, whose result is float32 under autocast on CUDA. torch.nn.RMSNorm is
# recognised by its class, since it may normalize several dimensions.
TORCH_WEIGHTED = Formula("T(w * (x32 * r))", ("weight",), _define_by_torch, _by_torch)
TORCH_UNWEIGHTED = Formula("T(x32 * r)", (), _define_by_torch, _by_torch)

FORMULAS = (
    Formula("w * T(x32 * r)", ("weight",), _define_before_weight, _before_weight),
    Formula(
        "w * T(x32 * r)",
        ("weight",),
        _define_before_weight_by_torch,
        _before_weight_by_torch,
    ),
    Formula("w * T(x32 * r) + b", ("weight", "bias"), _define_with_bias, _before_weight),
    Formula("T(x32 * r * (1 + w))", ("weight",), _define_around_zero, _once_around_zero),
    Formula("T(w * (x32 * r))", ("weight",), _define_once, _once),
    TORCH_WEIGHTED,
    Formula(
        "w * W(x32 * r), W being the dtype of w if that is half precision, else float32",
        ("weight",),
        _define_by_weight_dtype,
        _by_weight_dtype,
    ),
    Formula("T(x32 * r)", (), _define_unweighted, _once),
    TORCH_UNWEIGHTED,
    Formula("x * T(r)", (), _define_of_rstd, _of_rstd),
)
