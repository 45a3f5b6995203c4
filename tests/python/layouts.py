"""The same values at many strides and alignments, in storage whose other bytes are watched."""

import numpy as np

LAYOUTS = (
    "contiguous",
    "padded_rows",
    "offset_1",
    "offset_3",
    "inner_stride_2",
    "reversed_elements",
    "reversed_rows",
    "transposed",
    "slice_of_packed",
    "not_collapsible",
    "broadcast_rows",
)
OUTPUT_LAYOUTS = tuple(name for name in LAYOUTS if name != "broadcast_rows")

CANARY = 0xA5
MARGIN = 64  # elements in front of and behind the view


def _c_strides(shape):
    strides = [1] * len(shape)
    for axis in range(len(shape) - 2, -1, -1):
        strides[axis] = strides[axis + 1] * shape[axis + 1]
    return strides


def element_strides(shape, layout):
    """Strides in elements; those of "contiguous" layouts differ from C order only where named."""
    shape = tuple(max(1, size) for size in shape)
    if layout in ("contiguous", "offset_1", "offset_3"):
        return _c_strides(shape)
    if layout == "padded_rows":
        return _c_strides(shape[:-1] + (shape[-1] + 5,))
    if layout == "inner_stride_2":
        strides = _c_strides(shape[:-1] + (2 * shape[-1],))
        return strides[:-1] + [2]
    if layout == "reversed_elements":
        strides = _c_strides(shape)
        return strides[:-1] + [-1]
    if layout == "reversed_rows":
        strides = _c_strides(shape)
        return [-strides[0]] + strides[1:]
    if layout == "transposed":
        return _c_strides(shape[::-1])[::-1]
    if layout == "slice_of_packed":  # [:, 1] of an array with three of these side by side
        strides = _c_strides(shape)
        return [3 * strides[0]] + strides[1:]
    if layout == "not_collapsible":
        return _c_strides(tuple(size + 1 for size in shape))
    if layout == "broadcast_rows":
        return [0] + _c_strides(shape)[1:]
    raise ValueError(layout)


class Placed:
    """An array of the given values in a layout.

    view: the array to hand to the package. untouched(): whether every byte of the storage outside
    the view still holds the canary. With broadcast_rows only the first row is stored.
    """

    def __init__(self, values, layout):
        values = np.asarray(values)
        strides = element_strides(values.shape, layout)
        reach = [(size - 1) * stride for size, stride in zip(values.shape, strides) if size > 0]
        first = (
            MARGIN - sum(min(0, r) for r in reach) + {"offset_1": 1, "offset_3": 3}.get(layout, 0)
        )
        count = first + sum(max(0, r) for r in reach) + 1 + MARGIN
        item = values.dtype.itemsize
        raw = np.full(count * item + 64, CANARY, np.uint8)
        start = -raw.ctypes.data % 64
        self.storage = raw[start : start + count * item]
        byte_strides = [s * item for s in strides]
        self.view = np.ndarray(values.shape, values.dtype, self.storage, first * item, byte_strides)
        index = np.arange(count * item, dtype=np.int64)[: count * item].reshape(count, item)
        owned = np.lib.stride_tricks.as_strided(
            index[first:], values.shape + (item,), [s * 8 * item for s in strides] + [8]
        )
        self._outside = np.ones(count * item, bool)
        self._outside[owned.ravel()] = False
        if values.size:
            if layout == "broadcast_rows":
                self.view[0] = values[0]
            else:
                self.view[...] = values

    def untouched(self):
        return bool((self.storage[self._outside] == CANARY).all())


def empty(shape, dtype, layout="contiguous"):
    """An output: watched storage, with the view itself filled with canaries as well."""
    placed = Placed(np.zeros(shape, dtype), layout)
    placed.storage[:] = CANARY
    return placed


def written_nowhere(placed):
    return bool((placed.storage == CANARY).all())
