"""The paper's experiment: its pieces by hand, small real runs on the digits, and the committed result."""

import json
import pickle
import re
from dataclasses import asdict
from pathlib import Path

import pytest
import torch

from examples import degradation
from examples.degradation import PRESETS, Settings

RESULTS = Path(__file__).parent.parent / "examples" / "results"
SMALL = ["--depths", "8", "--iterations", "84"]  # one epoch is 41
# matplotlib's first two colours: the curves of the first two depths.
BLUE, ORANGE = (31, 119, 180), (255, 127, 14)


def _read(folder):
    return json.loads((folder / "degradation.json").read_text())


def _pixels(picture, color):
    """How many pixels of a PNG have exactly this colour."""
    from matplotlib.image import imread

    rgb = torch.from_numpy(imread(picture))[..., :3].mul(255).round().int()
    return int((rgb == torch.tensor(color)).all(-1).sum())


@pytest.fixture(scope="module")
def full_settings():
    full = PRESETS["full"]
    return Settings("cifar10", full.iterations, full.batch, full.learning_rate)


@pytest.mark.parametrize(
    ("iteration", "depth", "rate"),
    [
        (0, 56, 0.1), (31_999, 56, 0.1), (32_000, 56, 0.01), (47_999, 56, 0.01), (48_000, 56, 1e-3), (63_999, 56, 1e-3),
        (0, 110, 0.01), (399, 110, 0.01), (400, 110, 0.1), (32_000, 110, 0.01), (48_000, 110, 1e-3),
    ],
)  # fmt: skip
def test_schedule_is_the_papers(iteration, depth, rate, full_settings):
    assert (full_settings.momentum, full_settings.weight_decay, full_settings.batch) == (0.9, 1e-4, 128)
    assert degradation.learning_rate(iteration, depth, full_settings) == pytest.approx(rate)


def test_schedule_keeps_its_proportions_in_a_short_run():
    settings = Settings("digits", 9, 32, 1.0)
    rates = [degradation.learning_rate(i, 20, settings) for i in range(9)]
    assert rates == pytest.approx([1, 1, 1, 1, 1, 0.1, 0.1, 0.01, 0.01])


def test_batches_show_every_image_once_in_each_epoch(generator):
    stream = degradation.batches(10, 4, generator)
    epochs = [torch.cat([next(stream) for _ in range(3)]) for _ in range(2)]
    assert all(epoch.sort().values.tolist() == list(range(10)) for epoch in epochs)
    assert epochs[0].tolist() != epochs[1].tolist()


def test_crops_are_shifts_of_the_padded_image_and_half_are_mirrored(generator):
    x = torch.arange(1.0, 1 + 3 * 7 * 5).view(1, 3, 7, 5).repeat(200, 1, 1, 1)
    y = degradation.crop_and_flip(x, generator)
    assert y.shape == x.shape and y.is_contiguous(memory_format=torch.channels_last)
    padded = torch.zeros(3, 15, 13)
    padded[:, 4:11, 4:9] = x[0]
    crops = {
        (i, j, mirror): crop.flip(-1) if mirror else crop
        for i in range(9)
        for j in range(9)
        for crop in [padded[:, i : i + 7, j : j + 5]]
        for mirror in (False, True)
    }
    found = [[key for key, crop in crops.items() if torch.equal(crop, image)] for image in y]
    assert all(len(keys) == 1 or not image.any() for keys, image in zip(found, y))
    rows, columns, mirrored = zip(*(keys[0] for keys in found))
    assert set(rows) == set(columns) == set(range(9))
    assert 70 < sum(mirrored) < 130


def test_digits_are_split_and_normalised_by_the_training_images():
    images = degradation.load_digits()
    assert images.train.shape == (1297, 3, 16, 16) and images.test.shape == (500, 3, 16, 16)
    assert len(images.train_labels) == 1297 and set(images.test_labels.tolist()) == set(range(10))
    assert float(images.train.mean(0).abs().max()) < 1e-5 < float(images.test.mean(0).abs().max())
    assert not images.augment


