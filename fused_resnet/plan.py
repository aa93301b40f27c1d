"""Which kernel runs a problem, and why: Problem -> Plan, in plain Python, testable without a GPU or PyTorch.

A plan comes from the table of measured winners of the card's architecture (``plans/sm90.json``), or, when a
Triton kernel was asked for by name, from a heuristic. Under ``impl="auto"`` a problem nobody has measured on this
architecture goes to the library kernel: a fused kernel is chosen only where it was seen to win.
"""

from __future__ import annotations

import json
import os
import threading
import warnings
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from functools import lru_cache
from pathlib import Path
from typing import NamedTuple

IMPLS = ("auto", "reference", "triton", "cuda")
PLANS = Path(__file__).parent / "plans"
TABLE_FORMAT = 1
# Operator -> launch function in kernels/native.py, which calls the compiled C++/CUDA library.
CUDA_LAUNCHES = {"bn_finalize": "launch_bn_finalize", "bn_join": "launch_bn_join"}
ITEMSIZE = {"bfloat16": 2, "float16": 2, "float32": 4, "float64": 8}

BLOCK_OPS = ("residual_block", "stem")
# Architecture -> SM count and shared memory per block (bytes) of its common data-centre or desktop card. The shared
# memory limit belongs to the architecture; the SM count only shapes the heuristic.
_CARDS = {
    80: (108, 163 * 1024),
    86: (84, 99 * 1024),
    89: (128, 99 * 1024),
    90: (132, 227 * 1024),
    100: (148, 227 * 1024),
}


class Unsupported(RuntimeError):
    """The implementation that was asked for by name cannot run this problem; the message says why."""


ARCHITECTURES = tuple(_CARDS)


@dataclass(frozen=True)
class Device:
    """A CUDA device as far as planning sees it. ``arch`` is 10 * major + minor of the compute capability."""

    arch: int
    sm_count: int
    smem_bytes: int

    @classmethod
    def default(cls, arch: int) -> Device:
        """The usual card of an architecture (80, 86, 89, 90 or 100); KeyError for another one."""
        return cls(arch, *_CARDS[arch])


@dataclass(frozen=True)
class Problem:
    """One operator call, described by everything a choice of kernel may depend on.

    ``n, h, w, c`` are the shape of the operator's first tensor, ``k`` the output channels of its convolution and
    ``r, s`` the kernel; operators without a weight have ``k == c`` and ``r == s == 0``. Partial statistics [T, R, C]
    count as T images of R x 1 pixels. ``prologue`` is True when that tensor comes with a BatchNorm still to be applied.
    ``epilogue`` names what follows the accumulation: "stats", "affine", "affine+residual", "join", "join_downsample" (a
    second GEMM over ``side`` channels of the shortcut, at ``stride``), or "" when the operator has no variants.
    """

    op: str
    n: int
    h: int
    w: int
    c: int
    k: int
    r: int = 0
    s: int = 0
    stride: tuple[int, int] = (1, 1)
    padding: tuple[int, int] = (0, 0)
    dilation: tuple[int, int] = (1, 1)
    groups: int = 1
    dtype: str = "bfloat16"
    prologue: bool = False
    epilogue: str = ""
    side: int = 0

    @property
    def out_hw(self) -> tuple[int, int]:
        """Height and width of the operator's output: of its input for one without a weight, up to an odd remainder that
        the problem does not know for an input gradient."""
        if self.r == 0 or self.op == "conv1x1_join":
            return self.h, self.w
        if self.op == "conv_dgrad":
            return self.h * self.stride[0], self.w * self.stride[1]
        p = (self.h + 2 * self.padding[0] - self.dilation[0] * (self.r - 1) - 1) // self.stride[0] + 1
        q = (self.w + 2 * self.padding[1] - self.dilation[1] * (self.s - 1) - 1) // self.stride[1] + 1
        return p, q

    @property
    def gemm_m(self) -> int:
        p, q = self.out_hw
        return self.n * p * q

    @property
    def gemm_n(self) -> int:
        return self.k

    @property
    def gemm_k(self) -> int:
        return self.c // self.groups * self.r * self.s


