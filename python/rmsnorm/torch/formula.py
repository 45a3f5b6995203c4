"""The operators written in torch's own operations, which torch can differentiate in every way.

The kernels compute the same without intermediate results. This is for forward-mode derivatives, for
derivatives of gradients and for the gradient of rstd, where speed is not what matters. Results agree
with those of the kernels within a few roundings of the compute type.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor
from torch.nn import functional

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


# Rows whose largest magnitude is in this range stay as they are. It is that of float16, so that the
# rstd of such rows, which may be denormal there, is rounded as it is.
_UNSCALED = (2.0**-24, 2.0**16)


def _scale(s: Tensor, eps: float, axis: int) -> Tensor:
    """The power of two, in double, at the largest magnitude of each row or at the root of eps."""
    limits = torch.finfo(s.dtype)
    # A row may be empty.
    largest = functional.pad(s.abs().flatten(axis), (0, 1)).amax(-1).double()
    largest = largest.clamp(max(math.sqrt(eps), limits.tiny), limits.max)
    mantissa, _ = torch.frexp(largest)
    outside = (largest < _UNSCALED[0]) | (largest > _UNSCALED[1])
    scale = torch.where(outside, largest / (2 * mantissa), 1)
    return scale.reshape(*s.shape[:axis], *(1,) * -axis)


# A smaller eps of scaled rows counts as this one: rstd is above all floats with either, and its
# derivatives of some order are still doubles. Beside elements that are not zero it is nothing, and
# rows of doubles are scaled by no less than the root of eps.
_LEAST_EPS = 1e-80


class _Rows:
    """The rows of s normalized, each divided by a power of two before, as the kernels do it.

    That is exact, and neither squares nor what is derived from them overflow or are lost. For
    derivatives the power is a constant.
    """

    def __init__(self, s: Tensor, eps: float, axis: int, partial: float) -> None:
        row = s.shape[axis:]
        size = math.prod(row)
        self._count = math.ceil(partial * size)
        self._counted = (torch.arange(size, device=s.device) < self._count).reshape(row)
        scale = _scale(self._where_counted(s.detach()), eps, axis)
        self._scale = scale.to(s.dtype)
        self.scaled = s / self._scale
        squares = self._where_counted(self.scaled) ** 2
        mean_square = squares.sum(tuple(range(axis, 0)), keepdim=True) / self._count
        # In double, since the square of a scale of floats may be out of their range.
        scaled_eps = eps / scale / scale
        if eps > 0:
            scaled_eps = scaled_eps.clamp(_LEAST_EPS)
        rstd = torch.rsqrt(mean_square.double() + scaled_eps)
        if eps > 0:  # y of zeros is zero then, and not zero times infinity.
            rstd = rstd.clamp(max=torch.finfo(s.dtype).max)
        self.scaled_rstd = rstd.to(s.dtype)
        self.normed = self.scaled * self.scaled_rstd

    def _where_counted(self, values: Tensor) -> Tensor:
        return torch.where(self._counted, values, 0)

    def times_rstd(self, values: Tensor) -> Tensor:
        """Also where rstd by itself is out of range."""
        return values / self._scale * self.scaled_rstd

    def share(self, values: Tensor) -> Tensor:
        """values / k where an element counts, k being the number of those that do, and else 0."""
        return self._where_counted(values) / self._count

    @property
    def rstd(self) -> Tensor:
        """Of every row, its dimensions kept."""
        return self.scaled_rstd / self._scale


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
    rows = _Rows(s, eps, axis, partial)
    y = rows.normed
    if rounding == "rstd":
        y = rows.scaled * rows.scaled_rstd.to(normed_dtype).to(compute)
    dtype = compute if rounding == "once" else normed_dtype
    y = y.to(dtype)
    if weight is not None:
        w = weight if weight_offset == 0.0 else weight.to(compute) + weight_offset
        dtype = torch.promote_types(dtype, w.dtype)
        y = (y.to(compute) * w.to(compute)).to(dtype)
    if bias is not None:
        dtype = torch.promote_types(dtype, bias.dtype)
        y = (y.to(compute) + bias.to(compute)).to(dtype)
    return y.to(out_dtype), rows.rstd.reshape(s.shape[:axis])


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
    rows = _Rows(_sum(x, residual, compute), eps, axis, partial)
    normed = rows.normed
    g = dy.to(compute)
    dbias = None if bias is None else g.sum_to_size(bias.shape).to(bias.dtype)
    dweight = None
    if weight is not None:
        dweight = (g * normed).sum_to_size(weight.shape).to(weight.dtype)
        g = g * (weight.to(compute) + weight_offset)
    projection = (g * normed).sum(tuple(range(axis, 0)), keepdim=True)
    dx = rows.times_rstd(g - rows.share(normed * projection))
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
    given. With g = dy * w, v = ddx * rstd, T = sum(g * xhat), P = sum(v * xhat / k) and the
    objective of a row::

        L = sum(v * g) - T * P + sum(ddweight * dy * xhat) + sum(ddbias * dy)

    its derivatives by g and xhat are by_g and by_normed, and along is rstd times that by rstd, which
    is in v and in xhat: d rstd / dx[i] = -rstd**2 * xhat[i] / k.
    """
    compute = compute_dtype(dy, x, residual, weight, ddx, ddweight, ddbias)
    row = tuple(range(axis, 0))
    rows = _Rows(_sum(x, residual, compute), eps, axis, partial)
    normed = rows.normed
    wide_dy = dy.to(compute)
    w = torch.ones((), dtype=compute, device=x.device)
    if weight is not None:
        w = weight.to(compute) + weight_offset
    g = wide_dy * w
    v = torch.zeros_like(normed) if ddx is None else rows.times_rstd(ddx.to(compute))

    projection = (g * normed).sum(row, keepdim=True)
    of_v = (rows.share(v) * normed).sum(row, keepdim=True)
    by_g = v - of_v * normed
    by_normed = -(of_v * g + rows.share(v * projection))
    along = (v * g).sum(row, keepdim=True) - projection * of_v
    ddy = w * by_g
    if ddweight is not None:
        ddy = ddy + ddweight.to(compute) * normed
        by_normed = by_normed + ddweight.to(compute) * wide_dy
    if ddbias is not None:
        ddy = ddy + ddbias.to(compute)
    along = along + (by_normed * normed).sum(row, keepdim=True)
    dx = rows.times_rstd(by_normed - rows.share(normed * along))
    dweight = None
    if weight is not None:
        dweight = (wide_dy * by_g).sum_to_size(weight.shape).to(weight.dtype)
    return ddy.to(dy.dtype), dx.to(result_dtype(x, residual)), dweight


def gradient_of_rstd(
    d_rstd: Tensor, x: Tensor, residual: Tensor | None, eps: float, axis: int, partial: float
) -> Tensor:
    """What rstd adds to dx: d rstd / dx[i] = -rstd**3 * x[i] / k."""
    rows = _Rows(_sum(x, residual, d_rstd.dtype), eps, axis, partial)
    d_rstd = d_rstd.reshape(rows.rstd.shape)
    dx = -rows.times_rstd(rows.times_rstd(d_rstd * rows.share(rows.normed)))
    return dx.to(result_dtype(x, residual))
