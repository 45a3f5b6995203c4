"""NaN, infinities, denormals, zero rows and the ends of the exponent range."""

import cases
import floats
import numpy as np
import oracle
import pytest
import rmsnorm
import torch
from floats import BF16, DTYPES, EMAX, EMIN, F16, F32, F64, PRECISION, assert_same_bits

# signalling, all ones, negative, and the one whose payload is only in the low half of an f32
NAN_BITS = {
    F16: np.array([0x7C01, 0x7FFF, 0xFC01, 0xFE00], np.uint16),
    BF16: np.array([0x7F81, 0x7FFF, 0xFF81, 0xFFC0], np.uint16),
    F32: np.array([0x7F800001, 0x7FFFFFFF, 0xFF800001, 0x7F80FFFF], np.uint32),
    F64: np.array(
        [0x7FF0000000000001, 2**63 - 1, 0xFFF0000000000001, 0x7FF00000FFFFFFFF], np.uint64
    ),
}


def is_nan(values):
    return np.isnan(np.asarray(values).astype(F64))


@pytest.mark.parametrize("dtype", (F32, F64), ids=str)
def test_the_gradient_of_a_mean_square_of_zero_is_that_of_the_formula(dtype):
    """Both products of dy and an infinite xhat are negative infinities, of any number of elements."""
    x = np.array([[0.31, -1.58]], dtype)
    dy = np.array([[-2.4e-4, 6.2e5]], dtype)
    for repeats in (1, 3, 16, 40, 500):
        wide_x, wide_dy = np.tile(x, repeats), np.tile(dy, repeats)
        zero = np.zeros(1, dtype)
        for of_dy, expected in ((wide_dy, np.inf), (-wide_dy, -np.inf), (wide_x * 0 + 1, np.nan)):
            gradient = rmsnorm.rms_norm_backward(of_dy, wide_x, mean_square=zero, eps=0.0)[3]
            assert_same_bits(gradient, np.array([expected], dtype))


@pytest.mark.parametrize("out_dtype", DTYPES, ids=str)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_nan_in_x_stays_nan_in_its_row_only(dtype, out_dtype):
    x = cases.values(np.random.default_rng(40), (6, 67), dtype)
    clean = rmsnorm.rms_norm(x, out_dtype=out_dtype)
    for position in (0, 31, 66):
        for pattern in NAN_BITS[dtype].view(dtype):
            dirty = x.copy()
            dirty[2, position] = pattern
            y, rstd = rmsnorm.rms_norm(dirty, out_dtype=out_dtype, return_rstd=True)
            assert is_nan(y[2]).all() and is_nan(rstd[2])
            for row in (0, 1, 3, 4, 5):
                assert_same_bits(y[row], clean[row])


@pytest.mark.parametrize("out_dtype", DTYPES, ids=str)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_nan_payloads_never_round_to_a_number(dtype, out_dtype):
    """Elements outside the partial statistics, weights and sums: NaN goes through one rounding."""
    x = cases.values(np.random.default_rng(41), (2, 80), dtype)
    weight = cases.values(np.random.default_rng(42), 80, dtype)
    patterns = NAN_BITS[dtype].view(dtype)
    at = np.arange(60, 64)
    expected = np.zeros((2, 80), bool)
    expected[:, at] = True

    dirty = x.copy()
    dirty[:, at] = patterns
    for rounding in cases.ROUNDINGS:
        y = rmsnorm.rms_norm(dirty, partial=0.5, out_dtype=out_dtype, rounding=rounding)
        np.testing.assert_array_equal(is_nan(y), expected)
        dirty_weight = weight.copy()
        dirty_weight[at] = patterns
        y = rmsnorm.rms_norm(x, dirty_weight, out_dtype=out_dtype, rounding=rounding)
        np.testing.assert_array_equal(is_nan(y), expected)
    total = np.empty((2, 80), out_dtype)
    rmsnorm.add_rms_norm(dirty, x, residual_out=total)
    np.testing.assert_array_equal(is_nan(total), expected)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_infinity_in_x(dtype):
    """mean_square is inf, rstd 0: finite elements become zeros of their sign, inf * 0 is NaN."""
    x = cases.values(np.random.default_rng(43), (3, 70), dtype)
    clean = rmsnorm.rms_norm(x)
    for infinity in (np.inf, -np.inf):
        x[1, 33] = infinity
        y, rstd = rmsnorm.rms_norm(x, return_rstd=True)
        assert rstd[1] == 0
        others = np.arange(70) != 33
        assert is_nan(y[1, 33])
        assert_same_bits(y[1, others], (np.sign(x[1, others].astype(F64)) * 0.0).astype(dtype))
        assert_same_bits(y[[0, 2]], clean[[0, 2]])


