"""Tuning without a GPU: what is collected, in which order, and what is tried; the gate of correctness; budgets,
resuming and damaged tables; the command."""

import json
from contextlib import contextmanager, nullcontext
from dataclasses import replace
from functools import partial

import pytest
import torch
import torchvision

import fused_resnet
from benchmarks import tune as command
from fused_resnet import ops, plan, reference, testing, tuned, tuning, workload
from fused_resnet.plan import Problem, TileConfig

H100 = plan.Device.default(90)
TILE = TileConfig(32, 16)


def _problems(count=4):
    return [Problem("bn_act", 1, 8, 8, 16 * (i + 1), 16 * (i + 1)) for i in range(count)]


class _Lab:
    """Pretends to measure: every problem takes ten seconds, and its Triton kernel wins."""

    def __init__(self):
        self.seconds, self.measured, self.lines = 0.0, [], []

    def measure(self, task):
        self.seconds += 10
        self.measured.append(task.problem)
        entry = plan.table_entry(task.problem, {"library": 7.5, "triton": 5.0}, TILE)
        return tuning.Outcome(entry, ["a tile: too slow"])

    def tuner(self, path, valid=None):
        origin = {"card": "none", **(valid or {})}
        return tuning.Tuner(H100, path, origin, valid or {}, self.measure, log=self.lines.append, clock=self.clock)

    def run(self, problems, path, valid=None, **options):
        return self.tuner(path, valid).run([workload.Task(problem) for problem in problems], **options)

    def clock(self):
        return self.seconds


def test_budget_stops_and_the_next_run_goes_on(tmp_path, shipped):
    path, problems, lab = tmp_path / "sm90.json", _problems(), _Lab()
    assert lab.run(problems, path, budget=15) == 2
    assert lab.measured == problems[:2] and "2 problems left" in lab.lines[-1]
    again = _Lab()
    assert again.run(problems, path) == 0
    assert again.measured == problems[2:]
    table = plan.load_table(path, 90)
    assert list(table) == problems
    assert table[problems[0]] == plan.Measured({"library": 7.5, "triton": 5.0}, TILE, "sm90")
    third = _Lab()
    assert third.run(problems, path) == 0 and third.measured == []
    assert third.run(problems, path, again=True) == 0 and third.measured == problems


def test_table_is_whole_after_every_problem_and_counts_at_once(tmp_path, shipped):
    path, sizes = tmp_path / "sm90.json", []

    class Watch(_Lab):
        def measure(self, task):
            if path.exists():
                sizes.append(len(json.loads(path.read_text())["entries"]))
            assert "not measured" in plan.plan_for(task.problem, H100).reason
            return super().measure(task)

    Watch().run(_problems(), path)
    assert sizes == [1, 2, 3]
    assert {p.name for p in tmp_path.iterdir()} == {"sm90.json", ".sm90.json.lock"}
    assert {plan.plan_for(problem, H100).backend for problem in _problems()} == {"triton"}


def test_block_is_measured_again_behind_an_operator_that_was(tmp_path, shipped):
    """Blocks alone first, as they run by the heuristic's tiles; then operators, and the blocks whose they are."""
    path, (one, two, other) = tmp_path / "sm90.json", _problems(3)
    blocks = [replace(problem, op="residual_block") for problem in (one, other)]
    call = workload.Call(print, ())
    tasks = [workload.Task(one), workload.Task(two), workload.Task(blocks[0], call), workload.Task(other)]
    tasks = list(workload.in_graphs([*tasks, workload.Task(blocks[1], call)]))

    def run(tasks, **options):
        lab = _Lab()
        left = lab.tuner(path).run(tasks, **options)
        return left, [tasks.index(task) for problem in lab.measured for task in tasks if task.problem == problem]

    assert run([task for task in tasks if task.call]) == (0, [0, 1, 2, 3])
    assert run(tasks, budget=5) == (6, [0])
    assert run(tasks, budget=25) == (3, [1, 2, 3])  # with its twin in a graph
    assert run(tasks) == (0, [4, 5, 6])
    assert run(tasks) == (0, [])


