"""Gradients of an R x S convolution as implicit GEMMs, for its input and for its weight.

Input gradient, with the weight as the forward pass reads it, [K, R, S, C] in memory:

    dx[n, h, w, c] = sum_{r, s, k} dc[n, p, q, k] w[k, r, s, c]        p * stride - pad + r * dilation = h, q likewise

With a stride only some taps (r, s) reach a pixel, which ones depends on h mod stride and w mod stride alone. The pixels
of each such *phase* form GEMMs of their own over those taps: a 3x3 of stride 2 has four phases of 4, 2, 2 and 1 taps
and nothing is multiplied by zero, where masked taps would do four times the work. A tile of pixels belongs to one
phase; consecutive tiles take the phases in turn, so programs of several tiles have like amounts of work, and neighbours
read the same dc and complete each other's cache lines of dx. The epilogue:

    dx += addend (where its mask) on every addend_stride-th row and column
    with relu_of: dx = dx where relu_of's affine > 0, sums[t] = (sum dx, sum dx * xhat) over chunk t of tiles

Weight gradient, over the output's pixels m = (n, p, q):

    dw[k, r, s, c] = sum_m dc[m, k] a[n, p * stride - pad + r * dilation, q * stride - pad + s * dilation, c]

with a = relu(a * scale_a + shift_a) in a prologue, zero in the padding. The pixels are split into chunks whose number
follows from the shape alone, and a second kernel adds the chunks' results in order: no atomics, so the same input gives
the same bits.

Products in the operands' dtype, fp32 accumulation; fp32 operands as TF32 if PyTorch's switch for convolutions says so.
"""

import math

import torch
import triton
import triton.language as tl

from . import (
    convolution_constants,
    empty_rows,
    input_precision,
    on_device_of,
    output_hw,
    require_addend,
    require_like,
    require_pixels,
    require_rows,
    require_vectors,
    tap_major,
    tile_options,
    wgrad_chunks,
)
from .epilogue import (
    BN_SCALE,
    BN_SHIFT,
    add_chunks,
    add_sums,
    affine,
    load_addend,
    load_vector,
    relu,
    relu_backward,
    store_sums,
)


@triton.jit
def _phase_taps(
    phase, EXTENT: tl.constexpr, STRIDE: tl.constexpr, PAD: tl.constexpr, DILATION: tl.constexpr, STEP: tl.constexpr
):
    """Along one axis, the taps that reach the pixels ``phase`` + STRIDE * i: (first tap, their number, offset).

    They are first + STEP * j, and tap j connects pixel i with output i + offset - j * (STEP * DILATION / STRIDE).
    """
    first = EXTENT
    for reverse in tl.static_range(EXTENT):
        tap = EXTENT - 1 - reverse
        first = tl.where((phase + PAD - tap * DILATION) % STRIDE == 0, tap, first)
    return first, (EXTENT - first + STEP - 1) // STEP, (phase + PAD - first * DILATION) // STRIDE


