"""The operators written in torch's own operations, which torch can differentiate in every way.

The kernels compute the same without intermediate results. This is for forward-mode derivatives, for
derivatives of gradients and for the gradient of rstd, where speed is not what matters. Results agree
with those of the kernels within a few roundings of the compute type.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from .._typing import Rounding


def result_dtype(x: Tensor, residual: Tensor | None) -> torch.dtype:
    """The dtype of residual_out, and of the gradient that x and residual share."""
    return x.dtype if residual is None else torch.promote_types(x.dtype, residual.dtype)


def compute_dtype(*operands: Tensor | torch.dtype | None) -> torch.dtype:
    """float64 as soon as one of the tensors is."""
    dtypes = [t.dtype if isinstance(t, Tensor) else t for t in operands]
    return torch.float64 if torch.float64 in dtypes else torch.float32


def _sum(x: Tensor, residual: Tensor | None, compute: torch.dtype) -> Tensor:
    return x.to(compute) if residual is None else x.to(compute) + residual.to(compute)


def _statistics(s: Tensor, eps: float, axis: int, partial: float) -> tuple[Tensor, Tensor]:
    """rstd of every row, its dimensions kept, and for each element of a row 1 / k where it counts,
    k being the number of those that do, and 0 where it does not."""
    row = s.shape[axis:]
    size = math.prod(row)
    count = math.ceil(partial * size)
    share = (torch.arange(size, device=s.device) < count).to(s.dtype).reshape(row) / count
    return torch.rsqrt((s * s * share).sum(tuple(range(axis, 0)), keepdim=True) + eps), share


def _norm(
    s: Tensor,
    normed_dtype: torch.dtype,
    weight: Tensor | None,
    bias: Tensor | None,
    eps: float,
    axis: int,
    weight_offset: float,
    rounding: Rounding,
    partial: float,
    out_dtype: torch.dtype,
) -> tuple[Tensor, Tensor]:
    compute = s.dtype
    rstd, _ = _statistics(s, eps, axis, partial)
    scale = rstd.to(normed_dtype).to(compute) if rounding == "rstd" else rstd
    y = s * scale
    dtype = compute if rounding == "once" else normed_dtype
    y = y.to(dtype)
    if weight is not None:
        w = weight if weight_offset == 0.0 else weight.to(compute) + weight_offset
        dtype = torch.promote_types(dtype, w.dtype)
        y = (y.to(compute) * w.to(compute)).to(dtype)
    if bias is not None:
        dtype = torch.promote_types(dtype, bias.dtype)
        y = (y.to(compute) + bias.to(compute)).to(dtype)
    return y.to(out_dtype), rstd.reshape(s.shape[:axis])


def rms_norm(
    x: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    eps: float,
    axis: int,
    weight_offset: float,
    rounding: Rounding,
    partial: float,
    out_dtype: torch.dtype | None,
) -> tuple[Tensor, Tensor]:
    dtype = x.dtype if out_dtype is None else out_dtype
    s = x.to(compute_dtype(x, weight, bias, dtype))
    return _norm(s, x.dtype, weight, bias, eps, axis, weight_offset, rounding, partial, dtype)


def add_rms_norm(
    x: Tensor,
    residual: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    eps: float,
    axis: int,
    weight_offset: float,
    rounding: Rounding,
    round_residual: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    total = result_dtype(x, residual)
    s = _sum(x, residual, compute_dtype(x, residual, weight, bias))
    residual_out = s.to(total)
    if round_residual:
        s = residual_out.to(s.dtype)
    y, rstd = _norm(s, total, weight, bias, eps, axis, weight_offset, rounding, 1.0, x.dtype)
    return y, residual_out, rstd


def gradients(
    dy: Tensor,
    x: Tensor,
    residual: Tensor | None,
    weight: Tensor | None,
    bias: Tensor | None,
    d_residual: Tensor | None,
    eps: float,
    axis: int,
    weight_offset: float,
    partial: float,
) -> tuple[Tensor, Tensor | None, Tensor | None]:
    """dx, dweight and dbias; rstd is computed anew, so that what depends on it depends on x."""
    compute = compute_dtype(dy, x, residual, weight, bias, d_residual)
    s = _sum(x, residual, compute)
    rstd, share = _statistics(s, eps, axis, partial)
    normed = s * rstd
    g = dy.to(compute)
    dbias = None if bias is None else g.sum_to_size(bias.shape).to(bias.dtype)
    dweight = None
    if weight is not None:
        dweight = (g * normed).sum_to_size(weight.shape).to(weight.dtype)
        g = g * (weight.to(compute) + weight_offset)
    projection = (g * normed).sum(tuple(range(axis, 0)), keepdim=True)
    dx = (g - normed * projection * share) * rstd
    if d_residual is not None:
        dx = dx + d_residual.to(compute)
    return dx.to(result_dtype(x, residual)), dweight, dbias


def gradients_of_gradients(
    dy: Tensor,
    x: Tensor,
    residual: Tensor | None,
    weight: Tensor | None,
    ddx: Tensor | None,
    ddweight: Tensor | None,
    ddbias: Tensor | None,
    eps: float,
    axis: int,
    weight_offset: float,
    partial: float,
) -> tuple[Tensor, Tensor, Tensor | None]:
    """The gradients of dy, x (and residual) and weight where those of dx, dweight and dbias are
    given. With g = dy * w, T = sum(g * xhat), P = sum(ddx * xhat / k) and the objective of a row::

        L = rstd * (sum(ddx * g) - T * P) + sum(ddweight * dy * xhat) + sum(ddbias * dy)

    its derivatives by g, xhat and rstd are by_g, by_normed and by_rstd, and x is in both xhat and
    rstd: d rstd / dx[i] = -rstd**2 * xhat[i] / k.
    """
    compute = compute_dtype(dy, x, residual, weight, ddx, ddweight, ddbias)
    row = tuple(range(axis, 0))
    s = _sum(x, residual, compute)
    rstd, share = _statistics(s, eps, axis, partial)
    normed = s * rstd
    wide_dy = dy.to(compute)
    w = torch.ones((), dtype=compute, device=x.device)
    if weight is not None:
        w = weight.to(compute) + weight_offset
    g = wide_dy * w
    v = torch.zeros_like(s) if ddx is None else ddx.to(compute)

    projection = (g * normed).sum(row, keepdim=True)
    weighted = v * share
    along = (weighted * normed).sum(row, keepdim=True)
    by_g = rstd * (v - along * normed)
    by_normed = -rstd * (along * g + projection * weighted)
    by_rstd = (v * g).sum(row, keepdim=True) - projection * along
    ddy = w * by_g
    if ddweight is not None:
        ddy = ddy + ddweight.to(compute) * normed
        by_normed = by_normed + ddweight.to(compute) * wide_dy
    if ddbias is not None:
        ddy = ddy + ddbias.to(compute)
    by_rstd = by_rstd + (by_normed * s).sum(row, keepdim=True)
    dx = rstd * (by_normed - rstd * normed * share * by_rstd)
    dweight = None
    if weight is not None:
        dweight = (wide_dy * by_g).sum_to_size(weight.shape).to(weight.dtype)
    return ddy.to(dy.dtype), dx.to(result_dtype(x, residual)), dweight


def gradient_of_rstd(
    d_rstd: Tensor, x: Tensor, residual: Tensor | None, eps: float, axis: int, partial: float
) -> Tensor:
    """What rstd adds to dx: d rstd / dx[i] = -rstd**3 * x[i] / k."""
    s = _sum(x, residual, d_rstd.dtype)
    rstd, share = _statistics(s, eps, axis, partial)
    dx = d_rstd.reshape(rstd.shape) * -(rstd**3) * s * share
    return dx.to(result_dtype(x, residual))
