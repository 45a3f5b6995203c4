"""torch, on views of the same arrays; results are torch's own, as its functions have it."""

from __future__ import annotations

from functools import partial
from typing import Any

import torch
import torch._functorch.config
import torch.nn.functional as F

from ..cases import EPS, Case, Tensors
from . import Bind, Bound

# A backward pass is timed many times over one forward pass.
torch._functorch.config.donated_buffer = False


def tensor_of(array: Any) -> torch.Tensor:
    if isinstance(array, torch.Tensor):
        return array
    if array.dtype.name == "bfloat16":
        return torch.from_numpy(array.view("int16")).view(torch.bfloat16)
    return torch.from_numpy(array)


def norm(x: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
    return F.rms_norm(x, weight.shape, weight, EPS)


def plain_norm(x: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
    """What torch.compile makes one kernel of."""
    wide = x.float() if x.dtype != torch.float64 else x
    rstd = torch.rsqrt(wide.square().mean(-1, keepdim=True) + EPS)
    return (wide * rstd * weight.to(wide.dtype)).to(x.dtype)


def add_then(norm_of_sum: Any, x: Any, residual: Any, weight: Any) -> tuple[Any, Any]:
    total = x + residual
    return norm_of_sum(total, weight), total


def gradient_of(norm_of_x: Any, t: Tensors) -> Bound:
    """Of the backward pass alone, through the graph of one forward pass."""
    x, weight = (tensor_of(t[name]).detach().requires_grad_() for name in ("x", "weight"))
    y = norm_of_x(x, weight)
    call = partial(torch.autograd.grad, y, (x, weight), tensor_of(t["dy"]), retain_graph=True)
    return Bound(call, lambda gradients: {"dx": gradients[0], "dweight": gradients[1]})


def bind_with(case: Case, norm_of_x: Any, norm_of_sum: Any) -> Bind:
    def forward(t: Tensors) -> Bound:
        call = partial(norm_of_x, tensor_of(t["x"]), tensor_of(t["weight"]))
        return Bound(call, lambda y: {"y": y})

    def add(t: Tensors) -> Bound:
        operands = (tensor_of(t[name]) for name in ("x", "residual", "weight"))
        call = partial(norm_of_sum, *operands)
        return Bound(call, lambda pair: {"y": pair[0], "residual_out": pair[1]})

    def backward(t: Tensors) -> Bound:
        return gradient_of(norm_of_x, t)

    return {"forward": forward, "add": add, "backward": backward}[case.operation]


def eager(case: Case, threads: int) -> Bind:
    return bind_with(case, norm, partial(add_then, norm))


def compiled(case: Case, threads: int) -> Bind:
    torch._dynamo.reset()

    def plain_add_norm(x: Any, residual: Any, weight: Any) -> tuple[Any, Any]:
        return add_then(plain_norm, x, residual, weight)

    compile_it = partial(torch.compile, dynamic=False)
    return bind_with(case, compile_it(plain_norm), compile_it(plain_add_norm))
