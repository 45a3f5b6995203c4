"""Gradients through rmsnorm.torch and through the array functions: right, and never lost."""

import pytest
import rmsnorm
import rmsnorm.torch
import torch
from torch.autograd import gradcheck, gradgradcheck
from torch.nn import functional

OPERATORS = torch.ops.rmsnorm


def leaf(shape, seed=0, dtype=torch.float64):
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(shape, dtype=torch.float64, generator=generator).to(dtype).requires_grad_()


def options_of_rms_norm():
    return {
        "plain": {},
        "weight": {"weight": (6,)},
        "bias": {"weight": (6,), "bias": (6,)},
        "bias alone": {"bias": (6,)},
        "offset": {"weight": (6,), "weight_offset": 1.0},
        "before_weight": {"weight": (6,), "bias": (6,), "rounding": "before_weight"},
        "rstd": {"weight": (6,), "rounding": "rstd"},
        "large eps": {"weight": (6,), "eps": 3.0},
        "two axes": {"weight": (4, 6), "bias": (4, 6), "normalized_shape": (4, 6)},
        "per sample": {"weight": (3, 1, 6), "bias": (3, 1, 6)},
        "per head": {"weight": (4, 6), "bias": (1, 6)},
    }


def arranged(options):
    """The options without tensors, and the tensors: weight and bias."""
    options = {"normalized_shape": 6, "eps": 1e-5, **options}
    shapes = [options.pop("weight", None), options.pop("bias", None)]
    return options, [None if s is None else leaf(s, i + 1) for i, s in enumerate(shapes)]


@pytest.mark.parametrize("name", options_of_rms_norm())
def test_rms_norm(name):
    options, (weight, bias) = arranged(options_of_rms_norm()[name])

    def norm(x, weight, bias):
        return rmsnorm.torch.rms_norm(x, weight=weight, bias=bias, **options)

    assert gradcheck(norm, (leaf((3, 4, 6)), weight, bias))
    assert gradgradcheck(norm, (leaf((3, 4, 6)), weight, bias))


@pytest.mark.parametrize("round_residual", [True, False])
@pytest.mark.parametrize("name", options_of_rms_norm())
def test_add_rms_norm(name, round_residual):
    """Dao-AILab/quack 53 added the residual's gradient before the norm's derivative."""
    options, (weight, bias) = arranged(options_of_rms_norm()[name])

    def norm(x, residual, weight, bias):
        return rmsnorm.torch.add_rms_norm(
            x, residual, weight=weight, bias=bias, round_residual=round_residual, **options
        )

    inputs = (leaf((3, 4, 6)), leaf((3, 4, 6), 9), weight, bias)
    assert gradcheck(norm, inputs)
    assert gradgradcheck(norm, inputs)


@pytest.mark.parametrize("which", [0, 1])
def test_one_result_of_add_rms_norm_alone(which):
    inputs = (leaf((3, 6)), leaf((3, 6), 1), leaf(6, 2))
    assert gradcheck(lambda x, r, w: rmsnorm.torch.add_rms_norm(x, r, 6, w)[which], inputs)


@pytest.mark.parametrize("partial", [1.0, 0.4])
def test_the_array_functions_are_differentiated(partial):
    """With every option they have; rstd, too."""
    x, w, b = leaf((3, 4, 6)), leaf((3, 1, 6), 1), leaf(6, 2)
    options = {"eps": 1e-5, "weight_offset": 1.0, "partial": partial, "return_rstd": True}
    assert gradcheck(lambda x, w, b: rmsnorm.rms_norm(x, w, b, **options), (x, w, b))
    assert gradgradcheck(lambda x, w, b: rmsnorm.rms_norm(x, w, b, **options), (x, w, b))
    assert gradcheck(lambda x: rmsnorm.rms_norm(x, axis=-2, out_dtype="float64"), (x,))
    assert gradcheck(lambda x: rmsnorm.rms_norm(x, axis=1), (x,))
    for round_residual in (True, False):
        options = {"eps": 1e-5, "round_residual": round_residual, "return_rstd": True}
        call = lambda x, r, w: rmsnorm.add_rms_norm(x, r, w, **options)  # noqa: B023
        assert gradcheck(call, (x, leaf((3, 4, 6), 3), w))


