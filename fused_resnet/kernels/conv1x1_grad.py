"""Gradients of a 1x1 convolution as matrix products over pixels, for its input and for its weight.

The operands may come deferred: the gradient of the output as dc = A * (g where mask) + B * c + C, the activation as
a = relu(a * scale + shift), both rebuilt while loading. In channels_last memory, with pixels m and weights as they lie
in memory,

    input gradient     dx[m, c] = sum_k dc[m, k] w[k, c]
    from moments       dx[m, c] = sum_n g[m, n] w_g[n, c] + sum_k a[m, k] w_a[k, c] + w_1[c],     g = dout where mask
    weight gradient    dw[k, c] = sum_m dc[m, k] a[m, c]

The first two are one kernel, since the second only adds one more product to the same accumulators. Behind them come

    dx += addend (where its mask) on every addend_stride-th row and column
    with relu_of: dx = dx where relu_of's affine > 0, sums[t] = (sum dx, sum dx * xhat) over chunk t of pixels

For the weight gradient the pixels, which a stride may pick from a's, are split into chunks whose number follows from
the shape alone, and a second kernel adds the chunks' results in a fixed order: no atomics, so the same input gives the
same bits.

These products are bound by memory, and a program that rebuilds an operand reads two tensors for it. So the programs
that read the same pixels are neighbours and find them in L2, a gradient of few channels is rebuilt once for all columns
of dx, and the input gradient from moments of few channels has a kernel that reads its weights once.

Products in the operands' dtype, fp32 accumulation; fp32 operands as TF32 if PyTorch's switch for convolutions says so.
"""

import torch
import triton
import triton.language as tl

from . import (
    empty_rows,
    input_precision,
    on_device_of,
    output_hw,
    require_addend,
    require_deferred,
    require_gradient,
    require_like,
    require_mask,
    require_pixels,
    require_pointwise,
    require_rows,
    tile_options,
    wgrad_chunks,
)
from .epilogue import (
    BN_MEAN,
    BN_RSTD,
    BN_SCALE,
    BN_SHIFT,
    add_chunks,
    add_sums,
    affine,
    fold_rows,
    input_rows,
    load_addend,
    load_mask,
    load_packed,
    load_vector,
    relu,
    relu_backward,
    store_sums,
    unpack,
)

# From this many tiles of pixels on, one program computes all columns of them; below, columns fill the card, too.
_MANY_TILES = 512


@triton.jit
def _load_coef(coef_ptr, channels, cols):
    """A, B and C of a deferred gradient at ``cols`` [N], 0 beyond the last channel."""
    a = load_vector(coef_ptr, 0, channels, cols)
    b = load_vector(coef_ptr, 1, channels, cols)
    return a, b, load_vector(coef_ptr, 2, channels, cols)


