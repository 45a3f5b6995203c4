"""Forward passes on the CPU against a copy of the same bytes, in one process, interleaved.

    python benchmarks/forward.py                 # the table below, one thread
    python benchmarks/forward.py --rounds 201 --threads 2 --json forward.json

`ratio` is the median time of rms_norm with `out` given over the median time of a copy of x to y, the
fewest bytes that any implementation moves. The last lines give the cost of a call beyond its kernel:
the time of a call on an 1 x 8 array, whose kernel takes some 20 ns, all of which it includes.
"""

from __future__ import annotations

import argparse
import json
import platform
import statistics
import time
import timeit
from pathlib import Path

import ml_dtypes
import numpy as np
import rmsnorm

SHAPES = [(256, 4096), (4096, 4096), (16384, 128), (64, 65536), (16, 4096), (1, 4096)]
DTYPES = {"f32": np.float32, "bf16": ml_dtypes.bfloat16, "f16": np.float16, "f64": np.float64}


def cpu_name() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return platform.processor()
    return next((line.split(":", 1)[1].strip() for line in lines if "model name" in line), "?")


def seconds(function, *arguments, **keywords) -> float:
    start = time.perf_counter()
    function(*arguments, **keywords)
    return time.perf_counter() - start


def copy_bytes(x, y):
    np.copyto(y.view(np.uint8), x.view(np.uint8))


def measure(rows: int, n: int, dtype, rounds: int) -> dict[str, float]:
    generator = np.random.default_rng(0)
    x = generator.standard_normal((rows, n), dtype=np.float32).astype(dtype)
    weight = np.ones(n, dtype)
    y = np.empty_like(x)
    copies, norms = [], []
    for _ in range(rounds):
        copies.append(seconds(copy_bytes, x, y))
        norms.append(seconds(rmsnorm.rms_norm, x, weight, out=y))
    copy, norm = statistics.median(copies), statistics.median(norms)
    ratios = [b / a for a, b in zip(copies, norms, strict=True)]
    quarter, _, three_quarters = statistics.quantiles(ratios, n=4)
    return {
        "copy_us": copy * 1e6,
        "norm_us": norm * 1e6,
        "ratio": norm / copy,
        "ratio_quartiles": [quarter, three_quarters],
    }


def call_cost(make_array) -> float:
    x, weight, y = make_array((1, 8)), make_array((8,)), make_array((1, 8))
    timer = timeit.Timer(lambda: rmsnorm.rms_norm(x, weight, out=y))
    empty = timeit.Timer(lambda: None)
    calls = 100_000
    net = min(timer.repeat(15, calls)) - min(empty.repeat(15, calls))
    return net / calls * 1e9


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rounds", type=int, default=101)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--dtypes", nargs="+", choices=DTYPES, default=list(DTYPES))
    parser.add_argument("--json", type=Path, help="write the results to this file as well")
    arguments = parser.parse_args()

    rmsnorm.set_num_threads(arguments.threads)
    info = rmsnorm.info()
    machine = {"cpu": cpu_name(), "isa": info["cpu_isa"], "threads": arguments.threads}
    print(
        f"rmsnorm {info['version']} on {machine['cpu']}, {machine['isa']}, "
        f"{machine['threads']} thread(s), {arguments.rounds} rounds"
    )
    print(f"{'dtype':6}{'rows':>7}{'n':>7}{'copy us':>12}{'norm us':>12}{'ratio':>8}  quartiles")
    results = []
    for dtype in arguments.dtypes:
        for rows, n in SHAPES:
            result = measure(rows, n, DTYPES[dtype], arguments.rounds)
            results.append({"dtype": dtype, "rows": rows, "n": n, **result})
            low, high = result["ratio_quartiles"]
            print(
                f"{dtype:6}{rows:7}{n:7}{result['copy_us']:12.1f}{result['norm_us']:12.1f}"
                f"{result['ratio']:8.2f}  {low:.2f} - {high:.2f}"
            )

    calls = {"numpy": call_cost(lambda shape: np.ones(shape, np.float32))}
    try:
        import torch

        calls["torch"] = call_cost(lambda shape: torch.ones(shape))
    except ImportError:
        pass
    for framework, nanoseconds in calls.items():
        print(f"a call with three {framework} arrays, 1 x 8: {nanoseconds:.0f} ns")
    if arguments.json:
        record = {"machine": machine, "results": results, "call_ns": calls}
        arguments.json.write_text(json.dumps(record, indent=1) + "\n")


if __name__ == "__main__":
    main()
