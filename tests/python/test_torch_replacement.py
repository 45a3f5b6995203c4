"""replace_rms_norms on single modules: every class of transformers, and what it must not break.

A class is taken from the source of transformers alone, since importing a few hundred models takes
minutes: the statement of the class is run with torch's modules at hand. Classes whose source is the
same are tested once.
"""

import contextlib
import functools
import importlib.util
import inspect
import itertools
import pathlib
import re
import types

import cases
import floats
import numpy as np
import pytest
import rmsnorm
import torch
from floats import BF16, F16, F32, assert_same_bits
from rmsnorm.torch import replace_rms_norms
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch_arrays import TORCH, to_numpy, to_torch, torch_rstd

N = 96
CLASS = "Class_under_test"

pytest.importorskip("transformers")

# Classes that have "RMSNorm" in their names or 1 / sqrt of a mean square in their source, and
# nevertheless are left. The gated ones take a gate beside x.
LEFT = {
    "BailingHybridRMSNormGated": "gate",
    "BambaRMSNormGated": "gate",
    "DoryL2Norm": "unknown formula",  # a sum of squares
    "FalconH1RMSNormGated": "gate",
    "Glm5NextTextRMSNormGated": "gate",
    "GradiumPhononTTSTimestepNorm": "unknown formula",  # in the dtype of x throughout
    "GraniteMoeHybridRMSNormGated": "gate",
    "HYV4UnweightedRMSNorm": "unknown formula",  # r alone
    "HYV4VLUnweightedRMSNorm": "unknown formula",  # the same
    "KimiLinearRMSNormGated": "gate",
    "LaraMiniRMSNormGated": "gate",
    "MambaRMSNormGated": "gate",
    "MuseSparkTextCenteredRMSNorm": "unknown formula",  # 1 + w in the dtype of w
    "MuseSparkTextInputScaledRMSNorm": "unknown formula",  # the weight before the norm
    "NemotronHRMSNormGated": "gate",
    "OlmoHybridRMSNormGated": "gate",
    "Qwen3NextRMSNormGated": "gate",
    "Qwen3_5MoeRMSNormGated": "gate",
    "Qwen3_5RMSNormGated": "gate",
    "Qwen4ExpTextRMSNorm": "unknown formula",  # groups
    "Qwen4ExpTextRMSNormGated": "gate",
    "VoxtralRealtimeTextAdaRmsNorm": "modules within",  # no norm
    "Zamba2RMSNormGated": "gate",
}


@functools.cache
def sources():
    """The classes of transformers that may be RMSNorms: source to the names that have it."""
    (folder,) = importlib.util.find_spec("transformers").submodule_search_locations
    statement = re.compile(r"^class (\w+)\((.*)\):\n((?:[ \t].*\n|\n)*)", re.MULTILINE)
    found = {}
    for path in sorted(pathlib.Path(folder, "models").glob("*/modeling_*.py")):
        for name, base, body in statement.findall(path.read_text(encoding="utf-8")):
            mean_square = re.search(r"rsqrt|-0\.5", body) and re.search(r"pow\(2\)|square", body)
            about_mean = re.search(r"- mean|cum_mean|running_var|\.var\(", body)
            plain = base in ("nn.Module", "torch.nn.Module") and "norm" in name.lower()
            if "rmsnorm" in name.lower() or (plain and mean_square and not about_mean):
                source = f"class {name}({base}):\n{body}".replace(name, CLASS)
                found.setdefault(source, []).append(name)
    return found


