"""Scaled dot-product attention, non-causal, with fewer keys than queries.

Spatial reduction leaves M keys for N queries (M = N / 64 at stage 1), so the score matrix is tall
and thin. The specification is `attention_reference`: three lines.

Letters: B batch, h heads, N query tokens, M key tokens, D head dimension.
"""

import torch
import torch.nn.functional as F
from torch import Tensor


def attention_reference(q: Tensor, k: Tensor, v: Tensor, scale: float | None = None) -> Tensor:
    """softmax(scale q k^T) v, written out. q (B, h, N, D); k, v (B, h, M, D) -> (B, h, N, D)."""
    scale = q.shape[-1] ** -0.5 if scale is None else scale
    weights = torch.softmax(scale * q @ k.transpose(-2, -1), dim=-1)  # (B, h, N, M)
    return weights @ v


def attention(q: Tensor, k: Tensor, v: Tensor, scale: float | None = None) -> Tensor:
    """softmax(scale q k^T) v (Vaswani et al., 2017), every query to every key.

    q (B, h, N, D); k, v (B, h, M, D); any strides, floating point, same dtype -> (B, h, N, D).
    `scale` defaults to D ** -0.5. Raises ValueError when the shapes do not fit.
    """
    if q.dim() != 4 or k.shape != v.shape or q.shape[:2] + q.shape[3:] != k.shape[:2] + k.shape[3:]:
        raise ValueError(
            "attention takes q (B, h, N, D) and k, v (B, h, M, D); "
            f"got {tuple(q.shape)}, {tuple(k.shape)}, {tuple(v.shape)}"
        )
    return F.scaled_dot_product_attention(q, k, v, scale=scale)
