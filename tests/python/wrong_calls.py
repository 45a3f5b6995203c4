"""The table of wrong calls for test_errors.py.

Every case starts from a call that is right; `changes` replaces some of its arguments (... leaves
one out). The pattern has the argument's name, what was expected where that is worth saying, and
what came.
"""

import jax.numpy as jnp
import ml_dtypes
import numpy as np
import rmsnorm
from floats import BF16, F16, F32


def rms_norm_call():
    return {
        "x": np.ones((3, 8), F32),
        "weight": np.ones(8, F32),
        "bias": np.zeros(8, F32),
        "out": np.full((3, 8), 7, F32),
    }


def add_call():
    return {
        "x": np.ones((3, 8), F32),
        "residual": np.ones((3, 8), F32),
        "weight": np.ones(8, F32),
        "out": np.full((3, 8), 7, F32),
        "residual_out": np.full((3, 8), 7, F32),
    }


def mean_square_call():
    return {"x": np.ones((3, 8), F32), "out": np.full(3, 7, F32)}


def apply_call():
    return {
        "x": np.ones((3, 8), F32),
        "mean_square": np.ones(3, F32),
        "weight": np.ones(8, F32),
        "out": np.full((3, 8), 7, F32),
    }


def backward_call():
    return {
        "dy": np.ones((3, 8), F32),
        "x": np.ones((3, 8), F32),
        "weight": np.ones(8, F32),
        "rstd": np.ones(3, F32),
        "dx_out": np.full((3, 8), 7, F32),
        "dweight_out": np.full(8, 7, F32),
        "dbias_out": np.full(8, 7, F32),
    }


def with_flags(array, writeable):
    array.flags.writeable = writeable
    return array


def halves_of_one(offset):
    """x and out in one piece of memory, `offset` elements apart."""
    memory = np.ones(100, F32)
    return {"x": memory[:24].reshape(3, 8), "out": memory[offset : offset + 24].reshape(3, 8)}


def same_memory_other_strides():
    memory = np.ones((8, 8), F32)
    return {"x": memory, "out": memory.T}


def same_memory_other_size():
    memory = np.ones(24, F32)
    return {"x": memory.reshape(3, 8), "out": memory.view(BF16)[:24].reshape(3, 8)}


def weight_is_out():
    memory = np.ones((1, 8), F32)
    return {"x": np.ones((1, 8), F32), "weight": memory[0], "out": memory}


def both_outputs_one_array():
    memory = np.full((3, 8), 7, F32)
    return {"out": memory, "residual_out": memory}


def both_outputs_are_x():
    memory = np.ones((3, 8), F32)
    return {"x": memory, "out": memory, "residual_out": memory}


def backward_halves(name, offset):
    """dx_out and another array in one piece of memory, `offset` elements apart."""
    memory = np.ones(100, F32)
    return {
        name: memory[:24].reshape(3, 8),
        "dx_out": memory[offset : offset + 24].reshape(3, 8),
    }


def shared_with_dx(name, shape):
    memory = np.ones((3, 8), F32)
    return {"dx_out": memory, name: memory.reshape(-1)[: int(np.prod(shape))].reshape(shape)}


SUPPORTED = r"float16.*bfloat16.*float32.*float64"
OF_STATISTICS = "expected dtype float32 or float64 in native byte order, got"

