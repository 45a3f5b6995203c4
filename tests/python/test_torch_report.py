"""replace_rms_norms: what is left and why, the report, undoing, and what keeps working."""

import copy
import pickle
import re

import pytest
import rmsnorm.torch
import torch
from rmsnorm.torch import replace_rms_norms
from torch import nn
from torch.nn.utils import parametrize

N = 32


class HouseRMSNorm(nn.Module):
    """A norm of no model, in a spelling of its own: w * T(x32 * r)."""

    def __init__(self, n=N, epsilon=1e-4):
        super().__init__()
        self.gain = nn.Parameter(torch.linspace(0.5, 1.5, n))
        self.epsilon = epsilon

    def forward(self, tensor):
        wide = tensor.to(torch.float)
        mean_square = (wide * wide).mean(dim=[-1], keepdim=True)
        return (mean_square.add(self.epsilon).rsqrt() * wide).type(tensor.dtype) * self.gain


class Block(nn.Module):
    def __init__(self):
        super().__init__()
        self.norms = nn.ModuleList(HouseRMSNorm() for _ in range(3))
        self.linear = nn.Linear(N, N)
        self.final_norm = nn.RMSNorm(N, eps=1e-5)
        self.layer_norm = nn.LayerNorm(N)

    def forward(self, x):
        for norm in self.norms:
            x = x + self.linear(norm(x))
        return self.layer_norm(self.final_norm(x))


def sample(*shape, dtype=torch.float32):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(0)).to(dtype)


def assert_close(a, b):
    assert a.dtype == b.dtype
    torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-5)


def test_report():
    model = Block()
    report = replace_rms_norms(model)
    assert [n.name for n in report.replaced] == ["norms.0", "norms.1", "norms.2", "final_norm"]
    assert [n.module for n in report.replaced] == [*model.norms, model.final_norm]
    house, torchs = report.replaced[0], report.replaced[-1]
    assert (house.kind, house.formula, house.eps) == ("HouseRMSNorm", "w * T(x32 * r)", 1e-4)
    assert (torchs.kind, torchs.formula, torchs.eps) == ("RMSNorm", "T(w * (x32 * r))", 1e-5)
    assert report.left == ()
    assert str(report).splitlines() == [
        "4 norms replaced, 0 left",
        "  3 HouseRMSNorm: w * T(x32 * r), eps=0.0001 (norms.*)",
        "  1 RMSNorm: T(w * (x32 * r)), eps=1e-05 (final_norm)",
    ]

    again = replace_rms_norms(model)
    assert again.replaced == ()
    assert {n.reason for n in again.left} == {"it was replaced before"}
    assert str(again).startswith("0 norms replaced, 4 left\n  3 HouseRMSNorm left: it was")


def test_undo():
    model, x = Block(), sample(5, N)
    expected = model(x)
    report = replace_rms_norms(model)
    assert isinstance(model.norms[0], HouseRMSNorm)
    report.undo()
    assert type(model.norms[0]) is HouseRMSNorm and type(model.final_norm) is nn.RMSNorm
    assert torch.equal(model(x), expected)
    report.undo()
    assert replace_rms_norms(model).left == ()


def test_undone_at_the_end_of_a_block():
    model = Block()
    with pytest.raises(RuntimeError, match="in the block"), replace_rms_norms(model) as report:
        assert len(report.replaced) == 4
        assert type(model.norms[0]) is not HouseRMSNorm
        raise RuntimeError("in the block")
    assert type(model.norms[0]) is HouseRMSNorm


def test_the_model_itself_may_be_a_norm():
    norm = HouseRMSNorm()
    (replaced,) = replace_rms_norms(norm).replaced
    assert (replaced.name, replaced.module) == ("", norm)


def test_model_must_be_a_module():
    with pytest.raises(TypeError, match=r"model: expected a torch\.nn\.Module, got dict"):
        replace_rms_norms({})


def test_parameters_state_and_hooks_stay():
    model, x = Block(), sample(5, N)
    seen = []
    model.norms[1].register_forward_hook(lambda module, args, y: seen.append(y))
    parameters, text = dict(model.named_parameters()), repr(model)
    replace_rms_norms(model)
    assert repr(model) == text
    assert all(p is parameters[name] for name, p in model.named_parameters())
    model(x).square().sum().backward()
    assert len(seen) == 1
    assert all(p.grad is not None for p in model.parameters())
    state = Block().state_dict()
    model.load_state_dict(state)
    expected = Block()
    expected.load_state_dict(state)
    assert_close(model(x), expected(x))
    other = Block()
    swapped = torch.func.functional_call(model, dict(other.named_parameters()), (x,))
    assert_close(swapped, other(x))


