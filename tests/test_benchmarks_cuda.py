"""What the benchmarks do on a GPU, on a pretended one: what is tuned, proven and timed, in which order, and what is
written."""

import json
import subprocess
import sys
from dataclasses import replace

import pytest
import torch
from cuda_stand_in import CUDAGraph, pretended_card

import fused_resnet
from benchmarks import layers, parity, roofline, run, tune
from benchmarks.baselines import Case, _compiled
from benchmarks.results import load
from fused_resnet import ops, plan, reference, tuned, tuning, workload
from fused_resnet.plan import Measured, TileConfig

SMALL = ["--models", "resnet18", "--batches", "2", "--size", "32"]


def _measured(_, task):
    """A lab in which every operator's kernel wins, and no chain of them."""
    if task.problem.op == plan.STAGE_OP:
        return tuning.Outcome(plan.table_entry(task.problem, {"library": 7.0}), [])
    if task.call is not None:
        return tuning.Outcome(plan.table_entry(task.problem, {"library": 7.0, "triton": 9.0}), [])
    tile = plan.candidates(task.problem, ops.device_of(None, "auto"))[0]
    return tuning.Outcome(plan.table_entry(task.problem, {"library": 7.0, "triton": 5.0}, tile), [])


@pytest.fixture
def card(home, shipped, monkeypatch):
    """The card and a lab on it."""
    monkeypatch.setattr(tuning.Bench, "measure", _measured)
    monkeypatch.setattr(tuning.Timer, "__init__", lambda self: setattr(self, "seconds", 0.0))
    monkeypatch.setattr(tuning.Timer, "_flush", torch.empty(1), raising=False)
    monkeypatch.setattr(tuning.precompile.os, "cpu_count", lambda: 1)  # nothing is compiled ahead
    monkeypatch.setattr(roofline, "measure_ceilings", lambda device, dtype: roofline.Ceilings(1e12, 1e14))
    monkeypatch.setattr(run, "_ROUNDS", 3)
    with pretended_card(monkeypatch):
        yield


@pytest.fixture
def told(card, monkeypatch):
    """The main job's steps, in their order: tuning as it was called, in this process; parity, which always passes."""
    steps = []

    def spawn(words, seconds, log):
        steps.append(words)
        assert log.parent.exists()
        return tune.main(words)

    def check(case, impl, plans, device):
        steps.append((case, impl, plans))
        return parity.Parity(case.model, case.mode, impl, case.dtype, [], [], [], [])

    monkeypatch.setattr(run, "_spawn", spawn)
    monkeypatch.setattr(parity, "check", check)
    return steps


def test_main_job_tunes_proves_and_times(told, tmp_path, monkeypatch, capsys):
    options = [*SMALL, "--baselines", "graph", "--tune", "200", "--out", str(tmp_path)]
    assert run.main(options) == 0
    words, training, inference = told
    assert words[:2] == ["--own", "--budget"] and 100 < float(words[2]) <= 200
    assert [step[0].mode for step in (training, inference)] == ["training", "inference"]
    results = load(tmp_path / "results.json")
    counts = results["tuning"]
    table = tuned.load(90, "NVIDIA H100").measured
    assert counts["problems"] == counts["measured"] == len(table) > 50 and counts["left"] == 0
    assert {(p.op, p.epilogue.partition(" ")[0]) for p in table} >= {("residual_block", "graph"), ("stem", "inference")}
    assert f"{len(table)} of {len(table)} problems measured in" in capsys.readouterr().out
    rows = {(row["mode"], row["contender"]): row for row in results["rows"]}
    assert len(rows) == 2 * 3 and not any("error" in row for row in rows.values())
    assert {row["peak_bytes"] for row in rows.values()} == {5}
    assert CUDAGraph.modes == ["thread_local"] * 4
    del told[:]
    monkeypatch.setattr(run, "measure_case", lambda case, *_: list(rows.values()))
    assert run.main(options) == 0  # all of it is in the table by now
    assert len(told) == 2 and load(tmp_path / "results.json")["tuning"]["measured"] == 0