@triton.jit
def _gradient_tile(
    g_ptr, packed, c_ptr, coef, row0, row_limit, first_col, channels,
    ZERO_ROWS: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    """dc = A * (g where mask) + B * c + C [BLOCK_M, BLOCK_N] in g's dtype, from channel first_col on.

    packed: the tile's `load_packed` bytes of the mask, or None; coef None: g where mask alone. Zero beyond the last
    channel, where the coefficients are 0, and with ZERO_ROWS beyond the last row, where C is not.
    """
    row = tl.arange(0, BLOCK_M)
    cols = first_col + tl.arange(0, BLOCK_N)
    valid_rows = row0 + row < row_limit
    # Only the start of the tile can pass 2^31 elements; 64-bit offsets for all of them would cost registers.
    start = tl.cast(row0, tl.int64) * channels
    elements = row[:, None] * channels + cols[None, :]
    valid = valid_rows[:, None] & (cols < channels)[None, :]
    dc = tl.load(g_ptr + start + elements, mask=valid, other=0.0)
    if packed is not None:
        dc = tl.where(unpack(packed, BLOCK_M, BLOCK_N), dc, 0.0)
    if coef is not None:
        a, b, shift = coef
        c = tl.load(c_ptr + start + elements, mask=valid, other=0.0).to(tl.float32)
        rebuilt = affine(dc.to(tl.float32), a, shift) + c * b[None, :]
        if ZERO_ROWS:
            rebuilt = tl.where(valid_rows[:, None], rebuilt, 0.0)
        dc = rebuilt.to(dc.dtype)
    return dc


@triton.jit
def _weight_tile(w_ptr, k0, gemm_k, first_col, gemm_n, BLOCK_K: tl.constexpr, BLOCK_N: tl.constexpr):
    """w [BLOCK_K, BLOCK_N] from row k0 and column first_col of [gemm_k, gemm_n], zero out of range."""
    depth = tl.arange(0, BLOCK_K)
    cols = first_col + tl.arange(0, BLOCK_N)
    valid = (k0 + depth < gemm_k)[:, None] & (cols < gemm_n)[None, :]
    elements = depth[:, None] * gemm_n + cols[None, :]
    return tl.load(w_ptr + tl.cast(k0, tl.int64) * gemm_n + elements, mask=valid, other=0.0)


# One compilation serves every batch and image size: extents of maps gain nothing from being known to be even.
@triton.jit(do_not_specialize=["gemm_m", "in_h", "in_w", "out_h", "out_w", "chunk_pixels"])
def _conv1x1_dgrad_kernel(
    g_ptr,  # [gemm_m, gemm_k]
    mask_ptr,  # [gemm_m, ceil(gemm_k / 8)] uint8 | None
    c_ptr,  # [gemm_m, gemm_k] | None: g is not deferred
    coef_ptr,  # [3, gemm_k] fp32 | None
    w_ptr,  # [gemm_k, gemm_n]
    a_ptr,  # [pixels in, gemm_n] | None: no second product
    a_bn_ptr,  # [5, gemm_n] fp32 | None: a is not deferred
    w_a_ptr,  # [gemm_n, gemm_n] | None
    w_1_ptr,  # [gemm_n] fp32 | None
    relu_ptr,  # [gemm_m, gemm_n] | None
    relu_bn_ptr,  # [5, gemm_n] fp32 | None
    addend_ptr,  # [every ADDEND_STRIDE-th pixel out, gemm_n] | None
    addend_mask_ptr,  # ReLU bits of it | None
    dx_ptr,  # [gemm_m, gemm_n]
    sums_ptr,  # [chunks, 2, gemm_n] fp32 | None
    gemm_m,
    gemm_n,
    gemm_k,
    in_h,  # of a, which is read at every STRIDE-th row and column
    in_w,
    out_h,
    out_w,
    chunk_pixels,  # pixels of a program, a multiple of BLOCK_M
    program_tiles,  # tiles of columns of a program
    STRIDE: tl.constexpr,
    ADDEND_STRIDE: tl.constexpr,
    WHOLE_DEPTH: tl.constexpr,  # gemm_k <= BLOCK_K, one step
    SHORT_A: tl.constexpr,  # gemm_n <= BLOCK_K, one step of the second product
    INPUT_PRECISION: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    # Programs that read the same pixels are neighbours, so all but the first find them in L2.
    column_programs = tl.cdiv(tl.cdiv(gemm_n, BLOCK_N), program_tiles)
    chunk = tl.program_id(0) // column_programs
    first_tile = tl.program_id(0) % column_programs * program_tiles
    start = chunk * chunk_pixels
    stop = tl.minimum(start + chunk_pixels, gemm_m)
    row = tl.arange(0, BLOCK_M)
    if sums_ptr is not None:
        # Then a program has one tile of columns, and many of pixels.
        cols = first_tile * BLOCK_N + tl.arange(0, BLOCK_N)
        sums_row_ptr = sums_ptr + chunk.to(tl.int64) * 2 * gemm_n + cols
        store_sums(sums_row_ptr, tl.zeros((BLOCK_N,), tl.float32), tl.zeros((BLOCK_N,), tl.float32), cols, gemm_n)
    for row0 in tl.range(start, stop, BLOCK_M, disable_licm=True):
        valid_rows = row0 + row < stop
        tile_start = tl.cast(row0, tl.int64) * gemm_n
        if WHOLE_DEPTH:
            depth = tl.arange(0, BLOCK_K)
            coef = None
            if coef_ptr is not None:
                coef = _load_coef(coef_ptr, gemm_k, depth)
            packed = None
            if mask_ptr is not None:
                packed = load_packed(mask_ptr, row0, stop, 0, gemm_k, BLOCK_M, BLOCK_K)
            dc = _gradient_tile(g_ptr, packed, c_ptr, coef, row0, stop, 0, gemm_k, False, BLOCK_M, BLOCK_K)
        for tile in range(program_tiles):
            first_col = (first_tile + tile) * BLOCK_N
            cols = first_col + tl.arange(0, BLOCK_N)
            acc = tl.zeros((BLOCK_M, BLOCK_N), dtype=tl.float32)
            if w_1_ptr is not None:
                acc += load_vector(w_1_ptr, 0, gemm_n, cols)[None, :]
            if WHOLE_DEPTH:
                w = _weight_tile(w_ptr, 0, gemm_k, first_col, gemm_n, BLOCK_K, BLOCK_N)
                acc = tl.dot(dc, w, acc, input_precision=INPUT_PRECISION)
            else:
                packed = None
                if mask_ptr is not None:
                    packed = load_packed(mask_ptr, row0, stop, 0, gemm_k, BLOCK_M, BLOCK_K)
                for k0 in range(0, gemm_k, BLOCK_K):
                    depth = k0 + tl.arange(0, BLOCK_K)
                    coef = None
                    if coef_ptr is not None:
                        coef = _load_coef(coef_ptr, gemm_k, depth)
                    dc = _gradient_tile(g_ptr, packed, c_ptr, coef, row0, stop, k0, gemm_k, False, BLOCK_M, BLOCK_K)
                    if mask_ptr is not None:
                        # A step ahead: the compiler makes no loads of single bytes asynchronous.
                        packed = load_packed(mask_ptr, row0, stop, k0 + BLOCK_K, gemm_k, BLOCK_M, BLOCK_K)
                    w = _weight_tile(w_ptr, k0, gemm_k, first_col, gemm_n, BLOCK_K, BLOCK_N)
                    acc = tl.dot(dc, w, acc, input_precision=INPUT_PRECISION)
            if a_ptr is not None:
                a_tile_ptr = a_ptr + tile_start
                a_rows = row
                if STRIDE > 1:
                    a_tile_ptr = a_ptr
                    a_rows = input_rows(row0 + row, in_h, in_w, out_h, out_w, STRIDE)
                # One step needs no pipeline, which would cost registers.
                for k0 in tl.range(0, gemm_n, BLOCK_K, num_stages=1 if SHORT_A else None):
                    depth = k0 + tl.arange(0, BLOCK_K)
                    valid = valid_rows[:, None] & (depth < gemm_n)[None, :]
                    a = tl.load(a_tile_ptr + (a_rows[:, None] * gemm_n + depth[None, :]), mask=valid, other=0.0)
                    if a_bn_ptr is not None:
                        # Zero beyond the last channel, as scale and shift are there; rows out of range stay unread.
                        scale = load_vector(a_bn_ptr, BN_SCALE, gemm_n, depth)
                        shift = load_vector(a_bn_ptr, BN_SHIFT, gemm_n, depth)
                        a = relu(affine(a.to(tl.float32), scale, shift)).to(a.dtype)
                    w = _weight_tile(w_a_ptr, k0, gemm_n, first_col, gemm_n, BLOCK_K, BLOCK_N)
                    acc = tl.dot(a, w, acc, input_precision=INPUT_PRECISION)
            elements = row[:, None] * gemm_n + cols[None, :]  # [BLOCK_M, BLOCK_N]
            valid = valid_rows[:, None] & (cols < gemm_n)[None, :]
            if addend_ptr is not None:
                if ADDEND_STRIDE == 1:
                    addend = tl.load(addend_ptr + tile_start + elements, mask=valid, other=0.0)
                    if addend_mask_ptr is not None:
                        kept = load_mask(addend_mask_ptr, row0, stop, first_col, gemm_n, BLOCK_M, BLOCK_N)
                        addend = tl.where(kept, addend, 0.0)
                    acc += addend.to(tl.float32)
                else:
                    rows = row0 + row
                    image, h, w = rows // (out_h * out_w), rows // out_w % out_h, rows % out_w
                    acc += load_addend(
                        addend_ptr, addend_mask_ptr, image, h, w, valid_rows, cols, out_h, out_w, gemm_n, ADDEND_STRIDE
                    )
            if relu_ptr is not None:
                c = tl.load(relu_ptr + tile_start + elements, mask=valid, other=0.0).to(tl.float32)
                acc, sum_g, sum_x = relu_backward(acc, c, relu_bn_ptr, valid_rows, cols, gemm_n)
                add_sums(sums_row_ptr, sum_g, sum_x, cols, gemm_n)
            tl.store(dx_ptr + tile_start + elements, acc.to(dx_ptr.dtype.element_ty), mask=valid)


@triton.jit(do_not_specialize=["gemm_m", "chunk_pixels"])
def _conv1x1_dgrad_resident_kernel(
    g_ptr,  # [gemm_m, gemm_k]
    mask_ptr,  # [gemm_m, ceil(gemm_k / 8)] uint8 | None
    w_ptr,  # [gemm_k, gemm_n]
    a_ptr,  # [gemm_m, gemm_n]
    a_bn_ptr,  # [5, gemm_n] fp32
    w_a_ptr,  # [gemm_n, gemm_n]
    w_1_ptr,  # [gemm_n] fp32
    dx_ptr,  # [gemm_m, gemm_n]
    sums_ptr,  # [chunks, 2, gemm_n] fp32
    gemm_m,
    gemm_n,
    gemm_k,
    chunk_pixels,  # a multiple of BLOCK_M
    INPUT_PRECISION: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    """The input gradient from moments of few channels, gemm_n <= BLOCK_N and gemm_k <= BLOCK_K: a program goes through
    the pixels of a chunk with both weights in shared memory, the next tile on its way while it computes one.

    Sums stay spread over a tile until the end: exchanges between threads need barriers, which the compiler does not
    pipeline over. `a` is loaded once, as the operand and as what ReLU and sums see.
    """
    chunk = tl.program_id(0)
    start = chunk * chunk_pixels
    stop = tl.minimum(start + chunk_pixels, gemm_m)
    row = tl.arange(0, BLOCK_M)
    depth = tl.arange(0, BLOCK_K)
    cols = tl.arange(0, BLOCK_N)
    w = _weight_tile(w_ptr, 0, gemm_k, 0, gemm_n, BLOCK_K, BLOCK_N)
    w_a = _weight_tile(w_a_ptr, 0, gemm_n, 0, gemm_n, BLOCK_N, BLOCK_N)
    sum_g = tl.zeros((BLOCK_M // 16, 8, BLOCK_N), dtype=tl.float32)
    sum_x = tl.zeros((BLOCK_M // 16, 8, BLOCK_N), dtype=tl.float32)
    for row0 in tl.range(start, stop, BLOCK_M, disable_licm=True):
        valid_rows = row0 + row < stop
        g_elements = row[:, None] * gemm_k + depth[None, :]  # [BLOCK_M, BLOCK_K]
        g_valid = valid_rows[:, None] & (depth < gemm_k)[None, :]
        g = tl.load(g_ptr + tl.cast(row0, tl.int64) * gemm_k + g_elements, mask=g_valid, other=0.0)
        elements = row[:, None] * gemm_n + cols[None, :]  # [BLOCK_M, BLOCK_N]
        valid = valid_rows[:, None] & (cols < gemm_n)[None, :]
        tile_start = tl.cast(row0, tl.int64) * gemm_n
        a = tl.load(a_ptr + tile_start + elements, mask=valid, other=0.0)
        if mask_ptr is not None:
            g = tl.where(load_mask(mask_ptr, row0, stop, 0, gemm_k, BLOCK_M, BLOCK_K), g, 0.0)
        acc = tl.zeros((BLOCK_M, BLOCK_N), dtype=tl.float32)
        acc += load_vector(w_1_ptr, 0, gemm_n, cols)[None, :]
        acc = tl.dot(g, w, acc, input_precision=INPUT_PRECISION)
        c = a.to(tl.float32)
        scale = load_vector(a_bn_ptr, BN_SCALE, gemm_n, cols)
        shift = load_vector(a_bn_ptr, BN_SHIFT, gemm_n, cols)
        normalised = affine(c, scale, shift)
        acc = tl.dot(relu(normalised).to(a.dtype), w_a, acc, input_precision=INPUT_PRECISION)
        acc = tl.where(valid_rows[:, None] & (normalised > 0), acc, 0.0)
        mean = load_vector(a_bn_ptr, BN_MEAN, gemm_n, cols)
        sum_g += fold_rows(acc, BLOCK_M, BLOCK_N)
        sum_x += fold_rows(acc * (c - mean[None, :]), BLOCK_M, BLOCK_N)
        tl.store(dx_ptr + tile_start + elements, acc.to(dx_ptr.dtype.element_ty), mask=valid)
    rstd = load_vector(a_bn_ptr, BN_RSTD, gemm_n, cols)
    store_sums(
        sums_ptr + chunk.to(tl.int64) * 2 * gemm_n + cols,
        tl.sum(tl.sum(sum_g, axis=1), axis=0),
        tl.sum(tl.sum(sum_x, axis=1), axis=0) * rstd,
        cols,
        gemm_n,
    )


@triton.jit(do_not_specialize=["in_h", "in_w", "out_h", "out_w", "pixels", "chunk_pixels"])
def _conv1x1_wgrad_kernel(
    a_ptr,  # [pixels in, gemm_n], read at every STRIDE-th row and column
    a_bn_ptr,  # [5, gemm_n] fp32 | None: a is not deferred
    g_ptr,  # [pixels, gemm_m]
    mask_ptr,  # [pixels, ceil(gemm_m / 8)] uint8 | None
    c_ptr,  # [pixels, gemm_m] | None: g is not deferred
    coef_ptr,  # [3, gemm_m] fp32 | None
    dw_ptr,  # [chunks, gemm_m, gemm_n] fp32
    gemm_m,
    gemm_n,
    in_h,
    in_w,
    out_h,
    out_w,
    pixels,
    chunk_pixels,  # a multiple of BLOCK_K
    STRIDE: tl.constexpr,
    INPUT_PRECISION: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    # The programs of a chunk of pixels are neighbours: they read the same rows of a and dc, from L2.
    tiles_m = tl.cdiv(gemm_m, BLOCK_M)
    tiles_n = tl.cdiv(gemm_n, BLOCK_N)
    tile = tl.program_id(0)
    first_col = tile % tiles_n * BLOCK_N
    first_k = tile // tiles_n % tiles_m * BLOCK_M
    chunk = tile // (tiles_n * tiles_m)
    start = chunk * chunk_pixels
    stop = tl.minimum(start + chunk_pixels, pixels)
    ks = first_k + tl.arange(0, BLOCK_M)
    cols = first_col + tl.arange(0, BLOCK_N)
    coef = None
    if coef_ptr is not None:
        coef = _load_coef(coef_ptr, gemm_m, ks)
    if a_bn_ptr is not None:
        scale = load_vector(a_bn_ptr, BN_SCALE, gemm_n, cols)
        shift = load_vector(a_bn_ptr, BN_SHIFT, gemm_n, cols)
    row = tl.arange(0, BLOCK_K)
    acc = tl.zeros((BLOCK_M, BLOCK_N), dtype=tl.float32)
    packed = None
    if mask_ptr is not None:
        packed = load_packed(mask_ptr, start, stop, first_k, gemm_m, BLOCK_K, BLOCK_M)
    for row0 in range(start, stop, BLOCK_K):
        dc = _gradient_tile(
            g_ptr, packed, c_ptr, coef, row0, stop, first_k, gemm_m, True, BLOCK_K, BLOCK_M
        )  # [BLOCK_K, BLOCK_M]
        if mask_ptr is not None:
            packed = load_packed(mask_ptr, row0 + BLOCK_K, stop, first_k, gemm_m, BLOCK_K, BLOCK_M)
        a_tile_ptr = a_ptr + tl.cast(row0, tl.int64) * gemm_n
        a_rows = row
        if STRIDE > 1:
            a_tile_ptr = a_ptr
            a_rows = input_rows(row0 + row, in_h, in_w, out_h, out_w, STRIDE)
        valid = (row0 + row < stop)[:, None] & (cols < gemm_n)[None, :]
        a = tl.load(a_tile_ptr + (a_rows[:, None] * gemm_n + cols[None, :]), mask=valid, other=0.0)
        if a_bn_ptr is not None:
            # Beyond the last pixel this is relu(shift), times a dc of zero.
            a = relu(affine(a.to(tl.float32), scale, shift)).to(a.dtype)
        acc = tl.dot(tl.trans(dc), a, acc, input_precision=INPUT_PRECISION)
    elements = tl.arange(0, BLOCK_M)[:, None] * gemm_n + cols[None, :]  # [BLOCK_M, BLOCK_N]
    tile_start = (chunk.to(tl.int64) * gemm_m + first_k) * gemm_n
    tl.store(dw_ptr + tile_start + elements, acc, mask=(ks < gemm_m)[:, None] & (cols < gemm_n)[None, :])


def _require_matrix(name: str, w, rows: int, columns: int, like) -> None:
    """ValueError unless ``w`` is rows x columns contiguous values of like's dtype, of any shape."""
    if w.numel() != rows * columns or w.shape[0] != rows or w.dtype != like.dtype or not w.flatten(1).is_contiguous():
        raise ValueError(f"{name} is {tuple(w.shape)} {w.dtype}; expected contiguous [{rows}, {columns}] {like.dtype}")


def _launch_dgrad(
    gradient, w, dx, plan, *, a=(None, None, None, None), stride=1, relu_of=None, addend=(None, None), addend_stride=1
):
    """Launch the kernel on checked operands; a: (a, its bn, w_a, w_1) of a second product. Returns the sums or None."""
    config, (n, gemm_n, out_h, out_w), gemm_k = plan.config, dx.shape, gradient[0].shape[1]
    in_h, in_w = (dx if a[0] is None else a[0]).shape[2:]
    gemm_m, tiles_n = n * out_h * out_w, triton.cdiv(gemm_n, config.block_n)
    whole_depth = gemm_k <= config.block_k
    chunks, chunk_pixels, program_tiles, sums = triton.cdiv(gemm_m, config.block_m), config.block_m, 1, None
    if relu_of is not None:
        chunks = plan.statistics_rows(gemm_n)
        chunk_pixels = plan.chunk_pixels(gemm_m, chunks)
        sums = torch.empty((chunks, 2, gemm_n), dtype=torch.float32, device=dx.device)
    elif whole_depth and chunks >= _MANY_TILES:
        program_tiles = tiles_n
    require_pixels(dx if a[0] is None else a[0], chunks * chunk_pixels)
    grid = (chunks * triton.cdiv(tiles_n, program_tiles),)
    if grid[0]:
        with on_device_of(dx):
            _conv1x1_dgrad_kernel[grid](
                *gradient,
                w,
                *a,
                *(relu_of or (None, None)),
                *addend[:2],
                dx,
                sums,
                gemm_m,
                gemm_n,
                gemm_k,
                in_h,
                in_w,
                out_h,
                out_w,
                chunk_pixels,
                program_tiles,
                STRIDE=stride,
                ADDEND_STRIDE=addend_stride,
                WHOLE_DEPTH=whole_depth,
                SHORT_A=gemm_n <= config.block_k,
                INPUT_PRECISION=input_precision(dx.dtype),
                **tile_options(config),
            )
    return sums


def _launch_resident(dout, mask, w_g, a, w_a, w_1, da, plan):
    """Launch the kernel whose programs keep both weights, on checked operands. Returns the sums."""
    n, k, height, width = da.shape
    pixels, chunks = n * height * width, plan.statistics_rows(k)
    chunk_pixels = plan.chunk_pixels(pixels, chunks)
    require_pixels(da, chunks * chunk_pixels)
    sums = torch.empty((chunks, 2, k), dtype=torch.float32, device=da.device)
    with on_device_of(da):
        _conv1x1_dgrad_resident_kernel[(chunks,)](
            dout,
            mask,
            w_g,
            *a,
            w_a,
            w_1,
            da,
            sums,
            pixels,
            k,
            dout.shape[1],
            chunk_pixels,
            INPUT_PRECISION=input_precision(da.dtype),
            **tile_options(plan.config),
        )
    return sums


def launch_conv1x1_dgrad(grad, w, geometry, input_hw, relu_of, addend, addend_stride, plan):
    """dx = dc w + addend, [N, C, H, W] in g's dtype, and sums of it if ``relu_of`` is given.

    grad: Gradient(g [N, K, H, W], mask | None, c [N, K, H, W] | None, coef [3, K] | None), deferred or not; w
    [K, C, 1, 1] of a 1x1 convolution of stride 1; relu_of: Deferred(c [N, C, H, W], bn [5, C]), the activation the
    convolution read: dx is masked by its ReLU and sums [T, 2, C] fp32 = (sum dx, sum dx * xhat) of the fp32 values come
    back, else None. addend: Gradient(g, mask) on every addend_stride-th row and column.
    """
    if require_pointwise(geometry) != 1:
        raise ValueError(f"stride {tuple(geometry.stride)}: dx has the pixels of g")
    gradient = require_gradient(grad)
    g = grad.g
    if tuple(g.shape[2:]) != tuple(input_hw):
        raise ValueError(f"g is {tuple(g.shape)}; expected the height and width {tuple(input_hw)}")
    _require_matrix("weight", w, g.shape[1], w.shape[1], g)
    dx = empty_rows(g.shape[0], w.shape[1], *input_hw, like=g)
    if relu_of is not None:
        require_deferred("relu_of", relu_of)
        require_like("relu_of", relu_of.c, dx)
        if relu_of.bn is None:
            raise ValueError("relu_of has no BatchNorm, whose sums are asked for")
    if addend is not None:
        require_addend(addend, addend_stride, dx)
    sums = _launch_dgrad(
        gradient, w, dx, plan, relu_of=relu_of, addend=addend or (None, None), addend_stride=addend_stride
    )
    return dx, sums


def launch_conv1x1_dgrad_moments(dout, mask, w_g, a, w_a, w_1, stride, plan):
    """da = g w_g + a w_a + w_1, [N, K, P, Q] in dout's dtype, with g = dout where mask; and sums of it if a has a bn.

    dout [N, N_out, P, Q]; mask its ReLU bits or None; w_g [N_out, K], w_a [K, K], w_1 [K] fp32 as
    `reference.moments_weights` makes them. a: Deferred(c [N, K, H, W], bn | None), read at every stride-th row and
    column. With a bn (stride 1) da is masked by the ReLU of `a`, and sums [T, 2, K] fp32 come back, else None.
    """
    require_deferred("a", a)
    n, k, height, width = a.c.shape
    shape = (n, dout.shape[1], -(-height // stride), -(-width // stride))
    if tuple(require_rows("dout", dout).shape) != shape or dout.dtype != a.c.dtype:
        raise ValueError(f"dout is {tuple(dout.shape)} {dout.dtype}; expected {shape} {a.c.dtype}")
    if a.bn is not None and stride != 1:
        raise ValueError(f"stride {stride}: the activation of a deferred BatchNorm is read at every pixel")
    if mask is not None:
        require_mask(mask, dout)
    _require_matrix("w_g", w_g, dout.shape[1], k, dout)
    _require_matrix("w_a", w_a, k, k, dout)
    if w_1.shape != (k,) or w_1.dtype != torch.float32 or not w_1.is_contiguous():
        raise ValueError(f"w_1 must be contiguous fp32 [{k}]; got {tuple(w_1.shape)} {w_1.dtype}")
    da = empty_rows(n, k, *shape[2:], like=dout)
    config = plan.config
    if a.bn is not None and k <= config.block_n and dout.shape[1] <= config.block_k:
        return da, _launch_resident(dout, mask, w_g, a, w_a, w_1, da, plan)
    relu_of = None if a.bn is None else a
    sums = _launch_dgrad((dout, mask, None, None), w_g, da, plan, a=(*a, w_a, w_1), stride=stride, relu_of=relu_of)
    return da, sums


def launch_conv1x1_wgrad(a, grad, w_shape, geometry, plan):
    """dw = sum over pixels of dc times relu(bn(a)), [K, C, 1, 1] fp32 in channels_last memory.

    a: Deferred(c [N, C, H, W], bn [5, C] | None), read at every stride-th row and column; grad: Gradient(g
    [N, K, P, Q], mask | None, c | None, coef | None), deferred or not. The tile is block_m output channels x block_n
    input channels, block_k pixels deep.
    """
    stride = require_pointwise(geometry)
    require_deferred("a", a)
    gradient = require_gradient(grad)
    g, config = grad.g, plan.config
    (k, c), (n, channels, in_h, in_w) = w_shape[:2], a.c.shape
    if c != channels or a.c.dtype != g.dtype or tuple(w_shape[2:]) != (1, 1):
        raise ValueError(
            f"a is {tuple(a.c.shape)} {a.c.dtype}; expected {c} channels of {g.dtype} for {tuple(w_shape)}"
        )
    shape = (n, k, *output_hw((in_h, in_w), w_shape, geometry))
    if tuple(g.shape) != shape:
        raise ValueError(f"g is {tuple(g.shape)}; expected {shape}")
    pixels = n * shape[2] * shape[3]
    chunks = wgrad_chunks(w_shape, pixels)
    chunk_pixels = triton.cdiv(triton.cdiv(pixels, chunks), config.block_k) * config.block_k
    require_pixels(a.c, chunks * chunk_pixels + config.block_k)
    dw = torch.empty((k, 1, 1, c), dtype=torch.float32, device=g.device)
    parts = dw if chunks == 1 else torch.empty((chunks, *dw.shape), dtype=torch.float32, device=g.device)
    with on_device_of(g):
        _conv1x1_wgrad_kernel[(chunks * triton.cdiv(k, config.block_m) * triton.cdiv(c, config.block_n),)](
            *a,
            *gradient,
            parts,
            k,
            c,
            in_h,
            in_w,
            *shape[2:],
            pixels,
            chunk_pixels,
            STRIDE=stride,
            INPUT_PRECISION=input_precision(g.dtype),
            **tile_options(config),
        )
        if chunks > 1:
            add_chunks(parts, dw)
    return dw.permute(0, 3, 1, 2)
