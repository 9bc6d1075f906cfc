"""Attention on a GPU: one Triton kernel forward, two backward.

attention.py has the specification. All three hold tiles of scores with a row a query, so that a
query's maximum and sums stay within a warp.

The gradients of queries and of keys are made by a kernel each. That takes eight products, where
one kernel would need five. But that one would hold all keys and walk over the queries, with its
sums over the keys spread over eight warps: 13 barriers a tile, and no other program beside it in
the processor. Of these small ones two to four fit in, and one computes while another waits.

`query_gradient_kernel` gives a program some of the queries and all keys; it also normalises: for
each query it writes the largest score, the sum of the exponentials and sum_m p dp.
`key_gradient_kernel` gives a program a block of keys and all queries, or a slice of them where
there are few keys and many queries. The slices' sums are then added by `sum_kernel`, always in the
same order. No kernel has an atomic operation.

Letters: B batch, h heads, N query tokens, M key tokens, D head dimension.
"""

from __future__ import annotations  # tl.constexpr must not be looked up where Triton is missing

import math
from typing import NamedTuple

import torch
from torch import Tensor

from kernels.choose import jit, on_device_of, shared_memory, tl, triton

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
        return Blocks(64, max(16, triton.next_power_of_2(M)), 4, 3)
    return Blocks(64, 128 if D <= 64 else 64, 4, 1)


def query_gradient_blocks(M: int, D: int, dtype: torch.dtype, shared_memory: int) -> Blocks:
    if dtype == torch.float32:
        return Blocks(32, 32, 4, 1) if D <= 32 else Blocks(16, 32 if D <= 64 else 16, 8, 1)
    if M <= 256 and (D <= 32 or (D == 64 and shared_memory >= LARGE_SHARED_MEMORY)):
        return Blocks(64, min(128, max(16, triton.next_power_of_2(M))), 4, 2)
    return Blocks(64, 64, 4, 2 if D <= 32 else 1)


def key_gradient_blocks(M: int, D: int, dtype: torch.dtype, shared_memory: int) -> Blocks:
    """As many keys as a matrix unit of a Hopper chip has rows: what a program owns is short, and
    three or four fit into a processor."""
    if dtype == torch.float32:
        return Blocks(32, 32, 4, 2) if D <= 32 else Blocks(16, 32, 8, 1)
    return Blocks(64, 64, 8 if D == 128 else 4, 2 if D == 128 else 3)


@jit
def load_rows(matrix_ptr, index, row_stride, limit, D: tl.constexpr):
    """Rows `index` of a matrix (limit, D), zero beyond its end."""
    at = index[:, None] * row_stride + tl.arange(0, D)[None, :]
    return tl.load(matrix_ptr + at, mask=index[:, None] < limit, other=0.0)


@jit
def scores(queries, keys, m, M, RAGGED: tl.constexpr):
    """q k^T, (QUERIES, KEYS); minus infinity beyond the last key."""
    s = tl.dot(queries, tl.trans(keys), input_precision="ieee")
    return tl.where(m[None, :] < M, s, float("-inf")) if RAGGED else s


@jit
def online_softmax(s, scale_2, values, top, total, out):
    """One more chunk of scores s: e = exp2(scale_2 s - top), with the new maximum; the sums so far
    are rescaled to it, and e and e v added. scale_2 > 0, so that the largest s has the largest
    product: scaling and subtracting are then one instruction."""
    new_top = tl.maximum(top, tl.max(s, 1) * scale_2)
    e = tl.exp2(s * scale_2 - new_top[:, None])  # (QUERIES, KEYS)
    shrink = tl.exp2(top - new_top)
    total = total * shrink + tl.sum(e, 1)
    out = out * shrink[:, None]
    out = tl.dot(e.to(values.dtype), values, out, input_precision="ieee")
    return e, new_top, total, out


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
    scale_2,  # scale times log2(e), positive: exp2 is what the hardware has
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
    for t in tl.range(TILES, disable_licm=True):
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
            s = scores(queries, keys, m, M, RAGGED)
            _, top, total, out = online_softmax(s, scale_2, values, top, total, out)
        at = n[:, None] * h * D + tl.arange(0, D)[None, :]
        tl.store(o_ptr + at, out / total[:, None], mask=n[:, None] < N)


