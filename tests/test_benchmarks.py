"""The benchmark: roofline against hand-computed figures, options, and a small real run from the command line."""

import json
import sys

import pytest
import torch
import torchvision

import fused_resnet
from benchmarks import environment, layers, parity, plot, roofline, run
from benchmarks.baselines import BASELINES, Absent, Case
from benchmarks.results import load
from fused_resnet import reference, workload
from fused_resnet.plan import Problem, Work


def _resnet50_layers(batch=1):
    with torch.device("meta"):
        model = torchvision.models.resnet50()
    return roofline.layers(model, (batch, 3, 224, 224), "bfloat16")


def test_roofline_counts_by_hand():
    found = _resnet50_layers()
    assert len(found) == 54  # 53 convolutions and the classifier
    stem = found["conv1"]
    assert stem.flop == 2 * 112 * 112 * 64 * 3 * 49
    assert stem.bytes == 2 * (3 * 224 * 224 + 64 * 112 * 112 + 64 * 3 * 49)
    conv = found["layer2.1.conv2"]
    assert conv.flop == 2 * 28 * 28 * 128 * 128 * 9
    assert conv.bytes == 2 * (2 * 28 * 28 * 128 + 128 * 128 * 9)
    down = found["layer2.0.downsample.0"]  # reads every fourth pixel
    assert down.bytes == 2 * 28 * 28 * (256 + 512) + 2 * 256 * 512
    assert found["fc"].flop == 2 * 2048 * 1000 and found["fc"].bytes == 2 * (2048 + 1000 + 2048 * 1000)
    assert sum(layer.flop for layer in found.values()) == pytest.approx(8.18e9, rel=1e-3)
    assert sum(layer.flop for layer in _resnet50_layers(4).values()) == 4 * sum(l.flop for l in found.values())


def test_floor_takes_the_longer_of_arithmetic_and_traffic():
    work = [Work(100, 10), Work(10, 100)]
    ceilings = roofline.Ceilings(bytes_per_s=10.0, flop_per_s=20.0)
    assert roofline.floor_seconds(work, ceilings, training=False) == 5.0 + 10.0
    assert roofline.floor_seconds(work, ceilings, training=True) == 2 * 5.0 + 3 * 10.0


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--models", "resnet5"], "--models: expected one of resnet18, .*got 'resnet5'"),
        (["--modes", "train"], "--modes: expected one of training, inference, got 'train'"),
        (["--dtypes", "int8"], "--dtypes: expected one of fp32, bf16, fp16, got 'int8'"),
        (["--baselines", "tensorrt"], "--baselines: expected one of eager, .*got 'tensorrt'"),
        (["--impl", "fast"], "--impl: expected one of auto, .*got 'fast'"),
        (["--batches", "8", "0"], "--batches: expected a positive integer, got 0"),
        (["--size", "16"], "--size: expected at least 32 pixels, got 16"),
        (["--budget", "0"], "--budget: expected a positive number of seconds, got 0"),
        (["--tune", "-1"], "--tune: expected 0 or a number of seconds below --budget inf, got -1"),
        (["--tune", "60", "--budget", "60"], "--tune: expected 0 or a number of seconds below --budget 60, got 60"),
    ],
)
def test_bad_options_are_named_before_anything_runs(arguments, message, tmp_path, capsys):
    assert run.main([*arguments, "--out", str(tmp_path / "out")]) == 2
    import re

    assert re.search(message, capsys.readouterr().err)
    assert not (tmp_path / "out").exists()


@pytest.fixture
def small(monkeypatch):
    """A run of seconds: two runs a check, two steps, three rounds."""
    monkeypatch.setattr(parity, "STEPS", 2)
    monkeypatch.setattr(parity, "_RUNS", 2)
    monkeypatch.setattr(run, "_ROUNDS", 3)


def test_small_run_writes_rows_picture_and_environment(small, tmp_path, capsys):
    options = ["--models", "resnet18", "--batches", "2", "--size", "32", "--baselines", "eager", "graph", "--tune", "0"]
    assert run.main([*options, "--dtypes", "fp32", "--out", str(tmp_path)]) == 0
    results = json.loads((tmp_path / "results.json").read_text(), parse_constant=pytest.fail)
    assert results["environment"]["torch"] == torch.__version__ and results["options"]["budget"] == "inf"
    assert [(p["mode"], p["passed"]) for p in results["parity"]] == [("training", True), ("inference", True)]
    assert [len(p["losses_fused"]) for p in results["parity"]] == [2, 0]
    rows = {(row["mode"], row["contender"]): row for row in results["rows"]}
    for mode in ("training", "inference"):
        for contender in ("fused-auto", "eager"):
            row = rows[mode, contender]
            assert 0 < row["q25_ms"] <= row["median_ms"] <= row["q75_ms"] and row["n"] == 3
            assert row["images_per_s"] == pytest.approx(2000 / row["median_ms"])
            assert 0 < row["roofline_share"] < 2
    if not torch.cuda.is_available():
        assert "need a CUDA device" in rows["training", "graph"]["error"]
        assert "says nothing about speed on a GPU" in capsys.readouterr().out
    assert (tmp_path / "results.png").read_bytes().startswith(b"\x89PNG")


