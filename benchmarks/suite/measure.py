"""A case measured with all contenders in turns, on any device.

A result is a dictionary of the properties of its case and of

    bytes        that the case must move at least
    sets         of tensors that the calls go round
    rounds       in each of which every contender had one turn
    copy         the name of the faster of the ways to copy as many bytes
    times        by contender: "us", the time of a call, and "of_copy", the time of the copy in the same
                 round over it, each as [lower quartile, median, upper quartile]
    left_out     by contender: why it is not in times
"""

from __future__ import annotations

import statistics
from dataclasses import asdict, dataclass, field
from typing import Any, Protocol

from .cases import OPERATIONS, Case, Tensors
from .contenders import ALL, COPIES, OURS, PEERS, Bind, Bound, Unsupported
from .reference import Reference


class Device(Protocol):
    name: str
    threads: int

    def make_sets(self, case: Case) -> list[Tensors]:
        """As many sets of tensors as the calls of the case are to go round."""

    def runner(self, case: Case, bound: list[Bound]) -> Any:
        """What `sample` takes to make the calls, one for each set, in turn."""

    def sample(self, case: Case, runners: dict[str, Any]) -> dict[str, list[float]]:
        """Microseconds of a call of each runner in each round."""


def quartiles(values: list[float]) -> list[float]:
    """To four digits; more would be noise in the files."""
    points = (
        statistics.quantiles(values, n=4, method="inclusive") if len(values) > 1 else values * 3
    )
    return [float(f"{point:.4g}") for point in points]


@dataclass
class Race:
    device: Device
    peers: list[str]
    unavailable: dict[str, str] = field(default_factory=dict)
    prepared_for: Case | None = None
    prepared: dict[str, Bind] = field(default_factory=dict)

    def entrants(self, case: Case) -> list[str]:
        chosen = [OURS, *COPIES, *(self.peers if case.peers else [])]
        here = [name for name in chosen if self.device.name in ALL[name].devices]
        return [name for name in here if name not in self.unavailable]

    def prepare(self, name: str, case: Case) -> Bind:
        """Once for cold and warm caches, since some contenders compile for a shape."""
        problem = Case(case.operation, case.dtype, case.rows, case.n, case.layout)
        if problem != self.prepared_for:
            self.prepared_for, self.prepared = problem, {}
        if name not in self.prepared:
            self.prepared[name] = ALL[name].prepare(case, self.device.threads)
        return self.prepared[name]

    def line_up(self, case: Case, sets: list[Tensors]) -> tuple[dict[str, Any], dict[str, str]]:
        """The runners of those whose results are right, and why the others are left out."""
        reference = Reference(case, sets[0])
        runners, left_out = {}, {}
        for name in self.entrants(case):
            try:
                bind = self.prepare(name, case)
                first = bind(sets[0])
                if name not in COPIES and (fault := fault_of(first, case, sets[0], reference)):
                    raise ArithmeticError(fault)
                bound = [first, *(bind(tensors) for tensors in sets[1:])]
                runners[name] = self.device.runner(case, bound)
            except ImportError as error:
                self.unavailable[name] = str(error)
            except Unsupported as error:
                left_out[name] = str(error)
            except Exception as error:
                # A peer's failure is its own; this library's is not.
                if name not in PEERS:
                    raise
                left_out[name] = f"{type(error).__name__}: {error}"[:300]
        return runners, left_out

    def measure(self, case: Case) -> dict[str, Any]:
        sets = self.device.make_sets(case)
        runners, left_out = self.line_up(case, sets)
        samples = self.device.sample(case, runners)
        copies = [name for name in COPIES if name in samples]
        copy = min(copies, key=lambda name: statistics.median(samples[name]))
        times = {
            name: {
                "us": quartiles(taken),
                "of_copy": quartiles([c / t for c, t in zip(samples[copy], taken, strict=True)]),
            }
            for name, taken in samples.items()
        }
        properties = asdict(case)
        del properties["peers"]
        return {
            "device": self.device.name,
            "threads": self.device.threads,
            **properties,
            "bytes": case.bytes,
            "sets": len(sets),
            "rounds": len(samples[OURS]),
            "copy": copy,
            "times": times,
            "left_out": left_out,
        }


def fault_of(bound: Bound, case: Case, tensors: Tensors, reference: Reference) -> str | None:
    written = {name: tensors[name] for name in OPERATIONS[case.operation].writes}
    for array in written.values():
        array[...] = float("nan")
    value = bound.call()
    returned = bound.results(value) if bound.results else {}
    return reference.fault_of({**written, **returned})
