"""The four storage types: correct rounding, distances in ulp, and exact f32 and f64 arithmetic.

Everything here is defined by IEEE 754 and by nothing in the package under test. NumPy's own f32
and f64 sums and products are correctly rounded; what it lacks is a fused multiply-add and a
rounding from f64 to bfloat16 that rounds once. Both are made here from error-free transformations.
"""

import ml_dtypes
import numpy as np

F16 = np.dtype(np.float16)
BF16 = np.dtype(ml_dtypes.bfloat16)
F32 = np.dtype(np.float32)
F64 = np.dtype(np.float64)
DTYPES = (F16, BF16, F32, F64)

# significand bits (with the hidden one), and the exponents of the least and greatest normal binade
PRECISION = {F16: 11, BF16: 8, F32: 24, F64: 53}
EMIN = {F16: -14, BF16: -126, F32: -126, F64: -1022}
EMAX = {F16: 15, BF16: 127, F32: 127, F64: 1023}

_UNSIGNED = {2: np.uint16, 4: np.uint32, 8: np.uint64}


def promote(a, b):
    """The type that holds every value of both: f16 with bf16 gives f32, otherwise the wider one."""
    a, b = np.dtype(a), np.dtype(b)
    if a == b:
        return a
    return F64 if F64 in (a, b) else F32


def compute_dtype(*dtypes):
    """f64 as soon as one of the tensors is f64, f32 otherwise."""
    return F64 if any(d is not None and np.dtype(d) == F64 for d in dtypes) else F32


def two_sum(a, b):
    """a + b == s + e exactly."""
    s = a + b
    t = s - a
    return s, (a - (s - t)) + (b - t)


def _split(a):
    t = a * 134217729.0  # 2^27 + 1
    high = t - (t - a)
    return high, a - high


def two_product(a, b):
    """a * b == p + e exactly, for f64 factors well inside the exponent range."""
    p = a * b
    a_high, a_low = _split(a)
    b_high, b_low = _split(b)
    return p, ((a_high * b_high - p) + a_high * b_low + a_low * b_high) + a_low * b_low


def _sum_to_odd(a, b):
    """a + b in f64, rounded to odd: rounding that to fewer bits rounds the exact sum once."""
    s, e = two_sum(a, b)
    even = (s.view(np.uint64) & np.uint64(1)) == 0
    nudge = (e != 0) & even & np.isfinite(s)
    return np.where(nudge, np.nextafter(s, np.where(e > 0, np.inf, -np.inf)), s)


def fma(a, b, c):
    """a * b + c, rounded once, for f32 or f64 arrays of one dtype."""
    a, b, c = np.broadcast_arrays(a, b, c)
    dtype = a.dtype
    assert dtype in (F32, F64) and b.dtype == dtype and c.dtype == dtype
    a, b, c = (np.ascontiguousarray(v, np.float64) for v in (a, b, c))
    with np.errstate(all="ignore"):
        if dtype == F32:
            product = a * b  # 48 bits: exact
            total = _sum_to_odd(product, c)
            # an exact zero has its sign by the ordinary rules, which product + c follows
            return np.where(np.isfinite(total) & (total != 0), total, product + c).astype(F32)
        product, product_error = two_product(a, b)
        upper, lower = two_sum(c, product_error)
        total, total_error = two_sum(upper, product)
        fused = total + _sum_to_odd(total_error, lower)
        return np.where(np.isfinite(fused) & (fused != 0), fused, a * b + c)


def _bf16_bits(f32):
    bits = f32.view(np.uint32)
    rounded = bits + np.uint32(0x7FFF) + ((bits >> np.uint32(16)) & np.uint32(1))
    return np.where(np.isnan(f32), np.uint32(0x7FC00000), rounded) >> np.uint32(16)


def cast(values, dtype):
    """Round to nearest even into `dtype`, once; any NaN becomes some quiet NaN."""
    values, dtype = np.asarray(values), np.dtype(dtype)
    if values.dtype == dtype:
        return values
    with np.errstate(all="ignore"):
        if dtype != BF16:
            return values.astype(dtype)
        if values.dtype == F64:
            f32 = values.astype(F32)
            toward_odd = (f32.astype(F64) != values) & ((f32.view(np.uint32) & 1) == 0)
            toward_odd &= np.isfinite(values) & (np.abs(values) < 3.4e38)
            direction = np.where(f32.astype(F64) < values, np.float32(np.inf), np.float32(-np.inf))
            values = np.where(toward_odd, np.nextafter(f32, direction), f32)
        f32 = np.ascontiguousarray(values, F32)
        return _bf16_bits(f32).astype(np.uint16).view(BF16).reshape(values.shape)


def bits(values):
    """The representation as unsigned integers, every NaN as one pattern: to compare with ==."""
    values = np.array(values, order="C", copy=True)
    values[np.isnan(values.astype(F64))] = np.nan
    return values.view(_UNSIGNED[values.dtype.itemsize])


def assert_same_bits(actual, expected, message=""):
    """Equal dtype, shape and representation (so -0 is not +0); NaN equals NaN."""
    actual, expected = np.asarray(actual), np.asarray(expected)
    assert actual.dtype == expected.dtype, (message, actual.dtype, expected.dtype)
    assert actual.shape == expected.shape, (message, actual.shape, expected.shape)
    different = bits(actual) != bits(expected)
    if different.any():
        where = tuple(int(i) for i in np.argwhere(different)[0])
        raise AssertionError(
            f"{message} {int(different.sum())} of {different.size} elements differ, first at "
            f"{where}: {actual[where]!r} instead of {expected[where]!r}"
        )


def steps_between(a, b):
    """How many representable numbers apart, counted through zero; 0 for NaN against NaN."""
    a, b = np.asarray(a), np.asarray(b)
    assert a.dtype == b.dtype

    def ordinal(values):
        raw = bits(values).astype(np.uint64)
        sign = np.uint64(1) << np.uint64(8 * values.dtype.itemsize - 1)
        half = np.uint64(1) << np.uint64(63)
        return np.where(raw & sign, half - (raw & ~sign), half + raw)

    oa, ob = ordinal(a), ordinal(b)
    return np.maximum(oa, ob) - np.minimum(oa, ob)
