"""Scaled dot-product attention, non-causal, with fewer keys than queries.

Spatial reduction leaves M keys for N queries (M = N / 64 at stage 1; 256 for a crop of 512 pixels,
at every stage), so the score matrix is tall and thin. The specification is `attention_reference`:
three lines. On a CPU PyTorch's own attention runs; on a GPU two Triton kernels, because the usual
ones are made for square score matrices: their backward pass gives each program a block of *keys*,
and with 256 keys there are two programs to a head. Ours gives each program some of the *queries*.

Work, for each head of each image: 4 N M D operations forward and 10 N M D backward, and N M
exponentials each time. Traffic: q, k, v, o once forward; the same and their gradients backward, and
a float32 partial sum of the keys' and values' gradients for each slice of the queries.

Letters: B batch, h heads, N query tokens, M key tokens, D head dimension.
"""

from __future__ import annotations  # tl.constexpr must not be looked up where Triton is missing

import math
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from kernels.choose import jit, on_device_of, shared_memory, tl, triton, use_triton


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
    if use_triton(q, same and q.shape[3] in HEAD_DIMENSIONS and k.shape[2] > 0 and q.numel() > 0):
        return fused_attention(q, k, v, scale)
    return F.scaled_dot_product_attention(q, k, v, scale=scale)


# --- The kernels ---------------------------------------------------------------------------------

HEAD_DIMENSIONS = (16, 32, 64, 128)
LOG2_E = math.log2(math.e)


class Blocks(NamedTuple):
    queries: int  # rows of a tile
    keys: int  # held at a time
    warps: int
    stages: int  # tiles in flight: the next one is read while this one is computed


# Data-centre chips from Hopper on have this much shared memory for a program, and matrix units that
# read both operands from there. Elsewhere operands take registers, and larger blocks would spill.
LARGE_SHARED_MEMORY = 200 * 1024  # bytes


def forward_blocks(M: int, D: int, dtype: torch.dtype, shared_memory: int) -> Blocks:
    """256 keys are all there are for a crop of 512 pixels; no head of ours has D = 128.

    The sizes are the largest that compile without spilling registers: kernels/README.md.
    """
    if dtype == torch.float32:  # exact, which excludes the matrix units
        return Blocks(32, 32, 4, 1) if D <= 32 else Blocks(16, 32, 8, 1)
    if D == 64 and shared_memory < LARGE_SHARED_MEMORY:
        return Blocks(64, 64, 4, 2)
    if M <= 256 and D <= 64:
        return Blocks(64, max(16, triton.next_power_of_2(M)), 4, 2)
    return Blocks(64, 128 if D <= 64 else 64, 4, 1)


def backward_blocks(M: int, D: int, dtype: torch.dtype, shared_memory: int) -> Blocks:
    """The fewest chunks of keys: each one reads all queries again."""
    if dtype == torch.float32:
        return Blocks(32, 64, 8, 2) if D <= 32 else Blocks(16, 32, 8, 2)
    large = D <= 32 or (D == 64 and shared_memory >= LARGE_SHARED_MEMORY)
    most = 256 if large else 128 if D == 64 else 64
    return Blocks(32, min(most, max(16, triton.next_power_of_2(M))), 8, 2)


def statistics_blocks(M: int, D: int, dtype: torch.dtype, shared_memory: int) -> Blocks:
    """The tiles of the backward kernel, so that both kernels round a score alike. Two stages of
    bfloat16 would spill on a B200."""
    blocks = backward_blocks(M, D, dtype, shared_memory)
    return blocks if dtype == torch.float32 else blocks._replace(stages=1)


@jit
def load_rows(matrix_ptr, index, row_stride, limit, D: tl.constexpr):
    """Rows `index` of a matrix (limit, D), zero beyond its end."""
    at = index[:, None] * row_stride + tl.arange(0, D)[None, :]
    return tl.load(matrix_ptr + at, mask=index[:, None] < limit, other=0.0)


