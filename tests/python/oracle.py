"""What the exact real-number formula gives, to about 100 bits, and how far a result is from it.

    rstd = 1 / sqrt(mean(x[:k]^2) + eps)        y = x * rstd * (weight_offset + weight) + bias

The squares and their sum are double-doubles on values scaled by a power of two (nothing overflows
or underflows), the root is integer arithmetic, and the products are double-doubles with a separate
exponent. So the same code judges f16 and f64, rows of 1e300 and rows of denormals.
"""

import dataclasses
import math
from fractions import Fraction

import numpy as np
from floats import EMAX, EMIN, F32, F64, PRECISION, two_product, two_sum
from rmsnorm import _core


def error_bound(dtype, compute_dtype=None, **options):
    """What include/rmsnorm/bounds.hpp promises of y, in units in the last place of the exact one.

    The compute type is float32, or float64 where y is; given where other tensors are float64.
    """
    if compute_dtype is None:
        compute_dtype = F64 if dtype == F64 else F32
    return _core.error_bound(dtype.name, compute_dtype.name, **options)


@dataclasses.dataclass
class Exact:
    """(high + low) * 2^exponent, elementwise, with |high| in [1/2, 1) or zero."""

    high: np.ndarray
    low: np.ndarray
    exponent: np.ndarray

    def __getitem__(self, index):
        return Exact(self.high[index], self.low[index], self.exponent[index])

    def reshape(self, shape):
        return Exact(*(v.reshape(shape) for v in (self.high, self.low, self.exponent)))

    def to_f64(self):
        return np.ldexp(self.high, self.exponent)


def _normalised(high, low, exponent):
    high, low = two_sum(high, low)
    high, shift = np.frexp(high)
    return Exact(high, np.ldexp(low, -shift), np.asarray(exponent + shift, np.int64))


def _exact(values):
    mantissa, exponent = np.frexp(np.asarray(values, F64))
    return Exact(mantissa, np.zeros_like(mantissa), exponent.astype(np.int64))


def _product(a, b):
    high, low = two_product(a.high, b.high)
    return _normalised(high, low + (a.high * b.low + a.low * b.high), a.exponent + b.exponent)


def _sum(a, b):
    exponent = np.maximum(
        np.where(a.high == 0, b.exponent, a.exponent), np.where(b.high == 0, a.exponent, b.exponent)
    )
    a_high, a_low = (np.ldexp(v, a.exponent - exponent) for v in (a.high, a.low))
    b_high, b_low = (np.ldexp(v, b.exponent - exponent) for v in (b.high, b.low))
    high, error = two_sum(a_high, b_high)
    return _normalised(high, error + (a_low + b_low), exponent)


def exact_mean_square(row, count=None):
    """Mean of the squares of the first `count` elements of one row, as a Fraction."""
    row = np.asarray(row).astype(F64)[:count]
    largest = float(np.max(np.abs(row)))
    if largest == 0:
        return Fraction(0)
    scale = math.frexp(largest)[1]
    high, low = two_product(np.ldexp(row, -scale), np.ldexp(row, -scale))
    while high.size > 1:
        if high.size % 2:
            high, low = np.append(high, 0.0), np.append(low, 0.0)
        high, error = two_sum(high[::2], high[1::2])
        low = low[::2] + low[1::2] + error
    return (Fraction(high[0]) + Fraction(low[0])) * Fraction(4) ** scale / row.size


def _exact_rstd(mean_square_plus_eps):
    numerator, denominator = (mean_square_plus_eps.denominator, mean_square_plus_eps.numerator)
    shift = max(0, 280 - numerator.bit_length() + denominator.bit_length())
    shift += shift % 2
    root = math.isqrt((numerator << shift) // denominator)
    length = root.bit_length()
    high = root / (1 << length)
    low = float(Fraction(root, 1 << length) - Fraction(high))
    return _normalised(np.float64(high), np.float64(low), np.int64(length - shift // 2))


def exact_rstd(rows, eps, partial=1.0):
    """rstd of every row of a 2-D array of finite numbers; no row may be zero where eps is."""
    count = math.ceil(partial * rows.shape[-1])
    roots = [_exact_rstd(exact_mean_square(row, count) + Fraction(eps)) for row in rows]
    return Exact(*(np.array([getattr(r, f) for r in roots]) for f in ("high", "low", "exponent")))


def exact_norm(rows, weight=None, bias=None, *, eps=1e-6, weight_offset=0.0, partial=1.0):
    """The formula on a 2-D array; weight and bias broadcast against it."""
    with np.errstate(all="ignore"):
        rstd = exact_rstd(rows, eps, partial)
        y = _product(_exact(rows), rstd[:, None])
        if weight is not None:
            high, low = two_sum(np.float64(weight_offset), np.asarray(weight).astype(F64))
            y = _product(y, _normalised(high, low, np.zeros(high.shape, np.int64)))
        if bias is not None:
            y = _sum(y, _exact(np.broadcast_to(np.asarray(bias).astype(F64), rows.shape)))
    return y


def ulp_error(actual, exact):
    """|actual - exact| in units in the last place that actual's dtype has at the exact value.

    Below the normal numbers the unit is the least denormal. An infinity counts as the number that
    would follow the greatest finite one, NaN as infinitely far.
    """
    dtype = actual.dtype
    with np.errstate(all="ignore"):
        below_binade = (np.abs(exact.high) == 0.5) & (exact.high * exact.low < 0)
        leading = exact.exponent - 1 - below_binade
        unit = np.maximum(np.where(exact.high == 0, EMIN[dtype], leading), EMIN[dtype])
        unit = unit - (PRECISION[dtype] - 1)
        value = np.asarray(actual).astype(F64)
        infinite = np.isinf(value)
        mantissa, exponent = np.frexp(np.where(infinite, np.sign(value), value))
        exponent = exponent + np.where(infinite, EMAX[dtype] + 1, 0)
        difference = np.ldexp(mantissa, exponent - unit) - np.ldexp(
            exact.high, exact.exponent - unit
        )
        error = np.abs(difference - np.ldexp(exact.low, exact.exponent - unit))
        overflowed = infinite & (exact.exponent > EMAX[dtype] + 1)
        error[overflowed & (np.sign(value) == np.sign(exact.high))] = 0.0
        error[np.isnan(value)] = np.inf
    return error


def assert_within_budget(actual, exact, budget=None, message=""):
    budget = error_bound(actual.dtype) if budget is None else budget
    error = ulp_error(actual, exact)
    if error.size and not error.max() <= budget:
        where = tuple(int(i) for i in np.unravel_index(int(np.argmax(error)), error.shape))
        raise AssertionError(
            f"{message} {error[where]:.4g} ulp at {where}, more than {budget}: "
            f"{actual[where]!r} instead of {exact.to_f64()[where]!r}"
        )


def assert_rstd_within_budget(actual, exact, normed_dtype, y_dtype, count, message=""):
    """`normed_dtype` is that of what is normalised: x, or residual_out; `count` elements of it."""
    all_16_bit = normed_dtype.itemsize == 2 and y_dtype.itemsize == 2
    budget = _core.cpu_rstd_bound(actual.dtype.name, all_16_bit, count)
    assert_within_budget(actual, exact, budget, message)
