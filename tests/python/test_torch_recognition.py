"""replace_rms_norms: ways to write a formula that change nothing, and eps, which is exact.

What is one step away from a known formula is in test_torch_report.py.
"""

import gc
import logging
import subprocess
import sys
import weakref

import numpy as np
import pytest
import torch
from rmsnorm.torch import replace_rms_norms
from torch import nn
from torch.nn import functional

N = 32
HALF, SINGLE, DOUBLE = torch.bfloat16, torch.float32, torch.float64


class Parent(nn.Module):
    def __init__(self, eps=1e-6, dtype=SINGLE):
        super().__init__()
        self.weight = nn.Parameter(torch.linspace(0.5, 1.5, N, dtype=dtype))
        self.eps = eps


def norm_of(forward, *arguments, **named):
    """A module with the forward, of a class of its own."""
    return type("SomeRMSNorm", (Parent,), {"forward": forward})(*arguments, **named)


def sample(*shape, dtype=SINGLE, scale=1.0):
    x = torch.randn(*shape, dtype=DOUBLE, generator=torch.Generator().manual_seed(0))
    return (scale * x).to(dtype)


def replaced(module):
    report = replace_rms_norms(module)
    assert len(report.replaced) == 1, str(report)
    return report.replaced[0]


def reason_to_leave(module):
    report = replace_rms_norms(module)
    assert report.replaced == (), str(report)
    return report.left[0].reason


def unit(x, eps=1e-6):
    wide = x.float()
    return wide * torch.rsqrt(wide.pow(2).mean(-1, keepdim=True) + eps)


# The weight plus one.

OFFSETS = {
    "float ahead": lambda w: 1.0 + w.float(),
    "integer ahead": lambda w: 1 + w.float(),
    "integer behind": lambda w: w.float() + 1,
    "method": lambda w: w.float().add(1),
    "alpha": lambda w: torch.add(w.float(), 1, alpha=1),
    "half of two": lambda w: torch.add(w.float(), 0.5, alpha=2),
    "minus minus one": lambda w: w.float() - -1,
    "minus with alpha": lambda w: torch.sub(w.float(), -0.5, alpha=2),
    "ones": lambda w: torch.ones(N, device=w.device) + w.float(),
    "a single one": lambda w: torch.ones((), device=w.device) + w.float(),
    "ones like w": lambda w: torch.ones_like(w) + w.float(),
    "ones like w, wide": lambda w: w.float() + torch.ones_like(w).float(),
}


@pytest.mark.parametrize("way", OFFSETS)
def test_one_plus_the_weight(way):
    norm = norm_of(lambda self, x: (unit(x) * OFFSETS[way](self.weight)).type_as(x), dtype=HALF)
    x = sample(64, N, dtype=HALF)
    expected = norm(x)
    assert replaced(norm).formula == "T(x32 * r * (1 + w))"
    torch.testing.assert_close(norm(x), expected, rtol=0.01, atol=0)
    assert (norm(x) == expected).float().mean() > 0.99


NO_OFFSETS = {
    "two": lambda w: 2 + w.float(),
    "alpha of two": lambda w: torch.add(w.float(), 1, alpha=2),
    "minus one": lambda w: w.float() - 1,
    "one minus w": lambda w: 1 - w.float(),
    "in the dtype of w": lambda w: 1 + w,
    "true": lambda w: w.float() * True,
    "rows of ones": lambda w: torch.ones(3, 1, device=w.device) + w.float(),
    "ones of float64": lambda w: torch.ones((), device=w.device, dtype=DOUBLE)[None] + w.float(),
    "twos": lambda w: torch.full_like(w, 2) + w.float(),
}


@pytest.mark.parametrize("way", NO_OFFSETS)
def test_another_sum_is_left(way):
    forward = lambda self, x: (unit(x) * NO_OFFSETS[way](self.weight)).type_as(x)
    reason = reason_to_leave(norm_of(forward, dtype=HALF))
    assert "unknown formula" in reason or "beside its input" in reason


def test_a_shape_that_ones_bring_in_is_no_shape_of_x():
    forward = lambda self, x: torch.ones(2, 1, 1, 1) + unit(x)
    assert "beside its input" in reason_to_leave(norm_of(forward))


# eps.


def _by_torch(self, x):
    return functional.rms_norm(x, (N,), self.weight, self.eps)


def _unweighted(self, x):
    return functional.rms_norm(x, (N,), eps=self.eps)


def _before_weight(self, x):
    return functional.rms_norm(x, (N,), eps=self.eps) * self.weight


def _written_out(self, x):
    wide = x.to(torch.promote_types(x.dtype, SINGLE))
    rstd = torch.rsqrt(wide.square().mean(-1, keepdim=True) + self.eps)
    return (self.weight * (wide * rstd)).to(x.dtype)


def _through_float(self, x):
    return self.weight * unit(x, self.eps).to(x.dtype)


def _by_torch_in_float(self, x):
    return functional.rms_norm(x.float(), (N,), self.weight.float(), self.eps).to(x.dtype)


