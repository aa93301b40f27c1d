"""Stages of an inference batch in parts: only where measured, equal to the whole, refused where it would matter."""

from dataclasses import replace

import pytest
import torch
import torchvision

import fused_resnet
from fused_resnet import modules, ops, plan, tuning, workload
from fused_resnet.plan import Device, Problem, TileConfig, dump_table, load_table, plan_for, plan_stage, table_entry

H100 = Device.default(90)
STAGE = Problem(plan.STAGE_OP, 128, 56, 56, 64, 256, 3, 3, (1, 1), (1, 1), epilogue="inference 3 1x1-64 3x3-64 1x1-256")


@pytest.fixture
def tables(tmp_path, monkeypatch):
    """An empty folder of tables in place of the shipped ones."""
    monkeypatch.setattr(plan, "PLANS", tmp_path)
    plan.forget_tables()
    yield tmp_path
    plan.forget_tables()


def _resnet(device="cpu"):
    torch.manual_seed(0)
    model = fused_resnet.ResNet(fused_resnet.FusedBottleneck, [2, 1, 1, 1], num_classes=5).to(device)
    for module in model.modules():
        if isinstance(module, torch.nn.BatchNorm2d):
            torch.nn.init.uniform_(module.running_mean, -0.2, 0.2)
            torch.nn.init.uniform_(module.running_var, 0.5, 2)
    return model.eval()


def test_only_a_measurement_splits_a_stage(tables):
    assert plan_stage(STAGE, H100).reason == "the whole batch: not measured on sm90"
    entries = [
        table_entry(STAGE, {"library": 900.0, "32": 700.0, "16": 800.0}),
        table_entry(replace(STAGE, n=256), {"library": 900.0, "32": 950.0}),
    ]
    dump_table(tables / "sm90.json", 90, {"card": "test"}, entries)
    plan.forget_tables()
    assert plan_stage(STAGE, H100).backend == "32"
    assert plan_stage(STAGE, H100).reason == "measured on sm90: 32 700.0 us, 16 800.0 us, library 900.0 us"
    assert plan_stage(replace(STAGE, n=256), H100).backend == "library"
    assert plan_stage(STAGE, H100, "triton").backend == "library" and plan_stage(STAGE, None).backend == "library"


@pytest.mark.parametrize("schedule", ["0", "-8", "eight"])
def test_impossible_parts_are_left_out(tables, schedule):
    dump_table(tables / "sm90.json", 90, {}, [table_entry(STAGE, {"library": 9.0, schedule: 7.0})])
    with pytest.warns(UserWarning, match="unknown kernel"):
        assert load_table(tables / "sm90.json", 90) == {}


@pytest.mark.parametrize("maker", ["ours", "torchvision"])
def test_parts_give_what_the_whole_batch_gives(monkeypatch, maker):
    model = _resnet()
    if maker == "torchvision":
        theirs = torchvision.models.ResNet(torchvision.models.resnet.Bottleneck, [2, 1, 1, 1], num_classes=5).eval()
        theirs.load_state_dict(model.state_dict())
        model = fused_resnet.fuse(theirs)
    x = torch.randn(5, 3, 32, 32)
    asked = []
    run = modules.run_in_parts
    monkeypatch.setattr(modules, "run_in_parts", lambda stage, x, images: asked.append(images) or run(stage, x, images))
    with torch.no_grad(), fused_resnet.use("reference"):
        whole = model(x)
        assert not asked
        monkeypatch.setattr(ops, "part_of_stage", lambda impl, x, convolutions, depth: 2 if depth == 2 else 0)
        parts = model(x)
    assert asked == [2]
    torch.testing.assert_close(parts, whole, rtol=1e-5, atol=1e-6)


def test_statistics_gradients_and_hooks_keep_the_batch_whole(monkeypatch):
    model, x = _resnet(), torch.randn(3, 3, 32, 32)
    monkeypatch.setattr(ops, "part_of_stage", lambda *_: 1)
    monkeypatch.setattr(modules, "run_in_parts", lambda *_: pytest.fail("the batch was taken apart"))
    model(x).sum().backward()
    with torch.no_grad():
        model.train()(x)
        model.eval().layer1[1].bn2.train()
        for stage in (model.layer2, model.layer3, model.layer4):
            stage.register_forward_hook(lambda *_: None)
        model(x)
    traced = torch.fx.symbolic_trace(_resnet())
    with torch.no_grad():
        traced(x)


NEAR = Problem("conv_stats", 128, 56, 56, 64, 256, 1, 1, epilogue="stats")
TILES = TileConfig(128, 64, 64, 8, 3), TileConfig(64, 64, 64, 4, 3)


