"""Gradients of rmsnorm.jax: against long double, differences, and JAX's own of the formula."""

from functools import partial

import gradient_oracle
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import rmsnorm
import rmsnorm.jax
from floats import BF16, DTYPES, F16, F32, F64, assert_same_bits
from jax.test_util import check_grads
from jax_arrays import assert_close, formula, normal, sample, x64  # noqa: F401

OPTIONS = {
    "plain": {},
    "weight": {"weight": (6,)},
    "bias": {"weight": (6,), "bias": (6,)},
    "bias alone": {"bias": (6,)},
    "offset": {"weight": (6,), "weight_offset": 1.0},
    "before_weight": {"weight": (6,), "bias": (6,), "rounding": "before_weight"},
    "rstd": {"weight": (6,), "rounding": "rstd"},
    "large eps": {"weight": (6,), "eps": 3.0},
    "no eps": {"weight": (6,), "eps": 0.0},
    "two axes": {"weight": (4, 6), "bias": (4, 6), "axis": -2},
    "partial": {"partial": 0.4},
    "partial, two axes": {"weight": (4, 6), "bias": (1, 4, 6), "axis": 1, "partial": 0.4},
    "per sample": {"weight": (3, 1, 6), "bias": (3, 1, 6)},
    "per head": {"weight": (4, 6), "bias": (1, 6)},
}


def arranged(name):
    """The options without arrays, and weight and bias."""
    options = dict(OPTIONS[name])
    shapes = [options.pop("weight", None), options.pop("bias", None)]
    return options, [None if s is None else normal(s, i + 1) for i, s in enumerate(shapes)]


def check(norm, reference, arrays):
    """First derivatives by differences, and second ones against those that JAX derives."""
    leaves, structure = jax.tree.flatten(arrays)

    def flat(function):
        return jax.jit(lambda *leaves: function(*jax.tree.unflatten(structure, leaves)))

    check_grads(flat(norm), leaves, order=1, modes=["rev"])

    def second(function):
        def loss(*leaves):
            return sum(jnp.sum(y**3) for y in jax.tree.leaves(flat(function)(*leaves)))

        where = tuple(range(len(leaves)))
        first = jax.grad(loss, where)
        of_first = jax.grad(lambda *leaves: sum(jnp.sum(g**2) for g in first(*leaves)), where)
        return jax.jit(of_first)(*leaves)

    assert_close(second(norm), second(reference))


def added(x, residual, weight=None, bias=None, **options):
    return formula(x + residual, weight, bias, **options), x + residual


@pytest.mark.parametrize("name", OPTIONS)
def test_rms_norm(name):
    options, parameters = arranged(name)
    norm = partial(rmsnorm.jax.rms_norm, **options)
    options.pop("rounding", None)
    check(norm, partial(formula, **options), [normal((3, 4, 6)), *parameters])


@pytest.mark.parametrize("round_residual", [True, False])
@pytest.mark.parametrize("name", ["plain", "bias", "offset", "two axes", "per sample"])
def test_add_rms_norm(name, round_residual):
    options, parameters = arranged(name)
    norm = partial(rmsnorm.jax.add_rms_norm, round_residual=round_residual, **options)
    arrays = [normal((3, 4, 6)), normal((3, 4, 6), 9), *parameters]
    check(norm, partial(added, **options), arrays)


@pytest.mark.parametrize("which", [0, 1])
def test_one_result_of_add_rms_norm_alone(which):
    arrays = [normal((3, 6)), normal((3, 6), 1), normal(6, 2), normal(6, 3)]
    check(lambda *a: rmsnorm.jax.add_rms_norm(*a)[which], lambda *a: added(*a)[which], arrays)


def pulled_back(function, arrays, cotangents):
    return jax.jit(lambda: jax.vjp(function, *arrays)[1](cotangents))()


