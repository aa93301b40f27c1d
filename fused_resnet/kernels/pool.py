"""Max-pool 3x3, stride 2, padding 1, of relu(c * scale + shift), forward and backward, without that map in memory.

c [N, C, H, W] is the raw output of the stem's convolution, (mean, rstd, scale, shift, inv_count) the rows of bn
[5, C], y [N, C, ceil(H/2), ceil(W/2)]. Window (p, q) covers the pixels (2 p - 1 + r, 2 q - 1 + s), 0 <= r, s < 3:

    forward     y = max over r, s of relu(c * scale + shift)      index = 3 r + s of the winner, uint8
    backward    da[h, w] = sum of dy over the windows whose winner is (h, w)
                g = da where c * scale + shift > 0
                sums[t] = (sum g, sum g * xhat) over chunk t, xhat = (c - mean) * rstd

As in PyTorch the values are rounded to the dtype of c before they are compared, the first of equal ones wins, and a NaN
wins over everything but a later NaN. Padding never wins: what is in the image is at least 0.

Forward, the nine taps of neighbouring windows overlap: c crosses memory once and comes from the caches 2.25 times.
Backward gathers, so that nothing is added atomically. A pixel belongs to one, two or four windows, by its parity: a
program takes the 2 x 2 pixels (2 p + i, 2 q + j), which are in the windows (p + di, q + dj) alone, with di <= i and
dj <= j, at the tap (i + 1 - 2 di, j + 1 - 2 dj). Sums over a chunk of such blocks run in fp32, in a fixed order.
"""

import torch
import triton
import triton.language as tl

from . import empty_rows, map_options, on_device_of, require_pixels, require_rows, require_vectors
from .epilogue import BN_MEAN, BN_RSTD, BN_SCALE, BN_SHIFT, affine, load_vector, relu

# Added to a row that is not to be read: no tap brings it back into the image.
_OUTSIDE = tl.constexpr(-(2**30))