@pytest.mark.parametrize("eps", [None, 1e-6, 3e-9, 2.0**-23])
@pytest.mark.parametrize("forward", [_by_torch, _unweighted, _before_weight, _written_out])
def test_float64_has_the_eps_that_was_written(forward, eps):
    """At 1e-4, where the default of float32 would be ten times the mean square."""
    if forward is _written_out and eps is None:
        pytest.skip("is no number")
    norm, x = norm_of(forward, eps, DOUBLE), sample(5, N, dtype=DOUBLE, scale=1e-4)
    expected = norm(x)
    assert replaced(norm).eps == eps
    torch.testing.assert_close(norm(x), expected, rtol=1e-13, atol=0)


@pytest.mark.parametrize("dtype", [torch.float16, HALF, SINGLE, DOUBLE], ids=str)
@pytest.mark.parametrize("forward", [_by_torch, _unweighted, _before_weight])
def test_default_eps_of_each_dtype(forward, dtype):
    norm, x = norm_of(forward, None, dtype), sample(5, N, dtype=dtype, scale=1e-4)
    expected = norm(x)
    assert replaced(norm).eps is None
    tolerance = 2 * torch.finfo(dtype).eps
    torch.testing.assert_close(norm(x), expected, rtol=tolerance, atol=0)


def test_float64_through_float32():
    """Computed in float64 with the eps of the formula, and that of float32 where torch adds it."""
    x = sample(5, N, dtype=DOUBLE, scale=1e-4)
    for forward, eps, exact in (
        (_through_float, 1e-6, 1e-6),
        (_by_torch_in_float, None, torch.finfo(SINGLE).eps),
    ):
        norm = norm_of(forward, eps, DOUBLE)
        original = norm(x)
        assert replaced(norm).eps == exact
        expected = norm.weight * x / (x.square().mean(-1, keepdim=True) + exact).sqrt()
        torch.testing.assert_close(norm(x), expected, rtol=1e-13, atol=0)
        torch.testing.assert_close(norm(x), original, rtol=1e-6, atol=0)


def test_eps_that_depends_on_the_dtype_is_left():
    def forward(self, x):
        return functional.rms_norm(x, (N,), self.weight, torch.finfo(x.dtype).eps)

    assert reason_to_leave(norm_of(forward)) == "its eps depends on the dtype of x"

    def in_double_alone(self, x):
        eps = 1e-12 if x.dtype == DOUBLE else 1e-6
        return functional.rms_norm(x, (N,), self.weight, eps)

    assert reason_to_leave(norm_of(in_double_alone)) == "its eps depends on the dtype of x"


def test_eps_that_is_a_tensor_is_left():
    as_parameter = norm_of(_through_float)
    del as_parameter.eps
    as_parameter.eps = nn.Parameter(torch.tensor(1e-6))
    as_buffer = norm_of(_through_float)
    del as_buffer.eps
    as_buffer.register_buffer("eps", torch.tensor(1e-6))
    as_attribute = norm_of(_through_float, torch.tensor(1e-6))
    for norm in (as_parameter, as_buffer, as_attribute):
        assert reason_to_leave(norm)
    assert reason_to_leave(nn.RMSNorm(N, eps=torch.tensor(1e-6))) == "its eps is a Tensor"


@pytest.mark.parametrize("number", [np.float32, np.float64, float])
def test_eps_of_another_type(number):
    eps = number(0.1)
    for norm in (nn.RMSNorm(N, eps), norm_of(_by_torch, eps), norm_of(_through_float, eps)):
        x = sample(5, N)
        expected = norm(x)
        assert abs(replaced(norm).eps - eps) <= 1e-8
        torch.testing.assert_close(norm(x), expected)


# What decides beside dtypes.


def test_buffers_of_another_dtype_are_another_module():
    def forward(self, x):
        y = self.weight * unit(x).to(x.dtype)
        return y if self.like.dtype == SINGLE else y + y

    norms = [norm_of(forward) for _ in range(2)]
    for norm, dtype in zip(norms, (SINGLE, HALF)):
        norm.__class__ = type(norms[0])
        norm.register_buffer("like", torch.ones(N, dtype=dtype))
    report = replace_rms_norms(nn.ModuleList(norms))
    assert [[n.name for n in group] for group in (report.replaced, report.left)] == [["0"], ["1"]]


def test_something_else_in_float64_or_under_autocast_is_left():
    def in_double(self, x):
        y = _by_torch(self, x)
        return y + y if x.dtype == DOUBLE else y

    def under_autocast(self, x):
        y = _by_torch(self, x)
        return y + y if torch.is_autocast_enabled("cuda") else y

    assert reason_to_leave(norm_of(in_double)).endswith("something else in float64")
    assert reason_to_leave(norm_of(under_autocast)).endswith("under autocast on CUDA")


