"""The custom calls: shapes and dtypes of their results, and what their handlers are told."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from .. import _core
from .arguments import Options
from .call import Call
from .partitioning import ArrayType

for _platform, _handlers in _core.xla_handlers().items():
    for _name, _handler in _handlers.items():
        jax.ffi.register_ffi_target(_name, _handler, platform=_platform)


def compute_dtype(*arrays: jax.Array | np.dtype[Any] | None) -> np.dtype[Any]:
    """float64 as soon as one is, as the library computes."""
    f64 = np.dtype(np.float64)
    dtypes = [getattr(a, "dtype", a) for a in arrays if a is not None]
    return f64 if f64 in dtypes else np.dtype(np.float32)


def sum_dtype(x: jax.Array, residual: jax.Array) -> np.dtype[Any]:
    """What x and residual promote to, also where jax_numpy_dtype_promotion forbids to."""
    dtype: np.dtype[Any] = x.dtype
    return dtype if dtype == residual.dtype else compute_dtype(x, residual)


def of_rank(value: jax.Array, rank: int) -> jax.Array:
    """With leading dimensions, which jax_numpy_rank_promotion may forbid to imply."""
    return jnp.expand_dims(value, range(rank - value.ndim))


def _without_leading(value: jax.Array | None, rank: int) -> jax.Array | None:
    return None if value is None else jnp.squeeze(value, range(value.ndim - rank))


def _attributes(options: Options) -> dict[str, Any]:
    return {
        "axis": np.int64(options.axis),
        "eps": np.float64(options.eps),
        "partial": np.float64(options.partial),
        "round_residual": options.round_residual,
        "rounding": options.rounding,
        "weight_offset": np.float64(options.weight_offset),
    }


def forward(
    options: Options,
    x: jax.Array,
    residual: jax.Array | None,
    weight: jax.Array | None,
    bias: jax.Array | None,
    *,
    with_rstd: bool,
) -> tuple[jax.Array, jax.Array | None, jax.Array | None]:
    """(y, residual_out, rstd); residual_out is None without residual, rstd if not asked for."""
    arguments = {
        "x": x,
        "residual": residual,
        "weight": None if weight is None else of_rank(weight, x.ndim),
        "bias": None if bias is None else of_rank(bias, x.ndim),
    }
    results = {"y": ArrayType(x.shape, options.y_dtype)}
    if residual is not None:
        results["residual_out"] = ArrayType(x.shape, sum_dtype(x, residual))
    if with_rstd:
        computed = compute_dtype(x, residual, weight, bias, options.y_dtype)
        results["rstd"] = ArrayType(x.shape[: options.axis], computed)
    call = Call("rmsnorm_forward", _attributes(options), -options.axis, {})
    values = call(arguments, results)
    return values["y"], values.get("residual_out"), values.get("rstd")


def backward(
    options: Options,
    dy: jax.Array,
    x: jax.Array,
    residual: jax.Array | None,
    weight: jax.Array | None,
    rstd: jax.Array,
    d_residual: jax.Array | None,
    *,
    dx_dtype: np.dtype[Any],
    dweight_dtype: np.dtype[Any] | None,
    dbias_type: ArrayType | None,
) -> tuple[jax.Array, jax.Array | None, jax.Array | None]:
    """(dx, dweight, dbias) of the dtypes given, the last two None without; dbias has bias' shape."""
    full_weight = None if weight is None else of_rank(weight, x.ndim)
    arguments = {
        "dy": dy,
        "x": x,
        "residual": residual,
        "weight": full_weight,
        "rstd": rstd,
        "d_residual": d_residual,
    }
    results = {"dx": ArrayType(x.shape, dx_dtype)}
    if dweight_dtype is not None and full_weight is not None:
        results["dweight"] = ArrayType(full_weight.shape, dweight_dtype)
    if dbias_type is not None:
        leading = (1,) * (x.ndim - len(dbias_type.shape))
        results["dbias"] = ArrayType(leading + dbias_type.shape, dbias_type.dtype)
    computed = compute_dtype(*arguments.values(), *(r.dtype for r in results.values()))
    sums = {name: computed for name in ("dweight", "dbias")}
    call = Call("rmsnorm_backward", _attributes(options), -options.axis, sums)
    values = call(arguments, results)
    dweight = _without_leading(values.get("dweight"), 0 if weight is None else weight.ndim)
    dbias_rank = 0 if dbias_type is None else len(dbias_type.shape)
    return values["dx"], dweight, _without_leading(values.get("dbias"), dbias_rank)
