"""replace_rms_norms: forwards that return a known formula and do more than that are left.

A replacement would lose what they write, the gradients that they make themselves, and what they do
only in some circumstances. Recognising them changes nothing, either.
"""

import collections
import contextlib
import dataclasses
import logging
import threading
import types
import warnings

import pytest
import torch
import torch.utils.checkpoint
from rmsnorm.torch import recognition, replace_rms_norms, tracing
from test_torch_recognition import DOUBLE, HALF, SINGLE, N, norm_of, reason_to_leave, replaced
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.nn import functional
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode


def rstd(x):
    return torch.rsqrt(x.float().pow(2).mean(-1, keepdim=True) + 1e-6)


def norm(self, x):
    """w * T(x32 * r)"""
    return self.weight * (x.float() * rstd(x)).to(x.dtype)


def and_then(effect):
    """A forward that does something with its result, x and itself before it returns."""

    def forward(self, x):
        y = norm(self, x)
        effect(self, x, y)
        return y

    return forward


# Writes.

library = torch.library.Library("rmsnorm_tests", "DEF")
library.define("double_(Tensor(a!) x) -> ()")


@torch.library.impl(library, "double_", "CompositeExplicitAutograd")
def _double(x):
    x.mul_(2)


def _slice(self, x, y):
    y[..., :4] *= 2


def _caught(self, x, y):
    with contextlib.suppress(Exception):  # as of a forward that has another way
        y.view(-1).mul_(2)


def _other_data(self, x, y):
    y.data = y * 2


THROUGH_ANOTHER = "through another that shares its data"
WRITES = {
    "detach": (lambda self, x, y: y.detach().mul_(2), THROUGH_ANOTHER),
    "data": (lambda self, x, y: y.data.mul_(2), THROUGH_ANOTHER),
    "unsqueeze": (lambda self, x, y: y.unsqueeze(0).mul_(2), THROUGH_ANOTHER),
    "view": (lambda self, x, y: y.view(y.shape).neg_(), THROUGH_ANOTHER),
    "as_strided": (lambda self, x, y: y.as_strided((1,), (1,)).zero_(), THROUGH_ANOTHER),
    "select": (lambda self, x, y: y.select(-1, 0).fill_(3.0), THROUGH_ANOTHER),
    "slice": (_slice, THROUGH_ANOTHER),
    "caught": (_caught, THROUGH_ANOTHER),
    "list": (lambda self, x, y: torch._foreach_mul_([y], 2.0), "writes to tensors by aten._for"),
    "no result": (lambda self, x, y: torch.ops.rmsnorm_tests.double_(y), "by rmsnorm_tests.double"),
    "other data": (_other_data, "gives a tensor other data"),
    "x": (lambda self, x, y: x.zero_(), "its forward writes to its input"),
    "x by copy": (lambda self, x, y: x.copy_(y), "its forward writes to its input"),
    "view of x": (lambda self, x, y: x[0].zero_(), "its forward writes to its input"),
    "weight": (
        lambda self, x, y: self.weight.data.mul_(0.5),
        "its forward writes to its parameter weight",
    ),
    "weight without gradients": (
        torch.no_grad()(lambda self, x, y: self.weight.clamp_(0, 1)),
        "its forward writes to its parameter weight",
    ),
}


@pytest.mark.parametrize("where", WRITES)
def test_writes(where):
    effect, reason = WRITES[where]
    assert reason in reason_to_leave(norm_of(and_then(effect)))


def test_other_data_of_a_parameter():
    def forward(self, x):
        self.weight.data = self.weight.data * 0.5
        return norm(self, torch.ones_like(x) + x)

    assert "gives a tensor other data" in reason_to_leave(norm_of(forward))

    def at_the_end(self, x, y):
        self.weight.data = torch.zeros_like(self.weight)

    assert "writes to its parameter weight" in reason_to_leave(norm_of(and_then(at_the_end)))


