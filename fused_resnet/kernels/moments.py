"""Moments of a 1x1 convolution's input, and of that input with its output's gradient, for BatchNorm without an output.

Rows a [P, K] are the convolution's input, relu(bn(c)) of a deferred one or every stride-th pixel of a plain one, and
rows g [P, N] its output's gradient, zero where the ReLU behind it was off:

    gram  [K+1, K+1] = [a 1]^T [a 1]        cross [K+1, N] = [a 1]^T g        both fp64

One kernel computes both: the right operand of gram is a itself, and only tiles that touch the upper triangle are
computed. The pixels are split into chunks, how many follows from the shapes alone, and a second kernel adds the chunks'
fp32 results in fp64, in order: no atomics, so the same input gives the same bits. What is made of them is in
`moments_matrices`.

Precision. The variance is a difference, Cov = M / P - m m^T, in which an error d relative to M and m becomes one of
about d (1 + mean^2 / var). Tensor cores add to their fp32 accumulator by truncation (Fasi, Higham, Mikaitis and
Pranesh 2021, "Numerical behavior of NVIDIA tensor cores"), and the products of ReLU outputs are all positive. Emulated,
a chain over 4096 pixels loses 5e-6 (bf16) to 3e-5 (fp16) of M, always downwards, and one over 64 pixels 1e-7: so in
gram, where a mean of 70 deviations makes 5e-4 of the latter, a chain ends after BLOCK_K pixels, and results are added
in fp32 registers, rounded to nearest. In cross such a chain runs over the whole chunk: what dgamma and dW lose of it
grows with mean / deviation alone, and stays below what 16-bit gradients have lost before, while the second accumulator
would halve the tile. Sums are products with a column of ones, of the same rounded values, and end their chains in both.
fp32 operands are split into two TF32 values each ("tf32x3") where PyTorch's switch allows TF32, whose 11 bits would not
survive the difference.
"""

import torch
import triton
import triton.language as tl

from . import (
    input_precision,
    on_device_of,
    require_mask,
    require_pixels,
    require_rows,
    require_vectors,
    tile_options,
)
from .epilogue import BN_SCALE, BN_SHIFT, affine, input_rows, load_packed, load_vector, relu, unpack


@triton.jit
def _load_tile(x_ptr, bn_ptr, rows, valid_rows, cols, channels, ZERO_ROWS: tl.constexpr):
    """relu(bn(x)) [M, N] of the pixels ``rows``, in x's dtype, 0 beyond the last channel; bn_ptr None: x.

    Zero beyond the last row, too, with ZERO_ROWS or without a bn; else relu(shift).
    """
    valid = valid_rows[:, None] & (cols < channels)[None, :]
    x = tl.load(x_ptr + (rows[:, None] * channels + cols[None, :]), mask=valid, other=0.0)
    if bn_ptr is not None:
        scale = load_vector(bn_ptr, BN_SCALE, channels, cols)
        shift = load_vector(bn_ptr, BN_SHIFT, channels, cols)
        x = relu(affine(x.to(tl.float32), scale, shift)).to(x.dtype)
        if ZERO_ROWS:
            x = tl.where(valid_rows[:, None], x, 0.0)
    return x


