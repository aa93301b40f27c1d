"""The library's convolution with one fused pass around it: for groups, dilation, and wherever the library is faster.

The convolution is PyTorch's own (cuDNN on a GPU). What a fused kernel would do in its prologue is one elementwise pass
in front of it, what it would do in its epilogue one pass behind, over rows [pixels, C]:

    statistics  partials[t] = (count, mean, M2) over chunk t of consecutive pixels of the raw output
    affine      out = c * scale + shift  [+ residual]  [relu]                                    (`bn.launch_affine`)
    pool        max over 3x3 windows, stride 2, padding 1, of relu(c * scale + shift)              (`pool.launch_pool`)
    gradient    dx += addend (where its mask) on every addend_stride-th row and column; with relu_of: dx = dx where
                relu_of's affine > 0, sums[t] = (sum dx, sum dx * xhat) over chunk t

The statistics are of the rounded output, since the accumulators are gone; both differ from the exact ones by less than
the rounding of a single value does. Passes are deterministic; the convolution is where PyTorch's switches say so.
"""

import torch
import torch.nn.functional as F
import triton
import triton.language as tl

from . import bn as passes
from . import (
    map_options,
    on_device_of,
    pool,
    require_addend,
    require_frozen,
    require_like,
    require_rows,
    require_vectors,
)
from .epilogue import (
    BN_MEAN,
    BN_RSTD,
    BN_SCALE,
    BN_SHIFT,
    affine,
    load_addend,
    load_vector,
    reduce_statistics,
    store_statistics,
)


@triton.jit(do_not_specialize=["pixels", "chunk_pixels"])
def _channel_statistics_kernel(
    c_ptr,  # [pixels, channels]
    partials_ptr,  # [chunks, 3, channels] fp32
    pixels,
    channels,
    chunk_pixels,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
):
    """One program per chunk and channel tile. Each element of a tile runs Welford's recurrence over the chunk's tiles,
    so that threads exchange values once, at the end."""
    tiles_n = tl.cdiv(channels, BLOCK_N)
    chunk = tl.program_id(0) // tiles_n
    cols = tl.program_id(0) % tiles_n * BLOCK_N + tl.arange(0, BLOCK_N)
    start = chunk * chunk_pixels
    stop = tl.minimum(start + chunk_pixels, pixels)
    elements = tl.arange(0, BLOCK_M)[:, None] * channels + cols[None, :]  # [BLOCK_M, BLOCK_N]
    count = tl.zeros((BLOCK_M,), dtype=tl.float32)
    mean = tl.zeros((BLOCK_M, BLOCK_N), dtype=tl.float32)
    m2 = tl.zeros((BLOCK_M, BLOCK_N), dtype=tl.float32)
    for tile in range(tl.cdiv(stop - start, BLOCK_M)):
        row0 = start + tile * BLOCK_M
        valid_rows = row0 + tl.arange(0, BLOCK_M) < stop
        valid = valid_rows[:, None] & (cols < channels)[None, :]
        c = tl.load(c_ptr + row0.to(tl.int64) * channels + elements, mask=valid, other=0.0).to(tl.float32)
        count += tl.where(valid_rows, 1.0, 0.0)
        delta = tl.where(valid, c - mean, 0.0)
        mean += delta * (1.0 / tl.maximum(count, 1.0))[:, None]
        m2 += delta * (c - mean)
    total = tl.sum(count, axis=0)
    mean, m2 = reduce_statistics(total, count[:, None], mean, m2)
    store_statistics(partials_ptr + chunk.to(tl.int64) * 3 * channels + cols, total, mean, m2, cols, channels)


