"""The collaborative loss: two cross entropies, and at every pixel a decision who teaches whom.

The abstract says that a CNN and a Transformer transfer knowledge in both directions. We chose the
following. Let l_c and l_t be the cross entropies of the CNN and the Transformer at a valid pixel i,
z_c and z_t their logits, and sg a stop-gradient:

    r_i  = sg sigmoid((l_t,i - l_c,i) / kappa)                                     the gate
    L_ct = T^2/N sum_i r_i     KL(sg softmax(z_c/T) || softmax(z_t/T))    CNN teaches Transformer
    L_tc = T^2/N sum_i (1-r_i) KL(sg softmax(z_t/T) || softmax(z_c/T))    Transformer teaches CNN

In training the label of a pixel tells which branch is the better teacher there, so the gate uses
it. N counts the valid pixels, not the selected ones. So the loss depends neither on the size of the
image nor on how many pixels agree. T^2 keeps the size of the gradient independent of T (Hinton et
al., 2015).

`collaborative_loss_reference` is the specification. At its peak it holds nine maps of B x K x H x W
(117 MB each at B = 16, K = 7, 512 x 512, float32), although the logits are 16 times smaller. Two
implementations compute the same terms and gradients without any such map: distill_triton.py on a
GPU, distill_rows.py on a CPU.

Letters: B batch, K classes, H W the labels' size; the logits' size is h = H/4 by w = W/4. Loss
terms have one order everywhere: Transformer's cross entropy, CNN's, CNN teaches, Transformer
teaches, gate.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from kernels.choose import channels_last, refuse_second_derivative, use_triton
from kernels.distill_rows import accumulation_dtype, divisors, rows_backward, rows_forward
from kernels.distill_triton import triton_backward, triton_forward
from kernels.upsample import upsample, upsample_reference

# Each transfer gives two weights at a pixel with gate r, of (CNN teaches, Transformer teaches).
# A weight is constant + slope * r, written (constant, slope).
TRANSFERS = {
    "none": ((0, 0), (0, 0)),
    "cnn_to_transformer": ((1, 0), (0, 0)),
    "transformer_to_cnn": ((0, 0), (1, 0)),
    "mutual": ((1, 0), (1, 0)),
    "selective": ((0, 1), (1, -1)),
}


class CollaborativeLoss(NamedTuple):
    """Scalars, means over the valid pixels. `gate` is the mean of r and carries no gradient."""

    transformer_ce: Tensor
    cnn_ce: Tensor
    cnn_to_transformer: Tensor
    transformer_to_cnn: Tensor
    gate: Tensor


def collaborative_loss(
    cnn_logits: Tensor,
    transformer_logits: Tensor,
    labels: Tensor,
    *,
    transfer: str = "selective",
    temperature: float = 1.0,
    kappa: float = 0.5,
    ignore_index: int = 255,
    class_weights: Tensor | None = None,
) -> CollaborativeLoss:
    """Both cross entropies and both transfers, at the labels' resolution, in float32 or wider.

    cnn_logits, transformer_logits (B, K, H/4, W/4), upsampled bilinearly (align_corners=False) to
    the labels' size; labels (B, H, W) integer, 0..K-1 or `ignore_index`. The transfer terms are
    KL(teacher || student) = sum_k p_teacher (log p_teacher - log p_student); the teacher is
    detached. `transfer` is a key of TRANSFERS; `mutual` has weight 1 in both directions.
    class_weights (K,), positive, multiply each pixel's cross entropies by that of its label, in the
    gate too; the mean cross entropies are then weighted means. Without a valid pixel every term and
    every gradient is 0. Raises ValueError for shapes, types and options that do not fit.
    """
    check_arguments(cnn_logits, transformer_logits, labels, transfer, temperature, kappa)
    if class_weights is not None:
        class_weights = class_weights.to(cnn_logits.device, accumulation_dtype(cnn_logits))
    options = (transfer, float(temperature), float(kappa), ignore_index, class_weights)
    h, w = cnn_logits.shape[2:]
    at_a_quarter = labels.shape[1:] == (4 * h, 4 * w)
    fused = use_triton(cnn_logits, at_a_quarter and has_kernel(cnn_logits))
    if fused or (at_a_quarter and cnn_logits.device.type == "cpu"):
        terms, mean_gate, _ = fused_loss(cnn_logits, transformer_logits, labels, *options)
        return CollaborativeLoss(*terms.unbind(), mean_gate.detach())
    logits = (cnn_logits, transformer_logits)
    logits = (at_label_size(z, labels, upsample) for z in logits)  # not by atomics on a GPU
    return collaborative_loss_reference(*logits, labels, *options)


def collaborative_loss_reference(
    cnn_logits: Tensor,
    transformer_logits: Tensor,
    labels: Tensor,
    transfer: str = "selective",
    temperature: float = 1.0,
    kappa: float = 0.5,
    ignore_index: int = 255,
    class_weights: Tensor | None = None,
) -> CollaborativeLoss:
    """The specification: what `collaborative_loss` must equal; for any upsampling factor."""
    valid = labels != ignore_index  # (B, H, W)
    z_c, z_t = (at_label_size(z, labels) for z in (cnn_logits, transformer_logits))  # (B, K, H, W)
    target = labels.long().masked_fill(~valid, 0)
    w = torch.ones_like(z_c[:, 0]) if class_weights is None else class_weights[target]
    maps = per_pixel(z_c, z_t, target, w, transfer, temperature, kappa)
    *sums, weight = (torch.where(valid, m, 0).sum() for m in (*maps, w))  # where(): no 0 * inf
    means = (total / n for total, n in zip(sums, divisors(valid.sum(), weight), strict=True))
    return CollaborativeLoss(*means)


def per_pixel(z_c, z_t, target, w, transfer, temperature, kappa) -> tuple[Tensor, ...]:
    """The terms of CollaborativeLoss at every pixel, (B, H, W) each.

    z_c, z_t (B, K, H, W) at the labels' resolution, target (B, H, W) in 0..K-1, w (B, H, W).
    """
    log_p_c, log_p_t = torch.log_softmax(z_c, dim=1), torch.log_softmax(z_t, dim=1)
    l_c, l_t = (w * negative_log_likelihood(log_p, target) for log_p in (log_p_c, log_p_t))
    r = torch.sigmoid((l_t - l_c) / kappa).detach()
    weight_ct, weight_tc = (constant + slope * r for constant, slope in TRANSFERS[transfer])
    if temperature != 1:
        log_p_c = torch.log_softmax(z_c / temperature, dim=1)
        log_p_t = torch.log_softmax(z_t / temperature, dim=1)
    cnn_teaches = kl_divergence(teacher=log_p_c.detach(), student=log_p_t)
    transformer_teaches = kl_divergence(teacher=log_p_t.detach(), student=log_p_c)
    return (
        l_t,
        l_c,
        temperature**2 * weight_ct * cnn_teaches,
        temperature**2 * weight_tc * transformer_teaches,
        r,
    )


def kl_divergence(*, teacher: Tensor, student: Tensor) -> Tensor:
    """KL(teacher || student) per pixel from log-probabilities (B, K, H, W) -> (B, H, W).

    Both sides stay logarithms: p log p from probabilities has an infinite gradient at p = 0.
    """
    return (teacher.exp() * (teacher - student)).sum(dim=1)


def cross_entropy(logits: Tensor, target: Tensor) -> Tensor:
    """-log softmax(logits)[target] per pixel; logits (B, K, H, W), target (B, H, W)."""
    return negative_log_likelihood(torch.log_softmax(logits, dim=1), target)


def negative_log_likelihood(log_p: Tensor, target: Tensor) -> Tensor:
    """-log p[target] per pixel; log_p (B, K, H, W), target (B, H, W) -> (B, H, W)."""
    return -log_p.gather(1, target[:, None]).squeeze(1)


def at_label_size(logits: Tensor, labels: Tensor, upsampled=upsample_reference) -> Tensor:
    """Logits in at least float32, bilinearly at the labels' size."""
    logits, size = logits.to(accumulation_dtype(logits)), labels.shape[-2:]
    return logits if logits.shape[-2:] == size else upsampled(logits, size)


