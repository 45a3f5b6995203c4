"""The theorems: what stands in the placeholders of a template (*.g), and what must not do.

A template is a script for Gappa with placeholders like %bound. A placeholder that holds an
assumption or a conclusion has two texts (Bound): the one of the theorem, and another with which the
proof has to fail, be it a larger error that is assumed or a smaller one that is concluded. A script
that proves something else than it seems to, or whose assumptions contradict each other so that
anything follows from them, would be proved with the other text too.

In order, from the sum of squares to y; each takes what the ones before conclude. docs/proofs.md
tells what links them.
"""

import itertools
import re
import string
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

HERE = Path(__file__).parent


class Bound(NamedTuple):
    value: str
    fails: str  # with this in its place there must be no proof


@dataclass(frozen=True)
class Theorem:
    name: str
    template: str
    says: str  # with {placeholders} of the template
    values: Mapping[str, str | Bound]
    # What include/rmsnorm/bounds.hpp promises of it, in C++, and the program that shows that where
    # the theorem allows slightly more.
    promise: str = ""
    completed_by: str = ""

    def script(self, control: str = "") -> str:
        """The script for Gappa, or that of the control of one placeholder."""
        values = {name: text_of(value) for name, value in self.values.items()}
        bound = self.values.get(control)
        if isinstance(bound, Bound):
            values[control] = bound.fails
        return _Template((HERE / self.template).read_text()).substitute(values)

    def controls(self) -> list[str]:
        return [name for name, value in self.values.items() if isinstance(value, Bound)]

    def proved(self) -> float:
        """The conclusion `bound` of a theorem that stands for a promise, in ulps."""
        bound = text_of(self.values["bound"])
        return float.fromhex(bound) if bound.startswith("0x") else float(bound)

    def statement(self) -> str:
        return self.says.format_map(
            {name: readable(text_of(value)) for name, value in self.values.items()}
        )


def text_of(value: str | Bound) -> str:
    return value if isinstance(value, str) else value.value


class _Template(string.Template):
    delimiter = "%"


def readable(number: str) -> str:
    """1b-20 as 2^-20, 0x1.8p-53 as 1.5 * 2^-53."""
    if match := re.fullmatch(r"(\d+)b(-?\d+)", number):
        mantissa, exponent = match.groups()
        return f"2^{exponent}" if mantissa == "1" else f"{mantissa} * 2^{exponent}"
    if match := re.fullmatch(r"(0x[0-9a-f.]+)p(-?\d+)", number):
        mantissa = f"{float.fromhex(match[1]):.10g}"
        return mantissa if match[2] == "0" else f"{mantissa} * 2^{match[2]}"
    return number


@dataclass(frozen=True)
class Format:
    digits: int
    least: int  # exponent of the least normal number

    def __str__(self) -> str:
        """As Gappa wants it: digits, and the exponent of the least denormal."""
        return f"{self.digits}, {self.least - self.digits + 1}"


FORMATS = {
    "f16": Format(11, -14),
    "bf16": Format(8, -126),
    "f32": Format(24, -126),
    "f64": Format(53, -1022),
}
F32, F64 = str(FORMATS["f32"]), str(FORMATS["f64"])

# What one theorem concludes and another assumes. Relative errors of the guess of 1 / sqrt, of what
# the Newton step makes of it, and of rstd of f32 before it is rounded.
GUESS_F32, GUESS_F64 = "0x1.80001p-24", "0x2.80001p-53"
NEWTON_F32, NEWTON_F64 = "0x2.4p-46", "1b-102"
STATISTICS_F32 = "0x0.000d2p-24"


def binade(split_at: str = "") -> Bound:
    """V for one binade of 1 / sqrt(V).

    Where that is so near to 1 that what is computed may lie beyond, where floats are further apart,
    is a case of its own.
    """
    if not split_at:
        return Bound("V in [1, 4]", fails="V in [0, 4]")
    cases = f"(V in [{{}}, {split_at}] \\/ V in [{split_at}, 4])"
    return Bound(cases.format("1"), fails=cases.format("0x0.8p0"))