def test_problem_in_which_a_run_was_killed_comes_last(tmp_path, shipped):
    path, problems = tmp_path / "sm90.json", _problems()

    class Hangs(_Lab):
        def measure(self, task):
            if task.problem == problems[1]:
                raise KeyboardInterrupt
            return super().measure(task)

    for measured in (problems[:1], problems[2:], []):
        lab = Hangs()
        with pytest.raises(KeyboardInterrupt):
            lab.run(problems, path)
        assert lab.measured == measured
    lab = _Lab()
    assert lab.run(problems, path) == 0 and lab.measured == [problems[1]]
    assert {p.name for p in tmp_path.iterdir()} == {"sm90.json", ".sm90.json.lock"}


def test_table_that_cannot_be_written_ends_the_run(tmp_path, shipped):
    (tmp_path / "file").touch()
    lab = _Lab()
    with pytest.warns(UserWarning, match="not a usable plan table"), pytest.raises(OSError):
        lab.run(_problems(), tmp_path / "file" / "sm90.json")
    assert lab.measured == []


def test_damaged_table_is_named_and_replaced(tmp_path, shipped):
    path = tmp_path / "sm90.json"
    path.write_text('{"format": 2, "arch": 90, "entr')
    with pytest.warns(UserWarning, match="sm90.json: not a usable plan table"):
        _Lab().run(_problems(1), path)
    assert len(plan.load_table(path, 90)) == 1


def test_table_of_another_environment_is_measured_anew(tmp_path, shipped):
    path, lab = tmp_path / "sm90.json", _Lab()
    lab.run(_problems(2), path, valid={"torch": "1"})
    lab.run(_problems(2), path, valid={"torch": "1"})
    assert len(lab.measured) == 2
    with pytest.warns(UserWarning, match="measured with torch '1'; this is '2'"):
        lab.run(_problems(1), path, valid={"torch": "2"})
    assert len(plan.load_table(path, 90)) == 1


def test_problem_that_cannot_be_measured_leaves_the_others(tmp_path, shipped):
    class Poor(_Lab):
        def measure(self, task):
            if task.problem.c == 32:
                raise torch.cuda.OutOfMemoryError("CUDA out of memory. Tried to allocate\n20 GiB")
            return super().measure(task)

    lab = Poor()
    assert lab.run(_problems(), tmp_path / "sm90.json") == 1
    assert len(plan.load_table(tmp_path / "sm90.json", 90)) == 3
    assert any("left out: OutOfMemoryError: CUDA out of memory. Tried to allocate" in line for line in lab.lines)
    assert lab.run(_problems(), tmp_path / "sm90.json", budget=1e-9) == 1


def test_failed_device_ends_the_run_and_the_next_one_passes_over_the_problem(tmp_path, shipped):
    class Unlucky(_Lab):
        def measure(self, task):
            if task.problem.c == 32:
                raise tuning.DeviceFailed("a tile", plan.table_entry(task.problem, {"library": 3.0}))
            return super().measure(task)

    path = tmp_path / "sm90.json"
    with pytest.raises(tuning.DeviceFailed, match="failed at a tile; run again in a new process"):
        Unlucky().run(_problems(), path)
    again = _Lab()
    assert again.run(_problems(), path) == 0 and len(again.measured) == 2
    assert plan.load_table(path, 90)[_problems()[1]].us == {"library": 3.0}


def _tasks(*names, batch=2, size=64, dtype="bf16"):
    return workload.collect(command.runs(names, [batch], [dtype], ["training", "inference"], size))


