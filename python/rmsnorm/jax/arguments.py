"""The arguments of a norm, checked while a program is traced: nothing is known but shapes and dtypes.

Errors read as those of rmsnorm.rms_norm: the argument, what was expected and what came.
"""

from __future__ import annotations

import math
import operator
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from .._typing import DTypeLike, Rounding

DTYPES = tuple(np.dtype(t) for t in (jnp.float16, jnp.bfloat16, jnp.float32, jnp.float64))
_DTYPE_NAMES = "float16, bfloat16, float32 or float64"
_ROUNDINGS = ("once", "before_weight", "rstd")


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


_LONGEST_TEXT = 80


def _clipped(text: str) -> str:
    return text if len(text) <= _LONGEST_TEXT else text[: _LONGEST_TEXT - 3] + "..."


def _type_text(value: object) -> str:
    kind = type(value)
    name = _clipped(kind.__qualname__)
    return name if kind.__module__ == "builtins" else f"{_clipped(kind.__module__)}.{name}"


def _repr_text(value: object) -> str:
    """For messages: a wrong value may be of any length, and fail as it is shown."""
    try:
        return _clipped(repr(value))
    except Exception:  # noqa: BLE001  what comes from outside may raise anything
        return f"an object of type {_type_text(value)} that cannot be shown"


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
        raise TypeError(f"{name}: expected a JAX or NumPy array, got {_type_text(value)}{hint}")
    if value.dtype not in DTYPES:
        raise TypeError(f"{name}: expected dtype {_DTYPE_NAMES}, got {value.dtype}")
    _require_held(value.dtype, name)


def _number(value: object, name: str) -> float:
    if isinstance(value, jax.core.Tracer):
        raise TypeError(
            f"{name}: expected a number, got a traced value; options are fixed when a program is "
            "traced, make it a static argument"
        )
    if isinstance(value, (bool, np.bool_, str, bytes)):
        raise TypeError(f"{name}: expected a number, got {_type_text(value)}")
    try:
        return float(value)  # type: ignore[arg-type]
    except OverflowError as error:
        raise ValueError(f"{name}: expected a number within the range of a double") from error
    except Exception as error:
        raise TypeError(f"{name}: expected a number, got {_type_text(value)}") from error


def _finite(value: object, name: str) -> float:
    number = _number(value, name)
    if not math.isfinite(number):
        raise ValueError(f"{name}: expected a finite number, got {number:g}")
    return number


def _eps(value: object) -> float:
    eps = _number(value, "eps")
    if not (eps >= 0 and math.isfinite(eps)):
        raise ValueError(f"eps: expected a finite number >= 0, got {eps:g}")
    return eps


def _partial(value: object) -> float:
    partial = _number(value, "partial")
    if not 0 < partial <= 1:
        raise ValueError(f"partial: expected a number in (0, 1], got {partial:g}")
    return partial


def _axis_from_end(value: object, x: jax.Array) -> int:
    if isinstance(value, bool):
        raise TypeError("axis: expected an integer, got bool")
    try:
        axis = operator.index(value)  # type: ignore[arg-type]
    except Exception as error:
        raise TypeError(f"axis: expected an integer, got {_type_text(value)}") from error
    if not -x.ndim <= axis < x.ndim:
        raise ValueError(
            f"axis: expected {-x.ndim} <= axis < {x.ndim} for x of shape {x.shape}, "
            f"got {_repr_text(axis)}"
        )
    return axis if axis < 0 else axis - x.ndim


def _rounding(value: object) -> Rounding:
    if not isinstance(value, str):
        raise TypeError(f"rounding: expected a string, got {_type_text(value)}")
    for rounding in _ROUNDINGS:
        if value == rounding:
            return rounding  # type: ignore[return-value]
    raise ValueError(
        f"rounding: expected 'once', 'before_weight' or 'rstd', got {_repr_text(value)}"
    )


def _flag(value: object, name: str) -> bool:
    if not isinstance(value, bool):
        raise TypeError(f"{name}: expected True or False, got {_type_text(value)}")
    return value


def _out_dtype(value: DTypeLike | None, x: jax.Array) -> np.dtype[Any]:
    if value is None:
        return x.dtype
    error = ValueError if isinstance(value, str) else TypeError
    message = f"out_dtype: expected {_DTYPE_NAMES}, got {_repr_text(value)}"
    try:
        dtype: np.dtype[Any] = jnp.dtype(value)
    except Exception as cause:
        raise error(message) from cause
    if dtype not in DTYPES:
        raise error(message)
    _require_held(dtype, "out_dtype")
    return dtype


def _require_broadcast(value: jax.Array | None, name: str, x: jax.Array, axis: int) -> None:
    if value is None:
        return
    require_array(value, name)
    leading, normalized = value.shape[:axis], value.shape[axis:]
    rows = x.shape[:axis]
    fits = normalized == x.shape[axis:] and len(leading) <= len(rows)
    if fits and all(a in (1, b) for a, b in zip(reversed(leading), reversed(rows))):
        return
    alternative = f", or with leading dimensions that broadcast against {rows}" if rows else ""
    raise ValueError(
        f"{name}: expected shape {x.shape[axis:]}{alternative} for x of shape {x.shape}, "
        f"got {value.shape}"
    )


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
    if x.ndim == 0:
        raise ValueError("x: expected at least one dimension, got shape ()")
    from_end = _axis_from_end(axis, x)
    if residual is not None:
        require_array(residual, "residual")
        if residual.shape != x.shape:
            raise ValueError(
                f"residual: expected shape {x.shape} for x of shape {x.shape}, got {residual.shape}"
            )
    _require_broadcast(weight, "weight", x, from_end)
    _require_broadcast(bias, "bias", x, from_end)
    options = Options(
        eps=_eps(eps),
        axis=from_end,
        weight_offset=_finite(weight_offset, "weight_offset"),
        rounding=_rounding(rounding),
        partial=_partial(partial),
        round_residual=_flag(round_residual, "round_residual"),
        y_dtype=_out_dtype(out_dtype, x),
    )
    if options.weight_offset != 0 and weight is None:
        raise ValueError(
            f"weight_offset: {options.weight_offset:g} was given without weight; expected a weight"
        )
    return options
