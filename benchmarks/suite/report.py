"""Results as lines and tables in the terminal."""

from __future__ import annotations

from itertools import groupby
from typing import Any

from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.table import Table

from . import compare, records
from .cases import CONTIGUOUS
from .contenders import ALL, COPIES, OURS, PEERS

Result = dict[str, Any]

# Of the tables with all peers; a terminal that is narrower breaks their lines.
LEAST_WIDTH = 150
LABELS = {contender.label for contender in PEERS.values()}
NOTE = "us, GB/s: of rmsnorm with out given. Under each peer: its time over that."
NOTE_CPU = """\
torch, JAX and ZenDNN allocate their results, in memory that they have just freed and that is in the cache:
below, rmsnorm without out is held beside them.\
"""


def median(result: Result, name: str) -> float:
    return float(result["times"][name]["us"][1])


def size(count: float) -> str:
    for unit in ("B", "KiB", "MiB", "GiB"):
        if count < 1024:
            break
        count /= 1024
    return f"{count:.3g} {unit}"


def line_of(result: Result) -> str:
    """One result, while others are still to come."""
    ours = median(result, OURS)
    peers = (
        f"{name} {median(result, name) / ours:.2f}" for name in PEERS if name in result["times"]
    )
    return (
        f"{records.name_of(result)} {ours:10.2f} us {result['bytes'] / ours / 1e3:6.0f} GB/s"
        f" {100 * result['times'][OURS]['of_copy'][1]:5.1f}% of copy; times ours: "
        f"{', '.join(peers) or '-'}"
    )


def group(result: Result) -> tuple[Any, ...]:
    return records.properties(result)[:5]


def title_of(result: Result) -> str:
    device, threads, operation, layout, cache = group(result)
    place = f"{threads} thread{'s' * (threads > 1)}" if device == "cpu" else "CUDA, in a graph"
    return f"{operation}, {layout}, {cache} cache, {place}"


def new_table(title: str, headings: list[str]) -> Table:
    table = Table(title=title, title_justify="left", title_style="bold", box=SIMPLE_HEAD)
    for heading in headings:
        # The labels of peers may be broken, numbers may not.
        no_wrap = heading not in LABELS
        table.add_column(heading, justify="left" if heading == "call" else "right", no_wrap=no_wrap)
    return table


def table_of(results: list[Result]) -> Table:
    names = [name for name in PEERS if any(name in result["times"] for result in results)]
    headings = ["dtype", "rows x n", "us", "GB/s", "of copy", "quartiles"]
    table = new_table(title_of(results[0]), headings + [ALL[name].label for name in names])
    for result in results:
        ours = median(result, OURS)
        low, middle, high = (100 * value for value in result["times"][OURS]["of_copy"])
        cells = [result["dtype"], f"{result['rows']} x {result['n']}", f"{ours:.2f}"]
        cells += [f"{result['bytes'] / ours / 1e3:.1f}", f"{middle:.0f}%", f"{low:.0f}-{high:.0f}"]
        for name in names:
            there = name in result["times"]
            cells.append(f"{median(result, name) / ours:.2f}" if there else "")
        table.add_row(*cells)
    return table


def calls_table(costs: list[dict[str, Any]]) -> Table:
    table = new_table("cost of a call on the host", ["call", "ns", "quartiles"])
    for cost in costs:
        low, middle, high = cost["ns"]
        table.add_row(cost["call"], f"{middle:.0f}", f"{low:.0f}-{high:.0f}")
    return table


def machine_line(record: records.Record) -> str:
    machine = record["machine"]
    caches = ", ".join(f"{name} {size(count)}" for name, count in machine["caches"].items())
    # Files of before have none.
    kind = machine.get("microarchitecture")
    name = f"{machine['cpu']} ({kind})" if kind else machine["cpu"]
    place = f"{name}, {machine['cpus']} CPUs, {caches}, {machine['isa']}"
    return f"{machine['gpu']}, {place}" if "gpu" in machine else place


def reasons(record: records.Record) -> list[str]:
    """Who did not take part and where, each reason once."""
    lines = [
        f"not installed: {ALL[name].label} ({why})" for name, why in record["unavailable"].items()
    ]
    places: dict[tuple[str, str], list[Result]] = {}
    for result in record["results"]:
        for name, why in result["left_out"].items():
            if name not in COPIES:
                places.setdefault((name, why), []).append(result)
    for (name, why), results in places.items():
        first, more = " ".join(records.name_of(results[0]).split()), len(results) - 1
        others = f" and {more} more" if more else ""
        lines.append(f"left out: {ALL[name].label} ({why}): {first}{others}")
    return lines + [f"not measured: {line}" for line in record["not_measured"]]


def markdown(record: records.Record, threads: int) -> str:
    """This library's times over those of the copy, warm / cold, of tensors that lie side by side."""
    shapes: dict[str, dict[tuple[str, str], dict[str, str]]] = {}
    columns: dict[tuple[str, str], None] = {}
    for result in record["results"]:
        if result["threads"] != threads or result["layout"] != CONTIGUOUS:
            continue
        column = (result["operation"], result["dtype"])
        columns[column] = None
        caches = shapes.setdefault(f"{result['rows']} × {result['n']}", {}).setdefault(column, {})
        caches[result["cache"]] = f"{1 / result['times'][OURS]['of_copy'][1]:.2f}"
    lines = ["| rows × n | " + " | ".join(" ".join(column) for column in columns) + " |"]
    lines.append("|---" * (len(columns) + 1) + "|")
    for shape, cells in shapes.items():
        row = (" / ".join(cells.get(column, {}).values()) for column in columns)
        lines.append(f"| {shape} | " + " | ".join(row) + " |")
    return "\n".join(lines)


def faster_lines(record: records.Record) -> list[str]:
    """Where peers are faster."""
    lines = [
        f"faster beyond noise: {ALL[name].label}, {ratio:.2f} of the time: "
        + " ".join(records.name_of(result).split())
        for result in record["results"]
        for name, ratio in compare.faster_peers(result)
    ]
    return lines or ["no peer is faster beyond noise"]


def show(record: records.Record, console: Console) -> None:
    console.print(machine_line(record), highlight=False)
    console.print(" ".join(record["command"]), highlight=False)
    load = record["machine"]["load_average"][0]
    console.print(f"load average before: {load}; other work disturbs times", highlight=False)
    results = sorted(record["results"], key=lambda result: [str(part) for part in group(result)])
    for _, members in groupby(results, key=group):
        console.print(table_of(list(members)))
    if record["results"]:
        console.print(NOTE, highlight=False)
    if any(result["device"] == "cpu" for result in record["results"]):
        console.print(NOTE_CPU, highlight=False)
    if record["call_costs"]:
        console.print(calls_table(record["call_costs"]))
    if "floor_us" in record:
        console.print(f"floor, a kernel of one element in a graph: {record['floor_us'][1]:.2f} us")
    for line in faster_lines(record) + reasons(record):
        console.print(line, markup=False, highlight=False)
