"""Who takes part: this library, copies of the same bytes, and peers that may be installed or not.

A contender is a function `prepare(case, threads)` in a module of this package that is imported only
when its turn comes. It returns a function that binds the contender to one set of tensors; what is
timed is the call of what that returns. ImportError says that the peer is not installed, Unsupported
that it cannot do a case.
"""

from __future__ import annotations

import importlib
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from ..cases import Case, Tensors


class Unsupported(Exception):
    """The contender has no such operation, dtype or layout."""


@dataclass
class Bound:
    """A call without arguments, and what of its value are results, by name, where it has any.

    The other results are in the tensors that the call is bound to.
    """

    call: Callable[[], Any]
    results: Callable[[Any], dict[str, Any]] | None = None


Bind = Callable[[Tensors], Bound]


@dataclass(frozen=True)
class Contender:
    label: str
    place: str
    devices: tuple[str, ...]
    allocates: bool = False  # its results on the CPU, at every call

    def prepare(self, case: Case, threads: int) -> Bind:
        module, function = self.place.split(":")
        prepare: Callable[[Case, int], Bind]
        prepare = getattr(importlib.import_module(f"{__name__}.{module}"), function)
        return prepare(case, threads)


CPU, CUDA, BOTH = ("cpu",), ("cuda",), ("cpu", "cuda")

OURS = "rmsnorm"
OURS_NEW = "rmsnorm-new"
COPIES = {
    "copy": Contender("memcpy", "copies:memcpy", CPU),
    "copy-on-threads": Contender("memcpy on threads", "copies:memcpy_on_threads", CPU),
    "cuda-memcpy": Contender("cudaMemcpyAsync", "copies:cuda_memcpy", CUDA),
    "elementwise-copy": Contender("elementwise copy", "copies:cuda_elementwise", CUDA),
}
PEERS = {
    OURS_NEW: Contender("rmsnorm without out", "ours:into_new", CPU, allocates=True),
    "torch": Contender("torch eager", "by_torch:eager", BOTH, allocates=True),
    "torch-compiled": Contender("torch compiled", "by_torch:compiled", BOTH, allocates=True),
    "onnxruntime": Contender("ONNX Runtime", "by_onnxruntime:prepare", CPU),
    # Before OpenVINO, which loads OpenCL too: what it is to use is read from the environment once.
    "onednn": Contender("oneDNN", "by_onednn:prepare", CPU),
    "openvino": Contender("OpenVINO", "by_openvino:prepare", CPU),
    "jax": Contender("JAX", "by_jax:prepare", CPU, allocates=True),
    "ggml": Contender("ggml", "by_ggml:prepare", CPU),
    "zendnn": Contender("ZenDNN", "by_zendnn:prepare", CPU, allocates=True),
    "liger": Contender("Liger", "by_cuda_libraries:liger", CUDA),
    "quack": Contender("QuACK", "by_cuda_libraries:quack", CUDA),
    "flashinfer": Contender("FlashInfer", "by_cuda_libraries:flashinfer", CUDA),
}
ALL = {OURS: Contender("rmsnorm", "ours:into_given", BOTH), **COPIES, **PEERS}
