"""rms_norm and add_rms_norm with the signatures of torch.nn.functional."""

from __future__ import annotations

import operator
from collections.abc import Sequence
from numbers import Integral
from typing import Any, SupportsIndex

import torch
from torch import Tensor
from torch.compiler import is_dynamo_compiling
from torch.overrides import handle_torch_function, has_torch_function_variadic

from .._checks import repr_text, type_text
from .._typing import Rounding
from . import dispatch
from .arguments import fixed_number

_SINGLE_EPS = torch.finfo(torch.float32).eps
_DOUBLE_EPS = torch.finfo(torch.float64).eps
_INTEGERS = (Integral, torch.SymInt)
_HALF = (torch.float16, torch.bfloat16)


def default_eps(dtype: torch.dtype) -> float:
    """Torch's, for x of a dtype: that of the type which is computed in."""
    return _DOUBLE_EPS if dtype == torch.float64 else _SINGLE_EPS


def sizes_of(normalized_shape: Any) -> tuple[int, ...]:
    """normalized_shape as a tuple of integers, which may be of any type and symbols of torch."""
    try:
        sizes = tuple(normalized_shape)
    except TypeError:  # as a tensor or array without dimensions raises, which is iterable by type
        sizes = (normalized_shape,)
    if not all(isinstance(n, _INTEGERS) and not isinstance(n, bool) for n in sizes):
        raise TypeError(
            "normalized_shape: expected an integer or a sequence of integers, "
            f"got {repr_text(normalized_shape)}"
        )
    return tuple(_as_integer(n) for n in sizes)


def _sizes_in(shape: tuple[Any, ...]) -> tuple[Any, ...]:
    # While torch compiles, NumPy's integers are tensors, which stand for themselves.
    return shape if is_dynamo_compiling() else sizes_of(shape)


def _as_integer(n: Any) -> Any:
    return n if isinstance(n, (int, torch.SymInt)) else operator.index(n)


def _require_tensor(name: str, tensor: object) -> None:
    # Of the type itself: torch's functions end the process for what only says that it is one.
    if not issubclass(type(tensor), Tensor):
        raise TypeError(f"{name}: expected a torch.Tensor, got {type_text(tensor)}")


def _require_parameters(weight: object, bias: object) -> None:
    if weight is not None:
        _require_tensor("weight", weight)
    if bias is not None:
        _require_tensor("bias", bias)


def _axis_and_eps(input: Tensor, normalized_shape: Any, eps: float | None) -> tuple[int, float]:
    if isinstance(normalized_shape, tuple):
        shape = normalized_shape
        for n in shape:
            if type(n) is not int:
                shape = _sizes_in(shape)
                break
    elif type(normalized_shape) is int:
        shape = (normalized_shape,)
    else:
        shape = sizes_of(normalized_shape)
    if not shape or input.shape[-len(shape) :] != shape:
        raise ValueError(
            f"normalized_shape: expected the last dimensions of input, whose shape is "
            f"{tuple(input.shape)}, got {repr_text(shape)}"
        )
    if eps is None:
        eps = default_eps(input.dtype)
    elif type(eps) is not float:
        eps = fixed_number(eps, "eps")
    return -len(shape), eps


def autocast_dtype(input: Tensor) -> torch.dtype | None:
    """The dtype of torch's own result where autocast changes it."""
    if input.is_cuda and input.dtype in _HALF and torch.is_autocast_enabled("cuda"):
        return torch.float32
    return None


