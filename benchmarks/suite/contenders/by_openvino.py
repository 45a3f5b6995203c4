"""OpenVINO on the CPU: the formula, which its plug-in turns into its own RMS kernel.

The weight is a constant of the graph in f32, as that kernel wants it. A packed x is cut out of its
buffer by a node of the graph.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import openvino
from openvino import opset13 as ops

from ..cases import EPS, HEADS, OPERATIONS, PACKED_QKV, Case, Tensors
from . import Bind, Bound, Unsupported

TYPES = {
    "f32": openvino.Type.f32,
    "bf16": openvino.Type.bf16,
    "f16": openvino.Type.f16,
}


def norm_of(x: Any, weight: np.ndarray, dtype: Any) -> Any:
    wide = ops.convert(x, "f32") if dtype != openvino.Type.f32 else x
    axis, two = ops.constant(np.array([-1])), ops.constant(np.float32(2))
    mean_square = ops.reduce_mean(ops.power(wide, two), axis, keep_dims=True)
    root = ops.sqrt(ops.add(mean_square, ops.constant(np.float32(EPS))))
    rstd = ops.divide(ops.constant(np.float32(1)), root)
    scaled = ops.multiply(ops.constant(weight.astype(np.float32)), ops.multiply(wide, rstd))
    return ops.convert(scaled, dtype) if dtype != openvino.Type.f32 else scaled


def compiled_for(case: Case, t: Tensors, names: list[str], threads: int) -> Any:
    dtype = TYPES[case.dtype]
    inputs = [ops.parameter(t[name].shape, dtype, name=name) for name in names]
    x = inputs[0]
    if case.layout == PACKED_QKV:
        x = ops.slice(x, *(ops.constant(np.array([v])) for v in (0, HEADS, 1, 1)))
    if case.operation == "add":
        x = ops.add(x, inputs[1])
    outputs = [norm_of(x, t["weight"], dtype)] + ([x] if case.operation == "add" else [])
    settings = {
        "INFERENCE_PRECISION_HINT": dtype,
        "INFERENCE_NUM_THREADS": threads,
        "NUM_STREAMS": 1,
    }
    model = openvino.Model(outputs, inputs, "norm")
    return openvino.Core().compile_model(model, "CPU", settings)


def tensor_of(array: np.ndarray, dtype: str) -> openvino.Tensor:
    """Over the array's memory; OpenVINO takes bf16 as other numbers of 16 bits."""
    if dtype == "bf16":
        return openvino.Tensor(array.view(np.float16), array.shape, TYPES[dtype])
    return openvino.Tensor(array, shared_memory=True)


def prepare(case: Case, threads: int) -> Bind:
    operation = OPERATIONS[case.operation]
    if case.operation == "backward":
        raise Unsupported("OpenVINO has no backward pass")
    if case.dtype not in TYPES:
        raise Unsupported(f"not prepared for {case.dtype}")
    compiled = None
    names = ["qkv" if case.layout == PACKED_QKV else "x", *operation.reads[1:]]

    def bind(t: Tensors) -> Bound:
        nonlocal compiled
        if compiled is None:
            compiled = compiled_for(case, t, names, threads)
        request = compiled.create_infer_request()
        for i, name in enumerate(names):
            request.set_input_tensor(i, tensor_of(t[name], case.dtype))
        for i, name in enumerate(operation.writes):
            request.set_output_tensor(i, tensor_of(t[name], case.dtype))

        # Not infer(), which copies the results into new arrays.
        def call() -> None:
            request.start_async()
            request.wait()

        return Bound(call)

    return bind
