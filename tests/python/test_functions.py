"""The functions as objects: copies, pickles, signatures, help, completion, and the examples in docstrings."""

import builtins
import copy
import doctest
import functools
import importlib
import inspect
import json
import multiprocessing
import pickle
import pydoc
import re
import typing
import weakref

import jax
import numpy as np
import pytest
import rmsnorm
import rmsnorm.jax
import rmsnorm.torch
import torch
from floats import F32, assert_same_bits

FUNCTIONS = [
    *("rms_norm", "add_rms_norm", "rms_norm_backward", "mean_square", "rms_norm_apply"),
    *("info", "set_num_threads", "get_num_threads"),
]

functions = pytest.mark.parametrize("function", [getattr(rmsnorm, f) for f in FUNCTIONS])


@functions
def test_pickled_and_copied_by_name(function):
    for protocol in range(pickle.HIGHEST_PROTOCOL + 1):
        pickled = pickle.dumps(function, protocol)
        assert pickle.loads(pickled) is function
        assert b"rmsnorm" in pickled and b"_core" not in pickled
    assert copy.copy(function) is function
    assert copy.deepcopy({"norm": [function]})["norm"][0] is function


def test_pickled_inside_of_other_objects():
    norm = functools.partial(rmsnorm.rms_norm, eps=0.0, weight_offset=1.0)
    x, weight = np.ones((2, 8), F32), np.ones(8, F32)
    for other in (copy.deepcopy(norm), pickle.loads(pickle.dumps(norm))):
        assert other.func is rmsnorm.rms_norm
        assert_same_bits(other(x, weight), norm(x, weight))