@torch.no_grad()
def gate(
    cnn_logits: Tensor,
    transformer_logits: Tensor,
    labels: Tensor,
    *,
    kappa: float = 0.5,
    ignore_index: int = 255,
    class_weights: Tensor | None = None,
) -> Tensor:
    """The gate r at every pixel, (B, H, W): near 1 where the CNN teaches, near 0 where the
    Transformer does, NaN where the label is ignored. For pictures and statistics."""
    target = labels.long().masked_fill(labels == ignore_index, 0)
    l_c = cross_entropy(at_label_size(cnn_logits, labels), target)
    l_t = cross_entropy(at_label_size(transformer_logits, labels), target)
    w = 1 if class_weights is None else class_weights[target]
    return torch.sigmoid(w * (l_t - l_c) / kappa).masked_fill(labels == ignore_index, torch.nan)


def check_arguments(cnn_logits, transformer_logits, labels, transfer, temperature, kappa) -> None:
    if transfer not in TRANSFERS:
        raise ValueError(f"transfer must be one of {', '.join(TRANSFERS)}; got {transfer!r}")
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


# --- What PyTorch sees ---------------------------------------------------------------------------
#
# Two operations that PyTorch knows by name, so that autograd, torch.compile and export see one node
# each. The upstream gradients of the four terms are known only in the backward pass. On a GPU
# arithmetic is cheaper than memory, so backward computes the pixels again with these gradients at
# hand. On a CPU exponentials are the cost, so forward saves the gradient of each term, at the
# logits' size.


