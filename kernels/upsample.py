"""Bilinear upsampling as two matrix products.

Upsampling is linear and acts on rows and columns apart: y = A x C^T for each channel. A (H, h) and
C (W, w) are constant and have two numbers in a row that are not zero. On a GPU these products are
several times faster than PyTorch's own upsampling, zeros and all. PyTorch's backward pass adds with
atomics there, in another order in each run. The gradient A^T g C is two products as well and has
the same bits in every run. On a CPU PyTorch's own upsampling is faster where channels are last.

Work, for an output of H x W: 2 h H w + 2 w H W operations a channel, where 8 H W would do. Traffic:
x once, the map (H, w) between the products twice, y once; the same backward.

Letters: B batch, C channels, h w the input's size, H W the output's.
"""

from functools import lru_cache

import torch
import torch.nn.functional as F
from torch import Tensor

from kernels.choose import use_triton


def upsample_reference(x: Tensor, size: tuple[int, int]) -> Tensor:
    """PyTorch's bilinear interpolation, pixel centres at half integers."""
    return F.interpolate(x, size, mode="bilinear", align_corners=False)


def upsample(x: Tensor, size: tuple[int, int]) -> Tensor:
    """x (B, C, h, w), floating point -> (B, C, H, W) of the same dtype, bilinear; `size` is (H, W).

    Channels-last stays channels-last. Smaller sizes are interpolated too, as PyTorch does: without
    a low-pass filter. Raises ValueError when x has not four dimensions.
    """
    if x.dim() != 4:
        raise ValueError(f"upsample takes x (B, C, h, w); got {tuple(x.shape)}")
    if use_triton(x):
        return interpolate(x, *size, transposed=False)
    return upsample_reference(x, size)


@torch.library.custom_op("ctclm::interpolate", mutates_args=())
def interpolate(x: Tensor, H: int, W: int, transposed: bool) -> Tensor:
    """A x C^T, (B, C, h, w) -> (B, C, H, W). Or with the transposed matrices of the way back, from
    H x W to x's size, which is the gradient of that. The smaller map comes between the products."""
    B, C, h, w = x.shape
    if transposed:
        rows, columns = (interpolation_matrix(*n, x.dtype, x.device).T for n in ((H, h), (W, w)))
    else:
        rows, columns = (interpolation_matrix(*n, x.dtype, x.device) for n in ((h, H), (w, W)))
    with torch.autocast(x.device.type, enabled=False):  # in x's dtype, as PyTorch interpolates
        if not is_channels_last(x):
            return rows @ (x @ columns.T) if transposed else (rows @ x) @ columns.T
        pixels = x.permute(0, 2, 3, 1)  # (B, h, w, C), contiguous
        if transposed:
            out = rows @ (columns @ pixels).view(B, h, W * C)
        else:
            out = columns @ (rows @ pixels.reshape(B, h, w * C)).view(B, H, w, C)
        return out.view(B, H, W, C).permute(0, 3, 1, 2)


@interpolate.register_fake
def _(x, H, W, transposed):
    B, C, _, _ = x.shape
    layout = torch.channels_last if is_channels_last(x) else torch.contiguous_format
    return torch.empty((B, C, H, W), dtype=x.dtype, device=x.device, memory_format=layout)


def keep_size(ctx, inputs, output):
    x, _, _, ctx.transposed = inputs
    ctx.size = x.shape[-2:]


def backward(ctx, gradient):
    return interpolate(gradient, *ctx.size, transposed=not ctx.transposed), None, None, None


interpolate.register_autograd(backward, setup_context=keep_size)


def is_channels_last(x: Tensor) -> bool:
    return x.is_contiguous(memory_format=torch.channels_last)


@lru_cache(None)  # none is ever freed: a CUDA graph reads them by address
def interpolation_matrix(n: int, N: int, dtype: torch.dtype, device: torch.device) -> Tensor:
    """Linear interpolation of n numbers to N as a matrix (N, n): interpolate the identity."""
    identity = torch.eye(n, dtype=torch.float64)
    matrix = F.interpolate(identity[None], N, mode="linear", align_corners=False)[0].T
    return matrix.to(dtype).contiguous().to(device)  # last, so that every stream may read it