def test_collects_what_the_operators_state():
    tasks = _tasks("resnet18")
    problems = [task.problem for task in tasks]
    assert {"conv_stats", "conv_dgrad", "conv_wgrad", "conv_affine", "bn_finalize"} <= {p.op for p in problems}
    assert len(set(problems)) == len(problems)
    blocks = [task for task in tasks if task.call]
    # An identity block for each of four stages, three with a projection, and the stem, in both modes.
    assert len(blocks) == 2 * 8
    assert {task.problem.op for task in blocks} == set(plan.BLOCK_OPS)
    assert {task.layer for task in tasks} >= {"ResNet", "layer1.0", "layer4.1"}
    counts = {task.problem.epilogue: task.count for task in blocks}
    assert counts["training identity 3x3-64 3x3-64"] == 2 and counts["training projection 3x3-128 3x3-128"] == 1
    for problem, call, *_ in blocks:
        assert tuple(call.arguments[0].shape) == (problem.n, problem.c, problem.h, problem.w)
        assert call.arguments[0].is_meta


def test_work_begins_where_most_bytes_move_and_goes_on_block_by_block():
    tasks = _tasks("resnet50", batch=256, size=224)
    index = {task.problem: i for i, task in enumerate(tasks)}
    blocks = [task.problem for task in tasks if task.call]
    # Two blocks of 256 channels on 56 x 56 pixels move most; five of stage three move more than two of stage four.
    assert blocks[0].epilogue == "training identity 1x1-64 3x3-64 1x1-256"
    order = [b.epilogue.split("1x1-")[-1] for b in blocks if b.epilogue.startswith("training identity")]
    assert order == ["256", "512", "1024", "2048"]
    assert all("training" in block.epilogue for block in blocks[:4])
    # A block comes behind its operators, the largest of them first.
    mine = [task.problem for task in tasks[: index[blocks[0]]]]
    assert {"conv1x1_join", "cross_moments", "bn_finalize"} <= {p.op for p in mine}
    assert {(p.h, p.w) for p in mine if p.op.startswith("conv")} == {(56, 56)}
    assert mine[-1].op in plan.VECTOR_OPS


def test_models_of_other_makers_are_collected_too():
    model = torchvision.models.resnet18()
    assert workload.collect([(model, torch.empty(2, 3, 64, 64))]) == []
    tasks = workload.collect([(fused_resnet.fuse(model).eval(), torch.empty(2, 3, 64, 64))])
    assert {task.problem.op for task in tasks} == {"residual_block", "conv_affine", "stem", "conv_affine_pool"}
    lone = fused_resnet.FusedConvBNAct(8, 8).eval()
    assert [t.problem.op for t in workload.collect([(lone, torch.empty(1, 8, 5, 5))])][-1] == "residual_block"


def test_alternatives_are_legal_distinct_and_begin_with_the_heuristic():
    problem = Problem("conv_affine", 8, 28, 28, 128, 512, 1, 1, epilogue="affine")
    tiles = [chosen.config for chosen in tuning.alternatives(problem, H100)]
    assert tiles == plan.candidates(problem, H100)
    assert tiles[0] == plan.triton_plan(problem, None, H100, "").config
    assert len(tiles) == len(set(tiles)) > 4
    assert all(plan.unsupported(problem, tile, H100) is None for tile in tiles)
    assert list(tuning.alternatives(replace(problem, dtype="float64"), H100)) == []
    assert plan.candidates(replace(problem, dtype="float64"), H100) == []


def test_alternatives_are_those_that_can_run_here():
    finalize = Problem("bn_finalize", 512, 3, 1, 64, 64, dtype="float32")
    backends = [chosen.backend for chosen in tuning.alternatives(finalize, H100)]
    assert backends[0] == "cuda" and set(backends[1:]) == {"triton"}
    without = replace(H100, cuda_missing="not built")
    assert {chosen.backend for chosen in tuning.alternatives(finalize, without)} == {"triton"}
    neither = replace(without, triton_missing="not installed")
    assert list(tuning.alternatives(finalize, neither)) == []
    block = workload.Task(replace(finalize, op="residual_block"), workload.Call(print, ()))
    assert tuning.with_kernels([workload.Task(finalize), block], neither) == [block]


# The gate, on the interpreter


