"""Report.undo takes away what replace_rms_norms put there, beneath what others have put on it."""

import copy
import subprocess
import sys

import pytest
import rmsnorm.torch
import torch
from rmsnorm.torch import replace_rms_norms
from torch import nn
from torch.nn.utils import parametrizations, parametrize

N = 32


class HouseRMSNorm(nn.Module):
    def __init__(self):
        super().__init__()
        self.weight = nn.Parameter(torch.linspace(0.5, 1.5, N))

    def forward(self, x):
        wide = x.float()
        rstd = torch.rsqrt(wide.square().mean(-1, keepdim=True) + 1e-5)
        return self.weight * (wide * rstd).to(x.dtype)


class Doubled(nn.Module):
    def forward(self, weight):
        return 2 * weight


@pytest.fixture
def calls(monkeypatch):
    """Those of the library's kernels."""
    seen = []
    original = rmsnorm.rms_norm
    monkeypatch.setattr(rmsnorm, "rms_norm", lambda *a, **k: seen.append(a) or original(*a, **k))
    return seen


def sample():
    return torch.randn(5, N, generator=torch.Generator().manual_seed(0))


class Watched:
    """A replaced module, which is asked whether this library computes it."""

    def __init__(self, calls, module=None):
        self.module = HouseRMSNorm() if module is None else module
        self.report = replace_rms_norms(self.module)
        assert len(self.report.replaced) == 1, str(self.report)
        self._calls = calls

    def is_ours(self):
        self._calls.clear()
        with torch.no_grad():
            self.result = self.module(sample())
        return len(self._calls) == 1

    def undo(self):
        """Undoes with the module in use as it is, and sees that its results stay."""
        assert self.is_ours()
        before = self.result
        self.report.undo()
        assert not self.is_ours()
        torch.testing.assert_close(self.result, before)


PUT_ON = {
    "parametrization": lambda m: parametrize.register_parametrization(m, "weight", Doubled()),
    "weight_norm": lambda m: parametrizations.weight_norm(m),
    "spectral_norm": lambda m: parametrizations.spectral_norm(m),
    "weight_norm of old": lambda m: torch.nn.utils.weight_norm(m),
    "spectral_norm of old": lambda m: torch.nn.utils.spectral_norm(m),
    "hook": lambda m: m.register_forward_hook(lambda module, args, y: 3 * y),
}


@pytest.mark.filterwarnings("ignore:.*weight_norm. is deprecated")
@pytest.mark.parametrize("what", PUT_ON)
def test_what_was_put_on_since_stays(what, calls):
    watched = Watched(calls)
    PUT_ON[what](watched.module.eval())
    kind = type(watched.module)
    watched.undo()
    if issubclass(kind, HouseRMSNorm) and "Parametrized" in kind.__name__:
        assert type(watched.module) is kind
    else:
        assert type(watched.module) is HouseRMSNorm


def test_a_parametrization_is_removed_after_undo(calls):
    """It gives the module the class back that it found, which is then one without effect."""
    watched = Watched(calls, nn.RMSNorm((5, N)))
    parametrize.register_parametrization(watched.module, "weight", Doubled())
    watched.undo()
    assert replace_rms_norms(watched.module).left[0].reason == "it has modules within"
    parametrize.remove_parametrizations(watched.module, "weight")
    assert not watched.is_ours()
    again = Watched(calls, watched.module)
    again.undo()
    assert type(watched.module) is nn.RMSNorm


def test_a_parametrization_beneath():
    """It could not be removed from a class derived from the one that it made."""
    norm = parametrize.register_parametrization(nn.RMSNorm(N), "weight", Doubled())
    (left,) = replace_rms_norms(norm).left
    assert left.reason == "it has modules within"
    parametrize.remove_parametrizations(norm, "weight")
    assert type(norm) is nn.RMSNorm


def test_copies_with_a_parametrization(calls):
    watched = Watched(calls)
    parametrize.register_parametrization(watched.module, "weight", Doubled())
    twin = copy.deepcopy(watched.module)
    watched.undo()
    assert type(twin) is type(watched.module)
    watched.module = twin
    assert watched.is_ours(), "a copy is not undone"