def test_main_job_measures_blocks_again_behind_their_operators(told, tmp_path, monkeypatch):
    """A run that stopped in front of them leaves every problem measured, but not for the operators as they are now."""
    for kind in ("blocks", "operators", "stages"):
        assert tune.main(["--own", *SMALL, "--modes", "inference", "--only", kind]) == 0
    monkeypatch.setattr(run, "measure_case", lambda case, *_: [])
    options = [*SMALL, "--modes", "inference", "--out", str(tmp_path)]
    run.main(options)
    blocks = [problem for problem in tuned.load(90, "NVIDIA H100").measured if problem.op in plan.BLOCK_OPS]
    counts = load(tmp_path / "results.json")["tuning"]
    assert counts["measured"] == len(blocks) > 1 and counts["left"] == 0
    run.main(options)
    assert load(tmp_path / "results.json")["tuning"]["measured"] == 0


@pytest.mark.parametrize(
    ("options", "folder", "said"),
    [
        (["--tune", "0"], None, None),
        (["--impl", "triton"], None, None),
        (["--impl", "none"], None, None),
        ([], "", "tuning: FUSED_RESNET_PLANS is empty"),
    ],
)
def test_main_job_that_does_not_tune(told, tmp_path, monkeypatch, capsys, options, folder, said):
    if folder is not None:
        monkeypatch.setenv("FUSED_RESNET_PLANS", folder)
    monkeypatch.setattr(run, "measure_case", lambda case, *_: [])
    assert run.main([*SMALL, *options, "--out", str(tmp_path)]) == 1
    output = capsys.readouterr()
    assert "nothing was timed" in output.err and not any(isinstance(step, list) for step in told)
    assert (said or "") in output.out and ("tuning:" in output.out) == (said is not None)
    assert "tuning" not in json.loads((tmp_path / "results.json").read_text())


@pytest.mark.parametrize(("status", "said"), [(None, "a problem took too long"), (1, "ended with status 1, see")])
def test_tuning_that_hangs_or_fails_leaves_the_library(told, tmp_path, monkeypatch, capsys, status, said):
    def spawn(words, seconds, log):
        told.append(words)
        if status is None:
            raise subprocess.TimeoutExpired(words, seconds)
        return status

    monkeypatch.setattr(run, "_spawn", spawn)
    monkeypatch.setattr(run, "measure_case", lambda case, *_: [])
    run.main([*SMALL, "--modes", "inference", "--out", str(tmp_path)])
    output = capsys.readouterr()
    assert isinstance(told[0], list) and said in output.err
    assert "tuning: 0 of " in output.out and "left for the next run" in output.out


@pytest.mark.parametrize(
    ("options", "seconds"), [([], 300), (["--budget", "100"], 50), (["--tune", "7"], 7), (["--tune", "0"], 0)]
)
def test_seconds_of_tuning(options, seconds):
    assert run._parse(options, "cuda").tune == seconds
    assert run._parse([], "cpu").tune == 0


def test_tuning_is_a_process_of_its_own(tmp_path, monkeypatch):
    """It finds the package from any folder, and its log says what it did."""
    monkeypatch.chdir(tmp_path)
    assert run._spawn(["--batches", "0"], 120, tmp_path / "log") == 2
    assert "--batches, --size, --budget: expected positive numbers" in (tmp_path / "log").read_text()


CASE = Case("resnet50", "training", 256, "bf16", 64, "cuda")