class _Times:
    """A timer that runs each call once and says the next time of a list, then the last one for ever."""

    def __init__(self, *times):
        self.times, self.seen = list(times), []

    def __call__(self, run, best=float("inf")):
        run()
        self.seen.append(best)
        return self.times.pop(0) if len(self.times) > 1 else self.times[0]


SMALL = Problem("bn_act", 2, 5, 5, 16, 16, dtype="float32")


@pytest.mark.interpreter
def test_fastest_right_tile_wins(monkeypatch):
    tiles = plan.candidates(SMALL, H100)
    timer = _Times(9.0, 7.0, 8.0, 3.0, 5.0)
    entry, rejected = tuning.measure_operator(SMALL, H100, timer, "cpu")
    assert rejected == []
    assert entry == plan.table_entry(SMALL, {"library": 9.0, "triton": 3.0}, tiles[2])
    assert timer.seen[:5] == [float("inf"), float("inf"), 7.0, 7.0, 3.0]


def _on_cpu(function, problem, generator, device):
    return function(problem, generator, "cpu")


@pytest.mark.interpreter
def test_wrong_or_failing_kernels_never_win(monkeypatch):
    first, second, *_ = plan.candidates(SMALL, H100)
    right = tuning.launcher

    def launcher(chosen):
        if chosen.config == first:
            return lambda a, relu: reference.bn_act(a, not relu)
        if chosen.config == second:
            return lambda a, relu: 1 / 0
        return right(chosen)

    monkeypatch.setattr(tuning, "launcher", launcher)
    entry, rejected = tuning.measure_operator(SMALL, H100, _Times(9.0, 1.0, 4.0), "cpu")
    assert entry["us"] == {"library": 9.0, "triton": 4.0}
    assert entry["config"] != plan.table_entry(SMALL, {}, first)["config"]
    assert len(rejected) == 2 and "bn_act result 0" in rejected[0] and "ZeroDivisionError" in rejected[1]

    def illegal():
        raise RuntimeError("CUDA error: an illegal memory access was encountered")

    with monkeypatch.context() as patch:  # the tensors stay on the CPU
        patch.setattr(torch.cuda, "synchronize", illegal)
        patch.setattr(tuning.trials, "operator_arguments", partial(_on_cpu, tuning.trials.operator_arguments))
        patch.setattr(tuning.trials, "Trial", partial(_on_cpu, tuning.trials.Trial))
        with pytest.raises(tuning.DeviceFailed, match="bn_act 2x5x5x16 float32 with Plan") as failure:
            tuning.measure_operator(SMALL, H100, _Times(9.0, 1.0))
        assert failure.value.entry["us"] == {"library": 9.0}
    monkeypatch.setattr(tuning, "launcher", lambda chosen: lambda a, relu: reference.bn_act(a, not relu))
    entry, rejected = tuning.measure_operator(SMALL, H100, _Times(9.0, 1.0), "cpu")
    assert entry == plan.table_entry(SMALL, {"library": 9.0}) and len(rejected) == len(plan.candidates(SMALL, H100))


@pytest.mark.interpreter
def test_cuda_kernel_is_tried_beside_triton_and_may_win(monkeypatch):
    finalize = Problem("bn_finalize", 64, 3, 1, 16, 16, dtype="float32")
    right = tuning.launcher
    fake = {"cuda": lambda chosen: reference.bn_finalize}
    monkeypatch.setattr(tuning, "launcher", lambda chosen: fake.get(chosen.backend, right)(chosen))
    entry, _ = tuning.measure_operator(finalize, H100, _Times(9.0, 2.0, 4.0), "cpu")
    assert entry["us"] == {"library": 9.0, "cuda": 2.0, "triton": 4.0}
    assert TileConfig(**entry["config"]) == plan.candidates(finalize, H100)[0]


@contextmanager
def _planned_for(device, monkeypatch):
    """CPU tensors are planned for a card, and run its Triton kernels in the interpreter."""
    monkeypatch.setattr(ops, "device_of", lambda x, impl: device)
    yield
    plan.forget_tables()


