"""Compiling kernels ahead of their measurement, in processes of their own."""

import os
import subprocess
import sys
import time
from dataclasses import replace

import pytest

from fused_resnet import plan, precompile
from fused_resnet.plan import Problem

H100 = plan.Device.default(90)


def test_compile_job_compiles_instead_of_launching(monkeypatch):
    from fused_resnet.kernels import bn

    compiled = []

    class Kernel:
        def run(self, *args, grid, warmup, **options):
            compiled.append((warmup, grid, options["num_warps"]))

    problem = Problem("bn_act", 4, 6, 6, 24, 24)
    monkeypatch.setattr(bn, "_bn_act_kernel", Kernel())
    kernel = bn._bn_act_kernel
    precompile.compile_job(problem, plan.triton_plan(problem, None, H100, ""))
    assert [warmup for warmup, _, _ in compiled] == [True]
    assert bn._bn_act_kernel is kernel


def test_compile_job_fills_tritons_cache(tmp_path):
    """Where there is no GPU, a driver that only names one: compiling needs no more."""
    pytest.importorskip("triton")
    code = """
import triton
from triton.backends.compiler import GPUTarget

class Driver:
    get_current_target = staticmethod(lambda: GPUTarget("cuda", 90, 32))
    get_current_device = staticmethod(lambda: 0)
    get_current_stream = staticmethod(lambda device: 0)

triton.runtime.driver.set_active(Driver())
from fused_resnet import plan, precompile
problem = plan.Problem("bn_act", 4, 6, 6, 24, 24)
precompile.compile_job(problem, plan.triton_plan(problem, None, plan.Device.default(90), ""))
"""
    environment = {**os.environ, "TRITON_CACHE_DIR": str(tmp_path)}
    environment.pop("TRITON_INTERPRET", None)
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=environment)
    assert done.returncode == 0, done.stderr
    assert [path.name for path in tmp_path.rglob("*.cubin")] == ["_bn_act_kernel.cubin"]


def test_workers_get_their_share_in_order_and_end_with_the_block(tmp_path, monkeypatch):
    """Workers that note their jobs and then wait for ever."""
    code = f"""
import json, sys, time
from fused_resnet import precompile
def note(problem, chosen):
    with open({str(tmp_path)!r} + f"/{{problem.n % 2}}", "a") as file:
        print(problem.n, chosen.config.block_m, file=file)
    if problem.n > 6:
        time.sleep(600)
precompile.compile_job = note
precompile.torch.cuda.set_device = lambda index: None
"""
    (tmp_path / "sitecustomize.py").write_text("")
    (tmp_path / "patched.py").write_text(code)
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    monkeypatch.setattr(precompile, "_JOBS_PER_WORKER", 4)
    monkeypatch.setattr(precompile.os, "cpu_count", lambda: 4)
    monkeypatch.setattr(precompile, "__name__", "fused_resnet.precompile")
    popen, started = precompile.subprocess.Popen, []

    def start(words, **options):
        started.append(popen([words[0], "-c", "import patched; " + words[2]], **options))
        return started[-1]

    monkeypatch.setattr(precompile.subprocess, "Popen", start)
    problem = Problem("bn_act", 1, 6, 6, 24, 24)
    chosen = plan.triton_plan(problem, None, H100, "")
    jobs = [(replace(problem, n=i), chosen) for i in range(8)]
    with precompile.workers(jobs, 0) as running:
        assert running == started and len(running) == 2
        stop = time.monotonic() + 60
        files = [tmp_path / "0", tmp_path / "1"]
        while time.monotonic() < stop and not all(f.exists() and len(f.read_text().split()) == 8 for f in files):
            time.sleep(0.1)
        assert [f.read_text().split()[::2] for f in files] == [["0", "2", "4", "6"], ["1", "3", "5", "7"]]
    assert all(worker.poll() is not None for worker in started)
    with precompile.workers(jobs[:3], 0) as running:
        assert running == []
