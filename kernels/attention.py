"""Scaled dot-product attention, non-causal, with fewer keys than queries.

Spatial reduction leaves M keys for N queries (M = N / 64 at stage 1; 256 for a crop of 512 pixels,
at every stage), so the score matrix is tall and thin. The specification is `attention_reference`:
three lines. On a CPU PyTorch's own attention runs; on a GPU the kernels of attention_triton.py,
because the usual ones are made for square score matrices: their backward pass gives each program a
block of *keys* and all queries, and with 256 keys there are two programs to a head.

Work, for each head of each image: 4 N M D operations and N M exponentials forward, 16 N M D and
2 N M backward. Traffic: q, k, v, o once forward; backward q, k, v and the upstream gradient twice,
the three gradients once, and where the queries have several slices a float32 partial sum of the
keys' and values' gradients for each.

Letters: B batch, h heads, N query tokens, M key tokens, D head dimension.
"""

import torch
import torch.nn.functional as F
from torch import Tensor

from kernels.attention_triton import HEAD_DIMENSIONS, heads_last, triton_backward, triton_forward
from kernels.choose import refuse_second_derivative, use_triton


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
    scale = q.shape[-1] ** -0.5 if scale is None else float(scale)
    if torch.is_autocast_enabled(q.device.type):  # as PyTorch's own attention does
        q, k, v = (x.to(torch.get_autocast_dtype(q.device.type)) for x in (q, k, v))
    same = q.dtype == k.dtype == v.dtype != torch.float64
    fits = same and q.shape[3] in HEAD_DIMENSIONS and k.shape[2] > 0 and q.numel() > 0
    if use_triton(q, fits, faster=not pytorch_is_faster(q, k, v)):
        return fused_attention(q, k, v, scale)
    return F.scaled_dot_product_attention(q, k, v, scale=scale)


def pytorch_is_faster(q: Tensor, k: Tensor, v: Tensor) -> bool:
    """In float32: our products are exact, which keeps them off a GPU's matrix units; PyTorch's
    memory-efficient backend adds up three products in tf32 instead. Its backward pass may add
    gradients atomically, so where a gradient is wanted ours runs, and two runs are the same."""
    gradient = torch.is_grad_enabled() and any(x.requires_grad for x in (q, k, v))
    return q.is_cuda and q.dtype == torch.float32 and not gradient


# --- What PyTorch sees ---------------------------------------------------------------------------


@torch.library.custom_op("ctclm::attention", mutates_args=())
def fused_attention(q: Tensor, k: Tensor, v: Tensor, scale: float) -> Tensor:
    return triton_forward(q, k, v, scale)


@torch.library.custom_op("ctclm::attention_backward", mutates_args=())
def fused_attention_backward(
    do: Tensor, q: Tensor, k: Tensor, v: Tensor, scale: float
) -> tuple[Tensor, Tensor, Tensor]:
    return triton_backward(do, q, k, v, scale)


@fused_attention.register_fake
def _(q, k, v, scale):
    return heads_last(q)


@fused_attention_backward.register_fake
def _(do, q, k, v, scale):
    return heads_last(q), heads_last(k), heads_last(v)


def keep_for_backward(ctx, inputs, output):
    ctx.scale = inputs[3]
    ctx.save_for_backward(*inputs[:3])


def backward(ctx, do):
    return *fused_attention_backward(do, *ctx.saved_tensors, ctx.scale), None


fused_attention.register_autograd(backward, setup_context=keep_for_backward)
refuse_second_derivative(fused_attention_backward, "attention", "attention.py")