@pytest.mark.interpreter
@pytest.mark.parametrize("training", [True, False])
def test_block_is_timed_as_the_library_runs_it_and_as_the_chain_does(shipped, monkeypatch, training):
    block = torch.nn.Sequential(fused_resnet.FusedBasicBlock(16, 16)).train(training)
    tasks = workload.collect([(block, torch.empty(2, 16, 6, 6))])
    task = tasks[-1]
    ran = []

    class Watch(_Times):
        def __call__(self, run, best=float("inf")):
            chosen = plan.plan_block(task.problem, H100)
            measured = next(t.problem for t in tasks if t.problem.op in ("bn_act", "conv_affine"))
            ran.append((chosen.backend, plan.plan_for(measured, H100).backend))
            return super().__call__(run, best)

    with _planned_for(H100, monkeypatch):
        table = plan.measurements(H100)
        for problem, call, *_ in tasks[:-1]:
            if call is None and problem.op in ("bn_act", "bn_join", "conv_affine"):
                tile = plan.candidates(problem, H100)[0]
                table[problem] = plan.Measured({"library": 2.0, "triton": 1.0}, tile, "sm90")
        table[task.problem] = plan.Measured({"library": 9.0, "triton": 1.0}, None, "sm90")
        before = dict(table)
        entry, rejected = tuning.measure_block(task, H100, Watch(50.0, 30.0), "cpu")
        assert plan.measurements(H100) == before
    assert rejected == []
    assert entry == plan.table_entry(task.problem, {"library": 50.0, "triton": 30.0})
    assert ran == [("library", "triton"), ("triton", "triton")]


@pytest.mark.interpreter
def test_chain_with_cuda_kernels_is_timed_without_them_too(shipped, monkeypatch):
    block = torch.nn.Sequential(fused_resnet.FusedBasicBlock(16, 16))
    tasks = workload.collect([(block, torch.empty(2, 16, 6, 6))])
    finalize = next(t.problem for t in tasks if t.problem.op == "bn_finalize")
    ran = []

    def timer(run, best=float("inf")):
        ran.append((plan.plan_block(tasks[-1].problem, H100).backend, plan.plan_for(finalize, H100).backend))
        return 10.0 - len(ran)

    with _planned_for(H100, monkeypatch):
        tile = plan.candidates(finalize, H100)[0]
        times = {"library": 3.0, "triton": 2.0, "cuda": 1.0}
        plan.measurements(H100)[finalize] = plan.Measured(times, tile, "sm90")
        entry, _ = tuning.measure_block(tasks[-1], H100, timer, "cpu")
    assert ran == [("library", "cuda"), ("triton", "triton"), ("cuda", "cuda")]
    assert entry["us"] == {"library": 9.0, "triton": 8.0, "cuda": 7.0}


@pytest.mark.interpreter
@pytest.mark.parametrize(("dtype", "other"), [(torch.bfloat16, "stored"), (torch.float32, "moments")])
def test_bottleneck_is_timed_in_both_schemes(shipped, monkeypatch, dtype, other):
    tasks = workload.collect([(fused_resnet.FusedBottleneck(32, 8), torch.empty(2, 32, 6, 6, dtype=dtype))])
    schemes = []

    def timer(run, best=float("inf")):
        schemes.append(plan.plan_block(tasks[-1].problem, H100).scheme)
        return 10.0 - len(schemes)

    with _planned_for(H100, monkeypatch):
        entry, _ = tuning.measure_block(tasks[-1], H100, timer, "cpu")
    assert schemes == ["", "", other]
    assert entry["us"] == {"library": 9.0, "triton": 8.0, f"triton {other}": 7.0}