def test_a_write_that_nobody_else_sees_is_no_other_formula():
    def forward(self, x):
        mean_square = x.float().pow(2).mean(-1, keepdim=True)
        rstd = torch.rsqrt(mean_square.add_(1e-6))
        return self.weight * (x.float() * rstd).to(x.dtype)

    assert replaced(norm_of(forward)).formula == "w * T(x32 * r)"


# Gradients.


def _rstd_without_gradients(self, x):
    with torch.no_grad():
        r = rstd(x)
    return self.weight * (x.float() * r).to(x.dtype)


class Whole(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, weight):
        return weight * (x.float() * rstd(x)).to(x.dtype)

    @staticmethod
    def backward(ctx, dy):
        return 10 * dy, None


class Scaled(torch.autograd.Function):
    @staticmethod
    def forward(ctx, y):
        return y

    @staticmethod
    def backward(ctx, dy):
        return 10 * dy


def _enabled(self, x):
    with torch.enable_grad():
        return norm(self, x)


def _hook_on(tensor_of):
    def effect(self, x, y):
        tensor = tensor_of(self, x, y)
        if tensor.requires_grad:
            tensor.register_hook(lambda gradient: 0 * gradient)

    return and_then(effect)


def _hook_after_accumulation(self, x, y):
    if self.weight.requires_grad:
        self.weight.register_post_accumulate_grad_hook(lambda weight: None)


def _retained(self, x, y):
    if y.requires_grad:
        y.retain_grad()


SWITCHED = "gradients switched on or off"
GRADIENTS = {
    "part without": (_rstd_without_gradients, SWITCHED),
    "without": (torch.no_grad()(norm), SWITCHED),
    "in inference mode": (torch.inference_mode()(norm), SWITCHED),
    "enabled": (_enabled, SWITCHED),
    "function": (lambda self, x: Whole.apply(x, self.weight), SWITCHED),
    "function of the result": (lambda self, x: Scaled.apply(norm(self, x)), SWITCHED),
    "hook on y": (_hook_on(lambda self, x, y: y), "puts a hook on a tensor"),
    "hook on x": (_hook_on(lambda self, x, y: x), "puts a hook on a tensor"),
    "hook on the weight": (_hook_on(lambda self, x, y: self.weight), "puts a hook on a tensor"),
    "accumulation": (and_then(_hook_after_accumulation), "puts a hook on a tensor"),
    "kept": (and_then(_retained), "gradient of a tensor kept"),
    "y requires grad": (
        lambda self, x: norm(self, x).requires_grad_(),
        "gives its result gradients of its own",
    ),
    "weight requires grad": (
        and_then(lambda self, x, y: self.weight.requires_grad_()),
        "changes whether a tensor requires grad",
    ),
    "detached": (lambda self, x: norm(self, x.detach()), "unknown formula"),
    "data of the weight": (lambda self, x: self.weight.data * rstd(x), "unknown formula"),
}


@pytest.mark.parametrize("where", GRADIENTS)
def test_gradients(where):
    forward, reason = GRADIENTS[where]
    module = norm_of(forward)
    assert reason in reason_to_leave(module)
    assert module.weight._backward_hooks is None and module.weight.requires_grad


# Circumstances. norm is what a forward computes in the one that is tried first.


def twice_if(condition):
    def forward(self, x):
        y = norm(self, x)
        return y + y if condition(self, x) else y

    return forward


