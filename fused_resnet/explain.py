"""`explain(model, x)`: which implementation runs each layer, and why, without running it and without its card.

Fused operators report their problem and plan; any other leaf module is the library's.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from . import ops, plan
from .tracing import LayerTracker, run_on_meta


@dataclass(frozen=True)
class Record:
    """One layer's operator: where, what, on which shapes, which implementation, and why that one."""

    layer: str
    operator: str
    problem: str
    backend: str
    reason: str


class Explanation(list[Record]):
    """A list of `Record` that prints as a table."""

    def __str__(self) -> str:
        names = ("layer", "operator", "problem", "backend", "reason")
        rows = [names, *(tuple(getattr(record, name) for name in names) for record in self)]
        widths = [max(len(row[i]) for row in rows) for i in range(len(names) - 1)]
        lines = ["  ".join([*(cell.ljust(w) for cell, w in zip(row, widths)), row[-1]]).rstrip() for row in rows]
        return "\n".join([lines[0], "  ".join("-" * w for w in [*widths, len(names[-1])]), *lines[1:]])


def describe(problem: plan.Problem) -> str:
    """A problem in one cell: shapes, kernel, dtype, what is fused in front and behind."""
    text = f"{problem.n}x{problem.h}x{problem.w}x{problem.c}"
    if problem.k != problem.c or problem.r:
        text += f" -> {problem.k}, {problem.r}x{problem.s}"
    if problem.stride != (1, 1):
        text += f" /{problem.stride[0]}"
    if problem.dilation != (1, 1):
        text += f" dilation {problem.dilation[0]}"
    if problem.groups != 1:
        text += f" groups {problem.groups}"
    text += f" {problem.dtype}"
    return (
        text + (" [deferred in]" if problem.prologue else "") + (f" [{problem.epilogue}]" if problem.epilogue else "")
    )


def device_for(arch: str | None) -> plan.Device | None:
    """ "sm90" -> the planner's description of that card; None -> the current CUDA device, None without one.

    Raises ValueError for an unknown name.
    """
    if arch is None:
        return ops.device_of(torch.empty(0, device="cuda"), "auto") if torch.cuda.is_available() else None
    number = str(arch).removeprefix("sm")
    if not number.isdigit() or int(number) not in plan.ARCHITECTURES:
        known = ", ".join(f"sm{a}" for a in plan.ARCHITECTURES)
        raise ValueError(f"arch: expected one of {known}, got {arch!r}")
    return plan.Device.default(int(number))


def explain(model: nn.Module, x: Tensor, *, arch: str | None = None, impl: str | None = None) -> Explanation:
    """Which implementation runs each layer of `model` on an input like `x`, and why: a list that prints as a table.

    Args:
        model: any module; left as it is. In training mode its backward is explained too.
        x: an input; only shape and dtype count, so a meta tensor will do. Parameters are taken to have its dtype.
        arch: plan for a card that need not be here, "sm80" to "sm100"; default: the current device.
        impl: as in `use`; default: what `use` says.

    Raises:
        ValueError: unknown arch or impl. Unsupported: an explicit impl that cannot run, with the reason.
    """
    device = device_for(arch)
    records = Explanation()

    def leaf(layer: str, module: nn.Module, value: Tensor, unfused: str | None) -> None:
        shape = "x".join(map(str, value.shape)) + f" {str(value.dtype).removeprefix('torch.')}"
        reason = unfused or "not part of a fused unit"
        records.append(Record(layer, type(module).__name__, shape, "library", reason))

    with plan.use(plan.resolve_impl(impl)), LayerTracker(model, leaf) as tracker:

        def note(problem: plan.Problem, chosen: plan.Plan) -> None:
            records.append(Record(tracker.layer, problem.op, describe(problem), chosen.backend, chosen.reason))

        with ops.record(note, device):
            run_on_meta(model, x)
    return records
