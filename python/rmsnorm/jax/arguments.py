"""The arguments of a norm, checked while a program is traced: nothing is known but shapes and dtypes.

Errors read as those of rmsnorm.rms_norm: the argument, what was expected and what came.
"""

from __future__ import annotations

import operator
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from .._checks import (
    DTYPE_NAMES,
    checked_eps,
    checked_partial,
    checked_rounding,
    checked_weight_offset,
    number,
    repr_text,
    require_broadcast,
    require_dimensions,
    require_shape,
    type_text,
)
from .._typing import DTypeLike, Rounding

# As many as the handlers read.
MAX_DIMENSIONS = 64
DTYPES = tuple(np.dtype(t) for t in (jnp.float16, jnp.bfloat16, jnp.float32, jnp.float64))


@dataclass(frozen=True)
class Options:
    """What is fixed when a program is traced, checked."""

    eps: float
    axis: int  # of the first normalized axis, counted from the end: negative
    weight_offset: float
    rounding: Rounding
    partial: float
    round_residual: bool
    y_dtype: np.dtype[Any]


def _require_held(dtype: np.dtype[Any], name: str) -> None:
    if jax.dtypes.canonicalize_dtype(dtype) != dtype:
        raise ValueError(
            f"{name}: is float64, which JAX would make float32 of; enable jax_enable_x64, or pass "
            "float32"
        )


def require_array(value: object, name: str) -> None:
    if isinstance(value, np.ma.MaskedArray):
        raise TypeError(
            f"{name}: is a masked array, whose mask would be ignored; pass its .filled()"
        )
    if not isinstance(value, (jax.Array, np.ndarray)):
        hint = ""
        if isinstance(value, float) and name in ("weight", "bias"):
            hint = f"; options come by keyword: eps={value}"
        raise TypeError(f"{name}: expected a JAX or NumPy array, got {type_text(value)}{hint}")
    if value.dtype not in DTYPES:
        raise TypeError(f"{name}: expected dtype {DTYPE_NAMES}, got {value.dtype}")
    _require_held(value.dtype, name)


def _number(value: Any, name: str) -> float:
    if isinstance(value, jax.core.Tracer):
        raise TypeError(
            f"{name}: expected a number, got a traced value; options are fixed when a program is "
            "traced, make it a static argument"
        )
    # JAX and NumPy make numbers of truth values and texts, too. A dtype of JAX's keys has no kind.
    is_array = isinstance(value, (np.generic, np.ndarray, jax.Array))
    if is_array and getattr(value.dtype, "kind", "V") in "bSTUV":
        raise TypeError(f"{name}: expected a number, got dtype {value.dtype}")
    return number(value, name)


def _axis_from_end(value: object, x: jax.Array) -> int:
    if isinstance(value, bool):
        raise TypeError("axis: expected an integer, got bool")
    try:
        axis = operator.index(value)  # type: ignore[arg-type]
    except Exception as error:
        raise TypeError(f"axis: expected an integer, got {type_text(value)}") from error
    if not -x.ndim <= axis < x.ndim:
        raise ValueError(
            f"axis: expected {-x.ndim} <= axis < {x.ndim} for x of shape {x.shape}, "
            f"got {repr_text(axis)}"
        )
    return axis if axis < 0 else axis - x.ndim


def _rounding(value: object) -> Rounding:
    if not isinstance(value, str):
        raise TypeError(f"rounding: expected a string, got {type_text(value)}")
    return checked_rounding(value)


def _flag(value: object, name: str) -> bool:
    if not isinstance(value, bool):
        raise TypeError(f"{name}: expected True or False, got {type_text(value)}")
    return value


def _out_dtype(value: DTypeLike | None, x: jax.Array) -> np.dtype[Any]:
    if value is None:
        return x.dtype
    error = ValueError if isinstance(value, str) else TypeError
    message = f"out_dtype: expected {DTYPE_NAMES}, got {repr_text(value)}"
    try:
        dtype: np.dtype[Any] = jnp.dtype(value)
    except Exception as cause:
        raise error(message) from cause
    if dtype not in DTYPES:
        raise error(message)
    _require_held(dtype, "out_dtype")
    return dtype


def _require_parameter(value: jax.Array | None, name: str, x: jax.Array, axis: int) -> None:
    if value is not None:
        require_array(value, name)
        require_broadcast(name, value.shape, x.shape, axis)


def read_options(
    x: jax.Array,
    residual: jax.Array | None,
    weight: jax.Array | None,
    bias: jax.Array | None,
    *,
    eps: float,
    axis: int,
    weight_offset: float,
    rounding: Rounding,
    partial: float,
    round_residual: bool,
    out_dtype: DTypeLike | None,
) -> Options:
    """The options of a call whose arrays fit together, or TypeError or ValueError."""
    require_array(x, "x")
    require_dimensions(x.shape)
    if x.ndim > MAX_DIMENSIONS:
        raise ValueError(f"x: has {x.ndim} dimensions, more than {MAX_DIMENSIONS}")
    from_end = _axis_from_end(axis, x)
    if residual is not None:
        require_array(residual, "residual")
        require_shape("residual", residual.shape, x.shape, x.shape)
    _require_parameter(weight, "weight", x, from_end)
    _require_parameter(bias, "bias", x, from_end)
    return Options(
        eps=checked_eps(_number(eps, "eps")),
        axis=from_end,
        weight_offset=checked_weight_offset(
            _number(weight_offset, "weight_offset"), weight is not None
        ),
        rounding=_rounding(rounding),
        partial=checked_partial(_number(partial, "partial")),
        round_residual=_flag(round_residual, "round_residual"),
        y_dtype=_out_dtype(out_dtype, x),
    )
