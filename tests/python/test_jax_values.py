"""rmsnorm.jax computes what the array functions do, bit for bit, however JAX calls it."""

import os
import subprocess
import sys

import cases
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import rmsnorm
import rmsnorm.jax
from floats import BF16, DTYPES, F16, F32, F64, assert_same_bits, promote
from jax_arrays import sample, x64  # noqa: F401


def assert_same(actual, expected):
    assert isinstance(actual, jax.Array)
    assert_same_bits(np.asarray(actual), expected)


# Each case is a program to compile, so that a part of the grid must do.
@pytest.mark.parametrize("case", cases.grid()[::4], ids=str)
def test_grid(case):
    arrays = cases.build(case)
    x, *parameters = (
        None if a is None else np.ascontiguousarray(a.view)
        for a in (arrays.x, arrays.weight, arrays.bias)
    )
    options = {"eps": 1e-5, "out_dtype": case.out, **case.options}
    assert_same(
        rmsnorm.jax.rms_norm(x, *parameters, **options),
        rmsnorm.rms_norm(x, *parameters, **options),
    )


@pytest.mark.parametrize("round_residual", [True, False])
@pytest.mark.parametrize("rounding", cases.ROUNDINGS)
@pytest.mark.parametrize(
    "x_dtype, residual_dtype",
    [(F32, F32), (BF16, BF16), (BF16, F16), (F16, F32), (F64, F32)],
    ids=str,
)
def test_add(x_dtype, residual_dtype, rounding, round_residual):
    x, residual = sample((3, 5, 40), x_dtype), sample((3, 5, 40), residual_dtype, 1)
    weight, bias = sample(40, x_dtype, 2), sample((5, 40), F32, 3)
    options = {"rounding": rounding, "round_residual": round_residual, "weight_offset": 1.0}
    actual = jax.jit(lambda *a: rmsnorm.jax.add_rms_norm(*a, **options))(x, residual, weight, bias)
    expected = rmsnorm.add_rms_norm(x, residual, weight, bias, **options)
    for a, e in zip(actual, expected):
        assert_same(a, e)
    assert actual[1].dtype == promote(x_dtype, residual_dtype)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("rows", [40, 1500])
def test_under_jit(dtype, rows):
    """Rows for one thread and for several, of arrays that the program made."""
    x, weight = sample((rows, 1000), dtype), sample(1000, dtype, 1)

    @jax.jit
    def program(x, weight):
        return rmsnorm.jax.rms_norm(x[::-1] * 2, weight, axis=1)[::-1]

    assert_same(program(x, weight), rmsnorm.rms_norm(x * np.asarray(2, dtype), weight))


@pytest.mark.parametrize("threads", [1, 2, 3])
def test_threads(threads, thread_count):
    thread_count(threads)
    x = sample((777, 1025), F32)
    expected = rmsnorm.rms_norm(x)
    for _ in range(10):
        assert_same(rmsnorm.jax.rms_norm(x), expected)


def test_calls_at_once():
    """Many large calls in one program: XLA runs them on the threads that their parts run on."""
    xs = [sample((300, 1000 + i), F32, i) for i in range(8)]

    @jax.jit
    def program(xs):
        return [rmsnorm.jax.rms_norm(x) for x in xs]

    for _ in range(5):
        for y, x in zip(program(xs), xs):
            assert_same(y, rmsnorm.rms_norm(x))


@pytest.mark.parametrize("x_axis", [0, 1, 2, None])
@pytest.mark.parametrize("weight_axis", [0, 1, None])
def test_vmap(x_axis, weight_axis):
    if x_axis is None and weight_axis is None:
        pytest.skip("maps over nothing")
    x, weight = sample((4, 6, 40)), sample((4, 40), F32, 1)
    given_x = x[0] if x_axis is None else np.moveaxis(x, 0, x_axis)
    given_weight = weight[0] if weight_axis is None else np.moveaxis(weight, 0, weight_axis)
    actual = jax.vmap(rmsnorm.jax.rms_norm, (x_axis, weight_axis))(given_x, given_weight)
    x = np.stack([x[0]] * 4) if x_axis is None else x
    expected = rmsnorm.rms_norm(x, weight[0] if weight_axis is None else weight[:, None])
    assert_same(actual, expected)


