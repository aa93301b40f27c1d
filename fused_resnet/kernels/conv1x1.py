"""1x1 convolution with its neighbours: deferred BatchNorm + ReLU on load, statistics or affine + residual + ReLU after.

A 1x1 convolution in channels_last memory is a GEMM over pixels, acc[m, n] = sum_k a[m, k] w[n, k], with

    a [M, K]  rows of the input; with a prologue relu(a * scale_a + shift_a), zero beyond K **after** the affine
    w [N, K]  the weight [N, K, 1, 1] as it lies in memory
    M         output pixels n * P * Q; with a stride the row of the input is found by pixel arithmetic

and one of two epilogues on the fp32 accumulators:

    statistics  c = acc, cast; partials[t] = (count, mean, M2) of acc over chunk t of consecutive pixels
    affine      out = acc * scale + shift  [+ residual | + (x_s w_s) * scale_s + shift_s]  [relu], cast; mask = out > 0

The second GEMM of the affine epilogue is a downsample. Its scale differs from the main one per output channel, so
the two sides keep accumulators of their own: folding the scales into 16-bit weights would round them.

These products are bound by memory, and next by the instructions around them, not by arithmetic. So a program has as few
registers and conditions as can be: two or more blocks share an SM and hide each other's latency. Where statistics are
kept, a program has many tiles of pixels, each thread those of its own rows until the last, and the weight is loaded
once if its depth is one step. Else a program has one tile, without a loop, and its residual is under way before the
product is.

Tried on compiled code (sm90), of no help: statistics carried in memory from tile to tile (every thread of a column
loads them: 20 registers more); 32-bit offsets alone (a thread has few rows); ReLU bits gathered in words of 32 (30
instructions less here, 40 more in the join of `bn`); 128 channels of a tile beside a residual (one block on an SM). TMA
descriptors bring an affine epilogue from 76 registers to about 60, but do without strides and odd channels, and have to
be encoded on the host at every launch.

Precision: products of the operands' dtype, fp32 accumulation; fp32 operands as TF32 if PyTorch's switch for
convolutions allows it. Bits do not depend on the grid: every output is written by one program, in a fixed order.
"""

import torch
import triton
import triton.language as tl

from . import (
    empty_mask,
    empty_rows,
    input_precision,
    on_device_of,
    require_frozen,
    require_like,
    require_pixels,
    require_pointwise,
    require_rows,
    require_vectors,
    tile_options,
)
from .epilogue import (
    BN_SCALE,
    BN_SHIFT,
    affine,
    frozen_vectors,
    input_rows,
    load_vector,
    merge_statistics,
    reduce_statistics,
    relu,
    store_mask,
    store_statistics,
)


