"""The operators under torch.vmap: the batch dimension becomes one more dimension of rows."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from .._checks import require_broadcast
from . import operators  # noqa: F401  defines them
from .arguments import require_axis
from .registration import implementations

_library = implementations(__name__)


def _sample_shape(tensor: Tensor, dim: int | None) -> tuple[int, ...]:
    shape = list(tensor.shape)
    if dim is not None:
        del shape[dim]
    return tuple(shape)


class _Batch:
    """Puts the batch dimension of every tensor first.

    What fits the batch and not a sample is refused: a weight may not broadcast along the samples,
    nor the norm be of them.
    """

    def __init__(self, info: Any, x: Tensor, x_dim: int | None, axis: int) -> None:
        self.size: int = info.batch_size
        self._axis = axis
        self._sample = _sample_shape(x, x_dim)
        require_axis(axis, self._sample)

    def rows(self, tensor: Tensor | None, dim: int | None) -> Tensor | None:
        """A tensor with the shape of x, or of x without its normalized axes."""
        if tensor is None:
            return None
        if dim is None:
            return tensor.expand(self.size, *tensor.shape)
        return tensor.movedim(dim, 0)

    def shared(self, name: str, tensor: Tensor | None, dim: int | None) -> Tensor | None:
        """A weight or bias, as it is where all samples share it."""
        if tensor is None or dim is not None:
            return self.of_each_sample(name, tensor, dim)
        require_broadcast(name, tensor.shape, self._sample, self._axis)
        return tensor

    def of_each_sample(self, name: str, tensor: Tensor | None, dim: int | None) -> Tensor | None:
        """A weight or bias with a batch dimension, before those that broadcast against x's."""
        moved = self.rows(tensor, dim)
        if moved is None:
            return None
        require_broadcast(name, moved.shape[1:], self._sample, self._axis)
        ones = (1,) * (len(self._sample) + 1 - moved.dim())
        return moved.reshape(self.size, *ones, *moved.shape[1:])


@torch.library.register_vmap("rmsnorm::rms_norm", lib=_library)
def _(
    info: Any,
    in_dims: tuple[int | None, ...],
    x: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    *options: Any,
) -> tuple[tuple[Tensor, ...], tuple[int, ...]]:
    batch = _Batch(info, x, in_dims[0], options[1])
    results = torch.ops.rmsnorm.rms_norm(
        batch.rows(x, in_dims[0]),
        batch.shared("weight", weight, in_dims[1]),
        batch.shared("bias", bias, in_dims[2]),
        *options,
    )
    return results, (0, 0)


@torch.library.register_vmap("rmsnorm::add_rms_norm", lib=_library)
def _(
    info: Any,
    in_dims: tuple[int | None, ...],
    x: Tensor,
    residual: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    *options: Any,
) -> tuple[tuple[Tensor, ...], tuple[int, ...]]:
    batch = _Batch(info, x, in_dims[0], options[1])
    results = torch.ops.rmsnorm.add_rms_norm(
        batch.rows(x, in_dims[0]),
        batch.rows(residual, in_dims[1]),
        batch.shared("weight", weight, in_dims[2]),
        batch.shared("bias", bias, in_dims[3]),
        *options,
    )
    return results, (0, 0, 0)


@torch.library.register_vmap("rmsnorm::rms_norm_backward", lib=_library)
def _(
    info: Any,
    in_dims: tuple[int | None, ...],
    dy: Tensor,
    x: Tensor,
    residual: Tensor | None,
    weight: Tensor | None,
    bias: Tensor | None,
    rstd: Tensor | None,
    d_residual: Tensor | None,
    *options: Any,
) -> tuple[tuple[Tensor, ...], tuple[int | None, ...]]:
    """Every sample has a dweight of its own, also where the samples share the weight."""
    batch = _Batch(info, x, in_dims[1], options[1])
    dx, dweight, dbias = torch.ops.rmsnorm.rms_norm_backward(
        batch.rows(dy, in_dims[0]),
        batch.rows(x, in_dims[1]),
        batch.rows(residual, in_dims[2]),
        batch.of_each_sample("weight", weight, in_dims[3]),
        batch.of_each_sample("bias", bias, in_dims[4]),
        batch.rows(rstd, in_dims[5]),
        batch.rows(d_residual, in_dims[6]),
        *options,
    )

    def unpadded(
        gradient: Tensor, like: Tensor | None, dim: int | None
    ) -> tuple[Tensor, int | None]:
        if like is None:
            return gradient, None
        shape = list(like.shape)
        if dim is not None:
            del shape[dim]
        return gradient.reshape(batch.size, *shape), 0

    needs_dweight: bool = options[-1]
    dweight, dweight_dim = unpadded(dweight, weight if needs_dweight else None, in_dims[3])
    dbias, dbias_dim = unpadded(dbias, bias, in_dims[4])
    return (dx, dweight, dbias), (0, dweight_dim, dbias_dim)
