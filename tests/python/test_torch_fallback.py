"""Replaced modules called with what this library refuses: the result or error of their own forward.

The module's own forward computes such a call, and the next one is this library's again.
"""

import copy

import pytest
import rmsnorm
import torch
from rmsnorm.torch import replace_rms_norms
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

N = 32


class HouseRMSNorm(nn.Module):
    def __init__(self, dtype=None):
        super().__init__()
        self.weight = nn.Parameter(torch.linspace(0.5, 1.5, N, dtype=dtype))

    def forward(self, x):
        wide = x.float()
        rstd = torch.rsqrt(wide.pow(2).mean(-1, keepdim=True) + 1e-6)
        return self.weight * (wide * rstd).to(x.dtype)


class UnweightedRMSNorm(nn.Module):
    def forward(self, x):
        wide = x.float()
        return (wide * torch.rsqrt(wide.pow(2).mean(-1, keepdim=True) + 1e-6)).to(x.dtype)


class DefaultRMSNorm(HouseRMSNorm):
    def forward(self, x=None):
        return super().forward(torch.ones(2, N) if x is None else x)


class ByWeightDtypeRMSNorm(HouseRMSNorm):
    """T5's formula, with x converted, which float64 alone tells from x as it is."""

    def forward(self, x):
        wide = self.converted(x)
        y = wide * torch.rsqrt(x.float().pow(2).mean(-1, keepdim=True) + 1e-6)
        if self.weight.dtype in (torch.float16, torch.bfloat16):
            y = y.to(self.weight.dtype)
        return self.weight * y

    def converted(self, x):
        return x.float()


class T5LayerNorm(ByWeightDtypeRMSNorm):
    def converted(self, x):
        return x


def pair(module):
    """The module replaced, and a copy that is not."""
    original = copy.deepcopy(module)
    assert len(replace_rms_norms(module).replaced) == 1
    return module, original


def sample(*shape, dtype=torch.float32):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(0)).to(dtype)


def conjugate_part():
    return torch.complex(sample(4, N), sample(4, N)).conj().imag


COMPUTED = {
    "width 1": (HouseRMSNorm, lambda: sample(4, 1)),
    "rank 0": (HouseRMSNorm, lambda: torch.tensor(3.0)),
    "rank 0, unweighted": (UnweightedRMSNorm, lambda: torch.tensor(3.0)),
    "integers": (HouseRMSNorm, lambda: torch.arange(4 * N).reshape(4, N)),
    "complex": (HouseRMSNorm, lambda: torch.complex(sample(4, N), sample(4, N))),
    "negative bit": (HouseRMSNorm, conjugate_part),
    "zeros without memory": (HouseRMSNorm, lambda: torch._efficientzerotensor((4, N))),
    "nothing": (DefaultRMSNorm, lambda: None),
}


@pytest.mark.parametrize("what", COMPUTED)
@pytest.mark.filterwarnings("ignore:Casting complex values")
def test_a_call_that_this_library_refuses(what):
    kind, make = COMPUTED[what]
    module, original = pair(kind())
    x = make()
    y, expected = module(x), original(x)
    assert y.dtype == expected.dtype and torch.equal(y, expected)


def test_a_refused_call_is_differentiated():
    module, original = pair(HouseRMSNorm())
    for norm in (module, original):
        norm(torch.arange(4 * N).reshape(4, N)).sum().backward()
    assert torch.equal(module.weight.grad, original.weight.grad)


def test_the_next_call_is_computed_here(monkeypatch):
    calls = []
    kernel = rmsnorm.rms_norm
    module, _ = pair(HouseRMSNorm().requires_grad_(False))
    module(torch.tensor(3.0))
    monkeypatch.setattr(rmsnorm, "rms_norm", lambda *a, **k: calls.append(a) or kernel(*a, **k))
    module(sample(4, N))
    assert len(calls) == 1


def test_errors_of_hooks_and_modes_come_out():
    module, _ = pair(HouseRMSNorm())
    packed = []

    def pack(tensor):
        packed.append(tensor)
        raise ValueError("the budget is spent")

    with (
        torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor),
        pytest.raises(ValueError, match="^the budget is spent$"),
    ):
        module(sample(4, N))
    assert len(packed) == 1

    class Refusing(TorchDispatchMode):
        def __torch_dispatch__(self, function, types, args=(), kwargs=None):
            if function.namespace == "rmsnorm":
                raise TypeError(f"{function} is not allowed")
            return function(*args, **(kwargs or {}))

    x = sample(4, N)
    with Refusing(), pytest.raises(TypeError, match=r"rmsnorm.rms_norm.* is not allowed"):
        module(x)


def test_no_argument():
    module, original = pair(DefaultRMSNorm())
    assert torch.equal(module(), original())


def test_a_jagged_tensor():
    module, original = pair(nn.RMSNorm(N))
    x = torch.nested.nested_tensor([sample(3, N), sample(2, N)], layout=torch.jagged)
    assert torch.equal(module(x).values(), original(x).values())


REFUSED_BY_TORCH = {
    "width": ((N,), (4, N - 2)),
    "a multiple of the width": ((N,), (4, 2 * N)),
    "rank": ((2, N), (N,)),
    "no normalized dimension": ((), (4, N)),
}


@pytest.mark.parametrize("compiled", [False, True])
@pytest.mark.parametrize("affine", [False, True])
@pytest.mark.parametrize("what", REFUSED_BY_TORCH)
def test_an_error_of_torch_stays_one(what, affine, compiled):
    normalized_shape, shape = REFUSED_BY_TORCH[what]
    if affine and normalized_shape == ():
        pytest.skip("is left, since its weight has one element")
    module, original = pair(nn.RMSNorm(normalized_shape, elementwise_affine=affine))
    with pytest.raises((RuntimeError, ValueError)) as expected:
        original(sample(*shape))
    if compiled:
        torch._dynamo.reset()  # or shapes of another test make these symbols in the message
        module = torch.compile(module, backend="eager")
    with pytest.raises((RuntimeError, ValueError)) as error:
        module(sample(*shape))
    assert str(expected.value).splitlines()[0] in str(error.value)


@pytest.mark.parametrize("weight", [torch.bfloat16, torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize("x", [torch.bfloat16, torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize("kind", [ByWeightDtypeRMSNorm, T5LayerNorm])
def test_dtypes_by_that_of_the_weight(kind, x, weight):
    module, original = pair(kind(weight))
    x = sample(4, N, dtype=x)
    y, expected = module(x), original(x)
    assert y.dtype == expected.dtype
    torch.testing.assert_close(y, expected, rtol=2e-2 if y.itemsize == 2 else 1e-6, atol=0)