@dataclass(frozen=True)
class TileConfig:
    """Tile extents (pixels, channels, depth) and launch parameters of a Triton kernel; ``block_k`` 0: no GEMM."""

    block_m: int
    block_n: int
    block_k: int = 0
    num_warps: int = 4
    num_stages: int = 3


@dataclass(frozen=True)
class Plan:
    """The choice for one problem; ``reason`` is for people.

    ``module`` (of ``kernels``) and ``launch`` name the function that runs a "triton" or "cuda" backend, ``config`` is a
    Triton kernel's tile.
    """

    backend: str
    config: TileConfig | None
    reason: str
    module: str = ""
    launch: str = ""

    @staticmethod
    def statistics_rows(channels: int) -> int:
        """`statistics_rows`, carried by the plan so that kernels need no import of this module."""
        return statistics_rows(channels)

    @staticmethod
    def chunk_pixels(pixels: int, rows: int) -> int:
        """`chunk_pixels`, likewise."""
        return chunk_pixels(pixels, rows)


def statistics_rows(channels: int) -> int:
    """Rows T of the partial statistics [T, 3, C] or sums [T, 2, C] of a tensor with C channels.

    A function of C alone: traced shapes stay static under a dynamic batch, and neither shape nor order of summation
    depends on the card. Few channels get many rows, so that the programs that fill the table, one per row and channel
    tile, occupy a large GPU.
    """
    return max(64, min(512, 65536 // _next_power_of_two(channels)))


def chunk_pixels(pixels: int, rows: int) -> int:
    """Consecutive pixels that each of ``rows`` partial sums covers, a multiple of 256.

    So every power-of-two tile up to 256 divides a chunk. The last one in use may be short; those after it are empty.
    """
    return 256 * -(-pixels // (256 * rows))


class _Choice(threading.local):
    # An instance attribute set in __init__, not a class attribute: torch.compile guards the former, so a compiled
    # function notices a later `use`. It cannot trace contextvars.
    def __init__(self) -> None:
        self.impl = "auto"


_choice = _Choice()


def check_impl(impl: str) -> str:
    """Return ``impl`` if it names an implementation; ValueError otherwise."""
    if impl not in IMPLS:
        raise ValueError(f"impl must be one of {', '.join(IMPLS)}; got {impl!r}")
    return impl


def current_impl() -> str:
    """The implementation chosen by the innermost `use` of this thread; "auto" outside one.

    Autograd runs CUDA backward passes on threads of its own: read this in forward and keep the answer for backward.
    """
    return _choice.impl


def resolve_impl(impl: str | None) -> str:
    """An ``impl`` argument as given, or this thread's choice for None; ValueError for an unknown name."""
    return current_impl() if impl is None else check_impl(impl)


@contextmanager
def use(impl: str) -> Iterator[None]:
    """Make ``impl`` ("auto", "reference", "triton" or "cuda") this thread's choice inside a ``with`` block."""
    check_impl(impl)
    outer = _choice.impl
    _choice.impl = impl
    try:
        yield
    finally:
        _choice.impl = outer


def _power_of_two(value: int) -> bool:
    return value > 0 and value & (value - 1) == 0


def _next_power_of_two(value: int) -> int:
    return 1 << max(0, value - 1).bit_length()


def _accumulators(problem: Problem) -> int:
    """fp32 tiles a thread block keeps in registers. The two sides of a join have scales of their own: two tiles."""
    return 2 if problem.epilogue == "join_downsample" else 1


def _gemm_smem(problem: Problem, config: TileConfig) -> int:
    """Upper estimate (bytes) of the shared memory of a pipelined GEMM kernel; tests hold it against the compiler.

    The stages of both operands; the epilogue's change of layout comes after them, in the same memory.
    """
    stages = config.num_stages * (config.block_m + config.block_n) * config.block_k * ITEMSIZE[problem.dtype]
    return max(stages, config.block_m * config.block_n * 4) + 2048


def _gemm_unsupported(problem: Problem, config: TileConfig | None, device: Device) -> str | None:
    """The limits of every GEMM-shaped kernel: its channels and its tile."""
    if min(problem.c, problem.k) < 1:
        return "no channels"
    if config is None:
        return None
    blocks = (config.block_m, config.block_n, config.block_k)
    if not all(_power_of_two(block) and block >= 16 for block in blocks):
        return f"tile {blocks}: extents must be powers of two of at least 16"
    if config.block_m > 256:
        return f"block_m {config.block_m} does not divide the chunks of channel statistics"
    per_thread = _accumulators(problem) * config.block_m * config.block_n // (32 * config.num_warps)
    if per_thread > 128:
        return f"{per_thread} accumulators per thread spill registers (limit 128)"
    smem = _gemm_smem(problem, config)
    if smem > device.smem_bytes:
        return f"needs {smem} bytes of shared memory, sm{device.arch} has {device.smem_bytes}"
    return None


def _conv1x1_unsupported(problem: Problem, config: TileConfig | None, device: Device) -> str | None:
    if (problem.r, problem.s) != (1, 1):
        return f"no {problem.r}x{problem.s} kernel for {problem.op}"
    if problem.padding != (0, 0):
        return f"padding {problem.padding} on a 1x1 convolution"
    if problem.groups != 1:
        return f"{problem.groups} groups"
    return _gemm_unsupported(problem, config, device)


def _conv1x1_heuristic(problem: Problem, device: Device) -> TileConfig:
    """A tile for a 1x1 convolution.

    128 pixels by 64 channels on eight warps: 32 accumulators per thread leave registers for statistics, a residual,
    ReLU bits or a second accumulator. Twice as many spill in one of these epilogues or another on sm90 and sm100
    (tests compile them all); where they pay, measurement finds them. Where tiles would leave SMs idle (late stages,
    small batches) they shrink.
    """
    full = problem.dtype == "float32"
    block_m = min(64 if full else 128, max(16, _next_power_of_two(problem.gemm_m)))
    block_n = min(64, max(16, _next_power_of_two(problem.gemm_n)))
    block_k = min(32 if full else 64, max(16, _next_power_of_two(problem.gemm_k)))
    if problem.op == "conv_stats":
        # The pixel extent of a program is its row of statistics, whatever the tile: only channels can be split.
        chunk = chunk_pixels(max(1, problem.gemm_m), statistics_rows(problem.gemm_n))
        if -(-problem.gemm_m // chunk) * -(-problem.gemm_n // block_n) < device.sm_count:
            block_n = min(32, block_n)
    elif -(-problem.gemm_m // block_m) * -(-problem.gemm_n // block_n) < device.sm_count:
        block_m = min(64, block_m)
    # fp32 operands take twice the registers of 16-bit ones.
    num_warps = 8 if block_m * block_n >= (64 if full else 128) * 64 else 4
    for num_stages in (4, 3, 2):
        config = TileConfig(block_m, block_n, block_k, num_warps, num_stages)
        # Two blocks on an SM hide each other's epilogue, so one takes at most half of the shared memory.
        if _gemm_smem(problem, config) <= device.smem_bytes // 2:
            break
    return config


def _conv3x3_unsupported(problem: Problem, config: TileConfig | None, device: Device) -> str | None:
    if problem.groups != 1:
        return (
            f"{problem.groups} groups: the kernels convolve one; tiles of a group's few channels would be mostly empty"
        )
    if min(problem.r, problem.s) < 1:
        return f"no kernel extent: {problem.r}x{problem.s}"
    if (problem.r, problem.s, problem.stride, problem.padding) == (1, 1, (1, 1), (0, 0)):
        return "a plain 1x1 convolution is a matrix product, whose operands may come deferred"
    if problem.op == "conv_dgrad" and problem.prologue:
        return "a deferred gradient would be rebuilt for every tap: write it out first"
    if config is not None and config.num_warps > 4 and device.arch < 90:
        return f"{config.num_warps} warps: Triton's mma.sync convolutions were seen wrong with more than four"
    return _gemm_unsupported(problem, config, device)


def _conv3x3_heuristic(problem: Problem, device: Device) -> TileConfig:
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
        block_m = min(block_m, max(16, _next_power_of_two(problem.k)))
        block_n = min(block_n, max(16, _next_power_of_two(problem.c)))
    else:
        block_m = min(block_m, max(16, _next_power_of_two(problem.gemm_m)))
        block_n = min(block_n, max(16, _next_power_of_two(problem.k)))
        block_k = min(block_k, max(16, _next_power_of_two(problem.c)))
        per_row = problem.op == "conv_stats" or (problem.op == "conv_dgrad" and "relu" in problem.epilogue)
        extent = chunk_pixels(max(1, problem.gemm_m), statistics_rows(problem.k)) if per_row else block_m
        if -(-problem.gemm_m // extent) * -(-problem.k // block_n) < device.sm_count:
            # Rows of statistics fix the pixels of a program: only channels can be split.
            block_m, block_n = (block_m, min(32, block_n)) if per_row else (min(64, block_m), block_n)
    for num_stages in (3, 2):
        config = TileConfig(block_m, block_n, block_k, 4, num_stages)
        if _gemm_smem(problem, config) <= device.smem_bytes // 2:
            break
    return config


def _elementwise_unsupported(problem: Problem, config: TileConfig | None, device: Device) -> str | None:
    if config is None:
        return None
    if not (_power_of_two(config.block_m) and _power_of_two(config.block_n)) or config.block_n < 8:
        return f"tile {(config.block_m, config.block_n)}: powers of two, at least 8 channels"
    if config.block_m > 256:
        return f"block_m {config.block_m} does not divide the chunks of channel statistics"
    per_thread = config.block_m * config.block_n // (32 * config.num_warps)
    if per_thread > 32:
        return f"{per_thread} values per thread of each tensor spill registers (limit 32)"
    return None


def _elementwise_heuristic(problem: Problem, device: Device) -> TileConfig:
    """4096 values for 128 threads: a thread moves 32 values of every tensor, four 16-byte loads at 16 bit each."""
    block_n = min(128, max(8, _next_power_of_two(problem.c)))
    if problem.op in VECTOR_OPS:
        # Merging partial rows: latency alone matters. 32 channels make a 128-byte line; rows go in steps of 32.
        return TileConfig(32, min(32, block_n), num_warps=4, num_stages=2)
    values = 2048 if problem.op in _SUMMING_OPS else 4096
    return TileConfig(min(256, values // block_n), block_n, num_warps=4, num_stages=2)


VECTOR_OPS = frozenset({"bn_finalize", "bn_frozen", "merge_partials", "bn_backward_finalize"})
_SUMMING_OPS = frozenset({"bn_act_sums", "join_sums"})
_PIXEL_OPS = frozenset({"bn_act", "bn_join", "relu_grad", "bn_backward_apply"})


class Family(NamedTuple):
    """What planning knows of one file of Triton kernels.

    ``launches``: operator -> launch function in ``kernels/<module>.py``; ``unsupported``: its limits, as a reason or
    None; ``heuristic``: its default tile.
    """

    module: str
    launches: dict[str, str]
    unsupported: Callable[[Problem, TileConfig | None, Device], str | None]
    heuristic: Callable[[Problem, Device], TileConfig]


FAMILIES = (
    Family(
        "conv1x1",
        {
            "conv_stats": "launch_conv1x1_stats",
            "conv_affine": "launch_conv1x1_affine",
            "conv1x1_join": "launch_conv1x1_join",
        },
        _conv1x1_unsupported,
        _conv1x1_heuristic,
    ),
    Family(
        "conv3x3",
        {"conv_stats": "launch_conv3x3_stats", "conv_affine": "launch_conv3x3_affine"},
        _conv3x3_unsupported,
        _conv3x3_heuristic,
    ),
    Family(
        "conv3x3_grad",
        {"conv_dgrad": "launch_conv3x3_dgrad", "conv_wgrad": "launch_conv3x3_wgrad"},
        _conv3x3_unsupported,
        _conv3x3_heuristic,
    ),
    Family(
        "bn",
        {op: f"launch_{op}" for op in sorted(VECTOR_OPS | _SUMMING_OPS | _PIXEL_OPS)},
        _elementwise_unsupported,
        _elementwise_heuristic,
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


def triton_plan(problem: Problem, config: TileConfig | None, device: Device, reason: str) -> Plan:
    """The Plan that runs ``problem`` in Triton, ``config`` None: with the heuristic's; `Unsupported` if none."""
    found = family_of(problem, config, device)
    if isinstance(found, Family) and config is None:
        config = found.heuristic(problem, device)
        found = family_of(problem, config, device)
    if isinstance(found, str):
        raise Unsupported(f"{problem.op}: {found}")
    return Plan("triton", config, reason, found.module, found.launches[problem.op])


def _cuda_plan(problem: Problem, reason: str) -> Plan:
    if problem.op not in CUDA_LAUNCHES:
        raise Unsupported(f"{problem.op} has no kernel in the CUDA library")
    return Plan("cuda", None, reason, "native", CUDA_LAUNCHES[problem.op])


@lru_cache(maxsize=8192)
def plan_for(problem: Problem, device: Device | None, impl: str = "auto") -> Plan:
    """Choose a backend for ``problem``. ``device`` None means tensors on the CPU.

    ========== ==================================================================================================
    impl       choice
    ========== ==================================================================================================
    auto       the measured winner of this architecture; the library kernel where nothing was measured, so that no
               unmeasured kernel is chosen silently; the reference without a CUDA device
    triton     the Triton kernel, with its measured tile if there is one, else the heuristic's
    cuda       the kernel of the compiled C++/CUDA library
    reference  plain PyTorch
    ========== ==================================================================================================

    An explicit ``impl`` never falls back: `Unsupported` says why it cannot run. ValueError: unknown ``impl``.
    """
    check_impl(impl)
    if impl == "reference":
        return Plan("reference", None, "asked for")
    if device is None:
        if impl == "auto":
            return Plan("reference", None, "no CUDA device")
        raise Unsupported(f"{problem.op}: no CUDA device")
    if impl == "cuda":
        return _cuda_plan(problem, "asked for")
    winner = measured_winners(device.arch).get(problem)
    if impl == "triton":
        if winner is not None and winner.config is not None and not unsupported(problem, winner.config, device):
            return triton_plan(problem, winner.config, device, winner.reason)
        return triton_plan(problem, None, device, "asked for; tile from the heuristic")
    if winner is None:
        return Plan("library", None, f"not measured on sm{device.arch}")
    if winner.backend == "triton":
        if reason := unsupported(problem, winner.config, device):
            return Plan("library", None, f"the measured tile does not fit this card: {reason}")
        return triton_plan(problem, winner.config, device, winner.reason)
    if winner.backend == "cuda":
        return _cuda_plan(problem, winner.reason)
    return Plan("library", None, winner.reason)


@lru_cache(maxsize=1024)
def plan_block(problem: Problem, device: Device | None, impl: str = "auto") -> Plan:
    """Whether a whole residual block or stem runs as the chain of fused operators or as the library's own operators.

    The backend is "library" or the name of what runs the chain. Under "auto" a chain runs where it was measured to be
    faster as a whole. Any named ``impl`` asks for the chain; whether each operator can run, `plan_for` says.
    """
    check_impl(impl)
    if impl != "auto":
        return Plan(impl, None, "asked for")
    if device is None:
        return Plan("library", None, "no CUDA device, and without kernels the library's operators are the fastest")
    winner = measured_winners(device.arch).get(problem)
    if winner is None:
        return Plan("library", None, f"not measured on sm{device.arch}")
    return Plan(winner.backend, None, winner.reason)


class Winner(NamedTuple):
    """One measured entry of a table; ``config`` of the fastest Triton kernel even where another backend won."""

    backend: str
    config: TileConfig | None
    reason: str


@lru_cache(maxsize=16)
def measured_winners(arch: int) -> dict[Problem, Winner]:
    """The measured winners shipped for an architecture; empty when there is no table."""
    return load_table(PLANS / f"sm{arch}.json", arch)


def forget_choices() -> None:
    """Plan anew from the tables in memory: after `measured_winners`' dict was changed."""
    plan_for.cache_clear()
    plan_block.cache_clear()


def forget_tables() -> None:
    """Read the tables anew at the next plan: after one was written."""
    measured_winners.cache_clear()
    forget_choices()


def read_entries(path: Path, arch: int) -> list[dict]:
    """The entries of a table as `table_entry` made them; none, with a warning that names the file, if it is damaged.

    A missing file has none, without a warning.
    """
    if not path.exists():
        return []
    try:
        table = json.loads(path.read_text())
        if table["format"] != TABLE_FORMAT or table["arch"] != arch:
            raise ValueError(f"format {table['format']}, sm{table['arch']}; expected {TABLE_FORMAT}, sm{arch}")
        return list(table["entries"])
    except (OSError, ValueError, KeyError, TypeError) as error:
        warnings.warn(f"{path}: not a usable plan table, going on without it ({error!r})", stacklevel=3)
        return []


def load_table(path: Path, arch: int) -> dict[Problem, Winner]:
    """Read a table written by `dump_table`.

    A file that is truncated or foreign, or was measured on another architecture, yields nothing; an entry for a kernel
    or a configuration this version does not know is left out. Both warn, naming the file: a damaged table costs speed,
    never an answer.
    """
    winners: dict[Problem, Winner] = {}
    left_out = []
    for entry in read_entries(path, arch):
        try:
            problem, winner = _read_entry(entry, arch)
        except (AttributeError, KeyError, TypeError, ValueError) as error:
            left_out.append(str(error))
        else:
            winners[problem] = winner
    if left_out:
        warnings.warn(f"{path}: {len(left_out)} entries left out, the first: {left_out[0]}", stacklevel=2)
    return winners


def _read_entry(entry: dict, arch: int) -> tuple[Problem, Winner]:
    problem = Problem(**{k: tuple(v) if isinstance(v, list) else v for k, v in entry["problem"].items()})
    backend, config = entry["backend"], entry["config"]
    known = {
        "triton": problem.op in BLOCK_OPS or any(problem.op in family.launches for family in FAMILIES),
        "cuda": problem.op in CUDA_LAUNCHES,
        "library": True,
    }
    if not known.get(backend):
        raise ValueError(f"unknown kernel: {backend} {problem.op}")
    if backend == "triton" and config is None and problem.op not in BLOCK_OPS:
        raise ValueError(f"{problem.op}: a Triton winner without a tile")
    reason = f"measured on sm{arch}: {float(entry['us']):.1f} us, library {float(entry['library_us']):.1f} us"
    return problem, Winner(backend, None if config is None else TileConfig(**config), reason)


def table_entry(problem: Problem, backend: str, config: TileConfig | None, us: float, library_us: float) -> dict:
    """One measured winner in the form of the table; times in microseconds."""
    tile = None if config is None else asdict(config)
    return {"problem": asdict(problem), "backend": backend, "config": tile, "us": us, "library_us": library_us}


def dump_table(path: Path, arch: int, origin: dict[str, str], entries: Iterable[dict]) -> None:
    """Write a table for `load_table`, atomically: a reader sees the old one or the new one.

    ``origin`` says where the numbers come from: card, commit, date, versions.
    """
    table = {"format": TABLE_FORMAT, "arch": arch, "origin": origin, "entries": list(entries)}
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.{os.getpid()}")
    temporary.write_text(json.dumps(table, indent=1) + "\n")
    os.replace(temporary, path)


# name -> (bottleneck?, blocks per stage, groups, channels per group in the first stage)
_MODELS = {
    "resnet18": (False, (2, 2, 2, 2), 1, 64),
    "resnet34": (False, (3, 4, 6, 3), 1, 64),
    "resnet50": (True, (3, 4, 6, 3), 1, 64),
    "resnet101": (True, (3, 4, 23, 3), 1, 64),
    "resnet152": (True, (3, 8, 36, 3), 1, 64),
    "resnext50_32x4d": (True, (3, 4, 6, 3), 32, 4),
    "resnext101_32x8d": (True, (3, 4, 23, 3), 32, 8),
    "resnext101_64x4d": (True, (3, 4, 23, 3), 64, 4),
    "wide_resnet50_2": (True, (3, 4, 6, 3), 1, 128),
    "wide_resnet101_2": (True, (3, 4, 23, 3), 1, 128),
}
MODELS = tuple(_MODELS)


class _Conv(NamedTuple):
    """One convolution of a model: its name and shape, and the Problems of the operators around it."""

    layer: str
    n: int
    h: int
    w: int
    c: int
    k: int
    r: int = 1
    stride: int = 1
    groups: int = 1
    dtype: str = "bfloat16"

    def problem(self, op: str, prologue: bool = False, epilogue: str = "") -> Problem:
        """Of an operator that reads the convolution's input and its weight."""
        return Problem(
            op,
            *(self.n, self.h, self.w, self.c, self.k, self.r, self.r),
            stride=(self.stride, self.stride),
            padding=(self.r // 2, self.r // 2),
            groups=self.groups,
            dtype=self.dtype,
            prologue=prologue,
            epilogue=epilogue,
        )

    def output(self, op: str) -> Problem:
        """Of an elementwise operator on the convolution's output."""
        return Problem(op, self.n, *self.problem("").out_hw, self.k, self.k, dtype=self.dtype)

    @property
    def plain(self) -> bool:
        """A matrix product: its operators can read deferred tensors."""
        return self.r == 1 and self.stride == 1

    def dgrad(self, epilogue: str) -> Problem:
        """Of the input gradient, whose first tensor is the gradient of the output: K channels in, C out.

        That of a strided 1x1 is computed on the pixels it has read, as if they were the whole map.
        """
        p, q = self.problem("").out_hw
        stride = 1 if self.r == 1 else self.stride
        problem = self.problem("conv_dgrad", self.plain, epilogue)
        return replace(problem, h=p, w=q, c=self.k, k=self.c, stride=(stride, stride))

    def vectors(self, op: str, kinds: int) -> Problem:
        """Of an operator on the partial statistics [T, kinds, K] of the output."""
        return Problem(op, statistics_rows(self.k), kinds, 1, self.k, self.k, dtype="float32")

    def matrix(self, op: str) -> Problem:
        """Of an operator whose first tensor is the weight [K, C, 1, 1]."""
        return Problem(op, self.k, 1, 1, self.c, self.c, dtype=self.dtype)

    def moments(self) -> Problem:
        stride = (self.stride, self.stride)
        return Problem("moments", self.n, self.h, self.w, self.c, self.c, stride=stride, dtype=self.dtype)


def model_problems(
    arch_name: str, batch: int, size: int, training: bool, dtype: str = "bfloat16"
) -> list[tuple[str, Problem]]:
    """Every problem of every layer of a ResNet, as (layer name, Problem).

    Where the package has two ways through a layer (a bottleneck's last convolution from moments or from epilogue
    statistics, a downsample inside the join or before it) both are listed, so that plans exist for either. The same
    Problem comes back for every block of a stage. ``size`` is the height and width of the image in pixels. KeyError:
    not one of `MODELS`.
    """
    bottleneck, depths, groups, width_per_group = _MODELS[arch_name]
    expansion = 4 if bottleneck else 1
    stem = _Conv("conv1", batch, size, size, 3, 64, 7, 2, dtype=dtype)
    problems = _stem_problems(stem, training)
    hw = (stem.problem("").out_hw[0] - 1) // 2 + 1
    channels = 64
    for stage, depth in enumerate(depths):
        planes = 64 << stage
        width = planes * width_per_group // 64 * groups
        for index in range(depth):
            stride = 2 if stage > 0 and index == 0 else 1
            name = f"layer{stage + 1}.{index}"
            down = None
            if stride != 1 or channels != planes * expansion:
                down = _Conv(
                    f"{name}.downsample.0", batch, hw, hw, channels, planes * expansion, 1, stride, dtype=dtype
                )
            convs = [_Conv(f"{name}.conv1", batch, hw, hw, channels, planes, 3, stride, dtype=dtype)]
            out = (hw - 1) // stride + 1
            if bottleneck:
                convs = [
                    _Conv(f"{name}.conv1", batch, hw, hw, channels, width, dtype=dtype),
                    _Conv(f"{name}.conv2", batch, hw, hw, width, width, 3, stride, groups, dtype=dtype),
                    _Conv(f"{name}.conv3", batch, out, out, width, planes * 4, dtype=dtype),
                ]
            else:
                convs.append(_Conv(f"{name}.conv2", batch, out, out, planes, planes, 3, dtype=dtype))
            block = _training_problems if training else _inference_problems
            problems += block(convs, down)
            channels, hw = planes * expansion, out
    return problems


def _stem_problems(stem: _Conv, training: bool) -> list[tuple[str, Problem]]:
    if not training:
        frozen = Problem("bn_frozen", 1, 1, 1, stem.k, stem.k, dtype="float32")
        return [(stem.layer, frozen), (stem.layer, stem.problem("conv_affine", epilogue="affine"))]
    problems = [
        stem.problem("conv_stats", epilogue="stats"),
        stem.vectors("bn_finalize", 3),
        stem.output("bn_act_pool"),
        stem.output("bn_act_pool_backward"),
        stem.vectors("bn_backward_finalize", 2),
        stem.problem("conv_wgrad"),
    ]
    return [(stem.layer, problem) for problem in problems]


def _join(last: _Conv, down: _Conv | None, prologue: bool) -> Problem:
    if down is None:
        return last.problem("conv1x1_join", prologue, "join")
    stride = (down.stride, down.stride)
    return replace(last.problem("conv1x1_join", prologue, "join_downsample"), stride=stride, side=down.c)


def _inference_problems(convs: list[_Conv], down: _Conv | None) -> list[tuple[str, Problem]]:
    problems = []
    for conv in [*convs, *filter(None, [down])]:
        problems.append((conv.layer, Problem("bn_frozen", 1, 1, 1, conv.k, conv.k, dtype="float32")))
        problems.append((conv.layer, conv.problem("conv_affine", epilogue="affine")))
    last = convs[-1]
    problems.append((last.layer, last.problem("conv_affine", epilogue="affine+residual")))
    if last.r == 1:
        problems.append((last.layer, _join(last, down, prologue=False)))
    return problems


def _training_problems(convs: list[_Conv], down: _Conv | None) -> list[tuple[str, Problem]]:
    last, shortcut = convs[-1], [down] if down is not None else []
    problems = []
    # Epilogue statistics. A 3x3 reads its input nine times, so bn_act writes it out first; a 1x1 applies it on load.
    for i, conv in enumerate(convs):
        problems.append((conv.layer, conv.problem("conv_stats", i > 0 and conv.r == 1, "stats")))
        problems.append((conv.layer, conv.vectors("bn_finalize", 3)))
        if i + 1 < len(convs) and convs[i + 1].r == 3:
            problems.append((conv.layer, conv.output("bn_act")))
    for conv in shortcut:
        problems.append((conv.layer, conv.problem("conv_stats", epilogue="stats")))
        problems.append((conv.layer, conv.vectors("bn_finalize", 3)))
    problems.append((last.layer, last.output("bn_join")))
    problems.append((last.layer, last.output("join_sums")))
    problems += [(last.layer, last.output("relu_grad"))]
    if last.r == 1:
        problems += _moments_problems(last, down)
    # Backward. A plain 1x1 builds dc while loading; for the others it is written out.
    for conv in [*shortcut, *reversed(convs)]:
        problems.append((conv.layer, conv.vectors("bn_backward_finalize", 2)))
        if not conv.plain:
            problems.append((conv.layer, conv.output("bn_backward_apply")))
        deferred = conv is not down and conv is not convs[0]
        problems.append((conv.layer, conv.dgrad("" if conv is down else "relu" if deferred else "add")))
        problems.append((conv.layer, conv.problem("conv_wgrad", deferred)))
    for conv in convs[:-1]:
        problems.append((conv.layer, conv.output("bn_act_sums")))
    return problems


def _moments_problems(last: _Conv, down: _Conv | None) -> list[tuple[str, Problem]]:
    """The end of a bottleneck from the moments of its input, forward and backward."""
    problems = []
    for conv in [last, *filter(None, [down])]:
        deferred = conv is last
        for problem in (
            replace(conv.moments(), prologue=deferred),
            conv.matrix("moments_finalize"),
            conv.problem("cross_moments", deferred),
            conv.matrix("cross_sums"),
            replace(conv.vectors("bn_backward_finalize", 2), n=1),
            conv.matrix("moments_weights"),
            conv.problem("conv1x1_dgrad_moments", deferred),
        ):
            problems.append((conv.layer, problem))
    problems.append((last.layer, _join(last, down, prologue=True)))
    return problems
