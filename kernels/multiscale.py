"""Depthwise 11 x 11 convolution: the four scales of MultiScaleConv at once, and both gradients.

    y[b,c,i,j]   = sum_{u,v} x[b, c, i+u-5, j+v-5] k[c,u,v]         u, v = 0..10, zero outside x
    dx           = the same sum of dy with the kernel turned round, k[c, 10-u, 10-v]
    dk[c,u,v]    = sum_{b,i,j} dy[b,c,i,j] x[b, c, i+u-5, j+v-5]

The specification is one line of PyTorch, `multiscale_convolution_reference`; on a CPU it is also
what runs. On a GPU PyTorch's depthwise convolutions take a hundred times as long as reading and
writing once: they load 121 inputs for each output. Here each lane has one channel and keeps a
window of the image in registers, so that a loaded number takes part in up to 100 products.

Work: 121 multiply-adds for each of the B C H W outputs, once forward, twice backward; they are
exact in float32, whatever the input's type, and outnumber the bytes 60 to 1. Traffic: x and y once
forward; x, dy and dx backward, and float32 partial sums of dk. Tensors are channels-last, in and
out, as the model's other convolutions want them.

Letters: B batch, C channels, H W pixels. A NaN reaches the 11 x 11 outputs around it and no other.
"""

from __future__ import annotations  # tl.constexpr must not be looked up where Triton is missing

import torch
import torch.nn.functional as F
from torch import Tensor

from kernels.choose import jit, on_device_of, tl, triton, use_triton


def multiscale_convolution_reference(x: Tensor, kernel: Tensor) -> Tensor:
    """The specification: x (B, C, H, W), kernel (C, 1, 11, 11) -> (B, C, H, W)."""
    return F.conv2d(x, kernel, padding=5, groups=x.shape[1])


def multiscale_convolution(x: Tensor, kernel: Tensor) -> Tensor:
    """Each channel convolved with its own 11 x 11 kernel, zero padding, no bias.

    x (B, C, H, W), any strides; kernel (C, 1, 11, 11) of the same dtype -> (B, C, H, W), from a
    Triton kernel channels-last. Raises ValueError when the shapes do not fit.
    """
    if x.dim() != 4 or kernel.shape != (x.shape[1], 1, 11, 11):
        raise ValueError(
            "multiscale_convolution takes x (B, C, H, W) and kernel (C, 1, 11, 11); "
            f"got {tuple(x.shape)}, {tuple(kernel.shape)}"
        )
    if torch.is_autocast_enabled(x.device.type):  # as F.conv2d does
        x, kernel = (t.to(torch.get_autocast_dtype(x.device.type)) for t in (x, kernel))
    same = x.dtype == kernel.dtype != torch.float64
    if use_triton(x, same and x.shape[1] % 16 == 0 and x.numel() > 0):
        return fused_convolution(x, kernel)
    return multiscale_convolution_reference(x, kernel)


# --- The kernels ---------------------------------------------------------------------------------

ROWS, COLUMNS = 4, 8  # of outputs for each lane
KERNEL_ROWS = 4  # of dk for each lane: three programs have all eleven
WARPS = 4


@jit
def load_row(row_ptr, inside, column, W, C: tl.constexpr, COUNT: tl.constexpr):
    """COUNT neighbouring pixels of a row of (W, C), zero outside: a tuple of (GROUPS, CHANNELS)."""
    row = ()
    for j in tl.static_range(COUNT):
        here = inside & (column + j >= 0) & (column + j < W)
        pixel = tl.load(row_ptr + j * C, mask=here[:, None], other=0.0)
        row = row + (pixel.to(tl.float32),)
    return row


