"""Linear layers and convolutions whose bias learns by a kernel.

The gradient of a bias is the sum of the rows of dy, one row for each token or pixel. PyTorch's sum
over a quarter of a million short rows reads them at a seventh of the memory's rate: such sums took
a tenth of a training step of b0, five times as long as attention. It also rounds each of them to
the 16 bits that autocast computes in, while a bias has 32.

Everything else is PyTorch's. The product or the convolution adds a detached bias, and an operation
that changes nothing follows it, whose backward pass sums.

Work: an addition for each number of dy. Traffic: dy once.

Letters: B batch, C channels, H W pixels.
"""

from __future__ import annotations  # tl.constexpr must not be looked up where Triton is missing

import torch
import torch.nn.functional as F
from torch import Tensor

from kernels.choose import jit, on_device_of, tl, triton, use_triton
from kernels.norm import load_rows, split, sum_parts, tile_of


def linear(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    """F.linear: x (..., c), weight (C, c), bias (C,), floating point -> (..., C)."""
    if learns_by_kernel(x, bias):
        return LearnBias.apply(F.linear(x, weight, bias.detach()), bias, -1)
    return F.linear(x, weight, bias)


def conv2d(
    x: Tensor, weight: Tensor, bias: Tensor, stride=1, padding=0, dilation=1, groups: int = 1
) -> Tensor:
    """F.conv2d: x (B, c, h, w), weight (C, c / groups, kh, kw), bias (C,) -> (B, C, H, W)."""
    options = stride, padding, dilation, groups
    if learns_by_kernel(x, bias):
        return LearnBias.apply(F.conv2d(x, weight, bias.detach(), *options), bias, -3)
    return F.conv2d(x, weight, bias, *options)


def learns_by_kernel(x: Tensor, bias: Tensor) -> bool:
    """torch.compile joins the sum with what makes its rows, and is left to do so."""
    fits = 0 < bias.numel() <= LARGEST_ROW and x.numel() > 0
    fits = fits and torch.float64 not in (x.dtype, bias.dtype)
    learns = torch.is_grad_enabled() and bias.requires_grad and not torch.compiler.is_compiling()
    return learns and use_triton(x, fits)


def row_sum_reference(rows: Tensor) -> Tensor:
    """(..., C) -> (C,): what a bias learns from its rows."""
    return rows.flatten(0, -2).sum(0)


# --- The kernel ----------------------------------------------------------------------------------

NUMBERS = 4096  # of a tile, 32 a thread: in 16 bits, four reads of 16 bytes under way
LARGEST_ROW = NUMBERS  # channels


@jit
def row_sum_kernel(
    rows_ptr,  # (rows, C)
    parts_ptr,  # (programs, C) float32
    rows,
    C: tl.constexpr,
    ROWS: tl.constexpr,
    WIDTH: tl.constexpr,
    TILES: tl.constexpr,
):
    """TILES tiles, each as many tiles behind the last as there are programs."""
    program, programs, c = tl.program_id(0), tl.num_programs(0), tl.arange(0, WIDTH)
    total = tl.zeros((ROWS, WIDTH), tl.float32)
    for t in range(TILES):
        total += load_rows(rows_ptr, (program + t * programs) * ROWS, rows, C, ROWS, WIDTH)
    tl.store(parts_ptr + program * C + c, tl.sum(total, 0), c < C)


# --- What PyTorch sees ---------------------------------------------------------------------------


@torch.library.custom_op("ctclm::row_sum", mutates_args=())
def row_sum(rows: Tensor, dtype: torch.dtype) -> Tensor:
    """(..., C) -> (C,) of that dtype, added up in float32 and in an order that the shape fixes."""
    rows = rows.contiguous()
    C = rows.shape[-1]
    count, tile = rows.numel() // C, tile_of(C, NUMBERS)
    programs, tiles = split(triton.cdiv(count, tile.rows))
    parts = rows.new_empty(1, programs, C, dtype=torch.float32)
    total = rows.new_empty(C, dtype=dtype)
    with on_device_of(rows):
        row_sum_kernel[(programs,)](
            rows, parts, count, C, tile.rows, tile.width, tiles, num_warps=tile.warps
        )
        sum_parts(parts, total)
    return total


@row_sum.register_fake
def _(rows, dtype):
    return rows.new_empty(rows.shape[-1], dtype=dtype)


def keep_shape(ctx, inputs, output):
    ctx.shape, ctx.dtype = inputs[0].shape, inputs[0].dtype


row_sum.register_autograd(
    lambda ctx, g: (g.to(ctx.dtype).expand(ctx.shape), None), setup_context=keep_shape
)


class LearnBias(torch.autograd.Function):
    """y, to which a detached bias was added along `dim` -> y.

    A view: it cannot be changed in place, and PyTorch says so where something tries.
    """

    @staticmethod
    def forward(ctx, y: Tensor, bias: Tensor, dim: int) -> Tensor:
        ctx.dim, ctx.dtype = dim, bias.dtype
        return y.view_as(y)

    @staticmethod
    def backward(ctx, dy: Tensor):
        return dy, row_sum(dy.movedim(ctx.dim, -1), ctx.dtype), None