def test_a_class_derived_from_the_replaced_one(calls):
    watched = Watched(calls)
    ours = type(watched.module)

    class Tripled(ours):
        def forward(self, x):
            return 3 * super().forward(x)

    watched.module.__class__ = Tripled
    watched.undo()
    assert type(watched.module) is Tripled
    with replace_rms_norms(watched.module) as report:  # a forward that multiplies is no norm
        assert "unknown formula: mul" in report.left[0].reason


def test_a_class_that_somebody_gave_instead(calls):
    watched = Watched(calls)
    watched.module.__class__ = nn.Identity
    watched.report.undo()
    assert type(watched.module) is nn.Identity
    assert vars(watched.module).keys() == vars(HouseRMSNorm()).keys()


def test_a_forward_that_keeps_the_replaced_one(calls):
    watched = Watched(calls)
    kept = watched.module.forward
    watched.module.forward = lambda x: kept(x) + 1
    watched.undo()
    del watched.module.forward
    with replace_rms_norms(watched.module):
        assert watched.is_ours()
        calls.clear()
        kept(sample())
        assert len(calls) == 1


def test_only_the_own_replacement(calls):
    watched = Watched(calls)
    with replace_rms_norms(watched.module) as within:
        assert within.replaced == ()
    assert watched.is_ours(), "undone by the report that replaced nothing"
    watched.undo()
    again = Watched(calls, watched.module)
    watched.report.undo()
    assert again.is_ours(), "undone by the report of an earlier replacement"
    again.undo()


def test_compiled_modules_are_undone(calls):
    watched = Watched(calls)
    module = watched.module
    watched.module = torch.compile(module, fullgraph=True, backend="eager")
    assert watched.is_ours()
    watched.undo()
    assert type(module) is HouseRMSNorm


def test_one_compilation_for_equal_norms():
    from torch._dynamo.testing import CompileCounter

    torch._dynamo.reset()
    counter = CompileCounter()
    norms = [HouseRMSNorm() for _ in range(3)]
    for norm in norms:
        replace_rms_norms(norm)
    for norm in (*norms, *copy.deepcopy(norms)):
        torch.compile(norm, fullgraph=True, backend=counter)(sample())
    assert counter.frame_count == 1


def test_fsdp():
    """fully_shard gives a module a class of its own."""
    code = f"""
import sys
import torch
import torch.distributed as dist
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import FSDPModule, fully_shard
sys.path.insert(0, {sys.path[0]!r})
import rmsnorm.torch
from test_torch_undo import HouseRMSNorm, Watched, replace_rms_norms, sample

dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
calls, original = [], rmsnorm.rms_norm
rmsnorm.rms_norm = lambda *a, **k: calls.append(a) or original(*a, **k)
watched = Watched(calls)
fully_shard(watched.module, mesh=init_device_mesh("cpu", (1,)))
kind = type(watched.module)
assert kind.__name__ == "FSDPHouseRMSNorm"
watched.undo()
assert type(watched.module) is kind and isinstance(watched.module, FSDPModule)
watched.module(sample()).sum().backward()
assert watched.module.weight.grad is not None
watched.module.reshard()
(left,) = replace_rms_norms(watched.module).left
assert left.reason == "weight is a DTensor"
dist.destroy_process_group()
"""
    subprocess.run([sys.executable, "-c", code], check=True, timeout=300)


# accelerate gives a module a forward of its own, around the one that it found.


def hooks():
    return pytest.importorskip("accelerate.hooks")


def counting_hook():
    class Counting(hooks().ModelHook):
        seen = 0

        def pre_forward(self, module, *args, **kwargs):
            self.seen += 1
            return args, kwargs

    return Counting()


def test_a_hook_beneath_and_one_on_top(calls):
    beneath, on_top = counting_hook(), counting_hook()
    module = HouseRMSNorm()
    hooks().add_hook_to_module(module, beneath)
    watched = Watched(calls, module)
    hooks().add_hook_to_module(module, on_top, append=True)
    watched.undo()
    assert beneath.seen == on_top.seen == 2
    assert type(module) is HouseRMSNorm
    assert module._old_forward == HouseRMSNorm.forward.__get__(module)