@jit
def convolution_kernel(
    x_ptr,  # (B, H, W, C)
    kernel_ptr,  # (11, 11, C) float32
    y_ptr,  # (B, H, W, C)
    B,
    H,
    W,
    C: tl.constexpr,
    TURNED: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
    GROUPS: tl.constexpr,
    CHANNELS: tl.constexpr,
    UNROLL: tl.constexpr,
):
    """GROUPS tiles of ROWS x COLUMNS outputs of CHANNELS channels, a tile and a channel to a lane.

    Row u of the kernel needs ROWS rows of x, of which the last is new: each is loaded once.
    """
    tile = tl.program_id(0) * GROUPS + tl.arange(0, GROUPS)
    channel = tl.program_id(1) * CHANNELS + tl.arange(0, CHANNELS)
    across, down = tl.cdiv(W, COLUMNS), tl.cdiv(H, ROWS)
    column = tile % across * COLUMNS
    row = tile // across % down * ROWS
    image = tile // (across * down)
    first = (image.to(tl.int64) * H + row) * W + column  # of the tile's outputs, in pixels
    row_ptr = x_ptr + ((first - 5 * W - 5) * C)[:, None] + channel[None, :]
    SPAN: tl.constexpr = COLUMNS + 10
    window = ()
    for r in tl.static_range(ROWS - 1):
        inside = (image < B) & (row + r >= 5) & (row + r < H + 5)
        window = window + load_row(row_ptr, inside, column - 5, W, C, SPAN)
        row_ptr += W * C
    sums = ()
    for _ in tl.static_range(ROWS * COLUMNS):
        sums = sums + (tl.zeros((GROUPS, CHANNELS), tl.float32),)
    for u in tl.range(0, 11, loop_unroll_factor=UNROLL):
        i = row + u + ROWS - 6  # of the new row in x
        inside = (image < B) & (i >= 0) & (i < H)
        window = window + load_row(row_ptr, inside, column - 5, W, C, SPAN)
        row_ptr += W * C
        weights = ()
        for v in tl.static_range(11):
            at = (10 - u) * 11 + 10 - v if TURNED else u * 11 + v
            weights = weights + (tl.load(kernel_ptr + at * C + channel)[None, :],)
        added = ()
        for r in tl.static_range(ROWS):
            for j in tl.static_range(COLUMNS):
                total = sums[r * COLUMNS + j]
                for v in tl.static_range(11):
                    total += window[r * SPAN + j + v] * weights[v]
                added = added + (total,)
        sums = added
        window = window[SPAN:]
    out_ptr = y_ptr + (first * C)[:, None] + channel[None, :]
    for r in tl.static_range(ROWS):
        for j in tl.static_range(COLUMNS):
            inside = (image < B) & (row + r < H) & (column + j < W)
            tl.store(out_ptr + j * C, sums[r * COLUMNS + j], mask=inside[:, None])
        out_ptr += W * C


@jit
def kernel_gradient_kernel(
    x_ptr,  # (B, H, W, C)
    dy_ptr,  # (B, H, W, C)
    partial_ptr,  # (parts, 11, 11, C) float32
    B,
    H,
    W,
    LENGTH,  # rows of x in a part
    C: tl.constexpr,
    KERNEL_ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
    GROUPS: tl.constexpr,
    CHANNELS: tl.constexpr,
    UNROLL: tl.constexpr,
):
    """KERNEL_ROWS rows of dk, from GROUPS strips of LENGTH rows and COLUMNS columns.

    Row i of x meets row i + 5 - u of dy for each row u of dk: a window of KERNEL_ROWS rows of dy
    moves down with i, and each is loaded once.
    """
    strip = tl.program_id(0) * GROUPS + tl.arange(0, GROUPS)
    channel = tl.program_id(1) * CHANNELS + tl.arange(0, CHANNELS)
    u = tl.program_id(2) * KERNEL_ROWS  # the first
    across, down = tl.cdiv(W, COLUMNS), tl.cdiv(H, LENGTH)
    column = strip % across * COLUMNS
    row = strip // across % down * LENGTH
    image = strip // (across * down)
    first = (image.to(tl.int64) * H + row) * W + column
    x_row = x_ptr + ((first - 5) * C)[:, None] + channel[None, :]
    dy_row = dy_ptr + ((first + (6 - u - KERNEL_ROWS) * W) * C)[:, None] + channel[None, :]
    window = ()
    for k in tl.static_range(KERNEL_ROWS - 1):
        i = row + k + 6 - u - KERNEL_ROWS
        inside = (image < B) & (i >= 0) & (i < H)
        window = window + load_row(dy_row, inside, column, W, C, COLUMNS)
        dy_row += W * C
    sums = ()
    for _ in tl.static_range(KERNEL_ROWS * 11):
        sums = sums + (tl.zeros((GROUPS, CHANNELS), tl.float32),)
    for s in tl.range(0, LENGTH, loop_unroll_factor=UNROLL):
        i = row + s + 5 - u
        inside = (image < B) & (i >= 0) & (i < H)
        window = window + load_row(dy_row, inside, column, W, C, COLUMNS)
        dy_row += W * C
        x = load_row(x_row, (image < B) & (row + s < H), column - 5, W, C, COLUMNS + 10)
        x_row += W * C
        added = ()
        for k in tl.static_range(KERNEL_ROWS):  # of dk, from its first: dy from its last
            for v in tl.static_range(11):
                total = sums[k * 11 + v]
                for j in tl.static_range(COLUMNS):
                    total += window[(KERNEL_ROWS - 1 - k) * COLUMNS + j] * x[j + v]
                added = added + (total,)
        sums = added
        window = window[COLUMNS:]
    partial_ptr += (tl.program_id(0) * 121 + u * 11) * C + channel
    for k in tl.static_range(KERNEL_ROWS):
        for v in tl.static_range(11):
            total = tl.sum(sums[k * 11 + v], 0)
            if u + k < 11:
                tl.store(partial_ptr + (k * 11 + v) * C, total)


