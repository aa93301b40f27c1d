"""Compile Triton kernels before they are measured: in processes of their own, which fill Triton's cache on disk.

A candidate takes a second to compile and a quarter of one to measure, so tuning would mostly wait for one core. A
worker runs launch functions on meta tensors, with each kernel compiling for this card instead of being launched; the
GPU stays free for measuring. What fails here is compiled again, and named, where it is measured.
"""

from __future__ import annotations

import importlib
import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import asdict
from functools import partial
from pathlib import Path

import torch

from . import trials
from .plan import Plan, Problem, TileConfig

_JOBS_PER_WORKER = 16  # a worker takes some seconds to start


@contextmanager
def workers(jobs: list[tuple[Problem, Plan]], device: int) -> Iterator[list[subprocess.Popen]]:
    """Compile these jobs in the background, in their order, while the block runs; yields the processes that do.

    Every second core gets one, and none is started for a few jobs. ``device`` is the index of the CUDA device.
    """
    count = min((os.cpu_count() or 1) // 2, 8, len(jobs) // _JOBS_PER_WORKER)
    code = f"from {__name__} import work; work({device})"
    root = str(Path(__file__).parent.parent)
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, [root, os.environ.get("PYTHONPATH")]))}
    running = []
    try:
        for first in range(count):
            with tempfile.TemporaryFile("w+") as share:
                json.dump([(asdict(problem), asdict(chosen)) for problem, chosen in jobs[first::count]], share)
                share.seek(0)
                quiet = {"stdout": subprocess.DEVNULL, "stderr": subprocess.DEVNULL}
                running.append(subprocess.Popen([sys.executable, "-c", code], stdin=share, env=environment, **quiet))
        yield running
    finally:
        for worker in running:
            worker.kill()
            worker.wait()


class _Compiles:
    """Stands in for a kernel: compiles what would be launched."""

    def __init__(self, kernel) -> None:
        self.kernel = kernel

    def __getitem__(self, grid):
        return partial(self.kernel.run, grid=grid, warmup=True)


def compile_job(problem: Problem, chosen: Plan) -> None:
    """Compile the kernels that launching `chosen` on this problem needs, for the current device."""
    launch = getattr(importlib.import_module(f"{__package__}.kernels.{chosen.module}"), chosen.launch)
    files = [module for name, module in sys.modules.items() if name.startswith(f"{__package__}.kernels.")]
    kernels = [(module, *item) for module in files for item in vars(module).items() if item[0].endswith("_kernel")]
    arguments = trials.operator_arguments(problem, torch.Generator().manual_seed(0), "meta")
    try:
        for module, name, kernel in kernels:
            setattr(module, name, _Compiles(kernel))
        launch(*arguments, plan=chosen)
    finally:
        for module, name, kernel in kernels:
            setattr(module, name, kernel)


def _revive(job: list[dict]) -> tuple[Problem, Plan]:
    problem, chosen = ({k: tuple(v) if isinstance(v, list) else v for k, v in part.items()} for part in job)
    return Problem(**problem), Plan(**{**chosen, "config": TileConfig(**chosen["config"])})


def work(device: int) -> None:
    """What a worker does: the jobs on its standard input."""
    torch.cuda.set_device(device)
    parent = os.getppid()
    for job in json.load(sys.stdin):
        if os.getppid() != parent:
            return  # it was killed
        with suppress(Exception):
            compile_job(*_revive(job))