@pytest.mark.interpreter
def test_blocks_are_timed_in_a_graph_of_their_own(shipped, monkeypatch):
    """The twin of a block is planned, called and timed for replay; what is measured outside says nothing of it."""
    block = torch.nn.Sequential(fused_resnet.FusedBasicBlock(16, 16)).train()
    eager, graph = list(workload.in_graphs(workload.collect([(block, torch.empty(2, 16, 6, 6))])))[-2:]
    assert graph.problem == replace(eager.problem, epilogue="graph " + eager.problem.epilogue)
    seen = []

    def timer(run, best=float("inf")):
        run()
        return 10.0 - len(seen)

    def graphed(run):
        seen.append((plan.is_replayed(), plan.plan_block(graph.problem, H100).backend))
        return run

    asked = []
    state = ops._block_problem
    with _planned_for(H100, monkeypatch):
        monkeypatch.setattr(ops, "_block_problem", lambda *a: asked.append(state(*a)) or asked[-1])
        plan.measurements(H100)[eager.problem] = plan.Measured({"library": 1.0, "triton": 2.0}, None, "sm90")
        entry, rejected = tuning.measure_block(graph, H100, timer, "cpu", graphed)
    assert not rejected and entry == plan.table_entry(graph.problem, {"library": 9.0, "triton": 8.0})
    assert seen == [(True, "library"), (True, "triton")] and not plan.is_replayed()
    assert graph.problem in asked and eager.problem not in asked


@pytest.mark.interpreter
def test_failing_chain_is_rejected_and_the_library_stays(shipped, monkeypatch):
    tasks = workload.collect([(fused_resnet.FusedBasicBlock(16, 16).eval(), torch.empty(1, 16, 6, 6))])

    def timer(run, best=float("inf")):
        if plan.plan_block(tasks[-1].problem, H100).backend == "triton":
            raise RuntimeError("out of resources")
        return 4.0

    with _planned_for(H100, monkeypatch):
        entry, rejected = tuning.measure_block(tasks[-1], H100, timer, "cpu")
    assert entry["us"] == {"library": 4.0} and rejected == ["triton: RuntimeError: out of resources"]


# tune(model, example)


@pytest.fixture
def card(home, shipped, monkeypatch):
    """A pretended CUDA device, on which a lab measures."""
    lab = _Lab()

    class Bench:
        device = replace(H100, cuda_missing="not built")
        measure = staticmethod(lab.measure)
        ahead = staticmethod(lambda tasks: nullcontext())
        compiled = []

        def _compile(self, plans):
            self.compiled += plans
            return nullcontext([])

    Bench.chains_ahead = tuning.Bench.chains_ahead
    lab.compiled = Bench.compiled
    monkeypatch.setattr(tuning, "Bench", Bench)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 0)
    monkeypatch.setattr(torch.cuda, "device", lambda index: nullcontext())
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda: "H100")
    return lab


def test_tune_writes_the_users_table(card, home):
    model, lines = torch.nn.Sequential(fused_resnet.FusedBasicBlock(16, 16)), []
    before = {name: value.clone() for name, value in model.state_dict().items()}
    searches = torch.backends.cudnn.benchmark
    x = torch.empty(2, 16, 6, 6, dtype=torch.bfloat16)
    done = fused_resnet.tune(model, x, log=lines.append)
    assert done.path == tuned.location(90, "H100") and done.left == 0 and len(lines) >= done.problems
    table = tuned.load(90, "H100").measured
    assert len(table) == done.problems == len(set(card.measured))
    assert card.measured[-1].op == "residual_block" and "training" in card.measured[-1].epilogue
    assert all(problem.dtype in ("bfloat16", "float32") for problem in table)
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    again = fused_resnet.tune(model, x, budget=1, log=lines.append)
    assert again == done and len(card.measured) == done.problems
    model.eval()
    with torch.no_grad():
        part = fused_resnet.tune(model, x.float(), budget=1e-9, log=lines.append)
    assert part.left == part.problems > 0 and "problems left" in lines[-1]
    assert torch.backends.cudnn.benchmark == searches


def test_tune_follows_autocast(card):
    model = fused_resnet.FusedBasicBlock(16, 16).eval()
    with torch.autocast("cuda", torch.float16):
        fused_resnet.tune(model, torch.empty(2, 16, 6, 6), log=lambda _: None)
    assert {p.dtype for p in card.measured} == {"float16"}


