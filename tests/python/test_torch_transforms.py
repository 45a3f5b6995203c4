"""The operators of rmsnorm.torch under everything that torch does to operators."""

import pytest
import rmsnorm
import rmsnorm.torch
import torch
from torch.func import functional_call, grad, hessian, jacfwd, jacrev, jvp, vjp
from torch.fx.experimental.proxy_tensor import make_fx
from torch.library import opcheck
from torch.nn import functional
from torch.utils.checkpoint import checkpoint

OPERATORS = torch.ops.rmsnorm
OPTIONS = (1e-5, -1, 0.0, "once", 1.0, None)


def sample(shape, seed=0, dtype=torch.float64):
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(shape, dtype=torch.float64, generator=generator).to(dtype)


def leaf(*arguments):
    return sample(*arguments).requires_grad_()


def ours(x, w):
    return rmsnorm.torch.rms_norm(x, x.shape[-1], w, 1e-5)


def theirs(x, w):
    return functional.rms_norm(x, x.shape[-1:], w, 1e-5)


def assert_near(a, b):
    torch.testing.assert_close(a, b, rtol=1e-9, atol=1e-11)


# torch's own checks: schema, gradients registered, shapes without memory, AOT against eager.


@pytest.mark.parametrize(
    "x, weight, bias, options",
    [
        ((3, 8), None, None, OPTIONS),
        ((3, 8), 8, 8, (1e-5, -1, 1.0, "before_weight", 0.5, torch.float64)),
        ((3, 2, 8), (2, 8), None, (1e-5, -2, 0.0, "rstd", 1.0, None)),
        ((3, 2, 8), (3, 1, 8), (2, 8), OPTIONS),
    ],
)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_opcheck_of_rms_norm(x, weight, bias, options, dtype):
    tensors = [
        None if shape is None else leaf(shape, seed, t)
        for seed, (shape, t) in enumerate(((x, dtype), (weight, torch.float32), (bias, dtype)))
    ]
    opcheck(OPERATORS.rms_norm.default, (*tensors, *options))


@pytest.mark.parametrize("round_residual", [True, False])
@pytest.mark.parametrize("residual_dtype", [torch.float32, torch.bfloat16])
def test_opcheck_of_add_rms_norm(round_residual, residual_dtype):
    x, residual, weight = leaf((3, 8), 0, torch.bfloat16), leaf((3, 8), 1, residual_dtype), leaf(8)
    arguments = (x, residual, weight, None, 1e-5, -1, 0.0, "once", round_residual)
    opcheck(OPERATORS.add_rms_norm.default, arguments)


@pytest.mark.parametrize("needs_dweight", [True, False])
def test_opcheck_of_rms_norm_backward(needs_dweight):
    x, weight, rstd = leaf((3, 8), 0, torch.float32), leaf(8, 1, torch.bfloat16), torch.ones(3)
    for residual, bias, statistics in ((None, None, None), (sample((3, 8)), sample((1, 8)), rstd)):
        arguments = (sample((3, 8), 2), x, residual, weight, bias, statistics, residual)
        opcheck(
            OPERATORS.rms_norm_backward.default, (*arguments, 1e-5, -1, 0.0, 1.0, needs_dweight)
        )


def test_shapes_without_memory():
    x, w = torch.empty(3, 4, 8, device="meta"), torch.empty(8, device="meta", dtype=torch.float64)
    y = rmsnorm.torch.rms_norm(x.transpose(0, 1), 8, w, out_dtype=torch.float16)
    assert y.is_meta and y.shape == (4, 3, 8) and y.dtype == torch.float16 and y.is_contiguous()
    y, residual = rmsnorm.torch.add_rms_norm(x.half(), x, (4, 8))
    assert y.dtype == torch.float16 and residual.dtype == torch.float32
    with pytest.raises(ValueError, match=r"^weight: "):
        rmsnorm.torch.rms_norm(x, 8, w[:7])
    with pytest.raises(ValueError, match=r"^bias: "):
        rmsnorm.torch.rms_norm(x, 8, bias=torch.empty(3, 8, device="meta"))
    with pytest.raises(ValueError, match=r"^residual: "):
        rmsnorm.torch.add_rms_norm(x, x[:1], 8)