@jit
def forward_kernel(
    q_ptr,
    k_ptr,
    v_ptr,
    o_ptr,  # (B, N, h, D)
    q_image_stride,  # strides in elements; the last dimension is contiguous
    q_head_stride,
    q_row_stride,
    k_image_stride,
    k_head_stride,
    k_row_stride,
    v_image_stride,
    v_head_stride,
    v_row_stride,
    N,
    M,
    scale_2,  # scale times log2(e): exp2 is what the hardware has
    D: tl.constexpr,
    QUERIES: tl.constexpr,
    KEYS: tl.constexpr,
    TILES: tl.constexpr,
    CHUNKS: tl.constexpr,
    RAGGED: tl.constexpr,
):
    """TILES tiles of QUERIES queries against all keys, KEYS at a time. If one chunk holds all keys
    they are read once. The softmax is online: a new maximum rescales the sums so far."""
    block, head, image = tl.program_id(0), tl.program_id(1), tl.program_id(2).to(tl.int64)
    h = tl.num_programs(1)
    q_ptr += image * q_image_stride + head * q_head_stride
    k_ptr += image * k_image_stride + head * k_head_stride
    v_ptr += image * v_image_stride + head * v_head_stride
    o_ptr += (image * N * h + head) * D
    if CHUNKS == 1:
        m = tl.arange(0, KEYS)
        keys = load_rows(k_ptr, m, k_row_stride, M, D)
        values = load_rows(v_ptr, m, v_row_stride, M, D)
    for t in range(TILES):
        n = (block * TILES + t) * QUERIES + tl.arange(0, QUERIES)
        queries = load_rows(q_ptr, n, q_row_stride, N, D)
        top = tl.full((QUERIES,), float("-inf"), tl.float32)
        total = tl.zeros((QUERIES,), tl.float32)
        out = tl.zeros((QUERIES, D), tl.float32)
        for c in range(CHUNKS):
            if CHUNKS > 1:
                m = c * KEYS + tl.arange(0, KEYS)
                keys = load_rows(k_ptr, m, k_row_stride, M, D)
                values = load_rows(v_ptr, m, v_row_stride, M, D)
            s = tl.dot(queries, tl.trans(keys), input_precision="ieee") * scale_2
            if RAGGED:
                s = tl.where(m[None, :] < M, s, float("-inf"))
            new_top = tl.maximum(top, tl.max(s, 1))
            e = tl.exp2(s - new_top[:, None])  # (QUERIES, KEYS)
            shrink = tl.exp2(top - new_top)
            total = total * shrink + tl.sum(e, 1)
            out = out * shrink[:, None]
            out = tl.dot(e.to(values.dtype), values, out, input_precision="ieee")
            top = new_top
        at = n[:, None] * h * D + tl.arange(0, D)[None, :]
        tl.store(o_ptr + at, out / total[:, None], mask=n[:, None] < N)


@jit
def transposed_scores(keys, queries, m, M, scale_2, RAGGED: tl.constexpr):
    """log2(e) scale k q^T, (KEYS, QUERIES); minus infinity beyond the last key."""
    s = tl.dot(keys, tl.trans(queries), input_precision="ieee") * scale_2
    return tl.where(m[:, None] < M, s, float("-inf")) if RAGGED else s


