"""R x S convolution, 3x3 above all, as an implicit GEMM, with statistics or affine + residual + ReLU behind it.

In channels_last memory, with rows m = (n, p, q) and depth (r, s, c) over a weight that lies as [K, R, S, C],

    acc[m, k] = sum_{r, s, c} a[n, p * stride - pad + r * dilation, q * stride - pad + s * dilation, c] w[k, r, s, c]

where a outside of the image is zero. With a prologue a is relu(a * scale_a + shift_a), and the zeros of the padding
come **after** it. A 3x3 would apply a prologue nine times to every value; callers that can, write the activation out
first. The epilogue on the fp32 accumulators is one of

    statistics  c = acc, cast; partials[t] = (count, mean, M2) of acc over chunk t of consecutive pixels
    affine      out = acc * scale + shift  [+ residual]  [relu], cast

A convolution of few output pixels and much depth, at small batches in the late stages, would leave most of the GPU
idle. The affine form can split its depth: each of `split_k` programs per tile writes its fp32 share of the products,
and a second kernel adds them in order in front of the epilogue. That serves 1x1 convolutions, too.

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
    output_hw,
    require_frozen,
    require_like,
    require_pixels,
    require_rows,
    require_vectors,
    tap_major,
    tile_options,
)
from .epilogue import (
    BN_SCALE,
    BN_SHIFT,
    affine,
    frozen_vectors,
    load_vector,
    merge_statistics,
    relu,
    store_statistics,
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
    first_step,
    steps,
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
    """acc [BLOCK_M, BLOCK_N] fp32 of the output pixels from row0 and the output channels from first_col.

    Of the depth, cut into R * S * cdiv(channels, BLOCK_K) steps, those of [first_step, first_step + steps).
    """
    rows = row0 + tl.arange(0, BLOCK_M)
    cols = first_col + tl.arange(0, BLOCK_N)
    h0 = rows // out_w % out_h * STRIDE_H - PAD_H
    w0 = rows % out_w * STRIDE_W - PAD_W
    origin = (rows // (out_h * out_w) * in_h + h0).to(tl.int64) * in_w + w0  # pixel of tap (0, 0), may lie outside
    h0 = tl.where(rows < row_limit, h0, _OUTSIDE)
    a_row_ptr = a_ptr + origin[:, None] * channels  # [BLOCK_M, 1]
    w_row_ptr = w_ptr + cols.to(tl.int64)[:, None] * (R * S * channels)  # [BLOCK_N, 1]
    acc = tl.zeros((BLOCK_M, BLOCK_N), dtype=tl.float32)
    tap = first_step // tl.cdiv(channels, BLOCK_K)
    k0 = first_step % tl.cdiv(channels, BLOCK_K) * BLOCK_K
    for _ in range(steps):
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
def _conv3x3_stats_kernel(
    a_ptr,  # [pixels in, channels]
    a_bn_ptr,  # [5, channels] fp32 | None
    w_ptr,  # [gemm_n, R, S, channels]
    out_ptr,  # [gemm_m, gemm_n]
    partials_ptr,  # [chunks, 3, gemm_n] fp32
    gemm_m,
    gemm_n,
    channels,
    in_h,
    in_w,
    out_h,
    out_w,
    chunk_pixels,  # pixels of a program, a multiple of BLOCK_M
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
    # The running statistics live in memory: carried through the loop in the accumulators' layout, which keeps copies of
    # a channel in many threads, they would cost 64 registers. For the same reason nothing is hoisted out of the loop.
    row_ptr = partials_ptr + chunk.to(tl.int64) * 3 * gemm_n + cols
    _store_statistics(row_ptr, 0.0, tl.zeros((BLOCK_N,), tl.float32), tl.zeros((BLOCK_N,), tl.float32), cols, gemm_n)
    for tile in tl.range(tl.cdiv(stop - start, BLOCK_M), disable_licm=True):
        row0 = start + tile * BLOCK_M
        acc = _gemm_tile(
            a_ptr,
            a_bn_ptr,
            w_ptr,
            row0,
            stop,
            first_col,
            0,
            R * S * tl.cdiv(channels, BLOCK_K),
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
        elements = rows.to(tl.int64)[:, None] * gemm_n + cols[None, :]  # [BLOCK_M, BLOCK_N]
        valid = (rows < stop)[:, None] & (cols < gemm_n)[None, :]
        tl.store(out_ptr + elements, acc.to(out_ptr.dtype.element_ty), mask=valid)
        tile_count = tl.minimum(stop - row0, BLOCK_M).to(tl.float32)
        tile_mean, tile_m2 = _tile_statistics(acc, rows < stop, tile_count)
        mean = tl.load(row_ptr + gemm_n, mask=cols < gemm_n, other=0.0)
        m2 = tl.load(row_ptr + 2 * gemm_n, mask=cols < gemm_n, other=0.0)
        count, mean, m2 = merge_statistics((row0 - start).to(tl.float32), mean, m2, tile_count, tile_mean, tile_m2)
        _store_statistics(row_ptr, count, mean, m2, cols, gemm_n)


@triton.jit
def _tile_statistics(x, valid, count):
    """Mean [N] and M2 [N] = sum (x - mean)^2 over the ``count`` rows of x [M, N] marked in ``valid`` [M].

    Two passes over registers: E[x^2] - E[x]^2 would cancel for a channel whose mean is far from zero.
    """
    mean = tl.sum(tl.where(valid[:, None], x, 0.0), axis=0) / count
    deviation = tl.where(valid[:, None], x - mean[None, :], 0.0)  # [M, N]
    return mean, tl.sum(deviation * deviation, axis=0)


@triton.jit
def _store_statistics(row_ptr, count, mean, m2, cols, channels):
    """Store a row (count, mean, M2) for this program's own later loads, too: hence the barriers around it."""
    tl.debug_barrier()
    store_statistics(row_ptr, count, mean, m2, cols, channels)
    tl.debug_barrier()


