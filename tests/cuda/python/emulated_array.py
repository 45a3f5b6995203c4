"""Arrays that say they lie on a CUDA device, over memory of NumPy's.

Under the emulation of the execution model device memory is host memory, so that everything from the
DLPack export to the kernel's writes runs as it does on a device.
"""

from __future__ import annotations

import ctypes
from typing import Any

import numpy as np

CUDA, CUDA_HOST, CUDA_MANAGED, ROCM = 2, 3, 13, 10

_CODES = {"float16": (2, 16), "bfloat16": (4, 16), "float32": (2, 32), "float64": (2, 64)}


class _Tensor(ctypes.Structure):
    _fields_ = [
        ("data", ctypes.c_void_p),
        ("device_type", ctypes.c_int32),
        ("device_id", ctypes.c_int32),
        ("rank", ctypes.c_int32),
        ("code", ctypes.c_uint8),
        ("bits", ctypes.c_uint8),
        ("lanes", ctypes.c_uint16),
        ("sizes", ctypes.POINTER(ctypes.c_int64)),
        ("strides", ctypes.POINTER(ctypes.c_int64)),
        ("byte_offset", ctypes.c_uint64),
    ]


class _ManagedTensor(ctypes.Structure):
    pass


_Deleter = ctypes.CFUNCTYPE(None, ctypes.POINTER(_ManagedTensor))
_ManagedTensor._fields_ = [
    ("tensor", _Tensor),
    ("context", ctypes.c_void_p),
    ("deleter", _Deleter),
]

_new_capsule = ctypes.pythonapi.PyCapsule_New
_new_capsule.restype = ctypes.py_object
_new_capsule.argtypes = [ctypes.c_void_p, ctypes.c_char_p, ctypes.c_void_p]
_pointer_of = ctypes.pythonapi.PyCapsule_GetPointer
_pointer_of.restype = ctypes.c_void_p
_pointer_of.argtypes = [ctypes.py_object, ctypes.c_char_p]


class EmulatedArray:
    """A NumPy array as one on a device; records the streams that its exports were asked for."""

    def __init__(self, host: np.ndarray, device: tuple[int, int] = (CUDA, 0)) -> None:
        self.host = host
        self.device = device
        self.streams: list[int | None] = []
        self._exports: list[Any] = []  # in use until the consumer is done, which nobody tells

    @property
    def dtype(self) -> np.dtype:
        return self.host.dtype

    @property
    def shape(self) -> tuple[int, ...]:
        return self.host.shape

    def __dlpack_device__(self) -> tuple[int, int]:
        return self.device

    def __dlpack__(self, *, stream: int | None = None) -> Any:
        self.streams.append(stream)
        host = self.host
        code, bits = _CODES[host.dtype.name]
        sizes = (ctypes.c_int64 * host.ndim)(*host.shape)
        strides = (ctypes.c_int64 * host.ndim)(*(s // host.itemsize for s in host.strides))
        managed = _ManagedTensor(
            _Tensor(host.ctypes.data, *self.device, host.ndim, code, bits, 1, sizes, strides, 0),
            None,
            _Deleter(0),
        )
        self._exports.append((managed, sizes, strides))
        return _new_capsule(ctypes.addressof(managed), b"dltensor", None)

    def __array_namespace__(self) -> type[EmulatedNamespace]:
        return EmulatedNamespace


class EmulatedNamespace:
    """The part of the array API that results are made with."""

    consumer_stream = 0x77

    @classmethod
    def from_dlpack(cls, source: Any) -> EmulatedArray:
        device = tuple(source.__dlpack_device__())
        capsule = source.__dlpack__(stream=cls.consumer_stream)
        managed = ctypes.cast(
            _pointer_of(capsule, b"dltensor"), ctypes.POINTER(_ManagedTensor)
        ).contents
        tensor = managed.tensor
        name = next(k for k, v in _CODES.items() if v == (tensor.code, tensor.bits))
        sizes = tuple(tensor.sizes[i] for i in range(tensor.rank))
        dtype = np.dtype(name) if name != "bfloat16" else _bfloat16()
        count = int(np.prod(sizes, dtype=np.int64))
        memory = (ctypes.c_char * (count * dtype.itemsize)).from_address(tensor.data or 0)
        memory.owner = (capsule, source)  # which NumPy keeps with the memory
        return EmulatedArray(np.frombuffer(memory, dtype).reshape(sizes), device)


def _bfloat16() -> np.dtype:
    import ml_dtypes

    return np.dtype(ml_dtypes.bfloat16)
