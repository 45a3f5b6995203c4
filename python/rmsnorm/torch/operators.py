"""The operators torch.ops.rmsnorm.*: what they compute, and the shapes of their results.

Their arguments are those of the functions of rmsnorm, all by position, with a negative `axis`, so
that a batch dimension can be put in front. Gradients are in gradients.py, the rules of torch.vmap
in batching.py.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch.nn import Parameter

import rmsnorm

from .._typing import Rounding
from .arguments import (
    check_add_rms_norm,
    check_rms_norm,
    check_rms_norm_backward,
    require_axis,
)
from .formula import compute_dtype, result_dtype
from .registration import define, implementations

define(
    "rms_norm(Tensor x, Tensor? weight, Tensor? bias, float eps, int axis, float weight_offset, "
    "str rounding, float partial, ScalarType? out_dtype) -> (Tensor y, Tensor rstd)"
)
define(
    "add_rms_norm(Tensor x, Tensor residual, Tensor? weight, Tensor? bias, float eps, int axis, "
    "float weight_offset, str rounding, bool round_residual) "
    "-> (Tensor y, Tensor residual_out, Tensor rstd)"
)
# dbias is like bias, whose values mean nothing. A gradient without its input is an empty tensor,
# since an operator cannot return None.
define(
    "rms_norm_backward(Tensor dy, Tensor x, Tensor? residual, Tensor? weight, Tensor? bias, "
    "Tensor? rstd, Tensor? d_residual, float eps, int axis, float weight_offset, float partial, "
    "bool needs_dweight) -> (Tensor dx, Tensor dweight, Tensor dbias)"
)


def rms_norm(
    x: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    eps: float,
    axis: int,
    weight_offset: float,
    rounding: Rounding,
    partial: float,
    out_dtype: torch.dtype | None,
    *,
    with_rstd: bool = True,
) -> Tensor | tuple[Tensor, Tensor]:
    if axis >= 0:  # Gradients and vmap count from the end.
        require_axis(axis, x.shape)
    return rmsnorm.rms_norm(
        x,
        weight,
        bias,
        eps=eps,
        axis=axis,
        weight_offset=weight_offset,
        rounding=rounding,
        partial=partial,
        out_dtype=out_dtype,
        return_rstd=with_rstd,
    )


def add_rms_norm(
    x: Tensor,
    residual: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    eps: float,
    axis: int,
    weight_offset: float,
    rounding: Rounding,
    round_residual: bool,
    *,
    with_rstd: bool = True,
) -> tuple[Tensor, Tensor] | tuple[Tensor, Tensor, Tensor]:
    if axis >= 0:
        require_axis(axis, x.shape)
    return rmsnorm.add_rms_norm(
        x,
        residual,
        weight,
        bias,
        eps=eps,
        axis=axis,
        weight_offset=weight_offset,
        rounding=rounding,
        round_residual=round_residual,
        return_rstd=with_rstd,
    )


def gradients(
    dy: Tensor,
    x: Tensor,
    residual: Tensor | None,
    weight: Tensor | None,
    bias: Tensor | None,
    rstd: Tensor | None,
    d_residual: Tensor | None,
    eps: float,
    axis: int,
    weight_offset: float,
    partial: float,
    needs_dweight: bool,
) -> tuple[Tensor, Tensor | None, Tensor | None]:
    """What rms_norm_backward computes, with None for a gradient without its input."""
    if axis >= 0:
        require_axis(axis, x.shape)
    dtype = result_dtype(x, residual)
    return rmsnorm.rms_norm_backward(
        dy,
        x,
        weight,
        rstd,
        eps=eps,
        axis=axis,
        weight_offset=weight_offset,
        partial=partial,
        residual=residual,
        d_residual=d_residual,
        needs_dweight=needs_dweight,
        dx_out=None if dtype == x.dtype else x.new_empty(x.shape, dtype=dtype),
        dbias_out=None if bias is None else bias.new_empty(bias.shape),
    )


def without_none(
    x: Tensor, dx: Tensor, dweight: Tensor | None, dbias: Tensor | None
) -> tuple[Tensor, Tensor, Tensor]:
    return (
        dx,
        x.new_empty(0) if dweight is None else dweight,
        x.new_empty(0) if dbias is None else dbias,
    )


def rms_norm_backward(
    dy: Tensor,
    x: Tensor,
    residual: Tensor | None,
    weight: Tensor | None,
    bias: Tensor | None,
    rstd: Tensor | None,
    d_residual: Tensor | None,
    eps: float,
    axis: int,
    weight_offset: float,
    partial: float,
    needs_dweight: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    dx, dweight, dbias = gradients(
        dy,
        x,
        residual,
        weight,
        bias,
        rstd,
        d_residual,
        eps,
        axis,
        weight_offset,
        partial,
        needs_dweight,
    )
    return without_none(x, dx, dweight, dbias)


BACKENDS = (torch._C.DispatchKey.CPU, torch._C.DispatchKey.CUDA)


def on_plain_tensors(kernel: Callable[..., Any], *arguments: Any) -> Any:
    """Calls a kernel for the dispatcher: subclasses of Tensor have had their say."""
    return kernel(*(_plain(a) if isinstance(a, Tensor) else a for a in arguments))


def _plain(tensor: Tensor) -> Tensor:
    kind = type(tensor)
    return tensor if kind is Tensor or kind is Parameter else tensor.as_subclass(Tensor)


_library = implementations(__name__)
for _kernel in (rms_norm, add_rms_norm, rms_norm_backward):
    for _backend in BACKENDS:
        _library.impl(_kernel.__name__, partial(on_plain_tensors, _kernel), _backend.name)


@torch.library.register_fake("rmsnorm::rms_norm", lib=_library)
def _(
    x: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    eps: float,
    axis: int,
    weight_offset: float,
    rounding: Rounding,
    partial: float,
    out_dtype: torch.dtype | None,
) -> tuple[Tensor, Tensor]:
    check_rms_norm(x, weight, bias, eps, axis, weight_offset, rounding, partial, out_dtype)
    dtype = x.dtype if out_dtype is None else out_dtype
    statistics = compute_dtype(x, weight, bias, dtype)
    return x.new_empty(x.shape, dtype=dtype), x.new_empty(x.shape[:axis], dtype=statistics)


@torch.library.register_fake("rmsnorm::add_rms_norm", lib=_library)
def _(
    x: Tensor,
    residual: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    eps: float,
    axis: int,
    weight_offset: float,
    rounding: Rounding,
    round_residual: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    check_add_rms_norm(
        x, residual, weight, bias, eps, axis, weight_offset, rounding, round_residual
    )
    total = result_dtype(x, residual)
    statistics = compute_dtype(x, residual, weight, bias)
    return (
        x.new_empty(x.shape),
        x.new_empty(x.shape, dtype=total),
        x.new_empty(x.shape[:axis], dtype=statistics),
    )


@torch.library.register_fake("rmsnorm::rms_norm_backward", lib=_library)
def _(
    dy: Tensor,
    x: Tensor,
    residual: Tensor | None,
    weight: Tensor | None,
    bias: Tensor | None,
    rstd: Tensor | None,
    d_residual: Tensor | None,
    eps: float,
    axis: int,
    weight_offset: float,
    partial: float,
    needs_dweight: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    check_rms_norm_backward(
        dy,
        x,
        residual,
        weight,
        bias,
        rstd,
        d_residual,
        eps,
        axis,
        weight_offset,
        partial,
        needs_dweight,
    )
    dx = x.new_empty(x.shape, dtype=result_dtype(x, residual))
    dweight = None
    if weight is not None and needs_dweight:
        dweight = weight.new_empty(weight.shape)
    dbias = None if bias is None else bias.new_empty(bias.shape)
    return without_none(x, dx, dweight, dbias)
