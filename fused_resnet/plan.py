"""Stand-in until the planner lands."""
from dataclasses import dataclass
from contextlib import contextmanager

class Unsupported(RuntimeError): pass

@dataclass(frozen=True)
class Device:
    arch: int; sm_count: int; smem_bytes: int

@dataclass(frozen=True)
class Problem:
    op: str; n: int; h: int; w: int; c: int; k: int; r: int; s: int; stride: tuple; padding: tuple; dilation: tuple; groups: int; dtype: str; prologue: bool; epilogue: str

@dataclass(frozen=True)
class Plan:
    backend: str; reason: str = ""

def plan_for(problem, device, impl): return Plan("reference")

def block_backend(device_type, impl): return "library" if device_type == "cuda" and impl == "auto" else "chain"

_impl = "auto"
@contextmanager
def use(impl):
    global _impl
    before=_impl; _impl=impl
    try: yield
    finally: _impl=before

def current_impl(): return _impl
def resolve_impl(impl): return _impl if impl is None else impl

def statistics_chunks(pixels):
    chunk = 256 * ((pixels + 528 * 256 - 1) // (528 * 256))
    return (pixels + chunk - 1) // chunk, chunk
