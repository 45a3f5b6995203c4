"""Cases for test_moving_arrays.py: code of the caller's that moves an array of the call while the call
is read, or while its results are allocated.

With MALLOC_MMAP_THRESHOLD_ the memory of an array that is freed leaves the process at once, so that
reading it is a crash.
"""

import gc
import itertools
import sys
import types

import isolation
import numpy as np
import rmsnorm
import torch
from floats import BF16, F32
from hostile_arrays import Producer
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from wrong_calls import CALLS

CASES = {}
case = isolation.entering(CASES)
ROWS, COLUMNS = 16, 1024


# ---- calls of a size ----


def large(operation):
    """The arguments of a right call: where CALLS has 3 rows of 8, many and long ones."""
    sizes = {3: ROWS, 8: COLUMNS}
    return {
        name: np.full([sizes[s] for s in value.shape], 1, F32)
        for name, value in CALLS[operation][0]().items()
    }


def as_torch(arguments):
    return {name: torch.tensor(a) for name, a in arguments.items()}


# ---- how arrays move ----


def set_state(array):
    array.__setstate__((1, (1,), np.dtype(F32), False, b"\0\0\0\0"))


def set_shape(array):
    array.resize((1, 2), refcheck=False)
    array.shape = (2,)


def set_dtype(array):
    array.resize(4, refcheck=False)
    array.dtype = np.int32


def set_data(tensor):
    tensor.data = torch.zeros(1)


NUMPY_MOVES = {
    "resize": lambda a: a.resize(0, refcheck=False),
    "resize to one": lambda a: a.resize((1, 1), refcheck=False),
    "__setstate__": set_state,
    "shape": set_shape,
    "dtype": set_dtype,
    "reallocate": lambda a: a.resize((2 * ROWS, 4 * COLUMNS), refcheck=False),
}
TORCH_MOVES = {
    "resize_": lambda t: t.resize_(0),
    "storage": lambda t: t.untyped_storage().resize_(0),
    "set_": lambda t: t.set_(torch.zeros(1)),
    "data": set_data,
}


class Option:
    """A number that moves an array as it is read."""

    def __init__(self, number, move):
        self.number, self.move = number, move

    def __float__(self):
        self.move()
        return float(self.number)

    def __index__(self):
        self.move()
        return self.number


class Moving(Producer):
    """A DLPack producer that moves another array at each of its methods that is in `at`."""

    def __init__(self, array, move, *at):
        super().__init__(array)
        self.move, self.at = move, at

    def _asked(self, method):
        if method in self.at:
            self.move()

    def __dlpack_device__(self):
        self._asked("__dlpack_device__")
        return super().__dlpack_device__()

    def __dlpack__(self, **options):
        self._asked("__dlpack__")
        return super().__dlpack__(**options)

    def __array_namespace__(self, api_version=None):
        self._asked("__array_namespace__")
        return Namespace(self)


class Namespace:
    def __init__(self, producer):
        self.producer = producer

    def __getattr__(self, name):
        self.producer._asked(name)
        return getattr(np, name)


def run(function, arguments):
    """It raises an error that names an argument, or returns."""
    try:
        function(**arguments)
    except (TypeError, ValueError, RuntimeError) as error:
        assert str(error).split(":")[0] in {*arguments, "result", "stream"}, error


OPTIONS = {"eps": 0, "weight_offset": 0, "axis": -1, "partial": 1}
TAKEN = {
    "rms_norm": ("eps", "weight_offset", "axis", "partial"),
    "add": ("eps", "weight_offset", "axis"),
    "apply": ("eps", "weight_offset", "axis"),
    "backward": ("eps", "weight_offset", "axis", "partial"),
    "mean_square": (),
}


def moved_by_an_option(make, moves):
    for operation, (_, function) in CALLS.items():
        for option, victim in itertools.product(TAKEN[operation], large(operation)):
            for move in moves.values():
                arguments = make(large(operation))
                target = arguments[victim]
                hostile = Option(OPTIONS[option], lambda move=move, target=target: move(target))
                run(function, {**arguments, option: hostile})


