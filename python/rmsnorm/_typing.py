"""The types of the signatures in _core.pyi."""

from __future__ import annotations

from typing import Any, Literal, Protocol

Rounding = Literal["once", "before_weight", "rstd"]

DTypeName = Literal["float16", "bfloat16", "float32", "float64"]

# A name, or a dtype object of NumPy, ml_dtypes, JAX or torch, which share no type.
DTypeLike = DTypeName | Any

# A torch.cuda.Stream, a cupy.cuda.Stream, an object with __cuda_stream__, or a handle.
Stream = int | Any


class Array(Protocol):
    """An array with the DLPack protocol: NumPy, torch, JAX, CuPy and others."""

    def __dlpack__(self, *args: Any, **kwargs: Any) -> Any: ...

    def __dlpack_device__(self) -> Any: ...
