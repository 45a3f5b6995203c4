"""replace_rms_norms on modules whose own code raises: each is left, and the others are replaced."""

import functools
import math
import re

import numpy as np
import pytest
import torch
from rmsnorm.torch import recognition, replace_rms_norms
from torch import nn

N = 32


def formula(self, x, eps=1e-6):
    wide = x.float()
    rstd = torch.rsqrt(wide.pow(2).mean(-1, keepdim=True) + eps)
    return self.weight * (wide * rstd).to(x.dtype)


def plain(self, x):
    return formula(self, x)


class Parent(nn.Module):
    def __init__(self):
        super().__init__()
        self.weight = nn.Parameter(torch.linspace(0.5, 1.5, N))


def norm_of(forward, **members):
    return type("SomeRMSNorm", (Parent,), {"forward": forward, **members})()


def between_two_norms(*modules):
    return nn.Sequential(nn.RMSNorm(N), *modules, nn.RMSNorm(N))


def assert_left(reason, *modules):
    """The last of the modules alone is left, as it was."""
    model = between_two_norms(*modules)
    left_one = modules[-1]
    kind, members = type(left_one), set(vars(left_one))
    report = replace_rms_norms(model)
    assert [left.module for left in report.left] == [left_one]
    assert re.search(reason, report.left[0].reason), report.left[0].reason
    assert len(report.replaced) == len(model) - 1
    assert type(left_one) is kind and set(vars(left_one)) == members
    assert "1 left" in str(report)
    report.undo()
    assert type(model[0]) is nn.RMSNorm


class Descriptor:
    def __get__(self, module, kind=None):
        return self if module is None else functools.partial(formula, module)

    def __call__(self, module, x):
        return formula(module, x)


FORWARDS = {
    "without a signature": (staticmethod(torch.relu), "ValueError: no signature"),
    "none": (None, "TypeError: None is not a callable"),
    "property": (property(lambda self: lambda x: 2 * x), "TypeError: .* is not a callable"),
    "descriptor": (Descriptor(), "ValueError: no signature"),
}


@pytest.mark.parametrize("what", FORWARDS)
def test_a_forward_that_is_no_function(what):
    forward, reason = FORWARDS[what]
    assert_left(reason, norm_of(forward))


def test_a_class_that_cannot_be_changed():
    def __setattr__(self, name, value):
        if name == "__class__":
            raise AttributeError("frozen")
        nn.Module.__setattr__(self, name, value)

    assert_left("AttributeError: frozen", norm_of(plain, __setattr__=__setattr__))


def test_a_class_that_ignores_its_change():
    def __setattr__(self, name, value):
        if name != "__class__":
            nn.Module.__setattr__(self, name, value)

    assert_left("its class cannot be changed", norm_of(plain, __setattr__=__setattr__))


class RaisesOnceReplaced(Parent):
    """The error as its class is changed back."""

    error = None

    def __setattr__(self, name, value):
        if (
            name == "__class__"
            and self.error is not None
            and hasattr(type(self), "_rmsnorm_original")
        ):
            raise self.error
        super().__setattr__(name, value)


def raising_once_replaced(error):
    return type("SomeRMSNorm", (RaisesOnceReplaced,), {"forward": plain, "error": error})()


def test_a_metaclass_that_has_every_attribute():
    class Meta(type):
        def __getattr__(cls, name):
            if name.startswith("__"):
                raise AttributeError(name)

    kind = Meta("SomeRMSNorm", (Parent,), {"forward": plain})
    module = kind()
    report = replace_rms_norms(module)
    assert len(report.replaced) == 1 and type(module) is not kind
    report.undo()
    assert type(module) is kind


def twice(self, x):
    return 2 * nn.functional.layer_norm(x, (N,), self.weight)


@pytest.mark.parametrize("own_forward", [False, True])
def test_torchs_norm_whose_forward_is_anothers(monkeypatch, own_forward):
    """As by a program that patches torch's class."""
    monkeypatch.setattr(nn.RMSNorm, "forward", twice)
    module = nn.RMSNorm(N)
    if own_forward:
        module.forward = functools.partial(twice, module)
    assert len(replace_rms_norms(module).left) == 1
    assert type(module) is nn.RMSNorm


def test_torchs_function_is_anothers(monkeypatch):
    original = nn.functional.rms_norm
    monkeypatch.setattr(nn.functional, "rms_norm", lambda *arguments: 2 * original(*arguments))

    def forward(self, x):
        return nn.functional.rms_norm(x, (N,), self.weight, 1e-6)

    for module in (nn.RMSNorm(N), norm_of(forward)):
        for known in (recognition._known_expression.cache_clear, lambda: None):
            known()
            assert len(replace_rms_norms(module).left) == 1
    monkeypatch.undo()
    recognition._known_expression.cache_clear()
    assert_left("its eps is -1.0", nn.RMSNorm(N, -1.0))


def test_undo_goes_on_behind_a_class_that_cannot_be_changed_back():
    model = between_two_norms(raising_once_replaced(AttributeError("frozen")))
    report = replace_rms_norms(model)
    assert len(report.replaced) == 3
    with pytest.raises(AttributeError, match="frozen"):
        report.undo()
    assert type(model[0]) is type(model[2]) is nn.RMSNorm
    assert "_rmsnorm_norm" not in vars(model[1])
    type(model[1])._rmsnorm_original.error = None
    report.undo()
    assert type(model[1]).forward is plain


def test_an_interrupt_of_undo():
    errors = AttributeError("frozen"), KeyboardInterrupt("now")
    for order in (errors, errors[::-1]):
        model = between_two_norms(*map(raising_once_replaced, order))
        report = replace_rms_norms(model)
        with pytest.raises(KeyboardInterrupt, match="now"):
            report.undo()