def test_error_rate_counts_in_percent_and_leaves_the_model_in_training():
    class Fixed(torch.nn.Module):
        def forward(self, x):
            assert not self.training
            return torch.nn.functional.one_hot(x.flatten().long(), 10).float()

    labels = torch.arange(1200) % 10
    guesses = labels.clone()
    guesses[::8] = (guesses[::8] + 1) % 10
    model = Fixed()
    assert degradation.error_rate(model, guesses.view(-1, 1, 1, 1), labels) == 12.5
    assert model.training


def test_plain_and_shortcut_a_start_from_the_same_weights():
    states = []
    for shortcut in ("plain", "A"):
        torch.manual_seed(3)
        states.append(degradation.build(20, shortcut).state_dict())
    assert states[0].keys() == states[1].keys()
    assert all(torch.equal(states[0][key], states[1][key]) for key in states[0])


def test_deep_plain_network_trains_worse_than_the_residual_one():
    images = degradation.load_digits()
    settings = Settings("digits", 41, 32, PRESETS["digits"].learning_rate)
    errors = {s: degradation.train(44, s, images, settings)["train_error"] for s in ("plain", "A")}
    assert errors["plain"][0] > errors["A"][0] + 15


def test_small_run_writes_curves_picture_costs_and_environment(tmp_path, capsys):
    assert degradation.main([*SMALL, "--shortcuts", "plain", "A", "--seed", "1", "--out", str(tmp_path)]) == 0
    content = _read(tmp_path)
    preset = PRESETS["digits"]
    assert content["settings"] == asdict(Settings("digits", 84, preset.batch, preset.learning_rate, seed=1))
    assert [(n["depth"], n["shortcut"]) for n in content["networks"]] == [(8, "plain"), (8, "A")]
    for network in content["networks"]:
        assert network["parameters"] == 75_290 and network["multiply_adds"] > 3e6
        assert network["iterations"] == [41, 82, 84]
        assert len(network["train_error"]) == len(network["test_error"]) == 3
        assert all(0 <= e <= 100 for e in network["train_error"] + network["test_error"])
        assert network["train_error"][1] < network["train_error"][0] - 20
        assert network["environment"]["torch"] == torch.__version__ and network["seconds"] > 0
    assert _pixels(tmp_path / "degradation.png", BLUE) > 300
    assert {f.name for f in tmp_path.iterdir()} == {"degradation.json", "degradation.png"}
    out = capsys.readouterr().out
    assert re.search(r"^ +8 +A +75,290 ", out, re.M) and "ResNet-152" in out


def test_interrupted_run_keeps_what_is_finished_and_goes_on(tmp_path, monkeypatch, capsys):
    train, trained = degradation.train, []

    def train_two_then_stop(depth, shortcut, *rest):
        if len(trained) == 2:
            raise KeyboardInterrupt
        trained.append(shortcut)
        return train(depth, shortcut, *rest)

    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)  # a GPU's library may sum in another order each time
    monkeypatch.setattr(degradation, "imagenet_table", lambda: "")
    monkeypatch.setattr(degradation, "train", train_two_then_stop)
    options = ["--depths", "8", "--iterations", "2", "--out", str(tmp_path), "--shortcuts"]
    assert degradation.main([*options, "plain", "B", "C"]) == 130
    assert "run again to go on" in capsys.readouterr().out
    interrupted = _read(tmp_path)["networks"]
    assert [n["shortcut"] for n in interrupted] == ["plain", "B"] and (tmp_path / "degradation.png").exists()

    trained[:] = [""]
    assert degradation.main([*options, "C", "plain", "C"]) == 0
    assert trained == ["", "C"]
    assert "has 1 of these networks already, 1 are to be trained" in capsys.readouterr().out
    networks = _read(tmp_path)["networks"]
    assert networks[:2] == interrupted and networks[2]["shortcut"] == "C"
    # What comes after an interruption is what an undisturbed run would have had.
    settings = Settings(**_read(tmp_path)["settings"])
    assert train(8, "C", degradation.load_digits(), settings).items() <= networks[2].items()