@pytest.mark.parametrize("weight_dtype", DTYPES, ids=str)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_within_the_budget_of_every_mix(dtype, weight_dtype):
    x, dy = sample((70, 2, 40), dtype), sample((70, 2, 40), dtype, 1)
    weight, bias = sample((2, 40), weight_dtype, 2), sample(40, weight_dtype, 3)
    norm = partial(rmsnorm.jax.rms_norm, weight_offset=1.0, rounding="before_weight")
    actual = pulled_back(norm, (x, weight, bias), dy)
    assert [g.dtype for g in actual] == [dtype, weight_dtype, weight_dtype]
    expected = gradient_oracle.gradients(
        dy, x, weight, weight_offset=1.0, bias_shape=(40,), results=[weight_dtype]
    )
    gradient_oracle.judge(expected, [np.asarray(g) for g in actual])


@pytest.mark.parametrize("round_residual", [True, False])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_the_same_bits_as_the_array_function(dtype, round_residual):
    x, residual, weight = sample((9, 40), dtype), sample((9, 40), dtype, 1), sample(40, F32, 2)
    dy, d_residual = sample((9, 40), dtype, 3), sample((9, 40), dtype, 4)
    norm = partial(rmsnorm.jax.add_rms_norm, round_residual=round_residual)
    dx, d_added, dweight = pulled_back(norm, (x, residual, weight), (dy, d_residual))
    _, total, rstd = rmsnorm.add_rms_norm(
        x, residual, weight, round_residual=round_residual, return_rstd=True
    )
    normed = (total, None) if round_residual else (x, residual)
    expected = rmsnorm.rms_norm_backward(
        dy, normed[0], weight, rstd, residual=normed[1], d_residual=d_residual
    )
    assert_same_bits(np.asarray(dx), expected[0])
    assert_same_bits(np.asarray(d_added), expected[0])
    assert_same_bits(np.asarray(dweight), expected[1])


def test_dtypes_of_residual_gradients():
    """Each summand has its own, however they mix."""
    for x_dtype, residual_dtype in ((BF16, F32), (F16, BF16), (F32, F64)):
        x, residual = sample((3, 40), x_dtype), sample((3, 40), residual_dtype, 1)

        @jax.jit
        def program(x, residual):
            y, _ = rmsnorm.jax.add_rms_norm(x, residual)
            return jnp.sum(y.astype(jnp.float32) ** 3)

        dx, d_added = jax.jit(jax.grad(program, (0, 1)))(x, residual)
        assert dx.dtype == x_dtype and d_added.dtype == residual_dtype
        wide = np.float64
        expected = jax.jit(jax.grad(cubed(formula)))(x.astype(wide) + residual.astype(wide))
        assert_close(dx, expected, 2e-2)
        assert_close(d_added, expected, 2e-2)


def second_derivatives(norm):
    """Of the squares of dweight, by x and by the weight."""

    def loss(x, weight):
        return jnp.sum(jnp.sin(norm(x, weight)))

    def norm_of_gradient(x, weight):
        return jnp.sum(jax.grad(loss, 1)(x, weight) ** 2)

    return jax.jit(jax.grad(norm_of_gradient, (0, 1)))


def test_rows_whose_squares_overflow():
    """In first and in second derivatives."""
    x, weight = normal((3, 40)), normal(40, 1)
    exact = second_derivatives(partial(formula, eps=0.0))(x, weight)
    for exponent in (-100, 100):
        scale = 2.0**exponent
        actual = second_derivatives(partial(rmsnorm.jax.rms_norm, eps=0.0))(
            (x * scale).astype(np.float32), weight.astype(np.float32)
        )
        dx, dweight = (np.asarray(a, np.float64) for a in actual)
        if exponent > 0:  # dx is as small as x is large
            assert_close(dx * scale, exact[0], 1e-4)
        assert_close(dweight, exact[1], 1e-4)


@pytest.mark.parametrize("eps", [0.0, 1e70, 1e76, 1e77, 1e78, 1e100, 1e300])
def test_rows_and_an_eps_near_the_limits_of_float(eps):
    """Derivatives by x are denormal then, or zero; those by the weight are not, where x is as large
    as the root of eps."""
    x, weight = 1e38 * normal((3, 40)).clip(-3, 3), normal(40, 1)
    _, exact = second_derivatives(partial(formula, eps=eps))(x, weight)
    dx, dweight = second_derivatives(partial(rmsnorm.jax.rms_norm, eps=eps))(
        x.astype(np.float32), weight.astype(np.float32)
    )
    assert (np.abs(dx) < 1e-30).all()
    tolerance = 1e-4 * np.abs(exact).max() + 1e-37
    np.testing.assert_allclose(np.asarray(dweight, np.float64), exact, rtol=0, atol=tolerance)


