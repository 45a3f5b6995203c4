"""A CUDA device: tensors of torch, calls inside graphs, events around their replay.

A time is that of one call inside a graph of many, so that nothing of the host is in it. Cold, the calls
go round so many tensors that none is still in the L2 cache when its turn comes again. Warm, as when
decoding, they stay in the cache, as behind the layer that made them.
"""

from __future__ import annotations

import contextlib
import shutil
import subprocess
import time
from collections import deque
from collections.abc import Callable
from functools import partial
from typing import Any

import rmsnorm
import torch
import torch.nn.functional as F

from .cases import CUDA_MOST_BYTES, EPS, Case, Tensors, make_tensors
from .contenders import OURS, Bound
from .measure import quartiles

Call = Callable[[], object]

DTYPES = {"bf16": torch.bfloat16, "f16": torch.float16, "f32": torch.float32, "f64": torch.float64}

# Of one replay: half a millisecond or more, against which the resolution of events is nothing.
REPLAY_BYTES = 2 << 30
WARM_CALLS = 500

# This library once more after the rounds, without the others in between.
OURS_ALONE = f"{OURS}-alone"


def record(calls: list[Call], count: int) -> torch.cuda.CUDAGraph:
    """A graph of `count` calls, of these in turn, warmed up."""
    graph = torch.cuda.CUDAGraph()
    stream = torch.cuda.Stream()
    # What a peer allocates for its results stays taken as long as the arrays of its turn do.
    results: deque[object] = deque(maxlen=len(calls))
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream), torch.no_grad():
        for _ in range(3):
            calls[0]()
        stream.synchronize()
        graph.capture_begin()
        try:
            for i in range(count):
                results.append(calls[i % len(calls)]())
        except BaseException:
            with contextlib.suppress(RuntimeError):
                graph.capture_end()
            raise
        graph.capture_end()
    return graph


def replay_times(graphs: dict[str, torch.cuda.CUDAGraph], rounds: int) -> dict[str, list[float]]:
    """Microseconds of a replay of each, in turns."""
    times: dict[str, list[float]] = {name: [] for name in graphs}
    start = torch.cuda.Event(enable_timing=True)
    end = torch.cuda.Event(enable_timing=True)
    for graph in graphs.values():
        graph.replay()
    for _ in range(rounds):
        for name, graph in graphs.items():
            start.record()
            graph.replay()
            end.record()
            end.synchronize()
            times[name].append(start.elapsed_time(end) * 1e3)
    return times


class Cuda:
    name = "cuda"
    # Of the host, whose threads take no part.
    threads = 1

    def __init__(self, rounds: int) -> None:
        self.rounds = rounds
        self.cache_bytes = torch.cuda.get_device_properties(0).L2_cache_size

    def set_count(self, case: Case) -> int:
        if case.cache == "warm":
            return 1
        # The copy's last writes may still be in the cache: three times its size goes by in between.
        wanted = -(-3 * self.cache_bytes // case.bytes) + 1
        return max(2, min(wanted, CUDA_MOST_BYTES // case.allocated_bytes))

    def call_count(self, case: Case) -> int:
        if case.cache == "warm":
            return WARM_CALLS
        sets = self.set_count(case)
        return -(-max(REPLAY_BYTES // case.bytes, 4) // sets) * sets

    def make_sets(self, case: Case) -> list[Tensors]:
        # What the graphs of the case before allocated is given back only when asked for.
        torch.cuda.empty_cache()
        make = {"device": "cuda", "dtype": DTYPES[case.dtype]}
        weight = torch.rand(case.n, device="cuda").add_(0.5).to(DTYPES[case.dtype])
        filled, empty = partial(torch.randn, **make), partial(torch.empty, **make)
        return [make_tensors(case, weight, filled, empty) for _ in range(self.set_count(case))]

    def runner(self, case: Case, bound: list[Bound]) -> torch.cuda.CUDAGraph:
        try:
            return record([each.call for each in bound], self.call_count(case))
        finally:
            torch.cuda.synchronize()

    def sample(
        self, case: Case, runners: dict[str, torch.cuda.CUDAGraph]
    ) -> dict[str, list[float]]:
        times = replay_times(runners, self.rounds)
        times[OURS_ALONE] = replay_times({OURS: runners[OURS]}, self.rounds)[OURS]
        calls = self.call_count(case)
        return {name: [t / calls for t in taken] for name, taken in times.items()}


def floor_us(rounds: int) -> list[float]:
    """Quartiles of a kernel that does next to nothing, in a graph."""
    one, result = torch.zeros(1, device="cuda"), torch.empty(1, device="cuda")
    graph = record([partial(torch.neg, one, out=result)], WARM_CALLS)
    times = replay_times({"floor": graph}, rounds)["floor"]
    return quartiles([t / WARM_CALLS for t in times])


def host_ns(call: Call, calls: int = 10_000) -> list[float]:
    """Of the call alone: the device has caught up before each batch, which its queue can hold."""
    batch, times = 250, []
    for _ in range(calls // batch):
        torch.cuda.synchronize()
        start = time.perf_counter()
        for _ in range(batch):
            call()
        times.append((time.perf_counter() - start) / batch * 1e9)
    torch.cuda.synchronize()
    return quartiles(times)


def call_costs() -> list[dict[str, Any]]:
    x = torch.randn(1, 4096, device="cuda", dtype=torch.bfloat16)
    weight, y, residual = torch.ones_like(x[0]), torch.empty_like(x), torch.randn_like(x)
    total, stream = torch.empty_like(x), torch.cuda.current_stream().cuda_stream
    norm, add_norm = rmsnorm.rms_norm, rmsnorm.add_rms_norm
    calls: dict[str, Call] = {
        "rms_norm, CUDA, out": partial(norm, x, weight, out=y),
        "rms_norm, CUDA, out and stream": partial(norm, x, weight, out=y, stream=stream),
        "rms_norm, CUDA": partial(norm, x, weight),
        "add_rms_norm, CUDA, out": partial(
            add_norm, x, residual, weight, out=y, residual_out=total
        ),
        "torch's F.rms_norm, CUDA": partial(F.rms_norm, x, (4096,), weight, EPS),
        "torch.neg, CUDA, out": partial(torch.neg, x, out=y),
    }
    with torch.no_grad():
        return [{"call": name, "ns": host_ns(call)} for name, call in calls.items()]


def clocks() -> dict[str, str]:
    if shutil.which("nvidia-smi") is None:
        return {}
    fields = ["clocks.sm", "clocks.mem", "clocks.max.sm", "clocks.max.mem", "temperature.gpu"]
    fields += ["power.draw", "driver_version"]
    query = ["nvidia-smi", "--query-gpu=" + ",".join(fields), "--format=csv,noheader"]
    answer = subprocess.run(query, capture_output=True, text=True, check=False)
    if answer.returncode != 0:
        return {}
    values = answer.stdout.splitlines()[0].split(",")
    return dict(zip(fields, (v.strip() for v in values), strict=False))


def describe() -> dict[str, object]:
    device = torch.cuda.get_device_properties(0)
    return {
        "gpu": device.name,
        "compute_capability": f"{device.major}.{device.minor}",
        "multiprocessors": device.multi_processor_count,
        "l2_bytes": device.L2_cache_size,
        "gpu_memory_bytes": device.total_memory,
        "cuda": torch.version.cuda,
        "rmsnorm_cuda": rmsnorm.info()["cuda"],
    }
