"""Planning: policy, tables, and a valid tile for every layer of every model on every card, without a GPU."""

import json
import threading
import warnings
from dataclasses import replace

import pytest

from fused_resnet import plan as planning
from fused_resnet.plan import (
    MODELS,
    Device,
    Measured,
    Plan,
    Problem,
    Table,
    TileConfig,
    Unsupported,
    chunk_pixels,
    cuda_unsupported,
    current_impl,
    dump_table,
    load_table,
    model_problems,
    plan_block,
    plan_for,
    resolve_impl,
    statistics_rows,
    table_entry,
    triton_plan,
    unsupported,
    use,
)

ARCHS = (80, 86, 89, 90, 100)
H100 = Device.default(90)
POINTWISE = Problem("conv_stats", 32, 56, 56, 64, 256, 1, 1, epilogue="stats")
TILE = TileConfig(128, 64, 64, 8, 3)


@pytest.fixture
def plans(tmp_path, monkeypatch):
    """An empty folder of tables in place of the shipped ones."""
    monkeypatch.setattr(planning, "PLANS", tmp_path)
    planning.forget_tables()
    yield tmp_path
    planning.forget_tables()


@pytest.mark.parametrize("arch", ARCHS)
@pytest.mark.parametrize("dtype", ["bfloat16", "float16", "float32"])
@pytest.mark.parametrize("name", MODELS)
def test_every_layer_has_a_valid_plan_or_a_reason(name, dtype, arch):
    device, families = Device.default(arch), set()
    for training in (True, False):
        for batch in (1, 8, 256):
            for _, problem in dict.fromkeys(model_problems(name, batch, 224, training, dtype)):
                try:
                    plan = plan_for(problem, device, "triton")
                except Unsupported as reason:
                    assert str(reason).startswith(problem.op)
                    assert not (problem.op in ("conv_stats", "conv_affine") and problem.r == 1), reason
                else:
                    assert unsupported(problem, plan.config, device) is None
                    families.add(plan.module)
    assert {"conv1x1", "bn"} <= families


@pytest.mark.parametrize("name,convolutions", [("resnet18", 20), ("resnet50", 53), ("resnet152", 155)])
def test_model_problems_count_the_layers(name, convolutions):
    problems = model_problems(name, 2, 224, False)
    assert len({layer for layer, problem in problems if problem.op == "conv_affine"}) == convolutions
    assert [layer for layer, problem in problems if problem.op == "conv_affine_pool"] == ["conv1"]
    training = model_problems(name, 2, 224, True)
    assert len({layer for layer, problem in training if problem.op == "conv_wgrad"}) == convolutions


def test_model_problems_geometry():
    problems = dict.fromkeys(model_problems("resnext50_32x4d", 4, 224, False))
    conv2 = [problem for layer, problem in problems if layer == "layer2.0.conv2" and problem.op == "conv_affine"]
    assert conv2[0].groups == 32 and conv2[0].c == 256 and conv2[0].out_hw == (28, 28)
    down = [problem for layer, problem in problems if layer == "layer4.0.downsample.0" and problem.r == 1]
    assert (down[0].c, down[0].k, down[0].stride, down[0].out_hw) == (1024, 2048, (2, 2), (7, 7))


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize(
    "name,inplanes,planes,stride",
    [
        ("resnet50", 256, 64, 1),
        ("resnet50", 64, 64, 1),
        ("resnet50", 256, 128, 2),
        ("resnext50_32x4d", 256, 128, 2),
        ("resnet18", 64, 64, 1),
        ("resnet18", 64, 128, 2),
    ],
)
def test_model_problems_are_those_the_operators_ask_for(name, inplanes, planes, stride, dtype, training):
    """A block run on meta tensors asks for no operator's plan that the list of problems lacks."""
    torch = pytest.importorskip("torch")
    from fused_resnet import FusedBasicBlock, FusedBottleneck, ops

    kind = FusedBasicBlock if name == "resnet18" else FusedBottleneck
    outplanes = planes * kind.expansion
    options = {"groups": 32, "base_width": 4} if name.startswith("resnext") else {}
    asked = []
    with ops.record(lambda problem, plan: asked.append(problem), H100), use("reference"), torch.device("meta"):
        down = None
        if stride != 1 or inplanes != outplanes:
            conv = torch.nn.Conv2d(inplanes, outplanes, 1, stride, bias=False)
            down = torch.nn.Sequential(conv, torch.nn.BatchNorm2d(outplanes))
        block = kind(inplanes, planes, stride, down, **options).train(training)
        x = torch.empty(2, inplanes, 16, 16).to(getattr(torch, dtype), memory_format=torch.channels_last)
        block.to(x.dtype, memory_format=torch.channels_last)
        with torch.set_grad_enabled(training):
            out = block(x.requires_grad_(training))
        if training:
            out.sum().backward()
    # The vectors of a BatchNorm have its parameters' dtype, which the list takes to be fp32.
    listed = {problem for _, problem in model_problems(name, 2, 64, training, dtype)}
    asked = [problem for problem in asked if problem.op not in ("residual_block", "bn_frozen")]
    assert asked
    assert not set(asked) - listed