SUMS = [
    Theorem(
        "sum_step_f32",
        "sum_step.g",
        "an addition to a sum of floats rounds away {bound} of it, as long as it is good to {sum}",
        {
            "format": F32,
            "sum": Bound("1b-19", fails="1b-18"),
            "next": Bound("[0, 1b200]", fails="[-0x0.1p0, 1b200]"),
            "total": Bound("[1b-100, 1b100]", fails="[0, 1b100]"),
            "bound": Bound("0x1.00002p-24", fails="0x1.00001p-24"),
        },
    ),
    Theorem(
        "sum_step_f64",
        "sum_step.g",
        "the same of doubles: {bound} and {sum}",
        {
            "format": F64,
            # 2^28 additions, a row of 2^36 elements, err by less.
            "sum": Bound("1b-24", fails="0x1.1p-24"),
            "next": Bound("[0, 1b200]", fails="[-0x0.1p0, 1b200]"),
            "total": Bound("[1b-100, 1b100]", fails="[0, 1b100]"),
            "bound": Bound("0x1.000001p-53", fails="1b-53"),
        },
    ),
    Theorem(
        "compensated_step",
        "compensated_step.g",
        "an addition to a lane of doubles errs by {error} of the lane, and lo by {lost}",
        {
            "sum": Bound("[1b-800, 0x1.00000001p0]", fails="[1b-800, 0x1.0000001p0]"),
            "total": Bound("[1, 2]", fails="[0, 2]"),
            "low": Bound("0x1.0001p-36", fails="0x1.1p-35"),
            "error": Bound("0x1.00000001p-53", fails="1b-53"),
            "lost": Bound("1b-88", fails="0x1.fp-89"),
        },
    ),
]

MEANS = [
    Theorem(
        "mean_f64",
        "mean_f64.g",
        "mean square + eps as a pair of doubles errs by {bound} beside the sum's error",
        {
            "format": F64,
            "mean": Bound("[0, 4]", fails="[0, 1b20]"),
            "low": Bound("1b-33", fails="0x1.1p-33"),
            "rounding": Bound("1b-53", fails="0x1.1p-53"),
            "high": Bound("1b-53", fails="0x0.ffp-53"),
            "eps": Bound("[0, 4]", fails="[0, 1b20]"),
            "bound": Bound("0x1.81p-85", fails="0x1.8p-85"),
        },
    ),
    Theorem(
        "mean_f32_cuda",
        "mean_f32.g",
        "the same as a pair of floats, on CUDA: {bound}",
        {
            "a": Bound("1b-20", fails="0x1.1p-20"),
            "b": Bound("1b-24", fails="0x1.1p-24"),
            "g": Bound("1b-24", fails="1b-20"),
            "c": Bound("1b-48", fails="1b-47"),
            "k": Bound("1b-48", fails="1b-47"),
            "mean": Bound("[0, 4]", fails="[0, 0x4.1p0]"),
            "eps": Bound("[0, 4]", fails="[0, 8]"),
            "bound": Bound("0x1.0dp-40", fails="0x1.0ap-40"),
            "high": Bound("1b-24", fails="0x0.ffp-24"),
        },
    ),
]

ROOTS = [
    Theorem(
        "root_f64",
        "root.g",
        "the guess of 1 / sqrt in double is good to {bound}",
        {
            "format": F64,
            "guess": "f(1 / f(sqrt(v)))",
            "high": Bound("1b-53", fails="0x1.001p-53"),
            "V": Bound("[1, 4]", fails="[0, 4]"),
            "bound": Bound(GUESS_F64, fails="0x2.8p-53"),
        },
    ),
    Theorem(
        "root_f32",
        "root.g",
        "CUDA's in float, by an instruction that rounds once, to {bound}",
        {
            "format": F32,
            "guess": "f(1 / sqrt(v))",
            "high": Bound("1b-24", fails="0x1.001p-24"),
            "V": Bound("[1, 4]", fails="[0, 4]"),
            "bound": Bound(GUESS_F32, fails="0x1.8p-24"),
        },
    ),
    Theorem(
        "newton_f64",
        "newton.g",
        "the Newton step in double leaves {bound} before it is rounded",
        {
            "format": F64,
            "R": Bound("[0.5, 1]", fails="[0, 1]"),
            "guess": Bound(GUESS_F64, fails="0x2.9p-53"),
            "high": Bound("1b-53", fails="1b-51"),
            "bound": Bound(NEWTON_F64, fails="0x0.f8p-102"),
        },
    ),
    Theorem(
        "newton_f32",
        "newton.g",
        "that in float, on CUDA, {bound}",
        {
            "format": F32,
            "R": Bound("[0.5, 1]", fails="[0, 1]"),
            "guess": Bound(GUESS_F32, fails="0x1.9p-24"),
            "high": Bound("1b-24", fails="1b-22"),
            "bound": Bound(NEWTON_F32, fails="0x2.38p-46"),
        },
    ),
]