# torch.compile and torch.export.


def block(x, residual, w):
    h, residual = rmsnorm.torch.add_rms_norm(x.sin(), residual, 8, w, 1e-5)
    return (rmsnorm.torch.rms_norm(h.cos(), 8, w) * residual).sum()


@pytest.fixture
def fresh_compiler():
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


@pytest.mark.parametrize("backend", ["aot_eager", "inductor"])
def test_compile(backend, fresh_compiler):
    inputs = [leaf((5, 8)), leaf((5, 8), 1), leaf(8, 2)]
    expected = block(*inputs)
    gradients = torch.autograd.grad(expected, inputs)
    compiled = torch.compile(block, fullgraph=True, backend=backend)
    assert_near(compiled(*inputs), expected)
    for a, b in zip(torch.autograd.grad(compiled(*inputs), inputs), gradients):
        assert_near(a, b)
    with torch.no_grad():
        assert_near(compiled(*inputs), expected)


def test_compile_with_dynamic_rows(fresh_compiler):
    compiled = torch.compile(ours, fullgraph=True, backend="aot_eager", dynamic=True)
    w = leaf(8)
    for rows in (1, 2, 5, 17):
        x = leaf((rows, 3, 8), rows)
        for a, b in zip(
            torch.autograd.grad(compiled(x, w).sin().sum(), (x, w)),
            torch.autograd.grad(theirs(x, w).sin().sum(), (x, w)),
        ):
            assert_near(a, b)


@pytest.mark.parametrize("backend", ["eager", "aot_eager"])
def test_compiled_autograd(backend, fresh_compiler):
    for eps in (1e-5, 0.5):
        inputs = [leaf((5, 8)), leaf((5, 8), 1), leaf(8, 2)]

        def loss(eps=eps, inputs=inputs):
            x, residual, w = inputs
            h, residual = rmsnorm.torch.add_rms_norm(x.sin(), residual, 8, w, eps)
            return (rmsnorm.torch.rms_norm(h.cos(), 8, w, eps) * residual).sum()

        expected = torch.autograd.grad(loss(), inputs)
        with torch._dynamo.config.patch(compiled_autograd=True):
            torch.compile(lambda loss: loss.backward(), backend=backend)(loss())
        for tensor, gradient in zip(inputs, expected):
            assert_near(tensor.grad, gradient)


def test_compiled_module_in_training(fresh_compiler):
    def train(compiled):
        torch.manual_seed(0)
        model = torch.nn.Sequential(
            torch.nn.Linear(8, 8), rmsnorm.torch.RMSNorm(8, bias=True), torch.nn.Linear(8, 1)
        ).double()
        forward = torch.compile(model, fullgraph=True, backend="aot_eager") if compiled else model
        optimizer = torch.optim.Adam(model.parameters(), lr=0.01)
        for _ in range(5):
            optimizer.zero_grad()
            forward(sample((7, 8))).square().mean().backward()
            optimizer.step()
        return model.state_dict()

    eager, compiled = train(False), train(True)
    for name, value in eager.items():
        assert_near(compiled[name], value)


