"""The collaborative loss on a CPU: a few rows of pixels at a time, values and gradients together.

distill.py has the specification. Here no map of full-resolution logits exists: the rows of one
chunk are upsampled, and their gradients are brought back to the logits' size at once.

Upsampling is a product with a matrix on either side, A z C^T; its transpose is A^T g C.

Letters: B batch, K classes, h w the logits' size, R rows of W pixels in a chunk. Tensors of both
branches have the CNN first, as the arguments have.
"""

import torch
from torch import Tensor

from kernels.upsample import interpolation_matrix

CHUNK = 2**19  # numbers in the 2 x B x K x R x W logits of a chunk: about what a cache holds


def divisors(count: Tensor, weight: Tensor) -> Tensor:
    """What makes means of the five sums, (5,): the valid pixels' summed class weights under both
    cross entropies, their number under the rest; 1 where there is none."""
    weight, count = torch.where(count > 0, weight, 1), count.clamp(min=1).to(weight)
    return torch.stack((weight, weight, count, count, count))


def accumulation_dtype(logits: Tensor) -> torch.dtype:
    """The loss is computed in float32, or in the logits' dtype where that is wider."""
    return torch.promote_types(logits.dtype, torch.float32)


def rows_forward(
    cnn_logits, transformer_logits, labels, weights, temperature, kappa, ignore_index, class_weights
) -> tuple[Tensor, Tensor]:
    """Sums over the valid pixels, (7,) float64: the four terms, the gate, 1, and class weights. And
    the gradients of the mean cross entropies and of the mean transfers, (2, 2, B, K, h, w).

    `weights` is an entry of TRANSFERS: (constant, slope) of CNN teaches and of Transformer teaches.
    """
    B, K, h, w = cnn_logits.shape
    dtype = accumulation_dtype(cnn_logits)
    logits = torch.stack((cnn_logits, transformer_logits)).to(dtype)  # (2, B, K, h, w)
    A, C = (interpolation_matrix(n, 4 * n, dtype, logits.device) for n in (h, w))  # (H, h), (W, w)
    gradients = logits.new_zeros(2, *logits.shape)
    sums = torch.zeros(7, dtype=torch.float64)
    step = max(1, CHUNK // max(1, 2 * B * K * 16 * w))  # rows of logits in a chunk
    for first in range(0, h, step):
        last = min(first + step, h)
        reach = slice(max(first - 1, 0), last + 1)  # the logits' rows that reach into these pixels
        A_chunk = A[4 * first : 4 * last, reach]  # (R, .)
        buffers = logits.new_empty(2, 2, B, K, 4 * (last - first), 4 * w)
        torch.matmul(A_chunk, logits[..., reach, :] @ C.T, out=buffers[1])
        y = labels[:, None, 4 * first : 4 * last]
        options = (weights, temperature, kappa, ignore_index, class_weights)
        maps = pixels_and_gradients(buffers, y, *options)
        sums += maps.flatten(1).sum(1)
        gradients[..., reach, :] += A_chunk.T @ buffers @ C
    sums[2:4] *= temperature**2
    gradients[1] *= temperature
    for gradient, total in zip(gradients, divisors(*sums[5:])[[0, 2]], strict=True):
        gradient /= total
    return sums, gradients


def pixels_and_gradients(
    buffers, labels, weights, temperature, kappa, ignore_index, class_weights
) -> Tensor:
    """The four terms, the gate, 1 and the class weight at every pixel, zero where not valid,
    (7, B, 1, R, W).

        dl/dz = p - onehot(y)      d(T^2 KL(teacher || student))/dz = T (q_student - q_teacher)

    with p = softmax(z), q = softmax(z / T); labels (B, 1, R, W). The factors of T are the caller's.
    `buffers` (2, 2, B, K, R, W) is all the memory of this size that is used at T = 1:

                     on entry     meanwhile    on return
        buffers[0]   (nothing)    p            gradients of both cross entropies
        buffers[1]   logits z     z / T        gradients of both transfers
    """
    p, z = buffers
    valid = labels != ignore_index
    m = valid.to(z.dtype)
    target = (labels * valid).long().expand(2, *labels.shape)
    w = m if class_weights is None else m * class_weights[target[0]]
    lse = softmax_and_lse(z, out=p)
    l_c, l_t = (lse - z.gather(2, target)).mul_(w).unbind()  # (B, 1, R, W) each
    r = torch.sigmoid((l_t - l_c).div_(kappa))
    weight_ct, weight_tc = (m * (constant + slope * r) for constant, slope in weights)
    if temperature == 1:
        q = p
    else:
        q = torch.empty_like(z)
        lse = softmax_and_lse(z.div_(temperature), out=q)
    cnn_teaches, transformer_teaches = divergences(q, lse, z_overwritten=z)
    maps = torch.stack(
        (l_t, l_c, weight_ct * cnn_teaches, weight_tc * transformer_teaches, r, m, w)
    ).mul_(m)
    transfer_gradients(q, weight_ct, weight_tc, out=buffers[1])
    p.mul_(w).scatter_add_(2, target, -w.expand_as(target))  # w (p - onehot(y)), where valid
    return maps


def softmax_and_lse(z: Tensor, out: Tensor) -> Tensor:
    """softmax over the classes (dimension 2) into `out`; log sum exp. One exp serves both."""
    top = z.amax(2, keepdim=True)
    total = torch.sub(z, top, out=out).exp_().sum(2, keepdim=True)
    out /= total
    return total.log_().add_(top)


def divergences(q: Tensor, lse: Tensor, *, z_overwritten: Tensor) -> tuple[Tensor, Tensor]:
    """KL(q_c || q_t) and KL(q_t || q_c) at every pixel, (B, 1, R, W) each, where q = softmax(z).

    KL(q_c || q_t) = sum_k q_c (z_c - z_t) - (lse_c - lse_t). The memory of z is used for the
    difference of the logits and for the product with q.
    """
    (q_c, q_t), (lse_c, lse_t), (z_c, z_t) = q.unbind(), lse.unbind(), z_overwritten.unbind()
    logit_gap = z_c.sub_(z_t)
    lse_gap = lse_c - lse_t
    product = torch.mul(q_c, logit_gap, out=z_t)
    cnn_teaches = product.sum(1, keepdim=True).sub_(lse_gap)
    torch.mul(q_t, logit_gap, out=product)
    transformer_teaches = lse_gap - product.sum(1, keepdim=True)
    return cnn_teaches, transformer_teaches


def transfer_gradients(q: Tensor, weight_ct: Tensor, weight_tc: Tensor, *, out: Tensor) -> None:
    """weight (q_student - q_teacher) of the CNN as student, then of the Transformer."""
    (q_c, q_t), (of_cnn, of_transformer) = q.unbind(), out.unbind()
    torch.sub(q_c, q_t, out=of_cnn)
    torch.mul(of_cnn, -weight_ct, out=of_transformer)
    of_cnn *= weight_tc


def rows_backward(upstream: Tensor, saved: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """Gradients of the CNN's and the Transformer's logits; `saved` is what rows_forward left."""
    # The terms have the Transformer's first: (cross entropy, transfer), (CNN, Transformer).
    scale = upstream.view(2, 2, 1, 1, 1, 1).flip(1)
    both = scale[0] * saved[0] + scale[1] * saved[1]
    return tuple(channels_last_copy(gradient, dtype) for gradient in both)


def channels_last_copy(x: Tensor, dtype: torch.dtype) -> Tensor:
    """The result of an operation must be a tensor of its own, not a view."""
    return torch.empty_like(x, dtype=dtype, memory_format=torch.channels_last).copy_(x)
