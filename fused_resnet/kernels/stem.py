"""Convolution of images: up to four channels, a kernel of any extent, forward and weight gradient; a ResNet's stem.

With rows m = (n, p, q) and a[m, (r, s, c)] = x[n, p * stride - pad + r * dilation, q * stride - pad + s * dilation, c],

    acc[m, k] = sum_{r, s, c} a[m, (r, s, c)] w[k, r, s, c]           dw[k, r, s, c] = sum_m g[m, k] a[m, (r, s, c)]

    statistics  c = acc, cast; partials[t] = (count, mean, M2) of acc over chunk t of consecutive pixels
    affine      out = acc * scale + shift  [+ residual]  [relu], cast; scale and shift of running statistics
    pool        y = max over 3x3 windows, stride 2, padding 1, of relu(acc * scale + shift), cast

Three channels are too few for a tap to be a step in depth: padded to a dot's 16, a 7x7 kernel would be 784 deep instead
of 147. But in channels_last memory the S taps of a kernel row are neighbours, so that the depth goes in R slices of
S * C values, padded to a power of two: 224. A load is a pixel wide. Three channels of 16 bits start at any even byte,
which makes every value a load of its own, and twice as many instructions (compiled for sm_90); so such an image, and
its weight, are first copied to four channels. For a 224 x 224 image the pooled stem moves 1.5 MB with that copy, where
0.7 MB would do without, and 3.9 MB if it wrote the map. The slices of the weight are loaded once by each program, and
stay in shared memory while it goes through its pixels.

The pooled stem never writes the map that it pools, and of which a quarter comes out. A product for each of the nine
taps of a window would be the simplest: every maximum is elementwise then, for 2.25 times the products and the loads. A
program here walks down a strip of pooled rows instead, keeping the maximum over rows as it goes, so that a row of the
map is computed once, and one more per strip. Across, the first half of a tile holds the even columns of its windows and
the second half the odd ones: they meet elementwise, too. What remains is the odd column to the left of a window, one
row up in the tile: a `tl.gather` of the finished maxima, in the output's dtype, once for each pooled row. A tile of 64
columns has 31 windows; of a map of 112 x 112 it all computes 1.2 times the pixels. ReLU makes 0 the neutral element of
the maximum: what a window has outside of the map is 0, and a NaN stays a NaN.

Products in the operands' dtype, fp32 accumulation; fp32 operands as TF32 if PyTorch's switch for convolutions says so.
Bits do not depend on the grid: every output is written by one program, in a fixed order.
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
    tap_major,
    tile_options,
)
from .epilogue import affine, fold_rows, frozen_vectors, relu, store_statistics


@triton.jit(do_not_specialize=["pixels"])
def _pad_channels_kernel(x_ptr, out_ptr, pixels, CHANNELS: tl.constexpr, PADDED: tl.constexpr, BLOCK: tl.constexpr):
    """out [pixels, PADDED] = x [pixels, CHANNELS] and zeros."""
    element = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    pixel = element // PADDED
    channel = element % PADDED
    valid = pixel < pixels
    x = tl.load(x_ptr + pixel * CHANNELS + channel, mask=valid & (channel < CHANNELS), other=0.0)
    tl.store(out_ptr + element, x, mask=valid)


@triton.jit
def _load_weight(w_ptr, cols, gemm_n, R: tl.constexpr, S: tl.constexpr, CHANNELS: tl.constexpr, BLOCK_K: tl.constexpr):
    """The R slices w[r] [BLOCK_K, N] of a weight [gemm_n, R, S, CHANNELS], zero beyond S * CHANNELS."""
    depth = tl.arange(0, BLOCK_K)
    valid = (depth < S * CHANNELS)[:, None] & (cols < gemm_n)[None, :]
    pointers = w_ptr + (cols.to(tl.int64) * (R * S * CHANNELS))[None, :] + depth[:, None]
    slices = ()
    for r in tl.static_range(R):
        slices = slices + (tl.load(pointers + r * (S * CHANNELS), mask=valid, other=0.0),)
    return slices


@triton.jit
def _load_patches(
    x_ptr, image, p, q, valid, in_h, in_w,
    R: tl.constexpr, S: tl.constexpr, STRIDE_H: tl.constexpr, STRIDE_W: tl.constexpr, PAD_H: tl.constexpr,
    PAD_W: tl.constexpr, DILATION_H: tl.constexpr, DILATION_W: tl.constexpr, CHANNELS: tl.constexpr,
    BLOCK_K: tl.constexpr,
):  # fmt: skip
    """The R slices [M, BLOCK_K] of what the outputs (image, p, q) read, zero outside of the image and beyond S taps.

    image and p are scalars or [M, 1], q and valid [M, 1]. All slices are loaded before the first is used.
    """
    depth = tl.arange(0, BLOCK_K)[None, :]
    tap = depth // CHANNELS * DILATION_W
    h = p * STRIDE_H - PAD_H
    w = q * STRIDE_W - PAD_W
    # As unsigned numbers negative coordinates are large: one comparison for both ends.
    inside = valid & ((w + tap).to(tl.uint32) < in_w.to(tl.uint32)) & (depth < S * CHANNELS)  # [M, BLOCK_K]
    row_ptr = x_ptr + (image * in_h + h).to(tl.int64) * in_w * CHANNELS
    offset = (w + tap) * CHANNELS + depth % CHANNELS
    slices = ()
    for r in tl.static_range(R):
        row_inside = (h + r * DILATION_H).to(tl.uint32) < in_h.to(tl.uint32)
        slices = slices + (tl.load(row_ptr + offset, mask=inside & row_inside, other=0.0),)
        row_ptr += in_w * (DILATION_H * CHANNELS)
    return slices


@triton.jit
def _product(
    patches,
    weight,
    R: tl.constexpr,
    INPUT_PRECISION: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
):
    """The sum over r of patches[r] [BLOCK_M, K] times weight[r] [K, BLOCK_N], fp32."""
    acc = tl.zeros((BLOCK_M, BLOCK_N), dtype=tl.float32)
    for r in tl.static_range(R):
        acc = tl.dot(patches[r], weight[r], acc, input_precision=INPUT_PRECISION)
    return acc


@triton.jit(do_not_specialize=["gemm_m", "in_h", "in_w", "out_h", "out_w", "chunk_pixels"])
def _stem_fwd_kernel(
    x_ptr,  # [pixels in, CHANNELS]
    w_ptr,  # [gemm_n, R, S, CHANNELS]
    mean_ptr,  # [gemm_n] and the next three | None: statistics epilogue
    var_ptr,
    gamma_ptr,
    beta_ptr,
    eps,
    residual_ptr,  # [gemm_m, gemm_n] | None
    out_ptr,  # [gemm_m, gemm_n]
    partials_ptr,  # [chunks, 3, gemm_n] fp32 | None: affine epilogue
    gemm_m,
    gemm_n,
    in_h,
    in_w,
    out_h,
    out_w,
    chunk_pixels,
    RELU: tl.constexpr,
    R: tl.constexpr,
    S: tl.constexpr,
    STRIDE_H: tl.constexpr,
    STRIDE_W: tl.constexpr,
    PAD_H: tl.constexpr,
    PAD_W: tl.constexpr,
    DILATION_H: tl.constexpr,
    DILATION_W: tl.constexpr,
    CHANNELS: tl.constexpr,
    INPUT_PRECISION: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    tiles_n = tl.cdiv(gemm_n, BLOCK_N)
    chunk = tl.program_id(0) // tiles_n
    cols = tl.program_id(0) % tiles_n * BLOCK_N + tl.arange(0, BLOCK_N)
    start = chunk * chunk_pixels
    stop = tl.minimum(start + chunk_pixels, gemm_m)
    if partials_ptr is not None:
        row_ptr = partials_ptr + chunk.to(tl.int64) * 3 * gemm_n + cols
        if start >= gemm_m:  # a row of statistics that no pixel is left for: not worth its weight
            zeros = tl.zeros((BLOCK_N,), dtype=tl.float32)
            store_statistics(row_ptr, zeros, zeros, zeros, cols, gemm_n)
            return
    weight = _load_weight(w_ptr, cols, gemm_n, R, S, CHANNELS, BLOCK_K)
    pivot = tl.zeros((BLOCK_N,), dtype=tl.float32)
    total = tl.zeros((BLOCK_M // 16, 8, BLOCK_N), dtype=tl.float32)
    squares = tl.zeros((BLOCK_M // 16, 8, BLOCK_N), dtype=tl.float32)
    # Hoisted out of the loop, the pieces of addresses and masks would cost more registers than they save time.
    for row0 in tl.range(start, stop, BLOCK_M, disable_licm=True):
        rows = row0 + tl.arange(0, BLOCK_M)
        p = (rows // out_w % out_h)[:, None]
        q = (rows % out_w)[:, None]
        patches = _load_patches(
            x_ptr, (rows // (out_h * out_w))[:, None], p, q, (rows < stop)[:, None], in_h, in_w,
            R, S, STRIDE_H, STRIDE_W, PAD_H, PAD_W, DILATION_H, DILATION_W, CHANNELS, BLOCK_K,
        )  # fmt: skip
        acc = _product(patches, weight, R, INPUT_PRECISION, BLOCK_M, BLOCK_N)
        elements = rows.to(tl.int64)[:, None] * gemm_n + cols[None, :]  # [BLOCK_M, BLOCK_N]
        valid = (rows < stop)[:, None] & (cols < gemm_n)[None, :]
        if partials_ptr is not None:
            # Squares of deviations from the first tile's mean do not cancel: that mean lies within sqrt(tiles)
            # standard deviations of the chunk's, since the tile's own pixels are among the chunk's. Sums stay spread
            # over a tile until the end: fewer exchanges between threads, shorter chains of additions.
            if row0 == start:
                pivot = tl.sum(acc, axis=0) / tl.minimum(stop - start, BLOCK_M)
            deviation = tl.where((rows < stop)[:, None], acc - pivot[None, :], 0.0)
            total += fold_rows(deviation, BLOCK_M, BLOCK_N)
            squares += fold_rows(deviation * deviation, BLOCK_M, BLOCK_N)
        if var_ptr is not None:
            scale, shift = frozen_vectors(mean_ptr, var_ptr, gamma_ptr, beta_ptr, eps, gemm_n, cols)
            acc = affine(acc, scale, shift)
        if residual_ptr is not None:
            acc += tl.load(residual_ptr + elements, mask=valid, other=0.0).to(tl.float32)
        if RELU:
            acc = relu(acc)
        tl.store(out_ptr + elements, acc.to(out_ptr.dtype.element_ty), mask=valid)
    if partials_ptr is not None:
        count = tl.zeros_like(pivot) + (stop - start).to(tl.float32)
        shift = tl.sum(tl.sum(total, axis=1), axis=0) / count
        m2 = tl.sum(tl.sum(squares, axis=1), axis=0) - shift * shift * count
        m2 = tl.maximum(m2, 0.0, propagate_nan=tl.PropagateNan.ALL)
        store_statistics(row_ptr, count, pivot + shift, m2, cols, gemm_n)


@triton.jit
def _larger(a, b):
    """Maximum in the dtype of a; a NaN stays a NaN."""
    return tl.maximum(a, b, propagate_nan=tl.PropagateNan.ALL).to(a.dtype)


@triton.jit(do_not_specialize=["in_h", "in_w", "out_h", "out_w", "pool_h", "pool_w", "strip_rows"])
def _stem_pool_kernel(
    x_ptr,  # [pixels in, CHANNELS]
    w_ptr,  # [gemm_n, R, S, CHANNELS]
    mean_ptr,  # [gemm_n] and the next three
    var_ptr,
    gamma_ptr,  # | None: 1
    beta_ptr,  # | None: 0
    eps,
    y_ptr,  # [pixels pooled, gemm_n]
    gemm_n,
    in_h,
    in_w,
    out_h,
    out_w,
    pool_h,
    pool_w,
    strip_rows,  # pooled rows of a program
    R: tl.constexpr,
    S: tl.constexpr,
    STRIDE_H: tl.constexpr,
    STRIDE_W: tl.constexpr,
    PAD_H: tl.constexpr,
    PAD_W: tl.constexpr,
    DILATION_H: tl.constexpr,
    DILATION_W: tl.constexpr,
    CHANNELS: tl.constexpr,
    INPUT_PRECISION: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    HALF: tl.constexpr = BLOCK_M // 2
    # Programs that read the same pixels are neighbours, so all but the first find them in L2.
    tiles_n = tl.cdiv(gemm_n, BLOCK_N)
    cols = tl.program_id(0) % tiles_n * BLOCK_N + tl.arange(0, BLOCK_N)
    tile = tl.program_id(0) // tiles_n
    tiles_w = tl.cdiv(pool_w, HALF - 1)
    # One column of windows more than is stored, for its odd column of the map.
    pool_q = tile % tiles_w * (HALF - 1) - 1 + tl.arange(0, HALF)
    row = tl.arange(0, BLOCK_M)
    q = (tile % tiles_w * (HALF - 1) - 1 + row % HALF) * 2 + row // HALF
    tile = tile // tiles_w
    strips = tl.cdiv(pool_h, strip_rows)
    first = tile % strips * strip_rows
    stop = tl.minimum(first + strip_rows, pool_h)
    image = tile // strips
    weight = _load_weight(w_ptr, cols, gemm_n, R, S, CHANNELS, BLOCK_K)
    scale, shift = frozen_vectors(mean_ptr, var_ptr, gamma_ptr, beta_ptr, eps, gemm_n, cols)
    on_map = (q >= 0) & (q < out_w)
    left = tl.broadcast_to(tl.maximum(tl.arange(0, HALF) - 1, 0)[:, None], (HALF, BLOCK_N))
    best = tl.zeros((BLOCK_M, BLOCK_N), dtype=y_ptr.dtype.element_ty)
    for p in tl.range(2 * first - 1, 2 * stop, disable_licm=True):
        patches = _load_patches(
            x_ptr, image, p, q[:, None], on_map[:, None], in_h, in_w,
            R, S, STRIDE_H, STRIDE_W, PAD_H, PAD_W, DILATION_H, DILATION_W, CHANNELS, BLOCK_K,
        )  # fmt: skip
        acc = _product(patches, weight, R, INPUT_PRECISION, BLOCK_M, BLOCK_N)
        valid = on_map & (p >= 0) & (p < out_h)
        acc = tl.where(valid[:, None], relu(affine(acc, scale, shift)), 0.0)
        a = acc.to(y_ptr.dtype.element_ty)  # rounding keeps the order, so it may come before the maximum
        best = _larger(best, a)
        if (p & 1) == 1:
            # An odd row ends the windows of pooled row p // 2, and begins those of the next.
            even, odd = tl.split(tl.permute(tl.reshape(best, (2, HALF, BLOCK_N)), (1, 2, 0)))
            y = _larger(_larger(even, odd), tl.gather(odd, left, 0))  # [HALF, BLOCK_N]
            pixel = (image * pool_h + p // 2).to(tl.int64) * pool_w + pool_q
            stored = (p > 2 * first) & (tl.arange(0, HALF) > 0) & (pool_q < pool_w)
            elements = pixel[:, None] * gemm_n + cols[None, :]
            tl.store(y_ptr + elements, y, mask=stored[:, None] & (cols < gemm_n)[None, :])
            best = a


@triton.jit(do_not_specialize=["pixels", "in_h", "in_w", "out_h", "out_w", "chunk_pixels"])
def _stem_wgrad_kernel(
    x_ptr,  # [pixels in, CHANNELS]
    g_ptr,  # [pixels, gemm_m]
    parts_ptr,  # [chunks, gemm_m, R, S, channels] fp32
    gemm_m,
    channels,  # of the weight: at most CHANNELS
    pixels,
    in_h,
    in_w,
    out_h,
    out_w,
    chunk_pixels,
    R: tl.constexpr,
    S: tl.constexpr,
    STRIDE_H: tl.constexpr,
    STRIDE_W: tl.constexpr,
    PAD_H: tl.constexpr,
    PAD_W: tl.constexpr,
    DILATION_H: tl.constexpr,
    DILATION_W: tl.constexpr,
    CHANNELS: tl.constexpr,
    INPUT_PRECISION: tl.constexpr,
    BLOCK_M: tl.constexpr,  # output channels
    BLOCK_N: tl.constexpr,  # depth of a slice
    BLOCK_K: tl.constexpr,  # pixels of a step
):
    tiles_m = tl.cdiv(gemm_m, BLOCK_M)
    chunk = tl.program_id(0) // tiles_m
    ks = tl.program_id(0) % tiles_m * BLOCK_M + tl.arange(0, BLOCK_M)
    start = chunk * chunk_pixels
    stop = tl.minimum(start + chunk_pixels, pixels)
    slices = ()
    for _ in tl.static_range(R):
        slices = slices + (tl.zeros((BLOCK_M, BLOCK_N), dtype=tl.float32),)
    for row0 in tl.range(start, stop, BLOCK_K, disable_licm=True):
        rows = row0 + tl.arange(0, BLOCK_K)
        g_valid = (rows < stop)[:, None] & (ks < gemm_m)[None, :]
        g = tl.load(g_ptr + rows.to(tl.int64)[:, None] * gemm_m + ks[None, :], mask=g_valid, other=0.0)
        p = (rows // out_w % out_h)[:, None]
        q = (rows % out_w)[:, None]
        patches = _load_patches(
            x_ptr, (rows // (out_h * out_w))[:, None], p, q, (rows < stop)[:, None], in_h, in_w,
            R, S, STRIDE_H, STRIDE_W, PAD_H, PAD_W, DILATION_H, DILATION_W, CHANNELS, BLOCK_N,
        )  # fmt: skip
        sums = ()
        for r in tl.static_range(R):
            sums = sums + (tl.dot(tl.trans(g), patches[r], slices[r], input_precision=INPUT_PRECISION),)
        slices = sums
    depth = tl.arange(0, BLOCK_N)
    tap = depth // CHANNELS
    valid = (ks < gemm_m)[:, None] & ((tap < S) & (depth % CHANNELS < channels))[None, :]
    for r in tl.static_range(R):
        taps = ((chunk * gemm_m + ks).to(tl.int64)[:, None] * R + r) * S + tap[None, :]
        tl.store(parts_ptr + taps * channels + (depth % CHANNELS)[None, :], slices[r], mask=valid)


def _padded(rows, channels: int):
    """Memory [..., C] with `channels` instead: itself, or a copy with zeros behind."""
    if rows.shape[-1] == channels:
        return rows
    out = torch.empty((*rows.shape[:-1], channels), dtype=rows.dtype, device=rows.device)
    pixels, block = out.numel() // channels, 1024
    if pixels:
        _pad_channels_kernel[(triton.cdiv(out.numel(), block),)](
            rows, out, pixels, CHANNELS=rows.shape[-1], PADDED=channels, BLOCK=block, num_warps=4, num_stages=2
        )
    return out


def _padded_image(x):
    """[N, H, W, C] in memory with C a power of two."""
    return _padded(x.permute(0, 2, 3, 1), triton.next_power_of_2(x.shape[1]))


def _check_image(x, w_shape, geometry, slice_depth: int) -> tuple[int, int]:
    """Height and width of the output; ValueError for what these kernels do not convolve."""
    _, c, r, s = w_shape
    if c != x.shape[1] or geometry.groups != 1:
        raise ValueError(f"weight is {tuple(w_shape)}, {geometry.groups} groups; x has {x.shape[1]} channels")
    padded = triton.next_power_of_2(c)
    if padded > 4 or s * padded > slice_depth:
        raise ValueError(f"weight is {tuple(w_shape)}; the plan's slices hold up to 4 channels, {slice_depth} in a row")
    if x.shape[3] * padded >= 2**31:
        raise ValueError(f"x is {tuple(x.shape)}: offsets in a row are 32-bit")
    out_hw = output_hw(x.shape[2:], w_shape, geometry)
    if min(out_hw) < 1:
        raise ValueError(f"x is {tuple(x.shape)}: a {r}x{s} kernel does not fit with {geometry}")
    return out_hw


def _constants(w_shape, x, geometry, config) -> dict:
    """What the kernels take by name."""
    return {
        **convolution_constants(w_shape, geometry),
        "CHANNELS": triton.next_power_of_2(w_shape[1]),
        "INPUT_PRECISION": input_precision(x.dtype),
        **tile_options(config),
    }


def _check_operands(x, w) -> None:
    require_rows("x", x)
    if w.dim() != 4 or w.dtype != x.dtype:
        raise ValueError(f"weight is {tuple(w.shape)} {w.dtype}; expected [K, {x.shape[1]}, R, S] {x.dtype}")


def _steps(tiles: int) -> int:
    """How many of so many tiles a program takes one after the other: eight, fewer where programs are few.

    It loads the weight once for them; the pool's compute 17 rows of the map for them instead of 16.
    """
    return max(1, min(8, tiles // 1024))


_NO_BN = (None, None, None, None, 0.0)


def _launch_forward(x, w, geometry, plan, statistics=False, frozen=_NO_BN, residual=None, relu=False):
    """`_stem_fwd_kernel` on checked operands, a program for each chunk of pixels and tile of channels."""
    config = plan.config
    out = empty_rows(x.shape[0], w.shape[0], *_check_image(x, w.shape, geometry, config.block_k), x)
    n, k, out_h, out_w = out.shape
    pixels, partials = n * out_h * out_w, None
    if statistics:
        chunks = plan.statistics_rows(k)
        chunk_pixels = plan.chunk_pixels(pixels, chunks)
        partials = torch.empty((chunks, 3, k), dtype=torch.float32, device=out.device)
    else:
        chunk_pixels = config.block_m * _steps(triton.cdiv(pixels, config.block_m))
        chunks = triton.cdiv(pixels, chunk_pixels)
    require_pixels(x, chunks * chunk_pixels)
    if residual is not None:
        require_like("residual", residual, out)
    if not chunks:
        return out, partials
    with on_device_of(out):
        image = _padded_image(x)
        _stem_fwd_kernel[(chunks * triton.cdiv(k, config.block_n),)](
            image,
            _padded(tap_major(w), image.shape[3]),
            *frozen,
            residual,
            out,
            partials,
            pixels,
            k,
            *x.shape[2:],
            out_h,
            out_w,
            chunk_pixels,
            RELU=relu,
            **_constants(w.shape, x, geometry, config),
        )
    return out, partials


def launch_stem_stats(a, w, geometry, plan):
    """c = conv(x, w) and its channel statistics, for an image x of up to four channels.

    a: Deferred(x [N, C, H, W], None); w [K, C, R, S]. Returns (c [N, K, P, Q] in x's dtype, partials [T, 3, K] fp32:
    count, mean and M2 of the accumulators over each chunk).
    """
    if a.bn is not None:
        raise ValueError("a.bn: an image comes without a BatchNorm in front of it")
    _check_operands(a.c, w)
    return _launch_forward(a.c, w, geometry, plan, statistics=True)


def launch_stem_affine(x, w, bn, residual, relu, geometry, plan):
    """out = conv(x, w) * scale + shift [+ residual] [relu], for an image x of up to four channels.

    bn: Frozen(mean, var, gamma | None, beta | None, eps), running statistics [K]; residual [N, K, P, Q] or None.
    """
    _check_operands(x, w)
    frozen = require_frozen(bn, w.shape[0])
    return _launch_forward(x, w, geometry, plan, frozen=frozen, residual=residual, relu=relu)[0]


def launch_stem_pool(x, w, bn, geometry, plan):
    """y = max_pool(relu(conv(x, w) * scale + shift), 3x3, stride 2, padding 1), [N, K, ceil(P/2), ceil(Q/2)].

    x [N, C, H, W], an image of up to four channels; w [K, C, R, S]; bn: Frozen(mean, var, gamma | None, beta | None,
    eps), running statistics [K]. A tile is block_m / 2 windows wide, less one.
    """
    config = plan.config
    _check_operands(x, w)
    out_h, out_w = _check_image(x, w.shape, geometry, config.block_k)
    n, k = x.shape[0], w.shape[0]
    frozen = require_frozen(bn, k)
    y = empty_rows(n, k, (out_h + 1) // 2, (out_w + 1) // 2, x)
    pool_h, pool_w = y.shape[2:]
    require_pixels(x, n * out_h * out_w)
    tiles = triton.cdiv(pool_w, config.block_m // 2 - 1)
    strip_rows = _steps(n * tiles * pool_h)
    if n:
        with on_device_of(y):
            image = _padded_image(x)
            _stem_pool_kernel[(n * triton.cdiv(pool_h, strip_rows) * tiles * triton.cdiv(k, config.block_n),)](
                image,
                _padded(tap_major(w), image.shape[3]),
                *frozen,
                y,
                k,
                *x.shape[2:],
                out_h,
                out_w,
                pool_h,
                pool_w,
                strip_rows,
                **_constants(w.shape, x, geometry, config),
            )
    return y


def _wgrad_chunks(pixels: int) -> int:
    """Into how many chunks the pixels are split: 768 programs, two rounds of three on each of 132 SMs, of 512 pixels or
    more. The partial results of a 7x7 kernel with 64 channels stay below 30 MB."""
    return max(1, min(768, triton.cdiv(pixels, 512)))


def launch_stem_wgrad(a, grad, w_shape, geometry, plan):
    """dw = sum over pixels of g times the shifted image, [K, C, R, S] fp32 in channels_last memory.

    a: Deferred(x [N, C, H, W], None), C up to four; grad: Gradient with g [N, K, P, Q] alone, not deferred. The tile is
    block_m output channels x block_n values of a kernel row, block_k pixels deep. Chunks of pixels, as many as the
    shape says, are added up by PyTorch's sum, whose order is fixed.
    """
    if a.bn is not None:
        raise ValueError("a.bn: an image comes without a BatchNorm in front of it")
    if grad.mask is not None or grad.coef is not None:
        raise ValueError("grad: has to be written out (bn_backward_apply) first")
    x, g, config = require_rows("x", a.c), require_rows("grad", grad.g), plan.config
    k, c, r, s = w_shape
    out_hw = _check_image(x, w_shape, geometry, config.block_n)
    if g.shape != (x.shape[0], k, *out_hw) or g.dtype != x.dtype:
        raise ValueError(f"grad is {tuple(g.shape)} {g.dtype}; expected {(x.shape[0], k, *out_hw)} {x.dtype}")
    pixels = g.shape[0] * out_hw[0] * out_hw[1]
    chunks = _wgrad_chunks(pixels)
    chunk_pixels = triton.cdiv(triton.cdiv(pixels, chunks), config.block_k) * config.block_k
    require_pixels(x, chunks * chunk_pixels + config.block_k)
    parts = torch.empty((chunks, k, r, s, c), dtype=torch.float32, device=g.device)
    with on_device_of(g):
        _stem_wgrad_kernel[(chunks * triton.cdiv(k, config.block_m),)](
            _padded_image(x),
            g,
            parts,
            k,
            c,
            pixels,
            *x.shape[2:],
            *out_hw,
            chunk_pixels,
            **_constants(w_shape, x, geometry, config),
        )
    return parts.sum(0).permute(0, 3, 1, 2)
