"""Time every operator of a network by itself, and every block, against the least time that it could take.

    python -m benchmarks.layers --model resnet50 --batch 256 --mode training --dtype bf16

One row per distinct operator and kernel: the library's operators, the Triton kernel in its measured tile (or the
heuristic's), the CUDA library's kernel; and per distinct block: the library's operators, and the chain of fused ones.
The L2 cache is cold, as between the layers of a network. The floor is the longer of arithmetic and traffic at the
card's measured ceilings, both counted for the fused operators, so that a block's rows share one. Rows go to layers.json
in the format of all results, and layers.png shows them. Exit status: 0, or 2 for a bad option.
"""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, nullcontext
from functools import partial
from pathlib import Path

import torch

from fused_resnet import models, plan, reference, trials, tuning, workload
from fused_resnet.explain import describe
from fused_resnet.plan import Device

from . import plot, roofline, timing
from .baselines import DTYPES, Case
from .results import Results
from .tune import MODES, runs

_COLUMNS = ("layer", "x", "operator", "problem", "contender", "us", "q25-q75", "GB/s", "TFLOP/s", "of floor", "")

# What to time, under which name, and what to plan as meanwhile.
Contender = tuple[str, Callable[[], object], AbstractContextManager]


def _operators(task: workload.Task, device: Device | None, on: str) -> Iterator[Contender]:
    problem = task.problem
    arguments = trials.operator_arguments(problem, torch.Generator().manual_seed(0), on)
    yield "library", partial(getattr(reference, problem.op), *arguments), nullcontext()
    for impl in ("triton", "cuda") if device is not None else ():
        try:
            run = tuning.launcher(plan.plan_for(problem, device, impl))
        except plan.Unsupported:
            continue
        yield impl, partial(run, *arguments), nullcontext()


def _blocks(task: workload.Task, device: Device | None, on: str) -> Iterator[Contender]:
    if device is None:
        yield "library", tuning.block_call(task.call, on), nullcontext()
        yield "reference", tuning.block_call(task.call, on, "reference"), nullcontext()
        return
    run = tuning.block_call(task.call, on)
    for backend, plans in tuning.block_plans(task.problem, device).items():
        yield backend, run, tuning.planned_as(device, plans)


def measure(
    task: workload.Task,
    case: Case,
    ceilings: roofline.Ceilings,
    device: Device | None,
    times: Callable[[Callable[[], object]], list[float]],
) -> list[dict]:
    """The rows of one operator or block; `times(run)` are the seconds of several calls."""
    work, rows = task.work, []
    what = {"layer": task.layer, "count": task.count, "operator": task.problem.op, "problem": describe(task.problem)}
    for contender, run, planned in (_blocks if task.call else _operators)(task, device, case.device):
        row = {**case._asdict(), "contender": contender, **what, **work._asdict()}
        try:
            with planned:
                row |= timing.summary(times(run))
        except Exception as error:  # a kernel that fails is a row like any other
            row["error"] = f"{type(error).__name__}: {str(error)[:300].partition(chr(10))[0]}"
        else:
            seconds = row["median_ms"] / 1e3
            row |= {"gb_per_s": work.bytes / seconds / 1e9, "tflop_per_s": work.flop / seconds / 1e12}
            row["roofline_share"] = work.seconds(*ceilings) / seconds
        rows.append(row)
    return rows


def table(rows: list[dict]) -> str:
    """Rows as aligned text; the last column is the speed relative to the library's, or the error."""
    lines, library = [_COLUMNS], None
    for row in rows:
        head = row["layer"], str(row["count"]), row["operator"], row["problem"], row["contender"]
        if row["contender"] == "library":
            library = row.get("median_ms")
        if "error" in row:
            lines.append((*head, "-", "-", "-", "-", "-", row["error"]))
            continue
        spread = f"{1e3 * row['q25_ms']:.1f}-{1e3 * row['q75_ms']:.1f}"
        rates = f"{row['gb_per_s']:,.0f}", f"{row['tflop_per_s']:,.1f}", f"{100 * row['roofline_share']:.0f} %"
        relative = f"{library / row['median_ms']:.2f} x library" if library and row["contender"] != "library" else ""
        lines.append((*head, f"{1e3 * row['median_ms']:.1f}", spread, *rates, relative))
    widths = [max(len(line[i]) for line in lines) for i in range(len(_COLUMNS) - 1)]
    return "\n".join("  ".join([*(c.ljust(w) for c, w in zip(line, widths)), line[-1]]).rstrip() for line in lines)


def _parse(argv: list[str] | None, device: str) -> argparse.Namespace:
    cuda = device == "cuda"
    parser = argparse.ArgumentParser(prog="python -m benchmarks.layers", description=__doc__.split("\n\n")[0])
    parser.add_argument("--model", default="resnet50", choices=models.BUILDERS)
    parser.add_argument("--batch", type=int, default=256 if cuda else 2)
    parser.add_argument("--mode", default="training", choices=MODES)
    parser.add_argument("--dtype", default="bf16" if cuda else "fp32", choices=DTYPES)
    parser.add_argument("--size", type=int, default=224 if cuda else 64, help="image height and width in pixels")
    parser.add_argument("--out", type=Path, default=Path("out"), help="folder for layers.json and layers.png")
    parser.add_argument("--budget", type=float, default=float("inf"), help="seconds after which no layer is begun")
    return parser.parse_args(argv)


def main(argv: list[str] | None = None) -> int:
    """Entry point; returns the exit status."""
    on = "cuda" if torch.cuda.is_available() else "cpu"
    arguments = _parse(argv, on)
    if arguments.batch < 1 or arguments.size < 32 or not arguments.budget > 0:
        print("--batch, --budget: expected positive numbers; --size: at least 32 pixels", file=sys.stderr)
        return 2
    start = time.monotonic()
    case = Case(arguments.model, arguments.mode, arguments.batch, arguments.dtype, arguments.size, on)
    results = Results(arguments.out / "layers.json", arguments)
    tasks = workload.collect(runs([case.model], [case.batch], [case.dtype], [case.mode], case.size))
    ceilings = roofline.measure_ceilings(on, DTYPES[case.dtype])
    results.content["ceilings"] = {case.dtype: ceilings._asdict()}
    with tuning.conditions():
        device, times = None, lambda run: [timing.seconds(run, "cpu") for _ in range(6)][1:]
        if on == "cuda":
            bench = tuning.Bench()
            device, times = bench.device, lambda run: [us / 1e6 for us in bench.timer.times(run)]
        for done, task in enumerate(tasks):
            if time.monotonic() - start > arguments.budget:
                print(f"budget of {arguments.budget:.0f} s spent: {len(tasks) - done} problems left")
                break
            for row in measure(task, case, ceilings, device, times):
                results.add("rows", row)
    print(table(results.content["rows"]))
    plot.draw(results.content, arguments.out / "layers.png")
    print(f"{results.path} and layers.png written, {time.monotonic() - start:.0f} s")
    return 0


if __name__ == "__main__":
    sys.exit(main())