def test_wrong_network_fails_parity_and_is_not_timed(small, tmp_path, monkeypatch, capsys):
    build = fused_resnet.resnet18

    def broken(**keywords):
        model = build(**keywords)
        model.layer2[0].bn2.eps = 0.3
        return model

    monkeypatch.setattr(fused_resnet, "resnet18", broken)
    options = ["--models", "resnet18", "--batches", "2", "--size", "32", "--dtypes", "fp32", "--tune", "0"]
    assert run.main([*options, "--out", str(tmp_path)]) == 1
    results = json.loads((tmp_path / "results.json").read_text())
    assert results["rows"] == [] and not results["parity"][0]["passed"]
    assert "parity failed: nothing is timed" in capsys.readouterr().err


def test_kernel_that_fails_fails_parity(small, tmp_path, monkeypatch, capsys):
    """Each implementation and mode is looked at all the same."""
    monkeypatch.setattr(fused_resnet, "resnet18", lambda **_: 1 / 0)
    assert (
        run.main(["--models", "resnet18", "--batches", "2", "--size", "32", "--tune", "0", "--out", str(tmp_path)]) == 1
    )
    output = capsys.readouterr()
    assert output.out.count("FAILED: ZeroDivisionError: division by zero") == 2
    assert "Traceback" in output.err and "nothing is timed" in output.err


def test_wrong_kernel_in_inference_fails_parity_too(monkeypatch):
    monkeypatch.setattr(parity, "_RUNS", 2)
    affine = reference.conv_affine

    def wrong(x, w, frozen, residual, relu, geometry):
        return affine(x, w, frozen._replace(eps=0.01), residual, relu, geometry)

    case = Case("resnet18", "inference", 2, "fp32", 32, "cpu")
    assert parity.check(case, "reference").passed
    monkeypatch.setattr(reference, "conv_affine", wrong)
    outcome = parity.check(case, "reference")
    assert [(check.what, check.passed) for check in outcome.checks] == [("logits", False)]


def test_table_shows_losses_and_errors():
    case = Case("resnet18", "training", 2, "fp32", 32, "cpu")._asdict()
    timed = {"q25_ms": 9.0, "q75_ms": 11.0, "n": 3, "images_per_s": 1.0, "peak_bytes": None, "roofline_share": 0.5}
    text = run.table(
        [
            {**case, **timed, "contender": "fused-auto", "median_ms": 20.0},
            {**case, **timed, "contender": "eager", "median_ms": 10.0},
            {**case, "contender": "compile", "error": "no compiler"},
        ]
    )
    assert "0.50 x eager" in text and "no compiler" in text.splitlines()[-1]


def test_digits_are_real_and_normalised():
    x, target = parity.digits(50, 24)
    assert x.shape == (50, 3, 24, 24) and x.is_contiguous(memory_format=torch.channels_last)
    assert set(target.tolist()) == set(range(10))
    assert abs(float(x.mean())) < 1e-5 and float(x.std()) == pytest.approx(1, abs=1e-4)


def test_environment_outside_a_checkout_and_of_the_first_card(monkeypatch):
    said = {"git": None, "nvidia-smi": "580.1, 2619, 300.5, 40\n570.2, 0, 0, 0"}
    monkeypatch.setattr(environment, "_command", lambda *words: said[words[0]])
    monkeypatch.delenv("COMMIT", raising=False)
    assert environment.commit() == "unknown"
    monkeypatch.setenv("COMMIT", "abc")
    assert environment.commit() == "abc" and environment.describe()["driver"] == "580.1"
    assert environment.clocks()["power.draw"] == "300.5"
    said["nvidia-smi"] = None
    assert environment.clocks() is None and environment.describe()["driver"] is None


def test_ceilings_leave_the_switch_of_matrix_products_alone():
    before = torch.backends.cuda.matmul.fp32_precision
    ceilings = roofline.measure_ceilings("cpu", torch.float32)
    assert min(ceilings) > 0 and torch.backends.cuda.matmul.fp32_precision == before


def test_write_json_leaves_the_old_file_if_it_fails(tmp_path):
    path = tmp_path / "results.json"
    environment.write_json(path, {"rows": [1]})
    with pytest.raises(TypeError):
        environment.write_json(path, {"rows": [object()]})
    assert json.loads(path.read_text()) == {"rows": [1]}


def _results(*rows):
    described = {"card": None, "cpu": "a CPU", "commit": "abc", "torch": "2.11"}
    return {"environment": described, "parity": [], "rows": list(rows)}