# One compilation serves every batch and image size: extents of maps gain nothing from being known to be even.
@triton.jit(do_not_specialize=["in_h", "in_w", "out_h", "out_w", "pixels", "chunk_pixels"])
def _moments_kernel(
    a_ptr,  # [pixels in, gemm_m]
    a_bn_ptr,  # [5, gemm_m] fp32 | None
    g_ptr,  # [pixels, gemm_n] | None: the right operand is a, and gemm_n is gemm_m
    mask_ptr,  # ReLU bits of g | None
    parts_ptr,  # [chunks, gemm_m + 1, gemm_n] fp32
    gemm_m,
    gemm_n,
    in_h,
    in_w,
    out_h,
    out_w,
    pixels,
    chunk_pixels,
    STRIDE: tl.constexpr,
    ONE_TILE: tl.constexpr,  # the tile of gram is one: left and right operand are the same
    INPUT_PRECISION: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    """parts[t] = [a 1]^T g over chunk t of consecutive pixels; a program per chunk and tile, BLOCK_K pixels a step."""
    # The programs of a chunk are neighbours: they read the same pixels, all but the first from L2.
    tiles_m = tl.cdiv(gemm_m, BLOCK_M)
    tiles_n = tl.cdiv(gemm_n, BLOCK_N)
    chunk = tl.program_id(0) // (tiles_m * tiles_n)
    first_row = tl.program_id(0) // tiles_n % tiles_m * BLOCK_M
    first_col = tl.program_id(0) % tiles_n * BLOCK_N
    if g_ptr is None and first_row >= first_col + BLOCK_N:
        return  # below the diagonal
    ks = first_row + tl.arange(0, BLOCK_M)
    cols = first_col + tl.arange(0, BLOCK_N)
    row = tl.arange(0, BLOCK_K)
    start = chunk * chunk_pixels
    stop = tl.minimum(start + chunk_pixels, pixels)

    acc = tl.zeros((BLOCK_M, BLOCK_N), dtype=tl.float32)
    # As many columns of ones as a product must have: to add up g's values one by one costs a third of all instructions.
    ones = tl.full((BLOCK_K, 16), 1.0, a_ptr.dtype.element_ty)
    sums = tl.zeros((BLOCK_N, 16), dtype=tl.float32)
    if mask_ptr is not None:
        packed = load_packed(mask_ptr, start, stop, first_col, gemm_n, BLOCK_K, BLOCK_N)
    for row0 in range(start, stop, BLOCK_K):
        valid_rows = row0 + row < stop
        # Only the start of a tile can pass 2^31 elements; 64-bit offsets for all of them would cost registers.
        a_tile_ptr = a_ptr + tl.cast(row0, tl.int64) * gemm_m
        a_rows = row
        if STRIDE > 1:
            a_tile_ptr = a_ptr
            a_rows = input_rows(row0 + row, in_h, in_w, out_h, out_w, STRIDE)
        a = _load_tile(a_tile_ptr, a_bn_ptr, a_rows, valid_rows, ks, gemm_m, ONE_TILE)  # [BLOCK_K, BLOCK_M]
        if g_ptr is None:
            g = a
            if not ONE_TILE:
                g = _load_tile(a_tile_ptr, a_bn_ptr, a_rows, valid_rows, cols, gemm_n, True)  # [BLOCK_K, BLOCK_N]
        else:
            g_tile_ptr = g_ptr + tl.cast(row0, tl.int64) * gemm_n
            g = _load_tile(g_tile_ptr, None, row, valid_rows, cols, gemm_n, True)  # [BLOCK_K, BLOCK_N]
            if mask_ptr is not None:
                g = tl.where(unpack(packed, BLOCK_K, BLOCK_N), g, 0.0)
                # A step ahead: the compiler makes no loads of single bytes asynchronous.
                packed = load_packed(mask_ptr, row0 + BLOCK_K, stop, first_col, gemm_n, BLOCK_K, BLOCK_N)
        # A product with a limit on inexact additions is not merged with the addition behind it. Longer chains, added up
        # under a condition every 256 pixels, saved no instructions: registers move on either path.
        if g_ptr is None:
            acc += tl.dot(tl.trans(a), g, input_precision=INPUT_PRECISION, max_num_imprecise_acc=BLOCK_K)
        else:
            acc = tl.dot(tl.trans(a), g, acc, input_precision=INPUT_PRECISION)
        sums += tl.dot(tl.trans(g), ones, input_precision=INPUT_PRECISION, max_num_imprecise_acc=BLOCK_K)

    part_ptr = parts_ptr + chunk.to(tl.int64) * (gemm_m + 1) * gemm_n
    valid = (ks < gemm_m)[:, None] & (cols < gemm_n)[None, :]
    tl.store(part_ptr + ks[:, None] * gemm_n + cols[None, :], acc, mask=valid)
    if first_row == 0:
        first = tl.arange(0, 16) == 0
        sums_ptr = part_ptr + gemm_m * gemm_n + cols[:, None] + tl.zeros((1, 16), tl.int32)
        tl.store(sums_ptr, sums, mask=(cols < gemm_n)[:, None] & first[None, :])


@triton.jit(do_not_specialize=["chunks", "pixels"])
def _add_chunks_kernel(
    parts_ptr,
    out_ptr,
    chunks,
    rows,
    cols,
    pixels,
    SYMMETRIC: tl.constexpr,
    BLOCK_T: tl.constexpr,
    BLOCK_N: tl.constexpr,
):
    """out = sum over chunks of parts, in order and in fp64.

    SYMMETRIC: out is [rows, rows] with rows = cols + 1; parts holds its upper triangle and, in its last row, the last
    column but for the corner, which is ``pixels``.
    """
    index = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)
    row = index // cols
    col = index % cols
    valid = row < rows
    if SYMMETRIC:
        valid = valid & ((row <= col) | (row == cols))
    total = tl.zeros((BLOCK_N,), dtype=tl.float64)
    for t0 in range(0, chunks, BLOCK_T):
        t = t0 + tl.arange(0, BLOCK_T)
        pointers = parts_ptr + t.to(tl.int64)[:, None] * (rows * cols) + index[None, :]  # [BLOCK_T, BLOCK_N]
        part = tl.load(pointers, mask=(t < chunks)[:, None] & valid[None, :], other=0.0)
        total += tl.sum(part.to(tl.float64), axis=0)
    if SYMMETRIC:
        tl.store(out_ptr + row * rows + col, total, mask=valid)
        tl.store(out_ptr + col * rows + row, total, mask=valid)
        if tl.program_id(0) == 0:
            tl.store(out_ptr + rows * rows - 1, pixels.to(tl.float64))
    else:
        tl.store(out_ptr + index, total, mask=valid)


