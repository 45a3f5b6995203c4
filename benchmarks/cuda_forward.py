"""Forward passes on a CUDA device against a copy of the same bytes, in one process, interleaved.

    python benchmarks/cuda_forward.py                           # the tables below
    python benchmarks/cuda_forward.py --seconds 120 --json cuda_forward.json

A time is that of one call inside a CUDA graph of many, by events around its replay, the median of
the rounds; the calls go round so many arrays that none is still in the L2 cache when its turn comes
again. `of copy` is the time of the faster of two ways to copy the same number of bytes,
cudaMemcpyAsync and an elementwise kernel, over the time of the call; GB/s counts bytes read and
written once. The decode shapes stay in the cache, as behind the layer that made them; `floor` is a
kernel of one element. Peers are those that can be imported.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import shutil
import statistics
import subprocess
import sys
import time
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

import rmsnorm
import torch
import torch.nn.functional as F

DTYPES = {"bf16": torch.bfloat16, "f16": torch.float16, "f32": torch.float32}
LENGTHS = [1024, 2048, 4096, 5120, 8192, 16384, 32768, 65536]
EPS = 1e-6

# Of all arrays of a shape.
MOST_BYTES = 4 << 30
# Of one replay: half a millisecond or more, against which the resolution of events is nothing.
REPLAY_BYTES = 2 << 30


@dataclass
class Arrays:
    x: torch.Tensor
    weight: torch.Tensor
    y: torch.Tensor
    residual: torch.Tensor | None = None
    residual_out: torch.Tensor | None = None


@dataclass
class Case:
    operation: str
    dtype: str
    rows: int
    n: int
    layout: str = "contiguous"
    with_peers: bool = False
    cached: bool = False

    @property
    def bytes(self) -> int:
        tensors = 4 if self.operation == "add" else 2
        return tensors * self.rows * self.n * DTYPES[self.dtype].itemsize

    def make_arrays(self, sets: int) -> list[Arrays]:
        dtype, made = DTYPES[self.dtype], []
        weight = torch.rand(self.n, device="cuda").add_(0.5).to(dtype)
        for _ in range(sets):
            if self.layout == "packed qkv":
                # The q third of a projection of 32 heads, (tokens, heads, n).
                wide = torch.randn(self.rows // 32, 3 * 32, self.n, device="cuda").to(dtype)
                x = wide[:, :32]
            else:
                x = torch.randn(self.rows, self.n, device="cuda", dtype=dtype)
            arrays = Arrays(x, weight, torch.empty(x.shape, device="cuda", dtype=dtype))
            if self.operation == "add":
                arrays.residual = torch.randn_like(x)
                arrays.residual_out = torch.empty_like(x)
            made.append(arrays)
        return made

    def sets(self, cache_bytes: int) -> int:
        if self.cached:
            return 1
        # The copy's last writes may still be in the cache: three times its size goes by in between.
        footprint = self.bytes * (3 if self.layout == "packed qkv" else 1)
        return max(2, min(-(-3 * cache_bytes // self.bytes) + 1, MOST_BYTES // footprint))

    def calls(self, sets: int) -> int:
        if self.cached:
            return 500
        return -(-max(REPLAY_BYTES // self.bytes, 4) // sets) * sets


Call = Callable[[Arrays], object]


def ours(case: Case) -> Call:
    if case.operation == "add":
        return lambda a: rmsnorm.add_rms_norm(
            a.x, a.residual, a.weight, eps=EPS, out=a.y, residual_out=a.residual_out
        )
    return lambda a: rmsnorm.rms_norm(a.x, a.weight, eps=EPS, out=a.y)


def memory_copy(case: Case) -> Call:
    def call(a: Arrays) -> None:
        a.y.copy_(a.x)
        if a.residual is not None:
            a.residual_out.copy_(a.residual)

    return call


def elementwise_copy(case: Case) -> Call:
    def call(a: Arrays) -> None:
        torch.neg(a.x, out=a.y)
        if a.residual is not None:
            torch.neg(a.residual, out=a.residual_out)

    return call


def torch_eager(case: Case) -> Call:
    if case.operation == "add":

        def call(a: Arrays) -> tuple[torch.Tensor, torch.Tensor]:
            total = a.x + a.residual
            return F.rms_norm(total, (case.n,), a.weight, EPS), total

        return call
    return lambda a: F.rms_norm(a.x, (case.n,), a.weight, EPS)


def plain_norm(x: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
    wide = x.float()
    rstd = torch.rsqrt(wide.square().mean(-1, keepdim=True) + EPS)
    return (wide * rstd * weight.float()).to(x.dtype)


def plain_add_norm(
    x: torch.Tensor, residual: torch.Tensor, weight: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    total = x + residual
    return plain_norm(total, weight), total


def torch_compiled(case: Case) -> Call:
    torch._dynamo.reset()
    if case.operation == "add":
        compiled_add = torch.compile(plain_add_norm, dynamic=False)
        return lambda a: compiled_add(a.x, a.residual, a.weight)
    compiled = torch.compile(plain_norm, dynamic=False)
    return lambda a: compiled(a.x, a.weight)


def liger(case: Case) -> Call:
    if case.operation == "add":
        from liger_kernel.ops.fused_add_rms_norm import LigerFusedAddRMSNormFunction as Add

        return lambda a: Add.apply(a.x, a.residual, a.weight, EPS, 0.0, "llama", False)
    from liger_kernel.ops.rms_norm import LigerRMSNormFunction as Norm

    return lambda a: Norm.apply(a.x, a.weight, EPS, 0.0, "llama", False)


def quack(case: Case) -> Call:
    from quack.rmsnorm import rmsnorm_fwd

    return lambda a: rmsnorm_fwd(a.x, a.weight, residual=a.residual, eps=EPS)


def flashinfer(case: Case) -> Call:
    from flashinfer import norm

    if case.operation == "add":
        # In place: the sum over residual, y over x. As many bytes.
        return lambda a: norm.fused_add_rmsnorm(a.x, a.residual, a.weight, EPS)
    return lambda a: norm.rmsnorm(a.x, a.weight, EPS, out=a.y)


COPIES = {"memcpy": memory_copy, "elementwise copy": elementwise_copy}
PEERS = {
    "torch eager": torch_eager,
    "torch.compile": torch_compiled,
    "Liger": liger,
    "QuACK": quack,
    "FlashInfer": flashinfer,
}


def record(call: Call, arrays: list[Arrays], calls: int) -> torch.cuda.CUDAGraph:
    """A graph of `calls` calls that take the arrays in turn, warmed up."""
    graph = torch.cuda.CUDAGraph()
    stream = torch.cuda.Stream()
    # What a peer allocates for its results stays taken as long as the arrays of its turn do.
    results: deque[object] = deque(maxlen=len(arrays))
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream), torch.no_grad():
        for _ in range(3):
            call(arrays[0])
        stream.synchronize()
        graph.capture_begin()
        try:
            for i in range(calls):
                results.append(call(arrays[i % len(arrays)]))
        except BaseException:
            with contextlib.suppress(RuntimeError):
                graph.capture_end()
            raise
        graph.capture_end()
    return graph


def median_times(graphs: dict[str, torch.cuda.CUDAGraph], rounds: int) -> dict[str, float]:
    """Median microseconds of a replay of each, in turns."""
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
    return {name: statistics.median(each) for name, each in times.items()}


@dataclass
class Benchmark:
    rounds: int
    deadline: float
    peers: list[str]
    results: list[dict[str, object]] = field(default_factory=list)
    left_out: list[str] = field(default_factory=list)
    unavailable: dict[str, str] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self.cache_bytes = torch.cuda.get_device_properties(0).L2_cache_size

    def graphs_of(
        self, case: Case, arrays: list[Arrays], calls: int
    ) -> dict[str, torch.cuda.CUDAGraph]:
        makers: dict[str, Callable[[Case], Call]] = {"rmsnorm": ours}
        if not case.cached and case.layout == "contiguous":
            makers |= COPIES
        if case.with_peers:
            makers |= {name: PEERS[name] for name in self.peers if name not in self.unavailable}
        graphs = {}
        for name, make in makers.items():
            try:
                graphs[name] = record(make(case), arrays, calls)
            except ImportError as error:
                self.unavailable[name] = str(error)
            except Exception as error:
                # A peer's failure is its own; this library's is not.
                if name not in PEERS:
                    raise
                where = f"{name} {case.operation} {case.dtype} {case.rows} x {case.n}"
                self.left_out.append(f"{where}: {type(error).__name__}: {error}"[:300])
                torch.cuda.synchronize()
        return graphs

    def measure(self, case: Case) -> None:
        title = f"{case.operation} {case.dtype} {case.rows} x {case.n} {case.layout}"
        if time.monotonic() > self.deadline:
            self.left_out.append(f"{title}: no time left")
            return
        sets = case.sets(self.cache_bytes)
        calls = case.calls(sets)
        arrays = case.make_arrays(sets)
        graphs = self.graphs_of(case, arrays, calls)
        if case.layout != "contiguous":
            # The copy that it is held against has the same bytes side by side.
            like = Case(case.operation, case.dtype, case.rows, case.n)
            beside = like.make_arrays(sets)
            graphs |= {name: record(make(like), beside, calls) for name, make in COPIES.items()}
        times = {name: t / calls for name, t in median_times(graphs, self.rounds).items()}
        again = median_times({"rmsnorm": graphs["rmsnorm"]}, self.rounds)["rmsnorm"] / calls
        result: dict[str, object] = {
            "operation": case.operation,
            "dtype": case.dtype,
            "rows": case.rows,
            "n": case.n,
            "layout": case.layout,
            "array_sets": sets,
            "calls_in_graph": calls,
            "us": times,
            "rmsnorm_alone_us": again,
            "gb_per_s": case.bytes / times["rmsnorm"] / 1e3,
        }
        copies = [times[name] for name in COPIES if name in times]
        if copies:
            result["fraction_of_copy"] = min(copies) / times["rmsnorm"]
            result["copy_gb_per_s"] = case.bytes / min(copies) / 1e3
        self.results.append(result)
        print_result(result)
        # What the graphs allocated is given back only when asked for.
        graphs.clear()
        torch.cuda.empty_cache()


def print_heading() -> None:
    print(
        f"{'operation':11}{'dtype':6}{'rows':>9}{'n':>7}{'us':>9}{'GB/s':>7}{'copy':>7}"
        f"{'of copy':>9}  peers, us"
    )


def print_result(result: dict[str, object]) -> None:
    times = result["us"]
    peers = ", ".join(f"{name} {times[name]:.1f}" for name in PEERS if name in times)
    fraction = result.get("fraction_of_copy")
    copy = f"{result['copy_gb_per_s']:7.0f}{100 * fraction:8.1f}%" if fraction else " " * 16
    name = result["operation"] + (" qkv" if result["layout"] == "packed qkv" else "")
    print(
        f"{name:11}{result['dtype']:6}{result['rows']:9}{result['n']:7}"
        f"{times['rmsnorm']:9.2f}{result['gb_per_s']:7.0f}{copy}  {peers}",
        flush=True,
    )


def floor_us(rounds: int) -> float:
    """Of a kernel that does next to nothing, in a graph."""
    one = torch.zeros(1, device="cuda")
    arrays = [Arrays(one, one, torch.empty_like(one))]
    graph = record(lambda a: torch.neg(a.x, out=a.y), arrays, 500)
    return median_times({"floor": graph}, rounds)["floor"] / 500


def host_us(call: Callable[[], object], calls: int = 10_000) -> float:
    """Of the call alone: the device has caught up before each batch, which its queue can hold."""
    batch, times = 250, []
    for _ in range(calls // batch):
        torch.cuda.synchronize()
        start = time.perf_counter()
        for _ in range(batch):
            call()
        times.append(time.perf_counter() - start)
    torch.cuda.synchronize()
    return statistics.median(times) / batch * 1e6


def host_costs() -> dict[str, float]:
    x = torch.randn(1, 4096, device="cuda", dtype=torch.bfloat16)
    weight, y, residual = torch.ones_like(x[0]), torch.empty_like(x), torch.randn_like(x)
    total, stream = torch.empty_like(x), torch.cuda.current_stream().cuda_stream
    calls: dict[str, Callable[[], object]] = {
        "rms_norm, out given": lambda: rmsnorm.rms_norm(x, weight, out=y),
        "rms_norm, out and stream given": lambda: rmsnorm.rms_norm(x, weight, out=y, stream=stream),
        "rms_norm": lambda: rmsnorm.rms_norm(x, weight),
        "add_rms_norm, outputs given": lambda: rmsnorm.add_rms_norm(
            x, residual, weight, out=y, residual_out=total
        ),
        "torch F.rms_norm": lambda: F.rms_norm(x, (4096,), weight, EPS),
        "torch neg, out given": lambda: torch.neg(x, out=y),
    }
    with torch.no_grad():
        return {name: host_us(call) for name, call in calls.items()}


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


def machine() -> dict[str, object]:
    device = torch.cuda.get_device_properties(0)
    return {
        "gpu": device.name,
        "compute_capability": f"{device.major}.{device.minor}",
        "multiprocessors": device.multi_processor_count,
        "l2_bytes": device.L2_cache_size,
        "memory_bytes": device.total_memory,
        "cuda": torch.version.cuda,
        "torch": torch.__version__,
        "python": sys.version.split()[0],
        "rmsnorm": rmsnorm.info()["version"],
        "rmsnorm_cuda": rmsnorm.info()["cuda"],
    }


def rows_for(n: int, operation: str, dtype: str) -> int:
    """8192, or as many as let two sets of arrays fit."""
    tensors = 4 if operation == "add" else 2
    return min(8192, MOST_BYTES // (2 * tensors * n * DTYPES[dtype].itemsize))


def cases() -> list[Case]:
    """In the order of what is to be known first."""
    listed = []
    for dtype in DTYPES:
        for operation in ("norm", "add"):
            listed.append(Case(operation, dtype, 4096, 4096, with_peers=dtype == "bf16"))
    peers_at = {1024, 8192, 32768, 65536}
    for operation in ("norm", "add"):
        for n in LENGTHS:
            rows = rows_for(n, operation, "bf16")
            with_peers = n in peers_at and (operation == "norm" or n == 8192)
            listed.append(Case(operation, "bf16", rows, n, with_peers=with_peers))
    for dtype in ("bf16", "f32"):
        listed.append(Case("norm", dtype, 1 << 20, 128, with_peers=dtype == "bf16"))
        listed.append(Case("norm", dtype, 1 << 18, 128, layout="packed qkv"))
    for dtype in ("f32", "f16"):
        for operation in ("norm", "add"):
            for n in LENGTHS:
                if n != 4096 or dtype == "f32":
                    listed.append(Case(operation, dtype, rows_for(n, operation, dtype), n))
    return listed


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument(
        "--seconds", type=float, default=600, help="start no other shape after this time"
    )
    parser.add_argument(
        "--peers", nargs="*", choices=PEERS, default=list(PEERS), help="none with no name"
    )
    parser.add_argument("--json", type=Path, help="write the results to this file as well")
    arguments = parser.parse_args()
    if not torch.cuda.is_available():
        sys.exit("cuda_forward.py: torch sees no CUDA device")

    description = machine()
    before = clocks()
    print(
        f"rmsnorm {description['rmsnorm']} on {description['gpu']}, torch {description['torch']}, "
        f"{arguments.rounds} rounds"
    )
    benchmark = Benchmark(
        arguments.rounds, time.monotonic() + arguments.seconds, list(arguments.peers)
    )
    record_of_run: dict[str, object] = {
        "machine": description,
        "command": ["python", *sys.argv],
        "results": benchmark.results,
    }

    def save() -> None:
        record_of_run["unavailable"] = benchmark.unavailable
        record_of_run["left_out"] = benchmark.left_out
        if arguments.json:
            arguments.json.write_text(json.dumps(record_of_run, indent=1) + "\n")

    print("in a graph of calls on rows of one length, in the cache")
    print_heading()
    for rows in (1, 8, 64):
        for operation in ("norm", "add"):
            benchmark.measure(
                Case(operation, "bf16", rows, 4096, with_peers=rows != 8, cached=True)
            )
    floor = floor_us(arguments.rounds)
    record_of_run["floor_us"] = floor
    print(f"floor, a kernel of one element: {floor:.2f} us")

    record_of_run["host_us"] = host = host_costs()
    print("on the host, us a call")
    for name, microseconds in host.items():
        print(f"  {name:32}{microseconds:8.2f}")
    save()

    print("from memory")
    print_heading()
    for case in cases():
        benchmark.measure(case)
        save()
    record_of_run["clocks"] = {"before": before, "after": clocks()}
    save()
    for name, reason in benchmark.unavailable.items():
        print(f"not compared: {name} ({reason})")
    for line in benchmark.left_out:
        print(f"left out: {line}")


if __name__ == "__main__":
    main()