@jit
def statistics_kernel(
    q_ptr,
    k_ptr,
    v_ptr,
    do_ptr,
    statistics_ptr,  # (3, B, h, N) float32
    q_image_stride,
    q_head_stride,
    q_row_stride,
    k_image_stride,
    k_head_stride,
    k_row_stride,
    v_image_stride,
    v_head_stride,
    v_row_stride,
    do_image_stride,
    do_head_stride,
    do_row_stride,
    N,
    M,
    scale_2,
    D: tl.constexpr,
    QUERIES: tl.constexpr,
    KEYS: tl.constexpr,
    TILES: tl.constexpr,
    CHUNKS: tl.constexpr,
    RAGGED: tl.constexpr,
):
    """For each query over all keys: the largest score, the sum of exp2(s - largest), sum_m p dp.
    The gradients of one chunk of keys need these of all chunks.

    The largest score and the sum are not joined into one log-sum-exp: added to a score of
    thousands, the logarithm would be rounded to a thousandth, and the weights would not sum to 1.
    """
    part, head, image = tl.program_id(0), tl.program_id(1), tl.program_id(2).to(tl.int64)
    h, B = tl.num_programs(1), tl.num_programs(2).to(tl.int64)
    q_ptr += image * q_image_stride + head * q_head_stride
    k_ptr += image * k_image_stride + head * k_head_stride
    v_ptr += image * v_image_stride + head * v_head_stride
    do_ptr += image * do_image_stride + head * do_head_stride
    statistics_ptr += (image * h + head) * N
    for t in range(TILES):
        n = (part * TILES + t) * QUERIES + tl.arange(0, QUERIES)
        queries = load_rows(q_ptr, n, q_row_stride, N, D)
        upstream = load_rows(do_ptr, n, do_row_stride, N, D)
        top = tl.full((QUERIES,), float("-inf"), tl.float32)
        total = tl.zeros((QUERIES,), tl.float32)
        weighted = tl.zeros((QUERIES,), tl.float32)
        for c in range(CHUNKS):
            m = c * KEYS + tl.arange(0, KEYS)
            keys = load_rows(k_ptr, m, k_row_stride, M, D)
            values = load_rows(v_ptr, m, v_row_stride, M, D)
            s = transposed_scores(keys, queries, m, M, scale_2, RAGGED)
            dp = tl.dot(values, tl.trans(upstream), input_precision="ieee")
            new_top = tl.maximum(top, tl.max(s, 0))
            e = tl.exp2(s - new_top[None, :])  # (KEYS, QUERIES)
            shrink = tl.exp2(top - new_top)
            total = total * shrink + tl.sum(e, 0)
            weighted = weighted * shrink + tl.sum(e * dp, 0)
            top = new_top
        tl.store(statistics_ptr + n, top, mask=n < N)
        tl.store(statistics_ptr + B * h * N + n, total, mask=n < N)
        tl.store(statistics_ptr + 2 * B * h * N + n, weighted / total, mask=n < N)


