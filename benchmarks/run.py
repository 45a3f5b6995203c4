"""Benchmarks of this library against a copy of the same bytes and against what else is installed.

    python benchmarks/run.py --json results.json --plots figures      # the CPU, ten minutes
    python benchmarks/run.py --quick --operations forward --dtypes bf16 --threads 1
    python benchmarks/run.py --device cuda --json cuda.json
    python benchmarks/run.py --show results.json --plots figures
    python benchmarks/run.py --check old.json new.json

All contenders of a case take turns in one process; a time is the median of the rounds. `of copy` is the
time of a copy of as many bytes in the same round over the time of the call: the fraction of the speed of
a copy that is reached. A peer that is not installed, or cannot do a case, is named with the reason.
"""

from __future__ import annotations

import argparse
import contextlib
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterable, Iterator
from pathlib import Path

import rmsnorm
from rich.console import Console
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
)
from suite import compare, machine, records, report
from suite.call_costs import call_costs
from suite.cases import DTYPES, ITEM_BYTES, OPERATIONS, Case, cpu_grid, cuda_grid
from suite.contenders import PEERS
from suite.measure import Device, Race
from suite.records import Record

CONSOLE = Console(width=max(Console().width, report.LEAST_WIDTH))
HAS_BACKWARD = hasattr(rmsnorm, "rms_norm_backward")

# Of OpenMP's idle threads: half a millisecond, in place of ten or more in which they would disturb the
# next contender. Within a turn calls follow each other faster.
SPIN_COUNT = "10000"
# Each thread of OpenMP to a CPU of its own. Linux may wake the second of two on the CPU of the first,
# which waits for it there: f32 16 x 4096 took 250 us on two threads so, and 7 us bound.
BIND = "true"
# malloc is to keep what it has: results that a peer allocates shall come without page faults, which
# take longer than the norm and depend on what else was allocated before.
KEEP_MEMORY = {"MALLOC_MMAP_MAX_": "0", "MALLOC_TRIM_THRESHOLD_": str(1 << 40)}


def shape(text: str) -> tuple[int, int]:
    rows, n = text.split("x")
    return int(rows), int(n)