@jit
def query_gradient_kernel(
    q_ptr,
    k_ptr,
    v_ptr,
    do_ptr,
    statistics_ptr,  # (3, B, h, N) float32: largest score * scale_2, 1 / sum, sum_m p dp
    dq_ptr,  # (B, N, h, D)
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
    scale_2,
    D: tl.constexpr,
    QUERIES: tl.constexpr,
    KEYS: tl.constexpr,
    TILES: tl.constexpr,
    CHUNKS: tl.constexpr,
    RAGGED: tl.constexpr,
    HELD: tl.constexpr,  # whether the weights of all chunks stay in registers
):
    """TILES tiles of QUERIES queries against all keys, KEYS at a time.

        p = softmax(s)   dp = do v^T   ds = p (dp - sum_m p dp)   dq = scale ds k

    The forward pass may have added up the same products in another order, so a score of thousands
    may differ by a thousandth. Therefore the backward pass uses no result of the forward pass. The
    maximum, the denominator and sum_m p dp come from its own scores, so that for each query p sums
    to 1 and ds to 0, up to the rounding of p itself. The largest score and the sum are not joined
    into one log-sum-exp: added to a score of thousands, the logarithm would be rounded to a
    thousandth.

    ds needs the sums over all keys. HELD: the weights of all chunks wait for them in registers, and
    are multiplied in the dtype of the product that they enter. Otherwise all is read twice.
    sum_m p dp is the product of the upstream gradient and the output, which is computed again.
    Whatever does not change from tile to tile is computed again too (`disable_licm`): kept in
    registers, it would make them spill.
    """
    block, head, image = tl.program_id(0), tl.program_id(1), tl.program_id(2).to(tl.int64)
    h, B = tl.num_programs(1), tl.num_programs(2).to(tl.int64)
    q_ptr += image * q_image_stride + head * q_head_stride
    k_ptr += image * k_image_stride + head * k_head_stride
    v_ptr += image * v_image_stride + head * v_head_stride
    do_ptr += image * do_image_stride + head * do_head_stride
    statistics_ptr += (image * h + head) * N
    dq_ptr += (image * N * h + head) * D
    if HELD:
        keys, values = (), ()
        for c in tl.static_range(CHUNKS):
            m = c * KEYS + tl.arange(0, KEYS)
            keys = keys + (load_rows(k_ptr, m, k_row_stride, M, D),)
            values = values + (load_rows(v_ptr, m, v_row_stride, M, D),)
    for t in tl.range(TILES, disable_licm=True):
        n = (block * TILES + t) * QUERIES + tl.arange(0, QUERIES)
        queries = load_rows(q_ptr, n, q_row_stride, N, D)
        top = tl.full((QUERIES,), float("-inf"), tl.float32)
        total = tl.zeros((QUERIES,), tl.float32)
        out = tl.zeros((QUERIES, D), tl.float32)
        dq = tl.zeros((QUERIES, D), tl.float32)
        if HELD:
            es, tops = (), ()
            for c in tl.static_range(CHUNKS):
                m = c * KEYS + tl.arange(0, KEYS)
                s = scores(queries, keys[c], m, M, RAGGED)
                e, top, total, out = online_softmax(s, scale_2, values[c], top, total, out)
                es, tops = es + (e.to(queries.dtype),), tops + (top,)
            upstream = load_rows(do_ptr, n, do_row_stride, N, D)
            delta = tl.sum(out * upstream, 1) / total
            for c in tl.static_range(CHUNKS):
                dp = tl.dot(upstream, tl.trans(values[c]), input_precision="ieee")
                weight = tl.exp2(tops[c] - top) / total
                ds = es[c] * (dp * weight[:, None] - (delta * weight)[:, None]).to(es[c].dtype)
                dq = tl.dot(ds, keys[c], dq, input_precision="ieee")
        else:
            for c in range(CHUNKS):
                m = c * KEYS + tl.arange(0, KEYS)
                k = load_rows(k_ptr, m, k_row_stride, M, D)
                v = load_rows(v_ptr, m, v_row_stride, M, D)
                s = scores(queries, k, m, M, RAGGED)
                _, top, total, out = online_softmax(s, scale_2, v, top, total, out)
            upstream = load_rows(do_ptr, n, do_row_stride, N, D)
            delta = tl.sum(out * upstream, 1) / total
            for c in range(CHUNKS):
                m = c * KEYS + tl.arange(0, KEYS)
                k = load_rows(k_ptr, m, k_row_stride, M, D)
                v = load_rows(v_ptr, m, v_row_stride, M, D)
                s = scores(queries, k, m, M, RAGGED)
                dp = tl.dot(upstream, tl.trans(v), input_precision="ieee")
                p = tl.exp2(s * scale_2 - top[:, None]) * (1 / total)[:, None]
                ds = p * (dp - delta[:, None])
                dq = tl.dot(ds.to(k.dtype), k, dq, input_precision="ieee")
        tl.store(statistics_ptr + n, top, mask=n < N)
        tl.store(statistics_ptr + B * h * N + n, 1 / total, mask=n < N)
        tl.store(statistics_ptr + 2 * B * h * N + n, delta, mask=n < N)
        at = n[:, None] * h * D + tl.arange(0, D)[None, :]
        tl.store(dq_ptr + at, dq * scale, mask=n[:, None] < N)