@jit
def backward_kernel(
    q_ptr,
    k_ptr,
    v_ptr,
    do_ptr,
    statistics_ptr,  # (3, B, h, N) float32, read where there are several chunks of keys
    dq_ptr,  # (B, N, h, D)
    dk_ptr,  # (slices, B, h, M, D) float32
    dv_ptr,
    q_image_stride,
    q_head_stride,
    q_row_stride,
    k_image_stride,
    k_head_stride,
    k_row_stride,
    v_image_stride,
    v_head_stride,
    v_row_stride,
    do_image_stride,
    do_head_stride,
    do_row_stride,
    N,
    M,
    scale,
    scale_2,  # scale times log2(e)
    first_key,
    D: tl.constexpr,
    QUERIES: tl.constexpr,
    KEYS: tl.constexpr,
    TILES: tl.constexpr,
    CHUNKS: tl.constexpr,
    RAGGED: tl.constexpr,
):
    """A slice of TILES x QUERIES queries against the KEYS keys from `first_key` on.

        p = softmax(s)   dv = p^T do   dp = do v^T   ds = p (dp - sum_m p dp)
        dq = scale ds k   dk = scale ds^T q

    Scores are held transposed, (KEYS, QUERIES), so that dv and dk need no transpose. The forward
    pass adds up the same products in another order, so a score of thousands may differ by a
    thousandth. Therefore the backward pass uses no result of the forward pass. The maximum, the
    denominator and sum_m p dp come from its own scores, so that for each query p sums to 1 and ds
    to 0, up to the rounding of p itself.

    dq is complete if this chunk holds all keys; otherwise each chunk adds to it. dk and dv are sums
    over this slice of the queries only.
    """
    part, head, image = tl.program_id(0), tl.program_id(1), tl.program_id(2).to(tl.int64)
    h, B = tl.num_programs(1), tl.num_programs(2).to(tl.int64)
    q_ptr += image * q_image_stride + head * q_head_stride
    k_ptr += image * k_image_stride + head * k_head_stride
    v_ptr += image * v_image_stride + head * v_head_stride
    do_ptr += image * do_image_stride + head * do_head_stride
    dq_ptr += (image * N * h + head) * D
    dk_ptr += ((part * B + image) * h + head) * M * D
    dv_ptr += ((part * B + image) * h + head) * M * D
    m = first_key + tl.arange(0, KEYS)
    keys = load_rows(k_ptr, m, k_row_stride, M, D)
    values = load_rows(v_ptr, m, v_row_stride, M, D)
    sum_dk = tl.zeros((KEYS, D), tl.float32)
    sum_dv = tl.zeros((KEYS, D), tl.float32)
    for t in range(TILES):
        n = (part * TILES + t) * QUERIES + tl.arange(0, QUERIES)
        queries = load_rows(q_ptr, n, q_row_stride, N, D)
        upstream = load_rows(do_ptr, n, do_row_stride, N, D)
        s = transposed_scores(keys, queries, m, M, scale_2, RAGGED)
        if CHUNKS == 1:
            p = tl.exp2(s - tl.max(s, 0)[None, :])  # (KEYS, QUERIES)
            p *= (1 / tl.sum(p, 0))[None, :]
        else:
            at = statistics_ptr + (image * h + head) * N + n
            top = tl.load(at, mask=n < N, other=0.0)
            total = tl.load(at + B * h * N, mask=n < N, other=1.0)
            p = tl.exp2(s - top[None, :]) * (1 / total)[None, :]
        sum_dv = tl.dot(p.to(upstream.dtype), upstream, sum_dv, input_precision="ieee")
        dp = tl.dot(values, tl.trans(upstream), input_precision="ieee")
        if CHUNKS == 1:
            delta = tl.sum(p * dp, 0)
        else:
            delta = tl.load(at + 2 * B * h * N, mask=n < N, other=0.0)
        ds = (p * (dp - delta[None, :])).to(queries.dtype)
        sum_dk = tl.dot(ds, queries, sum_dk, input_precision="ieee")
        tile = tl.dot(tl.trans(ds), keys, input_precision="ieee") * scale  # of dq
        at = n[:, None] * h * D + tl.arange(0, D)[None, :]
        if CHUNKS > 1:
            tile += tl.load(dq_ptr + at, mask=n[:, None] < N, other=0.0)
        tl.store(dq_ptr + at, tile, mask=n[:, None] < N)
    at = m[:, None] * D + tl.arange(0, D)[None, :]
    tl.store(dk_ptr + at, sum_dk * scale, mask=m[:, None] < M)
    tl.store(dv_ptr + at, sum_dv, mask=m[:, None] < M)


# --- What PyTorch sees ---------------------------------------------------------------------------


@torch.library.custom_op("ctclm::attention", mutates_args=())
def fused_attention(q: Tensor, k: Tensor, v: Tensor, scale: float) -> Tensor:
    q, k, v = (rows_contiguous(x) for x in (q, k, v))
    B, h, N, D = q.shape
    M = k.shape[2]
    queries, keys, warps, stages = forward_blocks(M, D, q.dtype, shared_memory(q))
    tiles = tiles_per_program(B * h * triton.cdiv(N, queries), FORWARD_PROGRAMS, largest=8)
    o = heads_last(q)
    strides = (*q.stride()[:3], *k.stride()[:3], *v.stride()[:3])
    sizes = (D, queries, keys, tiles, triton.cdiv(M, keys), M % keys != 0)
    with on_device_of(q):
        forward_kernel[triton.cdiv(N, queries * tiles), h, B](
            q, k, v, o, *strides, N, M, scale * LOG2_E, *sizes, num_warps=warps, num_stages=stages
        )
    return o


