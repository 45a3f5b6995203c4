"""add_rms_norm: s = x + residual, stored once rounded, and the norm of the rounded or exact sum."""

import cases
import floats
import formulas
import layouts
import numpy as np
import oracle
import pytest
import rmsnorm
from floats import BF16, DTYPES, F16, F32, F64, assert_same_bits, cast, compute_dtype, promote

EPS = 1e-5
MIXES = [(x, r, w) for x in DTYPES for r in DTYPES for w in (None, x, F32)]


def operands(shape, *dtypes):
    rng = np.random.default_rng(50)
    return [None if d is None else cases.values(rng, s, d) for s, d in zip(shape, dtypes)]


def judge(x, residual, weight, bias, results, *, rounding, round_residual, weight_offset=0.0):
    """rstd by the oracle, the sum and y bit for bit."""
    y, total, rstd = results
    compute = compute_dtype(
        *(a.dtype for a in (x, residual, weight, bias, y, total) if a is not None)
    )
    exact_sum = x.astype(compute) + residual.astype(compute)
    assert_same_bits(total, cast(exact_sum, total.dtype), "residual_out:")
    normed = total if round_residual else exact_sum
    exact = oracle.exact_rstd(normed, EPS)
    oracle.assert_rstd_within_budget(rstd, exact, total.dtype, y.dtype, x.shape[-1])
    expected = formulas.contract(
        normed,
        rstd[:, None],
        weight,
        bias,
        rounding=rounding,
        weight_offset=weight_offset,
        out_dtype=y.dtype,
        dtype_t=total.dtype,
    )
    assert_same_bits(y, expected, "y:")


@pytest.mark.parametrize("round_residual", [True, False])
@pytest.mark.parametrize("rounding", cases.ROUNDINGS)
@pytest.mark.parametrize("x, residual, weight", MIXES, ids=str)
def test_dtypes(x, residual, weight, rounding, round_residual):
    for n in (64, 129):
        a, b, w = operands(((5, n), (5, n), n), x, residual, weight)
        results = rmsnorm.add_rms_norm(
            a, b, w, eps=EPS, rounding=rounding, round_residual=round_residual, return_rstd=True
        )
        assert results[0].dtype == x, "y has x's dtype"
        assert results[1].dtype == promote(x, residual)
        judge(a, b, w, None, results, rounding=rounding, round_residual=round_residual)


@pytest.mark.parametrize("round_residual", [True, False])
@pytest.mark.parametrize("total", DTYPES, ids=str)
@pytest.mark.parametrize("out", DTYPES, ids=str)
@pytest.mark.parametrize("layout", ["contiguous", "inner_stride_2", "reversed_rows"])
def test_given_outputs(out, total, round_residual, layout):
    a, b, w, bias = operands(((4, 70), (4, 70), 70, 70), BF16, F16, F32, BF16)
    y = layouts.empty(a.shape, out, layout)
    s = layouts.empty(a.shape, total, layout)
    results = rmsnorm.add_rms_norm(
        layouts.Placed(a, layout).view,
        layouts.Placed(b, layout).view,
        w,
        bias,
        eps=EPS,
        weight_offset=1.0,
        rounding="once",
        round_residual=round_residual,
        out=y.view,
        residual_out=s.view,
        return_rstd=True,
    )
    assert results[0] is y.view and results[1] is s.view
    assert y.untouched() and s.untouched()
    results = tuple(np.array(r) for r in results)
    judge(a, b, w, bias, results, rounding="once", round_residual=round_residual, weight_offset=1.0)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_rounded_equals_two_separate_steps(dtype):
    a, b, w = operands(((6, 333), (6, 333), 333), dtype, dtype, dtype)
    for rounding in cases.ROUNDINGS:
        y, total = rmsnorm.add_rms_norm(a, b, w, rounding=rounding)
        assert_same_bits(total, cast(a.astype(F64) + b.astype(F64), dtype))
        assert_same_bits(y, rmsnorm.rms_norm(total, w, rounding=rounding))