@jit
def key_gradient_kernel(
    q_ptr,
    k_ptr,
    v_ptr,
    do_ptr,
    statistics_ptr,  # (3, B, h, N) float32, as query_gradient_kernel writes them
    dk_ptr,  # (slices, B, M, h, D)
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
    scale_2,
    D: tl.constexpr,
    QUERIES: tl.constexpr,
    KEYS: tl.constexpr,
    TILES: tl.constexpr,
    CHUNKS: tl.constexpr,
    RAGGED: tl.constexpr,
):
    """KEYS keys against TILES tiles of QUERIES queries, a slice of all.

        p = softmax(s)   dv = p^T do   dp = do v^T   ds = p (dp - sum_m p dp)   dk = scale ds^T q

    Scores have the rows and columns that they have in query_gradient_kernel, so that both round
    alike, and p sums to 1 over the blocks of keys.
    """
    head, image = tl.program_id(1), tl.program_id(2).to(tl.int64)
    h, B = tl.num_programs(1), tl.num_programs(2).to(tl.int64)
    block, part = tl.program_id(0) % CHUNKS, tl.program_id(0) // CHUNKS
    q_ptr += image * q_image_stride + head * q_head_stride
    k_ptr += image * k_image_stride + head * k_head_stride
    v_ptr += image * v_image_stride + head * v_head_stride
    do_ptr += image * do_image_stride + head * do_head_stride
    statistics_ptr += (image * h + head) * N
    dk_ptr += ((part * B + image) * M * h + head) * D
    dv_ptr += ((part * B + image) * M * h + head) * D
    m = block * KEYS + tl.arange(0, KEYS)
    keys = load_rows(k_ptr, m, k_row_stride, M, D)
    values = load_rows(v_ptr, m, v_row_stride, M, D)
    sum_dk = tl.zeros((KEYS, D), tl.float32)
    sum_dv = tl.zeros((KEYS, D), tl.float32)
    for t in tl.range(TILES, disable_licm=True):
        n = (part * TILES + t) * QUERIES + tl.arange(0, QUERIES)
        queries = load_rows(q_ptr, n, q_row_stride, N, D)
        upstream = load_rows(do_ptr, n, do_row_stride, N, D)
        top = tl.load(statistics_ptr + n, mask=n < N, other=0.0)
        inverse = tl.load(statistics_ptr + B * h * N + n, mask=n < N, other=0.0)
        delta = tl.load(statistics_ptr + 2 * B * h * N + n, mask=n < N, other=0.0)
        s = scores(queries, keys, m, M, RAGGED)
        p = tl.exp2(s * scale_2 - top[:, None]) * inverse[:, None]  # (QUERIES, KEYS)
        sum_dv = tl.dot(tl.trans(p.to(upstream.dtype)), upstream, sum_dv, input_precision="ieee")
        dp = tl.dot(upstream, tl.trans(values), input_precision="ieee")
        ds = (p * (dp - delta[:, None])).to(queries.dtype)
        sum_dk = tl.dot(tl.trans(ds), queries, sum_dk, input_precision="ieee")
    at = m[:, None] * h * D + tl.arange(0, D)[None, :]
    tl.store(dk_ptr + at, sum_dk * scale, mask=m[:, None] < M)
    tl.store(dv_ptr + at, sum_dv, mask=m[:, None] < M)


@jit
def sum_kernel(
    parts_ptr,  # (2, slices, size) float32
    dk_ptr,  # size numbers
    dv_ptr,
    slices,
    size,
    SLICES: tl.constexpr,  # a power of two, no less than slices
    BLOCK: tl.constexpr,
):
    """dk and dv from the sums over each slice of the queries, always added in the same order."""
    at = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    part = tl.arange(0, SLICES)[:, None]
    row = (tl.program_id(1) * slices + part).to(tl.int64)
    inside = (part < slices) & (at[None, :] < size)
    total = tl.sum(tl.load(parts_ptr + row * size + at[None, :], mask=inside, other=0.0), 0)
    if tl.program_id(1) == 0:
        tl.store(dk_ptr + at, total, mask=at < size)
    else:
        tl.store(dv_ptr + at, total, mask=at < size)


# --- The launches --------------------------------------------------------------------------------