@torch.library.custom_op("ctclm::attention_backward", mutates_args=())
def fused_attention_backward(
    do: Tensor, q: Tensor, k: Tensor, v: Tensor, scale: float
) -> tuple[Tensor, Tensor, Tensor]:
    do, q, k, v = (rows_contiguous(x) for x in (do, q, k, v))
    B, h, N, D = q.shape
    M = k.shape[2]
    queries, keys, warps, stages = backward_blocks(M, D, q.dtype, shared_memory(q))
    tiles = tiles_per_program(B * h * triton.cdiv(N, queries), BACKWARD_PROGRAMS, largest=1024)
    slices, chunks = triton.cdiv(N, queries * tiles), triton.cdiv(M, keys)
    dq, statistics = heads_last(q), None
    dkv = q.new_empty(2, slices, B, h, M, D, dtype=torch.float32)
    strides = (*q.stride()[:3], *k.stride()[:3], *v.stride()[:3], *do.stride()[:3])
    sizes = (D, queries, keys, tiles, chunks, M % keys != 0)
    with on_device_of(q):
        if chunks > 1:
            dq = torch.zeros_like(dq, dtype=torch.float32)  # each chunk adds to it
            statistics = q.new_empty(3, B, h, N, dtype=torch.float32)
            blocks = statistics_blocks(M, D, q.dtype, shared_memory(q))
            statistics_kernel[slices, h, B](
                q, k, v, do, statistics, *strides, N, M, scale * LOG2_E, *sizes,
                num_warps=blocks.warps, num_stages=blocks.stages,
            )  # fmt: skip
        for c in range(chunks):
            backward_kernel[slices, h, B](
                q, k, v, do, statistics, dq, dkv[0], dkv[1], *strides, N, M, scale, scale * LOG2_E,
                c * keys, *sizes, num_warps=warps, num_stages=stages,
            )  # fmt: skip
    dk, dv = dkv.sum(1).to(q.dtype)  # in the order of the slices: the same in every run
    return dq.to(q.dtype), dk.clone(), dv.clone()


def heads_last(q: Tensor) -> Tensor:
    """Room for (B, h, N, D), in memory (B, N, h, D), which the model wants next."""
    B, h, N, D = q.shape
    return q.new_empty(B, N, h, D).transpose(1, 2)


def rows_contiguous(x: Tensor) -> Tensor:
    return x if x.stride(3) == 1 else x.contiguous()


# Programs that keep a large GPU busy: several to each of its processors forward, one or two
# backward, where each leaves a partial sum behind.
FORWARD_PROGRAMS, BACKWARD_PROGRAMS = 1024, 256


def tiles_per_program(tiles: int, programs: int, largest: int) -> int:
    """A power of two, so that few different kernels are compiled; from the shapes alone."""
    return min(largest, 1 << max(0, (tiles // programs).bit_length() - 1))


@fused_attention.register_fake
def _(q, k, v, scale):
    return heads_last(q)


@fused_attention_backward.register_fake
def _(do, q, k, v, scale):
    return heads_last(q), k.new_empty(k.shape), k.new_empty(k.shape)


def keep_for_backward(ctx, inputs, output):
    ctx.scale = inputs[3]
    ctx.save_for_backward(*inputs[:3])


def backward(ctx, do):
    return *fused_attention_backward(do, *ctx.saved_tensors, ctx.scale), None


def refuse(ctx, *_):
    raise RuntimeError(
        "attention has no second derivative on a GPU; attention_reference in kernels/attention.py "
        "has one"
    )


fused_attention.register_autograd(backward, setup_context=keep_for_backward)
fused_attention_backward.register_autograd(refuse)
