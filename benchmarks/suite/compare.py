"""Two files of results compared: what has become slower beyond noise. And who is faster in one.

Compared is this library's time over that of the copy in the same round, which leaves a machine that is
slower as a whole out of it; a call's cost is compared as it is. Slower beyond noise means that the
quartiles do not overlap and the median is worse by more than TOLERANCE.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from . import records
from .contenders import OURS, OURS_NEW, PEERS

# Medians of two runs on an idle machine differ by this much where quartiles are a few percent wide.
TOLERANCE = 0.05


@dataclass
class Difference:
    name: str
    old: list[float]
    new: list[float]

    @property
    def change(self) -> float:
        """The new median over the old, of times."""
        return self.new[1] / self.old[1]

    @property
    def slower(self) -> bool:
        return self.new[0] > self.old[2] and self.change > 1 + TOLERANCE

    @property
    def faster(self) -> bool:
        return self.new[2] < self.old[0] and self.change < 1 - TOLERANCE

    def __str__(self) -> str:
        old, new = ("{1:.4g} ({0:.4g} to {2:.4g})".format(*each) for each in (self.old, self.new))
        return f"{self.name}: {old} -> {new}, x {self.change:.2f}"


def times_by_case(record: records.Record) -> dict[str, list[float]]:
    """Quartiles of times: of this library over the copy, and of calls in nanoseconds."""
    times = {}
    for result in record["results"]:
        name = " ".join(records.name_of(result).split()) + ", over the copy"
        times[name] = [1 / value for value in reversed(result["times"][OURS]["of_copy"])]
    for cost in record["call_costs"]:
        times[f"{cost['call']}, ns"] = cost["ns"]
    return times


def faster_peers(result: dict[str, Any]) -> list[tuple[str, float]]:
    """Peers that beat this library beyond noise, and their times over its own.

    Those that allocate their results, in memory that they have just freed and that is in the cache,
    are held beside this library doing the same.
    """
    found = []
    for name, times in result["times"].items():
        if name not in PEERS or name == OURS_NEW:
            continue
        fair = OURS_NEW if PEERS[name].allocates and OURS_NEW in result["times"] else OURS
        ours = Difference(name, times["us"], result["times"][fair]["us"])
        if ours.slower:
            found.append((name, 1 / ours.change))
    return found


def check(old_path: Path, new_path: Path) -> int:
    """Prints the differences; 1 if something is slower or nothing could be compared, else 0."""
    old_record, new_record = records.load(old_path), records.load(new_path)
    for what in ("cpu", "isa", "gpu"):
        before, after = (record["machine"].get(what) for record in (old_record, new_record))
        if before != after:
            print(f"note: {what} was {before} and is {after}")
    old, new = times_by_case(old_record), times_by_case(new_record)
    differences = [Difference(name, old[name], new[name]) for name in old if name in new]
    slower = [difference for difference in differences if difference.slower]
    faster = [difference for difference in differences if difference.faster]
    for heading, found in (("slower", slower), ("faster", faster)):
        for difference in found:
            print(f"{heading}: {difference}")
    for name in old:
        if name not in new:
            print(f"only in {old_path}: {name}")
    print(f"{len(differences)} compared, {len(slower)} slower, {len(faster)} faster")
    return 1 if slower or not differences else 0
