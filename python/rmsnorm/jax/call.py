"""A custom call that JAX can map over and split over devices.

A handler is told by the attributes `arguments` and `results` what the arrays of a call are. They
have the rank of the first result, or its rows alone (rstd), and where one has a single element along
a row dimension it is repeated, or as a result summed, along that. So weights broadcast, and so vmap
works without copies: what is not mapped over gets a dimension of one.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import jax
import numpy as np
from jax.custom_batching import custom_vmap

from .partitioning import ArrayType, RowPartitioning


@dataclass(frozen=True)
class Call:
    target: str
    attributes: dict[str, Any]
    normalized: int  # the number of normalized axes
    # The dtype in which parts of results are added up that are sums over rows, by name.
    sums: dict[str, np.dtype[Any]]

    def __call__(
        self, arguments: dict[str, jax.Array | None], results: dict[str, ArrayType]
    ) -> dict[str, jax.Array]:
        """The results by name. Arguments that are None are left out."""
        present = {name: array for name, array in arguments.items() if array is not None}
        values = self._mapped(list(present), list(results), list(results.values()))(
            *present.values()
        )
        return dict(zip(results, values))

    def _mapped(self, arguments: list[str], results: list[str], types: Sequence[ArrayType]) -> Any:
        """The call as a function of its arrays."""

        @custom_vmap
        def call(*arrays: jax.Array) -> list[jax.Array]:
            return self._partitioned(arguments, results, types, arrays)

        @call.def_vmap
        def _(size: int, is_mapped: Sequence[bool], *arrays: jax.Array) -> Any:
            wide = [a if m else a.reshape((1, *a.shape)) for a, m in zip(arrays, is_mapped)]
            wide_types = [ArrayType((size, *shape), dtype) for shape, dtype in types]
            values = self._mapped(arguments, results, wide_types)(*wide)
            return values, [True] * len(results)

        return call

    def _partitioned(
        self,
        arguments: list[str],
        results: list[str],
        types: Sequence[ArrayType],
        arrays: Sequence[jax.Array],
    ) -> list[jax.Array]:
        partitioning = RowPartitioning(
            rows=types[0].shape[: -self.normalized],
            arguments=[array.shape for array in arrays],
            results=types,
            sums=[self.sums.get(name) for name in results],
        )

        def compiled(types: Sequence[ArrayType], *arrays: jax.Array) -> list[jax.Array]:
            call = jax.ffi.ffi_call(self.target, partitioning.jax_types(types, arrays))
            return list(
                call(
                    *arrays,
                    arguments=" ".join(arguments),
                    results=" ".join(results),
                    **self.attributes,
                )
            )

        return partitioning.split(compiled)(*arrays)
