"""The case grid: shape x dtypes x semantics x layout.

`grid()` covers every pair of values of any two properties at least once (all triples would be 10^6
cases) and is the same in every run. A Case says what to build; `build` makes the arrays.
"""

import dataclasses
import itertools
import random

import floats
import numpy as np
from floats import BF16, DTYPES, F16, F32, F64
from layouts import LAYOUTS, OUTPUT_LAYOUTS, Placed

LENGTHS = (
    *(1, 7, 8, 9, 31, 32, 33, 63, 64, 65, 255, 256, 257),
    *(1023, 1024, 1025, 4095, 4096, 4097, 65537),
)
ROWS = (0, 1, 3, 17)
ROUNDINGS = ("once", "before_weight", "rstd")

# how the axes are arranged: rows of one axis; the last two axes together; (tokens, heads, head_dim)
FORMS = ("rows", "two_axes", "heads")

# the axes in front of the normalised ones along which weight and bias vary
BROADCASTS = ("shared", "per_head", "per_sample")


@dataclasses.dataclass(frozen=True)
class Case:
    n: int
    rows: int
    form: str
    x: np.dtype
    weight: np.dtype | None
    bias: np.dtype | None
    out: np.dtype
    rounding: str
    weight_offset: float
    partial: float
    broadcast: str
    layout: str
    out_layout: str

    def __str__(self):
        dtypes = ",".join("-" if d is None else d.name for d in (self.x, self.weight, self.bias))
        return (
            f"{self.form}-{self.rows}x{self.n}-{dtypes}-{self.out.name}-{self.rounding}"
            f"-{self.weight_offset}-{self.partial}-{self.broadcast}-{self.layout}-{self.out_layout}"
        )

    @property
    def normalised_shape(self):
        if self.form != "two_axes":
            return (self.n,)
        first = next((d for d in (2, 3, 5, 7) if self.n % d == 0 and self.n > d), 1)
        return (first, self.n // first)

    @property
    def leading_shape(self):
        return (self.rows, 2) if self.form == "heads" else (self.rows,)

    @property
    def shape(self):
        return self.leading_shape + self.normalised_shape

    @property
    def axis(self):
        return -len(self.normalised_shape)

    @property
    def weight_shape(self):
        lead = self.leading_shape
        if self.broadcast == "per_head":  # the last leading axis
            return lead[-1:] + self.normalised_shape
        if self.broadcast == "per_sample":  # the first leading axis
            return lead[:1] + (1,) * (len(lead) - 1) + self.normalised_shape
        return self.normalised_shape

    @property
    def options(self):
        options = {"axis": self.axis, "rounding": self.rounding, "partial": self.partial}
        if self.weight_offset:
            options["weight_offset"] = self.weight_offset
        return options


PROPERTIES = {
    "n": LENGTHS,
    "rows": ROWS,
    "form": FORMS,
    "x": DTYPES,
    "weight": (None, *DTYPES),
    "bias": (None, *DTYPES),
    "out": DTYPES,
    "rounding": ROUNDINGS,
    "weight_offset": (0.0, 1.0),
    "partial": (1.0, 0.3),
    "broadcast": BROADCASTS,
    "layout": LAYOUTS,
    "out_layout": OUTPUT_LAYOUTS,
}


def _possible(chosen):
    case = Case(**chosen)
    if case.weight_offset and case.weight is None:
        return False
    return case.n < 65537 or case.rows <= 3


def grid():
    """About 300 cases with every possible pair of property values in one of them."""
    rng = random.Random(20191016)
    names = list(PROPERTIES)
    uncovered = {
        (a, va, b, vb)
        for a, b in itertools.combinations(names, 2)
        for va in PROPERTIES[a]
        for vb in PROPERTIES[b]
        if not (a == "weight" and va is None and b == "weight_offset" and vb)
        and not (a == "n" and va == 65537 and b == "rows" and vb == 17)
    }

    def pairs(chosen):
        return {(a, chosen[a], b, chosen[b]) for a, b in itertools.combinations(names, 2)}

    cases = []
    while uncovered:
        seed = rng.choice(sorted(uncovered, key=str))
        best, best_gain = None, 0
        for _ in range(40):
            chosen = {name: rng.choice(PROPERTIES[name]) for name in names}
            chosen[seed[0]], chosen[seed[2]] = seed[1], seed[3]
            if not _possible(chosen):
                continue
            gain = len(pairs(chosen) & uncovered)
            if gain > best_gain:
                best, best_gain = chosen, gain
        if best is not None:
            uncovered -= pairs(best)
            cases.append(Case(**best))
    return cases


@dataclasses.dataclass
class Arrays:
    x: Placed
    weight: Placed | None
    bias: Placed | None


def values(rng, shape, dtype):
    """Ordinary activations: normal, with a few outliers of 2^6, as real models have."""
    v = rng.standard_normal(shape)
    v = np.where(rng.random(shape) < 0.01, v * 64, v)
    return floats.cast(v, dtype)


def build(case, seed=0):
    """Arrays of a case; weight and bias lie in the case's layout where their shape allows."""
    rng = np.random.default_rng([seed, case.n, case.rows])
    x = values(rng, case.shape, case.x)
    if case.layout == "broadcast_rows":
        x = np.broadcast_to(x[:1], case.shape)

    def parameter(dtype):
        if dtype is None:
            return None
        layout = case.layout if case.layout != "broadcast_rows" else "contiguous"
        return Placed(values(rng, case.weight_shape, dtype), layout)

    return Arrays(Placed(x, case.layout), parameter(case.weight), parameter(case.bias))


# Mixes that models use, for loops that cannot afford all 4 x 5 x 4: (x, weight, out).
COMMON_DTYPES = (
    (F32, F32, F32),
    (F16, F16, F16),
    (BF16, BF16, BF16),
    (BF16, F32, BF16),
    (F16, F32, F16),
    (F64, F64, F64),
    (BF16, F32, F32),
)
