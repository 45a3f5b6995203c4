"""Between the arrays of this suite and torch's tensors, bf16 included, without a copy."""

import numpy as np
import torch
from floats import BF16, F16, F32

TORCH = {F16: torch.float16, BF16: torch.bfloat16, F32: torch.float32}


def to_torch(array):
    if array.dtype == BF16:
        return torch.from_numpy(array.view(np.int16)).view(torch.bfloat16)
    return torch.from_numpy(array)


def to_numpy(tensor):
    tensor = tensor.detach()
    if tensor.dtype == torch.bfloat16:
        return tensor.view(torch.int16).numpy().view(BF16)
    return tensor.numpy()


def torch_rstd(x, eps, by_power=False):
    """1 / sqrt(mean(x**2) + eps) of an array's rows as torch computes it in f32, as a column."""
    mean_square = to_torch(x).float().pow(2).mean(-1, keepdim=True) + eps
    return to_numpy(torch.pow(mean_square, -0.5) if by_power else torch.rsqrt(mean_square))