# operation, changes, exception, what the message matches
TABLE = {
    # what is an array
    "list as x": ("rms_norm", {"x": [1.0, 2.0]}, TypeError, r"^x\b.*list"),
    "tuple as weight": ("rms_norm", {"weight": (1.0,) * 8}, TypeError, r"^weight\b.*tuple"),
    "string as x": ("rms_norm", {"x": "1 2 3"}, TypeError, r"^x\b.*str"),
    "bytes as x": ("rms_norm", {"x": b"12345678"}, TypeError, r"^x\b.*bytes"),
    "None as x": ("rms_norm", {"x": None}, TypeError, r"^x\b.*None"),
    "float as x": ("rms_norm", {"x": 1.5}, TypeError, r"^x\b.*float"),
    "float as weight": ("rms_norm", {"weight": 1.5}, TypeError, r"^weight\b.*float"),
    "int as bias": ("rms_norm", {"bias": 0}, TypeError, r"^bias\b.*int"),
    "list as out": ("rms_norm", {"out": [[0.0] * 8] * 3}, TypeError, r"^out\b.*list"),
    "type as x": ("rms_norm", {"x": np.ndarray}, TypeError, r"^x\b"),
    "list as residual": ("add", {"residual": [1.0]}, TypeError, r"^residual\b.*list"),
    "list as mean_square": (
        "apply",
        {"mean_square": [1.0] * 3},
        TypeError,
        r"^mean_square\b.*list",
    ),
    # dtypes
    "int32 x": (
        "rms_norm",
        {"x": np.ones((3, 8), np.int32)},
        TypeError,
        rf"^x\b.*{SUPPORTED}.*int32",
    ),
    "uint8 x": ("rms_norm", {"x": np.ones((3, 8), np.uint8)}, TypeError, r"^x\b.*uint8"),
    "bool x": ("rms_norm", {"x": np.ones((3, 8), bool)}, TypeError, r"^x\b.*bool"),
    "complex x": ("rms_norm", {"x": np.ones((3, 8), np.complex64)}, TypeError, r"^x\b.*complex64"),
    "object x": ("rms_norm", {"x": np.ones((3, 8), object)}, TypeError, r"^x\b.*object"),
    "complex long double x": (
        "rms_norm",
        {"x": np.ones((3, 8), np.clongdouble)},
        TypeError,
        r"^x\b.*complex",
    ),
    "string array": ("rms_norm", {"x": np.full((3, 8), "a")}, TypeError, r"^x\b.*U1"),
    "datetime x": ("rms_norm", {"x": np.zeros((3, 8), "M8[s]")}, TypeError, r"^x\b.*datetime"),
    "record x": ("rms_norm", {"x": np.zeros((3, 8), [("a", "f4")])}, TypeError, r"^x\b"),
    "fp8 x": (
        "rms_norm",
        {"x": np.ones((3, 8), ml_dtypes.float8_e4m3fn)},
        TypeError,
        r"^x\b.*float8_e4m3fn",
    ),
    "big-endian x": ("rms_norm", {"x": np.ones((3, 8), ">f4")}, TypeError, r"^x\b.*>f4"),
    "big-endian f64 weight": (
        "rms_norm",
        {"weight": np.ones(8, ">f8")},
        TypeError,
        r"^weight\b.*>f8",
    ),
    "big-endian f16 out": ("rms_norm", {"out": np.ones((3, 8), ">f2")}, TypeError, r"^out\b.*>f2"),
    "int weight": ("rms_norm", {"weight": np.ones(8, int)}, TypeError, r"^weight\b.*int64"),
    "int bias": ("rms_norm", {"bias": np.ones(8, np.int16)}, TypeError, r"^bias\b.*int16"),
    "int out": ("rms_norm", {"out": np.ones((3, 8), int)}, TypeError, r"^out\b.*int64"),
    "int residual": ("add", {"residual": np.ones((3, 8), int)}, TypeError, r"^residual\b.*int64"),
    "int residual_out": (
        "add",
        {"residual_out": np.ones((3, 8), int)},
        TypeError,
        r"^residual_out\b.*int64",
    ),
    "f16 mean_square": (
        "apply",
        {"mean_square": np.ones(3, F16)},
        TypeError,
        r"^mean_square\b.*float32.*float64.*float16",
    ),
    "int mean_square": (
        "apply",
        {"mean_square": np.ones(3, int)},
        TypeError,
        rf"^mean_square: {OF_STATISTICS} int64$",
    ),
    "big-endian mean_square": (
        "apply",
        {"mean_square": np.ones(3, ">f4")},
        TypeError,
        rf"^mean_square: {OF_STATISTICS} >f4$",
    ),
    "bool mean_square from elsewhere": (
        "apply",
        {"mean_square": jnp.ones(3, bool)},
        TypeError,
        rf"^mean_square: {OF_STATISTICS} bool$",
    ),
    "int out of mean_square": (
        "mean_square",
        {"out": np.ones(3, int)},
        TypeError,
        rf"^out: {OF_STATISTICS} int64$",
    ),
    "bf16 out of mean_square": (
        "mean_square",
        {"out": np.ones(3, BF16)},
        TypeError,
        r"^out\b.*float32.*float64.*bfloat16",
    ),
    # shapes
    "0-d x": ("rms_norm", {"x": np.ones((), F32)}, ValueError, r"^x\b.*dimension.*\(\)"),
    "short weight": (
        "rms_norm",
        {"weight": np.ones(7, F32)},
        ValueError,
        r"^weight\b.*\(8,\).*\(7,\)",
    ),
    "weight of one": (
        "rms_norm",
        {"weight": np.ones(1, F32)},
        ValueError,
        r"^weight\b.*\(8,\).*\(1,\)",
    ),
    "0-d weight": (
        "rms_norm",
        {"weight": np.ones((), F32)},
        ValueError,
        r"^weight\b.*\(8,\).*\(\)",
    ),
    "long bias": ("rms_norm", {"bias": np.ones(9, F32)}, ValueError, r"^bias\b.*\(8,\).*\(9,\)"),
    "weight of other rows": (
        "rms_norm",
        {"weight": np.ones((2, 8), F32)},
        ValueError,
        r"^weight\b.*\(2, 8\)",
    ),
    "weight of higher rank": (
        "rms_norm",
        {"weight": np.ones((1, 3, 8), F32)},
        ValueError,
        r"^weight\b.*\(1, 3, 8\)",
    ),
    "weight for one of two axes": (
        "rms_norm",
        {"axis": 0},
        ValueError,
        r"^weight\b.*\(3, 8\).*\(8,\)",
    ),
    "out of other shape": (
        "rms_norm",
        {"out": np.ones((8, 3), F32)},
        ValueError,
        r"^out\b.*\(3, 8\).*\(8, 3\)",
    ),
    "flat out": ("rms_norm", {"out": np.ones(24, F32)}, ValueError, r"^out\b.*\(3, 8\).*\(24,\)"),
    "out that x would broadcast to": (
        "rms_norm",
        {"out": np.ones((1, 3, 8), F32)},
        ValueError,
        r"^out\b.*\(3, 8\).*\(1, 3, 8\)",
    ),
    "residual that would broadcast": (
        "add",
        {"residual": np.ones((1, 8), F32)},
        ValueError,
        r"^residual\b.*\(3, 8\).*\(1, 8\)",
    ),
    "residual_out of other shape": (
        "add",
        {"residual_out": np.ones((4, 8), F32)},
        ValueError,
        r"^residual_out\b.*\(3, 8\).*\(4, 8\)",
    ),
    "mean_square kept in two dimensions": (
        "apply",
        {"mean_square": np.ones((3, 1), F32)},
        ValueError,
        r"^mean_square\b.*\(3,\).*\(3, 1\)",
    ),
    "mean_square of other rows": (
        "apply",
        {"mean_square": np.ones(2, F32)},
        ValueError,
        r"^mean_square\b.*\(3,\).*\(2,\)",
    ),
    "mean_square out of x's shape": (
        "mean_square",
        {"out": np.ones((3, 8), F32)},
        ValueError,
        r"^out\b.*\(3,\).*\(3, 8\)",
    ),
    # options
    "axis too large": ("rms_norm", {"axis": 2}, ValueError, r"^axis\b.*-2.*2.*got 2"),
    "axis too small": ("rms_norm", {"axis": -3}, ValueError, r"^axis\b.*got -3"),
    "axis beyond 64 bits": ("rms_norm", {"axis": 2**70}, (ValueError, OverflowError), r"axis"),
    "axis beyond 32 bits": ("rms_norm", {"axis": 2**32 - 1}, ValueError, r"^axis\b"),
    "float axis": ("rms_norm", {"axis": 1.0}, TypeError, r"^axis\b.*integer.*float"),
    "tuple axis": ("rms_norm", {"axis": (0, 1)}, TypeError, r"^axis\b.*integer.*tuple"),
    "bool axis": ("rms_norm", {"axis": True}, TypeError, r"^axis\b.*integer.*bool"),
    "NaN eps": ("rms_norm", {"eps": float("nan")}, ValueError, r"^eps\b.*nan"),
    "negative eps": ("rms_norm", {"eps": -1e-6}, ValueError, r"^eps\b.*>= 0.*-1e-06"),
    "infinite eps": ("rms_norm", {"eps": float("inf")}, ValueError, r"^eps\b.*finite.*inf"),
    "eps None": ("rms_norm", {"eps": None}, TypeError, r"^eps\b.*number.*None"),
    "eps as string": ("rms_norm", {"eps": "1e-6"}, TypeError, r"^eps\b.*number.*str"),
    "eps as array": ("rms_norm", {"eps": np.ones(3)}, TypeError, r"^eps\b.*number"),
    "negative eps in add": ("add", {"eps": -1.0}, ValueError, r"^eps\b"),
    "NaN eps in apply": ("apply", {"eps": float("nan")}, ValueError, r"^eps\b"),
    "offset without weight": (
        "rms_norm",
        {"weight": None, "weight_offset": 1.0},
        ValueError,
        r"^weight_offset\b.*weight",
    ),
    "NaN offset": (
        "rms_norm",
        {"weight_offset": float("nan")},
        ValueError,
        r"^weight_offset\b.*nan",
    ),
    "infinite offset": (
        "rms_norm",
        {"weight_offset": -float("inf")},
        ValueError,
        r"^weight_offset\b.*inf",
    ),
    "offset as string": ("rms_norm", {"weight_offset": "1"}, TypeError, r"^weight_offset\b.*str"),
    "partial 0": ("rms_norm", {"partial": 0.0}, ValueError, r"^partial\b.*\(0, 1\].*0"),
    "partial 1.5": ("rms_norm", {"partial": 1.5}, ValueError, r"^partial\b.*1\.5"),
    "partial NaN": ("rms_norm", {"partial": float("nan")}, ValueError, r"^partial\b.*nan"),
    "negative partial": ("rms_norm", {"partial": -0.5}, ValueError, r"^partial\b.*-0\.5"),
    "unknown rounding": (
        "rms_norm",
        {"rounding": "nearest"},
        ValueError,
        r"^rounding\b.*once.*before_weight.*rstd.*nearest",
    ),
    "rounding None": ("rms_norm", {"rounding": None}, TypeError, r"^rounding\b.*None"),
    "rounding as number": ("add", {"rounding": 1}, TypeError, r"^rounding\b.*int"),
    "round_residual as string": (
        "add",
        {"round_residual": "no"},
        TypeError,
        r"^round_residual\b.*str",
    ),
    "return_rstd as number": ("rms_norm", {"return_rstd": 1}, TypeError, r"^return_rstd\b.*int"),
    "unknown out_dtype": (
        "rms_norm",
        {"out_dtype": "float8", "out": None},
        ValueError,
        r"^out_dtype\b.*float8",
    ),
    "integer out_dtype": (
        "rms_norm",
        {"out_dtype": np.int32, "out": None},
        TypeError,
        r"^out_dtype\b.*int32",
    ),
    "number as out_dtype": (
        "rms_norm",
        {"out_dtype": 32, "out": None},
        TypeError,
        r"^out_dtype\b.*32",
    ),
    "out_dtype against out": (
        "rms_norm",
        {"out_dtype": "float16"},
        ValueError,
        r"^out(_dtype)?\b.*float(16|32).*float(16|32)",
    ),
    "unknown keyword": ("rms_norm", {"epsilon": 1e-6}, TypeError, r"epsilon|incompatible"),
    "gate": ("rms_norm", {"gate": np.ones((3, 8), F32)}, TypeError, r"gate|incompatible"),
    "stream for CPU arrays": ("rms_norm", {"stream": 0}, ValueError, r"^stream: was given"),
    "partial of add": ("add", {"partial": 0.5}, TypeError, r"partial|incompatible"),
    "missing residual": ("add", {"residual": ...}, TypeError, r"residual|incompatible"),
    "missing x": ("rms_norm", {"x": ...}, TypeError, r"\bx\b|incompatible"),
    # memory
    "read-only out": (
        "rms_norm",
        {"out": with_flags(np.full((3, 8), 7, F32), False)},
        ValueError,
        r"^out\b.*(read-only|writ)",
    ),
    "read-only bf16 out": (
        "rms_norm",
        {"out": with_flags(np.full((3, 8), 7, BF16), False)},
        ValueError,
        r"^out\b.*(read-only|writ)",
    ),
    "read-only residual_out": (
        "add",
        {"residual_out": with_flags(np.full((3, 8), 7, F32), False)},
        ValueError,
        r"^residual_out\b.*(read-only|writ)",
    ),
    "read-only out of mean_square": (
        "mean_square",
        {"out": with_flags(np.full(3, 7, F32), False)},
        ValueError,
        r"^out\b.*(read-only|writ)",
    ),
    "broadcast out": (
        "rms_norm",
        {"out": np.lib.stride_tricks.as_strided(np.full(8, 7, F32), (3, 8), (0, 4))},
        ValueError,
        r"^out\b.*(share|broadcast|overlap)",
    ),
    "out whose elements share memory": (
        "rms_norm",
        {"out": np.lib.stride_tricks.as_strided(np.full(99, 7, F32), (3, 8), (16, 4))},
        ValueError,
        r"^out\b.*(share|overlap)",
    ),
    "out whose dimensions interleave": (
        "rms_norm",
        {
            "x": np.ones((2, 3), F32),
            "weight": None,
            "bias": None,
            "out": np.lib.stride_tricks.as_strided(np.full(9, 7, F32), (2, 3), (12, 8)),
        },
        ValueError,
        r"^out: its elements share memory.*or its dimensions interleave \(shape \(2, 3\), strides",
    ),
    "broadcast residual_out": (
        "add",
        {"residual_out": np.lib.stride_tricks.as_strided(np.full(8, 7, F32), (3, 8), (0, 4))},
        ValueError,
        r"^residual_out\b.*(share|broadcast|overlap)",
    ),
    "out one element behind x": (
        "rms_norm",
        halves_of_one(1),
        ValueError,
        r"^out\b.*overlap.*\bx\b",
    ),
    "out one row behind x": ("rms_norm", halves_of_one(8), ValueError, r"^out\b.*overlap.*\bx\b"),
    "out in x's last element": (
        "rms_norm",
        halves_of_one(23),
        ValueError,
        r"^out\b.*overlap.*\bx\b",
    ),
    "out is x transposed": (
        "rms_norm",
        {**same_memory_other_strides(), "weight": None, "bias": None},
        ValueError,
        r"^out\b.*overlap.*\bx\b",
    ),
    "out is x of another size": (
        "rms_norm",
        same_memory_other_size(),
        ValueError,
        r"^out\b.*overlap",
    ),
    "out is weight": ("rms_norm", weight_is_out(), ValueError, r"^out\b.*overlap.*weight"),
    "out is residual_out": ("add", both_outputs_one_array(), ValueError, r"out\b.*overlap.*out"),
    "both outputs are x": ("add", both_outputs_are_x(), ValueError, r"out\b.*overlap.*out"),
}

