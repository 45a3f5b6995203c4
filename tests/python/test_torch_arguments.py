"""Wrong arguments where no kernel reads them: the errors are those of a plain call.

In forward mode torch's own operations compute, which would take them; of fake and meta tensors there
are shapes alone.
"""

import contextlib

import numpy as np
import pytest
import rmsnorm
import rmsnorm.torch
import torch
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.autograd import forward_ad
from torch.func import functionalize, grad, jvp

OPERATORS = torch.ops.rmsnorm
OPTIONS = {"eps": 1e-5, "axis": -1, "weight_offset": 0.0, "rounding": "once"}


def norm(x, weight=None, bias=None, *, partial=1.0, out_dtype=None, **options):
    options = {**OPTIONS, **options}.values()
    return OPERATORS.rms_norm(x, weight, bias, *options, partial, out_dtype)


def add(x, residual, weight=None, bias=None, **options):
    return OPERATORS.add_rms_norm(x, residual, weight, bias, *{**OPTIONS, **options}.values(), True)


def backward(dy, x, *, partial=1.0, eps=1e-5, weight_offset=0.0, **tensors):
    names = ("residual", "weight", "bias", "rstd", "d_residual")
    others = [tensors.get(name) for name in names]
    return OPERATORS.rms_norm_backward(dy, x, *others, eps, -1, weight_offset, partial, True)


ones = torch.ones

# Tensors are made within the call, of the kind that it is about.
WRONG_CALLS = {
    "x int64": lambda: norm(ones(2, 4, dtype=torch.int64)),
    "x complex": lambda: norm(ones(2, 4, dtype=torch.complex64)),
    "x float8": lambda: norm(ones(2, 4).to(torch.float8_e4m3fn)),
    "x without dimensions": lambda: norm(ones(())),
    "weight int64": lambda: norm(ones(2, 4), ones(4, dtype=torch.int64)),
    "weight of more rows": lambda: norm(ones(2, 4), ones(3, 1, 4)),
    "weight of one": lambda: norm(ones(2, 4), ones(1)),
    "weight of other rows": lambda: norm(ones(2, 4), ones(3, 4)),
    "bias bool": lambda: norm(ones(2, 4), None, ones(4, dtype=torch.bool)),
    "bias of other size": lambda: norm(ones(2, 4), None, ones(5)),
    "bias of all axes": lambda: norm(ones(2, 4), None, ones(4), axis=-2),
    "rounding": lambda: norm(ones(2, 4), rounding="bogus"),
    "long rounding": lambda: norm(ones(2, 4), rounding="bogus" * 100),
    "negative eps": lambda: norm(ones(2, 4), eps=-1e-3),
    "eps NaN": lambda: norm(ones(2, 4), eps=float("nan")),
    "eps infinite": lambda: norm(ones(2, 4), eps=float("inf")),
    "partial above one": lambda: norm(ones(2, 4), partial=5.0),
    "partial zero": lambda: norm(ones(2, 4), partial=0.0),
    "offset alone": lambda: norm(ones(2, 4), weight_offset=1.0),
    "offset infinite": lambda: norm(ones(2, 4), ones(4), weight_offset=float("inf")),
    "out_dtype int32": lambda: norm(ones(2, 4), out_dtype=torch.int32),
    "residual of one row": lambda: add(ones(2, 4), ones(1, 4)),
    "residual int32": lambda: add(ones(2, 4), ones(2, 4, dtype=torch.int32)),
    "weight of added": lambda: add(ones(2, 4), ones(2, 4), ones(5)),
    "rounding of added": lambda: add(ones(2, 4), ones(2, 4), rounding=""),
    "eps of added": lambda: add(ones(2, 4), ones(2, 4), eps=-1.0),
    "offset of added": lambda: add(ones(2, 4), ones(2, 4), weight_offset=-1.0),
    "dy": lambda: backward(ones(3, 4), ones(2, 4)),
    "dy int32": lambda: backward(ones(2, 4, dtype=torch.int32), ones(2, 4)),
    "d_residual": lambda: backward(ones(2, 4), ones(2, 4), d_residual=ones(1, 4)),
    "rstd": lambda: backward(ones(2, 4), ones(2, 4), rstd=ones(2, 1)),
    "rstd half": lambda: backward(ones(2, 4), ones(2, 4), rstd=ones(2).half()),
    "weight of backward": lambda: backward(ones(2, 4), ones(2, 4), weight=ones(5)),
    "offset of backward": lambda: backward(ones(2, 4), ones(2, 4), weight_offset=1.0),
    "eps of backward": lambda: backward(ones(2, 4), ones(2, 4), eps=-1.0),
    "partial of backward": lambda: backward(ones(2, 4), ones(2, 4), partial=1.5),
}

WHERE = {
    "forward mode": forward_ad.dual_level,
    "fake tensors": FakeTensorMode,
    "meta tensors": lambda: torch.device("meta"),
}