def triton_forward(q: Tensor, k: Tensor, v: Tensor, scale: float) -> Tensor:
    if scale < 0:
        return triton_forward(-q, k, v, -scale)
    q, k, v = (rows_contiguous(x) for x in (q, k, v))
    B, h, N, D = q.shape
    M = k.shape[2]
    queries, keys, warps, stages = forward_blocks(M, D, q.dtype, shared_memory(q))
    tiles = tiles_per_program(triton.cdiv(N, queries), B * h, FORWARD_PROGRAMS, largest=8)
    o = heads_last(q)
    strides = (*q.stride()[:3], *k.stride()[:3], *v.stride()[:3])
    sizes = (D, queries, keys, tiles, triton.cdiv(M, keys), M % keys != 0)
    with on_device_of(q):
        forward_kernel[triton.cdiv(N, queries * tiles), h, B](
            q, k, v, o, *strides, N, M, positive(scale), *sizes, num_warps=warps, num_stages=stages
        )
    return o


def triton_backward(
    do: Tensor, q: Tensor, k: Tensor, v: Tensor, scale: float
) -> tuple[Tensor, Tensor, Tensor]:
    if scale < 0:
        dq, dk, dv = triton_backward(do, -q, k, v, -scale)
        return -dq, dk, dv
    do, q, k, v = (rows_contiguous(x) for x in (do, q, k, v))
    B, h, N, D = q.shape
    M = k.shape[2]
    strides = (*q.stride()[:3], *k.stride()[:3], *v.stride()[:3], *do.stride()[:3])
    numbers = (*strides, N, M, scale, positive(scale), D)
    statistics = q.new_empty(3, B, h, N, dtype=torch.float32)
    dq, dk, dv = heads_last(q), heads_last(k), heads_last(v)
    with on_device_of(q):
        queries, keys, warps, stages = query_gradient_blocks(M, D, q.dtype, shared_memory(q))
        chunks = triton.cdiv(M, keys)
        tiles = tiles_per_program(triton.cdiv(N, queries), B * h, QUERY_PROGRAMS, largest=8)
        sizes = (queries, keys, tiles, chunks, M % keys != 0, chunks <= HELD_CHUNKS)
        query_gradient_kernel[triton.cdiv(N, queries * tiles), h, B](
            q, k, v, do, statistics, dq, *numbers, *sizes, num_warps=warps, num_stages=stages
        )
        queries, keys, warps, stages = key_gradient_blocks(M, D, q.dtype, shared_memory(q))
        blocks = triton.cdiv(M, keys)
        tiles = tiles_per_program(triton.cdiv(N, queries), B * h * blocks, KEY_PROGRAMS)
        slices = triton.cdiv(N, queries * tiles)
        parts = (dk, dv)
        if slices > 1:
            parts = q.new_empty(2, slices, B, M, h, D, dtype=torch.float32)
        key_gradient_kernel[blocks * slices, h, B](
            q, k, v, do, statistics, parts[0], parts[1], *numbers, queries, keys, tiles, blocks,
            M % keys != 0, num_warps=warps, num_stages=stages,
        )  # fmt: skip
        if slices > 1:
            size, most = k.numel(), triton.next_power_of_2(slices)
            block = min(SUM_BLOCK, 8192 // most)  # of a thread 64 numbers
            sum_kernel[triton.cdiv(size, block), 2](
                parts, dk, dv, slices, size, most, block, num_warps=4
            )
    return dq, dk, dv


def positive(scale: float) -> float:
    """scale_2 of the kernels. Of a scale of 0 next to nothing: minus infinity times it stays so."""
    return max(scale * LOG2_E, 1e-30)


def heads_last(x: Tensor) -> Tensor:
    """Room for (B, h, N, D), in memory (B, N, h, D), which the model wants next."""
    B, h, N, D = x.shape
    return x.new_empty(B, N, h, D).transpose(1, 2)


def rows_contiguous(x: Tensor) -> Tensor:
    return x if x.stride(3) == 1 else x.contiguous()


# Programs that keep a large GPU busy: two to four of each kernel fit into one of its processors.
FORWARD_PROGRAMS, QUERY_PROGRAMS, KEY_PROGRAMS = 512, 512, 256
HELD_CHUNKS = 2  # chunks of keys whose weights a program keeps in registers
SUM_BLOCK = 512


def tiles_per_program(tiles: int, heads: int, programs: int, largest: int = 1024) -> int:
    """Of the tiles of one head; a power of two, so that few different kernels are compiled; from
    the shapes alone."""
    wanted = 1 << max(0, (heads * tiles // programs).bit_length() - 1)
    return min(wanted, largest, triton.next_power_of_2(tiles))