@case("NumPy arrays moved by an option")
def _():
    moved_by_an_option(lambda arguments: arguments, NUMPY_MOVES)


@case("torch tensors moved by an option")
def _():
    moved_by_an_option(as_torch, TORCH_MOVES)


@case("an array that an option empties is empty")
def _():
    x = np.ones((ROWS, COLUMNS), F32)
    y = rmsnorm.rms_norm(x, eps=Option(1, lambda: x.resize((3, 0), refcheck=False)))
    assert y.shape == (3, 0)


@case("the dtype that out_dtype is asked for moves x")
def _():
    x = np.ones((ROWS, COLUMNS), F32)

    def native(self):
        x.resize(0, refcheck=False)
        return True

    members = {"__module__": "numpy", "isnative": property(native), "name": "float64"}
    run(rmsnorm.rms_norm, {"x": x, "out_dtype": type("dtype", (), members)()})


class MovingName:
    """A dtype's name that moves an array as it is asked for."""

    __name__ = "float32"

    def __init__(self, move):
        self.move = move

    @property
    def __module__(self):
        self.move()
        return "numpy"


@case("the dtype that out_dtype is asked for moves each array of a call with out")
def _():
    for operation, function in (("rms_norm", rmsnorm.rms_norm), ("apply", rmsnorm.rms_norm_apply)):
        for name in large(operation):
            for move in NUMPY_MOVES.values():
                arguments = large(operation)
                moving = MovingName(lambda a=arguments[name], move=move: move(a))
                run(function, {**arguments, "out_dtype": moving})


@case("the module that is asked for bfloat16 moves an array that has been read")
def _():
    real = sys.modules["ml_dtypes"]
    x, out = np.ones((ROWS, COLUMNS), F32), np.zeros((ROWS, COLUMNS), F32)
    weight = np.ones(COLUMNS, BF16)

    class Moving(types.ModuleType):
        def __getattr__(self, name):
            x.resize(0, refcheck=False)
            return getattr(real, name)

    sys.modules["ml_dtypes"] = Moving("ml_dtypes")
    try:
        rmsnorm.rms_norm(x, weight, out=out)
    except ValueError as error:
        assert str(error).startswith("x: its memory"), error
    else:
        raise AssertionError("the call was not refused")
    finally:
        sys.modules["ml_dtypes"] = real
    assert not out.any()


# ---- other arrays ----


def moved_by_another(make, moves, *at):
    for operation, (_, function) in CALLS.items():
        names = list(large(operation))
        for hostile, victim in itertools.permutations(names, 2):
            for move in moves.values():
                arguments = make(large(operation))
                target = arguments[victim]
                array = large(operation)[hostile]
                arguments[hostile] = Moving(array, lambda m=move, t=target: m(t), *at)
                run(function, arguments)


@case("NumPy arrays moved by another's export")
def _():
    moved_by_another(lambda arguments: arguments, NUMPY_MOVES, "__dlpack__")


@case("NumPy arrays moved by another's device")
def _():
    moved_by_another(lambda arguments: arguments, NUMPY_MOVES, "__dlpack_device__")


@case("torch tensors moved by another's export")
def _():
    moved_by_another(as_torch, TORCH_MOVES, "__dlpack__")


# ---- results ----


def moved_by_a_result(make, moves, *at):
    """x makes the results, of which none is given."""
    for operation, (_, function) in CALLS.items():
        names = [name for name in large(operation) if "out" not in name and name != "x"]
        for victim in names:
            for move in moves.values():
                arguments = make({name: large(operation)[name] for name in ("x", *names)})
                target = arguments[victim]
                hostile = Moving(
                    large(operation)["x"], lambda m=move, t=target: m(t), "__dlpack__", *at
                )
                hostile.at = at
                run(function, {**arguments, "x": hostile})


@case("NumPy arrays moved by x's namespace")
def _():
    for at in ("__array_namespace__", "from_dlpack"):
        moved_by_a_result(lambda arguments: arguments, NUMPY_MOVES, at)