@jit
def sum_kernel(
    partial_ptr,  # (parts, 121, C) float32
    dk_ptr,  # (C, 121)
    parts,
    C: tl.constexpr,
    CHANNELS: tl.constexpr,
    PARTS: tl.constexpr,  # read at a time
):
    """Adds up the parts, in the same order each time."""
    tap = tl.program_id(0)
    channel = tl.program_id(1) * CHANNELS + tl.arange(0, CHANNELS)
    part = tl.arange(0, PARTS)
    total = tl.zeros((PARTS, CHANNELS), tl.float32)
    for start in range(0, parts, PARTS):
        at = ((start + part) * 121 + tap)[:, None] * C + channel[None, :]
        total += tl.load(partial_ptr + at, mask=(start + part < parts)[:, None], other=0.0)
    tl.store(dk_ptr + channel * 121 + tap, tl.sum(total, 0))


# --- What PyTorch sees ---------------------------------------------------------------------------


@torch.library.custom_op("ctclm::multiscale", mutates_args=())
def fused_convolution(x: Tensor, kernel: Tensor) -> Tensor:
    return convolve(channels_last(x), taps_first(kernel), turned=False)


@torch.library.custom_op("ctclm::multiscale_backward", mutates_args=())
def fused_convolution_backward(dy: Tensor, x: Tensor, kernel: Tensor) -> tuple[Tensor, Tensor]:
    dy, x = channels_last(dy), channels_last(x)
    return convolve(dy, taps_first(kernel), turned=True), kernel_gradient(x, dy)


def channels_last(x: Tensor) -> Tensor:
    return x.contiguous(memory_format=torch.channels_last)


def taps_first(kernel: Tensor) -> Tensor:
    """(C, 1, 11, 11) -> (121, C) float32: neighbouring lanes read neighbouring channels."""
    C = kernel.shape[0]
    return kernel.new_empty(121, C, dtype=torch.float32).copy_(kernel.reshape(C, 121).t())


def lanes(C: int) -> tuple[int, int]:
    """Tiles and channels of a program."""
    channels = min(32, C & -C)  # the largest power of two that divides C
    return 32 * WARPS // channels, channels


def convolve(x: Tensor, taps: Tensor, turned: bool) -> Tensor:
    B, C, H, W = x.shape
    groups, channels = lanes(C)
    tiles = B * triton.cdiv(H, ROWS) * triton.cdiv(W, COLUMNS)
    y = torch.empty_like(x, memory_format=torch.channels_last)
    with on_device_of(x):
        convolution_kernel[triton.cdiv(tiles, groups), C // channels](
            x, taps, y, B, H, W, C, turned, ROWS, COLUMNS, groups, channels, 1, num_warps=WARPS
        )
    return y


def kernel_gradient(x: Tensor, dy: Tensor) -> Tensor:
    B, C, H, W = x.shape
    groups, channels = lanes(C)
    length = min(H, 32)
    parts = triton.cdiv(B * triton.cdiv(H, length) * triton.cdiv(W, COLUMNS), groups)
    partial = x.new_empty(parts, 121, C, dtype=torch.float32)
    dk = x.new_empty(C, 1, 11, 11)
    with on_device_of(x):
        kernel_gradient_kernel[parts, C // channels, triton.cdiv(11, KERNEL_ROWS)](
            x, dy, partial, B, H, W, length, C, KERNEL_ROWS, COLUMNS, groups, channels, 1,
            num_warps=WARPS,
        )  # fmt: skip
        sum_kernel[121, C // channels](partial, dk, parts, C, channels, 32, num_warps=4)
    return dk


@fused_convolution.register_fake
def _(x, kernel):
    return torch.empty_like(x, memory_format=torch.channels_last)


@fused_convolution_backward.register_fake
def _(dy, x, kernel):
    return torch.empty_like(x, memory_format=torch.channels_last), kernel.new_empty(kernel.shape)


def keep_for_backward(ctx, inputs, output):
    ctx.save_for_backward(*inputs)


def backward(ctx, dy):
    return fused_convolution_backward(dy, *ctx.saved_tensors)


def refuse(ctx, *_):
    raise RuntimeError(
        "multiscale_convolution has no second derivative on a GPU; "
        "multiscale_convolution_reference in kernels/multiscale.py has one"
    )


fused_convolution.register_autograd(backward, setup_context=keep_for_backward)
fused_convolution_backward.register_autograd(refuse)
