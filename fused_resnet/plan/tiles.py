"""Tiles of the Triton kernels: what a kernel can run, and what it takes by default, both with reasons."""

from __future__ import annotations

from dataclasses import replace

from .problem import (
    ITEMSIZE,
    Device,
    Problem,
    TileConfig,
    chunk_pixels,
    next_power_of_two,
    power_of_two,
    statistics_rows,
)


def _accumulators(problem: Problem) -> int:
    """fp32 tiles a thread block keeps in registers.

    The two sides of a join have scales of their own, moments keep the results of a step beside their sum: two tiles.
    Behind products of small matrices come fp64 tiles, as large as two.
    """
    if problem.op in MATRIX_OPS:
        return 4
    return 2 if problem.epilogue == "join_downsample" or problem.op == "moments" else 1


def gemm_smem(problem: Problem, config: TileConfig) -> int:
    """Upper estimate (bytes) of the shared memory of a pipelined GEMM kernel; tests hold it against the compiler.

    The stages of both operands; the epilogue's change of layout comes after them, in the same memory. A deferred
    gradient is two tensors.
    """
    if problem.op in MATRIX_OPS:
        # The left operand is computed from moments in fp64; the parts of a product split in three follow.
        row = 8 * config.block_m + ITEMSIZE[problem.dtype] * config.block_n
        return config.num_stages * config.block_k * row + 8192
    if problem.op in PRODUCT_OPS:
        # Operands that are transformed, or split for TF32, are written back for the tensor cores: one stage more.
        copies = config.num_stages + (problem.dtype == "float32")
        operands = copies * (config.block_m + config.block_n) * config.block_k * ITEMSIZE[problem.dtype]
        return max(operands, config.block_m * config.block_n * 4) + 6144
    if problem.op == "conv1x1_dgrad_moments" and resident_weights(problem, config):
        # Two operands and two weights; the operand whose ReLU bits are applied is written back for the tensor cores.
        rows = config.block_n + config.num_stages * config.block_m
        return rows * (config.block_k + config.block_n) * ITEMSIZE[problem.dtype] + 2048
    if problem.op == "conv_stats" and (problem.r, problem.s) == (1, 1) and problem.c <= config.block_k:
        # The weight stays, and the pipeline runs over tiles, with their epilogues in it.
        operands = (config.num_stages * config.block_m + config.block_n) * config.block_k * ITEMSIZE[problem.dtype]
        return operands + config.block_m * config.block_n * 4 + 512
    plain = (problem.r, problem.s, problem.stride) == (1, 1, (1, 1))
    deferred = problem.prologue if problem.op == "conv_dgrad" else plain and problem.op == "conv_wgrad"
    rows = config.block_m * (2 if deferred else 1) + config.block_n
    stages = config.num_stages * rows * config.block_k * ITEMSIZE[problem.dtype]
    if problem.op == "conv_dgrad" and plain and problem.c <= config.block_k:
        # One step: the pipeline runs over tiles, with their epilogues in it.
        stages += config.block_m * config.block_n * ITEMSIZE[problem.dtype]
    return max(stages, config.block_m * config.block_n * 4) + 2048


def resident_weights(problem: Problem, config: TileConfig) -> bool:
    """Whether an input gradient from moments keeps its weights in shared memory: they are one tile."""
    return problem.prologue and problem.c <= config.block_n and problem.k <= config.block_k


def _gemm_unsupported(problem: Problem, config: TileConfig | None, device: Device) -> str | None:
    """The limits of every GEMM-shaped kernel: its channels and its tile."""
    if min(problem.c, problem.k) < 1:
        return "no channels"
    if config is None:
        return None
    blocks = (config.block_m, config.block_n, config.block_k)
    if not all(power_of_two(block) and block >= 16 for block in blocks):
        return f"tile {blocks}: extents must be powers of two of at least 16"
    if config.block_m > 256:
        return f"block_m {config.block_m} does not divide the chunks of channel statistics"
    per_thread = _accumulators(problem) * config.block_m * config.block_n // (32 * config.num_warps)
    if per_thread > 128:
        return f"{per_thread} accumulators per thread spill registers (limit 128)"
    smem = gemm_smem(problem, config)
    if smem > device.smem_bytes:
        return f"needs {smem} bytes of shared memory, sm{device.arch} has {device.smem_bytes}"
    return None


