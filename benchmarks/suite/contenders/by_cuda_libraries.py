"""Peers that have CUDA kernels only; each is imported when it is to take part."""

from __future__ import annotations

from functools import partial
from typing import Any

from ..cases import EPS, Case, Tensors
from . import Bind, Bound, Unsupported


def results_of(value: Any) -> dict[str, Any]:
    """Of y or of (y, sum, ...)."""
    if isinstance(value, tuple):
        return {"y": value[0], "residual_out": value[1]}
    return {"y": value}


def refuse_backward(case: Case) -> None:
    if case.operation == "backward":
        raise Unsupported("not prepared for backward")


def liger(case: Case, threads: int) -> Bind:
    from liger_kernel.ops.fused_add_rms_norm import LigerFusedAddRMSNormFunction as Add
    from liger_kernel.ops.rms_norm import LigerRMSNormFunction as Norm

    refuse_backward(case)
    options = (EPS, 0.0, "llama", False)

    def bind(t: Tensors) -> Bound:
        if case.operation == "add":
            call = partial(Add.apply, t["x"], t["residual"], t["weight"], *options)
        else:
            call = partial(Norm.apply, t["x"], t["weight"], *options)
        return Bound(call, results_of)

    return bind


def quack(case: Case, threads: int) -> Bind:
    from quack.rmsnorm import rmsnorm_fwd

    refuse_backward(case)

    def bind(t: Tensors) -> Bound:
        residual = t["residual"] if case.operation == "add" else None
        call = partial(rmsnorm_fwd, t["x"], t["weight"], residual=residual, eps=EPS)
        return Bound(call, results_of)

    return bind


def flashinfer(case: Case, threads: int) -> Bind:
    from flashinfer import norm

    refuse_backward(case)

    def bind(t: Tensors) -> Bound:
        if case.operation == "forward":
            return Bound(partial(norm.rmsnorm, t["x"], t["weight"], EPS, out=t["y"]))
        # In place: the sum over residual, y over x. As many bytes.
        x, residual = t["x"].clone(), t["residual"].clone()
        call = partial(norm.fused_add_rmsnorm, x, residual, t["weight"], EPS)
        return Bound(call, lambda nothing: {"y": x, "residual_out": residual})

    return bind