def parse(arguments: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    add("--device", choices=("cpu", "cuda"), default="cpu")
    add("--operations", nargs="+", choices=OPERATIONS, help="default: all that there are")
    add("--dtypes", nargs="+", choices=ITEM_BYTES, default=list(DTYPES))
    add("--cache", nargs="+", choices=("warm", "cold"), default=["warm", "cold"])
    add("--shapes", nargs="+", type=shape, metavar="ROWSxN", help="(CPU) in place of the grid's")
    add("--peers", nargs="*", choices=PEERS, default=list(PEERS), help="none with no name")
    add("--threads", nargs="+", type=int, help="(CPU) default: 1, and one for each CPU")
    add("--quick", action="store_true", help="(CPU) fewer shapes and rounds")
    add("--rounds", type=int, help="at most (default: 51; CUDA 15)")
    add("--seconds", type=float, default=3600, help="start no other case after this time")
    add("--json", type=Path, help="write the results to this file")
    add("--plots", type=Path, metavar="FOLDER", help="draw them, as SVG and PNG")
    add("--show", type=Path, metavar="JSON", help="measure nothing, show this file")
    add(
        "--markdown",
        type=int,
        metavar="THREADS",
        help="with --show: times over a copy, for documents",
    )
    add("--check", nargs=2, type=Path, metavar=("OLD", "NEW"), help="exit with 1 if NEW is slower")
    # A process that measures for another one: on one number of threads, without tables.
    add("--part", action="store_true", help=argparse.SUPPRESS)
    # Of such a process: OpenMP, loaded by then, lets it ask no more which CPUs it was given.
    add("--cpus", nargs="+", type=int, help=argparse.SUPPRESS)
    options = parser.parse_args(arguments)
    if options.device == "cuda" and (options.shapes or options.threads or options.quick):
        parser.error("--shapes, --threads and --quick are for --device cpu")
    if options.markdown is not None and not options.show:
        parser.error("--markdown is for --show")
    options.peers = [name for name in PEERS if name in options.peers]
    there = [name for name in OPERATIONS if name != "backward" or HAS_BACKWARD]
    options.operations = options.operations or there
    if missing := set(options.operations) - set(there):
        parser.error(f"this build of rmsnorm has no {', '.join(missing)}")
    return options


def chosen_cases(options: argparse.Namespace) -> list[Case]:
    if options.device == "cuda":
        grid: Iterable[Case] = cuda_grid()
    else:
        grid = cpu_grid(options.dtypes, options.shapes, options.quick)
    return [
        case
        for case in grid
        if case.operation in options.operations
        and case.dtype in options.dtypes
        and case.cache in options.cache
    ]


def new_record() -> Record:
    return {
        "schema": records.SCHEMA,
        "command": ["python", *sys.argv],
        "machine": machine.describe(),
        "unavailable": {},
        "not_measured": [],
        "results": [],
        "call_costs": [],
    }


def new_progress() -> Progress:
    return Progress(
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TimeElapsedColumn(),
        TimeRemainingColumn(),
        console=CONSOLE,
    )


def measure_cases(device: Device, options: argparse.Namespace, record: Record) -> None:
    """Adds to the record, and writes it, case by case."""
    race = Race(device, options.peers, record["unavailable"])
    deadline = time.monotonic() + options.seconds
    cases = chosen_cases(options)
    if not cases:
        sys.exit("run.py: no case of the grid has what is asked for")
    with new_progress() as progress:
        task = progress.add_task("", total=len(cases))
        for case in cases:
            progress.update(task, description=str(case))
            if time.monotonic() > deadline:
                record["not_measured"].append(f"{case}: no time left")
            else:
                result = race.measure(case)
                record["results"].append(result)
                # Not cut to the width of a terminal that there may not be.
                line = report.line_of(result)
                CONSOLE.print(line, markup=False, highlight=False, soft_wrap=True)
            progress.advance(task)
            save(record, options)


def save(record: Record, options: argparse.Namespace) -> None:
    if options.json:
        records.save(record, options.json)


def measure_part(options: argparse.Namespace) -> None:
    from suite.cpu_device import Host

    most, seconds = (9, 0.1) if options.quick else (51, 1.2)
    most = options.rounds or most
    device = Host(options.threads[0], options.cpus, seconds, (min(5, most), most))
    record = new_record()
    measure_cases(device, options, record)
    save(record, options)


@contextlib.contextmanager
def confined_to(threads: int) -> Iterator[dict[str, str]]:
    """An environment and CPUs for a new process in which every library has as many threads."""
    variables = {"OMP_NUM_THREADS": str(threads), "PJRT_NPROC": str(threads)}
    defaults = {"GOMP_SPINCOUNT": SPIN_COUNT, "OMP_PROC_BIND": BIND, **KEEP_MEMORY}
    before = machine.cpus()
    if hasattr(os, "sched_setaffinity"):
        os.sched_setaffinity(0, before[-threads:])
    try:
        yield {**defaults, **os.environ, **variables}
    finally:
        if hasattr(os, "sched_setaffinity"):
            os.sched_setaffinity(0, before)


def measure_cpu(options: argparse.Namespace) -> Record:
    """A process for each number of threads, since libraries choose theirs when they are loaded."""
    counts = options.threads or sorted({1, len(machine.cpus())})
    if any(not 1 <= count <= len(machine.cpus()) for count in counts):
        sys.exit(f"run.py: --threads: expected 1 to {len(machine.cpus())}, got {counts}")
    record = new_record()
    with tempfile.TemporaryDirectory() as folder:
        for threads in counts:
            path = Path(folder) / f"{threads}.json"
            own = ["--part", "--threads", str(threads), "--json", str(path)]
            own += ["--seconds", str(options.seconds / len(counts))]
            own += ["--cpus", *map(str, machine.cpus()[-threads:])]
            with confined_to(threads) as environment:
                command = [sys.executable, *sys.argv, *own]
                status = subprocess.run(command, env=environment, check=False).returncode
            if status != 0:
                sys.exit(f"run.py: measuring on {threads} threads ended with status {status}")
            part = records.load(path)
            record["unavailable"] |= part["unavailable"]
            record["not_measured"] += [
                f"{each} ({threads} threads)" for each in part["not_measured"]
            ]
            record["results"] += part["results"]
            record["machine"]["settings"] |= part["machine"]["settings"]
            save(record, options)
    record["call_costs"] = call_costs(options.quick, with_torch="torch" in options.peers)
    record["machine"]["load_average"].append(machine.load_average())
    save(record, options)
    return record


def measure_cuda(options: argparse.Namespace) -> Record:
    import torch

    if not torch.cuda.is_available():
        sys.exit("run.py: torch sees no CUDA device")
    from suite import cuda_device

    record, rounds = new_record(), options.rounds or 15
    record["machine"] |= cuda_device.describe()
    before = cuda_device.clocks()
    record["floor_us"] = cuda_device.floor_us(rounds)
    record["call_costs"] = cuda_device.call_costs()
    measure_cases(cuda_device.Cuda(rounds), options, record)
    record["machine"]["load_average"].append(machine.load_average())
    record["machine"]["clocks"] = {"before": before, "after": cuda_device.clocks()}
    save(record, options)
    return record


def main() -> None:
    options = parse()
    if options.check:
        sys.exit(compare.check(*options.check))
    if options.part:
        measure_part(options)
        return
    if options.markdown is not None:
        print(report.markdown(records.load(options.show), options.markdown))
        return
    if options.show:
        record = records.load(options.show)
    else:
        record = measure_cuda(options) if options.device == "cuda" else measure_cpu(options)
    report.show(record, CONSOLE)
    if options.plots:
        from suite import plots

        for path in plots.draw_all(record, options.plots):
            CONSOLE.print(f"{path}.svg, .png", highlight=False)


if __name__ == "__main__":
    main()
