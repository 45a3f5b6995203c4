"""Copies of as many bytes as a case must move, the yardstick."""

from __future__ import annotations

import threading
from collections.abc import Callable
from functools import cache, partial
from queue import SimpleQueue

from ..cases import Case, Tensors
from . import Bind, Bound, Unsupported

Call = Callable[[], object]


def in_turn(calls: list[Call]) -> Bound:
    if len(calls) == 1:
        return Bound(calls[0])

    def call() -> None:
        for each in calls:
            each()

    return Bound(call)


def memcpy_calls(t: Tensors, parts: int) -> list[list[Call]]:
    """For each of the parts, which end on cache lines, the copies of it."""
    import numpy as np

    calls: list[list[Call]] = [[] for _ in range(parts)]
    for source, destination in t.copies:
        s, d = source.view(np.uint8), destination.view(np.uint8)
        ends = [len(s) * i // parts // 64 * 64 for i in range(parts)] + [len(s)]
        for part in range(parts):
            piece = slice(ends[part], ends[part + 1])
            calls[part].append(partial(np.copyto, d[piece], s[piece]))
    return calls


def memcpy(case: Case, threads: int) -> Bind:
    """On one thread."""
    return lambda t: in_turn(memcpy_calls(t, 1)[0])


class Workers:
    """Threads for copies, on which NumPy lets go of the interpreter. A hand-over takes some 10 us."""

    def __init__(self, count: int) -> None:
        self.tasks: list[SimpleQueue[Call]] = [SimpleQueue() for _ in range(count)]
        self.done: SimpleQueue[None] = SimpleQueue()
        for queue in self.tasks:
            threading.Thread(target=self.work, args=(queue,), daemon=True).start()

    def work(self, queue: SimpleQueue[Call]) -> None:
        while True:
            queue.get()()
            self.done.put(None)

    def run(self, own: Call, others: list[Call]) -> None:
        for queue, task in zip(self.tasks, others, strict=True):
            queue.put(task)
        own()
        for _ in others:
            self.done.get()


workers_of = cache(Workers)


def memcpy_on_threads(case: Case, threads: int) -> Bind:
    """Each thread copies a part of its own."""
    if threads == 1:
        raise Unsupported("there is one thread")

    def bind(t: Tensors) -> Bound:
        own, *others = (in_turn(calls).call for calls in memcpy_calls(t, threads))
        return Bound(partial(workers_of(threads - 1).run, own, others))

    return bind


def cuda_memcpy(case: Case, threads: int) -> Bind:
    return lambda t: in_turn([partial(d.copy_, s) for s, d in t.copies])


def cuda_elementwise(case: Case, threads: int) -> Bind:
    import torch

    return lambda t: in_turn([partial(torch.neg, s, out=d) for s, d in t.copies])