def rms_norm(
    input: Tensor,
    normalized_shape: SupportsIndex | Sequence[SupportsIndex],
    weight: Tensor | None = None,
    eps: float | None = None,
    *,
    bias: Tensor | None = None,
    weight_offset: float = 0.0,
    rounding: Rounding = "once",
    out_dtype: torch.dtype | None = None,
) -> Tensor:
    """torch.nn.functional.rms_norm, computed by rmsnorm.

    ``y = input / sqrt(mean(input**2) + eps) * (weight_offset + weight) + bias``, the mean taken over
    the dimensions of normalized_shape. Differentiable in input, weight and bias; gradients pass
    through roundings unchanged.

    Args:
        input: float16, bfloat16, float32 or float64, of shape ``(*, *normalized_shape)`` and any
            strides, on the CPU or on CUDA.
        normalized_shape: The last dimensions of input, one or several; integers of any type.
        weight: Of shape normalized_shape, optionally after leading dimensions that broadcast
            against those of input; any of the four dtypes. None: ones.
        eps: Added to the mean square; in units of input squared. None: as in torch, the machine
            epsilon of float32, or of float64 for float64 input.
        bias: As weight, added at the end. None: nothing is added.
        weight_offset: Added to weight in the compute type; 1.0 for weights stored around zero.
        rounding: Where half precision rounds: "once", "before_weight" or "rstd", as in
            rmsnorm.rms_norm.
        out_dtype: dtype of the result. None: that of input, except that half precision on CUDA gives
            float32 where autocast is enabled for CUDA, as in torch.

    Returns:
        A contiguous tensor of the shape of input.

    Raises:
        TypeError, ValueError: An argument is of the wrong kind, dtype, shape or value. Of these
            messages, those that come from rmsnorm.rms_norm call input x.
        RuntimeError: The tensors are on a device that this build cannot compute on.

    Examples:
        >>> import torch
        >>> import rmsnorm.torch
        >>> x = torch.tensor([[1.0, 7.0]], requires_grad=True)
        >>> y = rmsnorm.torch.rms_norm(x, (2,), eps=0.0)
        >>> y.detach()
        tensor([[0.2000, 1.4000]])
        >>> y.sum().backward()
        >>> x.grad
        tensor([[ 0.1680, -0.0240]])
    """
    if has_torch_function_variadic(input, weight, bias):
        overridden: Tensor = handle_torch_function(
            rms_norm,
            (input, weight, bias),
            input,
            normalized_shape,
            weight,
            eps,
            bias=bias,
            weight_offset=weight_offset,
            rounding=rounding,
            out_dtype=out_dtype,
        )
        return overridden
    if type(input) is not Tensor:
        _require_tensor("input", input)
    _require_parameters(weight, bias)
    axis, eps = _axis_and_eps(input, normalized_shape, eps)
    if type(weight_offset) is not float:
        weight_offset = fixed_number(weight_offset, "weight_offset")
    if out_dtype is None:
        if input.is_cuda:
            out_dtype = autocast_dtype(input)
    elif not isinstance(out_dtype, torch.dtype):
        raise TypeError(f"out_dtype: expected a torch.dtype, got {repr_text(out_dtype)}")
    y: Tensor = dispatch.rms_norm(
        False, input, weight, bias, eps, axis, weight_offset, rounding, 1.0, out_dtype
    )
    return y


def add_rms_norm(
    input: Tensor,
    residual: Tensor,
    normalized_shape: SupportsIndex | Sequence[SupportsIndex],
    weight: Tensor | None = None,
    eps: float | None = None,
    *,
    bias: Tensor | None = None,
    weight_offset: float = 0.0,
    rounding: Rounding = "once",
    round_residual: bool = True,
) -> tuple[Tensor, Tensor]:
    """Residual add and rms_norm in one pass over memory.

    ``residual_out = input + residual``, and ``y = rms_norm(residual_out, ...)``.

    Args:
        input, normalized_shape, weight, eps, bias, weight_offset, rounding: As in rms_norm.
        residual: Of the shape of input; any of the four dtypes.
        round_residual: True: the norm is taken of residual_out, as the model that adds and then
            normalizes computes. False: of the sum before it is rounded to that dtype.

    Returns:
        (y, residual_out), contiguous tensors of the shape of input. y has the dtype of input,
        residual_out the one that input and residual promote to, under autocast as well.
        Differentiable, both of them.

    Raises:
        TypeError, ValueError, RuntimeError: As rms_norm.

    Examples:
        >>> import torch
        >>> import rmsnorm.torch
        >>> x, residual = torch.tensor([[1.0, 3.0]]), torch.tensor([[0.0, 4.0]])
        >>> rmsnorm.torch.add_rms_norm(x, residual, (2,), eps=0.0)
        (tensor([[0.2000, 1.4000]]), tensor([[1., 7.]]))
    """
    if has_torch_function_variadic(input, residual, weight, bias):
        overridden: tuple[Tensor, Tensor] = handle_torch_function(
            add_rms_norm,
            (input, residual, weight, bias),
            input,
            residual,
            normalized_shape,
            weight,
            eps,
            bias=bias,
            weight_offset=weight_offset,
            rounding=rounding,
            round_residual=round_residual,
        )
        return overridden
    _require_tensor("input", input)
    _require_tensor("residual", residual)
    _require_parameters(weight, bias)
    axis, eps = _axis_and_eps(input, normalized_shape, eps)
    if type(weight_offset) is not float:
        weight_offset = fixed_number(weight_offset, "weight_offset")
    results: tuple[Tensor, Tensor] = dispatch.add_rms_norm(
        False, input, residual, weight, bias, eps, axis, weight_offset, rounding, round_residual
    )
    return results
