"""Group normalisation of channels-last maps.

    y[b,p,c] = (x[b,p,c] - mean[b,g]) / deviation[b,g] * weight[c] + bias[c]        c in group g

PyTorch's takes and returns channels-first maps on a GPU, so a branch whose convolutions like
channels-last copies each map twice a block. Here nothing is moved. A group's mean needs all pixels
of an image, so programs take chunks of them and leave partial results, a small kernel joins these,
and a third pass applies them. Whatever the dtypes, they compute in float32; `dtype` is as in
kernels/norm.py, which also has what is shared.

Work, for each number of x: about 6 operations forward and 15 backward. Traffic: x twice and y once
forward; x and dy twice and dx once backward; the second time from the cache where they fit.

Letters: B batch, C channels, H W pixels, P = H W, G groups.
"""

from __future__ import annotations  # tl.constexpr must not be looked up where Triton is missing

import torch
import torch.nn.functional as F
from torch import Tensor

from kernels.choose import (
    channels_last,
    jit,
    on_device_of,
    refuse_second_derivative,
    tl,
    triton,
    use_triton,
)
from kernels.norm import (
    dtype_of_pytorch,
    kernel_fits,
    load_rows,
    split,
    store_rows,
    sum_parts,
    tile_of,
)


def group_norm_reference(
    x: Tensor, groups: int, weight: Tensor, bias: Tensor, eps: float
) -> Tensor:
    """PyTorch's."""
    return F.group_norm(x, groups, weight, bias, eps)


def group_norm(
    x: Tensor,
    groups: int,
    weight: Tensor,
    bias: Tensor,
    eps: float,
    dtype: torch.dtype | None = None,
) -> Tensor:
    """Each group of channels of each image to mean 0 and variance 1, times weight, plus bias (Wu
    and He, 2018).

    x (B, C, H, W), any strides; weight and bias (C,); floating point -> x's shape, from a Triton
    kernel channels-last. `dtype` is that of the result, by default PyTorch's: x's, and float32
    under autocast on a GPU. Raises ValueError when the shapes do not fit.
    """
    if x.dim() != 4 or weight.shape != x.shape[1:2] or bias.shape != weight.shape:
        raise ValueError(
            "group_norm takes x (B, C, H, W), weight and bias (C,); "
            f"got {tuple(x.shape)}, {tuple(weight.shape)}, {tuple(bias.shape)}"
        )
    if groups < 1 or x.shape[1] % groups:
        raise ValueError(f"group_norm cannot put {x.shape[1]} channels into {groups} groups")
    if use_triton(x, kernel_fits(x, weight, bias, eps)):
        dtype = dtype or dtype_of_pytorch(x)
        return fused_group_norm(x, groups, weight, bias, eps, dtype)[0]
    y = group_norm_reference(x, groups, weight, bias, eps)
    return y if dtype is None else y.to(dtype)


# --- The kernels ---------------------------------------------------------------------------------

JOINED = 4096  # partial results at a time: at least a group's in a batch of 16


@jit
def statistics_kernel(
    x_ptr,  # (B, P, C)
    parts_ptr,  # (2, B, chunks, C) float32: mean, sum of squared distances from it
    P,
    C: tl.constexpr,
    ROWS: tl.constexpr,
    WIDTH: tl.constexpr,
    TILES: tl.constexpr,
):
    """Of each channel in a chunk of TILES x ROWS pixels. Relative to the mean of the first tile, or
    squares would lose all digits where the mean is large."""
    chunk, image, c = tl.program_id(0), tl.program_id(1), tl.arange(0, WIDTH)
    chunks, B = tl.num_programs(0), tl.num_programs(1)
    x_ptr += image.to(tl.int64) * P * C
    start = chunk * TILES * ROWS
    x = load_rows(x_ptr, start, P, C, ROWS, WIDTH)
    shift = tl.sum(x, 0) / tl.minimum(P - start, ROWS)
    total = tl.zeros((ROWS, WIDTH), tl.float32)
    squares = tl.zeros((ROWS, WIDTH), tl.float32)
    for t in range(TILES):
        first = start + t * ROWS
        x = load_rows(x_ptr, first, P, C, ROWS, WIDTH) - shift[None, :]
        x = tl.where(first + tl.arange(0, ROWS)[:, None] < P, x, 0.0)
        total += x
        squares += x * x
    count = tl.minimum(P - start, TILES * ROWS)
    mean = tl.sum(total, 0) / count
    at = parts_ptr + (image * chunks + chunk) * C + c
    tl.store(at, shift + mean, c < C)
    tl.store(at + B * chunks * C, tl.maximum(tl.sum(squares, 0) - count * mean * mean, 0.0), c < C)