def test_export():
    class Model(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.norm = rmsnorm.torch.RMSNorm(8, 1e-5, dtype=torch.float64)

        def forward(self, x):
            return self.norm(x) + 1

    model, x = Model(), sample((5, 8))
    rows = torch.export.Dim("rows")
    exported = torch.export.export(model, (x,), dynamic_shapes=({0: rows},))
    assert any("rmsnorm.rms_norm" in str(n.target) for n in exported.graph.nodes)
    for input in (x, sample((9, 8), 1)):
        assert_near(exported.module()(input), model(input))


def test_symbolic_trace_and_jit_trace():
    norm, x = rmsnorm.torch.RMSNorm(8, dtype=torch.float64), sample((5, 8))
    traced = torch.fx.symbolic_trace(torch.nn.Sequential(norm))
    assert_near(traced(x), norm(x))
    with pytest.warns(DeprecationWarning):
        traced = torch.jit.trace(norm, (x,))
    assert "rmsnorm::rms_norm" in str(traced.inlined_graph)
    assert_near(traced(sample((7, 8), 1)), norm(sample((7, 8), 1)))


@pytest.mark.parametrize("pre_dispatch", [False, True])
@pytest.mark.parametrize("tracing_mode", ["real", "symbolic"])
def test_make_fx(pre_dispatch, tracing_mode):
    def norms(x, w):
        return ours(x, w), *rmsnorm.torch.add_rms_norm(x, x, 8, w)

    w = sample(8, 1)
    traced = make_fx(norms, tracing_mode=tracing_mode, pre_dispatch=pre_dispatch)(sample((5, 8)), w)
    assert "rmsnorm.rms_norm" in traced.code
    assert "rmsnorm.add_rms_norm" in traced.code
    for a, b in zip(traced(sample((5, 8), 2), w), norms(sample((5, 8), 2), w)):
        assert torch.equal(a, b)


# torch.func.


@pytest.mark.parametrize(
    "in_dims", [(0, None), (1, None), (0, 0), (2, 0), (None, 0), (0, 1), (None, 1)]
)
def test_vmap(in_dims):
    shape = [5, 8]
    shapes = [list(shape), [8]]
    for s, d in zip(shapes, in_dims):
        if d is not None:
            s.insert(d, 3)
    x, w = sample(shapes[0]), sample(shapes[1], 1)
    assert_near(torch.vmap(ours, in_dims)(x, w), torch.vmap(theirs, in_dims)(x, w))

    def add(x, w):
        return rmsnorm.torch.add_rms_norm(x, x.sin(), 8, w, 1e-5)

    def reference(x, w):
        return theirs(x + x.sin(), w), x + x.sin()

    for a, b in zip(torch.vmap(add, in_dims)(x, w), torch.vmap(reference, in_dims)(x, w)):
        assert_near(a, b)


def test_vmap_of_per_head_weights_and_biases():
    def norm(x, w, b):
        return rmsnorm.torch.rms_norm(x, 8, w, 1e-5, bias=b)

    x, w, b = sample((3, 5, 4, 8)), sample((3, 4, 8), 1), sample((8,), 2)
    result = torch.vmap(norm, (0, 0, None))(x, w, b)
    for i in range(3):
        assert_near(result[i], norm(x[i], w[i], b))
    twice = torch.vmap(torch.vmap(norm, (0, None, None)), (0, 0, None))(x, w, b)
    assert_near(twice, result)


def loss_of(norm):
    return lambda x, w: norm(x, w).sin().sum()


TRANSFORMS = {
    "grad": grad,
    "grad of weight": lambda f: grad(f, argnums=1),
    "vjp": lambda f: lambda x, w: vjp(f, x, w)[1](torch.ones((), dtype=x.dtype)),
    "jvp": lambda f: lambda x, w: jvp(f, (x, w), (x.cos(), w.cos())),
    "gradients of samples": lambda f: torch.vmap(grad(f, argnums=(0, 1)), (0, None)),
    "gradients of samples and weights": lambda f: (
        lambda x, w: torch.vmap(grad(f, argnums=(0, 1)))(x, x.sin() + w)
    ),
    "jacrev": jacrev,
    "jacfwd": lambda f: jacfwd(f, argnums=(0, 1)),
    "hessian": lambda f: hessian(f, argnums=(0, 1)),
    "reverse over reverse": lambda f: jacrev(grad(f, argnums=(0, 1)), argnums=(0, 1)),
    "reverse over forward": lambda f: grad(lambda x, w: jvp(f, (x, w), (w.cos() + x, w))[1]),
    "thrice": lambda f: grad(lambda x, w: grad(lambda x, w: grad(f)(x, w).sin().sum())(x, w).sum()),
}


@pytest.mark.parametrize("name", TRANSFORMS)
def test_transforms(name):
    x, w = sample((3, 4)), sample(4, 1)
    results, expected = (TRANSFORMS[name](loss_of(f))(x, w) for f in (ours, theirs))
    for a, b in zip(flattened(results), flattened(expected), strict=True):
        assert_near(a, b)
        assert a.abs().max() > 0


def flattened(results):
    if isinstance(results, torch.Tensor):
        return [results]
    return [tensor for r in results for tensor in flattened(r)]


def test_transforms_of_add_rms_norm():
    def loss(add):
        def of(x, w):
            y, total = add(x, w)
            return (y.sin() * total).sum()

        return of

    x, w = sample((3, 4)), sample(4, 1)
    for round_residual in (True, False):

        def add(x, w, round_residual=round_residual):
            return rmsnorm.torch.add_rms_norm(x, x.cos(), 4, w, 1e-5, round_residual=round_residual)

        def reference(x, w):
            return theirs(x + x.cos(), w), x + x.cos()

        for transform in TRANSFORMS.values():
            results, expected = (transform(loss(f))(x, w) for f in (add, reference))
            for a, b in zip(flattened(results), flattened(expected), strict=True):
                assert_near(a, b)


def test_gradients_of_the_samples_of_a_module():
    norm = rmsnorm.torch.RMSNorm(8, 1e-5, bias=True, dtype=torch.float64)
    parameters = {k: v.detach() for k, v in norm.named_parameters()}
    x = sample((6, 3, 8))

    def loss(parameters, x):
        return functional_call(norm, parameters, (x,)).sin().sum()

    per_sample = torch.vmap(grad(loss), (None, 0))(parameters, x)
    for i in range(6):
        for name, gradient in grad(loss)(parameters, x[i]).items():
            assert_near(per_sample[name][i], gradient)


def test_batched_backward():
    """The rule of the backward operator alone, for shared and for own weights."""
    x, w = leaf((3, 5)), leaf(5, 1)
    cotangents = sample((4, 3, 5), 2)
    results = torch.autograd.grad(ours(x, w), (x, w), cotangents, is_grads_batched=True)
    for i in range(4):
        for a, b in zip(results, torch.autograd.grad(ours(x, w), (x, w), cotangents[i])):
            assert_near(a[i], b)


def test_forward_mode():
    from torch.autograd import forward_ad

    x, w = sample((3, 8)), sample(8, 1)
    with forward_ad.dual_level():
        duals = [forward_ad.make_dual(t, t.sin()) for t in (x, w)]
        expected = forward_ad.unpack_dual(theirs(*duals)).tangent
        for call in (
            lambda x, w: ours(x, w),
            lambda x, w: OPERATORS.rms_norm(x, w, None, *OPTIONS)[0],
            lambda x, w: ours(x.requires_grad_(), w),
        ):
            y, tangent = forward_ad.unpack_dual(call(*duals))
            assert_near(tangent, expected)
            assert_near(y, ours(x, w))
        with pytest.raises(
            RuntimeError, match=r"^x: carries a forward-mode tangent.*rmsnorm.torch"
        ):
            rmsnorm.rms_norm(*(forward_ad.make_dual(t, t.sin()) for t in (x, w)))


@pytest.mark.parametrize("rounding", ["once", "before_weight", "rstd"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_the_formula_of_forward_mode_rounds_where_the_kernels_do(rounding, dtype):
    from rmsnorm.torch import formula

    x, w, b = sample((50, 64), 0, dtype), sample(64, 1, dtype), sample(64, 2, torch.float32)
    options = (1e-5, -1, 1.0, rounding, 0.7, torch.bfloat16)
    y, rstd = formula.rms_norm(x, w, b, *options)
    expected, expected_rstd = OPERATORS.rms_norm(x, w, b, *options)
    torch.testing.assert_close(rstd, expected_rstd, rtol=1e-6, atol=0)
    assert (y != expected).float().mean() < 0.01  # by rstd's last bit
    r = sample((50, 64), 3, torch.bfloat16)
    for round_residual in (True, False):
        options = (1e-5, -1, 0.0, rounding, round_residual)
        results = formula.add_rms_norm(x, r, w, b, *options)
        expected = OPERATORS.add_rms_norm(x, r, w, b, *options)
        assert torch.equal(results[1], expected[1])
        torch.testing.assert_close(results[0], expected[0])
        if dtype == torch.bfloat16:
            assert (results[0] != expected[0]).float().mean() < 0.01
        assert all(a.dtype == e.dtype for a, e in zip(results, expected))


# What else a training loop does.


@pytest.mark.parametrize("use_reentrant", [True, False])
def test_checkpoint(use_reentrant):
    x, w = leaf((5, 8)), leaf(8, 1)
    expected = torch.autograd.grad(ours(x.sin(), w).cos().sum(), (x, w))
    y = checkpoint(lambda x, w: ours(x.sin(), w).cos(), x, w, use_reentrant=use_reentrant)
    y.sum().backward()
    assert torch.equal(x.grad, expected[0]) and torch.equal(w.grad, expected[1])


def test_saved_tensors_go_through_hooks():
    packed = []
    x, w = leaf((5, 8)), leaf(8, 1)

    def pack(tensor):
        packed.append(tensor.shape)
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        ours(x, w)
    assert packed == [(5, 8), (8,), (5,)], "x, weight and rstd, and nothing of the size of x more"


@pytest.mark.parametrize("compiled", [False, True])
def test_autocast(compiled, fresh_compiler):
    """Nothing is cast: what linear layers leave in bfloat16 stays so, whatever the weight's dtype."""
    x, w = leaf((5, 8), 0, torch.float32), leaf(8, 1, torch.float32)
    linear = torch.nn.Linear(8, 8)

    def model(x, w):
        return ours(linear(x), w)

    if compiled:
        model = torch.compile(model, fullgraph=True, backend="aot_eager")
    with torch.autocast("cpu", torch.bfloat16):
        y = model(x, w)
        assert ours(x, w).dtype == torch.float32 == theirs(x, w).dtype
    assert y.dtype == torch.bfloat16
    y.float().sum().backward()
    assert x.grad.dtype == w.grad.dtype == torch.float32
    assert w.grad.abs().sum() > 0


def test_modes_and_subclasses_see_the_operators():
    seen = []

    class Watching(torch.utils._python_dispatch.TorchDispatchMode):
        def __torch_dispatch__(self, function, types, args=(), kwargs=None):
            seen.append(str(function))
            return function(*args, **(kwargs or {}))

    class Tracked(torch.Tensor):
        @classmethod
        def __torch_function__(cls, function, types, args=(), kwargs=None):
            seen.append(function)
            return super().__torch_function__(function, types, args, kwargs or {})

    x, w = leaf((5, 8)), leaf(8, 1)
    with Watching():
        ours(x, w).sum().backward()
    assert "rmsnorm.rms_norm.default" in seen and "rmsnorm.rms_norm_backward.default" in seen
    seen.clear()
    y = ours(sample((5, 8)).as_subclass(Tracked), w)
    assert rmsnorm.torch.rms_norm in seen and isinstance(y, Tracked)
    assert_near(y.as_subclass(torch.Tensor), ours(sample((5, 8)), w))
    with torch.device("meta"):
        assert_near(ours(x, w), ours(x, w))


def test_lazy_negation():
    """Memory that holds the negated values is resolved by the dispatcher, or refused."""
    z = torch.complex(torch.zeros(3, 8), sample((3, 8), 0, torch.float32))
    view = z.conj().imag
    assert view.is_neg()
    result = OPERATORS.rms_norm(view, None, None, *OPTIONS)[0]
    assert_near(result, rmsnorm.rms_norm(view.resolve_neg(), eps=1e-5))
    with pytest.raises(ValueError, match=r"^x: .*resolve_neg"):
        ours(view, None)
