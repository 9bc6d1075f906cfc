"""The collaborative loss on a GPU: two Triton kernels that never write full-resolution logits.

distill.py has the specification. The kernels work on dual cells. Four neighbouring logits enclose
4 x 4 pixels that depend on these four alone. In a row, pixels 4 cx - 2 .. 4 cx + 1 lie between the
logits of columns cx - 1 and cx, at 1/8, 3/8, 5/8 and 7/8 of the way; the same holds down a column.
At the border one of the two logits is missing: a fraction of 0 or 1 makes the other one count
alone, which is what align_corners=False means there. So h + 1 by w + 1 dual cells tile the image.

A program walks down ROWS of them with one lane for each column of pixels. The K classes of a pixel
sit in a tuple of K registers: no padding to a power of two and no reduction across lanes. A logit
receives gradients from four dual cells. Those above and below are added in registers while the
program walks down, those to the left and right by one exchange between lanes. So each gradient is
written once, in a fixed order, without atomics.

Work per pixel: 2 K exponentials and some 30 K other operations, once forward and once for each
branch backward. Traffic: logits and labels once each time, gradients once. kernels/README.md has
the lower bound on the time.

Letters: B batch, K classes, H W the labels' size, h w the logits' size (a quarter).
"""

from __future__ import annotations  # tl.constexpr must not be looked up where Triton is missing

import math

import torch
from torch import Tensor

from kernels.choose import channels_last, jit, on_device_of, tl, triton
from kernels.distill_rows import divisors

CELL_ROWS = 8  # dual rows of a program
FORWARD_LANES, BACKWARD_LANES = 128, 64  # columns of pixels of a program, 32 to a warp


@jit
def corners(j, n):
    """The logits before and after dual cell j; there are n logits."""
    return tl.minimum(tl.maximum(j - 1, 0), n - 1), tl.minimum(j, n - 1)


@jit
def fraction(j, n, p):
    """How far pixel p = 0..3 of dual cell j has come from the logit before to the one after."""
    return tl.where(j == 0, 1.0, tl.where(j >= n, 0.0, (p + 0.5) / 4))


@jit
def lerp_columns(row_ptr, left, right, fx, K: tl.constexpr):
    """One row of logits (w, K), interpolated at the lanes' columns: a tuple of K."""
    v = ()
    for k in tl.static_range(K):
        a = tl.load(row_ptr + left * K + k).to(tl.float32)
        b = tl.load(row_ptr + right * K + k).to(tl.float32)
        v = v + (a + fx * (b - a),)
    return v


@jit
def lerp_rows_shifted(above, below, fy, K: tl.constexpr):
    """The K logits of a pixel minus the largest of them, so that no exponential overflows."""
    v = ()
    for k in tl.static_range(K):
        v = v + (above[k] + fy * (below[k] - above[k]),)
    top = v[0]
    for k in tl.static_range(1, K):
        top = tl.maximum(top, v[k])
    z = ()
    for k in tl.static_range(K):
        z = z + (v[k] - top,)
    return z


@jit
def exponentials(z, T, K: tl.constexpr):
    """exp(z / T) and their sum."""
    e = ()
    total = tl.zeros_like(z[0])
    for k in tl.static_range(K):
        e = e + (tl.exp(z[k] / T),)
        total += e[k]
    return e, total


@jit
def at_label(z, y, K: tl.constexpr):
    """z[y]; NaN where y is no class, so that a wrong label cannot pass unseen."""
    value = tl.full(y.shape, float("nan"), tl.float32)
    for k in tl.static_range(K):
        value = tl.where(y == k, z[k], value)
    return value


@jit
def weight_of(class_weights_ptr, y, valid, K: tl.constexpr):
    """The class weight of label y; nothing is read where y is no class."""
    return tl.load(class_weights_ptr + y, mask=valid & (y >= 0) & (y < K), other=1.0)