def test_results_of_other_settings_or_no_results_are_left_alone(tmp_path, capsys):
    path = tmp_path / "degradation.json"
    content = {"settings": asdict(Settings("digits", 7, 32, 0.02)), "networks": []}
    for text, message in (
        (json.dumps(content), r"other settings: iterations 7 \(here 84\), seed 0 \(here 5\); name another folder"),
        ("{", "degradation.json is not a results file, and is left as it is"),
        ('{"settings": {}, "networks": [{}]}', "not a results file"),
    ):
        path.write_text(text)
        assert degradation.main([*SMALL, "--seed", "5", "--out", str(tmp_path)]) == 2
        assert re.search(message, capsys.readouterr().err)
        assert path.read_text() == text
    assert degradation.main([*SMALL, "--out", str(path)]) == 2
    assert "--out: " in capsys.readouterr().err


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--depths", "20", "21"], r"--depths: expected 6n \+ 2 \(8, 14, 20, .*\), got 21"),
        (["--depths", "2"], r"--depths: expected 6n \+ 2 .* got 2"),
        (["--shortcuts", "A", "D"], "--shortcuts: expected plain, A, B, C, got 'D'"),
        (["--data", "mnist"], "--data: expected digits or cifar10, got 'mnist'"),
        (["--iterations", "0"], "--iterations: expected a positive integer, got 0"),
        (["--epochs", "-1"], "--epochs: expected a positive integer, got -1"),
        (["--full", "--data", "digits"], "--full: is the paper's schedule on CIFAR-10, got --data digits"),
        (["--full"], "--folder: needed for CIFAR-10: a folder with .*data_batch_1, .*test_batch"),
        (["--data", "cifar10", "--folder", "nowhere"], "--folder: expected .*, in nowhere or nowhere/cifar-10-batches"),
    ],
)
def test_bad_options_are_named_before_anything_runs(arguments, message, tmp_path, capsys):
    assert degradation.main([*arguments, "--out", str(tmp_path / "out")]) == 2
    assert re.search(message, capsys.readouterr().err)
    assert not (tmp_path / "out").exists()


def test_epochs_and_iterations_exclude_each_other(capsys):
    with pytest.raises(SystemExit) as stop:
        degradation.main(["--epochs", "1", "--iterations", "1"])
    assert stop.value.code == 2 and "not allowed with argument" in capsys.readouterr().err


def _write_cifar10(folder, images_each=3):
    """Small python batches: images of one value each, 0, 1, 2, ..., and that value modulo 10 as the label."""
    import numpy as np

    folder.mkdir(parents=True)
    for index, name in enumerate(degradation._CIFAR_BATCHES):
        values = np.arange(index * images_each, (index + 1) * images_each, dtype=np.uint8)
        batch = {b"data": values[:, None].repeat(3072, 1), b"labels": (values % 10).tolist()}
        (folder / name).write_bytes(pickle.dumps(batch))


@pytest.mark.parametrize("inside", ["", "cifar-10-batches-py"])
def test_cifar10_is_read_from_its_python_batches(inside, tmp_path):
    _write_cifar10(tmp_path / "data" / inside)
    images = degradation.load_cifar10(tmp_path / "data")
    assert images.train.shape == (15, 3, 32, 32) and images.test.shape == (3, 3, 32, 32) and images.augment
    assert images.train_labels.tolist() == [i % 10 for i in range(15)] and images.test_labels.tolist() == [5, 6, 7]
    deviation = torch.arange(15.0).repeat_interleave(3072).std()  # of pixels with the mean 7
    torch.testing.assert_close(images.train[:, 0, 0, 0], (torch.arange(15.0) - 7) / deviation)
    torch.testing.assert_close(images.test[:, 2, 31, 31], (torch.arange(15.0, 18.0) - 7) / deviation)