def test_nested_vmap():
    x, weight, bias = sample((2, 3, 5, 40)), sample((3, 40), F32, 1), sample((2, 5, 40), F32, 2)
    mapped = jax.vmap(jax.vmap(rmsnorm.jax.rms_norm, (0, 0, None)), (0, None, 0))
    expected = rmsnorm.rms_norm(x, weight[:, None], bias[:, None])
    assert_same(jax.jit(mapped)(x, weight, bias), expected)


def test_vmap_copies_no_argument():
    """What is not mapped over is not repeated in memory."""

    def program(x, weights):
        return jax.vmap(rmsnorm.jax.rms_norm, (None, 0))(x, weights)

    x, weights = sample((64, 40)), sample((8, 40), F32, 1)
    compiled = jax.jit(program).lower(x, weights).compile()
    assert compiled.memory_analysis().temp_size_in_bytes < x.nbytes
    assert_same(compiled(x, weights), rmsnorm.rms_norm(np.stack([x] * 8), weights[:, None]))


def test_more_dimensions_than_the_library_takes():
    x = sample((2, 1, 2, 1, 2, 3, 1, 2, 2, 8))
    weight = sample((3, 1, 2, 1, 8), F32, 1)
    expected = rmsnorm.rms_norm(x, weight)
    assert_same(rmsnorm.jax.rms_norm(x, weight), expected)
    assert_same(jax.vmap(jax.vmap(rmsnorm.jax.rms_norm, (0, None)), (0, None))(x, weight), expected)


@pytest.mark.parametrize("shape", [(0, 40), (3, 0), (0, 0), (2, 0, 40)], ids=str)
def test_empty(shape):
    x = np.zeros(shape, np.float32)
    y, residual = jax.jit(rmsnorm.jax.add_rms_norm)(x, x, np.ones(shape[-1], np.float32))
    assert y.shape == residual.shape == shape
    assert jax.vmap(rmsnorm.jax.rms_norm)(x).shape == shape


def test_in_loops_and_branches():
    x, weights = sample((4, 40), F64), sample((3, 40), F64, 1)

    @jax.jit
    def program(x, weights):
        def layer(x, weight):
            return jax.lax.cond(
                weight[0] > 0, rmsnorm.jax.rms_norm, lambda x, w: x, x, weight
            ), None

        return jax.lax.scan(layer, x, weights)[0]

    expected = x
    for weight in weights:
        expected = rmsnorm.rms_norm(expected, weight) if weight[0] > 0 else expected
    assert_same(program(x, weights), expected)


def test_donated_arguments():
    x = sample((4, 40))
    expected = rmsnorm.rms_norm(x)
    given = jnp.array(x)
    y = jax.jit(rmsnorm.jax.rms_norm, donate_argnums=0)(given)
    assert given.is_deleted()
    assert_same(y, expected)
    given, residual = jnp.array(x), jnp.array(x)
    y, total = jax.jit(rmsnorm.jax.add_rms_norm, donate_argnums=(0, 1))(given, residual)
    assert_same(y, rmsnorm.rms_norm(x + x))
    assert_same(total, x + x)


def test_export():
    """A program that is exported once runs for any number of rows."""
    rows = jax.export.symbolic_shape("rows")[0]
    check = jax.export.DisabledSafetyCheck.custom_call("rmsnorm_forward")
    types = [jax.ShapeDtypeStruct(s, np.float32) for s in ((rows, 2, 40), (2, 40))]
    exported = jax.export.export(jax.jit(rmsnorm.jax.rms_norm), disabled_checks=[check])(*types)
    weight = sample((2, 40), F32, 1)
    for count in (1, 7):
        x = sample((count, 2, 40))
        assert_same(exported.call(x, weight), rmsnorm.rms_norm(x, weight))


@pytest.mark.parametrize("name", ["float16", "bfloat16", "float32", "float64"])
def test_out_dtype_by_any_name(name):
    x = sample((3, 40))
    for spelled in (name, jnp.dtype(name), getattr(jnp, name)):
        y = rmsnorm.jax.rms_norm(x, out_dtype=spelled)
        assert_same(y, rmsnorm.rms_norm(x, out_dtype=name))


def test_an_isa_that_cannot_run():
    code = "import numpy, rmsnorm.jax; rmsnorm.jax.rms_norm(numpy.ones((2, 8), 'float32'))"
    result = subprocess.run(
        [sys.executable, "-c", code],
        env={**os.environ, "RMSNORM_ISA": "nonsense"},
        capture_output=True,
        text=True,
        check=False,
    )
    assert result.returncode == 1
    assert "rmsnorm: RMSNORM_ISA" in result.stderr
