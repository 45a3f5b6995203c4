"""What the contract's gradients are in long double, and how far a result may be from them.

    c = sum(g * xhat) / k    dx = (g - c * xhat) * rstd + d_residual     g = dy * w, xhat = x * rstd

Budgets in units u of the compute type (half an ulp of 1), of which half an ulp of the result comes
on top: g takes 1, xhat 2 (rstd and its product; 6 where rstd was summed in f32 lanes between 16-bit
types), c 18 of the mean of |g * xhat| (its terms, lanes of eight, its own rounding) and n / 256 more
in double, dx 4 of |g| and its own rounding; dweight and dbias one for each of at most 64 rows of a
block and one for their total, of the sum of magnitudes.
"""

import dataclasses
import math

import numpy as np
from floats import EMIN, F64, PRECISION, compute_dtype

REAL = np.longdouble


def real(array):
    return np.asarray(array).astype(F64).astype(REAL)


def half_ulp(exact, dtype):
    exponent = np.frexp(np.abs(exact).astype(F64))[1] - 1
    return np.ldexp(0.5, np.maximum(exponent, EMIN[dtype]) - (PRECISION[dtype] - 1))


@dataclasses.dataclass
class Near:
    """An exact value and the largest error in the compute type, before the result is rounded."""

    value: np.ndarray
    error: np.ndarray

    def judge(self, actual, name):
        allowed = self.error + half_ulp(self.value, actual.dtype)
        error = np.abs(real(actual) - self.value)
        assert actual.shape == self.value.shape, (name, actual.shape, self.value.shape)
        within = error <= allowed
        if not within.all():
            where = tuple(int(i) for i in np.argwhere(~within)[0])
            raise AssertionError(
                f"{name}: {actual[where]!r} at {where} instead of {float(self.value[where])!r}, "
                f"{float(error[where] / allowed[where]):.3g} of what is allowed"
            )


def sum_to(values, shape):
    """Over all dimensions that broadcasting `shape` to that of values adds or stretches."""
    lead = values.ndim - len(shape)
    stretched = tuple(
        d for d in range(values.ndim) if d < lead or (shape[d - lead] == 1 and values.shape[d] != 1)
    )
    return values.sum(axis=stretched, keepdims=True).reshape(shape)


def gradients(
    dy,
    x,
    weight=None,
    *,
    results,
    eps=1e-6,
    axis=-1,
    weight_offset=0.0,
    partial=1.0,
    residual=None,
    mean_square=None,
    d_residual=None,
    bias_shape=None,
):
    """dx, dweight, dbias and d_mean_square as Near, or None; `results` are the dtypes written."""
    present = [a for a in (dy, x, weight, residual, d_residual) if a is not None]
    compute = compute_dtype(*(a.dtype for a in present), *results)
    u = REAL(2) ** -PRECISION[compute]
    axis = axis % x.ndim
    row = tuple(range(axis, x.ndim))
    n = math.prod(x.shape[axis:])
    k = math.ceil(partial * n)
    narrow = dy.dtype.itemsize == 2 and x.dtype.itemsize == 2 and residual is None
    of_xhat = 6 if narrow else 2
    of_c = 16 + of_xhat + (n / 256 if compute == F64 else 0)

    s = x.astype(compute) if residual is None else x.astype(compute) + residual.astype(compute)
    s = real(s)
    counted = (np.arange(n) < k).reshape(x.shape[axis:])
    if mean_square is None:
        mean = np.sum(s * s * counted, axis=row, keepdims=True) / k
    else:
        mean = real(mean_square).reshape(x.shape[:axis] + (1,) * len(row))
        counted = np.zeros_like(counted)
    rstd = 1 / np.sqrt(mean + REAL(eps))
    xhat = s * rstd
    wide_dy = real(dy)
    w = REAL(1)
    if weight is not None:
        w = real(weight)
        if weight_offset:
            w = real(np.asarray(weight_offset, compute) + weight.astype(compute))
    g = wide_dy * w
    total = np.sum(g * xhat, axis=row, keepdims=True)
    magnitude = np.sum(np.abs(g * xhat), axis=row, keepdims=True)

    dx = (g - np.where(counted, total / k, 0) * xhat) * rstd
    if d_residual is not None:
        dx = dx + real(d_residual)
    error = (4 * np.abs(g) + np.abs(xhat) * magnitude / k * of_c) * rstd + np.abs(dx)
    dweight = dbias = d_mean_square = None
    if weight is not None:
        terms = wide_dy * xhat
        dweight = Near(
            sum_to(terms, weight.shape), u * (65 + of_xhat) * sum_to(np.abs(terms), weight.shape)
        )
    if bias_shape is not None:
        dbias = Near(sum_to(wide_dy, bias_shape), u * 65 * sum_to(np.abs(wide_dy), bias_shape))
    if mean_square is not None:
        factor = (rstd * rstd / 2).reshape(x.shape[:axis])
        rows = (total.reshape(factor.shape), magnitude.reshape(factor.shape))
        d_mean_square = Near(-factor * rows[0], u * of_c * factor * rows[1])
    return Near(dx, u * error), dweight, dbias, d_mean_square


def judge(expected, actual):
    """Each result against what is expected of it; both None where there is none."""
    names = ("dx", "dweight", "dbias", "d_mean_square")
    for name, near, result in zip(names, expected, (*actual, None)):
        assert (near is None) == (result is None), name
        if near is not None:
            near.judge(result, name)


assert np.finfo(REAL).nmant >= 63, "the oracle needs a long double wider than double"
