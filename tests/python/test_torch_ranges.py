"""Forward mode and derivatives of gradients on rows whose squares overflow or underflow."""

import pytest
import rmsnorm
import rmsnorm.torch
import torch
from test_torch_transforms import OPERATORS, flattened, sample
from torch.autograd import forward_ad
from torch.func import grad, hessian, jacfwd, jvp

# The rows of a call are those of u times these powers of two. float16 has none: its squares fit
# into float.
EXPONENTS = {
    torch.bfloat16: (-83, -40, 0, 40, 83),
    torch.float32: (-83, -40, 0, 40, 83),
    torch.float64: (-600, -400, 0, 400, 600),
}
# Of the largest element of a row; bfloat16 rounds each of a chain of derivatives.
TOLERANCES = {torch.bfloat16: 0.06, torch.float32: 4e-6, torch.float64: 2e-14}


def norms_of_scaled(dtype, eps, partial=1.0):
    """y of x = u * c for each row's power c, as an operator and in double as a function of u.

    The second keeps to the range of double by eps / c**2 in the place of eps.
    """
    exponents = [e for e in EXPONENTS[dtype] if eps == 0.0 or e > -200]
    c = torch.tensor([2.0**e for e in exponents], dtype=torch.float64)[:, None]
    u = sample((len(exponents), 6), 0, dtype)
    if eps:
        u[0] = 0

    def normed(u, w):
        options = (eps, -1, 0.0, "once", partial, None)
        y, rstd = OPERATORS.rms_norm(u * c.to(u.dtype), w, None, *options)
        return y, rstd * c[:, 0].to(rstd.dtype)

    def reference(u, w):
        counted = u[..., : round(partial * u.shape[-1])]
        rstd = torch.rsqrt(counted.square().mean(-1, keepdim=True) + eps / c / c)
        return u * rstd * w, rstd[:, 0]

    return normed, reference, (u, sample((6,), 1, dtype))


def loss(norm, which):
    return lambda *arguments: norm(*arguments)[which].sin().sum()


DERIVATIVES = {
    "values": lambda f, which: lambda u, w: jvp(f, (u, w), (u.cos(), w.cos()))[0][which],
    "tangents": lambda f, which: lambda u, w: jvp(f, (u, w), (u.cos(), w.cos()))[1][which],
    "jacfwd": lambda f, which: jacfwd(lambda u, w: f(u, w)[which], (0, 1)),
    "gradients": lambda f, which: grad(loss(f, which), 0),
    "hessian": lambda f, which: hessian(loss(f, which), (0, 1)),
    "reverse over reverse": lambda f, which: grad(
        lambda u, w: (grad(loss(f, which), 0)(u, w) * u.cos()).sum(), (0, 1)
    ),
    "reverse over forward": lambda f, which: grad(
        lambda u, w: jvp(loss(f, which), (u, w), (u.cos(), w.cos()))[1], (0, 1)
    ),
    "thrice": lambda f, which: grad(
        lambda u, w: grad(lambda u, w: grad(loss(f, which))(u, w).sin().sum())(u, w).cos().sum()
    ),
}


@pytest.mark.parametrize("which", [0, 1], ids=["y", "rstd"])
@pytest.mark.parametrize("eps", [0.0, 1e-6])
@pytest.mark.parametrize("dtype", EXPONENTS, ids=str)
@pytest.mark.parametrize("name", DERIVATIVES)
def test_derivatives(name, dtype, eps, which):
    normed, reference, inputs = norms_of_scaled(dtype, eps, partial=0.5)
    results = DERIVATIVES[name](normed, which)(*inputs)
    expected = DERIVATIVES[name](reference, which)(*(t.double() for t in inputs))
    assert_near_rows(results, expected, TOLERANCES[dtype])


def assert_near_rows(results, expected, tolerance):
    for a, b in zip(flattened(results), flattened(expected), strict=True):
        rows = (-1, b.shape[-1]) if b.dim() else (1, 1)
        error = (a.double() - b).abs().reshape(rows).amax(-1)
        # Of the dtype that a was rounded to, the smallest number and more.
        least = 4 * torch.finfo(a.dtype).tiny
        largest = b.abs().reshape(rows).amax(-1)
        assert (error <= tolerance * largest + least).all(), (a, b)


@pytest.mark.parametrize("round_residual", [True, False])
@pytest.mark.parametrize("dtype", EXPONENTS, ids=str)
def test_add_rms_norm(dtype, round_residual):
    exponent = EXPONENTS[dtype][-1]
    for c in (2.0**exponent, 2.0**-exponent):

        def normed(u, v, c=c):
            options = (0.0, -1, 0.0, "once", round_residual)
            y, total, _ = OPERATORS.add_rms_norm(u * c, v * c, None, None, *options)
            return y, total / c

        def reference(u, v):
            return (u + v) * torch.rsqrt((u + v).square().mean(-1, keepdim=True)), u + v

        inputs = sample((3, 6), 0, dtype), sample((3, 6), 1, dtype)
        for which in (0, 1):
            for derivative in DERIVATIVES.values():
                results = derivative(normed, which)(*inputs)
                expected = derivative(reference, which)(*(t.double() for t in inputs))
                assert_near_rows(results, expected, TOLERANCES[dtype])


