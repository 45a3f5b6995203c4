"""What the tests of rmsnorm.jax share: float64 enabled for them, arrays, and the formula in JAX."""

import math

import cases
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from floats import F32


@pytest.fixture(autouse=True)
def x64():
    """JAX with float64, and without it again afterwards."""
    jax.config.update("jax_enable_x64", True)
    yield
    jax.config.update("jax_enable_x64", False)


def sample(shape, dtype=F32, seed=0):
    return cases.values(np.random.default_rng(seed), shape, dtype)


def normal(shape, seed=0):
    return np.random.default_rng(seed).standard_normal(shape)


def formula(x, weight=None, bias=None, *, eps=1e-6, axis=-1, weight_offset=0.0, partial=1.0):
    """The norm without its roundings, in the dtype of x: JAX itself derives its gradients."""
    axis = axis % x.ndim
    rows = x.reshape(*x.shape[:axis], math.prod(x.shape[axis:]))
    counted = rows[..., : math.ceil(partial * rows.shape[-1])]
    rstd = 1 / jnp.sqrt(jnp.mean(counted**2, axis=-1) + eps)
    y = x * rstd.reshape(x.shape[:axis] + (1,) * (x.ndim - axis))
    if weight is not None:
        y = y * (weight_offset + weight)
    return y if bias is None else y + bias


def assert_close(actual, expected, tolerance=1e-9):
    """Trees of arrays: equal structure and shapes, and values relative to the largest."""
    assert jax.tree.structure(actual) == jax.tree.structure(expected)
    for a, b in zip(jax.tree.leaves(actual), jax.tree.leaves(expected)):
        assert a.shape == b.shape
        a, b = np.asarray(a, np.float64), np.asarray(b, np.float64)
        scale = max(1.0, float(np.max(np.abs(b), initial=0)))
        np.testing.assert_allclose(a, b, rtol=0, atol=tolerance * scale)
