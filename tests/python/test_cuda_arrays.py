"""CUDA arrays where there is no CUDA to compute them: a build without it, or a machine."""

from __future__ import annotations

import ctypes

import numpy as np
import pytest
import rmsnorm

pytestmark = pytest.mark.skipif(
    bool(rmsnorm.info()["cuda"]["devices"]), reason="there is a CUDA device here"
)

CUDA = 2

_address_of = ctypes.PYFUNCTYPE(ctypes.POINTER(ctypes.c_int32), ctypes.py_object, ctypes.c_char_p)(
    ("PyCapsule_GetPointer", ctypes.pythonapi)
)

WHY = (
    r"(and this build of rmsnorm has no CUDA; install one that has \(see the README\)"
    r"|and there is no NVIDIA driver here \(error 35\); install one for CUDA \d+\.\d"
    r"|and CUDA finds no device here \(error 100\); make one visible \(CUDA_VISIBLE_DEVICES\))"
    r", or pass CPU arrays$"
)


class CudaArray:
    """Says that it lies on a device; its memory is NumPy's, and must not be computed with."""

    def __init__(self, *shape: int) -> None:
        self.host = np.full(shape, 7, np.float32)

    def __dlpack_device__(self) -> tuple[int, int]:
        return (CUDA, 0)

    def __dlpack__(self, **keywords: object) -> object:
        capsule = self.host.__dlpack__()
        tensor = _address_of(capsule, b"dltensor")
        tensor[2], tensor[3] = self.__dlpack_device__()  # behind the 8 bytes of its data's address
        return capsule

    def __array_namespace__(self) -> object:
        return np


@pytest.mark.parametrize(
    "call",
    [
        lambda x, out: rmsnorm.rms_norm(x),
        lambda x, out: rmsnorm.rms_norm(x, CudaArray(64), out=out),
        lambda x, out: rmsnorm.rms_norm(x, stream=1234, return_rstd=True, out=out),
        lambda x, out: rmsnorm.rms_norm(CudaArray(0, 64)),
        lambda x, out: rmsnorm.add_rms_norm(x, CudaArray(3, 64), out=out),
        lambda x, out: rmsnorm.mean_square(x),
        lambda x, out: rmsnorm.rms_norm_apply(x, CudaArray(3), out=out),
        lambda x, out: rmsnorm.rms_norm_backward(CudaArray(3, 64), x, CudaArray(64), dx_out=out),
    ],
)
def test_cuda_arrays_without_cuda(call):
    x, out = CudaArray(3, 64), CudaArray(3, 64)
    with pytest.raises(RuntimeError, match=rf"^(x|dy): is on cuda:0, {WHY}"):
        call(x, out)
    assert (out.host == 7).all()


def test_the_array_that_is_on_cuda_is_named():
    x = np.ones((3, 64), np.float32)
    with pytest.raises(ValueError, match="^weight: is on cuda:0 while x is on cpu"):
        rmsnorm.rms_norm(x, CudaArray(64))