@jit
def join_statistics_kernel(
    parts_ptr,
    statistics_ptr,  # (2, B, G) float32: mean, 1 / deviation
    P,
    chunks,
    pixels,  # of a chunk
    eps,
    G: tl.constexpr,
    CHANNELS: tl.constexpr,  # of a group
    CHUNKS: tl.constexpr,
    GROUPS: tl.constexpr,
    WIDTH: tl.constexpr,
):
    """Of GROUPS groups of one image: all squared distances from the common mean (Chan et al.,
    1979)."""
    image, B = tl.program_id(1), tl.num_programs(1)
    k, c = tl.arange(0, CHUNKS)[:, None, None], tl.arange(0, WIDTH)[None, None, :]
    group = tl.program_id(0) * GROUPS + tl.arange(0, GROUPS)
    column = group[None, :, None] * CHANNELS + c
    inside = (group < G)[None, :, None] & (c < CHANNELS)
    parts_ptr += image * chunks * G * CHANNELS
    total = tl.zeros((CHUNKS, GROUPS, WIDTH), tl.float32)
    for start in range(0, chunks, CHUNKS):
        at = parts_ptr + (start + k) * G * CHANNELS + column
        mean = tl.load(at, inside & (start + k < chunks), 0.0)
        total += mean * tl.minimum(P - (start + k) * pixels, pixels)
    common = tl.sum(tl.sum(total, 2), 0) / (P * CHANNELS)  # (GROUPS,)
    squares = tl.zeros((CHUNKS, GROUPS, WIDTH), tl.float32)
    for start in range(0, chunks, CHUNKS):
        at = parts_ptr + (start + k) * G * CHANNELS + column
        here = inside & (start + k < chunks)
        distance = tl.load(at, here, 0.0) - common[None, :, None]
        distance *= distance * tl.minimum(P - (start + k) * pixels, pixels)
        squares += tl.where(here, distance, 0.0)
        squares += tl.load(at + B * chunks * G * CHANNELS, here, 0.0)
    variance = tl.sum(tl.sum(squares, 2), 0) / (P * CHANNELS)
    tl.store(statistics_ptr + image * G + group, common, group < G)
    tl.store(statistics_ptr + (B + image) * G + group, tl.rsqrt(variance + eps), group < G)


@jit
def load_channels(of_groups_ptr, image, B, G, C: tl.constexpr, WIDTH: tl.constexpr):
    """(2, B, G) -> two numbers for each channel of one image."""
    c = tl.arange(0, WIDTH)
    at = of_groups_ptr + image * G + c // (C // G)
    return tl.load(at, c < C, 0.0), tl.load(at + B * G, c < C, 0.0)


@jit
def forward_kernel(
    x_ptr,  # (B, P, C), as y
    statistics_ptr,
    weight_ptr,  # (C,)
    bias_ptr,
    y_ptr,
    P,
    G: tl.constexpr,
    C: tl.constexpr,
    ROWS: tl.constexpr,
    WIDTH: tl.constexpr,
):
    """ROWS pixels."""
    first, image, c = tl.program_id(0) * ROWS, tl.program_id(1), tl.arange(0, WIDTH)
    mean, scale = load_channels(statistics_ptr, image, tl.num_programs(1), G, C, WIDTH)
    scale *= tl.load(weight_ptr + c, c < C, 0.0).to(tl.float32)
    bias = tl.load(bias_ptr + c, c < C, 0.0).to(tl.float32)
    origin = image.to(tl.int64) * P * C
    x = load_rows(x_ptr + origin, first, P, C, ROWS, WIDTH)
    y = (x - mean[None, :]) * scale[None, :] + bias[None, :]
    store_rows(y_ptr + origin, first, P, y, C, ROWS, WIDTH)


