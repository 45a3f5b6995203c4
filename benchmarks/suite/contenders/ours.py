"""This library, on NumPy arrays on the CPU and on torch tensors on CUDA."""

from __future__ import annotations

from functools import partial

import rmsnorm

from ..cases import EPS, Case, Tensors
from . import Bind, Bound, Unsupported


def into_given(case: Case, threads: int) -> Bind:
    def forward(t: Tensors) -> Bound:
        return Bound(partial(rmsnorm.rms_norm, t["x"], t["weight"], eps=EPS, out=t["y"]))

    def add(t: Tensors) -> Bound:
        outputs = {"out": t["y"], "residual_out": t["residual_out"]}
        operands = (t["x"], t["residual"], t["weight"])
        return Bound(partial(rmsnorm.add_rms_norm, *operands, eps=EPS, **outputs))

    def backward(t: Tensors) -> Bound:
        _, rstd = rmsnorm.rms_norm(t["x"], t["weight"], eps=EPS, return_rstd=True)
        operands = (t["dy"], t["x"], t["weight"], rstd)
        return Bound(
            partial(rmsnorm.rms_norm_backward, *operands, eps=EPS, dx_out=t["dx"]),
            lambda gradients: {"dweight": gradients[1]},
        )

    return {"forward": forward, "add": add, "backward": backward}[case.operation]


def into_new(case: Case, threads: int) -> Bind:
    """As peers that allocate their results do."""

    def forward(t: Tensors) -> Bound:
        call = partial(rmsnorm.rms_norm, t["x"], t["weight"], eps=EPS)
        return Bound(call, lambda y: {"y": y})

    def add(t: Tensors) -> Bound:
        call = partial(rmsnorm.add_rms_norm, t["x"], t["residual"], t["weight"], eps=EPS)
        return Bound(call, lambda pair: {"y": pair[0], "residual_out": pair[1]})

    if case.operation == "backward":
        raise Unsupported("measured with out")
    return {"forward": forward, "add": add}[case.operation]
