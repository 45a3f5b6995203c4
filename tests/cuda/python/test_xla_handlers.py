"""The handlers of XLA's custom calls on CUDA, on the emulation, with an API of the tests' own."""

from __future__ import annotations

import numpy as np
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
    for handler in HANDLERS.values():
        assert xla_frame.metadata_of(handler, xla_frame.Xla()) == (0, 3, COMMAND_BUFFER_COMPATIBLE)


def test_forward() -> None:
    x, weight = normal((3, 2, 40)), normal((1, 2, 40), 1)
    y, rstd = np.empty_like(x), np.empty((3, 2), np.float32)
    call("rmsnorm_forward", {"x": x, "weight": weight}, {"y": y, "rstd": rstd}, eps=1e-5)
    exact = 1 / np.sqrt(np.mean(x.astype(np.float64) ** 2, axis=-1) + 1e-5)
    np.testing.assert_allclose(rstd, exact, rtol=1e-6)
    np.testing.assert_allclose(y, x * exact[..., None] * weight, rtol=1e-5, atol=1e-6)


def test_refusals() -> None:
    x, y = normal((3, 40)), normal((3, 40), 1)
    before = y.copy()
    xla = xla_frame.Xla()
    handler = HANDLERS["rmsnorm_forward"]
    assert not xla_frame.call(handler, xla, {"x": x}, {"y": y}, eps=-1.0)
    assert xla.errors[0][1].startswith("rmsnorm: eps: ")
    np.testing.assert_array_equal(y, before)
