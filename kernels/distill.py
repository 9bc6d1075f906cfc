"""The collaborative loss: two cross entropies, and who teaches whom at every pixel.

The abstract says that a CNN and a Transformer transfer knowledge in both directions. We chose:
at a valid pixel i, with l_m,i the cross entropy of branch m in {c, t} and sg a stop-gradient,

    r_i  = sg sigmoid((l_t,i - l_c,i) / kappa)                    reliability of the CNN
    L_ct = T^2 / N  sum_i r_i      KL(sg softmax(z_c / T) || softmax(z_t / T))   CNN teaches
    L_tc = T^2 / N  sum_i (1-r_i)  KL(sg softmax(z_t / T) || softmax(z_c / T))   Transformer teaches

because the labels, which both students have, say which of the two to believe here. N counts the
valid pixels, not the selected ones, so that the loss depends neither on the size of the image nor
on how many pixels agree. T^2 keeps the gradient's size independent of T (Hinton et al., 2015).

`collaborative_loss_reference` says it in PyTorch. It holds nine maps of B x K x H x W at its peak
(117 MB each at B = 16, K = 7, 512 x 512 in float32), although the logits have a sixteenth of that.
What follows it computes the same, and its gradients, without ever holding one such map: on a GPU
two Triton kernels, on a CPU the same lines over a few rows at a time.

Letters: B batch, K classes, H W the labels' pixels; the logits' grid is h = H/4 by w = W/4.
"""

from __future__ import annotations  # tl.constexpr must not be looked up where Triton is missing

import math
from functools import lru_cache
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from kernels.choose import jit, on_device_of, tl, triton, use_triton

DIRECTIONS = ("none", "cnn_to_transformer", "transformer_to_cnn", "mutual", "selective")


class CollaborativeLoss(NamedTuple):
    """Scalars, means over the valid pixels. `gate` is the mean of r and carries no gradient."""

    cnn_ce: Tensor
    transformer_ce: Tensor
    cnn_to_transformer: Tensor
    transformer_to_cnn: Tensor
    gate: Tensor


def collaborative_loss(
    cnn_logits: Tensor,
    transformer_logits: Tensor,
    labels: Tensor,
    *,
    direction: str = "selective",
    temperature: float = 1.0,
    kappa: float = 0.5,
    ignore_index: int = 255,
) -> CollaborativeLoss:
    """Both cross entropies and both transfers, at the labels' resolution, in float32 or wider.

    cnn_logits, transformer_logits (B, K, H/4, W/4), upsampled bilinearly (align_corners=False) to
    the labels' size; labels (B, H, W) integer, 0..K-1 or `ignore_index`. The transfer terms are
    KL(teacher || student) = sum_k p_teacher (log p_teacher - log p_student); the teacher is
    detached. `direction`: one of DIRECTIONS; `mutual` is both ways with r = 1 everywhere.
    With no valid pixel every term is 0 and every gradient is 0.
    """
    check_arguments(cnn_logits, transformer_logits, labels, direction, temperature, kappa)
    options = (direction, float(temperature), float(kappa), ignore_index)
    h, w = cnn_logits.shape[-2:]
    at_a_quarter = labels.shape[1:] == (4 * h, 4 * w)
    fits = at_a_quarter and cnn_logits.shape[1] <= 16 and cnn_logits.dtype != torch.float64
    if use_triton(cnn_logits, fits) or (cnn_logits.device.type == "cpu" and at_a_quarter):
        terms, gate, _ = fused_loss(cnn_logits, transformer_logits, labels, *options)
        return CollaborativeLoss(*terms.unbind(), gate.detach())
    return collaborative_loss_reference(cnn_logits, transformer_logits, labels, *options)


