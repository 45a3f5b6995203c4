"""rms_norm_backward: every dtype, option and layout against long double, and against differences of
the forward functions themselves."""

import cases
import gradient_oracle
import jax
import jax.numpy as jnp
import layouts
import numpy as np
import pytest
import rmsnorm
import torch
from floats import BF16, DTYPES, F16, F32, F64, assert_same_bits, cast
from layouts import LAYOUTS, OUTPUT_LAYOUTS, Placed

EPS = 1e-5


def sample(shape, dtype, seed=0):
    return cases.values(np.random.default_rng([seed, *np.shape(shape)]), shape, dtype)


def judged(dy, x, weight=None, *, has_bias=False, dtypes=(), **options):
    """The call, its results held against the oracle."""
    options.setdefault("eps", EPS)
    results = rmsnorm.rms_norm_backward(dy, x, weight, has_bias=has_bias, **options)
    known = {k: v for k, v in options.items() if k not in ("rounding", "rstd")}
    bias_shape = x.shape[known.get("axis", -1) :] if has_bias else None
    written = [r.dtype for r in results[:3] if r is not None]
    expected = gradient_oracle.gradients(
        dy, x, weight, results=written, bias_shape=bias_shape, **known
    )
    gradient_oracle.judge(expected, results)
    return results


@pytest.mark.parametrize("dy", DTYPES, ids=str)
@pytest.mark.parametrize("x", DTYPES, ids=str)
@pytest.mark.parametrize("weight", [None, *DTYPES], ids=str)
def test_dtypes(dy, x, weight):
    for rows, n in ((1, 8), (5, 33), (150, 64)):
        w = None if weight is None else sample(n, weight, 1)
        dx, dweight, dbias = judged(
            sample((rows, n), dy), sample((rows, n), x, 2), w, has_bias=True
        )
        assert dx.dtype == x
        assert dbias.dtype == (x if weight is None else weight) and dbias.shape == (n,)
        assert dweight is None if weight is None else dweight.dtype == weight


OPTIONS = {
    "plain": {},
    "offset": {"weight_offset": 1.0},
    "partial": {"partial": 0.3},
    "no eps": {"eps": 0.0},
    "large eps": {"eps": 10.0},
}


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("name", OPTIONS)
@pytest.mark.parametrize("with_residual", [False, True])
@pytest.mark.parametrize("with_d_residual", [False, True])
def test_options(dtype, name, with_residual, with_d_residual):
    for rows, n in ((3, 40), (40, 257)):
        shape = (rows, n)
        options = dict(OPTIONS[name])
        if with_residual:
            options["residual"] = sample(shape, dtype, 3)
        if with_d_residual:
            options["d_residual"] = sample(shape, dtype, 4)
        weight = sample(n, F32, 1)
        judged(sample(shape, dtype), sample(shape, dtype, 2), weight, has_bias=True, **options)


@pytest.mark.parametrize("statistics", [F32, F64], ids=str)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_given_mean_square(dtype, statistics):
    x, dy, weight = sample((6, 100), dtype), sample((6, 100), dtype, 1), sample(100, dtype, 2)
    mean_square = np.random.default_rng(3).uniform(0.5, 2, 6).astype(statistics)
    results = judged(dy, x, weight, has_bias=True, mean_square=mean_square)
    assert results[3].dtype == statistics


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_the_rstd_of_forward_is_the_one_computed(dtype):
    """Between equal dtypes forward and backward sum in one order."""
    x, dy, weight = sample((9, 257), dtype), sample((9, 257), dtype, 1), sample(257, dtype, 2)
    _, rstd = rmsnorm.rms_norm(x, weight, eps=EPS, return_rstd=True)
    given = rmsnorm.rms_norm_backward(dy, x, weight, rstd, eps=EPS)
    computed = rmsnorm.rms_norm_backward(dy, x, weight, eps=EPS)
    for a, b in zip(given[:2], computed[:2]):
        assert_same_bits(a, b)
    # and a given one is used
    doubled = rmsnorm.rms_norm_backward(dy, x, weight, rstd * 2, eps=EPS)
    assert_same_bits(doubled[1], cast(computed[1].astype(F64) * 2, dtype))