@pytest.mark.parametrize("training", [True, False])
def test_stem_problems_are_those_the_operators_ask_for(training):
    torch = pytest.importorskip("torch")
    from fused_resnet import modules, ops

    asked = []
    with ops.record(lambda problem, plan: asked.append(problem), H100), use("reference"), torch.device("meta"):
        conv, bn = torch.nn.Conv2d(3, 64, 7, 2, 3, bias=False).bfloat16(), torch.nn.BatchNorm2d(64).train(training)
        x = torch.empty(2, 3, 64, 64, dtype=torch.bfloat16)
        with torch.set_grad_enabled(training):
            y = modules.forward_stem(conv, bn, torch.nn.ReLU(), torch.nn.MaxPool2d(3, 2, 1), x)
        if training:
            y.sum().backward()
    asked = {problem for problem in asked if problem.op != "stem"}
    listed = {problem for layer, problem in model_problems("resnet18", 2, 64, training) if layer == "conv1"}
    assert {"bn_act_pool_backward" if training else "conv_affine_pool"} <= {problem.op for problem in asked}
    assert not asked - listed


def test_unmeasured_problems_go_to_the_library(plans):
    assert plan_for(POINTWISE, H100, "auto") == Plan("library", None, "not measured on sm90")
    assert plan_for(POINTWISE, None, "auto") == Plan("reference", None, "no CUDA device")
    assert plan_for(POINTWISE, H100, "reference").backend == "reference"


def test_explicit_impl_never_falls_back(plans):
    plan = plan_for(POINTWISE, H100, "triton")
    assert (plan.backend, plan.module, plan.launch) == ("triton", "conv1x1", "launch_conv1x1_stats")
    with pytest.raises(Unsupported, match="no CUDA device"):
        plan_for(POINTWISE, None, "triton")
    with pytest.raises(Unsupported, match="32 groups"):
        plan_for(Problem("conv1x1_join", 1, 8, 8, 64, 64, 1, 1, groups=32), H100, "triton")
    with pytest.raises(Unsupported, match="float64"):
        plan_for(Problem("bn_act", 1, 8, 8, 64, 64, dtype="float64"), H100, "triton")
    with pytest.raises(Unsupported, match="sm75"):
        plan_for(POINTWISE, Device(75, 40, 65536), "triton")
    with pytest.raises(Unsupported, match="bn_act: no kernel in the CUDA library"):
        plan_for(Problem("bn_act", 1, 8, 8, 64, 64), H100, "cuda")
    with pytest.raises(Unsupported, match="conv_stats: no 1x1 kernel"):
        plan_for(POINTWISE, H100, "cuda")
    finalize = Problem("bn_finalize", 512, 3, 1, 64, 64, dtype="float32")
    plan = plan_for(finalize, H100, "cuda")
    assert (plan.backend, plan.module, plan.launch) == ("cuda", "native", "launch_bn_finalize")
    with pytest.raises(ValueError, match="impl must be one of"):
        plan_for(POINTWISE, H100, "fast")


CONV3X3 = Problem("conv_stats", 32, 28, 28, 128, 128, 3, 3, padding=(1, 1), epilogue="stats")
BOTTLENECK = replace(CONV3X3, op="bottleneck_affine", c=256, k=64, epilogue="identity")


