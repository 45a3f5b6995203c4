"""Within jax.shard_map: over which axes of the mesh arrays vary.

Versions of JAX name this differently: that of jaxlib 0.10 and, tried after it, of those before.
"""

from __future__ import annotations

from typing import Any

import jax


def _varying(array: jax.Array) -> frozenset[Any]:
    aval = jax.typeof(array)
    manual = getattr(aval, "manual_axis_type", None)
    if manual is not None:
        return frozenset(manual.varying)
    return frozenset(aval.vma)


def _cast_to_varying(array: jax.Array, axes: tuple[Any, ...]) -> jax.Array:
    pcast = getattr(jax.lax, "pcast", None)
    if pcast is None:
        varying: jax.Array = getattr(jax.lax, "pvary")(array, axes)  # noqa: B009
    else:
        varying = pcast(array, axes, to="varying")
    return varying


def vary_alike(*arrays: jax.Array | None) -> tuple[jax.Array | None, ...]:
    """The arrays, all of them varying over the axes that any of them does.

    Where one is cast for that, its gradient is summed over the axes.
    """
    axes: frozenset[Any] = frozenset()
    for array in arrays:
        if array is not None:
            axes |= _varying(array)
    if not axes:
        return arrays
    return tuple(
        array
        if array is None or not (missing := axes - _varying(array))
        else _cast_to_varying(array, tuple(missing))
        for array in arrays
    )


def varying_alike(array: jax.Array) -> dict[str, Any]:
    """Keywords of jax.ShapeDtypeStruct for what varies over the axes that the array does."""
    axes = _varying(array)
    if not axes:
        return {}
    manual = getattr(jax.typeof(array), "manual_axis_type", None)
    return {"vma": axes} if manual is None else {"manual_axis_type": manual}