def test_the_kernels_are_called(monkeypatch):
    calls = []
    original = rmsnorm.rms_norm
    monkeypatch.setattr(rmsnorm, "rms_norm", lambda *a, **k: calls.append(a) or original(*a, **k))
    model = Block().requires_grad_(False)
    with replace_rms_norms(model):
        model(sample(5, N))
    assert len(calls) == 4
    model(sample(5, N))
    assert len(calls) == 4


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64], ids=str)
def test_moved_to_another_dtype(dtype):
    model, reference = Block(), Block()
    reference.load_state_dict(model.state_dict())
    replace_rms_norms(model)
    y, expected = (
        model.to(dtype)(sample(5, N, dtype=dtype)),
        reference.to(dtype)(sample(5, N, dtype=dtype)),
    )
    assert y.dtype == expected.dtype == dtype
    tolerance = 16 * torch.finfo(dtype).eps if dtype != torch.float64 else 1e-6
    torch.testing.assert_close(y, expected, rtol=tolerance, atol=tolerance)


@pytest.mark.parametrize(
    "duplicate",
    [
        copy.deepcopy,
        lambda model: pickle.loads(pickle.dumps(model)),
        lambda model: pickle.loads(pickle.dumps(model, protocol=0)),
    ],
    ids=["deepcopy", "pickle", "pickle protocol 0"],
)
def test_copies_are_replaced_too(duplicate):
    model, x = Block(), sample(5, N)
    replace_rms_norms(model)
    twin = duplicate(model)
    assert type(twin.norms[0]) is type(model.norms[0])
    assert torch.equal(twin(x), model(x))
    with torch.no_grad():
        twin.norms[0].gain.zero_()
    assert not torch.equal(twin(x), model(x)), "the copy has parameters of its own"


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_compile_in_one_graph(dtype):
    """One compiled forward for modules that differ in eps and formula would be wrong."""
    model = Block().to(dtype)
    model.norms[1].epsilon = 3.0
    x = sample(5, N, dtype=dtype)
    replace_rms_norms(model)
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    assert torch.equal(compiled(x), model(x))
    norms = [torch.compile(norm, fullgraph=True, backend="aot_eager") for norm in model.norms]
    for compiled, norm in zip(norms, model.norms):
        assert torch.equal(compiled(x), norm(x))


def test_export():
    model, x = Block(), sample(5, N)
    replace_rms_norms(model)
    program = torch.export.export(model, (x,))
    assert "torch.ops.rmsnorm.rms_norm" in program.graph_module.code
    assert torch.equal(program.module()(x), model(x))


def test_argument_by_name():
    norm, x = HouseRMSNorm(), sample(5, N)
    expected = norm(x)
    replace_rms_norms(norm)
    assert_close(norm(tensor=x), expected)
    for arguments, named in [((), {}), ((x, x), {}), ((), {"x": x}), ((x,), {"tensor": x})]:
        with pytest.raises(TypeError, match=r"HouseRMSNorm\.forward\(\)"):
            norm(*arguments, **named)


@pytest.mark.parametrize("shape", [(N,), (4, N)], ids=str)
@pytest.mark.parametrize("eps", [None, 0.1])
@pytest.mark.parametrize("affine", [True, False])
def test_rms_norm_of_torch(shape, eps, affine):
    norm = nn.RMSNorm(shape, eps=eps, elementwise_affine=affine)
    if affine:
        nn.init.normal_(norm.weight)
    x = 1e-3 * sample(3, 4, N)
    expected = norm(x)
    (replaced,) = replace_rms_norms(norm).replaced
    assert replaced.eps == eps
    assert_close(norm(x), expected)


def test_weight_and_bias():
    xlstm = pytest.importorskip("transformers.models.xlstm.modeling_xlstm")
    norm = xlstm.xLSTMRMSNorm(N, use_bias=True).bfloat16()
    nn.init.normal_(norm.weight)
    nn.init.normal_(norm.bias)
    x = sample(64, N, dtype=torch.bfloat16)
    expected = norm(x)
    (replaced,) = replace_rms_norms(norm).replaced
    assert replaced.formula == "w * T(x32 * r) + b"
    y = norm(x)
    assert (y != expected).float().mean() < 0.01
    torch.testing.assert_close(y, expected, rtol=0.02, atol=0.02)


