"""Whether a call may go past torch's dispatcher, straight to the kernels."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.autograd import forward_ad
from torch.compiler import is_dynamo_compiling
from torch.nn import Parameter
from torch.utils import _python_dispatch

# C functions of torch that have no public name; 30 ns each.
_dispatch_modes = torch._C._len_torch_dispatch_stack
_transforms_active = torch._C._are_functorch_transforms_active
_is_tracing = torch._C._is_tracing
_any_requires_grad = torch._C._any_requires_grad
_modes_before_dispatch: Callable[[], int] = torch._ops._len_torch_dispatch_stack_pre_dispatch


def is_eager(x: Tensor, *tensors: Tensor | None) -> bool:
    """True where nobody but autograd has to hear of an operation on the tensors.

    Those who have to: the tracers of torch.compile, torch.export, torch.fx and torch.jit,
    transforms of torch.func, forward-mode derivatives, dispatch modes, and subclasses of Tensor.
    Meta tensors have nothing to compute with.
    """
    if is_dynamo_compiling() or _dispatch_modes() or _transforms_active() or _is_tracing():
        return False
    if forward_ad._current_level >= 0:
        return False
    # make_fx with pre_dispatch has a stack of modes of its own, which takes longer to ask.
    if _python_dispatch._is_in_torch_dispatch_mode and _modes_before_dispatch():
        return False
    for tensor in (x, *tensors):
        kind = type(tensor)
        if kind is not Tensor and kind is not Parameter and tensor is not None:
            return False
    return not x.is_meta


def requires_grad(*arguments: Any) -> bool:
    return _any_requires_grad(*arguments) and torch.is_grad_enabled()