def test_plot_from_a_file_alone(tmp_path, capsys):
    case = Case("resnet18", "training", 2, "fp32", 32, "cpu")._asdict()
    times = {"median_ms": 10.0, "q25_ms": 9.0, "q75_ms": 11.0, "n": 3, "roofline_share": 0.5}
    whole = {**case, **times, "images_per_s": 200.0, "peak_bytes": 10**9}
    layer = {**case, **times, "contender": "library", "layer": "layer1.0", "operator": "bn_act", "problem": "2x8x8x64"}
    failed = {**case, "contender": "compile", "error": "no compiler"}
    for i, rows in enumerate(
        (
            [],
            [failed],
            [{**whole, "contender": "eager"}, {**whole, "contender": "fused-auto"}, failed],
            [{**whole, "contender": "fused-auto", "peak_bytes": None}],
            [layer],
        )
    ):
        environment.write_json(tmp_path / f"{i}.json", _results(*rows))
        assert plot.main([str(tmp_path / f"{i}.json")]) == 0
        assert (tmp_path / f"{i}.png").read_bytes().startswith(b"\x89PNG")
    (tmp_path / "bad.json").write_text("{")
    assert plot.main([str(tmp_path / "bad.json")]) == 2
    assert "bad.json: not a results file" in capsys.readouterr().err


def test_layers_of_a_small_network(tmp_path, capsys):
    options = ["--model", "resnet18", "--batch", "2", "--size", "32", "--mode", "inference", "--dtype", "fp32"]
    assert layers.main([*options, "--out", str(tmp_path)]) == 0
    rows = load(tmp_path / "layers.json")["rows"]
    assert all("error" not in row for row in rows)
    for row in rows:
        assert 0 < row["q25_ms"] <= row["median_ms"] <= row["q75_ms"]
        assert row["gb_per_s"] == pytest.approx(row["bytes"] / row["median_ms"] / 1e6)
        assert row["tflop_per_s"] == pytest.approx(row["flop"] / row["median_ms"] / 1e9)
        assert row["roofline_share"] > 0
    stem = next(row for row in rows if row["operator"] == "conv_affine_pool" and "7x7" in row["problem"])
    assert stem["flop"] == 2 * 2 * 16 * 16 * 64 * 3 * 49
    blocks = [row for row in rows if row["operator"] == "residual_block"]
    assert {row["contender"] for row in blocks} >= {"library"} and len({row["contender"] for row in blocks}) > 1
    # Convolutions, weights and vectors of a whole block: an identity block of stage one.
    block = next(row for row in blocks if row["layer"] == "layer1.0")
    assert block["flop"] == 2 * (2 * 2 * 8 * 8 * 64 * 64 * 9) and block["count"] == 2
    assert "x library" in capsys.readouterr().out
    assert (tmp_path / "layers.png").read_bytes().startswith(b"\x89PNG")


def test_layers_stop_with_their_budget_and_name_failures(tmp_path, capsys, monkeypatch):
    options = ["--model", "resnet18", "--batch", "2", "--size", "32", "--dtype", "fp32", "--out", str(tmp_path)]
    assert layers.main([*options, "--budget", "1e-9"]) == 0
    assert load(tmp_path / "layers.json")["rows"] == [] and "problems left" in capsys.readouterr().out
    task = workload.Task(Problem("bn_act", 2, 5, 5, 16, 16, dtype="float32"), None, "layer1.0", 3, Work(0, 100))

    def times(run):
        run()
        raise RuntimeError("no memory\nand more")

    case = Case("resnet18", "training", 2, "fp32", 32, "cpu")
    rows = layers.measure(task, case, roofline.Ceilings(1, 1), None, times)
    assert [row["error"] for row in rows] == ["RuntimeError: no memory"]
    assert "RuntimeError: no memory" in layers.table(rows)
    assert layers.main(["--batch", "0"]) == layers.main(["--size", "8"]) == layers.main(["--budget", "-1"]) == 2


SMALL = Case("resnet18", "inference", 1, "fp32", 32, "cpu")


@pytest.mark.parametrize("name", ["graph", "cudnn-graphs"])
def test_contenders_that_need_a_gpu_say_so(name):
    with pytest.raises(Absent, match="need a CUDA device"):
        BASELINES[name](SMALL)


def test_contenders_that_are_absent_say_why(monkeypatch):
    with pytest.raises(Absent, match="inference only"):
        BASELINES["compile-freezing"](SMALL._replace(mode="training"))
    with pytest.raises(Absent, match="timm has no resnet19"):
        BASELINES["timm"](SMALL._replace(model="resnet19"))
    for package, name in (("timm", "timm"), ("torchvision", "eager")):
        monkeypatch.setitem(sys.modules, package, None)
        with pytest.raises(Absent, match=f"{package} is not installed"):
            BASELINES[name](SMALL)


@pytest.mark.parametrize("name", ["eager-nchw", "timm"])
@pytest.mark.parametrize("mode", ["training", "inference"])
def test_peers_run(name, mode):
    assert torch.isfinite(BASELINES[name](SMALL._replace(mode=mode, batch=2))()).all()


def test_peers_have_the_layout_they_are_named_for(monkeypatch):
    seen = []
    stride = torchvision.models.ResNet.forward
    monkeypatch.setattr(torchvision.models.ResNet, "forward", lambda s, x: seen.append(x.stride()) or stride(s, x))
    for name in ("eager", "eager-nchw"):
        BASELINES[name](SMALL._replace(batch=2))()
    assert seen == [(3072, 1, 96, 3), (3072, 1024, 32, 1)]