class Layer(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.norm = rmsnorm.rms_norm
        self.weight = torch.nn.Parameter(torch.linspace(1, 2, 8))

    def forward(self, x):
        return self.norm(x, self.weight)


def test_modules_that_hold_a_function():
    layer, x = Layer(), torch.linspace(-1, 1, 16).reshape(2, 8)
    for other in (copy.deepcopy(layer), pickle.loads(pickle.dumps(layer))):
        assert other.norm is rmsnorm.rms_norm
        assert torch.equal(other(x), layer(x))


def test_a_spawned_process_gets_the_function():
    with multiprocessing.get_context("spawn").Pool(1) as pool:
        (y,) = pool.map(rmsnorm.rms_norm, [np.ones((2, 8), F32)])
    assert_same_bits(y, rmsnorm.rms_norm(np.ones((2, 8), F32)))


def test_cloudpickle():
    cloudpickle = pytest.importorskip("cloudpickle")
    norm = cloudpickle.loads(cloudpickle.dumps(lambda x: rmsnorm.rms_norm(x)))
    assert_same_bits(norm(np.ones((2, 8), F32)), rmsnorm.rms_norm(np.ones((2, 8), F32)))
    assert cloudpickle.loads(cloudpickle.dumps(rmsnorm.add_rms_norm)) is rmsnorm.add_rms_norm


@pytest.mark.parametrize(
    "thing",
    [
        *(rmsnorm.variant, rmsnorm.jax.rms_norm, rmsnorm.jax.add_rms_norm, rmsnorm.torch.rms_norm),
        *(rmsnorm.torch.add_rms_norm, rmsnorm.torch.replace_rms_norms, rmsnorm.torch.RMSNorm),
        *(rmsnorm.torch.kernel_mapping, rmsnorm.ExportedArray),
    ],
)
def test_everything_else_public_is_pickled_by_name(thing):
    assert pickle.loads(pickle.dumps(thing)) is thing
    assert copy.deepcopy(thing) is thing


def test_reports_are_copied():
    model = torch.nn.Sequential(torch.nn.RMSNorm(8), torch.nn.RMSNorm(8))
    report = rmsnorm.torch.replace_rms_norms(model)
    for other in (copy.deepcopy(report), pickle.loads(pickle.dumps(report))):
        assert str(other) == str(report)
        assert len(other.replaced) == 2


def test_signature():
    parameters = inspect.signature(rmsnorm.rms_norm).parameters
    assert list(parameters) == [
        *("x", "weight", "bias", "eps", "axis", "weight_offset", "rounding", "partial", "out"),
        *("out_dtype", "return_rstd", "stream"),
    ]
    assert parameters["x"].default is inspect.Parameter.empty
    assert parameters["eps"].default == 1e-6 and parameters["axis"].default == -1
    assert parameters["rounding"].default == "once" and parameters["return_rstd"].default is False
    assert parameters["bias"].kind is inspect.Parameter.POSITIONAL_OR_KEYWORD
    assert parameters["eps"].kind is inspect.Parameter.KEYWORD_ONLY
    assert parameters["eps"].annotation is float


@functions
def test_the_signature_is_what_a_call_takes(function):
    """Every default may be given, each by keyword; what is required may not be left out."""
    signature = inspect.signature(function)
    arrays = {"x": (2, 8), "residual": (2, 8), "dy": (2, 8), "mean_square": (2,)}
    required, defaults = {}, {}
    for name, parameter in signature.parameters.items():
        if parameter.default is inspect.Parameter.empty:
            required[name] = (
                np.ones(arrays[name], F32) if name != "n" else rmsnorm.get_num_threads()
            )
        else:
            defaults[name] = parameter.default
    signature.bind(**required)
    plain, spelled = function(**required), function(**required, **defaults)
    positional = function(*required.values())
    for other in (spelled, positional):
        assert repr(other) == repr(plain)
    for name in required:
        with pytest.raises(TypeError, match=f"^{name}: is missing"):
            function(**{k: v for k, v in required.items() if k != name})


@functions
def test_annotations_are_types(function):
    hints = typing.get_type_hints(function)
    assert set(hints) == {*inspect.signature(function).parameters, "return"}
    assert not any(isinstance(hint, str) for hint in hints.values())


def stub_signatures():
    """Parameters of each function in the stub, by its first definition: names, kinds, defaults."""
    text = (importlib.resources.files("rmsnorm") / "_core.pyi").read_text()
    found = {}
    for name, parameters in re.findall(r"^def (\w+)\((.*?)\) -> .*:", text, re.MULTILINE):
        found.setdefault(name, parameters)
    return found


@functions
def test_the_stub_has_the_same_parameters(function):
    expected = []
    for name, parameter in inspect.signature(function).parameters.items():
        if parameter.kind is inspect.Parameter.KEYWORD_ONLY and "*" not in expected:
            expected.append("*")
        expected.append(name)
    stub = stub_signatures()[function.__name__]
    depth_free = re.sub(r"\[[^\]]*\]", "", stub)
    assert [p.split(":")[0].strip() for p in depth_free.split(",") if p.strip()] == expected


@functions
def test_names_and_help(function):
    assert function.__module__ == "rmsnorm" and function.__qualname__ == function.__name__
    assert repr(function) == f"<function rmsnorm.{function.__name__}>"
    assert inspect.isroutine(function) and callable(function)
    text = pydoc.plain(pydoc.render_doc(function))
    assert f"{function.__name__}(" in text and function.__doc__.splitlines()[0] in text
    assert weakref.ref(function)() is function
    assert hash(function) == hash(copy.copy(function)) and function == copy.copy(function)
    kind = type(function)
    assert kind.__module__ == "rmsnorm._core" and kind.__name__ == "Function"
    with pytest.raises(TypeError):
        kind()
    assert not hasattr(function, "no_such_attribute")


def test_an_attribute_of_a_class_stays_the_function():
    class Model:
        norm = rmsnorm.rms_norm

    x = np.ones((2, 8), F32)
    assert Model().norm is rmsnorm.rms_norm is Model.norm
    assert_same_bits(Model().norm(x), rmsnorm.rms_norm(x))


@pytest.mark.parametrize("name", [b"__module__", (), 10**30, object(), None], ids=type)
def test_names_of_attributes_are_strings(name):
    with pytest.raises(TypeError, match="attribute name must be string"):
        rmsnorm.rms_norm.__getattribute__(name)


def test_jax_can_trace_it_as_far_as_the_error():
    with pytest.raises(TypeError, match="^x: is a traced value"):
        jax.jit(rmsnorm.rms_norm)(np.ones((2, 8), F32))


def test_ipython_completes_keywords():
    completer = pytest.importorskip("IPython.core.completer")
    shell = completer.IPCompleter(namespace={"rmsnorm": rmsnorm}, global_namespace={})
    shell.use_jedi = False
    with completer.provisionalcompleter():
        line = "rmsnorm.rms_norm(x, weight_o"
        texts = {c.text for c in shell.completions(line, len(line))}
    assert "weight_offset=" in texts


def test_keywords_that_are_not_interned():
    x = np.ones((2, 8), F32)
    options = json.loads('{"e\\u0070s": 0.5}')
    assert_same_bits(rmsnorm.rms_norm(x, **options), rmsnorm.rms_norm(x, eps=0.5))


# ---- examples ----

MODULES = [rmsnorm, rmsnorm.torch, rmsnorm.jax]
PUBLIC = [
    (module, name)
    for module in MODULES
    for name in module.__all__
    if callable(getattr(module, name))
    # what replace_rms_norms returns, and has an example of
    and name not in ("LeftNorm", "ReplacedNorm", "Report")
]


@pytest.mark.parametrize(
    "module, name", PUBLIC, ids=[f"{module.__name__}.{name}" for module, name in PUBLIC]
)
def test_every_docstring_has_an_example_that_is_true(module, name, thread_count):
    public = getattr(module, name)
    finder = doctest.DocTestFinder(recurse=False)
    tests = finder.find(public, name, module=False, globs={"__builtins__": builtins})
    (test,) = [t for t in tests if t.examples]
    result = doctest.DocTestRunner(optionflags=doctest.NORMALIZE_WHITESPACE).run(test)
    assert result.attempted > 0 and result.failed == 0


def test_doctest_finds_the_functions_of_the_package():
    found = {t.name for t in doctest.DocTestFinder().find(rmsnorm) if t.examples}
    assert {f"rmsnorm.{name}" for name in FUNCTIONS} <= found