RSTDS = [
    Theorem(
        "rstd_f32_cpu",
        "rstd_double.g",
        "rstd of f32 on the CPU, n <= 2^20, B = 4096 blocks: {bound} ulp, 0.5 + (B + 17) 2^-30",
        {
            "sum": Bound("0x100b.0001p-53", fails="0x102bp-53"),  # B + 11 roundings
            "mean": Bound("[1b-300, 4]", fails="[0, 4]"),
            "eps": Bound("[0, 4]", fails="[-0x0.1p0, 4]"),
            "V": binade("0x1.0000008p0"),
            "unrounded": Bound("0x0.00004045p-24", fails="0x0.0000404p-24"),
            "relative": Bound("0x1.00004045p-24", fails="0x1.0000404p-24"),
            "bound": Bound("0x0.80004044p0", fails="0x0.8000403cp0"),
        },
        promise="cpu_rstd_bound(DType::f32, false, 1 << 20)",
    ),
    Theorem(
        "rstd_f32_cpu_short",
        "rstd_double.g",
        "the same of one block, n <= 256: {bound} ulp",
        {
            "sum": Bound("0xc.0001p-53", fails="0xdp-53"),
            "mean": Bound("[1b-300, 4]", fails="[0, 4]"),
            "eps": Bound("[0, 4]", fails="[-0x0.1p0, 4]"),
            "V": binade("0x1.0000008p0"),
            "unrounded": Bound("0x0.00000049p-24", fails="0x0.00000048p-24"),
            "relative": Bound("0x1.00000049p-24", fails="0x1.00000045p-24"),
            "bound": Bound("0x0.80000048p0", fails="0x0.80000044p0"),
        },
        promise="cpu_rstd_bound(DType::f32, false, 256)",
    ),
    Theorem(
        "rstd_f16_cpu",
        "rstd_double.g",
        "rstd between 16-bit tensors on the CPU, nine roundings to float: {bound} ulp of f32",
        {
            # One of a square, seven of a lane and one of folding, and for n up to 2^36 at most
            # 2^28 + 5 to double.
            "sum": Bound("0x9.801p-24", fails="0x9.81p-24"),
            "mean": Bound("[1b-300, 4]", fails="[0, 4]"),
            "eps": Bound("[0, 4]", fails="[-0x0.1p0, 4]"),
            "V": binade(),
            "unrounded": Bound("0x4.c01p-24", fails="0x4.cp-24"),
            "relative": Bound("0x5.c01p-24", fails="0x5.cp-24"),
            "bound": Bound("5.751", fails="5.75"),
        },
        promise="cpu_rstd_bound(DType::f32, true, 1 << 20)",
    ),
    Theorem(
        "rstd_f16_cuda",
        "rstd_pair.g",
        "rstd between 16-bit tensors on CUDA, 31 roundings to float: {bound} ulp of f32",
        {
            "format": F32,
            "pair": Bound("0x1f.001p-24", fails="0x1f.01p-24"),
            "newton": Bound(NEWTON_F32, fails="1b-36"),
            "V": binade(),
            "unrounded": Bound("0xf.801p-24", fails="0xf.8p-24"),
            "relative": Bound("0x10.801p-24", fails="0x10.8p-24"),
            "ulp": "1b-24",
            "bound": Bound("16.5005", fails="16.5"),
        },
        promise="cuda_rstd_bound(DType::f32, 31)",
    ),
    Theorem(
        "rstd_f32_cuda",
        "rstd_pair.g",
        "rstd of f32 on CUDA, n <= 2^20: {bound} ulp, 0.5 + 2^-12.3",
        {
            "format": F32,
            # 6400 * 2^-48 of the sum and 272 * 2^-48 of the mean.
            "pair": Bound("0x1.a1p-36", fails="0x1.bp-36"),
            "newton": Bound(NEWTON_F32, fails="1b-41"),
            "V": binade(),
            "unrounded": Bound(STATISTICS_F32, fails="0x0.000d1p-24"),
            "relative": Bound("0x1.000d2p-24", fails="0x1.000dp-24"),
            "ulp": "1b-24",
            "bound": Bound("0x0.800d2p0", fails="0x0.800dp0"),
        },
        promise="cuda_rstd_bound(DType::f32, 0)",
    ),
    Theorem(
        "rstd_f64",
        "rstd_pair.g",
        "rstd of f64: {bound} ulp",
        {
            "format": F64,
            # The rounding of the squares, on CUDA that of the mean, and little beside it.
            "pair": Bound("0x1.0001p-53", fails="0x1.01p-53"),
            # Near the ends of the range of doubles; NEWTON_F64 where no error term is denormal.
            "newton": Bound("1b-75", fails="1b-60"),
            "V": binade("0x1.0000000000001p0"),
            "unrounded": Bound("0x0.8001p-53", fails="0x0.8p-53"),
            "relative": Bound("0x1.8001p-53", fails="0x1.8p-53"),
            "ulp": "1b-53",
            "bound": Bound("1.0001", fails="1"),
        },
        promise="cpu_rstd_bound(DType::f64, false, 1 << 20)",
    ),
]


