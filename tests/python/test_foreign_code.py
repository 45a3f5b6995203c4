"""Code of others that runs within a call: it calls back, answers wrongly, takes long or raises."""

import pathlib
import subprocess
import sys
import textwrap
import threading
import types

import jax
import numpy as np
import pytest
import rmsnorm
import rmsnorm.torch
import torch
from dlpack_producer import Producer
from torch.overrides import TorchFunctionMode

PATH = str(pathlib.Path(__file__).parent)


def in_a_process(code):
    command = [sys.executable, "-c", textwrap.dedent(code)]
    return subprocess.run(command, check=False, capture_output=True, text=True, timeout=120)


# ---- calls within calls ----


class Lazy:
    """The norm of another array, computed when it is asked for."""

    exports = 0

    def __init__(self, array):
        self.array = array

    def __dlpack_device__(self):
        return (1, 0)

    def __dlpack__(self, **options):
        Lazy.exports += 1
        return rmsnorm.rms_norm(self.array).__dlpack__(**options)


def lazy(depth, array):
    for _ in range(depth):
        array = Lazy(array)
    return array


def test_calls_within_calls():
    x = np.linspace(-1, 2, 16, dtype=np.float32).reshape(2, 8)
    expected = x
    for _ in range(31):
        expected = rmsnorm.rms_norm(expected)
    np.testing.assert_array_equal(np.from_dlpack(rmsnorm.rms_norm(lazy(30, x))), expected)


@pytest.mark.parametrize(
    "code",
    [
        """
        class Endless:
            def __dlpack_device__(self):
                return (1, 0)
            def __dlpack__(self, **options):
                return rmsnorm.rms_norm(self).__dlpack__(**options)
        call = lambda: rmsnorm.rms_norm(Endless())
        """,
        """
        class Endless:
            def __float__(self):
                return float(rmsnorm.rms_norm(x, eps=self)[0])
        call = lambda: rmsnorm.rms_norm(x, eps=Endless())
        """,
        """
        class Endless:
            def __float__(self):
                return float(rmsnorm.rms_norm_backward(x, x, eps=self)[0][0])
        call = lambda: rmsnorm.rms_norm_backward(x, x, eps=Endless())
        """,
    ],
    ids=["array", "option", "backward"],
)
def test_endless_calls_within_calls(code):
    """A call takes more of the stack than Python's limit of nested calls reckons with."""
    result = in_a_process(
        "import numpy as np, rmsnorm\nx = np.ones(8, np.float32)\n"
        + textwrap.dedent(code)
        + "try:\n    call()\nexcept RecursionError:\n    print('refused')\n"
    )
    assert (result.returncode, result.stdout) == (0, "refused\n"), result.stderr


def test_endless_calls_within_calls_on_a_small_stack():
    result = in_a_process("""
        import threading
        import numpy as np, rmsnorm

        x = np.ones(8, np.float32)

        class Endless:
            def __init__(self, call):
                self.call = call
            def __dlpack_device__(self):
                return (1, 0)
            def __dlpack__(self, **options):
                return self.call(self)

        def run(call):
            try:
                call(Endless(call))
            except RecursionError as error:
                print(error)

        threading.stack_size(512 * 1024)
        for call in rmsnorm.rms_norm, lambda array: rmsnorm.rms_norm_backward(array, x):
            thread = threading.Thread(target=run, args=(call,))
            thread.start()
            thread.join()
    """)
    expected = "rmsnorm: calls within each other take more than 384 KiB of stack\n"
    assert (result.returncode, result.stdout) == (0, 2 * expected), result.stderr


def test_a_call_while_another_one_s_stack_is_switched_away():
    """greenlets copy stacks, so that a call may begin above one that has not ended."""
    greenlet = pytest.importorskip("greenlet")
    main, x = greenlet.getcurrent(), np.ones(8, np.float32)

    class Waiting(Producer):
        def __dlpack__(self, **options):
            main.switch()
            return super().__dlpack__(**options)

    def deep(n):
        return rmsnorm.rms_norm(Waiting(x)) if n == 0 else list(map(deep, [n - 1]))

    inner = greenlet.greenlet(lambda: deep(20))
    inner.switch()
    np.testing.assert_array_equal(rmsnorm.rms_norm(x), rmsnorm.rms_norm(x))
    inner.switch()
    assert inner.dead


