"""Which kernel runs a problem, and why: Problem -> Plan, in plain Python, testable without a GPU or PyTorch.

A plan comes from what was measured on the user's own card (`fused_resnet.tune`) or on its architecture
(``plans/sm90.json``), or, when a Triton kernel was asked for by name, from a heuristic. Under ``impl="auto"`` a problem
that nobody has measured goes to the library kernel: a fused kernel is chosen only where it was seen to win.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from functools import lru_cache
from pathlib import Path

from .cuda import CUDA_LAUNCHES, cuda_plan, cuda_unsupported
from .families import (
    FAMILIES,
    VECTOR_OPS,
    candidates,
    own_kernel_refusal,
    triton_plan,
    unsupported,
)
from .layers import MODELS, model_problems
from .occupancy import tile_reason
from .problem import (
    ARCHITECTURES,
    BLOCK_OPS,
    GRAPH,
    STAGE_OP,
    Device,
    Measured,
    Plan,
    Problem,
    Table,
    TileConfig,
    Unsupported,
    chunk_pixels,
    statistics_rows,
)
from .tables import dump_table, load_table, parse_entries, parse_table, read_text, table_entry
from .work import Work, work_of

__all__ = [
    "ARCHITECTURES",
    "BLOCK_OPS",
    "CUDA_LAUNCHES",
    "FAMILIES",
    "GRAPH",
    "IMPLS",
    "MODELS",
    "PLANS",
    "STAGE_OP",
    "VECTOR_OPS",
    "Device",
    "Measured",
    "Plan",
    "Problem",
    "Table",
    "TileConfig",
    "Unsupported",
    "Work",
    "candidates",
    "check_impl",
    "chunk_pixels",
    "cuda_plan",
    "cuda_unsupported",
    "current_impl",
    "dump_table",
    "forget_choices",
    "forget_tables",
    "is_replayed",
    "load_table",
    "measurements",
    "model_problems",
    "parse_entries",
    "parse_table",
    "plan_block",
    "plan_for",
    "plan_stage",
    "read_text",
    "replayed",
    "resolve_impl",
    "statistics_rows",
    "table_entry",
    "tile_reason",
    "triton_plan",
    "unsupported",
    "use",
    "work_of",
]

IMPLS = ("auto", "reference", "triton", "cuda")
PLANS = Path(__file__).parent.parent / "plans"


class _Choice(threading.local):
    # An instance attribute set in __init__, not a class attribute: torch.compile guards the former, so a compiled
    # function notices a later `use`. It cannot trace contextvars.
    def __init__(self) -> None:
        self.impl = "auto"


_choice = _Choice()
_replayed = False


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
    """Make ``impl`` ("auto", "reference", "triton" or "cuda") this thread's choice inside a ``with`` block.

    It is read in forward, and backward keeps it. Activation checkpointing runs the forward again, on CUDA in a thread
    of autograd's: ``checkpoint(..., use_reentrant=False, context_fn=lambda: (nullcontext(), use(impl)))`` tells it.
    """
    check_impl(impl)
    outer = _choice.impl
    _choice.impl = impl
    try:
        yield
    finally:
        _choice.impl = outer


@contextmanager
def replayed() -> Iterator[None]:
    """Plan blocks for a CUDA graph inside a ``with`` block: while one is captured, and warmed up for.

    A replay launches nothing from Python, so that a chain of short kernels can win in it which loses outside. It holds
    for all threads: autograd may run a checkpointed block again on one of its own.
    """
    global _replayed
    outer, _replayed = _replayed, True
    try:
        yield
    finally:
        _replayed = outer


def is_replayed() -> bool:
    """Whether blocks are planned for a CUDA graph."""
    return _replayed


def _plan_with(backend: str, problem: Problem, config: TileConfig | None, device: Device, reason: str) -> Plan:
    """The Plan that runs ``problem`` with a backend; `Unsupported` if it cannot, here or anywhere."""
    if backend == "library":
        return Plan("library", None, reason)
    missing = device.triton_missing if backend == "triton" else device.cuda_missing
    if missing:
        raise Unsupported(f"{problem.op}: {missing}")
    if backend == "triton":
        return triton_plan(problem, config, device, reason)
    return cuda_plan(problem, device, reason)


def _block_with(backend: str, device: Device, reason: str) -> Plan:
    """`_plan_with` for a whole block, whose chain always has Triton kernels in it."""
    backend, _, scheme = backend.partition(" ")
    needed = {"library": (), "triton": (device.triton_missing,), "cuda": (device.triton_missing, device.cuda_missing)}
    if missing := "; ".join(filter(None, needed[backend])):
        raise Unsupported(missing)
    return Plan(backend, None, reason, scheme=scheme)


def _fastest(measured: Measured, plan_with: Callable[[str, str], Plan]) -> Plan:
    """``plan_with(backend, reason)`` of the fastest backend that can run here; the reason says what was faster."""
    reason = measured.reason
    for backend in measured.ranking:
        try:
            return plan_with(backend, reason)
        except Unsupported as error:
            reason += f"; {backend} cannot run here: {error}"
    raise AssertionError(f"{measured}: a measurement without the library")


def _look_up(problem: Problem, device: Device) -> Measured | None:
    """What was measured of a problem, or of the same one at batch sizes near it.

    Between two batch sizes with the same winner there is no other; beyond the largest, or the smallest, up to a factor
    of two. The nearer one's tile is taken. None where that leaves a doubt.
    """
    exact = measurements(device).get(problem)
    if exact is not None or problem.op in VECTOR_OPS or problem.h * problem.w == 1:  # there, n counts no images
        return exact
    sizes = _batches(device).get(replace(problem, n=0), [])
    below = max((item for item in sizes if item[0] < problem.n), default=None, key=lambda item: item[0])
    above = min((item for item in sizes if item[0] > problem.n), default=None, key=lambda item: item[0])
    near = [item for item in (below, above) if item is not None]
    if len({measured.ranking[0].partition(" ")[0] for _, measured in near}) == 2:
        return None
    near.sort(key=lambda item: max(item[0], problem.n) / min(item[0], problem.n))
    if not near or (len(near) == 1 and not problem.n / 2 <= near[0][0] <= problem.n * 2):
        return None
    batch, measured = near[0]
    return measured._replace(where=f"{measured.where} at batch {batch}")


@lru_cache(maxsize=16)
def _batches(device: Device) -> dict[Problem, list[tuple[int, Measured]]]:
    """The measurements by problem without its batch size: (batch size, measured) of each."""
    sizes: dict[Problem, list[tuple[int, Measured]]] = {}
    for problem, measured in measurements(device).items():
        sizes.setdefault(replace(problem, n=0), []).append((problem.n, measured))
    return sizes


def _unmeasured(problem: Problem, device: Device) -> Plan:
    """An operator without a measurement, in a chain that was measured as a whole, or that must be one.

    Where the kernels are known to be right and fast, on an architecture with measurements, its Triton kernel runs: the
    reference, which is all that the library has for it, takes several passes.
    """
    reason = f"not measured on sm{device.arch}"
    if measurements(device):
        try:
            return _plan_with("triton", problem, None, device, f"{reason}; tile from the heuristic")
        except Unsupported as error:
            reason += f"; {error}"
    return Plan("library", None, reason)


@lru_cache(maxsize=8192)
def plan_for(problem: Problem, device: Device | None, impl: str = "auto") -> Plan:
    """Choose a backend for ``problem``. ``device`` None means tensors on the CPU.

    ========== ==================================================================================================
    impl       choice
    ========== ==================================================================================================
    auto       the fastest that was measured and can run here, at this batch size or one near it; the library where
               nothing was measured on the architecture, so that no unmeasured kernel is chosen silently; the reference
               without a CUDA device
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
        return _plan_with("cuda", problem, None, device, "asked for")
    measured = _look_up(problem, device)
    if impl == "triton":
        if measured is not None and measured.config and not unsupported(problem, measured.config, device):
            return _plan_with("triton", problem, measured.config, device, measured.reason)
        chosen = _plan_with("triton", problem, None, device, "")
        said = f"heuristic: {tile_reason(problem, chosen.config, device)}"
        if chosen.module == "conv_library":
            said = f"the library's convolution between fused passes: {own_kernel_refusal(problem, device)}; {said}"
        return replace(chosen, reason=said)
    if measured is None:
        return _unmeasured(problem, device)
    return _fastest(measured, lambda backend, reason: _plan_with(backend, problem, measured.config, device, reason))


