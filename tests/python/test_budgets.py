"""Distance from exact arithmetic, n up to 2^20: what include/rmsnorm/bounds.hpp promises."""

import cases
import floats
import numpy as np
import oracle
import pytest
import rmsnorm
from floats import BF16, DTYPES, F16, F32, F64
from hypothesis import given, settings
from hypothesis import strategies as st


def check(x, weight=None, bias=None, out_dtype=None, message="", **options):
    y = rmsnorm.rms_norm(x, weight, bias, out_dtype=out_dtype, **options)
    exact = oracle.exact_norm(x, weight, bias, **options)
    tensors = [t.dtype for t in (x, weight, bias, y) if t is not None]
    budget = oracle.error_bound(
        y.dtype, floats.compute_dtype(*tensors), rounded_weight=options.get("weight_offset", 0) != 0
    )
    oracle.assert_within_budget(y, exact, budget, message)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("n", cases.LENGTHS)
def test_lengths(dtype, n):
    """The rows have outliers, as in tenstorrent/tt-metal 49600, and an offset that is added to the
    weight in float: vllm-project/vllm 29810 and linkedin/Liger-Kernel 1462 rounded the sum to bf16.
    """
    rng = np.random.default_rng(n)
    rows = 3 if n > 5000 else 30
    x, weight = cases.values(rng, (rows, n), dtype), cases.values(rng, n, dtype)
    check(x, weight)
    check(x, weight, weight_offset=1.0, eps=1e-3)


@pytest.mark.parametrize("x, weight, out", cases.COMMON_DTYPES, ids=str)
def test_mixed_dtypes(x, weight, out):
    """Reported for ranks above 2 of sgl-project/sglang 32807, and of Dao-AILab/quack 12."""
    rng = np.random.default_rng(11)
    rows, w = cases.values(rng, (40, 1000), x), cases.values(rng, 1000, weight)
    check(rows, w, out_dtype=out, eps=1e-5)
    expected = rmsnorm.rms_norm(rows, w, out_dtype=out)
    for shape in ((8, 5, 1000), (2, 4, 5, 1000)):
        y = rmsnorm.rms_norm(rows.reshape(shape), w, out_dtype=out)
        floats.assert_same_bits(y.reshape(expected.shape), expected)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("n", [2**18 + 3, 2**20])
def test_long_rows(dtype, n):
    rng = np.random.default_rng(n)
    check(cases.values(rng, (1, n), dtype))
    check(floats.cast(rng.random((1, n)) + 0.5, dtype))  # no sign, no spread: errors do not average


def drift_of_serial_sum(constants, terms):
    """How far `terms` f32 additions of c^2, one after the other, end from the truth, relatively."""
    squares = constants.astype(F64) ** 2
    total = np.zeros_like(constants)
    for _ in range(terms):
        total = floats.fma(constants, constants, total)
    return total.astype(F64) / (squares * terms) - 1


@pytest.mark.parametrize("terms", [8, 16, 31, 32, 64])
@pytest.mark.parametrize("n", [256, 1024, 4096, 70000])
def test_constant_rows_f32(n, terms):
    """Equal terms are the worst rows for a sum: every addition of a binade rounds the same way.

    The constants are those, of many, on which a chain of `terms` f32 additions drifts farthest.
    """
    rng = np.random.default_rng(n + terms)
    candidates = (1 + rng.random(20000)).astype(F32)
    drift = drift_of_serial_sum(candidates, terms)
    order = np.argsort(drift)
    count = 8 if n > 5000 else 24
    worst = candidates[np.concatenate([order[:count], order[-count:]])]
    weight = (1 + rng.random(n)).astype(F32)
    x = np.repeat(worst[:, None], n, axis=1)
    check(x, weight, eps=0.0, message=f"constants near {worst[0]!r}:")
    _, rstd = rmsnorm.rms_norm(x, eps=0.0, return_rstd=True)
    oracle.assert_rstd_within_budget(rstd, oracle.exact_rstd(x, 0.0), x.dtype, x.dtype, n)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("n", [33, 1000, 1024, 33333, 2**20])
def test_constant_rows(dtype, n):
    """rstd is in float also for halves: pytorch/helion 2273 kept it for backward in bf16."""
    rng = np.random.default_rng(n)
    count = max(2, min(200, 2**18 // n))
    constants = floats.cast(np.ldexp(1 + rng.random(count), rng.integers(-8, 8, count)), dtype)
    x = np.repeat(constants[:, None], n, axis=1)
    weight = cases.values(rng, n, dtype)
    check(x, weight, eps=0.0)
    _, rstd = rmsnorm.rms_norm(x, eps=0.0, return_rstd=True)
    oracle.assert_rstd_within_budget(rstd, oracle.exact_rstd(x, 0.0), x.dtype, x.dtype, n)


@pytest.mark.parametrize("dtype", [F32, F64], ids=str)
def test_alternating_and_decaying_rows(dtype):
    """Rows whose squares span the precision of the sum: small terms must not be lost one by one."""
    n = 8192
    i = np.arange(n)
    tiny = 2.0 ** (-floats.PRECISION[dtype] / 2)
    rows = np.stack(
        [
            np.where(i == 0, 1.0, tiny),  # each small square is half an ulp of the first
            np.where(i % 32 == 0, 1.0, tiny),
            np.where(i < 32, 1.0, 0.9 * tiny),
            np.ldexp(1.0, -(i // 200)),
            np.where(i == n - 1, 1.0, tiny * 1.01),
        ]
    ).astype(dtype)
    check(rows, eps=0.0)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_partial_statistics(dtype):
    rng = np.random.default_rng(12)
    x, weight = cases.values(rng, (20, 1000), dtype), cases.values(rng, 1000, dtype)
    for partial in (0.0625, 0.333, 0.5, 1e-9):
        check(x, weight, partial=partial)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_bias_that_does_not_cancel(dtype):
    rng = np.random.default_rng(13)
    x, weight = (np.abs(cases.values(rng, (20, 500), dtype)), np.abs(cases.values(rng, 500, dtype)))
    bias = np.abs(cases.values(rng, 500, dtype))
    check(x, weight, bias)


@settings(max_examples=150)
@given(
    n=st.integers(1, 300),
    rows=st.integers(1, 4),
    dtype=st.sampled_from(DTYPES),
    spread=st.integers(0, 8),
    eps=st.sampled_from([0.0, 1e-12, 1e-6, 1e-5, 1.0]),
    offset=st.sampled_from([0.0, 0.5, 1.0]),
    partial=st.floats(0.01, 1.0),
    seed=st.integers(0, 2**32 - 1),
)
def test_any_row(n, rows, dtype, spread, eps, offset, partial, seed):
    rng = np.random.default_rng(seed)
    scale = 2.0 ** rng.integers(-spread, spread + 1, (rows, n))
    x = floats.cast(rng.standard_normal((rows, n)) * scale, dtype)
    x = np.where(x == 0, np.ones((), dtype), x)
    weight = np.abs(cases.values(rng, n, dtype))
    check(x, weight, eps=eps, weight_offset=offset, partial=partial)


def test_other_dtypes_of_the_result():
    """Each of the four result dtypes, rounded once from the compute type."""
    rng = np.random.default_rng(14)
    for x_dtype in DTYPES:
        x = cases.values(rng, (10, 300), x_dtype)
        for out_dtype in (F16, BF16, F32, F64):
            assert rmsnorm.rms_norm(x, out_dtype=out_dtype).dtype == out_dtype
            check(x, out_dtype=out_dtype)
