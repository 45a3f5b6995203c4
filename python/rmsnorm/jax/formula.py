"""The gradients of a norm as plain JAX, from which JAX derives what comes after them.

The kernels compute first derivatives. Derivatives of those are rare enough to be had from the
formula, in the compute type and without its roundings, as the kernels' are.
"""

from __future__ import annotations

import math
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from .arguments import Options
from .calls import of_rank


def _normalized(s: jax.Array, options: Options) -> jax.Array:
    """s * rstd, for s in the compute type."""
    rows = s.reshape(*s.shape[: options.axis], -1)
    counted = rows
    if options.partial < 1:
        counted = rows[..., : math.ceil(options.partial * rows.shape[-1])]
    # Computed on rows where a constant has brought what counts near one, so that neither squares
    # nor what is derived from them overflow or are lost.
    # XLA divides by a constant's reciprocal and flushes denormal ones, hence the limit.
    root, limit = math.sqrt(options.eps), float(np.finfo(s.dtype).max) / 2**8
    largest = jnp.max(jnp.abs(counted), axis=-1, keepdims=True, initial=min(root, limit))
    largest = jnp.minimum(largest, limit)
    scale = jax.lax.stop_gradient(jnp.where(largest > 0, largest, 1))
    mean_square = jnp.mean((counted / scale) ** 2, axis=-1, keepdims=True)
    # Where the root is above it, the limit is the scale of every row.
    eps = (root / scale if root <= limit else root / limit) ** 2
    return (rows / scale / jnp.sqrt(mean_square + eps)).reshape(s.shape)


def gradients(
    options: Options,
    computed: np.dtype[Any],
    dy: jax.Array,
    x: jax.Array,
    residual: jax.Array | None,
    weight: jax.Array | None,
    d_residual: jax.Array | None,
    bias_shape: tuple[int, ...],
) -> tuple[jax.Array, jax.Array | None, jax.Array]:
    """(dx, dweight, dbias) in the dtype `computed`, as calls.backward returns them."""

    def norm(s: jax.Array, w: jax.Array | None, b: jax.Array) -> jax.Array:
        y = _normalized(s, options)
        if w is not None:
            y = y * (options.weight_offset + of_rank(w, s.ndim))
        return y + of_rank(b, s.ndim)

    s = x.astype(computed)
    if residual is not None:
        s = s + residual.astype(computed)
    w = None if weight is None else weight.astype(computed)
    _, pull_back = jax.vjp(norm, s, w, jnp.zeros(bias_shape, computed))
    dx, dweight, dbias = pull_back(dy.astype(computed))
    if d_residual is not None:
        dx = dx + d_residual.astype(computed)
    return dx, dweight, dbias