def test_a_stand_in_for_jax():
    """Its Array is no type. Real arrays are known when it is gone."""
    result = in_a_process(f"""
        import sys
        from unittest.mock import MagicMock, patch
        import numpy as np, rmsnorm
        sys.path.insert(0, {PATH!r})
        from dlpack_producer import Producer

        mock = MagicMock()
        with patch.dict(sys.modules, {{"jax": mock, "jax.dlpack": mock.dlpack, "jax.core": mock.core}}):
            print(type(rmsnorm.rms_norm(Producer(np.ones(8, np.float32)))).__name__)
            try:
                rmsnorm.rms_norm(5)
            except TypeError as error:
                print(error)
        import jax.numpy
        print(isinstance(rmsnorm.rms_norm(jax.numpy.ones(8)), jax.Array))
    """)
    expected = "ExportedArray\nx: expected an array (NumPy, torch, JAX or anything with __dlpack__), got int\nTrue\n"
    assert (result.returncode, result.stdout) == (0, expected), result.stderr


@pytest.mark.parametrize("answer", ["broken", "failing"])
def test_jax_cannot_say_whether_it_has_x64(answer):
    result = in_a_process(f"""
        import jax, jax.numpy as jnp, rmsnorm

        class Failing:
            @property
            def jax_enable_x64(self):
                if {answer!r} == "failing":
                    raise ZeroDivisionError("x64")
                return type("Broken", (), {{"__bool__": lambda self: 1 / 0}})()

        x = jnp.ones(8)
        jax.config = Failing()
        try:
            rmsnorm.rms_norm(x, out_dtype="float64")
        except RuntimeError as error:
            print(error, type(error.__cause__).__name__, sep="; ")
    """)
    expected = "x: asking JAX for its jax_enable_x64 failed; ZeroDivisionError\n"
    assert (result.returncode, result.stdout) == (0, expected), result.stderr


@pytest.mark.parametrize("how", ["negative", "repeated"])
def test_a_mode_answers_for_the_result(how):
    class Answering(TorchFunctionMode):
        def __torch_function__(self, function, types, args=(), kwargs=None):
            result = function(*args, **(kwargs or {}))
            return answer if isinstance(result, torch.Tensor) else result

    answer = torch.zeros(1, 8).expand(3, 8)
    if how == "negative":
        answer = torch.zeros(3, 8, dtype=torch.complex64).conj().imag
    x = torch.ones(3, 8)
    with Answering(), pytest.raises((ValueError, RuntimeError), match=r"^result: "):
        rmsnorm.rms_norm(x)


def test_bfloat16_without_ml_dtypes():
    result = in_a_process("""
        import numpy as np, rmsnorm, sys, torch
        x = np.ones((3, 8), np.float32)
        try:
            rmsnorm.rms_norm_backward(x, x, torch.ones(8, dtype=torch.bfloat16))
        except ValueError as error:
            print(error)
        assert "ml_dtypes" not in sys.modules
    """)
    expected = "result: its dtype is bfloat16, and NumPy arrays of that are made by ml_dtypes; "
    assert result.stdout == expected + "import ml_dtypes first\n", result.stderr


def test_two_threads_import_the_operators_at_once():
    """Their first calls with tensors that require grad, which import rmsnorm.torch."""
    result = in_a_process("""
        import threading
        import rmsnorm, torch

        def run():
            barrier.wait()
            rmsnorm.rms_norm(torch.ones(2, 8, requires_grad=True)).sum().backward()

        barrier = threading.Barrier(4)
        threads = [threading.Thread(target=run) for _ in range(4)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        print("done")
    """)
    assert (result.returncode, result.stdout) == (0, "done\n"), result.stderr


def test_a_failed_export_is_tried_once_at_each_depth():
    """A TypeError may also say that __dlpack__ does not know a keyword, and is not tried again for
    what an array within it raised."""
    Lazy.exports = 0
    with pytest.raises(TypeError, match=r"^x: its __dlpack__ failed"):
        rmsnorm.rms_norm(lazy(12, [1.0, 2.0]))
    assert Lazy.exports == 12 + 1, "the innermost one is asked for the older dialect as well"


def test_an_older_dialect_behind_a_wrapper():
    class Wrapper:
        def __init__(self, producer):
            self.producer = producer

        def __dlpack_device__(self):
            return self.producer.__dlpack_device__()

        def __dlpack__(self, **options):
            return self.producer.__dlpack__(**options)

    x = np.linspace(-1, 2, 8, dtype=np.float32)
    y = rmsnorm.rms_norm(Wrapper(Producer(x, keywords=())))
    np.testing.assert_array_equal(np.from_dlpack(y), rmsnorm.rms_norm(x))


# ---- memory for results ----


