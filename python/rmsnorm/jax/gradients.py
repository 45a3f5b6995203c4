"""The norm as a function that JAX differentiates: by the backward kernel, and from there by JAX."""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.custom_derivatives import SymbolicZero

from . import calls, formula
from .arguments import Options
from .manual_axes import vary_alike
from .partitioning import ArrayType


@dataclass(frozen=True)
class Wanted:
    """The gradients that a backward call computes beside dx: fixed when a program is traced."""

    dx_dtype: np.dtype[Any]
    dweight: np.dtype[Any] | None
    dbias: ArrayType | None  # the shape and dtype of bias


@partial(jax.custom_vjp, nondiff_argnums=(0, 1))
def backward(
    options: Options,
    wanted: Wanted,
    dy: jax.Array,
    x: jax.Array,
    residual: jax.Array | None,
    weight: jax.Array | None,
    rstd: jax.Array,
    d_residual: jax.Array | None,
) -> tuple[jax.Array, jax.Array | None, jax.Array | None]:
    """(dx, dweight, dbias). rstd is that of x and residual, so that nothing is derived by it."""
    return calls.backward(
        options,
        dy,
        x,
        residual,
        weight,
        rstd,
        d_residual,
        dx_dtype=wanted.dx_dtype,
        dweight_dtype=wanted.dweight,
        dbias_type=wanted.dbias,
    )


def _backward_forward(options: Options, wanted: Wanted, *arrays: Any) -> Any:
    return backward(options, wanted, *arrays), arrays


def _backward_backward(options: Options, wanted: Wanted, arrays: Any, cotangents: Any) -> Any:
    dy, x, residual, weight, _, d_residual = arrays
    bias_shape, bias_dtype = wanted.dbias or ((), None)
    computed = calls.compute_dtype(dy, x, residual, weight, d_residual, wanted.dx_dtype, bias_dtype)

    def from_formula(
        dy: jax.Array,
        x: jax.Array,
        residual: jax.Array | None,
        weight: jax.Array | None,
        d_residual: jax.Array | None,
    ) -> Any:
        dx, dweight, dbias = formula.gradients(
            options, computed, dy, x, residual, weight, d_residual, bias_shape
        )
        return (
            dx.astype(wanted.dx_dtype),
            None if wanted.dweight is None or dweight is None else dweight.astype(wanted.dweight),
            None if bias_dtype is None else dbias.astype(bias_dtype),
        )

    _, pull_back = jax.vjp(from_formula, dy, x, residual, weight, d_residual)
    *by_inputs, by_d_residual = pull_back(cotangents)
    return *by_inputs, None, by_d_residual


backward.defvjp(_backward_forward, _backward_backward)


@partial(
    jax.tree_util.register_dataclass,
    data_fields=["x", "residual", "weight", "rstd"],
    meta_fields=["wanted", "x_type", "residual_type", "bias_type"],
)
@dataclass
class _Saved:
    """From the forward to the backward pass; x is what was normalized, before residual was added."""

    x: Any
    residual: Any
    weight: Any
    rstd: Any
    wanted: Wanted
    # Of the arguments, as jax.typeof returns them.
    x_type: Any
    residual_type: Any
    bias_type: Any


@partial(jax.custom_vjp, nondiff_argnums=(0, 1))
def norm(
    options: Options,
    with_rstd: bool,
    x: jax.Array,
    residual: jax.Array | None,
    weight: jax.Array | None,
    bias: jax.Array | None,
) -> tuple[jax.Array, jax.Array | None, jax.Array | None]:
    """(y, residual_out, rstd), as calls.forward returns them.

    Nothing is derived by rstd, which is for the backward pass.
    """
    return calls.forward(options, x, residual, weight, bias, with_rstd=with_rstd)


def _norm_forward(options: Options, with_rstd: bool, *primals: Any) -> Any:
    x: Any
    x, residual, weight, bias = (None if primal is None else primal.value for primal in primals)
    _, _, weight_primal, bias_primal = primals
    # Through norm and not through the call, so that what is saved can be derived again.
    y, residual_out, rstd = norm(options, True, x, residual, weight, bias)
    rounded = residual is not None and options.round_residual
    saved = _Saved(
        x=residual_out if rounded else x,
        residual=None if rounded else residual,
        weight=weight,
        rstd=rstd,
        wanted=Wanted(
            dx_dtype=x.dtype if residual is None else calls.sum_dtype(x, residual),
            dweight=weight.dtype if weight is not None and weight_primal.perturbed else None,
            dbias=ArrayType(bias.shape, bias.dtype)
            if bias is not None and bias_primal.perturbed
            else None,
        ),
        x_type=jax.typeof(x),
        residual_type=None if residual is None else jax.typeof(residual),
        bias_type=None if bias is None else jax.typeof(bias),
    )
    return (y, residual_out, rstd if with_rstd else None), saved


def _present(cotangent: Any) -> jax.Array | None:
    return None if isinstance(cotangent, SymbolicZero) else cotangent


def _of_type(gradient: Any, argument_type: Any) -> Any:
    """The gradient in the dtype of its argument and, where JAX has them in types, its sharding."""
    if argument_type is None:
        return None
    gradient = gradient.astype(argument_type.dtype)
    if jax.typeof(gradient).sharding.spec == argument_type.sharding.spec:
        return gradient
    return jax.sharding.reshard(gradient, argument_type.sharding)


def _norm_backward(options: Options, with_rstd: bool, saved: _Saved, cotangents: Any) -> Any:
    dy, d_residual = (_present(cotangent) for cotangent in cotangents[:2])
    dx: Any
    if dy is not None:
        dx, dweight, dbias = backward(
            options,
            saved.wanted,
            dy,
            saved.x,
            saved.residual,
            saved.weight,
            saved.rstd,
            d_residual,
        )
    else:
        dx, dweight, dbias = d_residual, None, None
        if dx is None:
            dx = jnp.zeros_like(saved.x)
    weight_type = None if saved.weight is None else jax.typeof(saved.weight)
    # Gradients that nobody wants are zeros, which XLA drops, since JAX before 0.10 takes it amiss
    # where a function returns None at one call and an array at another.
    if dweight is None and weight_type is not None:
        dweight = jnp.zeros(weight_type.shape, weight_type.dtype)
    if dbias is None and saved.bias_type is not None:
        dbias = jnp.zeros(saved.bias_type.shape, saved.bias_type.dtype)
    dx, dweight, dbias = vary_alike(dx, dweight, dbias)
    return (
        _of_type(dx, saved.x_type),
        _of_type(dx, saved.residual_type),
        _of_type(dweight, weight_type),
        _of_type(dbias, saved.bias_type),
    )


norm.defvjp(_norm_forward, _norm_backward, symbolic_zeros=True)