def test_an_interrupt_behind_a_module_that_cannot_be_changed_back():
    def forward(self, x):
        raise KeyboardInterrupt("now")

    frozen = raising_once_replaced(AttributeError("frozen"))
    model = between_two_norms(frozen, norm_of(plain), norm_of(forward))
    with pytest.raises(KeyboardInterrupt, match="now"):
        replace_rms_norms(model)
    assert type(model[0]) is nn.RMSNorm and type(model[2]).forward is plain
    assert not any("_rmsnorm_norm" in vars(module) for module in model)


def test_attributes_that_hold_each_other_many_times_over():
    """2**40 elements, for who does not see that they are the same ones."""
    shared = [0]
    for _ in range(40):
        shared = [shared, shared]
    model = between_two_norms(norm_of(plain))
    model[1].shared = shared
    assert len(replace_rms_norms(model).replaced) == 3


def test_a_forward_that_uses_its_results_many_times_over():
    def forward(self, x):
        for _ in range(40):
            x = x + x * self.weight
        return x

    assert_left("computes more than any norm", norm_of(forward))


class Hostile:
    """An attribute of a module; two that are not the same have the same hash."""

    def __hash__(self):
        return 1


class WithoutHash(Hostile):
    def __hash__(self):
        raise RuntimeError("no hash")


class WithoutEquality(Hostile):
    def __eq__(self, other):
        raise RuntimeError("no equality")

    __hash__ = Hostile.__hash__


class EqualInPart(Hostile):
    def __eq__(self, other):
        return np.array([True, False])

    __hash__ = Hostile.__hash__


@pytest.mark.parametrize("kind", [WithoutHash, WithoutEquality, EqualInPart])
def test_attributes_that_cannot_be_compared(kind):
    """Two modules of the same class have them, which could be looked at once if they were equal."""
    first, second = (norm_of(plain) for _ in range(2))
    second.__class__ = type(first)
    first.config, second.config = kind(), kind()
    model = between_two_norms(first, second)
    report = replace_rms_norms(model)
    assert len(report.replaced) + len(report.left) == len(model)
    assert {model[0], model[-1]} <= {norm.module for norm in report.replaced}
    report.undo()
    assert type(model[0]) is nn.RMSNorm and type(first) is type(second)


class Unprintable(Exception):
    def __str__(self):
        raise self


def test_an_exception_that_cannot_be_printed():
    def forward(self, x):
        raise Unprintable

    assert_left("Unprintable", norm_of(forward))


@pytest.mark.parametrize("error", [SystemExit, KeyboardInterrupt])
def test_all_or_nothing(error):
    """What is no Exception goes through, and the model is then as it was."""

    def forward(self, x):
        raise error("now")

    model = between_two_norms(norm_of(plain), norm_of(forward))
    before = [(type(module), set(vars(module))) for module in model]
    with pytest.raises(error, match="now"):
        replace_rms_norms(model)
    assert [(type(module), set(vars(module))) for module in model] == before


def test_an_interrupt_of_a_forward_whose_class_cannot_be_put_back():
    class Frozen(type(nn.Module)):
        def __setattr__(cls, name, value):
            raise RuntimeError("frozen class")

    def forward(self, x):
        type.__setattr__(SomeRMSNorm, "calls", SomeRMSNorm.calls + 1)
        raise KeyboardInterrupt("now")

    SomeRMSNorm = Frozen("SomeRMSNorm", (Parent,), {"forward": forward, "calls": 0})
    with pytest.raises(KeyboardInterrupt, match="now"):
        replace_rms_norms(SomeRMSNorm())
    assert SomeRMSNorm.calls == 1


def test_all_or_nothing_if_the_modules_cannot_be_listed():
    class Model(nn.Sequential):
        def named_modules(self, *arguments, **named):
            yield "first", self[0]
            raise ValueError("no more")

    model = Model(nn.RMSNorm(N), nn.RMSNorm(N))
    with pytest.raises(ValueError, match="no more"):
        replace_rms_norms(model)
    assert type(model[0]) is nn.RMSNorm and "_rmsnorm_norm" not in vars(model[0])


# eps that this library refuses and torch does not.


@pytest.mark.parametrize("eps", [-1e-3, float("inf"), float("nan")])
def test_an_eps_that_this_library_refuses(eps):
    def forward(self, x):
        return self.weight * nn.functional.rms_norm(x, (N,), eps=eps)

    assert_left(f"its eps is {eps}", nn.RMSNorm(N, eps))
    for written in (forward, lambda self, x: formula(self, x, eps)):
        reason = "its forward computes with the number nan"
        assert_left(reason if math.isnan(eps) else f"its eps is {eps}", norm_of(written))


def test_an_eps_that_no_float_holds():
    assert_left("OverflowError", nn.RMSNorm(N, 10**400))


# Parameters.


def test_a_property_that_hides_a_parameter():
    class Shadowed(nn.Module):
        def __init__(self):
            super().__init__()
            self._parameters["weight"] = nn.Parameter(torch.ones(N))

        @property
        def weight(self):
            return 3 * self._parameters["weight"]

    def forward(self, x):
        wide = x.float()
        rstd = torch.rsqrt(wide.pow(2).mean(-1, keepdim=True) + 1e-6)
        return self._parameters["weight"] * (wide * rstd).to(x.dtype)

    module = type("ShadowedRMSNorm", (Shadowed,), {"forward": forward})()
    assert_left("its attribute weight is not its parameter", module)


def test_a_weight_of_one_element():
    """Each call would be refused, since no row of x is as long."""
    module = norm_of(plain)
    module.weight = nn.Parameter(torch.tensor([2.0]))
    assert_left("weight has one element", module)
