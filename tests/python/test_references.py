"""The references of this suite checked against rational arithmetic, before they judge anything."""

import math
from fractions import Fraction

import floats
import numpy as np
import oracle
import pytest
from floats import BF16, DTYPES, EMAX, EMIN, F16, F32, F64, PRECISION
from layouts import LAYOUTS, Placed


def nearest_even(value, dtype):
    """A Fraction rounded into dtype, by integer arithmetic; infinities as floats."""
    if value == 0:
        return 0.0
    exponent = abs(value.numerator).bit_length() - value.denominator.bit_length() - 1
    exponent += abs(value) >= Fraction(2) ** (exponent + 1)
    exponent = max(exponent, EMIN[dtype])
    quantum = Fraction(2) ** (exponent - PRECISION[dtype] + 1)
    rounded = round(value / quantum) * quantum  # Python rounds a tie to even
    if abs(rounded) >= Fraction(2) ** (EMAX[dtype] + 1):
        return math.copysign(math.inf, value)
    return float(rounded)


def awkward_f64(rng, count, dtype):
    """Values at, just above and just below ties and binade borders of dtype, and denormals."""
    exponents = rng.integers(EMIN[dtype] - PRECISION[dtype] - 1, min(EMAX[dtype], 1000) + 1, count)
    steps = rng.integers(0, 2 ** (PRECISION[dtype] + 1), count).astype(F64)
    base = np.ldexp(1 + steps / 2.0 ** (min(PRECISION[dtype], 52)), exponents)
    nudged = np.nextafter(base, np.where(rng.integers(0, 2, count), np.inf, 0))
    return np.where(rng.integers(0, 3, count) == 0, base, nudged) * rng.choice([-1, 1], count)


@pytest.mark.parametrize("dtype", [F16, BF16, F32])
def test_cast_rounds_f64_once_to_nearest_even(dtype):
    values = awkward_f64(np.random.default_rng(1), 3000, dtype)
    expected = [nearest_even(Fraction(v), dtype) for v in values]
    np.testing.assert_array_equal(floats.cast(values, dtype).astype(F64), expected)


def test_cast_to_bf16_keeps_every_nan_and_the_sign_of_zero():
    payloads = np.array([0x7F800001, 0x7FFFFFFF, 0xFF800001, 0xFFFFFFFF, 0x7FC00000], np.uint32)
    assert np.isnan(floats.cast(payloads.view(F32), BF16).astype(F32)).all()
    zeros = floats.cast(np.array([0.0, -0.0, 1e-45, -1e-45], F32), BF16)
    np.testing.assert_array_equal(np.signbit(zeros.astype(F32)), [False, True, False, True])


