"""oneDNN's layer normalisation with its flag for RMS, through the C interface of the shared library.

The library is the one that DNNL_LIBRARY names, that of the Python package onednn, or one that the
system's linker finds. The weight is in f32, for which oneDNN has optimised code in every dtype. A
build for SYCL computes through the OpenCL driver beside it; its calls are waited for.
"""

from __future__ import annotations

import ctypes
import ctypes.util
import importlib.metadata
import os
import re
from collections.abc import Callable
from ctypes import byref, c_char_p, c_float, c_int, c_int64, c_size_t, c_uint, c_void_p
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np

from ..cases import EPS, PACKED_QKV, Case, Tensors
from . import Bind, Bound, Unsupported

TYPES = {"f16": 1, "bf16": 2, "f32": 3}
CPU, IN_ORDER = 1, 1
FORWARD_INFERENCE = 96
USE_SCALE, RMS_NORM = 0x02, 0x20
SRC, DST, SCALE = 1, 17, 51
QUERY_IMPLEMENTATION = 8
MOST_DIMENSIONS = 12


class Argument(ctypes.Structure):
    _fields_ = (("index", c_int), ("memory", c_void_p))


def library_path() -> str:
    if named := os.environ.get("DNNL_LIBRARY"):
        return named
    try:
        files = importlib.metadata.distribution("onednn").files or []
    except importlib.metadata.PackageNotFoundError:
        files = []
    for file in files:
        if file.name == "libdnnl.so.3":
            return str(Path(file.locate()).resolve())
    if found := ctypes.util.find_library("dnnl"):
        return found
    raise ImportError(
        "no libdnnl: neither DNNL_LIBRARY nor a package onednn nor the linker has one"
    )


def load(path: str) -> ctypes.CDLL:
    """With the libraries that it needs, which the linker does not look for in its own folder."""
    while True:
        try:
            return ctypes.CDLL(path, mode=ctypes.RTLD_GLOBAL)
        except OSError as error:
            missing = re.match(r"(\S+): cannot open shared object file", str(error))
            beside = Path(path).parent / missing[1] if missing else Path(path)
            if str(beside) == path or not beside.exists():
                raise ImportError(str(error)) from error
            load(str(beside))


def checked(status: int) -> None:
    if status != 0:
        raise RuntimeError(f"oneDNN returned status {status}")


class Handle:
    """An object of the library, made by its last argument's function into a pointer."""

    def __init__(self, destroy: Callable[[c_void_p], int], create: Any, *arguments: Any) -> None:
        self.pointer = c_void_p()
        self.destroy = destroy
        checked(create(byref(self.pointer), *arguments))

    def __del__(self) -> None:
        if self.pointer:
            self.destroy(self.pointer)


class Library:
    def __init__(self) -> None:
        path = library_path()
        driver = Path(path).parent / "libintelocl.so"
        if driver.exists():
            os.environ.setdefault("OCL_ICD_FILENAMES", str(driver))
        self.c = c = load(path)
        self.engine = Handle(c.dnnl_engine_destroy, c.dnnl_engine_create, CPU, c_size_t(0))
        self.stream = Handle(
            c.dnnl_stream_destroy, c.dnnl_stream_create, self.engine.pointer, IN_ORDER
        )

    def descriptor(self, array: np.ndarray, dtype: int) -> Handle:
        c, dimensions = self.c, c_int64 * MOST_DIMENSIONS
        sizes = dimensions(*array.shape)
        strides = dimensions(*(stride // array.itemsize for stride in array.strides))
        create = c.dnnl_memory_desc_create_with_strides
        return Handle(c.dnnl_memory_desc_destroy, create, array.ndim, sizes, dtype, strides)

    def memory(self, array: np.ndarray, dtype: int) -> Handle:
        c, descriptor = self.c, self.descriptor(array, dtype)
        address = c_void_p(array.ctypes.data)
        create = c.dnnl_memory_create
        return Handle(
            c.dnnl_memory_destroy, create, descriptor.pointer, self.engine.pointer, address
        )

    def norm(self, x: Handle, y: Handle) -> Handle:
        c = self.c
        create = c.dnnl_layer_normalization_forward_primitive_desc_create_v2
        arguments = (self.engine.pointer, FORWARD_INFERENCE, x.pointer, y.pointer, None)
        options = (TYPES["f32"], c_float(EPS), c_uint(USE_SCALE | RMS_NORM), None)
        try:
            return Handle(c.dnnl_primitive_desc_destroy, create, *arguments, *options)
        except RuntimeError as error:
            raise Unsupported(f"{error}: it may be older than the flag for RMS") from error

    def primitive(self, description: Handle) -> Handle:
        c, name = self.c, c_char_p()
        checked(
            c.dnnl_primitive_desc_query(description.pointer, QUERY_IMPLEMENTATION, 0, byref(name))
        )
        if name.value is not None and name.value.startswith(b"ref"):
            raise Unsupported("oneDNN has only its reference code for it")
        return Handle(c.dnnl_primitive_destroy, c.dnnl_primitive_create, description.pointer)

    def call_of(
        self, primitive: Handle, arrays: dict[int, tuple[np.ndarray, int]]
    ) -> Callable[[], None]:
        memories = {index: self.memory(*array) for index, array in arrays.items()}
        arguments = (Argument * len(memories))(
            *(Argument(index, memory.pointer) for index, memory in memories.items())
        )
        execute, wait = self.c.dnnl_primitive_execute, self.c.dnnl_stream_wait
        stream, count = self.stream.pointer, len(memories)

        def call(keep: object = (memories, primitive, arrays)) -> None:
            execute(primitive.pointer, stream, count, arguments)
            wait(stream)

        checked(execute(primitive.pointer, stream, count, arguments))
        checked(wait(stream))
        return call


library = cache(Library)


def prepare(case: Case, threads: int) -> Bind:
    one = library()
    if case.operation == "add":
        raise Unsupported("oneDNN has no sum with two results")
    if case.operation == "backward":
        raise Unsupported("oneDNN 3.13's gradient with the flag for RMS has the term of a mean")
    if case.dtype not in TYPES:
        raise Unsupported(f"oneDNN has no {case.dtype}")
    if case.layout == PACKED_QKV:
        raise Unsupported("not prepared for packed tensors")
    dtype, f32 = TYPES[case.dtype], TYPES["f32"]
    primitive = None

    def bind(t: Tensors) -> Bound:
        nonlocal primitive
        if primitive is None:
            x, y = one.descriptor(t["x"], dtype), one.descriptor(t["y"], dtype)
            primitive = one.primitive(one.norm(x, y))
        weight = t["weight"].astype(np.float32)
        arrays = {SRC: (t["x"], dtype), SCALE: (weight, f32), DST: (t["y"], dtype)}
        return Bound(one.call_of(primitive, arrays))

    return bind