@triton.jit
def _dgrad_tile(
    g_ptr,
    w_ptr,
    row0,
    phase,
    first_col,
    super_pixels,
    super_h,
    super_w,
    out_h,
    out_w,
    channels,
    depth_channels,
    R: tl.constexpr,
    S: tl.constexpr,
    STRIDE_H: tl.constexpr,
    STRIDE_W: tl.constexpr,
    PAD_H: tl.constexpr,
    PAD_W: tl.constexpr,
    DILATION_H: tl.constexpr,
    DILATION_W: tl.constexpr,
    STEP_H: tl.constexpr,
    STEP_W: tl.constexpr,
    INPUT_PRECISION: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    """acc [BLOCK_M, BLOCK_N] fp32 of one phase of the STRIDE_H x STRIDE_W super-pixels from row0."""
    first_r, taps_h, offset_h = _phase_taps(phase // STRIDE_W, R, STRIDE_H, PAD_H, DILATION_H, STEP_H)
    first_s, taps_w, offset_w = _phase_taps(phase % STRIDE_W, S, STRIDE_W, PAD_W, DILATION_W, STEP_W)
    rows = row0 + tl.arange(0, BLOCK_M)
    cols = first_col + tl.arange(0, BLOCK_N)
    p0 = rows // super_w % super_h + offset_h
    q0 = rows % super_w + offset_w
    origin = (rows // (super_h * super_w) * out_h + p0).to(tl.int64) * out_w + q0  # of tap (0, 0), may lie outside
    p0 = tl.where(rows < super_pixels, p0, -(2**30))
    g_row_ptr = g_ptr + origin[:, None] * depth_channels  # [BLOCK_M, 1]
    w_row_ptr = w_ptr + tl.arange(0, BLOCK_K).to(tl.int64)[:, None] * (R * S * channels)  # [BLOCK_K, 1]
    acc = tl.zeros((BLOCK_M, BLOCK_N), dtype=tl.float32)
    tap_h = 0
    tap_w = 0
    k0 = 0
    for _ in range(taps_h * taps_w * tl.cdiv(depth_channels, BLOCK_K)):
        depth = k0 + tl.arange(0, BLOCK_K)
        p = -tap_h * (STEP_H * DILATION_H // STRIDE_H)
        q = -tap_w * (STEP_W * DILATION_W // STRIDE_W)
        # As unsigned numbers negative coordinates are large: one comparison for both ends.
        inside = ((p0 + p).to(tl.uint32) < out_h.to(tl.uint32)) & ((q0 + q).to(tl.uint32) < out_w.to(tl.uint32))
        g_offset = (p * out_w + q).to(tl.int64) * depth_channels
        g_valid = inside[:, None] & (depth < depth_channels)[None, :]
        g = tl.load(g_row_ptr + g_offset + depth[None, :], mask=g_valid, other=0.0)  # [BLOCK_M, BLOCK_K]
        tap = (first_r + tap_h * STEP_H) * S + first_s + tap_w * STEP_W
        w_offset = (tap + k0 * (R * S)).to(tl.int64) * channels
        w_valid = (depth < depth_channels)[:, None] & (cols < channels)[None, :]
        w = tl.load(w_row_ptr + w_offset + cols[None, :], mask=w_valid, other=0.0)  # [BLOCK_K, BLOCK_N]
        acc = tl.dot(g, w, acc, input_precision=INPUT_PRECISION)
        k0 += BLOCK_K
        tap_w = tl.where(k0 < depth_channels, tap_w, tap_w + 1)
        k0 = tl.where(k0 < depth_channels, k0, 0)
        tap_h = tl.where(tap_w < taps_w, tap_h, tap_h + 1)
        tap_w = tl.where(tap_w < taps_w, tap_w, 0)
    return acc


@triton.jit(do_not_specialize=["images", "in_h", "in_w", "out_h", "out_w", "program_tiles"])
def _conv3x3_dgrad_kernel(
    g_ptr,  # [pixels out, depth_channels]
    w_ptr,  # [depth_channels, R, S, channels]
    relu_ptr,  # [pixels in, channels] | None
    relu_bn_ptr,  # [5, channels] fp32 | None
    addend_ptr,  # [every ADDEND_STRIDE-th pixel in, channels] | None
    addend_mask_ptr,  # ReLU bits of it | None
    dx_ptr,  # [pixels in, channels]
    sums_ptr,  # [programs, 2, channels] fp32 | None
    images,
    channels,
    depth_channels,
    in_h,
    in_w,
    out_h,
    out_w,
    program_tiles,
    ADDEND_STRIDE: tl.constexpr,
    R: tl.constexpr,
    S: tl.constexpr,
    STRIDE_H: tl.constexpr,
    STRIDE_W: tl.constexpr,
    PAD_H: tl.constexpr,
    PAD_W: tl.constexpr,
    DILATION_H: tl.constexpr,
    DILATION_W: tl.constexpr,
    STEP_H: tl.constexpr,
    STEP_W: tl.constexpr,
    INPUT_PRECISION: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    # Programs that read the same pixels are neighbours, so all but the first find them in L2.
    tiles_n = tl.cdiv(channels, BLOCK_N)
    chunk = tl.program_id(0) // tiles_n
    first_col = tl.program_id(0) % tiles_n * BLOCK_N
    cols = first_col + tl.arange(0, BLOCK_N)
    super_h = tl.cdiv(in_h, STRIDE_H)
    super_w = tl.cdiv(in_w, STRIDE_W)
    super_pixels = images * super_h * super_w
    first_tile = chunk * program_tiles
    tiles = tl.cdiv(super_pixels, BLOCK_M) * (STRIDE_H * STRIDE_W)
    if sums_ptr is not None:
        sums_row_ptr = sums_ptr + chunk.to(tl.int64) * 2 * channels + cols
        store_sums(sums_row_ptr, tl.zeros((BLOCK_N,), tl.float32), tl.zeros((BLOCK_N,), tl.float32), cols, channels)
    for tile in tl.range(first_tile, tl.minimum(first_tile + program_tiles, tiles), disable_licm=True):
        phase = tile % (STRIDE_H * STRIDE_W)
        row0 = tile // (STRIDE_H * STRIDE_W) * BLOCK_M
        acc = _dgrad_tile(
            g_ptr,
            w_ptr,
            row0,
            phase,
            first_col,
            super_pixels,
            super_h,
            super_w,
            out_h,
            out_w,
            channels,
            depth_channels,
            R,
            S,
            STRIDE_H,
            STRIDE_W,
            PAD_H,
            PAD_W,
            DILATION_H,
            DILATION_W,
            STEP_H,
            STEP_W,
            INPUT_PRECISION,
            BLOCK_M,
            BLOCK_N,
            BLOCK_K,
        )
        rows = row0 + tl.arange(0, BLOCK_M)
        image = rows // (super_h * super_w)
        h = rows // super_w % super_h * STRIDE_H + phase // STRIDE_W
        w = rows % super_w * STRIDE_W + phase % STRIDE_W
        valid_rows = (rows < super_pixels) & (h < in_h) & (w < in_w)
        valid = valid_rows[:, None] & (cols < channels)[None, :]
        elements = ((image * in_h + h).to(tl.int64) * in_w + w)[:, None] * channels + cols[None, :]
        if addend_ptr is not None:
            acc += load_addend(
                addend_ptr, addend_mask_ptr, image, h, w, valid_rows, cols, in_h, in_w, channels, ADDEND_STRIDE
            )
        if relu_ptr is not None:
            c = tl.load(relu_ptr + elements, mask=valid, other=0.0).to(tl.float32)
            acc, sum_g, sum_x = relu_backward(acc, c, relu_bn_ptr, valid_rows, cols, channels)
            add_sums(sums_row_ptr, sum_g, sum_x, cols, channels)
        tl.store(dx_ptr + elements, acc.to(dx_ptr.dtype.element_ty), mask=valid)


@triton.jit(do_not_specialize=["in_h", "in_w", "out_h", "out_w", "pixels", "chunk_pixels"])
def _conv3x3_wgrad_kernel(
    a_ptr,  # [pixels in, channels]
    a_bn_ptr,  # [5, channels] fp32 | None
    g_ptr,  # [pixels, gemm_m]
    dw_ptr,  # [chunks, gemm_m, R, S, channels] fp32
    gemm_m,
    channels,
    in_h,
    in_w,
    out_h,
    out_w,
    pixels,
    chunk_pixels,
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
    # The programs of a chunk of pixels are neighbours: they read the same rows of a and dc, from L2.
    tiles_n = tl.cdiv(channels, BLOCK_N)
    tile = tl.program_id(0)
    first_col = tile % tiles_n * BLOCK_N
    tile = tile // tiles_n
    tap = tile % (R * S)
    tile = tile // (R * S)
    tiles_m = tl.cdiv(gemm_m, BLOCK_M)
    first_k = tile % tiles_m * BLOCK_M
    chunk = tile // tiles_m
    start = chunk * chunk_pixels
    stop = tl.minimum(start + chunk_pixels, pixels)

    ks = first_k + tl.arange(0, BLOCK_M)
    cols = first_col + tl.arange(0, BLOCK_N)
    scale = tl.zeros((BLOCK_N,), dtype=tl.float32)
    shift = tl.zeros((BLOCK_N,), dtype=tl.float32)
    if a_bn_ptr is not None:
        scale = load_vector(a_bn_ptr, BN_SCALE, channels, cols)
        shift = load_vector(a_bn_ptr, BN_SHIFT, channels, cols)
    rows = start + tl.arange(0, BLOCK_K)
    image = rows // (out_h * out_w)
    p = rows // out_w % out_h
    q = rows % out_w
    # A step of BLOCK_K pixels in (image, p, q), added with carries below: divisions in the loop would cost more than
    # the products.
    step_image = BLOCK_K // (out_h * out_w)
    step_p = BLOCK_K // out_w % out_h
    step_q = BLOCK_K % out_w
    tap_h = tap // S * DILATION_H - PAD_H
    tap_w = tap % S * DILATION_W - PAD_W
    acc = tl.zeros((BLOCK_M, BLOCK_N), dtype=tl.float32)
    for row0 in range(start, stop, BLOCK_K):
        valid_rows = row0 + tl.arange(0, BLOCK_K) < stop
        h = p * STRIDE_H + tap_h
        w = q * STRIDE_W + tap_w
        # As unsigned numbers negative coordinates are large: one comparison for both ends.
        inside = valid_rows & (h.to(tl.uint32) < in_h.to(tl.uint32)) & (w.to(tl.uint32) < in_w.to(tl.uint32))
        a_rows = (image * in_h + h).to(tl.int64) * in_w + w
        a_valid = inside[:, None] & (cols < channels)[None, :]
        a = tl.load(a_ptr + a_rows[:, None] * channels + cols[None, :], mask=a_valid, other=0.0)  # [BLOCK_K, BLOCK_N]
        g_rows = (row0 + tl.arange(0, BLOCK_K)).to(tl.int64)
        g_valid = valid_rows[:, None] & (ks < gemm_m)[None, :]
        g = tl.load(g_ptr + g_rows[:, None] * gemm_m + ks[None, :], mask=g_valid, other=0.0)  # [BLOCK_K, BLOCK_M]
        if a_bn_ptr is not None:
            a = tl.where(a_valid, relu(affine(a.to(tl.float32), scale, shift)), 0.0).to(g.dtype)
        acc = tl.dot(tl.trans(g), a, acc, input_precision=INPUT_PRECISION)
        q += step_q
        carry = q >= out_w
        q = tl.where(carry, q - out_w, q)
        p += step_p + carry.to(tl.int32)
        carry = p >= out_h
        p = tl.where(carry, p - out_h, p)
        image += step_image + carry.to(tl.int32)
    elements = ((chunk * gemm_m + ks).to(tl.int64) * (R * S) + tap)[:, None] * channels + cols[None, :]
    tl.store(dw_ptr + elements, acc, mask=(ks < gemm_m)[:, None] & (cols < channels)[None, :])


def _require_written(grad) -> None:
    """ValueError for a deferred gradient: every tap would rebuild it from three tensors."""
    if grad.mask is not None or grad.coef is not None:
        raise ValueError("the gradient must be written out (bn_backward_apply), not deferred")
    require_rows("g", grad.g)


def _check_gradient(g, w_shape, geometry, image) -> None:
    """ValueError unless ``g`` is a gradient of the output of convolving ``image`` [N, C, H, W], whatever its C."""
    out_hw = output_hw(image[2:], w_shape, geometry)
    if tuple(g.shape) != (image[0], w_shape[0], *out_hw):
        raise ValueError(f"g is {tuple(g.shape)}; expected {(image[0], w_shape[0], *out_hw)}")


def launch_conv3x3_dgrad(grad, w, geometry, input_hw, relu_of, addend, addend_stride, plan):
    """dx = conv_transpose(g, w) + addend, [N, C, H, W] in g's dtype, and sums of it if ``relu_of`` is given.

    grad: Gradient with g [N, K, P, Q] alone, not deferred; w [K, C, R, S], copied if it is not in channels_last memory;
    relu_of: Deferred(c [N, C, H, W], bn [5, C]), the activation the convolution read: dx is masked by its ReLU and
    sums [T, 2, C] fp32 = (sum dx, sum dx * xhat) of the fp32 values come back, else None. addend: Gradient(g, mask) on
    every addend_stride-th row and column. Any kernel extent, stride, padding and dilation, one group.
    """
    _require_written(grad)
    g, config = grad.g, plan.config
    constants = convolution_constants(w.shape, geometry)
    n, c, in_h, in_w = shape = (g.shape[0], w.shape[1], *input_hw)
    if w.dtype != g.dtype:
        raise ValueError(f"weight is {w.dtype}, gradient {g.dtype}")
    _check_gradient(g, w.shape, geometry, shape)
    dx = empty_rows(*shape, like=g)
    if relu_of is not None:
        require_like("relu_of", relu_of.c, dx)
        require_vectors("relu_of.bn", relu_of.bn, 5, c)
    if addend is not None:
        require_addend(addend, addend_stride, dx)

    (stride_h, stride_w), _, dilation = geometry[:3]
    super_pixels = n * triton.cdiv(in_h, stride_h) * triton.cdiv(in_w, stride_w)
    tiles = triton.cdiv(super_pixels, config.block_m) * stride_h * stride_w
    require_pixels(g, (tiles + 1) * config.block_m)
    programs, program_tiles, sums = tiles, 1, None
    if relu_of is not None:
        programs = plan.statistics_rows(c)
        program_tiles = plan.chunk_pixels(tiles * config.block_m, programs) // config.block_m
        sums = torch.empty((programs, 2, c), dtype=torch.float32, device=g.device)
    if programs:
        with on_device_of(g):
            _conv3x3_dgrad_kernel[(programs * triton.cdiv(c, config.block_n),)](
                g,
                tap_major(w),
                None if relu_of is None else relu_of.c,
                None if relu_of is None else relu_of.bn,
                None if addend is None else addend.g,
                None if addend is None else addend.mask,
                dx,
                sums,
                n,
                c,
                g.shape[1],
                in_h,
                in_w,
                *g.shape[2:],
                program_tiles,
                ADDEND_STRIDE=addend_stride,
                **constants,
                STEP_H=stride_h // math.gcd(stride_h, dilation[0]),
                STEP_W=stride_w // math.gcd(stride_w, dilation[1]),
                INPUT_PRECISION=input_precision(g.dtype),
                **tile_options(config),
            )
    return dx, sums


def launch_conv3x3_wgrad(a, grad, w_shape, geometry, plan):
    """dw = sum over pixels of g times the shifted relu(bn(a)), [K, C, R, S] fp32 in channels_last memory.

    a: Deferred(c [N, C, H, W], bn [5, C] | None); grad: Gradient with g [N, K, P, Q] alone, not deferred. The tile is
    block_m output channels x block_n input channels, block_k pixels deep.
    """
    require_rows("a", a.c)
    _require_written(grad)
    g, config = grad.g, plan.config
    k, c, r, s = w_shape
    if c != a.c.shape[1] or a.c.dtype != g.dtype:
        raise ValueError(f"a is {tuple(a.c.shape)} {a.c.dtype}; expected {c} channels of {g.dtype}")
    if a.bn is not None:
        require_vectors("a.bn", a.bn, 5, c)
    _check_gradient(g, w_shape, geometry, a.c.shape)
    pixels = g.shape[0] * g.shape[2] * g.shape[3]
    chunks = wgrad_chunks(w_shape, pixels)
    chunk_pixels = triton.cdiv(triton.cdiv(pixels, chunks), config.block_k) * config.block_k
    require_pixels(a.c, chunks * chunk_pixels + config.block_k)
    dw = torch.empty((k, r, s, c), dtype=torch.float32, device=g.device)
    parts = dw if chunks == 1 else torch.empty((chunks, *dw.shape), dtype=torch.float32, device=g.device)
    tiles = triton.cdiv(k, config.block_m) * triton.cdiv(c, config.block_n) * r * s
    with on_device_of(g):
        _conv3x3_wgrad_kernel[(chunks * tiles,)](
            a.c,
            a.bn,
            g,
            parts,
            k,
            *a.c.shape[1:],
            *g.shape[2:],
            pixels,
            chunk_pixels,
            **convolution_constants(w_shape, geometry),
            INPUT_PRECISION=input_precision(g.dtype),
            **tile_options(config),
        )
        if chunks > 1:
            add_chunks(parts, dw)
    return dw.permute(0, 3, 1, 2)
