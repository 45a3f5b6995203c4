"""rstd, mean_square, rms_norm_apply and rows sharded over devices."""

import math
from fractions import Fraction

import cases
import layouts
import numpy as np
import oracle
import pytest
import rmsnorm
from floats import DTYPES, F32, F64, assert_same_bits, compute_dtype

# rms_norm_apply starts from a mean square that was rounded to f32 (or f64), a unit of 2^-24 (2^-53)
# at most. The root halves it, and half a unit is at most half an ulp of y.
HALF_AN_ULP = {F32: 0.5, F64: 0.5}


def apply_budget(dtype):
    return oracle.error_bound(dtype) + HALF_AN_ULP.get(dtype, 0)


def mean_square_error(actual, x):
    """In ulp of the result's dtype."""
    rows = x.reshape(-1, x.shape[-1])
    worst = 0.0
    for value, row in zip(actual.reshape(-1), rows):
        exact = oracle.exact_mean_square(row)
        unit = np.spacing(actual.dtype.type(float(exact)))
        worst = max(worst, abs(float((Fraction(float(value)) - exact) / Fraction(float(unit)))))
    return worst


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("n", [1, 8, 31, 257, 4097, 65537])
def test_mean_square(dtype, n):
    x = cases.values(np.random.default_rng(n), (3, 2, n), dtype)
    result = rmsnorm.mean_square(x)
    assert result.shape == (3, 2)
    assert result.dtype == compute_dtype(dtype)
    # Half an ulp to round, and for f64 the rounding of the squares, which may be an ulp.
    assert mean_square_error(result, x) <= (1.501 if dtype == F64 else 0.501)


@pytest.mark.parametrize("layout", layouts.LAYOUTS)
def test_mean_square_layouts_and_out(layout):
    x = cases.values(np.random.default_rng(60), (6, 77), F32)
    if layout == "broadcast_rows":
        x = np.repeat(x[:1], 6, axis=0)
    expected = rmsnorm.mean_square(x)
    out = layouts.empty((6,), F32)
    assert rmsnorm.mean_square(layouts.Placed(x, layout).view, out=out.view) is out.view
    assert_same_bits(out.view, expected)
    assert out.untouched()


def test_mean_square_beyond_the_range_of_the_sum():
    """The sum overflows f32 and the mean does not; and the other way round below."""
    assert rmsnorm.mean_square(np.full((1, 4096), 2.0**63, F32))[0] == np.float32(2.0**126)
    assert rmsnorm.mean_square(np.full((1, 4096), 2.0**65, F32))[0] == np.inf
    assert rmsnorm.mean_square(np.full((1, 64), 2.0**-70, F32))[0] == np.float32(2.0**-140)
    assert rmsnorm.mean_square(np.full((1, 4096), 2.0**511))[0] == 2.0**1022
    assert rmsnorm.mean_square(np.zeros((2, 5), F32)).tolist() == [0, 0]


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_apply_equals_rms_norm_where_the_mean_square_is_exact(dtype):
    """Small integers: their squares sum exactly, and n = 2^k divides exactly."""
    rng = np.random.default_rng(61)
    x = rng.integers(-7, 8, (20, 256)).astype(dtype)
    weight = cases.values(rng, 256, dtype)
    mean_square = rmsnorm.mean_square(x)
    np.testing.assert_array_equal(mean_square, (x.astype(F64) ** 2).mean(-1))
    for rounding in cases.ROUNDINGS:
        for offset in (0.0, 1.0):
            options = {"eps": 1e-5, "rounding": rounding, "weight_offset": offset}
            y = rmsnorm.rms_norm_apply(x, mean_square, weight, **options)
            assert_same_bits(y, rmsnorm.rms_norm(x, weight, **options))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_apply_is_within_budget(dtype):
    rng = np.random.default_rng(62)
    x, weight = cases.values(rng, (4, 5, 700), dtype), cases.values(rng, 700, dtype)
    y = rmsnorm.rms_norm_apply(x, rmsnorm.mean_square(x), weight, eps=1e-5)
    assert y.dtype == dtype
    exact = oracle.exact_norm(x.reshape(20, 700), weight, eps=1e-5)
    oracle.assert_within_budget(y.reshape(20, 700), exact, apply_budget(dtype))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shards", [2, 4, 8])
def test_rows_sharded_over_devices(dtype, shards):
    rng = np.random.default_rng(63)
    x, weight = cases.values(rng, (6, 1024), dtype), cases.values(rng, 1024, dtype)
    parts = np.split(x, shards, axis=1)
    mean = np.mean([rmsnorm.mean_square(part).astype(F64) for part in parts], axis=0)
    mean = mean.astype(compute_dtype(dtype))
    y = np.concatenate(
        [
            rmsnorm.rms_norm_apply(part, mean, w, eps=1e-5)
            for part, w in zip(parts, np.split(weight, shards))
        ],
        axis=1,
    )
    # each shard's mean square was rounded as well: one more half ulp ahead of the root
    budget = apply_budget(dtype) + HALF_AN_ULP.get(dtype, 0)
    oracle.assert_within_budget(y, oracle.exact_norm(x, weight, eps=1e-5), budget)


def test_apply_in_place_and_into_strides():
    x = cases.values(np.random.default_rng(64), (6, 77), F32)
    mean = rmsnorm.mean_square(x)
    expected = rmsnorm.rms_norm_apply(x, mean)
    for layout in layouts.OUTPUT_LAYOUTS:
        placed = layouts.Placed(x, layout)
        spread = layouts.Placed(mean, "inner_stride_2").view
        rmsnorm.rms_norm_apply(placed.view, spread, out=placed.view)
        assert_same_bits(placed.view, expected)
        assert placed.untouched()


@pytest.mark.parametrize("n", [1, 2, 3, 10, 30, 100, 1000, 4097])
def test_partial_takes_the_ceiling(n):
    """rstd of 1, 1, 1, ... with a large value at position k - 1 and another at k tells k."""
    for partial in (1.0, 0.999, 0.5, 1 / 3, 0.3, 0.1, 0.0625, 1e-12):
        k = math.ceil(partial * n)
        x = np.arange(1, n + 1, dtype=F64)
        _, rstd = rmsnorm.rms_norm(x, eps=0.0, partial=partial, return_rstd=True)
        oracle.assert_within_budget(rstd[None], oracle.exact_rstd(x[None, :k], 0.0), 2.0)
    if n == 4097:
        x[-1] = np.nan
        assert np.isfinite(rmsnorm.rms_norm(x, partial=0.9)[:-1]).all()


def test_partial_of_one_is_the_full_norm():
    x = cases.values(np.random.default_rng(65), (6, 777), F32)
    assert_same_bits(rmsnorm.rms_norm(x, partial=1.0), rmsnorm.rms_norm(x))


def test_rstd_is_the_correctly_rounded_root_where_the_mean_square_is_exact():
    rng = np.random.default_rng(66)
    x = rng.integers(-500, 501, (400, 64)).astype(F32)
    for eps in (0.0, 0.5, 1e-6):
        _, rstd = rmsnorm.rms_norm(x, eps=eps, return_rstd=True)
        exact = oracle.exact_rstd(x, eps)
        # the double rounding through f64 moves a few by 2^-29 ulp beyond a half
        oracle.assert_within_budget(rstd, exact, 0.5 + 2.0**-27)