@triton.jit(do_not_specialize=["pixels", "in_h", "in_w", "chunk_pixels"])
def _dgrad_pass_kernel(
    dx_ptr,  # [pixels, channels], read and written
    relu_ptr,  # [pixels, channels] | None
    relu_bn_ptr,  # [5, channels] fp32 | None
    addend_ptr,  # [every ADDEND_STRIDE-th pixel, channels] | None
    addend_mask_ptr,  # ReLU bits of it | None
    sums_ptr,  # [chunks, 2, channels] fp32 | None
    pixels,
    channels,
    in_h,
    in_w,
    chunk_pixels,
    ADDEND_STRIDE: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
):
    tiles_n = tl.cdiv(channels, BLOCK_N)
    chunk = tl.program_id(0) // tiles_n
    cols = tl.program_id(0) % tiles_n * BLOCK_N + tl.arange(0, BLOCK_N)
    start = chunk * chunk_pixels
    stop = tl.minimum(start + chunk_pixels, pixels)
    elements = tl.arange(0, BLOCK_M)[:, None] * channels + cols[None, :]  # [BLOCK_M, BLOCK_N]
    total_g = tl.zeros((BLOCK_M, BLOCK_N), dtype=tl.float32)
    total_x = tl.zeros((BLOCK_M, BLOCK_N), dtype=tl.float32)
    for tile in range(tl.cdiv(stop - start, BLOCK_M)):
        row0 = start + tile * BLOCK_M
        tile_start = row0.to(tl.int64) * channels
        rows = row0 + tl.arange(0, BLOCK_M)
        valid = (rows < stop)[:, None] & (cols < channels)[None, :]
        dx = tl.load(dx_ptr + tile_start + elements, mask=valid, other=0.0).to(tl.float32)
        if addend_ptr is not None:
            image = rows // (in_h * in_w)
            h = rows // in_w % in_h
            dx += load_addend(
                addend_ptr, addend_mask_ptr, image, h, rows % in_w, rows < stop, cols, in_h, in_w, channels,
                ADDEND_STRIDE,
            )  # fmt: skip
        if relu_ptr is not None:
            c = tl.load(relu_ptr + tile_start + elements, mask=valid, other=0.0).to(tl.float32)
            scale = load_vector(relu_bn_ptr, BN_SCALE, channels, cols)
            shift = load_vector(relu_bn_ptr, BN_SHIFT, channels, cols)
            dx = tl.where(valid & (affine(c, scale, shift) > 0), dx, 0.0)
            total_g += dx
            total_x += dx * (c - load_vector(relu_bn_ptr, BN_MEAN, channels, cols)[None, :])
        tl.store(dx_ptr + tile_start + elements, dx.to(dx_ptr.dtype.element_ty), mask=valid)
    if sums_ptr is not None:
        row_ptr = sums_ptr + chunk.to(tl.int64) * 2 * channels + cols
        sum_x = tl.sum(total_x, axis=0) * load_vector(relu_bn_ptr, BN_RSTD, channels, cols)
        tl.store(row_ptr, tl.sum(total_g, axis=0), mask=cols < channels)
        tl.store(row_ptr + channels, sum_x, mask=cols < channels)


def _written_out(a, plan):
    """relu(bn(a)) in memory: a.c itself if nothing is deferred."""
    return require_rows("a", a.c) if a.bn is None else passes.launch_bn_act(a, True, plan)


def _gradient_written_out(grad, plan):
    if grad.mask is None and grad.coef is None:
        return require_rows("g", grad.g)
    return passes.launch_bn_backward_apply(grad, plan)


def _convolve(x, w, geometry):
    if w.dtype != x.dtype:
        raise ValueError(f"weight is {w.dtype}; expected {x.dtype}")
    c = F.conv2d(x, w, None, *geometry)
    return c.contiguous(memory_format=torch.channels_last)


def _grid(pixels: int, channels: int, rows: int | None, plan) -> tuple[tuple[int], int]:
    """Grid and pixels per program: a program per row of sums, or per tile."""
    tiles_n = triton.cdiv(channels, plan.config.block_n)
    if rows is None:
        return (triton.cdiv(pixels, plan.config.block_m) * tiles_n,), plan.config.block_m
    return (rows * tiles_n,), plan.chunk_pixels(pixels, rows)