@jit
def gradient_sums_kernel(
    dy_ptr,  # (B, P, C), as x
    x_ptr,
    statistics_ptr,
    parts_ptr,  # (2, B, chunks, C) float32: sum of dy z, sum of dy
    P,
    G: tl.constexpr,
    C: tl.constexpr,
    ROWS: tl.constexpr,
    WIDTH: tl.constexpr,
    TILES: tl.constexpr,
):
    """Of each channel in a chunk of TILES x ROWS pixels; z = (x - mean) / deviation."""
    chunk, image, c = tl.program_id(0), tl.program_id(1), tl.arange(0, WIDTH)
    chunks, B = tl.num_programs(0), tl.num_programs(1)
    mean, scale = load_channels(statistics_ptr, image, B, G, C, WIDTH)
    origin = image.to(tl.int64) * P * C
    of_weight = tl.zeros((ROWS, WIDTH), tl.float32)
    of_bias = tl.zeros((ROWS, WIDTH), tl.float32)
    for t in range(TILES):
        first = (chunk * TILES + t) * ROWS
        x = load_rows(x_ptr + origin, first, P, C, ROWS, WIDTH)
        dy = load_rows(dy_ptr + origin, first, P, C, ROWS, WIDTH)
        of_weight += dy * ((x - mean[None, :]) * scale[None, :])
        of_bias += dy
    at = parts_ptr + (image * chunks + chunk) * C + c
    tl.store(at, tl.sum(of_weight, 0), c < C)
    tl.store(at + B * chunks * C, tl.sum(of_bias, 0), c < C)


@jit
def join_sums_kernel(
    parts_ptr,
    weight_ptr,  # (C,)
    sums_ptr,  # (2, B, C) float32: the sums of an image
    means_ptr,  # (2, B, G) float32: of dy weight z, of dy weight, over a group
    P,
    chunks,
    G: tl.constexpr,
    CHANNELS: tl.constexpr,  # of a group
    CHUNKS: tl.constexpr,
    GROUPS: tl.constexpr,
    WIDTH: tl.constexpr,
):
    """Of GROUPS groups of one image: program (i, image, 0) of dy z, (i, image, 1) of dy."""
    image = tl.program_id(2) * tl.num_programs(1) + tl.program_id(1)
    k, c = tl.arange(0, CHUNKS)[:, None, None], tl.arange(0, WIDTH)[None, :]
    group = tl.program_id(0) * GROUPS + tl.arange(0, GROUPS)
    column = group[:, None] * CHANNELS + c  # (GROUPS, WIDTH)
    inside = (group < G)[:, None] & (c < CHANNELS)
    parts_ptr += image * chunks * G * CHANNELS
    total = tl.zeros((CHUNKS, GROUPS, WIDTH), tl.float32)
    for start in range(0, chunks, CHUNKS):
        at = (start + k) * G * CHANNELS + column[None, :, :]
        total += tl.load(parts_ptr + at, inside[None, :, :] & (start + k < chunks), 0.0)
    sums = tl.sum(total, 0)
    weight = tl.load(weight_ptr + column, inside, 0.0).to(tl.float32)
    mean = tl.sum(sums * weight, 1) / (P * CHANNELS)
    tl.store(sums_ptr + image * G * CHANNELS + column, sums, inside)
    tl.store(means_ptr + image * G + group, mean, group < G)


@jit
def backward_kernel(
    dy_ptr,  # (B, P, C), as x and dx
    x_ptr,
    statistics_ptr,
    weight_ptr,  # (C,)
    means_ptr,
    dx_ptr,
    P,
    G: tl.constexpr,
    C: tl.constexpr,
    ROWS: tl.constexpr,
    WIDTH: tl.constexpr,
):
    """ROWS pixels. With g = dy weight, and means over a group of an image:

    dx = (g - mean(g) - z mean(g z)) / deviation
    """
    first, image, c = tl.program_id(0) * ROWS, tl.program_id(1), tl.arange(0, WIDTH)
    mean, scale = load_channels(statistics_ptr, image, tl.num_programs(1), G, C, WIDTH)
    mean_gz, mean_g = load_channels(means_ptr, image, tl.num_programs(1), G, C, WIDTH)
    weight = tl.load(weight_ptr + c, c < C, 0.0).to(tl.float32)
    origin = image.to(tl.int64) * P * C
    z = load_rows(x_ptr + origin, first, P, C, ROWS, WIDTH) - mean[None, :]
    z *= scale[None, :]
    g = load_rows(dy_ptr + origin, first, P, C, ROWS, WIDTH) * weight[None, :]
    dx = (g - mean_g[None, :] - z * mean_gz[None, :]) * scale[None, :]
    store_rows(dx_ptr + origin, first, P, dx, C, ROWS, WIDTH)


# --- What PyTorch sees ---------------------------------------------------------------------------


