"""RMSNorm as a module."""

from __future__ import annotations

from collections.abc import Sequence
from numbers import Real
from typing import SupportsIndex

import torch
from torch import Tensor
from torch.nn import Module, Parameter

from .._checks import number, repr_text, type_text
from .._typing import Rounding
from .functional import rms_norm, sizes_of


class RMSNorm(Module):
    """torch.nn.RMSNorm, computed by rmsnorm, with the options of the models that differ from it.

    Its state dict is that of torch.nn.RMSNorm: ``weight``, or nothing without elementwise_affine;
    with bias=True also ``bias``.

    Args:
        normalized_shape: The last dimensions of the input, one or several; integers of any type.
        eps: As in rms_norm.
        elementwise_affine: Whether there is a weight, of shape normalized_shape. It starts where
            weight_offset + weight is one.
        device, dtype: Of the parameters.
        bias: Whether there is a bias, of the same shape, starting at zero; needs
            elementwise_affine.
        weight_offset, rounding: As in rms_norm; see rmsnorm.variant for those of a model.

    Shape:
        ``(*, *normalized_shape)``, of input and result.

    Examples:
        >>> import torch
        >>> import rmsnorm.torch
        >>> norm = rmsnorm.torch.RMSNorm(2, eps=0.0, weight_offset=1.0)
        >>> norm
        RMSNorm((2,), eps=0.0, elementwise_affine=True, weight_offset=1.0)
        >>> norm(torch.tensor([[1.0, 7.0]])).detach()
        tensor([[0.2000, 1.4000]])
    """

    normalized_shape: tuple[int, ...]
    eps: float | None
    elementwise_affine: bool
    weight_offset: float
    rounding: Rounding
    weight: Parameter | None
    bias: Parameter | None

    def __init__(
        self,
        normalized_shape: SupportsIndex | Sequence[SupportsIndex],
        eps: float | None = None,
        elementwise_affine: bool = True,
        device: torch.device | str | int | None = None,
        dtype: torch.dtype | None = None,
        *,
        bias: bool = False,
        weight_offset: float = 0.0,
        rounding: Rounding = "once",
    ) -> None:
        super().__init__()
        self.normalized_shape = sizes_of(normalized_shape)
        if not all(0 <= n < 2**63 for n in self.normalized_shape if isinstance(n, int)):
            raise ValueError(
                "normalized_shape: expected sizes of 0 and more, within 64 bits, "
                f"got {repr_text(normalized_shape)}"
            )
        if isinstance(weight_offset, bool) or not isinstance(weight_offset, Real):
            raise TypeError(f"weight_offset: expected a number, got {type_text(weight_offset)}")
        number(weight_offset, "weight_offset")
        self.eps = eps
        self.elementwise_affine = elementwise_affine
        self.weight_offset = weight_offset
        self.rounding = rounding
        if not elementwise_affine and (bias or weight_offset != 0.0):
            name = "bias" if bias else "weight_offset"
            raise ValueError(f"{name}: was given with elementwise_affine=False")

        def parameter() -> Parameter:
            return Parameter(torch.empty(self.normalized_shape, device=device, dtype=dtype))

        self.register_parameter("weight", parameter() if elementwise_affine else None)
        self.register_parameter("bias", parameter() if bias else None)
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Sets weight so that weight_offset + weight is one, and bias to zero."""
        if self.weight is not None:
            torch.nn.init.constant_(self.weight, 1.0 - self.weight_offset)
        if self.bias is not None:
            torch.nn.init.zeros_(self.bias)

    def forward(self, input: Tensor) -> Tensor:
        return rms_norm(
            input,
            self.normalized_shape,
            self.weight,
            self.eps,
            bias=self.bias,
            weight_offset=self.weight_offset,
            rounding=self.rounding,
        )

    def extra_repr(self) -> str:
        text = (
            f"{self.normalized_shape}, eps={self.eps}, elementwise_affine={self.elementwise_affine}"
        )
        if self.bias is not None:
            text += ", bias=True"
        if self.weight_offset != 0.0:
            text += f", weight_offset={self.weight_offset}"
        if self.rounding != "once":
            text += f", rounding={self.rounding!r}"
        return text
