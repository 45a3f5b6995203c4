"""The norms of this library as layers of the package kernels, through which transformers offers
to replace layers: its classes say ``use_kernel_forward_from_hub("RMSNorm")``.

One name stands there for several formulas, so the layer looks at the module that it is put into.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable
from weakref import WeakKeyDictionary

import torch
from torch import Tensor
from torch.nn import Module

from .recognition import Norm, Recognition, Unrecognised
from .replacement import leaving_what_raises, require_supported

_recognition = Recognition()
_norms: WeakKeyDictionary[Module, Norm | None] = WeakKeyDictionary()


def _norm_of(module: Module) -> Norm | None:
    """What a module computes, found at its first call; None if it is no known formula."""
    if module not in _norms:
        try:
            with leaving_what_raises():
                require_supported(module)
                _norms[module] = _recognition.of(module)
        except Unrecognised as error:
            warnings.warn(f"{type(module).__name__} keeps its forward: {error}", stacklevel=3)
            _norms[module] = None
    return _norms[module]


# kernels binds this forward to modules of the model, and refuses layers with other members than
# these. It cannot be traced: what a module computes is found by running it, and torch.compile would
# take what it finds in one module for a fact about all of the class.
class _Layer(Module):
    can_torch_compile = False
    has_backward = True

    def forward(self, hidden_states: Tensor) -> Tensor:
        norm = None if torch.compiler.is_compiling() else _norm_of(self)
        y = None if norm is None else norm.compute(self, hidden_states)
        if y is not None:
            return y
        original: Callable[..., Tensor] = type(self).forward
        return original(self, hidden_states)


class InstalledLayer:
    """What kernels calls a repository: it loads a layer, this one from the installed package."""

    def load(self) -> type[Module]:
        return _Layer

    def __eq__(self, other: object) -> bool:
        return isinstance(other, InstalledLayer)

    def __hash__(self) -> int:
        return hash(InstalledLayer)

    def __str__(self) -> str:
        return "`rmsnorm.torch`"


def kernel_mapping() -> dict[str, dict[str, InstalledLayer]]:
    """For kernels.use_kernel_mapping and kernels.register_kernel_mapping: the layer for the names
    under which transformers registers its RMSNorm classes without a gate, on CPU and CUDA.

    A module whose forward is none of the known formulas keeps it, with a warning at its first call;
    so does every module under torch.compile, for which replace_rms_norms is the way.

    Examples:
        >>> import rmsnorm.torch
        >>> sorted(rmsnorm.torch.kernel_mapping())
        ['RMSNorm', 'RMSNormZeroCentered']
    """
    devices = {"cpu": InstalledLayer(), "cuda": InstalledLayer()}
    return {"RMSNorm": devices, "RMSNormZeroCentered": devices}