def test_options_of_a_module_count():
    """The same class may compute different formulas."""
    xlstm = pytest.importorskip("transformers.models.xlstm.modeling_xlstm")
    gemma = pytest.importorskip("transformers.models.gemma3n.modeling_gemma3n")
    norms = nn.ModuleList(
        [
            gemma.Gemma3nRMSNorm(N),
            gemma.Gemma3nRMSNorm(N, with_scale=False),
            gemma.Gemma3nRMSNorm(N, eps=0.5),
            xlstm.xLSTMRMSNorm(N),
            xlstm.xLSTMRMSNorm(N, use_weight=False),
            xlstm.xLSTMRMSNorm(N, force_float32_reductions=False),
        ]
    )
    report = replace_rms_norms(norms)
    assert [(n.formula, n.eps) for n in report.replaced] == [
        ("T(w * (x32 * r))", 1e-6),
        ("T(x32 * r)", 1e-6),
        ("T(w * (x32 * r))", 0.5),
        ("w * T(x32 * r)", 1e-6),
        ("T(x32 * r)", 1e-6),
    ]
    assert [n.name for n in report.left] == ["5"]


class Parent(nn.Module):
    def __init__(self):
        super().__init__()
        self.weight = nn.Parameter(torch.ones(N))
        self.register_buffer("scale", torch.ones(()))


def _rstd(x):
    return torch.rsqrt(x.float().pow(2).mean(-1, keepdim=True) + 1e-6)


# Each of these is one step away from a formula that is known.
def _other_axis(self, x):
    mean_square = x.float().pow(2).mean(0, keepdim=True)
    return self.weight * (x.float() * torch.rsqrt(mean_square + 1e-6)).to(x.dtype)


def _sum(self, x):
    square = x.float().pow(2).sum(-1, keepdim=True)
    return self.weight * (x.float() * torch.rsqrt(square + 1e-6)).to(x.dtype)


def _eps_outside(self, x):
    rstd = torch.rsqrt(x.float().pow(2).mean(-1, keepdim=True)) + 1e-6
    return self.weight * (x.float() * rstd).to(x.dtype)


def _in_own_dtype(self, x):
    return self.weight * x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + 1e-6)


def _weight_before_root(self, x):
    return ((self.weight.float() * x.float()) * _rstd(x)).to(x.dtype)


def _offset_of_two(self, x):
    return ((x.float() * _rstd(x)) * (2.0 + self.weight.float())).to(x.dtype)


def _offset_in_own_dtype(self, x):
    return ((x.float() * _rstd(x)) * (1.0 + self.weight)).to(x.dtype)


def _always_half(self, x):
    return self.weight * (x.float() * _rstd(x)).to(torch.bfloat16)


def _wide_result(self, x):
    return self.weight.float() * (x.float() * _rstd(x)).to(x.dtype)


def _weight_twice(self, x):
    return self.weight * self.weight * (x.float() * _rstd(x)).to(x.dtype)


def _in_place(self, x):
    return x.copy_(self.weight * (x.float() * _rstd(x)).to(x.dtype))


def _in_training(self, x):
    y = self.weight * (x.float() * _rstd(x)).to(x.dtype)
    return y + y if self.training else y


def _in_evaluation(self, x):
    y = self.weight * (x.float() * _rstd(x)).to(x.dtype)
    return y if self.training else y + y


def _by_rank(self, x):
    y = self.weight * (x.float() * _rstd(x)).to(x.dtype)
    return y if x.dim() == 3 else y + y


def _by_dtype(self, x):
    y = self.weight * (x.float() * _rstd(x)).to(x.dtype)
    return y + y if x.dtype == torch.float16 else y


def _with_buffer(self, x):
    return self.weight * (x.float() * _rstd(x)).to(x.dtype) * self.scale


def _by_value(self, x):
    return x if x.abs().max() < 1 else self.weight * (x.float() * _rstd(x)).to(x.dtype)


def _two_results(self, x):
    return self.weight * (x.float() * _rstd(x)).to(x.dtype), x


def _two_arguments(self, x, scale=None):
    return self.weight * (x.float() * _rstd(x)).to(x.dtype)


def _any_arguments(self, *x):
    return self.weight * (x[0].float() * _rstd(x[0])).to(x[0].dtype)


CHANGED = {
    _other_axis: "unknown formula",
    _sum: "unknown formula",
    _eps_outside: "unknown formula",
    _in_own_dtype: "unknown formula",
    _weight_before_root: "unknown formula",
    _offset_of_two: "unknown formula",
    _offset_in_own_dtype: "unknown formula",
    _always_half: "unknown formula",
    _wide_result: "unknown formula",
    _weight_twice: "unknown formula",
    _in_place: "writes to its input",
    _in_training: "something else in training",
    _in_evaluation: "something else in training",
    _by_rank: "something else for x of another rank",
    _by_dtype: "unknown formula",
    _with_buffer: "tensors beside its input and parameters",
    _by_value: "cannot be traced",
    _two_results: "something else than a tensor",
    _two_arguments: "other arguments than x: x, scale",
    _any_arguments: "other arguments than x",
}


