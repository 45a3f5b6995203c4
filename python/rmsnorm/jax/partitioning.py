"""How a call is split over devices: by rows. Every device has whole rows, and all of the weights.

XLA knows nothing of what a custom call does, and would gather all arguments on every device.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import count
from typing import Any, NamedTuple

import jax
import numpy as np
from jax.experimental.custom_partitioning import custom_partitioning
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from .manual_axes import varying_alike

Shape = tuple[int, ...]


class ArrayType(NamedTuple):
    shape: Shape
    dtype: np.dtype[Any]


# For each row dimension the axes of the mesh that it is split over.
RowAxes = list[tuple[Any, ...]]


def _axes_of(sharding: Any, dimension: int) -> tuple[Any, ...]:
    spec = getattr(sharding, "spec", ())
    axes = spec[dimension] if dimension < len(spec) else None
    return () if axes is None else axes if isinstance(axes, tuple) else (axes,)


@dataclass(frozen=True)
class RowPartitioning:
    """For arrays whose first dimensions are rows: all of them, as many as the first result has, or
    one, which then stands for all of them."""

    rows: Shape  # of the first result
    arguments: Sequence[Shape]
    results: Sequence[ArrayType]
    # The names of results that are sums over rows, and in which dtype parts of them are added.
    sums: Sequence[np.dtype[Any] | None]

    def _is_split(self, shape: Shape, dimension: int) -> bool:
        return shape[dimension] == self.rows[dimension]

    def _dimensions(self, shape: Shape) -> range:
        return range(min(len(shape), len(self.rows)))

    def _sharding(self, mesh: Mesh, shape: Shape, axes: RowAxes) -> NamedSharding:
        spec = [
            axes[d] if axes[d] and self._is_split(shape, d) else None
            for d in self._dimensions(shape)
        ]
        return NamedSharding(mesh, PartitionSpec(*spec))

    def _summed_axes(self, shape: Shape, axes: RowAxes) -> tuple[Any, ...]:
        """The axes of the mesh over which a result of this shape is a sum."""
        return tuple(
            name
            for d in self._dimensions(shape)
            if not self._is_split(shape, d)
            for name in axes[d]
        )

    def rule(self) -> str:
        """In the notation of custom_partitioning: which dimensions are split alike."""
        others = count()

        def factors(shape: Shape) -> str:
            return " ".join(
                f"row{d}"
                if d < len(self.rows) and self._is_split(shape, d)
                else f"other{next(others)}"
                for d in range(len(shape))
            )

        arguments = ", ".join(factors(shape) for shape in self.arguments)
        return f"{arguments} -> {', '.join(factors(result.shape) for result in self.results)}"

    def infer(self, mesh: Any, arguments: Sequence[Any]) -> list[NamedSharding]:
        """Shardings of the results by those of the arguments."""
        axes: RowAxes = [
            next(
                (
                    found
                    for argument in arguments
                    if d < len(argument.shape) and self._is_split(argument.shape, d)
                    if (found := _axes_of(argument.sharding, d))
                ),
                (),
            )
            for d in range(len(self.rows))
        ]
        return [self._sharding(mesh, result.shape, axes) for result in self.results]

    def jax_types(
        self, types: Sequence[ArrayType], arguments: Sequence[jax.Array]
    ) -> list[jax.ShapeDtypeStruct]:
        """The types of results as JAX tracks them: with shardings, where those are part of types."""
        mesh = jax.typeof(arguments[0]).sharding.mesh
        if mesh.empty:
            return [jax.ShapeDtypeStruct(shape, dtype) for shape, dtype in types]
        shardings = self.infer(mesh, [jax.typeof(argument) for argument in arguments])
        varying = varying_alike(arguments[0])
        return [
            jax.ShapeDtypeStruct(shape, dtype, sharding=sharding, **varying)
            for (shape, dtype), sharding in zip(types, shardings)
        ]

    def partition(
        self, call: Callable[..., list[jax.Array]], mesh: Mesh, results: Sequence[Any]
    ) -> Any:
        """What custom_partitioning asks for: the mesh, the call of a device, and shardings.

        `call(types, *arrays)` computes results of the types.
        """
        axes = [_axes_of(results[0].sharding, d) for d in range(len(self.rows))]
        axes = [
            names if self.rows[d] % np.prod([mesh.shape[n] for n in names], dtype=int) == 0 else ()
            for d, names in enumerate(axes)
        ]
        shardings = [self._sharding(mesh, result.shape, axes) for result in self.results]
        summed = [self._summed_axes(result.shape, axes) for result in self.results]
        types = [
            ArrayType(
                sharding.shard_shape(result.shape),
                result.dtype if not over or partial is None else partial,
            )
            for result, sharding, over, partial in zip(self.results, shardings, summed, self.sums)
        ]

        def call_of_device(*arrays: jax.Array) -> list[jax.Array]:
            values = call(types, *arrays)
            return [
                jax.lax.psum(value, over).astype(result.dtype) if over else value
                for value, result, over in zip(values, self.results, summed)
            ]

        arguments = tuple(self._sharding(mesh, shape, axes) for shape in self.arguments)
        return mesh, call_of_device, shardings, arguments

    def split(self, call: Callable[..., list[jax.Array]]) -> Callable[..., list[jax.Array]]:
        """`call` with the types of all results, as a function that XLA may split."""

        def whole(*arrays: jax.Array) -> list[jax.Array]:
            return call(self.results, *arrays)

        if not self.rows:
            return whole
        partitioned = custom_partitioning(whole)
        partitioned.def_partition(
            partition=lambda mesh, arguments, results: self.partition(call, mesh, results),
            infer_sharding_from_operands=lambda mesh, arguments, _: self.infer(mesh, arguments),
            sharding_rule=self.rule(),
        )
        return partitioned