def test_parity_runs_by_the_plans_of_the_timed_batch(shipped):
    device = plan.Device.default(90)
    assert parity.plans_of(CASE, "auto", None) == {}
    untuned = parity.plans_of(CASE, "auto", device)
    assert {measured.ranking[0] for measured in untuned.values()} == {"library"}
    tasks = workload.collect(tune.runs(["resnet50"], [256], ["bf16"], ["training"], 64))
    table, tile = plan.measurements(device), TileConfig(64, 64, 64, 4, 4)
    for task in workload.in_graphs(tasks):
        if task.problem.op in ("residual_block", "conv1x1_join"):
            graph = task.problem.epilogue.startswith(plan.GRAPH)
            us = {"library": 9.0, "triton": 1.0} | ({"triton stored": 0.5} if graph else {})
            table[task.problem] = Measured(us, None if task.call else tile, "sm90")
    plan.forget_choices()
    for graph, scheme in ((False, ""), (True, "stored")):
        plans = parity.plans_of(CASE, "auto", device, graph)
        with tuning.planned_as(device, plans):
            for problem in (problem for problem in plans if problem.op == "residual_block"):
                assert problem.n == parity.BATCH and not problem.epilogue.startswith(plan.GRAPH)
                chosen = plan.plan_block(problem, device)
                assert (chosen.backend, chosen.scheme) == ("triton", scheme)
            joins = [problem for problem in plans if problem.op == "conv1x1_join"]
            assert bool(joins) != graph and all(plan.plan_for(problem, device).config == tile for problem in joins)
            # One without a measurement has the heuristic's tile for the timed batch.
            wgrad = next(problem for problem in plans if problem.op == "conv_wgrad" and problem.h > 1)
            timed = plan.triton_plan(replace(wgrad, n=256), None, device, "")
            assert plan.plan_for(wgrad, device).config == timed.config
    plan.forget_tables()
    named = parity.plans_of(CASE, "triton", device)
    assert {p.n for p in named if p.op == "conv_stats"} == {parity.BATCH}
    plan.forget_tables()


def test_parity_is_proven_once_for_equal_plans(told, tmp_path, monkeypatch):
    monkeypatch.setattr(run, "measure_case", lambda case, *_: [])
    options = ["--models", "resnet18", "--size", "64", "--modes", "training", "--tune", "0", "--out", str(tmp_path)]
    run.main([*options, "--batches", "2", "4", "8"])
    assert [impl for _, impl, _ in told] == ["auto"]


def test_contender_that_fails_while_timed_is_a_row(monkeypatch):
    monkeypatch.setattr(run, "_ROUNDS", 5)
    calls = []

    def build(case):
        def fail():
            calls.append(case)
            if len(calls) == 5:
                raise torch.cuda.OutOfMemoryError("no memory\nat all")

        return fail

    case = Case("resnet18", "inference", 1, "fp32", 32, "cpu")
    rows = run.measure_case(case, {"a": build, "b": lambda case: lambda: None}, roofline.Ceilings(1e9, 1e9), 9.0)
    assert rows[0]["error"] == "OutOfMemoryError: no memory" and "median_ms" not in rows[0]
    assert rows[1]["n"] == 5 and len(calls) == 5


def test_compiled_contenders_stay_compiled_while_timed(monkeypatch):
    monkeypatch.setattr(run, "_ROUNDS", 3)
    compiled = []

    def contender():
        def backend(graph, inputs):
            compiled.append(graph)
            return graph.forward

        return _compiled(backend=backend)

    case = Case("resnet18", "inference", 1, "fp32", 32, "cpu")
    contenders = {name: contender() for name in ("one", "two")}
    rows = run.measure_case(case, contenders, roofline.Ceilings(1e9, 1e9), 1.0)
    assert all(row["n"] == 3 for row in rows) and len(compiled) == 2


def test_layers_time_every_kernel_and_chain(card, tmp_path, monkeypatch, capsys):
    operators = {launch: op for family in plan.FAMILIES for op, launch in family.launches.items()}
    monkeypatch.setattr(tuning, "launcher", lambda chosen: getattr(reference, operators[chosen.launch]))
    monkeypatch.setattr(tuning, "block_call", lambda call, on: lambda: plan.forget_choices())
    options = ["--model", "resnet18", "--batch", "2", "--size", "32", "--mode", "training", "--dtype", "fp32"]
    assert layers.main([*options, "--out", str(tmp_path)]) == 0
    rows = load(tmp_path / "layers.json")["rows"]
    blocks = [row for row in rows if row["operator"] == "residual_block"]
    assert {row["contender"] for row in blocks} == {"library", "triton"} and not any("error" in row for row in blocks)
    operators = [row for row in rows if row["operator"] == "bn_finalize"]
    assert {row["contender"] for row in operators} == {"library", "triton"}
    assert all(row["n"] >= 5 for row in rows if "error" not in row)