def collaborative_loss_reference(
    cnn_logits: Tensor,
    transformer_logits: Tensor,
    labels: Tensor,
    direction: str = "selective",
    temperature: float = 1.0,
    kappa: float = 0.5,
    ignore_index: int = 255,
) -> CollaborativeLoss:
    """The specification: what `collaborative_loss` must equal; for any upsampling factor."""
    valid = labels != ignore_index  # (B, H, W)
    z_c, z_t = upsample(cnn_logits, labels), upsample(transformer_logits, labels)  # (B, K, H, W)
    target = labels.long().masked_fill(~valid, 0)
    maps = per_pixel(z_c, z_t, target, direction, temperature, kappa)
    count = valid.sum().clamp(min=1)
    means = [torch.where(valid, m, 0).sum() / count for m in maps]  # where(): no 0 * inf
    return CollaborativeLoss(*means)


def per_pixel(z_c, z_t, target, direction, temperature, kappa) -> tuple[Tensor, ...]:
    """l_c, l_t, both weighted transfers and the gate at every pixel, (B, H, W) each.

    z_c, z_t (B, K, H, W) at the labels' resolution, target (B, H, W) in 0..K-1.
    """
    log_p_c, log_p_t = torch.log_softmax(z_c, dim=1), torch.log_softmax(z_t, dim=1)
    l_c, l_t = pick(log_p_c, target), pick(log_p_t, target)
    r = torch.sigmoid((l_t - l_c) / kappa).detach()
    weight_ct, weight_tc = transfer_weights(r, direction)
    if temperature != 1:
        log_p_c = torch.log_softmax(z_c / temperature, dim=1)
        log_p_t = torch.log_softmax(z_t / temperature, dim=1)
    cnn_teaches = kl_divergence(teacher=log_p_c.detach(), student=log_p_t)
    transformer_teaches = kl_divergence(teacher=log_p_t.detach(), student=log_p_c)
    return (
        l_c,
        l_t,
        temperature**2 * weight_ct * cnn_teaches,
        temperature**2 * weight_tc * transformer_teaches,
        r,
    )


def transfer_weights(r: Tensor, direction: str) -> tuple[Tensor, Tensor]:
    """Per-pixel weights of (CNN teaches Transformer, Transformer teaches CNN). The one place."""
    if direction == "selective":
        return r, 1 - r
    return (
        torch.full_like(r, direction in ("cnn_to_transformer", "mutual")),
        torch.full_like(r, direction in ("transformer_to_cnn", "mutual")),
    )


def kl_divergence(*, teacher: Tensor, student: Tensor) -> Tensor:
    """KL(teacher || student) per pixel from log-probabilities (B, K, H, W) -> (B, H, W).

    Both sides stay logarithms: p log p from probabilities has an infinite gradient at p = 0.
    """
    return (teacher.exp() * (teacher - student)).sum(dim=1)


def cross_entropy(logits: Tensor, target: Tensor) -> Tensor:
    """-log softmax(logits)[target] per pixel; logits (B, K, H, W), target (B, H, W)."""
    return pick(torch.log_softmax(logits, dim=1), target)


def pick(log_p: Tensor, target: Tensor) -> Tensor:
    """-log p[target] per pixel, (B, H, W)."""
    return -log_p.gather(1, target[:, None]).squeeze(1)


def upsample(logits: Tensor, labels: Tensor) -> Tensor:
    """Logits in at least float32, bilinearly at the labels' size."""
    logits = logits.to(torch.promote_types(logits.dtype, torch.float32))
    return F.interpolate(logits, size=labels.shape[-2:], mode="bilinear", align_corners=False)


@torch.no_grad()
def reliability(
    cnn_logits: Tensor, transformer_logits: Tensor, labels: Tensor, *, kappa=0.5, ignore_index=255
) -> Tensor:
    """The gate r itself, (B, H, W): 1 where the CNN is right and the Transformer is not; NaN where
    the label is ignored. For pictures and statistics."""
    target = labels.long().masked_fill(labels == ignore_index, 0)
    l_c = cross_entropy(upsample(cnn_logits, labels), target)
    l_t = cross_entropy(upsample(transformer_logits, labels), target)
    return torch.sigmoid((l_t - l_c) / kappa).masked_fill(labels == ignore_index, torch.nan)


