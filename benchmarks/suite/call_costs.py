"""What a call costs on the CPU: on 1 x 8 elements, whose kernel takes some 20 ns, all of it included."""

from __future__ import annotations

import importlib.util
import timeit
from collections.abc import Callable
from functools import partial
from typing import Any

import numpy as np
import rmsnorm

from .cases import EPS
from .measure import quartiles

Call = Callable[[], object]


def nanoseconds(call: Call, calls: int, repeats: int) -> list[float]:
    """Quartiles, less the time of an empty call."""
    empty = min(timeit.repeat(lambda: None, number=calls, repeat=repeats))
    times = timeit.repeat(call, number=calls, repeat=repeats)
    return quartiles([(t - empty) / calls * 1e9 for t in times])


def calls_on(arrays: str, make: Callable[[tuple[int, ...]], Any]) -> dict[str, Call]:
    x, residual, y, total = (make((1, 8)) for _ in range(4))
    weight = make((8,))
    outputs = {"out": y, "residual_out": total}
    return {
        f"rms_norm, {arrays}, out": partial(rmsnorm.rms_norm, x, weight, out=y),
        f"rms_norm, {arrays}": partial(rmsnorm.rms_norm, x, weight),
        f"add_rms_norm, {arrays}, out": partial(
            rmsnorm.add_rms_norm, x, residual, weight, **outputs
        ),
        f"mean_square, {arrays}": partial(rmsnorm.mean_square, x),
    }


def calls_by_name(with_torch: bool) -> dict[str, Call]:
    source, destination = np.ones((1, 8), np.float32), np.ones((1, 8), np.float32)
    calls = calls_on("NumPy", partial(np.ones, dtype=np.float32))
    calls["np.copyto"] = partial(np.copyto, destination, source)
    if not with_torch or importlib.util.find_spec("torch") is None:
        return calls
    import torch

    x, weight = torch.ones(1, 8), torch.ones(8)
    calls |= calls_on("torch", torch.ones)
    calls["torch's F.rms_norm"] = partial(torch.nn.functional.rms_norm, x, (8,), weight, EPS)
    return calls


def call_costs(quick: bool, with_torch: bool) -> list[dict[str, Any]]:
    calls, repeats = (2_000, 5) if quick else (50_000, 15)
    return [
        {"call": name, "ns": nanoseconds(call, calls, repeats)}
        for name, call in calls_by_name(with_torch).items()
    ]
