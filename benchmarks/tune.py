"""Measure which kernel, and which tile of it, runs each problem fastest, and write the winners to a plan table.

    python -m benchmarks.tune --models resnet50 --batches 256 --dtypes bf16 --modes training inference --budget 900

For every operator of every layer: the legal tiles of its Triton kernel and its CUDA kernel are held against float64 on
random input first (on fewer images, with the error budget of the tests), and whatever passes is timed with a cold L2
cache against the library's operators. Then whole blocks: the chain of winners against the library's block, forward and
backward. The table is rewritten, atomically, after each problem, so a run may be killed, or end with its budget, and
the next one goes on where it stopped.
"""

from __future__ import annotations

import argparse
import datetime
import importlib
import json
import statistics
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import NamedTuple

import torch
from torch import nn

import fused_resnet
from fused_resnet import models, ops, plan, reference, testing
from fused_resnet.explain import describe, device_for
from fused_resnet.plan import Device, Plan, Problem, TileConfig
from fused_resnet.tracing import LayerTracker, run_on_meta

DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}
MODES = ("training", "inference")
_CHECKED_PIXELS = 20_000  # of the first tensor, when a kernel is held against float64
# Tiles beside the heuristic's own (pixels, channels, depth, warps, stages).
_GEMM_TILES = (
    (128, 128, 64, 8, 3), (128, 128, 32, 4, 4), (128, 64, 64, 4, 4), (128, 64, 64, 8, 3), (64, 128, 64, 4, 4),
    (64, 64, 64, 4, 4), (128, 256, 64, 8, 3), (256, 64, 64, 8, 3), (64, 256, 64, 8, 3), (64, 64, 128, 4, 3),
)  # fmt: skip
_MAP_TILES = ((16, 64, 4), (32, 64, 4), (64, 64, 4), (32, 128, 4), (64, 128, 8), (128, 64, 8))


class Block(NamedTuple):
    """A residual block or stem of a model: its problem, the module that runs it, and the shape of its input."""

    problem: Problem
    module: nn.Module
    shape: tuple[int, ...]


def collect(
    names: list[str], batches: list[int], dtypes: list[str], modes: list[str], size: int
) -> tuple[list[Problem], list[Block]]:
    """Every distinct problem of the models' layers, as the operators state them, and every distinct block."""
    problems: dict[Problem, None] = {}
    blocks: dict[Problem, Block] = {}
    for name in names:
        for mode in modes:
            with torch.device("meta"):
                model = getattr(models, name)().train(mode == "training")
            modules = dict(model.named_modules())
            for batch in batches:
                for dtype in dtypes:
                    with LayerTracker(model, lambda *_: None) as tracker:

                        def note(problem: Problem, chosen: Plan, tracker=tracker, modules=modules) -> None:
                            if problem.op == "residual_block" and tracker.layer in modules:
                                shape = problem.n, problem.c, problem.h, problem.w
                                blocks.setdefault(problem, Block(problem, modules[tracker.layer], shape))
                            elif problem.op not in plan.BLOCK_OPS:
                                problems.setdefault(problem)

                        with plan.use("reference"), ops.record(note, None):
                            run_on_meta(model, torch.empty(batch, 3, size, size, dtype=DTYPES[dtype], device="meta"))
    return list(problems), list(blocks.values())


def candidates(problem: Problem, device: Device) -> Iterator[TileConfig]:
    """The heuristic's tile and its legal neighbours, without repetition; none if there is no Triton kernel."""
    try:
        first = plan.triton_plan(problem, None, device, "").config
    except plan.Unsupported:
        return
    if first.block_k:
        others = [TileConfig(*tile) for tile in _GEMM_TILES]
    else:
        others = [TileConfig(m, n, 0, warps, first.num_stages) for m, n, warps in _MAP_TILES]
    for config in dict.fromkeys((first, *others)):
        if plan.unsupported(problem, config, device) is None:
            yield config


def launcher(chosen: Plan) -> Callable:
    """The launch function that a plan names, bound to it."""
    module = importlib.import_module(f"fused_resnet.kernels.{chosen.module}")
    return partial(getattr(module, chosen.launch), plan=chosen)