@pytest.mark.parametrize(
    ("problem", "change", "reason"),
    [
        (CONV3X3, {}, None),
        (CONV3X3, {"op": "conv_affine", "stride": (2, 2), "epilogue": "affine+residual", "dtype": "float16"}, None),
        (CONV3X3, {"op": "conv_dgrad", "epilogue": "relu"}, None),
        (CONV3X3, {"op": "conv_dgrad", "epilogue": "add"}, None),
        (CONV3X3, {"op": "conv_wgrad", "stride": (2, 2), "epilogue": ""}, None),
        (BOTTLENECK, {}, None),
        (BOTTLENECK, {"c": 64, "epilogue": "projection"}, None),
        (BOTTLENECK, {"c": 64}, "width 64 of 64 channels"),
        (CONV3X3, {"dtype": "float32"}, "float32: the kernel multiplies 16-bit values"),
        (CONV3X3, {"r": 7, "s": 7}, "no 7x7 kernel"),
        (CONV3X3, {"padding": (0, 0)}, "padding (0, 0), dilation (1, 1)"),
        (CONV3X3, {"dilation": (2, 2)}, "padding (1, 1), dilation (2, 2)"),
        (CONV3X3, {"groups": 32}, "32 groups"),
        (CONV3X3, {"n": 2**22}, "32-bit"),
        (CONV3X3, {"prologue": True}, "write the deferred tensor out first"),
        (CONV3X3, {"stride": (2, 1)}, "stride (2, 1)"),
        (CONV3X3, {"op": "conv_dgrad", "stride": (2, 2)}, "stride (2, 2): the kernel has (1, 1)"),
        (CONV3X3, {"op": "conv_dgrad", "epilogue": "reluadd"}, "either adds a gradient or masks"),
        (CONV3X3, {"c": 96}, "96 -> 128 channels: the kernel takes multiples of 64"),
        (CONV3X3, {"k": 32}, "128 -> 32 channels"),
        (CONV3X3, {"op": "conv1x1_join"}, "no kernel in the CUDA library"),
        (BOTTLENECK, {"c": 512, "k": 128}, "width 128 of 512 channels"),
        (BOTTLENECK, {"stride": (2, 2)}, "the kernel keeps the resolution"),
    ],
)
def test_limits_of_the_cuda_kernels_have_reasons(plans, problem, change, reason):
    problem = replace(problem, **change)
    said = cuda_unsupported(problem, H100)
    assert said is None if reason is None else reason in said
    entry = table_entry(problem, {"cuda": 1.0, "library": 2.0}, None)
    if reason is None:
        assert plan_for(problem, H100, "cuda").launch.startswith("launch_")
        assert plan_for(problem, H100, "auto").backend == "library"  # not measured
        # Measured, but on a card that has none of it.
        dump_table(plans / "sm100.json", 100, {}, [entry])
        assert "sm100: the kernel uses wgmma" in plan_for(problem, Device.default(100), "auto").reason
    else:
        with pytest.raises(Unsupported, match=f"^{problem.op}: "):
            plan_for(problem, H100, "cuda")
    for arch in (80, 89, 100):
        assert cuda_unsupported(problem, Device.default(arch))


@pytest.mark.parametrize(
    ("problem", "arch", "reason"),
    [
        (POINTWISE, 90, "64x64x64, 4 warps, 128 registers: room for 4 blocks on an SM, 6272 output tiles on 132 SMs"),
        (POINTWISE, 80, "128x64x64, 8 warps: room for 2 blocks on an SM, 3136 output tiles on 108 SMs"),
        (POINTWISE, 86, "128x64x64, 8 warps: room for 1 block on an SM, 3136 output tiles on 84 SMs"),
        (
            Problem("conv_affine", 1, 7, 7, 512, 2048, 1, 1, epilogue="affine"),
            90,
            "64x64x64, 4 warps, 128 registers: room for 3 blocks on an SM, 32 output tiles on 132 SMs",
        ),
        (
            Problem("conv_affine", 1, 7, 7, 512, 512, 3, 3, padding=(1, 1), epilogue="affine"),
            90,
            "64x64x64, 4 warps: room for 4 blocks on an SM, 8 output tiles in 16 shares of the depth on 132 SMs",
        ),
        (
            Problem("conv_wgrad", 32, 14, 14, 256, 256, 3, 3, padding=(1, 1)),
            90,
            "128x128x64, 4 warps: room for 2 blocks on an SM, 36 output tiles on 132 SMs",
        ),
        (
            Problem("bn_act", 32, 56, 56, 64, 64),
            89,
            "64x64, 4 warps: room for 12 blocks on an SM, 1568 output tiles on 128 SMs",
        ),
    ],
)
def test_heuristic_says_what_its_tile_means_on_the_card(plans, problem, arch, reason):
    assert plan_for(problem, Device.default(arch), "triton").reason == f"heuristic: {reason}"


