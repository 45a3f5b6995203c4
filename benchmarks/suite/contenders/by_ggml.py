"""ggml's CPU backend, by ctypes: a graph of rms_norm and the product with the weight.

The library is the one that GGML_LIBRARY names or that benchmarks/build_ggml.py has built. What is timed
is the computation of a plan that is made before, on tensors over the given memory; newer versions
compute both nodes of the graph in one pass. Only functions are called of which the arguments are
pointers and numbers, so that no layout of a structure but one of three members is assumed.
"""

from __future__ import annotations

import ctypes
import os
from collections.abc import Callable
from ctypes import c_bool, c_float, c_int, c_int64, c_size_t, c_void_p
from functools import cache, partial
from pathlib import Path
from typing import Any

import numpy as np

from ..cases import EPS, PACKED_QKV, Case, Tensors
from . import Bind, Bound, Unsupported

FOLDER = Path(__file__).parents[3] / "build" / "ggml"
LIBRARY = "libggml-cpu.so"
F32 = 0
# Of a graph: x, the residual, the weight, and three results.
MOST_TENSORS = 8
# More than ggml's parameters of a pool of threads take.
POOL_PARAMETER_BYTES = 4096


class ContextParameters(ctypes.Structure):
    _fields_ = (("size", c_size_t), ("memory", c_void_p), ("without_data", c_bool))


# The functions that are called: what they return, and of what.
P, I64, SIZE = c_void_p, c_int64, c_size_t
FUNCTIONS: dict[str, tuple[Any, tuple[Any, ...]]] = {
    "ggml_init": (P, (ContextParameters,)),
    "ggml_free": (None, (P,)),
    "ggml_tensor_overhead": (SIZE, ()),
    "ggml_graph_overhead_custom": (SIZE, (SIZE, c_bool)),
    "ggml_new_tensor_1d": (P, (P, c_int, I64)),
    "ggml_new_tensor_3d": (P, (P, c_int, I64, I64, I64)),
    "ggml_view_3d": (P, (P, P, I64, I64, I64, SIZE, SIZE, SIZE)),
    "ggml_add": (P, (P, P, P)),
    "ggml_mul": (P, (P, P, P)),
    "ggml_rms_norm": (P, (P, P, c_float)),
    "ggml_new_graph_custom": (P, (P, SIZE, c_bool)),
    "ggml_build_forward_expand": (None, (P, P)),
    "ggml_threadpool_params_init": (None, (P, c_int)),
    "ggml_threadpool_new": (P, (P,)),
    "ggml_backend_cpu_init": (P, ()),
    "ggml_backend_cpu_set_n_threads": (None, (P, c_int)),
    "ggml_backend_cpu_set_threadpool": (None, (P, P)),
    "ggml_backend_cpu_buffer_from_ptr": (P, (P, SIZE)),
    "ggml_backend_buffer_free": (None, (P,)),
    "ggml_backend_tensor_alloc": (c_int, (P, P, P)),
    "ggml_backend_graph_plan_create": (P, (P, P)),
    "ggml_backend_graph_plan_free": (None, (P, P)),
    "ggml_backend_graph_plan_compute": (c_int, (P, P)),
}


def library_path() -> Path:
    return Path(os.environ.get("GGML_LIBRARY", FOLDER / LIBRARY))


@cache
def library() -> ctypes.CDLL:
    path = library_path()
    if not path.exists():
        raise ImportError(f"no {path.name}: benchmarks/build_ggml.py builds it")
    try:
        c = ctypes.CDLL(str(path.resolve()))
        for name, (result, arguments) in FUNCTIONS.items():
            function = getattr(c, name)
            function.restype, function.argtypes = result, arguments
    except (OSError, AttributeError) as error:
        raise ImportError(str(error)) from error
    return c


@cache
def backend_of(threads: int) -> int:
    """With threads that stay; without a pool each computation would make its own."""
    c = library()
    backend: int = c.ggml_backend_cpu_init()
    c.ggml_backend_cpu_set_n_threads(backend, threads)
    parameters = ctypes.create_string_buffer(POOL_PARAMETER_BYTES)
    c.ggml_threadpool_params_init(parameters, threads)
    c.ggml_backend_cpu_set_threadpool(backend, c.ggml_threadpool_new(parameters))
    return backend