def test_tune_refuses(card, monkeypatch):
    block, x = fused_resnet.FusedBasicBlock(16, 16), torch.empty(2, 16, 6, 6)
    with pytest.raises(TypeError, match="example: expected a tensor, got list"):
        fused_resnet.tune(block, [x])
    for budget in (0, -1.0, float("nan")):
        with pytest.raises(ValueError, match="budget: expected a positive number of seconds, got"):
            fused_resnet.tune(block, x, budget=budget)
    with pytest.raises(ValueError, match="model: nothing in it is fused"):
        fused_resnet.tune(torch.nn.Conv2d(16, 16, 1), x)
    with monkeypatch.context() as patch:
        patch.setenv("FUSED_RESNET_PLANS", "")
        with pytest.raises(RuntimeError, match="FUSED_RESNET_PLANS is empty"):
            fused_resnet.tune(block, x)
    with monkeypatch.context() as patch:
        patch.setattr(torch.distributed, "is_initialized", lambda: True)
        patch.setattr(torch.distributed, "get_world_size", lambda: 8)
        with pytest.raises(RuntimeError, match="in a distributed job"):
            fused_resnet.tune(block, x)
    with monkeypatch.context() as patch:
        patch.setattr(torch.cuda, "is_available", lambda: False)
        with pytest.raises(RuntimeError, match="needs a CUDA device"):
            fused_resnet.tune(block, x)
    assert card.measured == []


# The command


def test_plans_of_measured_blocks_and_operators(shipped):
    operator = Problem("bn_act", 1, 8, 8, 16, 16)
    block = Problem("residual_block", 2, 8, 8, 64, 64, 3, 3, epilogue="training identity 1x1-16 3x3-16 1x1-64")
    assert plan.plan_block(block, H100).backend == plan.plan_for(operator, H100).backend == "library"
    entries = [
        plan.table_entry(operator, {"library": 3.0, "triton": 2.0}, TILE),
        plan.table_entry(block, {"library": 80.0, "triton": 50.0}),
    ]
    plan.dump_table(shipped / "sm90.json", 90, {}, entries)
    plan.forget_tables()
    assert plan.plan_for(operator, H100).launch == "launch_bn_act"
    assert plan.plan_block(block, H100).backend == "triton"
    assert plan.plan_block(block, H100).reason == "measured on sm90: triton 50.0 us, library 80.0 us"


def test_command_writes_the_table_of_the_card(card, tmp_path, monkeypatch):
    described = dict.fromkeys(("card", "driver", "torch", "cuda", "cudnn", "triton", "date", "commit", "cpu"), "known")
    monkeypatch.setattr(command.environment, "describe", lambda: described)
    options = ["--models", "resnet18", "--batches", "2", "--size", "64", "--out", str(tmp_path / "out")]
    assert command.main([*options, "--budget", "1e-9"]) == 3
    assert command.main(options) == 0
    table = json.loads((tmp_path / "out" / "sm90.json").read_text())
    version = fused_resnet.__version__
    assert table["origin"] == {"fused_resnet": version} | {k: v for k, v in described.items() if k != "cpu"}
    assert len(table["entries"]) == len(set(card.measured)) > 50


def test_command_compiles_without_measuring(card, tmp_path):
    options = ["--models", "resnet18", "--batches", "16", "--size", "64", "--modes", "inference"]
    assert command.main([*options, "--compile", "--out", str(tmp_path)]) == 0
    assert not card.measured and not list(tmp_path.iterdir())
    assert {problem.op for problem, _ in card.compiled} >= {"conv_affine", "conv_affine_pool"}


