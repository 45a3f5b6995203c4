"""rms_norm and add_rms_norm for JAX."""

from __future__ import annotations

from functools import partial

import jax

from .._typing import DTypeLike, Rounding
from .arguments import Options, read_options
from .gradients import norm
from .manual_axes import vary_alike


# Outside of jit a call is a compiled program of its own; within it leaves no trace.
@partial(jax.jit, static_argnums=0, inline=True)
def _compiled(
    options: Options,
    x: jax.Array,
    residual: jax.Array | None,
    weight: jax.Array | None,
    bias: jax.Array | None,
) -> tuple[jax.Array, jax.Array | None]:
    arrays = vary_alike(x, residual, weight, bias)
    y, residual_out, _ = norm(options, False, *arrays)
    return y, residual_out


def rms_norm(
    x: jax.Array,
    weight: jax.Array | None = None,
    bias: jax.Array | None = None,
    *,
    eps: float = 1e-6,
    axis: int = -1,
    weight_offset: float = 0.0,
    rounding: Rounding = "once",
    partial: float = 1.0,
    out_dtype: DTypeLike | None = None,
) -> jax.Array:
    """Root mean square layer normalization, for jit, grad and vmap.

    ``y = x / sqrt(mean(x**2) + eps) * (weight_offset + weight) + bias``, the mean taken over the axes
    `axis` ... -1 together. The values are those of rmsnorm.rms_norm, bit for bit. Differentiable in
    x, weight and bias, in reverse mode and more than once; gradients pass through roundings
    unchanged.

    Args:
        x: JAX or NumPy array of float16, bfloat16, float32 or, with jax_enable_x64, float64, of at
            least one dimension.
        weight: Array of shape ``x.shape[axis:]``, optionally after leading dimensions that broadcast
            against those of x. Any of the four dtypes. None: ones.
        bias: As weight, added at the end. None: nothing is added.
        eps: Added to the mean square, in units of x squared; finite, >= 0. As all options a number
            that is known when the program is traced.
        axis: First normalized axis.
        weight_offset: Added to weight in the compute type; 1.0 for weights stored around zero.
        rounding: Where half precision rounds: "once", "before_weight" or "rstd", as in
            rmsnorm.rms_norm.
        partial: In (0, 1]; the mean is taken over the first ceil(partial * n) elements of a row.
        out_dtype: dtype of the result. None: that of x.

    Returns:
        An array of the shape of x.

    Raises:
        TypeError, ValueError: An argument is of the wrong kind, dtype, shape or value; raised while
            the program is traced.

    Examples:
        >>> import jax
        >>> import jax.numpy as jnp
        >>> import rmsnorm.jax
        >>> norm = jax.jit(lambda x: rmsnorm.jax.rms_norm(x, eps=0.0))
        >>> norm(jnp.array([[1.0, 7.0]]))
        Array([[0.2, 1.4]], dtype=float32)
    """
    options = read_options(
        x,
        None,
        weight,
        bias,
        eps=eps,
        axis=axis,
        weight_offset=weight_offset,
        rounding=rounding,
        partial=partial,
        round_residual=True,
        out_dtype=out_dtype,
    )
    y: jax.Array = _compiled(options, x, None, weight, bias)[0]
    return y


def add_rms_norm(
    x: jax.Array,
    residual: jax.Array,
    weight: jax.Array | None = None,
    bias: jax.Array | None = None,
    *,
    eps: float = 1e-6,
    axis: int = -1,
    weight_offset: float = 0.0,
    rounding: Rounding = "once",
    round_residual: bool = True,
) -> tuple[jax.Array, jax.Array]:
    """Residual add and rms_norm in one pass over memory.

    ``residual_out = x + residual``, and ``y = rms_norm(residual_out, ...)``.

    Args:
        x, weight, bias, eps, axis, weight_offset, rounding: As in rms_norm.
        residual: Array of the shape of x; any of the four dtypes.
        round_residual: True: the norm is taken of residual_out, as the model that adds and then
            normalizes computes. False: of the sum before it is rounded to that dtype.

    Returns:
        (y, residual_out), of the shape of x. y has the dtype of x, residual_out the one that x and
        residual promote to. Differentiable, both of them.

    Raises:
        TypeError, ValueError: As rms_norm.

    Examples:
        >>> import jax.numpy as jnp
        >>> import rmsnorm.jax
        >>> y, residual = rmsnorm.jax.add_rms_norm(
        ...     jnp.array([[1.0, 3.0]]), jnp.array([[0.0, 4.0]]), eps=0.0
        ... )
        >>> y
        Array([[0.2, 1.4]], dtype=float32)
        >>> residual
        Array([[1., 7.]], dtype=float32)
    """
    if residual is None:
        raise TypeError("residual: expected a JAX or NumPy array, got NoneType")
    options = read_options(
        x,
        residual,
        weight,
        bias,
        eps=eps,
        axis=axis,
        weight_offset=weight_offset,
        rounding=rounding,
        partial=1.0,
        round_residual=round_residual,
        out_dtype=None,
    )
    results: tuple[jax.Array, jax.Array] = _compiled(options, x, residual, weight, bias)
    return results