def test_rows_that_are_large_where_they_do_not_count():
    """The second derivatives of the others are as before."""
    x = normal((3, 40)) * np.where(np.arange(40) < 16, 1.0, 2.0**60)

    def program(norm):
        first = jax.grad(lambda x: jnp.sum(jnp.sin(norm(x, eps=0.0, partial=0.4)[:, :16])))
        return jax.jit(jax.grad(lambda x: jnp.sum(first(x)[:, :16] ** 2)))

    actual = program(rmsnorm.jax.rms_norm)(x.astype(np.float32) * np.float32(2.0**-40))
    expected = program(formula)(x)
    assert_close(np.asarray(actual[:, :16], np.float64) * 2.0**-120, expected[:, :16], 1e-4)


@pytest.mark.parametrize("round_residual", [True, False])
def test_without_implied_ranks_and_dtypes(round_residual):
    """What jax_numpy_rank_promotion and jax_numpy_dtype_promotion forbid is not needed."""
    x, residual, weight, bias = (
        normal(shape, seed).astype(dtype)
        for seed, (shape, dtype) in enumerate([((3, 6), BF16), ((3, 6), F32), (6, F16), (6, BF16)])
    )

    def second(*arrays):
        def loss(x, residual, weight, bias):
            options = {"weight_offset": 1.0, "round_residual": round_residual}
            y, total = rmsnorm.jax.add_rms_norm(x, residual, weight, bias, **options)
            y = rmsnorm.jax.rms_norm(total, weight) + y.astype(total.dtype)
            return jnp.mean(jnp.sin(y)) + jnp.mean(jnp.sin(total))

        first = jax.grad(loss, (0, 1, 2, 3))
        where = tuple(range(len(arrays)))
        of_first = jax.grad(lambda *a: sum(jnp.sum(g.astype(F32) ** 2) for g in first(*a)), where)
        return loss(*arrays), first(*arrays), of_first(*arrays)

    expected = jax.jit(second)(x, residual, weight, bias)
    jax.clear_caches()
    with jax.numpy_rank_promotion("raise"), jax.numpy_dtype_promotion("strict"):
        actual = second(*(jnp.asarray(a) for a in (x, residual, weight, bias)))
    assert_close(actual, expected, 2e-2)


def cubed(norm):
    return lambda *arrays: jnp.sum(norm(*arrays) ** 3)


@pytest.mark.parametrize("axes", [(0, None), (1, None), (2, None), (0, 0), (None, 0)], ids=str)
def test_vmap(axes):
    """Gradients of samples, and the gradient of a mapped function."""
    shape = {0: (4, 5, 6), 1: (5, 4, 6), 2: (5, 6, 4), None: (5, 6)}[axes[0]]
    x, weight = normal(shape), normal((4, 6) if axes[1] == 0 else (6,), 1)

    def of_samples(norm):
        return jax.jit(jax.vmap(jax.grad(cubed(norm), (0, 1)), axes))(x, weight)

    def of_mapped(norm):
        return jax.jit(jax.grad(cubed(jax.vmap(norm, axes)), (0, 1)))(x, weight)

    for program in (of_samples, of_mapped):
        assert_close(program(rmsnorm.jax.rms_norm), program(formula))


def test_jacobian_and_hessian():
    x, weight = normal((2, 6)), normal(6, 1)

    def jacobian(norm):
        return jax.jit(jax.jacrev(norm, (0, 1)))(x, weight)

    assert_close(jacobian(rmsnorm.jax.rms_norm), jacobian(formula))

    def hessian(norm):
        return jax.jit(jax.jacrev(jax.jacrev(cubed(norm), (0, 1)), (0, 1)))(x, weight)

    assert_close(hessian(rmsnorm.jax.rms_norm), hessian(formula))


def test_third_derivative():
    x = normal(6)

    def third(norm):
        first = jax.grad(cubed(norm))
        second = jax.grad(lambda x: jnp.sum(first(x) ** 2))
        return jax.jit(jax.grad(lambda x: jnp.sum(second(x) ** 2)))(x)

    assert_close(third(rmsnorm.jax.rms_norm), third(formula))