def test_infinity_in_weight_and_bias():
    x, weight, bias = np.ones((2, 5), F32), np.ones(5, F32), np.zeros(5, F32)
    x[1, 2], weight[2], bias[4] = 0, np.inf, -np.inf
    y = rmsnorm.rms_norm(x, weight, bias)
    np.testing.assert_array_equal(np.isinf(y), [[0, 0, 1, 0, 1], [0, 0, 0, 0, 1]])
    np.testing.assert_array_equal(np.isnan(y), [[0, 0, 0, 0, 0], [0, 0, 1, 0, 0]])


def test_results_beyond_the_greatest_number_overflow_as_rounding_says():
    x, weight = np.ones((1, 4), F32), np.array([65504, 65519, 65520, -1e30], F32)
    y = rmsnorm.rms_norm(x, weight, eps=0.0, out_dtype=F16)
    np.testing.assert_array_equal(y.astype(F32), [[65504, 65504, np.inf, -np.inf]])


def magnitudes(dtype):
    least = EMIN[dtype] - PRECISION[dtype] + 1
    middle = [e for e in range(least, EMAX[dtype], max(1, (EMAX[dtype] - least) // 25))]
    return sorted({*middle, least, least + 1, EMIN[dtype] - 1, EMIN[dtype], EMAX[dtype]})


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("eps", [0.0, 1e-45, 1e-6])
def test_every_magnitude_is_within_budget(dtype, eps):
    """Squares that overflow or underflow the compute type included.

    Reported of huggingface/candle 3477 (NaN for f32 of 1e9), and for squares of f16 of
    pytorch/pytorch 133085, xlite-dev/LeetCUDA 335 and nntrainer/nntrainer 3935.
    """
    rng = np.random.default_rng(44)
    rows = []
    for exponent in magnitudes(dtype):
        row = floats.cast(np.ldexp(rng.uniform(1, 1.99, 120), exponent), dtype)
        rows.append(np.where(rng.integers(0, 2, 120) == 1, row, -row))
    x = np.stack(rows)
    weight = floats.cast(rng.uniform(0.5, 2, 120), dtype)
    y = rmsnorm.rms_norm(x, weight, eps=eps)
    oracle.assert_within_budget(y, oracle.exact_norm(x, weight, eps=eps))
    alone = rmsnorm.rms_norm(x, eps=eps, rounding="before_weight")
    oracle.assert_within_budget(alone, oracle.exact_norm(x, eps=eps))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_greatest_and_least_numbers(dtype):
    greatest = floats.cast(np.ldexp(2 - 2.0 ** (1 - PRECISION[dtype]), EMAX[dtype]), dtype)
    least = floats.cast(np.ldexp(1.0, EMIN[dtype] - PRECISION[dtype] + 1), dtype)
    for n in (1, 2, 33, 4096, 2**17):
        for value in (greatest, least):
            x = np.full((2, n), value, dtype)
            oracle.assert_within_budget(
                rmsnorm.rms_norm(x, eps=0.0), oracle.exact_norm(x, eps=0.0), message=f"n={n}"
            )
        # one great number among least ones
        x = np.full((1, n), least, dtype)
        x[0, n // 2] = greatest
        oracle.assert_within_budget(
            rmsnorm.rms_norm(x, eps=0.0), oracle.exact_norm(x, eps=0.0), message=f"n={n}"
        )


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_rescaling_by_a_power_of_two_changes_nothing(dtype):
    """f(2^k x) == f(x) for eps = 0 while the squares stay normal; rstd scales exactly."""
    rng = np.random.default_rng(45)
    x64 = rng.uniform(1, 2, (3, 500)) * rng.choice([-1, 1], (3, 500))
    x = floats.cast(x64, dtype)
    weight = cases.values(rng, 500, dtype)
    y, rstd = rmsnorm.rms_norm(x, weight, eps=0.0, return_rstd=True)
    compute = floats.compute_dtype(dtype)
    low = max(EMIN[dtype], EMIN[compute] // 2 + 1)
    high = min(EMAX[dtype], EMAX[compute] // 2 - 6)
    for k in sorted({*range(low, high, max(1, (high - low) // 40)), -1, 1, high - 1}):
        scaled = np.ldexp(x.astype(F64), k).astype(dtype)
        y_k, rstd_k = rmsnorm.rms_norm(scaled, weight, eps=0.0, return_rstd=True)
        assert_same_bits(y_k, y, f"k={k}")
        assert_same_bits(rstd_k, np.ldexp(rstd, -k), f"k={k}")


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_zero_rows(dtype):
    x = np.zeros((2, 40), dtype)
    x[:, 1] = -0.0
    for eps in (1e-6, 0.25):
        y, rstd = rmsnorm.rms_norm(x, eps=eps, return_rstd=True)
        assert_same_bits(y, x)
        exact = oracle.exact_rstd(x, eps)
        oracle.assert_within_budget(rstd, exact, 0.5)
    # 0 / 0: the formula has no value
    y, rstd = rmsnorm.rms_norm(x, eps=0.0, return_rstd=True)
    assert is_nan(y).all() and np.isposinf(rstd.astype(F64)).all()


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_denormals_are_kept(dtype):
    """In x, in weight and in the result, also where the compute type makes them normal numbers."""
    least = np.ldexp(1.0, EMIN[dtype] - PRECISION[dtype] + 1)
    x = np.ones((1, 64), dtype)
    x[0, 5:9] = floats.cast(least * np.array([1, 2, 3, -5]), dtype)
    weight = np.ones(64, dtype)
    weight[20:23] = floats.cast(least * np.array([1, 3, -7]), dtype)
    exact = oracle.exact_norm(x, weight, eps=0.0)
    for rounding in ("once", "before_weight"):
        y = rmsnorm.rms_norm(x, weight, eps=0.0, rounding=rounding)
        oracle.assert_within_budget(y, exact)
        assert (y[0, [5, 6, 7, 8, 20, 21, 22]].astype(F64) != 0).all()
    doubled = rmsnorm.add_rms_norm(x, x)[1]
    np.testing.assert_array_equal(doubled.astype(F64), 2 * x.astype(F64))


def test_flush_to_zero_mode_of_the_caller_has_no_effect_and_survives(thread_count):
    rng = np.random.default_rng(46)
    tiny = floats.cast(np.ldexp(rng.uniform(-4, 4, (600, 512)), -128), F32)
    half = floats.cast(np.ldexp(rng.uniform(-4, 4, (600, 512)), -130), BF16)
    weight = floats.cast(np.ldexp(rng.uniform(1, 2, 512), -128), F32)
    for threads in (1, 2):
        thread_count(threads)
        calls = [
            lambda: rmsnorm.rms_norm(tiny, eps=0.0),
            lambda: rmsnorm.rms_norm(half, eps=0.0, out_dtype=F32),
            lambda: rmsnorm.rms_norm(half, weight, eps=1e-6),
            lambda: rmsnorm.rms_norm(tiny, weight, rounding="before_weight"),
            lambda: rmsnorm.add_rms_norm(tiny, tiny)[1],
        ]
        expected = [call() for call in calls]
        if not torch.set_flush_denormal(True):
            pytest.skip("this CPU has no flush-to-zero mode")
        try:
            results = [call() for call in calls]
            still_flushing = float(np.float32(1e-40) * np.float32(0.5)) == 0.0
        finally:
            torch.set_flush_denormal(False)
        assert still_flushing
        for actual, wanted in zip(results, expected):
            assert_same_bits(actual, wanted)
        assert any((r != 0).any() for r in (results[2], results[4]))


def test_every_half_number():
    """All 2^16 patterns of f16 and bf16 through one normalisation each way."""
    for dtype in (F16, BF16):
        patterns = np.arange(2**16, dtype=np.uint16).view(dtype)
        finite = patterns[np.isfinite(patterns.astype(F32))]
        ones = np.ones((1, finite.size), dtype)
        # x = 1 with eps = 0 has rstd 1, so the weight comes out as it went in
        assert_same_bits(rmsnorm.rms_norm(ones, finite, eps=0.0)[0], finite)
        assert_same_bits(
            rmsnorm.rms_norm(ones, finite, eps=0.0, rounding="before_weight")[0], finite
        )
        wide = rmsnorm.rms_norm(ones, finite, eps=0.0, out_dtype=F32)[0]
        assert_same_bits(wide, finite.astype(F32))
        # x alone: statistics of the first element (1), the rest passes through
        x = np.concatenate([np.ones(1, dtype), finite])[None]
        y = rmsnorm.rms_norm(x, eps=0.0, partial=1e-9)
        assert_same_bits(y, x)


def test_every_tie_into_half_rounds_to_even():
    for dtype in (F16, BF16):
        positive = np.arange(0x7C00 if dtype == F16 else 0x7F80, dtype=np.uint16).view(dtype)
        low, high = positive[:-1].astype(F64), positive[1:].astype(F64)
        ties = ((low + high) / 2).astype(F32)
        assert (ties.astype(F64) == (low + high) / 2).all()
        around = np.concatenate(
            [np.nextafter(ties, np.float32(0)), ties, np.nextafter(ties, np.float32(np.inf))]
        )
        weights = np.concatenate([around, -around])
        y = rmsnorm.rms_norm(np.ones((1, weights.size), F32), weights, eps=0.0, out_dtype=dtype)
        assert_same_bits(y[0], floats.cast(weights, dtype))