def build(source, name):
    """A module of the class, of width N."""
    namespace = {"torch": torch, "nn": nn, "__name__": __name__}
    code = "from __future__ import annotations\n" + source.replace(CLASS, name)
    exec(code, namespace)  # noqa: S102  of the installed transformers
    kind = namespace[name]
    # Of classes that ask for more than their width.
    given = {"group_size": N // 2, "config": types.SimpleNamespace(eps=1e-5, hidden_size=N)}
    widths = ("hidden_size", "dim", "num_features")
    names = inspect.signature(kind.__init__).parameters
    arguments = {n: given.get(n, N) for n in names if n in given or n in widths}
    return kind(**arguments)


SOURCES = sources()
# It is built of the model's other classes: a norm, which is looked at by itself, and a gate.
NOT_BUILT = {"AXK2GatedRMSNorm"}
NORMS = [names[0] for names in SOURCES.values() if not LEFT.keys() | NOT_BUILT >= set(names)]
SOURCE_OF = {name: source for source, names in SOURCES.items() for name in names}


def test_which_classes_of_transformers_are_left():
    """All that are not named in this file are replaced."""
    names = [name for group in SOURCES.values() for name in group]
    assert len(names) > 200, "the classes are looked for in vain"
    assert {"LlamaRMSNorm", "T5LayerNorm", "Gemma3RMSNorm", "Llama4TextL2Norm"} <= set(names)
    reasons = {}
    for source, group in SOURCES.items():
        if set(group) <= NOT_BUILT:
            continue
        report = replace_rms_norms(build(source, group[0]))
        assert len(report.replaced) + len(report.left) == 1, group
        reasons.update((name, left.reason) for name in group for left in report.left)
    assert reasons.keys() == LEFT.keys()
    for name, reason in reasons.items():
        assert LEFT[name] in reason


def norm_of_class(name, dtype):
    """A module with weights at random, around those that change nothing."""
    module = build(SOURCE_OF[name], name)
    rng = np.random.default_rng(1)
    around = 0.0 if "torch.zeros(" in SOURCE_OF[name] else 1.0
    with torch.no_grad():
        for parameter in module.parameters():
            values = around + 0.3 * rng.standard_normal(parameter.shape)
            parameter.copy_(to_torch(floats.cast(values, F32)))
    return module.to(dtype)


PAIRS = [(F32, F32), (BF16, BF16), (F16, F16), (BF16, F32), (F32, BF16), (F16, F32), (F16, BF16)]


def assert_same_results(module, source, eps, x):
    """Of a replaced module and its own class: equal in all rows for which torch's root is ours.

    In the others the roots are some ulp apart: each of up to two roundings to half precision may
    flip, one before a weight of less than 2 by two steps, and in f32 eight steps are the bound that
    test_transformers.py explains.
    """
    with torch.no_grad():
        expected = to_numpy(type(module).__mro__[2].forward(module, to_torch(x)))
        y = to_numpy(module(to_torch(x)))
    assert y.dtype == expected.dtype
    _, root = rmsnorm.rms_norm(x, eps=eps, out_dtype=y.dtype, return_rstd=True)
    theirs = torch_rstd(x, eps, by_power="-0.5" in source)[:, 0]
    assert (root == theirs).mean() > 0.2, "too few equal roots for a test"
    assert_same_bits(y[root == theirs], expected[root == theirs])
    steps = floats.steps_between(y, expected)
    if y.dtype == F32 and x.dtype == F32:
        assert steps.max() <= 8
    elif y.dtype == F32:
        scale = np.abs(expected).max()
        assert np.abs(y - expected).max() <= scale * 2.0 ** -(floats.PRECISION[x.dtype] - 1)
        assert (steps > 8).mean() < 0.01
    else:
        assert steps.max() <= 2
        assert (steps > 0).mean() < 0.01


@pytest.mark.parametrize("x_dtype, weight_dtype", PAIRS, ids=str)
@pytest.mark.parametrize("name", NORMS)
def test_forward(name, x_dtype, weight_dtype):
    module = norm_of_class(name, TORCH[weight_dtype])
    (replaced,) = replace_rms_norms(module).replaced
    x = cases.values(np.random.default_rng(0), (64, N), x_dtype)
    assert_same_results(module, SOURCE_OF[name], replaced.eps, x)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize("name", NORMS)
def test_gradients(name, dtype):
    """In f32, in which most classes compute f64 too."""
    module = norm_of_class(name, dtype)
    x = torch.randn(2, 5, N, dtype=dtype, generator=torch.Generator().manual_seed(0))
    dy = torch.randn(2, 5, N, dtype=dtype, generator=torch.Generator().manual_seed(1))

    def gradients():
        inputs = [x.clone().requires_grad_(), *module.parameters()]
        return torch.autograd.grad(module(inputs[0]), inputs, dy)

    expected = gradients()
    assert replace_rms_norms(module).replaced
    for ours, theirs in zip(gradients(), expected, strict=True):
        assert ours.dtype == theirs.dtype
        torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-5)


@contextlib.contextmanager
def cuda_autocast():
    """torch.autocast would look for a device."""
    torch.set_autocast_enabled("cuda", True)
    try:
        yield
    finally:
        torch.set_autocast_enabled("cuda", False)


@pytest.mark.parametrize("name", NORMS)
def test_dtypes_under_autocast(name):
    """That of CUDA, which changes torch's own function and leaves the operations of models."""
    original, replaced = norm_of_class(name, torch.float32), norm_of_class(name, torch.float32)
    assert replace_rms_norms(replaced).replaced
    for x_dtype, dtype in itertools.product(TORCH.values(), TORCH.values()):
        with FakeTensorMode(), cuda_autocast():
            x = torch.empty(3, N, dtype=x_dtype, device="cuda")
            for module in (original, replaced):
                for parameter in module._parameters:
                    without_storage = torch.empty(N, dtype=dtype, device="cuda")
                    module._parameters[parameter] = nn.Parameter(without_storage, False)
            assert replaced(x).dtype == original(x).dtype