def launch_library_stats(a, w, geometry, plan):
    """c = conv(relu(bn(a)), w) by the library, and channel statistics of c in one pass behind it.

    a: Deferred(c [N, C, H, W], bn [5, C] | None); w [K, C / groups, R, S]; any geometry. Returns (c [N, K, P, Q] in a's
    dtype, partials [T, 3, K] fp32: count, mean and M2 over each chunk of pixels).
    """
    c = _convolve(_written_out(a, plan), w, geometry)
    n, k, p, q = c.shape
    rows = plan.statistics_rows(k)
    grid, chunk_pixels = _grid(n * p * q, k, rows, plan)
    partials = torch.empty((rows, 3, k), dtype=torch.float32, device=c.device)
    with on_device_of(c):
        _channel_statistics_kernel[grid](c, partials, n * p * q, k, chunk_pixels, **map_options(plan.config))
    return c, partials


def launch_library_affine(x, w, bn, residual, relu, geometry, plan):
    """out = conv(x, w) * scale + shift [+ residual] [relu]: the library's convolution, then one pass.

    bn: Frozen(mean, var, gamma | None, beta | None, eps), running statistics [K] in any floating dtype.
    """
    frozen = require_frozen(bn, w.shape[0])
    c = _convolve(require_rows("x", x), w, geometry)
    if residual is not None:
        require_like("residual", residual, c)
    table = passes.launch_bn_frozen(*frozen, plan)
    return passes.launch_affine(c, table, residual, None, None, relu, plan)


def launch_library_affine_pool(x, w, bn, geometry, plan):
    """y = max_pool(relu(conv(x, w) * scale + shift), 3x3, stride 2, padding 1): the library's convolution, then a pass.

    bn: Frozen(mean, var, gamma | None, beta | None, eps), running statistics [K] in any floating dtype.
    """
    table = passes.launch_bn_frozen(*require_frozen(bn, w.shape[0]), plan)
    return pool.launch_pool(_convolve(require_rows("x", x), w, geometry), table, False, plan)[0]


def launch_library_dgrad(grad, w, geometry, input_hw, relu_of, addend, addend_stride, plan):
    """dx = conv_transpose(dc, w) + addend by the library, [N, C, H, W]; mask, addend and sums in one pass behind it.

    Arguments and results as `reference.conv_dgrad`; sums [T, 2, C] fp32. A deferred gradient is written out first.
    """
    g = _gradient_written_out(grad, plan)
    n, c = g.shape[0], w.shape[1] * geometry.groups
    dx = torch.ops.aten.convolution_backward(
        g, g.new_empty(n, c, *input_hw), w, None, *geometry[:3], False, [0, 0], geometry.groups, [True, False, False]
    )[0].contiguous(memory_format=torch.channels_last)
    if relu_of is not None:
        require_like("relu_of", relu_of.c, dx)
        require_vectors("relu_of.bn", relu_of.bn, 5, c)
    if addend is not None:
        require_addend(addend, addend_stride, dx)
    if relu_of is None and addend is None:
        return dx, None
    pixels, rows = n * input_hw[0] * input_hw[1], plan.statistics_rows(c)
    sums = None if relu_of is None else torch.empty((rows, 2, c), dtype=torch.float32, device=dx.device)
    grid, chunk_pixels = _grid(pixels, c, None if sums is None else rows, plan)
    if grid[0]:
        with on_device_of(dx):
            _dgrad_pass_kernel[grid](
                dx,
                None if relu_of is None else relu_of.c,
                None if relu_of is None else relu_of.bn,
                None if addend is None else addend.g,
                None if addend is None else addend.mask,
                sums,
                pixels,
                c,
                *input_hw,
                chunk_pixels,
                ADDEND_STRIDE=addend_stride,
                **map_options(plan.config),
            )
    return dx, sums


def launch_library_wgrad(a, grad, w_shape, geometry, plan):
    """dw = sum over pixels of dc times the shifted relu(bn(a)) by the library, w_shape, fp32 in channels_last memory.

    Deferred operands are written out first.
    """
    x, g = _written_out(a, plan), _gradient_written_out(grad, plan)
    w = torch.empty(w_shape, dtype=g.dtype, device=g.device, memory_format=torch.channels_last)
    dw = torch.ops.aten.convolution_backward(
        g, x, w, None, *geometry[:3], False, [0, 0], geometry.groups, [False, True, False]
    )[1]
    return dw.to(torch.float32, memory_format=torch.channels_last)
