"""ONNX Runtime on the CPU, its own operators, bound to the same memory.

f32 and f16 have kernels; a bf16 graph is one of conversions around the f32 kernel. A packed x is cut
out of its buffer by a node of the graph.
"""

from __future__ import annotations

from functools import partial
from typing import Any

import numpy as np
import onnxruntime
from onnx import TensorProto, helper, numpy_helper

from ..cases import EPS, HEADS, OPERATIONS, PACKED_QKV, Case, Tensors
from . import Bind, Bound, Unsupported

TYPES = {
    "f32": TensorProto.FLOAT,
    "bf16": TensorProto.BFLOAT16,
    "f16": TensorProto.FLOAT16,
    "f64": TensorProto.DOUBLE,
}


def model_of(case: Case, inputs: dict[str, Any], outputs: dict[str, Any]) -> bytes:
    nodes, constants = [], []
    if case.layout == PACKED_QKV:
        bounds = {"begin": 0, "end": HEADS, "axis": 1}
        constants = [numpy_helper.from_array(np.array([v]), name) for name, v in bounds.items()]
        nodes.append(helper.make_node("Slice", ["qkv", *bounds], ["x"]))
    if case.operation == "add":
        kind, domain = "SkipSimplifiedLayerNormalization", "com.microsoft"
        operands, results = ["x", "residual", "weight"], ["y", "", "", "residual_out"]
    else:
        kind, domain = "SimplifiedLayerNormalization", ""
        operands, results = ["x", "weight"], ["y"]
    nodes.append(helper.make_node(kind, operands, results, domain=domain, epsilon=EPS))

    def values(arrays: dict[str, Any]) -> list[Any]:
        dtype = TYPES[case.dtype]
        return [helper.make_tensor_value_info(k, dtype, v.shape) for k, v in arrays.items()]

    graph = helper.make_graph(nodes, "norm", values(inputs), values(outputs), constants)
    opsets = [helper.make_opsetid("", 21), helper.make_opsetid("com.microsoft", 1)]
    return helper.make_model(graph, opset_imports=opsets, ir_version=10).SerializeToString()


def prepare(case: Case, threads: int) -> Bind:
    operation = OPERATIONS[case.operation]
    if case.operation == "backward":
        raise Unsupported("ONNX Runtime has no backward pass")
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = threads
    # Errors only: a graph without an own kernel for its dtype would warn of it each time.
    options.log_severity_level = 3
    session = None
    names = ["qkv" if case.layout == PACKED_QKV else "x", *operation.reads[1:], "weight"]

    def bind(t: Tensors) -> Bound:
        nonlocal session
        inputs = {name: t[name] for name in names}
        outputs = {name: t[name] for name in operation.writes}
        if session is None:
            model = model_of(case, inputs, outputs)
            providers = ["CPUExecutionProvider"]
            session = onnxruntime.InferenceSession(model, options, providers=providers)
        binding = session.io_binding()
        where = ("cpu", 0, TYPES[case.dtype])
        for name, array in inputs.items():
            binding.bind_input(name, *where, array.shape, array.ctypes.data)
        for name, array in outputs.items():
            binding.bind_output(name, *where, array.shape, array.ctypes.data)
        return Bound(partial(session.run_with_iobinding, binding))

    return bind