@pytest.mark.parametrize("dtype", [F32, F64])
def test_fma_rounds_once(dtype):
    rng = np.random.default_rng(2)
    a, b = (rng.standard_normal(3000).astype(dtype) for _ in "ab")
    c = -(a * b) + rng.choice([0, 1, -3, 0.5], 3000) * np.spacing(a * b) * rng.standard_normal(3000)
    c = np.where(rng.integers(0, 2, 3000), c, rng.standard_normal(3000)).astype(dtype)
    # exact products close to a tie of the sum: the case that rounding twice gets wrong
    a[:500] = 1 + rng.integers(1, 2**10, 500) * 2.0 ** -(PRECISION[dtype] // 2)
    b[:500] = 1 + rng.integers(1, 2**10, 500) * 2.0 ** -(PRECISION[dtype] // 2)
    c[:500] = 2.0 ** rng.integers(-60, 60, 500)
    expected = [
        nearest_even(Fraction(float(u)) * Fraction(float(v)) + Fraction(float(t)), dtype)
        for u, v, t in zip(a, b, c)
    ]
    np.testing.assert_array_equal(floats.fma(a, b, c).astype(F64), expected)


def test_fma_differs_from_a_sum_rounded_through_f64():
    # a*b + c = 1 + 2^-23 + 2^-24 - 2^-54 lies below a tie of f32; in f64 it becomes that tie
    a = np.array([2.0**-24 * (1 + 2.0**-15)], F32)
    b = np.array([1 - 2.0**-15], F32)
    c = np.array([1 + 2.0**-23], F32)
    through_f64 = (a.astype(F64) * b.astype(F64) + c.astype(F64)).astype(F32)
    assert through_f64 == np.float32(1 + 2.0**-22)
    assert floats.fma(a, b, c) == c


@pytest.mark.parametrize("dtype", DTYPES)
def test_steps_and_ulp_error_at_binade_borders_and_denormals(dtype):
    tiny = 2.0 ** (EMIN[dtype] - PRECISION[dtype] + 1)
    ladder = np.array([-tiny, -0.0, 0.0, tiny, 2 * tiny], F64).astype(dtype)
    np.testing.assert_array_equal(floats.steps_between(ladder[:-1], ladder[1:]), [1, 0, 1, 1])
    one = np.array([1.0], F64)
    below = floats.cast(one - 2.0 ** -PRECISION[dtype], dtype)
    above = floats.cast(one + 2.0 ** -(PRECISION[dtype] - 1), dtype)
    assert floats.steps_between(below, above) == 2

    def exact(value):
        mantissa, exponent = np.frexp(np.array([value], F64))
        return oracle.Exact(mantissa, np.zeros(1), exponent)

    assert oracle.ulp_error(above, exact(1.0)) == 1
    assert oracle.ulp_error(below, exact(1.0)) == 0.5
    assert oracle.ulp_error(ladder[3:4], exact(0.0)) == 1
    assert oracle.ulp_error(ladder[4:5], exact(2 * tiny)) == 0
    # the exact value a hair below one has the smaller ulp
    hair = oracle.Exact(np.array([0.5]), np.array([-(2.0**-80)]), np.array([1]))
    assert abs(oracle.ulp_error(above, hair) - 2) < 1e-6


def test_oracle_agrees_with_rational_arithmetic():
    rng = np.random.default_rng(3)
    for scale, offset in ((1.0, 0.0), (1e-300, 1.0), (1e300, 0.5)):
        x = rng.standard_normal((2, 37)) * scale
        weight, bias = rng.standard_normal(37), rng.standard_normal((2, 37))
        y = oracle.exact_norm(x, weight, bias, eps=1e-6, weight_offset=offset)
        for row in range(2):
            mean = sum(Fraction(v) ** 2 for v in x[row]) / 37 + Fraction(1e-6)
            for i in range(37):
                # compare squares, since the root is irrational: ((y - b) / (x w))^2 == 1 / mean
                value = Fraction(y.high[row, i]) + Fraction(y.low[row, i])
                value *= Fraction(2) ** int(y.exponent[row, i])
                product = value - Fraction(bias[row, i])
                factor = Fraction(x[row, i]) * (Fraction(weight[i]) + Fraction(offset))
                ratio = product**2 / (factor**2 / mean)
                # the product is judged relative to the result, which the bias may dominate
                slack = abs(Fraction(bias[row, i]) / product) + 1
                assert abs(ratio - 1) < slack * Fraction(2) ** -90


def test_oracle_mean_square_is_exact_on_cancelling_free_sums():
    for n in (1, 2, 3, 1000, 4097):
        row = np.random.default_rng(n).standard_normal(n).astype(F32)
        exact = sum(Fraction(float(v)) ** 2 for v in row) / n
        assert abs(oracle.exact_mean_square(row) / exact - 1) < Fraction(2) ** -95
    assert oracle.exact_mean_square(np.full(9, 5e-324)) == Fraction(5e-324) ** 2
    assert oracle.exact_mean_square(np.array([3.0, 4.0, 99.0]), 2) == Fraction(25, 2)


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("shape", [(5, 7), (3, 2, 4), (1, 9), (0, 4)])
def test_layouts_hold_their_values_and_see_stray_writes(layout, shape):
    values = np.random.default_rng(4).standard_normal(shape).astype(F32)
    if layout == "broadcast_rows" and shape[0]:
        values[:] = values[0]
    placed = Placed(values, layout)
    np.testing.assert_array_equal(placed.view, values)
    assert placed.untouched()
    placed.view[...] = 0
    assert placed.untouched()
    outside = np.flatnonzero(placed._outside)
    placed.storage[outside[len(outside) // 2]] ^= 1
    assert not placed.untouched()
