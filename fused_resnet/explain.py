"""`explain(model, x)`: which implementation runs each layer, and why, without running it.

The model is walked once, forward and (in training mode) backward, on meta tensors: shapes without data, so a planned
card need not be there. Fused operators report their problem and plan; any other leaf module is the library's.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn.modules import module as global_hooks

from . import ops, plan
from .modules import FusedBlock, FusedConvBNAct


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
    if problem.k != problem.c or (problem.r, problem.s) != (1, 1):
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
    number = arch.removeprefix("sm")
    if not number.isdigit() or int(number) not in plan.ARCHITECTURES:
        known = ", ".join(f"sm{a}" for a in plan.ARCHITECTURES)
        raise ValueError(f"arch: expected one of {known}, got {arch!r}")
    return plan.Device.of(int(number))


def _reason_unfused(module: nn.Module) -> str | None:
    return module.unfused_reason() if isinstance(module, (FusedBlock, FusedConvBNAct)) else None


@contextmanager
def _module_hooks(model: nn.Module, records: Explanation) -> Iterator[list[str]]:
    """Keep the name of the module that runs on top of the returned stack, in forward and backward, and record leaves.

    The hooks are global ones: a hook of its own would make a module ineligible for fusing.
    """
    names = {id(module): name or type(module).__name__ for name, module in model.named_modules()}
    unfused: list[str] = []
    stack = [type(model).__name__]
    labelled = set()

    def label(tensor, name: str) -> None:
        """Name the layer in backward: the autograd node that made `tensor` puts it on the stack before it runs."""
        node = tensor.grad_fn if isinstance(tensor, Tensor) else None
        if node is not None and node not in labelled:
            labelled.add(node)
            node.register_prehook(lambda _: stack.__setitem__(slice(None), [name]))

    def enter(module, inputs):
        if inputs:
            label(inputs[0], stack[-1])
        stack.append(names.get(id(module), type(module).__name__))
        reason = _reason_unfused(module)
        if reason is not None:
            unfused.append(f"{stack[-1]} runs unfused: {reason}")
        if not any(True for _ in module.children()) and inputs and isinstance(inputs[0], Tensor):
            shape = "x".join(map(str, inputs[0].shape)) + f" {str(inputs[0].dtype).removeprefix('torch.')}"
            why = unfused[-1] if unfused else "not part of a fused unit"
            records.append(Record(stack[-1], type(module).__name__, shape, "library", why))

    def leave(module, inputs, output):
        label(output, stack.pop())
        if _reason_unfused(module) is not None:
            unfused.pop()

    handles = (
        global_hooks.register_module_forward_pre_hook(enter),
        global_hooks.register_module_forward_hook(leave),
    )
    try:
        yield stack
    finally:
        for handle in handles:
            handle.remove()


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
    state = {
        name: torch.empty_like(tensor, dtype=x.dtype if tensor.is_floating_point() else None, device="meta")
        for name, tensor in (*model.named_parameters(), *model.named_buffers())
    }
    state |= {name: state[name].requires_grad_(p.requires_grad) for name, p in model.named_parameters()}

    with plan.use(plan.resolve_impl(impl)), _module_hooks(model, records) as stack:

        def note(problem: plan.Problem, chosen: plan.Plan) -> None:
            records.append(Record(stack[-1], problem.op, describe(problem), chosen.backend, chosen.reason))

        with ops.record(note, device), torch.set_grad_enabled(model.training):
            out = torch.func.functional_call(model, state, (torch.empty_like(x, device="meta"),))
            tensors = [t for t in torch.utils._pytree.tree_leaves(out) if isinstance(t, Tensor) and t.requires_grad]
            if model.training and tensors:
                sum(t.sum() for t in tensors).backward()
    return records
