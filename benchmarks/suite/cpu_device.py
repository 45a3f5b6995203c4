"""The CPU: tensors in NumPy arrays, turns of calls by the clock of the process."""

from __future__ import annotations

import contextlib
import gc
import math
import mmap
import os
import time
from typing import Any

import ml_dtypes
import numpy as np
import rmsnorm

from . import machine
from .cases import Case, Tensors, make_tensors
from .contenders import Bound
from .turns import Call, Turn, rounds_of

DTYPES: dict[str, Any] = {
    "f32": np.float32,
    "bf16": ml_dtypes.bfloat16,
    "f16": np.float16,
    "f64": np.float64,
}

# Tensors start where large ones of malloc and torch do: 64 bytes into a page.
PAGE, INTO_PAGE = 4096, 64
# The values of all tensors are taken from this many, each from another place on.
VALUES = 1 << 20
# Of the timed calls of a turn: a hundred microseconds or so, against which the clock's 0.1 us are
# nothing.
TURN_BYTES, MOST_CALLS = 4 << 20, 64
# Of the untimed calls of a warm turn, at most. A cache gives up what a neighbour left in it by and by:
# 8 MiB after one that wrote several arrays as large take twice the time in the first call, 1.4 in the
# second, 1.1 in the third, and with most are within 1 % from the ninth on (Zen 5, 32 MiB). The time is
# for what is no matter of calls, such as a core's clock, which some instructions lower for as long.
SETTLING_CALLS, SETTLING_SECONDS = 12, 1e-3
# All tensors of a cold case are this many times as large as the last-level cache. Caches that are gone
# round keep some lines for long: with twice their size a pass with plain stores still finds so much that
# it takes 0.7 of the time, with four times 0.9 (Zen 5, 32 MiB). And who stores past the caches fills
# them with half of the bytes only, those that are read.
COLD_CACHES = 8
# That is enough of them where virtual machines name the cache of a whole host, or else twice the cache.
ENOUGH_COLD_BYTES, LEAST_COLD_CACHES = 1 << 30, 2
# Timed are as many calls as untimed ones over this, at least, since those have been paid for.
TIMED_SHARE = 4
# Longer than idle threads of a thread pool look out for work, see GOMP_SPINCOUNT in run.py: whoever
# had the last turn has then left the cores.
SETTLE_SECONDS = 2e-3


