"""JAX, jitted, on arrays that share their memory with the others' where JAX can; results are its own."""

from __future__ import annotations

from functools import partial
from typing import Any

import jax
import jax.numpy as jnp

from ..cases import EPS, HEADS, PACKED_QKV, Case, Tensors
from . import Bind, Bound, Unsupported


def norm(x: jax.Array, weight: jax.Array) -> jax.Array:
    wide = x.astype(jnp.float32)
    rstd = jax.lax.rsqrt(jnp.mean(jnp.square(wide), -1, keepdims=True) + EPS)
    return (wide * rstd * weight.astype(jnp.float32)).astype(x.dtype)


def add_norm(x: jax.Array, residual: jax.Array, weight: jax.Array) -> tuple[jax.Array, jax.Array]:
    total = x + residual
    return norm(total, weight), total


def norm_of_q(qkv: jax.Array, weight: jax.Array) -> jax.Array:
    return norm(qkv[:, :HEADS], weight)


def finished(function: Any, *operands: Any) -> Any:
    return jax.block_until_ready(function(*operands))


def prepare(case: Case, threads: int) -> Bind:
    if case.dtype == "f64":
        raise Unsupported("JAX is set to 32 bits")
    packed = case.layout == PACKED_QKV
    jitted_norm, jitted_add_norm = jax.jit(norm_of_q if packed else norm), jax.jit(add_norm)
    # The pull-back is an operand, with what the forward pass left for it. It comes out of a jitted function
    # so that all of them have one structure, for which it is compiled once.
    jitted_vjp, jitted_pull = jax.jit(partial(jax.vjp, norm)), jax.jit(lambda pull, dy: pull(dy))

    def forward(t: Tensors) -> Bound:
        x = jax.device_put(t["qkv" if packed else "x"])
        call = partial(finished, jitted_norm, x, jax.device_put(t["weight"]))
        return Bound(call, lambda y: {"y": y})

    def add(t: Tensors) -> Bound:
        operands = (jax.device_put(t[name]) for name in ("x", "residual", "weight"))
        call = partial(finished, jitted_add_norm, *operands)
        return Bound(call, lambda pair: {"y": pair[0], "residual_out": pair[1]})

    def backward(t: Tensors) -> Bound:
        _, pull = jitted_vjp(jax.device_put(t["x"]), jax.device_put(t["weight"]))
        call = partial(finished, jitted_pull, pull, jax.device_put(t["dy"]))
        return Bound(call, lambda gradients: {"dx": gradients[0], "dweight": gradients[1]})

    return {"forward": forward, "add": add, "backward": backward}[case.operation]
