"""What rmsnorm.jax refuses, while a program is traced: errors name the argument."""

import os
import subprocess
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import rmsnorm
import rmsnorm.jax
import torch
from jax_arrays import sample, x64  # noqa: F401

X, W = np.ones((2, 8), np.float32), np.ones(8, np.float32)
MANY = jnp.ones((1,) * 65)

WRONG_CALLS = {
    "list": (TypeError, r"^x: expected a JAX or NumPy array, got list$", ([1.0],), {}),
    "scalar": (TypeError, r"^x: expected a JAX or NumPy array, got float$", (1.0,), {}),
    "None": (TypeError, r"^x: .* got NoneType$", (None,), {}),
    "torch": (TypeError, r"^weight: .* got torch.Tensor$", (X, torch.ones(8)), {}),
    "masked": (TypeError, r"^x: is a masked array", (np.ma.masked_array(X),), {}),
    "integers": (TypeError, r"^x: expected dtype float16, .*, got int32$", (X.astype("i4"),), {}),
    "complex": (TypeError, r"^bias: .* got complex64$", (X, W, W.astype("c8")), {}),
    "byte order": (TypeError, r"^x: expected dtype", (X.astype(">f4"),), {}),
    "no dimension": (ValueError, r"^x: .*got shape \(\)$", (np.ones((), np.float32),), {}),
    "weight shape": (
        ValueError,
        r"^weight: expected shape \(8,\), or with leading .* \(2,\) for x of .*, got \(7,\)$",
        (X, W[:7]),
        {},
    ),
    "weight rows": (ValueError, r"^weight: .* got \(3, 8\)$", (X, np.ones((3, 8), "f4")), {}),
    "weight rank": (ValueError, r"^weight: .* got \(1, 1, 8\)$", (X, np.ones((1, 1, 8), "f4")), {}),
    "scalar weight": (ValueError, r"^weight: .* got \(\)$", (X, np.ones((), "f4")), {}),
    "one element": (ValueError, r"^weight: .* got \(1,\)$", (X, np.ones(1, "f4")), {}),
    "bias shape": (
        ValueError,
        r"^bias: expected shape \(2, 8\) for x of shape \(2, 8\), got \(8,\)$",
        (X, None, W),
        {"axis": 0},
    ),
    "axis": (ValueError, r"^axis: expected -2 <= axis < 2 .*, got 2$", (X,), {"axis": 2}),
    "axis type": (TypeError, r"^axis: expected an integer, got float$", (X,), {"axis": 1.0}),
    "axis flag": (TypeError, r"^axis: expected an integer, got bool$", (X,), {"axis": True}),
    "eps": (ValueError, r"^eps: expected a finite number >= 0, got -1$", (X,), {"eps": -1}),
    "eps nan": (ValueError, r"^eps: .* got nan$", (X,), {"eps": float("nan")}),
    "eps type": (TypeError, r"^eps: expected a number, got str$", (X,), {"eps": "1e-6"}),
    "eps None": (TypeError, r"^eps: expected a number, got NoneType$", (X,), {"eps": None}),
    "eps flag": (TypeError, r"^eps: expected a number, got bool$", (X,), {"eps": True}),
    "eps key": (TypeError, r"^eps: expected a number, got ", (X,), {"eps": jax.random.key(0)}),
    "eps bytes": (TypeError, r"^eps: .* got bytearray$", (X,), {"eps": bytearray(b"1")}),
    "eps text array": (TypeError, r"^eps: .* dtype <U1$", (X,), {"eps": np.array("1")}),
    "eps bool array": (TypeError, r"^eps: .* dtype bool$", (X,), {"eps": jnp.array(True)}),
    "eps NumPy flag": (TypeError, r"^eps: .* dtype bool$", (X,), {"eps": np.True_}),
    "dimensions": (ValueError, r"^x: has 65 dimensions, more than 64$", (MANY,), {}),
    "eps array": (TypeError, r"^eps: expected a number, got ", (X,), {"eps": W}),
    "eps large": (ValueError, r"^eps: .* range of a double$", (X,), {"eps": 10**400}),
    "offset": (
        ValueError,
        r"^weight_offset: 1 was given without weight; expected a weight$",
        (X,),
        {"weight_offset": 1.0},
    ),
    "offset inf": (ValueError, r"^weight_offset: .*inf", (X, W), {"weight_offset": float("inf")}),
    "partial": (ValueError, r"^partial: .* \(0, 1\], got 0$", (X,), {"partial": 0}),
    "partial above": (ValueError, r"^partial: .* got 1.5$", (X,), {"partial": 1.5}),
    "rounding": (ValueError, r"^rounding: expected 'once', .* got 'twice'$", (X,), {"rounding": "twice"}),
    "rounding type": (TypeError, r"^rounding: expected a string, got int$", (X,), {"rounding": 1}),
    "out_dtype": (ValueError, r"^out_dtype: .* got 'int8'$", (X,), {"out_dtype": "int8"}),
    "out_dtype name": (ValueError, r"^out_dtype: .* got 'half-ish'$", (X,), {"out_dtype": "half-ish"}),
    "out_dtype type": (TypeError, r"^out_dtype: .* got 3$", (X,), {"out_dtype": 3}),
}  # fmt: skip