def test_results_of_differentiated_calls_are_those_of_the_others():
    for dtype in (torch.float16, torch.bfloat16, torch.float32, torch.float64):
        x, w = leaf((5, 40), 0, dtype), leaf(40, 1, torch.float32)
        for out_dtype in (None, "bfloat16", torch.float64):
            options = {"return_rstd": True, "out_dtype": out_dtype, "rounding": "before_weight"}
            expected = rmsnorm.rms_norm(x.detach(), w.detach(), **options)
            results = rmsnorm.rms_norm(x, w, **options)
            assert all(r.requires_grad for r in results)
            assert all(a.dtype == e.dtype and torch.equal(a, e) for a, e in zip(results, expected))
        expected = rmsnorm.add_rms_norm(x.detach(), x.detach(), w.detach())
        for a, e in zip(rmsnorm.add_rms_norm(x, x, w), expected):
            assert a.requires_grad and a.dtype == e.dtype and torch.equal(a, e)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
@pytest.mark.parametrize("weight_dtype", [torch.bfloat16, torch.float32])
@pytest.mark.parametrize("residual_dtype", [None, torch.float32, torch.bfloat16])
def test_gradients_are_those_of_rms_norm_backward(dtype, weight_dtype, residual_dtype):
    """The same bits, each in the dtype of its tensor."""
    x, w, b = leaf((37, 40), 0, dtype), leaf(40, 1, weight_dtype), leaf(40, 2, torch.float16)
    dy = leaf((37, 40), 3, dtype).detach()
    if residual_dtype is None:
        y, normed, d_residual, residual = rmsnorm.torch.rms_norm(x, 40, w, bias=b), x, None, None
        y.backward(dy)
    else:
        residual = leaf((37, 40), 4, residual_dtype)
        y, normed = rmsnorm.torch.add_rms_norm(x, residual, 40, w, bias=b)
        d_residual = leaf((37, 40), 5, normed.dtype).detach()
        torch.autograd.backward((y, normed), (dy, d_residual))
    dx, dweight, dbias = rmsnorm.rms_norm_backward(
        dy,
        normed.detach(),
        w.detach(),
        eps=torch.finfo(torch.float32).eps,
        d_residual=d_residual,
        dbias_out=torch.empty(40, dtype=torch.float16),
    )
    assert x.grad.dtype == dtype and torch.equal(x.grad, dx.to(dtype))
    assert w.grad.dtype == weight_dtype and torch.equal(w.grad, dweight)
    assert b.grad.dtype == torch.float16 and torch.equal(b.grad, dbias)
    if residual is not None:
        assert torch.equal(residual.grad, dx.to(residual_dtype))


def test_the_gradient_of_an_unrounded_sum_is_not_rounded_to_the_narrower_dtype():
    x, residual = leaf((5, 40), 0, torch.bfloat16), leaf((5, 40), 1, torch.float32)
    y, _ = rmsnorm.torch.add_rms_norm(x, residual, 40, round_residual=False)
    y.float().square().sum().backward()
    assert not torch.equal(residual.grad, residual.grad.bfloat16().float())
    assert torch.equal(x.grad, residual.grad.bfloat16())


def test_against_torch():
    x, w, dy = leaf((64, 129), 0), leaf(129, 1), leaf((64, 129), 2).detach()
    ours = torch.autograd.grad(rmsnorm.torch.rms_norm(x, 129, w), (x, w), dy)
    theirs = torch.autograd.grad(functional.rms_norm(x, (129,), w), (x, w), dy)
    for a, b in zip(ours, theirs):
        torch.testing.assert_close(a, b, rtol=1e-12, atol=1e-13)


@pytest.mark.parametrize("needed", [(1, 0, 0), (0, 1, 0), (0, 0, 1), (1, 0, 1), (0, 1, 1)])
def test_only_what_is_needed(needed):
    names = ("x", "w", "b")
    tensors = [
        leaf(s, i).requires_grad_(bool(n)) for i, (s, n) in enumerate(zip(((5, 8), 8, 8), needed))
    ]
    everything = [t.detach().clone().requires_grad_() for t in tensors]
    for x, w, b in (tensors, everything):
        rmsnorm.torch.rms_norm(x, 8, w, bias=b).sin().sum().backward()
    for name, tensor, full, wanted in zip(names, tensors, everything, needed):
        if wanted:
            torch.testing.assert_close(tensor.grad, full.grad, msg=name)
        else:
            assert tensor.grad is None, name