@pytest.mark.parametrize(
    ("only", "ops_of"), [("blocks", {"residual_block", "stem"}), ("stages", {"residual_stage"}), ("operators", None)]
)
def test_command_measures_one_kind_alone(card, tmp_path, monkeypatch, only, ops_of):
    described = dict.fromkeys(("card", "driver", "torch", "cuda", "cudnn", "triton", "date", "commit"), "known")
    monkeypatch.setattr(command.environment, "describe", lambda: described)
    options = ["--models", "resnet18", "--batches", "16", "--size", "64", "--modes", "inference"]
    assert command.main([*options, "--only", only, "--out", str(tmp_path)]) == 0
    measured = {problem.op for problem in card.measured}
    assert measured == ops_of if ops_of else not measured & {"residual_block", "stem", "residual_stage"}
    # Chains are compiled ahead of the blocks that run them, a kernel for each operator.
    compiled = {problem.op: chosen for problem, chosen in card.compiled}
    assert ("conv_affine" in compiled) == (only == "blocks")
    assert all(chosen.backend == "triton" for chosen in compiled.values())


def test_needs_a_gpu_or_a_dry_run(capsys):
    if not torch.cuda.is_available():
        assert command.main([]) == 2
        assert "--dry-run" in capsys.readouterr().err
    assert command.main(["--batches", "0", "--dry-run", "sm90"]) == 2
    assert command.main(["--models", "resnet18", "--batches", "2", "--size", "64", "--dry-run", "sm90"]) == 0
    assert "20 blocks" in capsys.readouterr().out


def _recorded(dtype):
    problems = [task.problem for task in _tasks("resnet50", size=32, dtype=dtype) if task.call is None]
    return {(p.op, p.prologue, p.epilogue, p.stride, p.r): p for p in reversed(problems)}.values()


def test_sample_arguments_fit_every_operator():
    """Each operator that a ResNet-50 asks for runs on its sample arguments, on fake shapes of its own size."""
    problems = _recorded("bf16")
    assert len({p.op for p in problems}) >= 18
    for problem in problems:
        arguments = testing.operator_arguments(problem, torch.Generator().manual_seed(0), "cpu")
        results = testing.comparable(problem.op, getattr(reference, problem.op)(*arguments))
        assert results and all(torch.isfinite(r).all() for r in results), problem.op
        shapes = testing.operator_arguments(problem, torch.Generator().manual_seed(0), "meta")
        for real, shape in zip(*map(torch.utils._pytree.tree_leaves, (arguments, shapes))):
            if isinstance(real, torch.Tensor):
                assert (real.shape, real.dtype, real.stride()) == (shape.shape, shape.dtype, shape.stride())


def test_check_operator_catches_a_wrong_kernel():
    generator = torch.Generator().manual_seed(0)
    testing.check_operator(SMALL, reference.bn_act, generator, "cpu")
    with pytest.raises(AssertionError, match="bn_act result 0"):
        testing.check_operator(SMALL, lambda a, relu: reference.bn_act(a, not relu), generator, "cpu")


@pytest.mark.gpu
def test_every_kernel_of_resnet50_within_the_error_budget_on_the_device():
    """Every operator of a training step and an inference, with the heuristic's tile, at 16 bit and fp32."""
    device = ops.device_of(torch.empty(0, device="cuda"), "auto")
    checked = 0
    for dtype in ("bf16", "fp16", "fp32"):
        for problem, call, *_ in _tasks("resnet50", size=96, dtype=dtype):
            if call is None and plan.unsupported(problem, None, device) is None:
                run = tuning.launcher(plan.triton_plan(problem, None, device, ""))
                testing.check_operator(problem, run, torch.Generator().manual_seed(0), "cuda")
                checked += 1
    assert checked > 100


@pytest.mark.gpu
def test_tune_on_the_device(home):
    """A small block in both modes; the second run finds everything measured, and plans are chosen from it."""
    block = fused_resnet.FusedBottleneck(64, 16).cuda()
    x = torch.randn(8, 64, 14, 14, device="cuda", dtype=torch.bfloat16)
    for training in (True, False):
        block.train(training)
        done = fused_resnet.tune(block, x)
        assert done.left == 0 and done.path.exists()
        assert fused_resnet.tune(block, x, budget=1e-9) == done
        records = fused_resnet.explain(block, x)
        assert any("measured on" in record.reason for record in records)
    fused_resnet.ops.forget_plans()
