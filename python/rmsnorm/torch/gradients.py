"""Gradients of the operators, known to torch's dispatcher and, for calls past it, as functions.

apply_rms_norm and apply_add_rms_norm compute and record past the dispatcher, which takes three
times as long to call an operator that is implemented in Python.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch._functorch.utils import enable_single_level_autograd_function
from torch.autograd import forward_ad

from . import formula, operators
from .arguments import check_add_rms_norm, check_rms_norm, check_rms_norm_backward
from .eager import is_eager, requires_grad
from .registration import implementations

Gradient = Tensor | None

# Named here so that a torch without them is refused when this module is imported.
_has_storage = torch._C._has_storage
_transforms_active = torch._C._are_functorch_transforms_active
_after_autograd_keyset = torch._C._after_autograd_keyset
_AutoDispatchBelowAutograd = torch._C._AutoDispatchBelowAutograd
_compiled_autograd_key = torch.autograd.Function._compiled_autograd_key

_library = implementations(__name__)


def _needs_dispatcher(gradient: Tensor) -> bool:
    """Whether what torch hands down holds its values in no memory, or others than its memory does.

    Those are batches of gradients, from torch.autograd.grad(..., is_grads_batched=True), the
    imaginary part of a conjugate, which is negated when it is read, and zeros that torch knows of.
    """
    return not _has_storage(gradient) or gradient.is_neg() or gradient._is_zerotensor()


def _gradients(
    dy: Tensor,
    x: Tensor,
    residual: Tensor | None,
    weight: Tensor | None,
    bias: Tensor | None,
    rstd: Tensor | None,
    d_residual: Tensor | None,
    *options: Any,
    needs_dweight: bool,
) -> tuple[Tensor, Gradient, Gradient]:
    """dx, dweight and dbias; None for the last two where they are not needed."""
    arguments = (dy, x, residual, weight, bias, rstd, d_residual, *options, needs_dweight)
    dispatched = (
        torch.is_grad_enabled()
        or _needs_dispatcher(dy)
        or (d_residual is not None and _needs_dispatcher(d_residual))
    )
    if not dispatched and is_eager(*arguments[:7]):
        return operators.gradients(*arguments)
    dx, dweight, dbias = torch.ops.rmsnorm.rms_norm_backward(*arguments)
    return dx, dweight if needs_dweight else None, None if bias is None else dbias


def _add(a: Gradient, b: Gradient) -> Gradient:
    return b if a is None else a if b is None else a + b


def _kept(tensor: Tensor) -> Tensor:
    """What of an input is saved: a copy where it was made in inference mode.

    torch saves no such tensor, because nothing notices when its values change.
    """
    return tensor.clone() if tensor.is_inference() else tensor


def _save_rms_norm(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    x, weight, bias, eps, axis, weight_offset, _, partial, _ = inputs
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(_kept(x), weight, bias if ctx.needs_input_grad[2] else None, output[1])
    ctx.options = (eps, axis, weight_offset, partial)


def _rms_norm_backward(ctx: Any, dy: Gradient, d_rstd: Gradient = None) -> tuple[Gradient, ...]:
    x, weight, bias, rstd = ctx.saved_tensors
    needs_dweight = weight is not None and ctx.needs_input_grad[1]
    dx = dweight = dbias = None
    if dy is not None:
        dx, dweight, dbias = _gradients(
            dy, x, None, weight, bias, rstd, None, *ctx.options, needs_dweight=needs_dweight
        )
    if d_rstd is not None:
        eps, axis, _, partial = ctx.options
        dx = _add(dx, formula.gradient_of_rstd(d_rstd, x, None, eps, axis, partial))
    return dx, dweight, dbias, *(None,) * 7


def _save_add_rms_norm(
    ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor, Tensor]
) -> None:
    x, residual, weight, bias, eps, axis, weight_offset, _, round_residual = inputs
    _, residual_out, rstd = output
    ctx.set_materialize_grads(False)
    normed = (residual_out, None) if round_residual else (_kept(x), _kept(residual))
    ctx.save_for_backward(*normed, weight, bias if ctx.needs_input_grad[3] else None, rstd)
    ctx.options = (eps, axis, weight_offset, 1.0)
    ctx.dtypes = (x.dtype, residual.dtype)


def _add_rms_norm_backward(
    ctx: Any, dy: Gradient, d_residual: Gradient, d_rstd: Gradient = None
) -> tuple[Gradient, ...]:
    x, residual, weight, bias, rstd = ctx.saved_tensors
    needs_dweight = weight is not None and ctx.needs_input_grad[2]
    dx, dweight, dbias = d_residual, None, None
    if dy is not None:
        dx, dweight, dbias = _gradients(
            dy,
            x,
            residual,
            weight,
            bias,
            rstd,
            d_residual,
            *ctx.options,
            needs_dweight=needs_dweight,
        )
    if d_rstd is not None:
        eps, axis, _, partial = ctx.options
        dx = _add(dx, formula.gradient_of_rstd(d_rstd, x, residual, eps, axis, partial))
    if dx is None:
        return (None,) * 10
    to_x, to_residual = (dx.to(dtype) for dtype in ctx.dtypes)
    return to_x, to_residual, dweight, dbias, *(None,) * 6


def _save_gradients(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    dy, x, residual, weight, bias, _, d_residual, *options, needs_dweight = inputs
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(dy, x, residual, weight)
    ctx.options = tuple(options)
    ctx.has_dweight = weight is not None and needs_dweight
    ctx.has_bias = bias is not None
    ctx.d_residual_dtype = None if d_residual is None else d_residual.dtype


def _gradients_backward(
    ctx: Any, ddx: Gradient, ddweight: Gradient, ddbias: Gradient
) -> tuple[Gradient, ...]:
    dy, x, residual, weight = ctx.saved_tensors
    ddy, dx, dweight = formula.gradients_of_gradients(
        dy,
        x,
        residual,
        weight,
        ddx,
        ddweight if ctx.has_dweight else None,
        ddbias if ctx.has_bias else None,
        *ctx.options,
    )
    dresidual = None if residual is None else dx.to(residual.dtype)
    dd_residual = None
    if ctx.d_residual_dtype is not None and ddx is not None:
        dd_residual = ddx.to(ctx.d_residual_dtype)
    # bias has no values here, and rstd is a function of x, whose gradient has that of rstd in it.
    return ddy, dx.to(x.dtype), dresidual, dweight, None, None, dd_residual, *(None,) * 6


def _gradients_formula(*arguments: Any) -> tuple[Tensor, Tensor, Tensor]:
    dy, x, residual, weight, bias, _, d_residual, *options, needs_dweight = arguments
    dx, dweight, dbias = formula.gradients(dy, x, residual, weight, bias, d_residual, *options)
    return operators.without_none(x, dx, dweight if needs_dweight else None, dbias)


def _register(
    kernel: Callable[..., Any],
    save: Callable[..., None],
    backward: Callable[..., tuple[Gradient, ...]],
    check: Callable[..., None],
    by_formula: Callable[..., Any],
) -> Callable[..., Any]:
    """Makes an operator differentiable; returns the function that goes past the dispatcher.

    That one takes, behind the arguments of the operator, whether to return rstd, too: a result that
    is recorded costs time.

    torch.library.register_autograd would do for reverse mode in eager calls, but its functions do
    not work under torch.func, and lose tangents of forward mode.
    """
    operator = getattr(torch.ops.rmsnorm, kernel.__name__).default

    def forward(ctx: Any, *arguments: Any) -> Any:
        inputs, how = arguments[:-1], arguments[-1]
        if isinstance(how, bool):
            output = kernel(*inputs)
            save(ctx, inputs, output)
            return output if how else output[0] if len(output) == 2 else output[:-1]
        if _transforms_active():
            # In forward grad mode is off, and outer transforms would not record the call.
            with torch.enable_grad():
                output = below_autograd(how, *inputs)
        else:
            output = below_autograd(how, *inputs)
        save(ctx, inputs, output)
        return output

    def below_autograd(keys: Any, *inputs: Any) -> Any:
        rest = keys & _after_autograd_keyset
        if rest.highestPriorityTypeId() in operators.BACKENDS:
            # Where the dispatcher would come, in half of the time.
            return operators.on_plain_tensors(kernel, *inputs)
        with _AutoDispatchBelowAutograd():
            return operator.redispatch(rest, *inputs)

    # torch.autograd.Function is _SingleLevelFunction, what compiled autograd asks for and, in
    # Python, a way around both for transforms of torch.func. Those have taken this call apart when
    # it comes here.
    members = {
        "forward": staticmethod(forward),
        "backward": staticmethod(backward),
        "_compiled_autograd_key": staticmethod(_compiled_autograd_key),
    }
    function: Any = type(kernel.__name__, (torch.autograd.function._SingleLevelFunction,), members)

    def autograd(keys: Any, *inputs: Any) -> Any:
        if forward_ad._current_level >= 0:
            check(*inputs)
            return by_formula(*inputs)
        if not requires_grad(*inputs):
            return below_autograd(keys, *inputs)
        if _transforms_active():
            with enable_single_level_autograd_function():
                return function.apply(*inputs, keys)
        return function.apply(*inputs, keys)

    _library.impl(kernel.__name__, autograd, "Autograd", with_keyset=True)
    apply: Callable[..., Any] = function.apply
    return apply


apply_rms_norm = _register(
    operators.rms_norm,
    _save_rms_norm,
    _rms_norm_backward,
    check_rms_norm,
    formula.rms_norm,
)
apply_add_rms_norm = _register(
    operators.add_rms_norm,
    _save_add_rms_norm,
    _add_rms_norm_backward,
    check_add_rms_norm,
    formula.add_rms_norm,
)
_register(
    operators.rms_norm_backward,
    _save_gradients,
    _gradients_backward,
    check_rms_norm_backward,
    _gradients_formula,
)
