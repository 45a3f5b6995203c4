"""The formulas of published models, bit for bit, given the reciprocal root of each row.

`formula_*` are the lines of the models' torch code written with torch's promotion rules: an
operation on tensors computes in f32 (f64 for f64) and rounds its result to the promoted dtype.
`contract` is the one general expression of include/rmsnorm/contract.hpp. That the package computes
both is tested in test_formulas.py, that the lines are the models' in test_transformers.py.

rstd comes from outside, since its last bit depends on how the squares are summed.
"""

import numpy as np
from floats import F32, F64, cast, compute_dtype, fma, promote


def _wide(dtype):
    return F64 if dtype == F64 else F32


def times(a, b):
    dtype = promote(a.dtype, b.dtype)
    with np.errstate(all="ignore"):
        return cast(a.astype(_wide(dtype)) * b.astype(_wide(dtype)), dtype)


def plus(a, b):
    dtype = promote(a.dtype, b.dtype)
    with np.errstate(all="ignore"):
        return cast(a.astype(_wide(dtype)) + b.astype(_wide(dtype)), dtype)


def formula_a(x, rstd, weight):
    """Llama, Mistral, Qwen: weight * cast(x32 * rstd)."""
    return times(weight, cast(times(x.astype(rstd.dtype), rstd), x.dtype))


def formula_b(x, rstd, weight):
    """Gemma: cast(x32 * rstd * (1 + weight32))."""
    one = np.ones((), rstd.dtype)
    normed = times(x.astype(rstd.dtype), rstd)
    return cast(times(normed, plus(one, weight.astype(rstd.dtype))), x.dtype)


def formula_c(x, rstd, weight):
    """OLMo 2, GPT-OSS: cast(weight * (x32 * rstd))."""
    return cast(times(weight, times(x.astype(rstd.dtype), rstd)), x.dtype)


def formula_d(x, rstd, weight):
    """T5: the dtype of a half weight rounds x * rstd; an f32 weight makes the result f32."""
    normed = times(x, rstd)
    if weight.dtype.itemsize == 2:
        normed = cast(normed, weight.dtype)
    return times(weight, normed)


def formula_e(x, rstd, weight=None):
    """Gemma 3n: cast(x32 * rstd * weight32), weight optional."""
    normed = times(x.astype(rstd.dtype), rstd)
    if weight is not None:
        normed = times(normed, weight.astype(rstd.dtype))
    return cast(normed, x.dtype)


def formula_f(x, rstd):
    """Llama 4's "L2Norm", NanoChat: cast(x32 * rstd)."""
    return cast(times(x.astype(rstd.dtype), rstd), x.dtype)


def formula_g(x, rstd):
    """DeepSeek-V4 and GLM-5-Next without weight: x * cast(rstd)."""
    return times(x, cast(rstd, x.dtype))


def formula_m(x, rstd, weight=None, bias=None):
    """xLSTM: cast(x32 * rstd), then weight and bias in the storage types."""
    y = cast(times(x.astype(rstd.dtype), rstd), x.dtype)
    if weight is not None:
        y = times(y, weight)
    if bias is not None:
        y = plus(y, bias)
    return y


# Options of the package for each formula. D holds where x and weight share a half type or are f32;
# "D mixed" is its other half, an f32 weight on half x.
OPTIONS = {
    "A": {"rounding": "before_weight"},
    "B": {"rounding": "once", "weight_offset": 1.0},
    "C": {"rounding": "once"},
    "D": {"rounding": "before_weight"},
    "D mixed": {"rounding": "once", "out_dtype": F32},
    "E": {"rounding": "once"},
    "F": {"rounding": "once"},
    "G": {"rounding": "rstd"},
    "M": {"rounding": "before_weight"},
}


def contract(x, rstd, weight=None, bias=None, *, rounding, weight_offset=0.0, out_dtype, dtype_t):
    """The contract's expression. `x` may be the sum with a residual, in the compute type when that
    sum is not rounded; `dtype_t` is T of the contract and rstd has the compute type."""
    compute = rstd.dtype
    assert compute == compute_dtype(x.dtype, getattr(weight, "dtype", None), compute)
    wide = x.astype(compute)
    w = None
    if weight is not None:
        w = weight.astype(compute)
        weight_dtype = weight.dtype
        if weight_offset != 0:
            w = np.asarray(weight_offset, compute) + w
            weight_dtype = compute
    with np.errstate(all="ignore"):
        if rounding == "once":
            y = wide * rstd
            if bias is not None:
                ones = np.ones((), compute)
                y = fma(y, ones if w is None else w, bias.astype(compute))
            elif w is not None:
                y = y * w
            return cast(y, out_dtype)
        factor = cast(rstd, dtype_t).astype(compute) if rounding == "rstd" else rstd
        y = cast(wide * factor, dtype_t)
        if w is not None:
            y = cast(y.astype(compute) * w, promote(dtype_t, weight_dtype))
        if bias is not None:
            y = cast(y.astype(compute) + bias.astype(compute), promote(y.dtype, bias.dtype))
        return cast(y, out_dtype)
