"""rmsnorm.torch under autocast: the dtypes of torch's own function, and of each model's operations.

CUDA's autocast is seen on tensors that say to be there and have no storage.
"""

import contextlib
import itertools

import pytest
import rmsnorm.torch
import torch
from rmsnorm.torch import replace_rms_norms
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.nn import functional

N = 8
HALF = (torch.float16, torch.bfloat16)
DTYPES = (*HALF, torch.float32, torch.float64)
PAIRS = list(itertools.product(DTYPES, (None, *DTYPES)))


@contextlib.contextmanager
def autocast(device="cuda", dtype=torch.bfloat16, enabled=True):
    """torch.autocast would look for a device."""
    before = torch.is_autocast_enabled(device), torch.get_autocast_dtype(device)
    torch.set_autocast_enabled(device, enabled)
    torch.set_autocast_dtype(device, dtype)
    try:
        yield
    finally:
        torch.set_autocast_enabled(device, before[0])
        torch.set_autocast_dtype(device, before[1])


def tensors(x_dtype, weight_dtype, device="cuda"):
    x = torch.empty(3, N, dtype=x_dtype, device=device)
    weight = None if weight_dtype is None else torch.empty(N, dtype=weight_dtype, device=device)
    return x, weight


def result_dtype(norm, x, weight):
    """Of a module that is given a weight without storage, which needs no gradient."""
    norm._parameters["weight"] = None if weight is None else nn.Parameter(weight, False)
    return norm(x).dtype


@pytest.mark.filterwarnings("ignore:Mismatch dtype")
@pytest.mark.parametrize("autocast_dtype", HALF, ids=str)
@pytest.mark.parametrize("device", ["cuda", "cpu"])
def test_dtypes_are_torchs(device, autocast_dtype):
    for enabled, pair in itertools.product((True, False), PAIRS):
        with FakeTensorMode(), autocast(device, autocast_dtype, enabled):
            x, weight = tensors(*pair, device)
            expected = functional.rms_norm(x, (N,), weight).dtype
            assert rmsnorm.torch.rms_norm(x, N, weight).dtype == expected, pair
            if enabled and device == "cuda" and x.dtype in HALF:
                assert expected == torch.float32, "nothing to test in this torch"


@pytest.mark.filterwarnings("ignore:Mismatch dtype")
@pytest.mark.parametrize("pair", PAIRS, ids=str)
def test_modules_are_torchs(pair):
    theirs, ours, replaced = nn.RMSNorm(N), rmsnorm.torch.RMSNorm(N), nn.RMSNorm(N)
    assert replace_rms_norms(replaced).replaced
    with FakeTensorMode(), autocast():
        x, weight = tensors(*pair)
        expected = result_dtype(theirs, x, weight)
        assert result_dtype(ours, x, weight) == result_dtype(replaced, x, weight) == expected


def test_the_other_device_and_other_functions_are_left_alone():
    with FakeTensorMode():
        x, _ = tensors(torch.bfloat16, None)
        on_cpu = torch.empty(3, N, dtype=torch.bfloat16)
        with autocast("cuda"):
            assert rmsnorm.torch.rms_norm(on_cpu, N).dtype == torch.bfloat16
            y, residual = rmsnorm.torch.add_rms_norm(x, x, N)
            assert y.dtype == residual.dtype == torch.bfloat16
            for dtype in DTYPES:
                assert rmsnorm.torch.rms_norm(x, N, out_dtype=dtype).dtype == dtype
            with autocast(enabled=False):
                assert rmsnorm.torch.rms_norm(x, N).dtype == torch.bfloat16
        with autocast("cpu"):
            assert rmsnorm.torch.rms_norm(x, N).dtype == torch.bfloat16


def test_compiled_code_is_guarded_by_autocast():
    with FakeTensorMode():
        x, _ = tensors(torch.bfloat16, None)
        compiled = torch.compile(
            lambda x: rmsnorm.torch.rms_norm(x, N), fullgraph=True, backend="eager"
        )
        for enabled in (False, True, False):
            with autocast(enabled=enabled):
                assert compiled(x).dtype == (torch.float32 if enabled else torch.bfloat16)


@pytest.mark.parametrize("dtype", HALF, ids=str)
def test_values_and_gradients_are_those_of_a_cast(dtype):
    """Autocast casts the tensors of torch's function; here only the dtype of the result differs."""
    generator = torch.Generator().manual_seed(0)
    x, weight, dy = (torch.randn(s, generator=generator) for s in ((64, 40), (40,), (64, 40)))
    leaves = [x.to(dtype).requires_grad_(), weight.to(dtype).requires_grad_()]
    ours = rmsnorm.torch.rms_norm(leaves[0], 40, leaves[1], out_dtype=torch.float32)
    cast = rmsnorm.torch.rms_norm(leaves[0].float(), 40, leaves[1].float())
    assert ours.dtype == torch.float32 and torch.equal(ours, cast)
    for a, b in zip(*(torch.autograd.grad(y, leaves, dy) for y in (ours, cast))):
        assert a.dtype == b.dtype == dtype and torch.equal(a, b)


# Modules, each in its own operations.


def _rstd(x):
    return torch.rsqrt(x.float().pow(2).mean(-1, keepdim=True) + 1e-6)


FORWARDS = {
    "before weight": lambda self, x: self.weight * (x.float() * _rstd(x)).to(x.dtype),
    "once": lambda self, x: (self.weight.float() * (x.float() * _rstd(x))).to(x.dtype),
    "around zero": lambda self, x: (x.float() * _rstd(x) * (1 + self.weight.float())).to(x.dtype),
    "unweighted": lambda self, x: (x.float() * _rstd(x)).to(x.dtype),
    "of rstd": lambda self, x: x * _rstd(x).to(x.dtype),
    "by weight dtype": lambda self, x: (
        self.weight
        * (
            (x.float() * _rstd(x)).to(self.weight.dtype)
            if self.weight.dtype in HALF
            else x.float() * _rstd(x)
        )
    ),
    "torch's": lambda self, x: functional.rms_norm(x, (N,), self.weight, 1e-6),
    "torch's without weight": lambda self, x: functional.rms_norm(x, (N,)),
    "torch's before weight": lambda self, x: functional.rms_norm(x, (N,)) * self.weight,
    "torch's and back": lambda self, x: functional.rms_norm(x, (N,), self.weight).to(x.dtype),
}


def _with_autocast_disabled(self, x):
    with torch.autocast(x.device.type, enabled=False):
        return functional.rms_norm(x, (N,), self.weight)


FORWARDS["torch's, autocast disabled"] = _with_autocast_disabled


class Parent(nn.Module):
    def __init__(self):
        super().__init__()
        self.weight = nn.Parameter(torch.ones(N))


@pytest.mark.filterwarnings("ignore:Mismatch dtype")
@pytest.mark.parametrize("name", FORWARDS)
def test_replaced_modules_keep_their_dtypes(name):
    kind = type("SomeRMSNorm", (Parent,), {"forward": FORWARDS[name]})
    original, replaced = kind(), kind()
    report = replace_rms_norms(replaced)
    assert len(report.replaced) == 1, str(report)
    for x_dtype, dtype, enabled in itertools.product(DTYPES[:3], DTYPES[:3], (True, False)):
        with FakeTensorMode(), autocast(enabled=enabled):
            x, weight = tensors(x_dtype, dtype)
            expected = result_dtype(original, x, weight)
            assert result_dtype(replaced, x, weight) == expected, (x_dtype, dtype, enabled)