@pytest.mark.parametrize("name", WRONG_CALLS)
def test_wrong_calls(name):
    error, message, arguments, options = WRONG_CALLS[name]
    with pytest.raises(error, match=message):
        rmsnorm.jax.rms_norm(*arguments, **options)


def test_wrong_calls_of_add():
    with pytest.raises(ValueError, match=r"^residual: expected shape \(2, 8\) .*, got \(8,\)$"):
        rmsnorm.jax.add_rms_norm(X, W)
    with pytest.raises(TypeError, match=r"^residual: .* got NoneType$"):
        rmsnorm.jax.add_rms_norm(X, None)
    with pytest.raises(TypeError, match=r"^round_residual: expected True or False, got int$"):
        rmsnorm.jax.add_rms_norm(X, X, round_residual=1)


def test_errors_come_when_tracing():
    """Shapes are wrong before anything runs, of abstract arrays as of any."""
    types = [jax.ShapeDtypeStruct(s, np.float32) for s in ((2, 8), (7,))]
    with pytest.raises(ValueError, match=r"^weight: .* got \(7,\)"):
        jax.eval_shape(rmsnorm.jax.rms_norm, *types)
    with pytest.raises(ValueError, match=r"^weight: "):
        jax.vmap(rmsnorm.jax.rms_norm)(np.ones((3, 2, 8)), np.ones((3, 7)))


def test_traced_options():
    with pytest.raises(TypeError, match=r"^eps: expected a number, got a traced value; .*static"):
        jax.jit(lambda x, eps: rmsnorm.jax.rms_norm(x, eps=eps))(X, 1e-6)
    y = jax.jit(lambda x, eps: rmsnorm.jax.rms_norm(x, eps=eps), static_argnums=1)(X, 1e-6)
    assert y.shape == X.shape


def test_options_of_any_number_type():
    x = sample((2, 8))
    expected = rmsnorm.jax.rms_norm(x, W, eps=0.5, axis=1)
    for eps in (np.float32(0.5), np.array(0.5), jnp.float32(0.5)):
        actual = rmsnorm.jax.rms_norm(x, W, eps=eps, axis=np.int64(1))
        np.testing.assert_array_equal(actual, expected)


def test_float64_is_not_made_float32():
    x = np.ones((2, 8))
    assert rmsnorm.jax.rms_norm(x).dtype == np.float64
    jax.config.update("jax_enable_x64", False)
    for wrong, name in (
        (lambda: rmsnorm.jax.rms_norm(x), "x"),
        (lambda: rmsnorm.jax.rms_norm(X, x[0]), "weight"),
        (lambda: rmsnorm.jax.rms_norm(X, out_dtype="float64"), "out_dtype"),
    ):
        with pytest.raises(ValueError, match=rf"^{name}: is float64, .*jax_enable_x64"):
            wrong()


def test_the_array_functions_name_rmsnorm_jax():
    for function in (rmsnorm.rms_norm, rmsnorm.mean_square):
        with pytest.raises(TypeError, match=r"^x: is a traced value, .*rmsnorm\.jax"):
            jax.jit(lambda x, function=function: function(x))(X)


def python(code, **environment):
    return subprocess.run(
        [sys.executable, "-c", code],
        env={**os.environ, **environment},
        capture_output=True,
        text=True,
        check=False,
    )


def test_without_jax(tmp_path):
    (tmp_path / "jax").mkdir()
    (tmp_path / "jax" / "__init__.py").write_text("raise ImportError('no jax here')")
    paths = os.pathsep.join([str(tmp_path), os.environ.get("PYTHONPATH", "")])
    works = python("import numpy, rmsnorm; rmsnorm.rms_norm(numpy.ones(8))", PYTHONPATH=paths)
    assert works.returncode == 0, works.stderr
    result = python("import rmsnorm.jax", PYTHONPATH=paths)
    assert "ImportError: rmsnorm.jax: needs JAX; install it with: pip install" in result.stderr
    (tmp_path / "jax" / "__init__.py").write_text(
        "__version__, __version_info__ = '0.4.35', (0, 4, 35)"
    )
    result = python("import rmsnorm.jax", PYTHONPATH=paths)
    assert "ImportError: rmsnorm.jax: needs JAX 0.6.2 or later, got 0.4.35" in result.stderr


def test_import_brings_no_jax():
    result = python("import sys, rmsnorm; print('jax' in sys.modules)")
    assert result.stdout.strip() == "False", result.stderr