def test_batch_sizes_near_a_measured_one(tables):
    times = {"triton": 10.0, "library": 20.0}
    entries = [table_entry(replace(NEAR, n=n), times, tile) for n, tile in zip((32, 128), TILES)]
    entries.append(table_entry(replace(NEAR, n=512), {"library": 5.0, "triton": 6.0}, TILES[0]))
    dump_table(tables / "sm90.json", 90, {}, entries)
    plan.forget_tables()
    between = plan_for(replace(NEAR, n=48), H100, "auto")
    assert (between.backend, between.config) == ("triton", TILES[0])
    assert between.reason == "measured on sm90 at batch 32: triton 10.0 us, library 20.0 us"
    assert plan_for(replace(NEAR, n=100), H100, "auto").config == TILES[1]
    # Beyond the smallest by up to a factor of two.
    assert plan_for(replace(NEAR, n=16), H100, "auto").reason.startswith("measured on sm90 at batch 32")
    assert plan_for(replace(NEAR, n=15), H100, "auto").reason == "not measured on sm90; tile from the heuristic"
    # Neighbours that disagree say nothing.
    assert "not measured" in plan_for(replace(NEAR, n=256), H100, "auto").reason
    # Rows of statistics are no images.
    finalize = Problem("bn_finalize", 512, 3, 1, 64, 64, dtype="float32")
    plan.measurements(H100)[finalize] = plan.Measured({"library": 1.0}, None, "sm90")
    plan.forget_choices()
    assert "not measured" in plan_for(replace(finalize, n=300), H100, "auto").reason


def test_blocks_near_a_measured_batch_size(tables):
    block = replace(STAGE, op="residual_block", epilogue="training identity")
    entries = [table_entry(replace(block, n=n), {"triton": 1.0, "library": 2.0}) for n in (32, 128)]
    dump_table(tables / "sm90.json", 90, {}, entries)
    plan.forget_tables()
    assert plan.plan_block(replace(block, n=64), H100).backend == "triton"
    assert plan.plan_block(replace(block, n=512), H100).backend == "library"


def test_an_operator_of_a_chain_without_a_measurement(tables):
    """Without any measurement on the architecture the kernels count as untried, and the library runs."""
    assert plan_for(NEAR, H100, "auto").backend == "library"
    dump_table(tables / "sm90.json", 90, {}, [table_entry(replace(NEAR, k=64), {"library": 1.0})])
    plan.forget_tables()
    chosen = plan_for(NEAR, H100, "auto")
    assert (chosen.backend, chosen.reason) == ("triton", "not measured on sm90; tile from the heuristic")
    double = plan_for(replace(NEAR, dtype="float64"), H100, "auto")
    assert double.backend == "library" and "float64" in double.reason


def test_tuning_states_and_times_the_schedules_that_run(tables, monkeypatch):
    """The problems are those that a forward asks for, and what was fastest is what it then does."""
    model = _resnet()
    tasks = workload.stages(model, torch.empty(20, 3, 32, 32, device="meta"))
    assert [task.layer for task in tasks] == ["layer1", "layer2", "layer3", "layer4"]
    assert tasks[0].problem == Problem(
        plan.STAGE_OP,
        20,
        8,
        8,
        64,
        256,
        3,
        3,
        (1, 1),
        (1, 1),
        dtype="float32",
        epilogue="inference 2 1x1-64 3x3-64 1x1-256",
    )
    assert workload.stages(model.train(), torch.empty(20, 3, 32, 32, device="meta")) == []
    ran = []

    def timer(run):
        ran.append(run())
        return 10.0 - len(ran)

    entry, rejected = tuning.measure_stage(tasks[0], timer, "cpu")
    assert entry == table_entry(tasks[0].problem, {"library": 9.0, "8": 8.0, "16": 7.0}) and not rejected
    for parts in ran[1:]:
        torch.testing.assert_close(parts, ran[0], rtol=1e-4, atol=1e-5)
    dump_table(tables / "sm90.json", 90, {}, [entry])
    plan.forget_tables()
    monkeypatch.setattr(ops, "device_of", lambda x, impl: H100)
    asked = []
    run = modules.run_in_parts
    monkeypatch.setattr(modules, "run_in_parts", lambda stage, x, images: asked.append(images) or run(stage, x, images))
    with torch.no_grad():
        model.eval()(torch.randn(20, 3, 32, 32))
    assert asked == [16]


def test_explain_lists_a_stage_in_parts_once(tables):
    model, x = _resnet(), torch.empty(20, 3, 32, 32, device="meta")
    whole = [record for record in fused_resnet.explain(model, x, arch="sm90") if record.layer.startswith("layer1")]
    problem = workload.stages(model, x)[0].problem
    dump_table(tables / "sm90.json", 90, {}, [table_entry(problem, {"library": 9.0, "8": 8.0})])
    plan.forget_tables()
    records = fused_resnet.explain(model, x, arch="sm90")
    parts = [record for record in records if record.layer.startswith("layer1")]
    assert len(parts) == len(whole) and all(record.problem.startswith("8x8x8") for record in parts)
    schedule = next(record for record in records if record.operator == plan.STAGE_OP)
    assert schedule.backend == "8" and schedule.problem.startswith("20x8x8")
    assert next(record for record in records if record.layer == "layer2.0").problem.startswith("20x8x8")
