"""`tune(model, example)`: measure which kernel, and which tile of it, runs each problem of a model fastest.

For every operator of every layer, the Triton kernel in its legal tiles and the CUDA kernel are timed with a cold L2
cache against the library's operators; what would enter the table is held against float64 first, on random input (fewer
images) with the error budget of `trials`. Then whole blocks: the chain of the fastest against the library's block,
forward and backward; anew when one of its operators was measured since. Work begins with the block that moves most
bytes over all its layers, and goes on block by block, so that a short budget buys most. The table is written after each
problem: a run may be killed, or end with its budget, and the next one goes on where it stopped.
"""

from __future__ import annotations

import copy
import datetime
import importlib
import json
import re
import statistics
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext, suppress
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import NamedTuple

import torch
from filelock import FileLock
from torch import Tensor, nn

from . import modules, ops, plan, precompile, reference, trials, tuned
from .explain import describe
from .graphs import ERROR_MODE
from .plan import Device, Measured, Plan, Problem
from .workload import Call, Task, collect, in_graphs, stages

_CHECKED_PIXELS = 20_000  # of the first tensor, when a kernel is held against float64


class Outcome(NamedTuple):
    """What came of a task: its entry in the table's form, and what was rejected and why."""

    entry: dict
    rejected: list[str]


def launcher(chosen: Plan) -> Callable:
    """The launch function that a plan names, bound to it."""
    module = importlib.import_module(f"{__package__}.kernels.{chosen.module}")
    return partial(getattr(module, chosen.launch), plan=chosen)


def alternatives(problem: Problem, device: Device) -> Iterator[Plan]:
    """The kernels that can run an operator's problem on a device: the CUDA library's, and Triton's in each tile."""
    with suppress(plan.Unsupported):
        yield plan.plan_for(problem, device, "cuda")
    if not device.triton_missing:
        for tile in plan.candidates(problem, device):
            yield plan.triton_plan(problem, tile, device, "")


def with_kernels(tasks: list[Task], device: Device) -> list[Task]:
    """The tasks that leave a choice on a device: blocks, and operators that have a kernel."""
    return [task for task in tasks if task.call or next(alternatives(task.problem, device), None)]


class Timer:
    """Times of a call on the GPU, in microseconds, with a cold L2 cache: 256 MB are written before each call."""

    def __init__(self, seconds: float = 0.15) -> None:
        self.seconds = seconds
        self._flush = torch.empty(256 * 2**20, dtype=torch.uint8, device="cuda")

    def __call__(self, run: Callable[[], object], best: float = float("inf")) -> float:
        """The median; five calls are enough of one that takes half as long again as `best`, the time to beat."""
        return statistics.median(self.times(run, best))

    def times(self, run: Callable[[], object], best: float = float("inf")) -> list[float]:
        """All of the times, behind two calls that do not count."""
        for _ in range(2):
            run()
        torch.cuda.synchronize()
        times: list[float] = []
        stop = time.monotonic() + self.seconds
        while len(times) < 5 or (time.monotonic() < stop and len(times) < 50 and min(times) < 1.5 * best):
            self._flush.fill_(len(times))
            begin, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
            begin.record()
            run()
            end.record()
            end.synchronize()
            times.append(begin.elapsed_time(end) * 1000)
        return times