CIRCUMSTANCES = {
    "gradients": lambda self, x: not torch.is_grad_enabled(),
    "gradients in training": lambda self, x: self.training and not torch.is_grad_enabled(),
    "gradients of x": lambda self, x: not x.requires_grad,
    "gradients of the weight": lambda self, x: not self.weight.requires_grad,
    "a frozen model": lambda self, x: (
        torch.is_grad_enabled() and not x.requires_grad and not self.weight.requires_grad
    ),
    "inference": lambda self, x: torch.is_inference_mode_enabled(),
    "inference in training": lambda self, x: self.training and torch.is_inference_mode_enabled(),
    "autocast on the CPU": lambda self, x: torch.is_autocast_enabled("cpu"),
    "autocast on CUDA": lambda self, x: torch.is_autocast_enabled("cuda"),
    "autocast in training": lambda self, x: torch.is_autocast_enabled("cuda") and self.training,
    "contiguous": lambda self, x: not x.is_contiguous(),
    "not contiguous in training": lambda self, x: not x.is_contiguous() and self.training,
    "dtype in training": lambda self, x: x.dtype == SINGLE and self.training,
    "dtype without gradients": lambda self, x: x.dtype == SINGLE and not torch.is_grad_enabled(),
    "weight in training": lambda self, x: self.weight.dtype == SINGLE and self.training,
    "double in training": lambda self, x: x.dtype == DOUBLE and self.training,
    "rank in training": lambda self, x: x.dim() == 2 and self.training,
    "four rows": lambda self, x: x.shape[0] == 4,
    "one row": lambda self, x: x.shape[0] == 1,
    "many rows": lambda self, x: x.numel() > 1000,
}


@pytest.mark.parametrize("condition", CIRCUMSTANCES)
def test_circumstances(condition):
    for forward in (
        twice_if(CIRCUMSTANCES[condition]),
        twice_if(lambda self, x: not CIRCUMSTANCES[condition](self, x)),
    ):
        assert reason_to_leave(norm_of(forward))


def test_width_of_a_norm_without_a_weight():
    def forward(self, x):
        y = (x.float() * rstd(x)).to(x.dtype)
        return y + y if x.shape[-1] > 16 else y

    module = type("UnitNorm", (nn.Module,), {"forward": forward})()
    assert "for x of another size" in reason_to_leave(module)


# State.


def _count_in_class(self, x, y):
    type(self).calls += 1


def _count_in_list(self, x, y):
    self.state[0] += 1


def _count_in_nested(self, x, y):
    self.state["calls"][0].append(1)


def _keep_by_name(self, x, y):
    self.state["y"] = y


STATES = {
    "list": (list, lambda self, x, y: self.state.append(1)),
    "element of a list": (lambda: [0], _count_in_list),
    "dict": (dict, _keep_by_name),
    "ordered": (lambda: collections.OrderedDict(a=1), _keep_by_name),
    "counter": (collections.Counter, lambda self, x, y: self.state.update("y")),
    "set": (set, lambda self, x, y: self.state.add(len(self.state))),
    "deque": (lambda: collections.deque([0], 1), lambda self, x, y: self.state.append([])),
    "nested": (lambda: {"calls": ([],)}, _count_in_nested),
}


@pytest.mark.parametrize("kind", STATES)
def test_state(kind):
    make, effect = STATES[kind]
    for owner_of in (lambda module: module, type):
        module = norm_of(and_then(effect))
        owner = owner_of(module)
        owner.state = make()
        kept = module.state
        assert reason_to_leave(module) == "its forward changes its attribute state"
        assert module.state is kept and kept == make()


def test_attributes_of_a_class():
    module = norm_of(and_then(_count_in_class))
    type(module).calls = 0
    assert reason_to_leave(module) == "its forward changes its attribute calls"
    assert type(module).calls == 0

    def new_attribute(self, x, y):
        type(self).seen = y

    module = norm_of(and_then(new_attribute))
    assert reason_to_leave(module) == "its forward changes its attribute seen"
    assert not hasattr(type(module), "seen")


def test_objects_are_shared_with_others():
    """A configuration, a logger, or what another thread works on: it is neither compared nor put
    back."""

    def log(self, x, y):
        self.logger.debug("called")
        self.config.seen.append(1)

    module = norm_of(and_then(log))
    module.logger = logging.getLogger("norms")
    module.config = types.SimpleNamespace(seen=[])
    with replace_rms_norms(module) as report:
        assert len(report.replaced) == 1
    assert module.config.seen