@pytest.mark.parametrize("forward", CHANGED, ids=lambda f: f.__name__.strip("_"))
def test_a_changed_formula_is_left(forward):
    norm = type("ChangedRMSNorm", (Parent,), {"forward": forward})()
    state = {name: value.clone() for name, value in norm.state_dict().items()}
    report = replace_rms_norms(norm)
    assert report.replaced == ()
    (left,) = report.left
    assert left.kind == "ChangedRMSNorm" and CHANGED[forward] in left.reason
    assert all(torch.equal(norm.state_dict()[name], value) for name, value in state.items())
    assert vars(norm).keys() == vars(Parent()).keys()


def _with_own_forward():
    norm = HouseRMSNorm()
    norm.forward = lambda x: x
    return norm


class TwoRowsRMSNorm(HouseRMSNorm):
    def __init__(self):
        super().__init__()
        self.gain = nn.Parameter(torch.ones(2, N))


class Scaled(nn.Parameter):
    pass


def _with_parameter(parameter):
    norm = HouseRMSNorm()
    norm.gain = parameter
    return norm


UNUSUAL = {
    "replaced forward": (_with_own_forward, "replaced by somebody else"),
    "2-D weight": (TwoRowsRMSNorm, r"of shape \(2, 32\)"),
    "parametrization": (
        lambda: parametrize.register_parametrization(HouseRMSNorm(), "gain", nn.Identity()),
        "modules within",
    ),
    "kind of parameter": (lambda: _with_parameter(Scaled(torch.ones(N))), "gain is a Scaled"),
    "dtype": (
        lambda: _with_parameter(nn.Parameter(torch.ones(N).to(torch.float8_e4m3fn), False)),
        "gain is of dtype float8_e4m3fn",
    ),
    "ours": (lambda: rmsnorm.torch.RMSNorm(N), "this library's"),
}


@pytest.mark.parametrize("what", UNUSUAL)
def test_an_unusual_module_is_left(what):
    make, reason = UNUSUAL[what]
    report = replace_rms_norms(make())
    assert report.replaced == ()
    (left,) = report.left
    assert re.search(reason, left.reason)


def test_a_device_without_kernels():
    """A model may be on the meta device, to be loaded later; else its device has to be known."""
    (replaced,) = replace_rms_norms(HouseRMSNorm().to("meta")).replaced
    replaced.module.to_empty(device="cpu")
    nn.init.ones_(replaced.module.gain)
    assert_close(replaced.module(sample(5, N)), HouseRMSNorm.forward(replaced.module, sample(5, N)))


def test_other_norms_are_not_mentioned():
    model = nn.Sequential(nn.LayerNorm(N), nn.GroupNorm(4, N), nn.BatchNorm1d(N), nn.Linear(N, N))
    report = replace_rms_norms(model)
    assert report.replaced == () and report.left == ()
    assert str(report) == "0 norms replaced, 0 left"


# Classes that say themselves how they are copied and pickled.


class Rebuilt(HouseRMSNorm):
    """By a function, which makes one of the class."""

    def __reduce__(self):
        return rebuilt, ()


class RebuiltWithState(HouseRMSNorm):
    def __reduce__(self):
        return rebuilt, (RebuiltWithState.__name__,), vars(self)


class Called(HouseRMSNorm):
    """By its own class, whichever it is."""

    def __reduce__(self):
        return type(self), (N,), vars(self)


class CalledWithArguments(HouseRMSNorm):
    def __reduce__(self):
        return type(self), (N, self.epsilon)


class Named(HouseRMSNorm):
    """By the name of a global."""

    def __reduce__(self):
        return "NAMED"


def rebuilt(name="Rebuilt"):
    return globals()[name]()


NAMED = Named()


@pytest.mark.parametrize("duplicate", [copy.deepcopy, lambda m: pickle.loads(pickle.dumps(m))])
@pytest.mark.parametrize("kind", [Rebuilt, RebuiltWithState, Called, CalledWithArguments, Named])
def test_classes_with_a_reduce_of_their_own(kind, duplicate):
    norm, x = NAMED if kind is Named else kind(), sample(5, N)
    expected = norm(x)
    with replace_rms_norms(norm):
        twin = duplicate(norm)
        assert (twin is norm) == (kind is Named)
        assert_close(twin(x), expected)
    if twin is not norm:
        keeps_its_class = kind in (Called, CalledWithArguments)
        assert isinstance(twin, kind) and (type(twin) is not kind) == keeps_its_class
        again = replace_rms_norms(twin)
        assert len(again.left) == (kind is Called), "a copy is replaced if its state is copied"