@pytest.mark.parametrize("rounding", cases.ROUNDINGS)
def test_gradients_pass_through_roundings(rounding):
    x, dy, weight = sample((5, 64), BF16), sample((5, 64), BF16, 1), sample(64, BF16, 2)
    expected = rmsnorm.rms_norm_backward(dy, x, weight)
    for a, b in zip(expected[:2], rmsnorm.rms_norm_backward(dy, x, weight, rounding=rounding)[:2]):
        assert_same_bits(a, b)


def test_the_options_of_a_variant_can_be_passed_on():
    x, dy, weight = sample((5, 64), F32), sample((5, 64), F32, 1), sample(64, F32, 2)
    for name in ("llama", "gemma2", "olmo2"):
        judged(dy, x, weight, **rmsnorm.variant(name))


@pytest.mark.parametrize("lead", [(), (1,), (4,), (3, 1), (1, 4), (3, 4), (1, 1)])
@pytest.mark.parametrize("axis", [-1, -2])
def test_broadcast_weights_get_gradients_of_their_shape(lead, axis):
    row = (40,) if axis == -1 else (5, 8)
    x, dy = sample((3, 4, *row), F32), sample((3, 4, *row), F32, 1)
    weight = sample((*lead, *row), F32, 2)
    dbias = np.full((*lead, *row), np.nan, F32)
    results = rmsnorm.rms_norm_backward(dy, x, weight, eps=EPS, axis=axis, dbias_out=dbias)
    assert results[1].shape == weight.shape and results[2] is dbias
    expected = gradient_oracle.gradients(
        dy, x, weight, results=[F32], eps=EPS, axis=axis, bias_shape=dbias.shape
    )
    gradient_oracle.judge(expected, results)


@pytest.mark.parametrize("axis", [0, 1, -3, -2, -1])
def test_axis(axis):
    x, dy = sample((3, 4, 7), F32), sample((3, 4, 7), F32, 1)
    weight = sample(x.shape[axis:], F32, 2)
    judged(dy, x, weight, axis=axis, has_bias=True)


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("dtype", [BF16, F32], ids=str)
def test_input_layouts(layout, dtype):
    for n in (1, 7, 64, 257):
        names = ("dy", "x", "residual", "d_residual")
        arrays = {name: sample((5, n), dtype, seed) for seed, name in enumerate(names)}
        if layout == "broadcast_rows":
            arrays = {k: np.repeat(v[:1], 5, axis=0) for k, v in arrays.items()}
        weight = sample(n, F32, 9)
        expected = rmsnorm.rms_norm_backward(weight=weight, has_bias=True, **arrays)
        placed = {k: Placed(v, layout).view for k, v in arrays.items()}
        for name in names:
            mixed = {**arrays, name: placed[name]}
            actual = rmsnorm.rms_norm_backward(weight=weight, has_bias=True, **mixed)
            for a, b in zip(actual, expected):
                assert_same_bits(a, b, name)
        if layout != "broadcast_rows":
            weight = Placed(weight, layout).view
        actual = rmsnorm.rms_norm_backward(weight=weight, has_bias=True, **placed)
        for a, b in zip(actual, expected):
            assert_same_bits(a, b)