def check_arguments(cnn_logits, transformer_logits, labels, direction, temperature, kappa) -> None:
    if direction not in DIRECTIONS:
        raise ValueError(f"direction must be one of {', '.join(DIRECTIONS)}; got {direction!r}")
    if temperature <= 0 or kappa <= 0:
        raise ValueError(f"temperature and kappa must be positive; got {temperature}, {kappa}")
    if cnn_logits.shape != transformer_logits.shape or cnn_logits.dim() != 4:
        raise ValueError(
            "both logits must be (B, K, H/4, W/4) and alike; "
            f"got {tuple(cnn_logits.shape)} and {tuple(transformer_logits.shape)}"
        )
    if labels.dim() != 3 or len(labels) != len(cnn_logits) or labels.is_floating_point():
        raise ValueError(
            f"labels must be integers (B, H, W) for a batch of {len(cnn_logits)}; "
            f"got {labels.dtype} {tuple(labels.shape)}"
        )


# --- Without full-resolution maps ----------------------------------------------------------------
#
# Two operations that PyTorch knows by name, so that autograd, torch.compile and export see one node
# each. The upstream gradient of each of the four terms is known only in the backward pass. On a
# GPU, where arithmetic is cheaper than registers, backward computes the pixels again with the four
# at hand; on a CPU, where exp is what costs, forward leaves the gradient of each term, at the
# logits' size.


@torch.library.custom_op("ctclm::collaborative_loss", mutates_args=())
def fused_loss(
    cnn_logits: Tensor,
    transformer_logits: Tensor,
    labels: Tensor,
    direction: str,
    temperature: float,
    kappa: float,
    ignore_index: int,
) -> tuple[Tensor, Tensor, Tensor]:
    """The four terms (4,), the gate's mean (), and what the backward pass wants to know."""
    compute = triton_forward if use_triton(cnn_logits) else row_forward
    options = (direction, temperature, kappa, ignore_index)
    with torch.autocast(cnn_logits.device.type, enabled=False):
        sums, kept = compute(cnn_logits, transformer_logits, labels, *options)
    means = (sums[:5] / sums[5].clamp(min=1)).to(wide(cnn_logits))
    return means[:4].clone(), means[4].clone(), kept


@torch.library.custom_op("ctclm::collaborative_loss_backward", mutates_args=())
def fused_loss_backward(
    upstream: Tensor,
    kept: Tensor,
    cnn_logits: Tensor,
    transformer_logits: Tensor,
    labels: Tensor,
    direction: str,
    temperature: float,
    kappa: float,
    ignore_index: int,
) -> tuple[Tensor, Tensor]:
    """Gradients of both logits from those of the four terms, upstream (4,)."""
    compute = triton_backward if use_triton(cnn_logits) else row_backward
    options = (direction, temperature, kappa, ignore_index)
    return compute(upstream, kept, cnn_logits, transformer_logits, labels, *options)


@fused_loss.register_fake
def _(cnn_logits, transformer_logits, labels, *options):
    kept = () if use_triton(cnn_logits) else (2, 2, *cnn_logits.shape)
    return tuple(cnn_logits.new_empty(x, dtype=wide(cnn_logits)) for x in ((4,), (), kept))


@fused_loss_backward.register_fake
def _(upstream, kept, cnn_logits, transformer_logits, labels, *options):
    return tuple(torch.empty_like(pixels_last(x)) for x in (cnn_logits, transformer_logits))


def keep_for_backward(ctx, inputs, output):
    ctx.options = inputs[3:]
    ctx.save_for_backward(output[2], *inputs[:3])


def backward(ctx, upstream, _gate, _kept):
    gradients = fused_loss_backward(upstream, *ctx.saved_tensors, *ctx.options)
    return *gradients, None, None, None, None, None


def refuse(ctx, *_):
    raise RuntimeError(
        "collaborative_loss has no second derivative; collaborative_loss_reference in "
        "kernels/distill.py has one"
    )


