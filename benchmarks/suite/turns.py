"""Who is called when, such that a contender's time is its own doing and not that of its neighbours.

What a contender finds in the caches depends on who was there before: one that stores past the caches
leaves y out of them, others leave lines that have yet to be written to memory, and whoever comes next
would pay for both. So everybody first pays by calls that are not timed, until nothing is left of the
neighbour. And in case something is, everybody is the neighbour of everybody else equally often.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass

Call = Callable[[], object]
Clock = Callable[[], float]


def order_of_round(names: list[str], index: int) -> list[str]:
    """The names in an order in which, over 2 n rounds, each comes twice right after each other one.

    These are the rows of a Latin square of Williams: neighbours in the zigzag 0, 1, n - 1, 2, n - 2, ...
    differ by everything from 1 to n - 1 when it is read from both ends.
    """
    count = len(names)
    zigzag = ((j + 1) // 2 if j % 2 else -(j // 2) for j in range(count))
    order = [names[(step + index // 2) % count] for step in zigzag]
    return order[::-1] if index % 2 else order


@dataclass(frozen=True)
class Turn:
    """Calls that are not timed, as many and for as long as said at least, then timed ones."""

    untimed: int
    seconds: float
    timed: int


class Track:
    """The sets of tensors that calls go round, each contender from where the one before stopped."""

    def __init__(self, clock: Clock = time.perf_counter) -> None:
        self.clock = clock
        self.position = 0

    def next_of(self, calls: list[Call]) -> Call:
        call = calls[self.position % len(calls)]
        self.position += 1
        return call

    def take(self, turn: Turn, calls: list[Call]) -> float:
        """Microseconds of one of the timed calls."""
        begin, done = self.clock(), 0
        while done < turn.untimed or self.clock() - begin < turn.seconds:
            self.next_of(calls)()
            done += 1
        timed = [self.next_of(calls) for _ in range(turn.timed)]
        start = self.clock()
        for call in timed:
            call()
        return (self.clock() - start) / turn.timed * 1e6


def rounds_of(
    runners: dict[str, list[Call]],
    turn: Turn,
    go_on: Callable[[int], bool],
    before: Callable[[], None] = lambda: None,
    clock: Clock = time.perf_counter,
) -> dict[str, list[float]]:
    """Microseconds of a call of each in each round, as long as `go_on(rounds so far)` says so."""
    samples: dict[str, list[float]] = {name: [] for name in runners}
    track = Track(clock)
    for order in orders(list(runners), go_on):
        for name in order:
            before()
            samples[name].append(track.take(turn, runners[name]))
    return samples


def orders(names: list[str], go_on: Callable[[int], bool]) -> Iterator[list[str]]:
    index = 0
    while go_on(index):
        yield order_of_round(names, index)
        index += 1
