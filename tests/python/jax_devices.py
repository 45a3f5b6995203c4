"""Programs on eight devices of one CPU: how calls are split. Run by test_jax_devices.py.

The number of devices is fixed before JAX starts, so that this takes a process of its own.
"""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import rmsnorm
import rmsnorm.jax
from floats import BF16, F32, assert_same_bits
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P
from jax_arrays import assert_close, formula, normal, sample

jax.config.update("jax_enable_x64", True)
MESH = Mesh(np.array(jax.devices()).reshape(4, 2), ("rows", "columns"))


def put(array, *spec):
    return jax.device_put(array, NamedSharding(MESH, P(*spec)))


def cubed(norm):
    return lambda *arrays: sum(jnp.sum(y**3) for y in jax.tree.leaves(norm(*arrays)))


def added(x, residual, weight):
    return formula(x + residual, weight), x + residual


def gradients(norm, arrays):
    """Of all arguments, and the compiled program's text."""
    program = jax.jit(jax.grad(cubed(norm), tuple(range(len(arrays)))))
    return program(*arrays), program.lower(*arrays).compile().as_text()


def spec_of(array):
    spec = tuple(array.sharding.spec)
    return spec + (None,) * (array.ndim - len(spec))


SPLIT_BY_ROWS = {
    "one axis": ([(8, 4, 6), (6,)], [("rows",), ()]),
    "two axes": ([(8, 4, 6), (6,)], [("rows", "columns"), ()]),
    "two axes along one dimension": ([(8, 4, 6), (6,)], [(("rows", "columns"),), ()]),
    "weights of heads": ([(8, 4, 2, 6), (2, 6)], [("rows", None, "columns"), ("columns",)]),
    "weights of heads everywhere": ([(8, 4, 2, 6), (2, 6)], [("rows", None, "columns"), ()]),
    "bias": ([(8, 4, 6), (6,), (4, 6)], [("rows", "columns"), (), ()]),
}


def check_split_by_rows():
    for name, (shapes, specs) in SPLIT_BY_ROWS.items():
        arrays = [normal(shape, i) for i, shape in enumerate(shapes)]
        given = [put(a, *spec) for a, spec in zip(arrays, specs)]
        actual, text = gradients(rmsnorm.jax.rms_norm, given)
        assert "all-gather" not in text, name
        assert_close(actual, gradients(formula, arrays)[0])
        assert spec_of(actual[0]) == spec_of(given[0]), name
        y = jax.jit(rmsnorm.jax.rms_norm)(*given)
        assert spec_of(y) == spec_of(given[0]), name
        assert_same_bits(np.asarray(y), rmsnorm.rms_norm(*arrays))


def check_add():
    arrays = [normal((8, 4, 6), 0), normal((8, 4, 6), 1), normal((6,), 2)]
    given = [put(arrays[0], "rows"), put(arrays[1], "rows"), put(arrays[2])]
    actual, text = gradients(rmsnorm.jax.add_rms_norm, given)
    assert "all-gather" not in text
    assert_close(actual, gradients(added, arrays)[0])


def check_mapped():
    arrays = [normal((8, 4, 6)), normal((8, 6), 1)]
    given = [put(a, "rows") for a in arrays]
    actual, text = gradients(jax.vmap(rmsnorm.jax.rms_norm), given)
    assert "all-gather" not in text and "all-reduce" not in text
    assert_close(actual, gradients(jax.vmap(formula), arrays)[0])


def check_split_normalized_axis():
    """Then whole rows are made first, as nothing else is right."""
    arrays = [normal((8, 4, 6)), normal((6,), 1)]
    given = [put(arrays[0], "rows", None, "columns"), put(arrays[1], "columns")]
    assert_close(
        gradients(rmsnorm.jax.rms_norm, given)[0], gradients(rmsnorm.jax.rms_norm, arrays)[0]
    )
    one_row = [put(normal(8), "rows"), put(normal(8, 1))]
    assert_close(
        jax.jit(rmsnorm.jax.rms_norm)(*one_row), formula(*(np.asarray(a) for a in one_row))
    )


def check_rows_that_do_not_divide():
    """XLA pads what it splits unevenly; no sum may count the padding."""
    arrays = [normal((6, 3, 6)), normal((6,), 1)]

    def constrained(norm, x, weight):
        split = jax.lax.with_sharding_constraint(x + 0, NamedSharding(MESH, P(None, "columns")))
        return norm(split, weight)

    assert_close(
        gradients(partial(constrained, rmsnorm.jax.rms_norm), arrays)[0],
        gradients(formula, arrays)[0],
    )