@jit
def forward_kernel(
    cnn_ptr,  # (B, h, w, K)
    transformer_ptr,
    labels_ptr,  # (B, 4h, 4w)
    class_weights_ptr,  # (K,) float32
    sums_ptr,  # (7, programs) float32
    h,
    w,
    ignore_index,
    kappa,
    WEIGHTED: tl.constexpr,  # by class_weights_ptr
    K: tl.constexpr,
    T: tl.constexpr,
    CT_CONSTANT: tl.constexpr,  # the weights of TRANSFERS: CNN teaches, Transformer teaches
    CT_SLOPE: tl.constexpr,
    TC_CONSTANT: tl.constexpr,
    TC_SLOPE: tl.constexpr,
    LANES: tl.constexpr,
    ROWS: tl.constexpr,
):
    """Each program's sums of the four terms, the gate, 1 and class weights over its valid pixels.

    KL(q_c || q_t) = sum_k q_c,k (z_c,k - z_t,k) / T - (log s_c - log s_t),  q = exp(z / T) / s
    """
    tile_column, tile_row = tl.program_id(0), tl.program_id(1)
    image = tl.program_id(2).to(tl.int64)
    cnn_ptr += image * h * w * K
    transformer_ptr += image * h * w * K
    labels_ptr += image * 16 * h * w
    lane = tl.arange(0, LANES)
    x = tile_column * LANES + lane - 2
    cx = tile_column * (LANES // 4) + lane // 4
    left, right = corners(cx, w)
    fx = fraction(cx, w, lane % 4)
    sum_t, sum_c = tl.zeros((LANES,), tl.float32), tl.zeros((LANES,), tl.float32)
    sum_ct, sum_tc = tl.zeros((LANES,), tl.float32), tl.zeros((LANES,), tl.float32)
    sum_r, count = tl.zeros((LANES,), tl.float32), tl.zeros((LANES,), tl.float32)
    sum_w = tl.zeros((LANES,), tl.float32)
    for n in range(ROWS):
        cy = tile_row * ROWS + n
        above, below = corners(cy, h)
        above_c = lerp_columns(cnn_ptr + above * w * K, left, right, fx, K)
        below_c = lerp_columns(cnn_ptr + below * w * K, left, right, fx, K)
        above_t = lerp_columns(transformer_ptr + above * w * K, left, right, fx, K)
        below_t = lerp_columns(transformer_ptr + below * w * K, left, right, fx, K)
        for p in range(4):
            fy = fraction(cy, h, p)
            row = 4 * cy - 2 + p
            inside = (x >= 0) & (x < 4 * w) & (row >= 0) & (row < 4 * h)
            y = tl.load(labels_ptr + row * 4 * w + x, mask=inside, other=0).to(tl.int32)
            valid = inside & (y != ignore_index)
            z_c = lerp_rows_shifted(above_c, below_c, fy, K)
            z_t = lerp_rows_shifted(above_t, below_t, fy, K)
            e_c, s_c = exponentials(z_c, 1.0, K)
            e_t, s_t = exponentials(z_t, 1.0, K)
            l_c = tl.log(s_c) - at_label(z_c, y, K)
            l_t = tl.log(s_t) - at_label(z_t, y, K)
            if WEIGHTED:
                c = weight_of(class_weights_ptr, y, valid, K)
                l_c, l_t = c * l_c, c * l_t
                sum_w += tl.where(valid, c, 0)
            r = tl.sigmoid((l_t - l_c) / kappa)
            if T != 1:
                e_c, s_c = exponentials(z_c, T, K)
                e_t, s_t = exponentials(z_t, T, K)
            # Each branch's logits are less its own maximum. The two shifts differ, and cancel: as q
            # sums to 1, sum_k q_k (z_c,k - z_t,k) and log s_c - log s_t change by the same amount.
            dot_c, dot_t = tl.zeros_like(r), tl.zeros_like(r)
            for k in tl.static_range(K):
                logit_gap = (z_c[k] - z_t[k]) / T
                dot_c += e_c[k] * logit_gap
                dot_t += e_t[k] * logit_gap
            lse_gap = tl.log(s_c) - tl.log(s_t)
            cnn_teaches, transformer_teaches = dot_c / s_c - lse_gap, lse_gap - dot_t / s_t
            weight_ct, weight_tc = CT_CONSTANT + CT_SLOPE * r, TC_CONSTANT + TC_SLOPE * r
            sum_t += tl.where(valid, l_t, 0)
            sum_c += tl.where(valid, l_c, 0)
            sum_ct += tl.where(valid, T * T * weight_ct * cnn_teaches, 0)
            sum_tc += tl.where(valid, T * T * weight_tc * transformer_teaches, 0)
            sum_r += tl.where(valid, r, 0)
            count += tl.where(valid, 1.0, 0.0)
    programs = tl.num_programs(0) * tl.num_programs(1) * tl.num_programs(2)
    at = (tl.program_id(2) * tl.num_programs(1) + tile_row) * tl.num_programs(0) + tile_column
    tl.store(sums_ptr + at, tl.sum(sum_t))
    tl.store(sums_ptr + programs + at, tl.sum(sum_c))
    tl.store(sums_ptr + 2 * programs + at, tl.sum(sum_ct))
    tl.store(sums_ptr + 3 * programs + at, tl.sum(sum_tc))
    tl.store(sums_ptr + 4 * programs + at, tl.sum(sum_r))
    tl.store(sums_ptr + 5 * programs + at, tl.sum(count))
    if not WEIGHTED:
        sum_w = count
    tl.store(sums_ptr + 6 * programs + at, tl.sum(sum_w))


@jit
def backward_kernel(
    student_ptr,  # (B, h, w, K)
    teacher_ptr,
    labels_ptr,  # (B, 4h, 4w)
    class_weights_ptr,  # (K,) float32
    scale_ptr,  # (2,) float32: of the gradient of the cross entropy, of the transfer
    gradient_ptr,  # (B, h, w, K)
    h,
    w,
    ignore_index,
    kappa,
    WEIGHTED: tl.constexpr,  # by class_weights_ptr
    K: tl.constexpr,
    T: tl.constexpr,
    CONSTANT: tl.constexpr,  # the weight of TRANSFERS for this student
    SLOPE: tl.constexpr,
    STUDENT_IS_CNN: tl.constexpr,
    LANES: tl.constexpr,
    ROWS: tl.constexpr,
):
    """The gradient of one branch, which is the student here; the other branch is its teacher.

        dl/dz = p - onehot(y)      d(T^2 KL(teacher || student))/dz = T (q_student - q_teacher)

    with p = softmax(z), q = softmax(z / T). The last dual cell of a tile in either direction
    belongs to the next tile; here it only completes the gradients before it.
    """
    CELLS: tl.constexpr = LANES // 4
    tile_column, tile_row = tl.program_id(0), tl.program_id(1)
    image = tl.program_id(2).to(tl.int64)
    student_ptr += image * h * w * K
    teacher_ptr += image * h * w * K
    gradient_ptr += image * h * w * K
    labels_ptr += image * 16 * h * w
    lane = tl.arange(0, LANES)
    first = tile_column * (CELLS - 1)  # the first dual cell, and the first logit written
    x = 4 * first + lane - 2
    cx = first + lane // 4
    left, right = corners(cx, w)
    fx = fraction(cx, w, lane % 4)
    cell = tl.arange(0, CELLS)
    owned = (cell < CELLS - 1) & (first + cell < w)
    scale_ce, scale_transfer = tl.load(scale_ptr), tl.load(scale_ptr + 1)
    lower = zeros(LANES, K)
    for n in range(ROWS + 1):
        cy = tile_row * ROWS + n
        upper, lower = lower, zeros(LANES, K)
        above, below = corners(cy, h)
        above_s = lerp_columns(student_ptr + above * w * K, left, right, fx, K)
        below_s = lerp_columns(student_ptr + below * w * K, left, right, fx, K)
        above_t = lerp_columns(teacher_ptr + above * w * K, left, right, fx, K)
        below_t = lerp_columns(teacher_ptr + below * w * K, left, right, fx, K)
        for p in range(4):
            fy = fraction(cy, h, p)
            row = 4 * cy - 2 + p
            inside = (x >= 0) & (x < 4 * w) & (row >= 0) & (row < 4 * h)
            y = tl.load(labels_ptr + row * 4 * w + x, mask=inside, other=0).to(tl.int32)
            valid = inside & (y != ignore_index)
            z_s = lerp_rows_shifted(above_s, below_s, fy, K)
            z_t = lerp_rows_shifted(above_t, below_t, fy, K)
            e_s, s_s = exponentials(z_s, 1.0, K)
            e_t, s_t = exponentials(z_t, 1.0, K)
            ce_gap = tl.log(s_s) - at_label(z_s, y, K) - tl.log(s_t) + at_label(z_t, y, K)
            if STUDENT_IS_CNN:  # r = sigmoid((l_transformer - l_cnn) / kappa)
                ce_gap = -ce_gap
            ce = tl.where(valid, scale_ce, 0)
            if WEIGHTED:
                c = weight_of(class_weights_ptr, y, valid, K)
                ce_gap, ce = c * ce_gap, c * ce
            r = tl.sigmoid(ce_gap / kappa)
            transfer = tl.where(valid, scale_transfer * (CONSTANT + SLOPE * r), 0)
            p_s = ce / s_s
            if T != 1:
                q_s, d_s = exponentials(z_s, T, K)
                q_t, d_t = exponentials(z_t, T, K)
            else:
                q_s, d_s, q_t, d_t = e_s, s_s, e_t, s_t
            d_s, d_t = transfer / d_s, transfer / d_t
            next_upper, next_lower = (), ()
            for k in tl.static_range(K):
                g = p_s * e_s[k] - tl.where(y == k, ce, 0) + d_s * q_s[k] - d_t * q_t[k]
                next_upper = next_upper + (upper[k] + (1 - fy) * g,)
                next_lower = next_lower + (lower[k] + fy * g,)
            upper, lower = next_upper, next_lower
        at = ((cy - 1) * w + first + cell) * K
        for k in tl.static_range(K):
            value = add_neighbours(fx * upper[k], (1 - fx) * upper[k], CELLS)
            tl.store(gradient_ptr + at + k, value, mask=owned & (n > 0) & (cy <= h))


@jit
def zeros(LANES: tl.constexpr, K: tl.constexpr):
    v = ()
    for _ in tl.static_range(K):
        v = v + (tl.zeros((LANES,), tl.float32),)
    return v


@jit
def add_neighbours(to_right, to_left, CELLS: tl.constexpr):
    """(4 CELLS,) twice -> (CELLS,): the gradient of each cell's right-hand logit, which is this
    cell's share to the right and the next cell's share to the left."""
    here = tl.sum(tl.reshape(to_right, (CELLS, 4)), 1)
    there = tl.sum(tl.reshape(to_left, (CELLS, 4)), 1)
    return here + tl.gather(there, (tl.arange(0, CELLS) + 1) % CELLS, 0)


# --- Launches ------------------------------------------------------------------------------------


def triton_forward(
    cnn_logits, transformer_logits, labels, weights, temperature, kappa, ignore_index, class_weights
) -> tuple[Tensor, Tensor]:
    """Sums over the valid pixels of the four terms, the gate, 1 and class weights, (7,) float64;
    what divides the terms, (4,).

    `weights` is an entry of TRANSFERS: (constant, slope) of CNN teaches and of Transformer teaches.
    """
    B, K, h, w = cnn_logits.shape
    z_c, z_t = channels_last(cnn_logits), channels_last(transformer_logits)
    lanes, rows = FORWARD_LANES, CELL_ROWS
    grid = (triton.cdiv(w + 1, lanes // 4), triton.cdiv(h + 1, rows), B)
    sums = z_c.new_empty(7, math.prod(grid), dtype=torch.float32)
    weighted, labels = class_weights is not None, labels.contiguous()
    numbers = (h, w, ignore_index, kappa, weighted)
    options = (K, temperature, *weights[0], *weights[1], lanes, rows)
    with on_device_of(z_c):
        forward_kernel[grid](
            z_c, z_t, labels, class_weights if weighted else sums, sums, *numbers, *options,
            num_warps=4,
        )  # fmt: skip
    sums = sums.double().sum(1)
    return sums, divisors(*sums[5:])[:4].float()


def triton_backward(
    upstream,
    total,
    cnn_logits,
    transformer_logits,
    labels,
    weights,
    temperature,
    kappa,
    ignore_index,
    class_weights,
) -> tuple[Tensor, Tensor]:
    """Gradients of the CNN's and the Transformer's logits; total (4,) divides the four terms."""
    K, h, w = cnn_logits.shape[1:]
    labels, z_c, z_t = labels.contiguous(), *map(channels_last, (cnn_logits, transformer_logits))
    grid = (triton.cdiv(w, BACKWARD_LANES // 4 - 1), triton.cdiv(h, CELL_ROWS), len(z_c))
    scale = upstream / total  # on the device: nothing waits for it
    weighted = class_weights is not None
    scale[2:] *= temperature

    def gradient_of(student, teacher, scale, weight, student_is_cnn):
        gradient = torch.empty_like(student)  # channels last, like every gradient here
        with on_device_of(student):
            backward_kernel[grid](
                student, teacher, labels, class_weights if weighted else scale, scale, gradient,
                h, w, ignore_index, kappa, weighted, K, temperature, *weight, student_is_cnn,
                BACKWARD_LANES, CELL_ROWS, num_warps=2,
            )  # fmt: skip
        return gradient

    # The order of the terms: both cross entropies, both transfers; the Transformer's come first.
    # Slices, for a list of indices would be copied to the GPU.
    of_cnn = gradient_of(z_c, z_t, scale[1::2].contiguous(), weights[1], True)
    of_transformer = gradient_of(z_t, z_c, scale[0::2].contiguous(), weights[0], False)
    return of_cnn, of_transformer
