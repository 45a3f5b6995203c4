"""The arguments of the operators, checked where no kernel reads them.

That is under forward mode, under torch.vmap, and where a call is traced, with sizes that may be
symbols. Errors read as those of rmsnorm.rms_norm.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch._functorch.pyfunctorch import temporarily_clear_interpreter_stack
from torch.autograd import forward_ad

from .._checks import (
    DTYPE_NAMES,
    checked_eps,
    checked_partial,
    checked_rounding,
    checked_weight_offset,
    number,
    require_broadcast,
    require_dimensions,
    require_shape,
)

_DTYPES = (torch.float16, torch.bfloat16, torch.float32, torch.float64)
_STATISTICS = (torch.float32, torch.float64)

_unpack_dual: Any = forward_ad.unpack_dual
_is_wrapped = torch._C._functorch.is_functorch_wrapped_tensor

_Tensors = dict[str, Tensor | None]


def _text(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def _require_readable(name: str, tensor: Tensor) -> None:
    if tensor.layout != torch.strided:
        raise TypeError(f"{name}: expected a strided torch tensor, got layout {tensor.layout}")
    of_rows = name == "rstd"
    if tensor.dtype not in (_STATISTICS if of_rows else _DTYPES):
        names = "float32 or float64" if of_rows else DTYPE_NAMES
        raise TypeError(
            f"{name}: expected dtype {names} in native byte order, got {_text(tensor.dtype)}"
        )


def _require_device(name: str, tensor: Tensor, x: Tensor) -> None:
    if tensor.device == x.device:
        return
    named, other = (name, tensor), ("x", x)
    if tensor.device.type == "cpu":
        named, other = other, named
    raise ValueError(
        f"{named[0]}: is on {named[1].device} while {other[0]} is on {other[1].device}; expected "
        "all arrays on one device"
    )


def fixed_number(value: Any, name: str) -> Any:
    """An option as a float, or the symbol of one: a tensor could be changed before it is read again
    for backward. Raises TypeError for one whose derivative would be lost."""
    if isinstance(value, torch.SymFloat):
        return value
    if isinstance(value, Tensor):
        _require_no_derivative(value, name)
    return number(value, name)


def _has_tangent(tensor: Tensor) -> bool:
    if forward_ad._current_level < 0:
        return False
    with temporarily_clear_interpreter_stack():  # Transforms hide tangents from outside of them.
        return _unpack_dual(tensor).tangent is not None


def _require_no_derivative(option: Tensor, name: str) -> None:
    if _is_wrapped(option) or torch._is_functional_tensor(option):
        derivative = "that a transform follows, whose derivatives"
    elif option.requires_grad and torch.is_grad_enabled():
        derivative = "that requires grad, and its gradient"
    elif _has_tangent(option):
        derivative = "with a forward-mode tangent, which"
    else:
        return
    raise TypeError(
        f"{name}: expected a number, got a tensor {derivative} would be lost; pass {name}.item()"
    )


def require_axis(axis: int, x: Sequence[int]) -> None:
    require_dimensions(x)
    if not -len(x) <= axis < 0:
        raise ValueError(
            f"axis: expected {-len(x)} <= axis < 0 for x of shape {tuple(x)}, got {axis}"
        )


def _require_tensors(
    x: Tensor, axis: int, like_x: _Tensors, parameters: _Tensors, of_rows: _Tensors
) -> None:
    """like_x have the shape of x, parameters broadcast, of_rows have one number for each row."""
    everything = {"x": x, **like_x, **parameters, **of_rows}
    for name, tensor in everything.items():
        if tensor is not None:
            _require_readable(name, tensor)
            _require_device(name, tensor, x)
    require_axis(axis, x.shape)
    for tensors, shape in ((like_x, x.shape), (of_rows, x.shape[:axis])):
        for name, tensor in tensors.items():
            if tensor is not None:
                require_shape(name, tensor.shape, shape, x.shape)
    for name, tensor in parameters.items():
        if tensor is not None:
            require_broadcast(name, tensor.shape, x.shape, axis)


def check_rms_norm(
    x: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    eps: float,
    axis: int,
    weight_offset: float,
    rounding: str,
    partial: float,
    out_dtype: torch.dtype | None,
) -> None:
    _require_tensors(x, axis, {}, {"weight": weight, "bias": bias}, {})
    checked_eps(eps)
    checked_weight_offset(weight_offset, weight is not None)
    checked_rounding(rounding)
    checked_partial(partial)
    if out_dtype is not None and out_dtype not in _DTYPES:
        raise TypeError(
            f"out_dtype: expected {DTYPE_NAMES}, as a string or a dtype, got {_text(out_dtype)}"
        )


def check_add_rms_norm(
    x: Tensor,
    residual: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    eps: float,
    axis: int,
    weight_offset: float,
    rounding: str,
    round_residual: bool,
) -> None:
    _require_tensors(x, axis, {"residual": residual}, {"weight": weight, "bias": bias}, {})
    checked_eps(eps)
    checked_weight_offset(weight_offset, weight is not None)
    checked_rounding(rounding)


def check_rms_norm_backward(
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
) -> None:
    like_x = {"dy": dy, "residual": residual, "d_residual": d_residual}
    _require_tensors(x, axis, like_x, {"weight": weight, "bias": bias}, {"rstd": rstd})
    checked_eps(eps)
    checked_weight_offset(weight_offset, weight is not None)
    checked_partial(partial)