def test_a_frozen_weight_costs_no_sum_over_rows(monkeypatch):
    asked = []
    backward = rmsnorm.rms_norm_backward

    def watched(*args, **kwargs):
        asked.append(kwargs["needs_dweight"])
        return backward(*args, **kwargs)

    monkeypatch.setattr(rmsnorm, "rms_norm_backward", watched)
    x, w = leaf((5, 8)), leaf(8, 1)
    rmsnorm.torch.rms_norm(x, 8, w.detach()).sum().backward()
    rmsnorm.torch.rms_norm(x, 8, w).sum().backward()
    assert asked == [False, True]


def test_used_twice_and_accumulated():
    x, w = leaf((5, 8)), leaf(8, 1)
    y = rmsnorm.torch.rms_norm(x, 8, w)
    (rmsnorm.torch.rms_norm(y, 8, w) * y).sum().backward(retain_graph=True)
    expected_x, expected_w = x.grad.clone(), w.grad.clone()
    a = functional.rms_norm(x, (8,), w)
    reference = torch.autograd.grad((functional.rms_norm(a, (8,), w) * a).sum(), (x, w))
    torch.testing.assert_close(expected_x, reference[0])
    torch.testing.assert_close(expected_w, reference[1])
    x.grad = w.grad = None
    for _ in range(2):
        y = rmsnorm.torch.rms_norm(x, 8, w)
        (rmsnorm.torch.rms_norm(y, 8, w) * y).sum().backward()
    torch.testing.assert_close(x.grad, 2 * expected_x)


def test_gradients_of_any_layout():
    """Expanded, transposed and sliced tensors, as other operations hand them down."""
    x, w = leaf((6, 5, 8)), leaf(8, 1)
    views = (
        lambda t: t.transpose(0, 1),
        lambda t: t[:, 1:4],
        lambda t: t[..., ::2],
        lambda t: t[:1].expand(6, 5, 8),
        lambda t: t.permute(2, 0, 1),
    )
    for view in views:
        seen = view(x)
        weight = w if seen.shape[-1] == 8 else leaf(seen.shape[-1:], 2)
        y = rmsnorm.torch.rms_norm(seen, seen.shape[-1], weight)
        theirs = functional.rms_norm(seen, seen.shape[-1:], weight)
        for scalar in (lambda t: t.sum(), lambda t: t.transpose(0, 1).contiguous().sin().sum()):
            ours = torch.autograd.grad(scalar(y), (x, weight), retain_graph=True)
            expected = torch.autograd.grad(scalar(theirs), (x, weight), retain_graph=True)
            for a, b in zip(ours, expected):
                torch.testing.assert_close(a, b, rtol=1e-10, atol=1e-12)


def test_a_changed_input_is_noticed():
    x, w = leaf((5, 8)), leaf(8, 1)
    y = rmsnorm.torch.rms_norm(x, 8, w)
    with torch.no_grad():
        w.mul_(2)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        y.sum().backward()
    s = x * 1
    y = rmsnorm.rms_norm(s, w)
    with torch.no_grad():
        s.add_(1)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        y.sum().backward()


def test_no_grad_and_inference_mode():
    x, w = leaf((5, 8)), leaf(8, 1)
    expected = rmsnorm.torch.rms_norm(x, 8, w).detach()
    for mode in (torch.no_grad, torch.inference_mode):
        with mode():
            y = rmsnorm.torch.rms_norm(x, 8, w)
            assert not y.requires_grad and torch.equal(y, expected)
            z, _ = rmsnorm.torch.add_rms_norm(x, x, 8, w)
            assert not z.requires_grad
            y, _ = OPERATORS.rms_norm(x, w, None, 1e-5, -1, 0.0, "once", 1.0, None)
            assert not y.requires_grad


@pytest.mark.parametrize("create_graph", [False, True])
def test_a_lazily_negated_gradient(create_graph):
    """As the loss has it that takes the imaginary part of a conjugate."""
    x, r, w = leaf((3, 8)), leaf((3, 8), 2), leaf(8, 1)

    def derivatives(y, total=None):
        lazy = torch.complex(y.detach(), y.detach().cos()).conj().imag
        assert lazy.is_neg()
        results, cotangents = ([y], [lazy]) if total is None else ([total, y], [lazy, lazy])
        leaves = (x, w) if total is None else (x, r, w)
        return torch.autograd.grad(results, leaves, cotangents, create_graph=create_graph)

    pairs = [
        (rmsnorm.torch.rms_norm(x, 8, w), functional.rms_norm(x, (8,), w)),
        (rmsnorm.torch.add_rms_norm(x, r, 8, w), (functional.rms_norm(x + r, (8,), w), x + r)),
    ]
    for ours, theirs in pairs:
        arguments = [t if isinstance(t, tuple) else (t,) for t in (ours, theirs)]
        for a, b in zip(*(derivatives(*results) for results in arguments)):
            torch.testing.assert_close(a, b, rtol=1e-12, atol=1e-13)