def test_unrounded_differs_from_rounded_on_halves():
    """Models want one or the other: vllm-project/vllm 52104, vllm-project/vllm-omni 6878."""
    a, b = operands(((6, 333), (6, 333)), BF16, BF16)
    rounded, unrounded = (
        rmsnorm.add_rms_norm(a, b, round_residual=flag)[0] for flag in (True, False)
    )
    assert (floats.bits(rounded) != floats.bits(unrounded)).any()
    # and the unrounded one is the nearest to the exact norm of the exact sum
    exact = oracle.exact_norm(a.astype(F32) + b.astype(F32))
    oracle.assert_within_budget(unrounded, exact)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("layout", layouts.OUTPUT_LAYOUTS)
@pytest.mark.parametrize(
    "out, residual_out",
    [("x", "residual"), ("residual", "x"), ("x", None), (None, "x"), (None, "residual")],
)
def test_in_place(dtype, layout, out, residual_out):
    a, b, w = operands(((5, 131), (5, 131), 131), dtype, dtype, dtype)
    expected_y, expected_total = rmsnorm.add_rms_norm(a, b, w)
    placed = {"x": layouts.Placed(a, layout), "residual": layouts.Placed(b, layout)}
    y, total = rmsnorm.add_rms_norm(
        placed["x"].view,
        placed["residual"].view,
        w,
        out=placed[out].view if out else None,
        residual_out=placed[residual_out].view if residual_out else None,
    )
    assert_same_bits(y, expected_y)
    assert_same_bits(total, expected_total)
    assert placed["x"].untouched() and placed["residual"].untouched()
    for name, original in (("x", a), ("residual", b)):
        if name not in (out, residual_out):
            assert_same_bits(placed[name].view, original, name)


def test_the_same_array_twice():
    (a,) = operands(((5, 99),), F32)
    y, total = rmsnorm.add_rms_norm(a, a)
    assert_same_bits(total, a + a)
    assert_same_bits(y, rmsnorm.rms_norm(a + a))


def test_a_sum_that_overflows_only_when_it_is_rounded():
    a = np.full((1, 32), 60000, np.float16)
    y, total = rmsnorm.add_rms_norm(a, a, eps=0.0, round_residual=False)
    assert np.isinf(total).all()
    np.testing.assert_array_equal(y, np.ones((1, 32)))
    y, _ = rmsnorm.add_rms_norm(a, a, eps=0.0, round_residual=True)
    assert np.isnan(y).all()


def test_sums_whose_squares_overflow():
    for dtype, scale in ((F32, 1e35), (F64, 1e300), (BF16, 1e35), (F32, 1e-40), (F64, 1e-310)):
        a, b = (cast(v.astype(F64) * scale, dtype) for v in operands(((4, 65), (4, 65)), F64, F64))
        y, total = rmsnorm.add_rms_norm(a, b, eps=0.0)
        oracle.assert_within_budget(y, oracle.exact_norm(total, eps=0.0))


@pytest.mark.parametrize("lead", [(4,), (3, 1), (3, 4)])
def test_weight_and_bias_per_head_and_sample(lead):
    a, b, w, bias = operands(((3, 4, 40), (3, 4, 40), (*lead, 40), (*lead, 40)), *[F32] * 4)
    y, total = rmsnorm.add_rms_norm(a, b, w, bias)
    assert_same_bits(y, rmsnorm.rms_norm(total, w, bias))
    assert_same_bits(total, a + b)


def test_no_rows():
    y, total, rstd = rmsnorm.add_rms_norm(
        np.zeros((2, 0, 8), F16), np.zeros((2, 0, 8), F32), return_rstd=True
    )
    assert y.shape == total.shape == (2, 0, 8) and rstd.shape == (2, 0)
    assert (y.dtype, total.dtype, rstd.dtype) == (F16, F32, F32)