def y(
    dtype: str,
    compute: str,
    rstd: Bound,
    ulps: float,
    *,
    kind: str = "",
    device: str = "",
    times: int = 1,
    rounded_weight: bool = True,
    unrounded_sum: bool = True,
    completed_by: str = "",
) -> Theorem:
    """y within so many ulps, where |x rstd w| is at most `times` |y|.

    rstd is its error. Whether weight_offset + weight is rounded, and the sum with the residual not
    to its dtype but to the compute type alone, matters only where y has that type.
    """
    result, computed = FORMATS[dtype], FORMATS[compute]
    least, least_product = result.least, computed.least + 1
    denormal = f"1b{least - result.digits + 1}"
    # A rounding of the compute type, a little more than that, and what shows in y in any case.
    unit, visible = f"1b-{computed.digits}", f"1b-{result.digits + 9}"
    more = f"0x1.01p-{computed.digits}" if result == computed else visible
    normal = f"|s * r| in [1b{{}}, 1b{2 - computed.least}]"
    values: dict[str, str | Bound] = {
        "compute": str(computed),
        "result": str(result),
        "rstd": rstd,
        "sum": Bound(unit, fails=more) if unrounded_sum else Bound("0", fails=visible),
        "weight": Bound(unit, fails=more) if rounded_weight else Bound("0", fails=visible),
        "normal": Bound(normal.format(least_product), fails=normal.format(least_product - 15)),
        "product": Bound(f"|P| <= {2 * times}", fails=f"|P| <= {2.5 * times}"),
        "binade": Bound("Y in [1, 2]", fails="Y in [1, 4]"),
        "also": "",
        "ulp": f"1b-{result.digits - 1}",
        # All digits are needed.
        "bound": Bound(f"{ulps:.4f}", fails=f"{ulps - 0.0001:.4f}"),
    }
    if kind == "same_binade":  # the product, before it is rounded, does not lie beyond that of Y
        values["also"] = Bound("/\\ h * w + b <= 2", fails="")
        values["binade"] = Bound("Y in [1, 2]", fails="Y in [-4, 2]")
    elif kind == "subnormal":  # or zero: an ulp is the least denormal
        values["ulp"] = denormal
        values["product"] = Bound(f"|P| <= {times}b{least}", fails=f"|P| <= {2 * times}b{least}")
        values["binade"] = Bound(f"Y in [0, 1b{least}]", fails=f"Y in [0, 1b{least + 2}]")
    elif kind == "small":  # x rstd is smaller than any other theorem allows
        values["ulp"] = denormal
        values["normal"] = Bound(
            f"|s * r| <= 1b{least_product}", fails=f"|s * r| <= 1b{least_product + 25}"
        )
        values["product"] = Bound("|w| <= 1", fails="|w| <= 1b20")
        values["binade"] = Bound(
            f"h * w + b in [0, 1b{least_product}]", fails=f"h * w + b in [0, 1b{least_product + 4}]"
        )
    rounded_weight_shows = rounded_weight and result == computed
    unrounded_sum_shows = unrounded_sum and result == computed
    kinds = {
        "": "",
        "same_binade": "product in the binade of y",
        "subnormal": "y subnormal",
        "small": f"|x rstd| <= 2^{least_product} and |w| <= 1",
    }
    says = [
        f"{dtype} from {'double' if compute == 'f64' else 'float'}",
        device,
        kinds[kind],
        f"|x rstd w| <= {times} |y|" if times > 1 else "",
        "weight rounded" if rounded_weight_shows else "",
        "sum not rounded" if unrounded_sum_shows else "",
    ]
    name = [
        f"y_{dtype}",
        "from_f64" if compute == "f64" and dtype != "f64" else "",
        device.lower(),
        kind,
        "rounded_weight" if rounded_weight_shows else "",
        "unrounded_sum" if unrounded_sum_shows else "",
    ]
    flags = f"{rounded_weight}, {unrounded_sum}".lower()
    return Theorem(
        "_".join(filter(None, name)),
        "y.g",
        ", ".join(filter(None, says)) + ": {bound} ulp",
        values,
        f"error_bound(DType::{dtype}, DType::{compute}, {flags})",
        completed_by,
    )