def test_long_containers_are_not_searched():
    module = norm_of(norm)
    module.vocabulary = {str(i): [i] for i in range(10_000)}
    state = tracing.State(module)
    assert len(state._contents) < 100


def test_threads_that_replace_norms_of_one_class():
    class OneRMSNorm(type(norm_of(norm))):
        pass

    filters, log = list(warnings.filters), logging.getLogger(FakeTensorMode.__module__)
    modules = [OneRMSNorm() for _ in range(6)]
    barrier, reports = threading.Barrier(len(modules)), []

    def replace(module):
        barrier.wait()
        reports.append(replace_rms_norms(module))

    threads = [threading.Thread(target=replace, args=(module,)) for module in modules]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert [len(report.replaced) for report in reports] == [1] * len(modules)
    assert warnings.filters == filters and not log.disabled


def test_a_buffer_that_is_set():
    def keep(self, x, y):
        self.last = y

    module = norm_of(and_then(keep))
    module.register_buffer("last", torch.zeros(N))
    assert reason_to_leave(module) == "its forward sets its attribute last"


def test_a_forward_that_is_left_works_as_before():
    """What it keeps for later must not be a tensor without storage."""

    def forward(self, x):
        if "twos" not in self.state:
            self.state["twos"] = torch.full((N,), 2.0)
        return norm(self, x) * self.state["twos"]

    module = norm_of(forward)
    module.state = {}
    assert reason_to_leave(module) == "its forward changes its attribute state"
    x = torch.ones(2, N)
    assert torch.equal(module(x), 2 * norm(module, x))


def test_containers_that_stay_are_no_reason():
    module = norm_of(norm)
    module.names, module.state, module.other = ["a"], {"b": [1, {2}]}, object()
    module.itself = module.names
    module.names.append(module.names)
    assert replaced(module).formula == "w * T(x32 * r)"


# Modules that are alike.


@dataclasses.dataclass(frozen=True)
class Config:
    name: str
    eps: float = dataclasses.field(compare=False)


class NoHash:
    def __hash__(self):
        raise RuntimeError("no hash")


class NeverTheSame:
    def __eq__(self, other):
        raise RuntimeError("not comparable")

    def __hash__(self):
        return 1


def test_equal_values_of_other_types_are_other_modules():
    kind = type(norm_of(twice_if(lambda self, x: self.flags[0] is True)))
    for flags in ([(1,), (True,)], [[1], [True]], [(1.0,), (True,)]):
        norms = nn.ModuleList(kind() for _ in flags)
        for module, value in zip(norms, flags):
            module.flags = value
        report = replace_rms_norms(norms)
        assert [[n.name for n in group] for group in (report.replaced, report.left)] == [
            ["0"],
            ["1"],
        ]


def test_equal_objects_may_differ():
    kind = type(norm_of(lambda self, x: functional.rms_norm(x, (N,), eps=self.config.eps)))
    norms = nn.ModuleList(kind() for _ in range(2))
    norms[0].config, norms[1].config = Config("a", 1e-6), Config("a", 1.0)
    assert norms[0].config == norms[1].config
    assert [n.eps for n in replace_rms_norms(norms).replaced] == [1e-6, 1.0]


@pytest.mark.parametrize("attribute", [NoHash, NeverTheSame])
def test_attributes_that_cannot_be_compared(attribute):
    kind = type(norm_of(norm))
    norms = nn.ModuleList(kind() for _ in range(2))
    for module in norms:
        module.attribute = attribute()
    assert len(replace_rms_norms(norms).replaced) == 2


# Devices.


@pytest.mark.parametrize("device", ["cpu", "meta"])
def test_another_device(device):
    moved = [
        lambda self, x: norm(self, x).to(device),
        lambda self, x: norm(self, x.to(device)),
    ]
    assert [reason_to_leave(norm_of(f))[:31] for f in moved] == [
        "its forward moves a tensor from"
    ] * 2
    assert replaced(norm_of(lambda self, x: norm(self, x).to(x.device)))


