"""ZenDNN by the operator of its plug-in for torch, which allocates its result.

Of the package only the library with the operators is loaded: its Python code would have a say in
torch.compile, which is a contender of its own.
"""

from __future__ import annotations

import importlib.metadata
from functools import partial
from typing import Any

import torch

from ..cases import EPS, PACKED_QKV, Case, Tensors
from . import Bind, Bound, Unsupported
from .by_torch import tensor_of


def operator() -> Any:
    try:
        files = importlib.metadata.distribution("zentorch").files or []
    except importlib.metadata.PackageNotFoundError as error:
        raise ImportError("No package zentorch") from error
    (library,) = (file for file in files if file.name == "libzentorch.so")
    try:
        torch.ops.load_library(str(library.locate()))
    except OSError as error:
        raise ImportError(f"zentorch is built for another torch: {error}") from error
    return torch.ops.zentorch.zentorch_rms_norm.default


def has_f16() -> bool:
    """Where it has no instructions for it, it prints an error and leaves the result as it was."""
    return bool(torch.cpu.get_capabilities().get("avx512_fp16", False))


def prepare(case: Case, threads: int) -> Bind:
    norm = operator()
    if case.operation == "add":
        raise Unsupported("ZenDNN's sum is in place")
    if case.operation == "backward":
        raise Unsupported("ZenDNN has no backward pass")
    if case.dtype == "f64" or (case.dtype == "f16" and not has_f16()):
        raise Unsupported(f"ZenDNN has no {case.dtype} on this CPU")
    if case.layout == PACKED_QKV:
        raise Unsupported("ZenDNN takes dense tensors only")

    def bind(t: Tensors) -> Bound:
        call = partial(norm, tensor_of(t["x"]), tensor_of(t["weight"]), EPS)
        return Bound(call, lambda y: {"y": y})

    return bind
