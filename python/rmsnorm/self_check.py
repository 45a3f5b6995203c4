"""Compares rms_norm with arithmetic that is exact for the purpose, on the ISA in use."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from decimal import Decimal, localcontext
from typing import Any

import numpy as np

import rmsnorm
from rmsnorm import _core

# Fraction bits, and the exponent of the smallest normal number.
FORMATS = {
    "float16": (10, -14),
    "bfloat16": (7, -126),
    "float32": (23, -126),
    "float64": (52, -1022),
}

EPS = 1e-6

# Shorter than a vector, a vector and a bit, several blocks with a tail.
LENGTHS = (1, 7, 33, 1000, 4099)


def budget(name: str) -> float:
    """What is promised, in units in the last place of the result."""
    return _core.error_bound(name, "float64" if name == "float64" else "float32")


@dataclass(frozen=True)
class Result:
    dtype: str
    error: float  # the largest, in units in the last place; NaN: not run
    note: str = ""

    @property
    def passed(self) -> bool:
        return bool(self.note) or self.error <= budget(self.dtype)

    def __str__(self) -> str:
        if self.note:
            return f"{self.dtype:9} {self.note}"
        verdict = "ok" if self.passed else "FAILED"
        return f"{self.dtype:9} {self.error:.3f} of {budget(self.dtype):g} allowed: {verdict}"


def numpy_dtype(name: str) -> np.dtype[Any] | None:
    if name != "bfloat16":
        return np.dtype(name)
    try:
        import ml_dtypes
    except ImportError:
        return None
    dtype: np.dtype[Any] = np.dtype(ml_dtypes.bfloat16)
    return dtype


def error_by_float64(x: Any, weight: Any, y: Any, name: str) -> float:
    x64, w64 = x.astype(np.float64), weight.astype(np.float64)
    # float64 errs by 2^-50 or so, a hundred-millionth of a unit of float32.
    exact = x64 / np.sqrt(np.mean(x64 * x64, axis=-1, keepdims=True) + EPS) * w64
    fraction_bits, smallest_exponent = FORMATS[name]
    exponent = np.maximum(np.frexp(exact)[1] - 1, smallest_exponent)
    unit = np.ldexp(1.0, exponent - fraction_bits)
    error = np.abs(y.astype(np.float64) - exact) / unit
    return float(np.max(error)) if np.all(np.isfinite(error)) else float("inf")


def error_by_decimal(x: Any, weight: Any, y: Any, name: str) -> float:
    fraction_bits, _ = FORMATS[name]
    worst = 0.0
    with localcontext() as context:
        context.prec = 50
        weights = [Decimal(value) for value in weight.tolist()]
        for row, results in zip(x.tolist(), y.tolist()):
            values = [Decimal(value) for value in row]
            mean = sum((value * value for value in values), Decimal(0)) / len(values)
            root = (mean + Decimal(EPS)).sqrt()
            for value, w, result in zip(values, weights, results):
                exact = value / root * w
                unit = Decimal(2) ** (int(np.frexp(float(exact))[1]) - 1 - fraction_bits)
                error = float(abs(Decimal(result) - exact) / unit)
                if not error <= worst:
                    worst = float("inf") if math.isnan(error) else error
    return worst


def check_dtype(name: str) -> Result:
    dtype = numpy_dtype(name)
    if dtype is None:
        return Result(name, float("nan"), "not checked: ml_dtypes is not installed")
    error_of = error_by_decimal if name == "float64" else error_by_float64
    rng = np.random.default_rng(0)
    worst = 0.0
    for n in LENGTHS:
        x = rng.standard_normal((4, n)).astype(dtype)
        weight = rng.uniform(0.5, 2.0, n).astype(dtype)
        y = rmsnorm.rms_norm(x, weight, eps=EPS)
        worst = max(worst, error_of(x, weight, y, name))
    return Result(name, worst)


def run() -> Iterator[Result]:
    for name in FORMATS:
        yield check_dtype(name)