class Answering(TorchFunctionMode):
    """A mode that answers torch.empty_like with something of the user's."""

    def __init__(self, answer):
        super().__init__()
        self.answer = answer

    def __torch_function__(self, function, kinds, arguments=(), keywords=None):
        if function is torch.empty_like:
            return self.answer(*arguments)
        return function(*arguments, **(keywords or {}))


@pytest.mark.parametrize(
    "answer",
    [
        lambda x: Producer(np.zeros((2, 8), np.float32), device=(2, 0), data=16),
        lambda x: np.zeros((2, 8), np.float32),
        lambda x: torch.zeros(2, 8, dtype=torch.float64),
        lambda x: torch.zeros(8, 2),
        lambda x: x,
        lambda x: x.view(2, 8),
    ],
    ids=["another device", "another library", "dtype", "shape", "input", "view of the input"],
)
def test_memory_for_a_result_that_was_not_asked_for(answer):
    x = torch.linspace(-1, 2, 16).reshape(2, 8)
    before = x.clone()
    with Answering(answer), pytest.raises(RuntimeError, match=r"^result: new memory was asked"):
        rmsnorm.rms_norm(x)
    assert torch.equal(x, before)


# ---- imports ----


def test_no_call_waits_for_an_import(tmp_path, monkeypatch):
    """That of a library which cannot have made the argument, by another thread."""
    (tmp_path / "cupy.py").write_text("import sys\nsys.modules['a_test'].wait()\n")
    called = threading.Event()
    importing = threading.Event()
    test = types.SimpleNamespace(wait=lambda: (importing.set(), called.wait(timeout=60)))
    monkeypatch.setitem(sys.modules, "a_test", test)
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.delitem(sys.modules, "cupy", raising=False)
    thread = threading.Thread(target=__import__, args=("cupy",))
    thread.start()
    assert importing.wait(timeout=60)
    waiting = threading.Thread(target=rmsnorm.rms_norm, args=(Producer(np.ones(8, np.float32)),))
    waiting.start()
    waiting.join(timeout=60)
    finished = not waiting.is_alive()
    called.set()
    thread.join()
    monkeypatch.delitem(sys.modules, "cupy", raising=False)
    assert finished


@pytest.mark.parametrize("name", ["cupy", "ml_dtypes", "numpy.ma"])
def test_a_stand_in_for_a_library_is_not_kept(name):
    """It lacks what makes it that library, and is looked at again by every call."""
    code = f"""
        import gc, sys, types
        import numpy as np
        import rmsnorm

        class Attribute:
            pass

        class StandIn(types.ModuleType):
            made = 0
            def __getattr__(self, name):
                if name == "Device":
                    raise AttributeError(name)
                StandIn.made += 1
                return Attribute()

        sys.modules[{name!r}] = StandIn({name!r})
        sys.path.insert(0, {PATH!r})
        from dlpack_producer import StandardProducer
        x = np.ones(8, np.float32)
        raw = np.zeros(8, "V2")
        class Sub(np.ndarray):
            pass
        def call():
            rmsnorm.rms_norm(x.view(Sub))
            rmsnorm.rms_norm(StandardProducer(x))
            for wrong in (raw, [1.0]):
                try:
                    rmsnorm.rms_norm(wrong)
                except TypeError:
                    pass
        call()
        alive = lambda: sum(type(o) is Attribute for o in gc.get_objects())
        before = StandIn.made, alive()
        for _ in range(10):
            call()
        print(StandIn.made > before[0], alive() - before[1])
    """
    result = in_a_process(code)
    assert result.stdout == "True 0\n", result.stdout + result.stderr


# ---- what is only asked for a message or a result ----


class SaysJax:
    """An object that says it is an array of JAX's, and has no more of one than it must."""

    __class__ = jax.Array

    def __dlpack_device__(self):
        return (1, 0)

    def __dlpack__(self, **options):
        raise ValueError("no memory")


def test_devices_that_fail_do_not_hide_the_error():
    with pytest.raises(TypeError, match=r"^x: its __dlpack__ failed") as caught:
        rmsnorm.rms_norm(SaysJax())
    assert str(caught.value.__cause__) == "no memory"


@pytest.mark.parametrize(
    "name, shown",
    [(b"\xff\xfe", r"'\\xff\\xfe'"), (b"n" * 10**5, r"'n{,100}\.\.\.'"), (b"a\nb", r"'a\\x0ab'")],
    ids=["bytes", "long", "control"],
)
def test_the_name_of_a_capsule(name, shown):
    with pytest.raises(TypeError, match=rf"^x: .*a capsule named {shown}; expected"):
        rmsnorm.rms_norm(Producer(np.ones(8, np.float32), name=name))