def has_kernel(logits: Tensor) -> bool:
    """The kernels hold the classes in registers and compute in float32."""
    return logits.shape[1] <= 16 and logits.dtype != torch.float64 and logits.numel() > 0


@torch.library.custom_op("ctclm::collaborative_loss", mutates_args=())
def fused_loss(
    cnn_logits: Tensor,
    transformer_logits: Tensor,
    labels: Tensor,
    transfer: str,
    temperature: float,
    kappa: float,
    ignore_index: int,
    class_weights: Tensor | None,
) -> tuple[Tensor, Tensor, Tensor]:
    """The four terms (4,), the gate's mean (), and what the backward pass needs."""
    on_triton = use_triton(cnn_logits, has_kernel(cnn_logits))
    compute = triton_forward if on_triton else rows_forward
    options = (TRANSFERS[transfer], temperature, kappa, ignore_index, class_weights)
    with torch.autocast(cnn_logits.device.type, enabled=False):
        sums, saved = compute(cnn_logits, transformer_logits, labels, *options)
    means = (sums[:5] / divisors(*sums[5:])).to(accumulation_dtype(cnn_logits))
    return means[:4].clone(), means[4].clone(), saved


@torch.library.custom_op("ctclm::collaborative_loss_backward", mutates_args=())
def fused_loss_backward(
    upstream: Tensor,
    saved: Tensor,
    cnn_logits: Tensor,
    transformer_logits: Tensor,
    labels: Tensor,
    transfer: str,
    temperature: float,
    kappa: float,
    ignore_index: int,
    class_weights: Tensor | None,
) -> tuple[Tensor, Tensor]:
    """Gradients of the CNN's and the Transformer's logits; upstream (4,) has the terms'."""
    if not use_triton(cnn_logits, has_kernel(cnn_logits)):
        return rows_backward(upstream, saved, cnn_logits.dtype)
    options = (TRANSFERS[transfer], temperature, kappa, ignore_index, class_weights)
    return triton_backward(upstream, saved, cnn_logits, transformer_logits, labels, *options)


@fused_loss.register_fake
def _(cnn_logits, transformer_logits, labels, *options):
    on_triton = use_triton(cnn_logits, has_kernel(cnn_logits))
    saved = (4,) if on_triton else (2, 2, *cnn_logits.shape)
    dtype = accumulation_dtype(cnn_logits)
    return tuple(cnn_logits.new_empty(shape, dtype=dtype) for shape in ((4,), (), saved))


@fused_loss_backward.register_fake
def _(upstream, saved, cnn_logits, transformer_logits, labels, *options):
    return tuple(torch.empty_like(channels_last(x)) for x in (cnn_logits, transformer_logits))


def keep_for_backward(ctx, inputs, output):
    ctx.options = inputs[3:7]
    ctx.save_for_backward(output[2], *inputs[:3], inputs[7])


def backward(ctx, upstream, _gate, _saved):
    *tensors, class_weights = ctx.saved_tensors
    gradients = fused_loss_backward(upstream, *tensors, *ctx.options, class_weights)
    return *gradients, None, None, None, None, None, None


fused_loss.register_autograd(backward, setup_context=keep_for_backward)
refuse_second_derivative(fused_loss_backward, "collaborative_loss", "distill.py", where="")