@triton.jit
def _input_tile(
    a_ptr,
    a_bn_ptr,
    row0,
    row_limit,
    k0,
    gemm_k,
    in_h,
    in_w,
    out_h,
    out_w,
    STRIDE: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    """relu(bn(a)) [BLOCK_M, BLOCK_K] of the output pixels from row0 and the channels from k0; a_bn_ptr None: a.

    Zero beyond the last channel, as scale and shift are there. Beyond the last pixel it is the last one again, of which
    nothing is stored: conditions on rows would take more instructions than the product.
    """
    row = tl.minimum(tl.arange(0, BLOCK_M), row_limit - row0 - 1)
    if STRIDE == 1:
        # Only the start of the tile can pass 2^31 elements; 64-bit offsets for all of them would cost registers.
        a_ptr += row0.to(tl.int64) * gemm_k
    else:
        row = input_rows(row0 + row, in_h, in_w, out_h, out_w, STRIDE)
    depth = k0 + tl.arange(0, BLOCK_K)
    a = tl.load(a_ptr + (row[:, None] * gemm_k + depth[None, :]), mask=(depth < gemm_k)[None, :], other=0.0)
    if a_bn_ptr is not None:
        scale = load_vector(a_bn_ptr, BN_SCALE, gemm_k, depth)
        shift = load_vector(a_bn_ptr, BN_SHIFT, gemm_k, depth)
        a = relu(affine(a.to(tl.float32), scale, shift)).to(a.dtype)
    return a


@triton.jit
def _weight_tile(w_ptr, first_col, gemm_n, k0, gemm_k, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr):
    """w [BLOCK_N, BLOCK_K] from output channel first_col and input channel k0, with edges as in `_input_tile`."""
    col = tl.minimum(tl.arange(0, BLOCK_N), gemm_n - first_col - 1)
    depth = k0 + tl.arange(0, BLOCK_K)
    elements = col[:, None] * gemm_k + depth[None, :]
    return tl.load(w_ptr + first_col.to(tl.int64) * gemm_k + elements, mask=(depth < gemm_k)[None, :], other=0.0)


@triton.jit
def _gemm_tile(
    a_ptr,
    a_bn_ptr,
    w_ptr,
    row0,
    row_limit,
    first_col,
    gemm_n,
    gemm_k,
    in_h,
    in_w,
    out_h,
    out_w,
    STRIDE: tl.constexpr,
    INPUT_PRECISION: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    """acc [BLOCK_M, BLOCK_N] = relu(bn(a)) w^T in fp32 of the pixels from row0, channels from first_col."""
    acc = tl.zeros((BLOCK_M, BLOCK_N), dtype=tl.float32)
    for k0 in range(0, gemm_k, BLOCK_K):
        a = _input_tile(
            a_ptr, a_bn_ptr, row0, row_limit, k0, gemm_k, in_h, in_w, out_h, out_w, STRIDE, BLOCK_M, BLOCK_K
        )
        w = _weight_tile(w_ptr, first_col, gemm_n, k0, gemm_k, BLOCK_N, BLOCK_K)
        acc = tl.dot(a, tl.trans(w), acc, input_precision=INPUT_PRECISION)
    return acc


@triton.jit
def _pair_statistics(x, row0, row_limit):
    """Counts [M // 16, 8, 1], means and M2 [M // 16, 8, N] of the rows r and r + 8 of each 16 of x [M, N], in pairs.

    One thread holds both in the tensor cores' layout, so nothing passes between threads. ``row0`` is the index of the
    first row; those from ``row_limit`` on do not count.
    """
    pairs = tl.reshape(x, (x.shape[0] // 16, 2, 8, x.shape[1]))
    first, second = tl.split(tl.permute(pairs, (0, 2, 3, 1)))  # [M // 16, 8, N]
    row = row0 + 16 * tl.arange(0, x.shape[0] // 16)[:, None, None] + tl.arange(0, 8)[None, :, None]
    count = (row < row_limit).to(tl.float32) + (row + 8 < row_limit).to(tl.float32)
    second = tl.where(row + 8 < row_limit, second, first)
    deviation = 0.5 * (first - second)
    return count, second + deviation, 2.0 * deviation * deviation


# One compilation serves every batch and image size: extents of maps gain nothing from being known to be even.
@triton.jit(do_not_specialize=["gemm_m", "in_h", "in_w", "out_h", "out_w", "chunk_pixels"])
def _conv1x1_fwd_kernel(
    a_ptr,  # [pixels in, gemm_k]
    a_bn_ptr,  # [5, gemm_k] fp32 | None
    w_ptr,  # [gemm_n, gemm_k]
    out_ptr,  # [gemm_m, gemm_n]
    partials_ptr,  # [chunks, 3, gemm_n] fp32 | None: affine epilogue
    bn_ptr,  # [5, gemm_n] fp32 | None: running statistics or a statistics epilogue
    mean_ptr,  # [gemm_n] and the next three: running statistics | None
    var_ptr,
    gamma_ptr,
    beta_ptr,
    eps,
    residual_ptr,  # [gemm_m, gemm_n] | None
    mask_ptr,  # [gemm_m, ceil(gemm_n / 8)] uint8 | None
    shortcut_ptr,  # [shortcut pixels, shortcut_k] | None: no second GEMM
    shortcut_w_ptr,  # [gemm_n, shortcut_k] | None
    shortcut_bn_ptr,  # [5, gemm_n] fp32 | None
    gemm_m,
    gemm_n,
    gemm_k,
    shortcut_k,
    in_h,  # of the strided input: the shortcut if there is a second GEMM, else a
    in_w,
    out_h,
    out_w,
    chunk_pixels,  # pixels of a program, a multiple of BLOCK_M
    STRIDE: tl.constexpr,
    RELU: tl.constexpr,
    WHOLE_DEPTH: tl.constexpr,  # gemm_k <= BLOCK_K, one step, for many tiles
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

    tiles = 1
    if partials_ptr is not None:
        tiles = tl.cdiv(stop - start, BLOCK_M)
        count = tl.zeros((BLOCK_M // 16, 8, 1), dtype=tl.float32)
        mean = tl.zeros((BLOCK_M // 16, 8, BLOCK_N), dtype=tl.float32)
        m2 = tl.zeros((BLOCK_M // 16, 8, BLOCK_N), dtype=tl.float32)
    if WHOLE_DEPTH:
        w = _weight_tile(w_ptr, first_col, gemm_n, 0, gemm_k, BLOCK_N, BLOCK_K)
    # Addresses hoisted out of the loop would live in registers through its epilogue.
    for tile in tl.range(tiles, disable_licm=True):
        row0 = start + tile * BLOCK_M
        row = tl.arange(0, BLOCK_M)
        # Only the start of the tile can pass 2^31 elements; 64-bit offsets for all of them would cost registers.
        tile_start = row0.to(tl.int64) * gemm_n
        elements = row[:, None] * gemm_n + cols[None, :]  # [BLOCK_M, BLOCK_N]
        valid_rows = row0 + row < stop
        valid = valid_rows[:, None] & (cols < gemm_n)[None, :]
        if residual_ptr is not None:
            # Under way while the product waits for its operands.
            residual = tl.load(residual_ptr + tile_start + elements, mask=valid, other=0.0)
        if WHOLE_DEPTH:
            a = _input_tile(a_ptr, a_bn_ptr, row0, stop, 0, gemm_k, in_h, in_w, out_h, out_w, STRIDE, BLOCK_M, BLOCK_K)
            acc = tl.dot(a, tl.trans(w), input_precision=INPUT_PRECISION)
        else:
            acc = _gemm_tile(
                a_ptr,
                a_bn_ptr,
                w_ptr,
                row0,
                stop,
                first_col,
                gemm_n,
                gemm_k,
                in_h,
                in_w,
                out_h,
                out_w,
                STRIDE if shortcut_ptr is None else 1,
                INPUT_PRECISION,
                BLOCK_M,
                BLOCK_N,
                BLOCK_K,
            )
        if partials_ptr is not None:
            count, mean, m2 = merge_statistics(count, mean, m2, *_pair_statistics(acc, row0, stop))
        if bn_ptr is not None:
            acc = affine(acc, load_vector(bn_ptr, BN_SCALE, gemm_n, cols), load_vector(bn_ptr, BN_SHIFT, gemm_n, cols))
        if var_ptr is not None:
            scale, shift = frozen_vectors(mean_ptr, var_ptr, gamma_ptr, beta_ptr, eps, gemm_n, cols)
            acc = affine(acc, scale, shift)
        if residual_ptr is not None:
            acc += residual.to(tl.float32)
        if shortcut_ptr is not None:
            side = _gemm_tile(
                shortcut_ptr,
                None,
                shortcut_w_ptr,
                row0,
                stop,
                first_col,
                gemm_n,
                shortcut_k,
                in_h,
                in_w,
                out_h,
                out_w,
                STRIDE,
                INPUT_PRECISION,
                BLOCK_M,
                BLOCK_N,
                BLOCK_K,
            )
            acc += affine(
                side,
                load_vector(shortcut_bn_ptr, BN_SCALE, gemm_n, cols),
                load_vector(shortcut_bn_ptr, BN_SHIFT, gemm_n, cols),
            )
        if RELU:
            acc = relu(acc)
        out = acc.to(out_ptr.dtype.element_ty)
        tl.store(out_ptr + tile_start + elements, out, mask=valid)
        if mask_ptr is not None:
            store_mask(mask_ptr, out > 0, row0, stop, first_col, gemm_n, BLOCK_M, BLOCK_N)

    if partials_ptr is not None:
        total = tl.maximum(stop - start, 0).to(tl.float32)
        count = tl.reshape(count, (BLOCK_M // 2, 1))
        mean = tl.reshape(mean, (BLOCK_M // 2, BLOCK_N))
        mean, m2 = reduce_statistics(total, count, mean, tl.reshape(m2, (BLOCK_M // 2, BLOCK_N)))
        store_statistics(partials_ptr + chunk.to(tl.int64) * 3 * gemm_n + cols, total, mean, m2, cols, gemm_n)


def _check_operands(name: str, x, w) -> None:
    require_rows(name, x)
    if tuple(w.shape[1:]) != (x.shape[1], 1, 1) or w.dtype != x.dtype or not w.flatten(1).is_contiguous():
        raise ValueError(f"weight of {name} is {tuple(w.shape)} {w.dtype}; expected [N, {x.shape[1]}, 1, 1] {x.dtype}")


_NO_BN = (None, None, None, None, 0.0)


def _launch(
    x, bn_in, w, out, plan, *, stride=1, partials=None, bn=None, frozen=_NO_BN, residual=None, mask=None, relu=False,
    side=None,
):  # fmt: skip
    """Launch the kernel on checked operands. ``side``: (x_s, w_s, bn_s) of a second GEMM, strided by ``stride``."""
    (n, gemm_n, out_h, out_w), gemm_k, config = out.shape, x.shape[1], plan.config
    gemm_m = n * out_h * out_w
    side_x, side_w, side_bn = side or (None, None, None)
    strided = x if side is None else side_x
    if partials is None:
        chunks, chunk_pixels = triton.cdiv(gemm_m, config.block_m), config.block_m
    else:
        chunks, chunk_pixels = partials.shape[0], plan.chunk_pixels(gemm_m, partials.shape[0])
    require_pixels(strided, chunks * chunk_pixels)
    grid = (chunks * triton.cdiv(gemm_n, config.block_n),)
    if grid[0] == 0:
        return
    with on_device_of(out):
        _conv1x1_fwd_kernel[grid](
            x,
            bn_in,
            w,
            out,
            partials,
            bn,
            *frozen,
            residual,
            mask,
            side_x,
            side_w,
            side_bn,
            gemm_m,
            gemm_n,
            gemm_k,
            0 if side is None else side_x.shape[1],
            *strided.shape[2:],
            out_h,
            out_w,
            chunk_pixels,
            STRIDE=stride,
            RELU=relu,
            WHOLE_DEPTH=partials is not None and gemm_k <= config.block_k,
            INPUT_PRECISION=input_precision(x.dtype),
            **tile_options(config),
        )


def _output(x, w, stride: int):
    n, _, h, w_in = x.shape
    return empty_rows(n, w.shape[0], (h - 1) // stride + 1, (w_in - 1) // stride + 1, x)


def launch_conv1x1_stats(a, w, geometry, plan):
    """c = conv1x1(relu(bn(a))) and its channel statistics.

    a: Deferred(c [N, K, H, W], bn [5, K] | None); w [N_out, K, 1, 1]. Returns (c [N, N_out, P, Q] in a's dtype,
    partials [T, 3, N_out] fp32: count, mean and M2 of the accumulators over each chunk of pixels).
    """
    stride = require_pointwise(geometry)
    _check_operands("a", a.c, w)
    if a.bn is not None:
        require_vectors("a.bn", a.bn, 5, a.c.shape[1])
    out = _output(a.c, w, stride)
    partials = torch.empty((plan.statistics_rows(w.shape[0]), 3, w.shape[0]), dtype=torch.float32, device=out.device)
    _launch(*a, w, out, plan, stride=stride, partials=partials)
    return out, partials


def launch_conv1x1_affine(x, w, bn, residual, relu, geometry, plan):
    """out = conv1x1(x) * scale + shift [+ residual] [relu]; residual [N, N_out, P, Q] or None.

    bn: Frozen(mean, var, gamma | None, beta | None, eps), running statistics [N_out] in any floating dtype.
    """
    stride = require_pointwise(geometry)
    _check_operands("x", x, w)
    frozen = require_frozen(bn, w.shape[0])
    out = _output(x, w, stride)
    if residual is not None:
        require_like("residual", residual, out)
    _launch(x, None, w, out, plan, stride=stride, frozen=frozen, residual=residual, relu=relu)
    return out


def launch_conv1x1_join(a, w, bn, shortcut, w_shortcut, bn_shortcut, stride_shortcut, plan):
    """out = relu(conv1x1(relu(bn(a))) * scale + shift + s), and the ReLU bits of out.

    s is ``shortcut`` itself (w_shortcut None) or conv1x1(shortcut[::stride]) * scale_s + shift_s. Returns
    (out [N, N_out, H, W], mask uint8 [N, H, W, ceil(N_out / 8)]).
    """
    _check_operands("a", a.c, w)
    if a.bn is not None:
        require_vectors("a.bn", a.bn, 5, a.c.shape[1])
    require_vectors("bn", bn, 5, w.shape[0])
    out = _output(a.c, w, 1)
    mask = empty_mask(out)
    if w_shortcut is None:
        _launch(*a, w, out, plan, bn=bn, residual=require_like("shortcut", shortcut, out), mask=mask, relu=True)
        return out, mask
    _check_operands("shortcut", shortcut, w_shortcut)
    require_vectors("bn_shortcut", bn_shortcut, 5, w.shape[0])
    h, w_in = ((extent - 1) // stride_shortcut + 1 for extent in shortcut.shape[2:])
    if (shortcut.shape[0], w_shortcut.shape[0], h, w_in) != tuple(out.shape) or shortcut.dtype != out.dtype:
        raise ValueError(f"shortcut {tuple(shortcut.shape)} does not lead to {tuple(out.shape)}")
    side = (shortcut, w_shortcut, bn_shortcut)
    _launch(*a, w, out, plan, stride=stride_shortcut, bn=bn, mask=mask, relu=True, side=side)
    return out, mask