@pytest.mark.parametrize("zero", [(0,), (1,), (0, 1)])
def test_gradients_that_are_known_to_be_zeros(zero):
    """Without memory, as torch has them: for the sum, for y or for both."""
    x, w = leaf((3, 8)), leaf(8, 1)
    cotangents = [leaf((3, 8), 2).detach(), leaf((3, 8), 3).detach()]
    lazy = [
        torch._efficientzerotensor((3, 8), dtype=t.dtype) if i in zero else t
        for i, t in enumerate(cotangents)
    ]
    zeros = [torch.zeros_like(t) if i in zero else t for i, t in enumerate(cotangents)]
    results = rmsnorm.torch.add_rms_norm(x, x, 8, w)
    for a, b in zip(
        torch.autograd.grad(results, (x, w), lazy, retain_graph=True),
        torch.autograd.grad(results, (x, w), zeros),
    ):
        assert torch.equal(a, b)


def test_what_inference_mode_made_of_a_frozen_model():
    """A norm trained on it: its input can be changed unnoticed, and so a copy is kept."""
    with torch.inference_mode():
        x, residual = leaf((3, 8)).detach() * 1, leaf((3, 8), 2).detach() * 1
    w = leaf(8, 1)

    def dweight(y, change=()):
        with torch.inference_mode():
            for tensor in change:
                tensor.mul_(3)
        return torch.autograd.grad(y.sin().sum(), w)[0]

    expected = dweight(functional.rms_norm(x, (8,), w))
    of_sum = dweight(functional.rms_norm(x + residual, (8,), w))
    ys = [rmsnorm.torch.rms_norm(x, 8, w), rmsnorm.rms_norm(x, w, eps=torch.finfo(x.dtype).eps)]
    sums = [
        rmsnorm.torch.add_rms_norm(x, residual, 8, w, round_residual=rounded)[0]
        for rounded in (True, False)
    ]
    for y in ys:
        torch.testing.assert_close(dweight(y, (x,)), expected)
    for y in sums:
        torch.testing.assert_close(dweight(y, (residual,)), of_sum)


def test_third_derivative():
    x, w = leaf((3, 5)), leaf(5, 1)

    def derivatives(norm):
        value = norm(x).sin().sum()
        for _ in range(3):
            (g,) = torch.autograd.grad(value, x, create_graph=True)
            value = g.square().sum()
        return value.detach()

    ours = derivatives(lambda x: rmsnorm.torch.rms_norm(x, 5, w))
    theirs = derivatives(lambda x: functional.rms_norm(x, (5,), w))
    torch.testing.assert_close(ours, theirs, rtol=1e-9, atol=1e-9)


# What cannot be differentiated says so.


def test_refused_gradients():
    x, w, out = leaf((3, 8)), leaf(8, 1), torch.full((3, 8), 7.0, dtype=torch.float64)
    mean_square = rmsnorm.mean_square(x.detach())
    for call, name in (
        (lambda: rmsnorm.rms_norm(x, out=out), "x"),
        (lambda: rmsnorm.rms_norm(x.detach(), w, out=out), "weight"),
        (lambda: rmsnorm.add_rms_norm(x, x.detach(), out=out), "x"),
        (lambda: rmsnorm.add_rms_norm(x.detach(), x, residual_out=out), "residual"),
        (lambda: rmsnorm.rms_norm(x.detach().numpy(), w), "weight"),
        (lambda: rmsnorm.rms_norm(x, w.detach().numpy()), "x"),
        (lambda: rmsnorm.rms_norm(x.detach(), out=leaf((3, 8))), "out"),
        (lambda: rmsnorm.mean_square(x), "x"),
        (lambda: rmsnorm.rms_norm_apply(x, mean_square), "x"),
        (lambda: rmsnorm.rms_norm_backward(x, x.detach(), dx_out=out), "dy"),
        (lambda: rmsnorm.rms_norm_backward(x.detach(), x.detach(), w, dx_out=out), "weight"),
    ):
        with pytest.raises(RuntimeError, match=rf"^{name}: requires grad.*no_grad.*detach"):
            call()
        assert (out == 7).all(), "written"
        with torch.no_grad():
            call()
        out.fill_(7.0)