# Errors of rstd that y is proved for: its own, by the theorems above, and a rounding more where the
# sum with the residual is not rounded to its dtype. All elements of a row may be rounded in one
# direction, and rstd then errs by as much in the other.
RSTD_F16_CPU = Bound("7b-24", fails="8b-24")
RSTD_F16_CUDA = Bound("18b-24", fails="19b-24")
RSTD_F32 = Bound("0x1.000d2p-24", fails="0x1.01p-24")
RSTD_F32_UNROUNDED_SUM = Bound("0x2.000d3p-24", fails="0x2.01p-24")
RSTD_F64 = Bound("0x1.8001p-53", fails="0x1.81p-53")
RSTD_F64_UNROUNDED_SUM = Bound("0x2.8002p-53", fails="0x2.81p-53")


def y_16_bit() -> list[Theorem]:
    cpu, cuda = RSTD_F16_CPU, RSTD_F16_CUDA
    return [
        y("f16", "f32", cpu, 0.5099, device="CPU", times=8),
        y("f16", "f32", cpu, 0.5050, device="CPU", times=8, kind="subnormal"),
        y("f16", "f32", cuda, 0.5079, device="CUDA", times=3),
        y("f16", "f32", cuda, 0.5040, device="CUDA", times=3, kind="subnormal"),
        y("bf16", "f32", cuda, 0.5026, times=8),
        y("bf16", "f32", cuda, 0.5013, times=8, kind="subnormal"),
        y("bf16", "f32", Bound("18b-24", fails="1b-18"), 0.5004, kind="small"),
        y("f16", "f64", Bound("1b-24", fails="1b-23"), 0.5010, times=8),
        y("f16", "f64", Bound("1b-24", fails="1b-23"), 0.5005, times=8, kind="subnormal"),
        y("bf16", "f64", Bound("1b-21", fails="1b-20"), 0.5010, times=8),
        y("bf16", "f64", Bound("1b-21", fails="1b-20"), 0.5005, times=8, kind="subnormal"),
    ]


def y_f32_and_f64() -> list[Theorem]:
    theorems = [
        y("f32", "f64", Bound("1b-32", fails="1b-31"), 0.5040),
        y("f32", "f64", Bound("1b-32", fails="1b-31"), 0.5020, kind="subnormal"),
    ]
    for unrounded_sum, rounded_weight in itertools.product([False, True], repeat=2):
        rstd_f32 = RSTD_F32_UNROUNDED_SUM if unrounded_sum else RSTD_F32
        rstd_f64 = RSTD_F64_UNROUNDED_SUM if unrounded_sum else RSTD_F64
        more = rounded_weight + 2 * unrounded_sum
        for dtype, rstd, ulps, kind, completed_by in [
            ("f32", rstd_f32, 3.0003 + more, "", "roundings_f32"),
            ("f32", rstd_f32, 2.5003 + more, "same_binade", ""),
            ("f32", rstd_f32, 1.5002 + more / 2, "subnormal", ""),
            ("f32", rstd_f32, 2.0003 + more, "small", ""),
            ("f64", rstd_f64, 3.5001 + more, "", ""),
            ("f64", rstd_f64, 1.7501 + more / 2, "subnormal", ""),
            ("f64", rstd_f64, 2.5001 + more, "small", ""),
        ]:
            theorems.append(
                y(
                    dtype,
                    dtype,
                    rstd,
                    ulps,
                    kind=kind,
                    rounded_weight=rounded_weight,
                    unrounded_sum=unrounded_sum,
                    completed_by=completed_by,
                )
            )
    return theorems


THEOREMS = [*SUMS, *MEANS, *ROOTS, *RSTDS, *y_16_bit(), *y_f32_and_f64()]