@pytest.mark.parametrize("hook_is_first", [True, False])
@pytest.mark.parametrize("removed_before_undo", [True, False])
def test_a_hook_that_is_removed(hook_is_first, removed_before_undo, calls):
    module = HouseRMSNorm()
    if hook_is_first:
        hooks().add_hook_to_module(module, counting_hook())
    watched = Watched(calls, module)
    if not hook_is_first:
        hooks().add_hook_to_module(module, counting_hook())
    if removed_before_undo:
        hooks().remove_hook_from_module(module)
    watched.undo()
    hooks().remove_hook_from_module(module)
    assert not watched.is_ours()
    assert module.forward == HouseRMSNorm.forward.__get__(module)
    Watched(calls, module).undo()


def test_a_forward_of_somebody_else_beneath_the_hook():
    module = HouseRMSNorm()
    module.forward = lambda x: x
    hooks().add_hook_to_module(module, counting_hook())
    (left,) = replace_rms_norms(module).left
    assert left.reason == "its forward was replaced by somebody else"


@pytest.mark.parametrize("how", ["dispatch_model", "cpu_offload", "disk_offload"])
def test_models_that_accelerate_dispatches(how, calls, tmp_path):
    accelerate = pytest.importorskip("accelerate")
    model = nn.Sequential(HouseRMSNorm(), nn.Linear(N, N), nn.RMSNorm(N))
    expected = model(sample())
    if how == "dispatch_model":
        accelerate.dispatch_model(model, {"": "cpu"}, force_hooks=True)
    elif how == "cpu_offload":
        accelerate.cpu_offload(model, execution_device=torch.device("cpu"))
    else:
        accelerate.disk_offload(model, str(tmp_path), execution_device=torch.device("cpu"))
    offloaded = how != "dispatch_model"
    assert model[0].weight.is_meta == offloaded
    with replace_rms_norms(model) as report:
        assert len(report.replaced) == 2 and report.left == ()
        torch.testing.assert_close(model(sample()), expected)
        assert len(calls) == 2
        assert model[0].weight.is_meta == offloaded, "not loaded, or left in memory"
    assert torch.equal(model(sample()), expected)
    assert len(calls) == 2


# Another import of the package, whose functions and classes are not those of the first one.


def in_a_process(code):
    start = f"""
import copy, importlib, pickle, sys
sys.path.insert(0, {sys.path[0]!r})
import rmsnorm.torch as first
from test_torch_undo import HouseRMSNorm, sample

norm, x = HouseRMSNorm(), sample()
expected = norm(x)
report = first.replace_rms_norms(norm)
"""
    subprocess.run([sys.executable, "-c", start + code], check=True)


@pytest.mark.parametrize("undone_first", [True, False])
def test_reload(undone_first):
    in_a_process(f"""
if {undone_first}:
    report.undo()
importlib.reload(sys.modules["rmsnorm.torch.replacement"])
importlib.reload(first)
report.undo()
assert type(norm) is HouseRMSNorm and norm(x).equal(expected)
report = first.replace_rms_norms(norm)
assert len(report.replaced) == 1
for twin in (copy.deepcopy(norm), pickle.loads(pickle.dumps(norm))):
    assert type(twin) is type(norm) and twin(x).equal(norm(x))
report.undo()
assert type(norm) is HouseRMSNorm
""")


def test_a_second_import():
    in_a_process("""
for name in [name for name in sys.modules if name.startswith("rmsnorm.torch")]:
    del sys.modules[name]
import rmsnorm.torch as second
assert second.replace_rms_norms is not first.replace_rms_norms
(left,) = second.replace_rms_norms(norm).left
assert left.reason == "it was replaced before"
other = HouseRMSNorm()
with second.replace_rms_norms(other) as within:
    assert len(within.replaced) == 1
    twin = pickle.loads(pickle.dumps(other))
    assert type(twin) is type(other) and twin(x).equal(other(x))
assert type(other) is HouseRMSNorm
report.undo()
assert type(norm) is HouseRMSNorm and norm(x).equal(expected)
with second.replace_rms_norms(norm) as within:
    assert len(within.replaced) == 1
assert type(norm) is HouseRMSNorm
""")
