"""Which kernel runs a problem, and why: Problem -> Plan, in plain Python, testable without a GPU or PyTorch.

A plan comes from the table of measured winners of the card's architecture (``plans/sm90.json``), or, when a
Triton kernel was asked for by name, from a heuristic. Under ``impl="auto"`` a problem nobody has measured on this
architecture goes to the library kernel: a fused kernel is chosen only where it was seen to win.
"""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import contextmanager
from functools import lru_cache
from pathlib import Path

from .families import CUDA_LAUNCHES, FAMILIES, VECTOR_OPS, gemm_smem, stem_smem, triton_plan, unsupported
from .layers import MODELS, model_problems
from .problem import (
    ARCHITECTURES,
    BLOCK_OPS,
    Device,
    Plan,
    Problem,
    TileConfig,
    Unsupported,
    chunk_pixels,
    statistics_rows,
)
from .tables import Winner, dump_table, load_table, read_entries, table_entry

__all__ = [
    "ARCHITECTURES",
    "BLOCK_OPS",
    "CUDA_LAUNCHES",
    "FAMILIES",
    "IMPLS",
    "MODELS",
    "PLANS",
    "VECTOR_OPS",
    "Device",
    "Plan",
    "Problem",
    "TileConfig",
    "Unsupported",
    "Winner",
    "check_impl",
    "chunk_pixels",
    "current_impl",
    "dump_table",
    "forget_choices",
    "forget_tables",
    "gemm_smem",
    "load_table",
    "measured_winners",
    "model_problems",
    "plan_block",
    "plan_for",
    "read_entries",
    "resolve_impl",
    "statistics_rows",
    "stem_smem",
    "table_entry",
    "triton_plan",
    "unsupported",
    "use",
]

IMPLS = ("auto", "reference", "triton", "cuda")
PLANS = Path(__file__).parent.parent / "plans"


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