@triton.jit(do_not_specialize=["windows", "in_h", "in_w", "out_h", "out_w"])
def _bn_act_pool_kernel(
    c_ptr,  # [pixels, channels]
    bn_ptr,  # [5, channels] fp32
    y_ptr,  # [windows, channels]
    index_ptr,  # [windows, channels] uint8 | None
    windows,
    channels,
    in_h,
    in_w,
    out_h,
    out_w,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
):
    tiles_n = tl.cdiv(channels, BLOCK_N)
    rows = tl.program_id(0) // tiles_n * BLOCK_M + tl.arange(0, BLOCK_M)
    cols = tl.program_id(0) % tiles_n * BLOCK_N + tl.arange(0, BLOCK_N)
    h0 = rows // out_w % out_h * 2 - 1
    w0 = rows % out_w * 2 - 1
    origin = (rows // (out_h * out_w) * in_h + h0).to(tl.int64) * in_w + w0  # of tap (0, 0), may lie outside
    h0 = tl.where(rows < windows, h0, _OUTSIDE)
    scale = load_vector(bn_ptr, BN_SCALE, channels, cols)
    shift = load_vector(bn_ptr, BN_SHIFT, channels, cols)
    best = tl.full((BLOCK_M, BLOCK_N), -1.0, dtype=tl.float32)
    winner = tl.zeros((BLOCK_M, BLOCK_N), dtype=tl.int32)
    for r in tl.static_range(3):
        for s in tl.static_range(3):
            inside = (h0 + r >= 0) & (h0 + r < in_h) & (w0 + s >= 0) & (w0 + s < in_w)
            valid = inside[:, None] & (cols < channels)[None, :]
            pixel = origin + (r * in_w + s)
            c = tl.load(c_ptr + pixel[:, None] * channels + cols[None, :], mask=valid, other=0.0)
            a = relu(affine(c.to(tl.float32), scale, shift)).to(c.dtype).to(tl.float32)
            wins = valid & ((a > best) | (a != a))
            best = tl.where(wins, a, best)
            winner = tl.where(wins, 3 * r + s, winner)
    elements = rows.to(tl.int64)[:, None] * channels + cols[None, :]
    valid = (rows < windows)[:, None] & (cols < channels)[None, :]
    tl.store(y_ptr + elements, best.to(y_ptr.dtype.element_ty), mask=valid)
    if index_ptr is not None:
        tl.store(index_ptr + elements, winner.to(tl.uint8), mask=valid)


@triton.jit(do_not_specialize=["blocks", "in_h", "in_w", "out_h", "out_w", "chunk_blocks"])
def _bn_act_pool_backward_kernel(
    dy_ptr,  # [windows, channels]
    index_ptr,  # [windows, channels] uint8
    c_ptr,  # [pixels, channels]
    bn_ptr,  # [5, channels] fp32
    g_ptr,  # [pixels, channels]
    sums_ptr,  # [T, 2, channels] fp32
    blocks,  # of 2 x 2 pixels, as many as windows
    channels,
    in_h,
    in_w,
    out_h,
    out_w,
    chunk_blocks,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
):
    tiles_n = tl.cdiv(channels, BLOCK_N)
    chunk = tl.program_id(0) // tiles_n
    cols = tl.program_id(0) % tiles_n * BLOCK_N + tl.arange(0, BLOCK_N)
    start = chunk * chunk_blocks
    stop = tl.minimum(start + chunk_blocks, blocks)
    sums_row_ptr = sums_ptr + chunk.to(tl.int64) * 2 * channels + cols
    if start >= blocks:
        tl.store(sums_row_ptr, tl.zeros((BLOCK_N,), dtype=tl.float32), mask=cols < channels)
        tl.store(sums_row_ptr + channels, tl.zeros((BLOCK_N,), dtype=tl.float32), mask=cols < channels)
        return
    scale = load_vector(bn_ptr, BN_SCALE, channels, cols)
    shift = load_vector(bn_ptr, BN_SHIFT, channels, cols)
    mean = load_vector(bn_ptr, BN_MEAN, channels, cols)
    rstd = load_vector(bn_ptr, BN_RSTD, channels, cols)
    # Tiles are added up elementwise and reduced once: fewer exchanges between threads, shorter chains of additions.
    total_g = tl.zeros((BLOCK_M, BLOCK_N), dtype=tl.float32)
    total_x = tl.zeros((BLOCK_M, BLOCK_N), dtype=tl.float32)
    for row0 in range(start, stop, BLOCK_M):
        rows = row0 + tl.arange(0, BLOCK_M)
        p = rows // out_w % out_h
        q = rows % out_w
        origin = (rows // (out_h * out_w) * in_h + 2 * p).to(tl.int64) * in_w + 2 * q
        # All that a block needs is loaded before anything is stored: the compiler moves no load over a store.
        gradients, winners, maps, pixels, inside = (), (), (), (), ()
        for k in tl.static_range(4):  # window (p + k // 2, q + k % 2) and pixel (2 p + k // 2, 2 q + k % 2)
            valid = (rows < stop) & (p + k // 2 < out_h) & (q + k % 2 < out_w)
            valid = valid[:, None] & (cols < channels)[None, :]
            windows = (rows.to(tl.int64) + k // 2 * out_w + k % 2)[:, None] * channels + cols[None, :]
            gradients = gradients + (tl.load(dy_ptr + windows, mask=valid, other=0.0),)
            winners = winners + (tl.load(index_ptr + windows, mask=valid, other=255),)
            valid = (rows < stop) & (2 * p + k // 2 < in_h) & (2 * q + k % 2 < in_w)
            inside = inside + (valid[:, None] & (cols < channels)[None, :],)
            pixels = pixels + ((origin + k // 2 * in_w + k % 2)[:, None] * channels + cols[None, :],)
            maps = maps + (tl.load(c_ptr + pixels[k], mask=inside[k], other=0.0),)
        for k in tl.static_range(4):
            g = tl.zeros((BLOCK_M, BLOCK_N), dtype=tl.float32)
            for di in tl.static_range(k // 2 + 1):
                for dj in tl.static_range(k % 2 + 1):
                    won = winners[2 * di + dj] == 3 * (k // 2 + 1 - 2 * di) + k % 2 + 1 - 2 * dj
                    g += tl.where(won, gradients[2 * di + dj].to(tl.float32), 0.0)
            c = maps[k].to(tl.float32)
            g = tl.where(inside[k] & (affine(c, scale, shift) > 0), g, 0.0)
            tl.store(g_ptr + pixels[k], g.to(g_ptr.dtype.element_ty), mask=inside[k])
            total_g += g
            total_x += g * ((c - mean[None, :]) * rstd[None, :])
    tl.store(sums_row_ptr, tl.sum(total_g, axis=0), mask=cols < channels)
    tl.store(sums_row_ptr + channels, tl.sum(total_x, axis=0), mask=cols < channels)


def _pooled_hw(c, bn) -> tuple[int, int]:
    """Check a map and its BatchNorm; height and width of the pooled output."""
    require_rows("a", c)
    require_vectors("a.bn", bn, 5, c.shape[1])
    return (c.shape[2] + 1) // 2, (c.shape[3] + 1) // 2


def launch_pool(c, bn, with_index, plan):
    """`launch_bn_act_pool`; without `with_index` the taps are None: the pass behind the library's convolution."""
    out_h, out_w = _pooled_hw(c, bn)
    n, channels, in_h, in_w = c.shape
    y = empty_rows(n, channels, out_h, out_w, c)
    index = torch.empty_like(y, dtype=torch.uint8) if with_index else None
    windows, config = n * out_h * out_w, plan.config
    require_pixels(c, windows + config.block_m)
    if windows:
        with on_device_of(y):
            _bn_act_pool_kernel[(triton.cdiv(windows, config.block_m) * triton.cdiv(channels, config.block_n),)](
                c, bn, y, index, windows, channels, in_h, in_w, out_h, out_w, **map_options(config)
            )
    return y, index


def launch_bn_act_pool(a, plan):
    """y = max_pool(relu(c * scale + shift), 3x3, stride 2, padding 1) in c's dtype, and the winning taps, uint8.

    a: Deferred(c [N, C, H, W], bn [5, C]); both results are [N, C, ceil(H/2), ceil(W/2)] in channels_last memory.
    """
    return launch_pool(*a, True, plan)


def launch_bn_act_pool_backward(dy, index, a, plan):
    """g [N, C, H, W] in dy's dtype: dy at its window's winner where c * scale + shift > 0; and sums [T, 2, C] fp32.

    dy and index [N, C, ceil(H/2), ceil(W/2)], index as `launch_bn_act_pool` gave it; a: Deferred(c, bn).
    """
    out_h, out_w = _pooled_hw(*a)
    n, channels, in_h, in_w = a.c.shape
    pooled = (n, channels, out_h, out_w)
    if dy.shape != pooled or dy.dtype != a.c.dtype:
        raise ValueError(f"dy is {tuple(dy.shape)} {dy.dtype}; expected {pooled} {a.c.dtype}")
    if index.shape != pooled or index.dtype != torch.uint8:
        raise ValueError(f"index is {tuple(index.shape)} {index.dtype}; expected {pooled} {torch.uint8}")
    require_rows("dy", dy)
    require_rows("index", index)
    rows = plan.statistics_rows(channels)
    blocks = n * out_h * out_w
    chunk_blocks = plan.chunk_pixels(blocks, rows)
    require_pixels(a.c, rows * chunk_blocks)
    g = empty_rows(*a.c.shape, like=dy)
    sums = torch.empty((rows, 2, channels), dtype=torch.float32, device=g.device)
    with on_device_of(g):
        _bn_act_pool_backward_kernel[(rows * triton.cdiv(channels, plan.config.block_n),)](
            dy,
            index,
            a.c,
            a.bn,
            g,
            sums,
            blocks,
            channels,
            in_h,
            in_w,
            out_h,
            out_w,
            chunk_blocks,
            **map_options(plan.config),
        )
    return g, sums