class RaisingName(type):
    def __getattr__(cls, name):
        raise KeyError(name)


class OfRaisingName(Producer, metaclass=RaisingName):
    pass


def test_looking_for_a_from_dlpack_that_raises():
    with pytest.raises(TypeError, match=r"^x: looking for the from_dlpack") as caught:
        rmsnorm.rms_norm(OfRaisingName(np.ones(8, np.float32)))
    assert isinstance(caught.value.__cause__, KeyError)


def test_the_library_of_a_type_whose_module_has_a_long_name():
    module = types.ModuleType("m" * 200)
    kind = type("Array", (Producer,), {"__module__": module.__name__})

    def from_dlpack(array):
        return ("of the module", np.from_dlpack(array))

    from_dlpack.__module__ = module.__name__
    module.from_dlpack = from_dlpack
    sys.modules[module.__name__] = module
    try:
        made, _ = rmsnorm.rms_norm(kind(np.ones(8, np.float32)))
    finally:
        del sys.modules[module.__name__]
    assert made == "of the module"


class OddText(str):
    def __iter__(self):
        raise KeyError("iter")

    def __repr__(self):
        raise ZeroDivisionError

    def __hash__(self):
        return super().__hash__()


def test_hints_that_fail_are_left_out(monkeypatch):
    x = np.ones(8, np.float32)
    with pytest.raises(TypeError, match=r"^epz: is no argument of rms_norm"):
        rmsnorm.rms_norm(x, **{OddText("epz"): 1e-6})
    for module in ("difflib", "numbers"):
        monkeypatch.setitem(sys.modules, module, None)
    with pytest.raises(TypeError, match=r"^epz: is no argument of rms_norm"):
        rmsnorm.rms_norm(x, epz=1e-6)
    with pytest.raises(TypeError, match=r"^weight: expected an array"):
        rmsnorm.rms_norm(x, 1e-6)


def test_variant_of_text_that_answers_for_itself():
    with pytest.raises(ValueError, match=r"^name: expected a model_type.* got 'nonesuch'"):
        rmsnorm.variant(OddText("nonesuch"))
    with pytest.raises(TypeError, match=r"^name: expected a string"):
        rmsnorm.variant(type("SaysText", (), {"__class__": str})())


class StrangeName:
    pass


StrangeName.__qualname__ = StrangeName.__module__ = "\ud800" * 100


@pytest.mark.parametrize(
    "call",
    [
        lambda x: rmsnorm.rms_norm(StrangeName()),
        lambda x: rmsnorm.rms_norm(x, eps=StrangeName()),
        lambda x: rmsnorm.rms_norm(x, **{"\ud800" * 100: 1}),
        lambda x: rmsnorm.rms_norm(x, **{"\0" * 100: 1}),
        lambda x: rmsnorm.rms_norm(x, rounding="\ud800" * 100),
        lambda x: rmsnorm.variant("\ud800" * 100),
        lambda x: rmsnorm.torch.rms_norm(torch.from_numpy(x), (8,) * 10000),
        lambda x: rmsnorm.torch.rms_norm(torch.from_numpy(x), 10**4000),
        lambda x: rmsnorm.torch.RMSNorm(10**4000),
    ],
)
def test_escaped_and_long_values_are_clipped_as_shown(call):
    with pytest.raises((TypeError, ValueError)) as caught:
        call(np.ones((2, 8), np.float32))
    assert len(str(caught.value)) < 300


class OddModule(str):
    def rpartition(self, separator):
        return self, separator, ""


@pytest.mark.parametrize("name", ["." * 10**6, OddModule("a.b"), "a" * 10**6])
def test_the_library_of_a_type_whose_module_is_no_name(name):
    kind = type("Array", (Producer,), {})
    kind.__module__ = name
    x = np.linspace(-1, 2, 8, dtype=np.float32)
    y = rmsnorm.rms_norm(kind(x))
    np.testing.assert_array_equal(np.from_dlpack(y), rmsnorm.rms_norm(x))


def test_an_exception_whose_class_hides_its_cause():
    class Hiding(TypeError):
        __cause__ = property(lambda self: {}["cause"])

    class Failing(Producer):
        def __dlpack__(self, **options):
            raise Hiding

    with pytest.raises(TypeError, match=r"^x: its __dlpack__ failed"):
        rmsnorm.rms_norm(Failing(np.ones(8, np.float32)))
