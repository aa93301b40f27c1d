"""Stand-in until the planner lands."""

from dataclasses import dataclass
from contextlib import contextmanager


class Unsupported(RuntimeError):
    pass


@dataclass(frozen=True)
class Device:
    arch: int
    sm_count: int
    smem_bytes: int


@dataclass(frozen=True)
class Problem:
    op: str
    n: int
    h: int
    w: int
    c: int
    k: int
    r: int
    s: int
    stride: tuple
    padding: tuple
    dilation: tuple
    groups: int
    dtype: str
    prologue: bool
    epilogue: str


@dataclass(frozen=True)
class Plan:
    backend: str
    reason: str = ""


def plan_for(problem, device, impl):
    return Plan("reference")


def block_backend(device_type, impl):
    return "library" if impl == "auto" else "chain"


_impl = "auto"


@contextmanager
def use(impl):
    global _impl
    before = _impl
    _impl = impl
    try:
        yield
    finally:
        _impl = before


def current_impl():
    return _impl


def resolve_impl(impl):
    return _impl if impl is None else impl


def statistics_rows(channels):
    """Rows of a statistics workspace [T, 3, C] or [T, 2, C]: a function of C alone, so that traced shapes stay static."""
    return max(64, min(512, 65536 // (1 << (channels - 1).bit_length())))


def chunk_pixels(pixels, rows):
    return 256 * -(-pixels // (256 * rows))
