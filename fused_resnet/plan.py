"""Stand-in until the planner lands."""

from contextlib import contextmanager
from dataclasses import dataclass


class Unsupported(RuntimeError):
    pass


ARCHITECTURES = (80, 86, 89, 90, 100)


@dataclass(frozen=True)
class Device:
    arch: int
    sm_count: int
    smem_bytes: int

    @classmethod
    def of(cls, arch):
        return cls(arch, 132, 227 * 1024)


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


def plan_block(problem, device, impl):
    return Plan("library", "") if impl == "auto" else Plan(impl, "asked for")


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
    return max(64, min(512, 65536 // (1 << (channels - 1).bit_length())))


def chunk_pixels(pixels, rows):
    return 256 * -(-pixels // (256 * rows))