fused_loss.register_autograd(backward, setup_context=keep_for_backward)
fused_loss_backward.register_autograd(refuse)


def wide(logits: Tensor) -> torch.dtype:
    return torch.promote_types(logits.dtype, torch.float32)


def pixels_last(x: Tensor) -> Tensor:
    """(B, K, h, w) in memory as (B, h, w, K), which is how the model leaves its logits."""
    return x.contiguous(memory_format=torch.channels_last)


# --- On a CPU: a few rows at a time --------------------------------------------------------------

CHUNK = 2**19  # numbers in a map of 2 x B x K x rows x W at a time: about what a cache holds


@lru_cache(16)
def upsampling(n: int, dtype: torch.dtype) -> Tensor:
    """Bilinear x4 along one axis as a matrix (4n, n): what it makes of the identity."""
    identity = torch.eye(n, dtype=dtype)
    return F.interpolate(identity[None], scale_factor=4, mode="linear")[0].T.contiguous()


def row_forward(
    cnn_logits, transformer_logits, labels, direction, temperature, kappa, ignore_index
):
    """Sums over the valid pixels of the four terms, the gate and 1, (6,) float64; and the gradients
    of the mean cross entropy and of the mean transfer with respect to (CNN, Transformer) logits,
    (2, 2, B, K, h, w).

    Upsampling is a product with a matrix on either side, A z C^T, and its transpose is A^T g C.
    """
    B, K, h, w = cnn_logits.shape
    z = torch.stack((cnn_logits, transformer_logits)).to(wide(cnn_logits))  # (2, B, K, h, w)
    rows, columns = upsampling(h, z.dtype), upsampling(w, z.dtype)  # A (H, h), C (W, w)
    gradients = z.new_zeros(2, *z.shape)
    sums = torch.zeros(6, dtype=torch.float64)
    step = max(1, CHUNK // (2 * B * K * 16 * w))
    for first in range(0, h, step):
        last = min(first + step, h)
        near = slice(max(first - 1, 0), last + 1)  # the logits that reach into these rows
        A = rows[4 * first : 4 * last, near]
        pair = z.new_empty(2, 2, B, K, 4 * (last - first), 4 * w)
        torch.matmul(A, z[..., near, :] @ columns.T, out=pair[1])
        y = labels[:, None, 4 * first : 4 * last]
        maps = pixels_and_gradients(pair, y, direction, temperature, kappa, ignore_index)
        sums += maps.flatten(1).sum(1)
        gradients[..., near, :] += A.T @ pair @ columns
    sums[2:4] *= temperature**2
    gradients[1, 0] *= temperature
    gradients[1, 1] *= -temperature
    return sums, gradients.div_(sums[5].clamp(min=1))


def pixels_and_gradients(pair, labels, direction, temperature, kappa, ignore_index):
    """What `per_pixel` returns and the number 1, zero where not valid, (6, B, 1, R, W).

        dl/dz = p - onehot(y)        d(T^2 KL(teacher || student))/dz = T (q_student - q_teacher)

    pair (2, 2, B, K, R, W): pair[1] is z, the upsampled logits of CNN and Transformer. Left there
    is what they add to the gradients, pair[0] by cross entropy and pair[1] by transfer; no other
    map of that size lives meanwhile. q = softmax(z / T); labels (B, 1, R, W). The factors of T, and
    the sign of the second transfer's gradient, q_c - q_t for both, are the caller's.
    """
    p, z = pair.unbind()
    valid = labels != ignore_index
    target = (labels * valid).long().expand(2, *labels.shape)
    m = valid.to(z.dtype)
    lse = softmax_and_lse(z, out=p)
    l_c, l_t = (lse - z.gather(2, target)).unbind()  # (B, 1, R, W) each
    r = torch.sigmoid((l_t - l_c).div_(kappa))
    weight_ct, weight_tc = (m * weight for weight in transfer_weights(r, direction))
    q = p
    if temperature != 1:
        q = torch.empty_like(z)
        lse = softmax_and_lse(z.div_(temperature), out=q)
    (q_c, q_t), (lse_c, lse_t), (gap, scratch) = q.unbind(), lse.unbind(), z.unbind()
    gap -= scratch  # (z_c - z_t) / T
    lse_gap = lse_c.sub_(lse_t)
    cnn_teaches = torch.mul(q_c, gap, out=scratch).sum(1, keepdim=True).sub_(lse_gap)
    transformer_teaches = lse_gap - torch.mul(q_t, gap, out=scratch).sum(1, keepdim=True)
    maps = torch.stack(
        (l_c, l_t, weight_ct * cnn_teaches, weight_tc * transformer_teaches, r, m)
    ).mul_(m)
    difference = torch.sub(q_c, q_t, out=gap)
    torch.mul(difference, weight_ct, out=scratch)  # of the Transformer, but for the sign
    difference *= weight_tc  # of the CNN
    p.mul_(m).scatter_add_(2, target, -m.expand_as(target))
    return maps


def softmax_and_lse(z: Tensor, out: Tensor) -> Tensor:
    """softmax over the classes (dimension 2) into `out`; log sum exp. From one exp: it costs."""
    top = z.amax(2, keepdim=True)
    total = torch.sub(z, top, out=out).exp_().sum(2, keepdim=True)
    out /= total
    return total.log_().add_(top)


def row_backward(upstream, kept, cnn_logits, transformer_logits, labels, *_options):
    cross_entropy, transfer = kept  # (2, B, K, h, w) each
    shape = (2, 1, 1, 1, 1)
    both = upstream[:2].view(shape) * cross_entropy + upstream[2:].flip(0).view(shape) * transfer
    return tuple(copied(g, cnn_logits.dtype) for g in both)


def copied(x: Tensor, dtype: torch.dtype) -> Tensor:
    """A tensor of its own, which an operation's result must be, with pixels last."""
    return torch.empty_like(x, dtype=dtype, memory_format=torch.channels_last).copy_(x)


# --- On a GPU: dual cells ------------------------------------------------------------------------
#
# Between four neighbouring logits lie 4 x 4 pixels that depend on these four alone. In a row,
# pixels 4 cx - 2 .. 4 cx + 1 lie between the logits of columns cx - 1 and cx, at 1/8, 3/8, 5/8 and
# 7/8 of the way; likewise down a column. At the border one of the two is missing: fraction 0 or 1
# makes the other one count alone, which is what align_corners=False means there. So h + 1 by w + 1
# dual cells tile the image.
#
# A program walks down ROWS of them with a lane for each column of pixels. The K classes of a pixel
# sit in a tuple of K registers: no padding to a power of two and no reduction across lanes. To a
# logit come gradients from four dual cells: those above and below meet in registers as the program
# walks down, those to the left and right by one exchange between lanes, so that each is written
# once, in a fixed order, without atomics.
#
# Work per pixel: 2 K exponentials and some 30 K other operations, once forward and once for each
# branch backward. Traffic: logits and labels once each time, gradients once. kernels/README.md has
# the time that this would take at least.

CELL_ROWS = 8  # dual rows of a program
FORWARD_LANES, BACKWARD_LANES = 128, 64  # columns of pixels of a program, 32 to a warp


@jit
def neighbours(j, n):
    """The logits before and after dual cell j, of n."""
    return tl.minimum(tl.maximum(j - 1, 0), n - 1), tl.minimum(j, n - 1)


@jit
def fraction(j, n, p):
    """How far pixel p = 0..3 of dual cell j has come from the one to the other."""
    return tl.where(j == 0, 1.0, tl.where(j >= n, 0.0, (p + 0.5) / 4))


@jit
def across(z, left, right, fx, K: tl.constexpr):
    """One row of logits, z (w, K), at the lanes' columns: a tuple of K."""
    v = ()
    for k in tl.static_range(K):
        a = tl.load(z + left * K + k).to(tl.float32)
        b = tl.load(z + right * K + k).to(tl.float32)
        v = v + (a + fx * (b - a),)
    return v


@jit
def between(above, below, fy, K: tl.constexpr):
    """The logits of a pixel less the largest of them."""
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
def weights_of(r, DIRECTION: tl.constexpr):
    """`transfer_weights`: what changes there changes here."""
    weight_ct, weight_tc = tl.zeros_like(r), tl.zeros_like(r)
    if DIRECTION == "selective":
        weight_ct, weight_tc = r, 1 - r
    if DIRECTION == "cnn_to_transformer" or DIRECTION == "mutual":
        weight_ct += 1
    if DIRECTION == "transformer_to_cnn" or DIRECTION == "mutual":
        weight_tc += 1
    return weight_ct, weight_tc


@jit
def forward_kernel(
    cnn,  # (B, h, w, K)
    transformer,
    labels,  # (B, 4h, 4w)
    sums,  # (6, programs) float32
    h,
    w,
    ignore_index,
    kappa,
    K: tl.constexpr,
    T: tl.constexpr,
    DIRECTION: tl.constexpr,
    LANES: tl.constexpr,
    ROWS: tl.constexpr,
):
    strip, band, image = tl.program_id(0), tl.program_id(1), tl.program_id(2).to(tl.int64)
    cnn, transformer = cnn + image * h * w * K, transformer + image * h * w * K
    labels += image * 16 * h * w
    lane = tl.arange(0, LANES)
    x = strip * LANES + lane - 2
    cx = strip * (LANES // 4) + lane // 4
    left, right = neighbours(cx, w)
    fx = fraction(cx, w, lane % 4)
    sum_c, sum_t = tl.zeros((LANES,), tl.float32), tl.zeros((LANES,), tl.float32)
    sum_ct, sum_tc = tl.zeros((LANES,), tl.float32), tl.zeros((LANES,), tl.float32)
    sum_r, count = tl.zeros((LANES,), tl.float32), tl.zeros((LANES,), tl.float32)
    for n in range(ROWS):
        cy = band * ROWS + n
        above, below = neighbours(cy, h)
        above_c = across(cnn + above * w * K, left, right, fx, K)
        below_c = across(cnn + below * w * K, left, right, fx, K)
        above_t = across(transformer + above * w * K, left, right, fx, K)
        below_t = across(transformer + below * w * K, left, right, fx, K)
        for p in range(4):
            fy = fraction(cy, h, p)
            row = 4 * cy - 2 + p
            inside = (x >= 0) & (x < 4 * w) & (row >= 0) & (row < 4 * h)
            y = tl.load(labels + row * 4 * w + x, mask=inside, other=0).to(tl.int32)
            valid = inside & (y != ignore_index)
            z_c, z_t = between(above_c, below_c, fy, K), between(above_t, below_t, fy, K)
            e_c, s_c = exponentials(z_c, 1.0, K)
            e_t, s_t = exponentials(z_t, 1.0, K)
            l_c = tl.log(s_c) - at_label(z_c, y, K)
            l_t = tl.log(s_t) - at_label(z_t, y, K)
            r = tl.sigmoid((l_t - l_c) / kappa)
            weight_ct, weight_tc = weights_of(r, DIRECTION)
            if T != 1:
                e_c, s_c = exponentials(z_c, T, K)
                e_t, s_t = exponentials(z_t, T, K)
            cross_c, cross_t = tl.zeros_like(r), tl.zeros_like(r)
            for k in tl.static_range(K):
                gap = (z_c[k] - z_t[k]) / T
                cross_c += e_c[k] * gap
                cross_t += e_t[k] * gap
            log_s = tl.log(s_c) - tl.log(s_t)
            cnn_teaches, transformer_teaches = cross_c / s_c - log_s, log_s - cross_t / s_t
            sum_c += tl.where(valid, l_c, 0)
            sum_t += tl.where(valid, l_t, 0)
            sum_ct += tl.where(valid, T * T * weight_ct * cnn_teaches, 0)
            sum_tc += tl.where(valid, T * T * weight_tc * transformer_teaches, 0)
            sum_r += tl.where(valid, r, 0)
            count += tl.where(valid, 1.0, 0.0)
    programs = tl.num_programs(0) * tl.num_programs(1) * tl.num_programs(2)
    at = (tl.program_id(2) * tl.num_programs(1) + band) * tl.num_programs(0) + strip
    tl.store(sums + at, tl.sum(sum_c))
    tl.store(sums + programs + at, tl.sum(sum_t))
    tl.store(sums + 2 * programs + at, tl.sum(sum_ct))
    tl.store(sums + 3 * programs + at, tl.sum(sum_tc))
    tl.store(sums + 4 * programs + at, tl.sum(sum_r))
    tl.store(sums + 5 * programs + at, tl.sum(count))


@jit
def backward_kernel(
    student,  # (B, h, w, K)
    peer,
    labels,  # (B, 4h, 4w)
    scale,  # (2,) float32: of the gradient of the cross entropy, of the transfer
    gradient,  # (B, h, w, K)
    h,
    w,
    ignore_index,
    kappa,
    K: tl.constexpr,
    T: tl.constexpr,
    DIRECTION: tl.constexpr,
    STUDENT: tl.constexpr,
    LANES: tl.constexpr,
    ROWS: tl.constexpr,
):
    """dl/dz = p - onehot(y) and d(T^2 KL(teacher || student))/dz = T (q_student - q_teacher),
    q = softmax(z / T), of one branch. The last dual cell of a strip and the last dual row of a
    band belong to the next program; here they only complete the gradients before them."""
    CELLS: tl.constexpr = LANES // 4
    strip, band, image = tl.program_id(0), tl.program_id(1), tl.program_id(2).to(tl.int64)
    student, peer = student + image * h * w * K, peer + image * h * w * K
    gradient += image * h * w * K
    labels += image * 16 * h * w
    lane = tl.arange(0, LANES)
    first = strip * (CELLS - 1)  # the first dual cell, and the first logit written
    x = 4 * first + lane - 2
    cx = first + lane // 4
    left, right = neighbours(cx, w)
    fx = fraction(cx, w, lane % 4)
    cell = tl.arange(0, CELLS)
    mine = (cell < CELLS - 1) & (first + cell < w)
    scale_ce, scale_transfer = tl.load(scale), tl.load(scale + 1)
    lower = zeros(LANES, K)
    for n in range(ROWS + 1):
        cy = band * ROWS + n
        upper, lower = lower, zeros(LANES, K)
        above, below = neighbours(cy, h)
        above_s = across(student + above * w * K, left, right, fx, K)
        below_s = across(student + below * w * K, left, right, fx, K)
        above_p = across(peer + above * w * K, left, right, fx, K)
        below_p = across(peer + below * w * K, left, right, fx, K)
        for p in range(4):
            fy = fraction(cy, h, p)
            row = 4 * cy - 2 + p
            inside = (x >= 0) & (x < 4 * w) & (row >= 0) & (row < 4 * h)
            y = tl.load(labels + row * 4 * w + x, mask=inside, other=0).to(tl.int32)
            valid = inside & (y != ignore_index)
            z_s, z_p = between(above_s, below_s, fy, K), between(above_p, below_p, fy, K)
            e_s, s_s = exponentials(z_s, 1.0, K)
            e_p, s_p = exponentials(z_p, 1.0, K)
            lead = tl.log(s_s) - at_label(z_s, y, K) - tl.log(s_p) + at_label(z_p, y, K)
            if STUDENT == "cnn":  # lead = l_student - l_peer; r = sigmoid((l_t - l_c) / kappa)
                weight = weights_of(tl.sigmoid(-lead / kappa), DIRECTION)[1]
            else:
                weight = weights_of(tl.sigmoid(lead / kappa), DIRECTION)[0]
            ce = tl.where(valid, scale_ce, 0)
            transfer = tl.where(valid, scale_transfer * weight, 0)
            p_s = ce / s_s
            if T != 1:
                q_s, d_s = exponentials(z_s, T, K)
                q_p, d_p = exponentials(z_p, T, K)
            else:
                q_s, d_s, q_p, d_p = e_s, s_s, e_p, s_p
            d_s, d_p = transfer / d_s, transfer / d_p
            next_upper, next_lower = (), ()
            for k in tl.static_range(K):
                g = p_s * e_s[k] - tl.where(y == k, ce, 0) + d_s * q_s[k] - d_p * q_p[k]
                next_upper = next_upper + (upper[k] + (1 - fy) * g,)
                next_lower = next_lower + (lower[k] + fy * g,)
            upper, lower = next_upper, next_lower
        at = ((cy - 1) * w + first + cell) * K
        for k in tl.static_range(K):
            value = meet(fx * upper[k], (1 - fx) * upper[k], CELLS)
            tl.store(gradient + at + k, value, mask=mine & (n > 0) & (cy <= h))


@jit
def zeros(LANES: tl.constexpr, K: tl.constexpr):
    v = ()
    for _ in tl.static_range(K):
        v = v + (tl.zeros((LANES,), tl.float32),)
    return v


@jit
def meet(to_right, to_left, CELLS: tl.constexpr):
    """(4 CELLS,) twice -> (CELLS,): for each cell's right-hand logit, from the two cells it has."""
    here = tl.sum(tl.reshape(to_right, (CELLS, 4)), 1)
    there = tl.sum(tl.reshape(to_left, (CELLS, 4)), 1)
    return here + tl.gather(there, (tl.arange(0, CELLS) + 1) % CELLS, 0)


def triton_forward(
    cnn_logits, transformer_logits, labels, direction, temperature, kappa, ignore_index
):
    """Sums over the valid pixels of the four terms, the gate and 1, (6,) float64; the divisor."""
    B, K, h, w = cnn_logits.shape
    z_c, z_t = pixels_last(cnn_logits), pixels_last(transformer_logits)
    lanes, rows = FORWARD_LANES, CELL_ROWS
    grid = (triton.cdiv(w + 1, lanes // 4), triton.cdiv(h + 1, rows), B)
    sums = z_c.new_empty(6, math.prod(grid), dtype=torch.float32)
    options = (ignore_index, kappa, K, temperature, direction, lanes, rows)
    with on_device_of(z_c):
        forward_kernel[grid](z_c, z_t, labels.contiguous(), sums, h, w, *options, num_warps=4)
    sums = sums.double().sum(1)
    return sums, sums[5].clamp(min=1).float()


def triton_backward(
    upstream,
    count,
    cnn_logits,
    transformer_logits,
    labels,
    direction,
    temperature,
    kappa,
    ignore_index,
):
    B, K, h, w = cnn_logits.shape
    labels, z_c, z_t = labels.contiguous(), pixels_last(cnn_logits), pixels_last(transformer_logits)
    lanes, rows = BACKWARD_LANES, CELL_ROWS
    grid = (triton.cdiv(w, lanes // 4 - 1), triton.cdiv(h, rows), B)
    scale = upstream / count  # on the device: nothing waits for it
    scale[2:] *= temperature
    options = (ignore_index, kappa, K, temperature, direction)
    gradients = []
    for name, student, peer, terms in (
        ("cnn", z_c, z_t, scale[::3].contiguous()),  # slices: a list would be copied to the GPU
        ("transformer", z_t, z_c, scale[1:3].contiguous()),
    ):
        gradient = torch.empty_like(student)  # channels last, like every gradient here
        with on_device_of(student):
            backward_kernel[grid](
                student, peer, labels, terms, gradient, h, w, *options, name, lanes, rows,
                num_warps=2,
            )  # fmt: skip
        gradients.append(gradient)
    return tuple(gradients)
