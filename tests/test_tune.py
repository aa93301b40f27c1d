"""Tuning without a GPU: what is collected, which tiles are tried, resuming, budgets, and damaged tables."""

import json
from functools import partial

import pytest
import torch

from benchmarks import tune
from fused_resnet import ops, plan, reference, testing
from fused_resnet.plan import Problem, TileConfig


def _problems(count=4):
    return [Problem("bn_act", 1, 8, 8, 16 * (i + 1), 16 * (i + 1)) for i in range(count)]


class _Lab:
    """Pretends to measure: every problem takes ten seconds, and the second tile of a kernel wins."""

    def __init__(self):
        self.seconds, self.measured, self.lines = 0.0, [], []

    def measure(self, problem):
        self.seconds += 10
        self.measured.append(problem)
        return tune.Measured(plan.table_entry(problem, "triton", TileConfig(32, 16), 5.0, 7.5), ["a tile: too slow"])

    def run(self, problems, path, **options):
        work = [(problem, partial(self.measure, problem)) for problem in problems]
        return tune.tune(work, path, 90, {"card": "none"}, clock=lambda: self.seconds, log=self.lines.append, **options)


def test_budget_stops_and_the_next_run_goes_on(tmp_path):
    path, problems, lab = tmp_path / "sm90.json", _problems(), _Lab()
    assert lab.run(problems, path, budget=15) == 2
    assert lab.measured == problems[:2] and "2 problems left" in lab.lines[-1]
    again = _Lab()
    assert again.run(problems, path) == 0
    assert again.measured == problems[2:]
    winners = plan.load_table(path, 90)
    assert list(winners) == problems
    assert winners[problems[0]] == plan.Winner("triton", TileConfig(32, 16), "measured on sm90: 5.0 us, library 7.5 us")
    third = _Lab()
    assert third.run(problems, path) == 0 and third.measured == []
    assert third.run(problems, path, again=True) == 0 and third.measured == problems


def test_table_is_whole_after_every_problem(tmp_path):
    path, lab = tmp_path / "sm90.json", _Lab()
    sizes = []
    problems = _problems()

    def measure(problem):
        if path.exists():
            sizes.append(len(json.loads(path.read_text())["entries"]))
        return lab.measure(problem)

    tune.tune([(p, partial(measure, p)) for p in problems], path, 90, {}, log=lambda _: None)
    assert sizes == [1, 2, 3]
    assert [p.name for p in tmp_path.iterdir()] == ["sm90.json"]


def test_damaged_table_is_named_and_replaced(tmp_path):
    path, lab = tmp_path / "sm90.json", _Lab()
    path.write_text('{"format": 1, "arch": 90, "entr')
    with pytest.warns(UserWarning, match="sm90.json: not a usable plan table"):
        lab.run(_problems(1), path)
    assert len(plan.load_table(path, 90)) == 1


def test_collects_what_the_operators_state():
    problems, blocks = tune.collect(["resnet18"], [2], ["bf16"], ["training", "inference"], 64)
    assert {"conv_stats", "conv_dgrad", "conv_wgrad", "conv_affine", "bn_finalize"} <= {p.op for p in problems}
    assert len(set(problems)) == len(problems)
    assert len(blocks) == 2 * 7  # an identity block for each of four stages, and three with a projection
    assert all(block.shape[1:] == (block.problem.c, block.problem.h, block.problem.w) for block in blocks)


def test_candidates_are_legal_distinct_and_begin_with_the_heuristic():
    device = plan.Device.default(90)
    problem = Problem("conv_affine", 8, 28, 28, 128, 512, 1, 1, epilogue="affine")
    tiles = list(tune.candidates(problem, device))
    assert tiles[0] == plan.triton_plan(problem, None, device, "").config
    assert len(tiles) == len(set(tiles)) > 4
    assert all(plan.unsupported(problem, tile, device) is None for tile in tiles)
    assert list(tune.candidates(Problem("conv_affine", 1, 8, 8, 8, 8, 1, 1, dtype="float64"), device)) == []


def test_plans_of_measured_blocks_and_operators(tmp_path, monkeypatch):
    monkeypatch.setattr(plan, "PLANS", tmp_path)
    operator = Problem("bn_act", 1, 8, 8, 16, 16)
    block = Problem("residual_block", 2, 8, 8, 64, 64, 3, 3, epilogue="training identity 1x1-16 3x3-16 1x1-64")
    device = plan.Device.default(90)
    plan.forget_tables()
    assert plan.plan_block(block, device).backend == plan.plan_for(operator, device).backend == "library"
    entries = [
        plan.table_entry(operator, "triton", TileConfig(32, 16), 2.0, 3.0),
        plan.table_entry(block, "triton", None, 50.0, 80.0),
    ]
    plan.dump_table(tmp_path / "sm90.json", 90, {}, entries)
    plan.forget_tables()
    try:
        assert plan.plan_for(operator, device).launch == "launch_bn_act"
        assert plan.plan_block(block, device).backend == "triton"
        assert plan.plan_block(block, device).reason == "measured on sm90: 50.0 us, library 80.0 us"
    finally:
        monkeypatch.undo()
        plan.forget_tables()


def test_needs_a_gpu_or_a_dry_run(capsys):
    if not torch.cuda.is_available():
        assert tune.main([]) == 2
        assert "--dry-run" in capsys.readouterr().err
    assert tune.main(["--batches", "0", "--dry-run", "sm90"]) == 2
    assert tune.main(["--models", "resnet18", "--batches", "2", "--size", "64", "--dry-run", "sm90"]) == 0
    assert "14 blocks" in capsys.readouterr().out


def _recorded(dtype):
    problems = tune.collect(["resnet50"], [2], [dtype], ["training", "inference"], 32)[0]
    return {(p.op, p.prologue, p.epilogue, p.stride, p.r): p for p in reversed(problems)}.values()


def test_sample_arguments_fit_every_operator():
    """Each operator that a ResNet-50 asks for runs on its sample arguments, on fake shapes of its own size."""
    problems = _recorded("bf16")
    assert len({p.op for p in problems}) >= 18
    for problem in problems:
        arguments = testing.operator_arguments(problem, torch.Generator().manual_seed(0), "cpu")
        results = testing.comparable(problem.op, getattr(reference, problem.op)(*arguments))
        assert results and all(torch.isfinite(r).all() for r in results), problem.op


def test_check_operator_catches_a_wrong_kernel():
    problem = Problem("bn_act", 2, 5, 5, 16, 16, dtype="float32")
    generator = torch.Generator().manual_seed(0)
    testing.check_operator(problem, reference.bn_act, generator, "cpu")
    with pytest.raises(AssertionError, match="bn_act result 0"):
        testing.check_operator(problem, lambda a, relu: reference.bn_act(a, not relu), generator, "cpu")


@pytest.mark.gpu
def test_every_kernel_of_resnet50_within_the_error_budget_on_the_device():
    """Every operator of a training step and an inference, with the heuristic's tile, at 16 bit and fp32."""
    device = ops.device_of(torch.empty(0, device="cuda"), "auto")
    checked = 0
    for dtype in ("bf16", "fp16", "fp32"):
        for problem in tune.collect(["resnet50"], [2], [dtype], ["training", "inference"], 96)[0]:
            if plan.unsupported(problem, None, device) is None:
                run = tune.launcher(plan.triton_plan(problem, None, device, ""))
                testing.check_operator(problem, run, torch.Generator().manual_seed(0), "cuda")
                checked += 1
    assert checked > 100