@triton.jit(do_not_specialize=["gemm_m", "in_h", "in_w", "out_h", "out_w"])
def _conv3x3_affine_kernel(
    a_ptr,  # [pixels in, channels]
    w_ptr,  # [gemm_n, R, S, channels]
    mean_ptr,  # [gemm_n] and the next three
    var_ptr,
    gamma_ptr,  # | None: 1
    beta_ptr,  # | None: 0
    eps,
    residual_ptr,  # [gemm_m, gemm_n] | None
    out_ptr,  # [gemm_m, gemm_n]; with SPLIT_K > 1 fp32 [SPLIT_K, gemm_m, gemm_n], products alone
    gemm_m,
    gemm_n,
    channels,
    in_h,
    in_w,
    out_h,
    out_w,
    RELU: tl.constexpr,
    SPLIT_K: tl.constexpr,
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
    tiles_n = tl.cdiv(gemm_n, BLOCK_N)
    tile = tl.program_id(0) // SPLIT_K
    share = tl.program_id(0) % SPLIT_K
    row0 = tile // tiles_n * BLOCK_M
    first_col = tile % tiles_n * BLOCK_N
    steps = R * S * tl.cdiv(channels, BLOCK_K)
    first_step = 0
    if SPLIT_K > 1:
        first_step = share * steps // SPLIT_K
        steps = (share + 1) * steps // SPLIT_K - first_step
    acc = _gemm_tile(
        a_ptr,
        None,
        w_ptr,
        row0,
        gemm_m,
        first_col,
        first_step,
        steps,
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
    cols = first_col + tl.arange(0, BLOCK_N)
    elements = rows.to(tl.int64)[:, None] * gemm_n + cols[None, :]  # [BLOCK_M, BLOCK_N]
    valid = (rows < gemm_m)[:, None] & (cols < gemm_n)[None, :]
    if SPLIT_K > 1:
        tl.store(out_ptr + share.to(tl.int64) * gemm_m * gemm_n + elements, acc, mask=valid)
    else:
        scale, shift = frozen_vectors(mean_ptr, var_ptr, gamma_ptr, beta_ptr, eps, gemm_n, cols)
        out = _affine_epilogue(acc, scale, shift, residual_ptr, elements, valid, RELU)
        tl.store(out_ptr + elements, out.to(out_ptr.dtype.element_ty), mask=valid)


@triton.jit
def _affine_epilogue(acc, scale, shift, residual_ptr, elements, valid, RELU: tl.constexpr):
    """relu?(acc * scale + shift [+ residual]), [M, N] fp32."""
    acc = affine(acc, scale, shift)
    if residual_ptr is not None:
        acc += tl.load(residual_ptr + elements, mask=valid, other=0.0).to(tl.float32)
    if RELU:
        acc = relu(acc)
    return acc


@triton.jit(do_not_specialize=["pixels"])
def _split_affine_kernel(
    shares_ptr,  # [SPLIT_K, pixels, channels] fp32
    mean_ptr,  # [channels] and the next three
    var_ptr,
    gamma_ptr,
    beta_ptr,
    eps,
    residual_ptr,  # [pixels, channels] | None
    out_ptr,  # [pixels, channels]
    pixels,
    channels,
    RELU: tl.constexpr,
    SPLIT_K: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
):
    """The second half of a split convolution: its shares summed in order, then the epilogue."""
    tiles_n = tl.cdiv(channels, BLOCK_N)
    rows = tl.program_id(0) // tiles_n * BLOCK_M + tl.arange(0, BLOCK_M)
    cols = tl.program_id(0) % tiles_n * BLOCK_N + tl.arange(0, BLOCK_N)
    elements = rows.to(tl.int64)[:, None] * channels + cols[None, :]  # [BLOCK_M, BLOCK_N]
    valid = (rows < pixels)[:, None] & (cols < channels)[None, :]
    acc = tl.zeros((BLOCK_M, BLOCK_N), dtype=tl.float32)
    for share in tl.static_range(SPLIT_K):
        offset = tl.cast(pixels, tl.int64) * channels * share
        acc += tl.load(shares_ptr + offset + elements, mask=valid, other=0.0)
    scale, shift = frozen_vectors(mean_ptr, var_ptr, gamma_ptr, beta_ptr, eps, channels, cols)
    out = _affine_epilogue(acc, scale, shift, residual_ptr, elements, valid, RELU)
    tl.store(out_ptr + elements, out.to(out_ptr.dtype.element_ty), mask=valid)


def _output(name: str, x, w, geometry):
    """Check the operands and allocate [N, K, P, Q]; ValueError for shapes that are no convolution."""
    require_rows(name, x)
    if w.dim() != 4 or w.shape[1] != x.shape[1] or w.dtype != x.dtype:
        raise ValueError(f"weight is {tuple(w.shape)} {w.dtype}; expected [K, {x.shape[1]}, R, S] {x.dtype}")
    out_hw = output_hw(x.shape[2:], w.shape, geometry)
    if min(out_hw) < 1:
        raise ValueError(f"a {w.shape[2]}x{w.shape[3]} kernel does not fit into {tuple(x.shape[2:])} with {geometry}")
    return empty_rows(x.shape[0], w.shape[0], *out_hw, x)


def _constants(w, geometry, config) -> dict:
    """What both kernels take by name."""
    return {
        **convolution_constants(w.shape, geometry),
        "INPUT_PRECISION": input_precision(w.dtype),
        **tile_options(config),
    }


def launch_conv3x3_stats(a, w, geometry, plan):
    """c = conv(relu(bn(a)), w) and its channel statistics; any kernel extent, stride, padding and dilation, one group.

    a: Deferred(c [N, C, H, W], bn [5, C] | None); w [K, C, R, S], copied if it is not in channels_last memory. Returns
    (c [N, K, P, Q] in a's dtype, partials [T, 3, K] fp32: count, mean and M2 of the accumulators over each chunk).
    """
    out = _output("a", a.c, w, geometry)
    if a.bn is not None:
        require_vectors("a.bn", a.bn, 5, a.c.shape[1])
    n, k, out_h, out_w = out.shape
    pixels, rows = n * out_h * out_w, plan.statistics_rows(k)
    chunk_pixels = plan.chunk_pixels(pixels, rows)
    require_pixels(a.c, rows * chunk_pixels)
    partials = torch.empty((rows, 3, k), dtype=torch.float32, device=out.device)
    with on_device_of(out):
        _conv3x3_stats_kernel[(rows * triton.cdiv(k, plan.config.block_n),)](
            a.c,
            a.bn,
            tap_major(w),
            out,
            partials,
            pixels,
            k,
            *a.c.shape[1:],
            out_h,
            out_w,
            chunk_pixels,
            **_constants(w, geometry, plan.config),
        )
    return out, partials


def launch_conv3x3_affine(x, w, bn, residual, relu, geometry, plan):
    """out = conv(x, w) * scale + shift [+ residual] [relu]; residual [N, K, P, Q] or None.

    bn: Frozen(mean, var, gamma | None, beta | None, eps), running statistics [K] in any floating dtype.
    """
    out = _output("x", x, w, geometry)
    n, k, out_h, out_w = out.shape
    frozen = require_frozen(bn, k)
    if residual is not None:
        require_like("residual", residual, out)
    pixels, config = n * out_h * out_w, plan.config
    require_pixels(x, pixels + config.block_m)
    if not pixels:
        return out
    tiles = triton.cdiv(pixels, config.block_m) * triton.cdiv(k, config.block_n)
    split, target = config.split_k, out
    if split > 1:
        target = torch.empty((split, pixels, k), dtype=torch.float32, device=out.device)
    with on_device_of(out):
        _conv3x3_affine_kernel[(tiles * split,)](
            x,
            tap_major(w),
            *frozen,
            residual if split == 1 else None,
            target,
            pixels,
            k,
            *x.shape[1:],
            out_h,
            out_w,
            RELU=relu,
            SPLIT_K=split,
            **_constants(w, geometry, config),
        )
        if split > 1:
            # 8 x 64 values in 128 threads: a 16-byte load of every share each, and blocks enough for a small map.
            block_m, block_n = 8, 64
            _split_affine_kernel[(triton.cdiv(pixels, block_m) * triton.cdiv(k, block_n),)](
                target,
                *frozen,
                residual,
                out,
                pixels,
                k,
                RELU=relu,
                SPLIT_K=split,
                BLOCK_M=block_m,
                BLOCK_N=block_n,
                num_warps=4,
                num_stages=2,
            )
    return out