@pytest.mark.parametrize("layout", OUTPUT_LAYOUTS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_given_outputs(layout, dtype):
    x, dy, weight = sample((5, 70), F32), sample((5, 70), F32, 1), sample((5, 70), F32, 2)
    outs = {
        name: layouts.empty(x.shape, dtype, layout)
        for name in ("dx_out", "dweight_out", "dbias_out")
    }
    views = {name: out.view for name, out in outs.items()}
    results = rmsnorm.rms_norm_backward(dy, x, weight, eps=EPS, **views)
    assert all(a is b for a, b in zip(results, views.values()))
    assert all(out.untouched() for out in outs.values())
    expected = gradient_oracle.gradients(
        dy, x, weight, results=[dtype], eps=EPS, bias_shape=x.shape
    )
    gradient_oracle.judge(expected, tuple(np.array(r) for r in results))


@pytest.mark.parametrize("target", ["dy", "x", "residual", "d_residual"])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("layout", ["contiguous", "reversed_rows", "inner_stride_2"])
def test_dx_in_place(target, dtype, layout):
    for rows, n in ((3, 257), (200, 64)):
        names = ("dy", "x", "residual", "d_residual")
        arrays = {name: sample((rows, n), dtype, seed) for seed, name in enumerate(names)}
        weight = sample(n, dtype, 9)
        expected = rmsnorm.rms_norm_backward(weight=weight, has_bias=True, **arrays)
        placed = Placed(arrays[target], layout)
        given = {**arrays, target: placed.view}
        results = rmsnorm.rms_norm_backward(
            weight=weight, has_bias=True, dx_out=placed.view, **given
        )
        assert results[0] is placed.view and placed.untouched()
        for a, b in zip(results, expected):
            assert_same_bits(np.array(a), b)


def test_gradients_that_are_not_needed():
    x, dy, weight = sample((5, 64), F32), sample((5, 64), F32, 1), sample(64, F32, 2)
    dx, dweight, dbias = rmsnorm.rms_norm_backward(dy, x, weight, needs_dweight=False)
    assert dweight is None and dbias is None
    assert_same_bits(dx, rmsnorm.rms_norm_backward(dy, x, weight, has_bias=True)[0])


@pytest.mark.parametrize("shape", [(0, 8), (2, 0, 8), (3, 0)])
def test_sums_over_nothing_are_zero(shape):
    weight, dbias = np.ones(shape[-1], F32), np.full(shape[-1], 7, F32)
    dx, dweight, dbias = rmsnorm.rms_norm_backward(
        np.zeros(shape, F32), np.zeros(shape, F32), weight, dbias_out=dbias
    )
    assert dx.shape == shape
    assert_same_bits(dweight, np.zeros(shape[-1], F32))
    assert_same_bits(dbias, np.zeros(shape[-1], F32))


def test_more_dimensions_than_the_library_has():
    shape = (2, 1, 2, 1, 2, 1, 2, 3, 2, 4)
    weight_shape = (2, 1, 1, 1, 2, 3, 1, 4)
    x, dy = sample(shape, F32), sample(shape, F32, 1)
    weight, dbias = sample(weight_shape, F32, 2), np.empty((3, 2, 4), F32)
    results = rmsnorm.rms_norm_backward(dy, x, weight, eps=EPS, dbias_out=dbias)
    expected = gradient_oracle.gradients(
        dy, x, weight, results=[F32], eps=EPS, bias_shape=dbias.shape
    )
    gradient_oracle.judge(expected, results)


# Differences of the forward functions: what is differentiated is what is computed.


def differences(function, array, direction):
    step = 1e-6
    upper, lower = (function(array + sign * step * direction) for sign in (1, -1))
    return (upper - lower) / (2 * step)


def assert_derivatives(function, arrays, gradients):
    """function(**arrays) is a number; a gradient times a direction is its derivative there."""
    rng = np.random.default_rng(40)
    for name, gradient in gradients.items():
        for _ in range(3):
            direction = rng.standard_normal(arrays[name].shape)
            found = differences(
                lambda value, name=name: function(**{**arrays, name: value}),
                arrays[name],
                direction,
            )
            expected = float(np.sum(gradient * direction))
            assert abs(found - expected) <= 1e-7 * (abs(expected) + 1), name


@pytest.mark.parametrize("name", OPTIONS)
@pytest.mark.parametrize("axis", [-1, -2])
@pytest.mark.parametrize("broadcast", [False, True])
def test_differences_of_rms_norm(name, axis, broadcast):
    rng = np.random.default_rng(41)
    shape = (3, 4, 6)
    row = shape[axis:]
    of_weight = (shape[0], *(1,) * (2 - len(row)), *row) if broadcast else row
    arrays = {
        "x": rng.standard_normal(shape),
        "weight": rng.standard_normal(of_weight),
        "bias": rng.standard_normal(of_weight),
    }
    dy = rng.standard_normal(shape)
    options = {"axis": axis, **OPTIONS[name]}
    dx, dweight, dbias = rmsnorm.rms_norm_backward(
        dy, arrays["x"], arrays["weight"], dbias_out=np.empty(of_weight), **options
    )
    assert_derivatives(
        lambda x, weight, bias: np.sum(dy * rmsnorm.rms_norm(x, weight, bias, **options)),
        arrays,
        {"x": dx, "weight": dweight, "bias": dbias},
    )


@pytest.mark.parametrize("round_residual", [True, False])
@pytest.mark.parametrize("weight_offset", [0.0, 1.0])
def test_differences_of_add_rms_norm(round_residual, weight_offset):
    rng = np.random.default_rng(42)
    arrays = {name: rng.standard_normal((4, 6)) for name in ("x", "residual")}
    arrays["weight"] = rng.standard_normal(6)
    dy, d_residual = rng.standard_normal((4, 6)), rng.standard_normal((4, 6))
    options = {"weight_offset": weight_offset, "eps": EPS}

    def objective(x, residual, weight):
        y, total = rmsnorm.add_rms_norm(
            x, residual, weight, round_residual=round_residual, **options
        )
        return np.sum(dy * y) + np.sum(d_residual * total)

    if round_residual:
        inputs = {"x": arrays["x"] + arrays["residual"]}
    else:
        inputs = {"x": arrays["x"], "residual": arrays["residual"]}
    dx, dweight, _ = rmsnorm.rms_norm_backward(
        dy, weight=arrays["weight"], d_residual=d_residual, **inputs, **options
    )
    assert_derivatives(objective, arrays, {"x": dx, "residual": dx, "weight": dweight})


def test_differences_of_rms_norm_apply():
    rng = np.random.default_rng(43)
    arrays = {
        "x": rng.standard_normal((4, 6)),
        "mean_square": rng.uniform(0.5, 2, 4),
        "weight": rng.standard_normal(6),
    }
    dy = rng.standard_normal((4, 6))
    dx, dweight, _, d_mean_square = rmsnorm.rms_norm_backward(
        dy, arrays["x"], arrays["weight"], mean_square=arrays["mean_square"]
    )
    assert_derivatives(
        lambda **a: np.sum(dy * rmsnorm.rms_norm_apply(**a)),
        arrays,
        {"x": dx, "mean_square": d_mean_square, "weight": dweight},
    )


# Frameworks and threads.


@pytest.mark.parametrize("dtype", [F16, BF16, F32], ids=str)
def test_frameworks(dtype):
    arrays = {
        "dy": sample((7, 40), dtype),
        "x": sample((7, 40), dtype, 1),
        "weight": sample(40, dtype, 2),
        "d_residual": sample((7, 40), dtype, 3),
    }
    expected = rmsnorm.rms_norm_backward(has_bias=True, **arrays)
    by_jax = rmsnorm.rms_norm_backward(
        has_bias=True, **{k: jnp.asarray(v) for k, v in arrays.items()}
    )
    assert all(isinstance(r, jax.Array) for r in by_jax)
    for a, b in zip(by_jax, expected):
        assert_same_bits(np.asarray(a), b)

    def to_torch(array):
        bits = torch.from_numpy(array.view(np.int16 if dtype.itemsize == 2 else np.int32))
        return bits.view(getattr(torch, dtype.name))

    tensors = {k: to_torch(v) for k, v in arrays.items()}
    by_torch = rmsnorm.rms_norm_backward(has_bias=True, **tensors)
    for a, b in zip(by_torch, expected):
        assert type(a) is torch.Tensor
        assert torch.equal(a, to_torch(b))
    out = tensors["dy"]
    assert rmsnorm.rms_norm_backward(**tensors, dx_out=out)[0] is out
    assert out._version == 1 and torch.equal(out, by_torch[0])


@pytest.mark.parametrize("dtype", [BF16, F32, F64], ids=str)
@pytest.mark.parametrize("shape", [(1031, 515), (3, 400, 515), (7, 65537)])
def test_thread_counts(dtype, shape, thread_count):
    x, dy = sample(shape, dtype), sample(shape, dtype, 1)
    weight = sample((shape[0], 1, shape[-1]) if len(shape) == 3 else shape[-1], F32, 2)
    results = []
    for threads in (1, 2, 3):
        thread_count(threads)
        results.append(rmsnorm.rms_norm_backward(dy, x, weight, has_bias=True))
    for result in results[1:]:
        for a, b in zip(result, results[0]):
            assert_same_bits(a, b)


def test_rows_of_any_magnitude():
    """Rows that are computed on scaled values, beside others that are not."""
    rng = np.random.default_rng(44)
    scales = np.ldexp(1.0, rng.choice([-100, -80, -40, 0, 40, 64, 100], 48)).astype(F32)
    x = rng.uniform(0.5, 1, (48, 70)).astype(F32) * scales[:, None]
    dy, weight = sample((48, 70), F32), sample(70, F32, 1)
    dx, dweight, _ = rmsnorm.rms_norm_backward(dy, x, weight, eps=0.0)
    plain = rmsnorm.rms_norm_backward(dy, x / scales[:, None], weight, eps=0.0)
    with np.errstate(over="ignore", under="ignore"):
        assert_same_bits(dx, plain[0] / scales[:, None])
    np.testing.assert_allclose(dweight, plain[1], rtol=1e-5, atol=1e-4)