@pytest.mark.parametrize("name", WRONG_CALLS)
@pytest.mark.parametrize("where", WHERE)
def test_errors_are_those_of_a_plain_call(where, name):
    with pytest.raises((TypeError, ValueError)) as plain:
        WRONG_CALLS[name]()
    with WHERE[where](), pytest.raises(type(plain.value)) as other:
        WRONG_CALLS[name]()
    assert str(other.value) == str(plain.value)


@pytest.mark.parametrize("where", [contextlib.nullcontext, *WHERE.values()])
@pytest.mark.parametrize("axis", [-3, -9])
def test_axis(where, axis):
    with where(), pytest.raises(ValueError, match=rf"^axis: expected -2 <= axis < .* got {axis}$"):
        norm(ones(2, 4), axis=axis)


def test_operators_count_the_axis_from_the_end():
    """An axis from the front would be another one with a dimension of samples put in front."""
    options = (None, None, 1e-6, 1, 0.0, "once")
    for call in (
        lambda x: OPERATORS.rms_norm(x, *options, 1.0, None),
        lambda x: OPERATORS.add_rms_norm(x, x, *options, True),
        lambda x: OPERATORS.rms_norm_backward(x, x, *(None,) * 5, 1e-6, 1, 0.0, 1.0, True),
    ):
        for enter in (contextlib.nullcontext, *WHERE.values()):
            with enter(), pytest.raises(ValueError, match=r"^axis: expected -2 <= axis < 0 .* 1$"):
                call(ones(2, 4))


# Ways of a call that read an option apart from the array functions.
WAYS = {
    "plain": lambda call, x: call(x),
    "recorded": lambda call, x: call(x.clone().requires_grad_()),
    "vmap": lambda call, x: torch.vmap(call)(x),
    "subclass": lambda call, x: call(x.as_subclass(type("Sub", (torch.Tensor,), {}))),
    "meta": lambda call, x: call(x.to("meta")),
    "forward mode": lambda call, x: jvp(call, (x,), (x,))[0],
}


@pytest.mark.parametrize("option", ["eps", "weight_offset"])
@pytest.mark.parametrize("name", ["rms_norm", "add_rms_norm"])
@pytest.mark.parametrize("way", WAYS)
def test_an_option_whose_derivative_would_be_lost(way, name, option):
    value = torch.tensor(0.5, requires_grad=True)

    def call(x):
        weight = ones(4, device=x.device)
        if name == "rms_norm":
            return rmsnorm.torch.rms_norm(x, 4, weight, **{option: value})
        return rmsnorm.torch.add_rms_norm(x, x, 4, weight, **{option: value})[0]

    lost = rf"^{option}: .* tensor that requires grad, .* lost; pass {option}.item\(\)$"
    with pytest.raises(TypeError, match=lost):
        WAYS[way](call, ones(2, 4))
    with torch.no_grad():  # None is lost there.
        assert WAYS[way](call, ones(2, 4)).shape == (2, 4)
    lost = rf"^{option}: .* tensor with a forward-mode tangent, which would be lost"
    with forward_ad.dual_level():
        value = forward_ad.make_dual(torch.tensor(0.5), torch.tensor(1.0))
        with pytest.raises(TypeError, match=lost):
            call(ones(2, 4))
        with pytest.raises(TypeError, match=lost):
            rmsnorm.rms_norm(ones(2, 4), ones(4), **{option: value})


# An option within a transform, which hides what follows the option outside of it.
NESTED = {
    "jvp of grad": lambda f, x, v: jvp(lambda v: grad(lambda x: f(x, v))(x), (v,), (v,)),
    "jvp of jvp": lambda f, x, v: jvp(lambda v: jvp(lambda x: f(x, v), (x,), (x,)), (v,), (v,)),
    "jvp of vmap": lambda f, x, v: jvp(lambda v: torch.vmap(lambda x: f(x, v))(x), (v,), (v,)),
    "grad of functionalize": lambda f, x, v: grad(lambda v: functionalize(f)(x, v))(v),
    "functionalize": lambda f, x, v: functionalize(f)(x, v.requires_grad_()),
    "a dual number in grad": lambda f, x, v: grad(lambda x: f(x, dual(v)))(x),
    "a dual number in vmap": lambda f, x, v: torch.vmap(lambda x: f(x, dual(v)))(x),
}


def dual(v):
    return forward_ad.make_dual(v, torch.ones_like(v))


@pytest.mark.parametrize("option", ["eps", "weight_offset"])
@pytest.mark.parametrize("name", NESTED)
@pytest.mark.parametrize("of", ["tensors", "arrays"])
def test_an_option_in_a_transform_of_another(of, name, option):
    def norm(x, v):
        if of == "tensors":
            return rmsnorm.torch.rms_norm(x, 4, ones(4), **{option: v}).sum()
        y = rmsnorm.rms_norm(np.ones((2, 4)), np.ones(4), **{option: v})
        return float(y.sum()) * x.sum()

    with (
        forward_ad.dual_level() if "dual" in name else contextlib.nullcontext(),
        pytest.raises(TypeError, match=rf"^{option}: expected a number, got a tensor .* be lost"),
    ):
        NESTED[name](norm, ones(2, 4), torch.tensor(0.5))