# Names.


class NamedX(nn.Module):
    def __init__(self):
        super().__init__()
        self.x = nn.Parameter(torch.linspace(0.5, 1.5, N))


def test_a_parameter_named_x():
    def forward(self, hidden):
        return self.x * (hidden.float() * rstd(hidden)).to(hidden.dtype)

    module = type("NamedRMSNorm", (NamedX,), {"forward": forward})()
    x = torch.randn(3, N, generator=torch.Generator().manual_seed(0))
    expected = module(x)
    assert replaced(module).formula == "w * T(x32 * r)"
    torch.testing.assert_close(module(x), expected)

    def of_the_weight(self, hidden):
        return self.x * (self.x.float() * rstd(self.x)).to(self.x.dtype)

    module = type("NamedRMSNorm", (NamedX,), {"forward": of_the_weight})()
    assert "unknown formula" in reason_to_leave(module)


# The caller's modes.


class Doubled(TorchDispatchMode):
    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        result = function(*args, **(kwargs or {}))
        return result * 2 if function is torch.ops.aten.rsqrt.default else result


class DoubledFunction(TorchFunctionMode):
    def __torch_function__(self, function, types, args=(), kwargs=None):
        result = function(*args, **(kwargs or {}))
        return result * 2 if function is torch.rsqrt else result


MODES = {
    "dispatch": Doubled,
    "function": DoubledFunction,
    "device": lambda: torch.device("meta"),
    "autocast": lambda: torch.autocast("cpu", dtype=torch.bfloat16),
    "inference": torch.inference_mode,
}


@pytest.mark.parametrize("mode", MODES)
def test_the_first_caller_is_in_another_mode(mode):
    """The formulas are run once, and what that gave is there for all later calls."""

    def written_out(self, x):
        rstd = torch.rsqrt(x.float().pow(2).mean(-1, keepdim=True) + self.eps)
        return self.weight * (x.float() * rstd).to(x.dtype)

    by_torch = lambda self, x: functional.rms_norm(x, (N,), self.weight, self.eps)
    forwards = (written_out, by_torch)
    norms = [norm_of(forward) for forward in (*forwards, *forwards)]
    recognition._known_expression.cache_clear()
    try:
        with MODES[mode]():
            formulas = [replaced(module).formula for module in norms[:2]]
        formulas += [replaced(module).formula for module in norms[2:]]
    finally:
        recognition._known_expression.cache_clear()
    assert formulas == ["w * T(x32 * r)", "T(w * (x32 * r))"] * 2


@pytest.mark.parametrize("dtype", [HALF, DOUBLE], ids=str)
def test_another_default_dtype(dtype):
    before = torch.get_default_dtype()
    recognition._known_expression.cache_clear()
    torch.set_default_dtype(dtype)
    try:
        assert replaced(norm_of(norm)).formula == "w * T(x32 * r)"
    finally:
        torch.set_default_dtype(before)
    assert replaced(norm_of(norm)).formula == "w * T(x32 * r)"


@pytest.mark.parametrize("transform", [torch.func.grad, torch.vmap, torch.func.functionalize])
def test_within_a_transform(transform):
    """As at the first call of a layer of the package kernels."""

    def function(x):
        assert replaced(norm_of(norm)).formula == "w * T(x32 * r)"
        return x.sum()

    transform(function)(torch.ones(3, 2))


def test_within_a_checkpoint():
    """Which counts the tensors that are saved for backward."""
    norms = [norm_of(norm), None]

    def function(x):
        first = norms.pop(0)
        if first is not None:
            replaced(first)
        return x.exp().sin()

    x = torch.ones(3, requires_grad=True)
    torch.utils.checkpoint.checkpoint(function, x, use_reentrant=False).sum().backward()
    torch.testing.assert_close(x.grad, x.exp().cos() * x.exp())