@pytest.mark.interpreter
def test_bench_measures_operators_blocks_graphs_and_stages(home, shipped, monkeypatch):
    """Its own calls of the card; kernels run in the interpreter."""
    monkeypatch.setattr(tuning.Timer, "times", lambda self, run, best: [run(), 3.0][1:])
    stage = torch.nn.Sequential(torch.nn.Sequential(fused_resnet.FusedBasicBlock(16, 16))).eval()
    x = torch.empty(9, 16, 3, 3)
    with pretended_card(monkeypatch), tuning.conditions():
        bench = tuning.Bench()
        tasks = workload.collect([(stage, x)]) + workload.stages(stage, x)
        outcomes = {task.problem: bench.measure(task) for task in workload.in_graphs(tasks)}
        assert set(CUDAGraph.modes) == {"thread_local"}
    assert not any(outcome.rejected for outcome in outcomes.values())
    times = {(p.op, p.epilogue.startswith(plan.GRAPH)): set(o.entry["us"]) for p, o in outcomes.items()}
    assert times["conv_affine", False] == {"library", "triton"}
    for graph in (False, True):
        assert times["residual_block", graph] == {"library", "triton"}
        assert times[plan.STAGE_OP, graph] == {"library", "8"}


def test_tuning_goes_on_in_a_new_process_behind_a_kernel_that_broke_the_device(card, monkeypatch, capsys):
    done, programs = [], []

    def measure(self, task):
        done.append(task)
        if len(done) == 3:
            raise tuning.DeviceFailed("a tile", plan.table_entry(task.problem, {"library": 3.0}))
        if len(done) == 6:
            raise tuning.DeviceFailed("something", None)
        return _measured(self, task)

    monkeypatch.setattr(tuning.Bench, "measure", measure)
    monkeypatch.setattr(tune.os, "execv", lambda program, words: programs.append((program, words)))
    options = ["--own", *SMALL, "--modes", "inference", "--budget", "100"]
    tune.main(options)
    ((program, words),) = programs
    assert program == sys.executable and words[1:-1] == ["-m", "benchmarks.tune", *options, "--budget"]
    assert 50 < float(words[-1]) < 100 and "failed at a tile" in capsys.readouterr().out
    assert tune.main(words[3:]) == 1 and len(programs) == 1  # what the table cannot say would be met again
    assert len({task.problem for task in done[:6]}) == 6
    assert tune.main(words[3:]) == 0


def test_own_table_gets_what_the_shipped_one_lacks_blocks_first(card, shipped, monkeypatch):
    options = [*SMALL, "--modes", "inference"]
    assert tune.main([*options, "--only", "stages", "--out", str(shipped)]) == 0
    ops.forget_plans()
    done = []
    monkeypatch.setattr(
        tuning.Bench, "measure", lambda self, task: done.append(tune.kind_of(task)) or _measured(self, task)
    )
    assert tune.main(["--own", *options]) == 0
    blocks = done.count("blocks") // 2
    assert done[:blocks] == ["blocks"] * blocks and done[blocks] == "operators"  # and each block again behind its own
    own = tuned.load(90, "NVIDIA H100").measured
    assert {problem.op for problem in own} == {"residual_block", "stem", "conv_affine", "conv_affine_pool"}
    assert tune.main(["--own", *options]) == 0 and len(done) == len(own) + blocks


def test_own_table_needs_a_folder(card, monkeypatch, capsys):
    monkeypatch.setenv("FUSED_RESNET_PLANS", "")
    assert tune.main(["--own", *SMALL]) == 2
    assert "FUSED_RESNET_PLANS is empty" in capsys.readouterr().err
