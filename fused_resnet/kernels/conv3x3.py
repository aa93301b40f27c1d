"""R x S convolution, 3x3 above all, as an implicit GEMM, with statistics or affine + residual + ReLU behind it.

In channels_last memory, with rows m = (n, p, q) and depth (r, s, c) over a weight that lies as [K, R, S, C],

    acc[m, k] = sum_{r, s, c} a[n, p * stride - pad + r * dilation, q * stride - pad + s * dilation, c] w[k, r, s, c]

where a outside of the image is zero. With a prologue a is relu(a * scale_a + shift_a), and the zeros of the padding come
**after** it. A 3x3 would apply a prologue nine times to every value; callers that can, write the activation out first.
The epilogue on the fp32 accumulators is one of

    statistics  c = acc, cast; partials[t] = (count, mean, M2) of acc over chunk t of consecutive pixels
    affine      out = acc * scale + shift  [+ residual]  [relu], cast

The loop runs over taps and channels in one, so that loads of the next tap overlap with the products of this one.
Products in the operands' dtype, fp32 accumulation; fp32 operands as TF32 if PyTorch's switch for convolutions allows
it. Bits do not depend on the grid: every output is written by one program, in a fixed order.
"""

import torch
import triton
import triton.language as tl

from . import (
    convolution_constants,
    empty_rows,
    input_precision,
    on_device_of,
    require_like,
    require_rows,
    require_vectors,
    tap_major,
)
from .epilogue import (
    BN_SCALE,
    BN_SHIFT,
    affine,
    load_vector,
    merge_statistics,
    relu,
    tile_statistics,
)

# Added to a row that is not to be read: no tap brings it back into the image.
_OUTSIDE = tl.constexpr(-(2**30))