def test_autocast_within_a_forward():
    """Of the device of x, as Google's and NVIDIA's models have it."""

    def forward(self, x):
        with torch.autocast(device_type=x.device.type, enabled=False):
            return (unit(x) * (1 + self.weight.float())).to(x.dtype)

    norm, x = norm_of(forward), sample(5, N)
    expected = norm(x)
    assert replaced(norm).formula == "T(x32 * r * (1 + w))"
    torch.testing.assert_close(norm(x), expected)


@pytest.mark.parametrize(
    "mode",
    [torch.inference_mode, lambda: torch.autocast("cpu"), torch.no_grad, torch.enable_grad],
    ids=["inference", "autocast", "no_grad", "enable_grad"],
)
def test_a_caller_in_another_mode(mode):
    norms = [norm_of(forward) for forward in (_by_torch, _written_out, _through_float)]
    with mode():
        before = torch.is_autocast_enabled("cpu"), torch.is_inference_mode_enabled()
        for norm in norms:
            replaced(norm)
        assert before == (torch.is_autocast_enabled("cpu"), torch.is_inference_mode_enabled())


def test_torchs_norm_with_a_kernel_of_its_own_on_cuda():
    """As in a torch that is built with CUDA, where its function is no longer made of operations."""
    code = f"""
import sys
import torch
library = torch.library.Library("aten", "IMPL")
library.impl("_fused_rms_norm", lambda *arguments: 1 / 0, "CUDA")
sys.path.insert(0, {sys.path[0]!r})
import test_torch_recognition as tests
for forward in (tests._by_torch, tests._unweighted, tests._before_weight, tests._by_torch_in_float):
    for eps in (None, 1e-6):
        tests.replaced(tests.norm_of(forward, eps))
"""
    subprocess.run([sys.executable, "-c", code], check=True)


# Where a norm is looked for.


class Scale(nn.RMSNorm):
    pass


class PlusOne(nn.RMSNorm):
    def forward(self, x):
        return super().forward(x) + 1


class Halved(PlusOne):
    def forward(self, x):
        return functional.rms_norm(x, self.normalized_shape, self.weight, self.eps)


class HouseRMSNorm(Parent):
    forward = _through_float


class Unit(HouseRMSNorm):
    pass


def test_classes_that_derive_from_a_norm():
    model = nn.ModuleList([Scale(N), Scale((2, N)), PlusOne(N), Halved(N), Unit(), nn.Linear(N, N)])
    report = replace_rms_norms(model)
    assert [n.kind for n in report.replaced] == ["Scale", "Scale", "Halved", "Unit"]
    assert [(n.kind, n.name) for n in report.left] == [("PlusOne", "2")]
    assert "unknown formula: add(" in report.left[0].reason


# What a forward does beside its result would be gone after a replacement.


class Counting(nn.RMSNorm):
    calls = 0

    def forward(self, x):
        self.calls += 1
        return super().forward(x)


class Keeping(nn.RMSNorm):
    def forward(self, x):
        self.last = x
        return super().forward(x)


@pytest.mark.parametrize("kind, attribute", [(Counting, "calls"), (Keeping, "last")])
def test_a_forward_that_sets_an_attribute_is_left(kind, attribute):
    module = kind(N)
    assert reason_to_leave(module) == f"its forward sets its attribute {attribute}"
    assert attribute not in vars(module), "recognising leaves no trace"


# A replacement needs a class of its own.


registry = set()


class Registered(nn.RMSNorm):
    def __init_subclass__(cls):
        if cls.__name__ in registry:
            raise ValueError(f"{cls.__name__} is registered already")
        registry.add(cls.__name__)


class HouseNorm(Registered):
    pass


class WithKind(nn.RMSNorm):
    def __init_subclass__(cls, *, kind):
        cls.kind = kind


class Kind(WithKind, kind=1):
    pass


@pytest.mark.parametrize("kind, reason", [(HouseNorm, "registered already"), (Kind, "'kind'")])
def test_a_class_that_none_can_be_derived_from_is_left(kind, reason):
    model = nn.Sequential(nn.RMSNorm(N), kind(N), nn.RMSNorm(N))
    report = replace_rms_norms(model)
    assert [n.name for n in report.replaced] == ["0", "2"]
    assert [n.name for n in report.left] == ["1"] and reason in report.left[0].reason
    assert type(model[1]) is kind


def test_a_forward_that_cannot_run_is_left_without_a_log(caplog):
    """torch logs, with a traceback, what it refuses of a tensor without storage."""
    log = logging.getLogger("torch._subclasses.fake_tensor")
    log.addHandler(caplog.handler)
    try:
        module = norm_of(lambda self, x: (self.weight * unit(x) * torch.ones(3)).to(x.dtype))
        assert "cannot be traced" in reason_to_leave(module)
    finally:
        log.removeHandler(caplog.handler)
    assert caplog.records == []


def test_replaced_classes_are_freed():
    def class_of_a_replaced_module():
        module = norm_of(lambda self, x: (self.weight.float() * unit(x)).to(x.dtype))
        replaced(module)
        return weakref.ref(type(module))

    known = class_of_a_replaced_module()
    gc.collect()
    assert known() is None
