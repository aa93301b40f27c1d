"""The vocabulary of planning: a Device, a Problem on it, and the Plan that answers it. Standard library only."""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

ITEMSIZE = {"bfloat16": 2, "float16": 2, "float32": 4, "float64": 8}

BLOCK_OPS = ("residual_block", "stem")
GRAPH = "graph "  # begins the epilogue of a block in a CUDA graph, where launches cost little: a problem of its own
# How a training chain of a block may end, measured as a backend of its own: "triton stored" beside "triton".
SCHEMES = ("stored", "moments")
STAGE_OP = "residual_stage"  # its backends: "library", the whole batch at once, or the images of a part, as a string
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
    """A CUDA device as far as planning sees it. ``arch`` is 10 * major + minor of the compute capability.

    ``triton_missing`` and ``cuda_missing`` say why Triton, and the C++/CUDA library, cannot run here; empty if they
    can. ``tuned`` holds what was measured on this very card, which counts before the tables that the package ships.
    """

    arch: int
    sm_count: int
    smem_bytes: int
    triton_missing: str = ""
    cuda_missing: str = ""
    tuned: Table | None = None

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
    second GEMM over ``side`` channels of the shortcut, at ``stride``), "identity" or "projection" (the shortcut of a
    whole bottleneck of width ``k``), or "" when the operator has no variants.
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
        the problem does not know for an input gradient; of the convolution, where a pool follows it."""
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
    """Tile extents (pixels, channels, depth) and launch parameters of a Triton kernel; ``block_k`` 0: no GEMM.

    ``split_k``: programs that share the depth of one tile, for kernels that can. ``maxnreg``: registers that a thread
    may take, so that more blocks share an SM; 0 leaves it to the compiler.
    """

    block_m: int
    block_n: int
    block_k: int = 0
    num_warps: int = 4
    num_stages: int = 3
    split_k: int = 1
    maxnreg: int = 0


class Measured(NamedTuple):
    """What was measured of one problem: the time (microseconds) of each backend that gave the right answer.

    "library" is always among them. ``config`` is the tile of the fastest Triton kernel; ``where``: the card.
    """

    us: dict[str, float]
    config: TileConfig | None
    where: str

    @property
    def ranking(self) -> list[str]:
        """The backends, fastest first; a draw goes to the library."""
        return sorted(self.us, key=lambda backend: (self.us[backend], backend != "library"))

    @property
    def reason(self) -> str:
        """The times in words, for a plan's reason."""
        return f"measured on {self.where}: " + ", ".join(f"{name} {self.us[name]:.1f} us" for name in self.ranking)


@dataclass(frozen=True, eq=False)
class Table:
    """Measured problems under a name. Compared by identity, so that a `Device` that holds one can be a key."""

    name: str
    measured: dict[Problem, Measured]


@dataclass(frozen=True)
class Plan:
    """The choice for one problem; ``reason`` is for people.

    ``module`` (of ``kernels``) and ``launch`` name the function that runs a "triton" or "cuda" backend, ``config`` is a
    Triton kernel's tile. ``scheme``: of a block's training chain, where one was measured to be the faster.
    """

    backend: str
    config: TileConfig | None
    reason: str
    module: str = ""
    launch: str = ""
    scheme: str = ""

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
    return max(64, min(512, 65536 // next_power_of_two(channels)))


def chunk_pixels(pixels: int, rows: int) -> int:
    """Consecutive pixels that each of ``rows`` partial sums covers, a multiple of 256.

    So every power-of-two tile up to 256 divides a chunk. The last one in use may be short; those after it are empty.
    """
    return 256 * -(-pixels // (256 * rows))


def power_of_two(value: int) -> bool:
    """Whether ``value`` is 1, 2, 4, ..."""
    return value > 0 and value & (value - 1) == 0


def next_power_of_two(value: int) -> int:
    """The smallest power of two that is at least ``value``; 1 for 0."""
    return 1 << max(0, value - 1).bit_length()