def test_grouped_convolution_says_who_convolves_and_why(plans):
    grouped = replace(CONV3X3, groups=32)
    reason = plan_for(grouped, H100, "triton").reason
    assert reason.startswith("the library's convolution between fused passes: no 3x3 kernel for conv_stats; ")
    assert "32 groups: the kernels convolve one" in reason


def test_more_pixels_than_32_bits_are_refused():
    assert "32-bit" in unsupported(Problem("bn_act", 2**16, 2**8, 2**8, 8, 8), None, H100)


@pytest.mark.parametrize(
    "config,reason",
    [
        (TileConfig(128, 64, 48), "powers of two"),
        (TileConfig(512, 64, 64, 8), "statistics"),
        (TileConfig(256, 256, 64, 4), "accumulators"),
        (TileConfig(128, 128, 256, 8, 4), "shared memory"),
        (TileConfig(128, 64, 64, 3), "num_warps"),
        (TileConfig(128, 64, 64, 8, maxnreg=16), "maxnreg 16"),
        (TileConfig(128, 64, 64, 16, maxnreg=168), "65536"),
    ],
)
def test_impossible_tiles_have_reasons(config, reason):
    assert reason in unsupported(POINTWISE, config, H100)


def test_shared_memory_limit_is_the_cards(plans):
    tile = TileConfig(128, 128, 64, 8, 4)
    assert unsupported(POINTWISE, tile, H100) is None
    assert "101376" in unsupported(POINTWISE, tile, Device.default(86))


def test_candidates_of_a_1x1_fit_its_channels_and_depth():
    """Each costs seconds of a GPU: none past the channels, with idle stages, or for another kernel than its own."""
    shallow = planning.candidates(replace(POINTWISE, k=64), H100)
    assert {tile.block_n for tile in shallow if tile.block_k} == {64}
    assert all(tile.num_stages == 2 or tile == shallow[0] for tile in shallow if tile.block_k)
    deep = planning.candidates(replace(POINTWISE, c=256), H100)
    assert [tile.num_stages for tile in deep if tile.block_k == 256] == [2, 3]
    assert not any(tile.block_k == 256 for tile in planning.candidates(replace(POINTWISE, c=256, prologue=True), H100))
    strided = [tile for tile in planning.candidates(replace(POINTWISE, c=512, stride=(2, 2)), H100) if tile.block_k]
    assert len(strided) == len(set(strided)) == 3


def test_tile_of_a_table_without_a_register_limit(plans):
    entry = table_entry(POINTWISE, {"library": 2.0, "triton": 1.0}, TILE)
    del entry["config"]["maxnreg"]
    dump_table(plans / "sm90.json", 90, {}, [entry])
    assert plan_for(POINTWISE, H100, "auto").config == TILE


def test_table_round_trip(plans):
    other = Problem("bn_act", 32, 56, 56, 64, 64)
    finalize = Problem("bn_finalize", 512, 3, 1, 64, 64, dtype="float32")
    entries = [
        table_entry(POINTWISE, {"library": 20.0, "triton": 10.0}, TILE),
        table_entry(other, {"library": 8.0, "triton": 9.0}, TileConfig(32, 64)),
        table_entry(finalize, {"library": 2.0, "cuda": 1.0}),
    ]
    dump_table(plans / "sm90.json", 90, {"card": "test"}, entries)
    plan = plan_for(POINTWISE, H100, "auto")
    assert (plan.backend, plan.config, plan.module) == ("triton", TILE, "conv1x1")
    assert plan.reason == "measured on sm90: triton 10.0 us, library 20.0 us"
    assert plan_for(other, H100, "auto").backend == "library"
    assert plan_for(other, H100, "triton").config == TileConfig(32, 64)
    assert plan_for(finalize, H100, "auto").module == "native"
    assert plan_for(POINTWISE, Device.default(80), "auto").reason == "not measured on sm80"