@torch.library.custom_op("ctclm::group_norm", mutates_args=())
def fused_group_norm(
    x: Tensor, groups: int, weight: Tensor, bias: Tensor, eps: float, dtype: torch.dtype
) -> tuple[Tensor, Tensor]:
    """The result, and mean and 1 / deviation of each group, (2, B, G)."""
    x, weight, bias = channels_last(x), weight.contiguous(), bias.contiguous()
    (B, C, P), tile = sizes(x), tile_of(x.shape[1])
    tiles, chunks, each = chunks_of(x)
    parts = x.new_empty(2, B, chunks, C, dtype=torch.float32)
    statistics = x.new_empty(2, B, groups, dtype=torch.float32)
    y = torch.empty_like(x, dtype=dtype)
    with on_device_of(x):
        statistics_kernel[chunks, B](
            x, parts, P, C, tile.rows, tile.width, each, num_warps=tile.warps
        )
        CHUNKS, GROUPS, WIDTH = joined(chunks, groups, C // groups)
        join_statistics_kernel[triton.cdiv(groups, GROUPS), B](
            parts, statistics, P, chunks, each * tile.rows, eps, groups, C // groups, CHUNKS,
            GROUPS, WIDTH,
        )  # fmt: skip
        forward_kernel[tiles, B](
            x, statistics, weight, bias, y, P, groups, C, tile.rows, tile.width,
            num_warps=tile.warps,
        )  # fmt: skip
    return y, statistics


@torch.library.custom_op("ctclm::group_norm_backward", mutates_args=())
def fused_group_norm_backward(
    dy: Tensor, x: Tensor, statistics: Tensor, weight: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    dy, x, weight = channels_last(dy), channels_last(x), weight.contiguous()
    (B, C, P), tile, groups = sizes(x), tile_of(x.shape[1]), statistics.shape[2]
    tiles, chunks, each = chunks_of(x)
    parts = x.new_empty(2, B, chunks, C, dtype=torch.float32)
    sums = x.new_empty(2, B, C, dtype=torch.float32)
    means = torch.empty_like(statistics)
    dx, dweight, dbias = torch.empty_like(x), torch.empty_like(weight), torch.empty_like(weight)
    with on_device_of(x):
        gradient_sums_kernel[chunks, B](
            dy, x, statistics, parts, P, groups, C, tile.rows, tile.width, each,
            num_warps=tile.warps,
        )  # fmt: skip
        CHUNKS, GROUPS, WIDTH = joined(chunks, groups, C // groups)
        join_sums_kernel[triton.cdiv(groups, GROUPS), B, 2](
            parts, weight, sums, means, P, chunks, groups, C // groups, CHUNKS, GROUPS, WIDTH
        )
        backward_kernel[tiles, B](
            dy, x, statistics, weight, means, dx, P, groups, C, tile.rows, tile.width,
            num_warps=tile.warps,
        )  # fmt: skip
        sum_parts(sums, dweight, dbias)
    return dx, dweight, dbias


def sizes(x: Tensor) -> tuple[int, int, int]:
    """B, C, P."""
    return x.shape[0], x.shape[1], x.shape[2] * x.shape[3]


def chunks_of(x: Tensor) -> tuple[int, int, int]:
    """Tiles of an image, chunks of an image, tiles of a chunk: from the shapes alone."""
    B, C, P = sizes(x)
    tiles = triton.cdiv(P, tile_of(C).rows)
    _, each = split(B * tiles)
    return tiles, triton.cdiv(tiles, each), each


def joined(chunks: int, groups: int, channels: int) -> tuple[int, int, int]:
    """CHUNKS, GROUPS, WIDTH of the kernels that join: as many as make JOINED numbers."""
    power = triton.next_power_of_2
    CHUNKS = min(power(chunks), max(1, JOINED // power(channels)))
    return CHUNKS, min(power(groups), max(1, JOINED // (CHUNKS * power(channels)))), power(channels)


@fused_group_norm.register_fake
def _(x, groups, weight, bias, eps, dtype):
    y = torch.empty_like(x, dtype=dtype, memory_format=torch.channels_last)
    return y, x.new_empty(2, x.shape[0], groups, dtype=torch.float32)


@fused_group_norm_backward.register_fake
def _(dy, x, statistics, weight):
    dx = torch.empty_like(x, memory_format=torch.channels_last)
    return dx, weight.new_empty(weight.shape), weight.new_empty(weight.shape)


def keep_for_backward(ctx, inputs, output):
    x, _, weight, *_ = inputs
    ctx.set_materialize_grads(False)  # nothing depends on the statistics but this backward pass
    ctx.save_for_backward(x, output[1], weight)


def backward(ctx, dy, _):
    dx, dweight, dbias = fused_group_norm_backward(dy, *ctx.saved_tensors)
    return dx, None, dweight, dbias, None, None


fused_group_norm.register_autograd(backward, setup_context=keep_for_backward)
refuse_second_derivative(fused_group_norm_backward, "group_norm", "group_norm.py")
