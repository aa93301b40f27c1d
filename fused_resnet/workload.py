"""The problems of a model: what there is to measure (`tuning`), and in which order it pays."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from dataclasses import replace
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from . import modules, ops, plan
from .plan import Plan, Problem, Work
from .tracing import LayerTracker, run_on_meta


class Call(NamedTuple):
    """How a whole block was called: the operator of `torch.ops.fused_resnet` and its arguments, meta tensors in it."""

    operator: Callable
    arguments: tuple


class Task(NamedTuple):
    """One problem to measure; `call` is None for an operator. `layer`: the first of `count` places that state it.

    `work` is that of one place, for a block the sum over its operators.
    """

    problem: Problem
    call: Call | None = None
    layer: str = ""
    count: int = 1
    work: Work = Work(0, 0)


class _Collector(TorchFunctionMode):
    """Notes the problems of every block that runs on meta tensors, and how the block was called."""

    def __init__(self) -> None:
        super().__init__()
        self.calls: dict[Problem, Call] = {}
        # block -> its operators' problems -> how often over all layers; None: operators outside any block
        self.groups: dict[Problem | None, Counter[Problem]] = {}
        self.layers: dict[Problem, str] = {}
        self.counts: Counter[Problem] = Counter()
        self._call: Call | None = None

    def __torch_function__(self, func, types, args=(), kwargs=None):
        if func in (torch.ops.fused_resnet.residual_block, torch.ops.fused_resnet.stem):
            self._call = Call(func, args)
        return func(*args, **(kwargs or {}))

    def walk(self, model: nn.Module, x: Tensor) -> None:
        """Run forward, and backward in training mode, of `model` on a meta tensor like x."""
        owners: dict[str, Problem] = {}

        def note(problem: Problem, _: Plan) -> None:
            self.layers.setdefault(problem, tracker.layer)
            self.counts[problem] += 1
            if problem.op in plan.BLOCK_OPS:
                owners[tracker.layer] = problem
                self.calls.setdefault(problem, self._call)
                self.groups.setdefault(problem, Counter())
            else:
                self.groups.setdefault(owners.get(tracker.layer), Counter())[problem] += 1

        with LayerTracker(model, lambda *_: None) as tracker, plan.use("reference"), ops.record(note, None), self:
            run_on_meta(model, x)

    def work(self, block: Problem | None) -> Work:
        """FLOP and bytes of a block over all its layers."""
        works = [(count, plan.work_of(problem)) for problem, count in self.groups[block].items()]
        return Work(sum(count * work.flop for count, work in works), sum(count * work.bytes for count, work in works))


def collect(runs: Iterable[tuple[nn.Module, Tensor]]) -> list[Task]:
    """Every distinct problem of these models on inputs like these, in the order in which measuring it pays.

    Blocks that move most bytes over all their layers come first, each behind its operators.
    """
    collector = _Collector()
    for model, x in runs:
        collector.walk(model, x)
    order: dict[Problem, Work] = {}
    for block in sorted(collector.groups, key=lambda block: -collector.work(block).bytes):
        works = {problem: plan.work_of(problem) for problem in collector.groups[block]}
        order |= dict(sorted(works.items(), key=lambda item: -collector.groups[block][item[0]] * item[1].bytes))
        if block is not None:
            total, layers = collector.work(block), collector.counts[block]
            order[block] = Work(total.flop // layers, total.bytes // layers)
    return [Task(p, collector.calls.get(p), collector.layers[p], collector.counts[p], order[p]) for p in order]


def stages(model: nn.Module, x: Tensor) -> list[Task]:
    """The schedules of a model's stages on an input like x, in inference; none for a model in training mode.

    Stages are rows of fused blocks among the model's own children, as torchvision's ResNet has them.
    """
    rows = {} if model.training else {n: m for n, m in model.named_children() if isinstance(m, nn.Sequential)}
    convolutions = {name: modules.stage_convolutions(stage) for name, stage in rows.items()}
    inputs: dict[str, Tensor] = {}
    hooks = [m.register_forward_pre_hook(lambda _, a, name=n: inputs.update({name: a[0]})) for n, m in rows.items()]
    try:
        run_on_meta(model, x)
    finally:
        for hook in hooks:
            hook.remove()
    return [
        Task(ops.stage_problem(inputs[name], found, len(rows[name])), Call(rows[name], (inputs[name],)), name)
        for name, found in convolutions.items()
        if found is not None and name in inputs
    ]


def in_graphs(tasks: Iterable[Task]) -> Iterator[Task]:
    """The tasks, each block followed by the same one in a CUDA graph."""
    for task in tasks:
        yield task
        if task.call is not None:
            yield task._replace(problem=replace(task.problem, epilogue=plan.GRAPH + task.problem.epilogue))
