"""Figures of results: the speed over that of a copy, by the bytes that are moved, for each contender.

One figure for each operation, layout and number of threads, with a panel for each dtype and state of
the cache. A line joins the shapes of one row length; a length with a single shape is a marker.
"""

from __future__ import annotations

from itertools import groupby
from pathlib import Path
from typing import Any

import matplotlib

from . import records
from .contenders import ALL, OURS, PEERS
from .report import Result, machine_line, size

matplotlib.use("Agg")
import matplotlib.pyplot as plt
from matplotlib.lines import Line2D

# The same in every figure. This library's is drawn thick and last.
COLOURS = dict(
    zip(
        [OURS, *PEERS],
        ["black", *matplotlib.color_sequences["tab10"], "navy", "gold"],
        strict=True,
    )
)
# By row length, shortest first.
MARKERS = "v^sDoPX*<>"
PANEL_INCHES = (4.2, 3.0)
DTYPES = ("f32", "bf16", "f16", "f64")


def figure_key(result: Result) -> tuple[Any, ...]:
    return tuple(result[name] for name in ("device", "operation", "layout", "threads"))


def file_name(key: tuple[Any, ...]) -> str:
    device, operation, layout, threads = key
    words = [device, operation, *([] if layout == "contiguous" else layout.split())]
    return "_".join([*words, f"{threads}t"] if device == "cpu" else words)


def draw_panel(axes: Any, results: list[Result], names: list[str], lengths: list[int]) -> None:
    for name in reversed(names):
        points = sorted(
            (r["n"], r["bytes"], r["times"][name]["of_copy"]) for r in results if name in r["times"]
        )
        for n, of_length in groupby(points, key=lambda point: point[0]):
            _, x, y = zip(*of_length, strict=True)
            axes.plot(
                x,
                [middle for _, middle, _ in y],
                color=COLOURS[name],
                marker=MARKERS[lengths.index(n) % len(MARKERS)],
                linewidth=2.2 if name == OURS else 1,
                markersize=6 if name == OURS else 4,
            )
            low, _, high = zip(*y, strict=True)
            axes.vlines(x, low, high, color=COLOURS[name], linewidth=1)
    axes.axhline(1, color="grey", linewidth=0.8, linestyle="--")
    axes.set_xscale("log", base=2)
    axes.xaxis.set_major_formatter(lambda value, _: size(value))
    axes.tick_params(labelsize=8)
    # By medians: a quartile may lie far out where a machine was not idle.
    medians = [
        times["of_copy"][1] for r in results for k, times in r["times"].items() if k in names
    ]
    axes.set_ylim(0, 1.1 * max(1, *medians))
    axes.grid(alpha=0.25)


def legend_of(figure: Any, names: list[str], lengths: list[int]) -> None:
    lines = [Line2D([], [], color=COLOURS[name], label=ALL[name].label) for name in names]
    for i, n in enumerate(lengths):
        marker = MARKERS[i % len(MARKERS)]
        lines.append(Line2D([], [], color="grey", marker=marker, linestyle="", label=f"n = {n}"))
    figure.legend(handles=lines, loc="outside right upper", fontsize=8, frameon=False)


def draw(key: tuple[Any, ...], results: list[Result], record: records.Record, folder: Path) -> Path:
    device, operation, layout, threads = key
    dtypes = [dtype for dtype in DTYPES if any(r["dtype"] == dtype for r in results)]
    caches = [cache for cache in ("warm", "cold") if any(r["cache"] == cache for r in results)]
    names = [n for n in [OURS, *PEERS] if any(n in r["times"] for r in results)]
    lengths = sorted({r["n"] for r in results})
    width, height = PANEL_INCHES
    figure, grid = plt.subplots(
        len(caches),
        len(dtypes),
        squeeze=False,
        sharex=True,
        figsize=(width * len(dtypes) + 1.5, height * len(caches) + 0.8),
        layout="constrained",
    )
    for cache, row in zip(caches, grid, strict=True):
        for dtype, axes in zip(dtypes, row, strict=True):
            chosen = [r for r in results if r["dtype"] == dtype and r["cache"] == cache]
            draw_panel(axes, chosen, names, lengths)
            axes.set_title(f"{dtype}, {cache} cache", fontsize=10)
        row[0].set_ylabel("speed over that of a copy", fontsize=9)
    for axes in grid[-1]:
        axes.set_xlabel("bytes read and written", fontsize=9)
    legend_of(figure, names, lengths)
    place = f"{threads} thread{'s' * (threads > 1)}" if device == "cpu" else "in a CUDA graph"
    figure.suptitle(f"{operation}, {layout}, {place}", fontsize=12)
    figure.supxlabel(f"{machine_line(record)}\n{' '.join(record['command'])}", fontsize=7)
    path = folder / file_name(key)
    # Equal results make equal files: no time of writing, no random names.
    with matplotlib.rc_context({"svg.hashsalt": path.name}):
        figure.savefig(path.with_suffix(".svg"), metadata={"Date": None, "Creator": None})
    figure.savefig(path.with_suffix(".png"), dpi=130, metadata={"Software": None})
    plt.close(figure)
    return path


def draw_all(record: records.Record, folder: Path) -> list[Path]:
    """The files without their suffixes, .svg and .png."""
    folder.mkdir(parents=True, exist_ok=True)
    results = sorted(record["results"], key=lambda r: [str(part) for part in figure_key(r)])
    return [
        draw(key, list(members), record, folder)
        for key, members in groupby(results, key=figure_key)
    ]
