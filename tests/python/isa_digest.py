"""Run by test_invariance.py in a process of its own: prints a digest of every result as JSON.

RMSNORM_ISA in the environment selects the instruction set; the digests must not depend on it.
"""

import hashlib
import json
import sys

import cases
import floats
import layouts
import numpy as np
import rmsnorm
from floats import DTYPES


def digest(*arrays):
    h = hashlib.sha256()
    for array in arrays:
        h.update(floats.bits(array).tobytes())
    return h.hexdigest()


def grid_digests():
    for number, case in enumerate(cases.grid()):
        arrays = cases.build(case)
        out = layouts.empty(case.shape, case.out, case.out_layout)
        y, rstd = rmsnorm.rms_norm(
            arrays.x.view,
            None if arrays.weight is None else arrays.weight.view,
            None if arrays.bias is None else arrays.bias.view,
            out=out.view,
            return_rstd=True,
            **case.options,
        )
        yield f"{number}: {case}", digest(y, rstd)


def bit_pattern_digests():
    """Rows of arbitrary bits: NaN, infinities, denormals, all magnitudes, in every dtype."""
    rng = np.random.default_rng(20)
    for dtype in DTYPES:
        raw = rng.integers(0, 256, (64, 97 * dtype.itemsize), dtype=np.uint8)
        x = raw.view(dtype)
        finite = np.where(np.isfinite(x.astype(np.float64)), x, np.ones((), dtype))
        weight = floats.cast(rng.standard_normal(97), dtype)
        for name, rows in (
            ("any bits", x),
            ("finite bits", finite),
            ("tiny", finite * x.dtype.type(0)),
        ):
            for rounding in cases.ROUNDINGS:
                for eps in (0.0, 1e-6):
                    y, rstd = rmsnorm.rms_norm(
                        rows, weight, eps=eps, rounding=rounding, return_rstd=True
                    )
                    yield f"{dtype} {name} {rounding} {eps}", digest(y, rstd)
            for out_dtype in DTYPES:
                y = rmsnorm.rms_norm(rows, out_dtype=out_dtype)
                yield f"{dtype} to {out_dtype} {name}", digest(y)


def scaled_digests():
    rng = np.random.default_rng(21)
    for dtype in DTYPES:
        for exponent in range(
            floats.EMIN[dtype] - floats.PRECISION[dtype] + 3, floats.EMAX[dtype], 7
        ):
            x = floats.cast(np.ldexp(1 + rng.random((2, 1100)), exponent - 1), dtype)
            yield (f"{dtype} 2^{exponent}", digest(*rmsnorm.rms_norm(x, eps=0.0, return_rstd=True)))


def other_operation_digests():
    rng = np.random.default_rng(22)
    for dtype in DTYPES:
        for n in (1, 8, 33, 257, 4097):
            x, residual = (cases.values(rng, (5, n), dtype) for _ in "xr")
            yield f"mean square {dtype} {n}", digest(rmsnorm.mean_square(x))
            mean_square = rmsnorm.mean_square(residual)
            yield f"apply {dtype} {n}", digest(rmsnorm.rms_norm_apply(x, mean_square))
            for round_residual in (False, True):
                results = rmsnorm.add_rms_norm(
                    x, residual, round_residual=round_residual, return_rstd=True
                )
                yield f"add {dtype} {n} {round_residual}", digest(*results)


def given_statistics_digests():
    """Zero, infinite, negative and denormal mean squares and rstd, whose factors meet paddings."""
    rng = np.random.default_rng(24)
    given = np.array([0.0, -0.0, np.inf, np.nan, -1.0, 5e-324, 1e-310, 1e-42, 1e300])
    for dtype in DTYPES:
        for n in (1, 2, 31, 33, 260):
            dy, x = (cases.values(rng, (given.size, n), dtype) for _ in "dx")
            for signed in (x, np.abs(x)):
                yield (
                    f"apply given {dtype} {n} {signed is x}",
                    digest(rmsnorm.rms_norm_apply(signed, given, eps=0.0)),
                )
                for option in ("mean_square", "rstd"):
                    results = rmsnorm.rms_norm_backward(
                        dy, signed, has_bias=True, eps=0.0, **{option: given}
                    )
                    key = f"backward given {option} {dtype} {n} {signed is x}"
                    yield key, digest(*(r for r in results if r is not None))


def backward_digests():
    rng = np.random.default_rng(23)
    for dtype in DTYPES:
        for weight_dtype in (dtype, floats.F32, floats.F16):
            for rows, n in ((1, 1), (3, 8), (9, 33), (20, 257), (150, 31), (2, 4097)):
                dy, x, extra = (cases.values(rng, (rows, n), dtype) for _ in "dxe")
                weight = cases.values(rng, n, weight_dtype)
                for options in ({}, {"partial": 0.3}, {"residual": extra}, {"d_residual": extra}):
                    results = rmsnorm.rms_norm_backward(dy, x, weight, has_bias=True, **options)
                    key = f"backward {dtype} {weight_dtype} {rows} {n} {list(options)}"
                    yield key, digest(*results)


def all_digests():
    sources = (grid_digests, bit_pattern_digests, scaled_digests)
    with np.errstate(all="ignore"):
        for source in (
            *sources,
            other_operation_digests,
            given_statistics_digests,
            backward_digests,
        ):
            yield from source()


if __name__ == "__main__":
    json.dump({"isa": rmsnorm.info()["cpu_isa"], "digests": dict(all_digests())}, sys.stdout)
