"""The handlers of XLA's custom calls on CUDA, on the emulation, with an API of the tests' own."""

from __future__ import annotations

import numpy as np
import pytest
import xla_frame
from rmsnorm import _core

HANDLERS = _core.xla_handlers()["CUDA"]
COMMAND_BUFFER_COMPATIBLE = 1


def normal(shape: tuple[int, ...], seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).standard_normal(shape).astype(np.float32)


def call(name: str, arguments: dict, results: dict, **changed: object) -> None:
    xla = xla_frame.Xla()
    assert xla_frame.call(HANDLERS[name], xla, arguments, results, **changed), xla.errors
    assert not xla.errors and not xla.memory


def test_metadata() -> None:
    """What frees memory behind a launch must not be replayed from a graph."""
    xla = xla_frame.Xla()
    forward, backward = (HANDLERS[f"rmsnorm_{name}"] for name in ("forward", "backward"))
    assert xla_frame.metadata_of(forward, xla) == (0, 3, COMMAND_BUFFER_COMPATIBLE)
    assert xla_frame.metadata_of(backward, xla) == (0, 3, 0)


def test_forward() -> None:
    x, weight = normal((3, 2, 40)), normal((1, 2, 40), 1)
    y, rstd = np.empty_like(x), np.empty((3, 2), np.float32)
    call("rmsnorm_forward", {"x": x, "weight": weight}, {"y": y, "rstd": rstd}, eps=1e-5)
    exact = 1 / np.sqrt(np.mean(x.astype(np.float64) ** 2, axis=-1) + 1e-5)
    np.testing.assert_allclose(rstd, exact, rtol=1e-6)
    np.testing.assert_allclose(y, x * exact[..., None] * weight, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("mapped", [False, True])
def test_backward(mapped: bool) -> None:
    """With memory for the sums from XLA; `mapped`: x stands for all that dy has, as under vmap."""
    x, weight = normal((1, 5, 40) if mapped else (3, 5, 40)), normal((1, 1, 40), 1)
    dy = normal((3, 5, 40), 2)
    wide = x.astype(np.float64)
    rstd = 1 / np.sqrt(np.mean(wide**2, axis=-1) + 1e-6)
    dx = np.empty_like(dy)
    dweight = np.empty((3, 1, 40) if mapped else (1, 1, 40), np.float32)
    dbias = np.empty((1, 1, 40), np.float32)
    arguments = {"dy": dy, "x": x, "weight": weight, "rstd": rstd.astype(np.float32)}
    call("rmsnorm_backward", arguments, {"dx": dx, "dweight": dweight, "dbias": dbias})

    xhat, g = wide * rstd[..., None], dy.astype(np.float64) * weight
    c = np.mean(g * xhat, axis=-1, keepdims=True)
    np.testing.assert_allclose(dx, (g - c * xhat) * rstd[..., None], rtol=1e-4, atol=1e-5)
    rows = (1,) if mapped else (0, 1)
    expected = np.sum(dy * xhat, axis=rows, keepdims=True)
    np.testing.assert_allclose(dweight, expected, rtol=1e-4, atol=1e-5)
    np.testing.assert_allclose(dbias, np.sum(dy, (0, 1), keepdims=True), rtol=1e-4, atol=1e-5)


def test_refusals() -> None:
    x, y = normal((3, 40)), normal((3, 40), 1)
    before = y.copy()
    xla = xla_frame.Xla()
    handler = HANDLERS["rmsnorm_forward"]
    assert not xla_frame.call(handler, xla, {"x": x}, {"y": y}, eps=-1.0)
    assert xla.errors[0][1].startswith("rmsnorm: eps: ")
    np.testing.assert_array_equal(y, before)