def test_missing_and_damaged_batches_are_named(tmp_path, capsys):
    folder = tmp_path / "data"
    _write_cifar10(folder)
    options = ["--data", "cifar10", "--folder", str(folder), "--out", str(tmp_path / "out")]
    (folder / "data_batch_2").write_bytes(pickle.dumps({b"data": [[0.0] * 7], b"labels": [1]}))
    assert degradation.main(options) == 2
    assert re.search(r"--folder: .*data_batch_2 is no batch of CIFAR-10: ", capsys.readouterr().err)
    (folder / "data_batch_2").write_bytes(b"half a pick")
    assert degradation.main(options) == 2
    assert re.search(r"--folder: .*data_batch_2 is no batch of CIFAR-10: ", capsys.readouterr().err)
    (folder / "data_batch_4").unlink()
    assert degradation.main(options) == 2
    assert re.search(r"; missing: data_batch_4$", capsys.readouterr().err.strip())


def test_full_run_on_cifar10_trains_with_augmentation(tmp_path, monkeypatch):
    """The path of --full, on few images and for few iterations."""
    _write_cifar10(tmp_path / "data")
    crops = []
    crop = degradation.crop_and_flip
    monkeypatch.setattr(degradation, "crop_and_flip", lambda *a: crops.append(len(a[0])) or crop(*a))
    monkeypatch.setattr(degradation, "imagenet_table", lambda: "")
    options = ["--full", "--folder", str(tmp_path / "data"), "--depths", "8", "--epochs", "2", "--out", str(tmp_path)]
    assert degradation.main(options) == 0
    content = _read(tmp_path)
    assert content["settings"] == asdict(Settings("cifar10", 2, 128, 0.1))
    assert [n["shortcut"] for n in content["networks"]] == ["plain", "A"]
    assert content["networks"][0]["iterations"] == [1, 2] and crops == [15] * 4


def test_tables_show_cost_beside_the_papers_figures():
    rows = [re.split(r" {2,}", line.strip()) for line in degradation.imagenet_table().splitlines()]
    cost = {tuple(row[:2]): row[2:] for row in rows[1:-1]}
    assert len(cost) == 11
    assert cost["ResNet-34", "plain"][:2] == cost["ResNet-34", "A"][:2] == ["21,623,848", "3,644,493,824"]
    assert cost["ResNet-34", "plain"][2:] == ["3.6", "28.54"] and cost["ResNet-34", "A"][2:] == ["3.6", "25.03"]
    assert cost["bottleneck, 256 channels, 56x56", "identity"] == ["70,400", "218,365,952"]
    curves = {"train_error": [50.0, 4.0], "test_error": [60.0, 5.0], "multiply_adds": 40_551_040}
    networks = [{"depth": 20, "shortcut": s, "parameters": 269_722, **curves} for s in ("A", "plain")]
    _, plain, residual = (line.split() for line in degradation.results_table(networks).splitlines())
    assert plain == ["20", "plain", "269,722", "40,551,040", "4.00", "5.00"]
    assert residual == ["20", "A", "269,722", "0.27", "40,551,040", "4.00", "5.00", "8.75"]


def test_committed_result_is_that_of_the_default_run():
    content, preset = _read(RESULTS), PRESETS["digits"]
    assert content["settings"] == asdict(Settings("digits", preset.iterations, preset.batch, preset.learning_rate))
    errors = {(n["shortcut"], n["depth"]): n["train_error"][-1] for n in content["networks"]}
    assert set(errors) == {(s, d) for s in preset.shortcuts for d in preset.depths}
    plain = [errors["plain", depth] for depth in preset.depths]
    assert plain == sorted(plain) and plain[-1] > 20
    assert max(errors["A", depth] for depth in preset.depths) < 1
    assert min(_pixels(RESULTS / "degradation.png", color) for color in (BLUE, ORANGE)) > 300
