"""Tune the table of plans that the package ships: `fused_resnet.tuning` over whole models, batches and dtypes.

    python -m benchmarks.tune --models resnet50 --batches 256 --dtypes bf16 --modes training inference --budget 540

What is measured, how, and in which order, `fused_resnet.tuning` says. The table is rewritten, atomically, after each
problem, so a run may be killed, or end with its budget, and the next one goes on where it stopped. A kernel that breaks
the device costs its process alone: what is left goes on in a new one. Exit status: 0, 1 if the device is broken and the
table does not say by what, 2 for a bad option, 3 if problems are left.
"""

from __future__ import annotations

import argparse
import os
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import NoReturn

import torch
from torch import Tensor, nn

import fused_resnet
from fused_resnet import models, plan, tuned, tuning, workload
from fused_resnet.explain import describe, device_for

from . import environment
from .baselines import DTYPES

MODES = ("training", "inference")
KINDS = ("operators", "blocks", "stages")


def runs(
    names: list[str], batches: list[int], dtypes: list[str], modes: list[str], size: int
) -> Iterator[tuple[nn.Module, Tensor]]:
    """The models and inputs of these options, without data."""
    for name in names:
        for mode in modes:
            with torch.device("meta"):
                model = getattr(models, name)().train(mode == "training")
            for batch in batches:
                for dtype in dtypes:
                    yield model, torch.empty(batch, 3, size, size, dtype=DTYPES[dtype], device="meta")


def problems(
    names: list[str], batches: list[int], dtypes: list[str], modes: list[str], size: int
) -> list[workload.Task]:
    """What can be measured for these options, in the order of `workload.collect`, stages last."""
    options = names, batches, dtypes, modes, size
    return workload.collect(runs(*options)) + [task for run in runs(*options) for task in workload.stages(*run)]


def choices(tasks: list[workload.Task], device: plan.Device) -> list[workload.Task]:
    """Those that leave a choice on a device, and each block in a CUDA graph, too."""
    return list(workload.in_graphs(tuning.with_kernels(tasks, device)))


def unshipped(tasks: list[workload.Task], arch: int) -> list[workload.Task]:
    """Those that the package's table lacks."""
    shipped = plan.load_table(plan.PLANS / f"sm{arch}.json", arch)
    return [task for task in tasks if task.problem not in shipped]


def kind_of(task: workload.Task) -> str:
    """Which of `KINDS` a task is."""
    if task.problem.op == plan.STAGE_OP:
        return "stages"
    return "operators" if task.call is None else "blocks"


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.tune", description=__doc__.split("\n\n")[0])
    parser.add_argument("--models", nargs="+", default=["resnet50"], choices=models.BUILDERS)
    parser.add_argument("--batches", nargs="+", type=int, default=[256, 128, 32, 8, 1])
    parser.add_argument("--dtypes", nargs="+", default=["bf16"], choices=DTYPES)
    parser.add_argument("--modes", nargs="+", default=list(MODES), choices=MODES)
    parser.add_argument("--compile", action="store_true", help="fill Triton's cache on all cores, measure nothing")
    parser.add_argument("--only", choices=KINDS, help="blocks alone show within a minute or two what chains gain")
    parser.add_argument("--size", type=int, default=224, help="image height and width in pixels")
    parser.add_argument("--budget", type=float, default=float("inf"), help="seconds after which no problem is begun")
    parser.add_argument("--again", action="store_true", help="measure what the table has already, too")
    parser.add_argument("--out", type=Path, default=plan.PLANS, help="folder for sm<arch>.json")
    parser.add_argument(
        "--own", action="store_true", help="into your own table instead, what the package's lacks, all blocks first"
    )
    parser.add_argument("--dry-run", metavar="ARCH", help="list problems and candidates for a card, e.g. sm90")
    return parser


def _dry_run(tasks: list[workload.Task], arch: str) -> int:
    device, kernels = device_for(arch), 0
    for problem, call, *_ in tasks:
        plans = [] if call else list(tuning.alternatives(problem, device))
        kernels += len(plans)
        print(f"{problem.op:22} {describe(problem):80} {'' if call else f'{len(plans)} kernels'}".rstrip())
    blocks = sum(task.call is not None for task in tasks)
    print(f"{len(tasks) - blocks} operators in {kernels} kernels, {blocks} blocks")
    return 0


def _tuner(arguments: argparse.Namespace, bench: tuning.Bench) -> tuning.Tuner:
    """Into the table that ships, or the user's own."""
    if arguments.own:
        return tuning.own_tuner(bench)
    described = environment.describe()
    kept = ("card", "driver", "torch", "cuda", "cudnn", "triton", "date", "commit")
    origin = {"fused_resnet": fused_resnet.__version__} | {key: str(described[key]) for key in kept}
    path = arguments.out / f"sm{bench.device.arch}.json"
    return tuning.Tuner(bench.device, path, origin, {}, bench.measure, bench.ahead)


def _measure(arguments: argparse.Namespace, tasks: list[workload.Task], bench: tuning.Bench, stop: float) -> int:
    """Measure until `stop`, on the clock of time.monotonic; how many problems are left. Into the user's own table all
    blocks come first, and again behind their operators."""
    tuner = _tuner(arguments, bench)
    work = [task for task in choices(tasks, bench.device) if arguments.only in (None, kind_of(task))]
    rounds = [work]
    if arguments.own:
        work = unshipped(work, bench.device.arch)
        rounds = [[task for task in work if kind_of(task) == "blocks"], work]
    for now in rounds:
        blocks = all(kind_of(task) == "blocks" for task in now)
        tuner.ahead = (lambda _: bench.chains_ahead(tasks)) if blocks else bench.ahead
        left = tuner.run(now, max(0.0, stop - time.monotonic()), arguments.again)
    return left


def _go_on(argv: list[str], budget: float) -> NoReturn:
    """This command from its beginning, in a new program under the same process id."""
    os.execv(sys.executable, [sys.executable, "-m", "benchmarks.tune", *argv, "--budget", str(budget)])


def main(argv: list[str] | None = None) -> int:
    """Entry point; returns the exit status."""
    argv = sys.argv[1:] if argv is None else argv
    arguments = _parser().parse_args(argv)
    stop = time.monotonic() + arguments.budget
    if min(*arguments.batches, arguments.size) < 1 or not arguments.budget > 0:
        print("--batches, --size, --budget: expected positive numbers", file=sys.stderr)
        return 2
    if arguments.own and tuned.folder() is None:
        print("--own: FUSED_RESNET_PLANS is empty, so there is no folder for it", file=sys.stderr)
        return 2
    if not arguments.dry_run and not torch.cuda.is_available():
        print("tuning needs a CUDA device; --dry-run sm90 lists the problems without one", file=sys.stderr)
        return 2
    tasks = problems(arguments.models, arguments.batches, arguments.dtypes, arguments.modes, arguments.size)
    if arguments.dry_run:
        return _dry_run(tasks, arguments.dry_run)
    with tuning.conditions():
        bench = tuning.Bench()
        if arguments.compile:
            with bench.chains_ahead(tasks) as running:
                for worker in running:
                    worker.wait()
            return 0
        try:
            left = _measure(arguments, tasks, bench, stop)
        except tuning.DeviceFailed as failure:
            print(failure, flush=True)
            if failure.entry is None or arguments.again:
                return 1
            budget = stop - time.monotonic()
            return 3 if budget <= 0 else _go_on(argv, budget)
    return 0 if left == 0 else 3


if __name__ == "__main__":
    sys.exit(main())
