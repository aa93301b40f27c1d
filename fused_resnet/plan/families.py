"""The families of Triton kernels: what each file of them launches, its limits, its default tile, what a tuner tries."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import replace
from typing import NamedTuple

from .problem import Device, Plan, Problem, TileConfig, Unsupported
from .tiles import (
    MATRIX_OPS,
    PIXEL_OPS,
    PRODUCT_OPS,
    SUMMING_OPS,
    VECTOR_OPS,
    conv1x1_grad_heuristic,
    conv1x1_grad_unsupported,
    conv1x1_heuristic,
    conv1x1_tiles,
    conv1x1_unsupported,
    conv3x3_heuristic,
    conv3x3_unsupported,
    elementwise_heuristic,
    elementwise_unsupported,
    gemm_smem,
    library_heuristic,
    library_unsupported,
    moments_heuristic,
    moments_unsupported,
    pool_heuristic,
    stem_heuristic,
    stem_smem,
    stem_unsupported,
)


def _tiles(*tiles: tuple[int, ...]) -> tuple[TileConfig, ...]:
    return tuple(TileConfig(*tile) for tile in tiles)


# Tiles worth a measurement beside the heuristic's own.
_GEMM_TILES = _tiles(
    (128, 128, 64, 8, 3), (128, 128, 32, 4, 4), (128, 64, 64, 4, 4), (128, 64, 64, 8, 3), (64, 128, 64, 4, 4),
    (64, 64, 64, 4, 4), (128, 256, 64, 8, 3), (256, 64, 64, 8, 3), (64, 256, 64, 8, 3), (64, 64, 128, 4, 3),
)  # fmt: skip
# Wide tiles that read an operand once, on eight and on sixteen warps, and small ones of which two or more blocks share
# an SM; for the input, whole depths of res2 and res3.
_DGRAD_TILES = _tiles(
    (64, 64, 64, 4, 4), (64, 64, 128, 4, 2), (64, 64, 256, 4, 2), (64, 128, 64, 4, 3), (128, 64, 64, 8, 2),
    (128, 128, 64, 8, 3), (128, 128, 128, 16, 2), (128, 256, 32, 8, 4), (128, 256, 64, 16, 3),
)  # fmt: skip
_GRAD_TILES = {
    "conv_dgrad": _DGRAD_TILES,
    "conv1x1_dgrad_moments": _DGRAD_TILES,
    "conv_wgrad": _tiles(
        (64, 64, 64, 4, 4), (64, 128, 32, 4, 4), (128, 64, 32, 4, 4), (64, 256, 32, 8, 4), (64, 256, 32, 16, 4),
        (128, 128, 32, 8, 4), (128, 256, 32, 8, 4), (128, 256, 32, 16, 4), (256, 128, 32, 8, 4),
    ),
}  # fmt: skip
_MOMENTS_TILES = {
    "moments": _tiles(
        (64, 64, 64, 8, 4), (64, 64, 64, 4, 3), (64, 64, 32, 4, 4), (128, 128, 64, 8, 3), (128, 128, 32, 8, 3),
        (128, 128, 64, 16, 3),
    ),
    "cross_moments": _tiles(
        (64, 128, 32, 8, 4), (64, 256, 64, 16, 3), (64, 256, 32, 16, 4), (128, 128, 64, 8, 3), (128, 128, 32, 8, 3),
        (128, 128, 32, 16, 4), (128, 256, 32, 8, 4), (256, 128, 32, 8, 4),
    ),
}  # fmt: skip
_MATRIX_TILES = {
    op: _tiles((64, 32, 32, 4, 2), (32, 32, 32, 4, 2), (128, 32, 32, 8, 2), (64, 64, 32, 8, 2)) for op in MATRIX_OPS
} | {"cross_sums": _tiles((32, 32, 0, 4, 2), (128, 32, 0, 4, 2), (256, 16, 0, 4, 2))}
# Depths of a 7x7 kernel's rows; the gradient's have pixels last.
_STEM_TILES = _tiles(
    (64, 64, 32, 4, 1), (128, 64, 32, 4, 1), (64, 32, 32, 4, 1), (128, 32, 32, 4, 1), (64, 64, 32, 4, 2),
    (128, 64, 32, 8, 1), (64, 32, 64, 4, 1), (64, 32, 64, 4, 2), (64, 32, 128, 4, 1), (64, 32, 64, 8, 1),
)  # fmt: skip
_MAP_TILES = tuple(
    TileConfig(m, n, 0, warps, 2)
    for m, n, warps in ((16, 64, 4), (32, 64, 4), (64, 64, 4), (32, 128, 4), (64, 128, 8), (128, 64, 8))
)


class Family(NamedTuple):
    """What planning knows of one file of Triton kernels.

    ``launches``: operator -> launch function in ``kernels/<module>.py``; ``unsupported``: its limits, as a reason or
    None; ``heuristic``: its default tile; ``tiles``: what a tuner tries beside it, for every problem or as a function
    of one; ``smem``: upper estimate of a GEMM's shared memory.
    """

    module: str
    launches: dict[str, str]
    unsupported: Callable[[Problem, TileConfig | None, Device], str | None]
    heuristic: Callable[[Problem, Device], TileConfig]
    tiles: tuple[TileConfig, ...] | Callable[[Problem], Iterable[TileConfig]] = _GEMM_TILES
    smem: Callable[[Problem, TileConfig], int] = gemm_smem


FAMILIES = (
    Family(
        "conv1x1",
        {
            "conv_stats": "launch_conv1x1_stats",
            "conv_affine": "launch_conv1x1_affine",
            "conv1x1_join": "launch_conv1x1_join",
        },
        conv1x1_unsupported,
        conv1x1_heuristic,
        conv1x1_tiles,
    ),
    # In front of the other convolutions: with four channels or fewer their taps would be mostly padding.
    Family(
        "stem",
        {
            "conv_stats": "launch_stem_stats",
            "conv_affine": "launch_stem_affine",
            "conv_affine_pool": "launch_stem_pool",
            "conv_wgrad": "launch_stem_wgrad",
        },
        stem_unsupported,
        stem_heuristic,
        _STEM_TILES,
        stem_smem,
    ),
    Family(
        "conv1x1_grad",
        {
            "conv_dgrad": "launch_conv1x1_dgrad",
            "conv_wgrad": "launch_conv1x1_wgrad",
            "conv1x1_dgrad_moments": "launch_conv1x1_dgrad_moments",
        },
        conv1x1_grad_unsupported,
        conv1x1_grad_heuristic,
        lambda problem: _GRAD_TILES[problem.op],
    ),
    Family(
        "conv3x3",
        {"conv_stats": "launch_conv3x3_stats", "conv_affine": "launch_conv3x3_affine"},
        conv3x3_unsupported,
        conv3x3_heuristic,
    ),
    Family(
        "conv3x3_grad",
        {"conv_dgrad": "launch_conv3x3_dgrad", "conv_wgrad": "launch_conv3x3_wgrad"},
        conv3x3_unsupported,
        conv3x3_heuristic,
    ),
    Family(
        "moments",
        {op: f"launch_{op}" for op in sorted(PRODUCT_OPS)},
        moments_unsupported,
        moments_heuristic,
        lambda problem: _MOMENTS_TILES[problem.op],
    ),
    Family(
        "moments_matrices",
        {op: f"launch_{op}" for op in sorted(_MATRIX_TILES)},
        moments_unsupported,
        moments_heuristic,
        lambda problem: _MATRIX_TILES[problem.op],
    ),
    Family(
        "bn",
        {op: f"launch_{op}" for op in sorted(VECTOR_OPS | SUMMING_OPS | PIXEL_OPS)},
        elementwise_unsupported,
        elementwise_heuristic,
        _MAP_TILES,
    ),
    Family(
        "pool",
        {"bn_act_pool": "launch_bn_act_pool", "bn_act_pool_backward": "launch_bn_act_pool_backward"},
        elementwise_unsupported,
        pool_heuristic,
        _MAP_TILES,
    ),
    # Last: where a kernel of our own can run, asking for Triton means that one. A tile without depth asks for this.
    Family(
        "conv_library",
        {
            "conv_stats": "launch_library_stats",
            "conv_affine": "launch_library_affine",
            "conv_affine_pool": "launch_library_affine_pool",
            "conv_dgrad": "launch_library_dgrad",
            "conv_wgrad": "launch_library_wgrad",
        },
        library_unsupported,
        library_heuristic,
        _MAP_TILES,
    ),
)


def family_of(problem: Problem, config: TileConfig | None, device: Device) -> Family | str:
    """The first family whose kernels can run ``problem`` with ``config`` on ``device``, or the reason why none can."""
    if problem.dtype not in ("bfloat16", "float16", "float32"):
        return f"Triton kernels accumulate in fp32; {problem.dtype} data needs more"
    if device.arch < 80:
        return f"sm{device.arch}: Triton kernels need sm80 or later"
    if max(problem.n * problem.h * problem.w, problem.gemm_m) >= 2**31:
        return "2**31 pixels or more: pixel indices are 32-bit"
    if config is not None and (config.num_warps not in (1, 2, 4, 8, 16) or config.num_stages < 1):
        return f"num_warps {config.num_warps}, num_stages {config.num_stages}"
    if config is not None and config.maxnreg and not 32 <= config.maxnreg <= min(255, 2048 // config.num_warps):
        return f"maxnreg {config.maxnreg} of {config.num_warps} warps: from 32 on, and an SM has 65536"
    reasons = []
    for family in FAMILIES:
        if problem.op in family.launches:
            reason = family.unsupported(problem, config, device)
            if reason is None:
                return family
            reasons.append(reason)
    return "; ".join(dict.fromkeys(reasons)) or f"{problem.op} has no Triton kernel"


def unsupported(problem: Problem, config: TileConfig | None, device: Device) -> str | None:
    """Why no Triton kernel can run ``problem`` with ``config`` on ``device``, or None if one can.

    The one predicate that heuristic, table loader, tuner and tests share. ``config`` None asks about the problem
    alone.
    """
    found = family_of(problem, config, device)
    return found if isinstance(found, str) else None


def own_kernel_refusal(problem: Problem, device: Device) -> str:
    """Why a convolution goes to the library and passes around it: what the kernels of our own say."""
    own = (family for family in FAMILIES if problem.op in family.launches and family.module != "conv_library")
    return "; ".join(dict.fromkeys(filter(None, (family.unsupported(problem, None, device) for family in own))))


def triton_plan(problem: Problem, config: TileConfig | None, device: Device, reason: str) -> Plan:
    """The Plan that runs ``problem`` in Triton, ``config`` None: with the heuristic's; `Unsupported` if none."""
    found = family_of(problem, config, device)
    if isinstance(found, Family) and config is None:
        config = found.heuristic(problem, device)
        found = family_of(problem, config, device)
    if isinstance(found, str):
        raise Unsupported(f"{problem.op}: {found}")
    return Plan("triton", config, reason, found.module, found.launches[problem.op])


def candidates(problem: Problem, device: Device) -> list[TileConfig]:
    """The heuristics' tiles and the legal ones of every family that can run the problem, without repetition."""
    tiles: dict[TileConfig, None] = {}
    for family in FAMILIES:
        if problem.op in family.launches and family.unsupported(problem, None, device) is None:
            first = family.heuristic(problem, device)
            splits = [replace(first, split_k=split) for split in (1, first.split_k // 2) if 0 < split < first.split_k]
            others = family.tiles(problem) if callable(family.tiles) else family.tiles
            # What a family in front of this one would run is that family's to name.
            named = (first, *splits, *others)
            tiles |= dict.fromkeys(t for t in named if not tiles or family_of(problem, t, device) is family)
    return [tile for tile in tiles if unsupported(problem, tile, device) is None]