def made(pointer: int | None) -> int:
    if pointer is None:
        raise RuntimeError("ggml returned a null pointer")
    return pointer


class Graph:
    """Tensors over the memory of arrays, what is computed of them, and the plan of it."""

    def __init__(self, threads: int) -> None:
        self.c = c = library()
        self.backend = backend_of(threads)
        self.buffers: list[int] = []
        self.plan: int | None = None
        size = MOST_TENSORS * c.ggml_tensor_overhead()
        size += c.ggml_graph_overhead_custom(MOST_TENSORS, False)
        self.context = made(c.ggml_init(ContextParameters(size, None, True)))
        self.nodes = made(c.ggml_new_graph_custom(self.context, MOST_TENSORS, False))

    def __del__(self) -> None:
        if self.plan is not None:
            self.c.ggml_backend_graph_plan_free(self.backend, self.plan)
        for buffer in self.buffers:
            self.c.ggml_backend_buffer_free(buffer)
        self.c.ggml_free(self.context)

    def place(self, tensor: int, array: np.ndarray) -> int:
        address = array.ctypes.data
        buffer = made(self.c.ggml_backend_cpu_buffer_from_ptr(address, array.nbytes))
        self.buffers.append(buffer)
        if self.c.ggml_backend_tensor_alloc(buffer, tensor, address) != 0:
            raise RuntimeError("ggml has not taken the memory")
        return tensor

    def tensor(self, array: np.ndarray) -> int:
        """Of a dense array of (..., rows, n), whose last dimension is ggml's first."""
        *outer, rows, n = array.shape
        make = self.c.ggml_new_tensor_3d
        return self.place(made(make(self.context, F32, n, rows, *(outer or [1]))), array)

    def vector(self, array: np.ndarray) -> int:
        make = self.c.ggml_new_tensor_1d
        return self.place(made(make(self.context, F32, array.size)), array)

    def leading_rows(self, whole: int, part: np.ndarray) -> int:
        """What `part`, a view of the array of `whole` from its first element on, is of it."""
        blocks, rows, n = part.shape
        strides = (part.strides[1], part.strides[0])
        return made(self.c.ggml_view_3d(self.context, whole, n, rows, blocks, *strides, 0))

    def norm(self, x: int, weight: int, y: np.ndarray) -> None:
        """Both nodes on y: where the first is not skipped, the second works in place."""
        c = self.c
        normed = self.place(made(c.ggml_rms_norm(self.context, x, EPS)), y)
        c.ggml_build_forward_expand(
            self.nodes, self.place(made(c.ggml_mul(self.context, normed, weight)), y)
        )

    def planned(self) -> Callable[[], int]:
        self.plan = made(self.c.ggml_backend_graph_plan_create(self.backend, self.nodes))
        return partial(self.c.ggml_backend_graph_plan_compute, self.backend, self.plan)


def prepare(case: Case, threads: int) -> Bind:
    library()
    if case.operation == "backward":
        raise Unsupported("ggml's gradient knows no weight")
    if case.dtype != "f32":
        raise Unsupported("ggml normalises f32 only")

    def bind(t: Tensors) -> Bound:
        graph = Graph(threads)
        if case.layout == PACKED_QKV:
            x = graph.leading_rows(graph.tensor(t["qkv"]), t["x"])
        else:
            x = graph.tensor(t["x"])
        if case.operation == "add":
            total = made(graph.c.ggml_add(graph.context, x, graph.tensor(t["residual"])))
            x = graph.place(total, t["residual_out"])
        graph.norm(x, graph.vector(t["weight"]), t["y"])
        compute = graph.planned()

        # The status is no result, and the graph and the arrays are to live as long as the call does.
        def call(keep: object = (graph, t)) -> None:
            compute()

        return Bound(call)

    return bind
