"""What a tile means on a card, in words: the reason that a plan from the heuristic carries."""

from __future__ import annotations

from .families import family_of
from .problem import Device, Problem, TileConfig

# Threads that an SM holds at most; registers may allow fewer, which only the compiler knows where a tile sets no limit.
_THREADS = {86: 1536, 89: 1536}
_REGISTERS = 65536
_RESERVED = 1024  # bytes of shared memory that the driver keeps of every block


def blocks_per_sm(problem: Problem, config: TileConfig, device: Device) -> int:
    """Thread blocks that shared memory, threads and, where the tile limits them, registers of an SM have room for."""
    threads = 32 * config.num_warps
    blocks = _THREADS.get(device.arch, 2048) // threads
    if config.maxnreg:
        blocks = min(blocks, _REGISTERS // (threads * config.maxnreg))
    if config.block_k:
        # An SM has what one block may have at most, and the driver's part of that block.
        smem = family_of(problem, config, device).smem(problem, config)
        blocks = min(blocks, (device.smem_bytes + _RESERVED) // (smem + _RESERVED))
    return blocks


def output_tiles(problem: Problem, config: TileConfig) -> int:
    """Tiles that cover the operator's output: pixels by channels, or the weight of a gradient by its K and C R S."""
    rows, columns = problem.gemm_m, problem.k
    if problem.op == "conv_wgrad":
        rows, columns = problem.k, problem.gemm_k
    elif problem.op in ("moments", "cross_moments"):
        rows = problem.c
    elif problem.op == "conv1x1_dgrad_moments":
        columns = problem.c
    return -(-rows // config.block_m) * -(-columns // config.block_n)


def tile_reason(problem: Problem, config: TileConfig, device: Device) -> str:
    """For instance "128x64x64, 8 warps, 128 registers: room for 2 blocks on an SM, 392 output tiles on 132 SMs"; the
    registers of a thread only where the tile limits them."""
    extents = "x".join(str(extent) for extent in (config.block_m, config.block_n, config.block_k) if extent)
    blocks, tiles = blocks_per_sm(problem, config, device), output_tiles(problem, config)
    room = f"{blocks} block{'s' if blocks != 1 else ''}"
    registers = f", {config.maxnreg} registers" if config.maxnreg else ""
    shares = f" in {config.split_k} shares of the depth" if config.split_k > 1 else ""
    return (
        f"{extents}, {config.num_warps} warps{registers}: room for {room} on an SM, {tiles} output tiles{shares} on "
        f"{device.sm_count} SMs"
    )
