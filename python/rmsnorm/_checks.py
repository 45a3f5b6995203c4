"""What rmsnorm.jax and the operators of rmsnorm.torch ask of options and shapes.

Errors read as those of the array functions: the argument, what was expected and what came.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

from ._typing import Rounding

DTYPE_NAMES = "float16, bfloat16, float32 or float64"

_ROUNDINGS: tuple[Rounding, ...] = ("once", "before_weight", "rstd")
_LONGEST_TEXT = 80


def _clipped(text: str) -> str:
    return text if len(text) <= _LONGEST_TEXT else text[: _LONGEST_TEXT - 3] + "..."


def type_text(value: object) -> str:
    kind = type(value)
    name = _clipped(kind.__qualname__)
    return name if kind.__module__ == "builtins" else f"{_clipped(kind.__module__)}.{name}"


def repr_text(value: object) -> str:
    """For messages: a wrong value may be of any length, and fail as it is shown."""
    try:
        return _clipped(repr(value))
    except Exception:  # noqa: BLE001  what comes from outside may raise anything
        return f"an object of type {type_text(value)} that cannot be shown"


def number_text(value: float) -> str:
    """As the array functions show it: the shortest text that is no other number's."""
    return repr(float(value)).removesuffix(".0")


def number(value: Any, name: str) -> float:
    if isinstance(value, (bool, str, bytes, bytearray, memoryview)):
        raise TypeError(f"{name}: expected a number, got {type_text(value)}")
    try:
        return float(value)
    except OverflowError as error:
        raise ValueError(f"{name}: expected a number within the range of a double") from error
    except Exception as error:
        raise TypeError(f"{name}: expected a number, got {type_text(value)}") from error


def checked_eps(eps: float) -> float:
    if not (eps >= 0 and math.isfinite(eps)):
        raise ValueError(f"eps: expected a finite number >= 0, got {number_text(eps)}")
    return eps


def checked_partial(partial: float) -> float:
    if not 0 < partial <= 1:
        raise ValueError(f"partial: expected a number in (0, 1], got {number_text(partial)}")
    return partial


def checked_rounding(rounding: str) -> Rounding:
    for known in _ROUNDINGS:
        if rounding == known:
            return known
    raise ValueError(
        f"rounding: expected 'once', 'before_weight' or 'rstd', got {repr_text(rounding)}"
    )


def checked_weight_offset(weight_offset: float, has_weight: bool) -> float:
    if not math.isfinite(weight_offset):
        raise ValueError(
            f"weight_offset: expected a finite number, got {number_text(weight_offset)}"
        )
    if weight_offset != 0 and not has_weight:
        raise ValueError(
            f"weight_offset: {number_text(weight_offset)} was given without weight; expected a weight"
        )
    return weight_offset


def require_dimensions(x: Sequence[int]) -> None:
    """Shapes are given, here and below; their sizes may be symbols."""
    if len(x) == 0:
        raise ValueError("x: expected at least one dimension, got shape ()")


def require_shape(
    name: str, shape: Sequence[int], expected: Sequence[int], x: Sequence[int]
) -> None:
    if tuple(shape) != tuple(expected):
        raise ValueError(
            f"{name}: expected shape {tuple(expected)} for x of shape {tuple(x)}, "
            f"got {tuple(shape)}"
        )


def require_broadcast(name: str, shape: Sequence[int], x: Sequence[int], axis: int) -> None:
    """A weight or bias: the normalized axes, after any that broadcast. axis is negative."""
    leading, normalized = shape[:axis], shape[axis:]
    rows = x[:axis]
    fits = normalized == x[axis:] and len(leading) <= len(rows)
    if fits and all(a in (1, b) for a, b in zip(reversed(leading), reversed(rows))):
        return
    alternative = f", or with leading dimensions that broadcast against {tuple(rows)}"
    raise ValueError(
        f"{name}: expected shape {tuple(x[axis:])}{alternative if rows else ''} for x of shape "
        f"{tuple(x)}, got {tuple(shape)}"
    )