def _split(values: int, pixels: int) -> int:
    """Into how many chunks the pixels are split, for ``values`` results of each.

    256 programs of 128 x 128 values fill 132 SMs twice and leave partial results of 17 MB, whose way through L2 costs
    little beside the activations. Smaller results make shorter programs, at most 768, two rounds of three on each SM; a
    chunk has 256 pixels or more.
    """
    return max(1, min(768, 2**22 // values, triton.cdiv(pixels, 256)))


def _check_input(a, stride: int) -> tuple[int, int, int, int]:
    """[N, K, P, Q] of every ``stride``-th row and column of the deferred activation ``a``; ValueError if unreadable."""
    require_rows("a", a.c)
    if stride < 1:
        raise ValueError(f"stride must be 1 or more; got {stride}")
    n, channels, h, w = a.c.shape
    if a.bn is not None:
        require_vectors("a.bn", a.bn, 5, channels)
    return n, channels, (h + stride - 1) // stride, (w + stride - 1) // stride


def _launch_products(a, g, mask, stride: int, out, values: int, plan):
    """out = [a 1]^T g, or with g None [a 1]^T [a 1], on checked operands; ``values``: results of a chunk of pixels."""
    n, gemm_m, out_h, out_w = _check_input(a, stride)
    gemm_n, config = (gemm_m if g is None else g.shape[1]), plan.config
    pixels = n * out_h * out_w
    chunks = _split(values, pixels)
    chunk_pixels = triton.cdiv(triton.cdiv(pixels, chunks), config.block_k) * config.block_k
    require_pixels(a.c, chunks * chunk_pixels + config.block_k)
    tiles = triton.cdiv(gemm_m, config.block_m) * triton.cdiv(gemm_n, config.block_n)
    parts = torch.empty((chunks, gemm_m + 1, gemm_n), dtype=torch.float32, device=out.device)
    precision = input_precision(a.c.dtype)
    with on_device_of(out):
        _moments_kernel[(chunks * tiles,)](
            a.c,
            a.bn,
            g,
            mask,
            parts,
            gemm_m,
            gemm_n,
            *a.c.shape[2:],
            out_h,
            out_w,
            pixels,
            chunk_pixels,
            STRIDE=stride,
            ONE_TILE=g is None and tiles == 1 and config.block_m == config.block_n,
            INPUT_PRECISION="tf32x3" if precision == "tf32" else precision,
            **tile_options(config),
        )
        # 4096 values at a time, 32 of each thread: latency is what this kernel costs.
        block_t = min(128, triton.next_power_of_2(chunks))
        block_n = min(4096 // block_t, triton.next_power_of_2((gemm_m + 1) * gemm_n))
        _add_chunks_kernel[(triton.cdiv((gemm_m + 1) * gemm_n, block_n),)](
            parts,
            out,
            chunks,
            gemm_m + 1,
            gemm_n,
            pixels,
            SYMMETRIC=g is None,
            BLOCK_T=block_t,
            BLOCK_N=block_n,
            num_warps=4,
            num_stages=2,
        )
    return out


def launch_moments(a, stride, plan):
    """gram = [a 1]^T [a 1] over every stride-th pixel of relu(bn(a)), [K+1, K+1] float64: a: Deferred(c, bn | None).

    The activation is rounded to c's dtype, as the convolution that reads it rounds it.
    """
    channels = _check_input(a, stride)[1]
    gram = torch.empty((channels + 1, channels + 1), dtype=torch.float64, device=a.c.device)
    # One tile, or the upper triangle in tiles of 128.
    values = channels * min(channels, (channels + 128) // 2)
    return _launch_products(a, None, None, stride, gram, values, plan)


def launch_cross_moments(a, g, mask, stride, plan):
    """cross = [a 1]^T (g where mask) over pixels, [K+1, N] float64.

    a: Deferred(c [B, K, H, W], bn [5, K] | None), g [B, N, P, Q] in c's dtype on every stride-th row and column of it,
    mask: the ReLU bits of g, or None.
    """
    n, channels, out_h, out_w = _check_input(a, stride)
    require_rows("g", g)
    if (g.shape[0], *g.shape[2:]) != (n, out_h, out_w) or g.dtype != a.c.dtype:
        raise ValueError(f"g is {tuple(g.shape)} {g.dtype}; expected {(n, 'N', out_h, out_w)} {a.c.dtype}")
    if mask is not None:
        require_mask(mask, g)
    cross = torch.empty((channels + 1, g.shape[1]), dtype=torch.float64, device=g.device)
    return _launch_products(a, g, mask, stride, cross, channels * g.shape[1], plan)
