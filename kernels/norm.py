"""Layer normalisation of rows that are short.

A row is what one token has: 32 to 512 channels, and there are a quarter of a million of them at
stage 1. PyTorch gives each row a block of threads, so the number of rows decides its time. Here a
program takes a tile of rows. Whatever the dtypes, it computes in float32.

Under autocast PyTorch returns float32, which the products that follow cast to bfloat16 again: the
result is written, read and written once more. `dtype` says what to return at once.

Work, for each number of x: about 8 operations forward and 20 backward. Traffic: x and y once
forward; x, dy and dx once backward. Mean and variance are computed again in the backward pass,
which has each row in registers anyway, so nothing but x is kept.

Letters: C channels.
"""

from __future__ import annotations  # tl.constexpr must not be looked up where Triton is missing

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from kernels.choose import jit, on_device_of, refuse_second_derivative, tl, triton, use_triton


def layer_norm_reference(x: Tensor, weight: Tensor, bias: Tensor, eps: float) -> Tensor:
    """PyTorch's: (x - mean) / sqrt(variance + eps) * weight + bias over the last dimension."""
    return F.layer_norm(x, weight.shape, weight, bias, eps)


def layer_norm(
    x: Tensor, weight: Tensor, bias: Tensor, eps: float, dtype: torch.dtype | None = None
) -> Tensor:
    """Each row of x to mean 0 and variance 1, times weight, plus bias (Ba et al., 2016).

    x (..., C), any strides; weight and bias (C,); floating point -> x's shape. `dtype` is that of
    the result, by default PyTorch's: x's, and float32 under autocast on a GPU. Raises ValueError
    when the shapes do not fit.
    """
    if x.dim() == 0 or weight.shape != x.shape[-1:] or bias.shape != weight.shape:
        raise ValueError(
            "layer_norm takes x (..., C), weight and bias (C,); "
            f"got {tuple(x.shape)}, {tuple(weight.shape)}, {tuple(bias.shape)}"
        )
    if use_triton(x, kernel_fits(x, weight, bias, eps)):
        return fused_layer_norm(x, weight, bias, eps, dtype or dtype_of_pytorch(x))
    y = layer_norm_reference(x, weight, bias, eps)
    return y if dtype is None else y.to(dtype)


def kernel_fits(x: Tensor, weight: Tensor, bias: Tensor, eps: float) -> bool:
    """Of both norms, this one and that of kernels/group_norm.py."""
    fits = 0 < weight.numel() <= LARGEST_ROW and x.numel() > 0 and eps > 0
    return fits and torch.float64 not in (x.dtype, weight.dtype) and weight.dtype == bias.dtype


def dtype_of_pytorch(x: Tensor) -> torch.dtype:
    """That of PyTorch's norms on a GPU: x's, and float32 under autocast."""
    return torch.float32 if torch.is_autocast_enabled(x.device.type) else x.dtype


# --- The kernels ---------------------------------------------------------------------------------

LARGEST_ROW = 1024  # channels: longer rows keep PyTorch's block of threads busy


class Tile(NamedTuple):
    rows: int
    width: int  # C, rounded up to a power of two
    warps: int


