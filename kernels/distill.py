"""The collaborative loss: two cross entropies, and who teaches whom at every pixel.

The abstract says that a CNN and a Transformer transfer knowledge in both directions. We chose:
at a valid pixel i, with l_m,i the cross entropy of branch m in {c, t} and sg a stop-gradient,

    r_i  = sg sigmoid((l_t,i - l_c,i) / kappa)                    reliability of the CNN
    L_ct = T^2 / N  sum_i r_i      KL(sg softmax(z_c / T) || softmax(z_t / T))   CNN teaches
    L_tc = T^2 / N  sum_i (1-r_i)  KL(sg softmax(z_t / T) || softmax(z_c / T))   Transformer teaches

because the labels, which both students have, say which of the two to believe here. N counts the
valid pixels, not the selected ones, so that the loss depends neither on the size of the image nor
on how many pixels agree. T^2 keeps the gradient's size independent of T (Hinton et al., 2015).

Letters: B batch, K classes, H W the labels' pixels; logits live on a coarser grid, (H/4, W/4).
"""

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

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
    valid = labels != ignore_index  # (B, H, W)
    count = valid.sum().clamp(min=1)
    target = labels.long().masked_fill(~valid, 0)
    z_c = upsample(cnn_logits, labels)  # (B, K, H, W)
    z_t = upsample(transformer_logits, labels)

    def mean(per_pixel: Tensor) -> Tensor:  # over the valid pixels; where(), so 0 * inf cannot be
        return torch.where(valid, per_pixel, 0).sum() / count

    log_p_c, log_p_t = torch.log_softmax(z_c, dim=1), torch.log_softmax(z_t, dim=1)
    l_c, l_t = pick(log_p_c, target), pick(log_p_t, target)  # (B, H, W)
    r = torch.sigmoid((l_t - l_c) / kappa).detach()
    weight_ct, weight_tc = transfer_weights(r, direction)
    if temperature != 1:
        log_p_c = torch.log_softmax(z_c / temperature, dim=1)
        log_p_t = torch.log_softmax(z_t / temperature, dim=1)
    cnn_teaches = kl_divergence(teacher=log_p_c.detach(), student=log_p_t)
    transformer_teaches = kl_divergence(teacher=log_p_t.detach(), student=log_p_c)
    return CollaborativeLoss(
        cnn_ce=mean(l_c),
        transformer_ce=mean(l_t),
        cnn_to_transformer=temperature**2 * mean(weight_ct * cnn_teaches),
        transformer_to_cnn=temperature**2 * mean(weight_tc * transformer_teaches),
        gate=mean(r),
    )


def transfer_weights(r: Tensor, direction: str) -> tuple[Tensor, Tensor]:
    """Per-pixel weights of (CNN teaches Transformer, Transformer teaches CNN). The one place."""
    on, off = torch.ones_like(r), torch.zeros_like(r)
    return {
        "none": (off, off),
        "cnn_to_transformer": (on, off),
        "transformer_to_cnn": (off, on),
        "mutual": (on, on),
        "selective": (r, 1 - r),
    }[direction]


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