def test_measured_tile_that_does_not_fit_the_card(plans):
    entries = [table_entry(POINTWISE, {"library": 2.0, "triton": 1.0}, TileConfig(128, 128, 64, 8, 4))]
    dump_table(plans / "sm90.json", 90, {}, entries)
    small = Device(90, 16, 99 * 1024)
    plan = plan_for(POINTWISE, small, "auto")
    assert plan.backend == "library" and "triton cannot run here: conv_stats: needs 147968 bytes" in plan.reason
    assert plan_for(POINTWISE, small, "triton").reason.startswith("heuristic: ")


@pytest.mark.parametrize(
    "text",
    [
        "",
        "\0",
        '{"format": 2, "arch": 90, "ent',
        "[]",
        '{"format": 99, "arch": 90, "entries": []}',
        '{"format": 2}',
        "[1]",
    ],
)
def test_damaged_table_warns_with_its_name(plans, text):
    (plans / "sm90.json").write_text(text)
    with pytest.warns(UserWarning, match="sm90.json"):
        assert plan_for(POINTWISE, H100, "auto").reason == "not measured on sm90"


def test_table_of_another_architecture(plans):
    dump_table(plans / "sm90.json", 80, {}, [])
    with pytest.warns(UserWarning, match="sm80"):
        assert load_table(plans / "sm90.json", 90) == {}


def test_unknown_entries_are_left_out(plans):
    good = table_entry(POINTWISE, {"library": 20.0, "triton": 10.0}, TILE)
    bad = [
        good | {"problem": good["problem"] | {"op": "conv_winograd"}},
        good | {"us": {"library": 20.0, "vulkan": 10.0}},
        good | {"us": {"triton": 10.0}},
        good | {"us": {"library": 20.0, "triton": 0.0}},
        good | {"us": {"library": float("nan")}},
        good | {"us": 10.0},
        good | {"config": TILE.__dict__ | {"cluster": 2}},
        good | {"config": None},
        good | {"problem": {"op": "bn_act"}},
        good | {"problem": good["problem"] | {"dtype": {}}},
        "not an entry",
    ]
    path = plans / "sm90.json"
    dump_table(path, 90, {}, [*bad, good])
    with pytest.warns(UserWarning, match="11 entries left out"):
        measured = load_table(path, 90)
    assert list(measured) == [POINTWISE]


def test_shipped_tables_load():
    shipped = planning.PLANS
    for path in shipped.glob("*.json"):
        arch = int(path.stem.removeprefix("sm"))
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            table = load_table(path, arch)
        for problem, measured in table.items():
            if "triton" in measured.us and measured.config is not None:
                triton_plan(problem, measured.config, Device.default(arch), "")
        assert json.loads(path.read_text())["origin"]


FINALIZE = Problem("bn_finalize", 512, 3, 1, 64, 64, dtype="float32")
BLOCK = Problem("residual_block", 2, 8, 8, 64, 64, 3, 3, epilogue="training identity 1x1-16 3x3-16 1x1-64")
NO_CUDA = replace(H100, cuda_missing="_C.abi3.so was not built")
NO_TRITON = replace(H100, triton_missing="Triton is not installed")


def test_block_runs_in_the_scheme_that_was_faster(plans):
    entries = [
        table_entry(BLOCK, {"library": 5.0, "triton": 4.0, "triton stored": 3.0}),
        table_entry(replace(BLOCK, n=256), {"library": 5.0, "triton": 2.0, "triton stored": 3.0}),
        table_entry(replace(BLOCK, k=9), {"library": 5.0, "triton recomputed": 3.0}),
    ]
    dump_table(plans / "sm90.json", 90, {}, entries)
    with pytest.warns(UserWarning, match="unknown kernel: triton recomputed"):
        chosen = plan_block(BLOCK, H100)
    assert (chosen.backend, chosen.scheme) == ("triton", "stored")
    assert chosen.reason == "measured on sm90: triton stored 3.0 us, triton 4.0 us, library 5.0 us"
    assert plan_block(replace(BLOCK, n=256), H100).scheme == ""
    # Between two batch sizes that differ in the scheme alone, the nearer one's is taken.
    assert plan_block(replace(BLOCK, n=3), H100).scheme == "stored"
    assert plan_block(replace(BLOCK, n=200), H100).scheme == ""
    assert plan_block(BLOCK, NO_TRITON).backend == "library"


