"""The operations in float64, to make sure that everything that is timed computes the same.

This is no test of accuracy, tests/ has those: the tolerance is a few units in the last place of the
dtype at the largest result, as much as any order of roundings needs.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np

from .cases import EPS, OPERATIONS, Case, Tensors

TOLERANCE = {"f64": 1e-12, "f32": 1e-5, "f16": 4e-3, "bf16": 3e-2}

# Rows whose results are compared; sums over rows are compared whole.
MOST_ROWS = 64


def as_float64(array: Any) -> np.ndarray:
    """An array of NumPy, JAX or torch on any device."""
    if hasattr(array, "detach"):
        array = array.detach().double().cpu()
    return np.asarray(array).astype(np.float64)


def rstd_of(x: np.ndarray) -> np.ndarray:
    return 1 / np.sqrt(np.square(x).mean(-1, keepdims=True) + EPS)


def forward(t: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
    return {"y": t["x"] * rstd_of(t["x"]) * t["weight"]}


def add(t: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
    total = t["x"] + t["residual"]
    return {"residual_out": total, **forward({"x": total, "weight": t["weight"]})}


def backward(t: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
    rstd = rstd_of(t["x"])
    scaled = t["dy"] * t["weight"]
    dot = (scaled * t["x"]).mean(-1, keepdims=True)
    return {"dx": rstd * (scaled - t["x"] * np.square(rstd) * dot)}


FORMULAS: dict[str, Callable[[dict[str, np.ndarray]], dict[str, np.ndarray]]] = {
    "forward": forward,
    "add": add,
    "backward": backward,
}


def dweight_of(dy: Any, x: Any) -> np.ndarray:
    """Summed over pieces of rows, since all of them in float64 would be large."""
    total = np.zeros(x.shape[-1])
    for first in range(0, len(x), 256):
        piece = as_float64(x[first : first + 256])
        total += (as_float64(dy[first : first + 256]) * piece * rstd_of(piece)).sum(0)
    return total


class Reference:
    """What the results of a case should be, on rows spread over the tensors."""

    def __init__(self, case: Case, tensors: Tensors) -> None:
        self.case = case
        self.step = max(1, case.shape[0] // MOST_ROWS)
        inputs = {name: self.rows_of(tensors[name]) for name in OPERATIONS[case.operation].reads}
        inputs["weight"] = as_float64(tensors["weight"])
        self.results = FORMULAS[case.operation](inputs)
        if case.operation == "backward":
            self.results["dweight"] = dweight_of(tensors["dy"], tensors["x"])

    def rows_of(self, array: Any) -> np.ndarray:
        return as_float64(array[:: self.step])

    def fault_of(self, results: dict[str, Any]) -> str | None:
        """What is wrong with the results, if something is."""
        for name, expected in self.results.items():
            found = results[name]
            if tuple(found.shape[:-1]) == self.case.shape[:-1]:
                found = self.rows_of(found)
            difference = np.abs(as_float64(found).reshape(expected.shape) - expected).max()
            allowed = TOLERANCE[self.case.dtype] * np.abs(expected).max()
            if not difference <= allowed:
                return f"{name} is off by {difference:.3g}, more than {allowed:.3g}"
        return None