SPECIAL = {
    "infinity": [1, 2, float("inf"), 3],
    "first infinity": [float("-inf"), 2, 1, 3],
    "NaN": [1, float("nan"), 2, 3],
    "zeros": [0, 0, 0, 0],
    "greatest": [3e38, 3e38, -3e38, 3e38],
    "denormal": [1e-40, 2e-40, 0, 0],
    "large": [1e25, 2e25, -3e25, 1],
    "small": [1e-25, 2e-25, -3e-25, 0],
    "large where it does not count": [1e-25, 1, 1e12, 1e12],
}


@pytest.mark.parametrize("rounding", ["once", "before_weight", "rstd"])
@pytest.mark.parametrize("eps", [0.0, 1e-6, 1e9])
@pytest.mark.parametrize("partial", [1.0, 0.5])
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32], ids=str)
def test_results_in_forward_mode_are_those_of_the_kernels(dtype, partial, eps, rounding):
    """Infinities and NaN included."""
    x = torch.tensor(list(SPECIAL.values())).to(dtype)
    expected = rmsnorm.rms_norm(x, eps=eps, partial=partial, rounding=rounding, return_rstd=True)
    with forward_ad.dual_level():
        results = OPERATORS.rms_norm(x, None, None, eps, -1, 0.0, rounding, partial, None)
    for a, b in zip(results, expected, strict=True):
        tolerance = 2 * torch.finfo(b.dtype).eps
        torch.testing.assert_close(a, b, rtol=tolerance, atol=1e-44, equal_nan=True)


@pytest.mark.parametrize("partial", [1.0, 0.5])
@pytest.mark.parametrize("eps", [0.0, 1e-6])
def test_gradients_in_forward_mode_are_those_of_the_kernels(partial, eps):
    x = torch.tensor([row for name, row in SPECIAL.items() if name != "zeros" or eps])
    dy = torch.tensor([1.0, -2.0, 0.5, 3.0]).expand(x.shape)
    expected = rmsnorm.rms_norm_backward(dy, x, eps=eps, partial=partial)[0]
    with forward_ad.dual_level():
        dx = OPERATORS.rms_norm_backward(
            dy, x, None, None, None, None, None, eps, -1, 0.0, partial, False
        )[0]
    torch.testing.assert_close(dx, expected, rtol=4e-6, atol=1e-44, equal_nan=True)


@pytest.mark.parametrize("eps", [1e-110, 1e-130, 5e-324])
@pytest.mark.parametrize("dtype", EXPONENTS, ids=str)
def test_rows_of_zeros_with_an_eps_below_all_squares(dtype, eps):
    """y is zero. Where 1/sqrt(eps) is out of range dx is infinite, as the kernels' is."""
    x, dy = torch.zeros(2, 4, dtype=dtype), torch.ones(2, 4, dtype=dtype)
    options = (eps, -1, 0.0)
    with forward_ad.dual_level():
        y, rstd = OPERATORS.rms_norm(x, None, None, *options, "once", 1.0, None)
        (dx, *_) = OPERATORS.rms_norm_backward(
            dy, x, None, None, None, None, None, *options, 1.0, False
        )
    assert torch.equal(y, torch.zeros_like(x))
    torch.testing.assert_close(rstd, rmsnorm.rms_norm(x, eps=eps, return_rstd=True)[1])
    torch.testing.assert_close(dx, rmsnorm.rms_norm_backward(dy, x, eps=eps)[0])


@pytest.mark.parametrize("eps", [1e-100, 1e-115, 1e-130])
def test_elements_that_are_not_counted_beside_zeros(eps):
    x = torch.tensor([[0, 0, 2.0**-126, -(2.0**-120)]])
    expected = rmsnorm.rms_norm(x, eps=eps, partial=0.5)
    with forward_ad.dual_level():
        y, _ = OPERATORS.rms_norm(x, None, None, eps, -1, 0.0, "once", 0.5, None)
    torch.testing.assert_close(y, expected)
    dy = torch.tensor([[0.0, 0, 1, 2]])
    (expected, *_) = rmsnorm.rms_norm_backward(dy, x * 2.0**-20, ones := torch.ones(4), eps=eps)
    with forward_ad.dual_level():
        (dx, *_) = OPERATORS.rms_norm_backward(
            dy, x * 2.0**-20, None, ones, None, None, None, eps, -1, 0.0, 1.0, True
        )
    torch.testing.assert_close(dx, expected)


def test_rows_without_elements():
    x = torch.ones(2, 0)
    y, tangent = jvp(lambda x: rmsnorm.torch.rms_norm(x, 0), (x,), (x,))
    assert y.shape == tangent.shape == (2, 0)