class Arena:
    """Memory that all cases use one after another, so that its pages are there.

    A mapping of its own with large pages, as NumPy asks for its large arrays: memory of malloc has what
    pages the process made before, and with small ones bf16 16384 x 256, cold, took 1.3 times as long.
    """

    def __init__(self) -> None:
        self.bytes = np.empty(0, np.uint8)
        self.used = 0

    def reserve(self, size: int) -> None:
        if len(self.bytes) < size:
            self.bytes = np.empty(0, np.uint8)
            mapping = mmap.mmap(-1, size, mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
            with contextlib.suppress(AttributeError, OSError):  # a system without large pages
                mapping.madvise(mmap.MADV_HUGEPAGE)
            self.bytes = np.frombuffer(mapping, np.uint8)
            # Pages come with the first write, which is not to be in what is timed.
            self.bytes[:] = 1
        self.used = 0

    def take(self, shape: tuple[int, ...], dtype: Any) -> np.ndarray:
        address = self.bytes.ctypes.data + self.used
        first = self.used + (INTO_PAGE - address) % PAGE
        self.used = first + math.prod(shape) * np.dtype(dtype).itemsize
        if self.used > len(self.bytes):
            raise MemoryError(f"{self.used} bytes of {len(self.bytes)} reserved")
        return self.bytes[first : self.used].view(dtype).reshape(shape)


def cold_bytes(cache: int, memory: int) -> int:
    wanted = min(COLD_CACHES * cache, max(LEAST_COLD_CACHES * cache, ENOUGH_COLD_BYTES))
    return min(wanted, memory // 4)


class Host:
    name = "cpu"

    def __init__(
        self, threads: int, cpus: list[int], seconds_per_case: float, rounds: tuple[int, int]
    ) -> None:
        self.threads = threads
        self.seconds_per_case = seconds_per_case
        self.least_rounds, self.most_rounds = rounds
        self.arena = Arena()
        self.cpus = cpus
        self.bind(cpus)
        self.cold_bytes = cold_bytes(machine.last_level_cache_bytes(), machine.memory_bytes())
        rmsnorm.set_num_threads(threads)

    def bind(self, cpus: list[int]) -> None:
        """Lets this thread run on these.

        OpenMP binds the thread that loads it to the first, where all threads would stay that the next
        contender starts: so it gets all back. While times are taken it stays on the first, or Linux
        would put it on that of OpenMP's second thread.
        """
        if hasattr(os, "sched_setaffinity"):
            os.sched_setaffinity(0, cpus)

    def set_count(self, case: Case) -> int:
        """Cold: a multiple of the last-level cache goes by before a tensor's next turn."""
        return 1 if case.cache == "warm" else max(2, -(-self.cold_bytes // case.bytes))

    def make_sets(self, case: Case) -> list[Tensors]:
        sets, dtype = self.set_count(case), DTYPES[case.dtype]
        # Seven tensors of a set at most start on a page of their own.
        self.arena.reserve(sets * (case.allocated_bytes + 7 * PAGE) + 2 * case.tensor_bytes)
        generator = np.random.default_rng(0)
        values = generator.standard_normal(VALUES, np.float32).astype(dtype).view(np.uint8)
        weight = self.arena.take((case.n,), dtype)
        weight[...] = generator.uniform(0.5, 1.5, case.n).astype(dtype)
        taken = 0

        def empty(shape: tuple[int, ...]) -> np.ndarray:
            return self.arena.take(shape, dtype)

        def filled(shape: tuple[int, ...]) -> np.ndarray:
            nonlocal taken
            array = empty(shape)
            flat = array.reshape(-1).view(np.uint8)
            begin = taken * 64 * 7919 % len(values)
            done = 0
            while done < len(flat):
                piece = values[begin : begin + len(flat) - done]
                flat[done : done + len(piece)] = piece
                done, begin = done + len(piece), 0
            taken += 1
            return array

        return [make_tensors(case, weight, filled, empty) for _ in range(sets)]

    def runner(self, case: Case, bound: list[Bound]) -> list[Call]:
        self.bind(self.cpus)
        return [each.call for each in bound]

    def turn(self, case: Case) -> Turn:
        """Warm, after untimed calls that move several times the bytes of the last-level cache, if not
        after many. Cold, after one on each set, so that no tensor was last touched, and no line in the
        caches was left to be written, by someone else."""
        if case.cache == "warm":
            untimed = min(SETTLING_CALLS, max(2, -(-self.cold_bytes // 2 // case.bytes)))
        else:
            untimed = self.set_count(case)
        timed = max(1, min(MOST_CALLS, TURN_BYTES // case.bytes), untimed // TIMED_SHARE)
        return Turn(untimed, SETTLING_SECONDS, timed)

    def settle(self) -> None:
        if self.threads > 1:
            time.sleep(SETTLE_SECONDS)

    def sample(self, case: Case, runners: dict[str, list[Call]]) -> dict[str, list[float]]:
        """In each round a turn of each, in another order, until the time of the case is over."""
        deadline = time.monotonic() + self.seconds_per_case

        def go_on(rounds: int) -> bool:
            in_time = rounds < self.most_rounds and time.monotonic() < deadline
            return rounds < self.least_rounds or in_time

        self.bind(self.cpus[:1])
        gc.collect()
        gc.disable()
        try:
            return rounds_of(runners, self.turn(case), go_on, self.settle)
        finally:
            gc.enable()
            self.bind(self.cpus)