class Timer:
    """Median time of a call on the GPU, in microseconds, with a cold L2 cache: 256 MB are written before each call."""

    def __init__(self, seconds: float = 0.15) -> None:
        self.seconds = seconds
        self._flush = torch.empty(256 * 2**20, dtype=torch.uint8, device="cuda")

    def __call__(self, run: Callable[[], object]) -> float:
        for _ in range(2):
            run()
        torch.cuda.synchronize()
        times: list[float] = []
        stop = time.monotonic() + self.seconds
        while len(times) < 5 or (time.monotonic() < stop and len(times) < 50):
            self._flush.fill_(len(times))
            begin, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
            begin.record()
            run()
            end.record()
            end.synchronize()
            times.append(begin.elapsed_time(end) * 1000)
        return statistics.median(times)


class Measured(NamedTuple):
    """Outcome of one problem: the winner in the table's form, and what was rejected and why."""

    entry: dict
    rejected: list[str]


def measure_operator(problem: Problem, device: Device, timer: Callable[[Callable], float]) -> Measured:
    """Check and time every candidate of an operator against the library."""
    generator = torch.Generator().manual_seed(0)
    images = max(1, min(problem.n, _CHECKED_PIXELS // max(1, problem.h * problem.w)))
    small = problem if problem.op in plan.VECTOR_OPS else replace(problem, n=images)
    arguments = testing.operator_arguments(problem, generator)
    library_us = timer(lambda: getattr(reference, problem.op)(*arguments))
    best, rejected = (library_us, "library", None), []
    tile = None, float("inf")
    plans = [plan.triton_plan(problem, config, device, "") for config in candidates(problem, device)]
    if plan.cuda_unsupported(problem, device) is None:
        plans.append(plan.cuda_plan(problem, device, ""))
    for chosen in plans:
        run, config = launcher(chosen), chosen.config
        try:
            testing.check_operator(small, run, torch.Generator().manual_seed(1), "cuda")
            us = timer(lambda run=run: run(*arguments))
        except Exception as error:  # a tile that fails to compile, to launch or to be right is out, the others go on
            rejected.append(f"{config or chosen.backend}: {type(error).__name__}: {str(error).splitlines()[0][:200]}")
            torch.cuda.empty_cache()
            continue
        if config is not None and us < tile[1]:
            tile = config, us
        if us < best[0]:
            best = us, chosen.backend, config
    us, backend, _ = best
    return Measured(plan.table_entry(problem, backend, tile[0], us, library_us), rejected)


def measure_block(block: Block, device: Device, timer: Callable[[Callable], float]) -> Measured:
    """Time a whole block, forward (and backward, in training): chain of measured winners against the library's."""
    problem, training = block.problem, block.problem.epilogue.startswith("training")
    dtype = getattr(torch, problem.dtype)
    module = block.module.to_empty(device="cuda").to(memory_format=torch.channels_last).train(training)
    with torch.no_grad():
        for tensor in (*module.parameters(), *module.buffers()):
            tensor.copy_(torch.rand_like(tensor, dtype=torch.float32) * 0.1 + 0.5)
    for conv in module.modules():
        if isinstance(conv, nn.Conv2d):
            conv.to(dtype)
            nn.init.kaiming_normal_(conv.weight)
    x = torch.randn(block.shape, device="cuda", dtype=dtype).to(memory_format=torch.channels_last)
    x.requires_grad_(training)
    gradient = None

    def run() -> None:
        nonlocal gradient
        if not training:
            with torch.no_grad():
                module(x)
            return
        out = module(x)
        if gradient is None:
            gradient = torch.randn_like(out)
        out.backward(gradient)

    library_us = timer(run)
    table = plan.measured_winners(device.arch)
    before = table.get(problem)
    table[problem] = plan.Winner("triton", None, "being measured")
    plan.forget_choices()
    rejected, us = [], float("inf")
    try:
        us = timer(run)
    except Exception as error:
        rejected.append(f"{type(error).__name__}: {str(error).splitlines()[0][:200]}")
    finally:
        table.pop(problem) if before is None else table.__setitem__(problem, before)
        plan.forget_choices()
    backend = "triton" if us < library_us else "library"
    return Measured(plan.table_entry(problem, backend, None, min(us, library_us), library_us), rejected)


def _key(entry: dict) -> str:
    return json.dumps(entry["problem"], sort_keys=True)


def _known(problem: Problem) -> str:
    return _key(plan.table_entry(problem, "library", None, 0.0, 0.0))


def tune(
    work: list[tuple[Problem, Callable[[], Measured]]],
    path: Path,
    arch: int,
    origin: dict[str, str],
    *,
    again: bool = False,
    budget: float = float("inf"),
    clock: Callable[[], float] = time.monotonic,
    log: Callable[[str], None] = print,
) -> int:
    """Measure what the table at `path` lacks (all of it with `again`) until `budget` seconds are over.

    The table is written after each problem. Returns how many problems are left.
    """
    start = clock()
    entries = {_key(entry): entry for entry in plan.read_entries(path, arch)}
    left = [(problem, measure) for problem, measure in work if again or _known(problem) not in entries]
    for done, (problem, measure) in enumerate(left):
        if clock() - start > budget:
            log(f"budget of {budget:.0f} s spent: {len(left) - done} problems left; run again to go on")
            return len(left) - done
        try:
            entry, rejected = measure()
        except torch.cuda.OutOfMemoryError:
            log(f"[{done + 1}/{len(left)}] {problem.op}: out of memory, left out")
            torch.cuda.empty_cache()
            continue
        entries[_key(entry)] = entry
        plan.dump_table(path, arch, origin, entries.values())
        plan.forget_tables()
        what = f"{problem.op} {describe(problem)}: {entry['backend']}"
        log(f"[{done + 1}/{len(left)}] {what} {entry['us']:.1f} us, library {entry['library_us']:.1f} us")
        for reason in rejected:
            log(f"    rejected {reason}")
    return 0


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.tune", description=__doc__.split("\n\n")[0])
    parser.add_argument("--models", nargs="+", default=["resnet50"], choices=models.BUILDERS)
    parser.add_argument("--batches", nargs="+", type=int, default=[256])
    parser.add_argument("--dtypes", nargs="+", default=["bf16"], choices=DTYPES)
    parser.add_argument("--modes", nargs="+", default=list(MODES), choices=MODES)
    parser.add_argument("--size", type=int, default=224, help="image height and width in pixels")
    parser.add_argument("--budget", type=float, default=float("inf"), help="seconds after which no problem is begun")
    parser.add_argument("--again", action="store_true", help="measure what the table has already, too")
    parser.add_argument("--out", type=Path, help="default: fused_resnet/plans/sm<arch>.json")
    parser.add_argument("--dry-run", metavar="ARCH", help="list problems and candidates for a card, e.g. sm90")
    return parser


def _dry_run(problems: list[Problem], blocks: list[Block], arch: str) -> int:
    device = device_for(arch)
    for problem in problems:
        tiles = list(candidates(problem, device))
        print(f"{problem.op:22} {describe(problem):70} {len(tiles)} tiles")
    for block in blocks:
        print(f"{block.problem.op:22} {describe(block.problem)}")
    print(f"{len(problems)} operators, {len(blocks)} blocks")
    return 0


def main(argv: list[str] | None = None) -> int:
    """Entry point; returns the exit status."""
    arguments = _parser().parse_args(argv)
    if min(*arguments.batches, arguments.size) < 1:
        print("--batches, --size: expected positive integers", file=sys.stderr)
        return 2
    if not arguments.dry_run and not torch.cuda.is_available():
        print("tuning needs a CUDA device; --dry-run sm90 lists the problems without one", file=sys.stderr)
        return 2
    problems, blocks = collect(arguments.models, arguments.batches, arguments.dtypes, arguments.modes, arguments.size)
    if arguments.dry_run:
        return _dry_run(problems, blocks, arguments.dry_run)
    device = device_for(None)
    path = arguments.out or plan.PLANS / f"sm{device.arch}.json"
    torch.backends.cudnn.benchmark = True
    timer = Timer()
    work = [(p, partial(measure_operator, p, device, timer)) for p in problems]
    work += [(b.problem, partial(measure_block, b, device, timer)) for b in blocks]
    origin = {
        "card": torch.cuda.get_device_name(),
        "torch": torch.__version__,
        "date": datetime.date.today().isoformat(),
        "commit": _commit(),
        "fused_resnet": fused_resnet.__version__,
    }
    left = tune(work, path, device.arch, origin, again=arguments.again, budget=arguments.budget)
    return 0 if left == 0 else 3


def _commit() -> str:
    import subprocess

    git = subprocess.run(["git", "describe", "--always", "--dirty"], capture_output=True, text=True)
    return git.stdout.strip() or "unknown"


if __name__ == "__main__":
    sys.exit(main())