TABLE.update(
    {
        "list as dy": ("backward", {"dy": [1.0]}, TypeError, r"^dy\b.*list"),
        "None as dy": ("backward", {"dy": None}, TypeError, r"^dy\b.*None"),
        "missing dy": ("backward", {"dy": ...}, TypeError, r"\bdy\b|incompatible"),
        "float as d_residual": (
            "backward",
            {"d_residual": 0.5},
            TypeError,
            r"^d_residual\b.*float",
        ),
        "int dy": (
            "backward",
            {"dy": np.ones((3, 8), int)},
            TypeError,
            rf"^dy\b.*{SUPPORTED}.*int64",
        ),
        "int dx_out": (
            "backward",
            {"dx_out": np.ones((3, 8), int)},
            TypeError,
            r"^dx_out\b.*int64",
        ),
        "int rstd": (
            "backward",
            {"rstd": np.ones(3, int)},
            TypeError,
            rf"^rstd: {OF_STATISTICS} int64$",
        ),
        "f16 rstd": (
            "backward",
            {"rstd": np.ones(3, F16)},
            TypeError,
            r"^rstd\b.*float32.*float64.*float16",
        ),
        "bf16 mean_square of backward": (
            "backward",
            {"mean_square": np.ones(3, BF16)},
            TypeError,
            r"^mean_square\b.*float32.*float64.*bfloat16",
        ),
        "short weight whose gradient would be right": (
            "backward",
            {"weight": np.ones(7, F32)},
            ValueError,
            r"^weight: expected shape \(8,\).*, got \(7,\)$",
        ),
        "dy of other shape": (
            "backward",
            {"dy": np.ones((3, 7), F32)},
            ValueError,
            r"^dy\b.*\(3, 8\).*\(3, 7\)",
        ),
        "dy that would broadcast": (
            "backward",
            {"dy": np.ones((1, 8), F32)},
            ValueError,
            r"^dy\b.*\(3, 8\).*\(1, 8\)",
        ),
        "d_residual of other shape": (
            "backward",
            {"d_residual": np.ones(8, F32)},
            ValueError,
            r"^d_residual\b.*\(3, 8\).*\(8,\)",
        ),
        "rstd kept in two dimensions": (
            "backward",
            {"rstd": np.ones((3, 1), F32)},
            ValueError,
            r"^rstd\b.*\(3,\).*\(3, 1\)",
        ),
        "weight of backward too short": (
            "backward",
            {"weight": np.ones(7, F32), "dweight_out": None},
            ValueError,
            r"^weight\b.*\(8,\).*\(7,\)",
        ),
        "dweight_out of other shape": (
            "backward",
            {"dweight_out": np.full((1, 8), 7, F32)},
            ValueError,
            r"^dweight_out\b.*\(8,\) for weight of shape \(8,\).*\(1, 8\)",
        ),
        "dbias_out too long": (
            "backward",
            {"dbias_out": np.full(9, 7, F32)},
            ValueError,
            r"^dbias_out\b.*\(8,\).*\(9,\)",
        ),
        "dx_out of other shape": (
            "backward",
            {"dx_out": np.full((8, 3), 7, F32)},
            ValueError,
            r"^dx_out\b.*\(3, 8\).*\(8, 3\)",
        ),
        "dweight_out without weight": (
            "backward",
            {"weight": None},
            ValueError,
            r"^dweight_out\b.*without weight",
        ),
        "dweight_out that is not needed": (
            "backward",
            {"needs_dweight": False},
            ValueError,
            r"^dweight_out\b.*needs_dweight",
        ),
        "offset of backward without weight": (
            "backward",
            {"weight": None, "dweight_out": None, "weight_offset": 1.0},
            ValueError,
            r"^weight_offset\b.*weight",
        ),
        "partial with mean_square": (
            "backward",
            {"mean_square": np.ones(3, F32), "partial": 0.5},
            ValueError,
            r"^partial\b.*0\.5.*mean_square",
        ),
        "axis of backward": ("backward", {"axis": 2}, ValueError, r"^axis\b.*got 2"),
        "eps of backward": ("backward", {"eps": -1.0}, ValueError, r"^eps\b.*-1"),
        "rounding of backward": (
            "backward",
            {"rounding": "up"},
            ValueError,
            r"^rounding\b.*once.*up",
        ),
        "has_bias as number": ("backward", {"has_bias": 1}, TypeError, r"^has_bias\b.*int"),
        "needs_dweight as None": (
            "backward",
            {"needs_dweight": None},
            TypeError,
            r"^needs_dweight\b.*None",
        ),
        "bias of backward": (
            "backward",
            {"bias": np.ones(8, F32)},
            TypeError,
            r"bias|incompatible",
        ),
        "stream of backward": ("backward", {"stream": 0}, ValueError, r"^stream: was given"),
        "read-only dx_out": (
            "backward",
            {"dx_out": with_flags(np.full((3, 8), 7, F32), False)},
            ValueError,
            r"^dx_out\b.*(read-only|writ)",
        ),
        "read-only dbias_out": (
            "backward",
            {"dbias_out": with_flags(np.full(8, 7, F32), False)},
            ValueError,
            r"^dbias_out\b.*(read-only|writ)",
        ),
        "broadcast dweight_out": (
            "backward",
            {"dweight_out": np.lib.stride_tricks.as_strided(np.full(1, 7, F32), (8,), (0,))},
            ValueError,
            r"^dweight_out\b.*share",
        ),
        "dx_out one row behind dy": (
            "backward",
            backward_halves("dy", 8),
            ValueError,
            r"^dx_out\b.*overlap.*\bdy\b",
        ),
        "dx_out in x's last element": (
            "backward",
            backward_halves("x", 23),
            ValueError,
            r"^dx_out\b.*overlap.*\bx\b",
        ),
        "dx_out over weight": (
            "backward",
            shared_with_dx("weight", (8,)),
            ValueError,
            r"^dx_out\b.*overlap.*weight",
        ),
        "dx_out over rstd": (
            "backward",
            shared_with_dx("rstd", (3,)),
            ValueError,
            r"^dx_out\b.*overlap.*rstd",
        ),
        "dx_out over dbias_out": (
            "backward",
            shared_with_dx("dbias_out", (8,)),
            ValueError,
            r"_out\b.*overlap.*_out",
        ),
        "dweight_out is weight": (
            "backward",
            dict.fromkeys(("weight", "dweight_out"), np.ones(8, F32)),
            ValueError,
            r"^dweight_out\b.*overlap.*weight",
        ),
    }
)

CALLS = {
    "rms_norm": (rms_norm_call, rmsnorm.rms_norm),
    "add": (add_call, rmsnorm.add_rms_norm),
    "mean_square": (mean_square_call, rmsnorm.mean_square),
    "apply": (apply_call, rmsnorm.rms_norm_apply),
    "backward": (backward_call, rmsnorm.rms_norm_backward),
}


def arranged(operation, changes):
    make, function = CALLS[operation]
    arguments = {**make(), **changes}
    arguments = {k: v for k, v in arguments.items() if v is not ...}
    return function, arguments