def conv1x1_unsupported(problem: Problem, config: TileConfig | None, device: Device) -> str | None:
    if (problem.r, problem.s) != (1, 1):
        return f"no {problem.r}x{problem.s} kernel for {problem.op}"
    if problem.padding != (0, 0):
        return f"padding {problem.padding} on a 1x1 convolution"
    if problem.stride[0] != problem.stride[1]:
        return f"stride {problem.stride}: the 1x1 kernels have one for both directions"
    if problem.groups != 1:
        return f"{problem.groups} groups"
    if config is not None and config.split_k > 1:
        return "this kernel does not split its depth"
    return _gemm_unsupported(problem, config, device)


def conv1x1_heuristic(problem: Problem, device: Device) -> TileConfig:
    """A tile for a 1x1 convolution.

    128 pixels by 64 channels on eight warps: 32 accumulators per thread leave registers for statistics, a residual,
    ReLU bits or a second accumulator. Where tiles would leave SMs idle (late stages, small batches) they shrink.
    """
    full, hopper, stats = problem.dtype == "float32", device.arch == 90, problem.op == "conv_stats"
    if hopper and not full and stats and problem.c <= _resident_depth(problem):
        return _resident_weight(problem, device)
    block_m = 64 if full or (hopper and problem.epilogue == "join_downsample") else 128
    block_m = min(block_m, max(16, next_power_of_two(problem.gemm_m)))
    block_n = min(64, max(16, next_power_of_two(problem.gemm_n)))
    block_k = min(32 if full else 64, max(16, next_power_of_two(problem.gemm_k)))
    if stats:
        # The pixel extent of a program is its row of statistics, whatever the tile: only channels can be split.
        if _statistics_programs(problem, block_n) < device.sm_count:
            block_m, block_n = min(64, block_m), min(32, block_n)
    elif -(-problem.gemm_m // block_m) * -(-problem.gemm_n // block_n) < device.sm_count:
        block_m = min(64, block_m)
    # fp32 operands take twice the registers of 16-bit ones.
    num_warps = 8 if block_m * block_n >= (64 if full else 128) * 64 else 4
    maxnreg = _register_limit(problem, num_warps, device)
    # One more stage than there are steps stays empty.
    steps = -(-problem.gemm_k // block_k)
    for num_stages in range(min(4, steps + 1), 1, -1):
        config = TileConfig(block_m, block_n, block_k, num_warps, num_stages, maxnreg=maxnreg)
        # Two blocks on an SM hide each other's epilogue, so one takes at most half of the shared memory.
        if gemm_smem(problem, config) <= device.smem_bytes // 2:
            break
    return _with_split(problem, config, device)


def _register_limit(problem: Problem, num_warps: int, device: Device) -> int:
    """`TileConfig.maxnreg` of a forward 1x1 kernel.

    The more warps an SM holds, the less it waits for memory. On sm90 128 registers do, for sixteen warps, and with a
    second product 168, for three blocks of four. Left alone, ptxas now takes two registers more, which halves the
    warps, now spills for the sake of more of them: the latter is what the limits of sm100 prevent.
    """
    if problem.dtype == "float32" or device.arch < 90:
        return 0
    if device.arch == 90:
        return 168 if problem.epilogue == "join_downsample" else 128
    return 168 if num_warps == 4 else 128 if problem.epilogue == "join" else 0


def _statistics_programs(problem: Problem, block_n: int) -> int:
    chunk = chunk_pixels(max(1, problem.gemm_m), statistics_rows(problem.gemm_n))
    return -(-problem.gemm_m // chunk) * -(-problem.gemm_n // block_n)


def _resident_depth(problem: Problem) -> int:
    """The largest depth in one step: a deferred activation passes through registers, which hold half as much."""
    return 128 if problem.prologue else 256


def _resident_weight(problem: Problem, device: Device) -> TileConfig:
    """A tile for statistics with the whole depth in one step.

    A program then loads its part of the weight once, not from L2 for each of its tiles, and the pipeline runs on from
    tile to tile: the next pixels arrive while statistics of these are taken.
    """
    block_m = min(64, max(16, next_power_of_two(problem.gemm_m)))
    block_n = min(64, max(16, next_power_of_two(problem.gemm_n)))
    if _statistics_programs(problem, block_n) < device.sm_count:
        block_n = min(32, block_n)
    config = TileConfig(block_m, block_n, max(16, next_power_of_two(problem.c)), 4, 3, maxnreg=128)
    return _deepest(problem, config, device.smem_bytes // 2)


# Tiles of a forward 1x1 worth a measurement. On sm90 the first two put sixteen warps on an SM, the third twelve; wider
# ones read pixels from L2 less often. Those of depth 128 and 256 are for statistics, see `_resident_weight`.
_CONV1X1_TILES = tuple(
    TileConfig(*tile[:5], maxnreg=tile[5])
    for tile in (
        (128, 64, 64, 8, 4, 128), (64, 64, 64, 4, 4, 128), (64, 128, 64, 4, 3, 168), (128, 128, 64, 8, 3, 0),
        (128, 256, 64, 8, 3, 0), (64, 64, 128, 4, 3, 128), (64, 64, 256, 4, 2, 128), (64, 64, 256, 4, 3, 128),
    )
)  # fmt: skip
# Registers per accumulator, itself included, that an epilogue takes beside 40 for addresses, as compiled for sm90.
_PER_ACCUMULATOR = {"affine": 1, "affine+residual": 2, "join": 2, "stats": 2.5, "join_downsample": 4}


def conv1x1_tiles(problem: Problem) -> list[TileConfig]:
    """What a tuner tries for a 1x1 convolution: no tile that reaches past the channels, spills, or has idle stages."""
    tiles, resident = [], _resident_depth(problem) if problem.op == "conv_stats" else 0
    for tile in _CONV1X1_TILES:
        steps = -(-problem.c // tile.block_k)
        accumulators = tile.block_m * tile.block_n // (32 * tile.num_warps)
        registers = 40 + _PER_ACCUMULATOR[problem.epilogue] * accumulators
        if tile.block_n > max(64, next_power_of_two(problem.k)) or registers > (tile.maxnreg or 255):
            continue
        if tile.block_k <= 64:
            tiles.append(replace(tile, num_stages=min(tile.num_stages, steps + 1)))
        elif tile.block_k // 2 < problem.c <= min(tile.block_k, resident):
            tiles.append(tile)
    return tiles


def conv1x1_grad_unsupported(problem: Problem, config: TileConfig | None, device: Device) -> str | None:
    if problem.stride != (1, 1) and (problem.op == "conv_dgrad" or (problem.op != "conv_wgrad" and problem.prologue)):
        return f"stride {problem.stride}: the result has the pixels of what it is masked by"
    return conv1x1_unsupported(problem, config, device)


def conv1x1_grad_heuristic(problem: Problem, device: Device) -> TileConfig:
    """A tile for the gradients of a 1x1 convolution, for the most part as the compiler's registers allow.

    For the input, 64 pixels by 64 columns on four warps: prologue and sums take about 100 registers, so that three such
    blocks share an SM on sm90 and hide each other's latency, where one of eight warps would stand alone (sm100
    multiplies 128 pixels at a time, on eight warps). Where that would read and rebuild a deep gradient again for more
    columns, 128 x 128 on eight warps reads it once, and 128 x 256 fewer times where no sums take registers: not on
    sm80, where they spill. For many columns of many pixels, a gradient of up to 128 channels is one step, rebuilt once;
    of up to 64, for 128 pixels at a time, since every tile of pixels reads the weight again. From moments of up to 64
    channels, both weights stay in shared memory.
    """
    if problem.op == "conv_wgrad":
        return _conv1x1_wgrad_heuristic(problem, device)
    full, moments = problem.dtype == "float32", problem.op == "conv1x1_dgrad_moments"
    columns, depth = (problem.c, problem.k + problem.c) if moments else (problem.k, problem.c)
    sums = problem.prologue if moments else "relu" in problem.epilogue
    rows = chunk_pixels(max(1, problem.gemm_m), statistics_rows(columns))

    def programs(block_m: int, block_n: int) -> int:
        return -(-problem.gemm_m // (rows if sums else block_m)) * -(-columns // block_n)

    if moments and sums and columns <= 64 and problem.k <= 256 and device.arch == 90 and not full:
        return TileConfig(64, max(16, next_power_of_two(columns)), max(16, next_power_of_two(problem.k)), 4, 2)
    block_m, block_n, num_warps = (64, 64, 8) if full else (128, 64, 8) if device.arch >= 100 else (64, 64, 4)
    whole = not (full or moments or sums) and depth <= 128 and columns > 64 and problem.gemm_m >= 512 * block_m
    wide = device.arch == 90 and columns > 128 and not (full or sums or whole)
    if wide and programs(128, 256) >= device.sm_count:
        return _deepest(problem, TileConfig(128, 256, 32, 8, 4), device.smem_bytes)
    if device.arch >= 90 and columns > 64 and not (full or whole) and programs(128, 128) >= device.sm_count:
        block_m, block_n, num_warps = 128, 128, 8
    if device.arch == 90 and whole and depth <= 64:
        block_m, num_warps = 128, 8
    if programs(block_m, block_n) < device.sm_count:
        block_n = 32
    block_m = min(block_m, max(16, next_power_of_two(problem.gemm_m)))
    block_n = min(block_n, max(16, next_power_of_two(columns)))
    block_k = min(32 if full else 128 if whole else 64, max(16, next_power_of_two(depth)))
    if block_m <= 64 and not full:
        num_warps = 4
    if whole:
        # Only tiles of the weight are in the pipeline, from L2: more stages cost registers, but on sm100.
        stages = 3 if device.arch >= 100 else 2
        return _deepest(problem, TileConfig(block_m, block_n, block_k, num_warps, stages), device.smem_bytes)
    blocks = 1 if num_warps == 8 else 3 if device.arch == 90 else 2
    # Bits of a mask are loaded a step ahead, into the last registers of a wide tile with sums.
    stages = 3 if device.arch < 90 or (moments and sums and block_n > 64) else 4
    return _deepest(problem, TileConfig(block_m, block_n, block_k, num_warps, stages), device.smem_bytes // blocks)


def _conv1x1_wgrad_heuristic(problem: Problem, device: Device) -> TileConfig:
    """As much of the result as a block's registers hold, since every tile reads both operands again: 128 x 256 on sm90
    and later, 128 x 128 before, or where a deferred activation takes registers of its own."""
    if problem.dtype == "float32":
        block_m, block_n, warps = 64, 64, 8
    else:
        block_m, block_n = 128, 128 if problem.prologue or device.arch < 90 else 256
        block_m = min(block_m, max(16, next_power_of_two(problem.k)))
        block_n = min(block_n, max(16, next_power_of_two(problem.c)))
        warps = 8 if block_m * block_n > 128 * 64 else 4
    return _deepest(problem, TileConfig(block_m, block_n, 32, warps, 4), device.smem_bytes)


def _deepest(problem: Problem, config: TileConfig, smem_bytes: int) -> TileConfig:
    """``config``, with fewer stages if this much shared memory holds no more of them."""
    while config.num_stages > 1 and gemm_smem(problem, config) > smem_bytes:
        config = replace(config, num_stages=config.num_stages - 1)
    return config


def conv3x3_unsupported(problem: Problem, config: TileConfig | None, device: Device) -> str | None:
    if problem.groups != 1:
        return (
            f"{problem.groups} groups: the kernels convolve one; tiles of a group's few channels would be mostly empty"
        )
    if min(problem.r, problem.s) < 1:
        return f"no kernel extent: {problem.r}x{problem.s}"
    split = config is not None and config.split_k > 1
    if split and problem.op != "conv_affine":
        return f"split_k {config.split_k}: only an affine epilogue can wait for the sum"
    if split and (reason := _split_unsupported(problem, config)):
        return reason
    if (problem.r, problem.s, problem.stride, problem.padding) == (1, 1, (1, 1), (0, 0)) and not split:
        return "a plain 1x1 convolution is a matrix product, whose operands may come deferred"
    if problem.op == "conv_dgrad" and problem.prologue:
        return "a deferred gradient would be rebuilt for every tap: write it out first"
    if config is not None and config.num_warps > 4 and device.arch < 90:
        return f"{config.num_warps} warps: Triton's mma.sync convolutions were seen wrong with more than four"
    return _gemm_unsupported(problem, config, device)


def _depth_steps(problem: Problem, config: TileConfig) -> int:
    return problem.r * problem.s * -(-problem.c // config.block_k)


def _split_unsupported(problem: Problem, config: TileConfig) -> str | None:
    if config.split_k > _depth_steps(problem, config):
        return f"split_k {config.split_k} of {_depth_steps(problem, config)} steps in depth"
    workspace = 4 * config.split_k * problem.gemm_m * problem.gemm_n
    return f"split_k {config.split_k}: {workspace >> 20} MB of partial products" if workspace > 64 << 20 else None


def _with_split(problem: Problem, config: TileConfig, device: Device) -> TileConfig:
    """Split the depth of an inference convolution whose tiles would leave half of the SMs idle.

    Only from 16 steps in depth on, and at least four to a share: the second kernel costs about as much as ten steps.
    """
    tiles = -(-problem.gemm_m // config.block_m) * -(-problem.gemm_n // config.block_n)
    steps = _depth_steps(problem, config)
    if problem.op != "conv_affine" or steps < 16 or 2 * tiles > device.sm_count:
        return config
    split = replace(config, num_warps=4, split_k=min(device.sm_count // tiles, steps // 4), maxnreg=0)
    return config if _split_unsupported(problem, split) else split


def conv3x3_heuristic(problem: Problem, device: Device) -> TileConfig:
    """A tile for a convolution or gradient with taps, on four warps whatever the tile.

    Triton has miscompiled loops like these for eight warps (pytorch/pytorch#173068): more enter a plan only by a
    measurement that checked the answer. 128 pixels by 64 channels leave registers for every epilogue; the weight
    gradient has none, and takes 128 x 128 where operands come from shared memory (wgmma, tcgen05). Below 8 channels of
    16 bits loads are too narrow for asynchronous copies and pass through registers: fewer pixels.
    """
    full, mma_sync = problem.dtype == "float32", device.arch < 90
    gradient = problem.op in ("conv_dgrad", "conv_wgrad")
    block_m = 64 if full or problem.c < 8 else 128
    block_n = 32 if full and gradient else 64
    block_k = 32 if full or mma_sync else 64
    if problem.op == "conv_wgrad":
        block_n = block_n if full or mma_sync else 128
        block_m = min(block_m, max(16, next_power_of_two(problem.k)))
        block_n = min(block_n, max(16, next_power_of_two(problem.c)))
    else:
        block_m = min(block_m, max(16, next_power_of_two(problem.gemm_m)))
        block_n = min(block_n, max(16, next_power_of_two(problem.k)))
        block_k = min(block_k, max(16, next_power_of_two(problem.c)))
        per_row = problem.op == "conv_stats" or (problem.op == "conv_dgrad" and "relu" in problem.epilogue)
        extent = chunk_pixels(max(1, problem.gemm_m), statistics_rows(problem.k)) if per_row else block_m
        if -(-problem.gemm_m // extent) * -(-problem.k // block_n) < device.sm_count:
            # Rows of statistics fix the pixels of a program: only channels can be split.
            block_m, block_n = (block_m, min(32, block_n)) if per_row else (min(64, block_m), block_n)
    # A small tile of mma.sync leaves room for a fourth stage; at three, ptxas spills a value around the loop.
    for num_stages in (4, 3, 2) if mma_sync and block_m * block_n <= 64 * 64 and not gradient else (3, 2):
        config = TileConfig(block_m, block_n, block_k, 4, num_stages)
        if gemm_smem(problem, config) <= device.smem_bytes // 2:
            break
    return _with_split(problem, config, device)


def moments_unsupported(problem: Problem, config: TileConfig | None, device: Device) -> str | None:
    if problem.stride[0] != problem.stride[1]:
        return f"stride {problem.stride}: one for both directions"
    if problem.op == "cross_sums":
        return elementwise_unsupported(problem, config, device)
    if problem.op == "moments" and config is not None and config.block_k > 64:
        return f"block_k {config.block_k}: tensor cores truncate sums, which costs a variance too much beyond 64 pixels"
    return _gemm_unsupported(problem, config, device)


def moments_heuristic(problem: Problem, device: Device) -> TileConfig:
    """Tiles for moments (channels by channels, pixels) and for what is made of them (input by output channels, depth).

    Up to 128 channels are one tile, so that every pixel is loaded and normalised once, and a gradient, wider than the
    input by far, is read from memory once. On sm90, 64 channels by all columns of a res2 on sixteen warps read either
    operand once, and deep ones take 256 x 128. 64 pixels a step amortise its synchronisations; 32 where registers hold
    no more. Products of small matrices wait for memory, not for arithmetic: few steps, many programs.
    """
    full, mma_sync = problem.dtype == "float32", device.arch < 90
    if problem.op == "cross_sums":
        return TileConfig(128, 32, num_warps=4, num_stages=2)
    if problem.op in MATRIX_OPS:
        return TileConfig(64, 32, 16 if mma_sync else 32, 4, 2)
    if full:
        return TileConfig(64, 64, 16 if mma_sync else 32, 4, 2)
    block_m = min(128, max(64, next_power_of_two(problem.c)))
    if problem.op == "moments":
        if block_m == 64:
            return TileConfig(64, 64, 64, 4, 3) if device.arch == 90 else TileConfig(64, 64, 64, 8, 4)
        block_k = 32 if mma_sync else 64
        return TileConfig(128, 128, block_k // 2 if problem.c > 128 and problem.prologue else block_k, 8, 3)
    if device.arch == 90 and problem.k > 128 and problem.c <= 64:
        return TileConfig(64, 256, 64, 16, 3)
    if device.arch == 90 and problem.c > 128:
        return TileConfig(256, 128, 32, 8, 4)
    return TileConfig(block_m, 128, 32 if mma_sync else 64, 8, 3)


def _slice_depth(problem: Problem) -> int:
    """Values that an output of the stem's kernels reads from one row of the image, padded to a power of two."""
    return max(16, next_power_of_two(problem.s) * next_power_of_two(problem.c))


def stem_smem(problem: Problem, config: TileConfig) -> int:
    """`gemm_smem` of the stem's kernels: all slices of the depth at once, those of the weight without stages.

    Without stages the epilogue's change of layout takes the place of the slices; else it comes on top.
    """
    item, weight = ITEMSIZE[problem.dtype], 0
    if problem.op == "conv_wgrad":
        slices = (config.block_m + problem.r * config.block_n) * config.block_k * item
    else:
        slices = config.block_m * problem.r * config.block_k * item
        weight = config.block_n * problem.r * config.block_k * item
    exchange = config.block_m * config.block_n * 4
    staged = max(slices, exchange) if config.num_stages == 1 else config.num_stages * slices + exchange
    return weight + staged + 2048


def stem_unsupported(problem: Problem, config: TileConfig | None, device: Device) -> str | None:
    if problem.c > 4 or problem.groups != 1:
        return f"{problem.c} channels in {problem.groups} groups: the stem's kernels read images of up to 4 channels"
    if problem.prologue:
        return "a BatchNorm in front of an image"
    if min(problem.c, problem.k) < 1:
        return "no channels"
    if problem.r * problem.s < 2:
        return f"a {problem.r}x{problem.s} kernel has no rows of taps"
    depth = _slice_depth(problem)
    if problem.r * depth > 256:
        return f"a {problem.r}x{problem.s} kernel is {problem.r * depth} deep: 256 fit into shared memory"
    if config is None:
        return None
    gradient = problem.op == "conv_wgrad"
    blocks = (config.block_m, config.block_n, config.block_k)
    if not all(power_of_two(block) and block >= 16 for block in blocks) or config.split_k != 1:
        return f"tile {blocks}, split_k {config.split_k}: extents must be powers of two of at least 16, the depth whole"
    if (config.block_n if gradient else config.block_k) != depth:
        return f"tile {blocks}: a row of the kernel is {depth} deep"
    if config.block_m > 256 or (problem.op == "conv_affine_pool" and config.block_m < 32):
        return f"block_m {config.block_m}: at most 256, and at least 32 for two halves"
    if config.num_warps > 4 and device.arch < 90:
        return f"{config.num_warps} warps: Triton's mma.sync convolutions were seen wrong with more than four"
    # Statistics keep two half tiles of sums, the pool a maximum, the gradient accumulators for each row of the kernel.
    tiles = {"conv_stats": 2, "conv_affine_pool": 2, "conv_wgrad": problem.r}.get(problem.op, 1)
    per_thread = tiles * config.block_m * config.block_n // (32 * config.num_warps)
    if per_thread > 128:
        return f"{per_thread} accumulators per thread spill registers (limit 128)"
    smem = stem_smem(problem, config)
    if smem > device.smem_bytes:
        return f"needs {smem} bytes of shared memory, sm{device.arch} has {device.smem_bytes}"
    return None


def stem_heuristic(problem: Problem, device: Device) -> TileConfig:
    """A tile of 64 pixels by 64 channels on four warps, without stages.

    The patches of a tile are loaded all at once and pass through registers, of which that tile leaves so many that four
    blocks share an SM and hide each other's loads. The weight gradient has accumulators for each row of the kernel: 32
    channels and fewer pixels where mma.sync takes its operands from registers, too.
    """
    full, mma_sync, depth = problem.dtype == "float32", device.arch < 90, _slice_depth(problem)
    channels = max(16, next_power_of_two(problem.k))
    if problem.op == "conv_wgrad":
        block_m = min(32 if mma_sync else 64, channels)
        return TileConfig(block_m, depth, 32 if full or mma_sync else 64, 4, 1)
    block_n = min(64, channels)
    if problem.op == "conv_stats" and not full:
        # The pixel extent of a program is its row of statistics, whatever the tile: only channels can be split.
        chunk = chunk_pixels(max(1, problem.gemm_m), statistics_rows(problem.k))
        if -(-problem.gemm_m // chunk) * -(-problem.k // block_n) < device.sm_count:
            block_n = min(32, block_n)
    for block_m in (64, 32) if not (full and mma_sync) else (32,):
        config = TileConfig(block_m, block_n, depth, 4, 1)
        if stem_smem(problem, config) <= device.smem_bytes:
            break
    return config


def elementwise_unsupported(problem: Problem, config: TileConfig | None, device: Device) -> str | None:
    if config is None:
        return None
    if not (power_of_two(config.block_m) and power_of_two(config.block_n)) or config.block_n < 8:
        return f"tile {(config.block_m, config.block_n)}: powers of two, at least 8 channels"
    if config.block_m > 256:
        return f"block_m {config.block_m} does not divide the chunks of channel statistics"
    per_thread = config.block_m * config.block_n // (32 * config.num_warps)
    if per_thread > 32:
        return f"{per_thread} values per thread of each tensor spill registers (limit 32)"
    return None


def elementwise_heuristic(problem: Problem, device: Device) -> TileConfig:
    """4096 values for 128 threads: a thread moves 32 values of every tensor, four 16-byte loads at 16 bit each."""
    block_n = min(128, max(8, next_power_of_two(problem.c)))
    if problem.op in VECTOR_OPS:
        # Merging partial rows: latency alone matters. 32 channels make a 128-byte line; rows go in steps of 32.
        return TileConfig(32, min(32, block_n), num_warps=4, num_stages=2)
    values = 2048 if problem.op in SUMMING_OPS else 4096
    return TileConfig(min(256, values // block_n), block_n, num_warps=4, num_stages=2)


def pool_heuristic(problem: Problem, device: Device) -> TileConfig:
    """1024 values for 128 threads: a thread has nine loads of 16 bytes under way.

    Backward it has twelve loads under way, and two sums to keep: half of that leaves every program a place on the GPU.
    """
    block_n = min(128, max(8, next_power_of_two(problem.k)))
    values = 512 if problem.op == "bn_act_pool_backward" else 1024
    return TileConfig(values // block_n, block_n, num_warps=4, num_stages=2)


def library_unsupported(problem: Problem, config: TileConfig | None, device: Device) -> str | None:
    if config is not None and config.block_k:
        return "the passes around the library's convolution have no depth"
    return elementwise_unsupported(problem, config, device)


def library_heuristic(problem: Problem, device: Device) -> TileConfig:
    """The elementwise tile of the result's channels; passes that sum keep two accumulators and take half of it."""
    if problem.op == "conv_affine_pool":
        return pool_heuristic(problem, device)
    tile = elementwise_heuristic(replace(problem, c=problem.k), device)
    return replace(tile, block_m=max(1, min(tile.block_m, 2048 // tile.block_n)))


VECTOR_OPS = frozenset({"bn_finalize", "bn_frozen", "merge_partials", "bn_backward_finalize"})
SUMMING_OPS = frozenset({"bn_act_sums", "join_sums"})
PRODUCT_OPS = frozenset({"moments", "cross_moments"})
MATRIX_OPS = frozenset({"moments_finalize", "moments_weights"})
PIXEL_OPS = frozenset({"bn_act", "bn_join", "relu_grad", "bn_backward_apply"})