def test_winner_that_cannot_run_here_leaves_it_to_the_next_with_the_reason(plans):
    times = {"library": 5.0, "triton": 4.0, "cuda": 3.0}
    entries = [table_entry(FINALIZE, times, TileConfig(32, 32, 0, 4, 2)), table_entry(BLOCK, times)]
    dump_table(plans / "sm90.json", 90, {}, entries)
    measured = "measured on sm90: cuda 3.0 us, triton 4.0 us, library 5.0 us"
    nothing = replace(NO_CUDA, triton_missing=NO_TRITON.triton_missing)
    for device, operator, block in (
        (H100, "cuda", "cuda"),
        (NO_CUDA, "triton", "triton"),
        (NO_TRITON, "cuda", "library"),  # a chain always has Triton kernels in it
        (nothing, "library", "library"),
    ):
        for plan, backend in ((plan_for(FINALIZE, device), operator), (plan_block(BLOCK, device), block)):
            assert plan.backend == backend
            assert plan.reason.startswith(measured)
            assert (backend == "cuda") == (plan.reason == measured)
    assert "; cuda cannot run here: bn_finalize: _C.abi3.so was not built" in plan_for(FINALIZE, NO_CUDA).reason
    assert plan_block(BLOCK, nothing).reason.count("cannot run here") == 2
    for device, impl, reason in ((NO_CUDA, "cuda", "was not built"), (NO_TRITON, "triton", "not installed")):
        with pytest.raises(Unsupported, match=reason):
            plan_for(FINALIZE, device, impl)


def test_a_draw_goes_to_the_library(plans):
    dump_table(plans / "sm90.json", 90, {}, [table_entry(POINTWISE, {"triton": 2.0, "library": 2.0}, TILE)])
    assert plan_for(POINTWISE, H100).backend == "library"
    assert plan_for(POINTWISE, H100, "triton").config == TILE


def test_what_was_tuned_on_the_card_counts_before_what_is_shipped(plans):
    other = replace(POINTWISE, n=8)
    slower, faster = {"library": 10.0, "triton": 20.0}, {"library": 10.0, "triton": 5.0}
    shipped = [table_entry(POINTWISE, slower, TILE), table_entry(other, faster, TILE)]
    dump_table(plans / "sm90.json", 90, {}, shipped)
    tuned = replace(H100, tuned=Table("mine", {POINTWISE: Measured(faster, TILE, "a card")}))
    assert plan_for(POINTWISE, H100).backend == "library"
    assert plan_for(POINTWISE, tuned).backend == plan_for(other, tuned).backend == "triton"
    assert plan_for(POINTWISE, tuned).reason == "measured on a card: triton 5.0 us, library 10.0 us"


@pytest.mark.parametrize("pixels", [1, 255, 256, 257, 50176, 802816, 10**7])
@pytest.mark.parametrize("channels", [1, 35, 64, 65, 512, 2048])
def test_chunks_cover_the_pixels(pixels, channels):
    rows = statistics_rows(channels)
    chunk = chunk_pixels(pixels, rows)
    assert 64 <= rows <= 512 and chunk % 256 == 0 and rows * chunk >= pixels
    assert Plan.statistics_rows(channels) == rows and Plan.chunk_pixels(pixels, rows) == chunk


def test_use_nests_and_is_per_thread():
    seen = []
    with use("triton"):
        with use("reference"):
            assert current_impl() == "reference"
            thread = threading.Thread(target=lambda: seen.append(current_impl()))
            thread.start()
            thread.join()
        assert current_impl() == resolve_impl(None) == "triton"
        assert resolve_impl("auto") == "auto"
    assert current_impl() == "auto" and seen == ["auto"]
    with pytest.raises(ValueError, match="got 'fast'"), use("fast"):
        pass
    with pytest.raises(RuntimeError), use("triton"):
        raise RuntimeError
    assert current_impl() == "auto"


def test_compiled_functions_notice_use():
    torch = pytest.importorskip("torch")

    @torch.compile(backend="eager", fullgraph=True)
    def function(x):
        with use("cuda"):
            inner = current_impl()
        return x + (1 if current_impl() == "auto" else 2), inner

    x = torch.zeros(())
    assert function(x)[0] == 1 and function(x)[1] == "cuda"
    with use("triton"):
        assert function(x)[0] == 2
    assert function(x)[0] == 1
