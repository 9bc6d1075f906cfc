"""Depthwise 11 x 11 convolution: the four scales of MultiScaleConv at once, and both gradients.

    y[b,c,i,j]   = sum_{u,v} x[b,c,i+u-5,j+v-5] k[c,u,v]          u, v = 0..10, zero outside x
    dx           = the same sum of dy with the kernel turned round, k[c,10-u,10-v]
    dk[c,u,v]    = sum_{b,i,j} dy[b,c,i,j] x[b,c,i+u-5,j+v-5]

The specification is one line of PyTorch, `multiscale_convolution_reference`; on a CPU it is also
what runs, but for dk. On a GPU PyTorch's depthwise kernels take a hundred times as long as it takes
to read and write once: each output loads 121 inputs. Here a channel's convolution becomes a product
of matrices. A strip of COLUMNS outputs depends on COLUMNS + 10 inputs of a row through a band of
the kernel's numbers, T_u[w, j] = k[u, w - j]:

    Y_i = sum_u X_{i+u-5} T_u         Y (strips, COLUMNS), X (strips, WINDOW), T (WINDOW, COLUMNS)
    dk[u, v] = the sum along the diagonal w - j = v of sum_i dY_i^T X_{i+u-5}

Two thirds of T are zeros, but the units that multiply matrices are fifteen times as fast as the
others. A program walks down the rows of its strips and reads each row once: the eleven output rows
that an input row takes part in are held in registers and move up by one with every row.

Work: 121 multiply-adds for each of the B C H W outputs, 32 x 11 with the zeros, once forward and
twice backward. Traffic: x and y once forward; dy three times, x twice and dx once backward.
Tensors are channels-last, in and out, as the model's other convolutions want them.

Letters: B batch, C channels, H W pixels. A NaN or infinity makes a NaN of all that its row of 32
inputs takes part in: up to 11 rows of the strips of outputs around it, and no other channel.
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


def multiscale_convolution_reference(x: Tensor, kernel: Tensor) -> Tensor:
    """The specification: x (B, C, H, W), kernel (C, 1, 11, 11) -> (B, C, H, W)."""
    return F.conv2d(x, kernel, padding=5, groups=x.shape[1])


def multiscale_convolution(x: Tensor, kernel: Tensor) -> Tensor:
    """Each channel convolved with its own 11 x 11 kernel, zero padding, no bias.

    x (B, C, H, W), any strides; kernel (C, 1, 11, 11) of the same dtype -> (B, C, H, W), from a
    Triton kernel channels-last. float32 and float64 always run in PyTorch, as does a number of
    channels that 16 does not divide. Raises ValueError when the shapes do not fit.
    """
    if x.dim() != 4 or kernel.shape != (x.shape[1], 1, 11, 11):
        raise ValueError(
            "multiscale_convolution takes x (B, C, H, W) and kernel (C, 1, 11, 11); "
            f"got {tuple(x.shape)}, {tuple(kernel.shape)}"
        )
    if torch.is_autocast_enabled(x.device.type):  # as F.conv2d does
        x, kernel = (t.to(torch.get_autocast_dtype(x.device.type)) for t in (x, kernel))
    low = x.dtype == kernel.dtype and x.dtype in DTYPES
    if low and use_triton(x, x.shape[1] % 16 == 0 and x.numel() > 0):
        return fused_convolution(x, kernel)
    if x.is_cpu and x.numel() > 0:
        return ConvolutionOnCPU.apply(x, kernel)
    return multiscale_convolution_reference(x, kernel)


class ConvolutionOnCPU(torch.autograd.Function):
    """The specification with another way to dk, which takes PyTorch twice as long as y and dx
    together: of one image it is a depthwise convolution too, of x by dy."""

    @staticmethod
    def forward(ctx, x, kernel):
        ctx.save_for_backward(x, kernel)
        return multiscale_convolution_reference(x, kernel)

    @staticmethod
    def backward(ctx, dy):
        x, kernel = ctx.saved_tensors
        B, C, H, W = x.shape
        dx = multiscale_convolution_reference(channels_last(dy), kernel.flip(2, 3))
        images = x.permute(2, 3, 0, 1).reshape(1, H, W, B * C).permute(0, 3, 1, 2)
        dk = F.conv2d(images, dy.reshape(B * C, 1, H, W), padding=5, groups=B * C)
        return dx, dk.view(B, *kernel.shape).sum(0)


# --- The kernels ---------------------------------------------------------------------------------

DTYPES = torch.bfloat16, torch.float16  # float32 products of this size would spill registers
CHANNELS = 8  # of a program, a warp for each
WINDOW = 32  # inputs of a strip, its columns of outputs and 10 more, to a power of two
# What an H100 was fastest with at b0's four stages (experiments/NOTES.md). 80 programs leave 52 of
# its 132 processors idle, but each of twice as many would multiply ten more rows in vain.
Y_COLUMNS, Y_STRIPS = 8, 32  # of a program; half the strips where that leaves too few programs
DK_COLUMNS, DK_STRIPS = 16, 16
PROGRAMS = 80  # at least, where there are more than 8 rows to divide
KERNEL_ROWS = 6  # of dk in a program: two programs have all eleven, one would spill registers
PARTS, SUM_LANES = 16, 128  # of a program that adds up the parts of dk


@jit
def convolution_kernel(
    x_ptr,  # (B, H, W, C)
    taps_ptr,  # (121, C)
    y_ptr,  # (B, H, W, C)
    B,
    H,
    W,
    C,
    LENGTH,
    TURNED: tl.constexpr,
    CHANNELS: tl.constexpr,
    STRIPS: tl.constexpr,
    COLUMNS: tl.constexpr,
    WINDOW: tl.constexpr,
):
    """LENGTH rows of STRIPS strips of outputs, COLUMNS wide.

    `sums` are the output rows i - 5 .. i + 5 while row i of x is added to them.
    """
    strip = tl.program_id(0) * STRIPS + tl.arange(0, STRIPS)
    channel = tl.program_id(1) * CHANNELS + tl.arange(0, CHANNELS)
    start = tl.program_id(2) * LENGTH
    column = strip % tl.cdiv(W, COLUMNS) * COLUMNS
    image = strip // tl.cdiv(W, COLUMNS)

    w, j = tl.arange(0, WINDOW), tl.arange(0, COLUMNS)
    v = w[:, None] - j[None, :]
    bands = ()
    for u in tl.static_range(11):
        tap = (10 - u) * 11 + 10 - v if TURNED else u * 11 + v
        at = taps_ptr + tap[None, :, :] * C + channel[:, None, None]
        bands = bands + (tl.load(at, mask=((v >= 0) & (v < 11))[None, :, :], other=0.0),)

    at = column[:, None] + w[None, :] - 5
    x_inside = (image < B)[:, None] & (w < COLUMNS + 10)[None, :] & (at >= 0) & (at < W)
    pixel = (image.to(tl.int64) * H + start - 5)[:, None] * W + at
    x_row = x_ptr + pixel[:, :, None] * C + channel[None, None, :]
    at = column[:, None] + j[None, :]
    y_inside = (image < B)[:, None] & (at < W)
    pixel = (image.to(tl.int64) * H + start - 10)[:, None] * W + at
    y_row = y_ptr + pixel[:, :, None] * C + channel[None, None, :]

    sums = ()
    for _ in tl.static_range(11):
        sums = sums + (tl.zeros((CHANNELS, STRIPS, COLUMNS), tl.float32),)
    x = tl.load(x_row, mask=x_inside[:, :, None] & (start >= 5), other=0.0)
    for s in range(LENGTH + 10):
        row = tl.permute(x, (2, 0, 1))
        x_row += W * C
        i = start + s - 4  # the next row, read while this one is multiplied
        more = (i >= 0) & (i < H) & (s < LENGTH + 9)
        x = tl.load(x_row, mask=x_inside[:, :, None] & more, other=0.0)
        # From the last to the first, so that a sum can move into registers that are free already.
        done = tl.dot(row, bands[10], sums[10], input_precision="ieee")
        inside = y_inside & (s >= 10) & (start + s - 10 < H)
        y = tl.permute(done.to(y_ptr.dtype.element_ty), (1, 2, 0))
        tl.store(y_row, y, mask=inside[:, :, None])
        y_row += W * C
        moved = ()
        for k in tl.static_range(1, 11):
            added = tl.dot(row, bands[10 - k], sums[10 - k], input_precision="ieee")
            moved = (added,) + moved
        sums = (tl.zeros((CHANNELS, STRIPS, COLUMNS), tl.float32),) + moved


@jit
def kernel_gradient_kernel(
    x_ptr,  # (B, H, W, C)
    dy_ptr,  # (B, H, W, C)
    partial_ptr,  # (parts, C, 121) float32
    B,
    H,
    W,
    C,
    LENGTH,
    KERNEL_ROWS: tl.constexpr,
    CHANNELS: tl.constexpr,
    STRIPS: tl.constexpr,
    COLUMNS: tl.constexpr,
    WINDOW: tl.constexpr,
):
    """KERNEL_ROWS rows of dk, from LENGTH rows of x in STRIPS strips.

    Row i of x meets row i + 5 - u of dy for each row u of dk: a window of KERNEL_ROWS rows of dy
    moves down with i.
    """
    strip = tl.program_id(0) * STRIPS + tl.arange(0, STRIPS)
    channel = tl.program_id(1) * CHANNELS + tl.arange(0, CHANNELS)
    HALVES: tl.constexpr = (10 + KERNEL_ROWS) // KERNEL_ROWS
    first = tl.program_id(2) % HALVES * KERNEL_ROWS  # row of dk
    piece = tl.program_id(2) // HALVES
    start = piece * LENGTH
    column = strip % tl.cdiv(W, COLUMNS) * COLUMNS
    image = strip // tl.cdiv(W, COLUMNS)

    w, j = tl.arange(0, WINDOW), tl.arange(0, COLUMNS)
    at = column[:, None] + w[None, :] - 5
    x_inside = (image < B)[:, None] & (w < COLUMNS + 10)[None, :] & (at >= 0) & (at < W)
    pixel = (image.to(tl.int64) * H + start)[:, None] * W + at
    x_row = x_ptr + pixel[:, :, None] * C + channel[None, None, :]
    at = column[:, None] + j[None, :]
    dy_inside = (image < B)[:, None] & (at < W)
    i = start + 6 - first - KERNEL_ROWS  # the first row of dy
    pixel = (image.to(tl.int64) * H + i)[:, None] * W + at
    dy_row = dy_ptr + pixel[:, :, None] * C + channel[None, None, :]

    # A product with the identity leaves each row of dy as the products below want it: without this
    # the compiler passes all KERNEL_ROWS of them through shared memory again for each row of x.
    p = tl.arange(0, STRIPS)
    same = (p[:, None] == p[None, :])[None, :, :] & (channel >= 0)[:, None, None]
    identity = tl.where(same, 1.0, 0.0).to(dy_ptr.dtype.element_ty)

    window = ()
    dy = tl.load(dy_row, mask=dy_inside[:, :, None] & (i >= 0) & (i < H), other=0.0)
    for _ in tl.static_range(KERNEL_ROWS - 1):
        row = tl.dot(tl.permute(dy, (2, 1, 0)), identity, input_precision="ieee")
        window = window + (row.to(dy.dtype),)
        dy_row += W * C
        i += 1
        dy = tl.load(dy_row, mask=dy_inside[:, :, None] & (i >= 0) & (i < H), other=0.0)
    sums = ()
    for _ in tl.static_range(KERNEL_ROWS):
        sums = sums + (tl.zeros((CHANNELS, COLUMNS, WINDOW), tl.float32),)
    x = tl.load(x_row, mask=x_inside[:, :, None], other=0.0)
    for s in range(LENGTH):
        x_now = tl.permute(x, (2, 0, 1))  # (CHANNELS, STRIPS, WINDOW)
        row = tl.dot(tl.permute(dy, (2, 1, 0)), identity, input_precision="ieee")
        window = window + (row.to(dy.dtype),)  # (CHANNELS, COLUMNS, STRIPS) each
        x_row += W * C
        dy_row += W * C
        i += 1
        more = s + 1 < LENGTH
        inside = x_inside & (start + s + 1 < H) & more
        x = tl.load(x_row, mask=inside[:, :, None], other=0.0)
        inside = dy_inside & (i >= 0) & (i < H) & more
        dy = tl.load(dy_row, mask=inside[:, :, None], other=0.0)
        added = ()
        for u in tl.static_range(KERNEL_ROWS):
            dy_of_u = window[KERNEL_ROWS - 1 - u]
            added = added + (tl.dot(dy_of_u, x_now, sums[u], input_precision="ieee"),)
        sums = added
        window = window[1:]

    # dk[v] = sum_j sums[j, j + v]; v = 11..15 fill up the power of two.
    v = tl.arange(0, 16)
    diagonal = j[None, :, None] + v[None, None, :] + 0 * channel[:, None, None]
    pieces = tl.num_programs(2) // HALVES
    part = tl.program_id(0).to(tl.int64) * pieces + piece
    at = partial_ptr + (part * C + channel[:, None]) * 121 + v[None, :]
    for u in tl.static_range(KERNEL_ROWS):
        total = tl.sum(tl.gather(sums[u], diagonal, 2), 1)  # (CHANNELS, 16)
        inside = (v < 11)[None, :] & (first + u < 11)
        tl.store(at + (first + u) * 11, total, mask=inside)


@jit
def sum_kernel(
    partial_ptr,  # (parts, N) float32
    dk_ptr,  # (N,)
    parts,
    N,
    PARTS: tl.constexpr,  # read at a time
    LANES: tl.constexpr,
):
    """Adds up the parts, in the same order each time."""
    n = tl.program_id(0) * LANES + tl.arange(0, LANES)
    part = tl.arange(0, PARTS)
    total = tl.zeros((PARTS, LANES), tl.float32)
    for start in range(0, parts, PARTS):
        at = (start + part).to(tl.int64)[:, None] * N + n[None, :]
        inside = (start + part < parts)[:, None] & (n < N)[None, :]
        total += tl.load(partial_ptr + at, mask=inside, other=0.0)
    tl.store(dk_ptr + n, tl.sum(total, 0), mask=n < N)


# --- What PyTorch sees ---------------------------------------------------------------------------


@torch.library.custom_op("ctclm::multiscale", mutates_args=())
def fused_convolution(x: Tensor, kernel: Tensor) -> Tensor:
    return convolve(channels_last(x), taps_first(kernel), turned=False)


@torch.library.custom_op("ctclm::multiscale_backward", mutates_args=())
def fused_convolution_backward(dy: Tensor, x: Tensor, kernel: Tensor) -> tuple[Tensor, Tensor]:
    dy, x = channels_last(dy), channels_last(x)
    return convolve(dy, taps_first(kernel), turned=True), kernel_gradient(x, dy)


def taps_first(kernel: Tensor) -> Tensor:
    """(C, 1, 11, 11) -> (121, C): a program reads the numbers of its channels side by side."""
    return kernel.reshape(kernel.shape[0], 121).t().contiguous()


def rows_per_program(programs: int, H: int) -> int:
    """The most rows, a power of two, that still leave PROGRAMS; `programs` have all H."""
    length = triton.next_power_of_2(H)
    while length > 8 and programs * triton.cdiv(H, length) < PROGRAMS:
        length //= 2
    return length


def convolve(x: Tensor, taps: Tensor, turned: bool) -> Tensor:
    B, C, H, W = x.shape
    strips, size = B * triton.cdiv(W, Y_COLUMNS), Y_STRIPS
    if triton.cdiv(strips, size) * C // CHANNELS * triton.cdiv(H, 8) < PROGRAMS:
        size //= 2
    length = rows_per_program(triton.cdiv(strips, size) * C // CHANNELS, H)
    y = torch.empty_like(x, memory_format=torch.channels_last)
    with on_device_of(x):
        convolution_kernel[triton.cdiv(strips, size), C // CHANNELS, triton.cdiv(H, length)](
            x, taps, y, B, H, W, C, length, turned, CHANNELS, size, Y_COLUMNS, WINDOW,
            num_warps=CHANNELS, num_stages=1,
        )  # fmt: skip
    return y


def kernel_gradient(x: Tensor, dy: Tensor) -> Tensor:
    B, C, H, W = x.shape
    strips = triton.cdiv(B * triton.cdiv(W, DK_COLUMNS), DK_STRIPS)
    halves = triton.cdiv(11, KERNEL_ROWS)
    length = rows_per_program(strips * C // CHANNELS * halves, H)
    pieces = triton.cdiv(H, length)
    partial = x.new_empty(strips * pieces, C, 121, dtype=torch.float32)
    dk = x.new_empty(C, 1, 11, 11)
    with on_device_of(x):
        kernel_gradient_kernel[strips, C // CHANNELS, pieces * halves](
            x, dy, partial, B, H, W, C, length, KERNEL_ROWS, CHANNELS, DK_STRIPS, DK_COLUMNS,
            WINDOW, num_warps=CHANNELS, num_stages=1,
        )  # fmt: skip
        sum_kernel[triton.cdiv(C * 121, SUM_LANES),](
            partial, dk, len(partial), C * 121, PARTS, SUM_LANES
        )
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


fused_convolution.register_autograd(backward, setup_context=keep_for_backward)
refuse_second_derivative(fused_convolution_backward, "multiscale_convolution", "multiscale.py")