def _checked(problem: Problem) -> Problem:
    """The problem on fewer images, for float64; one of per-channel vectors is small as it is."""
    images = max(1, min(problem.n, _CHECKED_PIXELS // max(1, problem.h * problem.w)))
    return problem if problem.op in plan.VECTOR_OPS else replace(problem, n=images)


def measure_operator(problem: Problem, device: Device, timer: Callable[..., float], on: str = "cuda") -> Outcome:
    """Time every kernel of an operator and the library; what is fastest of its kind must be right to count."""
    arguments = trials.operator_arguments(problem, torch.Generator().manual_seed(0), on)
    trial = trials.Trial(_checked(problem), torch.Generator().manual_seed(1), on)
    us = {"library": timer(lambda: getattr(reference, problem.op)(*arguments))}
    config, rejected = None, []
    for chosen in alternatives(problem, device):
        best = us.get(chosen.backend, float("inf"))
        try:
            run = launcher(chosen)
            took = timer(lambda run=run: run(*arguments), best)
            if took < best:
                trial.check(run)
                us[chosen.backend], config = took, chosen.config or config
        except Exception as error:  # a tile that fails to compile, to launch or to be right is out, the others go on
            rejected.append(f"{chosen.backend} {chosen.config}: {_line(error)}")
            _require_device(
                on, f"{problem.op} {describe(problem)} with {chosen}", plan.table_entry(problem, us, config)
            )
    return Outcome(plan.table_entry(problem, us, config), rejected)


def _line(error: Exception) -> str:
    return f"{type(error).__name__}: {(str(error).splitlines() or [''])[0][:200]}"


class DeviceFailed(RuntimeError):
    """An illegal access has ended this process's use of the device. `entry`: what had been measured before, or None."""

    def __init__(self, after: str, entry: dict | None) -> None:
        super().__init__(f"the CUDA device failed at {after}; run again in a new process, which passes over it")
        self.entry = entry


def _require_device(on: str, after: str, entry: dict | None = None) -> None:
    """`DeviceFailed` if the device no longer works."""
    if on != "cuda":
        return
    try:
        torch.cuda.synchronize()
        torch.cuda.empty_cache()
    except RuntimeError as error:
        raise DeviceFailed(after, entry) from error


def _materialise(value, scale: float, on: str):
    """A block's arguments with random values for meta tensors, channels_last, that need gradients where those do."""
    if isinstance(value, (list, tuple)):
        return [_materialise(item, scale, on) for item in value]
    if not isinstance(value, Tensor):
        return value
    if not value.is_floating_point():
        return torch.zeros(value.shape, dtype=value.dtype, device=on)
    if value.dim() == 4:
        real = torch.randn(value.shape, device=on).mul_(scale or (2 / value[0].numel()) ** 0.5)
        real = real.to(value.dtype, memory_format=torch.channels_last)
    else:
        real = (torch.rand(value.shape, device=on) * 0.1 + 0.5).to(value.dtype)
    return real.requires_grad_(value.requires_grad)


@contextmanager
def planned_as(device: Device, changes: dict[Problem, Measured]) -> Iterator[None]:
    """Plan for a device as if `changes` had been measured on it."""
    table = plan.measurements(device)
    before = dict(table)
    table.update(changes)
    plan.forget_choices()
    try:
        yield
    finally:
        table.clear()
        table.update(before)
        plan.forget_choices()


def block_call(call: Call, on: str = "cuda", impl: str = "auto") -> Callable[[], None]:
    """A block on random values: its forward, and its backward if anything in it needs gradients."""
    x, residual, *parameters = call.arguments[:-1]
    arguments = [*_materialise([x, residual], 1.0, on), *_materialise(parameters, 0.0, on), impl]
    leaves = [t for t in torch.utils._pytree.tree_leaves(arguments) if isinstance(t, Tensor) and t.requires_grad]
    gradient = None

    def run() -> None:
        nonlocal gradient
        with torch.set_grad_enabled(bool(leaves)):
            out = call.operator(*arguments)
        if leaves:
            gradient = torch.randn_like(out) if gradient is None else gradient
            torch.autograd.grad(out, leaves, gradient)

    return run


def block_plans(problem: Problem, device: Device) -> dict[str, dict[Problem, Measured]]:
    """Backend -> what to plan as (`planned_as`) for a block to run so: the library's operators, or the fastest chain.

    Where kernels of the CUDA library are in that chain ("cuda"), it is there without them, too ("triton"), for machines
    on which the library is not built. A training chain that may end in either scheme is there in the one that it would
    not take by itself, too ("triton stored" at 16 bit): at small batches, or where channels are many, the products of
    the moments may cost more than they save.
    """
    table = plan.measurements(device)
    native = {p: m for p, m in table.items() if m.ranking[0] == "cuda" and p.op not in plan.BLOCK_OPS}
    chains = {"library": {}, "triton": {}}
    if native and not device.cuda_missing:
        chains["triton"] = {p: m._replace(us={k: t for k, t in m.us.items() if k != "cuda"}) for p, m in native.items()}
        chains["cuda"] = {}
    if re.fullmatch(rf"({plan.GRAPH})?training (identity|projection) .* 1x1-\d+", problem.epilogue):
        other = "moments" if problem.dtype == "float32" else "stored"
        chains |= {f"{backend} {other}": changes for backend, changes in chains.items() if backend != "library"}
    forced = {backend: Measured({"library": 1.0, backend: 0.0}, None, "this is being measured") for backend in chains}
    return {backend: {**changes, problem: forced[backend]} for backend, changes in chains.items()}


def graphed(run: Callable[[], object]) -> Callable[[], object]:
    """The replay of a CUDA graph of `run`, which is warmed up first."""
    graph, stream = torch.cuda.CUDAGraph(), torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        run()
    torch.cuda.current_stream().wait_stream(stream)
    with torch.cuda.graph(graph, capture_error_mode=ERROR_MODE):
        run()
    return graph.replay


def measure_block(
    task: Task,
    device: Device,
    timer: Callable[..., float],
    on: str = "cuda",
    graphed: Callable[[Callable[[], object]], Callable[[], object]] = graphed,
) -> Outcome:
    """Time a whole block, with backward in training: the library's operators against the chain of the fastest ones."""
    run, us, rejected = block_call(task.call, on), {}, []
    in_graph = task.problem.epilogue.startswith(plan.GRAPH)
    for backend, plans in block_plans(task.problem, device).items():
        with planned_as(device, plans), plan.replayed() if in_graph else nullcontext():
            try:
                us[backend] = timer(graphed(run) if in_graph else run)
            except Exception as error:
                if backend == "library":
                    raise
                rejected.append(f"{backend}: {_line(error)}")
                _require_device(on, f"{describe(task.problem)} as {backend}", plan.table_entry(task.problem, us))
    return Outcome(plan.table_entry(task.problem, us), rejected)


def measure_stage(
    task: Task,
    timer: Callable[..., float],
    on: str = "cuda",
    graphed: Callable[[Callable[[], object]], Callable[[], object]] = graphed,
) -> Outcome:
    """Time a stage on the whole batch, and in parts of 8, 16, 32 and 64 images."""
    (like,) = task.call.arguments
    stage = copy.deepcopy(task.call.operator).to_empty(device=on).to(memory_format=torch.channels_last).eval()
    for module in stage.modules():
        if isinstance(module, nn.Conv2d):
            nn.init.kaiming_normal_(module.to(like.dtype).weight)
        elif isinstance(module, nn.BatchNorm2d):
            module.reset_parameters()
    x = torch.randn(like.shape, device=on).to(like.dtype, memory_format=torch.channels_last)
    in_graph = task.problem.epilogue.startswith(plan.GRAPH)
    us = {}
    with torch.no_grad(), plan.replayed() if in_graph else nullcontext():
        for images in (0, *(part for part in (8, 16, 32, 64) if part < like.shape[0])):
            run = partial(modules.run_in_parts, stage, x, images) if images else partial(stage, x)
            us[str(images) if images else "library"] = timer(graphed(run) if in_graph else run)
    return Outcome(plan.table_entry(task.problem, us), [])


class Bench:
    """The current CUDA device as a place to measure on."""

    def __init__(self) -> None:
        self.device = ops.device_of(torch.empty(0, device="cuda"), "auto")
        self.timer = Timer()

    def measure(self, task: Task) -> Outcome:
        """`measure_operator`, `measure_block` or `measure_stage`."""
        try:
            if task.problem.op == plan.STAGE_OP:
                return measure_stage(task, self.timer)
            if task.call is None:
                return measure_operator(task.problem, self.device, self.timer)
            return measure_block(task, self.device, self.timer)
        except DeviceFailed:
            raise
        except Exception:
            _require_device("cuda", f"{task.problem.op} {describe(task.problem)}")
            raise

    def ahead(self, tasks: list[Task]) -> AbstractContextManager:
        """Compile the candidates of these tasks in the background."""
        plans = ((task.problem, chosen) for task in tasks for chosen in alternatives(task.problem, self.device))
        return self._compile(plans)

    def chains_ahead(self, tasks: list[Task]) -> AbstractContextManager:
        """Compile what the chains of blocks run by now: of each operator the measured tile, or the heuristic's."""
        plans = []
        for problem in (task.problem for task in tasks if task.call is None):
            with suppress(plan.Unsupported):
                plans.append((problem, plan.plan_for(problem, self.device, "triton")))
        return self._compile(plans)

    def _compile(self, plans: Iterable[tuple[Problem, Plan]]) -> AbstractContextManager:
        jobs = [(problem, chosen) for problem, chosen in plans if chosen.backend == "triton"]
        return precompile.workers(jobs, torch.cuda.current_device())


def _key(entry: dict) -> str:
    return json.dumps(entry["problem"], sort_keys=True)


def save(path: Path, arch: int, origin: dict[str, str], entries: Iterable[dict], valid: dict[str, str]) -> None:
    """Add entries to the end of the table at `path`, in place of those of the same problems.

    `valid`: what its origin must say to be kept. Processes that tune at the same time wait for one another, and lose
    nothing.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    added = {_key(entry): entry for entry in entries}
    with FileLock(path.with_name(f".{path.name}.lock")):
        there = plan.parse_entries(plan.read_text(path), str(path), arch, valid)
        kept = [entry for entry in there if _key(entry) not in added]
        plan.dump_table(path, arch, origin, [*kept, *added.values()])


def to_measure(tasks: Iterable[Task], known: Iterable[Problem]) -> list[Task]:
    """The tasks whose problems are not among `known`, those of a table, oldest first, and the blocks that are, but
    before an operator in front of them (`collect`): with another tile of an operator the chain is another one."""
    age = {problem: i for i, problem in enumerate(known)}
    found, newest, behind_block = [], -1.0, False
    for task in tasks:
        measured = age.get(task.problem, float("inf"))
        if task.call is None:
            newest = max(-1.0 if behind_block else newest, measured)
        behind_block = task.call is not None
        if measured == float("inf") or (behind_block and newest > measured):
            found.append(task)
    return found


@dataclass
class Tuner:
    """Measures tasks into the table at `path`; `valid` is the part of its `origin` without which it starts anew."""

    device: Device
    path: Path
    origin: dict[str, str]
    valid: dict[str, str]
    measure: Callable[[Task], Outcome]
    ahead: Callable[[list[Task]], AbstractContextManager] = lambda tasks: nullcontext()
    log: Callable[[str], None] = print
    clock: Callable[[], float] = time.monotonic

    def run(self, tasks: list[Task], budget: float = float("inf"), again: bool = False) -> int:
        """Measure what the table lacks (all of it with `again`) until `budget` seconds are over; how many are left.

        A block is measured anew behind an operator that was. A problem that cannot be measured, for lack of memory for
        instance, is named in the log and left; one in which an earlier run was killed, since it hung for instance,
        comes last. OSError: the table cannot be written.
        """
        start, arch = self.clock(), self.device.arch
        text = plan.read_text(self.path)
        known = plan.parse_table(text, str(self.path), arch, self.valid)
        plan.measurements(self.device).update(known)
        plan.forget_choices()
        left, failed = list(tasks) if again else to_measure(tasks, known), 0
        begun = self.path.with_name(f".{self.path.name}.begun")  # a note of the problem that is being measured
        suspect = plan.read_text(begun)
        left.sort(key=lambda task: str(task.problem) == suspect)
        begun.parent.mkdir(parents=True, exist_ok=True)
        with self.ahead(left) if left else nullcontext():
            for done, task in enumerate(left):
                if self.clock() - start > budget:
                    begun.unlink(missing_ok=True)
                    self.log(f"time is over: {len(left) - done} problems left; run again to go on")
                    return len(left) - done + failed
                head = f"[{done + 1}/{len(left)}] {task.problem.op} {describe(task.problem)}"
                begun.write_text(str(task.problem))
                try:
                    outcome = self.measure(task)
                except DeviceFailed as failure:
                    if failure.entry is not None:
                        self._note(task, head, failure.entry, [str(failure)])
                    raise
                except Exception as error:
                    failed += 1
                    self.log(f"{head}: left out: {_line(error)}")
                else:
                    self._note(task, head, *outcome)
        begun.unlink(missing_ok=True)
        return failed

    def _note(self, task: Task, head: str, entry: dict, rejected: list[str]) -> None:
        """Into the table, the plans and the log."""
        save(self.path, self.device.arch, self.origin, [entry], self.valid)
        config = None if entry["config"] is None else plan.TileConfig(**entry["config"])
        measured = Measured(entry["us"], config, f"sm{self.device.arch}")
        plan.measurements(self.device)[task.problem] = measured
        plan.forget_choices()
        self.log(f"{head}: " + ", ".join(f"{name} {measured.us[name]:.1f} us" for name in measured.ranking))
        for reason in rejected:
            self.log(f"    rejected {reason}")


@contextmanager
def conditions() -> Iterator[None]:
    """What everything is timed under: cuDNN's own search on, as for the fastest library, and autograd as called for."""
    before = torch.backends.cudnn.benchmark
    torch.backends.cudnn.benchmark = True
    try:
        with torch.inference_mode(False), torch.enable_grad(), torch.autocast("cuda", enabled=False):
            yield
    finally:
        torch.backends.cudnn.benchmark = before


def own_tuner(bench: Bench, log: Callable[[str], None] = print) -> Tuner:
    """A tuner into the user's own table for the current card (module `tuned`), if there is a folder for it."""
    card = torch.cuda.get_device_name()
    valid = tuned.stamp(card)
    origin = {**valid, "date": datetime.date.today().isoformat()}
    return Tuner(bench.device, tuned.location(bench.device.arch, card), origin, valid, bench.measure, bench.ahead, log)


class Tuned(NamedTuple):
    """What `tune` did: the table's file, how many problems the model has, and how many of them are left."""

    path: Path
    problems: int
    left: int


def tune(
    model: nn.Module,
    example: Tensor,
    *,
    budget: float = float("inf"),
    again: bool = False,
    log: Callable[[str], None] = print,
) -> Tuned:
    """Measure the problems of a model on this machine's card, for `impl="auto"` to choose by, now and in later runs.

    Call it once, before compiling, capturing or training, from one process. What it measures goes into the user's own
    table (module `tuned` says where it lies and what makes it invalid), which counts before the shipped one. Problems
    that are there already are not measured again, so a run whose budget was spent can be continued.

    Args:
        model: with fused blocks (`fuse`, or the package's own modules); left as it is. In training mode, the training
            step is tuned, in eval mode inference: tune both if you run both.
        example: an input. Shape and dtype count; under autocast its dtype does. If it is on a CUDA device, so is the
            measurement, else on the current one.
        budget: seconds after which no problem is begun. All of ResNet-50 takes some minutes.
        again: measure what the table has already, too.
        log: called with each line of the report.

    Raises:
        TypeError, ValueError: an argument that does not fit, named; a model in which nothing is fused.
        RuntimeError: no CUDA device; in a distributed job, whose ranks would disturb one another; no folder to write.
        DeviceFailed: a kernel has broken the device for this process; a new one goes on behind it.
        OSError: the table cannot be written.
    """
    modules.check_module(model)
    if not isinstance(example, Tensor):
        raise TypeError(f"example: expected a tensor, got {type(example).__name__}")
    if not budget > 0:
        raise ValueError(f"budget: expected a positive number of seconds, got {budget}")
    if not torch.cuda.is_available():
        raise RuntimeError("tune: needs a CUDA device")
    distributed = torch.distributed
    if distributed.is_available() and distributed.is_initialized() and distributed.get_world_size() > 1:
        raise RuntimeError("tune: called in a distributed job; tune in one process before it, for all ranks")
    if tuned.folder() is None:
        raise RuntimeError("tune: FUSED_RESNET_PLANS is empty, which says that there is no folder for tuned plans")
    dtype = torch.get_autocast_dtype("cuda") if torch.is_autocast_enabled("cuda") else example.dtype
    x = torch.empty_like(example, dtype=dtype, device="meta")
    tasks = collect([(model, x)]) + stages(model, x)
    if not tasks:
        raise ValueError("model: nothing in it is fused; fused_resnet.explain(model, example) says why")
    with torch.cuda.device(example.device if example.is_cuda else torch.cuda.current_device()), conditions():
        bench = Bench()
        tuner = own_tuner(bench, log)
        tasks = list(in_graphs(with_kernels(tasks, bench.device)))
        try:
            left = tuner.run(tasks, budget, again)
        finally:
            ops.forget_plans()
    return Tuned(tuner.path, len(tasks), left)
