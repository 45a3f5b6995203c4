"""rmsnorm.torch.rms_norm and add_rms_norm: values, defaults, errors, the module."""

import copy
import io
import subprocess
import sys
from unittest import mock

import numpy as np
import pytest
import rmsnorm
import rmsnorm.torch
import torch
from torch.nn import functional

DTYPES = (torch.float16, torch.bfloat16, torch.float32, torch.float64)


def sample(shape, dtype=torch.float32, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(shape, dtype=torch.float64, generator=generator).to(dtype)


def same(a, b):
    return a.dtype == b.dtype and torch.equal(a, b)


def test_import_of_the_package_does_not_import_torch():
    code = "import sys, rmsnorm; assert 'torch' not in sys.modules; import rmsnorm.torch"
    subprocess.run([sys.executable, "-c", code], check=True)


def test_another_torch_is_refused_by_name():
    code = (
        "import torch\n"
        "del torch._C._any_requires_grad\n"
        "torch.__version__ = '3.1'\n"
        "import rmsnorm.torch\n"
    )
    ran = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert ran.returncode == 1
    last = ran.stderr.strip().splitlines()[-1]
    assert last.startswith("ImportError: rmsnorm.torch is made for torch 2.13; torch 3.1 lacks")
    assert "_any_requires_grad" in last


@pytest.mark.parametrize("weight", [None, *DTYPES], ids=str)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("eps", [None, 1e-3])
@pytest.mark.filterwarnings("ignore:Mismatch dtype")
def test_as_torch(dtype, weight, eps):
    """Dtype of the result, default eps, and values within two units in the last place.

    What eps=None means for halves: pytorch/pytorch 155527 and 189581.
    """
    x = sample((5, 3, 40), dtype) * 1e-4  # at which eps decides
    w = None if weight is None else sample((40,), weight, 1)
    y = rmsnorm.torch.rms_norm(x, (40,), w, eps)
    expected = functional.rms_norm(x, (40,), w, eps)
    assert y.dtype == expected.dtype and y.shape == expected.shape and y.is_contiguous()
    tolerance = 4 * torch.finfo(dtype).eps
    torch.testing.assert_close(y, expected, rtol=tolerance, atol=tolerance / 100)


@pytest.mark.parametrize("normalized", [40, (40,), [40], torch.Size([40]), (3, 40), (5, 3, 40)])
def test_normalized_shape(normalized):
    x = sample((5, 3, 40), torch.float64)
    shape = (normalized,) if isinstance(normalized, int) else tuple(normalized)
    weight = sample(shape, torch.float64, 1)
    y = rmsnorm.torch.rms_norm(x, normalized, weight)
    torch.testing.assert_close(y, functional.rms_norm(x, shape, weight), rtol=1e-14, atol=1e-15)
    total, residual = rmsnorm.torch.add_rms_norm(x, x, normalized, weight)
    expected = functional.rms_norm(x + x, shape, weight)
    torch.testing.assert_close(total, expected, rtol=1e-14, atol=1e-15)
    assert torch.equal(residual, x + x)


@pytest.mark.parametrize("rounding", ["once", "before_weight", "rstd"])
@pytest.mark.parametrize("requires_grad", [False, True])
def test_options_are_those_of_the_array_functions(rounding, requires_grad):
    x, w, b = (sample(s, torch.bfloat16, i) for i, s in enumerate(((4, 40), (40,), (40,))))
    r = sample((4, 40), torch.float32, 4)
    options = {"weight_offset": 1.0, "rounding": rounding}
    expected = rmsnorm.rms_norm(x, w, b, eps=1e-5, out_dtype="float32", **options)
    sums = rmsnorm.add_rms_norm(x, r, w, b, eps=1e-5, round_residual=False, **options)
    leaf = x.clone().requires_grad_(requires_grad)
    y = rmsnorm.torch.rms_norm(leaf, 40, w, 1e-5, bias=b, out_dtype=torch.float32, **options)
    assert same(y, expected) and y.requires_grad == requires_grad
    results = rmsnorm.torch.add_rms_norm(
        leaf, r, 40, w, 1e-5, bias=b, round_residual=False, **options
    )
    for a, e in zip(results, sums):
        assert same(a, e) and a.requires_grad == requires_grad


def test_weights_that_broadcast():
    x, w = sample((3, 4, 40)), sample((3, 1, 40), seed=1)
    assert same(rmsnorm.torch.rms_norm(x, 40, w, 1e-5), rmsnorm.rms_norm(x, w, eps=1e-5))


class SaysTensor:
    __class__ = torch.Tensor
    shape, dtype, device = torch.Size((8,)), torch.float32, torch.device("cpu")
    is_meta = is_cuda = requires_grad = False


SAYS_TENSOR = SaysTensor()
LONG_NAMED = type("A" * 10**6, (), {})()


@pytest.mark.parametrize(
    "arguments, exception, message",
    [
        (([[1.0]], 1), TypeError, r"^input: expected a torch.Tensor, got list"),
        ((None, 1), TypeError, r"^input: expected a torch.Tensor, got NoneType"),
        ((torch.ones(2, 8), 7), ValueError, r"^normalized_shape: .*\(2, 8\).*\(7,\)"),
        ((torch.ones(2, 8), ()), ValueError, r"^normalized_shape"),
        ((torch.ones(2, 8), (1, 2, 8)), ValueError, r"^normalized_shape"),
        ((torch.ones(2, 8), 8, [1.0] * 8), TypeError, r"^weight: expected a torch.Tensor"),
        ((torch.ones(2, 8), 8, torch.ones(7)), ValueError, r"^weight: expected shape \(8,\)"),
        ((torch.ones(2, 8), 8, None, -1.0), ValueError, r"^eps: "),
        ((torch.ones(2, 8), torch.tensor(8)), TypeError, r"^normalized_shape: .*tensor\(8\)"),
        ((torch.ones(2, 8), "8" * 10**6), TypeError, r"^normalized_shape: .{,140}$"),
        ((torch.ones(2, 8), 10**5000), ValueError, r"^normalized_shape: .* got .*cannot be shown"),
        ((LONG_NAMED, 8), TypeError, r"^input: .{,400}$"),
        ((torch.ones(2, 8), 8, LONG_NAMED), TypeError, r"^weight: .{,400}$"),
        ((torch.ones(2, 8), (8 + 0j,)), TypeError, r"^normalized_shape: .*\(\(8\+0j\),\)"),
        ((torch.ones(2, 8), (torch.tensor(8),)), TypeError, r"^normalized_shape: .*tensor\(8\)"),
        ((SAYS_TENSOR, 8), TypeError, r"^input: expected a torch.Tensor, got .*SaysTensor"),
        ((torch.ones(2, 8), 8, SAYS_TENSOR), TypeError, r"^weight: .* got .*SaysTensor"),
        ((torch.ones(2, 8), 8, mock.MagicMock(spec=torch.Tensor)), TypeError, r"^weight: .*Mock"),
        ((torch.ones(2, 8), (8.0,)), TypeError, r"^normalized_shape: .*\(8.0,\)"),
        ((torch.ones(2, 1), (True,)), TypeError, r"^normalized_shape: .*\(True,\)"),
        (
            (torch.ones(2, 8), 8, None, torch.ones((), requires_grad=True)),
            TypeError,
            r"^eps: .*grad",
        ),
        ((torch.ones(2, 8), 8, None, "1e-6"), TypeError, r"^eps: .*str"),  # as YAML 1.1 reads it
        ((torch.ones(2, 8, requires_grad=True), 8, None, "1e-6"), TypeError, r"^eps: .*str"),
        ((torch.ones(2, 8, dtype=torch.int32), 8), TypeError, r"^x: .*int32"),
        ((torch.ones(2, 8, requires_grad=True), 8, torch.ones(7)), ValueError, r"^weight"),
        ((torch.ones(2, 8, requires_grad=True), 8, None, -1.0), ValueError, r"^eps"),
    ],
)
def test_wrong_calls(arguments, exception, message):
    with pytest.raises(exception, match=message):
        rmsnorm.torch.rms_norm(*arguments)


@pytest.mark.parametrize(
    "arguments, options, exception, message",
    [
        ((-1,), {}, ValueError, r"^normalized_shape: .*-1"),
        ((8,), {"weight_offset": "a"}, TypeError, r"^weight_offset: expected a number, got str"),
        ((10**5000,), {}, ValueError, r"^normalized_shape: .* got .*cannot be shown"),
        ((8,), {"weight_offset": 10**400}, ValueError, r"^weight_offset: .* range of a double$"),
        ((8,), {"weight_offset": LONG_NAMED}, TypeError, r"^weight_offset: .{,400}$"),
        ((8,), {"weight_offset": True}, TypeError, r"^weight_offset: expected a number, got bool"),
    ],
)
def test_modules_that_cannot_be(arguments, options, exception, message):
    with pytest.raises(exception, match=message):
        rmsnorm.torch.RMSNorm(*arguments, **options)


def test_wrong_options():
    x = torch.ones(2, 8)
    for options, message in (
        ({"weight_offset": 1.0}, "weight_offset"),
        ({"rounding": "up"}, "rounding"),
        ({"bias": torch.ones(3)}, "bias"),
        ({"out_dtype": torch.int8}, "out_dtype"),
        ({"out_dtype": "float32"}, "out_dtype"),
        ({"out_dtype": np.float32}, "out_dtype"),
    ):
        with pytest.raises((TypeError, ValueError), match=rf"^{message}: "):
            rmsnorm.torch.rms_norm(x, 8, **options)
    with pytest.raises(TypeError, match=r"^residual: expected a torch.Tensor, got NoneType"):
        rmsnorm.torch.add_rms_norm(x, None, 8)
    with pytest.raises(ValueError, match=r"^residual: expected shape \(2, 8\)"):
        rmsnorm.torch.add_rms_norm(x, torch.ones(1, 8), 8)


# The module.


@pytest.mark.parametrize("shape", [40, (3, 40)])
@pytest.mark.parametrize("affine", [True, False])
def test_module_as_torch(shape, affine):
    theirs = torch.nn.RMSNorm(shape, 1e-5, affine)
    ours = rmsnorm.torch.RMSNorm(shape, 1e-5, affine)
    if affine:
        torch.nn.init.normal_(theirs.weight)
    assert ours.load_state_dict(theirs.state_dict()) is not None
    assert list(ours.state_dict()) == list(theirs.state_dict())
    theirs.load_state_dict(ours.state_dict())
    x = sample((5, 3, 40))
    torch.testing.assert_close(ours(x), theirs(x))
    assert repr(ours) == repr(theirs)


def test_module_options():
    norm = rmsnorm.torch.RMSNorm(
        40, bias=True, weight_offset=1.0, rounding="before_weight", dtype=torch.bfloat16
    )
    assert norm.eps is None and norm.normalized_shape == (40,)
    assert torch.equal(norm.weight, torch.zeros(40)) and torch.equal(norm.bias, torch.zeros(40))
    assert norm.weight.dtype == norm.bias.dtype == torch.bfloat16
    assert list(norm.state_dict()) == ["weight", "bias"]
    assert repr(norm).endswith("bias=True, weight_offset=1.0, rounding='before_weight')")
    x = sample((4, 40), torch.bfloat16)
    eps = torch.finfo(torch.float32).eps
    assert same(norm(x), rmsnorm.rms_norm(x, eps=eps))
    torch.nn.init.normal_(norm.weight)
    torch.nn.init.normal_(norm.bias)
    expected = rmsnorm.rms_norm(
        x,
        norm.weight.detach(),
        norm.bias.detach(),
        eps=eps,
        **rmsnorm.variant("llama"),
        weight_offset=1.0,
    )
    assert same(norm(x), expected)
    norm.reset_parameters()
    assert not norm.weight.any() and not norm.bias.any()
    for options in ({"bias": True}, {"weight_offset": 1.0}):
        with pytest.raises(ValueError, match=r"elementwise_affine=False"):
            rmsnorm.torch.RMSNorm(40, elementwise_affine=False, **options)


def test_module_is_an_ordinary_one():
    norm = rmsnorm.torch.RMSNorm(40, device="meta", dtype=torch.float16)
    assert norm.weight.is_meta and norm.weight.dtype == torch.float16
    norm = rmsnorm.torch.RMSNorm(40)
    x = sample((4, 40))
    twin = copy.deepcopy(norm).double()
    assert twin(x.double()).dtype == torch.float64
    buffer = io.BytesIO()
    torch.save(norm, buffer)
    buffer.seek(0)
    assert same(torch.load(buffer, weights_only=False)(x), norm(x))
    optimizer = torch.optim.SGD(norm.parameters(), lr=0.1)
    before = norm.weight.detach().clone()
    norm(x).square().sum().backward()
    optimizer.step()
    assert not torch.equal(norm.weight, before)


# Integers of any type.


@pytest.mark.parametrize("integer", [np.int64, np.int8, np.uint16, int], ids=lambda t: t.__name__)
def test_integers(integer):
    n, x = integer(40), sample((3, 40))
    norm = rmsnorm.torch.RMSNorm(n)
    assert norm.normalized_shape == torch.nn.RMSNorm(n).normalized_shape == (40,)
    assert all(type(size) is int for size in norm.normalized_shape)
    assert rmsnorm.torch.RMSNorm([integer(3), n]).normalized_shape == (3, 40)
    expected = rmsnorm.torch.rms_norm(x, 40)
    for normalized_shape in (n, (n,), [n]):
        assert same(rmsnorm.torch.rms_norm(x, normalized_shape), expected)
        assert same(rmsnorm.torch.add_rms_norm(x, x, normalized_shape)[1], x + x)


def test_integers_of_numpy_while_compiling():
    sizes, x = (np.int64(3), np.int64(40)), sample((2, 3, 40))
    torch._dynamo.reset()
    compiled = torch.compile(lambda x: rmsnorm.torch.rms_norm(x, sizes), backend="eager")
    assert same(compiled(x), rmsnorm.torch.rms_norm(x, (3, 40)))


@pytest.mark.parametrize("wrong", [True, 40.0, "40", None, torch.tensor([40]), [40.0], (True,)])
def test_what_is_no_integer(wrong):
    message = r"^normalized_shape: expected an integer or a sequence of integers, got "
    with pytest.raises(TypeError, match=message):
        rmsnorm.torch.RMSNorm(wrong)
    if not isinstance(wrong, tuple):
        with pytest.raises(TypeError, match=message):
            rmsnorm.torch.rms_norm(sample((3, 40)), wrong)


class OfAnyWidth(torch.nn.Module):
    """The ways to name the width, which is a symbol while the module is exported."""

    def forward(self, x, weight):
        n = x.shape[-1]
        module = rmsnorm.torch.RMSNorm(n, elementwise_affine=False)
        norms = [rmsnorm.torch.rms_norm(x, s, weight) for s in (n, (n,), [n], x.shape[-1:])]
        return module(x), rmsnorm.torch.add_rms_norm(x, x, n)[0], *norms


@pytest.mark.parametrize("strict", [True, False])
def test_symbols_as_integers(strict):
    dims = [torch.export.Dim(name, min=2, max=100) for name in ("rows", "n")]
    shapes = (dict(enumerate(dims)), {0: dims[1]})
    program = torch.export.export(
        OfAnyWidth(), (sample((3, 8)), sample(8)), dynamic_shapes=shapes, strict=strict
    )
    x, weight = sample((5, 12)), sample(12)
    for y, expected in zip(program.module()(x, weight), OfAnyWidth()(x, weight), strict=True):
        assert same(y, expected)


# Importing the package again, as notebooks and test runners do.

IMPORTED_AGAIN = """
import gc, importlib, sys
import rmsnorm
import torch
import rmsnorm.torch as first

x, w = torch.randn(3, 8, requires_grad=True), torch.ones(8)
compiled = torch.compile(lambda x: first.rms_norm(x, 8, w), fullgraph=True, backend="aot_eager")
program = torch.export.export(first.RMSNorm(8, 1e-5), (x.detach(),))
module, operator = first.RMSNorm(8, 1e-5), torch.ops.rmsnorm.rms_norm.default
expected = compiled(x).detach()


def use(package):
    for norm in (package.rms_norm, first.rms_norm):
        (dx,) = torch.autograd.grad(norm(x, 8, w).square().sum(), x, create_graph=True)
        dx.sum().backward()
        torch.func.jvp(lambda x: norm(x, 8, w), (x.detach(),), (x.detach(),))
        assert torch.equal(torch.vmap(lambda x: norm(x, 8, w))(x), expected)
        assert norm(x.to("meta"), 8).shape == (3, 8)
    assert torch.equal(compiled(x), expected) and compiled(x).requires_grad
    assert torch.equal(program.module()(x.detach()), module(x))
    arguments = (x.detach(), w, None, 1e-5, -1, 0.0, "once", 1.0, None)
    assert torch.equal(operator(*arguments)[0], module(x))
    assert torch.equal(torch.ops.rmsnorm.rms_norm(*arguments)[0], module(x))
    rmsnorm.rms_norm(x, w).sum().backward()
    norm = torch.nn.RMSNorm(8)
    assert package.replace_rms_norms(norm).replaced
    assert first.replace_rms_norms(norm).left[0].reason == "it was replaced before"


for _ in range(3):
    AGAIN
    gc.collect()
    use(sys.modules["rmsnorm.torch"])
"""
WAYS_TO_IMPORT_AGAIN = {
    "deleted": """
    for name in [name for name in sys.modules if name.startswith("rmsnorm.torch")]:
        del sys.modules[name]
    assert importlib.import_module("rmsnorm.torch") is not first
""",
    "reloaded": """
    for name in [name for name in sys.modules if name.startswith("rmsnorm.torch")]:
        importlib.reload(sys.modules[name])
""",
    "reloaded in part": """
    for name in ("gradients", "batching", "operators"):
        importlib.reload(sys.modules["rmsnorm.torch." + name])
""",
}


@pytest.mark.parametrize("way", WAYS_TO_IMPORT_AGAIN)
def test_imported_again(way):
    code = IMPORTED_AGAIN.replace("\n    AGAIN\n", WAYS_TO_IMPORT_AGAIN[way])
    subprocess.run([sys.executable, "-c", code], check=True)
