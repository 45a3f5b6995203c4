"""Every formula, bit for bit, on the case grid; rstd judged apart by the oracle."""

import cases
import floats
import formulas
import layouts
import numpy as np
import oracle
import pytest
import rmsnorm
from floats import BF16, DTYPES, F16, F32, F64, assert_same_bits, compute_dtype

EPS = 1e-5


def broadcast_rows(parameter, case):
    """A weight or bias of the case, spread over the rows of a 2-D x."""
    if parameter is None:
        return None
    full = np.broadcast_to(parameter.view, case.shape)
    return full.reshape(-1, case.n)


@pytest.mark.parametrize("case", cases.grid(), ids=str)
def test_grid(case):
    arrays = cases.build(case)
    out = layouts.empty(case.shape, case.out, case.out_layout)
    before = [np.array(a.view) for a in (arrays.x, arrays.weight, arrays.bias) if a is not None]
    y, rstd = rmsnorm.rms_norm(
        arrays.x.view,
        None if arrays.weight is None else arrays.weight.view,
        None if arrays.bias is None else arrays.bias.view,
        out=out.view,
        eps=EPS,
        return_rstd=True,
        **case.options,
    )
    assert y is out.view
    assert rstd.dtype == compute_dtype(case.x, case.weight, case.bias, case.out)
    assert rstd.shape == case.leading_shape
    after = [a for a in (arrays.x, arrays.weight, arrays.bias) if a is not None]
    for placed, old in zip(after, before):
        assert_same_bits(placed.view, old, "an input was written:")
        assert placed.untouched()
    assert out.untouched(), "written outside of the output"

    x = np.array(arrays.x.view).reshape(-1, case.n)
    rows_rstd = rstd.reshape(-1)
    if len(x):
        exact = oracle.exact_rstd(x, EPS, case.partial)
        oracle.assert_rstd_within_budget(rows_rstd, exact, x.dtype, out.view.dtype, case.n)
    expected = formulas.contract(
        x,
        rows_rstd[:, None],
        broadcast_rows(arrays.weight, case),
        broadcast_rows(arrays.bias, case),
        rounding=case.rounding,
        weight_offset=case.weight_offset,
        out_dtype=case.out,
        dtype_t=case.x,
    )
    assert_same_bits(np.array(y).reshape(-1, case.n), expected)


def test_grid_covers_every_pair():
    grid = cases.grid()
    assert {(c.n, c.layout) for c in grid} == {
        (n, layout) for n in cases.LENGTHS for layout in layouts.LAYOUTS
    }
    assert len({(c.x, c.weight) for c in grid}) == 4 * 5
    assert len({(c.x, c.out) for c in grid}) == 4 * 4
    assert len({(c.rounding, c.bias) for c in grid}) == 3 * 5


NAMED = {
    "A": (formulas.formula_a, [(t, w) for t in DTYPES for w in (t, F32)]),
    "B": (formulas.formula_b, [(t, w) for t in DTYPES for w in (t, F32)]),
    "C": (formulas.formula_c, [(t, w) for t in DTYPES for w in (t, F32)]),
    "D": (formulas.formula_d, [(t, t) for t in DTYPES]),
    "D mixed": (formulas.formula_d, [(F16, F32), (BF16, F32)]),
    "E": (formulas.formula_e, [(t, w) for t in DTYPES for w in (None, t, F32)]),
    "F": (formulas.formula_f, [(t, None) for t in DTYPES]),
    "G": (formulas.formula_g, [(t, None) for t in DTYPES]),
    "M": (formulas.formula_m, [(t, w) for t in DTYPES for w in (None, t)]),
}


@pytest.mark.parametrize(
    "name, dtype, weight_dtype",
    [(name, t, w) for name, (_, mixes) in NAMED.items() for t, w in mixes],
    ids=lambda v: v if isinstance(v, str) else "none" if v is None else v.name,
)
@pytest.mark.parametrize("n", [128, 769])
def test_named_formula(name, dtype, weight_dtype, n):
    formula = NAMED[name][0]
    rng = np.random.default_rng(n)
    x = cases.values(rng, (9, n), dtype)
    weight = None
    if weight_dtype is not None:
        weight = cases.values(rng, n, weight_dtype)
    options = dict(formulas.OPTIONS[name])
    # an f32 weight on half x makes torch's product f32; the package keeps x's dtype unless asked
    if name in ("A", "M") and weight is not None:
        options["out_dtype"] = floats.promote(dtype, weight_dtype)
    y, rstd = rmsnorm.rms_norm(x, weight, eps=EPS, return_rstd=True, **options)
    rstd = rstd[:, None]
    assert_same_bits(y, formula(x, rstd) if weight is None else formula(x, rstd, weight))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("with_weight", [False, True])
def test_formula_m_with_bias(dtype, with_weight):
    rng = np.random.default_rng(5)
    x, weight, bias = (cases.values(rng, shape, dtype) for shape in ((9, 200), 200, 200))
    weight = weight if with_weight else None
    y, rstd = rmsnorm.rms_norm(x, weight, bias, rounding="before_weight", return_rstd=True)
    assert_same_bits(y, formulas.formula_m(x, rstd[:, None], weight, bias))


@pytest.mark.parametrize("dtype", [F16, BF16], ids=str)
def test_the_formulas_are_distinguished_by_these_inputs(dtype):
    """A, B, C, G on the same half inputs differ, so passing one for another would be seen."""
    rng = np.random.default_rng(6)
    x, weight = cases.values(rng, (9, 769), dtype), cases.values(rng, 769, dtype)
    results = [rmsnorm.rms_norm(x, weight, eps=EPS, **formulas.OPTIONS[name]) for name in "ABCG"]
    for i, a in enumerate(results):
        for b in results[:i]:
            assert (floats.bits(a) != floats.bits(b)).any()


def test_once_with_bias_is_one_fused_multiply_add():
    """x * rstd is rounded, then fma(x * rstd, w, b): a separate product would round differently."""
    rng = np.random.default_rng(7)
    for dtype in (F32, F64):
        x, weight = (rng.standard_normal(s).astype(dtype) for s in ((4, 1000), 1000))
        _, rstd = rmsnorm.rms_norm(x, weight, return_rstd=True)
        normed = x * rstd[:, None]
        bias = (-(normed * weight) * (1 + 1e-6)).astype(dtype)  # cancels, so the rounding shows
        y = rmsnorm.rms_norm(x, weight, bias)
        assert_same_bits(y, floats.fma(normed, np.broadcast_to(weight, x.shape), bias))
        assert (y != normed * weight + bias).mean() > 0.5


def test_f64_rounds_once_into_bf16_and_f32():
    """Through f32 first, a few results in a million would round twice; these are such values."""
    n = 64
    x = np.ones((1, n))
    tie = 1 + 2.0**-8  # between two bf16 numbers
    weight = np.full(n, tie + 2.0**-40)
    y = rmsnorm.rms_norm(x, weight, eps=0.0, out_dtype=BF16)
    np.testing.assert_array_equal(y.astype(F64), np.full((1, n), 1 + 2.0**-7))