@lru_cache(maxsize=1024)
def plan_block(problem: Problem, device: Device | None, impl: str = "auto") -> Plan:
    """Whether a whole residual block or stem runs as the chain of fused operators or as the library's own operators.

    The backend is "library" or the name of what runs the chain: "triton", or "cuda" if kernels of the CUDA library are
    among it. Under "auto" a chain runs where it was measured to be faster as a whole, in the faster scheme. Any named
    ``impl`` asks for the chain; whether each operator can run, `plan_for` says.
    """
    check_impl(impl)
    if impl != "auto":
        return Plan(impl, None, "asked for")
    if device is None:
        return Plan("library", None, "no CUDA device, and without kernels the library's operators are the fastest")
    measured = _look_up(problem, device)
    if measured is None:
        return Plan("library", None, f"not measured on sm{device.arch}")
    return _fastest(measured, lambda backend, reason: _block_with(backend, device, reason))


@lru_cache(maxsize=1024)
def plan_stage(problem: Problem, device: Device | None, impl: str = "auto") -> Plan:
    """Whether a whole stage of residual blocks, in inference, takes a batch at once ("library") or in parts.

    Parts whose activations stay in the L2 cache trade memory traffic for more launches: only a measurement can say, and
    the backend is then the number of images in a part, as a string. Under a named ``impl`` the batch stays whole.
    """
    if check_impl(impl) != "auto" or device is None:
        return Plan("library", None, "the whole batch")
    measured = measurements(device).get(problem)
    if measured is None:
        return Plan("library", None, f"the whole batch: not measured on sm{device.arch}")
    return Plan(measured.ranking[0], None, measured.reason)


@lru_cache(maxsize=16)
def measurements(device: Device) -> dict[Problem, Measured]:
    """What was measured for a device: the table shipped for its architecture, under the one tuned on the card."""
    tuned = device.tuned.measured if device.tuned is not None else {}
    return load_table(PLANS / f"sm{device.arch}.json", device.arch) | tuned


def forget_choices() -> None:
    """Plan anew from the tables in memory: after `measurements`' dict was changed."""
    for choice in (plan_for, plan_block, plan_stage, _batches):
        choice.cache_clear()


def forget_tables() -> None:
    """Read the shipped tables anew at the next plan: after one was written."""
    measurements.cache_clear()
    forget_choices()