def check_sums_of_half_precision():
    """Parts of dweight are added up in float32: the result is that of one device, or its neighbour."""
    x, weight = sample((64, 32), BF16), sample(32, BF16, 1)
    whole = jax.jit(jax.grad(cubed(rmsnorm.jax.rms_norm), 1))(x, weight)
    split = jax.jit(jax.grad(cubed(rmsnorm.jax.rms_norm), 1))(put(x, "rows"), put(weight))
    assert split.dtype == BF16
    a, b = (np.asarray(v).astype(F32) for v in (whole, split))
    np.testing.assert_allclose(a, b, rtol=2.0**-7)
    assert (a == b).mean() > 0.9


def check_shard_map():
    """Gradients of a mapped function, and gradients within one."""
    arrays = [normal((8, 4, 6)), normal((6,), 1)]
    specs = (P("rows"), P())
    expected = gradients(formula, arrays)[0]
    mapped = jax.shard_map(rmsnorm.jax.rms_norm, mesh=MESH, in_specs=specs, out_specs=P("rows"))
    assert_close(gradients(mapped, arrays)[0], expected)
    for where in (0, 1, (0, 1)):
        inner = jax.grad(cubed(rmsnorm.jax.rms_norm), where)
        out = specs if where == (0, 1) else specs[where]
        within = jax.shard_map(inner, mesh=MESH, in_specs=specs, out_specs=out)
        assert_close(jax.jit(within)(*arrays), expected if where == (0, 1) else expected[where])


def check_pmap():
    x, weight = normal((8, 4, 6)), normal((6,), 1)
    actual = jax.pmap(jax.grad(cubed(rmsnorm.jax.rms_norm), (0, 1)), in_axes=(0, None))(x, weight)
    assert_close(actual, jax.vmap(jax.grad(cubed(formula), (0, 1)), (0, None))(x, weight))


def check_shardings_in_types():
    mesh = jax.make_mesh(
        (4, 2), ("rows", "columns"), axis_types=(jax.sharding.AxisType.Explicit,) * 2
    )
    arrays = [normal((8, 4, 6), 0), normal((8, 4, 6), 1), normal((4, 6), 2)]
    expected = gradients(added, arrays)[0]
    with jax.set_mesh(mesh):
        for specs in ((P("rows"), P("rows"), P()), (P("rows", "columns"), P("rows"), P("columns")),
                      (P("rows", None, "columns"), P(), P(None, "columns"))):  # fmt: skip
            given = [jax.device_put(a, s) for a, s in zip(arrays, specs)]
            if specs[0] == specs[1]:
                y, _ = rmsnorm.jax.add_rms_norm(*given)
                assert jax.typeof(y) == jax.typeof(given[0])
            else:
                given[1] = jax.sharding.reshard(given[1], specs[0])
            actual = jax.jit(jax.grad(cubed(rmsnorm.jax.add_rms_norm), (0, 1, 2)))(*given)
            assert [jax.typeof(a) for a in actual] == [jax.typeof(a) for a in given]
            assert_close(actual, expected)


def check_arrays_of_each_device():
    """The functions of rmsnorm itself return arrays on x's device."""
    x, weight = normal((4, 64)), normal((64,), 1)
    for device in jax.devices():
        given, w = jax.device_put(x, device), jax.device_put(weight, device)
        y, rstd = rmsnorm.rms_norm(given, w, return_rstd=True)
        results = [y, rstd, *rmsnorm.add_rms_norm(given, given), rmsnorm.mean_square(given)]
        results += rmsnorm.rms_norm_backward(given, given, w, has_bias=True)
        assert all(r.devices() == {device} for r in results)
        assert_same_bits(np.asarray(y), rmsnorm.rms_norm(x, weight))
        assert_same_bits(np.asarray(y + given), np.asarray(y) + x)


def check_arrays_on_several_devices_are_refused():
    x, out = normal((8, 64)), np.full((8, 64), 7.0)
    for given in (put(x, "rows"), put(x)):
        for norm, arrays in ((rmsnorm.rms_norm, [given]), (rmsnorm.add_rms_norm, [given, x])):
            try:
                norm(*arrays, out=out)
            except TypeError as error:
                assert str(error).startswith("x: is a JAX array on 8 devices"), error
                assert "rmsnorm.jax" in str(error)
            else:
                raise AssertionError("an array on several devices was taken")
    assert (out == 7).all()


for name, check in list(globals().items()):
    if name.startswith("check_"):
        check()
        print(name)