@triton.jit
def _gemm_tile(
    a_ptr,
    a_bn_ptr,
    w_ptr,
    row0,
    row_limit,
    first_col,
    gemm_n,
    channels,
    in_h,
    in_w,
    out_h,
    out_w,
    R: tl.constexpr,
    S: tl.constexpr,
    STRIDE_H: tl.constexpr,
    STRIDE_W: tl.constexpr,
    PAD_H: tl.constexpr,
    PAD_W: tl.constexpr,
    DILATION_H: tl.constexpr,
    DILATION_W: tl.constexpr,
    INPUT_PRECISION: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    """acc [BLOCK_M, BLOCK_N] fp32 of the output pixels from row0 and the output channels from first_col."""
    rows = row0 + tl.arange(0, BLOCK_M)
    cols = first_col + tl.arange(0, BLOCK_N)
    h0 = rows // out_w % out_h * STRIDE_H - PAD_H
    w0 = rows % out_w * STRIDE_W - PAD_W
    origin = (rows // (out_h * out_w) * in_h + h0).to(tl.int64) * in_w + w0  # pixel of tap (0, 0), may lie outside
    h0 = tl.where(rows < row_limit, h0, _OUTSIDE)
    a_row_ptr = a_ptr + origin[:, None] * channels  # [BLOCK_M, 1]
    w_row_ptr = w_ptr + cols.to(tl.int64)[:, None] * (R * S * channels)  # [BLOCK_N, 1]
    acc = tl.zeros((BLOCK_M, BLOCK_N), dtype=tl.float32)
    tap = 0
    k0 = 0
    for _ in range(R * S * tl.cdiv(channels, BLOCK_K)):
        depth = k0 + tl.arange(0, BLOCK_K)
        h = tap // S * DILATION_H
        w = tap % S * DILATION_W
        # As unsigned numbers negative coordinates are large: one comparison for both ends.
        inside = ((h0 + h).to(tl.uint32) < in_h.to(tl.uint32)) & ((w0 + w).to(tl.uint32) < in_w.to(tl.uint32))
        valid = inside[:, None] & (depth < channels)[None, :]
        a_offset = (h * in_w + w).to(tl.int64) * channels
        a = tl.load(a_row_ptr + a_offset + depth[None, :], mask=valid, other=0.0)  # [BLOCK_M, BLOCK_K]
        b_valid = (cols < gemm_n)[:, None] & (depth < channels)[None, :]
        b = tl.load(w_row_ptr + tap * channels + depth[None, :], mask=b_valid, other=0.0)  # [BLOCK_N, BLOCK_K]
        if a_bn_ptr is not None:
            scale = load_vector(a_bn_ptr, BN_SCALE, channels, depth)
            shift = load_vector(a_bn_ptr, BN_SHIFT, channels, depth)
            a = tl.where(valid, relu(affine(a.to(tl.float32), scale, shift)), 0.0).to(b.dtype)
        acc = tl.dot(a, tl.trans(b), acc, input_precision=INPUT_PRECISION)
        k0 += BLOCK_K
        tap = tl.where(k0 < channels, tap, tap + 1)
        k0 = tl.where(k0 < channels, k0, 0)
    return acc


@triton.jit(do_not_specialize=["gemm_m", "in_h", "in_w", "out_h", "out_w", "chunk_pixels"])
def _conv3x3_fwd_kernel(
    a_ptr,  # [pixels in, channels]
    a_bn_ptr,  # [5, channels] fp32 | None
    w_ptr,  # [gemm_n, R, S, channels]
    out_ptr,  # [gemm_m, gemm_n]
    partials_ptr,  # [chunks, 3, gemm_n] fp32 | None: affine epilogue
    bn_ptr,  # [5, gemm_n] fp32 | None: statistics epilogue
    residual_ptr,  # [gemm_m, gemm_n] | None
    gemm_m,
    gemm_n,
    channels,
    in_h,
    in_w,
    out_h,
    out_w,
    chunk_pixels,  # pixels of a program, a multiple of BLOCK_M
    RELU: tl.constexpr,
    R: tl.constexpr,
    S: tl.constexpr,
    STRIDE_H: tl.constexpr,
    STRIDE_W: tl.constexpr,
    PAD_H: tl.constexpr,
    PAD_W: tl.constexpr,
    DILATION_H: tl.constexpr,
    DILATION_W: tl.constexpr,
    INPUT_PRECISION: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    # Programs that read the same pixels are neighbours, so all but the first find them in L2.
    tiles_n = tl.cdiv(gemm_n, BLOCK_N)
    chunk = tl.program_id(0) // tiles_n
    first_col = tl.program_id(0) % tiles_n * BLOCK_N
    cols = first_col + tl.arange(0, BLOCK_N)
    start = chunk * chunk_pixels
    stop = tl.minimum(start + chunk_pixels, gemm_m)

    count = 0.0
    mean = tl.zeros((BLOCK_N,), dtype=tl.float32)
    m2 = tl.zeros((BLOCK_N,), dtype=tl.float32)
    for tile in range(tl.cdiv(stop - start, BLOCK_M)):
        row0 = start + tile * BLOCK_M
        acc = _gemm_tile(
            a_ptr,
            a_bn_ptr,
            w_ptr,
            row0,
            stop,
            first_col,
            gemm_n,
            channels,
            in_h,
            in_w,
            out_h,
            out_w,
            R,
            S,
            STRIDE_H,
            STRIDE_W,
            PAD_H,
            PAD_W,
            DILATION_H,
            DILATION_W,
            INPUT_PRECISION,
            BLOCK_M,
            BLOCK_N,
            BLOCK_K,
        )
        rows = row0 + tl.arange(0, BLOCK_M)
        valid_rows = rows < stop
        valid = valid_rows[:, None] & (cols < gemm_n)[None, :]
        elements = rows.to(tl.int64)[:, None] * gemm_n + cols[None, :]  # [BLOCK_M, BLOCK_N]
        if partials_ptr is not None:
            tile_count = tl.minimum(stop - row0, BLOCK_M).to(tl.float32)
            tile_mean, tile_m2 = tile_statistics(acc, valid_rows, tile_count)
            count, mean, m2 = merge_statistics(count, mean, m2, tile_count, tile_mean, tile_m2)
        if bn_ptr is not None:
            acc = affine(acc, load_vector(bn_ptr, BN_SCALE, gemm_n, cols), load_vector(bn_ptr, BN_SHIFT, gemm_n, cols))
        if residual_ptr is not None:
            acc += tl.load(residual_ptr + elements, mask=valid, other=0.0).to(tl.float32)
        if RELU:
            acc = relu(acc)
        tl.store(out_ptr + elements, acc.to(out_ptr.dtype.element_ty), mask=valid)

    if partials_ptr is not None:
        row_ptr = partials_ptr + chunk.to(tl.int64) * 3 * gemm_n + cols
        tl.store(row_ptr, tl.zeros((BLOCK_N,), dtype=tl.float32) + count, mask=cols < gemm_n)
        tl.store(row_ptr + gemm_n, mean, mask=cols < gemm_n)
        tl.store(row_ptr + 2 * gemm_n, m2, mask=cols < gemm_n)


def _output(a, w, geometry):
    """Check the operands and allocate [N, K, P, Q]; ValueError for shapes that are no convolution."""
    require_rows("a", a.c)
    if w.dim() != 4 or w.shape[1] != a.c.shape[1] or w.dtype != a.c.dtype:
        raise ValueError(f"weight is {tuple(w.shape)} {w.dtype}; expected [K, {a.c.shape[1]}, R, S] {a.c.dtype}")
    if a.bn is not None:
        require_vectors("a.bn", a.bn, 5, a.c.shape[1])
    out_hw = [
        (extent + 2 * pad - dilation * (taps - 1) - 1) // stride + 1
        for extent, taps, stride, pad, dilation in zip(a.c.shape[2:], w.shape[2:], *geometry[:3])
    ]
    if min(out_hw) < 1:
        raise ValueError(f"a {w.shape[2]}x{w.shape[3]} kernel does not fit into {tuple(a.c.shape[2:])} with {geometry}")
    return empty_rows(a.c.shape[0], w.shape[0], *out_hw, a.c)


def _launch(a, w, out, geometry, plan, *, partials=None, bn=None, residual=None, relu=False):
    constants = convolution_constants(w, geometry)
    n, channels, in_h, in_w = a.c.shape
    gemm_n, out_h, out_w = out.shape[1:]
    gemm_m = n * out_h * out_w
    config = plan.config
    if partials is None:
        chunks, chunk_pixels = triton.cdiv(gemm_m, config.block_m), config.block_m
    else:
        chunks, chunk_pixels = partials.shape[0], plan.chunk_pixels(gemm_m, partials.shape[0])
    if max(chunks * chunk_pixels, n * in_h * in_w) >= 2**31:
        raise ValueError(f"{gemm_m} output pixels: pixel indices are 32-bit")
    grid = (chunks * triton.cdiv(gemm_n, config.block_n),)
    if grid[0] == 0:
        return
    with on_device_of(out):
        _conv3x3_fwd_kernel[grid](
            a.c,
            a.bn,
            tap_major(w),
            out,
            partials,
            bn,
            residual,
            gemm_m,
            gemm_n,
            channels,
            in_h,
            in_w,
            out_h,
            out_w,
            chunk_pixels,
            RELU=relu,
            **constants,
            INPUT_PRECISION=input_precision(a.c.dtype),
            BLOCK_M=config.block_m,
            BLOCK_N=config.block_n,
            BLOCK_K=config.block_k,
            num_warps=config.num_warps,
            num_stages=config.num_stages,
        )


def launch_conv3x3_stats(a, w, geometry, plan):
    """c = conv(relu(bn(a)), w) and its channel statistics; any kernel extent, stride, padding and dilation, one group.

    a: Deferred(c [N, C, H, W], bn [5, C] | None); w [K, C, R, S], copied if it is not in channels_last memory. Returns
    (c [N, K, P, Q] in a's dtype, partials [T, 3, K] fp32: count, mean and M2 of the accumulators over each chunk).
    """
    out = _output(a, w, geometry)
    partials = torch.empty((plan.statistics_rows(w.shape[0]), 3, w.shape[0]), dtype=torch.float32, device=out.device)
    _launch(a, w, out, geometry, plan, partials=partials)
    return out, partials


def launch_conv3x3_affine(a, w, bn, residual, relu, geometry, plan):
    """out = conv(relu(bn(a)), w) * scale + shift [+ residual] [relu]; residual [N, K, P, Q] or None."""
    out = _output(a, w, geometry)
    require_vectors("bn", bn, 5, w.shape[0])
    if residual is not None:
        require_like("residual", residual, out)
    _launch(a, w, out, geometry, plan, bn=bn, residual=residual, relu=relu)
    return out