def tile_of(C: int, numbers: int = 2048) -> Tile:
    """Rows of `numbers` numbers in all. 2048 are 16 a thread: four reads of 16 bytes under way in
    float32, and no register spills."""
    width = max(16, triton.next_power_of_2(C))
    return Tile(max(1, numbers // width), width, 4)


@jit
def load_rows(matrix_ptr, first, rows, C: tl.constexpr, ROWS: tl.constexpr, WIDTH: tl.constexpr):
    """Rows `first`... of a matrix (rows, C) in float32, (ROWS, WIDTH), zero beyond its ends."""
    r, c = tl.arange(0, ROWS)[:, None], tl.arange(0, WIDTH)[None, :]
    inside = (first + r < rows) & (c < C)
    return tl.load(matrix_ptr + first.to(tl.int64) * C + r * C + c, inside, 0.0).to(tl.float32)


@jit
def store_rows(
    matrix_ptr, first, rows, values, C: tl.constexpr, ROWS: tl.constexpr, WIDTH: tl.constexpr
):
    r, c = tl.arange(0, ROWS)[:, None], tl.arange(0, WIDTH)[None, :]
    inside = (first + r < rows) & (c < C)
    tl.store(matrix_ptr + first.to(tl.int64) * C + r * C + c, values, inside)


@jit
def standardised(x, eps, C: tl.constexpr, WIDTH: tl.constexpr):
    """(x - mean) / deviation, zero beyond C, and 1 / deviation of each row.

    Twice over the row, which is in registers: a mean of squares minus a square of means would lose
    all digits where the mean is large.
    """
    x -= (tl.sum(x, 1) / C)[:, None]
    if C < WIDTH:
        x = tl.where(tl.arange(0, WIDTH)[None, :] < C, x, 0.0)
    scale = tl.rsqrt(tl.sum(x * x, 1) / C + eps)
    return x * scale[:, None], scale


@jit
def forward_kernel(
    x_ptr,  # (rows, C), as y
    weight_ptr,  # (C,)
    bias_ptr,
    y_ptr,
    rows,
    eps,
    C: tl.constexpr,
    ROWS: tl.constexpr,
    WIDTH: tl.constexpr,
):
    """A tile of ROWS rows."""
    first, c = tl.program_id(0) * ROWS, tl.arange(0, WIDTH)
    weight = tl.load(weight_ptr + c, c < C, 0.0).to(tl.float32)
    bias = tl.load(bias_ptr + c, c < C, 0.0).to(tl.float32)
    x = load_rows(x_ptr, first, rows, C, ROWS, WIDTH)
    x, _ = standardised(x, eps, C, WIDTH)
    store_rows(y_ptr, first, rows, x * weight[None, :] + bias[None, :], C, ROWS, WIDTH)


@jit
def backward_kernel(
    dy_ptr,  # (rows, C), as x and dx
    x_ptr,
    weight_ptr,  # (C,)
    dx_ptr,
    parts_ptr,  # (2, programs, C) float32: of the weight's gradient, of the bias's
    rows,
    eps,
    C: tl.constexpr,
    ROWS: tl.constexpr,
    WIDTH: tl.constexpr,
    TILES: tl.constexpr,
):
    """TILES tiles, each as many tiles behind the last as there are programs. With z = (x - mean) /
    deviation, g = dy weight, and means over a row:

        dx = (g - mean(g) - z mean(g z)) / deviation      dweight = sum dy z      dbias = sum dy
    """
    program, programs, c = tl.program_id(0), tl.num_programs(0), tl.arange(0, WIDTH)
    weight = tl.load(weight_ptr + c, c < C, 0.0).to(tl.float32)
    dweight = tl.zeros((ROWS, WIDTH), tl.float32)
    dbias = tl.zeros((ROWS, WIDTH), tl.float32)
    for t in range(TILES):
        first = (program + t * programs) * ROWS
        x = load_rows(x_ptr, first, rows, C, ROWS, WIDTH)
        dy = load_rows(dy_ptr, first, rows, C, ROWS, WIDTH)
        z, scale = standardised(x, eps, C, WIDTH)
        g = dy * weight[None, :]
        dx = g - (tl.sum(g, 1) / C)[:, None] - z * (tl.sum(g * z, 1) / C)[:, None]
        store_rows(dx_ptr, first, rows, dx * scale[:, None], C, ROWS, WIDTH)
        dweight += dy * z
        dbias += dy
    parts_ptr += program * C
    tl.store(parts_ptr + c, tl.sum(dweight, 0), c < C)
    tl.store(parts_ptr + programs * C + c, tl.sum(dbias, 0), c < C)


@jit
def sum_kernel(
    parts_ptr,  # (sums, parts, C) float32
    first_ptr,  # (C,)
    second_ptr,
    parts,
    C,
    PARTS: tl.constexpr,
    COLUMNS: tl.constexpr,
):
    """Adds the parts up, all at once: program (i, 0) for the first sum, (i, 1) for the second."""
    of_second = tl.program_id(1)
    p, c = tl.arange(0, PARTS)[:, None], tl.program_id(0) * COLUMNS + tl.arange(0, COLUMNS)
    at = (of_second * parts + p) * C + c[None, :]
    total = tl.sum(tl.load(parts_ptr + at, (p < parts) & (c[None, :] < C), 0.0), 0)
    tl.store(first_ptr + c, total, (c < C) & (of_second == 0))
    tl.store(second_ptr + c, total, (c < C) & (of_second == 1))


# --- What PyTorch sees ---------------------------------------------------------------------------

# Programs of the backward pass: about four to each processor of a large GPU. Each leaves 2 C sums.
PROGRAMS = 512


@torch.library.custom_op("ctclm::layer_norm", mutates_args=())
def fused_layer_norm(
    x: Tensor, weight: Tensor, bias: Tensor, eps: float, dtype: torch.dtype
) -> Tensor:
    x, weight, bias = x.contiguous(), weight.contiguous(), bias.contiguous()
    C = x.shape[-1]
    rows, tile = x.numel() // C, tile_of(C)
    y = torch.empty_like(x, dtype=dtype)
    with on_device_of(x):
        forward_kernel[(triton.cdiv(rows, tile.rows),)](
            x, weight, bias, y, rows, eps, C, tile.rows, tile.width, num_warps=tile.warps
        )
    return y


@torch.library.custom_op("ctclm::layer_norm_backward", mutates_args=())
def fused_layer_norm_backward(
    dy: Tensor, x: Tensor, weight: Tensor, eps: float
) -> tuple[Tensor, Tensor, Tensor]:
    dy, x, weight = dy.contiguous(), x.contiguous(), weight.contiguous()
    C = x.shape[-1]
    rows, tile = x.numel() // C, tile_of(C)
    programs, tiles = split(triton.cdiv(rows, tile.rows))
    dx, dweight, dbias = torch.empty_like(x), torch.empty_like(weight), torch.empty_like(weight)
    parts = x.new_empty(2, programs, C, dtype=torch.float32)
    with on_device_of(x):
        backward_kernel[(programs,)](
            dy, x, weight, dx, parts, rows, eps, C, tile.rows, tile.width, tiles,
            num_warps=tile.warps,
        )  # fmt: skip
        sum_parts(parts, dweight, dbias)
    return dx, dweight, dbias


def sum_parts(parts: Tensor, *sums: Tensor) -> None:
    """parts (1 or 2, parts, C) -> as many vectors (C,), in a fixed order."""
    _, P, C = parts.shape
    PARTS, COLUMNS = tile_of_parts(P, C)
    grid = triton.cdiv(C, COLUMNS), len(sums)
    sum_kernel[grid](parts, sums[0], sums[-1], P, C, PARTS, COLUMNS, num_warps=8)


def tile_of_parts(parts: int, C: int) -> tuple[int, int]:
    """All parts of as many columns as make 4096 numbers, and of 32 bytes at least."""
    PARTS = triton.next_power_of_2(parts)
    return PARTS, max(8, min(triton.next_power_of_2(C), 4096 // PARTS))


def split(tiles: int) -> tuple[int, int]:
    """Programs, at most twice PROGRAMS, and how many tiles each takes: a power of two, so that
    few different kernels are compiled. From the shapes alone, so that sums are always the same."""
    each = 1 << max(0, (tiles // PROGRAMS).bit_length() - 1)
    return triton.cdiv(tiles, each), each


@fused_layer_norm.register_fake
def _(x, weight, bias, eps, dtype):
    return x.new_empty(x.shape, dtype=dtype)


@fused_layer_norm_backward.register_fake
def _(dy, x, weight, eps):
    return x.new_empty(x.shape), weight.new_empty(weight.shape), weight.new_empty(weight.shape)


def keep_for_backward(ctx, inputs, output):
    x, weight, _, ctx.eps, _ = inputs
    ctx.save_for_backward(x, weight)


def backward(ctx, dy):
    return *fused_layer_norm_backward(dy, *ctx.saved_tensors, ctx.eps), None, None


fused_layer_norm.register_autograd(backward, setup_context=keep_for_backward)
refuse_second_derivative(fused_layer_norm_backward, "layer_norm", "norm.py")