def test_an_array_with_a_tangent_in_a_transform():
    x = ones(2, 4)
    with forward_ad.dual_level(), pytest.raises(RuntimeError, match="^x: .* tangent"):
        grad(lambda z: z * rmsnorm.rms_norm(dual(x)).sum())(torch.tensor(1.0))


@pytest.mark.parametrize("option", ["eps", "weight_offset"])
def test_an_option_is_read_once(option):
    """Backward computes with what forward did."""
    x = torch.linspace(-2, 1, 8).reshape(2, 4).requires_grad_()

    def gradients(value, changed):
        y = rmsnorm.torch.rms_norm(x, 4, ones(4), **{option: value})
        total, _ = rmsnorm.torch.add_rms_norm(x, x, 4, ones(4), **{option: value})
        changed()
        return torch.autograd.grad((y + total).sin().sum(), x)[0]

    value = torch.tensor(0.5)
    expected = gradients(0.5, lambda: None)
    assert torch.equal(gradients(value, lambda: value.fill_(9.0)), expected)


@pytest.mark.parametrize("way", WAYS)
def test_numbers_of_wrong_types(way):
    for value in ("1", b"1", True, None, [1.0], 10**400):
        for option in ("eps", "weight_offset"):
            if option == "eps" and value is None:
                continue  # torch's default

            def call(x, option=option, value=value):
                return rmsnorm.torch.rms_norm(x, 4, ones(4, device=x.device), **{option: value})

            with pytest.raises((TypeError, ValueError), match=rf"^{option}: expected a number"):
                WAYS[way](call, ones(2, 4))


def test_sparse_tensors_in_forward_mode():
    for enter in (contextlib.nullcontext, forward_ad.dual_level):
        with enter(), pytest.raises(TypeError, match=r"^x: .*strided.*layout torch.sparse_coo"):
            rmsnorm.torch.rms_norm(ones(2, 4).to_sparse(), 4)


def test_the_functions_in_forward_mode():
    x = ones(2, 4)
    for call, name in (
        (lambda x: rmsnorm.torch.rms_norm(x, 4, weight_offset=1.0), "weight_offset"),
        (lambda x: rmsnorm.torch.rms_norm(x, 4, torch.full((4,), 3)), "weight"),
        (lambda x: rmsnorm.torch.rms_norm(x, 4, bias=ones(3, 1, 4)), "bias"),
        (lambda x: rmsnorm.torch.add_rms_norm(x, x[:1], 4), "residual"),
    ):
        with pytest.raises((TypeError, ValueError), match=rf"^{name}: "):
            jvp(call, (x,), (x,))


def test_tensors_of_several_devices():
    """Named is the one that is not on the CPU, as in a plain call."""
    with FakeTensorMode():
        on_cuda, on_cpu = (torch.empty(2, 4, device=device) for device in ("cuda", "cpu"))
        for call, text in (
            (lambda: norm(on_cuda, on_cpu), "x: is on cuda:0 while weight is on cpu"),
            (lambda: norm(on_cpu, None, on_cuda), "bias: is on cuda:0 while x is on cpu"),
            (lambda: add(on_cuda, on_cpu), "x: is on cuda:0 while residual is on cpu"),
            (lambda: backward(on_cpu, on_cuda), "x: is on cuda:0 while dy is on cpu"),
        ):
            with pytest.raises(ValueError, match=f"^{text}; expected all arrays on one device$"):
                call()
    with pytest.raises(ValueError, match="^x: is on meta while weight is on cpu"):
        norm(ones(2, 4, device="meta"), ones(4))


def test_what_fits_the_batch_of_vmap_and_not_a_sample():
    x, w = ones(3, 4), ones(3, 4)
    expected = r"^weight: expected shape \(4,\) for x of shape \(4,\), got \(3, 4\)$"
    for in_dims in ((0, None, None), (0, None, 0)):
        with pytest.raises(ValueError, match=expected):
            torch.vmap(lambda x, w, r: norm(x, w), in_dims)(x, w, x)
        with pytest.raises(ValueError, match=expected):
            torch.vmap(lambda x, w, r: add(x, r, w), in_dims[:2] + (0,))(x, w, x)
        with pytest.raises(ValueError, match=expected):
            torch.vmap(lambda x, w, r: backward(x, x, weight=w), in_dims)(x, w, x)
    with pytest.raises(ValueError, match=r"^axis: expected -1 <= axis < 0 for x of shape \(4,\)"):
        torch.vmap(lambda x: norm(x, axis=-2))(x)
    y, _ = torch.vmap(norm, (0, None))(ones(3, 2, 4), ones(2, 4))
    assert y.shape == (3, 2, 4)
