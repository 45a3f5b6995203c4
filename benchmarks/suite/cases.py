"""What is measured: operations, and the grid of shape x dtype x operation x layout x cache.

A new operation is an entry of OPERATIONS, its formula in reference.py, lines in the grids below, and a
branch in those contenders that have it.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any

EPS = 1e-6

ITEM_BYTES = {"f32": 4, "bf16": 2, "f16": 2, "f64": 8}


@dataclass(frozen=True)
class Operation:
    """The tensors of rows x n that it must read and write at least; a weight of n comes with each."""

    reads: tuple[str, ...]
    writes: tuple[str, ...]


OPERATIONS = {
    "forward": Operation(("x",), ("y",)),
    "add": Operation(("x", "residual"), ("y", "residual_out")),
    "backward": Operation(("dy", "x"), ("dx",)),
}

CONTIGUOUS = "contiguous"
# x is the q part of the projection of a layer, (tokens, heads, n) in a buffer of (tokens, 3 * heads, n).
PACKED_QKV = "packed qkv"
HEADS = 32


@dataclass(frozen=True)
class Case:
    operation: str
    dtype: str
    rows: int
    n: int
    layout: str = CONTIGUOUS
    # "warm": always the same tensors, in the nearest cache that holds them. "cold": tensors that went
    # through the caches longest ago, of many more than the last-level cache can hold.
    cache: str = "warm"
    peers: bool = field(default=True, compare=False)

    def __str__(self) -> str:
        shape = f"{self.rows} x {self.n}"
        return f"{self.operation} {self.dtype} {shape} {self.layout} {self.cache}"

    @property
    def tensor_bytes(self) -> int:
        return self.rows * self.n * ITEM_BYTES[self.dtype]

    @property
    def bytes(self) -> int:
        """The fewest that can be moved, without those of the weight and of values per row."""
        operation = OPERATIONS[self.operation]
        return (len(operation.reads) + len(operation.writes)) * self.tensor_bytes

    @property
    def allocated_bytes(self) -> int:
        """Of one set of tensors; see `make_tensors`."""
        spare = self.bytes // 2 - len(OPERATIONS[self.operation].writes) * self.tensor_bytes
        packed = 3 * self.tensor_bytes if self.layout == PACKED_QKV else 0
        return self.bytes + spare + packed

    @property
    def shape(self) -> tuple[int, ...]:
        if self.layout == PACKED_QKV:
            return (self.rows // HEADS, HEADS, self.n)
        return (self.rows, self.n)


@dataclass
class Tensors:
    """One set of arrays of a case, and the pairs (source, destination) of a copy of its bytes."""

    named: dict[str, Any]
    copies: list[tuple[Any, Any]]

    def __getitem__(self, name: str) -> Any:
        return self.named[name]


Make = Callable[[tuple[int, ...]], Any]


def make_tensors(case: Case, weight: Any, filled: Make, empty: Make) -> Tensors:
    """Arrays made by `filled(shape)` for what is read and by `empty(shape)` for what is written.

    The copy goes from one dense tensor to another, whatever the layout. What is read beyond what is
    written counts half, since a copy writes what it reads: its half is copied to a spare tensor.
    """
    operation = OPERATIONS[case.operation]
    named = {"weight": weight}
    sources = []
    for name in operation.reads:
        if name == "x" and case.layout == PACKED_QKV:
            tokens, heads, n = case.shape
            named["qkv"] = filled((tokens, 3 * heads, n))
            named["x"] = named["qkv"][:, :heads]
            sources.append(filled((case.rows * n,)))
        else:
            named[name] = filled(case.shape)
            sources.append(named[name].reshape(-1))
    named |= {name: empty(case.shape) for name in operation.writes}
    destinations = [named[name].reshape(-1) for name in operation.writes]
    copies = list(zip(sources, destinations, strict=False))
    for source in sources[len(destinations) :]:
        half = len(source) // 2
        copies.append((source[:half], empty((half,))))
    return Tensors(named, copies)


Shapes = tuple[tuple[int, int], ...]

# The shapes of the goals: in and out of the caches, short and long rows.
LARGE_SHAPES: Shapes = (
    *((256, 4096), (4096, 4096), (16384, 128), (64, 65536)),
    # Heads of other sizes, and as many rows of 4096 as just fill a second level or do not.
    *((4096, 128), (16384, 64), (16384, 256), (64, 4096)),
)
# Of --quick: long rows, and short ones, which take another way through the kernels.
QUICK_SHAPES: Shapes = ((256, 4096), (16384, 128))
# Decoding: what a step of generation hands over is in the cache, so it is not measured cold.
DECODE_SHAPES: Shapes = ((1, 4096), (4, 4096), (16, 4096))
# q/k-norm of (tokens * heads, head size).
QKV_SHAPES: Shapes = ((32, 128), (512, 128), (16384, 128), (16384, 64), (16384, 256))
# Measured unless others are named.
DTYPES = ("f32", "bf16", "f16")


def cpu_grid(
    dtypes: list[str], shapes: list[tuple[int, int]] | None, quick: bool
) -> Iterator[Case]:
    """The grid, or with `shapes` these in place of its shapes; quick: a quarter of it."""
    large, decode, qkv = (LARGE_SHAPES, DECODE_SHAPES, QKV_SHAPES)
    if quick:
        large, decode, qkv = QUICK_SHAPES, decode[:1], qkv[2:3]
    if shapes:
        large, decode, qkv = tuple(shapes), (), tuple(s for s in shapes if s[0] % HEADS == 0)
    for operation in OPERATIONS:
        for dtype in dtypes:
            for rows, n in large:
                yield Case(operation, dtype, rows, n)
                yield Case(operation, dtype, rows, n, cache="cold")
            if operation != "backward":
                yield from (Case(operation, dtype, rows, n) for rows, n in decode)
            if operation == "forward":
                yield from (Case(operation, dtype, rows, n, PACKED_QKV) for rows, n in qkv)


CUDA_LENGTHS = (1024, 2048, 4096, 5120, 8192, 16384, 32768, 65536)
# Of all arrays of a shape on a CUDA device.
CUDA_MOST_BYTES = 4 << 30


def cuda_rows_for(n: int, operation: str, dtype: str) -> int:
    """8192, or as many as let two sets of arrays fit."""
    return min(8192, CUDA_MOST_BYTES // (2 * Case(operation, dtype, 1, n).bytes))


def cuda_grid() -> Iterator[Case]:
    """In the order of what is to be known first; decoding before all."""
    for rows in (1, 8, 64):
        for operation in ("forward", "add"):
            yield Case(operation, "bf16", rows, 4096, peers=rows != 8)
    for dtype in ("bf16", "f16", "f32"):
        for operation in ("forward", "add"):
            yield Case(operation, dtype, 4096, 4096, cache="cold", peers=dtype == "bf16")
    peers_at = {1024, 8192, 32768, 65536}
    for operation in ("forward", "add"):
        for n in CUDA_LENGTHS:
            rows = cuda_rows_for(n, operation, "bf16")
            peers = n in peers_at and (operation == "forward" or n == 8192)
            yield Case(operation, "bf16", rows, n, cache="cold", peers=peers)
    for dtype in ("bf16", "f32"):
        peers = dtype == "bf16"
        yield Case("forward", dtype, 1 << 20, 128, cache="cold", peers=peers)
        yield Case("forward", dtype, 1 << 18, 128, PACKED_QKV, "cold", peers=False)
    for dtype in ("f32", "f16"):
        for operation in ("forward", "add"):
            for n in CUDA_LENGTHS:
                if n != 4096 or dtype == "f32":
                    rows = cuda_rows_for(n, operation, dtype)
                    yield Case(operation, dtype, rows, n, cache="cold", peers=False)