def test_forward_mode_is_refused():
    x = normal((2, 6))
    with pytest.raises(TypeError, match="forward-mode"):
        jax.jvp(rmsnorm.jax.rms_norm, (x,), (x,))
    with pytest.raises(TypeError, match="forward-mode"):
        jax.jacfwd(rmsnorm.jax.add_rms_norm)(x, x)


@pytest.mark.parametrize("policy", [None, jax.checkpoint_policies.dots_saveable])
def test_checkpoint(policy):
    x, weight = normal((4, 6)), normal(6, 1)

    def program(norm):
        def layers(x, weight):
            return jnp.sum(norm(jnp.tanh(norm(x, weight)), weight) ** 3)

        return jax.jit(jax.grad(jax.checkpoint(layers, policy=policy), (0, 1)))(x, weight)

    assert_close(program(rmsnorm.jax.rms_norm), program(formula))


def test_scan_over_layers():
    x, weights = normal((4, 6)), normal((3, 6), 1)

    def program(norm):
        def network(x, weights):
            def layer(state, weight):
                x, residual = state
                y, residual = norm(x, residual, weight)
                return (jnp.tanh(y), residual), None

            (y, residual), _ = jax.lax.scan(layer, (x, x), weights)
            return jnp.sum(y**3) + jnp.sum(residual**3)

        return jax.jit(jax.grad(network, (0, 1)))(x, weights)

    def add(x, residual, weight):
        return formula(x + residual, weight), x + residual

    assert_close(program(rmsnorm.jax.add_rms_norm), program(add))


def names_in(function, *arrays):
    return str(jax.make_jaxpr(function)(*arrays))


def test_gradients_that_nobody_wants_are_not_computed():
    x, weight, bias = normal((4, 6)), normal(6, 1), normal(6, 2)
    loss = cubed(rmsnorm.jax.rms_norm)
    assert "dweight dbias" in names_in(jax.grad(loss, (0, 1, 2)), x, weight, bias)
    only_x = names_in(jax.grad(loss), x, weight, bias)
    assert "dweight" not in only_x and "dbias" not in only_x and "'dx'" in only_x
    assert "rstd" not in names_in(loss, x, weight, bias)

    def of_sum(x, residual):
        return jnp.sum(rmsnorm.jax.add_rms_norm(x, residual, weight)[1] ** 3)

    assert "rmsnorm_backward" not in names_in(jax.grad(of_sum), x, x)

    def of_norm(x):
        return jnp.sum(rmsnorm.jax.add_rms_norm(x, x, weight)[0] ** 3)

    assert "'dy x weight rstd'" in names_in(jax.grad(of_norm), x)


@pytest.mark.parametrize("shape", [(0, 40), (3, 0), (2, 0, 40)], ids=str)
def test_empty(shape):
    x, weight = np.zeros(shape), np.ones(shape[-1])
    dx, dweight = jax.jit(jax.grad(cubed(rmsnorm.jax.rms_norm), (0, 1)))(x, weight)
    assert dx.shape == shape
    assert_same_bits(np.asarray(dweight), np.zeros(shape[-1]))


def test_independent_of_threads(thread_count):
    x, weight = sample((900, 700), F32), sample(700, F32, 1)
    program = jax.jit(jax.grad(cubed(rmsnorm.jax.rms_norm), (0, 1)))
    gradients = []
    for threads in (1, 2, 3):
        thread_count(threads)
        gradients.append(program(x, weight))
    for other in gradients[1:]:
        for a, b in zip(gradients[0], other):
            assert_same_bits(np.asarray(a), np.asarray(b))


def test_saved_for_the_backward_pass():
    """x (or the sum), weight and one number a row: no array of the size of x beyond that."""
    x, weight = sample((64, 1024), BF16), sample(1024, BF16, 1)
    _, pull_back = jax.vjp(rmsnorm.jax.rms_norm, x, weight)
    saved = sum(leaf.nbytes for leaf in jax.tree.leaves(pull_back))
    assert saved <= x.nbytes + weight.nbytes + 64 * 4