@case("torch tensors moved by x's namespace")
def _():
    moved_by_a_result(as_torch, TORCH_MOVES, "__array_namespace__")


@case("an array moved by x's namespace is named")
def _():
    weight = np.ones(COLUMNS, F32)
    x = Moving(
        np.ones((ROWS, COLUMNS), F32),
        lambda: weight.resize(0, refcheck=False),
        "__array_namespace__",
    )
    try:
        rmsnorm.rms_norm(x, weight)
    except ValueError as error:
        assert str(error).startswith("weight: "), error
    else:
        raise AssertionError("was not refused")


class FunctionMode(TorchFunctionMode):
    def __init__(self, move):
        super().__init__()
        self.move = move

    def __torch_function__(self, function, types, args=(), kwargs=None):
        self.move(function)
        return function(*args, **(kwargs or {}))


class DispatchMode(TorchDispatchMode):
    def __init__(self, move):
        super().__init__()
        self.move = move

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        self.move(function)
        return function(*args, **(kwargs or {}))


def moves_at(asked, move, target):
    """Moves the target at the question of that number, and at no other."""
    count = itertools.count()

    def maybe(function):
        if next(count) == asked:
            with torch._C.DisableTorchFunction(), torch._C._DisableTorchDispatch():
                move(target)

    return maybe, count


@case("torch tensors moved by a mode")
def _():
    asked = set()
    for mode, (move, allocates) in itertools.product(
        (FunctionMode, DispatchMode), itertools.product(TORCH_MOVES.values(), (False, True))
    ):
        for victim, number in itertools.product(("x", "weight", "out"), range(12)):
            arguments = as_torch(large("rms_norm"))
            arguments.pop("bias")
            target = arguments[victim]
            if allocates:
                arguments.pop("out")
            maybe, count = moves_at(number, move, target)
            with mode(maybe):
                run(rmsnorm.rms_norm, arguments)
            asked.add((mode, next(count)))
    assert (FunctionMode, 0) not in asked, asked


class MovedStatistics(TorchFunctionMode):
    """Gives new tensors an odd address, where it is asked whether they are negated, and moves those
    of rows then."""

    asked = 0

    def __torch_function__(self, function, types, args=(), kwargs=None):
        name = getattr(function, "__name__", "")
        with torch._C.DisableTorchFunction():
            if name == "is_neg" and args[0].dim() == 1:
                self.asked += 1
                set_data(args[0])
                return False
            result = function(*args, **(kwargs or {}))
            if name in ("new_empty", "empty_like"):
                storage = torch.zeros(result.numel() + 1).untyped_storage()
                result.set_(storage, 1, result.shape, result.stride())
            return result


@case("results with one number for each row moved by a mode")
def _():
    x = torch.ones(4096, 4)
    for call in (
        lambda: rmsnorm.rms_norm(x, return_rstd=True),
        lambda: rmsnorm.add_rms_norm(x, x, return_rstd=True),
        lambda: rmsnorm.mean_square(x),
        lambda: rmsnorm.rms_norm_backward(x, x, mean_square=torch.ones(4096)),
    ):
        with MovedStatistics() as mode:
            try:
                call()
            except ValueError as error:
                assert str(error).startswith("result: "), error
            else:
                raise AssertionError("was not refused")
        assert mode.asked > 0


@case("an array moved by a finalizer that the garbage collector runs")
def _():
    class Cycle:
        def __init__(self, move):
            self.move, self.cycle = move, self

        def __del__(self):
            self.move()

    before = gc.get_threshold()
    for threshold in range(1, 12):
        x, weight = np.ones((ROWS, COLUMNS), F32), np.ones(COLUMNS, F32)
        gc.collect()
        gc.set_threshold(threshold)
        Cycle(lambda x=x: x.resize(0, refcheck=False))
        run(rmsnorm.rms_norm, {"x": x, "weight": weight})
        gc.set_threshold(*before)


if __name__ == "__main__":
    isolation.main(CASES)
