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
        return Blocks(32, 64, 8, 1) if D <= 32 else Blocks(16, 32, 8, 1)
    large = D <= 32 or (D == 64 and shared_memory >= LARGE_SHARED_MEMORY)
    most = 256 if large else 128 if D == 64 else 64
    return Blocks(32, min(most, max(16, triton.next_power_of_2(M))), 8, 2)


@jit
def rows_of(x, index, stride, limit, D: tl.constexpr):
    """Rows `index` of a matrix (limit, D), zero beyond its end."""
    at = index[:, None] * stride + tl.arange(0, D)[None, :]
    return tl.load(x + at, mask=index[:, None] < limit, other=0.0)


@jit
def forward_kernel(
    q,
    k,
    v,
    o,  # (B, N, h, D)
    q_image,  # strides in elements; the last dimension is contiguous
    q_head,
    q_row,
    k_image,
    k_head,
    k_row,
    v_image,
    v_head,
    v_row,
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
    """TILES tiles of QUERIES queries against all keys, KEYS at a time; where one chunk holds them
    all they are read once. The softmax is online: a new maximum rescales what was summed."""
    block, head, image = tl.program_id(0), tl.program_id(1), tl.program_id(2).to(tl.int64)
    h = tl.num_programs(1)
    q += image * q_image + head * q_head
    k += image * k_image + head * k_head
    v += image * v_image + head * v_head
    o += (image * N * h + head) * D
    if CHUNKS == 1:
        m = tl.arange(0, KEYS)
        keys, values = rows_of(k, m, k_row, M, D), rows_of(v, m, v_row, M, D)
    for t in range(TILES):
        n = (block * TILES + t) * QUERIES + tl.arange(0, QUERIES)
        queries = rows_of(q, n, q_row, N, D)
        top = tl.full((QUERIES,), float("-inf"), tl.float32)
        total = tl.zeros((QUERIES,), tl.float32)
        out = tl.zeros((QUERIES, D), tl.float32)
        for c in range(CHUNKS):
            if CHUNKS > 1:
                m = c * KEYS + tl.arange(0, KEYS)
                keys, values = rows_of(k, m, k_row, M, D), rows_of(v, m, v_row, M, D)
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
        tl.store(o + at, out / total[:, None], mask=n[:, None] < N)


@jit
def transposed_scores(keys, queries, m, M, scale_2, RAGGED: tl.constexpr):
    """log2(e) scale k q^T, (KEYS, QUERIES); minus infinity beyond the last key."""
    s = tl.dot(keys, tl.trans(queries), input_precision="ieee") * scale_2
    return tl.where(m[:, None] < M, s, float("-inf")) if RAGGED else s


@jit
def statistics_kernel(
    q,
    k,
    v,
    do,
    statistics,  # (3, B, h, N) float32
    q_image,
    q_head,
    q_row,
    k_image,
    k_head,
    k_row,
    v_image,
    v_head,
    v_row,
    do_image,
    do_head,
    do_row,
    N,
    M,
    scale_2,
    D: tl.constexpr,
    QUERIES: tl.constexpr,
    KEYS: tl.constexpr,
    TILES: tl.constexpr,
    RAGGED: tl.constexpr,
    CHUNKS: tl.constexpr,
):
    """What the gradients of one chunk of keys have to know of all chunks: for each query the
    largest score, the softmax's denominator relative to it, and sum_m p dp.

    The three stay apart: the logarithm of the denominator, added to a score of thousands, would be
    rounded to a thousandth, and the weights would no longer sum to 1.
    """
    part, head, image = tl.program_id(0), tl.program_id(1), tl.program_id(2).to(tl.int64)
    h, B = tl.num_programs(1), tl.num_programs(2).to(tl.int64)
    q += image * q_image + head * q_head
    k += image * k_image + head * k_head
    v += image * v_image + head * v_head
    do += image * do_image + head * do_head
    statistics += (image * h + head) * N
    for t in range(TILES):
        n = (part * TILES + t) * QUERIES + tl.arange(0, QUERIES)
        queries, upstream = rows_of(q, n, q_row, N, D), rows_of(do, n, do_row, N, D)
        top = tl.full((QUERIES,), float("-inf"), tl.float32)
        total = tl.zeros((QUERIES,), tl.float32)
        weighted = tl.zeros((QUERIES,), tl.float32)
        for c in range(CHUNKS):
            m = c * KEYS + tl.arange(0, KEYS)
            keys, values = rows_of(k, m, k_row, M, D), rows_of(v, m, v_row, M, D)
            s = transposed_scores(keys, queries, m, M, scale_2, RAGGED)
            dp = tl.dot(values, tl.trans(upstream), input_precision="ieee")
            new_top = tl.maximum(top, tl.max(s, 0))
            e = tl.exp2(s - new_top[None, :])  # (KEYS, QUERIES)
            shrink = tl.exp2(top - new_top)
            total = total * shrink + tl.sum(e, 0)
            weighted = weighted * shrink + tl.sum(e * dp, 0)
            top = new_top
        tl.store(statistics + n, top, mask=n < N)
        tl.store(statistics + B * h * N + n, total, mask=n < N)
        tl.store(statistics + 2 * B * h * N + n, weighted / total, mask=n < N)


@jit
def backward_kernel(
    q,
    k,
    v,
    do,
    statistics,  # (3, B, h, N) float32, read where there are several chunks of keys
    dq,  # (B, N, h, D)
    dk,  # (slices, B, h, M, D) float32
    dv,
    q_image,
    q_head,
    q_row,
    k_image,
    k_head,
    k_row,
    v_image,
    v_head,
    v_row,
    do_image,
    do_head,
    do_row,
    N,
    M,
    scale,
    scale_2,  # scale times log2(e)
    first_key,
    D: tl.constexpr,
    QUERIES: tl.constexpr,
    KEYS: tl.constexpr,
    TILES: tl.constexpr,
    RAGGED: tl.constexpr,
    CHUNKS: tl.constexpr,
):
    """A slice of TILES x QUERIES queries against the KEYS keys from `first_key` on.

        p = softmax(s)   dv = p^T do   dp = do v^T   ds = p (dp - sum_m p dp)
        dq = scale ds k   dk = scale ds^T q

    Scores are held transposed, (KEYS, QUERIES), so that dv and dk need no transpose. They are
    products of the same numbers as in the forward pass, added up in another order, so a score of
    thousands may differ by a thousandth. So nothing of the forward pass is used: the maximum, the
    denominator and sum_m p dp come from the scores of this pass, and by construction p sums to 1
    and ds to 0, to the rounding of p itself.

    dq is finished here, or added to that of the chunk of keys before; dk and dv are sums over this
    slice only.
    """
    part, head, image = tl.program_id(0), tl.program_id(1), tl.program_id(2).to(tl.int64)
    h, B = tl.num_programs(1), tl.num_programs(2).to(tl.int64)
    q += image * q_image + head * q_head
    k += image * k_image + head * k_head
    v += image * v_image + head * v_head
    do += image * do_image + head * do_head
    dq += (image * N * h + head) * D
    dk += ((part * B + image) * h + head) * M * D
    dv += ((part * B + image) * h + head) * M * D
    m = first_key + tl.arange(0, KEYS)
    keys, values = rows_of(k, m, k_row, M, D), rows_of(v, m, v_row, M, D)
    sum_dk = tl.zeros((KEYS, D), tl.float32)
    sum_dv = tl.zeros((KEYS, D), tl.float32)
    for t in range(TILES):
        n = (part * TILES + t) * QUERIES + tl.arange(0, QUERIES)
        queries, upstream = rows_of(q, n, q_row, N, D), rows_of(do, n, do_row, N, D)
        s = transposed_scores(keys, queries, m, M, scale_2, RAGGED)
        if CHUNKS == 1:
            p = tl.exp2(s - tl.max(s, 0)[None, :])  # (KEYS, QUERIES)
            p *= (1 / tl.sum(p, 0))[None, :]
        else:
            row = statistics + (image * h + head) * N + n
            top = tl.load(row, mask=n < N, other=0.0)
            total = tl.load(row + B * h * N, mask=n < N, other=1.0)
            p = tl.exp2(s - top[None, :]) * (1 / total)[None, :]
        sum_dv = tl.dot(p.to(upstream.dtype), upstream, sum_dv, input_precision="ieee")
        dp = tl.dot(values, tl.trans(upstream), input_precision="ieee")
        if CHUNKS == 1:
            delta = tl.sum(p * dp, 0)
        else:
            delta = tl.load(row + 2 * B * h * N, mask=n < N, other=0.0)
        ds = (p * (dp - delta[None, :])).to(queries.dtype)
        sum_dk = tl.dot(ds, queries, sum_dk, input_precision="ieee")
        tile = tl.dot(tl.trans(ds), keys, input_precision="ieee") * scale  # of dq
        at = n[:, None] * h * D + tl.arange(0, D)[None, :]
        if CHUNKS > 1:
            tile += tl.load(dq + at, mask=n[:, None] < N, other=0.0)
        tl.store(dq + at, tile, mask=n[:, None] < N)
    at = m[:, None] * D + tl.arange(0, D)[None, :]
    tl.store(dk + at, sum_dk * scale, mask=m[:, None] < M)
    tl.store(dv + at, sum_dv, mask=m[:, None] < M)


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
    dq = heads_last(q)
    dkv = q.new_empty(2, slices, B, h, M, D, dtype=torch.float32)
    strides = (*q.stride()[:3], *k.stride()[:3], *v.stride()[:3], *do.stride()[:3])
    sizes = (D, queries, keys, tiles, M % keys != 0, chunks)
    options = {"num_warps": warps, "num_stages": stages}
    grid = (slices, h, B)
    with on_device_of(q):
        statistics = None
        if chunks > 1:
            dq = torch.zeros_like(dq, dtype=torch.float32)  # each chunk adds to it
            statistics = q.new_empty(3, B, h, N, dtype=torch.float32)
            statistics_kernel[grid](
                q, k, v, do, statistics, *strides, N, M, scale * LOG2_E, *sizes, **options
            )
        for c in range(chunks):
            backward_kernel[grid](
                q, k, v, do, statistics, dq, dkv[0], dkv[1], *strides, N, M, scale, scale * LOG2_E,
                c * keys, *sizes, **options,
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
